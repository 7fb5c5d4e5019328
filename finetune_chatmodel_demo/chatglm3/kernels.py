"""The parts of a training step that keep fewer activations than autograd would: norm, MLP, loss, recomputing.

    RMSNorm   keeps its input in the dtype that it came in and a float32 scale for each token. Autograd would keep the
              input in float32 as well, and, where the norm is trained, the normed input.
    SwiGLU    keeps gate and up. Autograd would keep the activated gate as well, 13,696 numbers for each token and
              layer of the 6B model.
    loss      never holds (tokens × vocabulary) logits: only supervised positions come here, and their logits exist for
              `LOSS_CHUNK` positions at a time. Behind a frozen head (P-Tuning, LoRA, freeze) the gradient of a chunk's
              hidden states is computed right after its logits, in their place: nothing is computed twice.

Outputs are bit-equal to transformers' modules, and so are SwiGLU's gradients; RMSNorm's differ by rounding in float32.
In the 6B model under bfloat16 norm and SwiGLU keep 2.3 GiB less for a row of 2,048 tokens without checkpointing. They
are chains of element-wise operations, each of which reads and writes whole activations: `compile_elementwise` lets
torch.compile make one kernel of each chain.

Gradient checkpointing policies say which activations a training step keeps, and which it computes a second time:

    none   keeps all of them: the fastest
    mlp    computes the inside of each MLP again, which holds most of what a layer keeps
    full   keeps each layer's input only: the least memory, about a third more time

Frozen weights need no activations for gradients of their own: with a prefix or an adapter, `none` and `mlp` keep far
less than in full fine-tuning.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.models.glm.modeling_glm import GlmMLP, GlmRMSNorm

CheckpointingPolicy = Literal["none", "mlp", "full"]
# In the order of what they recompute.
POLICIES: tuple[CheckpointingPolicy, ...] = get_args(CheckpointingPolicy)
# Supervised positions whose logits exist at one time: 1,024 × 65,024 × 4 bytes = 254 MiB.
LOSS_CHUNK = 1024


class Kernels(NamedTuple):
    """The element-wise parts: plain, or compiled."""

    norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    norm_gradient: Callable[..., torch.Tensor]
    gated: Callable[..., torch.Tensor]
    gated_gradient: Callable[..., torch.Tensor]


class ChatGLM3RMSNorm(GlmRMSNorm):
    """Root mean square normalization (arXiv:1910.07467), computed in float32 as the original does."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(…, hidden) → (…, hidden), in the wider dtype of the input and the weight"""
        if not torch.is_grad_enabled():
            return super().forward(hidden_states)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, kernels_of(self))


def swiglu(gate_up: torch.Tensor, kernels: Kernels | None = None) -> torch.Tensor:
    """up × SiLU(gate) (arXiv:2002.05202): (…, 2 × inner), the gate in the first half → (…, inner)."""
    return _SwiGLU.apply(gate_up, kernels or PLAIN) if torch.is_grad_enabled() else _gated(gate_up)


def compile_elementwise(model: nn.Module) -> None:
    """Lets torch.compile fuse the norms and SwiGLUs of a model while it trains; the matrix products stay as they are.

    Values then differ by rounding: a fused kernel does not round to bfloat16 between its steps. It needs what
    torch.compile needs, Triton on a GPU and a C++ compiler on a CPU.
    """
    for module in model.modules():
        if isinstance(module, ChatGLM3RMSNorm) or hasattr(module, "gate_up_proj"):
            module.elementwise_kernels = _compiled()


