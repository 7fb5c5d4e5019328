"""What happens beside the steps: the order of an epoch, tokens per second, early stopping, kept random numbers."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from finetune_chatmodel_demo.training.arguments import RunArguments

if TYPE_CHECKING:
    from finetune_chatmodel_demo.training.run_trainer import RunTrainer


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Within this context random numbers may be drawn; afterwards all generators go on where they were."""
    python, arrays, cpu = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.random.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)


def build_early_stopping(run: RunArguments) -> list[TrainerCallback]:
    """transformers' early stopping, where it was asked for."""
    if run.early_stopping_patience is None:
        return []
    return [EarlyStoppingCallback(run.early_stopping_patience, run.early_stopping_threshold)]


def stopped_early(state: TrainerState, run: RunArguments) -> bool:
    """Whether the patience of the command line was at its end when a checkpoint's state was saved."""
    kept = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
    if run.early_stopping_patience is None or not kept:
        return False
    return kept["attributes"]["early_stopping_patience_counter"] >= run.early_stopping_patience


class EpochOrder(TrainerCallback):
    """Tells the sampler which epoch begins, also when a run is resumed in the middle of one."""

    def __init__(self, trainer: "RunTrainer") -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        order = getattr(self.trainer, "row_order", None)
        if order is not None:
            order.set_epoch(int((state.epoch or 0) + 1e-6))


class Throughput(TrainerCallback):
    """Counts tokens and the seconds spent in steps (not in validation or saving) since the last log entry."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.started: float | None = None
        self.counts: torch.Tensor | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.started is not None:
            self.seconds += time.perf_counter() - self.started
            self.started = None

    def add(self, counts: torch.Tensor) -> None:
        """Adds a batch: (2,), all tokens without padding and supervised ones."""
        self.counts = counts.clone() if self.counts is None else self.counts + counts

    def collect(self, accelerator: Any) -> dict[str, float]:
        """Returns tokens per second over all processes since the last call, and starts over."""
        if self.counts is None or self.seconds == 0:
            return {}
        total, supervised = accelerator.reduce(self.counts, reduction="sum").tolist()
        speeds = {
            "tokens_per_second": round(total / self.seconds),
            "supervised_tokens_per_second": round(supervised / self.seconds),
        }
        self.seconds, self.counts = 0.0, None
        return speeds
