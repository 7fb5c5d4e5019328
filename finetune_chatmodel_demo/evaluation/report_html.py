"""A comparison as one HTML page: tables, charts as inline SVG, the worst examples; nothing is loaded from elsewhere.

Exercised by `python -m pytest tests/test_evaluation_report.py`.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from finetune_chatmodel_demo.evaluation import report_text
from finetune_chatmodel_demo.evaluation.charts import outcome_chart, probe_chart, share_chart

STYLE = """
body { font: 15px/1.5 system-ui, "Noto Sans SC", "Microsoft YaHei", sans-serif; max-width: 1100px; margin: 2em auto;
  padding: 0 1em; color: #1c2430; background: #fff; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; border-bottom: 1px solid #d5dbe3; }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px; display: block; overflow-x: auto; }
th, td { border: 1px solid #d5dbe3; padding: .3em .6em; text-align: left; vertical-align: top; }
th { background: #eef2f7; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.reply { white-space: pre-wrap; max-width: 26em; overflow-wrap: anywhere; }
.note { color: #55606e; } svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; }
details { margin: .6em 0; } summary { cursor: pointer; font-weight: 600; }
"""


def to_html(result: dict[str, Any]) -> str:
    """The report as a page that can be sent around as one file."""
    parts = [
        "<h1>Evaluation</h1>",
        _description(result),
        "<h2>Exact answers</h2>",
        share_chart(result),
        _table(report_text.share_rows(result)),
        _note(report_text.NOTES_ON_SHARES),
        "<h2>Outcomes</h2>",
        outcome_chart(result),
        _table(report_text.outcome_rows(result)),
    ]
    if len(result["candidates"]) > 1:
        rows = _table(report_text.comparison_rows(result))
        parts += ["<h2>Differences</h2>", _note(report_text.NOTES_ON_DIFFERENCES), rows]
    if rows := report_text.probe_rows(result):
        parts += [
            "<h2>What else has changed</h2>",
            _note(report_text.NOTES_ON_PROBES),
            probe_chart(result),
            _table(rows),
        ]
    parts += ["<h2>By column</h2>", _table(report_text.split_rows(result, "by_column"))]
    parts += ["<h2>By kind of turn</h2>", _table(report_text.split_rows(result, "by_kind"))]
    parts += ["<h2>The worst examples</h2>", *(_examples(candidate) for candidate in result["candidates"])]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Evaluation</title>'
    head += f"<style>{STYLE}</style>"
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _description(result: dict[str, Any]) -> str:
    items = [f"{escape(key)}: {escape(value)}" for key, value in report_text.run_facts(result)]
    for candidate in result["candidates"]:
        where = f", {candidate['checkpoint']}" if candidate["checkpoint"] else ""
        text = escape(f"{candidate['kind']} of {candidate['model']}{where}")
        items.append(f"<b>{escape(candidate['name'])}</b>: {text}")
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _table(rows: Sequence[Sequence[str]], reply_columns: frozenset[int] = frozenset()) -> str:
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = []
    for row in rows[1:]:
        cells = []
        for i, cell in enumerate(row):
            kind = "reply" if i in reply_columns else "number" if cell[:1].isdigit() or cell[:1] in "+-<" else ""
            cells.append(f"<td{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(cell)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{heading}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _examples(candidate: dict[str, Any]) -> str:
    title = f"{candidate['name']}: {len(candidate['examples'])} of the replies that are not exact"
    if not candidate["examples"]:
        return f"<p><b>{escape(candidate['name'])}</b>: every reply is exact.</p>"
    rows = report_text.example_rows(candidate["examples"])
    return f"<details open><summary>{escape(title)}</summary>{_table(rows, frozenset({1, 2, 3}))}</details>"
