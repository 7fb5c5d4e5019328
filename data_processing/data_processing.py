"""Turns a table into role-tagged conversations, row by row: `python data_processing/data_processing.py`.

Reads data.csv and templates/pokemon.yaml beside this file and writes pokemon_conversations.json for training and
pokemon_conversations_validation.json, in phrasings that training never shows. Next: format_tool_poke.py.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the rooms are packages; this folder is not on the path

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from finetune_chatmodel_demo.common.cli import run_program
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import flag_path, whole_files

if TYPE_CHECKING:
    from data_processing.csv_rows import CsvRows
    from data_processing.template import Template

HERE = Path(__file__).resolve().parent


class JsonArrayWriter:
    """Writes a JSON array record by record; `close` writes its end (the file itself stays open)."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.separator = file, "[\n"

    def extend(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            self.file.write(self.separator + json.dumps(record, ensure_ascii=False))
            self.separator = ",\n"

    def close(self) -> None:
        self.file.write("\n]\n")


@dataclass
class Summary:
    """What one run read and wrote. `conversations` and `turns` (question-answer pairs) count per split."""

    rows_read: int = 0
    rows_filtered: int = 0
    rows_too_empty: int = 0
    rows_bad: int = 0
    rows_held_out: int = 0
    conversations: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)

    def add(self, split: str, records: list[dict[str, Any]]) -> None:
        """Counts what one row gave."""
        self.conversations[split] += len(records)
        self.turns[split] += sum(m["role"] == "user" for record in records for m in record["conversations"])

    @property
    def rows_kept(self) -> int:
        return self.rows_read - self.rows_filtered - self.rows_too_empty - self.rows_held_out

    def __str__(self) -> str:
        left_out = f"filtered by `where`: {self.rows_filtered}, too few filled cells: {self.rows_too_empty}"
        if self.rows_held_out:
            left_out += f", held out: {self.rows_held_out}"
        lines = [f"rows read: {self.rows_read}, kept: {self.rows_kept}, {left_out}, bad: {self.rows_bad}"]
        for split, count in self.conversations.items():
            lines.append(f"{split}: {count} conversations, {self.turns[split]} turns")
        return "\n".join(lines)


def convert(
    rows: "CsvRows",
    template: "Template",
    outputs: dict[str, Path],
    *,
    seed: int = 42,
    limit: int | None = None,
    hold_out: float = 0.0,
    progress: bool = False,
) -> Summary:
    """Writes the conversations of every row, with one row in memory at a time.

    Args:
        outputs: split ("train", "validation") → JSON file; all appear whole at the end, or none.
        limit: stop after this many kept rows.
        hold_out: share of the rows to leave out (`holding_out.is_held_out`).

    Raises:
        UserError: anything wrong with the CSV, the template or the paths; nothing is written then.
    """
    from data_processing.conversation_builder import build_conversations
    from data_processing.holding_out import check_share, is_held_out, subject_name
    from data_processing.template_reader import check_columns

    check_share(hold_out)
    check_columns(template, rows.columns, rows.path)
    for path in outputs.values():
        if path.resolve() in (rows.path.resolve(), template.path.resolve()):
            raise UserError(f"the output {path} is also an input; name another output")
    summary = Summary()
    with whole_files(*outputs.values()) as files:
        writers = {split: JsonArrayWriter(file) for split, file in zip(outputs, files)}
        for row in _with_progress(rows, progress):
            if limit is not None and summary.rows_kept >= limit:
                break
            summary.rows_read += 1
            if not template.matches(row):
                summary.rows_filtered += 1
                continue
            if is_held_out(subject_name(template, row), hold_out):
                summary.rows_held_out += 1
                continue
            records = {split: build_conversations(template, row, split, seed) for split in outputs}
            summary.rows_too_empty += not records["train"]
            for split, found in records.items():
                summary.add(split, found)
                writers[split].extend(found)
        for writer in writers.values():
            writer.close()
        summary.rows_bad = rows.bad_count
        if not summary.conversations["train"]:
            reason = f"no row of {rows.path} gave a conversation ({summary})"
            raise UserError(f"{reason}; check `where` and `turns` in {template.path}")
    return summary


def _with_progress(rows: "CsvRows", is_shown: bool) -> Iterator[dict[str, str]]:
    """The rows, with a bar that counts the bytes of the file."""
    from tqdm import tqdm

    size = rows.path.stat().st_size
    with tqdm(total=size, unit="B", unit_scale=True, desc=rows.path.name, disable=not is_shown) as bar:
        for row in rows:
            yield row
            bar.update(rows.bytes_read - bar.n)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        type=flag_path,
        default=HERE / "data.csv",
        help="a table with a header: CSV, TSV, .xlsx (default: %(default)s)",
    )
    parser.add_argument(
        "--template",
        type=flag_path,
        default=HERE / "templates" / "pokemon.yaml",
        help="which turns a row becomes (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=flag_path,
        default=HERE / "pokemon_conversations.json",
        help="JSON array of training conversations (default: %(default)s)",
    )
    parser.add_argument(
        "--validation_output",
        type=flag_path,
        help="conversations in phrasings never trained on (default: beside OUTPUT, named …_validation)",
    )
    parser.add_argument("--seed", type=int, default=42, help="draws turns and wordings (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="stop after this many kept rows")
    parser.add_argument(
        "--hold_out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave this share of the rows out, for `evaluate.py --csv … --hold_out SHARE` to ask about (default: 0)",
    )
    parser.add_argument(
        "--on_bad_record",
        choices=("error", "skip"),
        default="error",
        help="what a row with too many or too few cells does (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit {options.limit}: expected 1 or more")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Converts, and prints what was read and written."""
    options = parse_arguments(arguments)
    from data_processing.converting import tell_skipped
    from data_processing.csv_rows import CsvRows
    from data_processing.template_reader import load_template

    template = load_template(options.template)
    outputs = {"train": options.output}
    if template.has_validation:
        beside = options.output.with_name(f"{options.output.stem}_validation{options.output.suffix}")
        outputs["validation"] = options.validation_output or beside
    elif options.validation_output:
        raise UserError(
            f"{options.template} makes no validation conversations (validation_conversations_per_row is 0), "
            "so --validation_output would stay empty; leave it out, or add `validation` phrasings"
        )
    rows = CsvRows(options.input, options.on_bad_record)
    chosen = {"seed": options.seed, "limit": options.limit, "hold_out": options.hold_out}
    summary = convert(rows, template, outputs, **chosen, progress=True)
    tell_skipped(rows)
    print(summary)
    for split, path in outputs.items():
        print(f"{split} → {path}")


if __name__ == "__main__":
    sys.exit(run_program(main, interrupted="interrupted: no output was written"))
