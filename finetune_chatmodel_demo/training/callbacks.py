"""What happens beside the steps: the order of an epoch, tokens per second, early stopping, and an end on SIGTERM."""

import logging
import signal
import threading
import time
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from finetune_chatmodel_demo.training.arguments import RunArguments
from finetune_chatmodel_demo.training.sampling import LengthGroupedBatches

logger = logging.getLogger(__name__)


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

    def __init__(self) -> None:
        self.order: LengthGroupedBatches | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.order is not None:
            self.order.set_epoch(int((state.epoch or 0) + 1e-6))


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


logger = logging.getLogger(__name__)


class RunStopped(Exception):
    """The run was asked to stop, and has saved a checkpoint."""


class StopOnSignal(TrainerCallback):
    """Saves and stops at the end of the step in which SIGTERM arrives; a second SIGTERM ends the process at once."""

    def __init__(self) -> None:
        self.is_asked = False
        self.stopped_after: int | None = None  # the step
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped_after is None and self._is_asked_anywhere(args):
            self.stopped_after = state.global_step
            control.should_save = control.should_training_stop = True

    def _note(self, number: int, frame: Any) -> None:
        self.is_asked = True
        self._restore()
        logger.warning("SIGTERM: the run saves a checkpoint after this step and ends")

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _is_asked_anywhere(self, args: Any) -> bool:
        """All processes have to stop after the same step, whichever of them the signal reached."""
        if args.world_size == 1:
            return self.is_asked
        asked = torch.tensor(int(self.is_asked), device=args.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked)
