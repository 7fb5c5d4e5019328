"""The four tuning methods: what is trained, what stays bit-equal, what is saved, what it loads to."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import assert_resumes_to_the_same_weights, decide, load_result, read_log, train

from finetune_chatmodel_demo.chatglm3 import load_model
from finetune_chatmodel_demo.chatglm3.lora_files import read_adapter_config
from finetune_chatmodel_demo.training import methods, trainer

PROBE = torch.tensor([[5, 17, 99, 250, 31, 7, 1200, 44]])
# Flags of each method on a model of 2 layers.
METHODS = {
    "ptuning": {"pre_seq_len": 4, "learning_rate": 1e-1},
    "lora": {"finetuning_type": "lora", "learning_rate": 1e-2},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "learning_rate": 1e-2},
    "full": {"finetuning_type": "full", "learning_rate": 1e-2},
}
THOROUGH = [pytest.param(method, marks=pytest.mark.thorough) for method in ("freeze", "full")]

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize("method", METHODS)
def test_only_what_is_trained_changes_and_it_loads_to_the_same_logits(method, model, data, tmp_path, monkeypatch):
    trainers = []
    monkeypatch.setattr(trainer.RunTrainer, "save_result", _remember(trainers))
    assert train(model, data, tmp_path / "o", **METHODS[method]) == 0
    trained = trainers[0].model.eval()
    prepared = methods.prepare_model(decide(model, data, tmp_path / "p", **METHODS[method]))
    before = dict(prepared.named_parameters())
    changed = {name for name, value in trained.named_parameters() if not torch.equal(value, before[name])}
    trainable = {name for name, value in trained.named_parameters() if value.requires_grad}
    assert trainable == {name for name, value in before.items() if value.requires_grad}
    # The key's bias shifts all scores of a query alike: it has no gradient without a prefix.
    assert trainable - changed <= {name for name in trainable if "k_proj.bias" in name}
    if method == "ptuning":
        assert changed == {"model.prefix_encoder.embedding.weight"}
    else:
        assert changed - trainable == set()
    loaded = load_result(method, model, tmp_path / "o")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=PROBE).logits, trained(input_ids=PROBE).logits)
        assert not torch.allclose(load_model(model)(input_ids=PROBE).logits, trained(input_ids=PROBE).logits)
    losses = [entry["loss"] for entry in read_log(tmp_path / "o") if "loss" in entry]
    assert losses[-1] < losses[0]


def _remember(trainers):
    original = trainer.RunTrainer.save_result

    def save_result(self):
        trainers.append(self)
        original(self)

    return save_result


@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_a_resumed_run_ends_with_the_same_weights(method, model, data, tmp_path):
    options = METHODS[method]
    if method == "lora":
        options = options | {"lora_dropout": 0.1}
    file = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    assert_resumes_to_the_same_weights(model, data, tmp_path, file, **options)


def test_a_resumed_freeze_in_half_precision_keeps_its_float32_parameters(model, data, tmp_path):
    options = METHODS["freeze"] | {"bf16": True}
    trained = assert_resumes_to_the_same_weights(model, data, tmp_path, methods.TRAINED_FILE, **options)
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert {value.dtype for value in load_file(tmp_path / "a" / "model.safetensors").values()} == {torch.bfloat16}


def trained_names(settings):
    return {name for name, value in methods.prepare_model(settings).named_parameters() if value.requires_grad}


def test_freeze_chooses_layers_and_modules(model, data, tmp_path):
    def names(**options):
        return trained_names(decide(model, data, tmp_path / "o", finetuning_type="freeze", **options))

    first, last = names(freeze_trainable_layers=-1), names(freeze_trainable_layers=1)
    assert {name.split(".")[2] for name in first} == {"0"}
    assert {name.split(".")[2] for name in last} == {"1"}
    assert names() == first | last
    mlp = names(freeze_trainable_layers=1, freeze_trainable_modules="mlp")
    assert mlp == {"model.layers.1.mlp.gate_up_proj.weight", "model.layers.1.mlp.down_proj.weight"}
    # The original code's names
    keys = names(freeze_trainable_layers=1, freeze_trainable_modules="query_key_value")
    assert keys == {f"model.layers.1.self_attn.{n}_proj.{kind}" for n in "qkv" for kind in ("weight", "bias")}
    extra = names(
        freeze_trainable_layers=1, freeze_trainable_modules="dense_4h_to_h", freeze_extra_modules="norm,lm_head"
    )
    assert extra == {"model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_trainable_layers": 3}, "the model has 2 layers: give 1 to 2"),
        ({"freeze_trainable_layers": 0}, "--freeze_trainable_layers is 0"),
        ({"freeze_trainable_modules": "mpl"}, "no module 'mpl'; did you mean 'mlp'?"),
        ({"freeze_extra_modules": "lm_haed"}, "no module 'lm_haed'; did you mean 'lm_head'?"),
    ],
)
def test_freeze_explains_what_does_not_exist(options, message, model, data, tmp_path, capsys):
    assert train(model, data, tmp_path / "o", finetuning_type="freeze", **options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_lora_says_what_it_is(model, data, tmp_path, capsys):
    options = {"lora_rank": 4, "lora_alpha": 6, "lora_target": "query_key_value,down_proj", "use_rslora": True}
    assert train(model, data, tmp_path / "o", finetuning_type="lora", max_steps=1, **options) == 0
    printed = capsys.readouterr().out
    assert "LoRA, rank 4, alpha 6, in down_proj, k_proj, q_proj, v_proj" in printed
    config = read_adapter_config(tmp_path / "o")
    assert (config.rank, config.base_model, config.prompt_format) == (4, str(model), "multi-turn")
    assert config.target_modules == ("down_proj", "k_proj", "q_proj", "v_proj")
    names = load_file(tmp_path / "o" / "adapter_model.safetensors").keys()
    assert len(names) == 2 * 4 * 2  # layers × modules × (A, B)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finetuning_type": "lora", "lora_target": "q_prj"}, "no linear module 'q_prj'; did you mean 'q_proj'"),
        ({"finetuning_type": "lora", "lora_rank": 0}, "--lora_rank is 0; it must be at least 1"),
        ({"finetuning_type": "lora", "pre_seq_len": 8}, "--pre_seq_len belongs to P-Tuning v2"),
        ({"finetuning_type": "full", "lora_rank": 8}, "--lora_rank belongs to LoRA: add --finetuning_type lora"),
        ({"finetuning_type": "freeze", "quantization_bit": 4}, "cannot train some layers (freeze)"),
        ({"finetuning_type": "ptuning", "stage": "rm"}, "--stage rm trains a score head"),
        ({"pref_beta": 0.1}, "--pref_beta belongs to --stage dpo, and this run's stage is sft"),
        ({"stage": "dpo", "reward_model": "x"}, "--reward_model belongs to --stage ppo"),
        ({"streaming": True, "max_steps": -1}, "--streaming does not know how many rows there are"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "follows the validation loss, and there is no validation data"),
        ({"do_predict": True, "do_train": True}, "--do_predict answers the validation data, and there is none"),
    ],
)
def test_impossible_combinations_are_refused(options, message, model, data, tmp_path, capsys):
    assert train(model, data, tmp_path / "o", **options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_ptuning_by_name_has_the_originals_length(model, data, tmp_path):
    settings = decide(model, data, tmp_path / "o", finetuning_type="ptuning")
    assert (settings.pre_seq_len, settings.training.learning_rate) == (128, 2e-2)
    assert decide(model, data, tmp_path / "o", finetuning_type="lora").training.learning_rate == 1e-4


def test_an_adapter_is_continued(model, data, tmp_path):
    assert train(model, data, tmp_path / "a", **METHODS["lora"]) == 0
    options = {
        "finetuning_type": "lora",
        "adapter_name_or_path": tmp_path / "a",
        "max_steps": 1,
        "learning_rate": 1e-12,
    }
    assert train(model, data, tmp_path / "b", **options) == 0
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=1e-9)


def test_runs_of_different_methods_are_kept_apart(model, data, tmp_path, capsys):
    assert train(model, data, tmp_path / "o", save_steps=2, **METHODS["lora"]) == 0
    assert train(model, data, tmp_path / "o", resume_from_checkpoint=True, **METHODS["freeze"]) == 2
    assert "is a checkpoint of LoRA, and this run trains some layers (freeze)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(each, marks=pytest.mark.thorough) for each in ("freeze", "full"))]
)
def test_the_best_checkpoint_is_put_back(method, model, data, tmp_path, monkeypatch):
    """The largest loss is called the best here, so that it is not the last one."""
    trainers = []
    monkeypatch.setattr(trainer.RunTrainer, "save_result", _remember(trainers))
    options = METHODS[method] | {"save_steps": 1, "validation_file": data, "greater_is_better": True}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    assert train(model, data, tmp_path / "o", **options) == 0
    best = trainers[0].state.best_model_checkpoint
    losses = {entry["step"]: entry["eval_loss"] for entry in read_log(tmp_path / "o") if "eval_loss" in entry}
    assert best.endswith(f"checkpoint-{max(losses, key=losses.get)}")
    assert not best.endswith("checkpoint-4")
    with torch.no_grad():
        expected = load_result(method, model, best)(input_ids=PROBE).logits
        assert torch.equal(trainers[0].model.eval()(input_ids=PROBE).logits, expected)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.thorough)])
def test_lora_on_a_quantized_base(bits, model, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = METHODS["lora"] | {"quantization_bit": bits, "max_steps": 8, "gradient_checkpointing": True}
    assert train(model, data, tmp_path / "o", **options) == 0
    losses = [entry["loss"] for entry in read_log(tmp_path / "o") if "loss" in entry]
    assert losses[-1] < losses[0]
    weights = load_file(tmp_path / "o" / "adapter_model.safetensors")
    assert {bool(value.any()) for name, value in weights.items() if "lora_B" in name} == {True}


# Streaming


@pytest.mark.parametrize("stage", [pytest.param("pt", marks=pytest.mark.thorough), "sft"])
def test_rows_are_trained_while_they_are_read_and_a_resumed_run_sees_the_same(stage, model, data, tmp_path):
    file = data
    if stage == "pt":
        file = tmp_path / "texts.jsonl"
        file.write_text("".join(json.dumps({"text": f"皮卡丘的属性是电{'。' * i}"}) + "\n" for i in range(40)))
    options = {"stage": stage, "pre_seq_len": 4, "streaming": True, "buffer_size": 8, "max_seq_length": 64}
    # 24 rows: the resumed run goes on in its second epoch, at step 14.
    options |= {"max_steps": 20, "save_steps": 7, "lr_scheduler_type": "constant"}
    assert_resumes_to_the_same_weights(model, file, tmp_path, "prefix_encoder.safetensors", **options)
    first, second = ([e["loss"] for e in read_log(tmp_path / name) if "loss" in e] for name in "ab")
    assert first == second
    assert first[-1] < first[0]
