"""Does the model know the facts? Two ways to ask, for any number of candidates side by side.

**Against the facts** (`--csv`, or `--questions_file`): questions are built from a CSV and its template, never from the
training text, and each reply is read for the field's value: exact, partial (lists), wrong or missing.

    python finetune_chatmodel_demo/evaluate.py --csv data_processing/data.csv \\
        --template data_processing/templates/pokemon_kanto.yaml --hold_out 0.2 --report output/evaluation \\
        --compare base --compare prefix=output/pokemon --compare lora=output/lora --compare full=output/full

Groups: trained phrasings, unseen phrasings, multi-turn (pronouns, a second subject in the middle; the model sees its
own replies), unanswerable (right is a reply that says so), and with --hold_out trained and unseen phrasings about
subjects that the fine-tuning data do not have (`data_processing.py --hold_out` with the same share leaves them out).
`--report DIR` gets report.json, report.md, report.html and answers.jsonl, with every reply. The JSON:

    {"mode": "facts", "run": {flags, fields, held_out …},
     "candidates": [{"name", "kind", "model", "checkpoint", "prompt_format", "max_new_tokens", "seconds",
                     "groups": {GROUP: SCORE}, "probes": {…}, "examples": [the worst replies]}],
     "constant_answer": {GROUP: share of the column's most frequent value},
     "comparisons": [{"first", "second", "groups": {GROUP: {"difference", "bootstrap95", "only_first", "only_second",
                      "mcnemar_p"}}}]}
    SCORE: {"asked", "exact", "partial", "wrong", "missing", "share", "wilson95", "overlap", "verbatim", "begins_right",
            "not_ended", "by_column", "by_kind", "reasons"}

`overlap` is the mean of 1 for exact and the overlap share for partial; `verbatim` the share of the template's own
words; `begins_right` the share whose first line or sentence is exact, whatever follows: what a base knows that does not
stop.

**Against reference texts** (`--data`): every assistant message of a conversation file with a "column" key is a
question, asked with the true conversation before it; the reply must equal the reference to the letter. Needs no CSV.

    python finetune_chatmodel_demo/evaluate.py --pt-checkpoint output/pokemon \\
        --data "trained phrasings=formatted_data/pokemon_conversations.jsonl" \\
        --data "unseen phrasings=formatted_data/pokemon_conversations_validation.jsonl"

    {"model", "pt_checkpoint", "adapter", "prompt_format", "device", "seed", "batch_size", "seconds",
     "files": [{"name", "path", "questions_in_file", "max_new_tokens",
                "scores": {"base": SCORE, "base + prefix" or "base + adapter": SCORE}}]}
                                       with neither: {"model": SCORE}; with --compare: {NAME: SCORE}, and "candidates"
    SCORE: {"asked", "exact", "share", "wilson95": [low, high], "hit_cap", "by_column": {COLUMN: {"asked", "exact",
            "share"}}, "wrong": [{"column", "question", "expected", "got"}, … at most 20]}

`hit_cap` counts the replies that did not end by themselves within max_new_tokens.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the rooms are packages; this folder's own names are not

from finetune_chatmodel_demo.common.cli import run_program
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import flag_path, write_json
from finetune_chatmodel_demo.generation.choose import add_model_arguments

QUESTIONS_OF_A_GROUP = 300


def build_parser() -> argparse.ArgumentParser:
    """The command line; every flag is also accepted with underscores, or with hyphens."""
    parser = argparse.ArgumentParser(
        description="Ask for facts: the base model, prefixes, LoRA adapters and whole models side by side.",
        epilog="The docstring of this file documents both ways of asking and the keys of the JSON.",
    )
    _add_questions(parser.add_argument_group("what is asked (one of --csv, --questions_file, --data)"))
    group = parser.add_argument_group("who is asked")
    _add(group, "--compare", action="append", metavar="[NAME=]DIR", help="base, a prefix, an adapter, a whole model; "
         "repeat it (default: --pt-checkpoint or --adapter and its base, or --model)")  # fmt: skip
    add_model_arguments(group)
    group = parser.add_argument_group("how")
    _add(group, "--history", choices=("own", "reference", "both"), default="own", help="what later questions of a "
         "dialogue see: the model's own replies, the right ones, or once each (own)")  # fmt: skip
    _add(group, "--max_new_tokens", type=int, metavar="N", help="longest reply, in tokens (what the references need)")
    _add(group, "--batch_size", type=int, default=64, metavar="N", help="questions at a time (64)")
    _add(group, "--probes", metavar="FILE", help="with --csv: texts and requests that fine-tuning was not about (those "
         "of evaluation/probes.json; none: leave them out)")  # fmt: skip
    group = parser.add_argument_group("results")
    _add(group, "--examples", type=int, default=3, metavar="N", help="wrong replies to print (3)")
    _add(group, "--output", type=flag_path, metavar="X.json", help="write everything here")
    _add(group, "--report", type=flag_path, metavar="DIR", help="with --csv: report.json, .md, .html and answers.jsonl")
    return parser


def _add_questions(group: argparse._ArgumentGroup) -> None:
    _add(group, "--csv", type=flag_path, metavar="FILE", help="facts to ask about; needs --template")
    _add(group, "--template", type=flag_path, metavar="FILE", help="wordings, data_processing/templates/*.yaml")
    _add(
        group,
        "--questions_file",
        type=flag_path,
        metavar="FILE",
        help="questions of data_processing/question_builder.py",
    )
    _add(group, "--data", action="append", metavar="[NAME=]FILE", help="conversations with 'column' keys, JSON or JSON "
         "lines: replies must equal the reference; repeat it for several")  # fmt: skip
    _add(group, "--max_questions", type=int, metavar="N", help="--csv: questions of each group (300); --data: a random "
         "sample of each file (all)")  # fmt: skip
    _add(group, "--groups", metavar="A,B", help="--csv: these groups only, e.g. 'unseen phrasings,multi-turn' (all)")
    _add(group, "--hold_out", type=float, default=0.0, metavar="SHARE", help="--csv: this share of rows is not in the "
         "fine-tuning data, as of data_processing.py --hold_out (0)")  # fmt: skip
    _add(group, "--train_file", type=flag_path, metavar="FILE", help="--csv: check that the fine-tuning data hold no "
         "unseen wording and no held-out subject")  # fmt: skip
    _add(group, "--seed", type=int, default=0, metavar="N", help="of the choice of questions (0)")


def _add(group: argparse._ArgumentGroup, flag: str, **options: Any) -> None:
    """Adds a flag in both spellings, --max_new_tokens and --max-new-tokens."""
    group.add_argument(*dict.fromkeys((flag.replace("_", "-"), flag)), **options)


def report_files(arguments: argparse.Namespace) -> None:
    """`--data`: evaluate, write `--output`, print the table and some wrong replies."""
    from finetune_chatmodel_demo.evaluation import exact

    result = exact.evaluate_files(arguments)
    if arguments.output:
        write_json(arguments.output, result)
    print(exact.shares_table(result))
    print("(share of replies that equal the reference text, with its 95 % Wilson interval)")
    if examples := exact.format_examples(result, arguments.examples):
        print(examples)


def report_facts(arguments: argparse.Namespace) -> None:
    """`--csv` and `--questions_file`: build, compare, write the reports, print the summary."""
    from finetune_chatmodel_demo.evaluation.candidates import choose_candidates
    from finetune_chatmodel_demo.evaluation.comparison import AskOptions, compare_candidates
    from finetune_chatmodel_demo.evaluation.comparison_report import describe_run, summary, write_reports
    from finetune_chatmodel_demo.evaluation.probing import PROBES_FILE, read_probes

    probes = None if arguments.probes == "none" else read_probes(arguments.probes or PROBES_FILE)
    questions = load_questions(arguments)
    run = describe_run(arguments, questions)
    candidates = choose_candidates(arguments.compare or [], arguments)
    for notice in dict.fromkeys(notice for candidate in candidates for notice in candidate.choice.notices):
        tell(notice)
    options = AskOptions(arguments.history, arguments.max_new_tokens, arguments.batch_size, probes)
    result, answers = compare_candidates(candidates, questions, options, tell)
    result = {"mode": "facts", "run": run} | result
    if arguments.output:
        write_json(arguments.output, result)
    if arguments.report:
        write_reports(arguments.report, result, answers)
        tell(f"report: {arguments.report / 'report.html'}")
    print(summary(result, arguments.examples))


def load_questions(arguments: argparse.Namespace) -> Any:
    """The question set of `--questions_file`, or a new one of `--csv` and `--template`.

    Raises:
        UserError: the folder data_processing is missing, or there is no template.
    """
    from finetune_chatmodel_demo.evaluation.questions import read_question_file

    groups = [group.strip() for group in arguments.groups.split(",")] if arguments.groups else None
    if arguments.questions_file:
        questions = read_question_file(arguments.questions_file)
        chosen = questions.select(groups) if groups else questions
        if not chosen.dialogues:
            raise UserError(f"--groups {arguments.groups}: {arguments.questions_file} has no question of these groups")
        return chosen
    if arguments.template is None:
        raise UserError("--csv needs --template, the wordings of questions: see data_processing/templates")
    try:
        from finetune_chatmodel_demo.evaluation.question_building import BuildOptions, read_and_build
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("data_processing"):
            raise
        beside = Path(__file__).resolve().parents[1] / "data_processing"
        raise UserError(
            f"--csv needs this project's folder data_processing, which is not at {beside}: copy it there, or use "
            "--data with a file of conversations, or --questions_file with questions that were built elsewhere"
        ) from None
    count = QUESTIONS_OF_A_GROUP if arguments.max_questions is None else arguments.max_questions
    options = BuildOptions(count, arguments.seed, arguments.hold_out, tuple(groups) if groups else None)
    return read_and_build(arguments.csv, arguments.template, options)


def report(arguments: argparse.Namespace) -> None:
    """One of the two ways of asking.

    Raises:
        UserError: flags contradict each other, or a folder for results is missing.
    """
    ways = [flag for flag in ("csv", "questions_file", "data") if getattr(arguments, flag)]
    if len(ways) != 1:
        found = " and ".join(f"--{way}" for way in ways) or "none"
        raise UserError(f"give one of --csv, --questions_file and --data (got {found}); --help says what each asks")
    if arguments.output and not arguments.output.resolve().parent.is_dir():
        raise UserError(f"--output {arguments.output}: there is no folder {arguments.output.resolve().parent}")
    for flag, path, is_wrong in (("output", arguments.output, Path.is_dir), ("report", arguments.report, Path.is_file)):
        if path and is_wrong(path):  # said before hours of work
            raise UserError(f"--{flag} {path} is a {'folder' if path.is_dir() else 'file'}; name another")
    unfit = {"data": ("report", "template", "groups", "train_file", "probes", "hold_out")}
    unfit["questions_file"] = ("template", "max_questions", "hold_out")  # they were decided when the file was made
    for flag in unfit.get(ways[0], ()):
        if getattr(arguments, flag):
            raise UserError(f"--{flag} goes with --csv, not with --{ways[0]}")
    if ways == ["data"]:
        report_files(arguments)
    else:
        report_facts(arguments)


def tell(line: str) -> None:
    """What is going on goes beside the progress bars; standard output has the results alone."""
    print(line, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status of `run_program`."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    return run_program(lambda: report(arguments), out_of_memory_advice="use a smaller --batch-size")


if __name__ == "__main__":
    sys.exit(main())
