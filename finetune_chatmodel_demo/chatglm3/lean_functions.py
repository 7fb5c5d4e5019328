"""RMSNorm and SwiGLU with backward passes of their own, which keep fewer activations than autograd would.

    RMSNorm   keeps its input in the dtype that it came in and a float32 scale for each token. Autograd would keep the
              input in float32 as well, and, where the norm is trained, the normed input.
    SwiGLU    keeps gate and up. Autograd would keep the activated gate as well, 13,696 numbers for each token and
              layer of the 6B model.

Outputs are bit-equal to transformers' modules, and so are SwiGLU's gradients; RMSNorm's differ by rounding in float32.
In the 6B model under bfloat16 this is 2.3 GiB less for a row of 2,048 tokens without checkpointing.

They are chains of element-wise operations, each of which reads and writes whole activations: `compile_elementwise` lets
torch.compile make one kernel of each chain. Exercise both with `pytest tests/test_lean_functions.py`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.glm.modeling_glm import GlmRMSNorm


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
