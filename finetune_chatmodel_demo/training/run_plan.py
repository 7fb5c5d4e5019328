"""What a run will need: memory of each GPU and of the host, disk, steps; and what to change where it does not fit.

Neither data nor weights are read: a folder with config.json is enough, or the word `6b`. See `plan_memory.py --help`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.kernels import POLICIES
from finetune_chatmodel_demo.chatglm3.model_folder import read_model_config
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL
from finetune_chatmodel_demo.training.arguments import FREEZE, FULL, LORA, P_TUNING
from finetune_chatmodel_demo.training.checks import check_counts
from finetune_chatmodel_demo.training.deciding import read_settings
from finetune_chatmodel_demo.training.memory import GIB, MASTER, MOMENTS, MemoryPlan, Step, build_model, plan_memory
from finetune_chatmodel_demo.training.settings import Settings, choose_policy, choose_precision
from finetune_chatmodel_demo.training.zero import read_zero

OFFICIAL_6B = "6b"
GB = 10**9
# GB on the cards' boxes; manufacturers count these in GiB.
GPUS = {
    "T4": 16, "V100-16GB": 16, "V100-32GB": 32, "L4": 24, "A10": 24, "A30": 24, "RTX 3060": 12, "RTX 3080": 10,
    "RTX 3090": 24, "RTX 4060": 8, "RTX 4070": 12, "RTX 4080": 16, "RTX 4090": 24, "RTX 5080": 16, "RTX 5090": 32,
    "A6000": 48, "L40": 48, "L40S": 48, "A40": 48, "A100-40GB": 40, "A100-80GB": 80, "A800-80GB": 80, "H100": 80,
    "H800": 80, "H20": 96, "H200": 141,
}  # fmt: skip
# The driver keeps some: torch sees 23.6 of an RTX 4090's 24 GiB, 79.2 of an A100's 80.
USABLE_SHARE = 0.98
# A run that fits should not be talked into one that may not: the plan is held to 10% of what is allocated.
PLAN_MARGIN = 1.1
# Bytes of state that an optimizer keeps for a parameter; others: Adam's.
OPTIMIZER_BYTES = {
    "sgd": 0, "adafactor": 0.1, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 0, "paged_adamw_32bit": 0,
    "lion_8bit": 1, "lion_32bit": 4,
}  # fmt: skip
# Python with torch, transformers and CUDA's libraries, in each process.
PROCESS_BYTES = 3 * GIB
# Of rows and tokens of stages that do not train on one sequence a row: pairs are two.
SEQUENCES = {"rm": 2, "dpo": 2}
PACKED_TOKENS = 150  # of a conversation in a packed row whose data are not known
SAMPLED_ROWS = 200


@dataclass(frozen=True)
class RunPlan:
    """A plan, and what is not a GPU's memory.

    Attributes:
        step: what the plan was made from.
        memory: the peak of each GPU.
        host: bytes of the machine's memory while the model is loaded, all processes of it together.
        checkpoint, disk: bytes of one checkpoint, and of all that are kept with the result.
        rows_per_step: of all GPUs.
        steps, epochs: None where the number of rows is not known.
    """

    step: Step
    memory: MemoryPlan
    host: float
    checkpoint: float
    disk: float
    rows_per_step: int
    steps: int | None
    epochs: float | None


def make_plan(
    given: dict[str, Any],
    *,
    gpus: int = 1,
    rows: int | None = None,
    tokens: int | None = None,
    supervised: int | None = None,
    segments: int | None = None,
    is_cuda: bool = True,
    precision: str | None = None,
) -> RunPlan:
    """The plan of a run.

    Args:
        given: flags, from `command_line.parse_given`.
        gpus: processes.
        rows: of an epoch.
        tokens, supervised: of the longest row; default: --max_seq_length for both.
        segments: conversations in a packed row; default with --packing: rows of 150 tokens.
        is_cuda: whether it runs on a GPU.
        precision: bfloat16, float16 or float32; default: by --bf16 and --fp16, bfloat16 on a GPU.

    Raises:
        UserError: for a model or a DeepSpeed configuration that cannot be read, or a stage without a plan.
    """
    check_counts(given)
    settings = read_settings(given)
    if settings.stage.stage == "ppo":
        raise UserError(
            "there is no plan for stage ppo: the answers that it writes, its reward model and its reference decide its "
            "memory; start with the plan of --stage sft and add the weights of both models"
        )
    value = {item.name: item.default for item in fields(TrainingArguments)} | given
    config = read_config(settings.model.model_name_or_path)
    batch = int(value["per_device_train_batch_size"]) * SEQUENCES.get(settings.stage.stage, 1)
    longest = int(tokens or settings.data.max_seq_length)
    counted = 0 if settings.stage.stage == "rm" else batch * int(longest if supervised is None else supervised)
    shape = {"rows": batch, "tokens": longest}
    if settings.data.packing:
        segments = batch * max(1, longest // PACKED_TOKENS) if segments is None else segments
        shape = {"rows": 1, "tokens": batch * longest, "segments": segments}
    step = Step(
        config=config,
        settings=settings,
        supervised=counted,
        precision=precision or choose_precision(given, is_cuda),
        policy=choose_policy(given, is_cuda),
        quantization_bit=settings.model.quantization_bit,
        accumulates=int(value["gradient_accumulation_steps"]) > 1,
        optimizer_bytes=OPTIMIZER_BYTES.get(str(given.get("optim", "")), MOMENTS),
        zero=_read_zero(given.get("deepspeed"), config, settings),
        gpus=gpus,
        is_cuda=is_cuda,
        **shape,
    )
    memory = plan_memory(step)
    per_step = int(value["per_device_train_batch_size"]) * int(value["gradient_accumulation_steps"]) * gpus
    steps = int(value["max_steps"])
    if steps <= 0:
        steps = None if rows is None else max(1, round(float(value["num_train_epochs"]) * -(-rows // per_step)))
    checkpoint = _checkpoint_bytes(step, memory)
    kept = _count_kept(value["save_total_limit"], steps, float(value["save_steps"]))
    return RunPlan(
        step=step,
        memory=memory,
        host=_host_bytes(step, memory),
        checkpoint=checkpoint,
        disk=checkpoint * kept + _result_bytes(step, memory),
        rows_per_step=per_step,
        steps=steps,
        epochs=None if rows is None or steps is None else steps * per_step / rows,
    )


def plan_settings(settings: Settings, rows: Any) -> RunPlan:
    """The plan of a decided run, for its longest row.

    That of rm and dpo is rough: pairs count as two rows, a reference model does not.

    Args:
        settings: the decided run.
        rows: what is trained on; of a stream nothing is known, and --max_seq_length counts.

    Raises:
        UserError: where there is no plan: for stage ppo, whose rollouts decide, and for a model of the hub.
    """
    args = settings.training
    given = {
        **settings.given,
        "finetuning_type": settings.method,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "deepspeed": args.deepspeed,
        "optim": str(getattr(args.optim, "value", args.optim)),
    }
    if settings.method == P_TUNING and settings.checkpoint:
        given["ptuning_checkpoint"] = str(settings.checkpoint)
    facts = _measure_rows(rows, settings) if hasattr(rows, "lengths") and len(rows) else {}
    return make_plan(
        given, gpus=args.world_size, is_cuda=args.device.type == "cuda", precision=settings.precision, **facts
    )


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


def _read_zero(deepspeed: object, config: ChatGLM3Config, settings: Settings) -> Any:
    if not deepspeed:
        return None
    with torch.device("meta"):
        model = build_model(Step(config, settings, rows=1, tokens=1, supervised=1))
    return read_zero(deepspeed, config.hidden_size, sum(parameter.numel() for parameter in model.parameters()))


def read_config(path: str | None) -> ChatGLM3Config:
    """The configuration of a model folder, or of ChatGLM3-6B for the word `6b`.

    Raises:
        UserError: for a folder without a readable config.json.
    """
    if str(path).lower() == OFFICIAL_6B:
        return ChatGLM3Config()
    if not path or not (Path(path) / "config.json").is_file():
        raise UserError(
            f"--model_name_or_path {path or '(missing)'} is not a folder with a config.json; the plan needs only that "
            "file, or the word 6b for ChatGLM3-6B"
        )
    return read_model_config(path)


def _count_kept(limit: Any, steps: int | None, save_steps: float) -> int:
    """Checkpoints that are there at the same time: those that are kept and the one that is being written."""
    written = None
    if steps:
        written = max(1, int(1 / save_steps) if save_steps < 1 else int(steps // save_steps))
    if limit is None:
        return written or 1
    return min(int(limit) + 1, written) if written else int(limit) + 1


def _host_bytes(step: Step, memory: MemoryPlan) -> float:
    """The machine's memory: each process, what it loads (with ZeRO-3 its part), and what is offloaded."""
    loaded = memory.weights if step.zero and step.zero.stage == 3 else memory.weights * step.gpus
    host = PROCESS_BYTES * step.gpus + loaded
    if step.zero and step.zero.offloads_optimizer:
        host += (step.optimizer_bytes + MASTER + 4) * memory.trained  # its state, and float32 gradients
    return host


