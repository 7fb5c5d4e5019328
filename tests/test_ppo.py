"""PPO: runs of a small random model with each method; ratio, reference, resume, and what is refused or stopped."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from preference_helpers import once
from safetensors.torch import load_file
from training_helpers import decide, die_at, flags, read_log, train, write_conversations

from finetune_chatmodel_demo.chatglm3 import load_model
from finetune_chatmodel_demo.chatglm3.lora import load_adapter
from finetune_chatmodel_demo.training import checkpoints, workflow
from finetune_chatmodel_demo.training.command_line import parse_given
from finetune_chatmodel_demo.training.deciding import decide_settings
from finetune_chatmodel_demo.training.stages import ppo, ppo_rollouts
from finetune_chatmodel_demo.training.stages.ppo_figures import RolloutWatch
from finetune_chatmodel_demo.training.stages.reference import ReplyRows, build_rows
from finetune_chatmodel_demo.training.trainer import NonFiniteLossError

METHODS = {
    "lora": {"finetuning_type": "lora", "lora_dropout": 0.5, "learning_rate": 1e-2},
    "ptuning": {"finetuning_type": "ptuning", "pre_seq_len": 4, "learning_rate": 1e-2},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "learning_rate": 1e-3},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3},
}
REWARDS = """
def odd_lengths(prompts, replies):
    return [len(reply) % 2 + len(prompt) / 100 for prompt, reply in zip(prompts, replies)]
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Folder of train.jsonl, validation.jsonl and rewards.py."""
    folder = tmp_path_factory.mktemp("files")
    write_conversations(folder / "train.jsonl", rows=10)
    write_conversations(folder / "validation.jsonl", rows=5, seed=9)
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    return folder


def options(files: Path, **changes: object) -> dict[str, object]:
    """Flags of a short PPO run: rollouts of 4 replies, 2 updates each."""
    return {
        "stage": "ppo",
        "reward_function": f"{files / 'rewards.py'}:odd_lengths",
        "max_new_tokens": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 3,
        "ppo_epochs": 2,
        "plot_loss": False,
        "train_format": None,
        **({} if "finetuning_type" in changes else METHODS["lora"]),
        **changes,
    }


def run(model: Path, files: Path, output: Path, **changes: object):
    """Runs finetune.py's parts and returns the trainer."""
    argv = flags(model, files / "train.jsonl", output, **options(files, **changes))
    return workflow.run_finetuning(decide_settings(*parse_given(argv)))


def build_trainer(model: Path, files: Path, output: Path, monkeypatch, **changes: object):
    """A trainer that has not made a step, ready for one."""
    monkeypatch.setattr(workflow, "_train", lambda settings, trainer, *_: trainer._begin(None))
    return run(model, files, output, **changes)


