"""Numbers of a run that cannot be zero or negative, refused before something divides by them."""

from typing import Any

from finetune_chatmodel_demo.common.errors import UserError

COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_seq_length",
    "pre_seq_len",
)
# May be fractions: epochs, and shares of the steps.
AMOUNTS = ("num_train_epochs", "save_steps", "eval_steps")


def check_counts(given: dict[str, Any]) -> None:
    """Checks the numbers that were given.

    Raises:
        UserError: for the first that is too small.
    """
    for name in COUNTS:
        if given.get(name) is not None and int(given[name]) < 1:
            raise UserError(f"--{name} is {given[name]}; it must be at least 1")
    for name in AMOUNTS:
        if given.get(name) is not None and not float(given[name]) > 0:
            raise UserError(f"--{name} is {given[name]:g}; it must be above 0")
