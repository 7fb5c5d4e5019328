"""Reads a CSV row by row, with one row in memory, and says where a broken one is.

Encodings: those of `json_files.detect_encoding`. `data_processing/data_processing.py` reads its rows through this, and
the registry its CSV data sets.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from finetune_chatmodel_demo.conversation.json_files import Located, RecordError, detect_encoding

CELL_LIMIT = 1 << 20
"""Characters. A longer cell is an unclosed quote that swallows the rest of the file."""


class CSVFile:
    """A comma-separated file with a header line. Cells are text, as they stand; lines of blank cells are no rows.

    Attributes:
        path: The file.
        bytes_read: Position in the file, for a progress bar.
    """

    def __init__(self, path: Path):
        self.path, self.bytes_read = path, 0

    @cached_property
    def encoding(self) -> str:
        """See `detect_encoding`."""
        return detect_encoding(self.path)

    @cached_property
    def header(self) -> list[str]:
        """The names of the columns, "" where one has none.

        Raises:
            RecordError: There is no header, or it names a column twice, or the file is separated by something else.
        """
        _, cells = next(self._lines(), (0, []))
        cells = [cell.strip() for cell in cells]
        if not cells:
            raise RecordError(f"{self.path} has no header: every line is blank")
        doubled = [name for name, count in Counter(cells).items() if name and count > 1]
        if doubled:
            places = {name: [i + 1 for i, cell in enumerate(cells) if cell == name] for name in doubled}
            raise RecordError(f"{self.path}: the header names columns twice: {places}; rename them")
        if len(cells) == 1 and any(mark in cells[0] for mark in "\t;|"):
            raise RecordError(f"{self.path}: the header is one cell, {cells[0]!r}; save it comma-separated")
        return cells

    def values(self) -> Iterator[Located]:
        """Yields the rows, each an object of the named columns; a row of another length as a problem.

        Raises:
            RecordError: As `header`, or a quote is not closed.
        """
        header, number = self.header, 0
        lines = self._lines()
        next(lines)
        for line, cells in lines:
            number += 1
            if len(cells) == len(header):
                yield Located(number, line, {name: cell for name, cell in zip(header, cells) if name})
                continue
            remedy = "quote cells that hold a comma" if len(cells) > len(header) else "add the missing commas"
            yield Located(
                number,
                line,
                None,
                f"{len(cells)} cells where the header has {len(header)} columns (it starts {','.join(cells)[:40]!r}); "
                f"{remedy}",
            )

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """(number of its first line in the file, cells) of every row that is not blank, the header included."""
        csv.field_size_limit(CELL_LIMIT)
        with open(self.path, encoding=self.encoding, newline="") as file:
            reader = csv.reader(file, strict=True)
            start = 1
            while True:
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise RecordError(
                        f"{self.path}: the row that starts at line {start} cannot be read ({error}); "
                        "look for a quote that is not closed, or double the quotes inside a cell"
                    ) from None
                self.bytes_read = file.buffer.tell()
                if any(cell.strip() for cell in cells):
                    yield start, cells
                start = reader.line_num + 1
