"""SIGTERM (a scheduler takes the machine back, `kill PID`) ends a run after its step, with a checkpoint."""

import logging
import signal
import threading
from typing import Any

import torch
from transformers import TrainerCallback

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
