"""Records of a data file: read lazily, validated one by one, every fault named with file, line and key.

Four kinds: `multi-turn`, `{"tools": [...]?, "conversations": [{"role", "content", "loss"?}, ...]}`; `input-output`,
`{"prompt", "response"}`; `preference`, a conversation without its last reply and the two replies `"chosen"` and
`"rejected"`; `text`, `{"text"}`. Other keys are ignored. Look at a file with `inspect_data.py`.
"""

import copy
import difflib
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from finetune_chatmodel_demo.conversation.json_files import JSONFile, Located, RecordError, SkipsBadRecords

__all__ = [
    "STAGE_KINDS",
    "RecordError",
    "RecordFile",
    "RecordSource",
    "read_records",
    "validate_conversation",
    "validate_input_output",
    "validate_preference",
    "validate_record",
    "validate_text",
]

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
OPTIONAL_KEYS = ("tools", "loss")
KNOWN_KEYS = frozenset(KEY_ALIASES) | frozenset(OPTIONAL_KEYS) | {"metadata", "column"}

logger = logging.getLogger(__name__)


def read_records(
    path: str | Path,
    kind: RecordKind = "multi-turn",
    on_bad_record: Literal["error", "skip"] = "error",
) -> "RecordFile":
    """Opens a data file for lazy, validated reading.

    Args:
        path: JSON array or JSON lines (pretty-printed or not) in UTF-8, UTF-8 with BOM or GBK.
        kind: Which keys a record has.
        on_bad_record: "error" raises at the first bad record, "skip" counts it and goes on.

    Raises:
        FileNotFoundError: There is no such file.
        RecordError: While iterating: a bad record (with "error"), no good record, an unreadable file.
    """
    if kind not in REQUIRED_KEYS:
        raise ValueError(f"kind {kind!r} is unknown; use {', '.join(REQUIRED_KEYS)}")
    if on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record {on_bad_record!r} is unknown; use error or skip")
    if not Path(path).is_file():
        raise FileNotFoundError(f"data file {path} does not exist or is not a file (current folder: {Path.cwd()})")
    return RecordFile(Path(path), kind, on_bad_record)


class RecordSource(SkipsBadRecords):
    """The validated records of one place. Iterate as often as needed; each pass reads it anew.

    A subclass yields what the place holds (`_read`), names places (`where`), and may turn a row into a record
    (`_convert`).

    Attributes:
        path: The file, or the name of what is no file.
        kind: What the records are.
        limit: How many good records are read at most; None: all.
    """

    limit: int | None = None

    def __init__(self, path: Path, kind: str, on_bad_record: str):
        self.path, self.kind, self.on_bad_record = path, kind, on_bad_record
        self.forget_bad()
        self._seen_keys: set[str] = set(KNOWN_KEYS)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for located in self.iterate_located():
            yield located.value

    def first(self, count: int) -> "RecordSource":
        """The same source up to its `count`-th good record; what comes after that is not read."""
        limited = copy.copy(self)
        limited.limit = count if self.limit is None else min(count, self.limit)
        return limited

    def iterate_located(self) -> Iterator[Located]:
        """Like iterating, with the number and the line of each record."""
        return itertools.islice(self._iterate(), self.limit)

    def _iterate(self) -> Iterator[Located]:
        self.forget_bad()
        good_count = 0
        for located in self._read():
            where = self.where(located.number, located.line)
            try:
                if located.problem is not None:
                    raise RecordError(f"{where}: {located.problem}")
                record = self._convert(located.value, where)
                validate_record(record, self.kind, where)
            except RecordError as error:
                if self.on_bad_record == "error":
                    raise
                self.note_bad(str(error))
                continue
            good_count += 1
            self._warn_of_near_misses(record, where)
            yield Located(located.number, located.line, record)
        if self.bad_count and not good_count:
            raise RecordError(f"all {self.bad_count} records of {self.path} are bad; the first: {self.bad_messages[0]}")
        if not good_count:
            raise RecordError(f"{self.path} is empty; expected {self._expected_rows()}")

    def where(self, number: int, line: int) -> str:
        """Names the place of a record."""
        raise NotImplementedError

    def _read(self) -> Iterator[Located]:
        raise NotImplementedError

    def _convert(self, row: Any, where: str) -> Any:
        return row

    def _expected_rows(self) -> str:
        return f"{RECORD_FORMS[self.kind]}, one a line or in an array"

    def _warn_of_near_misses(self, record: dict[str, Any], where: str) -> None:
        """An optional key that is misspelt would be ignored in silence: says so, once a key."""
        for key in set(record).union(*record.get("conversations", ())) - self._seen_keys:
            self._seen_keys.add(key)
            for meant in difflib.get_close_matches(key.lower(), OPTIONAL_KEYS, n=1, cutoff=0.8):
                logger.warning("%s: key %r is ignored; did you mean %r?", where, key, meant)


class RecordFile(RecordSource):
    """The validated records of one JSON file; see `RecordSource`."""

    def __init__(self, path: Path, kind: str, on_bad_record: str):
        super().__init__(path, kind, on_bad_record)
        self._json = JSONFile(path)

    def where(self, number: int, line: int) -> str:
        """Names the place of a record: by its line, in an array also by its number."""
        record = f"record {number} (line {line})" if self._json.is_array else f"line {line}"
        return f"{self.path} {record}"

    def fingerprint(self) -> str:
        """What the records follow from, beside the file's content."""
        return f"{type(self).__name__} {self.kind} {self.on_bad_record}"

    def _read(self) -> Iterator[Located]:
        return self._json.values(REQUIRED_KEYS[self.kind])


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
    if message.get("loss") not in (None, True, False):
        raise RecordError(f"{where}: 'loss' must be true or false, got {_shorten(message['loss'])}")
    if role == "assistant" and message.get("metadata") is not None:
        _require(message, "metadata", str, where)


def _require_object(value: Any, where: str, form: str) -> None:
    if not isinstance(value, dict):
        raise RecordError(f"{where}: expected an object {form}, got {_shorten(value)}")


def _require(owner: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """The value of a key, which must be there and of a kind; guesses which key was meant where it is not."""
    if key not in owner:
        found = [name for name in owner if isinstance(name, str)]
        aliases = [name for name in found if name.lower() in KEY_ALIASES.get(key, ())]
        near = aliases or difflib.get_close_matches(key, found, n=1)
        hint = f"; did you mean {key!r} where it says {near[0]!r}?" if near else ""
        raise RecordError(f"{where}: key {key!r} is missing; found {', '.join(map(repr, found)) or 'no keys'}{hint}")
    if not isinstance(owner[key], kind):
        raise RecordError(f"{where}: {key!r} must be {KIND_NAMES[kind]}, got {_shorten(owner[key])}")
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


def _shorten(value: Any) -> str:
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
