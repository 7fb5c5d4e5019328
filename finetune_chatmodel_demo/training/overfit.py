"""A self-test for one's own data: can the first N rows be learned by heart?

    python finetune_chatmodel_demo/finetune.py --overfit_check 8 --train_file mine.jsonl \\
        --model_name_or_path THUDM/chatglm3-6b --pre_seq_len 128

The trainer of sft trains on these rows alone, with a constant learning rate and without dropout, until greedy decoding
reproduces every supervised reply, or until --max_steps. What cannot be reproduced is reported with the likely causes; a
run on the whole data would not learn it either. Nothing is kept but the report.
"""

import copy
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import write_json
from finetune_chatmodel_demo.conversation.records import RecordError
from finetune_chatmodel_demo.conversation.stage_data import build_stage_data
from finetune_chatmodel_demo.training.arguments import (
    FREEZE,
    FULL,
    LORA,
    P_TUNING,
)
from finetune_chatmodel_demo.training.base_model import load_base_tokenizer
from finetune_chatmodel_demo.training.methods import prepare_model
from finetune_chatmodel_demo.training.prediction import Reply, find_replies, is_reproduced, write_replies
from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.stages.reference import disable_dropout
from finetune_chatmodel_demo.training.stages.sft import ChatTrainer
from finetune_chatmodel_demo.training.watch import LearningWatch, measure_improvement

MOST_STEPS = 1000
MOST_RECORDS = 20_000  # read for the search for contradictions
WARMUP_STEPS = 10
# ptuning and full: the original's. A few rows bear more than a whole run's 1e-4 with lora and freeze: on chatglm3-tiny
# these learn 4 rows in 40 to 210 steps.
LEARNING_RATE = {P_TUNING: 2e-2, LORA: 1e-3, FREEZE: 3e-4, FULL: 1e-4}
# Below this mean loss (nats a token) of the newest batches it is worth letting the model write.
LOSS_TO_ASK = 0.1
STEPS_BETWEEN_QUESTIONS = 20
STEPS_BETWEEN_REPORTS = 100
QUESTIONS_AT_A_TIME = 16
REPORT_FILE = "overfit_check.json"
MOST_SHOWN = 5
LONGEST_TEXT = 80
STILL_FALLING = 0.05  # share by which the loss fell over the last third of the steps
NOT_MOVED = 0.1  # share by which it should fall at least when a few rows are learned by heart
MORE_CAPACITY = {
    P_TUNING: "a longer prefix (--pre_seq_len)",
    LORA: "a larger --lora_rank",
    FREEZE: "more layers (--freeze_trainable_layers)",
    FULL: "rows that the base model can tell apart",
}


@dataclass(frozen=True)
class Contradiction:
    """One prompt of the data that has several replies, each with the rows that it stands in."""

    prompt_ids: tuple[int, ...]
    rows_of_reply: dict[tuple[int, ...], list[int]]

    @property
    def rows(self) -> set[int]:
        """All rows that take part."""
        return {row for rows in self.rows_of_reply.values() for row in rows}


