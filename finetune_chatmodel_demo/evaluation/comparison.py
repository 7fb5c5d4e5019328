"""From judged replies to figures: shares by group, by column and by kind of turn; two candidates side by side.

The keys are documented in evaluate.py.
"""

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune_chatmodel_demo.evaluation.asking import Answer, ask_questions, choose_cap, constant_replies
from finetune_chatmodel_demo.evaluation.candidates import Candidate, load_candidates
from finetune_chatmodel_demo.evaluation.judge import OUTCOMES
from finetune_chatmodel_demo.evaluation.probing import Probes, probe_model
from finetune_chatmodel_demo.evaluation.questions import MULTI_TURN, UNANSWERABLE, QuestionSet

if TYPE_CHECKING:
    from pandas import DataFrame

RIGHT_HISTORY = ", right history"
HISTORY_CHOICES = ("own", "reference", "both")
Z95 = 1.959964
RESAMPLES = 2000
EXAMPLES_KEPT = 20
# The worst first: an endless reply says nothing, a false one misleads, an incomplete one is half right.
BADNESS = {"wrong": 0, "missing": 1, "partial": 2}


def as_frame(answers: Sequence[Answer]) -> "DataFrame":
    """A row an answer.

    Its columns are group, kind, column, outcome, reason, ended, verbatim, begins_right, and credit: 1 for an exact
    reply, the overlap share for a partial one, else 0. A reason does not say whom or what a reply speaks of.
    """
    import pandas

    return pandas.DataFrame(
        {
            "group": answer.turn.group,
            "kind": answer.turn.kind,
            "column": answer.turn.column or "(none)",
            "outcome": answer.verdict.outcome,
            "reason": _without_names(answer.verdict.reason),
            "ended": answer.ended,
            "verbatim": answer.is_verbatim,
            "begins_right": answer.begins_right,
            "credit": answer.verdict.overlap if answer.verdict.outcome in ("exact", "partial") else 0.0,
        }
        for answer in answers
    )


def _without_names(reason: str) -> str:
    reason = re.sub("^speaks about .*", "speaks about another subject", reason)
    return re.sub("^false about .*", "false about another column", reason)


def score_groups(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Group → its figures (SCORE in evaluate.py), in the order in which groups first come up."""
    return {group: _score(rows) for group, rows in as_frame(answers).groupby("group", sort=False)}


def _score(rows: "DataFrame") -> dict[str, Any]:
    counts, reasons = _counts(rows), rows["reason"][rows["reason"] != ""]
    return counts | {
        "wilson95": list(wilson_interval(counts["exact"], len(rows))),
        "overlap": float(rows["credit"].mean()),
        "verbatim": float(rows["verbatim"].mean()),
        "begins_right": float(rows["begins_right"].mean()),
        "not_ended": int((~rows["ended"]).sum()),
        "by_column": {name: _counts(part) for name, part in rows.groupby("column", sort=False)},
        "by_kind": {name: _counts(part) for name, part in rows.groupby("kind", sort=False)},
        "reasons": {reason: int(count) for reason, count in reasons.value_counts().items()},
    }


def _counts(rows: "DataFrame") -> dict[str, Any]:
    counts = {outcome: int((rows["outcome"] == outcome).sum()) for outcome in OUTCOMES}
    return {"asked": len(rows), **counts, "share": counts["exact"] / len(rows)}


def worst_examples(answers: Sequence[Answer], count: int = EXAMPLES_KEPT) -> list[dict[str, Any]]:
    """Replies that are not exact, the worst first, and of equally bad ones a column each in turn."""
    seen: dict[tuple[str, str], int] = {}
    ranked = []
    for answer in answers:
        if answer.verdict.outcome == "exact":
            continue
        key = (answer.turn.group, answer.turn.column or "")
        seen[key] = seen.get(key, 0) + 1
        badness = (answer.ended, BADNESS[answer.verdict.outcome], answer.verdict.overlap)
        ranked.append(((seen[key], *badness), answer))
    ranked.sort(key=lambda pair: pair[0])
    return [describe_answer(answer) for _, answer in ranked[:count]]


def describe_answer(answer: Answer) -> dict[str, Any]:
    """One reply as a report shows it."""
    return {
        "group": answer.turn.group,
        "kind": answer.turn.kind,
        "column": answer.turn.column,
        "subject": answer.turn.subject,
        "question": answer.turn.text,
        "expected": answer.turn.reference,
        "got": answer.reply,
        "ended": answer.ended,
        "outcome": answer.verdict.outcome,
        "reason": answer.verdict.reason,
    }


def compare(first: Sequence[Answer], second: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Two candidates on the same questions, group by group.

    Returns:
        group → {"difference" of the exact shares, second minus first; "bootstrap95" of it, over conversations;
        "only_first", "only_second": questions that only one of them answered right; "mcnemar_p"}.
    """
    assert [a.turn for a in first] == [b.turn for b in second], "two candidates were asked different questions"
    groups: dict[str, list[tuple[Answer, Answer]]] = {}
    for a, b in zip(first, second):
        groups.setdefault(a.turn.group, []).append((a, b))
    return {group: _compare_group(pairs) for group, pairs in groups.items()}


def _compare_group(pairs: Sequence[tuple[Answer, Answer]]) -> dict[str, Any]:
    right = [(a.verdict.outcome == "exact", b.verdict.outcome == "exact") for a, b in pairs]
    only_first = sum(a and not b for a, b in right)
    only_second = sum(b and not a for a, b in right)
    first, second = [float(a) for a, _ in right], [float(b) for _, b in right]
    low, high = bootstrap_difference(first, second, [a.dialogue for a, _ in pairs])
    return {
        "difference": (only_second - only_first) / len(pairs),
        "bootstrap95": [low, high],
        "only_first": only_first,
        "only_second": only_second,
        "mcnemar_p": mcnemar_p(only_first, only_second),
    }


def wilson_interval(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson, 1927), which stays inside 0..1 and is not empty at 0 or 1.

    Raises:
        ValueError: there were no trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials is no share")
    share = successes / trials
    scale = 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test: could both candidates be equally good?

    Args:
        only_first: questions that only the first candidate answered right.
        only_second: those that only the second did. What both or neither did says nothing.
    """
    differing = only_first + only_second
    if differing == 0:
        return 1.0
    fewer = min(only_first, only_second)
    tail = sum(math.comb(differing, k) for k in range(fewer + 1)) / 2**differing
    return min(1.0, 2 * tail)


def bootstrap_difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[int], seed: int = 0
) -> tuple[float, float]:
    """95 % interval of mean(second) - mean(first), from resampled conversations (percentile bootstrap).

    Args:
        first, second: the two candidates' scores of the same questions, in the same order.
        clusters: the conversation that each question is from: questions of one are drawn together, because an early
            mistake spoils the later replies.
    """
    import numpy
    import pandas

    assert len(first) == len(second) == len(clusters) > 0, "scores do not pair up"
    differences = pandas.Series(second, dtype=float) - pandas.Series(first, dtype=float)
    talks = differences.groupby(list(clusters)).agg(["sum", "size"]).to_numpy()
    drawn = talks[numpy.random.default_rng(seed).integers(len(talks), size=(RESAMPLES, len(talks)))].sum(axis=1)
    low, high = numpy.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    return float(low), float(high)


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