def _result_bytes(step: Step, memory: MemoryPlan) -> float:
    """What the run leaves: what was trained (a prefix in two forms), or the whole model."""
    if step.method in (P_TUNING, LORA):
        return 4.0 * memory.trained * (2 if step.method == P_TUNING else 1)
    number = 4 if step.precision == "float32" or (step.method == FULL and not step.zero) else 2
    extra = 4.0 * memory.trained if step.method == FREEZE and number < 4 else 0.0
    return number * memory.parameters + extra


def _checkpoint_bytes(step: Step, memory: MemoryPlan) -> float:
    """A result with the optimizer's state; DeepSpeed adds its float32 copy, and what is trained once more."""
    size = _result_bytes(step, memory) + step.optimizer_bytes * memory.trained
    return size + (MASTER + 2) * memory.trained if step.zero else size


def read_gpu_memory(text: str) -> float:
    """Bytes that a run can use of a GPU: `24`, `24GB`, or the name of a card.

    Raises:
        UserError: for an unknown name.
    """

    def plain(name: str) -> str:
        return re.sub(r"nvidia|geforce|tesla|[\s_-]", "", name.lower())

    for name, size in GPUS.items():
        if plain(text) in (plain(name), plain(name).removeprefix("rtx")):
            return size * GIB * USABLE_SHARE
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:gi?b?)?\s*", text, re.IGNORECASE)
    if found and float(found[1]) > 0:
        return float(found[1]) * GIB * USABLE_SHARE
    raise UserError(f"--gpu_memory {text!r} is neither a number of GB nor one of {', '.join(GPUS)}")


