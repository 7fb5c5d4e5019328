"""Rollouts of PPO: replies drawn from the policy, their scores, and what the updates learn from."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetune_chatmodel_demo.generation.batch import generate_all
from finetune_chatmodel_demo.generation.session import build_settings
from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.stages.ppo_math import (
    KL_ESTIMATORS,
    RunningMoments,
    SumOverProcesses,
    advantages_and_returns,
    explained_variance,
    kl_k1,
    kl_k3,
    masked_moments,
    move_kl_coef,
    token_rewards,
    whiten,
)
from finetune_chatmodel_demo.training.stages.ppo_rewards import Reward
from finetune_chatmodel_demo.training.stages.reference import (
    Reference,
    ReplyRows,
    build_rows,
    last_hidden_states,
    reply_log_probs,
    reply_states,
    spread,
    without_adapter_wrapper,
)
from finetune_chatmodel_demo.training.stages.stage_checks import sampling_of
from finetune_chatmodel_demo.training.trainer import NonFiniteLossError

NO_PROBABILITIES = "probability tensor contains"  # what torch says when it shall draw from NaN
PER_TOKEN = ("log_probs", "reference", "values", "advantages", "returns")


class PolicyWithValue(nn.Module):
    """A language model that also says how much reward is to come: a linear layer on its last hidden states.

    Attributes:
        model: ChatGLM3ForCausalLM, with or without PEFT's wrapper.
        value_head: (hidden) → 1 in float32; it starts at zero, so that the first advantages are the rewards alone.
    """

    def __init__(self, model: nn.Module, temperature: float) -> None:
        """
        Args:
            model: trained in place.
            temperature: that replies are drawn with; log-probabilities are of that distribution.
        """
        super().__init__()
        self.model = model
        self.temperature = temperature
        inner = without_adapter_wrapper(model)
        self.value_head = nn.Linear(inner.config.hidden_size, 1, device=inner.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self, input_ids: torch.Tensor, prompt_lengths: torch.Tensor, reply_lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            input_ids, prompt_lengths, reply_lengths: see `ReplyRows`.

        Returns:
            log_probs, entropies, values, each (B, T) in float32 and 0 at padding: of a reply's token, of the
            distribution it was drawn from, and of the text before it.
        """
        rows = ReplyRows(input_ids, prompt_lengths, reply_lengths)
        states = reply_states(last_hidden_states(self.model, rows), rows)
        log_probs, entropies = reply_log_probs(self.model, states, rows, self.temperature)
        with torch.autocast(states.device.type, enabled=False):
            values = self.value_head(states.float()).squeeze(-1)
        return log_probs, entropies, spread(values, rows.mask)


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
    def mask(self) -> torch.Tensor:
        """(B, T), True where there is a token of the reply."""
        return ReplyRows(self.input_ids, self.prompt_lengths, self.reply_lengths).mask

    def select(self, replies: torch.Tensor) -> "Rollout":
        """The replies (b,), without the padding that only others need."""
        width = int((self.prompt_lengths + self.reply_lengths)[replies].max())
        longest = int(self.reply_lengths[replies].max())
        chosen = {name: values[replies] for name, values in self.state().items()}
        chosen["input_ids"] = chosen["input_ids"][:, :width]
        return Rollout(**{name: v[:, :longest] if name in PER_TOKEN else v for name, v in chosen.items()})

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint in the middle of a rollout keeps."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


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


# Replies


@dataclass(frozen=True)
class Reply:
    """Ids of a reply with its stop token; `hit_cap`: --max_new_tokens ended it, and there is none."""

    ids: list[int]
    hit_cap: bool


def build_generation(settings: Settings, tokenizer: Any, is_greedy: bool = False) -> GenerationConfig:
    """How rollouts draw replies; greedy for validation."""
    sampling = {} if is_greedy else {"do_sample": True, **sampling_of(settings)}
    return build_settings(tokenizer, max_new_tokens=settings.generation.max_new_tokens, **sampling)


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


