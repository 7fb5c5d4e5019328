"""DPO: losses, rewards and gradients against plain formulas, the reference model, what each method trains and saves."""

import json
import math
from pathlib import Path

import pytest
import torch
from preference_helpers import METHODS, build_trainer, once, read_evaluation, remember_runs, train, write_pairs
from safetensors.torch import load_file
from training_helpers import assert_resumes_to_the_same_weights, decide, load_result, losses, read_log

from finetune_chatmodel_demo.chatglm3 import ChatGLM3ForCausalLM, load_model
from finetune_chatmodel_demo.chatglm3.lora import load_adapter
from finetune_chatmodel_demo.training import checkpoints, methods
from finetune_chatmodel_demo.training.arguments import StageArguments
from finetune_chatmodel_demo.training.stages.dpo import preference_figures
from finetune_chatmodel_demo.training.stages.reference import ReplyRows

BETA = 0.2
PROBE = torch.tensor([[5, 17, 99, 250, 31, 7, 1200, 44]])
FILES = {"ptuning": "prefix_encoder.safetensors", "lora": "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def other_model(tmp_path_factory, model):
    """Another model with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(1)
    changed = load_model(model)
    move(changed, 0.02)
    changed.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows=10)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model, data):
    """A trained LoRA adapter."""
    folder = tmp_path_factory.mktemp("adapter") / "o"
    assert train(model, data, folder, stage="dpo", **METHODS["lora"]) == 0
    return folder


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, model, data):
    """A trained prefix."""
    folder = tmp_path_factory.mktemp("prefix") / "o"
    assert train(model, data, folder, stage="dpo", **METHODS["ptuning"]) == 0
    return folder


def move(model, distance):
    """Moves what is trained away from where it is."""
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value), alpha=distance)


def plain_log_probs(model, items):
    """Log-probabilities of the chosen and of the rejected replies, from all logits of one row after the other."""
    found = []
    for key in ("chosen_ids", "rejected_ids"):
        values = []
        for item in items:
            prompt, reply = item["prompt_ids"], item[key]
            logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
            log_probs = logits - logits.exp().sum(dim=-1, keepdim=True).log()
            values.append(log_probs[torch.arange(len(reply)), torch.tensor(reply)].sum())
        found.append(torch.stack(values))
    return found


def plain_loss(kind, policy, reference, items, smoothing=0.0, ftx=0.0):
    """The losses as their papers write them, (B,)."""
    chosen, rejected = (p - r for p, r in zip(policy, reference))
    lengths = [torch.tensor([len(item[key]) for item in items]) for key in ("chosen_ids", "rejected_ids")]
    x = BETA * (chosen - rejected)
    if kind == "sigmoid":
        loss = (1 + torch.exp(-x)).log()
        if smoothing:
            loss = ((1 - smoothing) * loss - smoothing * (1 + torch.exp(x)).log()) / (1 - 2 * smoothing)
    elif kind == "hinge":
        loss = (1 - x).clamp(min=0)
    else:
        loss = (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * BETA)) ** 2
    return loss + ftx * -policy[0].sum() / lengths[0].sum()


def items_of(trainer):
    return [trainer.train_dataset.rows[i] for i in range(len(trainer.train_dataset))]


def batch_of(trainer):
    """All pairs in one batch."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    return {name: values for name, values in batch.items() if name not in ("row_index", "token_counts")}


# Losses and figures

GOLDEN = json.loads((Path(__file__).parent / "golden" / "preference_losses.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: "-".join(map(str, case["flags"].values())))
def test_losses_and_figures_are_those_of_trl(case):
    """trl 1.16.0; the numbers were written by `python tests/golden/make_preference_losses.py`."""
    policy, reference = (torch.tensor(GOLDEN[name], dtype=torch.float64) for name in ("policy", "reference"))
    if case["flags"]["pref_loss"] in ("orpo", "simpo"):
        reference = torch.zeros_like(policy)
    lengths = torch.tensor([*GOLDEN["lengths"]["chosen"], *GOLDEN["lengths"]["rejected"]])
    figures = preference_figures(StageArguments(stage="dpo", **case["flags"]), policy, reference, lengths)
    assert {name: figures[name].mean().item() for name in case["expected"]} == pytest.approx(case["expected"], rel=1e-6)


def test_a_reply_of_probability_1_has_a_finite_loss():
    log_probs = torch.tensor([0.0, -3.0], requires_grad=True)
    stage = StageArguments(stage="dpo", pref_loss="orpo")
    loss = preference_figures(stage, log_probs, torch.zeros(2), torch.tensor([2, 2]))["loss"].sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(log_probs.grad).all()


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("sigmoid", {}),
        ("hinge", {}),
        ("ipo", {}),
        ("sigmoid", {"smoothing": 0.1}),
        ("hinge", {"ftx": 0.5}),
    ],
)
def test_loss_rewards_and_gradients_are_those_of_the_formula(kind, extra, model, data, tmp_path):
    options = {"stage": "dpo", "finetuning_type": "full", "pref_beta": BETA, "pref_loss": kind}
    options |= {"dpo_label_smoothing": extra.get("smoothing", 0.0), "pref_ftx": extra.get("ftx", 0.0)}
    trainer = build_trainer(model, data, tmp_path / "o", **options)
    torch.manual_seed(0)
    move(trainer.model, 0.01)
    items = items_of(trainer)
    with torch.no_grad():
        reference = plain_log_probs(load_model(model), items)
    policy = plain_log_probs(trainer.model, items)
    expected = plain_loss(kind, policy, reference, items, **extra).mean()
    expected.backward()
    gradients = {name: value.grad.clone() for name, value in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(value.grad, gradients[name], rtol=1e-3, atol=1e-4)
    rewards = [BETA * (p - r) for p, r in zip(policy, reference)]
    figures = {
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": rewards[0] - rewards[1],
        "rewards/accuracies": (rewards[0] > rewards[1]).float(),
        "logps/chosen": policy[0],
        "logps/rejected": policy[1],
    }
    found = trainer._trained.collect(trainer.FIGURES, lambda sums: sums)
    for name, values in figures.items():
        assert found[name] == pytest.approx(values.mean().item(), rel=1e-4, abs=1e-4), name


def test_evaluation_is_a_mean_over_pairs_whatever_the_batch(model, data, tmp_path):
    options = {"stage": "dpo", "finetuning_type": "full", "pref_beta": BETA, "validation_file": data}
    trainer = build_trainer(model, data, tmp_path / "o", per_device_eval_batch_size=3, **options)
    move(trainer.model, 0.01)
    items = items_of(trainer)
    with torch.no_grad():
        policy, reference = (plain_log_probs(each, items) for each in (trainer.model, load_model(model)))
    found = trainer.evaluate()
    expected = plain_loss("sigmoid", policy, reference, items).mean().item()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-4)
    rewards = [BETA * (p - r) for p, r in zip(policy, reference)]
    assert found["eval_rewards/accuracies"] == pytest.approx((rewards[0] > rewards[1]).float().mean().item())
    assert found["eval_rewards/margins"] == pytest.approx((rewards[0] - rewards[1]).mean().item(), rel=1e-3)
    assert found["eval_logps/chosen"] == pytest.approx(policy[0].mean().item(), rel=1e-4)


def test_logits_of_all_positions_are_never_there(model, data, tmp_path):
    """(2B, T, 65,024) numbers would be most of a step's memory: only the replies' are computed, in chunks."""

    def refuse(_, states):
        assert states[0].dim() == 2 and len(states[0]) <= replies, "all logits are computed"

    for options in (METHODS["lora"], METHODS["full"]):
        trainer = build_trainer(model, data, tmp_path / "o", stage="dpo", **options)
        trainer.model.get_output_embeddings().register_forward_pre_hook(refuse)
        batch = batch_of(trainer)
        replies = int((batch["labels"] != -100).sum())
        trainer.compute_loss(trainer.model.train(), batch).backward()
        with pytest.raises(AssertionError, match="all logits"):
            trainer.model(input_ids=PROBE)


@pytest.mark.parametrize("method", once(["lora", "freeze", "full"], "lora"))
def test_the_first_loss_is_log_2(method, model, data, tmp_path):
    options = METHODS[method] | ({"lora_dropout": 0.5} if method == "lora" else {})
    assert train(model, data, tmp_path / "o", stage="dpo", max_steps=2, **options) == 0
    first, second = (entry for entry in read_log(tmp_path / "o") if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert second["rewards/margins"] != 0


def test_the_first_loss_is_log_2_in_half_precision(model, data, tmp_path):
    """Autocast keeps copies of the parameters; the reference must not be computed with the policy's, or the reverse."""
    options = METHODS["full"] | {"bf16": True, "max_steps": 3, "learning_rate": 3e-2}
    assert train(model, data, tmp_path / "o", stage="dpo", **options) == 0
    entries = [entry for entry in read_log(tmp_path / "o") if "loss" in entry]
    assert entries[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert entries[2]["rewards/margins"] > 0.5


def test_one_batch_of_four_equals_four_of_one(model, data, tmp_path):
    for name, (size, accumulation) in {"a": (4, 1), "b": (1, 4)}.items():
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        options |= {"train_sampling_strategy": "random", "learning_rate": 1e-3, "finetuning_type": "full"}
        assert train(model, data, tmp_path / name, stage="dpo", **options) == 0
    torch.testing.assert_close(losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=1e-4, atol=1e-5)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    for name in first.keys() - {name for name in first if "query_key_value.bias" in name}:  # a key's has no gradient
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


# The reference


def reference_of(trainer):
    batch = batch_of(trainer)
    lengths = (batch["labels"] != -100).sum(dim=1)
    return trainer.reference.log_probs(ReplyRows(batch["input_ids"], batch["lengths"] - lengths, lengths)).sum(dim=1)


def check_reference(trainer, expected_model):
    """The reference is `expected_model`, also when the policy has moved, and leaves the policy as it is."""
    items = items_of(trainer)
    with torch.no_grad():
        expected = torch.cat(plain_log_probs(expected_model, items))
    trainer.model.train()
    for distance in (0.0, 0.05):
        move(trainer.model, distance)
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        torch.testing.assert_close(reference_of(trainer), expected, rtol=1e-5, atol=1e-4)
        after = dict(trainer.model.named_parameters())
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert all(after[name].requires_grad == value for name, value in trainable_before(trainer).items())
    with torch.no_grad():
        policy = torch.cat(plain_log_probs(trainer.model.eval(), items))
    assert not torch.allclose(policy, expected, atol=1e-2)


def trainable_before(trainer):
    wanted = methods.prepare_model(trainer.settings)
    return {name: value.requires_grad for name, value in wanted.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_of_a_new_run_is_the_base(method, model, data, tmp_path):
    trainer = build_trainer(model, data, tmp_path / "o", stage="dpo", **METHODS[method])
    check_reference(trainer, load_model(model))


def test_the_reference_of_a_prefix_that_is_trained_on_is_the_base(model, prefix, data, tmp_path):
    options = {"stage": "dpo", "finetuning_type": "ptuning", "ptuning_checkpoint": prefix}
    trainer = build_trainer(model, data, tmp_path / "o", **options)
    check_reference(trainer, load_model(model))
    assert trainer.describe_objective()["reference"] == "the base model, the prefix off"


def test_the_reference_of_an_adapter_that_is_trained_on_is_that_adapter(model, adapter, data, tmp_path):
    options = {"stage": "dpo", "finetuning_type": "lora", "adapter_name_or_path": adapter}
    trainer = build_trainer(model, data, tmp_path / "o", **options)
    assert list(trainer.model.peft_config) == ["default"]
    check_reference(trainer, load_adapter(load_model(model), adapter))


@pytest.mark.parametrize("method", once(METHODS, "lora"))
def test_the_reference_can_be_another_model(method, model, other_model, data, tmp_path):
    trainer = build_trainer(model, data, tmp_path / "o", stage="dpo", ref_model=other_model, **METHODS[method])
    check_reference(trainer, load_model(other_model))
    assert not any(value.requires_grad for value in trainer.reference.model.parameters())


def test_policy_and_reference_have_no_dropout(model, data, tmp_path):
    for options in ({"pre_seq_len": 4}, {"finetuning_type": "lora", "lora_dropout": 0.5}):
        trainer = build_trainer(model, data, tmp_path / "o", stage="dpo", **options)
        move(trainer.model, 0.1)
        trainer.model.train()
        first, second = (trainer.compute_loss(trainer.model, batch_of(trainer)) for _ in range(2))
        assert first == second


def test_only_one_base_model_is_loaded(model, data, tmp_path, monkeypatch):
    loaded, original = [], ChatGLM3ForCausalLM.from_pretrained.__func__

    def from_pretrained(cls, path, **kwargs):
        loaded.append(path)
        return original(cls, path, **kwargs)

    monkeypatch.setattr(ChatGLM3ForCausalLM, "from_pretrained", classmethod(from_pretrained))
    for method in METHODS:
        build_trainer(model, data, tmp_path / "o", stage="dpo", **METHODS[method])
        assert loaded == [str(model)]
        loaded.clear()


# What is trained and saved


@pytest.mark.parametrize("method", once(METHODS, "ptuning"))
def test_only_what_is_trained_changes_and_it_loads_to_the_same_logits(method, model, data, tmp_path, monkeypatch):
    runs = remember_runs(monkeypatch)
    options = {"stage": "dpo", "validation_file": data, "eval_on_start": True, "max_steps": 8}
    assert train(model, data, tmp_path / "o", **METHODS[method], **options) == 0
    (trainer, before), after = runs[0], dict(runs[0][0].model.named_parameters())
    assert after.keys() == before.keys()
    trainable = {name for name, value in after.items() if value.requires_grad}
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed <= trainable
    # A key's bias shifts all of a query's attention scores alike: it has no gradient without a prefix.
    assert trainable - changed <= {name for name in trainable if "k_proj.bias" in name}
    with torch.no_grad():
        found = load_result(method, model, tmp_path / "o")(input_ids=PROBE).logits
        torch.testing.assert_close(found, trainer.model.eval()(input_ids=PROBE).logits, rtol=0, atol=1e-6)
        assert not torch.allclose(found, load_model(model)(input_ids=PROBE).logits)
    log = [entry for entry in read_log(tmp_path / "o") if "eval_loss" in entry]
    assert log[-1]["eval_rewards/margins"] > log[0]["eval_rewards/margins"]
    names = {path.relative_to(tmp_path / "o").as_posix() for path in (tmp_path / "o").rglob("*")}
    assert not [name for name in names if "/ref" in f"/{name}" or name.endswith(("README.md", ".arrow"))]
    if method in FILES:
        assert not any(name.endswith("/model.safetensors") for name in [f"/{name}" for name in names])
    else:
        first, second = (json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "o"))
        assert second == first | {"prompt_format": "multi-turn"}


@pytest.mark.parametrize("start", once([*METHODS, "adapter", "prefix"], "adapter"))
def test_a_resumed_run_ends_with_the_same_weights(start, model, adapter, prefix, data, tmp_path):
    """The reference of the second part is that of the first one, although the policy has moved."""
    method = {"adapter": "lora", "prefix": "ptuning"}.get(start, start)
    options = METHODS[method] | {"stage": "dpo"}
    if start == "adapter":
        options["adapter_name_or_path"] = adapter
    if start == "prefix":
        options |= {"ptuning_checkpoint": prefix}
    file = FILES.get(method, "model.safetensors")
    assert_resumes_to_the_same_weights(model, data, tmp_path, file, **options)
    log = [[entry["rewards/margins"] for entry in read_log(tmp_path / name) if "loss" in entry] for name in "ab"]
    assert log[0] == log[1]


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["ptuning", "lora"])
def test_a_quantized_base(method, model, data, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    runs = remember_runs(monkeypatch)
    options = METHODS[method] | {"quantization_bit": 4, "max_steps": 6, "save_steps": 3, "stage": "dpo"}
    assert train(model, data, tmp_path / "a", **options) == 0
    trained = {name: value for name, value in runs[0][0].model.named_parameters() if value.requires_grad}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert not all(torch.equal(value, value.bfloat16().float()) for value in trained.values())
    assert train(model, data, tmp_path / "b", **options) == 0
    checkpoints.remove_checkpoint(tmp_path / "b" / "checkpoint-6")
    assert train(model, data, tmp_path / "b", resume_from_checkpoint=True, **options) == 0
    first, second = (load_file(tmp_path / name / FILES[method]) for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", once(METHODS, "lora"))
def test_gradient_checkpointing_changes_nothing(method, model, data, tmp_path):
    found = []
    for name in ("True", "False"):
        options = METHODS[method] | {"gradient_checkpointing": name, "max_steps": 2}
        assert train(model, data, tmp_path / name, stage="dpo", **options) == 0
        found.append(losses(tmp_path / name))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


# What a user sees


def test_the_run_is_described(model, data, tmp_path, capsys):
    options = {"pref_loss": "hinge", "pref_ftx": 0.5, "pref_beta": 0.3, "finetuning_type": "lora", "max_steps": 1}
    assert train(model, data, tmp_path / "o", stage="dpo", lora_dropout=0.1, **options) == 0
    printed = capsys.readouterr().out
    assert "sanity check: the first pair\n  prompt    '[gMASK]sop<|user|>" in printed
    assert "dpo, direct preference optimization" in printed
    assert "  loss           hinge + 0.5 × sft, beta 0.3\n" in printed
    assert "  reference      the base model, the adapter off\n" in printed
    assert "note: --stage dpo trains without dropout" in printed


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"stage": "dpo", "pre_seq_len": 4}, 1e-2),
        ({"stage": "dpo", "finetuning_type": "lora"}, 5e-6),
        ({"stage": "dpo", "finetuning_type": "full"}, 1e-6),
        ({"stage": "rm", "finetuning_type": "lora"}, 1e-4),
        ({"stage": "rm", "finetuning_type": "full"}, 9e-6),
        ({"stage": "dpo", "finetuning_type": "lora", "learning_rate": 1e-3}, 1e-3),
    ],
)
def test_learning_rates_belong_to_stage_and_method(options, rate, model, data, tmp_path):
    training = decide(model, data, tmp_path / "o", **options).training
    assert training.learning_rate == rate
    assert (training.bf16, training.gradient_checkpointing) == (False, False)


