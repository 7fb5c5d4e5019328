"""Counts exact answers: the base model against base + prefix or base + adapter, on files of conversations.

    python finetune_chatmodel_demo/evaluate.py --pt-checkpoint output/pokemon \\
        --data "trained phrasings=formatted_data/pokemon_conversations.jsonl" \\
        --data "unseen phrasings=formatted_data/pokemon_conversations_validation.jsonl"

Every assistant message with a "column" key is a question: the model gets the true conversation before it, answers
greedily, and the reply must equal the reference text. With `--output X.json`:

    {"model", "pt_checkpoint", "adapter", "prompt_format", "device", "seed", "batch_size", "seconds",
     "files": [{"name", "path", "questions_in_file", "max_new_tokens",
                "scores": {"base": SCORE, "base + prefix" or "base + adapter": SCORE}}]}
                                                                            with neither: {"model": SCORE}
    SCORE: {"asked", "exact", "share", "wilson95": [low, high], "hit_cap", "by_column": {COLUMN: {"asked", "exact",
            "share"}}, "wrong": [{"column", "question", "expected", "got"}, … at most 20]}

`hit_cap` counts the replies that did not end by themselves within max_new_tokens.
"""

import argparse
import contextlib
import json
import logging
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: find the package, and let nothing in its folder shadow an installed one
    _folder = Path(__file__).resolve().parent
    sys.path[:] = [str(_folder.parent), *(entry for entry in sys.path if entry != str(_folder))]

from finetune_chatmodel_demo.generation.errors import UsageError, run_and_explain
from finetune_chatmodel_demo.generation.loading import ModelChoice, add_model_arguments, choose_model, load_choice

BASE, WHOLE = "base", "model"


def build_parser() -> argparse.ArgumentParser:
    """The command line; every flag is also accepted with underscores."""
    parser = argparse.ArgumentParser(
        description="Count exact answers of the base model and of base + prefix, or of base + LoRA adapter.",
        epilog="The docstring of this file documents the keys of --output.",
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--data",
        action="append",
        required=True,
        metavar="[NAME=]FILE",
        help="conversations with 'column' keys, JSON or JSON lines; repeat it for several",
    )
    add("--max-questions", "--max_questions", type=int, metavar="N", help="a random sample of each file (all)")
    add("--seed", type=int, default=0, metavar="N", help="of the sample (0)")
    add(
        "--max-new-tokens",
        "--max_new_tokens",
        type=int,
        metavar="N",
        help="longest reply, in tokens (what the longest reference of the file needs, and some to spare)",
    )
    add("--batch-size", "--batch_size", type=int, default=64, metavar="N", help="questions at a time (64)")
    add("--examples", type=int, default=3, metavar="N", help="wrong replies to print of each file (3)")
    add("--output", type=Path, metavar="X.json", help="write everything here")
    return parser


