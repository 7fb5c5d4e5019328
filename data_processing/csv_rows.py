"""Reads a CSV row by row, with one row in memory, and says exactly what is wrong with a broken one.

What it adds to `table_rows.TableRows`: stripped cells, and ragged rows that stop or are counted.
"""

from collections.abc import Iterator
from pathlib import Path

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.table_rows import TableRows
from finetune_chatmodel_demo.conversation.text_files import SkipsBadRecords


def check_input(path: str | Path) -> Path:
    """Raises a UserError where `path` is not a readable, non-empty file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; name an input file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
    return path


class CsvRows(SkipsBadRecords):
    """An iterable of rows, each a dict from column name to the stripped cell text.

    Args:
        path: the CSV file, comma-separated, with a header line.
        on_bad_record: "error" raises at the first ragged row; "skip" counts it (`bad_count`).

    Attributes:
        columns: the header's names, in order; unnamed columns are left out.
        bytes_read: position in the file, for a progress bar.

    Raises:
        UserError: empty file, unknown encoding, no data rows, duplicate names in the header, ragged rows.
    """

    def __init__(self, path: str | Path, on_bad_record: str = "error") -> None:
        self.path = check_input(path)
        self.on_bad_record = on_bad_record
        self.forget_bad()
        self._file = TableRows(self.path)
        self.encoding = self._file.encoding
        self.columns = [name for name in self._file.header if name]

    @property
    def bytes_read(self) -> int:
        """See the class."""
        return self._file.bytes_read

    def __iter__(self) -> Iterator[dict[str, str]]:
        row = None
        for row in self._file.rows():
            if row.problem is None:
                yield {name: cell.strip() for name, cell in row.value.items()}
                continue
            message = f"{self.path} line {row.line}: {row.problem}"
            if self.on_bad_record == "error":
                raise UserError(f"{message}, or pass --on_bad_record skip")
            self.note_bad(message)
        if row is None:
            raise UserError(f"{self.path} has a header and no rows; add at least one row")
