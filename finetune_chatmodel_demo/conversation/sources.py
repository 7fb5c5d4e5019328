"""From an entry of the registry to its records: `open_dataset` finds the rows, wherever they are, and converts them.

Rows come from a file (`source_files.py`), from a hub (`source_hubs.py`) or from a script (`source_scripts.py`);
`formats.py` turns each into a canonical record, and `records.py` checks it. Tested by `pytest tests/test_sources.py`.
"""

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from finetune_chatmodel_demo.conversation.formats import convert_row, needed_columns
from finetune_chatmodel_demo.conversation.json_files import Located
from finetune_chatmodel_demo.conversation.records import RecordSource
from finetune_chatmodel_demo.conversation.registry import DatasetEntry, check_kind
from finetune_chatmodel_demo.conversation.source_files import RowReader, open_files
from finetune_chatmodel_demo.conversation.source_hubs import open_hub
from finetune_chatmodel_demo.conversation.source_scripts import open_script

# Columns that are None by default: a row that has one of this name would be read without it.
OPTIONAL_COLUMNS = ("history", "system", "tools", "chosen", "rejected")

logger = logging.getLogger(__name__)


def open_dataset(
    entry: DatasetEntry,
    dataset_dir: Path,
    kind: str,
    *,
    on_bad_record: Literal["error", "skip"] = "error",
    allow_dataset_scripts: bool = False,
    streaming: bool = False,
) -> "DatasetSource":
    """Opens a data set for lazy, validated reading.

    Args:
        entry: From `read_registry`.
        dataset_dir: The registry's folder, from which file_name and script_url count.
        kind: What the stage needs; see `records.STAGE_KINDS`.
        on_bad_record: "error" raises at the first bad row, "skip" counts it.
        allow_dataset_scripts: Whether the program that script_url names may run.
        streaming: Read a hub's data set while iterating, without downloading all of it first.

    Raises:
        RegistryError: The entry cannot give records of this kind, or its rows cannot be had.
    """
    check_kind(entry, kind)
    if entry.origin == "file":
        reader = open_files(entry, Path(dataset_dir), needed_columns(entry))
    elif entry.origin == "script":
        reader = open_script(entry, Path(dataset_dir), is_allowed=allow_dataset_scripts)
    else:
        reader = open_hub(entry, streaming=streaming)
    return DatasetSource(entry, reader, kind, on_bad_record)


class DatasetSource(RecordSource):
    """The records of one data set of the registry; see `RecordSource`.

    With `num_samples` these are its first so many good records; where it has fewer, it is read again from the start.
    """

    def __init__(self, entry: DatasetEntry, reader: RowReader, kind: str, on_bad_record: str):
        super().__init__(reader.path, kind, on_bad_record)
        self.entry, self.reader = entry, reader
        self._seen_columns: set[str] = set()

    def _iterate(self) -> Iterator[Located]:
        if self.entry.num_samples is None:
            yield from super()._iterate()
            return
        given, first_bad = 0, None
        for _ in itertools.count():
            for located in super()._iterate():
                given += 1
                yield located
                if given == self.entry.num_samples:
                    break
            # What is bad is counted once, however often the data set is read.
            first_bad = first_bad or (self.bad_count, self.bad_messages)
            self.bad_count, self.bad_messages = first_bad
            if given == self.entry.num_samples:
                return

    def where(self, number: int, line: int) -> str:
        """Names the place of a row."""
        return self.reader.where(number, line)

    def fingerprint(self) -> str:
        """What the records follow from, beside the file's content."""
        return f"{type(self).__name__} {self.kind} {self.on_bad_record} {type(self.reader).__name__} {self.entry}"

    def _read(self) -> Iterator[Located]:
        return self.reader.rows()

    def _convert(self, row: Any, where: str) -> dict[str, Any]:
        record = convert_row(row, self.entry, self.kind, where)
        self._warn_of_unused_columns(row, where)
        return record

    def _expected_rows(self) -> str:
        return f"rows of the data set {self.entry.name!r}"

    def _warn_of_unused_columns(self, row: dict[str, Any], where: str) -> None:
        """A column that is there and not used would be ignored in silence: says so, once a column."""
        columns = vars(self.entry.columns)
        if self.kind == "text":
            unused = [columns[role] for role in ("query", "response") if columns[role] != columns["prompt"]]
            remedy = f"stage pt reads {columns['prompt']!r} alone"
        else:
            unused = [name for name in OPTIONAL_COLUMNS if name not in columns.values()]
            remedy = f"list it in 'columns' of {self.entry.name!r} if it should be"
        for name in unused:
            if row.get(name) and name not in self._seen_columns:
                self._seen_columns.add(name)
                logger.warning("%s: column %r is not used; %s", where, name, remedy)
