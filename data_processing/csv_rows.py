"""Reads a CSV row by row, with one row in memory, and says exactly what is wrong with a broken one.

What it adds to `csv_files.CSVFile`: stripped cells, ragged rows that stop or are counted, and mistakes as DataErrors.
Exercised by `python data_processing/data_processing.py`.
"""

from collections.abc import Iterator
from pathlib import Path

from data_processing.common import DataError, find_input
from finetune_chatmodel_demo.conversation.csv_files import CSVFile
from finetune_chatmodel_demo.conversation.json_files import RecordError, SkipsBadRecords


class CsvRows(SkipsBadRecords):
    """An iterable of rows, each a dict from column name to the stripped cell text.

    Args:
        path: the CSV file, comma-separated, with a header line.
        on_bad_record: "error" raises at the first ragged row; "skip" counts it (`bad_count`).

    Attributes:
        columns: the header's names, in order; unnamed columns are left out.
        bytes_read: position in the file, for a progress bar.

    Raises:
        DataError: empty file, no data rows, duplicate names in the header, ragged rows.
        RecordError: unknown encoding.
    """

    def __init__(self, path: str | Path, on_bad_record: str = "error") -> None:
        self.path = find_input(path)
        self.on_bad_record = on_bad_record
        self.forget_bad()
        self._file = CSVFile(self.path)
        self.encoding = self._file.encoding
        try:
            self.columns = [name for name in self._file.header if name]
        except RecordError as error:
            raise DataError(str(error)) from None

    @property
    def bytes_read(self) -> int:
        """See the class."""
        return self._file.bytes_read

    def __iter__(self) -> Iterator[dict[str, str]]:
        is_empty = True
        try:
            for row in self._file.values():
                is_empty = False
                if row.problem is None:
                    yield {name: cell.strip() for name, cell in row.value.items()}
                else:
                    self._report_ragged(f"{self.path} line {row.line}: {row.problem}")
        except RecordError as error:
            raise DataError(str(error)) from None
        if is_empty:
            raise DataError(f"{self.path} has a header and no rows; add at least one row")

    def _report_ragged(self, message: str) -> None:
        if self.on_bad_record == "error":
            raise DataError(f"{message}, or pass --on_bad_record skip")
        self.note_bad(message)