def entries(trainer) -> list[dict]:
    """The log's entries of updates, without speeds."""
    return [
        {key: value for key, value in entry.items() if "per_second" not in key and "runtime" not in key}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def reply_of(rollout, row: int) -> tuple[list[int], list[int]]:
    """Prompt and reply of a row, without padding."""
    start, length = int(rollout.prompt_lengths[row]), int(rollout.reply_lengths[row])
    ids = rollout.input_ids[row].tolist()
    return ids[:start], ids[start : start + length]


# Rollouts


@pytest.mark.parametrize("method", once(METHODS, "lora"))
def test_the_first_ratio_is_1(model, files, tmp_path, monkeypatch, method):
    """Although there is dropout of 0.5 in the adapter and of 0.1 on the prefix: none acts in PPO."""
    changes = METHODS[method] | {"temperature": 0.7, "max_new_tokens": 12}
    trainer = build_trainer(model, files, tmp_path / "o", monkeypatch, **changes)
    rollout = trainer._collect()
    trainer.policy.train()
    for chosen in (torch.tensor([3, 0]), torch.tensor([1])):
        part = rollout.select(chosen)
        log_probs, _, values = trainer.policy(part.input_ids, part.prompt_lengths, part.reply_lengths)
        torch.testing.assert_close(log_probs, part.log_probs, rtol=0, atol=2e-6)
        torch.testing.assert_close(values, part.values, rtol=0, atol=1e-6)
    trainer.rollout = rollout
    figures = trainer.compute_gradients(trainer._replies_of_this_update())
    assert figures["ratio"] == pytest.approx(1, abs=1e-6)
    assert figures["policy_kl"] == pytest.approx(0, abs=1e-10)
    assert figures["clip_fraction"] == 0
    # Whitened advantages have mean 0, and every reply is in the only update of this pass.
    assert figures["policy_loss"] == pytest.approx(0, abs=1e-5)


def test_probabilities_are_of_the_distribution_that_replies_are_drawn_from(model, files, tmp_path, monkeypatch):
    trainer = build_trainer(model, files, tmp_path / "o", monkeypatch, temperature=0.5)
    torch.nn.init.normal_(trainer.policy.value_head.weight)
    rollout, network = trainer._collect(), trainer.model.get_base_model().eval()
    assert len(set(rollout.prompt_lengths.tolist())) > 1
    for row in range(4):
        prompt, reply = reply_of(rollout, row)
        with torch.no_grad():
            output = network(torch.tensor([prompt + reply]), output_hidden_states=True, use_cache=False)
        before = slice(len(prompt) - 1, len(prompt) + len(reply) - 1)  # position t is predicted from t - 1
        expected = (output.logits[0, before] / 0.5).log_softmax(-1)[range(len(reply)), reply]
        torch.testing.assert_close(rollout.log_probs[row, : len(reply)], expected, rtol=0, atol=2e-6)
        values = network.model(torch.tensor([prompt + reply])).last_hidden_state[0, before]
        values = trainer.policy.value_head(values).squeeze(-1)
        torch.testing.assert_close(rollout.values[row, : len(reply)], values, rtol=0, atol=1e-5)
        assert not rollout.log_probs[row, len(reply) :].any() and not rollout.values[row, len(reply) :].any()


def test_replies_are_drawn_with_the_flags(model, files, tmp_path, monkeypatch):
    trainer = build_trainer(model, files, tmp_path / "o", monkeypatch)
    tokenizer = trainer.tokenizer_to_save
    drawn = ppo_rollouts.build_generation(trainer.settings, tokenizer)
    assert (drawn.do_sample, drawn.temperature, drawn.top_p, drawn.top_k) == (True, 1.0, 1.0, 0)
    assert drawn.eos_token_id == [tokenizer.get_command(name) for name in ("<eos>", "<|user|>", "<|observation|>")]
    assert ppo_rollouts.build_generation(trainer.settings, tokenizer, is_greedy=True).do_sample is False
    changes = {"temperature": 0.8, "top_p": 0.9, "top_k": 40}
    trainer = build_trainer(model, files, tmp_path / "p", monkeypatch, **changes)
    drawn = ppo_rollouts.build_generation(trainer.settings, tokenizer)
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (0.8, 0.9, 40)
    assert "leave out unlikely tokens" in " ".join(trainer.settings.notices)


def test_a_new_prefix_is_noted(model, files, tmp_path):
    changes = {"pre_seq_len": 4, "finetuning_type": "ptuning"}
    for start, count in ((None, 1), ("你好", 0)):
        argv = flags(model, files / "train.jsonl", tmp_path, **options(files, prefix_init_text=start, **changes))
        notices = decide_settings(*parse_given(argv)).notices
        assert len([notice for notice in notices if "behind a new random prefix" in notice]) == count


def test_a_reply_ends_with_its_stop_token_or_at_the_limit(tokenizer):
    class Model:
        device = "cpu"

        def generate(self, input_ids, attention_mask, generation_config):
            user, pad = tokenizer.get_command("<|user|>"), tokenizer.pad_token_id
            new = {2: [7, user, pad], 3: [7, 8, 9]}
            widths = attention_mask.sum(dim=1).tolist()
            return torch.cat([input_ids, torch.tensor([new[width] for width in widths])], dim=1)

    settings = ppo_rollouts.GenerationConfig(eos_token_id=tokenizer.stop_token_ids, pad_token_id=0)
    replies = ppo_rollouts.write_replies(Model(), [[5, 5], [5, 5, 5]], settings, batch_size=2)
    assert replies[0] == ppo_rollouts.Reply([7, tokenizer.get_command("<|user|>")], hit_cap=False)
    assert replies[1] == ppo_rollouts.Reply([7, 8, 9], hit_cap=True)


def test_prompts_come_in_an_order_that_depends_on_the_seed_alone():
    taken = [ppo_rollouts.order_of_prompts(10, start, 4, seed=5) for start in range(0, 40, 4)]
    flat = [row for part in taken for row in part]
    epochs = [flat[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert flat == ppo_rollouts.order_of_prompts(10, 0, 40, seed=5)
    assert flat != ppo_rollouts.order_of_prompts(10, 0, 40, seed=6)


def test_parts_of_a_rollout_lose_only_padding():
    rows = build_rows([[1, 2, 3], [4]], [[5], [6, 7, 8]], pad_token_id=0, device="cpu")
    assert rows.input_ids.tolist() == [[1, 2, 3, 5], [4, 6, 7, 8]]
    assert rows.mask.tolist() == [[True, False, False], [True, True, True]]
    per_token = torch.arange(6.0).reshape(2, 3)
    names = {item.name for item in dataclasses.fields(ppo_rollouts.Rollout)}
    others = dict.fromkeys(names - {"input_ids", "prompt_lengths", "reply_lengths"}, torch.tensor([10.0, 11.0]))
    others |= dict.fromkeys(ppo_rollouts.PER_TOKEN, per_token)
    part = ppo_rollouts.Rollout(**vars(rows), **others).select(torch.tensor([0]))
    assert part.input_ids.tolist() == [[1, 2, 3, 5]]
    assert (part.values.tolist(), part.scores.tolist()) == ([[0.0]], [10.0])


def test_penalty_and_normalised_scores(model, files, tmp_path, monkeypatch):
    trainer = build_trainer(model, files, tmp_path / "o", monkeypatch, ppo_missing_eos_penalty=2.0, ppo_score_norm=True)
    first = trainer.collector.shape_scores(torch.tensor([1.0, 5.0]), torch.tensor([False, True]))
    assert first.tolist() == pytest.approx([-1, 1])  # 1 and 5 - 2
    second = trainer.collector.shape_scores(torch.tensor([3.0, 5.0]), torch.tensor([False, False]))
    mean, deviation = 3.0, math.sqrt((4 + 0 + 0 + 4) / 4)  # of 1, 3, 3, 5
    assert second.tolist() == pytest.approx([(3 - mean) / deviation, (5 - mean) / deviation])


# Reference


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_is_the_model_before_training(model, files, tmp_path, method):
    trainer = run(model, files, tmp_path / "o", max_steps=4, **METHODS[method])
    base = load_model(model)
    rows = build_rows([[64790, 64792, 5]], [[30, 31, 2]], 0, "cpu")
    rows = ReplyRows(rows.input_ids % base.config.padded_vocab_size, rows.prompt_lengths, rows.reply_lengths)
    expected = base(rows.input_ids).logits.log_softmax(-1)[0, [2, 3, 4], rows.input_ids[0, 3:]]
    torch.testing.assert_close(trainer.collector.reference.log_probs(rows, 1.0)[0], expected, rtol=0, atol=1e-6)
    trained = trainer.policy(rows.input_ids, rows.prompt_lengths, rows.reply_lengths)[0][0]
    assert (trained - expected).abs().max() > 1e-3


def test_the_reference_of_an_adapter_that_is_trained_on_is_that_adapter(model, files, tmp_path):
    changes = {"max_steps": 4, "save_steps": 2, "adapter_name_or_path": tmp_path / "first"}
    run(model, files, tmp_path / "first", max_steps=3)
    trainer = run(model, files, tmp_path / "o", **changes)
    assert entries(trainer)[0]["kl"] == pytest.approx(0, abs=1e-5)
    checkpoints.remove_checkpoint(tmp_path / "o" / "checkpoint-4")
    resumed = run(model, files, tmp_path / "o", resume_from_checkpoint=True, **changes)
    start = load_adapter(load_model(model), tmp_path / "first")
    rows = build_rows([[60, 61, 5]], [[30, 31, 2]], 0, "cpu")
    expected = start(rows.input_ids).logits.log_softmax(-1)[0, [2, 3, 4], [30, 31, 2]]
    for each in (trainer, resumed):
        torch.testing.assert_close(each.collector.reference.log_probs(rows, 1.0)[0], expected, rtol=0, atol=1e-6)


def test_a_reference_of_its_own(model, files, tmp_path):
    full = run(model, files, tmp_path / "other", max_steps=2, **METHODS["full"])
    trainer = run(model, files, tmp_path / "o", max_steps=1, ref_model=tmp_path / "other")
    rows = build_rows([[60, 61, 5]], [[30, 31, 2]], 0, "cpu")
    expected = full.policy(rows.input_ids, rows.prompt_lengths, rows.reply_lengths)[0]
    torch.testing.assert_close(trainer.collector.reference.log_probs(rows, 1.0), expected, rtol=0, atol=1e-6)
    assert not any(value.requires_grad for value in trainer.collector.reference.model.parameters())


# Runs


@pytest.fixture(scope="module", params=once(METHODS, "ptuning"))
def finished(request, model, files, tmp_path_factory):
    """A finished run of each method: its name, folder and trainer."""
    output = tmp_path_factory.mktemp(request.param) / "o"
    changes = {"max_steps": 5, "save_steps": 3, "validation_file": files / "validation.jsonl"}
    return request.param, output, run(model, files, output, **METHODS[request.param], **changes)


def test_what_is_trained_changes_and_the_rest_does_not(finished, model):
    method, _, trainer = finished
    base = dict(load_model(model).named_parameters())
    for name, value in trainer.model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if value.requires_grad and plain in base:
            # The key's bias shifts all scores alike and has no gradient; nor have rows of tokens that never occur.
            assert not torch.equal(value, base[plain]) or "k_proj.bias" in name, name
        elif not value.requires_grad:
            assert torch.equal(value, base[plain]), name
    trainable = [name for name, value in trainer.model.named_parameters() if value.requires_grad]
    assert {"lora": "lora_", "ptuning": "prefix_encoder", "freeze": "layers.1.", "full": ""}[method] in trainable[0]
    if method == "lora":
        assert {bool(value.any()) for name, value in trainer.model.named_parameters() if "lora_B" in name} == {True}
    assert trainer.policy.value_head.weight.any()


def test_the_result_loads_with_equal_logits(finished, model):
    method, output, trainer = finished
    ids = torch.tensor([[60, 61, 5, 30, 31, 2]])
    if method == "lora":
        loaded = load_adapter(load_model(model), output)
    elif method == "ptuning":
        loaded = load_model(model, pt_checkpoint=output)
    else:
        loaded = load_model(output)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)
    assert not (output / "ppo_state.pt").exists()


def test_the_log_has_the_figures_of_the_field(finished):
    method, _, trainer = finished
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5]
    expected = {"loss", "policy_loss", "value_loss", "grad_norm", "learning_rate", "reward", "reward_std", "kl"}
    expected |= {"kl_k3", "kl_coef", "clip_fraction", "value_clip_fraction", "ratio", "policy_kl", "entropy"}
    expected |= {"explained_variance", "reply_tokens", "hit_cap", "tokens_per_second", "epoch"}
    assert all(expected <= entry.keys() for entry in log)
    assert all(math.isfinite(value) for entry in log for value in entry.values())
    rate = METHODS[method]["learning_rate"]
    assert [entry["learning_rate"] / rate for entry in log] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])  # linear
    # Two updates learn from each rollout; its figures stand in both entries.
    assert log[0]["reward"] == log[1]["reward"] != log[2]["reward"]
    assert [round(entry["epoch"], 6) for entry in log] == [0.2, 0.4, 0.6, 0.8, 1.0]  # of 10 prompts, 4 a rollout
    for before, after in ((log[1], log[2]), (log[3], log[4])):
        error = max(-0.2, min(0.2, before["kl"] / 6 - 1))
        assert after["kl_coef"] == pytest.approx(before["kl_coef"] * (1 + error * 4 / 10_000))


