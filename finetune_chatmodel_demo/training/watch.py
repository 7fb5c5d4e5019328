"""Warns when a run is not learning, with the likely cause and what to do: each cause once, at its first sign.

reach       before the start: the learning rate cannot move a new prefix out of its noise
masked      next to nothing is supervised, in the data or in the last steps
flat        the loss has not fallen after a tenth, a quarter or a half of the run
gradients   the gradients are zero, vanish, or overflow step after step
high        the loss stays above that of guessing
rising      the loss has lost what it had gained
"""

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from finetune_chatmodel_demo.training.arguments import P_TUNING
from finetune_chatmodel_demo.training.settings import Settings

logger = logging.getLogger(__name__)

# A prefix that cannot move by this share of its spread stays noise. (The published run: 0.01. The original's: 10.)
LEAST_REACH = 0.1
FEWEST_STEPS = 30  # shorter runs are trials, of which nothing is expected
FEWEST_STEPS_FOR_REACH = 50
LOOKS = (0.1, 0.25, 0.5)  # shares of the run after which the loss is looked at
LEAST_IMPROVEMENT = 0.03
LEARNED = 0.3  # nats a token: below it there is little left to learn
LOW_RATE = 0.1  # of the usual learning rate
LEAST_SUPERVISED = 0.01
RISE_WINDOW, RISE_WINDOW_SHARE = 10, 0.03
ABOVE_GUESSING = 1.0  # nats
FIRST_STEPS = 3
STEPS_IN_A_ROW = 20
ZERO_STEPS = 3
ADAM_EPSILONS = 10  # an element's gradient below 10 epsilons is held back by Adam's epsilon
REACHING_OPTIMIZERS = ("adam", "paged_adam", "lion")  # they move an element by about the learning rate
# Standard errors by which a difference must stand out: 2.5% of true differences lie further out on one side.
CERTAINTY = 2.0
# A rise is acted upon, so it must be certain: 4 standard errors, in two windows in a row.
RISE_CERTAINTY = 4.0
RISE_WINDOWS = 2
LEAST_RISE = 0.2  # nats
SHARE_LOST = 0.5  # of what had been gained
SHARE_OF_START = 0.1
GRADIENT_WINDOW = 20
VANISHED_SHARE = 1e-3


