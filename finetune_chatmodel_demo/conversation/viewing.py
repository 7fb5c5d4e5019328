"""Shows rows as people can check them: which token is what, and where the loss counts.

`inspect_data.py` prints these views; `viewing_html` makes a page of them. A row of every stage is a few sequences with
names: the tokens of sft, a block of pt, prompt and replies of rm, dpo and ppo.
"""

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
