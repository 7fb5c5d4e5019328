"""What a record has to be: every fault is named with its place, the key, what was expected and what was found.

Four kinds: `multi-turn`, `{"tools": [...]?, "conversations": [{"role", "content", "loss"?}, ...]}`; `input-output`,
`{"prompt", "response"}`; `preference`, a conversation without its last reply and the two replies `"chosen"` and
`"rejected"`; `text`, `{"text"}`. Other keys are ignored.
"""

import difflib
import json
from typing import Any, Literal

from finetune_chatmodel_demo.common.errors import UserError

# What each training stage reads.
STAGE_KINDS = {"pt": "text", "sft": "multi-turn", "ppo": "multi-turn", "rm": "preference", "dpo": "preference"}
RecordKind = Literal["multi-turn", "input-output", "preference", "text"]
ROLES = ("system", "user", "assistant", "tool", "observation")
REPLY_ROLES = ("assistant", "tool")
# What other data formats call our keys and roles; spelling mistakes are found by likeness instead.
KEY_ALIASES = {
    "conversations": ("messages", "dialogue", "dialog", "history", "chat", "turns"),
    "role": ("from", "speaker", "sender"),
    "content": ("value", "text", "message"),
    "prompt": ("instruction", "input", "question", "query", "source", "content"),
    "response": ("output", "answer", "reply", "completion", "target", "summary"),
    "name": ("tool", "function"),
    "parameters": ("arguments", "args", "params"),
    "observation": ("result", "output", "response"),
    "chosen": ("preferred", "accepted", "better", "win"),
    "rejected": ("dispreferred", "worse", "lose"),
    "text": ("content", "document", "body"),
}
ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
}
OPTIONAL_KEYS = ("tools", "loss", "weight", "history", "system")


class RecordError(UserError):
    """One record is bad; `--on_bad_record skip` counts it and goes on."""


def validate_record(record: Any, kind: str, where: str) -> None:
    """Checks a record of a kind. Errors are those of `validate_conversation`."""
    VALIDATORS[kind](record, where)


def validate_conversation(record: Any, where: str) -> None:
    """Checks a multi-turn record.

    Args:
        record: What the file held.
        where: Its place, for the message.

    Raises:
        RecordError: Says the place, the key, what was expected and what was found.
    """
    _require_object(record, where, RECORD_FORMS["multi-turn"])
    messages = _require(record, "conversations", list, where)
    if not messages:
        raise RecordError(f"{where}: 'conversations' is empty; expected at least one message")
    if record.get("tools") is not None:
        _require(record, "tools", list, where)
        _require_text(record["tools"], "tools", where)
    for index, message in enumerate(messages):
        _validate_message(message, f"{where}: conversations[{index}]")


def validate_input_output(record: Any, where: str) -> None:
    """Checks an input-output record. Arguments and errors are those of `validate_conversation`."""
    _require_object(record, where, RECORD_FORMS["input-output"])
    for key in ("prompt", "response"):
        _require_text(_require(record, key, str, where), key, where)


def validate_preference(record: Any, where: str) -> None:
    """Checks a preference record: a conversation that a reply is due to, and two different replies.

    The conversation ends with a user message, or with an observation (of its own, or of a `tool` message). A reply is
    an assistant message, or a call: a `tool` message, whose `observation` may be left out.

    Arguments and errors are those of `validate_conversation`.
    """
    _require_object(record, where, RECORD_FORMS["preference"])
    validate_conversation({key: record[key] for key in record if key not in ("chosen", "rejected")}, where)
    last = record["conversations"][-1]["role"]
    if last not in ("user", "observation", "tool"):
        raise RecordError(
            f"{where}: 'conversations' ends with role {last!r}; expected user or observation, since 'chosen' and "
            "'rejected' are what follows"
        )
    for key in ("chosen", "rejected"):
        reply = _require(record, key, dict, where)
        if reply.get("role") == "tool":
            reply = {"observation": "", **reply}
        _validate_message(reply, f"{where}: {key}")
        if reply["role"] not in REPLY_ROLES:
            raise RecordError(f"{where}: {key}: role {reply['role']!r} does not reply; use assistant or tool")
    if record["chosen"] == record["rejected"]:
        raise RecordError(f"{where}: 'chosen' and 'rejected' are the same; there is nothing to prefer")


