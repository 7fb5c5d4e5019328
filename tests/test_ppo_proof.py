"""PPO learns what it is rewarded for: the embedded model, questions of the Pokémon data, three seeds, KL bounded.

The target can be checked: a reply that mentions a colour (the character 色). Once the rule itself is the reward, and
once a reward model is, which `--stage rm` has learned from pairs that the rule has sorted.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from conversation_helpers import conversation, user, write_jsonl
from training_helpers import flags

from finetune_chatmodel_demo.chatglm3 import load_model, load_tokenizer
from finetune_chatmodel_demo.conversation.render import render_prompt
from finetune_chatmodel_demo.generation.replies import read_reply
from finetune_chatmodel_demo.generation.session import build_settings
from finetune_chatmodel_demo.training import workflow
from finetune_chatmodel_demo.training.command_line import parse_given
from finetune_chatmodel_demo.training.deciding import decide_settings
from finetune_chatmodel_demo.training.stages.ppo_rollouts import write_replies

DATASETS = REPOSITORY / "data_processing" / "datasets"
SEEDS = (1, 2, 3)
REPLY_TOKENS = 16
LARGEST_KL = 8.0  # nats of a whole reply; --ppo_target is 6

pytestmark = pytest.mark.usefixtures("one_thread")


def first_questions(file: str, count: int) -> list[str]:
    """The first question of each conversation, each once."""
    records = [json.loads(line) for line in (DATASETS / file).read_text(encoding="utf-8").splitlines()]
    turns = [record.get("messages") or record["conversations"] for record in records]
    found = dict.fromkeys(next(turn["content"] for turn in each if turn["role"] == "user") for each in turns)
    return random.Random(0).sample(list(found), min(count, len(found)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prompts to train and to validate on, and the rule."""
    folder = tmp_path_factory.mktemp("proof")
    for name, file, count in (("train", "pokemon", 400), ("validation", "pokemon_validation", 64)):
        questions = first_questions(f"{file}.jsonl", count)
        write_jsonl(folder / f"{name}.jsonl", [conversation(user(question)) for question in questions])
    rule = "def colour(prompts, replies):\n    return [float('色' in reply) for reply in replies]\n"
    (folder / "rewards.py").write_text(rule, encoding="utf-8")
    return folder


def run(folder: Path, tiny_folder: Path, output: Path, **options: object):
    argv = flags(tiny_folder, folder / "train.jsonl", output, train_format=None, plot_loss=False, **options)
    return workflow.run_finetuning(decide_settings(*parse_given(argv)))


def train_policy(folder: Path, tiny_folder: Path, output: Path, **options: object):
    """40 updates from 10 rollouts of 64 replies."""
    values = {
        "stage": "ppo",
        "finetuning_type": "lora",
        "validation_file": folder / "validation.jsonl",
        "max_new_tokens": REPLY_TOKENS,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "ppo_kl_coef": 0.05,
        "ppo_epochs": 2,
        "ppo_buffer_size": 2,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 64,
        "max_steps": 40,
        "logging_steps": 4,  # a rollout
        "save_strategy": "no",
        "eval_on_start": True,
    }
    return run(folder, tiny_folder, output, **values | options)


def summarise(trainer, name: str, seed: int) -> dict[str, float]:
    """First and last figures of a run; printed, so that `pytest -s` shows the table."""
    log = trainer.state.log_history
    updates = [entry for entry in log if "loss" in entry]
    greedy = [entry["eval_reward"] for entry in log if "eval_reward" in entry]
    mean = {key: sum(entry[key] for entry in updates[-3:]) / 3 for key in ("reward", "kl", "kl_k3", "entropy")}
    figures = {"drawn_before": updates[0]["reward"], "deviation_before": updates[0]["reward_std"]}
    figures |= {"drawn": mean["reward"], "kl": mean["kl"], "kl_k3": mean["kl_k3"]}
    figures |= {"greedy_before": greedy[0], "greedy": greedy[-1], "entropy": mean["entropy"]}
    print(name, seed, json.dumps({key: round(value, 3) for key, value in figures.items()}))
    return figures


