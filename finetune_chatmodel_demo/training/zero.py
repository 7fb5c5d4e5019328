"""DeepSpeed ZeRO: what its stages share out among the processes, and what a run with it has to do differently.

ZeRO-2   gradients and the optimizer's state are shared out, every process holds all weights
ZeRO-3   the weights are shared out as well, from the moment they are loaded
"""

import contextlib
import enum
import importlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from finetune_chatmodel_demo.common.errors import UserError

# Beside DeepSpeed's files in a checkpoint, while a run with another number of processes takes it up.
UNIVERSAL, LATEST_UNIVERSAL = "universal", "latest_universal"
# What DeepSpeed's files hold beside tensors, numbers and texts: classes of settings and of loss scales.
HARMLESS = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
# Seconds. One of its extensions took two minutes on two busy cores.
LONGEST_BUILD = 900

logger = logging.getLogger(__name__)


def connect() -> None:
    """Lets DeepSpeed use the connection between the processes that torch has.

    On GPUs accelerate does it with the settings; on the CPU nobody does, and ZeRO-3 would take each process for the
    only one while it loads the weights.
    """
    import deepspeed

    if os.environ.get("LOCAL_RANK", "0") == "0":
        remove_stale_locks()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed()


def remove_stale_locks() -> None:
    """Removes locks of builds that were killed: DeepSpeed would wait for them to end, without a word and forever.

    It builds small extensions at first, through torch.utils.cpp_extension, whose lock is a file that the builder holds
    open. One that no process here holds is left over; where several nodes may share the folder, after 15 minutes.

    Raises:
        UserError: when such a lock cannot be removed.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    is_alone = os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1")
    held = None
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        held = _list_open_files() if held is None else held
        if str(lock.resolve()) in held or not (is_alone or time.time() - lock.stat().st_mtime > LONGEST_BUILD):
            continue
        try:
            lock.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{lock} is left of a build that was killed, and DeepSpeed would wait for it forever; it cannot be "
                f"removed ({error}): remove it, or name another folder in TORCH_EXTENSIONS_DIR"
            ) from error
        logger.warning("removed %s: no process holds it, it is left of a build that was killed", lock)


def _list_open_files() -> set[str]:
    """What the processes of this machine hold open, as far as it may be seen."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(link))
    return found


def leave_out_frozen(engine: Any) -> None:
    """Keeps frozen weights out of DeepSpeed's part of a checkpoint: the base model has them.

    transformers does so for adapters alone. Without it, each checkpoint of a prefix on the 6B model has 12 GB.

    Args:
        engine: DeepSpeed's, of a model of which a part is trained.
    """
    load = engine.load_checkpoint

    def load_trained_part(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**kwargs, "load_module_strict": False})

    engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
    engine.load_checkpoint = load_trained_part


def gather_parameters(model: nn.Module, *, only_trained: bool = False) -> dict[str, torch.Tensor]:
    """The state of a model whose parameters are spread over processes, one after the other; {} but in the first.

    Args:
        model: loaded under ZeRO-3; all processes call this.
        only_trained: leaves frozen parameters out.
    """
    import deepspeed

    state = {}
    is_first = torch.distributed.get_rank() == 0
    for name, parameter in model.named_parameters():
        if only_trained and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            if is_first:
                state[name] = parameter.detach().cpu().clone()
    return state


def _member_of(kind: Any, name: Any) -> Any:
    """Stands for `getattr` while a pickle is checked: members of an enumeration, and nothing else.

    Raises:
        TypeError: it would be another attribute.
    """
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise TypeError(f"GLOBAL builtins.getattr of {kind}")
    return kind.__members__[name]


def check_pickles(checkpoint: Path, is_trusted: bool = False) -> None:
    """Refuses a checkpoint whose DeepSpeed files hold anything but data, before DeepSpeed, which runs it, opens them.

    Args:
        checkpoint: a folder with `latest`, which names the folder of DeepSpeed's files in it.
        is_trusted: the user says that he made it himself (--trust_checkpoint).

    Raises:
        UserError: names the file and what it would call.
    """
    if is_trusted:
        return
    for name in ("latest", LATEST_UNIVERSAL):
        tag = (checkpoint / name).read_text(encoding="utf-8").strip() if (checkpoint / name).is_file() else ""
        if Path(tag).is_absolute() or ".." in Path(tag).parts:
            raise UserError(f"{checkpoint / name} leads out of the checkpoint, to {tag!r}; it is not read")
    # Python 3.11.0 to 3.11.3 pickles a member of an enumeration as a call of getattr.
    known: list[Any] = [(_member_of, "builtins.getattr")]
    for module, names in HARMLESS.items():
        with contextlib.suppress(ImportError, AttributeError):  # versions of DeepSpeed differ
            known += [getattr(importlib.import_module(module), each) for each in names]
    # What lies beside these folders is read by transformers, as data.
    for path in sorted(path for path in checkpoint.glob("*/**/*") if path.is_file()):
        try:
            with torch.serialization.safe_globals(known):
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = found[1] if found else "it cannot be read as data"
            raise UserError(
                f"{path} holds more than data ({reason}), which DeepSpeed would run; take another checkpoint, or add "
                "--trust_checkpoint True if you made this one yourself"
            ) from None


