"""--do_predict: which reply is asked for, the answers, and their scores against figures computed by hand."""

import importlib.util
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY
from conversation_helpers import assistant, conversation, user, write_jsonl
from training_helpers import flags, read_log, train, write_conversations

from finetune_chatmodel_demo.chatglm3 import load_model
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation import build_dataset
from finetune_chatmodel_demo.conversation.data_arguments import DataArguments
from finetune_chatmodel_demo.conversation.records import read_records
from finetune_chatmodel_demo.conversation.render import render_prompt
from finetune_chatmodel_demo.generation.batch import generate_replies
from finetune_chatmodel_demo.training import prediction
from finetune_chatmodel_demo.training.arguments import GenerationArguments
from finetune_chatmodel_demo.training.prediction import choose_answer_length, run_prediction, take_last_reply

has_packages = all(importlib.util.find_spec(name) for name in prediction.PACKAGES)
needs_packages = pytest.mark.skipif(not has_packages, reason="jieba, nltk or rouge-chinese is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def loaded(model):
    return load_model(model, device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "validation.jsonl", rows=7)


@pytest.fixture(scope="module")
def rows(data, tokenizer):
    return build_dataset("multi-turn", data, tokenizer, **DataArguments().dataset_options())


def make_settings(max_new_tokens=8, given=("max_new_tokens",), prompt_format="multi-turn", batch_size=3, **generation):
    """As much of a run's settings as predictions need."""
    training = SimpleNamespace(
        process_index=0,
        world_size=1,
        per_device_eval_batch_size=batch_size,
        should_log=False,
        should_save=True,
        disable_tqdm=True,
        seed=3,
    )
    return SimpleNamespace(
        training=training,
        generation=GenerationArguments(max_new_tokens=max_new_tokens, **generation),
        prompt_format=prompt_format,
        precision="float32",
        given=dict.fromkeys(given),
    )


# Scores


@needs_packages
@pytest.mark.parametrize(
    ("predicted", "label", "expected"),
    [
        ("妙蛙种子的属性是草、毒。", "妙蛙种子的属性是草、毒。", (100, 100, 100, 100)),
        # Characters: 2 of 3, 1 of 2, none of 1 (1/2), none (1/4). Words: 电 属性 against 水 属性: 1 of 2.
        ("电属性", "水属性", (100 * (2 / 3 * 1 / 2 * 1 / 2 * 1 / 4) ** 0.25, 50, 0, 50)),
        # All of the answer is right, and it is too short: exp(1 - 7/3). Words: 2 of 2, 2 of 4; pairs 1 of 1, 1 of 3.
        ("电属性", "电属性的宝可梦", (100 * math.exp(1 - 7 / 3) * 0.5**0.25, 200 / 3, 50, 200 / 3)),
        # 1 of 1, then nothing: 1/2, 1/4, 1/8. One word has no pair of words.
        ("电", "电", (100 * (1 / 64) ** 0.25, 100, 0, 100)),
        ("火", "电", (0, 0, 0, 0)),
        ("", "电", (0, 0, 0, 0)),
        (" \n", "电", (0, 0, 0, 0)),
        ("电", "", (0, 0, 0, 0)),
    ],
)
def test_scores_are_those_computed_by_hand(predicted, label, expected):
    scores = prediction.score_pair(predicted, label)
    assert scores == pytest.approx(dict(zip(prediction.SCORES, expected)), abs=1e-3)


@needs_packages
def test_scores_are_means_over_the_answers():
    pairs = [("电属性", "水属性"), ("", "电"), ("草", "草")]
    scores = prediction.mean_scores(pairs)
    assert scores["rouge-1"] == pytest.approx((50 + 0 + 100) / 3, abs=1e-3)
    assert scores["bleu-4"] == pytest.approx((45.1801 + 0 + 35.3553) / 3, abs=1e-3)
    assert prediction.mean_scores([]) == dict.fromkeys(prediction.SCORES, 0)


@needs_packages
def test_long_answers_are_scored():
    text = "妙蛙种子的属性是草、毒。它的弱点是飞行！\n\n" * 60
    assert prediction.score_pair(text, text)["rouge-l"] == 100


@needs_packages
def test_the_packages_are_quiet_and_imported_only_when_needed():
    code = (
        "import sys, logging; logging.basicConfig(level=logging.DEBUG)\n"
        "from finetune_chatmodel_demo.training import prediction\n"
        "assert not {'jieba', 'nltk', 'rouge_chinese'} & set(sys.modules)\n"
        "print(prediction.score_pair('电属性', '水属性')['rouge-1'])\n"
    )
    run = subprocess.run([sys.executable, "-W", "always", "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.stdout == "50.0\n"
    assert "jieba" not in run.stderr and "prefix dict" not in run.stderr


def test_a_missing_package_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(prediction.importlib.util, "find_spec", lambda name: None if name != "nltk" else object())
    with pytest.raises(UserError, match=r"with jieba, rouge-chinese: pip install jieba rouge-chinese$"):
        prediction.check_packages()


# Which reply


def test_the_last_reply_is_asked_for_given_the_true_conversation(data, rows, tokenizer):
    for row, record in zip((rows[i] for i in range(len(rows))), read_records(data)):
        *history, last = record["conversations"]
        reply = take_last_reply(row, tokenizer)
        assert list(reply.prompt_ids) == render_prompt(tokenizer, history)
        assert tokenizer.decode(list(reply.expected_ids)).strip() == last["content"]
        assert [*reply.prompt_ids, *reply.expected_ids, tokenizer.eos_token_id] == row["input_ids"]


def make_row(tokenizer, tmp_path, messages, **options):
    path = write_jsonl(tmp_path / "record.jsonl", [conversation(*messages)])
    return build_dataset("multi-turn", path, tokenizer, **{**DataArguments().dataset_options(), **options})[0]


def test_a_call_is_the_last_reply_where_no_answer_follows(tokenizer, tmp_path):
    messages = [
        {"role": "user", "content": "查一查"},
        {"role": "assistant", "content": "好"},
        {"role": "tool", "name": "lookup", "parameters": {"name": "皮卡丘"}, "observation": "电"},
    ]
    reply = take_last_reply(make_row(tokenizer, tmp_path, messages), tokenizer)
    assert list(reply.prompt_ids) == render_prompt(tokenizer, messages[:2])
    assert tokenizer.decode(list(reply.expected_ids)) == "lookup\n ```python\ntool_call(name='皮卡丘')\n```"
    answered = [*messages, {"role": "assistant", "content": "是电"}]
    reply = take_last_reply(make_row(tokenizer, tmp_path, answered), tokenizer)
    assert list(reply.prompt_ids) == render_prompt(tokenizer, messages)


def test_replies_without_loss_are_not_asked_for(tokenizer, tmp_path):
    messages = [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "三"},
        {"role": "assistant", "content": "四", "loss": False},
    ]
    reply = take_last_reply(make_row(tokenizer, tmp_path, messages), tokenizer)
    assert list(reply.prompt_ids) == render_prompt(tokenizer, messages[:1])
    assert tokenizer.decode(list(reply.expected_ids)).strip() == "二"


def test_rows_of_plain_text_are_divided_where_their_reply_begins(tokenizer):
    eos = tokenizer.eos_token_id
    ids, target = [5, 6, 7, 8, 9, eos], -100
    row = {"input_ids": ids, "labels": [target, target, target, 8, 9, eos]}
    assert take_last_reply(row, tokenizer).prompt_ids == (5, 6, 7)
    assert take_last_reply(row, tokenizer).expected_ids == (8, 9)
    two = {"input_ids": [5, 8, eos, 9, 9, eos], "labels": [target, 8, eos, 9, 9, eos]}
    assert take_last_reply(two, tokenizer).prompt_ids == (5, 8, eos)
    cut = {"input_ids": [5, 8, 9], "labels": [target, 8, 9]}
    assert take_last_reply(cut, tokenizer).expected_ids == (8, 9)
    with pytest.raises(ValueError, match="no supervised reply"):
        take_last_reply({"input_ids": [5], "labels": [target]}, tokenizer)


# Answers


def read_predictions(folder: Path) -> list[dict]:
    text = (folder / "generated_predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@needs_packages
def test_every_row_is_answered_in_order_and_scored(loaded, tokenizer, data, rows, tmp_path):
    metrics = run_prediction(loaded, tokenizer, rows, make_settings(), tmp_path)
    lines = read_predictions(tmp_path)
    records = list(read_records(data))
    assert [line["label"] for line in lines] == [record["conversations"][-1]["content"] for record in records]
    prompts = [render_prompt(tokenizer, record["conversations"][:-1]) for record in records]
    assert [line["prompt"] for line in lines] == [tokenizer.decode(prompt) for prompt in prompts]
    one_by_one = generate_replies(loaded, tokenizer, prompts, max_new_tokens=8, batch_size=1)
    assert [line["predict"] for line in lines] == [reply.text for reply in one_by_one]
    expected = prediction.mean_scores((line["predict"], line["label"]) for line in lines)
    assert {f"predict_{name}": value for name, value in expected.items()}.items() <= metrics.items()
    assert metrics["predict_runtime"] > 0
    assert metrics["predict_samples_per_second"] == pytest.approx(7 / metrics["predict_runtime"], rel=0.01)
    for name in ("predict_results.json", "all_results.json"):
        assert json.loads((tmp_path / name).read_text()) == metrics


@needs_packages
def test_sampled_answers_differ_and_repeat_with_the_seed(loaded, tokenizer, rows, tmp_path):
    sampling = {"do_sample": True, "temperature": 1.5, "top_p": 1.0, "top_k": 0}
    answers = []
    for name, options in (("a", sampling), ("b", sampling), ("greedy", {})):
        run_prediction(loaded, tokenizer, rows, make_settings(**options), tmp_path / name)
        answers.append([line["predict"] for line in read_predictions(tmp_path / name)])
    assert answers[0] == answers[1] != answers[2]


@needs_packages
def test_the_model_is_left_in_the_mode_that_it_was_in(loaded, tokenizer, rows, tmp_path):
    loaded.train()
    try:
        run_prediction(loaded, tokenizer, rows, make_settings(max_new_tokens=1), tmp_path)
        assert loaded.training
    finally:
        loaded.eval()


def test_answers_stay_inside_the_models_context(tokenizer, caplog):
    small = SimpleNamespace(config=SimpleNamespace(seq_length=20))
    replies = [SimpleNamespace(prompt_ids=[1] * length) for length in (4, 12)]
    assert choose_answer_length(small, replies, make_settings(8)) == 8
    with pytest.raises(UserError, match=r"longest prompt has 12 tokens, .* --max_new_tokens 9 does not fit"):
        choose_answer_length(small, replies, make_settings(9))
    with caplog.at_level(logging.INFO):
        assert choose_answer_length(small, replies, make_settings(512, given=())) == 8
    assert "answers have at most 8 tokens" in caplog.text
    with pytest.raises(UserError, match="does not fit"):
        choose_answer_length(small, [SimpleNamespace(prompt_ids=[1] * 20)], make_settings(512, given=()))


# Whole runs


METHODS = {
    "ptuning": ({"pre_seq_len": 4}, "ptuning_checkpoint"),
    "lora": ({"finetuning_type": "lora", "learning_rate": 1e-2}, "adapter_name_or_path"),
    "freeze": ({"finetuning_type": "freeze", "freeze_trainable_layers": 1}, "model_name_or_path"),
    "full": ({"finetuning_type": "full"}, "model_name_or_path"),
}


@needs_packages
@pytest.mark.parametrize("method", METHODS)
def test_predictions_after_training_and_alone_are_the_same(method, model, data, tmp_path, tokenizer):
    options, flag = METHODS[method]
    options |= {"max_new_tokens": 6, "validation_file": data, "plot_loss": False, "do_predict": True}
    both, alone = tmp_path / "both", tmp_path / "alone"
    assert train(model, data, both, max_steps=3, do_train=True, **options) == 0
    assert read_log(both)[-1]["step"] == 3
    options = {name: value for name, value in options.items() if name in ("finetuning_type", "max_new_tokens")}
    options |= {"do_predict": True, "validation_file": data, "train_file": None, "max_steps": None, flag: both}
    assert train(model, data, alone, **options) == 0
    names = {"settings.json", "generated_predictions.jsonl", "predict_results.json", "all_results.json"}
    assert {path.name for path in alone.iterdir()} == names  # nothing was trained
    assert read_predictions(alone) == read_predictions(both)
    assert json.loads((alone / "all_results.json").read_text()).keys() == {
        *(f"predict_{name}" for name in prediction.SCORES),
        "predict_runtime",
        "predict_samples_per_second",
    }
    results = json.loads((both / "all_results.json").read_text())
    assert {"train_loss", "eval_loss", "predict_bleu-4"} <= results.keys()


@needs_packages
def test_prompts_and_responses_are_predicted_in_their_own_format(model, tmp_path, tokenizer):
    pairs = [{"prompt": f"宝可梦{i}", "response": "草属性" * (i % 3 + 1)} for i in range(4)]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(pairs, ensure_ascii=False), encoding="utf-8")
    options = {"train_format": "input-output", "validation_file": path, "do_predict": True, "max_new_tokens": 4}
    assert train(model, path, tmp_path / "o", train_file=None, max_steps=None, **options) == 0
    lines = read_predictions(tmp_path / "o")
    assert [line["label"] for line in lines] == [pair["response"] for pair in pairs]
    questions = [[{"role": "user", "content": pair["prompt"]}] for pair in pairs]
    prompts = [render_prompt(tokenizer, question, prompt_format="input-output") for question in questions]
    assert [line["prompt"] for line in lines] == [tokenizer.decode(prompt) for prompt in prompts]


@needs_packages
@pytest.mark.parametrize("template", ["default", "raw"])
def test_templates_of_base_models_are_predicted(model, data, tmp_path, template, tokenizer):
    options = {"template": template, "validation_file": data, "do_predict": True, "max_new_tokens": 4}
    assert train(model, data, tmp_path / "o", train_file=None, max_steps=None, **options) == 0
    lines, records = read_predictions(tmp_path / "o"), list(read_records(data))
    assert [line["label"] for line in lines] == [record["conversations"][-1]["content"] for record in records]
    for line, record in zip(lines, records):
        prompt = render_prompt(tokenizer, record["conversations"][:-1], prompt_format=template)
        assert line["prompt"] == tokenizer.decode(prompt)


@needs_packages
def test_rows_held_out_of_the_training_data_are_predicted(model, data, tmp_path):
    options = {"pre_seq_len": 4, "val_size": 2, "do_predict": True, "do_train": True, "max_new_tokens": 2}
    assert train(model, data, tmp_path / "o", max_steps=1, plot_loss=False, **options) == 0
    assert len(read_predictions(tmp_path / "o")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_file": None}, "--do_predict answers the validation data, and there is none"),
        ({"stage": "dpo", "pre_seq_len": 4}, "--do_predict writes answers, which --stage dpo does not train"),
    ],
)
def test_predictions_that_cannot_be_are_refused_before_loading(model, data, tmp_path, options, message, capsys):
    options = {"do_predict": True, "do_train": True, "validation_file": data, **options}
    assert train(model, data, tmp_path / "o", **options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_missing_package_stops_the_run_before_loading(model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prediction, "PACKAGES", {"no_such_module": "no-such-package"})
    assert train(model, data, tmp_path / "o", do_predict=True, validation_file=data) == 2
    assert "pip install no-such-package" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@needs_packages
def test_two_processes_share_the_rows(model, data, tmp_path):
    options = {"do_predict": True, "validation_file": data, "max_new_tokens": 6, "train_file": None, "max_steps": None}
    assert train(model, data, tmp_path / "one", **options) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["finetune_chatmodel_demo/finetune.py"]
    command += flags(model, data, tmp_path / "two", **options)
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert read_predictions(tmp_path / "two") == read_predictions(tmp_path / "one")


@needs_packages
def test_scores_rise_to_100_where_the_answers_are_learned(model, tmp_path):
    facts = {"皮卡丘": "皮卡丘的属性是电。", "小火龙": "小火龙的属性是火。", "杰尼龟": "杰尼龟的属性是水。"}
    records = [conversation(user(f"{name}的属性？"), assistant(answer)) for name, answer in facts.items()]
    path = write_jsonl(tmp_path / "facts.jsonl", records)
    scores = []
    for steps in (1, 80):
        output = tmp_path / str(steps)
        options = {"max_steps": steps, "learning_rate": 1e-2, "validation_file": path, "max_new_tokens": 24}
        options |= {"do_train": True, "do_predict": True, "plot_loss": False, "logging_steps": 40, "save_steps": 80}
        assert train(model, path, output, per_device_train_batch_size=3, **options) == 0
        scores.append(json.loads((output / "predict_results.json").read_text()))
    assert [line["predict"] for line in read_predictions(output)] == list(facts.values())
    for name in prediction.SCORES:
        assert scores[0][f"predict_{name}"] < 30
        assert scores[1][f"predict_{name}"] == 100
