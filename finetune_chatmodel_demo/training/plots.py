"""The loss curve of a run as a picture."""

import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def plot_loss(log_history: list[dict[str, float]], path: Path) -> None:
    """Draws training and validation loss over the steps into a PNG.

    Args:
        log_history: the trainer's log, entries with `step` and `loss` or `eval_loss`.
        path: the PNG; nothing is written when the log holds no loss.
    """
    training = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    validation = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    if not training:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no loss curve: the package matplotlib is not installed")
        return
    figure = Figure(figsize=(8, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*training), color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(*zip(*_smooth(training)), color="tab:blue", label="training loss (smoothed)")
    if validation:
        axes.plot(*zip(*validation), color="tab:orange", marker="o", markersize=4, label="validation loss")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per supervised token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def _smooth(points: list[tuple[float, float]], weight: float = 0.9) -> list[tuple[float, float]]:
    """Exponential moving average, corrected for its start at zero."""
    result, average = [], 0.0
    for count, (step, value) in enumerate(points, start=1):
        average = weight * average + (1 - weight) * value
        result.append((step, average / (1 - weight**count)))
    return result
