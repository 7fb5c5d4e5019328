"""AdvertiseGen's `{"content", "summary"}` → `{"prompt", "response"}`, the input-output format.

`python data_processing/format_advertise_gen.py --path AdvertiseGen/train.json` → formatted_data/advertise_gen.jsonl
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the rooms are packages; this folder is not on the path

from collections.abc import Iterator
from typing import Any

from data_processing.converting import ConvertedRecords, parse_arguments, write_records
from finetune_chatmodel_demo.common.cli import run_program
from finetune_chatmodel_demo.conversation.records import validate_input_output


def convert(entry: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """One advertisement; its keywords are the prompt."""
    yield where, {"prompt": entry["content"], "response": entry["summary"]}


def main(arguments: list[str] | None = None) -> None:
    """Converts every line, and prints the counts."""
    options = parse_arguments(arguments, __doc__, "advertise_gen.jsonl")
    keys = ("content", "summary")
    records = ConvertedRecords(options.path, keys, convert, validate_input_output, options.on_bad_record)
    write_records(records, options.output)


if __name__ == "__main__":
    sys.exit(run_program(main, interrupted="interrupted: no output was written"))
