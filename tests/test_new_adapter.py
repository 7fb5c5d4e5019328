"""--create_new_adapter: an adapter is merged into the base and a new one trained on top; what contradicts a start."""

import json
from pathlib import Path

import pytest
import torch
from preference_helpers import write_pairs
from safetensors.torch import load_file
from training_helpers import assert_resumes_to_the_same_weights, decide, load_result, train

from finetune_chatmodel_demo.chatglm3 import load_model
from finetune_chatmodel_demo.chatglm3.lora import load_adapter, merge_into_base
from finetune_chatmodel_demo.common.errors import UserError

LORA = {"finetuning_type": "lora", "learning_rate": 1e-2, "plot_loss": False, "max_steps": 3}
IDS = torch.tensor([[1, 5, 7, 13, 2, 9]])

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


@pytest.fixture(scope="module")
def first(model, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "o"
    assert train(model, data, folder, **LORA, lora_rank=4) == 0
    return folder


@pytest.fixture(scope="module")
def prefix(model, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prefix") / "o"
    assert train(model, data, folder, pre_seq_len=4, max_steps=1, plot_loss=False) == 0
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_a_new_adapter_stands_on_the_merged_one(model, data, first, tmp_path):
    options = LORA | {"adapter_name_or_path": first, "create_new_adapter": True, "lora_rank": 2}
    assert train(model, data, tmp_path / "o", **options) == 0
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert config["r"] == 2
    below = load_file(tmp_path / "o" / "merged_adapter" / "adapter_model.safetensors")
    assert all(
        torch.equal(value, below[name]) for name, value in load_file(first / "adapter_model.safetensors").items()
    )
    assert not list((tmp_path / "o" / "merged_adapter").glob("checkpoint*"))
    result = load_result("lora", model, tmp_path / "o")
    merged = merge_into_base(load_model(model), first)
    with result.disable_adapter():
        torch.testing.assert_close(logits(result), logits(merged), rtol=1e-5, atol=1e-5)
    assert (logits(result) - logits(merged)).abs().max() > 1e-3
    base = load_adapter(load_model(model), first)
    torch.testing.assert_close(logits(merged), logits(base), rtol=1e-4, atol=1e-5)
    # A third one stands on both, and a finished run may be started again.
    options |= {"adapter_name_or_path": tmp_path / "o", "resume_from_checkpoint": True}
    for _ in range(2):
        assert train(model, data, tmp_path / "third", **options) == 0
    assert (tmp_path / "third" / "merged_adapter" / "merged_adapter" / "adapter_config.json").is_file()
    third = load_result("lora", model, tmp_path / "third")
    with third.disable_adapter():
        torch.testing.assert_close(logits(third), logits(result), rtol=1e-4, atol=1e-5)


def test_it_resumes_to_the_same_weights(model, data, first, tmp_path):
    options = {"finetuning_type": "lora", "adapter_name_or_path": first, "create_new_adapter": True}
    assert_resumes_to_the_same_weights(model, data, tmp_path, "adapter_model.safetensors", **options)


def test_llama_factorys_older_flag(model, data, first, tmp_path):
    settings = decide(model, data, tmp_path / "o", **LORA, adapter_name_or_path=first, resume_lora_training=False)
    assert settings.merged_adapter == str(first) and settings.continued_adapter is None
    settings = decide(model, data, tmp_path / "o", **LORA, adapter_name_or_path=first, resume_lora_training=True)
    assert settings.merged_adapter is None and settings.continued_adapter == str(first)


def test_a_reward_model_stands_on_a_language_models_adapter(model, first, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    options = {**LORA, "stage": "rm", "adapter_name_or_path": first, "create_new_adapter": True}
    assert train(model, pairs, tmp_path / "o", train_format=None, **options) == 0
    assert (tmp_path / "o" / "merged_adapter" / "adapter_model.safetensors").is_file()
    load_adapter(load_model(model, head="score"), tmp_path / "o")


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"lora_rank": 8}, ("--lora_rank is 8", "has 4", "--create_new_adapter")),
        ({"lora_alpha": 5}, ("--lora_alpha is 5", "has 8")),
        ({"lora_dropout": 0.5}, ("--lora_dropout is 0.5", "has 0.0")),
        ({"lora_target": "q_proj"}, ("--lora_target is q_proj", "down_proj")),
        ({"use_dora": True}, ("--use_dora is True", "has False")),
    ],
)
def test_flags_that_contradict_a_continued_adapter(model, data, first, tmp_path, options, facts):
    with pytest.raises(UserError) as raised:
        decide(model, data, tmp_path / "o", **LORA, adapter_name_or_path=first, **options)
    assert all(fact in str(raised.value) for fact in (*facts, str(first)))
    decide(model, data, tmp_path / "o", **LORA, adapter_name_or_path=first, create_new_adapter=True, **options)


@pytest.mark.parametrize(
    "options",
    [{"lora_rank": 4}, {"lora_target": "all"}, {"lora_target": "query_key_value,dense,dense_h_to_4h,dense_4h_to_h"}],
)
def test_flags_that_say_what_is_there_are_let_through(model, data, first, tmp_path, options):
    decide(model, data, tmp_path / "o", **LORA, adapter_name_or_path=first, **options)


@pytest.mark.parametrize("options", [{"prefix_projection": True}, {"prefix_init_std": 0.5}])
def test_flags_that_contradict_a_continued_prefix(model, data, prefix, tmp_path, options):
    (flag,) = options
    with pytest.raises(UserError, match=f"--{flag} is .*{prefix}"):
        decide(model, data, tmp_path / "o", ptuning_checkpoint=prefix, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"create_new_adapter": True}, "--create_new_adapter merges --adapter_name_or_path first"),
        ({"create_new_adapter": True, "adapter_name_or_path": "x", "quantization_bit": 4}, "into weights of 4 bits"),
    ],
)
def test_a_new_adapter_that_has_nothing_to_stand_on(model, data, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        decide(model, data, tmp_path / "o", **LORA, **options)
