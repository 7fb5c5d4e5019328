"""Rollouts of PPO: replies drawn from the policy, their scores, and what the updates learn from.

Exercise it with `pytest tests/test_ppo.py`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import GenerationConfig

from finetune_chatmodel_demo.generation.batch import generate_all
from finetune_chatmodel_demo.training.stages.ppo_math import (
    KL_ESTIMATORS,
    SumOverProcesses,
    advantages_and_returns,
    kl_k1,
    kl_k3,
    token_rewards,
    whiten,
)
from finetune_chatmodel_demo.training.stages.ppo_policy import PolicyWithValue, Reference, ReplyRows, build_rows


@dataclass(frozen=True)
class Rollout:
    """B replies of one process; tensors (B, T) are 0 at padding, see `ppo_math`.

    Attributes:
        row_index: (B,), the prompts' rows in the training data.
        input_ids, prompt_lengths, reply_lengths: see `ReplyRows`.
        hit_cap: (B,) bool, True where --max_new_tokens ended the reply.
        scores: (B,), as the reward gave them.
        log_probs, reference, values: (B, T), before the updates.
        advantages, returns: (B, T).
    """

    row_index: torch.Tensor
    input_ids: torch.Tensor
    prompt_lengths: torch.Tensor
    reply_lengths: torch.Tensor
    hit_cap: torch.Tensor
    scores: torch.Tensor
    log_probs: torch.Tensor
    reference: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    @property
    def rows(self) -> ReplyRows:
        """Prompts and replies."""
        return ReplyRows(self.input_ids, self.prompt_lengths, self.reply_lengths)

    @property
    def mask(self) -> torch.Tensor:
        """(B, T), True where there is a token of the reply."""
        return self.rows.mask

    def select(self, replies: torch.Tensor) -> "Rollout":
        """The replies (b,), without the padding that only others need."""
        width = int((self.prompt_lengths + self.reply_lengths)[replies].max())
        longest = int(self.reply_lengths[replies].max())
        chosen = {item.name: getattr(self, item.name)[replies] for item in fields(self)}
        chosen["input_ids"] = chosen["input_ids"][:, :width]
        return Rollout(**{name: v[:, :longest] if name in PER_TOKEN else v for name, v in chosen.items()})

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint in the middle of a rollout keeps."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


PER_TOKEN = ("log_probs", "reference", "values", "advantages", "returns")


@dataclass(frozen=True)
class Reply:
    """Ids of a reply with its stop token; `hit_cap`: --max_new_tokens ended it, and there is none."""

    ids: list[int]
    hit_cap: bool


def seed_of(*numbers: int) -> int:
    """A seed that depends on all the numbers, below 2³²: rollouts never depend on a generator's state."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")


def order_of_prompts(count: int, start: int, size: int, seed: int) -> list[int]:
    """Rows number `start` to `start + size` of an endless sequence: all rows in random order, then in another one.

    Args:
        count: rows of the training data.
        start: how many were taken before.
        size: how many are wanted.
        seed: of the orders.
    """
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(start, start + size):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed_of(seed, epoch))
            orders[epoch] = torch.randperm(count, generator=generator).tolist()
        chosen.append(orders[epoch][place])
    return chosen


def write_replies(model: Any, prompts: Sequence[list[int]], settings: GenerationConfig, batch_size: int) -> list[Reply]:
    """Replies to prompts, in their order; prompts of similar length are answered together.

    Args:
        model: the policy's model, in evaluation mode.
        prompts: ids, each ending with the open assistant turn.
        settings: how tokens are drawn, from `build_settings`.
        batch_size: prompts answered at a time.
    """
    found = generate_all(model, prompts, settings, batch_size)
    return [Reply(ids, hit_cap=ids[-1] not in settings.eos_token_id) for ids in found]


