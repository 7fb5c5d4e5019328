"""Puts rows into one batch, padded to its longest row and never further."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL


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


@dataclass(frozen=True)
class PackCollator:
    """Puts the groups of `GroupedRows` into one row, conversation behind conversation.

    Attributes:
        pad_token_id: What fills the row.
        pad_to_multiple_of: Rounds the row's length up to a multiple, with a conversation of padding at its end.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns `input_ids`, `labels`, `position_ids`, (1, T) long tensors, and `segment_lengths`, a tuple."""
        import torch

        rows = [row for item in items for row in item["rows"]]
        total = sum(len(row["input_ids"]) for row in rows)
        missing = -total % self.pad_to_multiple_of if self.pad_to_multiple_of else 0
        if missing:
            rows.append({"input_ids": [self.pad_token_id] * missing, "labels": [IGNORED_LABEL] * missing})
        # A conversation's first token is predicted by nothing: what stands before it belongs to another one.
        labels = [label for row in rows for label in [IGNORED_LABEL, *row["labels"][1:]]]
        batch = {
            "input_ids": [token for row in rows for token in row["input_ids"]],
            "labels": labels,
            "position_ids": [position for row in rows for position in range(len(row["input_ids"]))],
        }
        tensors = {name: torch.tensor([values], dtype=torch.long) for name, values in batch.items()}
        return {**tensors, "segment_lengths": tuple(len(row["input_ids"]) for row in rows)}
