"""Checks the learning-rate schedule before anything is loaded, and says where it does not do what its name promises.

    finetune.py … --lr_scheduler_type cosine_with_restarts --lr_scheduler_kwargs '{"num_cycles": 3}'

The schedules themselves are transformers'; test_outputs.py holds their curves to formulas.
"""

import difflib
import inspect
import json
import math
from typing import Any

import torch
import yaml
from transformers import TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from finetune_chatmodel_demo.common.errors import UserError

# What the trainer fills in; the rest of a schedule's arguments can be given.
FILLED_IN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"}
WITHOUT_WARMUP = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU)
# ReduceLROnPlateau's own default.
DEFAULT_PATIENCE = 10
# The largest rate of any run here is 0.15, of the quickstart's prefix.
LIKELY_TYPO = 1.0


def read_options(text: Any) -> dict[str, Any] | None:
    """--lr_scheduler_kwargs as a mapping: JSON, also where a shell has eaten its quotes.

    Raises:
        UserError: when it is none.
    """
    if text is None or isinstance(text, dict):
        return text
    value = None
    for parse in (json.loads, yaml.safe_load):
        try:
            value = parse(str(text))
            break
        except (ValueError, yaml.YAMLError):
            continue
    if not isinstance(value, dict):
        raise UserError(f"--lr_scheduler_kwargs {text} is no JSON object; write it like '{{\"num_cycles\": 3}}'")
    return value


def check_scheduler(training: TrainingArguments, given: dict[str, object], notices: list[str]) -> None:
    """Checks --lr_scheduler_type and --lr_scheduler_kwargs by building the schedule for nothing.

    Args:
        training: the decided arguments.
        given: the options that were given.
        notices: a notice is appended where the schedule differs from what its name suggests.

    Raises:
        UserError: for arguments that the schedule does not have or does not take.
    """
    name, options = SchedulerType(training.lr_scheduler_type), training.lr_scheduler_kwargs or {}
    known = list_options(name)
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known) or 'none'}"
            raise UserError(f"--lr_scheduler_kwargs: {name.value} has no option {option!r}; {hint}")
    _check_rate(training.learning_rate)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=options)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--lr_scheduler_type {name.value} with --lr_scheduler_kwargs {options}: {error}") from error
    notices += _describe_surprises(name, options, training, given)


def _check_rate(rate: float) -> None:
    if not 0 <= rate < math.inf:
        raise UserError(f"--learning_rate is {rate:g}; it must be 0 or more, e.g. 2e-2 for P-Tuning v2")


def list_options(name: SchedulerType) -> list[str]:
    """What --lr_scheduler_kwargs may hold for a schedule."""
    if name in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        return []
    function = TYPE_TO_SCHEDULER_FUNCTION[name]
    if name == SchedulerType.REDUCE_ON_PLATEAU:
        function = torch.optim.lr_scheduler.ReduceLROnPlateau
    return [option for option in inspect.signature(function).parameters if option not in FILLED_IN]


def _describe_surprises(
    name: SchedulerType, options: dict[str, Any], training: TrainingArguments, given: dict[str, object]
) -> list[str]:
    notices = []
    if training.learning_rate >= LIKELY_TYPO:
        notices.append(
            f"--learning_rate is {training.learning_rate:g}, and 2e-2 (a prefix) or 1e-4 is usual: is a minus missing "
            "in its exponent?"
        )
    if name == SchedulerType.COSINE_WITH_RESTARTS and options.get("num_cycles", 1) == 1:
        notices.append(
            "cosine_with_restarts has one cycle unless told otherwise, which is cosine without a restart; "
            "--lr_scheduler_kwargs '{\"num_cycles\": 3}' starts anew twice"
        )
    if name in WITHOUT_WARMUP and given.get("warmup_steps"):
        instead = "; constant_with_warmup has one" if name == SchedulerType.CONSTANT else ""
        notices.append(f"--lr_scheduler_type {name.value} has no warm-up: --warmup_steps is not used{instead}")
    if name == SchedulerType.INVERSE_SQRT and not training.warmup_steps and "timescale" not in options:
        notices.append(
            "inverse_sqrt falls as fast as its warm-up was long; without one it hardly falls: give --warmup_steps, or "
            "--lr_scheduler_kwargs '{\"timescale\": 100}'"
        )
    if name == SchedulerType.REDUCE_ON_PLATEAU and "patience" not in options:
        notices.append(
            f"reduce_lr_on_plateau waits for {DEFAULT_PATIENCE} validations without progress; "
            "--lr_scheduler_kwargs '{\"patience\": 2}' waits for two"
        )
    return notices
