"""Reads a table (CSV, TSV or Excel) row by row and says exactly what is wrong with a broken one.

What it adds to `table_rows.TableRows`: stripped cells, ragged rows that stop or are counted, and cells that are hardly
what was meant: pandas wrote `nan` where it had no value, so that counts as empty; `None` and NUL bytes are named.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.table_rows import TableRows
from finetune_chatmodel_demo.conversation.text_files import SkipsBadRecords

logger = logging.getLogger(__name__)
# At the end of a cell (草、nan, 草nan), but not of a word (Conan).
NAN = re.compile(r"[\s、,，;；/|+]*(?<![A-Za-z0-9\u00c0-\u024f])(?:nan|NaN)$")
NO_VALUE = {"None", "NULL", "null", "<NA>", "NaT"}
NAN_CELLS = "end in 'nan', which pandas writes where it has no value: read as empty"
NO_VALUE_CELLS = "are None, null or the like: kept as text; empty them if they stand for no value"
NUL_CELLS = "hold NUL bytes: kept; the file may be damaged, or UTF-16 without a mark"


def check_input(path: str | Path) -> Path:
    """Raises a UserError where `path` is not a readable, non-empty file."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; name an input file")
    if not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; name an input file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
    return path


class CsvRows(SkipsBadRecords):
    """An iterable of rows, each a dict from column name to the stripped cell text.

    Args:
        path: .csv (separated by commas, semicolons or tabs), .tsv or .xlsx, with a header line.
        on_bad_record: "error" raises at the first ragged row; "skip" counts it (`bad_count`).

    Attributes:
        columns: the header's names, in order; unnamed columns are left out.
        odd_cells: what is odd → (how many cells, the place of the first); warned of at the end of the rows.
        bytes_read: position in the file, for a progress bar.

    Raises:
        UserError: empty file, unknown encoding, no data rows, duplicate names in the header, ragged rows.
    """

    def __init__(self, path: str | Path, on_bad_record: str = "error") -> None:
        self.path = check_input(path)
        self.on_bad_record = on_bad_record
        self.forget_bad()
        self.odd_cells: dict[str, tuple[int, str]] = {}
        self._file = TableRows(self.path)
        self.columns = self._file.columns

    @property
    def bytes_read(self) -> int:
        """See the class."""
        return self._file.bytes_read

    def __iter__(self) -> Iterator[dict[str, str]]:
        self.odd_cells.clear()
        try:
            yield from self._read()
        finally:
            for what, (count, first) in self.odd_cells.items():
                logger.warning("%s: %d cells %s (the first: %s)", self.path, count, what, first)

    def _read(self) -> Iterator[dict[str, str]]:
        row = None
        for row in self._file.rows():
            where = self._file.where(row.number, row.line)
            if row.problem is None:
                yield {name: self._clean(cell, f"{where}, column {name}") for name, cell in row.value.items()}
            elif self.on_bad_record == "error":
                raise UserError(f"{where}: {row.problem}, or pass --on_bad_record skip")
            else:
                self.note_bad(f"{where}: {row.problem}")
        if row is None:
            raise UserError(f"{self.path} has a header and no rows; add at least one row")

    def _clean(self, cell: str, where: str) -> str:
        cell = cell.strip()
        if cell.endswith(("nan", "NaN")) and (match := NAN.search(cell)):
            self._note_odd(NAN_CELLS, where)
            cell = cell[: match.start()]
        if cell in NO_VALUE:
            self._note_odd(NO_VALUE_CELLS, where)
        if "\0" in cell:
            self._note_odd(NUL_CELLS, where)
        return cell

    def _note_odd(self, what: str, where: str) -> None:
        count, first = self.odd_cells.get(what, (0, where))
        self.odd_cells[what] = (count + 1, first)
