"""From a row as its author wrote it to the canonical record that `validation.py` checks.

`convert_row` does it for both formats, alpaca and sharegpt, and for every kind of record. Nothing is guessed and
nothing is dropped: a row that does not hold what its entry in `dataset_info.json` says is an error that names the key.
Source of the rules: LLaMA-Factory's documentation of its data formats. See the result with `inspect_data.py`.
"""

import json
from typing import Any

from finetune_chatmodel_demo.conversation.file_formats import read_content, read_loss, read_record
from finetune_chatmodel_demo.conversation.registry import Columns, DatasetEntry, Tags, describe
from finetune_chatmodel_demo.conversation.validation import RecordError


def convert_row(row: Any, entry: DatasetEntry, kind: str, where: str) -> dict[str, Any]:
    """Turns one row into a canonical record.

    Args:
        row: An object whose keys are the entry's columns.
        entry: The data set. Its `kinds` include `kind`.
        kind: "multi-turn", "preference" or "text".
        where: The row's place, for messages.

    Returns:
        "multi-turn": `{"tools"?, "conversations"}`; "preference": `{"tools"?, "conversations", "chosen", "rejected"}`;
        "text": `{"text"}`, the prompt column alone.

    Raises:
        RecordError: Says the place, the column, what was expected and what was found.
    """
    if not isinstance(row, dict):
        raise RecordError(f"{where}: expected an object with the columns of {entry.name!r}, got {describe(row)}")
    if kind == "text":
        return {"text": need_text(row, "prompt", entry, where)}
    if entry.formatting == "openai":
        return convert_openai(row, entry, kind, where)
    convert = convert_alpaca if entry.formatting == "alpaca" else convert_sharegpt
    record = convert(row, entry, kind, where)
    tools = read_tools(row, entry.columns, where)
    return {"tools": tools, **record} if tools else record


def needed_columns(entry: DatasetEntry) -> frozenset[str]:
    """The keys that every row has to have; the reader of a JSON file tells records apart by them."""
    column = entry.columns.messages if entry.formatting == "sharegpt" else entry.columns.prompt
    return frozenset([column] if column else [])


