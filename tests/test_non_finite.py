"""A loss or gradient that is no number stops the run and names the rows: every method, accumulation, bfloat16."""

import math

import pytest
import torch
from training_helpers import read_log, train

from finetune_chatmodel_demo.chatglm3 import load_tokenizer
from finetune_chatmodel_demo.training import methods
from finetune_chatmodel_demo.training.settings import Settings

BAD_ROW = 17
METHODS = {
    "ptuning": {"pre_seq_len": 4},
    "lora": {"finetuning_type": "lora"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "full": {"finetuning_type": "full"},
}

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def broken(data, tmp_path):
    """The data with a word in row 17 that no other row has."""
    lines = data.read_text(encoding="utf-8").splitlines()
    lines[BAD_ROW] = lines[BAD_ROW].replace("皮卡丘", "喷火龙")
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def poisoned(model, monkeypatch):
    """A base model in which that word's embedding is no number."""
    tokenizer, load = load_tokenizer(model), methods.load_model
    rare = set(tokenizer.encode_text("喷火龙")) - set(tokenizer.encode_text("皮卡丘的属性是什么电属性的宝可梦"))

    def load_poisoned(*args, **kwargs):
        loaded = load(*args, **kwargs)
        loaded.model.embed_tokens.weight.data[sorted(rare)[-1]] = float("nan")
        return loaded

    monkeypatch.setattr(methods, "load_model", load_poisoned)


def test_a_bad_loss_stops_the_run_and_names_the_row(model, broken, poisoned, tmp_path, capsys):
    options = METHODS["ptuning"] | {"per_device_train_batch_size": 1, "max_steps": 24}
    assert train(model, broken, tmp_path / "o", **options) == 2
    error = capsys.readouterr().err
    assert "the loss is nan at step" in error
    assert f"row {BAD_ROW} (" in error
    assert f"line {BAD_ROW + 1}" in error
    assert not (tmp_path / "o" / "config.json").exists()


@pytest.mark.parametrize("method", METHODS)
def test_the_row_is_named_among_those_of_a_step(method, model, broken, poisoned, tmp_path, capsys):
    options = METHODS[method] | {"per_device_train_batch_size": 1, "max_steps": 6}
    assert train(model, broken, tmp_path / "o", gradient_accumulation_steps=4, **options) == 2
    error = capsys.readouterr().err
    assert "the loss is nan at step" in error
    assert f"in the batch of row {BAD_ROW} ({broken} line {BAD_ROW + 1}). Nothing of this step" in error
    assert not (tmp_path / "o" / "config.json").exists()


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}, {"packing": True}])
def test_the_row_is_named_in_other_ways_to_compute(options, model, broken, poisoned, tmp_path, capsys):
    options = METHODS["lora"] | {"per_device_train_batch_size": 1, "max_steps": 24} | options
    assert train(model, broken, tmp_path / "o", **options) == 2
    error = capsys.readouterr().err
    assert "the loss is nan at step" in error
    assert f"line {BAD_ROW + 1}" in error or f"row {BAD_ROW}" in error


def poison_gradients(monkeypatch):
    """The loss stays finite, and the gradient becomes infinite."""
    prepare = methods.prepare_model

    def prepare_poisoned(settings):
        model = prepare(settings)
        parameter = next(p for p in model.parameters() if p.requires_grad)
        parameter.register_hook(lambda gradient: gradient * float("inf"))
        return model

    from finetune_chatmodel_demo.training import workflow

    monkeypatch.setattr(workflow, "prepare_model", prepare_poisoned)


@pytest.mark.parametrize("method", ["ptuning", "full"])
def test_an_infinite_gradient_names_all_rows_of_the_step(method, model, data, tmp_path, monkeypatch, capsys):
    poison_gradients(monkeypatch)
    options = METHODS[method] | {"gradient_accumulation_steps": 3, "max_steps": 1}
    assert train(model, data, tmp_path / "o", **options) == 2
    error = capsys.readouterr().err
    assert "the gradient's norm is" in error and "at step 1, in the batch of row" in error
    assert error.count(f"({data} line ") == 6  # 2 rows × 3 accumulated


def test_under_loss_scaling_an_infinite_gradient_is_a_skipped_step(model, data, tmp_path, monkeypatch):
    """float16 finds its loss scale by overflowing; the scaler leaves such steps out. (There is no GPU here.)"""
    poison_gradients(monkeypatch)
    monkeypatch.setattr(Settings, "precision", "float16")
    monkeypatch.setattr(Settings, "weights_dtype", torch.float32)
    assert train(model, data, tmp_path / "o", max_steps=1, **METHODS["lora"]) == 0
    (entry,) = [entry for entry in read_log(tmp_path / "o") if "loss" in entry]
    assert math.isfinite(entry["loss"]) and not math.isfinite(entry["grad_norm"])
