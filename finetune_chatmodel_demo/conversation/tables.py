"""The table of what became of the data, which a run prints before it starts and `inspect_data.py` shows.

Columns line up in a terminal also where names are Chinese; the table is at most 100 columns wide.
"""

import unicodedata
from collections.abc import Sequence

from finetune_chatmodel_demo.conversation.tokenizing import DatasetReport

WIDEST = 100
EXACT_TOKENS = 100_000_000  # more are shown in millions
HEADINGS = ("data set", "read", "bad", "no target", "too long", "kept", "cut", "tokens", "supervised", "train")


def format_data_table(sets: Sequence[tuple[str, DatasetReport, int]]) -> str:
    """One line for each data set.

    `read` counts records; those that are `bad`, have `no target` or are `too long` are dropped, the rest is `kept`.
    `cut` rows lack something because of the length limit; `supervised` is the share of the tokens that are targets;
    `train` is how many rows (pt: documents) of an epoch come from the data set.

    Args:
        sets: Name, report, and rows of an epoch of each data set.
    """
    rows = [HEADINGS, *(_cells(*each) for each in sets)]
    widths = [max(display_width(row[column]) for row in rows) for column in range(len(HEADINGS))]
    room = WIDEST - sum(widths[1:]) - 2 * (len(widths) - 1)
    widths[0] = min(widths[0], max(room, display_width(HEADINGS[0])))
    lines = []
    for row in rows:
        name = pad(shorten(row[0], widths[0]), widths[0])
        lines.append("  ".join([name, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cells(name: str, report: DatasetReport, train_rows: int) -> tuple[str, ...]:
    counts = (
        report.rows_read + report.rows_bad,
        report.rows_bad,
        report.rows_dropped_masked,
        report.rows_dropped_long,
        report.rows_kept,
        report.rows_cut,
    )
    tokens = report.tokens_total
    counted = f"{tokens:,}" if tokens < EXACT_TOKENS else f"{tokens / 1e6:,.0f}M"
    share = report.tokens_supervised / max(1, report.tokens_total)
    supervised = f"{share:.1%}" if report.tokens_supervised else "-"
    return (name, *(f"{count:,}" for count in counts), counted, supervised, f"{train_rows:,}" if train_rows else "-")


def display_width(text: str) -> int:
    """Columns of a text in a terminal: wide East Asian characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def pad(text: str, width: int) -> str:
    """Fills up with blanks on the right."""
    return text + " " * (width - display_width(text))


def shorten(text: str, width: int) -> str:
    """Leaves out the beginning of a text that is too wide: the end of a path tells most."""
    if display_width(text) <= width:
        return text
    while display_width(text) > width - 1:
        text = text[1:]
    return f"…{text}"
