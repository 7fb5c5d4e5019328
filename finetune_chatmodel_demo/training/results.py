"""What a run leaves beside its result: `trainer_log.jsonl`, `*_results.json`, and its curves as pictures.

Names and keys are LLaMA-Factory's, whose users have programs that read them. Any run of `finetune.py` writes them;
the pictures are drawn at each checkpoint and at the end, `--plot_loss False` leaves them out.
"""

import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import partial_path, write_whole

TRAINER_LOG = "trainer_log.jsonl"
ALL_RESULTS = "all_results.json"
# Key of a line → the trainer's names for it; the first that an entry of the log has counts.
LINE_KEYS = {
    "loss": ("loss",),
    "eval_loss": ("eval_loss",),
    "predict_loss": ("predict_loss",),
    "reward": ("reward",),
    "accuracy": ("rewards/accuracies", "accuracy"),
    "eval_accuracy": ("eval_rewards/accuracies", "eval_accuracy"),
    "lr": ("learning_rate",),
    "epoch": ("epoch",),
    "throughput": ("tokens_per_second",),
}
METRICS = ("loss", "eval_loss", "predict_loss", "reward", "accuracy", "eval_accuracy")
# What `Trainer` logs once, when the last step is done → key of train_results.json.
TRAINING_KEYS = (
    "epoch",
    "total_flos",
    "train_loss",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
)
# --report_to NAME → packages, one of which it needs.
REPORTER_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "swanlab": ("swanlab",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
    "comet_ml": ("comet_ml",),
    "clearml": ("clearml",),
}
# Loss per token of these stages is a cross-entropy; of the others it is not, and has no perplexity.
STAGES_WITH_PERPLEXITY = ("pt", "sft")


