"""A comparison written down: a table for the terminal; report.json, .md, .html and answers.jsonl in one folder."""

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune_chatmodel_demo.common.files import whole_files
from finetune_chatmodel_demo.common.tables import format_table
from finetune_chatmodel_demo.evaluation.asking import Answer
from finetune_chatmodel_demo.evaluation.charts import outcome_chart, probe_chart, share_chart
from finetune_chatmodel_demo.evaluation.comparison import describe_answer
from finetune_chatmodel_demo.evaluation.questions import QuestionSet, check_training_file

if TYPE_CHECKING:
    from pandas import DataFrame

Result = dict[str, Any]
RECORDED_FLAGS = ("csv", "template", "questions_file", "train_file", "seed", "hold_out", "history", "batch_size")
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
STYLE = """
body { font: 15px/1.5 system-ui, "Noto Sans SC", "Microsoft YaHei", sans-serif; max-width: 1100px; margin: 2em auto;
  padding: 0 1em; color: #1c2430; background: #fff; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; border-bottom: 1px solid #d5dbe3; }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px; display: block; overflow-x: auto; }
th, td { border: 1px solid #d5dbe3; padding: .3em .6em; text-align: left; vertical-align: top; }
th { background: #eef2f7; } td { white-space: pre-wrap; max-width: 26em; overflow-wrap: anywhere; }
.note { color: #55606e; } svg { max-width: 100%; height: auto; }
details { margin: .6em 0; } summary { cursor: pointer; font-weight: 600; }
"""


def format_share(score: Mapping[str, Any]) -> str:
    """`97.0% (94.4% to 98.4%)`"""
    low, high = score["wilson95"]
    return f"{score['share']:.1%} ({low:.1%} to {high:.1%})"


def share_table(result: Result) -> "DataFrame":
    """Exact shares: a row a group, a column a candidate."""
    rows = []
    for group, first in result["candidates"][0]["groups"].items():
        shares = {candidate["name"]: format_share(candidate["groups"][group]) for candidate in result["candidates"]}
        constant = f"{result['constant_answer'][group]:.1%}"
        rows.append({"exact in facts": group, **shares, "same answer always": constant, "questions": first["asked"]})
    return _frame(rows)


def outcome_table(result: Result) -> "DataFrame":
    """Every outcome of every candidate and group."""
    rows = []
    for group in result["candidates"][0]["groups"]:
        for candidate in result["candidates"]:
            score = candidate["groups"][group]
            row = {"group": group, "candidate": candidate["name"]}
            row |= {outcome: score[outcome] for outcome in ("exact", "partial", "wrong", "missing")}
            row |= {key.replace("_", " "): f"{score[key]:.1%}" for key in ("overlap", "verbatim", "begins_right")}
            rows.append(row | {"not ended": score["not_ended"]})
    return _frame(rows)


def difference_table(result: Result) -> "DataFrame":
    """Differences between candidates on the same questions."""
    return _frame(
        {
            "group": group,
            "candidates": f"{pair['first']} → {pair['second']}",
            "difference": f"{figures['difference']:+.1%}",
            "95 % interval": "{:+.1%} to {:+.1%}".format(*figures["bootstrap95"]),
            "only the first": figures["only_first"],
            "only the second": figures["only_second"],
            "p": "<0.001" if figures["mcnemar_p"] < 0.001 else f"{figures['mcnemar_p']:.3f}",
        }
        for pair in result["comparisons"]
        for group, figures in pair["groups"].items()
    )


def probe_table(result: Result) -> "DataFrame":
    """Probes: a row a figure, a column a candidate; empty where nothing was probed."""
    columns: dict[str, dict[str, str]] = {}
    for candidate in (candidate for candidate in result["candidates"] if "probes" in candidate):
        column = columns[candidate["name"]] = {}
        for name, figures in candidate["probes"]["perplexity"].items():
            column[f"perplexity, {name}"] = f"{figures['perplexity']:,.4g}"
            column[f"bits per character, {name}"] = f"{figures['bits_per_character']:.3f}"
        titles = {"ended": "ends by itself", "role_format": "one plain turn", "asked_form": "has the asked form"}
        for key, title in titles.items() if "obedience" in candidate["probes"] else ():
            share = candidate["probes"]["obedience"][key]
            column[title] = "–" if share is None else f"{share:.0%}"
    return _frame(
        {"probe": probe, **{name: column[probe] for name, column in columns.items()}}
        for probe in next(iter(columns.values()), ())
    )


def split_table(result: Result, key: str) -> "DataFrame":
    """Exact shares by column ("by_column") or by kind of turn ("by_kind"), within each group."""
    return _frame(
        {
            "group": group,
            {"by_column": "column", "by_kind": "turn"}[key]: part,
            **{c["name"]: f"{c['groups'][group][key][part]['share']:.1%}" for c in result["candidates"]},
            "questions": figures["asked"],
        }
        for group, score in result["candidates"][0]["groups"].items()
        for part, figures in score[key].items()
    )


def example_table(examples: Sequence[Mapping[str, Any]]) -> "DataFrame":
    """Replies that are not exact."""
    return _frame(
        {key: example[key] for key in ("group", "question", "expected", "got")}
        | {"outcome": ": ".join(filter(None, (example["outcome"], example["reason"])))}
        for example in examples
    )


def _frame(rows: Any) -> "DataFrame":
    import pandas

    return pandas.DataFrame(list(rows))


