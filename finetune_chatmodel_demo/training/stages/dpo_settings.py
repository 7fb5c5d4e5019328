"""What the flags of --stage dpo mean to TRL, and which of their values cannot work."""

import math
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training.arguments import LORA, StageArguments
from finetune_chatmodel_demo.training.settings import Settings

OLDEST_TRL = Version("1.16")  # `dpo.PreferenceLoss` says what it takes from TRL
OUTPUT_LAYER = ("lm_head", "output_layer")


def check_dpo_settings(settings: Settings) -> None:
    """Refuses what cannot work, before anything is loaded.

    Args:
        settings: decided but for `training` and `checkpoint`, which may be None. Notices are added to it.

    Raises:
        UserError: for the first such value.
    """
    stage, tuning = settings.stage, settings.tuning
    ranges = [
        ("pref_beta", 0 < stage.pref_beta < math.inf, "above 0"),
        ("pref_ftx", 0 <= stage.pref_ftx < math.inf, "0 or more"),
        ("dpo_label_smoothing", 0 <= stage.dpo_label_smoothing < 0.5, "at least 0 and below 0.5"),
    ]
    for name, is_good, expected in ranges:
        if not is_good:
            raise UserError(f"--{name} is {getattr(stage, name)}; it must be {expected}")
    if stage.dpo_label_smoothing and stage.pref_loss != "sigmoid":
        raise UserError(f"--dpo_label_smoothing is for --pref_loss sigmoid, not {stage.pref_loss}; drop one of them")
    if stage.ref_model and not (Path(stage.ref_model) / "config.json").is_file():
        raise UserError(f"--ref_model {stage.ref_model} is not a folder with a config.json; give a whole model")
    named = f"{tuning.lora_target},{tuning.additional_target or ''}".split(",")
    if settings.method == LORA and any(name.strip() in OUTPUT_LAYER for name in named):
        raise UserError("--stage dpo computes log-probabilities without lm_head's adapter: take it out of the targets")
    if tuning.lora_dropout:
        settings.notices.append(
            "--stage dpo trains without dropout, so that policy and reference start out equal: --lora_dropout is only "
            "recorded in the adapter"
        )
    _check_trl()


def _check_trl() -> None:
    """Looks at TRL's version without the seconds that importing it takes."""
    try:
        found = metadata.version("trl")
    except metadata.PackageNotFoundError:
        found = "none"
    if found == "none" or Version(found) < OLDEST_TRL:
        raise UserError(
            f"--stage dpo needs the package trl from version {OLDEST_TRL} (found: {found}), which needs Python 3.11: "
            f"pip install 'trl>={OLDEST_TRL}'"
        )


def build_dpo_arguments(stage: StageArguments) -> dict[str, Any]:
    """The values of TRL's DPOConfig that the flags decide, or that must not be TRL's own defaults."""
    # Smoothed, the loss is that of arXiv:2403.00409: unbiased for labels of which this share is wrong.
    losses = ["robust" if stage.dpo_label_smoothing else stage.pref_loss]
    weights = [1.0]
    if stage.pref_ftx:
        losses.append("sft")
        weights.append(stage.pref_ftx)
    return {
        "beta": stage.pref_beta,
        "loss_type": losses,
        "loss_weights": weights,
        "label_smoothing": stage.dpo_label_smoothing,
        "max_length": None,  # rows have their length already
        "disable_dropout": True,
        "bf16": False,  # TRL's default is True, on a CPU as well
    }
