"""Preference optimization: the policy comes to prefer the chosen replies, without a reward model.

    python finetune_chatmodel_demo/finetune.py --stage dpo --finetuning_type lora --dataset pokemon_preference \\
        --eval_dataset pokemon_preference_validation --model_name_or_path THUDM/chatglm3-6b --output_dir output/dpo \\
        --adapter_name_or_path output/sft

The losses sigmoid (DPO), hinge and ipo compare the policy with a reference, orpo and simpo do without. The reference is
--ref_model where it is given, else

    ptuning        the base model, the prefix off; also when the run starts from --ptuning_checkpoint
    lora           the base model, the adapter off; with --adapter_name_or_path, that adapter as it was at the start
    freeze, full   a copy of the trained parameters as they were at the start
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL
from finetune_chatmodel_demo.training.arguments import StageArguments
from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.stages.pairs import PairTrainer
from finetune_chatmodel_demo.training.stages.reference import (
    Reference,
    ReplyRows,
    build_reference,
    describe_reference,
    disable_dropout,
    reply_log_probs,
    reply_states,
)
from finetune_chatmodel_demo.training.stages.stage_checks import EVALUATED, WITHOUT_REFERENCE


class PreferenceTrainer(PairTrainer):
    """Trains a policy so that it prefers the chosen replies."""

    FIGURES = EVALUATED["dpo"]

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        train_rows: Any | None,
        validation_rows: Any | None = None,
    ) -> None:
        """Arguments: see `RunTrainer`.

        Raises:
            UserError: when the reference model cannot be loaded.
        """
        needs_reference = settings.stage.pref_loss not in WITHOUT_REFERENCE
        self.reference: Reference | None = build_reference(model, settings) if needs_reference else None
        super().__init__(model, settings, tokenizer, train_rows, validation_rows)
        disable_dropout(self.model)

    def describe_objective(self) -> dict[str, str]:
        """See `PairTrainer`."""
        stage = self.settings.stage
        extra = f" + {stage.pref_ftx:g} × sft" if stage.pref_ftx else ""
        extra += f", label smoothing {stage.dpo_label_smoothing:g}" if stage.dpo_label_smoothing else ""
        extra += f", gamma {stage.simpo_gamma:g}" if stage.pref_loss == "simpo" else ""
        return {
            "loss": f"{stage.pref_loss}{extra}, beta {stage.pref_beta:g}",
            "reference": "none" if self.reference is None else describe_reference(self.settings),
        }

    def describe_run(self) -> dict[str, Any]:
        """What decides the course of a run; a resumed run is compared with it."""
        names = ("pref_beta", "pref_loss", "pref_ftx", "dpo_label_smoothing", "simpo_gamma", "ref_model")
        return {**super().describe_run(), **{name: getattr(self.settings.stage, name) for name in names}}

    def compute_figures(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `PairTrainer`."""
        reply_lengths = (batch["labels"] != IGNORED_LABEL).sum(dim=1)
        rows = ReplyRows(batch["input_ids"], batch["lengths"] - reply_lengths, reply_lengths)
        with self.accelerator.autocast():
            # Through the wrapper of several processes, which gathers the gradients.
            outputs = model(input_ids=rows.input_ids, use_cache=False, output_logits=False, output_hidden_states=True)
            states = reply_states(outputs.hidden_states[-1], rows)
            log_probs = reply_log_probs(self.accelerator.unwrap_model(model), states, rows)[0].sum(dim=1)
            reference = torch.zeros_like(log_probs)
            if self.reference is not None:
                reference = self.reference.log_probs(rows).sum(dim=1)
        return preference_figures(self.settings.stage, log_probs, reference, reply_lengths)


def preference_figures(
    stage: StageArguments, log_probs: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The losses and the figures of B pairs, (B,) each.

    Args:
        stage: the flags of dpo.
        log_probs: (2B,) of whole replies, the chosen ones first; gradients flow into these.
        reference: (2B,) the reference's, or zeros.
        lengths: (2B,) tokens of the replies.
    """
    gained = log_probs - reference
    loss = preference_loss(stage, *gained.chunk(2), *lengths.chunk(2))
    chosen, rejected = log_probs.chunk(2)
    if stage.pref_ftx:
        # All tokens of the batch's chosen replies weigh the same.
        loss = loss - stage.pref_ftx * chosen.sum() / lengths.chunk(2)[0].sum()
    rewards = stage.pref_beta * (gained / lengths if stage.pref_loss in WITHOUT_REFERENCE else gained).detach()
    better, worse = rewards.chunk(2)
    return {
        "loss": loss,
        "rewards/chosen": better,
        "rewards/rejected": worse,
        "rewards/margins": better - worse,
        "rewards/accuracies": (better > worse).float(),
        "logps/chosen": chosen.detach(),
        "logps/rejected": rejected.detach(),
    }


def preference_loss(
    stage: StageArguments,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
) -> torch.Tensor:
    """The loss of B pairs, (B,).

    sigmoid: DPO, arXiv:2305.18290; with label smoothing the unbiased form of arXiv:2403.00409. hinge: SLiC,
    arXiv:2305.10425. ipo: arXiv:2310.12036, equation 17, of means over tokens, as its authors computed it. orpo:
    arXiv:2403.07691, equations 6 and 7. simpo: arXiv:2405.14734, equation 6.

    Args:
        stage: `pref_loss`, `pref_beta`, `dpo_label_smoothing` and `simpo_gamma` are used.
        chosen, rejected: (B,) log-probabilities of the replies, minus the reference's where the loss has one.
        chosen_lengths, rejected_lengths: (B,) tokens of the replies.
    """
    beta, smoothing = stage.pref_beta, stage.dpo_label_smoothing
    difference = chosen - rejected
    chosen_mean, rejected_mean = chosen / chosen_lengths, rejected / rejected_lengths
    if stage.pref_loss == "sigmoid":
        right, wrong = -F.logsigmoid(beta * difference), -F.logsigmoid(-beta * difference)
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    if stage.pref_loss == "hinge":
        return torch.relu(1 - beta * difference)
    if stage.pref_loss == "ipo":
        return (chosen_mean - rejected_mean - 1 / (2 * beta)) ** 2
    if stage.pref_loss == "simpo":
        return -F.logsigmoid(beta * (chosen_mean - rejected_mean) - stage.simpo_gamma)
    log_odds = chosen_mean - rejected_mean - _log1mexp(chosen_mean) + _log1mexp(rejected_mean)
    return -chosen_mean - beta * F.logsigmoid(log_odds)


def _log1mexp(values: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of values below 0; a reply of probability 1 would be infinite."""
    return torch.log(-torch.expm1(values.clamp(max=-1e-6)))
