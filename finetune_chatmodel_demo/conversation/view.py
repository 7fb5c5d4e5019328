"""Shows rows as people can check them: which token is what, and where the loss counts.

`inspect_data.py` prints these views, or writes them as a page that needs no other file. A row of every stage is a few
sequences with names: the tokens of sft, a block of pt, prompt and replies of rm, dpo and ppo.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune_chatmodel_demo.conversation.packing import PackedDataset
from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
CONTROL_TOKENS = ("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
RESET, GREEN, BLUE, DIM = "\033[0m", "\033[32m", "\033[34m", "\033[2m"
LENGTH_PERCENTILES = (50, 90, 95, 99)
DOCUMENT_MARK = "┄┄ document ┄┄"


@dataclass(frozen=True)
class RowPart:
    """One sequence of a row.

    Attributes:
        name: "" where it is the whole row.
        input_ids: Its ids.
        labels: As long: the id where the loss counts, else -100.
        start: Position of its first token in what the model reads.
    """

    name: str
    input_ids: list[int]
    labels: list[int]
    start: int = 0


def split_row(item: dict[str, list[int]]) -> list[RowPart]:
    """The sequences of a row of any stage. A ppo reference is only compared with: no loss counts on it."""
    if "prompt_ids" in item:
        prompt = item["prompt_ids"]
        replies = [(name, item[f"{name}_ids"], item[f"{name}_ids"]) for name in ("chosen", "rejected")]
    elif item["labels"][:1] != [IGNORED_LABEL]:  # the two ids that start a row of sft or pt are never targets
        prompt, reference = item["input_ids"], item["labels"]
        replies = [("reference", reference, [IGNORED_LABEL] * len(reference))] if reference else []
    else:
        return [RowPart("", item["input_ids"], item["labels"])]
    parts = [RowPart("prompt", prompt, [IGNORED_LABEL] * len(prompt))]
    return parts + [RowPart(name, ids, labels, len(prompt)) for name, ids, labels in replies]


def format_summary(dataset: Any, note: str = "") -> str:
    """A few lines on a whole data set: rows, turns, tokens, share supervised, truncated, lengths."""
    return "\n".join(
        [dataset.report.path + note, *(f"  {name:<11} {value}" for name, value in summarize(dataset).items())]
    )


def summarize(dataset: Any) -> dict[str, str]:
    """What `format_summary` shows, by name."""
    report = dataset.report
    lengths = dataset.lengths
    percentiles = np.percentile(lengths, LENGTH_PERCENTILES, method="inverted_cdf")
    shares = [f"p{share} {int(length):,}" for share, length in zip(LENGTH_PERCENTILES, percentiles)]
    too_long = f", {report.rows_dropped_long:,} too long" if report.rows_dropped_long else ""
    facts = {
        "rows": f"{report.rows_kept:,} of {report.rows_read + report.rows_bad:,} records",
        "dropped": f"{report.rows_bad:,} bad records, {report.rows_dropped_masked:,} without a target{too_long}",
        "turns": f"{report.turns_kept:,} ({report.turns_kept / report.rows_kept:.1f} a row)",
        "tokens": f"{report.tokens_total:,} ({report.tokens_total / report.rows_kept:.1f} a row)",
        "supervised": f"{report.tokens_supervised:,} tokens ({report.tokens_supervised / report.tokens_total:.1%})",
        "truncated": (
            f"{report.rows_cut:,} rows ({report.rows_cut / report.rows_kept:.1%}), {report.rows_cut_inside:,} of them "
            f"inside a turn; {report.turns_dropped:,} turns left out"
        ),
        "length": ", ".join([*shares, f"longest {max(lengths):,}"]),
    }
    is_blocks = isinstance(dataset, PackedDataset)
    if is_blocks:
        facts["rows"] = f"{report.rows_kept:,} blocks of {len(dataset.documents):,} documents"
    elif not dataset.is_whole:
        facts["rows"] = f"{report.rows_kept:,}, out of {sum(each.rows_kept for each in dataset.reports):,}"
    if is_blocks or not dataset.is_whole:
        # Counted for whole data sets, in the table; here are some of their rows, or some more than once.
        del facts["dropped"], facts["turns"], facts["truncated"]
    if not report.tokens_supervised:
        del facts["supervised"]
    return facts


def format_row(
    tokenizer: Any,
    item: dict[str, list[int]],
    title: str,
    use_color: bool = False,
    document_starts: Sequence[int] = (),
) -> str:
    """One row for the terminal: its text with the supervised parts marked, and a table of its tokens.

    Args:
        tokenizer: A `ChatTokenizer` with `convert_ids_to_tokens`.
        item: A row of any stage.
        title: What to call the row.
        use_color: Marks with ANSI colours (green: the loss counts); without, with brackets ⟦ ⟧.
        document_starts: Positions in a block of pt at which a document begins; a line marks each.

    Returns:
        The text. In the table, mask 1 means that the loss counts at this token; positions are those in what the model
        reads, so that a reply goes on where the prompt ends.
    """
    parts = split_row(item)
    lines = [f"{title}: {describe(item)}"]
    for part in parts:
        lines += [f"{part.name}:"] if part.name else []
        lines.append(_format_flow(tokenizer, part, use_color, document_starts))
    lines += ["", f"{'position':>8} {'id':>7} {'label':>7} {'mask':>4}  text"]
    for part in parts:
        lines += [f"{part.name}:"] if part.name else []
        lines += _format_tokens(tokenizer, part, use_color, document_starts)
    return "\n".join(lines)


def _format_flow(tokenizer: Any, part: RowPart, use_color: bool, document_starts: Sequence[int]) -> str:
    texts, control_ids = token_texts(tokenizer, part.input_ids), find_control_ids(tokenizer)
    flow, was_target = [], False
    for position, (text, token_id, label) in enumerate(zip(texts, part.input_ids, part.labels)):
        counts = label != IGNORED_LABEL
        if position in document_starts:
            flow.append(f"\n{DOCUMENT_MARK}\n")
        if use_color:
            flow.append(_paint(text, GREEN if counts else BLUE if token_id in control_ids else DIM))
        else:
            flow.append(("⟦" if counts and not was_target else "⟧" if was_target and not counts else "") + text)
        was_target = counts
    flow.append("⟧" if was_target and not use_color else "")
    return "".join(flow).replace("\\n", "\\n\n")


def _format_tokens(tokenizer: Any, part: RowPart, use_color: bool, document_starts: Sequence[int]) -> list[str]:
    lines = []
    for position, text in enumerate(token_texts(tokenizer, part.input_ids)):
        token_id, label = part.input_ids[position], part.labels[position]
        counts = label != IGNORED_LABEL
        if position in document_starts:
            lines.append(DOCUMENT_MARK)
        line = f"{part.start + position:>8} {token_id:>7} {label:>7} {counts:>4d}  {text}"
        lines.append(_paint(line, GREEN) if use_color and counts else line)
    return lines


def describe(item: dict[str, list[int]]) -> str:
    """How long a row is and how much of it is supervised; of a prompt and replies, how long each is."""
    parts = split_row(item)
    if len(parts) > 1 or parts[0].name:
        return ", ".join(f"{part.name} {len(part.input_ids)} tokens" for part in parts)
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


def find_control_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that come from structure."""
    return {tokenizer.eos_token_id, *map(tokenizer.get_command, CONTROL_TOKENS)}


def _paint(text: str, color: str) -> str:
    return f"{color}{text}{RESET}"


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
