"""Do two models compute the same? Their logits on fixed probes, and how far they may be apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from finetune_chatmodel_demo.common.errors import UserError

# Largest difference of two logits, as a share of the largest logit. Weights are rounded to 24, 11 and 8 bits, and the
# errors add up over the layers: random models of 28 layers (weights of deviation 0.02 to 0.1) were found to differ by
# up to 1.3e-2 in float16 and 1.3e-1 in bfloat16. A wrong module changes the logits by as much as they are.
TOLERANCES = {torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 0.15}


class ComparisonError(UserError):
    """What was written does not compute what it should."""


@dataclass(frozen=True)
class Comparison:
    """Two models' logits on the same probes.

    Attributes:
        difference: largest difference of two logits.
        allowed: what the dtypes explain.
        positions: places where a next token (or a score) was computed.
        same_choice: those of them where both models have the same likeliest token; None for scores.
    """

    difference: float
    allowed: float
    positions: int
    same_choice: int | None

    def __str__(self) -> str:
        text = f"largest difference {self.difference:.1e} (allowed {self.allowed:.1e}) at {self.positions} positions"
        return text if self.same_choice is None else f"{text}, the same likeliest token at {self.same_choice}"

    def check(self, what: str) -> None:
        """Raises:
        ComparisonError: when the difference is larger than allowed, or is no number.
        """
        if not self.difference <= self.allowed:
            raise ComparisonError(f"{what}: {self}. The result was removed; please report this with the model's name")


@torch.no_grad()
def probe_logits(model: nn.Module, probes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits (tokens, vocabulary) of every probe, or scores (labels,) of a reward model, in float32 on the CPU."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits = [model(input_ids=torch.tensor([list(ids)], device=device)).logits[0].float().cpu() for ids in probes]
    model.train(was_training)
    return logits


def compare_logits(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], *dtypes: torch.dtype) -> Comparison:
    """
    Args:
        found, expected: from `probe_logits`.
        dtypes: of weights and computation; the coarsest says what is allowed.
    """
    largest = max(float(value.abs().max()) for value in expected)
    # max() of Python loses a nan that is not the first
    difference = float(torch.stack([(a - b).abs().max() for a, b in zip(found, expected)]).max())
    has_choice = expected[0].dim() == 2
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(found, expected)) if has_choice else None
    return Comparison(
        difference=difference,
        allowed=max(TOLERANCES[dtype] for dtype in dtypes) * max(largest, 1.0),
        positions=sum(len(value) if has_choice else 1 for value in expected),
        same_choice=same,
    )
