"""Questions out of a CSV and a template, for evaluate.py: `python data_processing/question_builder.py --output q.json`.

Never from the training text: every question is a wording of the template, filled from a row, and its right answer is
the row's cell. Four ways to ask: wordings that training shows (`train`), wordings that it does not (`validation`),
conversations in an order that it does not have (pronouns that refer back, a second subject in the middle, a question
that the table cannot answer), and rows that were held out of it. `evaluate.py --csv` builds the same in passing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_processing.common import DataError, run_entry
from data_processing.holding_out import check_share

if TYPE_CHECKING:
    from data_processing.conversation_template import Template
    from finetune_chatmodel_demo.evaluation.questions import QuestionSet

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class BuildOptions:
    """What to ask, and how much.

    Attributes:
        count: questions of every group (dialogues have several, and are made until their questions are as many).
        seed: of the choice.
        hold_out: share of the rows that the fine-tuning data do not have; 0: none, and no groups of held-out rows.
        groups: which of `questions.GROUPS`; None: all that there is something for.
    """

    count: int = 300
    seed: int = 0
    hold_out: float = 0.0
    groups: tuple[str, ...] | None = None


def build_questions(template: "Template", rows: Sequence[dict[str, str]], options: BuildOptions) -> "QuestionSet":
    """Build the question set of a CSV.

    Args:
        template: a template whose columns have been checked.
        rows: all rows of the CSV.

    Raises:
        DataError: nothing can be asked, or a group is unknown.
    """
    from data_processing.dialogue_builder import DialogueBuilder
    from data_processing.fact_tables import build_fact_table
    from data_processing.single_questions import QuestionPool
    from finetune_chatmodel_demo.evaluation.questions import (
        GROUPS,
        HELD_OUT_TRAINED,
        HELD_OUT_UNSEEN,
        MULTI_TURN,
        TRAINED,
        UNANSWERABLE,
        UNSEEN,
        QuestionSet,
    )

    check_share(options.hold_out)
    if options.count < 1:
        raise DataError(f"the number of questions is {options.count}; expected 1 or more")
    groups = GROUPS if options.groups is None else options.groups
    if unknown := set(groups) - set(GROUPS):
        raise DataError(f"unknown group of questions {min(unknown)!r}; use {', '.join(GROUPS)}")
    table = build_fact_table(template, rows)
    pool = QuestionPool(template, table, rows, options.hold_out)
    dialogues = []
    for group, split, held_out in (
        (TRAINED, "train", False),
        (UNSEEN, "validation", False),
        (HELD_OUT_TRAINED, "train", True),
        (HELD_OUT_UNSEEN, "validation", True),
    ):
        if group in groups:
            dialogues += pool.sample(group, split, held_out, options.count, random.Random(f"{options.seed}|{group}"))
    if {MULTI_TURN, UNANSWERABLE} & set(groups):
        builder = DialogueBuilder(template, table, pool, random.Random(f"{options.seed}|{MULTI_TURN}"))
        dialogues += builder.build(options.count)
    if not dialogues:
        raise DataError(f"{template.path}: no question of the template can be asked and checked; {pool.report()}")
    notes = {
        "template": str(template.path),
        "seed": options.seed,
        "hold_out": options.hold_out,
        "held_out": sorted(pool.held_out),
        "left_out": dict(pool.left_out),
        "fields": {name: f"{field.kind} {field.unit}".strip() for name, field in table.fields.items()},
    }
    return QuestionSet(table, tuple(dialogues), notes)


def read_and_build(
    csv_path: Path, template_path: Path, options: BuildOptions, on_bad_record: str = "error"
) -> "QuestionSet":
    """`build_questions` from files.

    Raises:
        DataError: anything wrong with the CSV, the template or the options.
    """
    from data_processing.csv_rows import CsvRows
    from data_processing.template_reader import load_template

    template = load_template(template_path)
    reader = CsvRows(csv_path, on_bad_record)
    template.check_columns(reader.columns, reader.path)
    return build_questions(template, list(reader), options)


def describe(questions: "QuestionSet") -> Iterator[str]:
    """Lines for the terminal: what is asked, what was held and left out."""
    counts = Counter(turn.group for turn in questions.turns)
    yield "questions: " + ", ".join(f"{group} {count}" for group, count in counts.items())
    if questions.notes.get("held_out"):
        yield f"held out: {len(questions.notes['held_out'])} subjects"
    for reason, count in questions.notes.get("left_out", {}).items():
        yield f"left out: {reason}: {count}"


def describe_fields(questions: "QuestionSet") -> Iterator[str]:
    """What every column was taken for."""
    for field in questions.table.fields.values():
        details = {
            "number": f", unit {field.unit or 'none'}",
            "list": f", separated by {field.separator}, {len(field.vocabulary)} different items",
            "text": f", {len(field.vocabulary)} different texts",
        }.get(field.kind, "")
        yield f"{field.column}: {field.kind}{details}; called {'、'.join(field.labels)}"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", type=Path, default=HERE / "data.csv", help="CSV with a header (default: %(default)s)")
    add("--template", type=Path, default=HERE / "templates" / "pokemon.yaml", help="wordings (default: %(default)s)")
    add("--output", type=Path, help="question file to write")
    add("--questions", type=int, default=300, help="questions of every group (default: %(default)s)")
    add("--hold_out", type=float, default=0.0, help="share of rows that the fine-tuning data do not have (default: 0)")
    add("--seed", type=int, default=0, help="of the choice (default: %(default)s)")
    add("--show_fields", action="store_true", help="print what every column was taken for")
    add("--on_bad_record", choices=("error", "skip"), default="error", help="what a ragged row does")
    options = parser.parse_args(arguments)
    if options.output is None and not options.show_fields:
        parser.error("nothing to do: give --output, --show_fields or both")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Builds, prints what there is, writes."""
    options = parse_arguments(arguments)
    from finetune_chatmodel_demo.evaluation.questions import write_questions

    build = BuildOptions(options.questions, options.seed, options.hold_out)
    questions = read_and_build(options.input, options.template, build, options.on_bad_record)
    if options.show_fields:
        print("\n".join(describe_fields(questions)))
    print("\n".join(describe(questions)))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_questions(questions, options.output)
        print(f"→ {options.output}")


if __name__ == "__main__":
    run_entry(main)
