"""Reads data files as people have them: rows one by one, each with its number and the line that it starts in.

    reader = open_rows(path)                     # by the extension; anything unknown is JSON
    for located in reader.rows():                # again and again; bounded memory, whatever the file's size
        place = reader.where(located.number, located.line)
        located.problem or located.value         # what is wrong with this row, or its value

JSON arrays and JSON lines (`JSONRows`; pretty-printed objects too, whatever the extension says), tables with a header
(`TableRows`: .csv with commas, semicolons or tabs, .tsv, .xlsx; cells are text as they stand), parquet, and folders of
these. Text is UTF-8 with or without BOM, UTF-16 with BOM, or GBK. What makes a whole file unreadable is a `UserError`
with file, line, what and remedy; a bad row is a problem of its own, and the next row is read.
"""

import bisect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.json_rows import JSONRows
from finetune_chatmodel_demo.conversation.table_rows import TableRows
from finetune_chatmodel_demo.conversation.text_files import Located, RowReader

PARQUET_BATCH_ROWS = 512


class ParquetRows:
    """A parquet file, of which PARQUET_BATCH_ROWS rows are in memory at a time."""

    def __init__(self, path: Path, needed: frozenset[str] = frozenset()):
        self.path = path

    def rows(self) -> Iterator[Located]:
        """See `RowReader`. Lines are the numbers of rows."""
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        number = 0
        try:
            with ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                    for row in batch.to_pylist():
                        number += 1
                        yield Located(number, number, row)
        except ArrowException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.path} cannot be read as parquet behind row {number} ({reason})") from None

    def where(self, number: int, line: int) -> str:
        """See `RowReader`."""
        return f"{self.path} row {number}"


class FolderRows:
    """The files of a folder one after the other, in the order of their names; rows are numbered through."""

    def __init__(self, path: Path, readers: list[RowReader]):
        self.path, self.readers = path, readers
        self._starts: list[int] = []

    def rows(self) -> Iterator[Located]:
        """See `RowReader`."""
        self._starts, number = [], 0
        for reader in self.readers:
            self._starts.append(number)
            for located in reader.rows():
                number += 1
                yield replace(located, number=number)

    def where(self, number: int, line: int) -> str:
        """See `RowReader`."""
        index = bisect.bisect_left(self._starts, number) - 1
        return self.readers[index].where(number - self._starts[index], line)


READERS = {
    ".json": JSONRows,
    ".jsonl": JSONRows,
    ".csv": TableRows,
    ".tsv": TableRows,
    ".xlsx": TableRows,
    ".parquet": ParquetRows,
}
EXTENSIONS = "json, jsonl, csv, tsv, xlsx or parquet"


def open_rows(path: str | Path, needed: frozenset[str] = frozenset()) -> RowReader:
    """The reader of a file, by its extension; anything unknown is JSON.

    Args:
        path: The file.
        needed: Keys that every row has; they tell records of a broken JSON file apart.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist or is not a file (current folder: {Path.cwd()})")
    return READERS.get(path.suffix.lower(), JSONRows)(path, needed)
