"""The trainer of pre-training and supervised fine-tuning: the loss of supervised tokens, validated per token."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.collating import PackCollator, PadCollator
from finetune_chatmodel_demo.conversation.packing import GroupedRows
from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL
from finetune_chatmodel_demo.evaluation.sample import TrainingEvaluator, build_training_evaluator
from finetune_chatmodel_demo.training.prediction import (
    Reply,
    is_reproduced,
    sample_replies,
    share_out,
    write_replies,
)
from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.trainer import RunTrainer
from finetune_chatmodel_demo.training.watch import LearningWatch

# A multiple of FlexAttention's block, so that rows come in few lengths.
CUDA_PACKED_MULTIPLE = 256


class _Collator:
    """Packs groups of rows, pads single rows."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad = PadCollator(pad_token_id)
        self.pack = PackCollator(pad_token_id, CUDA_PACKED_MULTIPLE if torch.cuda.is_available() else None)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return self.pack(items) if "rows" in items[0] else self.pad(items)


class ChatTrainer(RunTrainer):
    """Trains on rows of `input_ids` and `labels`."""

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        train_rows: Any | None,
        validation_rows: Any | None = None,
        watch: LearningWatch | None = None,
    ) -> None:
        """Arguments: see `RunTrainer`; `watch` looks at each step, default: a `LearningWatch` with the rows' report."""
        self._validation = torch.zeros(2, dtype=torch.float64)
        self._questions: list[Reply] | None = None
        self._evaluator: TrainingEvaluator | None = None
        watch = watch or LearningWatch(settings, getattr(train_rows, "report", None))
        if settings.data.packing and train_rows is not None:
            train_rows = GroupedRows(train_rows, settings.data.max_seq_length, settings.training.seed)
        super().__init__(
            model,
            settings,
            tokenizer,
            _Collator(tokenizer.pad_token_id),
            train_rows,
            validation_rows,
            callbacks=[watch],
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The mean loss of a batch; sums are kept for the mean over all tokens."""
        is_copy = self._find_copies(inputs.pop("row_index").tolist())
        inputs.pop("token_counts")
        inputs = self._prepare_inputs(inputs)
        inputs["labels"] = inputs["labels"].masked_fill(is_copy.to(inputs["labels"].device)[:, None], IGNORED_LABEL)
        supervised = (inputs["labels"][:, 1:] != IGNORED_LABEL).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs).loss.detach()
        self._validation += torch.stack([loss * supervised, supervised]).to(self._validation)
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates; the loss is the mean over all supervised tokens, whatever the batch size."""
        self._validation = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, **kwargs)
        totals = self.accelerator.reduce(self._validation.float().to(self.args.device), reduction="sum")
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if name in output.metrics:
            output.metrics[name] = (totals[0] / totals[1].clamp(min=1)).item()
        if self.settings.run.eval_questions and "eval_loss" in output.metrics:
            output.metrics.update({f"eval_{name}": figure for name, figure in self._ask().items()})
        return output

    def _ask(self) -> dict[str, float]:
        """What --eval_questions measures: "exact" is the share of the questions that are answered exactly."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        with self.compute_loss_context_manager():
            if self.settings.run.eval_questions_file:
                return self._ask_facts(model)
            return {"exact": self._ask_rows(model)}

    def _ask_facts(self, model: nn.Module) -> dict[str, float]:
        """Questions that are held against facts; every process asks all of them."""
        if self._evaluator is None:
            run, args = self.settings.run, self.args
            self._evaluator = build_training_evaluator(
                run.eval_questions_file,
                self.tokenizer_to_save,
                count=run.eval_questions,
                seed=args.seed,
                prompt_format=self.settings.prompt_format,
                batch_size=args.per_device_eval_batch_size,
            )
        return self._evaluator(model)

    def _ask_rows(self, model: nn.Module) -> float:
        """Replies of the validation data, shared out among the processes."""
        tokenizer = self.tokenizer_to_save
        if self._questions is None:
            rows, stops, count = self.eval_dataset.rows, tokenizer.stop_token_ids, self.settings.run.eval_questions
            self._questions = sample_replies(rows, count, self.args.seed, stops, model.config.seq_length)
            if not self._questions:
                raise UserError("--eval_questions: no row of the validation data has a whole supervised reply")
        own = share_out(self._questions, self.args.process_index, self.args.world_size)
        written = write_replies(model, tokenizer, [reply for reply, _ in own], self.args.per_device_eval_batch_size)
        exact = sum(is_reproduced(tokenizer, reply, ids) for (reply, counts), ids in zip(own, written) if counts)
        total = self.accelerator.reduce(torch.tensor(float(exact), device=self.args.device), reduction="sum")
        return total.item() / len(self._questions)
