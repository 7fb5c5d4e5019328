"""Questions out of a CSV and a template, for evaluate.py: `python data_processing/question_builder.py --output q.json`.

`evaluate.py --csv` builds the same in passing; `evaluation/question_building.py` says how they are made.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the rooms are packages; this folder is not on the path

import argparse

from finetune_chatmodel_demo.common.cli import run_program
from finetune_chatmodel_demo.common.files import flag_path

HERE = Path(__file__).resolve().parent


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        type=flag_path,
        default=HERE / "data.csv",
        help="a table with a header: CSV, TSV, .xlsx (default: %(default)s)",
    )
    add(
        "--template",
        type=flag_path,
        default=HERE / "templates" / "pokemon.yaml",
        help="wordings (default: %(default)s)",
    )
    add("--output", type=flag_path, help="question file to write")
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
    from finetune_chatmodel_demo.evaluation.question_building import (
        BuildOptions,
        describe,
        describe_fields,
        read_and_build,
    )
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
    sys.exit(run_program(main, interrupted="interrupted: no output was written"))
