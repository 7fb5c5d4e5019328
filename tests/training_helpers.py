"""What the tests of training, scripts and DeepSpeed share: a random small model, a data file, a run in this process."""

import json
import random
from pathlib import Path

import torch

from finetune_chatmodel_demo import finetune
from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM
from finetune_chatmodel_demo.chatglm3.loading import load_tokenizer

ROWS = 24


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
                {"role": "user", "content": "皮卡丘的属性是什么" * draw.randint(1, 2)},
                {"role": "assistant", "content": "电属性的宝可梦" * draw.randint(1, 5)},
            ]
        records.append({"conversations": turns})
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


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


def train(model: Path, data: Path, output: Path, **options: object) -> int:
    """Runs finetune.py in this process and returns its exit status."""
    return finetune.main(flags(model, data, output, **options))


def read_log(output: Path) -> list[dict]:
    """The log entries that the trainer wrote."""
    return json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def losses(output: Path) -> list[float]:
    """The training losses that were logged."""
    return [entry["loss"] for entry in read_log(output) if "loss" in entry]
