"""An optimizer update of PPO: the clipped losses of some replies, in batches, on one or more processes.

Exercise it with `pytest tests/test_ppo.py`.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import nn

from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.stages.ppo_math import kl_k3, policy_loss, value_loss
from finetune_chatmodel_demo.training.stages.ppo_policy import PolicyWithValue
from finetune_chatmodel_demo.training.stages.ppo_rollouts import Rollout
from finetune_chatmodel_demo.training.trainer import NonFiniteLossError

# Means over the tokens of an update. `policy_kl`: how far the policy has moved since the rollout.
UPDATE_FIGURES = (
    "policy_loss",
    "value_loss",
    "entropy",
    "clip_fraction",
    "value_clip_fraction",
    "ratio",
    "policy_kl",
)


class Updater:
    """Learns from the replies of a rollout."""

    def __init__(
        self,
        policy: PolicyWithValue,
        settings: Settings,
        accelerator: Accelerator,
        describe_failure: Callable[[str, list[torch.Tensor]], str],
    ) -> None:
        """
        Args:
            policy: trained in place.
            settings: the run.
            accelerator: of the run.
            describe_failure: words an error that names the training rows of the given indices.
        """
        self.policy, self.settings, self.accelerator = policy, settings, accelerator
        self.describe_failure = describe_failure
        # Averages gradients over processes, where there is more than one.
        self.wrapped: nn.Module = accelerator.prepare_model(policy, device_placement=False)

    def compute_gradients(self, replies: Rollout) -> dict[str, float]:
        """Forward and backward in batches of --per_device_train_batch_size; gradients are clipped.

        Every token of the update weighs the same, whatever the batches and processes.

        Args:
            replies: of this process, all that the update learns from.

        Returns:
            The log's figures of the update, over all processes.

        Raises:
            NonFiniteLossError: names the rows.
        """
        args, stage = self.settings.training, self.settings.stage
        self.policy.train()
        tokens = self.accelerator.reduce(replies.mask.sum(), reduction="sum")
        lengths = replies.prompt_lengths + replies.reply_lengths
        batches = lengths.argsort(descending=True, stable=True).split(args.per_device_train_batch_size)
        sums = torch.zeros(len(UPDATE_FIGURES), device=lengths.device)
        for number, chosen in enumerate(batches):
            is_last = number == len(batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.wrapped):
                sums += self._learn_from(replies.select(chosen), tokens)
        parameters = [value for value in self.policy.parameters() if value.requires_grad]
        norm = self.accelerator.clip_grad_norm_(parameters, args.max_grad_norm or float("inf"))
        if self.settings.precision != "float16" and not torch.isfinite(norm):
            failure = self.describe_failure(f"the gradient's norm is {float(norm)}", [replies.row_index])
            raise NonFiniteLossError(failure)
        means = (self.accelerator.reduce(sums, reduction="sum") / tokens).tolist()
        figures = dict(zip(UPDATE_FIGURES, means))
        loss = figures["policy_loss"] + stage.ppo_vf_coef * figures["value_loss"]
        return {"loss": loss, "grad_norm": float(norm), **figures}

    def _learn_from(self, batch: Rollout, tokens: torch.Tensor) -> torch.Tensor:
        """Gradients of a batch's share in the loss of an update.

        Args:
            batch: some of the update's replies.
            tokens: () reply tokens of the whole update on all processes.

        Returns:
            (figures,): sums over the batch's tokens, in the order of UPDATE_FIGURES.
        """
        stage, mask = self.settings.stage, batch.mask
        log_probs, entropies, values = self.wrapped(batch.input_ids, batch.prompt_lengths, batch.reply_lengths)
        policy, clipped = policy_loss(log_probs, batch.log_probs, batch.advantages, mask, stage.ppo_cliprange)
        value, value_clipped = value_loss(values, batch.values, batch.returns, mask, stage.ppo_cliprange_value)
        summed = policy + stage.ppo_vf_coef * value
        if not torch.isfinite(summed):
            raise NonFiniteLossError(self.describe_failure(f"the loss is {summed.item()}", [batch.row_index]))
        # Gradients are averaged over processes, and the loss is a mean over the tokens of all of them.
        self.accelerator.backward(summed * self.settings.training.world_size / tokens)
        with torch.no_grad():
            moved = kl_k3(batch.log_probs, log_probs)
            ratio = ((log_probs - batch.log_probs).exp() * mask).sum()
            figures = [policy, value, entropies.sum(), clipped, value_clipped, ratio, moved.sum()]
            return torch.stack([figure.detach().float() for figure in figures])
