"""The sharegpt format: a row is a list of messages, whose roles have the names that the entry's `tags` give them.

User or observation stand at odd places, assistant or function call at even ones, counted from 1 behind a system
message, which may stand first. See `formats.py`. Source of the rules: LLaMA-Factory's documentation of its formats.
"""

import json
from typing import Any

from finetune_chatmodel_demo.conversation.formats_cells import message, need_cell, read_list, system_message
from finetune_chatmodel_demo.conversation.json_files import RecordError
from finetune_chatmodel_demo.conversation.registry import DatasetEntry, Tags, describe


def convert_sharegpt(row: dict[str, Any], entry: DatasetEntry, kind: str, where: str) -> dict[str, Any]:
    """The conversation of a sharegpt row.

    A function call and the observation behind it become one `tool` message. A conversation that ends with a call gets
    an empty observation, so that the model learns to stop for it.

    Args, returns and raises: see `formats.convert_row`.
    """
    columns, tags = entry.columns, entry.tags
    given = read_list(need_cell(row, "messages", entry, where), columns.messages, where)
    system, turns = _split_system(given, tags, f"{where}: {columns.messages}")
    from_column = system_message(row, columns, where)
    if system and from_column and system != from_column:
        raise RecordError(
            f"{where}: two system prompts, in the column {columns.system!r} and in the first message; keep one"
        )
    reader = _Turns(turns, tags, f"{where}: {columns.messages}", first=len(given) - len(turns))
    record: dict[str, Any] = {"conversations": (system or from_column) + reader.read(is_open=kind == "preference")}
    if kind == "preference":
        for key in ("chosen", "rejected"):
            place = f"{where}: {getattr(columns, key)}"
            record[key] = convert_reply(need_cell(row, key, entry, where), tags, place)
    return record


def convert_reply(value: Any, tags: Tags, where: str) -> dict[str, Any]:
    """A reply of a pair: a text, a message of the assistant's or a function call, or a list of one of these."""
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise RecordError(
                f"{where}: expected one reply, got a list of {len(value)}; the messages that both replies follow "
                "belong into the column of messages"
            )
        value = value[0]
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _parse_message(value, tags)
    if isinstance(value, str):
        if not value.strip():
            raise RecordError(f"{where} is empty; a reply needs text")
        return message("assistant", value)
    role, content = _read_message(value, tags, where)
    if role == tags.function_tag:
        return {"role": "tool", **read_call(content, where)}
    if role != tags.assistant_tag:
        raise RecordError(f"{where}: expected {tags.assistant_tag!r} or {tags.function_tag!r}, got {role!r}")
    return _with_loss(message("assistant", _need_content(content, role, where)), value)


class _Turns:
    """The messages of one conversation behind its system prompt."""

    def __init__(self, turns: list[Any], tags: Tags, where: str, first: int):
        self.turns, self.tags, self.where, self.first = turns, tags, where, first
        self.expected = ((tags.user_tag, tags.observation_tag), (tags.assistant_tag, tags.function_tag))

    def read(self, is_open: bool) -> list[dict[str, Any]]:
        """The canonical messages. `is_open`: the conversation ends where a reply is due, else with a reply."""
        messages: list[dict[str, Any]] = []
        call: dict[str, Any] | None = None
        for index, turn in enumerate(self.turns):
            place = f"{self.where}[{self.first + index}]"
            role, content = _read_message(turn, self.tags, place)
            self._check_order(index, role, call is not None, place)
            if call is not None:
                call["observation"] = content
                call = None
            elif role == self.tags.function_tag:
                call = _with_loss({"role": "tool", **read_call(content, place), "observation": ""}, turn)
                messages.append(call)
            else:
                text = _need_content(content, role, place)
                messages.append(_with_loss(message(self._canonical(role), text), turn))
        self._check_end(is_open)
        return messages

    def _check_order(self, index: int, role: str, is_due: bool, place: str) -> None:
        known = (self.tags.system_tag, *self.expected[0], *self.expected[1])
        if role not in known:
            raise RecordError(
                f"{place}: role {role!r} is unknown; this data set has {', '.join(known)}. If others are meant, name "
                "them in 'tags' of its entry"
            )
        expected = (self.tags.observation_tag,) if is_due else self.expected[index % 2]
        if role not in expected:
            parity = "odd" if index % 2 == 0 else "even"
            rule = f" behind {self.tags.function_tag!r}" if is_due else f" at the {parity} place {index + 1}"
            raise RecordError(f"{place}: expected {' or '.join(map(repr, expected))}{rule}, got {role!r}")

    def _check_end(self, is_open: bool) -> None:
        if not self.turns:
            raise RecordError(f"{self.where}: there is no message (of {self.tags.user_tag!r})")
        if len(self.turns) % 2 == is_open:
            return
        last = self.turns[-1][self.tags.role_tag]
        due = self.expected[not is_open]
        raise RecordError(
            f"{self.where}: the conversation ends with {last!r} at place {len(self.turns)}; expected "
            f"{' or '.join(map(repr, due))} at its end" + (", for 'chosen' and 'rejected' to follow" if is_open else "")
        )

    def _canonical(self, role: str) -> str:
        tags = self.tags
        return {tags.user_tag: "user", tags.assistant_tag: "assistant", tags.observation_tag: "observation"}[role]


