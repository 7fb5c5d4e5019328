"""Asks every candidate the same questions and puts the figures side by side.

`compare_candidates` is what `evaluate.py --csv` runs; its result is the JSON that evaluate.py documents.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_chatmodel_demo.evaluation.asking import Answer, ask_questions, choose_cap, constant_replies
from finetune_chatmodel_demo.evaluation.candidates import Candidate, load_candidates
from finetune_chatmodel_demo.evaluation.probing import Probes, probe_model
from finetune_chatmodel_demo.evaluation.questions import MULTI_TURN, UNANSWERABLE, QuestionSet
from finetune_chatmodel_demo.evaluation.scoring import compare, score_groups, worst_examples

RIGHT_HISTORY = ", right history"
HISTORY_CHOICES = ("own", "reference", "both")


@dataclass(frozen=True)
class AskOptions:
    """How questions are put.

    Attributes:
        history: what later questions of a dialogue see before them: the model's "own" replies, the "reference" ones, or
            "both": dialogues are then asked a second time, in groups that end in ", right history".
        max_new_tokens: longest reply; None: what the references need, doubled.
        batch_size: questions at a time.
        probes: what is measured beside the questions; None: nothing.
        progress: show bars on standard error.
    """

    history: str = "own"
    max_new_tokens: int | None = None
    batch_size: int = 64
    probes: Probes | None = None
    progress: bool = True


def compare_candidates(
    candidates: Sequence[Candidate], questions: QuestionSet, options: AskOptions, tell: Callable[[str], None] = print
) -> tuple[dict[str, Any], dict[str, list[Answer]]]:
    """Load, ask and score every candidate.

    Args:
        tell: is given one line a candidate before it is asked.

    Returns:
        (the result without what evaluate.py adds about files and flags, all answers by the candidates' names)
    """
    answers: dict[str, list[Answer]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for candidate, model, tokenizer in load_candidates(candidates):
        started = time.monotonic()
        tell(f"asking {candidate.name} ({candidate.kind}): {len(questions.turns)} questions")
        cap = options.max_new_tokens or choose_cap(tokenizer, questions)
        answers[candidate.name] = list(_ask(model, tokenizer, candidate, questions, cap, options))
        row = candidate.to_json() | {"max_new_tokens": cap, "groups": score_groups(answers[candidate.name])}
        if options.probes is not None:
            row["probes"] = probe_model(
                model, tokenizer, options.probes, batch_size=options.batch_size, progress=options.progress
            )
        row["examples"] = worst_examples(answers[candidate.name])
        rows[candidate.name] = row | {"seconds": round(time.monotonic() - started, 1)}
        del model
    names = [candidate.name for candidate in candidates]
    result = {
        "candidates": [rows[name] for name in names],
        "constant_answer": _constant_shares(questions, answers[names[0]]),
        "comparisons": [
            {"first": a, "second": b, "groups": compare(answers[a], answers[b])}
            for a, b in itertools.combinations(names, 2)
        ],
    }
    return result, answers


def _ask(
    model: Any, tokenizer: Any, candidate: Candidate, questions: QuestionSet, cap: int, options: AskOptions
) -> Iterator[Answer]:
    """All answers of one candidate, with both histories where that was asked for."""
    keywords = {
        "prompt_format": candidate.choice.prompt_format,
        "max_new_tokens": cap,
        "batch_size": options.batch_size,
        "progress": options.progress,
    }
    first = "reference" if options.history == "reference" else "own"
    yield from ask_questions(model, tokenizer, questions, history=first, description=candidate.name, **keywords)
    dialogues = questions.select([MULTI_TURN, UNANSWERABLE])
    if options.history == "both" and dialogues.dialogues:
        title = f"{candidate.name}{RIGHT_HISTORY}"
        again = ask_questions(model, tokenizer, dialogues, history="reference", description=title, **keywords)
        offset = len(questions.dialogues)
        for answer in again:
            turn = replace(answer.turn, group=answer.turn.group + RIGHT_HISTORY)
            yield replace(answer, turn=turn, dialogue=answer.dialogue + offset)


def _constant_shares(questions: QuestionSet, answers: Sequence[Answer]) -> dict[str, float]:
    """group → the share that the most frequent value of each column would be right in."""
    groups: dict[str, list[bool]] = {}
    for answer, is_right in zip(answers, constant_replies(questions, answers)):
        groups.setdefault(answer.turn.group, []).append(is_right)
    return {group: sum(found) / len(found) for group, found in groups.items()}
