"""From judged replies to figures: shares by group, by column and by kind of turn; two candidates side by side.

The keys are documented in evaluate.py. Exercised by `python -m pytest tests/test_evaluation_report.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from finetune_chatmodel_demo.evaluation.asking import Answer
from finetune_chatmodel_demo.evaluation.fact_checking import OUTCOMES
from finetune_chatmodel_demo.evaluation.statistics import bootstrap_difference, mcnemar_p, wilson_interval

EXAMPLES_KEPT = 20
# The worst first: an endless reply says nothing, a false one misleads, an incomplete one is half right.
BADNESS = {"wrong": 0, "missing": 1, "partial": 2}


def score_group(answers: Sequence[Answer]) -> dict[str, Any]:
    """Figures of one group of questions."""
    counts = count_outcomes(answers)
    low, high = wilson_interval(counts["exact"], len(answers))
    return {
        "asked": len(answers),
        **counts,
        "share": counts["exact"] / len(answers),
        "wilson95": [low, high],
        "overlap": sum(credit(answer) for answer in answers) / len(answers),
        "verbatim": sum(answer.is_verbatim for answer in answers) / len(answers),
        "begins_right": sum(answer.begins_right for answer in answers) / len(answers),
        "not_ended": sum(not answer.ended for answer in answers),
        "by_column": _split(answers, lambda answer: answer.turn.column or "(none)"),
        "by_kind": _split(answers, lambda answer: answer.turn.kind),
        "reasons": _count_reasons(answers),
    }


def count_outcomes(answers: Sequence[Answer]) -> dict[str, int]:
    """How many replies are exact, partial, wrong, missing."""
    return {outcome: sum(answer.verdict.outcome == outcome for answer in answers) for outcome in OUTCOMES}


def credit(answer: Answer) -> float:
    """1 for an exact reply, the overlap share for a partial one, else 0."""
    return answer.verdict.overlap if answer.verdict.outcome in ("exact", "partial") else 0.0


def score_groups(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """`score_group` of every group, in the order in which they first come up."""
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.turn.group, []).append(answer)
    return {group: score_group(found) for group, found in groups.items()}


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


def _split(answers: Sequence[Answer], key: Callable[[Answer], str]) -> dict[str, dict[str, Any]]:
    parts: dict[str, list[Answer]] = {}
    for answer in answers:
        parts.setdefault(key(answer), []).append(answer)
    result = {}
    for name, found in parts.items():
        counts = count_outcomes(found)
        result[name] = {"asked": len(found), **counts, "share": counts["exact"] / len(found)}
    return result


def _count_reasons(answers: Sequence[Answer]) -> dict[str, int]:
    """Why replies are not exact, the most frequent first; whom or what they speak of is left out."""
    counts: dict[str, int] = {}
    for answer in answers:
        reason = answer.verdict.reason
        for start, object_ in (("speaks about", "another subject"), ("false about", "another column")):
            if reason.startswith(start):
                reason = f"{start} {object_}"
        if reason:
            counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))