def kernels_of(module: nn.Module) -> Kernels:
    """What `compile_elementwise` chose for a module."""
    return getattr(module, "elementwise_kernels", PLAIN)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, kernels: Kernels) -> torch.Tensor:
        output, scale = kernels.norm(hidden, weight, epsilon)
        ctx.save_for_backward(hidden, weight, scale)
        ctx.kernels = kernels
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        of_hidden = of_weight = None
        if ctx.needs_input_grad[1]:
            normed = (hidden.to(torch.float32) * scale).to(hidden.dtype)
            of_weight = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            of_hidden = ctx.kernels.norm_gradient(gradient, hidden, weight, scale)
        return of_hidden, of_weight, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.kernels = kernels
        return kernels.gated(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.kernels.gated_gradient(gradient, *ctx.saved_tensors), None


def _norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normed input, and the scale (…, 1)."""
    wide = hidden.to(torch.float32)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * (wide * scale).to(hidden.dtype), scale


def _norm_gradient(
    gradient: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    normed = hidden.to(torch.float32) * scale
    of_normed = (gradient * weight).to(hidden.dtype).to(torch.float32)
    shared = (of_normed * normed).mean(-1, keepdim=True)
    return ((of_normed - normed * shared) * scale).to(hidden.dtype)


def _gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * F.silu(gate)


def _gated_gradient(gradient: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Written into one tensor, half by half: the widest of a layer."""
    gate, up = gate_up.chunk(2, dim=-1)
    of_both = torch.empty_like(gate_up)
    of_gate, of_up = of_both.chunk(2, dim=-1)
    torch.mul(gradient, F.silu(gate), out=of_up)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
    return of_both


def _gated_gradient_in_one(gradient: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """The same for a compiler, which writes no halves of its own."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)), dim=-1)


PLAIN = Kernels(_norm, _norm_gradient, _gated, _gated_gradient)


@cache
def _compiled() -> Kernels:
    return Kernels(*(torch.compile(one) for one in (_norm, _norm_gradient, _gated, _gated_gradient_in_one)))


class ChatGLM3MLP(GlmMLP):
    """The MLP of a layer, which can forget what is inside it until the backward pass."""

    is_recomputed = False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) → (batch, tokens, hidden)"""
        if self.is_recomputed and self.training and torch.is_grad_enabled():
            # Without the last projection: where it is frozen, it needs no activation, and its work is not done twice.
            return self.down_proj(checkpoint(self._activate, hidden, use_reentrant=False))
        return self.down_proj(self._activate(hidden))

    def _activate(self, hidden: torch.Tensor) -> torch.Tensor:
        return swiglu(self.gate_up_proj(hidden), kernels_of(self))


def set_policy(model: nn.Module, policy: CheckpointingPolicy) -> None:
    """Chooses what `model.gradient_checkpointing_enable()` will switch on; "none" leaves it as it is.

    Raises:
        ValueError: for an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"the checkpointing policy is {policy!r}; use one of {', '.join(POLICIES)}")
    for module in model.modules():
        if hasattr(module, "recomputes_mlp_only"):
            module.recomputes_mlp_only = policy == "mlp"


def recompute_mlp(model: nn.Module, is_on: bool) -> None:
    """Switches the policy "mlp" on or off in all layers."""
    for module in model.modules():
        if isinstance(module, ChatGLM3MLP):
            module.is_recomputed = is_on


def summed_cross_entropy(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum of the cross-entropies of all positions, float32, (); without positions a zero that has a graph.

    A head whose weights are shared out is called even then: under ZeRO-3 all processes have to take part.

    Args:
        head: (positions, hidden) → (positions, vocabulary).
        hidden: (positions, hidden).
        targets: (positions,), each an id.
    """
    if _is_frozen_matrix(head):
        return _FrozenHeadLoss.apply(hidden, targets, head)
    chunks = list(zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK)))
    total = hidden.new_zeros((), dtype=torch.float32)
    for chunk in chunks:
        if len(chunks) > 1 and torch.is_grad_enabled():
            total = total + checkpoint(_loss_of_chunk, head, *chunk, use_reentrant=False)
        else:
            total = total + _loss_of_chunk(head, *chunk)
    return total


def _is_frozen_matrix(head: nn.Module) -> bool:
    """Whether the head is one plain matrix that is not trained, and all of it is here (ZeRO-3 shares it out)."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and not (head.weight.requires_grad and torch.is_grad_enabled())
        and not hasattr(head.weight, "ds_id")
    )


def _loss_of_chunk(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """The loss, and in the same pass softmax(logits) - one_hot(targets) times the head's matrix: its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), LOSS_CHUNK):
            rows = slice(start, start + LOSS_CHUNK)
            logits = head(hidden[rows])
            dtype = logits.dtype
            scores = logits.float()
            del logits
            wanted = targets[rows, None]
            scores -= scores.amax(dim=-1, keepdim=True)
            chosen = scores.gather(1, wanted)
            sums = scores.exp_().sum(dim=-1, keepdim=True)
            total += (sums.log() - chosen).sum()
            if gradient is not None:
                scores /= sums
                scores.scatter_add_(1, wanted, torch.full_like(chosen, -1.0))
                gradient[rows] = scores.to(dtype) @ head.weight.to(dtype)
            del scores  # or it would be there beside the next chunk's
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # In float32: half precision would round the factor itself, for all positions alike.
        return (gradient.float() * of_total).to(gradient.dtype), None, None
