"""How much memory a training step takes on each GPU: its allocations are counted on tensors without content.

The model is built from its configuration alone, tuned as the run would tune it, and makes a step on fake tensors, which
know shapes and types and hold nothing: seconds for the 6B model, on any machine. What a GPU does differently is put in
place: its attention needs no mask, and one kernel computes a packed row. `tests/test_memory.py` compares the counts
with what is allocated in real steps, `tests/benchmarks/bench_gpu.py` with the peaks of a GPU.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.glm import modeling_glm

from finetune_chatmodel_demo.chatglm3 import attention
from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.kernels import CheckpointingPolicy, set_policy, summed_cross_entropy
from finetune_chatmodel_demo.chatglm3.loading import MODEL_CLASSES
from finetune_chatmodel_demo.chatglm3.prefix import Prefix
from finetune_chatmodel_demo.chatglm3.prefix_files import read_prefix_config
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training.arguments import FREEZE, FULL, LORA, P_TUNING
from finetune_chatmodel_demo.training.methods import add_new_adapter, freeze_rest, train_in_float32
from finetune_chatmodel_demo.training.settings import DEFAULT_PRE_SEQ_LEN, Settings
from finetune_chatmodel_demo.training.zero import Zero

GIB = 2**30
# NF4 with double quantization: half a byte, an int8 scale for 64 numbers, a float32 for 256 scales (arXiv:2305.14314).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes of a trained parameter: Adam's two moments in float32, and DeepSpeed's float32 copy of the weights.
MOMENTS, MASTER = 8, 4
# Not counted from anything: what a CUDA context and its libraries usually take.
CUDA_CONTEXT = 0.6 * GIB
TUNED = {P_TUNING: "prefix", LORA: "adapter"}


@dataclass(frozen=True)
class Step:
    """A training step on one GPU.

    Attributes:
        config: of the base model.
        settings: says what is trained; see `deciding.read_settings`.
        rows, tokens: of one batch, and of its longest row; with packing one row of all tokens.
        supervised: tokens of the batch whose logits are computed.
        segments: conversations of a packed row; 0: no packing.
        precision: bfloat16, float16 or float32: of the computation.
        policy: of gradient checkpointing.
        quantization_bit: 4, 8 or None.
        accumulates: whether gradients of an earlier batch are there during the forward pass.
        optimizer_bytes: of the optimizer's state, for a trained parameter.
        zero: DeepSpeed's settings, or None.
        gpus: processes; they share what ZeRO partitions.
        is_cuda: whether it runs on a GPU.
    """

    config: ChatGLM3Config
    settings: Settings
    rows: int
    tokens: int
    supervised: int
    segments: int = 0
    precision: str = "bfloat16"
    policy: CheckpointingPolicy = "full"
    quantization_bit: int | None = None
    accumulates: bool = False
    optimizer_bytes: float = MOMENTS
    zero: Zero | None = None
    gpus: int = 1
    is_cuda: bool = True

    @property
    def method(self) -> str:
        """P_TUNING, LORA, FREEZE or FULL."""
        return self.settings.method


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU.

    Attributes:
        parts: of the peak.
        moment: of the step, when the peak is.
        moments: the totals of all moments.
        parameters, trained: numbers of the model, and those of them that are trained.
        weights: bytes of the whole base model, which ZeRO-3 shares out.
    """

    parts: dict[str, float] = field(default_factory=dict)
    moment: str = ""
    moments: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    trained: int = 0
    weights: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on each GPU."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> float:
        """Bytes of tensors: what `torch.cuda.max_memory_allocated` counts."""
        return self.total - self.parts.get("CUDA context", 0.0)


