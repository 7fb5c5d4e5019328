"""DeepSpeed ZeRO: what its stages share out among the processes, and what a run with it has to do differently.

    ZeRO-2   gradients and the optimizer's state are shared out, every process holds all weights
    ZeRO-3   the weights are shared out as well, from the moment they are loaded

Exercise it with `pytest -m slow tests/test_deepspeed.py`.
"""

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from finetune_chatmodel_demo.chatglm3.loading import load_model
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training.arguments import LORA, P_TUNING

if TYPE_CHECKING:
    from finetune_chatmodel_demo.training.run_trainer import RunTrainer
    from finetune_chatmodel_demo.training.settings import Settings

# Beside DeepSpeed's files in a checkpoint, while a run with another number of processes takes it up.
UNIVERSAL, LATEST_UNIVERSAL = "universal", "latest_universal"


def connect() -> None:
    """Lets DeepSpeed use the connection between the processes that torch has.

    On GPUs accelerate does it with the settings; on the CPU nobody does, and ZeRO-3 would take each process for the
    only one while it loads the weights.
    """
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed()


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


def load_shared(model: nn.Module, settings: "Settings", folder: str | Path) -> None:
    """Puts the parameters of a checkpoint into a model whose parameters are spread over processes.

    Args:
        model: from `prepare_model` under ZeRO-3; all processes call this.
        settings: the run.
        folder: what `save_trained` wrote.
    """
    import deepspeed

    from finetune_chatmodel_demo.training.methods import load_trained

    if settings.method in (P_TUNING, LORA):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with deepspeed.zero.GatheredParameters(trained, modifier_rank=0):
            load_trained(model, settings, folder)
        return
    # Loaded now, another model is spread in the same way; parameter by parameter its values are taken over.
    source = dict(load_model(folder, dtype=settings.weights_dtype, device=settings.training.device).named_parameters())
    for name, parameter in model.named_parameters():
        with (
            deepspeed.zero.GatheredParameters([source[name]]),
            deepspeed.zero.GatheredParameters([parameter], modifier_rank=0),
        ):
            parameter.data.copy_(source[name].data)


class _FinishUniversal(TrainerCallback):
    """Removes the converted checkpoint as soon as all processes have read it, and corrects what they read.

    DeepSpeed 0.19 gives all groups of parameters one and the same counter of steps, which then counts each step once
    for each group, and Adam's bias correction with it.
    """

    def __init__(self, trainer: "RunTrainer", checkpoint: Path) -> None:
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


def take_up_other_processes(trainer: "RunTrainer", checkpoint: Path, before: int) -> None:
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
