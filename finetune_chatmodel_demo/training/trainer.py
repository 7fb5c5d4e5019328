"""What the trainers of all stages share, on top of transformers' Trainer.

Rows in units of similar length, tokens per second, a stop at the first loss that is not a number, and checkpoints that
are whole or not there.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import partial_path, publish_files
from finetune_chatmodel_demo.training.arguments import FULL, LORA, P_TUNING
from finetune_chatmodel_demo.training.callbacks import EpochOrder, Throughput, build_early_stopping
from finetune_chatmodel_demo.training.checkpoints import (
    nothing_half_written,
    publish_checkpoint,
    remove_old_checkpoints,
    start_partial,
)
from finetune_chatmodel_demo.training.methods import load_shared, load_trained, save_trained
from finetune_chatmodel_demo.training.results import plot_curves
from finetune_chatmodel_demo.training.sampling import (
    ADDED,
    NumberedCollator,
    NumberedStream,
    number_rows,
    order_rows,
)
from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.watch import LearningWatch
from finetune_chatmodel_demo.training.zero import check_pickles, gather_parameters, leave_out_frozen

RESULT = "result"


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Within this context random numbers may be drawn; afterwards all generators go on where they were."""
    python, arrays, cpu = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.random.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)


class NonFiniteLossError(UserError):
    """The loss or the gradient became infinite or not a number."""


