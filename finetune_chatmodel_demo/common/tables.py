"""Tables as text: aligned in a terminal, also where cells are Chinese, or Markdown; pandas and tabulate do the work."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


def format_table(rows: "DataFrame | Sequence[Mapping[str, Any]]", style: str = "simple") -> str:
    """A table with one line for each row.

    Args:
        rows: a data frame, or one mapping a row; the keys are the headings. Cells are shown as `str` of them, numbers
            are right-aligned.
        style: `simple` for a terminal, `github` for Markdown (any `tablefmt` of tabulate).
    """
    import pandas

    frame = rows if isinstance(rows, pandas.DataFrame) else pandas.DataFrame(list(rows))
    right = [pandas.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]
    if style == "github":
        frame = frame.map(lambda cell: str(cell).replace("|", "\\|").replace("\n", " "))
    return frame.to_markdown(
        index=False,
        tablefmt=style,
        disable_numparse=True,
        colalign=["right" if number else "left" for number in right] or None,
    )
