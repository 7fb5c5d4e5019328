"""Shows rows as people can check them: which token is what, and where the loss counts.

`inspect_data.py` prints these views; training shows the first row with `format_row` before it starts.
"""

import html
import re
from typing import Any

import numpy as np

from finetune_chatmodel_demo.conversation.datasets import ConversationDataset
from finetune_chatmodel_demo.conversation.rendering import IGNORED_LABEL

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
CONTROL_TOKENS = ("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
RESET, GREEN, BLUE, DIM = "\033[0m", "\033[32m", "\033[34m", "\033[2m"
LENGTH_PERCENTILES = (50, 90, 95, 99)


def format_summary(dataset: ConversationDataset) -> str:
    """A few lines on a whole data set: rows, turns, tokens, share supervised, truncated, lengths."""
    return "\n".join([dataset.report.path, *(f"  {name:<11} {value}" for name, value in summarize(dataset).items())])


def summarize(dataset: ConversationDataset) -> dict[str, str]:
    """What `format_summary` shows, by name."""
    report = dataset.report
    percentiles = np.percentile(dataset.lengths, LENGTH_PERCENTILES, method="inverted_cdf")
    lengths = [f"p{share} {int(length):,}" for share, length in zip(LENGTH_PERCENTILES, percentiles)]
    return {
        "rows": f"{report.rows_kept:,} of {report.rows_read + report.rows_bad:,} records",
        "dropped": f"{report.rows_bad:,} bad records, {report.rows_dropped_masked:,} without a target, "
        f"{report.rows_dropped_long:,} too long",
        "turns": f"{report.turns_kept:,} ({report.turns_kept / report.rows_kept:.1f} a row)",
        "tokens": f"{report.tokens_total:,} ({report.tokens_total / report.rows_kept:.1f} a row)",
        "supervised": f"{report.tokens_supervised:,} tokens ({report.tokens_supervised / report.tokens_total:.1%})",
        "truncated": (
            f"{report.rows_cut:,} rows ({report.rows_cut / report.rows_kept:.1%}), {report.rows_cut_inside:,} of them "
            f"inside a turn; {report.turns_dropped:,} turns left out"
        ),
        "length": ", ".join([*lengths, f"longest {max(dataset.lengths):,}"]),
    }


def format_row(tokenizer: Any, item: dict[str, list[int]], title: str, use_color: bool = False) -> str:
    """One row for the terminal: its text with the supervised parts marked, and a table of its tokens.

    Args:
        tokenizer: A `ChatTokenizer` with `convert_ids_to_tokens`.
        item: `input_ids` and `labels`.
        title: What to call the row.
        use_color: Marks with ANSI colours (green: the loss counts); without, with brackets ⟦ ⟧.

    Returns:
        The text. In the table, mask 1 means that the loss counts at this token.
    """
    texts, control_ids = token_texts(tokenizer, item["input_ids"]), _control_ids(tokenizer)
    is_target = [label != IGNORED_LABEL for label in item["labels"]]
    flow, was_target = [], False
    for text, token_id, counts in zip(texts, item["input_ids"], is_target):
        if use_color:
            flow.append(_paint(text, GREEN if counts else BLUE if token_id in control_ids else DIM))
        else:
            flow.append(("⟦" if counts and not was_target else "⟧" if was_target and not counts else "") + text)
        was_target = counts
    flow.append("⟧" if was_target and not use_color else "")
    lines = [f"{title}: {describe(item)}", "".join(flow).replace("\\n", "\\n\n"), ""]
    lines.append(f"{'position':>8} {'id':>7} {'label':>7} {'mask':>4}  text")
    for position, text in enumerate(texts):
        label = item["labels"][position]
        line = f"{position:>8} {item['input_ids'][position]:>7} {label:>7} {is_target[position]:>4d}  {text}"
        lines.append(_paint(line, GREEN) if use_color and is_target[position] else line)
    return "\n".join(lines)


def describe(item: dict[str, list[int]]) -> str:
    """How long a row is and how much of it is supervised."""
    total = len(item["labels"])
    supervised = sum(label != IGNORED_LABEL for label in item["labels"])
    return f"{total} tokens, {supervised} supervised ({supervised / max(1, total):.1%})"


def token_texts(tokenizer: Any, input_ids: list[int]) -> list[str]:
    """The text of each token, on one line and harmless to a terminal.

    A character that is spread over byte tokens shows at the last of them; the others show their byte.
    """
    pieces = tokenizer.convert_ids_to_tokens(input_ids)
    texts, pending = [], b""
    for piece in pieces:
        byte = _BYTE_PIECE.fullmatch(piece)
        pending = pending + bytes.fromhex(byte[1]) if byte else b""
        text = piece.replace("▁", " ")
        if byte:
            try:
                text, pending = pending.decode("utf-8"), b""
            except UnicodeDecodeError:
                pending = pending[-3:]
        texts.append("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))
    return texts


def format_html(tokenizer: Any, dataset: ConversationDataset, rows: list[int]) -> str:
    """A page that needs no other file: the summary, and the rows with every token's id and label on hovering."""
    facts = "".join(f"<tr><th>{name}<td>{html.escape(value)}" for name, value in summarize(dataset).items())
    control_ids = _control_ids(tokenizer)
    sections = []
    for row in rows:
        item = dataset[row]
        title = html.escape(f"row {row} · {dataset.where(row)} · {describe(item)}")
        texts = token_texts(tokenizer, item["input_ids"])
        tokens = "".join(
            _token_html(position, text, token_id, label, token_id in control_ids)
            for position, (text, token_id, label) in enumerate(zip(texts, item["input_ids"], item["labels"]))
        )
        sections.append(f"<section><h2>{title}</h2><p>{tokens}</p></section>")
    path = html.escape(dataset.report.path)
    return HTML_PAGE.format(path=path, facts=facts, sections="\n".join(sections))


def _control_ids(tokenizer: Any) -> set[int]:
    return {tokenizer.eos_token_id, *map(tokenizer.get_command, CONTROL_TOKENS)}


def _token_html(position: int, text: str, token_id: int, label: int, is_control: bool) -> str:
    kind = "target" if label != IGNORED_LABEL else "control" if is_control else "context"
    hint = html.escape(f"position {position}, id {token_id}, label {label}, mask {int(label != IGNORED_LABEL)}")
    line_break = "<br>" if text == "\\n" else ""
    return f'<span class="{kind}" title="{hint}">{html.escape(text)}</span>{line_break}'


def _paint(text: str, color: str) -> str:
    return f"{color}{text}{RESET}"


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
</style>
</head>
<body>
<h1>{path}</h1>
<table>{facts}</table>
<p><span class="target">the loss counts</span> <span class="control">control token</span>
<span class="context">context</span> Point at a token to see its id and label.</p>
{sections}
</body>
</html>
"""
