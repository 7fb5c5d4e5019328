"""What a run will need, from its flags: memory of each GPU and of the host, disk, steps. See `plan_memory.py --help`.

Neither data nor weights are read: a folder with config.json is enough, or the word `6b`. The formula is in `memory`;
`pytest tests/test_plan_memory.py` exercises this file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.model_folder import read_model_config
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training.arguments import (
    FREEZE,
    FULL,
    LORA,
    P_TUNING,
    MethodArguments,
)
from finetune_chatmodel_demo.training.checks import check_counts
from finetune_chatmodel_demo.training.memory import GIB, MemoryPlan, plan_memory, weight_bytes
from finetune_chatmodel_demo.training.parameter_counts import (
    count_adapter,
    count_frozen_rest,
    count_parameters,
    count_prefix,
)
from finetune_chatmodel_demo.training.run_shape import MASTER, MOMENTS, RunShape
from finetune_chatmodel_demo.training.zero import read_zero

OFFICIAL_6B = "6b"
DEFAULT_PRE_SEQ_LEN = 128
# Bytes of state that an optimizer keeps for a parameter; others: Adam's.
OPTIMIZER_BYTES = {
    "sgd": 0, "adafactor": 0.1, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 0, "paged_adamw_32bit": 0,
    "lion_8bit": 1, "lion_32bit": 4,
}  # fmt: skip
# Python with torch, transformers and CUDA's libraries, in each process.
PROCESS_BYTES = 3 * GIB
# Of rows and tokens of stages that do not train on one sequence a row: pairs are two.
SEQUENCES = {"rm": 2, "dpo": 2}


@dataclass(frozen=True)
class RunPlan:
    """A plan, and what is not a GPU's memory.

    Attributes:
        shape: what the plan was made from.
        memory: the peak of each GPU.
        host: bytes of the machine's memory while the model is loaded, all processes of it together.
        checkpoint, disk: bytes of one checkpoint, and of all that are kept with the result.
        rows_per_step: of all GPUs.
        steps, epochs: None where the number of rows is not known.
    """

    shape: RunShape
    memory: MemoryPlan
    host: float
    checkpoint: float
    disk: float
    rows_per_step: int
    steps: int | None
    epochs: float | None
    save_steps: float


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
    shape = shape_of(
        given,
        gpus=gpus,
        tokens=tokens,
        supervised=supervised,
        segments=segments,
        is_cuda=is_cuda,
        precision=precision,
    )
    per_step = (
        int(given.get("per_device_train_batch_size", 8)) * int(given.get("gradient_accumulation_steps", 1)) * gpus
    )
    steps = int(given.get("max_steps", -1))
    if steps <= 0:
        epochs = float(given.get("num_train_epochs", 3))
        steps = None if rows is None else max(1, round(epochs * -(-rows // per_step)))
    save_steps = float(given.get("save_steps", 500))
    checkpoint = checkpoint_bytes(shape)
    return RunPlan(
        shape=shape,
        memory=plan_memory(shape),
        host=host_bytes(shape),
        checkpoint=checkpoint,
        disk=checkpoint * _count_kept(given, steps, save_steps) + result_bytes(shape),
        rows_per_step=per_step,
        steps=steps,
        epochs=None if rows is None or steps is None else steps * per_step / rows,
        save_steps=save_steps,
    )


def _count_kept(given: dict[str, Any], steps: int | None, save_steps: float) -> int:
    """Checkpoints that are there at the same time: those that are kept and the one that is being written."""
    limit = given.get("save_total_limit")
    written = None
    if steps:
        written = max(1, int(1 / save_steps) if save_steps < 1 else int(steps // save_steps))
    if limit is None:
        return written or 1
    return min(int(limit) + 1, written) if written else int(limit) + 1


def shape_of(
    given: dict[str, Any],
    *,
    gpus: int,
    tokens: int | None,
    supervised: int | None,
    segments: int | None,
    is_cuda: bool,
    precision: str | None,
) -> RunShape:
    """What of the flags decides memory; arguments and errors as of `make_plan`."""
    stage = str(given.get("stage", "sft"))
    if stage == "ppo":
        raise UserError(
            "there is no plan for stage ppo: the answers that it writes, its reward model and its reference decide its "
            "memory; start with the plan of --stage sft and add the weights of both models"
        )
    check_counts(given)
    config = read_config(str(given.get("model_name_or_path") or ""))
    method = str(
        given.get("finetuning_type")
        or (P_TUNING if given.get("pre_seq_len") or given.get("ptuning_checkpoint") else FULL)
    )
    rows = int(given.get("per_device_train_batch_size", 8)) * SEQUENCES.get(stage, 1)
    longest = int(tokens or given.get("max_seq_length", 2048))
    counted = 0 if stage == "rm" else rows * int(longest if supervised is None else supervised)
    prefix = _prefix_length(given) if method == P_TUNING else 0
    if given.get("packing"):
        segments = rows * max(1, longest // 150) if segments is None else segments
        rows, longest = 1, rows * longest
    return RunShape(
        config=config,
        method=method,
        rows=rows,
        tokens=longest,
        supervised=counted,
        trained=count_trained(given, config, method, prefix),
        number_bytes=4 if _precision(given, is_cuda, precision) == "float32" else 2,
        quantization_bit=given.get("quantization_bit"),
        policy=_policy(given, is_cuda),
        pre_seq_len=prefix,
        segments=segments or 0 if given.get("packing") else 0,
        active_layers=_active_layers(given, config) if method == FREEZE else None,
        accumulates=int(given.get("gradient_accumulation_steps", 1)) > 1,
        optimizer_bytes=OPTIMIZER_BYTES.get(str(given.get("optim", "")), MOMENTS),
        zero=read_zero(given.get("deepspeed"), config),
        gpus=gpus,
        is_cuda=is_cuda,
    )


def read_config(path: str) -> ChatGLM3Config:
    """The configuration of a model folder, or of ChatGLM3-6B for the word `6b`.

    Raises:
        UserError: for a folder without a readable config.json.
    """
    if path.lower() == OFFICIAL_6B:
        return ChatGLM3Config()
    if not (Path(path) / "config.json").is_file():
        raise UserError(
            f"--model_name_or_path {path or '(missing)'} is not a folder with a config.json; the plan needs only that "
            "file, or the word 6b for ChatGLM3-6B"
        )
    try:
        return read_model_config(path)
    except (UserError, OSError) as error:
        raise UserError(f"--model_name_or_path: {error}") from error


def _prefix_length(given: dict[str, Any]) -> int:
    checkpoint = given.get("ptuning_checkpoint")
    if given.get("pre_seq_len") is None and checkpoint and (Path(str(checkpoint)) / "config.json").is_file():
        values = json.loads((Path(str(checkpoint)) / "config.json").read_text(encoding="utf-8"))
        return int(values.get("pre_seq_len") or DEFAULT_PRE_SEQ_LEN)
    return int(given.get("pre_seq_len") or DEFAULT_PRE_SEQ_LEN)


def _precision(given: dict[str, Any], is_cuda: bool, precision: str | None) -> str:
    if precision is not None:
        return precision
    if given.get("bf16") or given.get("fp16"):
        return "bfloat16" if given.get("bf16") else "float16"
    is_chosen = "bf16" in given or "fp16" in given
    return "float32" if is_chosen or not is_cuda else "bfloat16"


def _policy(given: dict[str, Any], is_cuda: bool) -> Any:
    wanted = given.get("gradient_checkpointing", given.get("activation_checkpointing"))
    if wanted is None:
        return "full" if is_cuda else "none"
    return wanted if wanted == "mlp" else "full" if wanted else "none"


def _active_layers(given: dict[str, Any], config: ChatGLM3Config) -> int:
    """Layers that the gradient passes: down to the lowest that is trained."""
    count = int(given.get("freeze_trainable_layers", MethodArguments.freeze_trainable_layers))
    reaches_all = any(name in str(given.get("freeze_extra_modules") or "") for name in ("embed", "word_embeddings"))
    return config.num_layers if count < 0 or reaches_all else min(count, config.num_layers)


def count_trained(given: dict[str, Any], config: ChatGLM3Config, method: str, prefix: int) -> int:
    """Trained parameters, the score head of stage rm included."""
    score = config.hidden_size + 1 if given.get("stage") == "rm" else 0
    if method == P_TUNING:
        return count_prefix(config, prefix, bool(given.get("prefix_projection")))
    if method == LORA:
        return score + count_adapter(
            config,
            int(given.get("lora_rank", MethodArguments.lora_rank)),
            str(given.get("lora_target", "all")),
            str(given.get("additional_target") or ""),
            bool(given.get("use_dora")),
        )
    if method == FREEZE:
        return score + count_frozen_rest(
            config,
            int(given.get("freeze_trainable_layers", MethodArguments.freeze_trainable_layers)),
            str(given.get("freeze_trainable_modules", "all")),
            str(given.get("freeze_extra_modules") or ""),
        )
    return score + sum(count_parameters(config).values())


def host_bytes(shape: RunShape) -> float:
    """The machine's memory: each process, what it loads (with ZeRO-3 its part), and what is offloaded."""
    weights = weight_bytes(shape)
    loaded = weights if shape.zero and shape.zero.stage == 3 else weights * shape.gpus
    host = PROCESS_BYTES * shape.gpus + loaded
    if shape.zero and shape.zero.offloads_optimizer:
        host += (shape.optimizer_bytes + MASTER + 4) * shape.trained  # its state, and float32 gradients
    return host


def result_bytes(shape: RunShape) -> float:
    """What the run leaves: what was trained (a prefix in two forms), or the whole model."""
    if shape.method == P_TUNING:
        return 2 * 4.0 * shape.trained
    if shape.method == LORA:
        return 4.0 * shape.trained
    number = 4 if shape.method == FULL and not shape.zero else shape.number_bytes
    extra = 4.0 * shape.trained if shape.method == FREEZE and number < 4 else 0.0
    return number * sum(count_parameters(shape.config).values()) + extra


def checkpoint_bytes(shape: RunShape) -> float:
    """A result with the optimizer's state; DeepSpeed adds its float32 copy, and what is trained once more."""
    size = result_bytes(shape) + shape.optimizer_bytes * shape.trained
    if shape.zero:
        size += (MASTER + 2) * shape.trained
    return size
