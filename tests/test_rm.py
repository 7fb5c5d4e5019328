"""Reward models: loss, scores under padding, what each method trains, saves and resumes, a proof on held-out pairs."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from preference_helpers import METHODS, build_trainer, once, read_evaluation, remember_runs, train, write_pairs
from safetensors.torch import load_file
from training_helpers import assert_resumes_to_the_same_weights, flags, load_result, losses, read_log

from finetune_chatmodel_demo.chatglm3 import load_model
from finetune_chatmodel_demo.training import workflow
from finetune_chatmodel_demo.training.stages.pairs import PairCollator
from finetune_chatmodel_demo.training.stages.ppo_rewards import RewardModel, load_reward_model
from finetune_chatmodel_demo.training.stages.rm import pair_loss

STAGES = ("rm", "dpo")
RM_METHODS = ("lora", "freeze", "full")
PAIR = {"prompt_ids": [5, 17, 0, 99], "chosen_ids": [31, 7, 2], "rejected_ids": [44, 0, 8, 9, 10, 2]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture
def runs(monkeypatch):
    """The trainers whose results were saved, each with its model's parameters before the first step."""
    return remember_runs(monkeypatch)


def scores_of(model, items):
    """The chosen and rejected replies' scores, each row by itself and without padding."""
    with torch.no_grad():
        return [
            [model(input_ids=torch.tensor([item["prompt_ids"] + item[key]])).logits.item() for item in items]
            for key in ("chosen_ids", "rejected_ids")
        ]


# Loss and scores


def test_the_loss_is_the_pairs_negative_log_probability():
    chosen, rejected = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 1.0, 0.5])
    expected = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(2)), math.log(2)]
    torch.testing.assert_close(pair_loss(chosen, rejected), torch.tensor(expected))
    centred = [e + 0.1 * s**2 for e, s in zip(expected, (3.0, 0.0, 1.0))]
    torch.testing.assert_close(pair_loss(chosen, rejected, 0.1), torch.tensor(centred))


def test_pairs_become_rows_of_prompt_and_reply():
    longer = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}
    batch = PairCollator(0)([PAIR, longer])
    assert batch["lengths"].tolist() == [7, 3, 10, 2]
    assert batch["input_ids"].shape == (4, 10)
    assert batch["input_ids"][0].tolist() == [5, 17, 0, 99, 31, 7, 2, 0, 0, 0]
    assert batch["labels"][0].tolist() == [-100, -100, -100, -100, 31, 7, 2, -100, -100, -100]
    assert batch["labels"][3].tolist() == [-100, 4, *[-100] * 8]


def test_a_score_is_the_last_tokens_and_does_not_depend_on_padding(model):
    scorer = load_model(model, head="score")
    batch = PairCollator(scorer.config.pad_token_id)([PAIR])
    wider = torch.cat([batch["input_ids"], torch.zeros(2, 5, dtype=torch.long)], dim=1)
    with torch.no_grad():
        hidden = scorer.model(input_ids=torch.tensor([PAIR["prompt_ids"] + PAIR["chosen_ids"]])).last_hidden_state
        by_hand = hidden[0, -1] @ scorer.score.weight[0] + scorer.score.bias[0]
        alone = torch.tensor(scores_of(scorer, [PAIR])).flatten()
        torch.testing.assert_close(alone[0], by_hand)
        for input_ids in (batch["input_ids"], wider):
            torch.testing.assert_close(scorer(input_ids=input_ids).logits[:, 0], alone, rtol=0, atol=1e-6)
    assert abs(alone[0] - alone[1]) > 1e-3


