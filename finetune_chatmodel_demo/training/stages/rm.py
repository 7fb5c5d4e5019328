"""Reward models: a score for a text, from pairs of a better and a worse reply (Ouyang et al., 2022, arXiv:2203.02155).

    python finetune_chatmodel_demo/finetune.py --stage rm --finetuning_type lora --dataset pokemon_preference \\
        --eval_dataset pokemon_preference_validation --model_name_or_path THUDM/chatglm3-6b --output_dir output/rm

The result is a ChatGLM3ForSequenceClassification with one label, or an adapter with its score head: `--reward_model` of
--stage ppo.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.stages.pairs import PairTrainer
from finetune_chatmodel_demo.training.stages.stage_checks import EVALUATED


class RewardTrainer(PairTrainer):
    """Trains a score so that of each pair the chosen reply has the higher one."""

    FIGURES = EVALUATED["rm"]

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        train_rows: Any | None,
        validation_rows: Any | None = None,
    ) -> None:
        """Arguments: see `RunTrainer`; the model is a ChatGLM3ForSequenceClassification, maybe in PEFT's wrapper."""
        model.config.pad_token_id = tokenizer.pad_token_id  # the model takes the score at the last other token
        if not settings.stage.center_rewards_coefficient:
            _freeze_head_bias(model)
        super().__init__(model, settings, tokenizer, train_rows, validation_rows)

    def describe_objective(self) -> dict[str, str]:
        """See `PairTrainer`."""
        coefficient = self.settings.stage.center_rewards_coefficient
        centred = f" + {coefficient:g} (chosen + rejected)²" if coefficient else ""
        return {"loss": f"-log sigmoid(chosen - rejected){centred}, of scores"}

    def describe_run(self) -> dict[str, Any]:
        """What decides the course of a run; a resumed run is compared with it."""
        coefficient = self.settings.stage.center_rewards_coefficient
        return {**super().describe_run(), "center_rewards_coefficient": coefficient}

    def compute_figures(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `PairTrainer`."""
        chosen, rejected = model(input_ids=batch["input_ids"], use_cache=False).logits[:, 0].float().chunk(2)
        coefficient = self.settings.stage.center_rewards_coefficient
        return {
            "loss": pair_loss(chosen, rejected, coefficient),
            "accuracy": (chosen > rejected).float(),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
        }


def _freeze_head_bias(model: nn.Module) -> None:
    """The bias shifts both scores of a pair alike. Its gradient is rounding errors, and Adam would enlarge them."""
    for name, parameter in model.named_parameters():
        if "score" in name and name.endswith(".bias"):
            parameter.requires_grad_(False)


def pair_loss(chosen: torch.Tensor, rejected: torch.Tensor, center_coefficient: float = 0.0) -> torch.Tensor:
    """(B,), the negative log-probability that the chosen reply is the better one (Bradley and Terry).

    Only differences of scores matter to it; a coefficient holds their sum near zero (arXiv:2312.09244).

    Args:
        chosen, rejected: scores (B,).
        center_coefficient: weight of (chosen + rejected)².
    """
    loss = -F.logsigmoid(chosen - rejected)
    if center_coefficient:
        loss = loss + center_coefficient * (chosen + rejected) ** 2
    return loss
