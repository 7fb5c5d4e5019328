"""Cross-entropy behind the language-model head, without ever holding (tokens × vocabulary) logits.

Only supervised positions come here, and their logits exist for `LOSS_CHUNK` positions at a time. Behind a frozen head
(P-Tuning, LoRA, freeze) the gradient of a chunk's hidden states is computed right after its logits, in their place:
nothing is computed twice, and nothing but that gradient is kept. Exercise it with `pytest tests/test_losses.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Supervised positions whose logits exist at one time: 1,024 × 65,024 × 4 bytes = 254 MiB.
LOSS_CHUNK = 1024


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
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # In float32: half precision would round the factor itself, for all positions alike.
        return (gradient.float() * of_total).to(gradient.dtype), None, None