def batches_of(rows: ReplyRows, batch_size: int) -> Iterator[tuple[torch.Tensor, ReplyRows]]:
    """Cuts rows into batches of similar length: the rows' indices and the batch."""
    lengths = rows.prompt_lengths + rows.reply_lengths
    for chosen in lengths.argsort(descending=True, stable=True).split(batch_size):
        width = int(lengths[chosen].max())
        yield chosen, ReplyRows(rows.input_ids[chosen, :width], rows.prompt_lengths[chosen], rows.reply_lengths[chosen])


@torch.no_grad()
def assess_replies(
    policy: PolicyWithValue, reference: Reference, rows: ReplyRows, batch_size: int
) -> dict[str, torch.Tensor]:
    """`log_probs`, `reference` and `values` of replies, (B, T) each, in batches."""
    mask = rows.mask
    found = {name: torch.zeros(mask.shape, device=mask.device) for name in ("log_probs", "reference", "values")}
    for chosen, batch in batches_of(rows, batch_size):
        width = int(batch.reply_lengths.max())
        log_probs, _, values = policy(batch.input_ids, batch.prompt_lengths, batch.reply_lengths)
        found["log_probs"][chosen, :width] = log_probs
        found["values"][chosen, :width] = values
        found["reference"][chosen, :width] = reference.log_probs(batch, policy.temperature)
    return found


@dataclass(frozen=True)
class RewardShape:
    """How scores become advantages; the names are those of the flags (--ppo_...)."""

    kl_estimator: str
    whiten_rewards: bool
    gamma: float
    lam: float

    def advantages(
        self,
        found: dict[str, torch.Tensor],
        scores: torch.Tensor,
        mask: torch.Tensor,
        kl_coef: float,
        add_up: SumOverProcesses,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages with mean 0 and variance 1 over the rollouts of all processes, and returns; (B, T) each.

        Args:
            found: from `assess_replies`.
            scores: (B,), after penalties and normalisation.
            mask: (B, T).
            kl_coef: weight of the KL.
            add_up: sums over processes.
        """
        kl = KL_ESTIMATORS[self.kl_estimator](found["log_probs"], found["reference"])
        rewards = token_rewards(kl, scores, mask, kl_coef)
        if self.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, add_up=add_up)
        advantages, returns = advantages_and_returns(rewards, found["values"], mask, self.gamma, self.lam)
        return whiten(advantages, mask, add_up=add_up), returns


def describe_rollout(rollout: Rollout, add_up: SumOverProcesses) -> dict[str, float]:
    """The log's figures of a rollout, over all processes.

    Returns:
        `reward` and `reward_std`: of the scores as the reward gave them. `kl`: of whole replies to the reference, as
        the coefficient's controller sees it; `kl_k3`: the same by the estimator that is never negative.
        `reply_tokens`: mean length. `hit_cap`: share of replies that --max_new_tokens ended.
    """
    k1 = kl_k1(rollout.log_probs, rollout.reference).sum(dim=1)
    k3 = kl_k3(rollout.log_probs, rollout.reference).sum(dim=1)
    count = torch.ones_like(rollout.scores)
    columns = [count, rollout.scores, rollout.scores**2, k1, k3, rollout.reply_lengths, rollout.hit_cap]
    sums = add_up(torch.stack([column.double().sum() for column in columns]))
    replies, score, square, *others = sums.tolist()
    mean = score / replies
    figures = {"reward": mean, "reward_std": max(square / replies - mean**2, 0.0) ** 0.5}
    names = ("kl", "kl_k3", "reply_tokens", "hit_cap")
    return figures | {name: value / replies for name, value in zip(names, others)}


def join_rows(
    prompts: list[list[int]], replies: Sequence[Reply], pad_token_id: int, device: torch.device
) -> tuple[ReplyRows, torch.Tensor]:
    """Rows of prompts and replies, and `hit_cap` (B,)."""
    rows = build_rows(prompts, [reply.ids for reply in replies], pad_token_id, device)
    return rows, torch.tensor([reply.hit_cap for reply in replies], device=device)
