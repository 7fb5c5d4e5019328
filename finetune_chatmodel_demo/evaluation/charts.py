"""Bar charts of a comparison as SVG text, to stand inside of a page."""

import io
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUTCOME_COLOURS = {"exact": "#3a9b67", "partial": "#e2b93b", "wrong": "#c2455a", "missing": "#b6bdc7"}
BAR_INCHES, BLOCK_INCHES, EDGE_INCHES, WIDTH_INCHES = 0.17, 0.12, 0.8, 9.0


def share_chart(result: dict[str, Any]) -> str:
    """Exact shares with their 95 % intervals, a block of bars a group; the mark is the same answer always."""
    import pandas

    scores = pandas.DataFrame({c["name"]: c["groups"] for c in result["candidates"]})
    shares = scores.map(lambda score: score["share"])
    # To the left and right of each bar's end: (candidates, 2, groups); a share of 0 or 1 must not give -1e-17.
    reach = [
        [[abs(score["share"] - score["wilson95"][side]) for score in scores[name]] for side in (0, 1)]
        for name in scores
    ]
    figure, axes = _figure(len(shares), len(shares.columns))
    shares.plot.barh(ax=axes, xerr=reach, xlim=(0, 1), width=0.8, error_kw={"linewidth": 0.8})
    constant = [result["constant_answer"][group] for group in shares.index]
    axes.scatter(constant, range(len(constant)), marker="|", s=200, color="black", label="same answer always", zorder=3)
    return _to_svg(figure, axes, "share of exact answers")


def outcome_chart(result: dict[str, Any]) -> str:
    """Outcomes as stacked bars, one a group and candidate."""
    import pandas

    rows = {
        f"{group} · {candidate['name']}": {
            outcome: candidate["groups"][group][outcome] / candidate["groups"][group]["asked"]
            for outcome in OUTCOME_COLOURS
        }
        for group in result["candidates"][0]["groups"]
        for candidate in result["candidates"]
    }
    figure, axes = _figure(len(rows), 1)
    frame = pandas.DataFrame.from_dict(rows, orient="index")
    frame.plot.barh(ax=axes, stacked=True, xlim=(0, 1), width=0.8, color=OUTCOME_COLOURS)
    return _to_svg(figure, axes, "share of the questions")


def probe_chart(result: dict[str, Any]) -> str:
    """Bits per character of the probe texts, a block a set: what counts is the difference within it."""
    import pandas

    candidates = [candidate for candidate in result["candidates"] if "probes" in candidate]
    found = {
        candidate["name"]: {
            name: figures["bits_per_character"] for name, figures in candidate["probes"]["perplexity"].items()
        }
        for candidate in candidates
    }
    frame = pandas.DataFrame(found)
    figure, axes = _figure(len(frame), len(frame.columns))
    frame.plot.barh(ax=axes, width=0.8)
    return _to_svg(figure, axes, "bits per character (less is better)")


def _figure(blocks: int, bars: int) -> "tuple[Figure, Any]":
    """An empty chart, as high as its bars need."""
    from matplotlib.figure import Figure

    height = EDGE_INCHES + blocks * (BLOCK_INCHES + bars * BAR_INCHES)
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    return figure, figure.subplots()


def _to_svg(figure: "Figure", axes: Any, label: str) -> str:
    """The chart without an XML head; its texts stay texts, in the fonts of whoever looks at it."""
    from matplotlib import rc_context

    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]
