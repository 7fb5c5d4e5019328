"""The alpaca format: a row is an instruction, perhaps an input, a reply, and perhaps what was said before.

See `formats.py`. Source of the rules: LLaMA-Factory's documentation of its data formats.
"""

from typing import Any

from finetune_chatmodel_demo.conversation.formats_cells import (
    get_cell,
    message,
    need_cell,
    need_text,
    read_list,
    read_text,
    system_message,
)
from finetune_chatmodel_demo.conversation.json_files import RecordError
from finetune_chatmodel_demo.conversation.registry import DatasetEntry, describe


def convert_alpaca(row: dict[str, Any], entry: DatasetEntry, kind: str, where: str) -> dict[str, Any]:
    """The conversation of an alpaca row.

    Prompt and query are joined by one newline, without one where the query is blank. Every reply of the history is an
    assistant message like the last, so the loss counts on all of them.

    Args, returns and raises: see `formats.convert_row`.
    """
    columns = entry.columns
    messages = system_message(row, columns, where)
    for question, answer in _read_history(get_cell(row, columns.history), columns.history, where):
        messages += [message("user", question), message("assistant", answer)]
    prompt = need_text(row, "prompt", entry, where)
    query = read_text(get_cell(row, columns.query), columns.query, where)
    messages.append(message("user", f"{prompt}\n{query}" if query.strip() else prompt))
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
