"""Generation: prompts in, ids out. `generate` is the one call of the model; `stream_ids` iterates over what it writes.

While a reply is streamed, `generate` runs in a thread. An exception in the thread is raised in the loop that reads the
ids; leaving that loop (Ctrl-C, `break`) stops the thread at its next token.
"""

import contextlib
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

# torch.multinomial draws from the random state of the process: two seeded replies at the same time would mix theirs.
_ONE_REPLY_AT_A_TIME = threading.Lock()
# Python on Windows does not see Ctrl-C while it waits without a limit.
_WAIT_SECONDS = 0.2


def generate(model: Any, prompts: Sequence[list[int]], settings: GenerationConfig, **options: Any) -> list[list[int]]:
    """New ids of one left-padded batch, each row with whatever follows its stop id.

    Args:
        model: anything with transformers' `generate`.
        prompts: rendered prompts.
        settings: from `build_settings`.
        options: a streamer or stopping criteria, for `model.generate`.
    """
    width = max(map(len, prompts))
    input_ids = torch.tensor(
        [[settings.pad_token_id] * (width - len(ids)) + ids for ids in prompts], device=model.device
    )
    # 1 = a token of the prompt, 0 = padding in front of it
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings, **options)
    return output[:, width:].tolist()


class _QueueStreamer(BaseStreamer):
    """Puts each generated id in a queue; the first thing that `generate` hands over is the prompt."""

    def __init__(self, ids: queue.SimpleQueue):
        self._ids = ids
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for token_id in value.reshape(-1).tolist():
            self._ids.put(token_id)

    def end(self) -> None:
        """The worker itself says when it is done, also after an exception."""


class _StopOnEvent(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Run with a random state of our own, and leave the process's as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C within this context strikes at its end: an interrupted `Thread.start` does not tell whether it started."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    struck: list[tuple[Any, ...]] = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: struck.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if struck and callable(handler):
        handler(*struck[0])


def stream_ids(
    model: Any, input_ids: list[int], settings: GenerationConfig, *, seed: int | None = None
) -> Iterator[int]:
    """Generate after one prompt.

    Args:
        model: anything with transformers' `generate`.
        input_ids: the rendered prompt.
        settings: its `eos_token_id` names the ids that end the reply; they are not handed out.
        seed: makes sampling repeatable.

    Raises:
        Exception: whatever `generate` raised in its thread.
    """
    ids: queue.SimpleQueue = queue.SimpleQueue()
    stop, done = threading.Event(), threading.Event()

    def work() -> None:
        try:
            with _ONE_REPLY_AT_A_TIME, _seeded(seed, model.device):
                criteria = StoppingCriteriaList([_StopOnEvent(stop)])
                generate(model, [input_ids], settings, streamer=_QueueStreamer(ids), stopping_criteria=criteria)
            ids.put(None)
        except BaseException as error:  # handed to the reading thread, which raises it
            ids.put(error)
        finally:
            done.set()

    # No daemon: torch aborts when the program ends under it.
    worker = threading.Thread(target=work, name="generate")
    stop_ids = set(settings.eos_token_id or ())
    try:
        with _interrupts_deferred():
            worker.start()
        while True:
            try:
                item = ids.get(timeout=_WAIT_SECONDS)
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            if item not in stop_ids:
                yield item
    finally:
        stop.set()
        if worker.ident is not None:
            # Not join(): a second Ctrl-C in there makes Python forget the thread, which it then does not wait for.
            done.wait()
