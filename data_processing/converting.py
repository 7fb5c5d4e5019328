"""What the programs format_*.py share: a command line, records read one at a time, JSON lines written whole or not."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from data_processing.csv_rows import check_input
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import flag_path, whole_files
from finetune_chatmodel_demo.conversation.json_rows import JSONRows
from finetune_chatmodel_demo.conversation.records import RecordError
from finetune_chatmodel_demo.conversation.text_files import SkipsBadRecords


class ConvertedRecords(SkipsBadRecords):
    """Iterates over the converted records of one file, one entry in memory at a time.

    Args:
        path: JSON array or JSON lines.
        required_keys: keys that every entry must have.
        convert: (entry, where) → the entry's records, each with its own where; a RecordError in place of a record
            that cannot be made.
        validate: (record, where) raises a RecordError for a record that finetune.py would refuse.
        on_bad_record: "error" raises at the first bad record, "skip" counts it.
    """

    def __init__(
        self,
        path: Path,
        required_keys: tuple[str, ...],
        convert: Callable[[dict[str, Any], str], Iterator[tuple[str, dict[str, Any] | RecordError]]],
        validate: Callable[[Any, str], None],
        on_bad_record: str,
    ) -> None:
        self.path, self.required_keys = path, required_keys
        self.convert, self.validate = convert, validate
        self.on_bad_record = on_bad_record
        self.forget_bad()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for located in JSONRows(self.path, frozenset(self.required_keys)).rows():
            where = f"{self.path} record {located.number} (line {located.line})"
            problem = located.problem or self._missing(located.value)
            found = [(where, RecordError(f"{where}: {problem}"))] if problem else self.convert(located.value, where)
            for place, record in found:
                try:
                    if isinstance(record, RecordError):
                        raise record
                    self.validate(record, place)
                except RecordError as error:
                    if self.on_bad_record == "error":
                        raise
                    self.note_bad(str(error))
                else:
                    yield record

    def _missing(self, entry: Any) -> str | None:
        if not isinstance(entry, dict):
            return f"expected an object with {', '.join(self.required_keys)}, got {type(entry).__name__}"
        missing = [key for key in self.required_keys if key not in entry]
        return f"lacks {', '.join(missing)}; found {', '.join(map(repr, entry)) or 'no keys'}" if missing else None


def parse_arguments(
    arguments: list[str] | None, description: str, output_name: str, on_bad_record: str = "error"
) -> argparse.Namespace:
    """The command line of every format_*.py: `--path`, `--output` (formatted_data/NAME) and `--on_bad_record`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=flag_path, required=True, help="JSON array or JSON lines to read")
    parser.add_argument(
        "--output",
        type=flag_path,
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
    check_input(options.path)
    if options.output.resolve() == options.path.resolve():
        raise UserError(f"--output {options.output} is the file to read; name another output")
    return options


class Records(Protocol):
    """Records that are read one at a time, and what was skipped on the way."""

    bad_count: int
    bad_messages: list[str]

    def __iter__(self) -> Iterator[dict[str, Any]]: ...


def write_records(records: Records, output: Path) -> None:
    """Writes records as JSON lines, one at a time, and prints the counts of the original demo's scripts.

    Raises:
        UserError: there is no record; nothing is written then.
    """
    from tqdm import tqdm

    lengths: Counter[int] = Counter()
    with whole_files(output) as (file,):
        for record in tqdm(records, unit=" records", desc=output.name):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            lengths[len(record.get("conversations", ()))] += 1
        if not lengths:
            raise UserError(f"no good record for {output}; nothing was written")
    tell_skipped(records)
    print(f"err_count: {records.bad_count}")
    print(f"train_examples: {lengths.total()}")
    if set(lengths) != {0}:  # how many records have how many messages; 0: they have no "conversations"
        print(f"conversation_distribution: {lengths}")
    print(f"→ {output}")


def tell_skipped(records: Records) -> None:
    """Names what was skipped; of many, the first."""
    for message in records.bad_messages:
        print(f"skipped: {message}", file=sys.stderr)
    if records.bad_count > len(records.bad_messages):
        print(f"skipped: and {records.bad_count - len(records.bad_messages)} more", file=sys.stderr)