class RunTrainer(Trainer):
    """The base of the stages' trainers; stands in front of a library's trainer where a stage uses one."""

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        collate: Callable[[list[dict]], dict[str, torch.Tensor]],
        train_rows: Any | None,
        validation_rows: Any | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model: from `prepare_model`.
            settings: the decided run.
            tokenizer: saved beside a whole model.
            collate: makes a batch of the rows' items.
            train_rows: map-style dataset with `.lengths` and `.where(row)`, or an iterable one; None: nothing is
                trained.
            validation_rows: the same, or None.
            callbacks: the stage's own.
            kwargs: for the library's trainer.
        """
        self.settings = settings
        self.tokenizer_to_save = tokenizer
        self.throughput = Throughput()
        self.epoch_order = EpochOrder()
        # Of each batch of the step at work: its rows (B,), and its loss, tokens and supervised tokens (3,).
        self._rows_of_step: list[torch.Tensor] = []
        self._figures_of_step: list[torch.Tensor] = []
        self.watch = next((callback for callback in callbacks if isinstance(callback, LearningWatch)), None)
        uses_cache = model.config.use_cache
        is_quantized_prefix = getattr(model, "is_quantized", False) and settings.method == P_TUNING
        if is_quantized_prefix:
            model._hf_peft_config_loaded = True  # Trainer asks for an adapter on a quantized base; the prefix is one
        super().__init__(
            model=model,
            args=settings.training,
            data_collator=NumberedCollator(collate),
            train_dataset=number_rows(train_rows),
            eval_dataset=number_rows(validation_rows),
            callbacks=[self.throughput, self.epoch_order, *build_early_stopping(settings.run), *callbacks],
            **kwargs,
        )
        if is_quantized_prefix:
            model._hf_peft_config_loaded = False
        # Trainer writes use_cache=False into the configuration; saved with it, the model would answer slowly.
        self.model.config.use_cache = uses_cache

    # Order of the rows

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        self.epoch_order.order = order = order_rows(rows.lengths, self.args)
        return super()._get_train_sampler(train_dataset) if order is None else order

    def _get_eval_sampler(self, eval_dataset: Dataset) -> list[int]:
        """Longest rows first: little padding, and too little memory shows at once."""
        order = sorted(range(len(eval_dataset)), key=lambda i: eval_dataset.lengths[i], reverse=True)
        self._validation_positions = {row: position for position, row in enumerate(order)}
        return order

    # Steps

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One batch forward and backward. Nothing here waits for the device."""
        self._rows_of_step.append(inputs.pop("row_index"))
        counts = inputs.pop("token_counts").sum(dim=0)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.throughput.add(counts)
        self._figures_of_step.append(torch.cat([loss.detach().float().reshape(1), counts.to(loss.device).float()]))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm, before it is applied: the one moment of a step in which the host waits for the device.

        Raises:
            NonFiniteLossError: when a loss or the norm is not finite; the message names the rows.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        rows, figures = self._rows_of_step, torch.stack(self._figures_of_step).tolist()
        self._rows_of_step, self._figures_of_step = [], []
        for batch, (loss, *_) in zip(rows, figures):
            if not math.isfinite(loss):
                raise NonFiniteLossError(self._describe_failure(f"the loss is {loss}", [batch]))
        value = float(norm)
        has_loss_scaling = self.settings.precision == "float16" or self.is_deepspeed_enabled
        if not has_loss_scaling and not math.isfinite(value):
            raise NonFiniteLossError(self._describe_failure(f"the gradient's norm is {value}", rows))
        if self.watch is not None:
            loss, tokens, supervised = (sum(column) for column in zip(*figures))
            self.watch.add_step(loss, supervised=int(supervised), tokens=int(tokens), norm=value)
        return norm

    def _where(self, row: int) -> str:
        if isinstance(self.train_dataset, NumberedStream):
            return "in the order of reading"
        return self.train_dataset.rows.where(row)

    def _describe_failure(self, what: str, rows: list[torch.Tensor]) -> str:
        indices = sorted(int(index) for batch in rows for index in batch)
        places = "; ".join(f"row {index} ({self._where(index)})" for index in indices)
        return (
            f"{what} at step {self.state.global_step + 1}, in the batch of {places}. Nothing of this step was applied "
            "or saved. Look at the rows with inspect_data.py; if they are in order, lower --learning_rate, or use "
            "--bf16 instead of --fp16, and continue with --resume_from_checkpoint True"
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the library does it, without drawing from the random numbers of the training."""
        with kept_random_state(), self._without_engine():
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def _without_engine(self) -> Iterator[None]:
        """DeepSpeed makes no engine for an evaluation where the weights are whole: the model does without."""
        needs_none = self.is_deepspeed_enabled and self.deepspeed is None and not self.has_shared_weights
        self.is_deepspeed_enabled = self.is_deepspeed_enabled and not needs_none
        try:
            yield
        finally:
            self.is_deepspeed_enabled = self.is_deepspeed_enabled or needs_none

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the library does it, without what `NumberedCollator` added."""
        return super().prediction_step(model, {k: v for k, v in inputs.items() if k not in ADDED}, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates, as the library does it."""
        self._validated: set[int] = set()
        return super().evaluation_loop(*args, **kwargs)

    def _find_copies(self, rows: list[int]) -> torch.Tensor:
        """(B,), True for rows that were added so that all processes have the same number of full batches.

        Args:
            rows: `row_index` of a batch of an evaluation, each batch of it in its turn.
        """
        batches = [self._validation_positions[row] // self.args.eval_batch_size for row in rows]
        is_own = [batch % self.args.world_size == self.args.process_index for batch in batches]
        is_copy = [not own or row in self._validated for row, own in zip(rows, is_own)]
        self._validated.update(rows)
        return torch.tensor(is_copy)

    # Log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens per second to every entry with a training loss."""
        if "loss" in logs:
            logs.update(self.throughput.collect(self.accelerator))
        super().log(logs, start_time)

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with nothing_half_written(folder.parent, is_cleaned=self.args.should_save):
            self._write_checkpoint(folder)

    def _write_checkpoint(self, folder: Path) -> None:
        self.store_flos()
        partial = self._start_partial(folder)
        self.save_model(str(partial), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        if self.args.should_save:
            self._keep_callback_states()
            self.state.save_to_json(str(partial / "trainer_state.json"))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            facts = {"method": self.settings.method, "stage": self.settings.stage.stage}
            content = {"step": self.state.global_step, **facts, "run": self.describe_run()}
            publish_checkpoint(folder, content, self.settings.run.hash_checkpoints)
            remove_old_checkpoints(self.args.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
            self.plot()
        self.accelerator.wait_for_everyone()

    def _keep_callback_states(self) -> None:
        """What a callback (early stopping) counts goes into the checkpoint with the state."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _load_callback_state(self) -> None:
        """Takes up the counts of a checkpoint; what the command line says of patience holds."""
        super()._load_callback_state()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience = self.settings.run.early_stopping_patience
                callback.early_stopping_threshold = self.settings.run.early_stopping_threshold

    def _start_partial(self, folder: Path) -> Path:
        if self.args.should_save:
            start_partial(folder)
        self.accelerator.wait_for_everyone()
        return partial_path(folder)

    def save_result(self) -> None:
        """Writes the trained prefix or model, the state and the loss curve into `output_dir` itself."""
        folder = Path(self.args.output_dir)
        with nothing_half_written(folder, is_cleaned=self.args.should_save):
            partial = self._start_partial(folder / RESULT)
            self.save_model(str(partial), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(partial / "trainer_state.json"))
                publish_files(partial, folder)
                self.plot()

    def plot(self) -> None:
        """Draws the curves into `output_dir`, unless --plot_loss False."""
        if self.settings.run.plot_loss:
            plot_curves(self.state.log_history, self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        save_trained(self.model, self.settings, folder, self.tokenizer_to_save, state_dict)

    def describe_run(self) -> dict[str, Any]:
        """What decides the course of a run; a resumed run is compared with it."""
        data, args = self.settings.data, self.args
        lengths = getattr(self.train_dataset, "lengths", None)  # unknown while streaming
        return {
            "train_format": data.train_format,
            "template": data.template,
            "train_file": data.dataset or Path(data.train_file or "").name,
            "rows": None if lengths is None else len(lengths),
            "tokens": None if lengths is None else sum(lengths),
            "pre_seq_len": self.settings.pre_seq_len,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "max_steps": args.max_steps,
            "num_train_epochs": None if args.max_steps > 0 else args.num_train_epochs,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "processes": args.world_size,
            "rows of a step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "seed": args.seed,
            "precision": self.settings.precision,
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Does nothing: `workflow` loads the weights of a checkpoint in place of the base model's."""

    # DeepSpeed. Without an engine no step was left to train; the weights are those of the checkpoint.

    @property
    def deepspeed(self) -> Any:
        """The engine; None before the training, and where no step is left. The library sets it."""
        return self._engine

    @deepspeed.setter
    def deepspeed(self, engine: Any) -> None:
        self._engine = engine
        if engine is not None and self.settings.method != FULL:
            leave_out_frozen(engine)

    @property
    def has_shared_weights(self) -> bool:
        """Whether the weights are spread over the processes (ZeRO-3)."""
        return self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the library does it, also where no engine was made; a prefix without the weights behind it."""
        is_small = self.settings.method in (P_TUNING, LORA)
        if not self.is_deepspeed_enabled or (self.deepspeed is not None and not (is_small and self.has_shared_weights)):
            super().save_model(output_dir, _internal_call)
            return
        state = gather_parameters(self.model, only_trained=is_small) if self.has_shared_weights else None
        self._save(output_dir, state)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.has_shared_weights:
            load_shared(self.model, self.settings, best)
        elif self.is_deepspeed_enabled and self.deepspeed is not None and self.settings.method == FULL:
            check_pickles(Path(best), self.settings.run.trust_checkpoint)
            super()._load_best_model()
        else:
            load_trained(self.model, self.settings, best)