def find_remedies(plan: RunPlan, limit: float) -> list[tuple[str, MemoryPlan]]:
    """What to change, one after the other, until a run fits; empty: it fits, or nothing helps.

    Args:
        plan: of the run.
        limit: bytes of one GPU.

    Returns:
        Flag → the plan with it and those before it. A later value of the same flag takes the earlier one's place.
    """
    found: list[tuple[str, MemoryPlan]] = []
    step, memory = plan.step, plan.memory
    for flag, change in _changes(step):
        if memory.total <= limit:
            break
        changed = plan_memory(change(step))
        if changed.total < memory.total:
            step, memory = change(step), changed
            if found and found[-1][0].split()[0] == flag.split()[0]:
                found.pop()
            found.append((flag, changed))
    return found if memory.total <= limit else []


def find_faster_policy(plan: RunPlan, limit: float) -> tuple[str, MemoryPlan] | None:
    """The checkpointing policy that recomputes least and still fits with room to spare, where it is not the run's own.

    Args:
        plan: of a run that fits.
        limit: bytes of one GPU.
    """
    for policy in POLICIES[: POLICIES.index(plan.step.policy)]:
        changed = plan_memory(replace(plan.step, policy=policy))
        if changed.total * PLAN_MARGIN <= limit:
            return policy, changed
    return None