def test_validation_is_the_mean_reward_of_greedy_replies(finished, files):
    _, _, trainer = finished
    found = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert [entry["step"] for entry in found] == [3, 5]
    tokenizer, scores, lengths = trainer.tokenizer_to_save, [], []
    for row in trainer.eval_dataset.rows:
        ids = list(row["input_ids"])
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(trainer.model.eval()(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in tokenizer.stop_token_ids:
                break
        scores.append(trainer.collector.reward([row["input_ids"]], [ids[len(row["input_ids"]) :]]).item())
        lengths.append(len(ids) - len(row["input_ids"]))
    assert found[-1]["eval_reward"] == pytest.approx(sum(scores) / 5, rel=1e-6)
    assert found[-1]["eval_reply_tokens"] == pytest.approx(sum(lengths) / 5)


def test_checkpoints_hold_the_state_of_ppo(finished):
    _, output, _ = finished
    for step, has_rollout in ((3, True), (5, True)):  # both stand between the two updates of a rollout
        folder = output / f"checkpoint-{step}"
        manifest = checkpoints.read_whole_checkpoint(folder)
        assert (manifest["stage"], manifest["run"]["ppo_epochs"]) == ("ppo", 2)
        assert (folder / "ppo_rollout_0.pt").is_file() is has_rollout
        state = torch.load(folder / "ppo_state.pt", weights_only=True)
        assert (state["rollouts_done"], state["updates_done"]) == divmod(step, 2)
    assert not [path for path in output.iterdir() if path.name.startswith(".partial")]


@pytest.mark.parametrize(
    ("method", "step"),
    [
        ("lora", 3),
        pytest.param("ptuning", 4, marks=pytest.mark.thorough),
        pytest.param("freeze", 5, marks=pytest.mark.thorough),
        pytest.param("full", 3, marks=pytest.mark.thorough),
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(model, files, tmp_path, method, step):
    """From the middle of a rollout (3, 5) and from its end (4)."""
    changes = {**METHODS[method], "max_steps": 7, "ppo_score_norm": True, "ppo_kl_horizon": 10}
    whole = run(model, files, tmp_path / "whole", **changes)
    run(model, files, tmp_path / "cut", save_steps=step, **changes)
    checkpoints.remove_checkpoint(tmp_path / "cut" / "checkpoint-7")
    for folder in checkpoints.list_checkpoints(tmp_path / "cut")[1:]:
        checkpoints.remove_checkpoint(folder)
    torch.rand(5)
    resumed = run(model, files, tmp_path / "cut", save_steps=step, resume_from_checkpoint=True, **changes)
    assert entries(resumed) == entries(whole)
    first, second = whole.policy.state_dict(), resumed.policy.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert resumed.collector.kl_coef == whole.collector.kl_coef != 0.2
    assert resumed.collector.score_moments.state() == whole.collector.score_moments.state()


def test_a_rollout_can_only_be_continued_as_it_was_begun(model, files, tmp_path, capsys):
    run(model, files, tmp_path / "o", max_steps=3)
    argv = options(files, max_steps=5, resume_from_checkpoint=True, ppo_epochs=3)
    assert train(model, files / "train.jsonl", tmp_path / "o", **argv) == 2
    assert "in the middle of a rollout, which can only be continued as it was begun: ppo_epochs was 2, is 3" in (
        capsys.readouterr().err
    )


def test_weights_alone_are_not_resumed_from(model, files, tmp_path, capsys):
    run(model, files, tmp_path / "o", max_steps=2, save_only_model=True)
    argv = options(files, max_steps=4, resume_from_checkpoint=True)
    assert train(model, files / "train.jsonl", tmp_path / "o", **argv) == 2
    assert "checkpoint-2 has no ppo_state.pt (--save_only_model?)" in capsys.readouterr().err


def test_checkpoints_and_validation_follow_epochs_of_prompts(model, files, tmp_path):
    changes = {"max_steps": 6, "save_strategy": "epoch", "validation_file": files / "validation.jsonl"}
    trainer = run(model, files, tmp_path / "o", **changes)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "o")] == ["checkpoint-5"]
    validated = [entry["step"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert validated == [5, 6]  # after 10 prompts, and of the result


def test_gradients_are_clipped_and_the_value_head_has_its_own_rate(model, files, tmp_path, monkeypatch):
    trainer = build_trainer(model, files, tmp_path / "o", monkeypatch, max_grad_norm=0.01, ppo_value_lr=0.5)
    trainer.rollout = trainer._collect()
    figures = trainer.compute_gradients(trainer._replies_of_this_update())
    trained = [value for value in trainer.policy.parameters() if value.requires_grad]
    norm = torch.stack([value.grad.norm() for value in trained]).norm().item()
    assert figures["grad_norm"] > 0.1
    assert norm == pytest.approx(0.01, rel=1e-3)
    *_, head = trainer.optimizer.param_groups
    assert (head["initial_lr"], [tuple(value.shape) for value in head["params"]]) == (0.5, [(1, 32), (1,)])
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups[:-1]} == {1e-2}


def test_one_reply_accumulated_equals_one_batch(model, files, tmp_path):
    """Every token of an update weighs the same, whatever the batches."""
    runs = [
        run(model, files, tmp_path / name, per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch)
        for name, batch in (("a", 4), ("b", 1))
    ]
    first, second = map(entries, runs)
    for left, right in zip(first, second, strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-5)
    for left, right in zip(runs[0].policy.parameters(), runs[1].policy.parameters()):
        torch.testing.assert_close(left, right, rtol=0, atol=2e-4)


def test_gradient_checkpointing_changes_nothing(model, files, tmp_path):
    off, on = (run(model, files, tmp_path / str(is_on), gradient_checkpointing=is_on) for is_on in (False, True))
    assert on.model.get_base_model().is_gradient_checkpointing
    assert entries(off) == entries(on)


def test_epochs_count_prompts(model, files, tmp_path):
    # 10 prompts twice = 5 rollouts of 4 replies, each for 2 epochs × 1 update.
    trainer = run(model, files, tmp_path / "o", max_steps=None, num_train_epochs=2)
    assert (trainer.state.global_step, trainer.state.max_steps) == (10, 10)
    assert trainer.state.epoch == pytest.approx(2)
    # A rollout of 2 updates' replies, learned from 3 times.
    trainer = run(model, files, tmp_path / "p", max_steps=None, num_train_epochs=1, ppo_buffer_size=2, ppo_epochs=3)
    assert trainer.state.global_step == 12  # 2 rollouts of 8 replies, of 10 prompts


def test_bfloat16_runs(model, files, tmp_path):
    trainer = run(model, files, tmp_path / "o", bf16=True)
    assert all(math.isfinite(entry["loss"]) for entry in entries(trainer))
    # bfloat16 has 8 bits: batches of other shapes round differently.
    assert entries(trainer)[0]["ratio"] == pytest.approx(1, abs=0.05)
    assert trainer.policy.value_head.weight.dtype == torch.float32


def test_whitened_rewards_and_estimators_run(model, files, tmp_path):
    for estimator in ("k2", "k3"):
        changes = {"ppo_kl_estimator": estimator, "ppo_whiten_rewards": True, "ppo_adaptive_kl": False}
        log = entries(run(model, files, tmp_path / estimator, **changes))
        assert {entry["kl_coef"] for entry in log} == {0.2}
        assert log[-1]["kl_k3"] > 0


def test_runs_that_go_astray_are_told_once(model, files, tmp_path, caplog):
    changes = {"max_new_tokens": 1, "ppo_epochs": 1, "max_steps": 9, "learning_rate": 1e-9}
    (files / "same.py").write_text("def same(prompts, replies): return [1 for _ in replies]", encoding="utf-8")
    run(model, files, tmp_path / "o", reward_function=f"{files / 'same.py'}:same", **changes)
    warnings = [record.getMessage() for record in caplog.records if "rollouts in a row" in record.getMessage()]
    assert len(warnings) == 2
    assert "--max_new_tokens 1 ended 100% of the replies; raise it" in warnings[0]
    assert "all replies have the score 1: PPO learns from differences" in warnings[1]
    watch = RolloutWatch(decide(model, files / "train.jsonl", "o", **options(files)))
    for _ in range(5):
        watch.look({"hit_cap": 0.5, "reward": 1.0, "reward_std": 0.1, "kl": 31.0, "kl_k3": 9.0})
    assert "the KL to the reference is 31.0 nats a reply (--ppo_target 6); lower --learning_rate" in caplog.text


# What stops a run


def test_a_bad_probability_stops_the_run_and_names_the_prompts(model, files, tmp_path, monkeypatch, capsys):
    load = workflow.prepare_model

    def load_poisoned(settings):
        poisoned = load(settings)
        poisoned.get_base_model().model.norm.weight.data[0] = float("nan")
        return poisoned

    monkeypatch.setattr(workflow, "prepare_model", load_poisoned)
    assert train(model, files / "train.jsonl", tmp_path / "o", **options(files)) == 2
    error = capsys.readouterr().err
    assert "the policy's probabilities are no numbers at step 1, in the batch of row " in error
    assert "train.jsonl line " in error
    assert not (tmp_path / "o" / "adapter_config.json").exists()


def test_a_bad_loss_stops_the_run_and_names_the_prompts(model, files, tmp_path, monkeypatch):
    trainer = build_trainer(model, files, tmp_path / "o", monkeypatch)
    rollout = trainer._collect()
    rollout.advantages[2] = float("inf")
    trainer.rollout = rollout
    with pytest.raises(NonFiniteLossError, match=rf"the loss is .*row {int(rollout.row_index[2])} \("):
        trainer.compute_gradients(trainer._replies_of_this_update())


def test_a_prompt_without_room_for_a_reply_is_named(model, files, tmp_path, capsys):
    argv = options(files, max_new_tokens=490)
    assert train(model, files / "train.jsonl", tmp_path / "o", **argv) == 2
    error = capsys.readouterr().err
    assert "with --max_new_tokens 490 at most 22 fit into the model's context" in error
    assert "the prompt of row " in error
    argv = options(files, max_new_tokens=512)
    assert train(model, files / "train.jsonl", tmp_path / "o", **argv) == 2
    assert "max_new_tokens is 512" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_function": None}, "--stage ppo needs one reward: .* none was given"),
        ({"reward_model": "x"}, "--stage ppo needs one reward: .* both were given"),
        ({"reward_function": "rewards.py"}, "rewards.py is not of the form FILE.py:NAME"),
        ({"reward_function": "nowhere.py:f"}, "nowhere.py does not exist"),
        ({"reward_function": None, "reward_model": "/nowhere"}, "--reward_model /nowhere is no model and no adapter"),
        ({"ppo_epochs": 0}, "--ppo_epochs is 0; it must be at least 1"),
        ({"ppo_buffer_size": 0}, "--ppo_buffer_size is 0; it must be at least 1"),
        ({"ppo_target": 0}, "--ppo_target is 0; it must be above 0"),
        ({"ppo_kl_coef": -0.1}, "--ppo_kl_coef is -0.1; it must be at least 0"),
        ({"ppo_gamma": 1.5}, "--ppo_gamma is 1.5; it must be above 0 and at most 1"),
        ({"ppo_lam": -1}, "--ppo_lam is -1; it must be at least 0 and at most 1"),
        ({"ppo_cliprange": 0}, "--ppo_cliprange is 0; it must be above 0"),
        ({"ppo_cliprange_value": "nan"}, "--ppo_cliprange_value is nan"),
        ({"temperature": 0}, "--temperature is 0.0; with ppo it must be above 0"),
        ({"top_p": 0}, "--top_p is 0; it must be above 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens is 0; it must be at least 1"),
        ({"ref_model": "/nowhere"}, "--ref_model /nowhere is not a folder with a config.json"),
        ({"deepspeed": "{}"}, "--deepspeed does not work with --stage ppo"),
        ({"streaming": True}, "--streaming works with --stage pt and sft, not with ppo"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau follows the validation loss"),
        ({"metric_for_best_model": "loss"}, "loss is not measured by --stage ppo; use reward, reward_std"),
        ({"stage": "sft"}, "--reward_function belongs to --stage ppo"),
        ({"stage": "sft", "reward_function": None, "ppo_epochs": 2}, "--ppo_epochs belongs to --stage ppo"),
    ],
)
def test_impossible_runs_are_refused_before_loading(model, files, tmp_path, changes, message, monkeypatch, capsys):
    monkeypatch.setattr(workflow, "prepare_model", lambda *_: pytest.fail("the model was loaded"))
    argv = options(files, **changes)
    if changes.get("stage") == "sft":
        argv = {key: value for key, value in argv.items() if key != "ppo_epochs" or "ppo_epochs" in changes}
    assert train(model, files / "train.jsonl", tmp_path / "o", **argv) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "o").exists()


def test_the_best_checkpoint_is_the_one_with_the_highest_reward(model, files, tmp_path):
    changes = {"max_steps": 4, "save_steps": 1, "validation_file": files / "validation.jsonl", "save_total_limit": 1}
    changes |= {"load_best_model_at_end": True, "metric_for_best_model": "reward"}
    trainer = run(model, files, tmp_path / "o", **changes)
    rewards = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert trainer.state.best_metric == max(rewards)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{rewards.index(max(rewards)) + 1}"
    result, kept = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "o", best))
    assert all(torch.equal(result[name], kept[name]) for name in kept)