def test_results_are_in_the_files_that_users_know(model, data, tmp_path):
    options = METHODS["lora"] | {"validation_file": data, "eval_on_start": True, "save_steps": 2}
    assert train(model, data, tmp_path / "o", stage="dpo", **options) == 0
    evaluations = [entry for entry in read_log(tmp_path / "o") if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 2, 4]
    assert evaluations[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert evaluations[-1]["eval_rewards/margins"] > 0
    assert read_evaluation(tmp_path / "o")["eval_rewards/margins"] == evaluations[-1]["eval_rewards/margins"]
    log = (tmp_path / "o" / "trainer_log.jsonl").read_text(encoding="utf-8")
    assert '"accuracy"' in log and '"eval_accuracy"' in log


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pref_beta": 0}, "--pref_beta is 0; it must be above 0"),
        ({"pref_ftx": -1}, "--pref_ftx is -1; it must be at least 0"),
        ({"dpo_label_smoothing": 0.5}, "--dpo_label_smoothing is 0.5; it must be at least 0 and below 0.5"),
        ({"dpo_label_smoothing": 0.1, "pref_loss": "ipo"}, "--dpo_label_smoothing is for --pref_loss sigmoid, not ipo"),
        ({"ref_model": "/nowhere"}, "--ref_model /nowhere is not a folder with a config.json"),
        ({"ref_model": "/nowhere", "pref_loss": "orpo"}, "--pref_loss orpo compares with no reference"),
        ({"simpo_gamma": 1}, "--simpo_gamma is for --pref_loss simpo, not sigmoid"),
        ({"metric_for_best_model": "accuracy"}, "accuracy is not measured by --stage dpo; use loss, rewards/chosen"),
    ],
)
def test_impossible_settings_are_refused(options, message, model, data, tmp_path, capsys):
    assert train(model, data, tmp_path / "o", **{"stage": "dpo", "finetuning_type": "full"} | options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_runs_with_another_objective_are_noted(model, data, tmp_path, capsys):
    options = METHODS["lora"] | {"stage": "dpo", "save_steps": 2}
    assert train(model, data, tmp_path / "o", **options) == 0
    assert train(model, data, tmp_path / "o", resume_from_checkpoint=True, pref_beta=0.5, max_steps=6, **options) == 0
    assert "pref_beta was 0.1, is 0.5" in capsys.readouterr().out


# Proof


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"finetuning_type": "freeze", "learning_rate": 2e-4}, 30),
        ({"finetuning_type": "full", "learning_rate": 5e-5}, 30),
    ],
    ids=["freeze", "full"],
)
def test_true_answers_are_preferred_in_held_out_pairs(options, steps, tiny_folder, tmp_path):
    """On the embedded model, which knows the facts, seed 1; 226 pairs in other words and with other false answers.

    A pair counts as preferred when the policy has moved away from the reference in favour of the true answer. The
    proofs of ptuning and lora are in test_proofs.py.
    """
    values = {
        "stage": "dpo",
        "dataset": "pokemon_preference",
        "eval_dataset": "pokemon_preference_validation",
        "train_file": None,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "max_steps": steps,
        "logging_steps": 10,
        "eval_on_start": True,
        "seed": 1,
        **options,
    }
    assert train(tiny_folder, None, tmp_path / "o", **values) == 0
    start, end = (entry for entry in read_log(tmp_path / "o") if "eval_loss" in entry)
    assert (start["eval_rewards/accuracies"], start["eval_rewards/margins"]) == (0, 0)
    assert end["eval_rewards/accuracies"] > 0.9
    assert end["eval_rewards/margins"] > start["eval_rewards/margins"] + 0.3
    # The chosen replies have 16 tokens on average. They may lose 0.1 nats a token, and gain instead.
    assert end["eval_logps/chosen"] > start["eval_logps/chosen"] - 0.1 * 16