@dataclass(frozen=True)
class Outcome:
    """What the training came to: `written` are the ids that the model wrote for each of `replies`."""

    replies: list[Reply]
    written: list[list[int]]
    is_exact: list[bool]
    losses: list[float]
    learning_rate: float
    most_steps: int
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every reply was reproduced."""
        return all(self.is_exact)


class FirstRows:
    """The first rows of a data set."""

    def __init__(self, rows: Any, count: int) -> None:
        self.rows, self.lengths = rows, list(rows.lengths[:count])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.rows[row]

    def where(self, row: int) -> str:
        """File and line of a row."""
        return self.rows.where(row)


class OverfitWatch(LearningWatch):
    """Lets the model write the replies now and then, and ends the training when more of it would not help."""

    def __init__(self, settings: Settings, tokenizer: Any, replies: list[Reply]) -> None:
        super().__init__(settings)
        self.tokenizer, self.replies = tokenizer, replies
        self.written: list[list[int]] = []
        self.is_exact: list[bool] = []
        self._asked = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing is looked at before the first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Asks where the loss has become low, now and then anyway, and at the end."""
        step, newest = state.global_step, self.losses[-STEPS_BETWEEN_QUESTIONS:]
        is_low = sum(newest) / len(newest) < LOSS_TO_ASK or step % STEPS_BETWEEN_REPORTS == 0
        if not (is_low and step - self._asked >= STEPS_BETWEEN_QUESTIONS) and step < state.max_steps:
            return
        self._asked = step
        precision, was_training = self.settings.precision, model.training
        model.eval()
        with torch.autocast(model.device.type, getattr(torch, precision), enabled=precision != "float32"):
            self.written = write_replies(model, self.tokenizer, self.replies, QUESTIONS_AT_A_TIME)
        model.train(was_training)
        pairs = zip(self.replies, self.written)
        self.is_exact = [is_reproduced(self.tokenizer, reply, ids) for reply, ids in pairs]
        reproduced = f"{sum(self.is_exact)} of {len(self.is_exact)} replies reproduced"
        print(f"step {step}: loss {newest[-1]:.4f}, {reproduced}", flush=True)
        control.should_training_stop = not leaves_hope(self.replies, self.is_exact)


def run_overfit_check(settings: Settings) -> bool:
    """Trains on the first rows, reports, and returns whether all of their replies were reproduced.

    The report is printed, and written into --output_dir where that was given.

    Raises:
        UserError: when the model cannot be loaded, for a bad record, or when no row is left to train on.
        NonFiniteLossError: when the loss is no number any more.
    """
    set_seed(settings.training.seed)
    tokenizer = load_base_tokenizer(settings.model.model_name_or_path)
    rows = _read_rows(settings, tokenizer)
    chosen = FirstRows(rows, min(settings.run.overfit_check, len(rows)))
    stops = tokenizer.stop_token_ids
    replies = [reply for row in range(len(chosen)) for reply in find_replies(row, chosen[row], stops)]
    contradictions = find_contradictions(rows, stops)
    model = prepare_model(settings)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"overfit check: {settings.method_title}, {trainable:,} parameters, on the first {len(chosen)} of {len(rows)} "
        f"rows, which have {len(replies)} supervised replies",
        flush=True,
    )
    outcome = overfit(model, tokenizer, chosen, replies, settings)
    report = build_report(outcome, contradictions, rows, tokenizer, settings)
    print("\n".join(describe(report)), flush=True)
    if folder := settings.given.get("output_dir"):
        path = Path(str(folder)) / REPORT_FILE
        write_json(path, report)
        print(f"report: {path}", flush=True)
    return outcome.passed


def _read_rows(settings: Settings, tokenizer: Any) -> Any:
    """The training rows, one for each record, in the order of the data."""
    data = replace(
        settings.data, packing=False, validation_file=None, eval_dataset=None, val_size=0.0, mix_strategy="concat"
    )
    if data.max_samples is None:
        data = replace(data, max_samples=MOST_RECORDS)
    try:
        return build_stage_data(data, settings.stage.stage, tokenizer, settings.training.seed).train
    except RecordError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def find_contradictions(rows: Any, stop_ids: Sequence[int]) -> list[Contradiction]:
    """Prompts that stand before different replies: a model can give only one of them."""
    answers: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for row in range(len(rows)):
        for reply in find_replies(row, rows[row], stop_ids):
            if reply.is_whole:
                answers.setdefault(reply.prompt_ids, {}).setdefault(reply.expected_ids, []).append(row)
    return [Contradiction(prompt, replies) for prompt, replies in answers.items() if len(replies) > 1]


