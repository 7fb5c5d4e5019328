"""Reads a CSV row by row, with one row in memory, and says exactly what is wrong with a broken one.

Encodings: those of `json_files.detect_encoding`. Exercised by `python data_processing/data_processing.py`.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_processing.common import DataError, find_input
from finetune_chatmodel_demo.conversation.json_files import detect_encoding

CELL_LIMIT = 1 << 20
"""Characters. A longer cell is an unclosed quote that swallows the rest of the file."""


class CsvRows:
    """An iterable of rows, each a dict from column name to the stripped cell text.

    Args:
        path: the CSV file, comma-separated, with a header line.
        on_bad_record: "error" raises at the first ragged row; "skip" counts it.

    Attributes:
        columns: the header's names, in order; unnamed columns are left out.
        bad_count, bad_messages: ragged rows met so far under "skip" (the first 20 messages).
        bytes_read: position in the file, for a progress bar.

    Raises:
        DataError: empty file, no data rows, duplicate names in the header, ragged rows, unknown encoding.
    """

    def __init__(self, path: str | Path, on_bad_record: str = "error") -> None:
        self.path = find_input(path)
        self.on_bad_record = on_bad_record
        self.encoding = detect_encoding(self.path)
        self.bad_count = 0
        self.bad_messages: list[str] = []
        self.bytes_read = 0
        self._header: list[str] = []
        self._header = self._read_header()
        self.columns = [name for name in self._header if name]

    def __iter__(self) -> Iterator[dict[str, str]]:
        is_empty = True
        for line, cells in self._lines():
            if cells is self._header or not any(cells):
                continue
            is_empty = False
            if len(cells) == len(self._header):
                yield {name: cell for name, cell in zip(self._header, cells) if name}
            else:
                self._report_ragged(line, cells)
        if is_empty:
            raise DataError(f"{self.path} has a header and no rows; add at least one row")

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """(line number in the file, stripped cells); the first non-blank line is `self._header` itself."""
        csv.field_size_limit(CELL_LIMIT)
        header_seen = not self._header
        with self.path.open(encoding=self.encoding, newline="") as file:
            reader = csv.reader(file, strict=True)
            start = 1
            while True:
                try:
                    cells = [cell.strip() for cell in next(reader)]
                except StopIteration:
                    return
                except csv.Error as error:
                    raise DataError(
                        f"{self.path}: the row that starts at line {start} cannot be read ({error}); "
                        "look for a quote that is not closed, or double the quotes inside a cell"
                    ) from None
                self.bytes_read = file.buffer.tell()
                if not header_seen and any(cells):
                    header_seen, cells = True, self._header
                yield start, cells
                start = reader.line_num + 1

    def _read_header(self) -> list[str]:
        for _, cells in self._lines():
            if any(cells):
                break
        else:
            raise DataError(f"{self.path} has no header: every line is blank")
        doubled = [name for name, count in Counter(cells).items() if name and count > 1]
        if doubled:
            places = {name: [i + 1 for i, cell in enumerate(cells) if cell == name] for name in doubled}
            raise DataError(f"{self.path}: the header names columns twice: {places}; rename them")
        if len(cells) == 1 and any(mark in cells[0] for mark in "\t;|"):
            raise DataError(f"{self.path}: the header is one cell, {cells[0]!r}; save it comma-separated")
        return cells

    def _report_ragged(self, line: int, cells: list[str]) -> None:
        expected, got = len(self._header), len(cells)
        start = ",".join(cells)[:40]
        message = (
            f"{self.path} line {line}: {got} cells where the header has {expected} columns (it starts "
            f"{start!r}); {'quote cells that hold a comma' if got > expected else 'add the missing commas'}"
        )
        if self.on_bad_record == "error":
            raise DataError(f"{message}, or pass --on_bad_record skip")
        self.bad_count += 1
        if len(self.bad_messages) < 20:
            self.bad_messages.append(message)
