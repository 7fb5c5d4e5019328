"""What the tests of rm and dpo share: a file of pairs, the flags of each method on a model of 2 layers, the trainer."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import training_helpers
from conversation_helpers import pair, user, write_jsonl
from training_helpers import ROWS, decide

from finetune_chatmodel_demo.chatglm3.loading import load_tokenizer
from finetune_chatmodel_demo.training import trainer, workflow

METHODS = {
    "ptuning": {"pre_seq_len": 4, "learning_rate": 3e-2},
    "lora": {"finetuning_type": "lora", "learning_rate": 1e-2},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "learning_rate": 1e-2},
    "full": {"finetuning_type": "full", "learning_rate": 1e-2},
}


def once(names: Iterable[str], default: str) -> list:
    """Parameters of a proof that is repeated over methods: all but the default one are thorough."""
    return [pytest.param(name, marks=() if name == default else pytest.mark.thorough) for name in names]


def write_pairs(path: Path, rows: int = ROWS, seed: int = 0) -> Path:
    """Writes pairs of different lengths as JSON lines; the chosen replies are about electricity."""
    draw = random.Random(seed)
    records = []
    for _ in range(rows):
        question = user("皮卡丘的属性是什么" * draw.randint(1, 3))
        chosen, rejected = (text * draw.randint(1, 4) for text in ("电属性的", "草系的宝可梦"))
        records.append(pair([question], chosen, rejected))
    return write_jsonl(path, records)


def train(model: Path, data: Path, output: Path, **options: object) -> int:
    """Runs finetune.py in this process, without pictures, and returns its exit status."""
    return training_helpers.train(model, data, output, plot_loss=False, **options)


def build_trainer(model: Path, data: Path, output: Path, **options: object):
    """The trainer of a run that is not started."""
    settings = decide(model, data, output, **options)
    tokenizer = load_tokenizer(model)
    rows = workflow.build_stage_data(settings.data, settings.stage.stage, tokenizer, 0)
    prepared = workflow.prepare_model(settings)
    return workflow.trainer_class(settings.stage.stage)(prepared, settings, tokenizer, rows.train, rows.validation)


def remember_runs(monkeypatch) -> list[tuple]:
    """A list that fills with (trainer, the model's parameters before the first step) of each run that is finished."""
    runs, starts = [], []
    save_result, prepare_model = trainer.RunTrainer.save_result, workflow.prepare_model

    def prepare(settings):
        model = prepare_model(settings)
        starts.append({name: value.detach().clone() for name, value in model.named_parameters()})
        return model

    def save(self):
        runs.append((self, starts[-1]))
        save_result(self)

    monkeypatch.setattr(workflow, "prepare_model", prepare)
    monkeypatch.setattr(trainer.RunTrainer, "save_result", save)
    return runs


def read_evaluation(output: Path) -> dict[str, float]:
    """eval_results.json."""
    return json.loads((output / "eval_results.json").read_text(encoding="utf-8"))
