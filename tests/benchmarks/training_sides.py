"""One P-Tuning v2 training step, in ways that give the same loss: the original demo's, and ours, padded or packed.

The original's side is written anew from the behaviour of ChatGLM3's finetune_chatmodel_demo (January 2024) and runs on
the same layers as ours: `tests/test_benchmarks.py` holds it to the original's loss and gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from benchmark_helpers import Elapsed, ModelSize, Stopwatch, forget_memory_peak, memory_of_this_process
from pokemon_rows import Row

from finetune_chatmodel_demo.chatglm3 import ChatGLM3ForCausalLM
from finetune_chatmodel_demo.chatglm3.kernels import CheckpointingPolicy, set_policy
from finetune_chatmodel_demo.conversation import IGNORED_LABEL, PadCollator
from finetune_chatmodel_demo.conversation.collating import PackCollator

# Upstream's P-Tuning scripts and transformers' Trainer.
LEARNING_RATE = 2e-2
MAX_GRADIENT_NORM = 1.0

LossOf = Callable[[ChatGLM3ForCausalLM, list[Row]], torch.Tensor]


class OriginalLoss(NamedTuple):
    """The loss as the original demo computes it: every row padded to the maximum, logits at every position."""

    max_seq_length: int
    pad_token_id: int

    def __call__(self, model: ChatGLM3ForCausalLM, rows: list[Row]) -> torch.Tensor:
        input_ids = self._pad(rows, "input_ids", self.pad_token_id)
        labels = self._pad(rows, "labels", IGNORED_LABEL)
        # With a prefix the original always builds a boolean mask for the batch, (batch, 1, tokens, prefix + tokens).
        # The model adds the prefix's columns, all True, in its first layer.
        shape = (len(rows), 1, self.max_seq_length, self.max_seq_length)
        mask = torch.ones(shape, dtype=torch.bool).tril_()
        hidden = model.model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden).float()[:, :-1].contiguous()
        targets = labels[:, 1:].contiguous()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=IGNORED_LABEL)

    def _pad(self, rows: list[Row], key: str, filler: int) -> torch.Tensor:
        cut = [row[key][: self.max_seq_length] for row in rows]
        return torch.tensor([ids + [filler] * (self.max_seq_length - len(ids)) for ids in cut])


class OurLoss(NamedTuple):
    """The loss as this project computes it: padded to the batch's longest row, logits where a label counts."""

    pad_token_id: int

    def __call__(self, model: ChatGLM3ForCausalLM, rows: list[Row]) -> torch.Tensor:
        return model(**PadCollator(self.pad_token_id)(rows)).loss


class PackedLoss(NamedTuple):
    """The loss of rows that share one row of tokens (--packing)."""

    pad_token_id: int

    def __call__(self, model: ChatGLM3ForCausalLM, rows: list[Row]) -> torch.Tensor:
        return model(**PackCollator(self.pad_token_id)([{"rows": rows}])).loss


class Side:
    """A model of its own, trained in one of the ways."""

    def __init__(self, loss_of: LossOf, size: ModelSize, policy: CheckpointingPolicy = "full") -> None:
        """
        Args:
            loss_of: `OriginalLoss`, `OurLoss` or `PackedLoss`.
            size: equal sizes give equal weights, so two sides start alike.
            policy: of gradient checkpointing; the original has "full".
        """
        self.loss_of = loss_of
        self.model = size.build().train()
        self.model.model.prefix_encoder.dropout.p = 0.0  # so that both sides compute the same
        if policy != "none":
            set_policy(self.model, policy)
            # transformers 5.23 renames it.
            getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)()
        self.prefix = list(self.model.prefix_encoder.parameters())
        self.optimizer = torch.optim.AdamW(self.prefix, lr=LEARNING_RATE, weight_decay=0.0)

    def step(self, rows: list[Row]) -> tuple[float, Elapsed]:
        """Forward, backward, clipping, optimizer step. Returns the loss before it, and the time."""
        return self.accumulate([rows])

    def accumulate(self, batches: list[list[Row]]) -> tuple[float, Elapsed]:
        """As `step`, for batches whose gradients are added up: the loss is the mean over all supervised tokens."""
        targets = [sum(label != IGNORED_LABEL for row in batch for label in row["labels"][1:]) for batch in batches]
        with Stopwatch() as watch:
            self.optimizer.zero_grad()
            value = 0.0
            for batch, count in zip(batches, targets):
                loss = self.loss_of(self.model, batch) * (count / sum(targets))
                loss.backward()
                value += loss.item()
            torch.nn.utils.clip_grad_norm_(self.prefix, MAX_GRADIENT_NORM)
            self.optimizer.step()
        return value, watch.elapsed

    def gradient(self, rows: list[Row]) -> torch.Tensor:
        """The gradient of the prefix for `rows`, flat; nothing is updated."""
        self.optimizer.zero_grad()
        self.loss_of(self.model, rows).backward()
        return torch.cat([parameter.grad.flatten() for parameter in self.prefix])


def measure_memory(loss_of: LossOf, size: ModelSize, rows: list[Row], threads: int) -> dict[str, float] | None:
    """Resident MiB of one side, to be called in a process of its own: after building the model, and at the peak."""
    torch.set_num_threads(threads)
    side = Side(loss_of, size)
    before = memory_of_this_process()
    if before is None:
        return None
    forget_memory_peak()
    for _ in range(2):  # the second step has the optimizer's state beside the rest
        side.step(rows)
    peak = memory_of_this_process()["peak"]
    return {
        "resident_before_mib": round(before["now"]),
        "resident_peak_mib": round(peak),
        "step_mib": round(peak - before["now"]),
    }
