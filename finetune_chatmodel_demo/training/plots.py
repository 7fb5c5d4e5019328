"""The curves of a run as pictures: `training_loss.png`, `training_eval_loss.png`, `training_rewards.png`, …

Any run of `finetune.py` draws them into --output_dir at each checkpoint and at its end; `--plot_loss False` does not.
"""

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.training.checkpoints import PARTIAL_PREFIX

logger = logging.getLogger(__name__)

SMOOTHING = 0.9
MOST_MARKED_POINTS = 30


@dataclass(frozen=True)
class Chart:
    """One picture: `curves` is the trainer's name of a metric → its name in the legend."""

    file: str
    y_label: str
    curves: dict[str, str]
    starts_at_zero: bool = False


# The names are those that our trainers, and TRL's, log.
CHARTS = (
    Chart(
        "training_loss.png",
        "loss",
        {"loss": "training loss", "eval_loss": "validation loss"},
        starts_at_zero=True,
    ),
    Chart("training_eval_loss.png", "loss", {"eval_loss": "validation loss"}),
    Chart(
        "training_rewards.png",
        "reward",
        {
            "reward": "reward",
            "rewards/chosen": "chosen",
            "rewards/rejected": "rejected",
            "rewards/margins": "margin",
            "eval_reward": "reward, validation",
            "eval_rewards/margins": "margin, validation",
        },
    ),
    Chart(
        "training_accuracy.png",
        "share of pairs in the right order",
        {
            "rewards/accuracies": "accuracy",
            "accuracy": "accuracy",
            "eval_rewards/accuracies": "accuracy, validation",
            "eval_accuracy": "accuracy, validation",
        },
        starts_at_zero=True,
    ),
)


def plot_curves(log_history: list[dict[str, Any]], folder: str | Path) -> list[Path]:
    """Draws every chart of which the log has a curve: each as it was logged (pale) and smoothed.

    Args:
        log_history: the trainer's log, entries with `step` and metrics.
        folder: where the PNGs go.

    Returns:
        The files that were written.
    """
    written = []
    for chart in CHARTS:
        try:
            figure = draw_chart(log_history, chart)
        except ImportError:
            logger.warning("no curves are drawn: the package matplotlib is not installed")
            return written
        if figure is not None:
            path = Path(folder) / chart.file
            partial = path.with_name(PARTIAL_PREFIX + path.name)
            figure.savefig(partial, format="png")
            os.replace(partial, path)
            written.append(path)
    return written


def draw_chart(log_history: list[dict[str, Any]], chart: Chart) -> Any | None:
    """Draws one chart.

    Returns:
        The matplotlib figure; None when the log has none of the chart's curves.

    Raises:
        ImportError: matplotlib is not installed.
    """
    curves = [(label, points) for key, label in chart.curves.items() if (points := read_curve(log_history, key))]
    if not curves:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (label, points) in enumerate(curves):
        color = f"C{index}"
        marker = "o" if len(points) <= MOST_MARKED_POINTS else None  # a line of one point would be invisible
        axes.plot(*zip(*points), color=color, alpha=0.3, linewidth=1, marker=marker, markersize=3, label="_" + label)
        axes.plot(*zip(*smooth(points)), color=color, label=f"{label} (smoothed)")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(chart.y_label)
    if chart.starts_at_zero:
        axes.set_ylim(bottom=min(0, *(value for _, points in curves for _, value in points)))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    return figure


def read_curve(log_history: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, without values that are not finite."""
    points = [(entry["step"], entry[key]) for entry in log_history if key in entry and "step" in entry]
    return [(step, value) for step, value in points if value is not None and math.isfinite(value)]


def smooth(points: list[tuple[int, float]], weight: float = SMOOTHING) -> list[tuple[int, float]]:
    """Exponential moving average, corrected for its start at zero."""
    result, average = [], 0.0
    for count, (step, value) in enumerate(points, start=1):
        average = weight * average + (1 - weight) * value
        result.append((step, average / (1 - weight**count)))
    return result
