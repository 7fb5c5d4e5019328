"""Reads tables, .csv, .tsv and .xlsx; see `readers`.

Text goes through `csv` and not through pandas. `csv` is strict and knows lines; of pandas' readers, the C one drops the
quotes of a damaged cell and joins rows at a quote that is not closed, and the Python one leaves out a damaged row in
silence where rows of another length are to be counted. Workbooks go through pandas, whole.
"""

import csv
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TextIO

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.text_files import Located, detect_encoding

CELL_LIMIT = 1 << 20
"""Characters. A longer cell is an unclosed quote that swallows the rest of the file."""


UNREADABLE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    SyntaxError,
    EOFError,
    NotImplementedError,
    zlib.error,
    zipfile.BadZipFile,
)
"""What the libraries raise at a damaged workbook, in the archive, its XML or what the XML says."""


class TableRows:
    """A table with a header: .csv, .tsv or .xlsx. Cells are text, as they stand; rows of blank cells are no rows.

    Attributes:
        path: The file.
        bytes_read: Position in a text file, for a progress bar.
    """

    def __init__(self, path: Path, needed: frozenset[str] = frozenset()):
        self.path, self.bytes_read = path, 0

    @cached_property
    def encoding(self) -> str:
        """See `detect_encoding`."""
        return detect_encoding(self.path)

    @cached_property
    def header(self) -> list[str]:
        """The names of the columns, "" where one has none.

        Raises:
            UserError: There is no header, or it names a column twice.
        """
        cells = [cell.strip() for cell in next(self._lines(), (0, []))[1]]
        if not cells:
            raise UserError(f"{self.path} has no header: every line is blank")
        doubled = [name for name, count in Counter(cells).items() if name and count > 1]
        if doubled:
            places = {name: [i + 1 for i, cell in enumerate(cells) if cell == name] for name in doubled}
            raise UserError(f"{self.path}: the header names columns twice: {places}; rename them")
        return cells

    @property
    def columns(self) -> list[str]:
        """The named columns, in order."""
        return [name for name in self.header if name]

    def rows(self) -> Iterator[Located]:
        """See `RowReader`. A row is an object of the named columns; a row of another length is a problem.

        Raises:
            UserError: As `header`, or a quote is not closed.
        """
        header, lines = self.header, self._lines()
        next(lines)
        for number, (line, cells) in enumerate(lines, 1):
            if len(cells) == len(header):
                yield Located(number, line, {name: cell for name, cell in zip(header, cells) if name})
                continue
            remedy = "quote cells that hold the separator" if len(cells) > len(header) else "add the missing separators"
            yield Located(
                number,
                line,
                None,
                f"{len(cells)} cells where the header has {len(header)} columns (it starts {','.join(cells)[:40]!r}); "
                f"{remedy}",
            )

    def where(self, number: int, line: int) -> str:
        """See `RowReader`."""
        return f"{self.path} {'row' if self.path.suffix.lower() == '.xlsx' else 'line'} {line}"

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """(number of its first line in the file, cells) of every row that is not blank, the header included."""
        lines = self._excel_lines() if self.path.suffix.lower() == ".xlsx" else self._text_lines()
        return ((line, cells) for line, cells in lines if any(cell.strip() for cell in cells))

    def _excel_lines(self) -> Iterator[tuple[int, list[str]]]:
        """The rows of the first sheet."""
        import pandas

        try:
            sheet = pandas.read_excel(self.path, header=None, dtype=str, na_filter=False, engine="openpyxl")
        except UNREADABLE as error:
            raise UserError(f"{self.path} cannot be read as an Excel workbook ({error}); save it as .xlsx") from None
        for line, cells in enumerate(sheet.itertuples(index=False), 1):
            yield line, list(cells)

    def _text_lines(self) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(CELL_LIMIT)
        with open(self.path, encoding=self.encoding, newline="") as file:
            reader = csv.reader(file, strict=True, delimiter=self._find_separator(file))
            start = 1
            while True:
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    raise UserError(
                        f"{self.path}: the row that starts at line {start} cannot be read ({error}); "
                        "look for a quote that is not closed, or double the quotes inside a cell"
                    ) from None
                if cells is None:
                    return
                self.bytes_read = file.buffer.tell()
                yield start, cells
                start = reader.line_num + 1

    def _find_separator(self, file: TextIO) -> str:
        """The comma (in a .tsv the tab), or what separates the header where it has none; rewinds the file."""
        header = next((line for line in file if line.strip()), "")
        file.seek(0)
        expected = "\t" if self.path.suffix.lower() == ".tsv" else ","
        return expected if expected in header else max(expected, ";", "\t", key=header.count)