def test_early_stopping_follows_the_reward(model, files, tmp_path):
    """Nothing is learned at a learning rate of 0, and the first checkpoint stays the best one."""
    (files / "short.py").write_text("def short(prompts, replies): return [-len(r) for r in replies]", encoding="utf-8")
    changes = {"reward_function": f"{files / 'short.py'}:short", "learning_rate": 0.0, "max_steps": 6, "save_steps": 1}
    changes |= {"validation_file": files / "validation.jsonl", "early_stopping_patience": 2}
    trainer = run(model, files, tmp_path / "o", **changes)
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("reward", True)
    assert (trainer.state.global_step, trainer.state.best_global_step) == (3, 1)


def test_a_reward_is_checked_without_training(model, files, tmp_path):
    """--do_eval alone: the mean reward of a model as it is."""
    changes = {"do_eval": True, "validation_file": files / "validation.jsonl", "max_steps": None}
    trainer = run(model, files, tmp_path / "o", **changes)
    assert trainer.state.log_history[-1]["eval_reward"] > 0
    assert not (tmp_path / "o" / "adapter_config.json").exists()
    assert json.loads((tmp_path / "o" / "settings.json").read_text())["stage"] == "ppo"


# Other processes


@pytest.mark.thorough
def test_two_processes_learn_as_one(model, files, tmp_path):
    """The likeliest tokens in place of drawn ones (--top_k 1): both then have the same replies.

    The two processes stop in the middle of a rollout, and go on from there.
    """
    changes = {"top_k": 1, "ppo_whiten_rewards": True, "ppo_score_norm": True, "lr_scheduler_type": "constant"}
    changes |= {"validation_file": files / "validation.jsonl", "save_steps": 3}
    one = run(model, files, tmp_path / "one", max_steps=5, **changes)
    for steps in (3, 5):
        argv = options(files, max_steps=steps, gradient_accumulation_steps=1, resume_from_checkpoint=True, **changes)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [REPOSITORY / "finetune_chatmodel_demo" / "finetune.py"]
        command += flags(model, files / "train.jsonl", tmp_path / "two", ddp_backend="gloo", **argv)
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = {path.name for path in (tmp_path / "two" / "checkpoint-3").iterdir()}
    assert {"ppo_state.pt", "ppo_rollout_0.pt", "ppo_rollout_1.pt"} <= names
    for key in ("loss", "grad_norm", "reward", "reward_std", "kl", "kl_coef", "entropy", "explained_variance", "epoch"):
        logs = [[entry[key] for entry in log if "loss" in entry] for log in (read_log(tmp_path / "two"), entries(one))]
        assert logs[0] == pytest.approx(logs[1], rel=1e-3, abs=1e-5), key
    validated = [[e["eval_reward"] for e in read_log(tmp_path / name) if "eval_reward" in e] for name in ("two", "one")]
    assert validated[0] == pytest.approx(validated[1]) and len(validated[0]) == 2
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=1e-3)


