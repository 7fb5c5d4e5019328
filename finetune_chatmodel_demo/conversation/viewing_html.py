"""Rows as a page that needs no other file: pointing at a token shows its id and label.

`inspect_data.py --html rows.html` writes it.
"""

import html
from collections.abc import Sequence
from typing import Any

from finetune_chatmodel_demo.conversation.packing import PackedDataset
from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL
from finetune_chatmodel_demo.conversation.viewing import (
    RowPart,
    describe,
    find_control_ids,
    split_row,
    summarize,
    token_texts,
)


def format_html(tokenizer: Any, dataset: Any, rows: Sequence[int], table: str = "") -> str:
    """The page: a summary, and the rows with every token's id and label on hovering.

    Replies to a prompt stand side by side; a line shows where a document of pt begins.

    Args:
        tokenizer: A `ChatTokenizer` with `convert_ids_to_tokens`.
        dataset: Map-style rows of any stage.
        rows: Which rows to show.
        table: The table of the data sets.
    """
    facts = "".join(f"<tr><th>{name}<td>{html.escape(value)}" for name, value in summarize(dataset).items())
    summary = f"<table>{facts}</table>" + (f"\n<pre>{html.escape(table)}</pre>" if table else "")
    path = html.escape(dataset.report.path)
    sections = "\n".join(_format_section(tokenizer, dataset, row) for row in rows)
    return HTML_PAGE.format(path=path, summary=summary, sections=sections)


def _format_section(tokenizer: Any, dataset: Any, row: int) -> str:
    item = dataset[row]
    title = html.escape(f"row {row} · {dataset.where(row)} · {describe(item)}")
    starts = dataset.document_starts(row) if isinstance(dataset, PackedDataset) else ()
    prompt, *replies = (_format_part(tokenizer, part, starts) for part in split_row(item))
    beside = f'<div class="replies">{"".join(f"<div>{reply}</div>" for reply in replies)}</div>' if replies else ""
    return f"<section><h2>{title}</h2>{prompt}{beside}</section>"


def _format_part(tokenizer: Any, part: RowPart, document_starts: Sequence[int]) -> str:
    control_ids = find_control_ids(tokenizer)
    texts = token_texts(tokenizer, part.input_ids)
    tokens = [
        _token_html(part.start + position, text, token_id, label, token_id in control_ids)
        for position, (text, token_id, label) in enumerate(zip(texts, part.input_ids, part.labels))
    ]
    for position in document_starts:
        tokens[position] = f'<hr title="a document begins">{tokens[position]}'
    heading = f"<h3>{part.name}</h3>" if part.name else ""
    return f"{heading}<p>{''.join(tokens)}</p>"


def _token_html(position: int, text: str, token_id: int, label: int, is_control: bool) -> str:
    kind = "target" if label != IGNORED_LABEL else "control" if is_control else "context"
    hint = html.escape(f"position {position}, id {token_id}, label {label}, mask {int(label != IGNORED_LABEL)}")
    line_break = "<br>" if text == "\\n" else ""
    return f'<span class="{kind}" title="{hint}">{html.escape(text)}</span>{line_break}'


HTML_PAGE = """<!DOCTYPE html>
<html lang="zh">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{path}</title>
<style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif; }}
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.7; }}
h1 {{ font-size: 1.3rem; }}
h2 {{ font-size: 1rem; }}
th {{ text-align: left; padding-right: 1.5rem; }}
span {{ white-space: pre-wrap; border-radius: 3px; box-shadow: inset 0 0 0 1px #8883; }}
.target {{ background: #2a26; }}
.control {{ background: #28d4; font-weight: 600; }}
.context {{ opacity: 0.75; }}
.replies {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }}
h3 {{ font-size: 0.9rem; margin: 0; }}
hr {{ border: 0; border-top: 1px dashed #888; }}
pre {{ overflow-x: auto; }}
</style>
</head>
<body>
<h1>{path}</h1>
{summary}
<p><span class="target">the loss counts</span> <span class="control">control token</span>
<span class="context">context</span> Point at a token to see its id and label.</p>
{sections}
</body>
</html>
"""
