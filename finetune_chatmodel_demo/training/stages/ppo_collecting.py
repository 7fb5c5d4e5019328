"""Collects rollouts: replies of the policy, their scores, and the KL's coefficient that follows from them.

Exercise it with `pytest tests/test_ppo.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.stages import ppo_settings
from finetune_chatmodel_demo.training.stages.ppo_math import (
    AdaptiveKL,
    FixedKL,
    RunningMoments,
    explained_variance,
    masked_moments,
)
from finetune_chatmodel_demo.training.stages.ppo_policy import PolicyWithValue, Reference
from finetune_chatmodel_demo.training.stages.ppo_rewards import Reward
from finetune_chatmodel_demo.training.stages.ppo_rollouts import (
    Reply,
    RewardShape,
    Rollout,
    assess_replies,
    describe_rollout,
    join_rows,
    write_replies,
)
from finetune_chatmodel_demo.training.trainer import NonFiniteLossError

NO_PROBABILITIES = "probability tensor contains"  # what torch says when it shall draw from NaN


class Collector:
    """Answers prompts with the policy and makes rollouts of the answers.

    Attributes:
        kl_control: the KL's coefficient.
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
        stage = settings.stage
        self.policy, self.reference, self.reward = policy, reference, reward
        self.settings, self.args, self.tokenizer, self.accelerator = settings, settings.training, tokenizer, accelerator
        self.describe_failure = describe_failure
        self.shape = RewardShape(stage.ppo_kl_estimator, stage.ppo_whiten_rewards, stage.ppo_gamma, stage.ppo_lam)
        self.kl_control = FixedKL(stage.ppo_kl_coef)
        if stage.ppo_adaptive_kl:
            self.kl_control = AdaptiveKL(stage.ppo_kl_coef, stage.ppo_target, stage.ppo_kl_horizon)
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
        replies = self.answer(prompts, row_index, is_greedy=False)
        rows, hit_cap = join_rows(prompts, replies, self.tokenizer.pad_token_id, self.args.device)
        scores = self.score(prompts, replies)
        self._check_finite("the score", scores, row_index)
        self.policy.eval()
        with self.accelerator.autocast():
            found = assess_replies(self.policy, self.reference, rows, self.args.per_device_eval_batch_size)
        self._check_finite("a log-probability or value", sum(found.values()).sum(dim=1), row_index)
        shaped = self.shape_scores(scores, hit_cap)
        advantages, returns = self.shape.advantages(found, shaped, rows.mask, self.kl_control.coef, self.sum)
        rollout = Rollout(
            row_index=torch.tensor(row_index, device=self.args.device),
            input_ids=rows.input_ids,
            prompt_lengths=rows.prompt_lengths,
            reply_lengths=rows.reply_lengths,
            hit_cap=hit_cap,
            scores=scores,
            advantages=advantages,
            returns=returns,
            **found,
        )
        return rollout, self._describe(rollout)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over processes."""
        return self.accelerator.reduce(values, reduction="sum")

    def answer(self, prompts: list[list[int]], rows: list[int], is_greedy: bool) -> list[Reply]:
        """The policy's replies to prompts, drawn or greedy.

        Raises:
            NonFiniteLossError: when its probabilities are no numbers.
        """
        generation = ppo_settings.build_generation(self.settings, self.tokenizer, is_greedy)
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

    def _describe(self, rollout: Rollout) -> dict[str, float]:
        """A rollout's figures; moves the KL's coefficient, which the next rollout has."""
        figures = describe_rollout(rollout, self.sum)
        figures["kl_coef"] = self.kl_control.coef
        explained = explained_variance(rollout.values, rollout.returns, rollout.mask, self.sum)
        figures["explained_variance"] = explained.item()
        self.kl_control.update(figures["kl"], len(rollout.scores) * self.args.world_size)
        return figures

    def _check_finite(self, what: str, values: torch.Tensor, rows: list[int]) -> None:
        bad = [row for row, is_good in zip(rows, torch.isfinite(values).tolist()) if not is_good]
        if bad:
            raise NonFiniteLossError(self.describe_failure(f"{what} is not finite", [torch.tensor(bad)]))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"kl_coef": self.kl_control.coef, "score_moments": self.score_moments.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Continues from `state()`."""
        self.kl_control.coef = state["kl_coef"]
        self.score_moments.load(state["score_moments"])
