"""Refuses evaluations that cannot work: the part of `checks.py` about validation data, replies and early stopping."""

import os
from pathlib import Path

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.stages.stage_checks import check_metric


def check_evaluation(settings: Settings) -> None:
    """What needs validation data, replies, or a measure.

    Raises:
        UserError: for the first that lacks what it needs.
    """
    given = settings.given
    _check_best(settings)
    if settings.has_validation:
        return
    how = "give --validation_file, --eval_dataset or --val_size"
    if given.get("do_predict"):
        raise UserError(f"--do_predict answers the validation data, and there is none: {how}")
    if given.get("do_eval") or given.get("eval_strategy", "no") != "no":
        raise UserError(f"evaluation needs --validation_file or the like: {how}, or drop --eval_strategy/--do_eval")
    if given.get("lr_scheduler_type") == "reduce_lr_on_plateau":
        raise UserError(f"reduce_lr_on_plateau follows the validation loss, and there is no validation data: {how}")


def _check_best(settings: Settings) -> None:
    """What chooses the best checkpoint and the end of a run, and what it needs."""
    run, given, stage = settings.run, settings.given, settings.stage.stage
    if run.early_stopping_patience is not None:
        if run.early_stopping_patience < 1:
            raise UserError(
                f"--early_stopping_patience is {run.early_stopping_patience}; give 1 or more evaluations, e.g. 3"
            )
        if not settings.has_validation:
            raise UserError(
                "--early_stopping_patience follows the evaluations, and there is no validation data: give "
                "--validation_file, --eval_dataset or --val_size"
            )
        if "no" in (given.get("eval_strategy"), given.get("save_strategy") if "eval_strategy" not in given else None):
            raise UserError(
                "--early_stopping_patience follows the evaluations, and --eval_strategy (or --save_strategy) no makes "
                "none; use steps or epoch"
            )
    elif "early_stopping_threshold" in given:
        raise UserError("--early_stopping_threshold belongs to --early_stopping_patience N; add it")
    if run.eval_questions < 0:
        raise UserError(f"--eval_questions is {run.eval_questions}; give a number of replies, e.g. 100, or 0")
    if run.eval_questions and stage not in ("pt", "sft"):
        raise UserError(f"--eval_questions asks for replies, which --stage {stage} does not train; drop it")
    if run.eval_questions and stage == "pt":
        raise UserError("--eval_questions asks for replies, and the rows of --stage pt have none; drop it")
    if run.eval_questions and not settings.has_validation:
        raise UserError(
            "--eval_questions asks for replies of the validation data, and there is none: give --validation_file, "
            "--eval_dataset or --val_size"
        )
    if run.eval_questions_file:
        if not run.eval_questions:
            raise UserError("--eval_questions_file says what is asked, --eval_questions N how many; add it")
        if not Path(run.eval_questions_file).is_file():
            raise UserError(f"--eval_questions_file {run.eval_questions_file} does not exist")
    check_metric(settings)


def check_overfit_check(settings: Settings) -> None:
    """Flags that --overfit_check cannot go with.

    Raises:
        UserError: for the first of them.
    """
    run, given = settings.run, settings.given
    if run.overfit_check is None:
        return
    if settings.stage.stage != "sft":
        raise UserError(f"--overfit_check looks at replies: use it with --stage sft, not {settings.stage.stage}")
    for flag in ("deepspeed", "streaming", "do_predict", "do_eval"):
        if given.get(flag):
            raise UserError(f"--overfit_check trains on a few rows in one process; drop --{flag}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--overfit_check works in one process; start it with python, not with torchrun")
