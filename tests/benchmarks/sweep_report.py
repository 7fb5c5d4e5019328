"""The sweep of `sweep_prefix.py` as a table (sweep_prefix.md) and a picture (sweep_prefix.png).

python tests/benchmarks/sweep_prefix.py --report_only --report tests/benchmarks/results
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from finetune_chatmodel_demo.evaluation.comparison import wilson_interval

# Group of the plan → what its rows differ in.
VARIED = {
    "learning rate": ("learning_rate",),
    "start": ("init",),
    "learning rate × start": ("learning_rate", "init"),
    "projection": ("projection", "learning_rate"),
    "prefix length": ("pre_seq_len",),
    "dropout": ("dropout",),
    "warm-up": ("warmup",),
    "start and seed": ("init", "seed"),
    "what helped": ("projection", "learning_rate", "dropout"),
}
PANELS_PER_ROW = 4
COLUMNS = ("exact, trained wordings", "exact, unseen wordings", "validation loss")


def write_report(groups: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes table and picture into `folder`.

    Args:
        groups: `results` of the sweep's JSON: {"group", "runs": [{"setting", "exact", "validation_loss", …}]}.
        folder: made when missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep_prefix.md").write_text(format_tables(groups), encoding="utf-8")
    draw(groups, folder / "sweep_prefix.png")


def name_group(group: dict[str, Any]) -> str:
    """`Learning rate, 300 steps`."""
    return f"{group['group'][0].upper()}{group['group'][1:]}, {group['runs'][0]['setting']['steps']} steps"


def name_setting(group: str, setting: dict[str, Any]) -> str:
    """What tells a run from the others of its group: `0.15`, `dialogue`, `0.02, N(0, 1²)`."""
    return ", ".join(_name_value(key, setting[key]) for key in VARIED[group])


def _name_value(key: str, value: Any) -> str:
    if key == "init":
        return f"N(0, {value}²)" if value[0].isdigit() else f"text: {value}"
    if key == "projection":
        return "projection" if value else "no projection"
    if key in ("seed", "dropout"):
        return f"{key} {value:g}"
    if key == "warmup":
        return f"{value:.0%}"
    return f"{value:g}"


def format_tables(groups: Sequence[dict[str, Any]]) -> str:
    """A Markdown table for each group."""
    lines = []
    for group in groups:
        questions = group["runs"][0]["setting"]["questions"]
        lines += [
            f"### {name_group(group)}, {questions} questions of each kind",
            "",
            f"| {group['group']} | {' | '.join(COLUMNS)} |",
            "|---" * (1 + len(COLUMNS)) + "|",
        ]
        for run in group["runs"]:
            asked = run["setting"]["questions"]
            shares = [_format_share(run["exact"].get(name), asked) for name in ("train", "validation")]
            loss = "stopped" if "validation_loss" not in run else f"{run['validation_loss']:.3f}"
            lines.append(f"| {name_setting(group['group'], run['setting'])} | {' | '.join(shares)} | {loss} |")
        lines.append("")
    return "\n".join(lines)


def _format_share(exact: int | None, asked: int) -> str:
    if exact is None:
        return "–"
    low, high = wilson_interval(exact, asked)
    return f"{exact / asked:.1%} ({low:.1%} to {high:.1%})"


def draw(groups: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel a group: bars for the exact answers, the validation loss as numbers beside them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(groups) // PANELS_PER_ROW)
    columns = min(PANELS_PER_ROW, len(groups))
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows), dpi=90)
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, group in zip(panels, groups):
        names = [name_setting(group["group"], run["setting"]) for run in group["runs"]]
        for offset, (key, label) in enumerate((("train", "trained wordings"), ("validation", "unseen wordings"))):
            shares = [run["exact"].get(key, 0) / run["setting"]["questions"] for run in group["runs"]]
            places = [place + 0.4 * offset - 0.2 for place in range(len(names))]
            panel.barh(places, shares, height=0.38, label=label)
        for place, run in enumerate(group["runs"]):
            panel.text(1.02, place, f"{run.get('validation_loss', float('nan')):.2f}", va="center", fontsize=7)
        panel.set_yticks(range(len(names)), names, fontsize=7)
        panel.invert_yaxis()
        panel.set_xlim(0, 1.16)
        panel.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"], fontsize=7)
        panel.set_title(name_group(group), fontsize=9)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle("exact answers of chatglm3-tiny (validation loss at the right)", fontsize=10)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, format="png")
