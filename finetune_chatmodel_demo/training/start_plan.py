"""The memory plan of a decided run, from its real rows: the line "memory" of a start, and --dry_run.

Exercise it with `pytest tests/test_plan_memory.py`.
"""

from typing import Any

import torch

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL
from finetune_chatmodel_demo.training.plan_report import describe_in_a_line, describe_plan, describe_problem
from finetune_chatmodel_demo.training.run_plan import RunPlan, make_plan
from finetune_chatmodel_demo.training.settings import Settings

SAMPLED_ROWS = 200


def plan_settings(settings: Settings, rows: Any) -> RunPlan | None:
    """The plan of a run, for its longest row.

    Args:
        settings: the decided run.
        rows: what is trained on, map-style; of a stream nothing is known, and --max_seq_length counts.

    Returns:
        None where there is no plan: for stage ppo, whose rollouts decide, and for a model of the hub. That of rm and
        dpo is rough: pairs count as two rows, a reference model does not.
    """
    args = settings.training
    given = {
        **settings.given,
        "finetuning_type": settings.method,
        "ptuning_checkpoint": settings.checkpoint or settings.model.ptuning_checkpoint,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_checkpointing": "mlp" if settings.recomputes_mlp_only else uses_checkpointing(args),
        "deepspeed": args.deepspeed,
        "optim": str(getattr(args.optim, "value", args.optim)),
    }
    rows = getattr(rows, "rows", rows)  # as a trainer numbers them
    rows = rows.rows if hasattr(rows, "groups") else rows
    facts = _measure_rows(rows, settings) if hasattr(rows, "lengths") and len(rows) else {}
    try:
        return make_plan(
            given,
            gpus=args.world_size,
            is_cuda=args.device.type == "cuda",
            precision=settings.precision,
            **facts,
        )
    except UserError:
        return None


def _measure_rows(rows: Any, settings: Settings) -> dict[str, int]:
    """`rows`, `tokens`, `supervised` and `segments` of `make_plan`."""
    lengths = rows.lengths
    facts = {"rows": len(lengths)}
    if settings.data.packing:
        tokens = settings.data.max_seq_length
        sample = range(0, len(lengths), max(1, len(lengths) // SAMPLED_ROWS))
        share = sum(_measure_row(rows[i])[1] for i in sample) / max(1, sum(lengths[i] for i in sample))
        batch = tokens * settings.training.per_device_train_batch_size
        segments = max(1, round(batch * len(lengths) / max(1, sum(lengths))))
        return {**facts, "tokens": tokens, "supervised": round(share * tokens), "segments": segments}
    tokens, supervised = _measure_row(rows[max(range(len(lengths)), key=lambda i: lengths[i])])
    return {**facts, "tokens": tokens, "supervised": supervised}


def _measure_row(row: dict[str, Any]) -> tuple[int, int]:
    """Tokens and supervised tokens of one sequence; of a pair, those of its longer reply."""
    if "chosen_ids" in row:
        reply = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        return len(row["prompt_ids"]) + reply, reply
    return len(row["input_ids"]), sum(label != IGNORED_LABEL for label in row["labels"][1:])


def uses_checkpointing(args: Any) -> bool:
    """Whether activations are recomputed; transformers 5.23 renamed the setting."""
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


def warn_of_memory(settings: Settings, rows: Any) -> list[str]:
    """A notice where the GPU is too small for the plan."""
    device = settings.training.device
    plan = plan_settings(settings, rows) if device.type == "cuda" else None
    if plan is None:
        return []
    problem = describe_problem(plan, torch.cuda.get_device_properties(device).total_memory)
    return [problem] if problem else []


def describe_dry_run(settings: Settings, rows: Any) -> str:
    """What --dry_run says behind the table of the data."""
    plan = plan_settings(settings, rows)
    if plan is None:
        return f"the plan: there is none for stage {settings.stage.stage} of {settings.model.model_name_or_path}"
    device = settings.training.device
    limit = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return f"the plan: {describe_in_a_line(plan)}\n{describe_plan(plan, limit)}"