def _changes(step: Step) -> list[tuple[str, Callable[[Step], Step]]]:
    changes: list[tuple[str, Callable[[Step], Step]]] = []
    for policy in ("mlp", "full")[step.policy != "none" :]:
        changes.append((f"--gradient_checkpointing {policy}", lambda s, policy=policy: replace(s, policy=policy)))
    if step.rows > 1:
        flag = f"--per_device_train_batch_size 1, with {step.rows} times as many --gradient_accumulation_steps"
        counted = -(-step.supervised // step.rows)
        changes.append((flag, lambda s: replace(s, rows=1, supervised=counted, accumulates=True)))
    if step.method in (P_TUNING, LORA):
        changes.append(("--quantization_bit 4", lambda s: replace(s, quantization_bit=4)))
    else:
        configs, folder = Path(__file__).resolve().parents[1] / "configs", "finetune_chatmodel_demo/configs"
        for name in ("ds_zero3", "ds_zero3_offload"):
            zero = _read_zero(str(configs / f"{name}.json"), step.config, step.settings)
            flag = f"--deepspeed {folder}/{name}.json"
            changes.append((flag, lambda s, zero=zero: replace(s, zero=zero, precision="bfloat16")))
    half = step.tokens // 2
    shorter = lambda s: replace(s, tokens=half, supervised=max(1, s.supervised // 2))  # noqa: E731
    return [*changes, (f"--max_seq_length {half}", shorter)]


def describe_plan(plan: RunPlan, limit: float | None = None) -> str:
    """The whole plan in words.

    Args:
        plan: from `make_plan`.
        limit: usable bytes of each GPU.
    """
    step, memory = plan.step, plan.memory
    place = f"each of {step.gpus} GPUs" if step.gpus > 1 else "the GPU" if step.is_cuda else "the process"
    packed = f", {step.segments} conversations in it" if step.segments else ""
    lines = [
        f"{step.method}: {memory.trained:,} of {memory.parameters:,} parameters; batches of {step.rows} × "
        f"{step.tokens} tokens{packed}, {step.supervised} of them supervised",
        f"memory of {place} at its peak (the {memory.moment}):" if step.is_cuda else "memory at its peak:",
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
        if faster := find_faster_policy(plan, limit):
            policy, changed = faster
            lines.append(f"  faster: --gradient_checkpointing {policy} fits as well, {_size(changed.total).strip()}")
        return lines
    remedies = find_remedies(plan, limit)
    lines = [f"  does not fit into {_size(limit).strip()}" + ("; change, one after the other:" if remedies else "")]
    if not remedies:
        return [*lines, "  none of the settings makes it fit: more or larger GPUs, or a smaller model"]
    return lines + [f"    {flag}: {_size(changed.total).strip()}" for flag, changed in remedies]


def plan_as_json(plan: RunPlan, limit: float | None = None) -> dict[str, Any]:
    """All figures; bytes are whole numbers."""
    step, memory = plan.step, plan.memory
    report: dict[str, Any] = {
        "method": step.method,
        "parameters": memory.parameters,
        "trained_parameters": memory.trained,
        "batch": {"rows": step.rows, "tokens": step.tokens, "supervised": step.supervised, "gpus": step.gpus},
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
        fits = memory.total <= limit
        faster = find_faster_policy(plan, limit) if fits else None
        report |= {
            "usable_bytes_per_gpu": round(limit),
            "fits": fits,
            "remedies": [
                {"change": flag, "total_bytes_per_gpu": round(changed.total)}
                for flag, changed in find_remedies(plan, limit)
            ],
            "faster": faster and {"gradient_checkpointing": faster[0], "total_bytes_per_gpu": round(faster[1].total)},
        }
    return report


def _size(size: float) -> str:
    if size < GIB / 10:
        return f"{size / 2**20:8.1f} MiB{size / 10**6:8.1f} MB"
    return f"{size / GIB:8.2f} GiB{size / GB:8.2f} GB"