class LearningWatch(TrainerCallback):
    """Looks at losses, gradients and batches; `RunTrainer` hands them over.

    After a resume the losses of the earlier part are those of the log.
    """

    def __init__(self, settings: Settings, report: Any = None, learned: float = LEARNED) -> None:
        """
        Args:
            settings: the decided run.
            report: of the training rows, with `tokens_total` and `tokens_supervised`.
            learned: below this loss a run that does not improve is in order.
        """
        self.settings, self.report, self.learned = settings, report, learned
        self.usual_rate = settings.usual_learning_rate
        self.warned: dict[str, str] = {}
        self.losses: list[float] = []
        self.norms: list[float] = []
        self._shares: list[tuple[int, int]] = []  # supervised tokens and all tokens of the newest steps
        self._overflows = 0
        self._looks: list[int] = []
        self._guessing: float | None = None
        self._parameters = 0

    def add_step(self, loss: float, supervised: int, tokens: int, norm: float) -> None:
        """Takes a step before it is applied; `RunTrainer` calls it.

        Args:
            loss: of all its batches.
            supervised, tokens: in them.
            norm: of the gradient, before clipping.
        """
        self.losses.append(loss)
        self._shares = [*self._shares[1 - STEPS_IN_A_ROW :], (supervised, tokens)]
        if math.isfinite(norm):
            self._overflows = 0
            self.norms.append(norm)
        else:
            self._overflows += 1

    # When something is looked at

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Looks at what is known before the first step."""
        warmup = args.get_warmup_steps(state.max_steps)
        looks = {max(math.ceil(share * state.max_steps), FEWEST_STEPS, 2 * warmup) for share in LOOKS}
        self._looks = sorted(step for step in looks if step <= state.max_steps and step > state.global_step)
        self._guessing = math.log(model.config.vocab_size) if hasattr(model, "config") else None
        self._parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.losses = spread_log(state.log_history)
        if not state.is_world_process_zero:
            return
        if self.report is not None:
            self._check_supervised(
                "the training data", *(getattr(self.report, f"tokens_{kind}", 0) for kind in ("supervised", "total"))
            )
        self._check_reach(args, state, model, kwargs.get("lr_scheduler"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at what the step has added."""
        if not state.is_world_process_zero:
            return
        if len(self._shares) == STEPS_IN_A_ROW:
            self._check_supervised(
                f"the last {STEPS_IN_A_ROW} steps up to step {state.global_step}", *map(sum, zip(*self._shares))
            )
        self._check_gradients(args, state)
        self._check_level(args, state)
        if self._looks and state.global_step >= self._looks[0]:
            self._looks.pop(0)
            self._check_flat(args, state)

    # Causes

    def _check_supervised(self, where: str, supervised: int, tokens: int) -> None:
        if tokens and supervised < LEAST_SUPERVISED * tokens:
            self._warn(
                "masked",
                f"only {supervised:,} of {tokens:,} tokens of {where} ({supervised / tokens:.2%}) are supervised: the "
                "model learns from next to nothing. Likely cause: replies that the length limit cuts off, roles or "
                '"loss" keys that switch the loss off. Look at the coloured rows of inspect_data.py, raise '
                "--max_seq_length; if the replies really are that short, go on",
            )

    def _check_reach(self, args: Any, state: Any, model: Any, scheduler: Any) -> None:
        """How far a new prefix can get: the sum of the learning rates against the spread of its values."""
        encoder = getattr(model, "prefix_encoder", None)
        is_new = self.settings.method == P_TUNING and not self.settings.model.ptuning_checkpoint
        is_reaching = str(getattr(args.optim, "value", args.optim)).startswith(REACHING_OPTIMIZERS)
        if not (is_new and is_reaching and state.max_steps >= FEWEST_STEPS_FOR_REACH) or encoder is None:
            return
        if encoder.trans is not None:
            return  # an MLP moves all of its outputs at once
        spread = encoder.embedding.weight.detach().float().std().item()
        distance = args.learning_rate * sum_schedule(scheduler, state.max_steps)
        if distance < LEAST_REACH * spread:
            needed = args.learning_rate * spread / max(distance, 1e-30)
            self._warn(
                "reach",
                f"this run cannot learn: at the learning rate {args.learning_rate:g} a value of the prefix moves by "
                f"at most {distance:.2g} in {state.max_steps} steps, {distance / spread:.2g} of the prefix's spread of "
                f"{spread:.2g}. Likely cause: a learning rate for other methods than P-Tuning v2. Use --learning_rate "
                f"{max(self.usual_rate, float(f'{needed:.0e}')):g}, or train longer",
            )

    def _check_gradients(self, args: Any, state: Any) -> None:
        where = f"up to step {state.global_step} of {state.max_steps}"
        if self._overflows >= STEPS_IN_A_ROW:
            self._warn(
                "gradients",
                f"the gradients of {self._overflows} steps in a row, {where}, are not finite, and these steps were "
                "left out. Likely cause: float16 overflows. Use --bf16 instead of --fp16, or lower --learning_rate",
            )
        if len(self.norms) >= ZERO_STEPS and not any(self.norms[-ZERO_STEPS:]):
            self._warn(
                "gradients",
                f"the gradient is zero in {ZERO_STEPS} steps in a row, {where}: nothing is learned. Likely cause: "
                "rows without a supervised token (see inspect_data.py), or a float16 gradient that underflows (--bf16)",
            )
        newest = sorted(self.norms[-STEPS_IN_A_ROW:])
        if len(newest) == STEPS_IN_A_ROW and self._parameters:
            element = newest[STEPS_IN_A_ROW // 2] / math.sqrt(self._parameters)
            if 0 < element < ADAM_EPSILONS * args.adam_epsilon and not self._has_learned():
                self._warn(
                    "gradients",
                    f"the gradients vanish: {element:.1g} for each of {self._parameters:,} parameters in {where}, "
                    f"which Adam's epsilon of {args.adam_epsilon:g} holds back. Likely cause: what is trained has no "
                    "effect on the loss any more (a prefix that was driven too far: lower --learning_rate), or a loss "
                    "that few tokens reach",
                )
        vanished = find_vanished(self.norms)
        if vanished and not self._has_learned():
            self._warn(
                "gradients",
                f"the gradients vanish: a norm of {vanished[1]:.2g} {where}, {vanished[0]:.2g} at the start, while the "
                f"loss is still {self._newest_loss():.3f}. Likely cause: a learning rate that drove the parameters to "
                f"where they have no effect. Lower --learning_rate {args.learning_rate:g}, e.g. to a third",
            )

    def _check_level(self, args: Any, state: Any) -> None:
        """Loss above guessing, or rising; looked at whenever a window of steps is full."""
        window = max(RISE_WINDOW, math.ceil(RISE_WINDOW_SHARE * state.max_steps))
        if len(self.losses) % window:
            return
        where = f"at step {state.global_step} of {state.max_steps}"
        rise = find_rise(self.losses, window)
        if rise:
            self._warn(
                "rising",
                f"the loss rises: {rise.now:.3f} {where}, after {rise.lowest:.3f} around step {rise.lowest_step} and "
                f"{rise.start:.3f} at the start. " + self._explain_rise(args.learning_rate),
            )
        first, now = sum(self.losses[:window]) / window, self._newest_loss(window)
        is_high = self._guessing is not None and now > self._guessing + ABOVE_GUESSING
        if not is_high or len(self.losses) < 2 * window or now < 0.9 * first:
            return
        start = sum(self.losses[:FIRST_STEPS]) / FIRST_STEPS
        text = (
            f"the loss is {now:.2f} {where}, above the {self._guessing:.2f} of a model that guesses among all tokens "
            f"of the vocabulary, and was {start:.2f} at the start. "
        )
        if start < self._guessing + ABOVE_GUESSING:
            self._warn("rising", text + self._explain_rise(args.learning_rate))
        else:
            self._warn(
                "high",
                text + "Likely cause: weights or a tokenizer that do not belong together (check them with "
                "THUDM/check_download.py), or a start that is too wild (--prefix_init_std)",
            )

    def _explain_rise(self, rate: float) -> str:
        return (
            f"Likely cause: the learning rate {rate:g} is too high. Lower it, e.g. to {rate / 3:.1g}, or warm up "
            "longer (--warmup_steps)"
        )

    def _check_flat(self, args: Any, state: Any) -> None:
        found = measure_improvement(self.losses)
        if found.most >= LEAST_IMPROVEMENT or found.before < self.learned or self._continues():
            return
        self._warn(
            "flat",
            f"the loss has not moved in {state.global_step} of {state.max_steps} steps "
            f"({state.global_step / state.max_steps:.0%} of the run): {found.before:.3f} in its first {found.third} "
            f"steps, {found.now:.3f} in the last {found.third}, {-found.share:+.1%}. Likely cause: "
            + self._explain_flat(args.learning_rate),
        )

    def _explain_flat(self, rate: float) -> str:
        if rate < LOW_RATE * self.usual_rate:
            return (
                f"the learning rate {rate:g} is {self.usual_rate / rate:,.0f} times below the {self.usual_rate:g} that "
                f"suits {self.settings.method_title}. Stop, and start anew with --learning_rate {self.usual_rate:g}"
            )
        if "masked" in self.warned:
            return "next to nothing is supervised, see the warning above"
        if rate > self.usual_rate / LOW_RATE:
            return (
                f"the learning rate {rate:g} is {rate / self.usual_rate:,.0f} times above the {self.usual_rate:g} that "
                f"suits {self.settings.method_title}; or the data: see whether finetune.py --overfit_check 8 succeeds"
            )
        return (
            f"not the learning rate {rate:g} alone, {self.usual_rate:g} is usual. See whether finetune.py "
            "--overfit_check 8 reproduces rows of this data; if it does, raise --learning_rate or "
            + ("--pre_seq_len" if self.settings.method == P_TUNING else "the number of trained parameters")
        )

    def _continues(self) -> bool:
        """Whether the run refines a prefix or an adapter that was trained before."""
        return bool(self.settings.model.ptuning_checkpoint or self.settings.continued_adapter)

    def _newest_loss(self, count: int = STEPS_IN_A_ROW) -> float:
        newest = self.losses[-count:]
        return sum(newest) / max(len(newest), 1)

    def _has_learned(self) -> bool:
        """Whether small gradients are what one expects: the loss is low, or half of what it was."""
        start = sum(self.losses[:STEPS_IN_A_ROW]) / max(len(self.losses[:STEPS_IN_A_ROW]), 1)
        return self._newest_loss() < max(self.learned, 0.5 * start)

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self.warned:
            self.warned[kind] = text
            logger.warning("%s.", text)


def sum_schedule(scheduler: Any, steps: int) -> float:
    """The sum over all steps of the schedule's factors on the learning rate; `steps` where it cannot be asked."""
    factors: Sequence[Any] = getattr(scheduler, "lr_lambdas", ())
    if not factors:
        return float(steps)
    stride = max(1, steps // 1000)
    sampled = [float(factors[0](step)) for step in range(0, steps, stride)]
    return steps * sum(sampled) / len(sampled)


def spread_log(log_history: Sequence[dict[str, Any]]) -> list[float]:
    """One loss for each step of an earlier part of the run: an entry's loss is the mean since the entry before."""
    losses: list[float] = []
    for entry in log_history:
        if "loss" in entry and entry["loss"] is not None:
            losses += [float(entry["loss"])] * max(0, entry["step"] - len(losses))
    return losses


@dataclass(frozen=True)
class Improvement:
    """Mean loss of the first third of a series and of its last third; `most` is the share it can have fallen by."""

    before: float
    now: float
    most: float
    third: int

    @property
    def share(self) -> float:
        """The share by which the loss has fallen."""
        return (self.before - self.now) / self.before if self.before else 0.0


@dataclass(frozen=True)
class Rise:
    """Mean losses of windows: of the first, of the lowest and of the newest, and the steps before the lowest."""

    start: float
    lowest: float
    now: float
    lowest_step: int


def measure_improvement(losses: Sequence[float]) -> Improvement:
    """Compares the ends of a series of at least 6 losses.

    Returns:
        `most` is the fall's upper bound: its share plus 2 standard errors of the difference of two means.
    """
    third = len(losses) // 3
    first, last = losses[:third], losses[-third:]
    before, now = statistics.fmean(first), statistics.fmean(last)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
    most = (before - now + CERTAINTY * error) / before if before else 0.0
    return Improvement(before, now, most, third)


def find_rise(losses: Sequence[float], window: int) -> Rise | None:
    """Whether a loss that had been lower has risen for good.

    It has, when the last two windows both lie above the lowest one by half of what had been gained, by a tenth of the
    start, by 0.2 nats, and by 4 standard errors.

    Args:
        losses: of all steps.
        window: steps whose mean counts as one value.
    """
    parts = [losses[i : i + window] for i in range(0, len(losses) - window + 1, window)]
    if len(parts) < RISE_WINDOWS + 1:
        return None
    means = [statistics.fmean(part) for part in parts]
    spread = statistics.median(statistics.stdev(part) for part in parts)
    lowest = min(range(len(means)), key=means.__getitem__)
    least = max(
        SHARE_LOST * (means[0] - means[lowest]),
        SHARE_OF_START * means[0],
        LEAST_RISE,
        RISE_CERTAINTY * spread * math.sqrt(2 / window),
    )
    if all(mean - means[lowest] > least for mean in means[-RISE_WINDOWS:]):
        return Rise(means[0], means[lowest], means[-1], lowest * window)
    return None


def find_vanished(norms: Sequence[float]) -> tuple[float, float] | None:
    """The median gradient norm of the first 20 steps and of the last 20, when the latter is below a thousandth."""
    if len(norms) < 3 * GRADIENT_WINDOW:
        return None
    first, last = statistics.median(norms[:GRADIENT_WINDOW]), statistics.median(norms[-GRADIENT_WINDOW:])
    return (first, last) if last < VANISHED_SHARE * first else None
