"""The plan of a run in words: a table, one line for a run's start, and JSON. See `plan_memory.py`."""

from typing import Any

from finetune_chatmodel_demo.training.memory import GIB
from finetune_chatmodel_demo.training.parameter_counts import count_parameters
from finetune_chatmodel_demo.training.remedies import find_faster_policy, find_remedies
from finetune_chatmodel_demo.training.run_plan import RunPlan

GB = 10**9


def describe_plan(plan: RunPlan, limit: float | None = None) -> str:
    """The whole plan.

    Args:
        plan: from `make_plan`.
        limit: usable bytes of each GPU.
    """
    shape, memory = plan.shape, plan.memory
    place = f"each of {shape.gpus} GPUs" if shape.gpus > 1 else "the GPU" if shape.is_cuda else "the process"
    packed = f", {shape.segments} conversations in it" if shape.segments else ""
    lines = [
        f"{shape.method}: {shape.trained:,} of {sum(count_parameters(shape.config).values()):,} parameters; batches of "
        f"{shape.rows} × {shape.tokens} tokens{packed}, {shape.supervised} of them supervised",
        f"memory of {place} at its peak (the {memory.moment}):" if shape.is_cuda else "memory at its peak:",
        *(f"  {name:<24}{_size(size)}" for name, size in memory.parts.items()),
        f"  {'total':<24}{_size(memory.total)}",
    ]
    if limit is not None:
        lines += _describe_fit(plan, limit)
    lines += [
        f"host memory{'':<15}{_size(plan.host)}",
        f"a checkpoint{'':<14}{_size(plan.checkpoint)}",
        f"checkpoints and result{'':<4}{_size(plan.disk)}",
        f"a step{'':<20}{plan.rows_per_step:>8} rows",
    ]
    if plan.steps is not None:
        epochs = "" if plan.epochs is None else f" = {plan.epochs:.2f} epochs"
        lines.append(f"steps{'':<21}{plan.steps:>8}{epochs}")
    return "\n".join(lines)


def _describe_fit(plan: RunPlan, limit: float) -> list[str]:
    if plan.memory.total <= limit:
        lines = [f"  fits: {_size(limit - plan.memory.total).strip()} of {_size(limit).strip()} are left"]
        if faster := find_faster_policy(plan.shape, limit):
            policy, changed = faster
            lines.append(f"  faster: --gradient_checkpointing {policy} fits as well, {_size(changed.total).strip()}")
        return lines
    remedies = find_remedies(plan.shape, limit)
    lines = [f"  does not fit into {_size(limit).strip()}" + ("; change, one after the other:" if remedies else "")]
    if not remedies:
        return [*lines, "  none of the settings makes it fit: more or larger GPUs, or a smaller model"]
    return lines + [f"    {flag}: {_size(changed.total).strip()}" for flag, changed in remedies]


def describe_in_a_line(plan: RunPlan, limit: float | None = None) -> str:
    """`about 14.1 GiB: weights 11.6, activations (full) 0.5, …`; and what to change where it does not fit."""
    memory = plan.memory
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.parts.items() if size >= 0.05 * GIB)
    total = f"{memory.total / GIB:.1f} GiB" if memory.total >= GIB / 10 else f"{memory.total / 2**20:.0f} MiB"
    text = f"about {total}" + (" on each GPU" if plan.shape.gpus > 1 else "") + (f": {parts}" if parts else "")
    return text + f"; a checkpoint {_short(plan.checkpoint)}"


def describe_problem(plan: RunPlan, limit: float) -> str | None:
    """A warning where a run does not fit, with what to change; None where it fits."""
    if plan.memory.total <= limit:
        return None
    changes = "; ".join(f"{flag} ({_short(changed.total)})" for flag, changed in find_remedies(plan.shape, limit))
    return f"the plan needs {_short(plan.memory.total)} of GPU memory, and there are {_short(limit)}: " + (
        changes or "no setting makes it fit"
    )


def plan_as_json(plan: RunPlan, limit: float | None = None) -> dict[str, Any]:
    """All figures; bytes are whole numbers."""
    shape, memory = plan.shape, plan.memory
    report: dict[str, Any] = {
        "method": shape.method,
        "parameters": sum(count_parameters(shape.config).values()),
        "trained_parameters": shape.trained,
        "batch": {"rows": shape.rows, "tokens": shape.tokens, "supervised": shape.supervised, "gpus": shape.gpus},
        "bytes_per_gpu": {name: round(size) for name, size in memory.parts.items()},
        "total_bytes_per_gpu": round(memory.total),
        "total_gib_per_gpu": round(memory.total / GIB, 3),
        "total_gb_per_gpu": round(memory.total / GB, 3),
        "peak": memory.moment,
        "moments": {name: round(size) for name, size in memory.moments.items()},
        "host_bytes": round(plan.host),
        "checkpoint_bytes": round(plan.checkpoint),
        "disk_bytes": round(plan.disk),
        "rows_per_step": plan.rows_per_step,
        "steps": plan.steps,
        "epochs": plan.epochs,
    }
    if limit is not None:
        report["usable_bytes_per_gpu"] = round(limit)
        report["fits"] = memory.total <= limit
        report["remedies"] = [
            {"change": flag, "total_bytes_per_gpu": round(changed.total)}
            for flag, changed in find_remedies(shape, limit)
        ]
        faster = find_faster_policy(shape, limit) if report["fits"] else None
        report["faster"] = faster and {
            "gradient_checkpointing": faster[0],
            "total_bytes_per_gpu": round(faster[1].total),
        }
    return report


def _size(size: float) -> str:
    if size < GIB / 10:
        return f"{size / 2**20:8.1f} MiB{size / 10**6:8.1f} MB"
    return f"{size / GIB:8.2f} GiB{size / GB:8.2f} GB"


def _short(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