def summary(result: Result, examples: int) -> str:
    """What evaluate.py prints: shares, probes, and the worst replies of the last candidate."""
    parts = [format_table(share_table(result)), "(exact share with its 95 % Wilson interval)"]
    if len(probes := probe_table(result)):
        parts.append("\n" + format_table(probes))
    last = result["candidates"][-1]
    for example in last["examples"][:examples]:
        parts.append(f"{example['group']}, {last['name']}, {example['outcome']} ({example['reason']})")
        parts.append(f"    {example['question']}")
        parts.append(f"    expected {example['expected']!r}")
        parts.append(f"    got      {example['got']!r}")
    return "\n".join(parts)


class _Section(NamedTuple):
    """A heading of the report, what stands under it, and how it is drawn in the page."""

    title: str
    note: str
    table: "DataFrame"
    chart: Callable[[Result], str] | None = None


def _sections(result: Result) -> Iterator[_Section]:
    yield _Section("Exact answers", NOTES_ON_SHARES, share_table(result), share_chart)
    yield _Section("Outcomes", "", outcome_table(result), outcome_chart)
    if len(result["candidates"]) > 1:
        yield _Section("Differences", NOTES_ON_DIFFERENCES, difference_table(result))
    if len(probes := probe_table(result)):
        has_texts = any(candidate.get("probes", {}).get("perplexity") for candidate in result["candidates"])
        yield _Section("What else has changed", NOTES_ON_PROBES, probes, probe_chart if has_texts else None)
    yield _Section("By column", "", split_table(result, "by_column"))
    yield _Section("By kind of turn", "", split_table(result, "by_kind"))


def to_markdown(result: Result) -> str:
    """The whole report."""
    blocks = ["# Evaluation", "\n".join(f"- {fact}" for fact in _describe(result))]
    for section in _sections(result):
        blocks += [f"## {section.title}", _markdown_table(section.table), section.note]
    blocks.append("## The worst examples")
    for candidate in result["candidates"]:
        examples = candidate["examples"]
        found = _markdown_table(example_table(examples)) if examples else "None: every reply is exact."
        blocks += [f"### {candidate['name']}", found]
    return "\n\n".join(filter(None, blocks)) + "\n"


def to_html(result: Result) -> str:
    """The report as a page that can be sent around as one file: charts are inside, nothing is loaded."""
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in _describe(result))
    parts = [f"<h1>Evaluation</h1>\n<ul>{facts}</ul>"]
    for section in _sections(result):
        parts.append(f"<h2>{section.title}</h2>")
        if section.note:
            parts.append(f'<p class="note">{escape(section.note)}</p>')
        if section.chart:
            parts.append(section.chart(result))
        parts.append(section.table.to_html(index=False))
    parts.append("<h2>The worst examples</h2>")
    for candidate in result["candidates"]:
        examples, name = candidate["examples"], escape(candidate["name"])
        if examples:
            title = f"{name}: {len(examples)} of the replies that are not exact"
            table = example_table(examples).to_html(index=False)
            parts.append(f"<details open><summary>{title}</summary>{table}</details>")
        else:
            parts.append(f"<p><b>{name}</b>: every reply is exact.</p>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Evaluation</title>'
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _describe(result: Result) -> Iterator[str]:
    """What was asked of whom, one line a fact; long lists are counted."""
    for key, value in result.get("run", {}).items():
        if value in (None, "", [], {}):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name}: {part}" for name, part in value.items())
        elif isinstance(value, list):
            value = f"{len(value)} ({'、'.join(map(str, value[:5]))} …)"
        yield f"{key.replace('_', ' ')}: {value}"
    for candidate in result["candidates"]:
        where = f", {candidate['checkpoint']}" if candidate["checkpoint"] else ""
        yield f"{candidate['name']}: {candidate['kind']} of {candidate['model']}{where}"


def _markdown_table(frame: "DataFrame") -> str:
    """A reply may hold anything: what would break the table, or be taken for Markdown or HTML, is defused."""

    def defuse(cell: Any) -> str:
        text = str(cell).replace("\\", "\\\\").replace("<", "&lt;").replace("`", "\\`").replace("*", "\\*")
        return " ⏎ ".join(text.splitlines())

    return format_table(frame.map(defuse), "github")


def describe_run(arguments: argparse.Namespace, questions: QuestionSet) -> dict[str, Any]:
    """What a report says of the run: flags, how the questions came about, what the training file has of them.

    Raises:
        UserError: `--train_file` holds what it must not.
    """
    import torch
    import transformers

    flags = {name: getattr(arguments, name) for name in RECORDED_FLAGS}
    run = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    run |= {key: questions.notes[key] for key in ("fields", "held_out", "left_out") if questions.notes.get(key)}
    if arguments.train_file:
        overlaps = check_training_file(questions, arguments.train_file)
        run["in_training_file"] = {group: f"{found} of {asked}" for group, (found, asked) in overlaps.items()}
    versions = f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return run | {"versions": versions}


def write_reports(folder: Path, result: Result, answers: Mapping[str, Sequence[Answer]]) -> None:
    """Write all four files, or none; the folder is made where it is missing."""
    names = ("report.json", "report.md", "report.html", "answers.jsonl")
    with whole_files(*(folder / name for name in names)) as (data, text, page, replies):
        data.write(json.dumps(result, ensure_ascii=False, indent=2) + "\n")
        text.write(to_markdown(result))
        page.write(to_html(result))
        for name, found in answers.items():
            for answer in found:
                row = {"candidate": name, "dialogue": answer.dialogue} | describe_answer(answer)
                row |= {"overlap": answer.verdict.overlap, "verbatim": answer.is_verbatim}
                replies.write(json.dumps(row, ensure_ascii=False) + "\n")
