"""Direct preference optimization (Rafailov et al., 2023, arXiv:2305.18290) through TRL's trainer.

    python finetune_chatmodel_demo/finetune.py --stage dpo --finetuning_type lora --dataset pokemon_preference \\
        --eval_dataset pokemon_preference_validation --model_name_or_path THUDM/chatglm3-6b --output_dir output/dpo \\
        --adapter_name_or_path output/sft

TRL computes log-probabilities, losses and figures. Rows, order, checkpoints and the reference model are this project's.
The reference is --ref_model where it is given, else

    ptuning        the base model, the prefix off; also when the run starts from --ptuning_checkpoint
    lora           the base model, the adapter off; with --adapter_name_or_path, that adapter as it was at the start
    freeze, full   a copy of the trained parameters as they were at the start

Exercise it with `pytest tests/test_dpo.py`.
"""

from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL
from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.stages.pairs import PairTrainer
from finetune_chatmodel_demo.training.stages.reference import (
    ReferenceModel,
    build_reference,
    describe_reference,
    disable_dropout,
)


class PreferenceLoss(DPOTrainer):
    """TRL's trainer for rows that are token ids already, and a reference model that it does not know.

    Of TRL it uses the constructor, `_compute_loss`, which takes the reference's log-probabilities from the batch, and
    the forward pass that the constructor adds to a model: log-probabilities of the labels, logits in chunks.
    """

    def __init__(self, model: nn.Module, train_dataset: Any, eval_dataset: Any, **kwargs: Any) -> None:
        """Arguments: see `trl.DPOTrainer`; the data sets may be of any kind."""
        # TRL rounds the parameters trained on a quantized base to bfloat16.
        trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(
            model=model,
            train_dataset=_placeholder(),
            eval_dataset=None if eval_dataset is None else _placeholder(),
            **kwargs,
        )
        for parameter, values in trained:
            parameter.data = values
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.processing_class = None  # with one, Trainer writes the tokenizer's special ids into the configuration
        self.precompute_ref_logps = True

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Nothing is to be tokenized."""
        return dataset

    def _send_telemetry(self) -> None:
        """Nobody is told about the run."""


class PreferenceTrainer(PairTrainer, PreferenceLoss):
    """Trains a policy so that it prefers the chosen replies more than the reference does."""

    EVALUATED = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )

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
        self.reference = build_reference(model, settings, ReferenceModel)
        own = self.reference.model if self.reference.is_own_model else _NoModel(model.config)
        super().__init__(
            model, settings, tokenizer, train_rows, validation_rows, processing_class=tokenizer, ref_model=own
        )
        disable_dropout(self.model)

    def describe_objective(self) -> dict[str, str]:
        """See `PairTrainer`."""
        stage = self.settings.stage
        extra = f" + {stage.pref_ftx:g} × sft" if stage.pref_ftx else ""
        extra += f", label smoothing {stage.dpo_label_smoothing:g}" if stage.dpo_label_smoothing else ""
        return {
            "loss": f"{stage.pref_loss}{extra}, beta {stage.pref_beta:g}",
            "reference": describe_reference(self.settings),
        }

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The mean loss of a batch's pairs; TRL keeps their figures for the log."""
        input_ids, labels = inputs["input_ids"], inputs["labels"]
        chosen, rejected = self._reference_log_probs(input_ids, labels).chunk(2)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        batch = {
            "input_ids": input_ids,
            "attention_mask": (positions < inputs["lengths"][:, None]).long(),
            "completion_mask": (labels != IGNORED_LABEL).long(),
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }

        def forward(attention_mask: torch.Tensor, **kwargs: Any) -> Any:
            """TRL counts tokens with the mask; the model needs none, as padding is on the right."""
            return model(**kwargs)

        return super().compute_loss(forward, batch, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def _reference_log_probs(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(2B,), of whole replies."""
        with self.reference.in_place() as model, self.accelerator.autocast():
            outputs = model(input_ids=input_ids, labels=labels, use_cache=False, fused_lm_head=True)
        return outputs.log_probs.sum(dim=1)

    def evaluate_pairs(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `PairTrainer`. TRL gives means over the pairs, which stand here for each of them."""
        pairs = len(batch["lengths"]) // 2
        everyone, self.accelerator = self.accelerator, _ThisProcess(self.accelerator)
        try:
            loss = self.compute_loss(model, batch)
        finally:
            self.accelerator = everyone
        figures = {name: torch.full((pairs,), self._metrics["eval"][name][-1]) for name in self.EVALUATED[1:]}
        self._metrics["eval"].clear()
        return {"loss": loss.expand(pairs), **figures}

    def describe_run(self) -> dict[str, Any]:
        """What decides the course of a run; a resumed run is compared with it."""
        names = ("pref_beta", "pref_loss", "pref_ftx", "dpo_label_smoothing", "ref_model")
        return {**super().describe_run(), **{name: getattr(self.settings.stage, name) for name in names}}


class _NoModel(nn.Module):
    """Given to TRL as the reference model, so that it neither loads the base model again nor adds an adapter."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self) -> None:
        raise AssertionError("the reference model is not TRL's")


class _ThisProcess:
    """An accelerator that gathers nothing: processes may have different numbers of pairs at the end of evaluation."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values

    gather_for_metrics = gather

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


def _placeholder() -> Dataset:
    """TRL takes no other kind of data set; the rows take its place at once."""
    return Dataset.from_dict({name: [[0]] for name in ("prompt_ids", "chosen_ids", "rejected_ids")})
