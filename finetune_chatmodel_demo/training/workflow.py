"""A fine-tuning run from its settings to its result."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from finetune_chatmodel_demo.chatglm3.loading import load_model, load_tokenizer
from finetune_chatmodel_demo.conversation.collating import PadCollator
from finetune_chatmodel_demo.conversation.datasets import build_dataset
from finetune_chatmodel_demo.training.arguments import SettingsError
from finetune_chatmodel_demo.training.checkpoints import (
    list_checkpoints,
    read_whole_checkpoint,
    remove_checkpoint,
    remove_leftovers,
)
from finetune_chatmodel_demo.training.report import count_steps, describe_start, sanity_check
from finetune_chatmodel_demo.training.settings import P_TUNING, Settings
from finetune_chatmodel_demo.training.trainer import ChatTrainer

SETTINGS_FILE = "settings.json"

logger = logging.getLogger(__name__)


def run_finetuning(settings: Settings) -> ChatTrainer:
    """Trains, validates and saves.

    Args:
        settings: the decided run.

    Returns:
        The trainer, with the trained model and the log.

    Raises:
        SettingsError: when the model cannot be loaded.
        RecordError: for a bad record in a data file, or when no row is left to train on.
        NonFiniteLossError: when the loss is no number any more.
    """
    args = settings.training
    set_seed(args.seed)
    tokenizer = load_tokenizer(settings.model.model_name_or_path)
    # Data first: its errors show before gigabytes of weights are read.
    train_rows = _read_rows(settings, settings.data.train_file, tokenizer)
    validation_rows = None
    if settings.data.validation_file:
        validation_rows = _read_rows(settings, settings.data.validation_file, tokenizer)
    model = _load(settings)
    collate = PadCollator(tokenizer.pad_token_id)
    trainer = ChatTrainer(model, settings, tokenizer, collate, train_rows, validation_rows)
    if args.should_log:
        _print_start(settings, trainer, tokenizer, validation_rows)
    if args.should_save:
        _prepare_output(settings)
    _train(settings, trainer)
    if validation_rows is not None and not _was_evaluated(trainer):
        trainer.evaluate()
    trainer.save_result()
    if args.should_log:
        print(f"finished: {args.output_dir}", flush=True)
    return trainer


def _read_rows(settings: Settings, path: str, tokenizer: Any) -> Any:
    return build_dataset(settings.data.train_format, path, tokenizer, **settings.data.dataset_options())


def _load(settings: Settings) -> torch.nn.Module:
    """The base model with the checkpoint's weights in place, ready to train.

    Raises:
        SettingsError: when the model or the prefix cannot be loaded.
    """
    model_arguments = settings.model
    is_prefix = settings.method == P_TUNING
    path: str | Path = model_arguments.model_name_or_path
    if settings.checkpoint and not is_prefix:
        path = settings.checkpoint
    prefix_checkpoint = settings.checkpoint if is_prefix else None
    prefix_checkpoint = prefix_checkpoint or model_arguments.ptuning_checkpoint
    try:
        model = load_model(
            path,
            pt_checkpoint=prefix_checkpoint,
            pre_seq_len=model_arguments.pre_seq_len,
            prefix_projection=model_arguments.prefix_projection,
            quantization_bit=model_arguments.quantization_bit,
            dtype=settings.weights_dtype,
            device=settings.training.device,
        )
    except (ValueError, OSError) as error:
        raise SettingsError(str(error)) from error
    if is_prefix and prefix_checkpoint is None:
        model.prefix_encoder.reset_parameters(model_arguments.prefix_init_std)
    return model


def _print_start(settings: Settings, trainer: ChatTrainer, tokenizer: Any, validation_rows: Any) -> None:
    rows = trainer.train_dataset.rows
    print(sanity_check(tokenizer, rows[0]["input_ids"], rows[0]["labels"]))
    print(f"training data: {rows.report}")
    if validation_rows is not None:
        print(f"validation data: {validation_rows.report}")
    print(f"the run:\n{describe_start(settings, trainer)}")
    for notice in settings.notices + _changes_since(settings, trainer):
        print(f"note: {notice}")
    print(flush=True)


def _changes_since(settings: Settings, trainer: ChatTrainer) -> list[str]:
    """Names what differs from the run that wrote the checkpoint."""
    if settings.checkpoint is None:
        return []
    before = dict(read_whole_checkpoint(settings.checkpoint).get("run", {}))
    now = trainer.describe_run()
    changes = [f"{key} was {before[key]}, is {now[key]}" for key in now if key in before and before[key] != now[key]]
    if not changes:
        return []
    return [f"{settings.checkpoint.name} was written by a run with other settings: {'; '.join(changes)}"]


def _prepare_output(settings: Settings) -> None:
    """Keeps the settings beside the result, and removes the checkpoints of a run that is started anew."""
    folder = Path(settings.training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if settings.checkpoint is None:
        for checkpoint in list_checkpoints(folder):
            remove_checkpoint(checkpoint)
    text = json.dumps(settings.given, ensure_ascii=False, indent=1, default=str)
    (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def _train(settings: Settings, trainer: ChatTrainer) -> None:
    checkpoint = settings.checkpoint
    if checkpoint is None:
        trainer.train()
        return
    state = trainer.state.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step >= count_steps(trainer):
        # Trainer would make one more step, so that a restart loop would never come to rest.
        logger.info(
            "%s is the end of the run already: no step is left (--max_steps adds some, --overwrite_output_dir starts "
            "anew)",
            checkpoint,
        )
        trainer.state = state
        return
    trainer.train(resume_from_checkpoint=str(checkpoint))


def _was_evaluated(trainer: ChatTrainer) -> bool:
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return bool(steps) and steps[-1] == trainer.state.global_step
