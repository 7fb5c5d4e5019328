"""What rm and dpo share: batches of pairs, and figures that are means over pairs in the log and in evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL
from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.trainer import RunTrainer
from finetune_chatmodel_demo.training.watch import LearningWatch

# A loss of log 2 = 0.69 tells nothing apart; at 0.1 nine pairs of ten are far apart.
LEARNED = 0.1


@dataclass(frozen=True)
class PairCollator:
    """Puts B pairs into one batch of 2B rows, the B chosen ones first, each the prompt and a reply.

    Padding is on the right, and there is no attention mask: causal attention never sees what is to the right.
    """

    pad_token_id: int

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids` and `labels` (2B, T), the latter -100 but for the reply, and `lengths` (2B,)."""
        pairs = [(item["prompt_ids"], item[key]) for key in ("chosen_ids", "rejected_ids") for item in items]
        lengths = [len(prompt) + len(reply) for prompt, reply in pairs]
        input_ids = torch.full((len(pairs), max(lengths)), self.pad_token_id)
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        for row, (prompt, reply) in enumerate(pairs):
            input_ids[row, : lengths[row]] = torch.tensor(prompt + reply)
            labels[row, len(prompt) : lengths[row]] = torch.tensor(reply)
        return {"input_ids": input_ids, "labels": labels, "lengths": torch.tensor(lengths)}


class PairSums:
    """Sums over pairs, by name, from which means are made."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0

    def add(self, figures: dict[str, torch.Tensor]) -> None:
        """Adds figures (n,) of n pairs."""
        for name, values in figures.items():
            self.sums[name] = self.sums.get(name, 0) + values.detach().double().sum()
            count = len(values)
        self.count += count

    def collect(self, names: Sequence[str], add_up: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Returns the means over the pairs of all processes, and starts over; nothing where there was no pair.

        Args:
            names: of the figures; a process may have had no pair.
            add_up: sums a tensor over processes.
        """
        sums = [torch.as_tensor(self.sums.get(name, 0.0), dtype=torch.float64) for name in names]
        *totals, count = add_up(torch.stack([each.cpu() for each in [*sums, torch.tensor(float(self.count))]])).tolist()
        self.sums, self.count = {}, 0
        return {name: total / count for name, total in zip(names, totals)} if count else {}


class PairWatch(LearningWatch):
    """Warns when nothing is learned. The losses of pairs have no level of guessing among tokens."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """See `LearningWatch`."""
        super().on_train_begin(args, state, control, model, **kwargs)
        self._guessing = None


class PairTrainer(RunTrainer):
    """Trains on rows of `prompt_ids`, `chosen_ids` and `rejected_ids`; every pair counts once in every figure.

    Attributes:
        FIGURES: names of what `compute_figures` gives; the first is "loss".
    """

    FIGURES: Sequence[str] = ("loss",)
    # A batch's loss is the mean over its pairs, whatever their lengths.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        train_rows: Any | None,
        validation_rows: Any | None = None,
    ) -> None:
        """Arguments: see `RunTrainer`."""
        self._trained, self._evaluated = PairSums(), PairSums()
        super().__init__(
            model,
            settings,
            tokenizer,
            PairCollator(tokenizer.pad_token_id),
            train_rows,
            validation_rows,
            callbacks=[PairWatch(settings, getattr(train_rows, "report", None), LEARNED)],
        )
        self.model_accepts_loss_kwargs = False  # what `loss_is_scaled_for_ga` says, before transformers 5.19

    def describe_objective(self) -> dict[str, str]:
        """Lines of the table before the start: what is minimised."""
        raise NotImplementedError

    def compute_figures(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loss and the figures of pairs.

        Args:
            model: maybe in a wrapper of several processes.
            batch: n pairs of this process, n at least 1, as `PairCollator` makes them.

        Returns:
            A tensor (n,) for each name of FIGURES.
        """
        raise NotImplementedError

    def describe_steps(self, steps: int) -> dict[str, str]:
        """Lines of the table before the start, in pairs."""
        args, pairs = self.args, len(self.train_dataset)
        batch, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
        step = batch * accumulated * args.world_size
        return {
            "batch": f"{batch} pairs × {accumulated} accumulated × {args.world_size} processes = {step} pairs a step",
            "steps": f"{steps} of {step} pairs = {steps * step / pairs:.2f} epochs of {pairs} pairs",
            **self.describe_objective(),
        }

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The mean loss of a batch's pairs; their figures are kept for the log."""
        figures = self.compute_figures(model, inputs)
        self._trained.add(figures)
        return figures["loss"].mean()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means over the pairs since the last entry to every entry with a training loss."""
        if "loss" in logs:
            logs.update(self._trained.collect(self.FIGURES[1:], self._add_up))
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The mean loss of a batch; sums are kept for the means over all pairs."""
        is_own = ~self._find_copies(inputs.pop("row_index").tolist())
        inputs.pop("token_counts")
        inputs = self._prepare_inputs(inputs)
        if not is_own.any():
            return torch.zeros((), device=self.args.device), None, None
        is_own = is_own.repeat(2).to(self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            figures = self.compute_figures(model, {name: values[is_own] for name, values in inputs.items()})
        self._evaluated.add(figures)
        return figures["loss"].mean(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates; figures are means over all pairs, whatever the batch size and the number of processes."""
        self._evaluated = PairSums()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        for name, mean in self._evaluated.collect(self.FIGURES, self._add_up).items():
            output.metrics[f"{prefix}_{name}"] = mean
        return output

    def _add_up(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over processes."""
        return self.accelerator.reduce(values.float().to(self.args.device), reduction="sum").cpu().double()
