"""The folder finetune_chatmodel_demo alone, in place of the original's in a checkout of the official repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

DEMO = "finetune_chatmodel_demo"
PRE_SEQ_LEN = 4
STEPS = 2
RECORD = (
    '{"conversations": [{"role": "user", "content": "皮卡丘是什么属性？"}, {"role": "assistant", "content": "电。"}]}\n'
)
# What remains of the original's folder when ours is copied over it instead of replacing it.
LEFT_FROM_THE_ORIGINAL = ("arguments.py", "trainer.py", "preprocess_utils.py", "finetune.sh")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """ChatGLM3/ with our folder, a small random model in THUDM/chatglm3-6b, and a few records."""
    from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM

    root = tmp_path_factory.mktemp("official") / "ChatGLM3"
    ignored = shutil.ignore_patterns("__pycache__", "output", "formatted_data")
    shutil.copytree(REPOSITORY / DEMO, root / DEMO, ignore=ignored)
    for name in LEFT_FROM_THE_ORIGINAL:
        (root / DEMO / name).write_text("raise RuntimeError('the original is in the way')\n", encoding="utf-8")
    model_folder = root / "THUDM" / "chatglm3-6b"
    shutil.copytree(tiny_folder, model_folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.md"))
    config = ChatGLM3Config.from_pretrained(model_folder)
    for name, value in {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8}.items():
        setattr(config, name, value)
    ChatGLM3ForCausalLM(config).save_pretrained(model_folder)
    (root / DEMO / "train.jsonl").write_text(RECORD * 3, encoding="utf-8")
    return root


def run(cwd: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """A program of the checkout, with nothing on the path that leads to the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert str(REPOSITORY) not in result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def prefix(checkout: Path) -> Path:
    """Trained inside the folder, as the user's document does it."""
    result = run(
        checkout / DEMO,
        "finetune.py",
        *("--train_format", "multi-turn", "--train_file", "train.jsonl"),
        *("--model_name_or_path", "../THUDM/chatglm3-6b", "--output_dir", "output/pokemon"),
        *("--pre_seq_len", str(PRE_SEQ_LEN), "--max_seq_length", "64", "--max_steps", str(STEPS)),
        *("--per_device_train_batch_size", "1", "--use_cpu", "True"),
    )
    assert f"{STEPS}/{STEPS}" in result.stderr
    return checkout / DEMO / "output" / "pokemon"


def test_training_leaves_a_prefix(prefix: Path):
    from finetune_chatmodel_demo.chatglm3 import read_prefix_config

    config = read_prefix_config(prefix)
    assert config.pre_seq_len == PRE_SEQ_LEN
    assert config.prompt_format == "multi-turn"
    assert (prefix / "pytorch_model.bin").is_file()


def test_inference_from_inside_and_from_elsewhere(checkout: Path, prefix: Path, tmp_path: Path):
    ask = ("--pt-checkpoint", prefix, "--max-new-tokens", "4", "--device", "cpu", "--prompt", "你好")
    official = ("--model", "../THUDM/chatglm3-6b", "--tokenizer", "../THUDM/chatglm3-6b")
    inside = run(checkout / DEMO, "inference.py", *ask, *official, "--pt-pre-seq-len", str(PRE_SEQ_LEN))
    assert "multi-turn prompts, on cpu" in inside.stderr
    outside = run(tmp_path, checkout / DEMO / "inference.py", *ask)
    assert "chatglm3-6b (recorded in the checkpoint)" in outside.stderr
    assert outside.stdout == inside.stdout
