"""One cell of a row: is it there, is it text, is it a list. Shared by the formats; see `formats.py`."""

import json
from typing import Any

from finetune_chatmodel_demo.conversation.json_files import RecordError
from finetune_chatmodel_demo.conversation.registry import Columns, DatasetEntry, describe


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
    return [] if value is None or value == "" else read_list(value, columns.tools, where)


def system_message(row: dict[str, Any], columns: Columns, where: str) -> list[dict[str, str]]:
    """The system prompt of a row as a list of one message; of none where the cell is blank."""
    text = read_text(get_cell(row, columns.system), columns.system, where)
    return [message("system", text)] if text.strip() else []


def message(role: str, content: str) -> dict[str, str]:
    """A canonical message."""
    return {"role": role, "content": content}
