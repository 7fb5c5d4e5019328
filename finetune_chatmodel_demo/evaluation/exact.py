"""`evaluate.py --data FILE`: the share of replies that equal the reference text, on files of conversations.

A question is an assistant message that names the CSV column it was made from (`"column": "属性"`), asked with the true
conversation before it; white space at both ends aside, the reply must be the reference. Needs neither the CSV nor its
template, so it works where the demo folder was copied alone.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.tables import format_table
from finetune_chatmodel_demo.conversation.records import read_records
from finetune_chatmodel_demo.evaluation.candidates import choose_candidates, load_candidates
from finetune_chatmodel_demo.evaluation.comparison import wilson_interval
from finetune_chatmodel_demo.evaluation.comparison_report import format_share
from finetune_chatmodel_demo.generation.batch import generate_replies
from finetune_chatmodel_demo.generation.session import fit_prompt, prompt_budget

WRONG_EXAMPLES_KEPT = 20
# Metadata line, end token, and room for a reply that spells the same text in more pieces than the reference.
SPARE_TOKENS = 16
WHOLE = "model"  # the heading of the one column where nothing is compared


@dataclass(frozen=True)
class Question:
    """One assistant message to reproduce; `history` is everything before it, ending with what the user asked."""

    column: str
    history: list[dict[str, Any]]
    tools: list[Any] | None
    expected: str


def read_questions(path: str | Path, max_questions: int | None = None, seed: int = 0) -> tuple[list[Question], int]:
    """Collect the questions of a conversation file.

    Args:
        path: JSON or JSON lines, as `read_records` takes them.
        max_questions: keep a random sample of this size (by reservoir: a large file does not grow memory).
        seed: of the sample.

    Returns:
        The questions in the order of the file, and how many the file has.

    Raises:
        RecordError: a record is bad.
        UserError: no assistant message of the file names a column.
    """
    if max_questions is not None and max_questions < 1:
        raise UserError(f"max_questions is {max_questions}; it must be at least 1")
    chosen: list[tuple[int, Question]] = []
    found = 0
    draw = random.Random(seed)
    for number, record in enumerate(read_records(path), 1):
        messages = record["conversations"]
        for i, message in enumerate(messages):
            column = message.get("column")
            if message["role"] != "assistant" or column is None or not message["content"].strip():
                continue
            if not isinstance(column, str):
                raise UserError(f"{path} record {number}: conversations[{i}]: 'column' must be a text, got {column!r}")
            if not any(before["role"] == "user" for before in messages[:i]):
                raise UserError(f"{path} record {number}: conversations[{i}] has a 'column', and no question before it")
            question = Question(column, messages[:i], record.get("tools"), message["content"].strip())
            found += 1
            if max_questions is None or len(chosen) < max_questions:
                chosen.append((found, question))
            elif (place := draw.randrange(found)) < max_questions:
                chosen[place] = (found, question)
    if not found:
        raise UserError(
            f"{path} has no questions: none of its assistant messages has a 'column' key; make the file with "
            "data_processing/data_processing.py, which writes it"
        )
    return [question for _, question in sorted(chosen, key=lambda pair: pair[0])], found


def longest_reply_needed(tokenizer: Any, questions: Sequence[Question]) -> int:
    """Tokens after which no reply can still equal its reference."""
    return max(len(tokenizer.encode_text(question.expected)) for question in questions) + SPARE_TOKENS


def score_questions(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    prompt_format: str,
    max_new_tokens: int,
    batch_size: int,
    progress: bool = False,
    description: str = "answering",
) -> dict[str, Any]:
    """Ask every question greedily and compare.

    Returns:
        SCORE, as evaluate.py documents it.

    Raises:
        PromptTooLongError: a question without its history is still too long for the model.
    """
    options = {"max_prompt_tokens": prompt_budget(model, max_new_tokens), "prompt_format": prompt_format}
    replies = generate_replies(
        model,
        tokenizer,
        [fit_prompt(tokenizer, question.history, tools=question.tools, **options).input_ids for question in questions],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        prompt_format=prompt_format,
        progress=progress,
        description=description,
    )
    right: dict[str, list[bool]] = {}
    wrong = []
    for question, reply in zip(questions, replies):
        right.setdefault(question.column, []).append(reply.text == question.expected)
        if reply.text != question.expected:
            asked = question.history[-1].get("content", "") if question.history else ""
            pair = {"expected": question.expected, "got": reply.text}
            wrong.append({"column": question.column, "question": asked, **pair})
    exact = len(questions) - len(wrong)
    return {
        "asked": len(questions),
        "exact": exact,
        "share": exact / len(questions),
        "wilson95": list(wilson_interval(exact, len(questions))),
        "hit_cap": sum(reply.hit_cap for reply in replies),
        "by_column": {
            column: {"asked": len(found), "exact": sum(found), "share": sum(found) / len(found)}
            for column, found in sorted(right.items())
        },
        "wrong": wrong[:WRONG_EXAMPLES_KEPT],
    }


def split_data(value: str) -> tuple[str, str]:
    """`NAME=FILE` → (name, file); a file alone is named after itself, also when its path has a = in it."""
    name, equals, path = value.partition("=")
    if not equals or Path(value).is_file():
        return Path(value).stem, value
    return name, path


def evaluate_files(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, ask, score; the result as evaluate.py documents it.

    Raises:
        OSError, UserError: something that the user gave cannot be used.
    """
    started = time.monotonic()
    files = [split_data(value) for value in arguments.data]
    repeated = {name for name, _ in files if [other for other, _ in files].count(name) > 1}
    if repeated:
        raise UserError(f"--data: {', '.join(sorted(repeated))} is there twice; name the files, NAME=FILE")
    # Before the model: a mistake in a file shows at once.
    questions = [read_questions(path, arguments.max_questions, arguments.seed) for _, path in files]
    candidates = choose_candidates(arguments.compare or [], arguments)
    for notice in dict.fromkeys(notice for candidate in candidates for notice in candidate.choice.notices):
        print(notice, file=sys.stderr)
    rows = [
        {"name": name, "path": path, "questions_in_file": found, "max_new_tokens": None, "scores": {}}
        for (name, path), (_, found) in zip(files, questions)
    ]
    for candidate, model, tokenizer in load_candidates(candidates):
        condition = candidate.name if arguments.compare or len(candidates) > 1 else WHOLE
        for row, (asked, _) in zip(rows, questions):
            cap = arguments.max_new_tokens
            row["max_new_tokens"] = longest_reply_needed(tokenizer, asked) if cap is None else cap
            row["scores"][condition] = score_questions(
                model,
                tokenizer,
                asked,
                prompt_format=candidate.choice.prompt_format,
                max_new_tokens=row["max_new_tokens"],
                batch_size=arguments.batch_size,
                progress=True,
                description=f"{row['name']}, {condition}",
            )
    if arguments.compare:
        described = {"candidates": [candidate.to_json() for candidate in candidates]}
    else:
        choice = candidates[-1].choice
        described = {"model": choice.model, "prompt_format": choice.prompt_format, "device": choice.device}
        described |= {"pt_checkpoint": _name(choice.prefix), "adapter": _name(choice.adapter)}
    facts = {"seed": arguments.seed, "batch_size": arguments.batch_size}
    return described | facts | {"seconds": round(time.monotonic() - started, 1), "files": rows}


def _name(folder: Path | None) -> str | None:
    return str(folder) if folder else None


def shares_table(result: dict[str, Any]) -> str:
    """The result as a table: a row a file, a column a condition."""
    rows = []
    for file in result["files"]:
        shares = {condition: format_share(score) for condition, score in file["scores"].items()}
        asked = next(iter(file["scores"].values()))["asked"]
        rows.append({"exact answers": file["name"], **shares, "questions": asked})
    return format_table(rows)


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