class PeakCounter(TorchDispatchMode):
    """Counts the bytes of all tensor storages that are alive, by what they are for, and their peak.

    `with counter: …` sees every operation of forward, backward and optimizer on a CPU, real or fake. What a kernel
    allocates inside of itself it does not see.

    Attributes:
        label: what storages that come now are for.
        now, peak: bytes.
        parts: of the peak, by label.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[str, int]] = {}
        self._sums: Counter[str] = Counter()
        self.label = ""
        self.now = self.peak = 0
        self.parts: dict[str, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Counts the storage of `tensor`, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._enter(key, self.label, storage.nbytes())
        weakref.finalize(storage, self._drop, key)

    def relabel(self, tensor: torch.Tensor, label: str) -> None:
        """Says of a storage that is counted what it is for."""
        key = tensor.untyped_storage()._cdata
        if key in self._live:
            size = self._live[key][1]
            self._drop(key)
            self._enter(key, label, size)

    def restart(self, label: str) -> None:
        """Begins another part of the step: its peak is looked for from here."""
        self.label, self.peak, self.parts = label, self.now, dict(self._sums)

    def _enter(self, key: int, label: str, size: int) -> None:
        self._live[key] = label, size
        self._sums[label] += size
        self.now += size
        if self.now > self.peak:
            self.peak, self.parts = self.now, dict(self._sums)

    def _drop(self, key: int) -> None:
        label, size = self._live.pop(key, ("", 0))
        self._sums[label] -= size
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return output


def build_model(step: Step) -> nn.Module:
    """The model of a run on the device "meta", as `methods.prepare_model` makes it, without weights."""
    settings, config = step.settings, copy.deepcopy(step.config)  # a prefix changes the configuration
    is_half = step.precision != "float32" and (step.method != FULL or step.zero is not None)
    head = "score" if settings.stage.stage == "rm" else "lm"
    if head == "score":
        config.num_labels = 1
    with torch.device("meta"):
        model: Any = MODEL_CLASSES[head](config).to(getattr(torch, step.precision) if is_half else torch.float32)
        if step.method == P_TUNING:
            start = settings.model.ptuning_checkpoint  # of a run that may not have been made yet
            found = read_prefix_config(start).pre_seq_len if start and Path(start).is_dir() else DEFAULT_PRE_SEQ_LEN
            model.add_prefix(settings.pre_seq_len or found, settings.model.prefix_projection)
        elif step.method == LORA:
            model = add_new_adapter(model, settings.tuning)
        elif step.method == FREEZE:
            freeze_rest(model, settings.tuning)
    if not step.zero:
        train_in_float32(model)
    model.train()
    set_policy(_chat_model(model), step.policy)
    if step.policy != "none":
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def _chat_model(model: Any) -> Any:
    """The model itself, without PEFT's shell."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _quantize(model: nn.Module, bits: int) -> None:
    """bitsandbytes quantizes the matrices of the layers; embeddings, head, norms and biases stay as they are."""
    for name, module in _chat_model(model).model.layers.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            rows, columns = module.matrix_shape = tuple(module.weight.shape)
            size = NF4_BYTES * rows * columns if bits == 4 else rows * columns + 4 * rows  # int8: a scale for each row
            module.weight = nn.Parameter(torch.empty(int(size), dtype=torch.uint8, device="meta"), requires_grad=False)
            module.__class__, module.bits = _QuantizedLinear, bits


class _QuantizedLinear(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output = _QuantizedProduct.apply(hidden, self)
        return output if self.bias is None else output + self.bias


class _QuantizedProduct(torch.autograd.Function):
    """Allocates as bitsandbytes does: the matrix in half precision, for a moment; int8 products as int32."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, linear: Any) -> torch.Tensor:
        ctx.linear, ctx.dtype = linear, hidden.dtype
        if linear.bits == 8:
            hidden.new_empty(*hidden.shape[:-1], linear.matrix_shape[0], dtype=torch.int32)
        return hidden @ hidden.new_empty(linear.matrix_shape).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ gradient.new_empty(ctx.linear.matrix_shape), None


def _fill(model: nn.Module) -> None:
    """Puts fake tensors of the CPU in place of those of "meta", which have no kernels for attention."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    fake: Any = torch.empty(value.shape, dtype=value.dtype)
                    tensors[name] = nn.Parameter(fake, value.requires_grad) if name in module._parameters else fake


@contextmanager
def _known_kernels(is_cuda: bool) -> Iterator[None]:
    """Decides what real tensors would: that rows without padding need no causal mask, which depends on their values;
    and on a GPU that there is none behind a prefix either, and that a packed row is computed in one piece."""

    def attend(query: Any, key: Any, value: Any, block_mask: Any, scaling: float | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)

    with ExitStack() as stack:
        stack.enter_context(patch.object(modeling_glm, "create_causal_mask", lambda *_, **__: None))
        if not is_cuda:
            yield
            return
        stack.enter_context(patch.object(Prefix, "causal_mask", lambda *_: None))
        stack.enter_context(patch.object(attention, "uses_flex", lambda *_: True))
        stack.enter_context(patch.object(attention, "_attend", attend))
        stack.enter_context(patch.object(attention.Packing, "block_mask", lambda *_: None))
        yield


def plan_memory(step: Step) -> MemoryPlan:
    """The peak of a training step on each GPU, part by part.

    Raises:
        UserError: for DoRA on a quantized base, whose kernels are not known here.
    """
    model = build_model(step)
    parameters, trained = _count(model.parameters()), _count(p for p in model.parameters() if p.requires_grad)
    if step.quantization_bit:
        if step.settings.tuning.use_dora:
            raise UserError("there is no plan for --use_dora on a quantized base; plan it without --quantization_bit")
        _quantize(model, step.quantization_bit)
    with FakeTensorMode(allow_non_fake_inputs=True), _known_kernels(step.is_cuda):
        _fill(model)
        weights = sum(p.nbytes for p in model.parameters() if step.method not in TUNED or not p.requires_grad)
        moments = _share_out(step, count_step(step, model), trained)
    totals = {moment: sum(parts.values()) for moment, parts in moments.items()}
    moment = max(totals, key=lambda name: totals[name])
    parts = {name: size for name, size in moments[moment].items() if size}
    return MemoryPlan(parts, moment, totals, parameters, trained, weights)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def count_step(step: Step, model: nn.Module) -> dict[str, dict[str, float]]:
    """Makes a step, in which the optimizer has its state already.

    Returns:
        Moment of the step → bytes of each part at its peak.
    """
    counter, chat = PeakCounter(), _chat_model(model)
    tuned = TUNED.get(step.method, "weights")
    for tensor in [*model.parameters(), *model.buffers()]:
        counter.label = tuned if tensor.requires_grad else "weights"
        counter.add(tensor)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if step.accumulates and not step.zero:
            parameter.grad = torch.empty_like(parameter)
            counter.label = "gradients"
            counter.add(parameter.grad)
        parameter.register_post_accumulate_grad_hook(lambda p: _keep_gradient(p, counter, step))
    if step.zero and step.zero.stage == 3 and hasattr(chat, "lm_head"):
        chat.lm_head.weight.ds_id = 0  # how the loss knows that a head is shared out
    batch = _batch_of(step)
    is_mixed = step.precision != "float32" and not step.zero
    moments: dict[str, dict[str, float]] = {}
    with counter, torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed):
        counter.restart(f"activations ({step.policy})")
        hidden = chat.model(**batch, use_cache=False).last_hidden_state
        moments["forward pass"] = counter.parts
        counter.restart("logits")
        loss = _loss_of(step, chat, hidden)
        del hidden
        moments["loss"] = counter.parts
    with counter:
        counter.restart("backward pass")
        loss.backward()
        moments["backward pass"] = counter.parts
        counter.restart("optimizer step")  # whose kernels are fused: they allocate nothing
        moments["optimizer step"] = counter.parts
    return moments