def validate_text(record: Any, where: str) -> None:
    """Checks a document: `{"text": ...}`, not empty. Arguments and errors are those of `validate_conversation`."""
    _require_object(record, where, RECORD_FORMS["text"])
    text = _require(record, "text", str, where)
    if not text.strip():
        raise RecordError(f"{where}: 'text' is empty")
    _require_text(text, "text", where)


def _validate_message(message: Any, where: str) -> None:
    _require_object(message, where, '{"role": ..., "content": ...}')
    role = _require(message, "role", str, where)
    if role not in ROLES:
        meant = ROLE_ALIASES.get(role.lower()) or next(iter(difflib.get_close_matches(role.lower(), ROLES, n=1)), None)
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise RecordError(f"{where}: role {role!r} is unknown; use {', '.join(ROLES[:-1])} or {ROLES[-1]}{hint}")
    if role == "tool":
        _require_text(_require(message, "name", str, where), "name", where)
        _require_text(_require(message, "parameters", dict, where), "parameters", where)
        _require_text(_require(message, "observation", object, where), "observation", where)
    else:
        _require_text(_require(message, "content", str, where), "content", where)
    if role == "system" and message.get("tools") is not None:
        _require_text(_require(message, "tools", list, where), "tools", where)
    if message.get("loss") not in (None, True, False):
        raise RecordError(f"{where}: 'loss' must be true or false, got {shorten(message['loss'])}")
    if message.get("metadata") is not None:
        _require(message, "metadata", str, where)


def _require_object(value: Any, where: str, form: str) -> None:
    if not isinstance(value, dict):
        raise RecordError(f"{where}: expected an object {form}, got {shorten(value)}")


def _require(owner: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """The value of a key, which must be there and of a kind; guesses which key was meant where it is not."""
    if key not in owner:
        found = [name for name in owner if isinstance(name, str)]
        aliases = [name for name in found if name.lower() in KEY_ALIASES.get(key, ())]
        near = aliases or difflib.get_close_matches(key, found, n=1)
        hint = f"; did you mean {key!r} where it says {near[0]!r}?" if near else ""
        raise RecordError(f"{where}: key {key!r} is missing; found {', '.join(map(repr, found)) or 'no keys'}{hint}")
    if not isinstance(owner[key], kind):
        raise RecordError(f"{where}: {key!r} must be {KIND_NAMES[kind]}, got {shorten(owner[key])}")
    return owner[key]


def _require_text(value: Any, key: str, where: str) -> None:
    """Refuses half a surrogate pair (of an emoji that was cut): no tokenizer can encode it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"{text[error.start]!r} at character {error.start + 1}"
            raise RecordError(f"{where}: {key!r} holds {half}, half of a character; remove it") from None


def shorten(value: Any) -> str:
    """A value for a message: its kind and how it begins."""
    text = json.dumps(value, ensure_ascii=False)
    name = next((name for kind, name in KIND_NAMES.items() if isinstance(value, kind)), "null")
    return f"{name} {text[:60]}{'...' if len(text) > 60 else ''}" if value is not None else "null"


KIND_NAMES = {str: "a string", bool: "a boolean", list: "a list", dict: "an object", (int, float): "a number"}
REQUIRED_KEYS = {
    "multi-turn": frozenset({"conversations"}),
    "input-output": frozenset({"prompt", "response"}),
    "preference": frozenset({"conversations", "chosen", "rejected"}),
    "text": frozenset({"text"}),
}
RECORD_FORMS = {
    "multi-turn": '{"conversations": [{"role": ..., "content": ...}, ...]}',
    "input-output": '{"prompt": ..., "response": ...}',
    "preference": '{"conversations": [..., {"role": "user", "content": ...}], "chosen": {"role": "assistant", ...}, '
    '"rejected": {...}}',
    "text": '{"text": ...}',
}
VALIDATORS = {
    "multi-turn": validate_conversation,
    "input-output": validate_input_output,
    "preference": validate_preference,
    "text": validate_text,
}
