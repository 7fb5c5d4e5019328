"""What the tests of the memory plan measure with: bytes that autograd keeps, and the peak of live tensors in a step."""

import copy
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM
from finetune_chatmodel_demo.chatglm3.kernels import set_policy
from finetune_chatmodel_demo.chatglm3.lora import add_adapter

LORA_RANK = 8


class PeakCounter(TorchDispatchMode):
    """Counts the bytes of all tensor storages that are alive, and their peak.

    `with counter: …` sees every operation of forward, backward and optimizer on a CPU, real or fake. What a kernel
    allocates inside of itself it does not see.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, tensor: torch.Tensor) -> None:
        """Counts the storage of `tensor`, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = storage.nbytes()
        self.now += self._live[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return output


@dataclass(frozen=True)
class Case:
    """A training step to measure."""

    config: ChatGLM3Config
    method: str
    policy: str
    is_half: bool  # weights in bfloat16 (trained ones in float32) under autocast, as on a GPU
    tokens: int
    rows: int = 1
    prefix: int = 32
    projection: bool = False
    segments: tuple[int, ...] | None = None
    supervised: int | None = None  # of each row; default: half of the tokens
    batches: int = 1  # accumulated

    @property
    def counted(self) -> int:
        """Supervised tokens of each row."""
        return self.tokens // 2 if self.supervised is None else self.supervised


def build_model(case: Case) -> nn.Module:
    """The model as `training.methods.prepare_model` makes it."""
    torch.manual_seed(0)
    half = torch.bfloat16 if case.is_half and case.method != "full" else torch.float32
    model: Any = ChatGLM3ForCausalLM(copy.deepcopy(case.config)).to(half)  # a prefix changes the configuration
    if case.method == "ptuning":
        model.add_prefix(case.prefix, case.projection)
    elif case.method == "lora":
        model = add_adapter(model, rank=LORA_RANK)
    elif case.method == "freeze":
        model.requires_grad_(False)
        model.model.layers[-2:].requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train()
    if case.policy != "none":
        if case.policy == "mlp":
            set_policy(model, "mlp")
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        if case.method == "lora":
            model.enable_input_require_grads()
    return model


def batch_of(case: Case) -> dict[str, Any]:
    """Inputs of one batch: of each row the last tokens are supervised."""
    ids = torch.zeros(case.rows, case.tokens, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    labels[:, case.tokens - case.counted :] = 1
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if case.segments:
        batch["segment_lengths"] = case.segments
        batch["position_ids"] = torch.cat([torch.arange(length) for length in case.segments])[None]
    return batch


def autocast(case: Case) -> Any:
    """The context of the forward pass."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if case.is_half else nullcontext()


def measure_kept(case: Case) -> int:
    """Bytes that the forward pass of the transformer (without the loss) keeps for the backward pass."""
    model = build_model(case)
    base = model.base_model.model.model if case.method == "lora" else model.model
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, weakref.ref] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = weakref.ref(storage)
        return tensor

    batch = batch_of(case)
    del batch["labels"]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(case):
        output = base(**batch, use_cache=False).last_hidden_state
    # What passed by and was dropped does not count: frozen layers below the trained ones, for instance.
    parts = [storage() for storage in kept.values()]
    assert output.requires_grad
    return sum(storage.nbytes() for storage in parts if storage is not None)


def measure_peak(case: Case) -> int:
    """Peak bytes of the second of two whole steps, in which the optimizer has its state."""
    model = build_model(case)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    batch = batch_of(case)
    counter = PeakCounter()
    for tensor in [*model.parameters(), *model.buffers()]:
        counter.add(tensor)
    with counter:
        for _ in range(2):
            counter.peak = counter.now
            for _ in range(case.batches):
                with autocast(case):
                    loss = model(**batch).loss
                loss.backward()
                del loss
            optimizer.step()
            optimizer.zero_grad()
    return counter.peak