@torch.no_grad()
def assess_replies(
    policy: PolicyWithValue, reference: Reference, rows: ReplyRows, batch_size: int
) -> dict[str, torch.Tensor]:
    """`log_probs`, `reference` and `values` of replies, (B, T) each, in batches of similar length."""
    mask, lengths = rows.mask, rows.prompt_lengths + rows.reply_lengths
    found = {name: torch.zeros(mask.shape, device=mask.device) for name in ("log_probs", "reference", "values")}
    for chosen in lengths.argsort(descending=True, stable=True).split(batch_size):
        input_ids = rows.input_ids[chosen, : int(lengths[chosen].max())]
        batch = ReplyRows(input_ids, rows.prompt_lengths[chosen], rows.reply_lengths[chosen])
        width = int(batch.reply_lengths.max())
        log_probs, _, values = policy(batch.input_ids, batch.prompt_lengths, batch.reply_lengths)
        found["log_probs"][chosen, :width] = log_probs
        found["values"][chosen, :width] = values
        found["reference"][chosen, :width] = reference.log_probs(batch, policy.temperature)
    return found


def describe_rollout(rollout: Rollout, add_up: SumOverProcesses) -> dict[str, float]:
    """The log's figures of a `Rollout`, over all processes.

    Returns:
        `reward` and `reward_std`: of the scores as the reward gave them. `kl`: of whole replies to the reference, as
        the coefficient's controller sees it; `kl_k3`: the same by the estimator that is never negative.
        `reply_tokens`: mean length. `hit_cap`: share of replies that --max_new_tokens ended. `explained_variance`.
    """
    k1 = kl_k1(rollout.log_probs, rollout.reference).sum(dim=1)
    k3 = kl_k3(rollout.log_probs, rollout.reference).sum(dim=1)
    count = torch.ones_like(rollout.scores)
    columns = [count, rollout.scores, rollout.scores**2, k1, k3, rollout.reply_lengths, rollout.hit_cap]
    replies, score, square, *others = add_up(torch.stack([column.double().sum() for column in columns])).tolist()
    mean = score / replies
    names = ("kl", "kl_k3", "reply_tokens", "hit_cap")
    return {
        "reward": mean,
        "reward_std": max(square / replies - mean**2, 0.0) ** 0.5,
        **{name: value / replies for name, value in zip(names, others)},
        "explained_variance": explained_variance(rollout.values, rollout.returns, rollout.mask, add_up).item(),
    }