def overfit(model: nn.Module, tokenizer: Any, rows: FirstRows, replies: list[Reply], settings: Settings) -> Outcome:
    """Trains on `rows` until the model writes all `replies`, or for the greatest number of steps.

    Args:
        model: from `prepare_model`.
        tokenizer: its tokenizer.
        rows: what is trained on.
        replies: of these rows.
        settings: method, learning rate, batch size, steps and precision.
    """
    started, watch = time.monotonic(), OverfitWatch(settings, tokenizer, replies)
    disable_dropout(model)  # it would keep replies from being learned to the end
    with tempfile.TemporaryDirectory() as folder:  # nothing is written, but the library makes its output folder
        args = _training_arguments(settings, folder)
        run = replace(settings, training=args, data=replace(settings.data, packing=False))
        trainer = ChatTrainer(model, run, tokenizer, rows, watch=watch)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.train()
    seconds = time.monotonic() - started
    return Outcome(replies, watch.written, watch.is_exact, watch.losses, args.learning_rate, args.max_steps, seconds)


def _training_arguments(settings: Settings, folder: str) -> TrainingArguments:
    """Those of the run, for one batch a step at a constant learning rate, without validation and checkpoints."""
    args = copy.copy(settings.training)
    args.output_dir = folder
    args.learning_rate = float(settings.given.get("learning_rate") or LEARNING_RATE[settings.method])
    args.lr_scheduler_type, args.lr_scheduler_kwargs = SchedulerType.CONSTANT_WITH_WARMUP, {}
    args.warmup_steps = WARMUP_STEPS
    args.weight_decay = 0.0
    args.gradient_accumulation_steps = 1
    args.max_steps = args.max_steps if args.max_steps > 0 else MOST_STEPS
    args.eval_strategy = args.save_strategy = args.logging_strategy = IntervalStrategy.NO
    args.load_best_model_at_end, args.report_to = False, []
    return args


def leaves_hope(replies: Sequence[Reply], is_exact: Sequence[bool]) -> bool:
    """Whether more can be reproduced: a prompt of which another reply is reproduced is settled."""
    settled = {reply.prompt_ids for reply, exact in zip(replies, is_exact) if exact}
    return any(reply.prompt_ids not in settled for reply, exact in zip(replies, is_exact) if not exact)


def build_report(
    outcome: Outcome, contradictions: Sequence[Contradiction], rows: Any, tokenizer: Any, settings: Settings
) -> dict[str, Any]:
    """Everything that was found, as overfit_check.json has it."""
    failed = [
        {
            "row": reply.row,
            "where": rows.where(reply.row),
            "question": last_question(tokenizer, reply),
            "expected": read(tokenizer, reply.expected_ids),
            "got": read(tokenizer, ids),
            "was_cut": not reply.is_whole,
        }
        for reply, ids, is_exact in zip(outcome.replies, outcome.written, outcome.is_exact)
        if not is_exact
    ]
    return {
        "passed": outcome.passed,
        "rows": len({reply.row for reply in outcome.replies}),
        "replies": len(outcome.replies),
        "reproduced": sum(outcome.is_exact),
        "method": settings.method,
        "learning_rate": outcome.learning_rate,
        "steps": len(outcome.losses),
        "most_steps": outcome.most_steps,
        "first_loss": round(outcome.losses[0], 4),
        "last_loss": round(outcome.losses[-1], 4),
        "seconds": round(outcome.seconds, 1),
        "failed": failed,
        "contradictions": [_describe_contradiction(found, rows, tokenizer) for found in contradictions],
        "cut_rows": [rows.where(row) for row in sorted({reply.row for reply in outcome.replies if not reply.is_whole})],
        "causes": [] if outcome.passed else find_causes(outcome, contradictions, settings),
    }


