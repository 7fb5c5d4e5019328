"""Tables as text: aligned in a terminal, also where cells are Chinese, or Markdown; pandas and tabulate do the work."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


def format_table(
    rows: "DataFrame | Sequence[Mapping[str, Any]]", style: str = "simple", right: Collection[str] = ()
) -> str:
    """A table with one line for each row.

    Args:
        rows: a data frame, or one mapping a row; the keys are the headings. Cells are shown as `str` of them, numbers
            are right-aligned.
        style: `simple` for a terminal, `github` for Markdown (any `tablefmt` of tabulate).
        right: headings of further columns that are right-aligned: numbers that are texts already.
    """
    import pandas
    import tabulate

    tabulate.MIN_PADDING = 0  # a heading needs no room of its own beside the two blanks between columns
    frame = rows if isinstance(rows, pandas.DataFrame) else pandas.DataFrame(list(rows))
    is_right = [name in right or pandas.api.types.is_numeric_dtype(kind) for name, kind in frame.dtypes.items()]
    if style == "github":
        frame = frame.map(lambda cell: str(cell).replace("|", "\\|").replace("\n", " "))
    return frame.to_markdown(
        index=False,
        tablefmt=style,
        disable_numparse=True,
        colalign=["right" if number else "left" for number in is_right] or None,
    )
