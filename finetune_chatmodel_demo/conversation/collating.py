"""Puts rows into one batch, padded to its longest row and never further."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune_chatmodel_demo.conversation.rendering import IGNORED_LABEL


@dataclass(frozen=True)
class PadCollator:
    """Pads on the right.

    There is no attention mask on purpose: causal attention never sees what is to the right of a token, and without a
    mask PyTorch's fused kernels stay in use.

    Attributes:
        pad_token_id: What fills `input_ids`; `labels` are filled with -100.
        pad_to_multiple_of: Rounds the batch's length up to a multiple.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Returns `input_ids` and `labels`, both (B, T) long tensors."""
        import torch  # here, so that the room can be imported for a `--help` without it

        length = max(len(item["input_ids"]) for item in items)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {}
        for key, filler in (("input_ids", self.pad_token_id), ("labels", IGNORED_LABEL)):
            rows = [item[key] + [filler] * (length - len(item[key])) for item in items]
            batch[key] = torch.tensor(rows, dtype=torch.long)
        return batch
