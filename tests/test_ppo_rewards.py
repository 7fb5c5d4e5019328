"""PPO's rewards: reward models of both forms against the model's own forward pass, and functions of a user."""

import re
from pathlib import Path

import pytest
import torch

from finetune_chatmodel_demo.chatglm3 import load_model
from finetune_chatmodel_demo.chatglm3.lora import add_adapter, load_adapter, save_adapter
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training.stages.ppo_rewards import (
    RewardError,
    RewardFunction,
    RewardModel,
    check_reward_model,
    load_function,
    load_reward_model,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reward_model(model, tmp_path_factory, tokenizer) -> Path:
    """A reward model with random weights, in the form of --stage rm with all parameters."""
    folder = tmp_path_factory.mktemp("rm")
    torch.manual_seed(1)
    scorer = load_model(model, head="score")
    torch.nn.init.normal_(scorer.score.weight)
    scorer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_adapter(model, tmp_path_factory) -> Path:
    """The same as a LoRA adapter."""
    folder = tmp_path_factory.mktemp("rm_adapter")
    torch.manual_seed(2)
    scorer = add_adapter(load_model(model, head="score"), rank=2)
    for name, value in scorer.named_parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value, std=0.2)
            assert "lora_" in name or "score" in name
    save_adapter(scorer, folder, base_model=str(model))
    return folder


# Reward models


@pytest.mark.parametrize("kind", ["reward_model", "reward_adapter"])
def test_scores_are_those_of_the_last_token(kind, model, tokenizer, request):
    folder = request.getfixturevalue(kind)
    reward = RewardModel(load_reward_model(folder, dtype=torch.float32, device=CPU), tokenizer, batch_size=2)
    eos = tokenizer.eos_token_id
    prompts = [[64, 65, 70, 71], [64, 65, 72], [64, 65, 73, 74, 75]]
    replies = [[80, 81, eos], [82, eos], [83, 84, 85]]  # the last one hit the limit
    scores = reward(prompts, replies)
    if kind == "reward_model":
        plain = load_model(folder, head="score")
    else:
        plain = load_adapter(load_model(model, head="score"), folder)
    for prompt, reply, score in zip(prompts, replies, scores, strict=True):
        with torch.no_grad():
            expected = plain.eval()(torch.tensor([prompt + reply])).logits[0, 0]
        assert score.item() == pytest.approx(expected.item(), rel=1e-5)
    assert scores.unique().numel() == 3
    assert not any(value.requires_grad for value in reward.model.parameters())


def test_a_reply_that_ends_with_the_next_role_is_scored_with_eos(reward_model, tokenizer):
    """Rows of --stage rm end with eos, or `<|observation|>` after a call."""
    reward = RewardModel(load_reward_model(reward_model, dtype=torch.float32, device=CPU), tokenizer, batch_size=4)
    eos, user, observation = tokenizer.stop_token_ids
    first, second, third = reward([[64, 65, 70]] * 3, [[80, user], [80, eos], [80, observation]])
    assert first == second != third


def test_what_is_no_reward_model_is_refused(model, reward_adapter, tmp_path):
    save_adapter(add_adapter(load_model(model), rank=2), tmp_path / "lora", base_model=str(model))
    save_adapter(add_adapter(load_model(model, head="score"), rank=2), tmp_path / "orphan")
    config = tmp_path / "orphan" / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"{model}"', "null"))
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (model, "not a reward model; train one with --stage rm"),
        (tmp_path / "lora", "is an adapter of a language model, not of a reward model"),
        (tmp_path / "orphan", "does not say which base model it belongs to"),
        (tmp_path / "empty", r"is no model and no adapter: it has no config.json \(found: nothing\)"),
        (tmp_path / "nowhere", r"it has no config.json \(found: no such folder\)"),
    ):
        with pytest.raises(UserError, match=message):
            load_reward_model(folder, dtype=torch.float32, device=CPU)
    assert check_reward_model(reward_adapter) == model


