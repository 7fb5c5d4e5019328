"""Checks the learning-rate schedule before anything is loaded.

    finetune.py … --lr_scheduler_type cosine_with_restarts --lr_scheduler_kwargs '{"num_cycles": 3}'

The schedules themselves are transformers'; test_outputs.py holds their curves to formulas.
"""

import inspect
import json
import math
from typing import Any

import torch
import yaml
from transformers import TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from finetune_chatmodel_demo.common.errors import UserError, did_you_mean

# What the trainer fills in; the rest of a schedule's arguments can be given.
FILLED_IN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"}
WITHOUT_WARMUP = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU)
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
        notices: a notice is appended where the rate looks like a typing error, or a flag has no effect.

    Raises:
        UserError: for arguments that the schedule does not have or does not take.
    """
    name, options = SchedulerType(training.lr_scheduler_type), training.lr_scheduler_kwargs or {}
    known = list_options(name)
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known, 0.6) or f"; it takes {', '.join(known) or 'none'}"
            raise UserError(f"--lr_scheduler_kwargs: {name.value} has no option {option!r}{hint}")
    if not 0 <= training.learning_rate < math.inf:
        raise UserError(
            f"--learning_rate is {training.learning_rate:g}; it must be 0 or more, e.g. 2e-2 for P-Tuning v2"
        )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=options)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--lr_scheduler_type {name.value} with --lr_scheduler_kwargs {options}: {error}") from error
    if training.learning_rate >= LIKELY_TYPO:
        notices.append(
            f"--learning_rate is {training.learning_rate:g}, and 2e-2 (a prefix) or 1e-4 is usual: is a minus missing "
            "in its exponent?"
        )
    if name in WITHOUT_WARMUP and given.get("warmup_steps"):
        notices.append(f"--lr_scheduler_type {name.value} has no warm-up: --warmup_steps is not used")


def list_options(name: SchedulerType) -> list[str]:
    """What --lr_scheduler_kwargs may hold for a schedule."""
    if name in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        return []
    function = TYPE_TO_SCHEDULER_FUNCTION[name]
    if name == SchedulerType.REDUCE_ON_PLATEAU:
        function = torch.optim.lr_scheduler.ReduceLROnPlateau
    return [option for option in inspect.signature(function).parameters if option not in FILLED_IN]