def test_scores_are_float32_in_half_precision(model):
    """In bfloat16, scores around 8 would be multiples of 1/32."""
    scorer = load_model(model, head="score", dtype=torch.bfloat16)
    scorer.score.float()
    with torch.no_grad():
        scorer.score.bias.fill_(8.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            score = scorer(input_ids=torch.tensor([PAIR["prompt_ids"] + PAIR["chosen_ids"]])).logits
    assert score.dtype == torch.float32
    assert score.item() * 32 % 1 != 0


# What is trained


@pytest.mark.parametrize("method", once(RM_METHODS, "lora"))
def test_only_what_is_trained_changes_and_it_loads_to_the_same_scores(method, model, data, tmp_path, runs):
    assert train(model, data, tmp_path / "o", **METHODS[method], stage="rm", validation_file=data) == 0
    trainer, before = runs[0]
    trained = trainer.model.eval()
    after = dict(trained.named_parameters())
    trainable = {name for name, value in after.items() if value.requires_grad}
    # The head's bias shifts both scores of a pair: what Adam would make of its gradient is rounding errors, enlarged.
    assert [name.rpartition(".")[2] for name in trainable if "score" in name] == ["weight"]
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed <= trainable
    # A key's bias shifts all of a query's attention scores alike: it has no gradient.
    assert trainable - changed <= {name for name in trainable if "k_proj.bias" in name}
    rows = trainer.eval_dataset.rows
    items = [rows[i] for i in range(6)]
    expected = scores_of(trained, items)
    loaded = load_result(method, model, tmp_path / "o", head="score")
    parameters = dict(loaded.named_parameters())
    assert [name for name in trainable if not torch.equal(parameters[name], after[name])] == []
    torch.testing.assert_close(scores_of(loaded, items), expected, rtol=0, atol=1e-6)
    # As PPO loads and uses it
    scorer = load_reward_model(tmp_path / "o", dtype=torch.float32, device=torch.device("cpu"))
    reward = RewardModel(scorer, trainer.tokenizer_to_save, 4)
    found = reward([item["prompt_ids"] for item in items], [item["chosen_ids"] for item in items])
    torch.testing.assert_close(found, torch.tensor(expected[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", once(RM_METHODS, "lora"))
def test_a_resumed_run_ends_with_the_same_weights(method, model, data, tmp_path):
    options = METHODS[method] | {"stage": "rm"}
    if method == "lora":
        options["lora_dropout"] = 0.1
    file = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    weights = assert_resumes_to_the_same_weights(model, data, tmp_path, file, **options)
    assert any("score" in name or "classifier_head" in name for name in weights), sorted(weights)


def test_one_batch_of_four_equals_four_of_one(model, data, tmp_path):
    shapes = {"a": (4, 1), "b": (1, 4)}
    for name, (size, accumulation) in shapes.items():
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        options |= {"train_sampling_strategy": "random", "learning_rate": 1e-3, "finetuning_type": "full"}
        assert train(model, data, tmp_path / name, stage="rm", **options) == 0
    torch.testing.assert_close(losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=1e-5, atol=1e-6)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    for name in first.keys() - {name for name in first if "query_key_value.bias" in name}:  # a key's has no gradient
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=2e-5)


# Figures


def test_figures_of_log_and_evaluation_are_means_over_pairs(model, data, tmp_path, runs):
    options = {**METHODS["full"], "stage": "rm", "validation_file": data, "per_device_eval_batch_size": 7}
    assert train(model, data, tmp_path / "o", max_steps=3, logging_steps=3, **options) == 0
    trainer, _ = runs[0]
    rows = trainer.eval_dataset.rows
    chosen, rejected = map(torch.tensor, scores_of(trainer.model.eval(), [rows[i] for i in range(len(rows))]))
    expected = {
        "eval_loss": pair_loss(chosen, rejected).mean(),
        "eval_accuracy": (chosen > rejected).float().mean(),
        "eval_rewards/chosen": chosen.mean(),
        "eval_rewards/rejected": rejected.mean(),
        "eval_rewards/margins": (chosen - rejected).mean(),
    }
    found = read_evaluation(tmp_path / "o")
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), abs=1e-5), name
    (entry,) = [entry for entry in read_log(tmp_path / "o") if "loss" in entry]
    assert entry["rewards/margins"] == pytest.approx(entry["rewards/chosen"] - entry["rewards/rejected"], abs=1e-5)
    assert entry["accuracy"] * 6 == pytest.approx(round(entry["accuracy"] * 6))  # of the 6 pairs of 3 steps


def test_a_result_is_evaluated_without_training(model, data, tmp_path):
    options = {"stage": "rm", "validation_file": data}
    assert train(model, data, tmp_path / "o", **METHODS["full"], **options) == 0
    assert train(tmp_path / "o", data, tmp_path / "p", do_eval=True, train_file=None, max_steps=None, **options) == 0
    first, second = read_evaluation(tmp_path / "o"), read_evaluation(tmp_path / "p")
    for name in ("eval_loss", "eval_accuracy", "eval_rewards/margins"):
        assert first[name] == pytest.approx(second[name], abs=1e-6)
    assert not (tmp_path / "p" / "model.safetensors").exists()


@pytest.mark.parametrize("stage", once(STAGES, "dpo"))
def test_two_processes_count_every_pair_once(stage, model, tmp_path):
    """13 pairs in batches of 2 on 2 processes: three would be counted twice."""
    data = write_pairs(tmp_path / "pairs.jsonl", rows=13)
    options = {**METHODS["full"], "stage": stage, "validation_file": data, "per_device_eval_batch_size": 2}
    options |= {"learning_rate": 1e-3, "train_sampling_strategy": "random", "max_steps": 2}
    one = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert train(model, data, tmp_path / "one", **options, **one) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["finetune_chatmodel_demo/finetune.py", *flags(model, data, tmp_path / "two", **options)]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (read_evaluation(tmp_path / name) for name in ("one", "two"))
    names = [name for name in first if name == "eval_loss" or "/" in name or name == "eval_accuracy"]
    assert len(names) == {"rm": 5, "dpo": 7}[stage]
    for name in names:
        assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-3), name
    log = [[e for e in read_log(tmp_path / name) if "loss" in e] for name in ("one", "two")]
    for a, b in zip(*log, strict=True):
        assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], rel=1e-3, abs=1e-4)