def find_causes(outcome: Outcome, contradictions: Sequence[Contradiction], settings: Settings) -> list[str]:
    """Likely causes of a failure, the likeliest first."""
    failed = {reply.row for reply, is_exact in zip(outcome.replies, outcome.is_exact) if not is_exact}
    causes = []
    own = [found for found in contradictions if found.rows & failed]
    if own:
        causes.append(
            f"contradictory answers: {len(own)} prompts of the data have several replies, and no model can give more "
            "than one of them; make the questions differ, or keep one reply"
        )
    cut = sum(not reply.is_whole for reply, is_exact in zip(outcome.replies, outcome.is_exact) if not is_exact)
    if cut:
        causes.append(f"{cut} replies are cut off by the length limit; raise --max_seq_length or shorten the rows")
    if len(outcome.losses) >= 12:
        whole, end = (
            measure_improvement(outcome.losses),
            measure_improvement(outcome.losses[len(outcome.losses) // 2 :]),
        )
        rate = f"--learning_rate {outcome.learning_rate:g}"
        if whole.share < NOT_MOVED:
            causes.append(
                f"the loss has hardly moved ({whole.before:.3f} → {whole.now:.3f}): {rate} is too small, or so large "
                f"that nothing is learned; try {outcome.learning_rate * 10:g} and {outcome.learning_rate / 10:g}"
            )
        elif end.share > STILL_FALLING and not own:
            causes.append(
                f"not finished: the loss is still falling; give more steps (--max_steps {2 * outcome.most_steps}), or "
                f"a larger learning rate than {outcome.learning_rate:g}"
            )
        elif not own:
            causes.append(
                f"too little room: the loss stays at {end.now:.3f}; give {MORE_CAPACITY[settings.method]}, or fewer "
                "rows"
            )
    return causes


def describe(report: dict[str, Any]) -> list[str]:
    """The report in lines, for people."""
    lines = [
        f"overfit check {'passed' if report['passed'] else 'FAILED'}: {report['reproduced']} of {report['replies']} "
        f"replies of {report['rows']} rows are reproduced after {report['steps']} steps "
        f"({report['method']}, learning rate {report['learning_rate']:g}, {report['seconds']:g} s; "
        f"loss {report['first_loss']:.3f} → {report['last_loss']:.3f})"
    ]
    for failed in report["failed"][:MOST_SHOWN]:
        lines += [
            f"  row {failed['row']} ({failed['where']})" + (", cut by the length limit" if failed["was_cut"] else ""),
            f"    asked     {shorten(failed['question'])}",
            f"    expected  {shorten(failed['expected'])}",
            f"    got       {shorten(failed['got'])}",
        ]
    if len(report["failed"]) > MOST_SHOWN:
        lines.append(f"  … and {len(report['failed']) - MOST_SHOWN} more")
    for found in report["contradictions"][:MOST_SHOWN]:
        lines.append(f"contradiction: {shorten(found['question'])!r} has {len(found['replies'])} replies")
        lines += [f"    {shorten(reply['text'])!r} in {', '.join(reply['where'])}" for reply in found["replies"]]
    if len(report["contradictions"]) > MOST_SHOWN:
        lines.append(f"  … and {len(report['contradictions']) - MOST_SHOWN} more prompts with several replies")
    lines += [f"likely cause: {cause}" for cause in report["causes"]]
    return lines


def _describe_contradiction(found: Contradiction, rows: Any, tokenizer: Any) -> dict[str, Any]:
    return {
        "question": last_question(tokenizer, Reply(0, found.prompt_ids, (), True)),
        "replies": [
            {"text": read(tokenizer, ids), "where": [rows.where(row) for row in places[:MOST_SHOWN]]}
            for ids, places in found.rows_of_reply.items()
        ],
    }


def last_question(tokenizer: Any, reply: Reply) -> str:
    """What the user said last before a reply."""
    ids, starts = list(reply.prompt_ids), {}
    for role in ("<|user|>", "<|assistant|>"):
        token = tokenizer.get_command(role)
        starts[role] = [place for place, found in enumerate(ids) if found == token]
    if starts["<|user|>"]:
        start = starts["<|user|>"][-1]
        end = next((place for place in starts["<|assistant|>"] if place > start), len(ids))
        ids = ids[start + 1 : end]
    return read(tokenizer, ids)


def read(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids, without control tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def shorten(text: str) -> str:
    """One line of at most 80 characters."""
    line = text.replace("\n", "\\n")
    return line if len(line) <= LONGEST_TEXT else line[: LONGEST_TEXT - 1] + "…"
