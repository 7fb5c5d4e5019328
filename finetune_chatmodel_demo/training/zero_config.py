"""What a DeepSpeed configuration says, read before anything is loaded.

finetune.py --deepspeed finetune_chatmodel_demo/configs/ds_zero3.json ...
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training.parameter_counts import count_parameters
from finetune_chatmodel_demo.training.run_shape import Zero

# DeepSpeed's own defaults, in numbers (https://www.deepspeed.ai/docs/config-json/).
ZERO_BUCKET, ZERO_LIVE = 5e8, 1e9
# Seconds. One of its extensions took two minutes on two busy cores.
LONGEST_BUILD = 900


def read_stage(config: object) -> int:
    """The stage of a DeepSpeed configuration, 0 to 3; `config` and errors as of `read_zero`."""
    return int(_read_section(config).get("stage", 0))


def read_zero(config: object, model: ChatGLM3Config) -> Zero | None:
    """What of a DeepSpeed configuration decides memory; None: nothing is shared out.

    Args:
        config: what --deepspeed is given: a file, JSON, a mapping, or nothing.
        model: its sizes stand for "auto".

    Raises:
        UserError: for a configuration that is no JSON object.
    """
    if not config:
        return None
    zero = _read_section(config)
    stage = int(zero.get("stage", 0))
    if stage == 0:
        return None
    reduce = _number(zero.get("reduce_bucket_size"), model.hidden_size**2, ZERO_BUCKET)
    buffers = reduce * 2 * (2 if zero.get("overlap_comm") else 1)
    if stage == 3:
        everything = sum(count_parameters(model).values())
        live = _number(zero.get("stage3_max_live_parameters"), ZERO_LIVE, ZERO_LIVE)
        prefetch = _number(zero.get("stage3_prefetch_bucket_size"), 0.9 * model.hidden_size**2, ZERO_BUCKET)
        buffers += 2 * min(live + prefetch, everything)
    else:
        buffers += 2 * _number(zero.get("allgather_bucket_size"), ZERO_BUCKET, ZERO_BUCKET)
    return Zero(
        stage=stage,
        offloads_optimizer=_is_offloaded(zero.get("offload_optimizer")),
        offloads_weights=stage == 3 and _is_offloaded(zero.get("offload_param")),
        buffer_bytes=float(buffers),
    )


def _number(value: Any, automatic: float, default: float) -> float:
    return default if value is None else automatic if value == "auto" else float(value)


def _is_offloaded(section: Any) -> bool:
    return isinstance(section, dict) and section.get("device", "none") != "none"


def find_stale_locks() -> list[Path]:
    """Locks of builds that were killed: DeepSpeed would wait for them to end, without a word and forever.

    It builds small extensions at first, through torch.utils.cpp_extension.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    return sorted(lock for lock in locks if time.time() - lock.stat().st_mtime > LONGEST_BUILD)


def _read_section(config: object) -> dict[str, Any]:
    try:
        values: Any = config
        if not isinstance(config, dict):
            text = str(config).strip()
            values = json.loads(text if text.startswith("{") else Path(text).read_text(encoding="utf-8"))
        section = dict(values.get("zero_optimization") or {})
        int(section.get("stage", 0))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"--deepspeed {config} is not a DeepSpeed configuration ({error})") from error
    return section