def read_call(content: Any, where: str) -> dict[str, Any]:
    """A function call, `{"name", "arguments"}` or JSON text of it, as `{"name", "parameters"}`."""
    form = 'a call {"name": ..., "arguments": {...}}'
    call = _from_json(content, form, where)
    if isinstance(call, list) and len(call) == 1:
        call = call[0]
    if isinstance(call, list):
        raise RecordError(f"{where}: {len(call)} calls in one message; ChatGLM3 makes one at a time, give each its own")
    if not isinstance(call, dict):
        raise RecordError(f"{where}: expected {form}, got {describe(content)}")
    for key in ("name", "arguments"):
        if key not in call:
            raise RecordError(f"{where}: key {key!r} is missing in the call {describe(content)}; expected {form}")
    arguments = _from_json(call["arguments"], "'arguments', an object", where)
    if not isinstance(call["name"], str) or not call["name"] or not isinstance(arguments, dict):
        raise RecordError(f"{where}: expected {form} with a text and an object, got {describe(content)}")
    return {"name": call["name"], "parameters": arguments}


def _from_json(value: Any, form: str, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{where}: expected {form} as JSON, got {describe(value)} ({error.msg} at character {error.pos + 1})"
        ) from None


def _parse_message(text: str, tags: Tags) -> Any:
    """The message that a cell of a CSV holds as JSON; the text itself where it is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, dict) and {tags.role_tag, tags.content_tag} <= value.keys() else text


def _split_system(given: list[Any], tags: Tags, where: str) -> tuple[list[dict[str, str]], list[Any]]:
    """The system message that may stand first, and the rest."""
    if given and isinstance(given[0], dict) and given[0].get(tags.role_tag) == tags.system_tag:
        role, content = _read_message(given[0], tags, f"{where}[0]")
        return [message("system", _need_content(content, role, f"{where}[0]"))], given[1:]
    return [], given


def _read_message(value: Any, tags: Tags, where: str) -> tuple[str, Any]:
    """Role and content of a message, the content as it stands."""
    if not isinstance(value, dict):
        form = f'{{"{tags.role_tag}": ..., "{tags.content_tag}": ...}}'
        raise RecordError(f"{where}: expected a message {form}, got {describe(value)}")
    for tag, key in (("role_tag", tags.role_tag), ("content_tag", tags.content_tag)):
        if value.get(key) is None:
            raise RecordError(
                f"{where}: key {key!r} is missing; found {', '.join(map(repr, value)) or 'no keys'}. If one of them is "
                f"meant, name it as {tag!r} in 'tags' of the entry"
            )
    if not isinstance(value[tags.role_tag], str):
        raise RecordError(f"{where}: {tags.role_tag!r} must be a text, got {describe(value[tags.role_tag])}")
    return value[tags.role_tag], value[tags.content_tag]


def _need_content(content: Any, role: str, where: str) -> str:
    if not isinstance(content, str):
        raise RecordError(f"{where}: the content of {role!r} must be a text, got {describe(content)}")
    if not content.strip():
        raise RecordError(f"{where}: the content of {role!r} is empty; a message needs text")
    return content


def _with_loss(canonical: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`loss` of a message is this project's own key, and holds in every format."""
    return canonical if given.get("loss") is None else {**canonical, "loss": given["loss"]}
