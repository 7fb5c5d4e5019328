"""From flags to a run: fills in the defaults that depend on method, stage and device.

Everything here and in `checks` happens before the model is loaded, and writes nothing.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from transformers import TrainingArguments

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.data_arguments import DataArguments
from finetune_chatmodel_demo.training.arguments import (
    FULL,
    GROUP_BY_LENGTH,
    P_TUNING,
    GenerationArguments,
    MethodArguments,
    ModelArguments,
    RunArguments,
    StageArguments,
)
from finetune_chatmodel_demo.training.checkpoints import (
    find_last_checkpoint,
    list_checkpoints,
    read_manifest,
    read_whole_checkpoint,
)
from finetune_chatmodel_demo.training.checks import check_files, check_settings, has_gpu
from finetune_chatmodel_demo.training.prediction import check_packages
from finetune_chatmodel_demo.training.results import check_reporters
from finetune_chatmodel_demo.training.schedule import check_scheduler, read_options
from finetune_chatmodel_demo.training.settings import METHOD_TITLES, Settings, choose_policy, choose_precision
from finetune_chatmodel_demo.training.stages.stage_checks import default_metric

DEFAULT_WARMUP_SHARE = 0.03


def decide_settings(given: dict[str, object], notices: Sequence[str] = ()) -> Settings:
    """Turns the options that were given into a run.

    Args:
        given: option → value, see `command_line.parse_given`.
        notices: what is to be told at the start already; more is appended.

    Raises:
        UserError: when the run cannot work as described.
    """
    settings = read_settings(given, notices)
    check_files(settings.model, settings.data, settings.stage.stage, given, settings.notices)
    check_settings(settings)
    training = _build_training_arguments(settings)
    if settings.run.overfit_check is not None:  # leaves the checkpoints of --output_dir alone
        return replace(settings, training=training)
    checkpoint = None
    if settings.does_train and not settings.run.overwrite_output_dir:
        checkpoint = _find_checkpoint(training, settings)
    settings = replace(settings, training=training, checkpoint=checkpoint)
    if settings.does_train:
        _check_earlier_run(settings)
    return settings


def read_settings(given: dict[str, object], notices: Sequence[str] = ()) -> Settings:
    """The options in their groups, and the method; no file and no device is looked at yet."""
    model, tuning = ModelArguments(**_select(given, ModelArguments)), MethodArguments(**_select(given, MethodArguments))
    try:
        data = DataArguments(**_select(given, DataArguments))
    except ValueError as error:
        raise UserError(str(error)) from error
    return Settings(
        model=model,
        tuning=tuning,
        stage=StageArguments(**_select(given, StageArguments)),
        data=data,
        generation=GenerationArguments(**_select(given, GenerationArguments)),
        training=None,
        run=RunArguments(**_select(given, RunArguments)),
        method=tuning.finetuning_type or (P_TUNING if model.pre_seq_len or model.ptuning_checkpoint else FULL),
        checkpoint=None,
        given=given,
        notices=list(notices),
    )


def _select(given: dict[str, object], arguments: type) -> dict[str, object]:
    names = {item.name for item in fields(arguments) if item.init}
    return {name: value for name, value in given.items() if name in names}


def _build_training_arguments(settings: Settings) -> TrainingArguments:
    given = settings.given
    names = {item.name for item in fields(TrainingArguments)}
    chosen = _select(given, TrainingArguments)
    if "lr_scheduler_kwargs" in chosen:
        chosen["lr_scheduler_kwargs"] = read_options(chosen["lr_scheduler_kwargs"])
    # transformers 5.23 renamed the flag; both names work, and the old one warns.
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    chosen.pop("gradient_checkpointing", None)
    chosen[checkpointing] = choose_policy(given, has_gpu(given)) != "none"
    defaults = {
        "learning_rate": settings.usual_learning_rate,
        "warmup_steps": _default_warmup(given),
        "logging_steps": 10,
        "train_sampling_strategy": GROUP_BY_LENGTH,
        "ddp_find_unused_parameters": False,
        f"{checkpointing}_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": has_gpu(given),
        # Rows of different lengths cannot be sent around as one tensor: each process reads all and keeps its part.
        **({"accelerator_config": {"dispatch_batches": False}} if settings.data.streaming else {}),
        **_default_precision(given),
        **_default_evaluation(settings),
    }
    forced = {"remove_unused_columns": False, "label_names": ["labels"], "logging_nan_inf_filter": False}
    # The library would compile the whole model, anew for many a length of rows. See `compile_elementwise`.
    forced["torch_compile"] = False
    try:
        training = TrainingArguments(**{**defaults, **chosen, **forced})
    except ValueError as error:
        raise UserError(str(error)) from error
    check_scheduler(training, given, settings.notices)
    check_reporters(training.report_to)
    if settings.does_predict:
        check_packages()
    if training.n_gpu > 1:
        settings.notices.append(
            f"one of {training.n_gpu} GPUs is used; start with torchrun (NUM_GPUS in the scripts) for more"
        )
        training._n_gpu = 1  # DataParallel would gather every batch on one GPU
    return training


def _default_warmup(given: dict[str, object]) -> float:
    """3% of the steps; none in a run of less than 34, whose first step would have a learning rate of 0."""
    steps = given.get("max_steps", -1)
    return int(DEFAULT_WARMUP_SHARE * steps) if steps > 0 else DEFAULT_WARMUP_SHARE


def _default_precision(given: dict[str, object]) -> dict[str, bool]:
    if "bf16" in given or "fp16" in given or not has_gpu(given):
        return {}
    precision = choose_precision(given, True, torch.cuda.is_bf16_supported(including_emulation=False))
    return {"bf16" if precision == "bfloat16" else "fp16": True}


def _default_evaluation(settings: Settings) -> dict[str, object]:
    """Evaluation at each checkpoint, when there is something to evaluate on."""
    if not settings.has_validation or not settings.does_train:
        return {}
    given, stops_early = settings.given, settings.run.early_stopping_patience is not None
    strategy = given.get("save_strategy", "steps")
    strategy = "steps" if strategy == "best" else strategy
    defaults = {"eval_strategy": strategy}
    if strategy == "steps":
        defaults["eval_steps"] = given.get("save_steps", 500)
    if stops_early:
        defaults["load_best_model_at_end"] = True
        defaults["restore_callback_states_from_checkpoint"] = True
    if given.get("load_best_model_at_end", stops_early) or given.get("save_strategy") == "best":
        defaults["metric_for_best_model"] = default_metric(settings.stage.stage)
    if given.get("load_best_model_at_end", stops_early) and not {"save_steps", "save_strategy"} & given.keys():
        # The best evaluation has to have a checkpoint.
        ends = [end for end in ("steps", "strategy") if f"eval_{end}" in given]
        defaults |= {f"save_{end}": given[f"eval_{end}"] for end in ends}
    return defaults


def _find_checkpoint(training: TrainingArguments, settings: Settings) -> Path | None:
    """Resolves --resume_from_checkpoint: True (the newest whole one in output_dir), a path, or False."""
    wanted = training.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none", "no", ""):
        return None
    if is_true(wanted):
        checkpoint = find_last_checkpoint(training.output_dir, settings.run.hash_checkpoints)
        manifest = read_manifest(checkpoint) if checkpoint else {}
    else:
        checkpoint = Path(wanted)
        manifest = read_whole_checkpoint(checkpoint, settings.run.hash_checkpoints)
    if checkpoint is not None:
        _check_same_kind(checkpoint, manifest, settings)
    return checkpoint


def _check_same_kind(checkpoint: Path, manifest: dict[str, object], settings: Settings) -> None:
    """A checkpoint of another method or stage holds other parameters."""
    titles = {**METHOD_TITLES, **{title: title for title in METHOD_TITLES.values()}}  # manifests once had the titles
    found = titles.get(manifest.get("method"), str(manifest.get("method")))
    if found != settings.method_title:
        raise UserError(
            f"{checkpoint} is a checkpoint of {found}, and this run trains {settings.method_title}; choose another "
            "--output_dir"
        )
    stage = manifest.get("stage", "sft")
    if stage != settings.stage.stage:
        raise UserError(
            f"{checkpoint} is a checkpoint of stage {stage}, and this is a run of stage {settings.stage.stage}; choose "
            "another --output_dir"
        )


def is_true(value: object) -> bool:
    """Whether a flag's value says yes."""
    return str(value).lower() in ("true", "yes")


def _check_earlier_run(settings: Settings) -> None:
    """Keeps two runs apart: a later resume would otherwise continue with the checkpoint of the wrong one."""
    training = settings.training
    earlier = list_checkpoints(training.output_dir)
    if settings.checkpoint is not None or settings.run.overwrite_output_dir:
        return
    if is_true(training.resume_from_checkpoint):
        damaged = f" ({len(earlier)} damaged)" if earlier else ""
        settings.notices.append(f"no whole checkpoint in {training.output_dir}{damaged}: starting from the beginning")
    elif earlier:
        raise UserError(
            f"--output_dir {training.output_dir} holds {earlier[-1].name} of an earlier run; continue it with "
            "--resume_from_checkpoint True, start anew with --overwrite_output_dir, or choose another folder"
        )