@pytest.mark.thorough
@pytest.mark.parametrize("seed", SEEDS)
def test_a_rule_as_reward(folder, tiny_folder, tmp_path, seed):
    reward = f"{folder / 'rewards.py'}:colour"
    trainer = train_policy(folder, tiny_folder, tmp_path / "o", reward_function=reward, seed=seed)
    figures = summarise(trainer, "rule", seed)
    assert figures["drawn_before"] < 0.4
    assert figures["drawn"] > figures["drawn_before"] + 0.5
    assert figures["greedy"] > figures["greedy_before"] + 0.4
    assert max(figures["kl"], figures["kl_k3"]) < LARGEST_KL


# A reward model


def draw_pairs(folder: Path, tiny_folder: Path) -> list[dict]:
    """Replies of the embedded model to the training questions: pairs of one with and one without the character."""
    model, tokenizer = load_model(tiny_folder), load_tokenizer(tiny_folder)
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [render_prompt(tokenizer, record["conversations"]) for record in records]
    settings = build_settings(
        tokenizer, max_new_tokens=REPLY_TOKENS, do_sample=True, temperature=1.0, top_p=1.0, top_k=0
    )
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = [write_replies(model, prompts, settings, batch_size=100) for _ in range(8)]
    pairs = []
    for record, replies in zip(records, zip(*drawn)):
        texts = [read_reply(tokenizer, reply.ids).text for reply in replies]
        better, worse = ([text for text in texts if ("色" in text) is wanted] for wanted in (True, False))
        for chosen, rejected in zip(better, worse):
            pair = {"chosen": chosen, "rejected": rejected}
            messages = {key: {"role": "assistant", "content": text} for key, text in pair.items()}
            pairs.append({"conversations": record["conversations"], **messages})
    return pairs


@pytest.fixture(scope="module")
def reward_model(folder, tiny_folder) -> Path:
    """A LoRA reward model from --stage rm, over 0.9 on held-out pairs."""
    pairs = draw_pairs(folder, tiny_folder)
    assert len(pairs) > 200
    write_jsonl(folder / "pairs_validation.jsonl", pairs[:50])
    write_jsonl(folder / "pairs.jsonl", pairs[50:])
    options = {
        "stage": "rm",
        "finetuning_type": "lora",
        "train_file": folder / "pairs.jsonl",
        "validation_file": folder / "pairs_validation.jsonl",
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 16,
        "max_steps": 30,
        "logging_steps": 5,
        "save_strategy": "no",
    }
    trainer = run(folder, tiny_folder, folder / "rm", **options)
    accuracy = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry][-1]
    assert accuracy > 0.9
    return folder / "rm"


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in SEEDS[1:])])
def test_a_reward_model_as_reward(folder, tiny_folder, reward_model, tmp_path, seed):
    # Its scores have a scale of their own, which the KL's coefficient should not depend on.
    options = {"reward_model": reward_model, "ppo_score_norm": True, "ppo_kl_coef": 0.1}
    trainer = train_policy(folder, tiny_folder, tmp_path / "o", seed=seed, **options)
    figures = summarise(trainer, "reward model", seed)
    assert figures["drawn"] > figures["drawn_before"] + 0.6 * figures["deviation_before"]
    assert max(figures["kl"], figures["kl_k3"]) < LARGEST_KL
    # What the reward model was taught, on questions that neither has seen.
    tokenizer = trainer.tokenizer_to_save
    prompts = [row["input_ids"] for row in trainer.eval_dataset.rows]
    replies = trainer.collector.answer(prompts, list(range(len(prompts))), is_greedy=True)
    share = sum("色" in read_reply(tokenizer, reply.ids).text for reply in replies) / len(replies)
    print("share of greedy replies with the character:", share)
    assert share > 0.8