def _keep_gradient(parameter: nn.Parameter, counter: PeakCounter, step: Step) -> None:
    if step.zero:
        parameter.grad = None  # reduced and shared out at once
    else:
        counter.relabel(parameter.grad, "gradients")


def _batch_of(step: Step) -> dict[str, Any]:
    ids = torch.zeros(step.rows, step.tokens, dtype=torch.long)
    if not step.segments:
        return {"input_ids": ids}
    short, longer = divmod(step.tokens, step.segments)
    lengths = [short + (number < longer) for number in range(step.segments)]
    return {"input_ids": ids, "segment_lengths": lengths, "position_ids": torch.zeros_like(ids)}


def _loss_of(step: Step, chat: Any, hidden: torch.Tensor) -> torch.Tensor:
    if not hasattr(chat, "lm_head"):  # a reward model
        return chat.score(hidden[:, -1]).sum()
    # Which positions are supervised depends on the labels' values, which fake tensors do not have.
    chosen = torch.arange(step.supervised)
    return summed_cross_entropy(chat.lm_head, hidden.flatten(0, 1)[chosen], torch.zeros_like(chosen))


def _share_out(step: Step, moments: dict[str, dict[str, float]], trained: int) -> dict[str, dict[str, float]]:
    """What the processes share out with ZeRO, and what is there beside the tensors of the step."""
    zero, gpus = step.zero, step.gpus
    resident: dict[str, float] = {"optimizer": step.optimizer_bytes * trained}
    gradients = {}
    if zero:
        optimizer = (step.optimizer_bytes + MASTER) * trained / gpus
        resident = {"optimizer": 0 if zero.offloads_optimizer else optimizer, "DeepSpeed's buckets": zero.buffer_bytes}
        part = 0 if zero.offloads_optimizer else 2 * trained / gpus
        # The optimizer converts its part of the gradients to float32.
        gradients = {name: part * (3 if name == "optimizer step" else 1) for name in moments}
        gradients["forward pass"] = gradients["loss"] = part if step.accumulates else 0
    elif gpus > 1:
        resident["DDP's buckets"] = 4 * trained
    resident["CUDA context"] = CUDA_CONTEXT if step.is_cuda else 0
    shared = {}
    for name, parts in moments.items():
        weights = parts.get("weights", 0)
        if zero and zero.stage == 3:
            weights = 0 if zero.offloads_weights else weights / gpus
        shared[name] = {**parts, "weights": weights, **resident}
        if zero:
            shared[name]["gradients"] = gradients[name]
    return shared
