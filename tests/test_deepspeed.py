"""The ds scripts' way of training, DeepSpeed ZeRO-2 on two processes of the CPU, against one process without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import losses, make_model, read_log, train, write_conversations

from finetune_chatmodel_demo.chatglm3 import load_model, load_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


def run_script(name: str, *flags: object, **knobs: object) -> None:
    """Runs a ds script with two processes on the CPU."""
    pytest.importorskip("deepspeed")
    knobs |= {"NUM_GPUS": 2, "LR": 1e-3, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1}
    knobs["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **{name: str(value) for name, value in knobs.items()}}
    command = [REPOSITORY / "scripts" / name, "--use_cpu", *flags]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder):
    """Folders of the base model, of a run with two processes and ZeRO-2, and of one with neither."""
    folder = tmp_path_factory.mktemp("deepspeed")
    model = make_model(folder / "model", tiny_folder)
    data = write_conversations(folder / "train.jsonl")
    knobs = {"DEV_BATCH_SIZE": 2, "GRAD_ACCUMULARION_STEPS": 2, "SAVE_INTERVAL": 2}
    knobs |= {"BASE_MODEL_PATH": model, "DATASET_PATH": data, "OUTPUT_DIR": folder / "two"}
    flags = ["--train_sampling_strategy", "random", "--lr_scheduler_type", "constant", "--validation_file", data]
    for steps in ("2", "4"):  # the second call continues the first
        run_script("finetune_ds_multiturn.sh", *flags, MAX_STEP=steps, **knobs)
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "random",
        "validation_file": data,
        "seed": 42,
    }
    assert train(model, data, folder / "one", **options) == 0
    return model, folder / "two", folder / "one"


def test_losses_equal_those_of_one_process(runs):
    _, two, one = runs
    assert len(losses(two)) == 4
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    validation = [
        [entry["eval_loss"] for entry in read_log(folder) if "eval_loss" in entry][-1] for folder in (two, one)
    ]
    assert validation[0] == pytest.approx(validation[1], rel=1e-4)


def test_result_is_an_official_model_that_loads_alone(runs):
    model, two, one = runs
    official = load_file(two / "model.safetensors")
    assert official.keys() == load_file(model / "model.safetensors").keys()
    base, trained, reference = (load_model(folder).state_dict() for folder in (model, two, one))
    for name, value in trained.items():
        torch.testing.assert_close(value, reference[name], rtol=0, atol=2e-4)
        assert not torch.equal(value, base[name]) or "k_proj.bias" in name
    assert load_tokenizer(two).get_command("<|user|>") == load_tokenizer(model).get_command("<|user|>")


def test_checkpoints_are_whole(runs):
    _, two, _ = runs
    names = {path.name for path in two.iterdir()}
    assert {"checkpoint-2", "checkpoint-4", "train.log", "training_loss.png"} <= names
    assert not [name for name in names if name.startswith(".partial")]


def test_prompts_and_responses_train_on_two_processes(tmp_path, tiny_folder):
    model = make_model(tmp_path / "model", tiny_folder)
    data = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"宝可梦{i}", "response": "草属性" * (i % 3 + 1)} for i in range(12)]
    data.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    folders = {"BASE_MODEL_PATH": model, "DATASET_PATH": data, "OUTPUT_DIR": tmp_path / "out"}
    run_script("finetune_ds.sh", DEV_BATCH_SIZE=2, MAX_STEP=6, **folders)
    log = losses(tmp_path / "out")
    assert len(log) == 6 and log[-1] < log[0]
    base, trained = load_model(model).state_dict(), load_model(tmp_path / "out").state_dict()
    assert [name for name in base if torch.equal(base[name], trained[name]) and "k_proj.bias" not in name] == []
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["prompt_format"] == "input-output"
