"""Gradient checkpointing policies: which activations a training step keeps, and which it computes a second time.

    none   keeps all of them: the fastest
    mlp    computes the inside of each MLP again, which holds most of what a layer keeps
    full   keeps each layer's input only: the least memory, about a third more time

Frozen weights need no activations for gradients of their own: with a prefix or an adapter, `none` and `mlp` keep far
less than in full fine-tuning. Exercise it with `pytest tests/test_recomputing.py`.
"""

from typing import Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.glm.modeling_glm import GlmMLP

from finetune_chatmodel_demo.chatglm3.lean_functions import kernels_of, swiglu

CheckpointingPolicy = Literal["none", "mlp", "full"]
# In the order of what they recompute.
POLICIES: tuple[CheckpointingPolicy, ...] = get_args(CheckpointingPolicy)


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
