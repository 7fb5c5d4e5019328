"""What the tests of training, scripts and DeepSpeed share: a random small model, a data file, a run in this process."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch
from conftest import REPOSITORY
from conversation_helpers import assistant, conversation, user, write_jsonl
from safetensors.torch import load_file

from finetune_chatmodel_demo import finetune
from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM, load_model
from finetune_chatmodel_demo.chatglm3.loading import load_tokenizer
from finetune_chatmodel_demo.chatglm3.lora import load_adapter
from finetune_chatmodel_demo.training import checkpoints
from finetune_chatmodel_demo.training.command_line import parse_given
from finetune_chatmodel_demo.training.deciding import decide_settings
from finetune_chatmodel_demo.training.settings import Settings

ROWS = 24
DIE = """
import os, pkgutil, signal, sys
import torch
torch.set_num_threads(1)
from finetune_chatmodel_demo import finetune

owner, name, count = pkgutil.resolve_name(sys.argv[1]), sys.argv[2], int(sys.argv[3])
original, calls = getattr(owner, name), []

def die_in_time(*args, **kwargs):
    calls.append(1)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, name, die_in_time)
finetune.main(sys.argv[4:])
"""


def make_model(folder: Path, tokenizer_folder: Path) -> Path:
    """Saves a random ChatGLM3 of 2 layers of width 32 with its tokenizer into `folder`."""
    tokenizer = load_tokenizer(tokenizer_folder)
    torch.manual_seed(0)
    config = ChatGLM3Config(
        num_layers=2,
        padded_vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=32,
        ffn_hidden_size=64,
        kv_channels=8,
        num_attention_heads=4,
        multi_query_group_num=2,
        seq_length=512,
        initializer_range=0.1,
    )
    ChatGLM3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_conversations(path: Path, rows: int = ROWS, seed: int = 0) -> Path:
    """Writes conversations of different lengths as JSON lines."""
    draw = random.Random(seed)
    records = []
    for _ in range(rows):
        turns = []
        for _ in range(draw.randint(1, 3)):
            turns += [
                user("皮卡丘的属性是什么" * draw.randint(1, 2)),
                assistant("电属性的宝可梦" * draw.randint(1, 5)),
            ]
        records.append(conversation(*turns))
    return write_jsonl(path, records)


def flags(model: Path, data: Path, output: Path, **options: object) -> list[str]:
    """The command line of a short run on the CPU; `options` add to it or override it."""
    values = {
        "train_format": "multi-turn",
        "train_file": data,
        "model_name_or_path": model,
        "output_dir": output,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "use_cpu": True,
        "seed": 3,
        **options,
    }
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def decide(model: Path, data: Path, output: Path, **options: object) -> Settings:
    """The settings of a run."""
    return decide_settings(*parse_given(flags(model, data, output, **options)))


def train(model: Path, data: Path, output: Path, **options: object) -> int:
    """Runs finetune.py in this process and returns its exit status."""
    return finetune.main(flags(model, data, output, **options))


def assert_resumes_to_the_same_weights(
    model: Path, data: Path, folder: Path, file: str, **options: object
) -> dict[str, torch.Tensor]:
    """Trains, takes the last checkpoint and the result away from a copy of the run, and goes on there.

    Args:
        folder: gets the whole run as `a` and the resumed one as `b`.
        file: of the weights, which both runs end with.
        options: of the run; default: six steps, saved after three and at the end.

    Returns:
        These weights.
    """
    options = {"plot_loss": False, "max_steps": 6, "save_steps": 3, **options}
    whole, cut = folder / "a", folder / "b"
    assert train(model, data, whole, **options) == 0
    shutil.copytree(whole, cut)
    checkpoints.remove_checkpoint(cut / f"checkpoint-{options['max_steps']}")
    for result in (file, "trainer_state.json"):
        (cut / result).unlink()
    state = checkpoints.find_last_checkpoint(cut) / "trainer_state.json"
    written = state.stat().st_mtime_ns
    assert train(model, data, cut, resume_from_checkpoint=True, **options) == 0
    assert state.stat().st_mtime_ns == written  # it did not start anew
    first, second = load_file(whole / file), load_file(cut / file)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    return first


def die_at(owner: str, name: str, count: int, argv: list[str]) -> None:
    """Runs finetune.py in a process that SIGKILL ends at the `count`th call of `name` of `owner` (`module:Class`)."""
    command = [sys.executable, "-c", DIE, owner, name, str(count), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    assert done.returncode == -signal.SIGKILL, done.stderr


def load_result(method: str, model: Path, output: Path, **options: object) -> torch.nn.Module:
    """Loads the result of a run as inference.py does; `options` are `load_model`'s."""
    if method == "ptuning":
        return load_model(model, pt_checkpoint=output, **options)
    if method == "lora":
        return load_adapter(load_model(model, **options), output).eval()
    return load_model(output, **options)


def read_log(output: Path) -> list[dict]:
    """The log entries that the trainer wrote."""
    return json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def losses(output: Path) -> list[float]:
    """The training losses that were logged."""
    return [entry["loss"] for entry in read_log(output) if "loss" in entry]