def split_data(value: str) -> tuple[str, str]:
    """`NAME=FILE` → (name, file); a file alone is named after itself, also when its path has a = in it."""
    name, equals, path = value.partition("=")
    if not equals or Path(value).is_file():
        return Path(value).stem, value
    return name, path


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, ask, score; the result as the module docstring describes it.

    Raises:
        OSError, ValueError: something that the user gave cannot be used.
    """
    from finetune_chatmodel_demo.evaluation.exact_match import read_questions

    started = time.monotonic()
    files = [split_data(value) for value in arguments.data]
    repeated = {name for name, _ in files if [other for other, _ in files].count(name) > 1}
    if repeated:
        raise UsageError(f"--data: {', '.join(sorted(repeated))} is there twice; name the files, NAME=FILE")
    # Before the model: a mistake in a file shows at once.
    questions = [read_questions(path, arguments.max_questions, arguments.seed) for _, path in files]
    choice = choose_model(arguments)
    for notice in choice.notices:
        print(notice, file=sys.stderr)
    model, tokenizer = load_choice(choice)
    results = []
    for (name, path), (asked, found) in zip(files, questions):
        scored = _score_file(model, tokenizer, name, asked, choice, arguments)
        results.append({"name": name, "path": path, "questions_in_file": found} | scored)
    return {
        "model": choice.model,
        "pt_checkpoint": str(choice.prefix) if choice.prefix else None,
        "adapter": str(choice.adapter) if choice.adapter else None,
        "prompt_format": choice.prompt_format,
        "device": choice.device,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "seconds": round(time.monotonic() - started, 1),
        "files": results,
    }


def _score_file(
    model: Any, tokenizer: Any, name: str, questions: list[Any], choice: ModelChoice, arguments: argparse.Namespace
) -> dict[str, Any]:
    """`max_new_tokens` and `scores` of one file."""
    from finetune_chatmodel_demo.evaluation.exact_match import longest_reply_needed, score_questions

    cap = arguments.max_new_tokens
    cap = longest_reply_needed(tokenizer, questions) if cap is None else cap
    conditions = {WHOLE: contextlib.nullcontext}
    if choice.tuned:
        from finetune_chatmodel_demo.chatglm3.adapters import without_tuning

        conditions = {BASE: lambda: without_tuning(model), f"base + {choice.tuned}": contextlib.nullcontext}
    scores = {}
    for condition, switch in conditions.items():
        with switch():
            score = score_questions(
                model,
                tokenizer,
                questions,
                prompt_format=choice.prompt_format,
                max_new_tokens=cap,
                batch_size=arguments.batch_size,
                progress=True,
                description=f"{name}, {condition}",
            )
        scores[condition] = score.to_json()
    return {"max_new_tokens": cap, "scores": scores}


def format_table(result: dict[str, Any]) -> str:
    """The result as a table: a row a file, a column a condition."""
    conditions = list(result["files"][0]["scores"])
    rows = [["exact answers", *conditions, "questions"]]
    for file in result["files"]:
        shares = [_format_share(file["scores"][condition]) for condition in conditions]
        rows.append([file["name"], *shares, str(file["scores"][conditions[0]]["asked"])])
    widths = [max(_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def format_examples(result: dict[str, Any], count: int) -> str:
    """Some wrong replies of the last condition (what was trained, if anything), and how many were cut short."""
    lines = []
    for file in result["files"]:
        condition, score = list(file["scores"].items())[-1]
        if score["hit_cap"]:
            cap = file["max_new_tokens"]
            lines.append(f"{file['name']}, {condition}: {score['hit_cap']} replies did not end within {cap} tokens")
        for example in score["wrong"][:count]:
            lines.append(f"{file['name']}, {condition}, wrong ({example['column']}): {example['question']}")
            lines.append(f"    expected {example['expected']!r}")
            lines.append(f"    got      {example['got']!r}")
    return "\n".join(lines)


def _format_share(score: dict[str, Any]) -> str:
    low, high = score["wilson95"]
    return f"{score['share']:.1%} ({low:.1%} to {high:.1%})"


def _width(text: str) -> int:
    """Columns in a terminal: wide East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def report(arguments: argparse.Namespace) -> None:
    """Evaluate, write `--output`, print the table and some wrong replies."""
    if arguments.output and not arguments.output.resolve().parent.is_dir():
        raise UsageError(f"--output {arguments.output}: there is no folder {arguments.output.resolve().parent}")
    result = evaluate(arguments)
    if arguments.output:
        text = json.dumps(result, ensure_ascii=False, indent=2) + "\n"
        arguments.output.write_text(text, encoding="utf-8")
    print(format_table(result))
    print("(share of replies that equal the reference text, with its 95 % Wilson interval)")
    if examples := format_examples(result, arguments.examples):
        print(examples)


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code of `run_and_explain`."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    return run_and_explain(lambda: report(arguments), out_of_memory_advice="use a smaller --batch-size")


if __name__ == "__main__":
    sys.exit(main())
