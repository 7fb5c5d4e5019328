"""`evaluate.py --data FILE`: the share of replies that equal the reference text, on files of conversations.

Needs neither the CSV nor its template, so it works where the demo folder was copied alone.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.evaluation.candidates import choose_candidates, load_candidates
from finetune_chatmodel_demo.evaluation.exact_match import longest_reply_needed, read_questions, score_questions
from finetune_chatmodel_demo.evaluation.report_text import format_share
from finetune_chatmodel_demo.evaluation.report_text import format_table as format_rows
from finetune_chatmodel_demo.generation.errors import UsageError
from finetune_chatmodel_demo.generation.loading import ModelChoice, choose_model, load_choice

BASE, WHOLE = "base", "model"
# (name, model, tokenizer, prompt format)
Condition = tuple[str, Any, Any, str]


def split_data(value: str) -> tuple[str, str]:
    """`NAME=FILE` → (name, file); a file alone is named after itself, also when its path has a = in it."""
    name, equals, path = value.partition("=")
    if not equals or Path(value).is_file():
        return Path(value).stem, value
    return name, path


def evaluate_files(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, ask, score; the result as evaluate.py documents it.

    Raises:
        OSError, ValueError: something that the user gave cannot be used.
    """
    started = time.monotonic()
    files = [split_data(value) for value in arguments.data]
    repeated = {name for name, _ in files if [other for other, _ in files].count(name) > 1}
    if repeated:
        raise UsageError(f"--data: {', '.join(sorted(repeated))} is there twice; name the files, NAME=FILE")
    # Before the model: a mistake in a file shows at once.
    questions = [read_questions(path, arguments.max_questions, arguments.seed) for _, path in files]
    described, conditions = _conditions(arguments)
    rows = [
        {"name": name, "path": path, "questions_in_file": found, "max_new_tokens": None, "scores": {}}
        for (name, path), (_, found) in zip(files, questions)
    ]
    for condition, model, tokenizer, prompt_format in conditions:
        for row, (asked, _) in zip(rows, questions):
            cap = arguments.max_new_tokens
            row["max_new_tokens"] = longest_reply_needed(tokenizer, asked) if cap is None else cap
            score = score_questions(
                model,
                tokenizer,
                asked,
                prompt_format=prompt_format,
                max_new_tokens=row["max_new_tokens"],
                batch_size=arguments.batch_size,
                progress=True,
                description=f"{row['name']}, {condition}",
            )
            row["scores"][condition] = score.to_json()
    facts = {"seed": arguments.seed, "batch_size": arguments.batch_size}
    return described | facts | {"seconds": round(time.monotonic() - started, 1), "files": rows}


def _conditions(arguments: argparse.Namespace) -> tuple[dict[str, Any], Iterator[Condition]]:
    """What the JSON says of the models, and the models, one after the other."""
    if arguments.compare:
        candidates = choose_candidates(arguments.compare, arguments)
        _tell_notices(*(candidate.choice for candidate in candidates))
        described = {"candidates": [candidate.to_json() for candidate in candidates]}
        loaded = load_candidates(candidates)
        return described, ((c.name, model, tokenizer, c.choice.prompt_format) for c, model, tokenizer in loaded)
    choice = choose_model(arguments)
    _tell_notices(choice)
    described = {
        "model": choice.model,
        "pt_checkpoint": str(choice.prefix) if choice.prefix else None,
        "adapter": str(choice.adapter) if choice.adapter else None,
        "prompt_format": choice.prompt_format,
        "device": choice.device,
    }
    return described, _base_and_tuned(choice)


def _base_and_tuned(choice: ModelChoice) -> Iterator[Condition]:
    """One model, with what was trained switched off and on; without any it is just the model."""
    from finetune_chatmodel_demo.chatglm3.adapters import without_tuning

    model, tokenizer = load_choice(choice)
    switches = {WHOLE: contextlib.nullcontext}
    if choice.tuned:
        switches = {BASE: lambda: without_tuning(model), f"base + {choice.tuned}": contextlib.nullcontext}
    for name, switch in switches.items():
        with switch():
            yield name, model, tokenizer, choice.prompt_format


def _tell_notices(*choices: ModelChoice) -> None:
    for notice in dict.fromkeys(notice for choice in choices for notice in choice.notices):
        print(notice, file=sys.stderr)


def format_table(result: dict[str, Any]) -> str:
    """The result as a table: a row a file, a column a condition."""
    conditions = list(result["files"][0]["scores"])
    rows = [["exact answers", *conditions, "questions"]]
    for file in result["files"]:
        shares = [format_share(file["scores"][condition]) for condition in conditions]
        rows.append([file["name"], *shares, str(file["scores"][conditions[0]]["asked"])])
    return format_rows(rows)


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
