"""A comparison as text: the table for the terminal, and the report as Markdown.

Exercised by `python -m pytest tests/test_evaluation_report.py`.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first being the heading, in columns that also line up with Chinese characters in them."""
    widths = [max(display_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell + " " * (width - display_width(cell)) for cell, width in zip(row, widths)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def display_width(text: str) -> int:
    """Columns in a terminal: wide East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def format_share(score: dict[str, Any]) -> str:
    """`97.0% (94.4% to 98.4%)`"""
    low, high = score["wilson95"]
    return f"{score['share']:.1%} ({low:.1%} to {high:.1%})"


def share_rows(result: Result) -> list[list[str]]:
    """Exact shares: a row a group, a column a candidate."""
    names = [candidate["name"] for candidate in result["candidates"]]
    rows = [["exact in facts", *names, "same answer always", "questions"]]
    for group in result["candidates"][0]["groups"]:
        scores = [candidate["groups"][group] for candidate in result["candidates"]]
        constant = f"{result['constant_answer'][group]:.1%}"
        rows.append([group, *map(format_share, scores), constant, str(scores[0]["asked"])])
    return rows


def outcome_rows(result: Result) -> list[list[str]]:
    """Every outcome of every candidate and group."""
    heading = ["group", "candidate", "exact", "partial", "wrong", "missing", "overlap", "verbatim", "begins right"]
    rows = [[*heading, "not ended"]]
    for group in result["candidates"][0]["groups"]:
        for candidate in result["candidates"]:
            score = candidate["groups"][group]
            counts = [str(score[outcome]) for outcome in ("exact", "partial", "wrong", "missing")]
            shares = [f"{score[key]:.1%}" for key in ("overlap", "verbatim", "begins_right")]
            rows.append([group, candidate["name"], *counts, *shares, str(score["not_ended"])])
    return rows


def comparison_rows(result: Result) -> list[list[str]]:
    """Differences between candidates on the same questions."""
    rows = [["group", "candidates", "difference", "95 % interval", "only the first", "only the second", "p"]]
    for pair in result["comparisons"]:
        for group, figures in pair["groups"].items():
            low, high = figures["bootstrap95"]
            rows.append(
                [
                    group,
                    f"{pair['first']} → {pair['second']}",
                    f"{figures['difference']:+.1%}",
                    f"{low:+.1%} to {high:+.1%}",
                    str(figures["only_first"]),
                    str(figures["only_second"]),
                    format_p(figures["mcnemar_p"]),
                ]
            )
    return rows


def format_p(p: float) -> str:
    """`0.031`, or `<0.001`."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def probe_rows(result: Result) -> list[list[str]]:
    """Probes: a row a figure, a column a candidate; empty where nothing was probed."""
    candidates = [candidate for candidate in result["candidates"] if "probes" in candidate]
    if not candidates:
        return []
    rows = [["probe", *(candidate["name"] for candidate in candidates)]]
    for name in candidates[0]["probes"]["perplexity"]:
        found = [candidate["probes"]["perplexity"][name] for candidate in candidates]
        rows.append([f"perplexity, {name}", *(f"{figures['perplexity']:,.4g}" for figures in found)])
        rows.append([f"bits per character, {name}", *(f"{figures['bits_per_character']:.3f}" for figures in found)])
    if "obedience" in candidates[0]["probes"]:
        titles = {"ended": "ends by itself", "role_format": "one plain turn", "asked_form": "has the asked form"}
        for key, title in titles.items():
            found = [candidate["probes"]["obedience"][key] for candidate in candidates]
            rows.append([title, *("–" if share is None else f"{share:.0%}" for share in found)])
    return rows


def split_rows(result: Result, key: str) -> list[list[str]]:
    """Exact shares by column ("by_column") or by kind of turn ("by_kind"), within each group."""
    names = [candidate["name"] for candidate in result["candidates"]]
    rows = [["group", {"by_column": "column", "by_kind": "turn"}[key], *names, "questions"]]
    for group, score in result["candidates"][0]["groups"].items():
        for part, figures in score[key].items():
            shares = [f"{candidate['groups'][group][key][part]['share']:.1%}" for candidate in result["candidates"]]
            rows.append([group, part, *shares, str(figures["asked"])])
    return rows


def summary(result: Result, examples: int) -> str:
    """What evaluate.py prints: shares, probes, and the worst replies of the last candidate."""
    parts = [format_table(share_rows(result)), "(exact share with its 95 % Wilson interval)"]
    if rows := probe_rows(result):
        parts.append("\n" + format_table(rows))
    last = result["candidates"][-1]
    for example in last["examples"][:examples]:
        parts.append(f"{example['group']}, {last['name']}, {example['outcome']} ({example['reason']})")
        parts.append(f"    {example['question']}")
        parts.append(f"    expected {example['expected']!r}")
        parts.append(f"    got      {example['got']!r}")
    return "\n".join(parts)


def to_markdown(result: Result) -> str:
    """The whole report."""
    lines = ["# Evaluation", "", *_describe(result), "", "## Exact answers", "", *_table(share_rows(result))]
    lines += ["", NOTES_ON_SHARES, "", "## Outcomes", "", *_table(outcome_rows(result))]
    if len(result["candidates"]) > 1:
        lines += ["", "## Differences", "", NOTES_ON_DIFFERENCES, "", *_table(comparison_rows(result))]
    if rows := probe_rows(result):
        lines += ["", "## What else has changed", "", NOTES_ON_PROBES, "", *_table(rows)]
    lines += ["", "## By column", "", *_table(split_rows(result, "by_column"))]
    lines += ["", "## By kind of turn", "", *_table(split_rows(result, "by_kind"))]
    lines += ["", "## The worst examples"]
    for candidate in result["candidates"]:
        lines += ["", f"### {candidate['name']}", ""]
        lines += (
            _table(example_rows(candidate["examples"])) if candidate["examples"] else ["None: every reply is exact."]
        )
    return "\n".join(lines) + "\n"


NOTES_ON_SHARES = (
    "Exact: the reply states the fact, in whatever words, and nothing that contradicts the table (95 % Wilson "
    "interval; the turns of one conversation count singly). Same answer always: what the most frequent value of each "
    "column would score. Unanswerable questions are right where the reply says that it does not know and states no "
    "value. Begins right: the first line or sentence alone is exact, whatever follows it."
)
NOTES_ON_DIFFERENCES = (
    "Second minus first, on the same questions; the interval is a bootstrap over conversations, p is of the exact "
    "McNemar test."
)
NOTES_ON_PROBES = (
    "Perplexity of text that fine-tuning was not about, and whether replies to other requests end by themselves, are "
    "one plain turn of the assistant, and have the form that was asked for."
)


def example_rows(examples: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Replies that are not exact."""
    rows = [["group", "question", "expected", "got", "outcome"]]
    for example in examples:
        outcome = f"{example['outcome']}: {example['reason']}" if example["reason"] else example["outcome"]
        rows.append([example["group"], example["question"], example["expected"], example["got"], outcome])
    return rows


def run_facts(result: Result) -> list[tuple[str, str]]:
    """What a report says of the run, one line a key; long lists are counted."""
    facts = []
    for key, value in result.get("run", {}).items():
        if value in (None, "", [], {}):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name}: {part}" for name, part in value.items())
        elif isinstance(value, list):
            value = f"{len(value)} ({'、'.join(map(str, value[:5]))} …)"
        facts.append((key.replace("_", " "), str(value)))
    return facts


def _describe(result: Result) -> list[str]:
    """What was asked of whom."""
    lines = [f"- {key}: {value}" for key, value in run_facts(result)]
    for candidate in result["candidates"]:
        where = f", {candidate['checkpoint']}" if candidate["checkpoint"] else ""
        lines.append(f"- **{candidate['name']}**: {candidate['kind']} of {candidate['model']}{where}")
    return lines


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return lines


def _cell(text: str) -> str:
    """A reply may hold anything: what would break the table, or be taken for Markdown or HTML, is defused."""
    text = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`").replace("*", "\\*")
    return " ⏎ ".join(text.splitlines()) if text else " "
