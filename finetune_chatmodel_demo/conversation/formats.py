"""From a row as its author wrote it to the canonical record that `records.py` checks.

`convert_row` does it for both formats, alpaca and sharegpt, and for every kind of record. Nothing is guessed and
nothing is dropped: a row that does not hold what its entry in `dataset_info.json` says is an error that names the key.
Tested by `pytest tests/test_formats.py`; see the result with `inspect_data.py`.
"""

from typing import Any

from finetune_chatmodel_demo.conversation.formats_alpaca import convert_alpaca
from finetune_chatmodel_demo.conversation.formats_cells import need_text, read_tools
from finetune_chatmodel_demo.conversation.formats_sharegpt import convert_sharegpt
from finetune_chatmodel_demo.conversation.json_files import RecordError
from finetune_chatmodel_demo.conversation.registry import DatasetEntry, describe


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
    convert = convert_alpaca if entry.formatting == "alpaca" else convert_sharegpt
    record = convert(row, entry, kind, where)
    tools = read_tools(row, entry.columns, where)
    return {"tools": tools, **record} if tools else record


def needed_columns(entry: DatasetEntry) -> frozenset[str]:
    """The keys that every row has to have; the reader of a JSON file tells records apart by them."""
    column = entry.columns.messages if entry.formatting == "sharegpt" else entry.columns.prompt
    return frozenset([column] if column else [])
