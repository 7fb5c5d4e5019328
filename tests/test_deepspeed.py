"""DeepSpeed ZeRO-2 and ZeRO-3 on two processes of the CPU, against one process without it; ranks that die; nodes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import flags, losses, make_model, read_log, train, write_conversations

from finetune_chatmodel_demo.chatglm3 import load_model, load_tokenizer
from finetune_chatmodel_demo.training.checkpoints import find_last_checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "finetune_chatmodel_demo" / "configs"
METHODS = {
    "full": {},
    "lora": {"finetuning_type": "lora"},
    # Dropout draws from the random numbers of each process.
    "ptuning": {"pre_seq_len": 4, "prefix_dropout": 0, "learning_rate": 2e-2},
}
WEIGHTS = {
    "full": "model.safetensors",
    "lora": "adapter_model.safetensors",
    "ptuning": "prefix_encoder.safetensors",
}
STAGES = ("zero2", "zero3")
DDP = ("lora", "ptuning")
ROWS_OF_A_STEP = 8
STEPS = 4

pytestmark = pytest.mark.slow


def environment(**knobs: object) -> dict[str, str]:
    """Of processes that shall train on the CPU."""
    knobs = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": 1,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    } | knobs
    return {**os.environ, **{name: str(value) for name, value in knobs.items()}}


def options(processes: int, method: str, zero: str | None = None, **more: object) -> dict[str, object]:
    """Flags of a short run with 8 rows a step, whatever the number of processes."""
    config = {"deepspeed": CONFIGS / f"ds_{zero}.json"} if zero else {}
    return {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ROWS_OF_A_STEP // 2 // processes,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "random",
        "save_steps": 2,
        "max_steps": STEPS,
        "seed": 42,
        "plot_loss": False,
        **config,
        **METHODS[method],
        **more,
    }


def launch(processes: int, commands: list[list[str]], folder: Path) -> str:
    """Runs command lines of finetune.py one after the other with torchrun, and returns what they print."""
    file = folder / "commands.json"
    file.write_text(json.dumps(commands), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*torchrun, str(REPOSITORY / "tests" / "run_several.py"), str(file)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    return run.stdout


class Runs:
    """A model, data, and the runs on them: `one/METHOD`, `ddp/METHOD`, `zero2/METHOD`, `zero3/METHOD`."""

    def __init__(self, folder: Path, tokenizer_folder: Path) -> None:
        self.folder = folder
        self.model = make_model(folder / "model", tokenizer_folder)
        self.data = write_conversations(folder / "train.jsonl")

    def command(self, output: Path, given: dict[str, object]) -> list[str]:
        return flags(self.model, self.data, output, **given)

    def copy_until(self, step: int, run: str, to: str) -> Path:
        """A copy of a run as it was after `step` steps."""
        target = self.folder / to / run
        shutil.copytree(self.folder / run, target, ignore=shutil.ignore_patterns("model.safetensors.tmp"))
        for checkpoint in target.glob("checkpoint-*"):
            if int(checkpoint.name.partition("-")[2]) > step:
                shutil.rmtree(checkpoint)
        for result in ("trainer_state.json", *WEIGHTS.values()):
            (target / result).unlink(missing_ok=True)
        return target

    def trained(self, run: Path | str) -> dict[str, torch.Tensor]:
        folder = self.folder / run
        return load_file(folder / WEIGHTS[folder.name])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder) -> Runs:
    pytest.importorskip("deepspeed")
    runs = Runs(tmp_path_factory.mktemp("deepspeed"), tiny_folder)
    commands = [runs.command(runs.folder / "ddp" / method, options(2, method)) for method in DDP]
    for zero in STAGES:
        commands += [runs.command(runs.folder / zero / method, options(2, method, zero)) for method in METHODS]
    launch(2, commands, runs.folder)
    for method in METHODS:
        assert train(runs.model, runs.data, runs.folder / "one" / method, **options(1, method)) == 0
    return runs


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4)


@pytest.mark.parametrize("run", [*(f"ddp/{method}" for method in DDP), *(f"{z}/{m}" for z in STAGES for m in METHODS)])
def test_losses_and_result_are_those_of_one_process(runs, run):
    one = f"one/{Path(run).name}"
    assert len(losses(runs.folder / run)) == STEPS
    assert losses(runs.folder / run) == pytest.approx(losses(runs.folder / one), rel=1e-4)
    assert_close(runs.trained(run), runs.trained(one))