class TrainerLog(TrainerCallback):
    """`trainer_log.jsonl`: one line for each entry of the log, written at once by the first process.

    `elapsed_time` counts the time of earlier parts of a resumed run as well, `remaining_time` follows from the speed
    of this part.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / TRAINER_LOG
        self.total_steps = 0
        self._first_step = 0
        self._started: float | None = None
        self._seconds_before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.start(state.max_steps, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.total_steps:  # not without a training
            entry = {"epoch": state.epoch, "num_input_tokens_seen": state.num_input_tokens_seen, **(logs or {})}
            self.write(state.global_step, entry)

    def start(self, total_steps: int, first_step: int = 0) -> None:
        """Begins a run, or the rest of one: lines of steps that will be made again are cut.

        Args:
            total_steps: steps of the whole run.
            first_step: steps that were made already; 0 starts a new file.
        """
        self.total_steps, self._first_step = total_steps, first_step
        kept = [line for line in self._read() if _is_before(line, first_step)] if first_step else []
        self._seconds_before = max((_read_seconds(line.get("elapsed_time")) for line in kept), default=0.0)
        self._started = time.monotonic()
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, entry: dict[str, Any]) -> None:
        """Appends a line.

        Args:
            step: steps that are done.
            entry: what the trainer logs, in its names (`learning_rate`, `eval_loss` …).
        """
        line: dict[str, Any] = {"current_steps": step, "total_steps": max(step, self.total_steps)}
        for key, names in LINE_KEYS.items():
            value = next((entry[name] for name in names if entry.get(name) is not None), None)
            if value is not None:
                line[key] = value
        elapsed, remaining = self._measure(step)
        line["percentage"] = round(100 * step / self.total_steps, 2) if self.total_steps else 100.0
        line["elapsed_time"] = str(timedelta(seconds=int(elapsed)))
        line["remaining_time"] = str(timedelta(seconds=int(remaining)))
        if entry.get("num_input_tokens_seen"):
            line["total_tokens"] = entry["num_input_tokens_seen"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A file of its own for each line: nothing waits in memory when the run is killed.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line)) + "\n")

    def _measure(self, step: int) -> tuple[float, float]:
        """Seconds of the run so far, and those that are still to come."""
        here = time.monotonic() - self._started if self._started is not None else 0.0
        made = step - self._first_step
        remaining = here / made * max(0, self.total_steps - step) if made > 0 else 0.0
        return self._seconds_before + here, remaining

    def _read(self) -> list[dict[str, Any]]:
        """The lines of an earlier part of the run, without one that a killed process left unfinished."""
        lines = []
        if self.path.is_file():
            for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict) and isinstance(line.get("current_steps"), int):
                    lines.append(line)
        return lines


def check_reporters(names: Sequence[str]) -> None:
    """Refuses --report_to NAME without the package, which `Trainer` would miss after the model is loaded.

    Raises:
        UserError: names the package.
    """
    for name in names:
        packages = REPORTER_PACKAGES.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise UserError(f"--report_to {name} needs the package {packages[0]}: pip install {packages[0]}")


def save_results(folder: str | Path, split: str, metrics: dict[str, Any]) -> None:
    """Writes `{split}_results.json` and adds the metrics to `all_results.json`, which collects those of every split.

    Args:
        folder: --output_dir.
        split: train, eval or predict.
        metrics: key → number; numbers that are not finite become null, which JSON can say.
    """
    folder, metrics = Path(folder), _finite(metrics)
    everything: dict[str, Any] = {}
    if (folder / ALL_RESULTS).is_file():
        try:
            before = json.loads((folder / ALL_RESULTS).read_text(encoding="utf-8"))
            everything = before if isinstance(before, dict) else {}
        except ValueError:
            pass  # a damaged file of figures is no reason to lose the new ones
    for name, content in ((f"{split}_results.json", metrics), (ALL_RESULTS, everything | metrics)):
        write_whole(folder / name, json.dumps(content, indent=4, sort_keys=True) + "\n")


def remove_results(folder: str | Path) -> None:
    """Removes the results of an earlier run: `all_results.json` must not mix two runs."""
    for name in (ALL_RESULTS, *(f"{split}_results.json" for split in ("train", "eval", "predict"))):
        (Path(folder) / name).unlink(missing_ok=True)


def describe_training(
    log_history: Sequence[dict[str, Any]], total_steps: int, resumed_step: int = 0
) -> dict[str, float]:
    """The metrics of `train_results.json` from the log of a run.

    What `Trainer` says at the end of a resumed run depends on its version (older ones divide the losses of the last
    part by the steps of the whole). Here `train_loss` is the mean of the whole run's logged losses, and the speeds are
    those of the last part.

    Args:
        log_history: entries as `TrainerState` keeps them.
        total_steps: steps of the whole run.
        resumed_step: steps that an earlier part of the run had made.

    Returns:
        Those of TRAINING_KEYS that the log has; nothing when no step was made.
    """
    summaries = [entry for entry in log_history if "train_runtime" in entry]
    if not summaries:
        return {}
    metrics = {key: summaries[-1][key] for key in TRAINING_KEYS if key in summaries[-1]}
    if not resumed_step:
        return metrics
    mean = mean_logged_loss(log_history)
    if mean is not None:
        metrics["train_loss"] = mean
    reported, runtime = metrics.get("train_steps_per_second"), metrics.get("train_runtime")
    if reported and runtime:
        share = (total_steps - resumed_step) / runtime / reported
        for key in ("train_samples_per_second", "train_steps_per_second"):
            metrics[key] = round(metrics[key] * share, 3)
    return metrics


def mean_logged_loss(log_history: Sequence[dict[str, Any]]) -> float | None:
    """The mean over steps of the logged losses, each of which is a mean since the entry before it."""
    entries = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    starts = [0, *(step for step, _ in entries)]
    weights = [step - start for start, (step, _) in zip(starts, entries)]
    if sum(weights) <= 0:
        return None
    return sum(weight * loss for weight, (_, loss) in zip(weights, entries)) / sum(weights)


def is_evaluation(entry: dict[str, Any]) -> bool:
    """Whether an entry of the log is one of a validation; ppo has a reward in place of a loss."""
    return "eval_loss" in entry or "eval_reward" in entry


def describe_evaluation(log_history: Sequence[dict[str, Any]], stage: str) -> dict[str, float]:
    """The metrics of `eval_results.json`: the last evaluation in the log, with the perplexity of pt and sft."""
    evaluations = [entry for entry in log_history if is_evaluation(entry)]
    if not evaluations:
        return {}
    metrics = {key: value for key, value in evaluations[-1].items() if key.startswith("eval_") or key == "epoch"}
    if stage in STAGES_WITH_PERPLEXITY:
        try:
            metrics["eval_perplexity"] = math.exp(metrics["eval_loss"])
        except OverflowError:
            metrics["eval_perplexity"] = math.inf
    return metrics


def _is_before(line: dict[str, Any], first_step: int) -> bool:
    """Whether a line stays when a run goes on; what stands at the end of a run, without any metric, does not."""
    return line["current_steps"] <= first_step and any(key in line for key in METRICS)


def _read_seconds(text: Any) -> float:
    """`1 day, 2:03:04` → 93784."""
    try:
        days, _, clock = str(text).rpartition(" day")
        hours, minutes, seconds = clock.lstrip("s, ").split(":")
        return 86400 * int(days or 0) + 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return 0.0


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


if TYPE_CHECKING:
    from pandas import Series

logger = logging.getLogger(__name__)

SMOOTHING = 0.9
MOST_MARKED_POINTS = 30
# Picture → its y-axis and its curves: the trainer's name of a metric → its name in the legend.
CHARTS = {
    "training_loss.png": ("loss", {"loss": "training loss", "eval_loss": "validation loss"}),
    "training_eval_loss.png": ("loss", {"eval_loss": "validation loss"}),
    "training_rewards.png": (
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
    "training_accuracy.png": (
        "share of pairs in the right order",
        {
            "rewards/accuracies": "accuracy",
            "accuracy": "accuracy",
            "eval_rewards/accuracies": "accuracy, validation",
            "eval_accuracy": "accuracy, validation",
        },
    ),
}


def plot_curves(log_history: list[dict[str, Any]], folder: str | Path) -> list[Path]:
    """Draws every chart of which the log has a curve: each as it was logged (pale) and smoothed.

    Args:
        log_history: the trainer's log, entries with `step` and metrics.
        folder: where the PNGs go.

    Returns:
        The files that were written.
    """
    written = []
    for file in CHARTS:
        try:
            figure = draw_chart(log_history, file)
        except ImportError:
            logger.warning("no curves are drawn: the package matplotlib is not installed")
            return written
        if figure is not None:
            path = Path(folder) / file
            try:
                figure.savefig(partial_path(path), format="png")
                os.replace(partial_path(path), path)
            finally:
                partial_path(path).unlink(missing_ok=True)
            written.append(path)
    return written


def draw_chart(log_history: list[dict[str, Any]], file: str) -> Any | None:
    """Draws one chart.

    Returns:
        The matplotlib figure; None when the log has none of the chart's curves.

    Raises:
        ImportError: matplotlib is not installed.
    """
    y_label, names = CHARTS[file]
    curves = {label: curve for key, label in names.items() if len(curve := read_curve(log_history, key))}
    if not curves:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (label, curve) in enumerate(curves.items()):
        marker = "o" if len(curve) <= MOST_MARKED_POINTS else None  # a line of one point would be invisible
        pale = {"alpha": 0.3, "linewidth": 1, "marker": marker, "markersize": 3}
        axes.plot(curve.index, curve, color=f"C{index}", label="_" + label, **pale)
        axes.plot(curve.index, curve.ewm(alpha=1 - SMOOTHING).mean(), color=f"C{index}", label=f"{label} (smoothed)")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(y_label)
    if y_label != "reward":
        axes.set_ylim(bottom=min(0, *(curve.min() for curve in curves.values())))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    return figure


def read_curve(log_history: list[dict[str, Any]], key: str) -> "Series":
    """A metric by step, without values that are not finite."""
    import pandas

    points = {entry["step"]: entry[key] for entry in log_history if key in entry and "step" in entry}
    curve = pandas.Series(points, dtype=float)
    return curve[curve.abs() < math.inf]
