"""Whether a run fits a GPU, and what to change where it does not. See `plan_memory.py`."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from finetune_chatmodel_demo.chatglm3.kernels import POLICIES, CheckpointingPolicy
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training.arguments import LORA, P_TUNING
from finetune_chatmodel_demo.training.memory import GIB, MemoryPlan, plan_memory
from finetune_chatmodel_demo.training.run_shape import RunShape
from finetune_chatmodel_demo.training.zero import read_zero

# GB on the cards' boxes; manufacturers count these in GiB.
GPUS = {
    "T4": 16, "V100-16GB": 16, "V100-32GB": 32, "L4": 24, "A10": 24, "A30": 24, "RTX 3060": 12, "RTX 3080": 10,
    "RTX 3090": 24, "RTX 4060": 8, "RTX 4070": 12, "RTX 4080": 16, "RTX 4090": 24, "RTX 5080": 16, "RTX 5090": 32,
    "A6000": 48, "L40": 48, "L40S": 48, "A40": 48, "A100-40GB": 40, "A100-80GB": 80, "A800-80GB": 80, "H100": 80,
    "H800": 80, "H20": 96, "H200": 141,
}  # fmt: skip
# A run that fits should not be talked into one that may not: the plan is held to 10% of what is allocated.
PLAN_MARGIN = 1.1
# The driver keeps some: torch sees 23.6 of an RTX 4090's 24 GiB, 79.2 of an A100's 80.
USABLE_SHARE = 0.98


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


def find_remedies(shape: RunShape, limit: float) -> list[tuple[str, MemoryPlan]]:
    """What to change, one after the other, until a run fits; empty: it fits, or nothing helps.

    Args:
        shape: the run.
        limit: bytes of one GPU.

    Returns:
        Flag → the plan with it and those before it. A later value of the same flag takes the earlier one's place.
    """
    found: list[tuple[str, MemoryPlan]] = []
    for flag, change in _changes(shape):
        total = plan_memory(shape).total
        if total <= limit:
            break
        changed = change(shape)
        plan = plan_memory(changed)
        if plan.total < total:
            shape = changed
            if found and found[-1][0].split()[0] == flag.split()[0]:
                found.pop()
            found.append((flag, plan))
    return found if found and found[-1][1].total <= limit else []


def find_faster_policy(shape: RunShape, limit: float) -> tuple[CheckpointingPolicy, MemoryPlan] | None:
    """The checkpointing policy that recomputes least and still fits with room to spare, where it is not the run's own.

    Args:
        shape: a run that fits.
        limit: bytes of one GPU.
    """
    for policy in POLICIES[: POLICIES.index(shape.policy)]:
        plan = plan_memory(replace(shape, policy=policy))
        if plan.total * PLAN_MARGIN <= limit:
            return policy, plan
    return None


def _changes(shape: RunShape) -> list[tuple[str, Callable[[RunShape], RunShape]]]:
    changes: list[tuple[str, Callable[[RunShape], RunShape]]] = []
    if shape.policy == "none":
        changes.append(("--gradient_checkpointing mlp", lambda s: replace(s, policy="mlp")))
    changes.append(("--gradient_checkpointing full", lambda s: replace(s, policy="full")))
    if shape.rows > 1:
        changes.append(
            (
                f"--per_device_train_batch_size 1, with {shape.rows} times as many --gradient_accumulation_steps",
                lambda s: replace(s, rows=1, supervised=-(-s.supervised // s.rows), accumulates=True),
            )
        )
    if shape.method in (P_TUNING, LORA):
        changes.append(("--quantization_bit 4", lambda s: replace(s, quantization_bit=4)))
    else:
        configs, folder = Path(__file__).resolve().parents[1] / "configs", "finetune_chatmodel_demo/configs"
        for name in ("ds_zero3", "ds_zero3_offload"):
            zero = read_zero(str(configs / f"{name}.json"), shape.config)
            changes.append(
                (f"--deepspeed {folder}/{name}.json", lambda s, zero=zero: replace(s, zero=zero, number_bytes=2))
            )
    half = shape.tokens // 2
    changes.append(
        (f"--max_seq_length {half}", lambda s: replace(s, tokens=half, supervised=max(1, s.supervised // 2)))
    )
    return changes