# Functions


@pytest.fixture
def write(tmp_path):
    """Writes a Python file and returns FILE.py:NAME."""

    def write_function(body: str, name: str = "score") -> str:
        path = tmp_path / "rewards.py"
        path.write_text(body, encoding="utf-8")
        return f"{path}:{name}"

    return write_function


def test_a_function_gets_texts(write, tokenizer):
    reference = write(
        "seen = []\ndef score(prompts, replies):\n    seen.append((prompts, replies))\n    return [1, 2.5]"
    )
    reward = RewardFunction(reference, tokenizer, "multi-turn")
    start = [tokenizer.get_command(name) for name in ("[gMASK]", "sop")]
    prompt = [*start, *tokenizer.build_single_message("user", "", "你好"), tokenizer.get_command("<|assistant|>")]
    answer = tokenizer.encode_text("\n 电属性")
    call = tokenizer.encode_text("get_height\n ```python\ntool_call(name='皮卡丘')\n```")
    replies = [[*answer, tokenizer.eos_token_id], [*call, tokenizer.get_command("<|observation|>")]]
    scores = reward([prompt, prompt], replies)
    assert (scores.tolist(), scores.dtype) == ([1.0, 2.5], torch.float32)
    ((prompts, texts),) = reward.function.__globals__["seen"]
    assert prompts == ["[gMASK]sop<|user|> \n 你好<|assistant|>"] * 2
    assert texts[0] == "电属性"
    assert texts[1].startswith("[tool call: get_height]\n```python")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "def score(p, r): return r[0] / 2",
            r"score failed, or .*TypeError: unsupported.*the first of its 2 replies was '电'",
        ),
        ("def score(p, r): return None", "returned no list of numbers: TypeError: 'NoneType' object is not iterable"),
        ("def score(p, r): return 'ab'", "returned no list of numbers: ValueError: .*'a'"),
        ("def score(p, r): return [1.0]", "returned 1 scores for 2 replies; it must return one each, in their order"),
        ("def score(p, r): return [1.0, 'x']", "returned no list of numbers: ValueError: .*'x'"),
        ("def score(p, r): return [float('nan'), 1]", "returned nan for the reply '电'; expected a finite number"),
    ],
)
def test_bad_functions_are_explained(write, tokenizer, body, message):
    reward = RewardFunction(write(body), tokenizer, "multi-turn")
    ids = [*tokenizer.encode_text("\n 电"), tokenizer.eos_token_id]
    with pytest.raises(RewardError, match=message):
        reward([[64], [64]], [ids, ids])


def test_numbers_of_other_libraries_are_numbers(write, tokenizer):
    body = "import numpy, torch\ndef score(p, r): return numpy.array([1, 2.0])\ndef other(p, r): return torch.ones(2)"
    ids = [[5, 2], [5, 2]]
    assert RewardFunction(write(body), tokenizer, "multi-turn")(ids, ids).tolist() == [1, 2]
    assert RewardFunction(write(body, "other"), tokenizer, "multi-turn")(ids, ids).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("body", "name", "message"),
    [
        ("def score(p, r): return []", "scores", r"has no function 'scores' \(found: score\)"),
        ("score = 3", "score", r"has no function 'score' \(found: none\)"),
        ("def score(p, r) return []", "score", "is no Python program: .*line 1"),
        ("import nowhere_to_be_found", "score", "cannot be run: ModuleNotFoundError"),
    ],
)
def test_files_without_the_function_are_explained(write, body, name, message):
    with pytest.raises(UserError, match=message):
        load_function(write(body, name))


def test_the_form_of_the_reference_is_checked(tmp_path):
    for reference in ("rewards.py", "rewards:score", ":score", "rewards.py:"):
        with pytest.raises(UserError, match=r"is not of the form FILE\.py:NAME"):
            load_function(reference)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'none.py'} does not exist")):
        load_function(f"{tmp_path / 'none.py'}:score")
