"""A fine-tuning run from its settings to its result."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, set_seed

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import hold_folder, remove_leftovers, write_json
from finetune_chatmodel_demo.conversation.stage_data import StageData, build_stage_data
from finetune_chatmodel_demo.training.base_model import load_base_tokenizer
from finetune_chatmodel_demo.training.callbacks import RunStopped, StopOnSignal, stopped_early
from finetune_chatmodel_demo.training.checkpoints import (
    list_checkpoints,
    read_manifest,
    remove_checkpoint,
)
from finetune_chatmodel_demo.training.manifest import RUN_MANIFEST, describe_run, find_other_content, read_run_manifest
from finetune_chatmodel_demo.training.methods import prepare_model
from finetune_chatmodel_demo.training.report import count_steps, describe_start, sanity_check
from finetune_chatmodel_demo.training.results import (
    TrainerLog,
    describe_evaluation,
    describe_training,
    is_evaluation,
    remove_results,
    save_results,
)
from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.trainer import RunTrainer
from finetune_chatmodel_demo.training.zero import check_pickles, take_up_other_processes

SETTINGS_FILE = "settings.json"

logger = logging.getLogger(__name__)


def run_finetuning(settings: Settings) -> RunTrainer | None:
    """Trains, validates and saves; or, with --do_eval or --do_predict alone, only that.

    Args:
        settings: the decided run.

    Returns:
        The trainer, with the trained model and the log; None after --dry_run.

    Raises:
        UserError: when the model cannot be loaded.
        RecordError: for a bad record in a data file, or when no row is left to train on.
        NonFiniteLossError: when the loss is no number any more.
        RunStopped: after SIGTERM; there is a checkpoint, and no result.
    """
    args = settings.training
    set_seed(args.seed)
    if settings.run.dry_run:
        _print_dry_run(settings, _read_data(settings, load_base_tokenizer(settings.model.model_name_or_path)))
        return None
    # Two runs in one folder would remove each other's checkpoints. On several nodes the first process holds it.
    is_first = args.process_index == 0
    with hold_folder(Path(args.output_dir), "--output_dir") if is_first else nullcontext():
        return _run(settings)


def _run(settings: Settings) -> RunTrainer:
    args = settings.training
    tokenizer = load_base_tokenizer(settings.model.model_name_or_path)
    # Data first: its errors show before gigabytes of weights are read.
    data = _read_data(settings, tokenizer)
    model = prepare_model(settings)
    trainer = trainer_class(settings.stage.stage)(model, settings, tokenizer, data.train, data.validation)
    trainer.add_callback(TrainerLog(args.output_dir))
    stop = StopOnSignal()
    trainer.add_callback(stop)
    if args.should_log:
        _print_start(settings, trainer, tokenizer, data)
    at_end = _find_end(settings, trainer) if settings.does_train else None
    if args.should_save:
        manifest = describe_run(settings, data.train) if settings.does_train else None
        if at_end is not None:
            _check_same_run(settings, manifest)
        _prepare_output(settings, manifest)
    # Read now: --save_total_limit may remove that checkpoint before the end.
    resumed = read_manifest(settings.checkpoint)["step"] if settings.checkpoint else 0
    if settings.does_train:
        _train(settings, trainer, at_end)
        if stop.stopped_after is not None:
            raise RunStopped(f"stopped by SIGTERM after step {stop.stopped_after}, with a checkpoint")
    if data.validation is not None and settings.does_evaluate and not _was_evaluated(trainer):
        trainer.evaluate()
    if settings.does_train:
        trainer.save_result()
    if args.should_save:
        _save_results(settings, trainer, resumed)
    if settings.does_predict:
        _predict(settings, trainer, tokenizer, data.validation)
    if args.should_log:
        print(f"finished: {args.output_dir}", flush=True)
    return trainer


def _read_data(settings: Settings, tokenizer: Any) -> StageData:
    args = settings.training
    with args.main_process_first(desc="tokenizing"):  # the others read what it has kept (--tokenized_cache)
        return build_stage_data(
            settings.data, settings.stage.stage, tokenizer, args.seed, needs_train=settings.does_train
        )


def trainer_class(stage: str) -> type[RunTrainer]:
    """The trainer of a stage; what it needs is imported with it."""
    if stage == "rm":
        from finetune_chatmodel_demo.training.stages.rm import RewardTrainer

        return RewardTrainer
    if stage == "dpo":
        from finetune_chatmodel_demo.training.stages.dpo import PreferenceTrainer

        return PreferenceTrainer
    if stage == "ppo":
        from finetune_chatmodel_demo.training.stages.ppo import PPOTrainer

        return PPOTrainer
    from finetune_chatmodel_demo.training.stages.sft import ChatTrainer

    return ChatTrainer


def _print_start(settings: Settings, trainer: RunTrainer, tokenizer: Any, data: StageData) -> None:
    rows = data.train if settings.does_train else data.validation
    print(sanity_check(tokenizer, rows.peek(1)[0] if hasattr(rows, "peek") else rows[0]))
    print(data.table)
    if settings.does_train:
        print(f"the run:\n{describe_start(settings, trainer)}")
    for notice in settings.notices + _changes_since(settings, trainer):
        print(f"note: {notice}")
    print(flush=True)


def _print_dry_run(settings: Settings, data: StageData) -> None:
    """Everything that is known before the model is loaded."""
    if not settings.training.should_log:
        return
    print(data.table)
    print(_describe_plan(settings, data.train))
    for notice in settings.notices:
        print(f"note: {notice}")
    print("nothing was trained or written (--dry_run)", flush=True)


def _describe_plan(settings: Settings, rows: Any) -> str:
    """What the run will need; it takes seconds to find out."""
    from finetune_chatmodel_demo.training.run_plan import describe_plan, plan_settings

    device = settings.training.device
    limit = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    try:
        return f"the plan: {describe_plan(plan_settings(settings, rows), limit)}"
    except UserError as error:
        return f"the plan: {error}"


def _changes_since(settings: Settings, trainer: RunTrainer) -> list[str]:
    """Names what differs from the run that wrote the checkpoint."""
    if settings.checkpoint is None:
        return []
    before = dict(read_manifest(settings.checkpoint).get("run", {}))
    now = trainer.describe_run()
    changes = [f"{key} was {before[key]}, is {now[key]}" for key in now if key in before and before[key] != now[key]]
    if not changes:
        return []
    return [f"{settings.checkpoint.name} was written by a run with other settings: {'; '.join(changes)}"]


def _find_end(settings: Settings, trainer: RunTrainer) -> TrainerState | None:
    """The state of a checkpoint that is the end of the run: of its steps, or of the patience."""
    if settings.checkpoint is None:
        return None
    state = TrainerState.load_from_json(str(settings.checkpoint / "trainer_state.json"))
    return state if state.global_step >= count_steps(trainer) or stopped_early(state, settings.run) else None


def _check_same_run(settings: Settings, manifest: dict[str, Any]) -> None:
    """A run that is at its end trains nothing more; what would be trained anew must not pass for what was.

    Raises:
        UserError: data, model or method are others than those of the result in --output_dir.
    """
    folder = Path(settings.training.output_dir)
    if not (folder / RUN_MANIFEST).is_file():
        return
    changes = find_other_content(read_run_manifest(folder), manifest)
    if changes:
        raise UserError(
            f"--output_dir {folder} holds a finished run, of which no step is left, with other content: "
            f"{'; '.join(changes)}. Choose another --output_dir (OUTPUT_DIR of the scripts), start anew with "
            "--overwrite_output_dir, or train on with more --max_steps"
        )


def _prepare_output(settings: Settings, manifest: dict[str, Any] | None) -> None:
    """Keeps the settings beside the result, and removes the checkpoints of a run that is started anew."""
    folder = Path(settings.training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if settings.does_train and settings.checkpoint is None:
        for checkpoint in list_checkpoints(folder):
            remove_checkpoint(checkpoint)
        remove_results(folder)
    if settings.does_train or not (folder / SETTINGS_FILE).is_file():  # else: of the training that is looked at
        write_json(folder / SETTINGS_FILE, settings.given)
    if manifest is not None:
        write_json(folder / RUN_MANIFEST, manifest)


def _train(settings: Settings, trainer: RunTrainer, at_end: TrainerState | None) -> None:
    checkpoint = settings.checkpoint
    if checkpoint is None:
        trainer.train()
        return
    if at_end is not None:
        # Trainer would make one more step, so that a restart loop would never come to rest.
        logger.info(
            "%s is the end of the run already: no step is left (%s adds some, --overwrite_output_dir starts anew)",
            checkpoint,
            "--early_stopping_patience" if stopped_early(at_end, settings.run) else "--max_steps",
        )
        trainer.state = at_end
        if trainer.args.load_best_model_at_end and at_end.best_model_checkpoint:
            trainer._load_best_model()
        return
    if trainer.is_deepspeed_enabled:
        check_pickles(checkpoint, settings.run.trust_checkpoint)
    before = read_manifest(checkpoint).get("run", {}).get("processes", trainer.args.world_size)
    if trainer.is_deepspeed_enabled and before != trainer.args.world_size:
        take_up_other_processes(trainer, checkpoint, before)
    trainer.train(resume_from_checkpoint=str(checkpoint))


def _was_evaluated(trainer: RunTrainer) -> bool:
    """Whether the log has the validation of the result: of its last step, or of the best one where that was loaded."""
    state = trainer.state
    is_best = trainer.args.load_best_model_at_end and state.best_model_checkpoint
    if is_best and state.best_global_step != state.global_step:
        return False
    steps = [entry["step"] for entry in state.log_history if is_evaluation(entry)]
    return bool(steps) and steps[-1] == state.global_step


def _save_results(settings: Settings, trainer: RunTrainer, resumed: int) -> None:
    """Writes train_results.json, eval_results.json and all_results.json, where the run has such results.

    Args:
        resumed: the step after which the run went on.
    """
    folder, log, stage = settings.training.output_dir, trainer.state.log_history, settings.stage.stage
    results = {"eval": describe_evaluation(log, stage)}
    if settings.does_train:
        results["train"] = describe_training(log, trainer.state.global_step, resumed)
    for split, metrics in results.items():
        if metrics:
            save_results(folder, split, metrics)


def _predict(settings: Settings, trainer: RunTrainer, tokenizer: Any, rows: Any) -> None:
    from finetune_chatmodel_demo.training.prediction import PREDICTIONS, run_prediction

    metrics = run_prediction(trainer.model, tokenizer, rows, settings, settings.training.output_dir)
    if settings.training.should_log:
        scores = ", ".join(f"{name.removeprefix('predict_')} {metrics[name]:.2f}" for name in sorted(metrics)[:4])
        print(f"{len(rows)} answers are in {Path(settings.training.output_dir) / PREDICTIONS}: {scores}")