class Collector:
    """Answers prompts with the policy and makes rollouts of the answers.

    Attributes:
        kl_coef: weight of the KL; every rollout moves it, unless --ppo_adaptive_kl False.
        score_moments: of all scores so far, for --ppo_score_norm.
    """

    def __init__(
        self,
        policy: PolicyWithValue,
        reference: Reference,
        reward: Reward,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        describe_failure: Callable[[str, list[torch.Tensor]], str],
    ) -> None:
        """
        Args:
            policy: answers, and is trained by others.
            reference: what its KL is measured to.
            reward: scores the answers.
            settings: the run.
            tokenizer: of the policy.
            accelerator: of the run.
            describe_failure: words an error that names the training rows of the given indices.
        """
        self.policy, self.reference, self.reward = policy, reference, reward
        self.settings, self.args, self.tokenizer, self.accelerator = settings, settings.training, tokenizer, accelerator
        self.describe_failure = describe_failure
        self.kl_coef = settings.stage.ppo_kl_coef
        self.score_moments = RunningMoments()

    def collect(self, prompts: list[list[int]], row_index: list[int]) -> tuple[Rollout, dict[str, float]]:
        """Draws replies, scores them and computes their advantages.

        Args:
            prompts: ids; as many on every process.
            row_index: their rows in the training data.

        Returns:
            The rollout of this process, and the log's figures of all processes' rollouts.

        Raises:
            NonFiniteLossError: for a score, probability or value that is no number; names the rows.
            RewardError: when the reward function fails.
        """
        stage, device = self.settings.stage, self.args.device
        replies = self.answer(prompts, row_index, is_greedy=False)
        rows = build_rows(prompts, [reply.ids for reply in replies], self.tokenizer.pad_token_id, device)
        hit_cap = torch.tensor([reply.hit_cap for reply in replies], device=device)
        scores = self.score(prompts, replies)
        self._check_finite("the score", scores, row_index)
        self.policy.eval()
        with self.accelerator.autocast():
            found = assess_replies(self.policy, self.reference, rows, self.args.per_device_eval_batch_size)
        self._check_finite("a log-probability or value", sum(found.values()).sum(dim=1), row_index)
        shaped = self.shape_scores(scores, hit_cap)
        advantages, returns = self._advantages(found, shaped, rows.mask)
        rollout = Rollout(
            row_index=torch.tensor(row_index, device=device),
            **vars(rows),
            hit_cap=hit_cap,
            scores=scores,
            advantages=advantages,
            returns=returns,
            **found,
        )
        figures = {**describe_rollout(rollout, self.sum), "kl_coef": self.kl_coef}
        if stage.ppo_adaptive_kl:
            count = len(scores) * self.args.world_size
            self.kl_coef = move_kl_coef(self.kl_coef, figures["kl"], stage.ppo_target, count, stage.ppo_kl_horizon)
        return rollout, figures

    def _advantages(
        self, found: dict[str, torch.Tensor], scores: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages with mean 0 and variance 1 over the rollouts of all processes, and returns; (B, T) each."""
        stage = self.settings.stage
        kl = KL_ESTIMATORS[stage.ppo_kl_estimator](found["log_probs"], found["reference"])
        rewards = token_rewards(kl, scores, mask, self.kl_coef)
        if stage.ppo_whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, add_up=self.sum)
        advantages, returns = advantages_and_returns(rewards, found["values"], mask, stage.ppo_gamma, stage.ppo_lam)
        return whiten(advantages, mask, add_up=self.sum), returns

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over processes."""
        return self.accelerator.reduce(values, reduction="sum")

    def answer(self, prompts: list[list[int]], rows: list[int], is_greedy: bool) -> list[Reply]:
        """The policy's replies to prompts, drawn or greedy.

        Raises:
            NonFiniteLossError: when its probabilities are no numbers.
        """
        generation = build_generation(self.settings, self.tokenizer, is_greedy)
        self.policy.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                return write_replies(self.policy.model, prompts, generation, self.args.per_device_eval_batch_size)
        except RuntimeError as error:
            if NO_PROBABILITIES not in str(error):
                raise
            failure = self.describe_failure("the policy's probabilities are no numbers", [torch.tensor(rows)])
            raise NonFiniteLossError(failure) from error

    def score(self, prompts: list[list[int]], replies: list[Reply]) -> torch.Tensor:
        """The reward's scores, (B,) in float32."""
        if not prompts:
            return torch.zeros(0, device=self.args.device)
        with self.accelerator.autocast():
            return self.reward(prompts, [reply.ids for reply in replies]).to(self.args.device, torch.float32)

    def shape_scores(self, scores: torch.Tensor, hit_cap: torch.Tensor) -> torch.Tensor:
        """Scores with the penalty for replies that did not end, normalised where the flag says so; (B,)."""
        shaped = scores - self.settings.stage.ppo_missing_eos_penalty * hit_cap
        if not self.settings.stage.ppo_score_norm:
            return shaped
        everything = torch.ones_like(shaped, dtype=torch.bool)
        mean, variance = masked_moments(shaped.double(), everything, self.sum)
        self.score_moments.add(mean.item(), variance.item(), len(shaped) * self.args.world_size)
        return self.score_moments.normalise(shaped)

    def _check_finite(self, what: str, values: torch.Tensor, rows: list[int]) -> None:
        bad = [row for row, is_good in zip(rows, torch.isfinite(values).tolist()) if not is_good]
        if bad:
            raise NonFiniteLossError(self.describe_failure(f"{what} is not finite", [torch.tensor(bad)]))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"kl_coef": self.kl_coef, "score_moments": self.score_moments.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Continues from `state()`."""
        self.kl_coef = state["kl_coef"]
        self.score_moments.load(state["score_moments"])
