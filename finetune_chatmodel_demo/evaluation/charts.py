"""Bar charts as SVG text, drawn by hand: no fonts to ship, no library to load.

Exercised by `python -m pytest tests/test_evaluation_report.py`.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

COLOURS = ("#8a94a3", "#2f6fb7", "#d9822b", "#3a9b67", "#8b5fbf", "#c2455a", "#5aa7b5", "#a0853c")
OUTCOME_COLOURS = {"exact": "#3a9b67", "partial": "#e2b93b", "wrong": "#c2455a", "missing": "#b6bdc7"}
LABEL_WIDTH, PLOT_WIDTH, BAR, GAP = 250, 640, 16, 14


def share_chart(result: dict[str, Any]) -> str:
    """Exact shares with their intervals, a block of bars a group."""
    candidates = result["candidates"]
    names = [candidate["name"] for candidate in candidates]
    shapes, y = _legend(list(zip(names, COLOURS * len(names)))), 34
    for group in candidates[0]["groups"]:
        shapes.append(_label(group, y + len(candidates) * BAR / 2 + 4))
        for i, candidate in enumerate(candidates):
            score = candidate["groups"][group]
            low, high = (LABEL_WIDTH + value * PLOT_WIDTH for value in score["wilson95"])
            top, middle = y + i * BAR, y + i * BAR + (BAR - 3) / 2
            tip = f"{candidate['name']}, {group}: {score['exact']} of {score['asked']}"
            shapes.append(_bar(LABEL_WIDTH, top, score["share"] * PLOT_WIDTH, COLOURS[i % len(COLOURS)], tip))
            shapes.append(f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}" stroke="#1c2430" stroke-width="1.2"/>')
            shapes.append(f'<text x="{max(high, LABEL_WIDTH) + 5:.1f}" y="{top + 11}">{score["share"]:.1%}</text>')
        constant = LABEL_WIDTH + result["constant_answer"][group] * PLOT_WIDTH
        bottom = y + len(candidates) * BAR
        shapes.append(f'<path d="M{constant:.1f} {y - 3}V{bottom}" stroke="#1c2430" stroke-dasharray="3 3"/>')
        y = bottom + GAP
    caption = "Bars: exact share; lines: 95 % interval; dashed: the same answer always"
    return _svg([*shapes, _label(caption, y + 6, x=LABEL_WIDTH, anchor="start")], y + 16, "Exact answers")


def outcome_chart(result: dict[str, Any]) -> str:
    """Outcomes as stacked bars, one a group and candidate."""
    shapes, y = _legend(list(OUTCOME_COLOURS.items())), 34
    for group in result["candidates"][0]["groups"]:
        for candidate in result["candidates"]:
            score, x = candidate["groups"][group], float(LABEL_WIDTH)
            shapes.append(_label(f"{group} · {candidate['name']}", y + 11))
            for outcome, colour in OUTCOME_COLOURS.items():
                width = score[outcome] / score["asked"] * PLOT_WIDTH
                if width:
                    tip = f"{candidate['name']}, {group}: {score[outcome]} {outcome}"
                    shapes.append(_bar(x, y, width, colour, tip))
                x += width
            y += BAR
        y += GAP
    return _svg(shapes, y, "Outcomes")


def probe_chart(result: dict[str, Any]) -> str:
    """Bits per character of the probe texts, a block a set: what counts is the difference within it."""
    candidates = [candidate for candidate in result["candidates"] if "probes" in candidate]
    names = [candidate["name"] for candidate in candidates]
    shapes, y = _legend(list(zip(names, COLOURS * len(names)))), 34
    sets = candidates[0]["probes"]["perplexity"]
    for name in sets:
        found = [candidate["probes"]["perplexity"][name]["bits_per_character"] for candidate in candidates]
        scale = PLOT_WIDTH / max(*found, 1e-9)
        shapes.append(_label(name, y + len(candidates) * BAR / 2 + 4))
        for i, candidate in enumerate(candidates):
            bits = candidate["probes"]["perplexity"][name]["bits_per_character"]
            tip = f"{candidate['name']}, {name}: {bits:.3f} bits per character"
            shapes.append(_bar(LABEL_WIDTH, y + i * BAR, bits * scale, COLOURS[i % len(COLOURS)], tip))
            shapes.append(f'<text x="{LABEL_WIDTH + bits * scale + 5:.1f}" y="{y + i * BAR + 11}">{bits:.2f}</text>')
        y += len(candidates) * BAR + GAP
    caption = "Bits per character, less is better; each block has its own scale"
    return _svg([*shapes, _label(caption, y + 6, x=LABEL_WIDTH, anchor="start")], y + 16, "Probe texts")


def _legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    shapes, x = [], float(LABEL_WIDTH)
    for name, colour in entries:
        shapes.append(_bar(x, 6, 12, colour, name))
        shapes.append(_label(name, 17, x=x + 18, anchor="start"))
        x += 34 + sum(13 if ord(character) > 0x2E7F else 7 for character in name)
    return shapes


def _bar(x: float, y: float, width: float, colour: str, tip: str) -> str:
    shape = f'x="{x:.1f}" y="{y}" width="{max(width, 0.5):.1f}" height="{BAR - 3}" fill="{colour}"'
    return f"<rect {shape}><title>{escape(tip)}</title></rect>"


def _label(text: str, y: float, *, x: float = LABEL_WIDTH - 8, anchor: str = "end") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(shapes: Sequence[str], height: float, title: str) -> str:
    width = LABEL_WIDTH + PLOT_WIDTH + 70
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 8:.0f}" role="img">'
    return f"{head}<title>{escape(title)}</title>{''.join(shapes)}</svg>"
