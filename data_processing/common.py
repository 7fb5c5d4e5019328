"""What every program in this folder needs: encodings, streaming JSON in, whole files out, readable errors.

Exercised by `pytest tests/test_data_processing.py`.
"""

import codecs
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SCAN_BYTES = 1 << 20


class DataError(ValueError):
    """A mistake in a file or on the command line; the message says what, where, got and what to do."""


def run_entry(main: Callable[[], None]) -> None:
    """Runs `main`; a mistake in the data becomes one line on stderr and exit status 1, not a traceback."""
    try:
        main()
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: no output was written")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'X'?`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def find_input(path: str | Path) -> Path:
    """Raises a DataError where `path` is not a readable, non-empty file."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; name an input file")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes)")
    return path


def detect_encoding(path: Path) -> str:
    """Finds how a text file is encoded by reading all of it once, one MiB at a time.

    Returns:
        "utf-8-sig" (UTF-8 with or without BOM) or "gb18030" (a superset of GBK and GB2312).

    Raises:
        DataError: UTF-16, a binary file, or bytes that are neither.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in start:
        raise DataError(f"{path} is UTF-16 or binary (it starts with {start!r}); save it as UTF-8")
    failures = []
    for encoding in ("utf-8-sig", "gb18030"):
        place = _first_undecodable_line(path, encoding)
        if place is None:
            return encoding
        failures.append(f"not {encoding.removesuffix('-sig')} at line {place}")
    raise DataError(f"{path} has an unknown encoding ({', '.join(failures)}); save it as UTF-8")


def _first_undecodable_line(path: Path, encoding: str) -> int | None:
    """1-based number of the first line with a byte that `encoding` cannot read; None where all can be."""
    decoder = codecs.getincrementaldecoder(encoding)(errors="strict")
    lines_before = 0
    with path.open("rb") as file:
        while True:
            block = file.read(SCAN_BYTES)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return lines_before + error.object[: error.start].count(b"\n") + 1
            if not block:
                return None
            lines_before += block.count(b"\n")


@contextmanager
def whole_files(*paths: Path) -> Iterator[list[IO[str]]]:
    """Opens text files that appear under their names only when the block ends well, all of them or none.

    They are written beside their destination under a temporary name and renamed at the end. After an error or
    Ctrl-C the temporary files are gone and what stood there before is untouched.

    Raises:
        DataError: a destination is named twice or is not a regular file.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise DataError(f"two outputs have the same path {paths[0]}; give them different names")
    for path in paths:
        if path.exists() and not path.is_file():
            raise DataError(f"cannot write {path}: it is not a regular file; name an output file")
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    files: list[IO[str]] = []
    try:
        for path in temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.append(path.open("w", encoding="utf-8", newline="\n"))
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for source, path in zip(temporary, paths):
            source.replace(path)
    finally:
        for file in files:
            file.close()
        for path in temporary:
            path.unlink(missing_ok=True)


def write_json_line(file: IO[str], record: dict[str, Any]) -> None:
    """One record, one line, Chinese as it is."""
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


class JsonArrayWriter:
    """Writes a JSON array record by record; `close` writes its end (the file itself stays open)."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.count = 0
        self.file.write("[")

    def append(self, record: dict[str, Any]) -> None:
        self.file.write(",\n" if self.count else "\n")
        self.file.write(json.dumps(record, ensure_ascii=False))
        self.count += 1

    def close(self) -> None:
        self.file.write("\n]\n")