class _FinishUniversal(TrainerCallback):
    """Removes the converted checkpoint as soon as all processes have read it, and corrects what they read.

    DeepSpeed 0.19 gives all groups of parameters one and the same counter of steps, which then counts each step once
    for each group, and Adam's bias correction with it.
    """

    def __init__(self, trainer: Any, checkpoint: Path) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self.trainer.deepspeed.optimizer.optimizer
        for values in optimizer.state.values():
            if torch.is_tensor(values.get("step")):
                values["step"] = values["step"].clone()
        self.trainer.accelerator.wait_for_everyone()
        if args.should_save:
            _remove_universal(self.checkpoint)


def _remove_universal(checkpoint: Path) -> None:
    (checkpoint / LATEST_UNIVERSAL).unlink(missing_ok=True)
    shutil.rmtree(checkpoint / UNIVERSAL, ignore_errors=True)


def take_up_other_processes(trainer: Any, checkpoint: Path, before: int) -> None:
    """Prepares a checkpoint's DeepSpeed state, one part for each process, for another number of processes.

    DeepSpeed's universal checkpoint is made in the checkpoint's folder, and removed when it has been read. All
    processes call this, before the training.

    Args:
        trainer: of the run that begins.
        checkpoint: a whole checkpoint.
        before: how many processes wrote it.

    Raises:
        UserError: when DeepSpeed cannot convert it.
    """
    if trainer.args.weight_decay:
        raise UserError(
            f"{checkpoint} was written by {before} processes: with --weight_decay, DeepSpeed's universal checkpoint "
            f"would decay biases and norms as well; continue with {before} processes"
        )
    if trainer.args.should_save:
        _convert(checkpoint, before)
    trainer.accelerator.wait_for_everyone()
    plugin = trainer.accelerator.state.deepspeed_plugin
    for config in (plugin.hf_ds_config.config, plugin.deepspeed_config):
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    trainer.add_callback(_FinishUniversal(trainer, checkpoint))


def _convert(checkpoint: Path, before: int) -> None:
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    _remove_universal(checkpoint)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(checkpoint / tag), "--output_folder", str(checkpoint / UNIVERSAL)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        _remove_universal(checkpoint)
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"{checkpoint} was written by {before} processes, and DeepSpeed cannot convert it for another number "
            f"({reason}); continue with {before} processes"
        )
    (checkpoint / LATEST_UNIVERSAL).write_text(UNIVERSAL, encoding="utf-8")


# DeepSpeed's own defaults, in numbers (https://www.deepspeed.ai/docs/config-json/).
ZERO_BUCKET, ZERO_LIVE = 5e8, 1e9


def read_stage(config: object) -> int:
    """The stage of a DeepSpeed configuration, 0 to 3; `config` and errors as of `read_zero`."""
    return int(_read_section(config).get("stage", 0))


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed configuration decides memory.

    Attributes:
        stage: 1, 2 or 3.
        offloads_optimizer, offloads_weights: to the host's memory.
        buffer_bytes: of the buckets in which gradients are reduced and weights are gathered.
    """

    stage: int
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    buffer_bytes: float = 0.0


def read_zero(config: object, hidden_size: int, parameters: int) -> Zero | None:
    """What of a DeepSpeed configuration decides memory; None: nothing is shared out.

    Args:
        config: what --deepspeed is given: a file, JSON, a mapping, or nothing.
        hidden_size: of the model, for "auto".
        parameters: of the model, more than which are never gathered.

    Raises:
        UserError: for a configuration that is no JSON object.
    """
    if not config:
        return None
    zero = _read_section(config)
    stage = int(zero.get("stage", 0))
    if stage == 0:
        return None
    reduce = _number(zero.get("reduce_bucket_size"), hidden_size**2, ZERO_BUCKET)
    buffers = reduce * 2 * (2 if zero.get("overlap_comm") else 1)
    if stage == 3:
        live = _number(zero.get("stage3_max_live_parameters"), ZERO_LIVE, ZERO_LIVE)
        prefetch = _number(zero.get("stage3_prefetch_bucket_size"), 0.9 * hidden_size**2, ZERO_BUCKET)
        buffers += 2 * min(live + prefetch, parameters)
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