# What a user sees


def test_the_first_pair_and_the_run_are_shown(model, data, tmp_path, capsys):
    assert train(model, data, tmp_path / "o", stage="rm", finetuning_type="lora", max_steps=1) == 0
    printed = capsys.readouterr().out
    assert "sanity check: the first pair\n  prompt    '[gMASK]sop<|user|>" in printed
    assert "rm, a reward model" in printed
    assert "2 pairs × 1 accumulated × 1 processes = 2 pairs a step" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "rm", "pre_seq_len": 4}, "--stage rm trains a score head"),
        ({"stage": "rm", "center_rewards_coefficient": -1}, "--center_rewards_coefficient is -1"),
        ({"stage": "dpo", "center_rewards_coefficient": 0.1}, "--center_rewards_coefficient belongs to --stage rm"),
    ],
)
def test_impossible_settings_are_refused(options, message, model, data, tmp_path, capsys):
    assert train(model, data, tmp_path / "o", **options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_no_number_names_the_pairs(stage, model, data, tmp_path, capsys, monkeypatch):
    def poison(settings):
        prepared = original(settings)
        with torch.no_grad():
            prepared.model.norm.weight[0] = math.nan
        return prepared

    original = workflow.prepare_model
    monkeypatch.setattr(workflow, "prepare_model", poison)
    assert train(model, data, tmp_path / "o", stage=stage, finetuning_type="full") == 2
    error = capsys.readouterr().err
    assert "the loss is nan at step 1" in error
    assert "pairs.jsonl line " in error


@pytest.mark.thorough
def test_a_loss_that_does_not_move_is_noted(model, data, tmp_path, caplog):
    options = {"finetuning_type": "lora", "max_steps": 32, "logging_steps": 10, "per_device_train_batch_size": 24}
    assert train(model, data, tmp_path / "o", stage="rm", learning_rate=1e-9, **options) == 0
    assert "the loss has not moved" in caplog.text
    assert "start anew with --learning_rate 0.0001" in caplog.text


def test_sums_of_scores_can_be_held_near_zero(model, data, tmp_path):
    options = {"stage": "rm", "finetuning_type": "full", "validation_file": data, "center_rewards_coefficient": 0.1}
    trainer = build_trainer(model, data, tmp_path / "o", **options)
    rows = trainer.eval_dataset.rows
    chosen, rejected = map(torch.tensor, scores_of(trainer.model, [rows[i] for i in range(len(rows))]))
    centred = pair_loss(chosen, rejected).mean() + 0.1 * ((chosen + rejected) ** 2).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(centred.item(), abs=1e-5)
    assert trainer.model.score.bias.requires_grad  # only this part of the loss reaches it
    assert trainer.describe_objective()["loss"].startswith("-log sigmoid(chosen - rejected) + 0.1")


# Quantized


@pytest.mark.thorough
@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_a_quantized_base(bits, model, data, tmp_path, runs):
    pytest.importorskip("bitsandbytes")
    options = METHODS["lora"] | {"stage": "rm", "quantization_bit": bits, "validation_file": data, "max_steps": 12}
    assert train(model, data, tmp_path / "o", **options) == 0
    assert read_evaluation(tmp_path / "o")["eval_accuracy"] > 0.9
    trainer, before = runs[0]
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert any("score" in name for name in trained)
    assert {torch.equal(value, before[name]) for name, value in trained.items() if "lora_B" in name} == {False}