def convert_openai(row: dict[str, Any], entry: DatasetEntry, kind: str, where: str) -> dict[str, Any]:
    """The conversation of a row of OpenAI messages, as `file_formats` reads it from a file.

    Args, returns and raises: see `convert_row`.
    """
    columns, tags = entry.columns, entry.tags
    words = {"user": tags.user_tag, "assistant": tags.assistant_tag, "system": tags.system_tag}
    roles = {written: role for role, written in words.items()}

    def rename(message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        kept = {key: message[key] for key in message if key not in (tags.role_tag, tags.content_tag)}
        role = message.get(tags.role_tag)
        kept["role"] = roles.get(role, role) if isinstance(role, str) else role
        return kept | {"content": message.get(tags.content_tag)}

    given = {
        "messages": [
            rename(each) for each in read_list(need_cell(row, "messages", entry, where), columns.messages, where)
        ]
    }
    for key in ("system", "tools", "chosen", "rejected"):
        cell = get_cell(row, getattr(columns, key))
        if cell is not None:
            given[key] = [rename(each) for each in cell] if isinstance(cell, list) and key != "tools" else cell
    return read_record(given, kind, where)


def convert_alpaca(row: dict[str, Any], entry: DatasetEntry, kind: str, where: str) -> dict[str, Any]:
    """The conversation of an alpaca row.

    Prompt and query are joined by one newline, without one where the query is blank. Every reply of the history is an
    assistant message like the last, so the loss counts on all of them.

    Args, returns and raises: see `convert_row`.
    """
    columns = entry.columns
    messages = system_message(row, columns, where)
    for question, answer in _read_history(get_cell(row, columns.history), columns.history, where):
        messages += [message("user", question), message("assistant", answer)]
    query = read_text(get_cell(row, columns.query), columns.query, where)
    prompt = get_cell(row, columns.prompt) if query.strip() else None
    if not isinstance(prompt, str) or prompt.strip():
        prompt = need_text(row, "prompt", entry, where)
    messages.append(message("user", "\n".join(text for text in (prompt, query) if text.strip())))
    if kind == "multi-turn":
        return {"conversations": [*messages, message("assistant", need_text(row, "response", entry, where))]}
    chosen, rejected = _read_pair(row, entry, where)
    return {
        "conversations": messages,
        "chosen": message("assistant", chosen),
        "rejected": message("assistant", rejected),
    }


def _read_pair(row: dict[str, Any], entry: DatasetEntry, where: str) -> tuple[str, str]:
    """The better and the worse reply: of two columns where the entry names them, else of a list of two."""
    columns = entry.columns
    if columns.chosen or columns.rejected:
        return need_text(row, "chosen", entry, where), need_text(row, "rejected", entry, where)
    if columns.response not in row and {"chosen", "rejected"} <= row.keys():
        raise RecordError(
            f"{where}: the pair is not in {columns.response!r}; to read the columns 'chosen' and 'rejected', list both "
            f"in 'columns' of {entry.name!r} in {entry.registry}"
        )
    pair = read_list(need_cell(row, "response", entry, where), columns.response, where)
    if len(pair) != 2:
        raise RecordError(
            f"{where}: {columns.response!r} must be a list of two replies, the better one first, got {len(pair)}"
        )
    texts = [read_text(reply, f"{columns.response}[{index}]", where) for index, reply in enumerate(pair)]
    for index, text in enumerate(texts):
        if not text.strip():
            raise RecordError(f"{where}: '{columns.response}[{index}]' is empty; a reply needs text")
    return texts[0], texts[1]


def _read_history(value: Any, column: str | None, where: str) -> list[tuple[str, str]]:
    """Pairs of instruction and reply; none where the cell is blank."""
    if value is None or value == "":
        return []
    pairs = []
    for index, pair in enumerate(read_list(value, column, where)):
        place = f"{column}[{index}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RecordError(f"{where}: {place!r} must be a list [instruction, reply], got {describe(pair)}")
        question, answer = (read_text(part, f"{place}[{position}]", where) for position, part in enumerate(pair))
        if not question.strip() or not answer.strip():
            empty = "reply" if question.strip() else "instruction"
            raise RecordError(f"{where}: {place!r} has an empty {empty}; fill it in, or leave the whole turn out")
        pairs.append((question, answer))
    return pairs


def convert_sharegpt(row: dict[str, Any], entry: DatasetEntry, kind: str, where: str) -> dict[str, Any]:
    """The conversation of a sharegpt row.

    A function call and the observation behind it become one `tool` message. A conversation that ends with a call gets
    an empty observation, so that the model learns to stop for it.

    Args, returns and raises: see `convert_row`.
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
    return _with_loss(message("assistant", _need_content(content, role, where)), value, where)


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
                call = _with_loss({"role": "tool", **read_call(content, place), "observation": ""}, turn, place)
                messages.append(call)
            else:
                text = _need_content(content, role, place)
                messages.append(_with_loss(message(self._canonical(role), text), turn, place))
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
    content = read_content(content, where)
    if not isinstance(content, str):
        raise RecordError(f"{where}: the content of {role!r} must be a text, got {describe(content)}")
    if not content.strip():
        raise RecordError(f"{where}: the content of {role!r} is empty; a message needs text")
    return content


def _with_loss(canonical: dict[str, Any], given: dict[str, Any], where: str) -> dict[str, Any]:
    """`loss` of a message is this project's own key, and holds in every format."""
    loss = read_loss(given, where)
    return canonical if loss is None else {**canonical, "loss": loss}


def get_cell(row: dict[str, Any], column: str | None) -> Any:
    """The cell of a column, None where the row or the whole data set has none."""
    return None if column is None else row.get(column)


def need_cell(row: dict[str, Any], role: str, entry: DatasetEntry, where: str) -> Any:
    """The cell that plays a role (a key of `columns`), which must be there.

    Raises:
        RecordError: The entry names no such column, or the row lacks it; says what the row has instead.
    """
    column = getattr(entry.columns, role)
    if column is None:
        raise RecordError(
            f"{where}: 'columns.{role}' is not set for {entry.name!r} in {entry.registry}; name the column"
        )
    if row.get(column) is None:
        state = "is missing" if column not in row else "is null"
        found = ", ".join(map(repr, row)) or "no columns"
        raise RecordError(
            f"{where}: column {column!r} {state}; found {found}. If one of them is meant, name it in 'columns.{role}' "
            f"of {entry.name!r} in {entry.registry}"
        )
    return row[column]


def need_text(row: dict[str, Any], role: str, entry: DatasetEntry, where: str) -> str:
    """The text of the cell that plays a role, which must be there and not be empty."""
    column = getattr(entry.columns, role)
    text = read_text(need_cell(row, role, entry, where), column, where)
    if not text.strip():
        raise RecordError(f"{where}: {column!r} is empty; a {'prompt' if role == 'prompt' else 'reply'} needs text")
    return text


def read_text(value: Any, column: str | None, where: str) -> str:
    """The text of a cell, "" for null. Nothing is converted: 0.70 as a number would become 0.7."""
    if value is not None and not isinstance(value, str):
        raise RecordError(f"{where}: {column!r} must be a text, got {describe(value)}")
    return value or ""


def read_list(value: Any, column: str | None, where: str) -> list[Any]:
    """A list that is given as such, or as JSON text (a cell of a CSV holds nothing else)."""
    given = value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RecordError(
                f"{where}: {column!r} must be a list or JSON text of one, got {describe(given)} ({error.msg} at "
                f"character {error.pos + 1})"
            ) from None
    if not isinstance(value, list | tuple):
        raise RecordError(f"{where}: {column!r} must be a list, got {describe(given)}")
    return list(value)


def read_tools(row: dict[str, Any], columns: Columns, where: str) -> list[Any]:
    """The tools of a row: a list, or JSON text of one; empty where there are none."""
    value = get_cell(row, columns.tools)
    return [] if not value else read_list(value, columns.tools, where)


def system_message(row: dict[str, Any], columns: Columns, where: str) -> list[dict[str, str]]:
    """The system prompt of a row as a list of one message; of none where the cell is blank."""
    text = read_text(get_cell(row, columns.system), columns.system, where)
    return [message("system", text)] if text.strip() else []


def message(role: str, content: str) -> dict[str, str]:
    """A canonical message."""
    return {"role": role, "content": content}
