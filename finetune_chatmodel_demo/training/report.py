"""What a run prints before it starts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune_chatmodel_demo.conversation.packing import GroupedRows
from finetune_chatmodel_demo.training.methods import describe_method
from finetune_chatmodel_demo.training.settings import Settings

if TYPE_CHECKING:
    from finetune_chatmodel_demo.training.trainer import RunTrainer

LONGEST_SANITY_CHECK = 60
STAGE_TITLES = {
    "pt": "pt, pre-training on text",
    "sft": "sft, supervised fine-tuning",
    "rm": "rm, a reward model",
    "dpo": "dpo, direct preference optimization",
    "ppo": "ppo, proximal policy optimization",
}


def describe_start(settings: Settings, trainer: "RunTrainer") -> str:
    """Returns the effective settings as a table, one line each."""
    args = trainer.args
    is_streamed = settings.data.streaming
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in trainer.model.parameters())
    effective = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = count_steps(trainer)
    warmup = args.get_warmup_steps(steps)
    method = describe_method(settings, trainer.model)
    lines = {
        "stage": STAGE_TITLES[settings.stage.stage],
        "method": f"{method}: {trainable:,} of {everything:,} parameters train",
        "base model": settings.model.model_name_or_path,
        "learning rate": f"{args.learning_rate:g}, {_name(args.lr_scheduler_type)}, warm-up over {warmup} steps",
        "batch": f"{args.per_device_train_batch_size} rows × {args.gradient_accumulation_steps} accumulated × "
        f"{args.world_size} processes = {effective} rows a step",
        "steps": f"{steps} of {effective} rows" + ("" if is_streamed else _count_epochs(steps * effective, trainer)),
        **({"packing": packed.describe()} if (packed := _find_groups(trainer)) else {}),
        **(trainer.describe_steps(steps) if hasattr(trainer, "describe_steps") else {}),
        "precision": settings.precision
        + (f", base in {bits} bits" if (bits := settings.model.quantization_bit) else ""),
        "device": f"{args.device}, gradient checkpointing {_describe_checkpointing(settings)}"
        + (", norms and SwiGLU compiled" if settings.compiles_elementwise else ""),
        "output": f"{args.output_dir}, a checkpoint every {args.save_steps:g} {_name(args.save_strategy)}",
        "resumed from": str(settings.checkpoint) if settings.checkpoint else "nothing, a new run",
    }
    return "\n".join(f"  {name:<14} {text}" for name, text in lines.items())


def _find_groups(trainer: "RunTrainer") -> GroupedRows | None:
    rows = getattr(trainer.train_dataset, "rows", None)
    return rows if isinstance(rows, GroupedRows) else None


def _count_epochs(rows: int, trainer: "RunTrainer") -> str:
    count = len(trainer.train_dataset)
    return f" = {rows / count:.2f} epochs of {count} rows"


def count_steps(trainer: "RunTrainer") -> int:
    """Optimizer steps of the whole run."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    if hasattr(trainer, "count_steps"):
        return trainer.count_steps()
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def uses_checkpointing(args: Any) -> bool:
    """Whether activations are recomputed; transformers 5.23 renamed the setting."""
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


def _describe_checkpointing(settings: Settings) -> str:
    if not uses_checkpointing(settings.training):
        return "off"
    return "of MLPs" if settings.recomputes_mlp_only else "on"


def sanity_check(tokenizer: Any, row: dict[str, Sequence[int]]) -> str:
    """Returns the first row as the original demo shows it: token, id and label, one a line.

    The middle of a long row is left out.

    Args:
        tokenizer: says what an id stands for.
        row: an item of the training data, of any stage.
    """
    if "chosen_ids" in row:
        parts = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
        return _show_texts(tokenizer, row, "the first pair", parts)
    if len(row["labels"]) != len(row["input_ids"]):
        return _show_texts(tokenizer, row, "the first prompt", {"prompt": "input_ids", "reference": "labels"})
    lines = [
        f"{tokenizer.convert_ids_to_tokens(token)!r:>20}: {token} -> {label}"
        for token, label in zip(row["input_ids"], row["labels"])
    ]
    if len(lines) > LONGEST_SANITY_CHECK:
        half = LONGEST_SANITY_CHECK // 2
        lines[half:-half] = [f"{'…':>20}  ({len(lines) - 2 * half} tokens are not shown)"]
    return "\n".join(["sanity check: the first row (-100: no loss)", *lines])


def _show_texts(tokenizer: Any, row: dict[str, Sequence[int]], what: str, parts: dict[str, str]) -> str:
    lines = [f"  {name:<10}{tokenizer.decode(row[key], skip_special_tokens=False)!r}" for name, key in parts.items()]
    return "\n".join([f"sanity check: {what}", *lines])


def _name(value: Any) -> str:
    return str(getattr(value, "value", value))