@pytest.mark.thorough
def test_a_killed_run_ends_with_the_same_weights(model, files, tmp_path):
    """Killed in the middle of an update, and of writing a checkpoint."""
    changes = {"max_steps": 9, "save_steps": 3}
    whole = run(model, files, tmp_path / "whole", **changes)
    killed = tmp_path / "killed"
    argv = flags(model, files / "train.jsonl", killed, **options(files, resume_from_checkpoint=True, **changes))
    for owner, name, count in (
        (f"{ppo.__name__}:PPOTrainer", "_learn_from", 10),
        ("finetune_chatmodel_demo.common.files", "flush", 8),
    ):
        die_at(owner, name, count, argv)
        assert checkpoints.find_last_checkpoint(killed).name == "checkpoint-3"
    resumed = run(model, files, killed, resume_from_checkpoint=True, **changes)
    assert entries(resumed) == entries(whole)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["lora", "ptuning"])
def test_a_quantized_base(model, files, tmp_path, method):
    pytest.importorskip("bitsandbytes")
    changes = METHODS[method] | {"quantization_bit": 4, "max_steps": 3}
    log = entries(run(model, files, tmp_path / "o", **changes))
    assert log[0]["ratio"] == pytest.approx(1, abs=1e-3)
    assert all(math.isfinite(entry["loss"]) for entry in log)
    assert log[-1]["kl_k3"] > 0
