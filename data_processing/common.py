"""What every program in this folder needs: files written whole or not at all, one-line errors.

Exercised by `pytest tests/test_data_processing.py`.
"""

import argparse
import difflib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from finetune_chatmodel_demo.conversation.json_files import RecordError


class DataError(ValueError):
    """A mistake in a file or on the command line; the message says what, where, got and what to do."""


def run_entry(main: Callable[[], None]) -> None:
    """Runs `main`; a mistake in the data becomes one line on stderr and exit status 1, not a traceback."""
    try:
        main()
    except (DataError, RecordError, OSError) as error:
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


def parse_format_arguments(
    arguments: list[str] | None, description: str, output_name: str, on_bad_record: str = "error"
) -> argparse.Namespace:
    """The command line of every format_*.py: `--path`, `--output` (formatted_data/NAME) and `--on_bad_record`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, required=True, help="JSON array or JSON lines to read")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("formatted_data") / output_name,
        help="JSON lines to write (default: %(default)s under the current folder)",
    )
    parser.add_argument(
        "--on_bad_record",
        choices=("error", "skip"),
        default=on_bad_record,
        help="stop at the first bad record, or count it and go on (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    find_input(options.path)
    if options.output.resolve() == options.path.resolve():
        raise DataError(f"--output {options.output} is the file to read; name another output")
    return options


class Records(Protocol):
    """Records that are read one at a time, and what was skipped on the way."""

    bad_count: int
    bad_messages: list[str]

    def __iter__(self) -> Iterator[dict[str, Any]]: ...


def write_records(records: Records, output: Path) -> None:
    """Writes records as JSON lines, one at a time, and prints the counts; the file appears whole at the end.

    Raises:
        DataError: there is no record.
    """
    from tqdm import tqdm

    lengths: Counter[int] = Counter()
    with whole_files(output) as (file,):
        for record in tqdm(records, unit=" records", desc=output.name):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            lengths[len(record.get("conversations", ()))] += 1
        if not lengths:
            raise DataError(f"no good record for {output}; nothing was written")
    _print_report(records, lengths, output)


def _print_report(records: Records, lengths: Counter[int], output: Path) -> None:
    """The numbers that the original demo's scripts print, and what was wrong with the bad records."""
    for message in records.bad_messages:
        print(f"skipped: {message}", file=sys.stderr)
    if records.bad_count > len(records.bad_messages):
        print(f"skipped: and {records.bad_count - len(records.bad_messages)} more", file=sys.stderr)
    print(f"err_count: {records.bad_count}")
    print(f"train_examples: {lengths.total()}")
    if set(lengths) != {0}:  # how many records have how many messages; 0: they have no "conversations"
        print(f"conversation_distribution: {lengths}")
    print(f"→ {output}")
