"""Does the model say exactly what it should? Questions with known answers, after the true conversation before them.

A question is an assistant message that names the CSV column it was made from (`"column": "属性"`). The reply counts
when it equals the reference text, white space at both ends aside.
Exercised by `python finetune_chatmodel_demo/evaluate.py`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.conversation.records import read_records
from finetune_chatmodel_demo.evaluation.statistics import wilson_interval
from finetune_chatmodel_demo.generation.batch import generate_replies
from finetune_chatmodel_demo.generation.prompts import fit_prompt, prompt_budget

WRONG_EXAMPLES_KEPT = 20
# Metadata line, end token, and room for a reply that spells the same text in more pieces than the reference.
SPARE_TOKENS = 16


@dataclass(frozen=True)
class Question:
    """One assistant message to reproduce; `history` is everything before it, ending with what the user asked."""

    column: str
    history: list[dict[str, Any]]
    tools: list[Any] | None
    expected: str


@dataclass(frozen=True)
class Score:
    """How many of `asked` replies were `exact`; `hit_cap` of them were ended by the token limit."""

    asked: int
    exact: int
    hit_cap: int
    by_column: dict[str, dict[str, int]]
    wrong: list[dict[str, str]]

    def to_json(self) -> dict[str, Any]:
        """The score as evaluate.py's `--output` has it."""
        low, high = wilson_interval(self.exact, self.asked)
        return {
            "asked": self.asked,
            "exact": self.exact,
            "share": self.exact / self.asked,
            "wilson95": [low, high],
            "hit_cap": self.hit_cap,
            "by_column": {
                column: count | {"share": count["exact"] / count["asked"]} for column, count in self.by_column.items()
            },
            "wrong": self.wrong,
        }


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
        ValueError: no assistant message of the file names a column.
    """
    if max_questions is not None and max_questions < 1:
        raise ValueError(f"max_questions is {max_questions}; it must be at least 1")
    chosen: list[tuple[int, Question]] = []
    found = 0
    draw = random.Random(seed)
    for record in read_records(path):
        messages = record["conversations"]
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or "column" not in message:
                continue
            question = Question(message["column"], messages[:i], record.get("tools"), message["content"].strip())
            found += 1
            if max_questions is None or len(chosen) < max_questions:
                chosen.append((found, question))
            elif (place := draw.randrange(found)) < max_questions:
                chosen[place] = (found, question)
    if not found:
        raise ValueError(
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
) -> Score:
    """Ask every question greedily and compare.

    Raises:
        PromptTooLongError: a question without its history is still too long for the model.
    """
    budget = prompt_budget(model, max_new_tokens)
    prompts = [
        fit_prompt(
            tokenizer,
            question.history,
            max_prompt_tokens=budget,
            tools=question.tools,
            prompt_format=prompt_format,
        ).input_ids
        for question in questions
    ]
    replies = generate_replies(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        prompt_format=prompt_format,
        progress=progress,
        description=description,
    )
    by_column: dict[str, dict[str, int]] = {}
    wrong = []
    for question, reply in zip(questions, replies):
        is_exact = reply.text == question.expected
        count = by_column.setdefault(question.column, {"asked": 0, "exact": 0})
        count["asked"] += 1
        count["exact"] += is_exact
        if not is_exact and len(wrong) < WRONG_EXAMPLES_KEPT:
            wrong.append(
                {
                    "column": question.column,
                    "question": question.history[-1].get("content", "") if question.history else "",
                    "expected": question.expected,
                    "got": reply.text,
                }
            )
    return Score(
        asked=len(questions),
        exact=sum(count["exact"] for count in by_column.values()),
        hit_cap=sum(reply.hit_cap for reply in replies),
        by_column=dict(sorted(by_column.items())),
        wrong=wrong,
    )
