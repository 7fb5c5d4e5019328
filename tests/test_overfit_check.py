"""finetune.py --overfit_check: rows that can be learned by heart are, and what cannot be is named with its cause."""

import json
from pathlib import Path

import pytest
import torch
from conversation_helpers import assistant, conversation, user, write_jsonl
from training_helpers import flags

from finetune_chatmodel_demo import finetune
from finetune_chatmodel_demo.training import overfit
from finetune_chatmodel_demo.training.prediction import Reply

FACTS = [
    ("妙蛙种子是什么属性？", "妙蛙种子的属性是草、毒。"),
    ("小火龙是什么属性？", "小火龙的属性是火。"),
    ("皮卡丘的身高是多少？", "皮卡丘的身高是0.4米。"),
]
METHODS = {
    "ptuning": {"pre_seq_len": 8, "learning_rate": 5e-2},
    "lora": {"finetuning_type": "lora"},
    "freeze": {"finetuning_type": "freeze"},
    "full": {},
}


def write(path: Path, pairs) -> Path:
    return write_jsonl(path, [conversation(user(question), assistant(answer)) for question, answer in pairs])


def check(model, data, output, rows=8, **options) -> int:
    options = {"overfit_check": rows, "max_steps": 400, "logging_steps": None} | options
    return finetune.main(flags(model, data, output, **options))


def read_report(folder: Path) -> dict:
    return json.loads((folder / "overfit_check.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def consistent(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "consistent.jsonl", FACTS)


@pytest.mark.parametrize(
    "method", ["ptuning", *(pytest.param(each, marks=pytest.mark.thorough) for each in METHODS if each != "ptuning")]
)
def test_consistent_rows_are_learned_by_heart(method, consistent, tiny_folder, tmp_path, capsys):
    assert check(tiny_folder, consistent, tmp_path / "o", **METHODS[method]) == 0
    printed = capsys.readouterr().out
    assert "on the first 3 of 3 rows, which have 3 supervised replies" in printed
    assert "overfit check passed: 3 of 3 replies of 3 rows are reproduced after" in printed
    report = read_report(tmp_path / "o")
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["overfit_check.json"]
    assert (report["passed"], report["method"], report["reproduced"]) == (True, method, 3)
    assert report["failed"] == report["contradictions"] == report["cut_rows"] == report["causes"] == []
    assert report["steps"] < report["most_steps"] == 400
    assert report["last_loss"] < 0.2 < report["first_loss"]


def test_contradictory_rows_are_named(tiny_folder, tmp_path, capsys):
    data = write(tmp_path / "d.jsonl", [*FACTS, (FACTS[0][0], "妙蛙种子的属性是水。")])
    assert check(tiny_folder, data, tmp_path / "o") == 1
    printed = capsys.readouterr().out
    assert "overfit check FAILED: 3 of 4 replies of 4 rows" in printed
    assert "contradiction: '妙蛙种子是什么属性？' has 2 replies" in printed
    report = read_report(tmp_path / "o")
    assert report["steps"] < 400  # it stops when nothing more can be reproduced
    (contradiction,) = report["contradictions"]
    assert contradiction["question"] == FACTS[0][0]
    places = {reply["text"]: reply["where"] for reply in contradiction["replies"]}
    assert places == {FACTS[0][1]: [f"{data} line 1"], "妙蛙种子的属性是水。": [f"{data} line 4"]}
    (failed,) = report["failed"]
    assert {failed["expected"], failed["got"]} == set(places)
    assert report["causes"][0].startswith("contradictory answers: 1 prompts")


def test_a_contradiction_outside_of_the_rows_is_told_too(consistent, tiny_folder, tmp_path, capsys):
    data = write(tmp_path / "d.jsonl", [*FACTS, ("它呢？", "是。"), ("它呢？", "不是。")])
    assert check(tiny_folder, data, tmp_path / "o", rows=3) == 0
    printed = capsys.readouterr().out
    assert "on the first 3 of 5 rows" in printed
    assert "contradiction: '它呢？' has 2 replies" in printed
    assert read_report(tmp_path / "o")["passed"]


def test_the_same_question_in_other_conversations_is_no_contradiction(tokenizer, tmp_path):
    answers = {"皮卡丘": "电。", "小火龙": "火。"}
    records = [
        conversation(user(name), assistant("好。"), user("它呢？"), assistant(answer))
        for name, answer in answers.items()
    ]
    path = write_jsonl(tmp_path / "d.jsonl", records)
    from finetune_chatmodel_demo.conversation import build_dataset

    lengths = {"max_seq_length": 99, "max_source_length": 9, "max_target_length": 9}
    rows = build_dataset("multi-turn", path, tokenizer, **lengths)
    assert overfit.find_contradictions(rows, tokenizer.stop_token_ids) == []


def test_a_learning_rate_that_is_too_small_is_named(consistent, tiny_folder, tmp_path, capsys):
    assert check(tiny_folder, consistent, tmp_path / "o", pre_seq_len=8, learning_rate=2e-5, max_steps=30) == 1
    (cause,) = read_report(tmp_path / "o")["causes"]
    assert cause.startswith("the loss has hardly moved (") and "--learning_rate 2e-05 is too small" in cause
    assert f"likely cause: {cause}" in capsys.readouterr().out


def test_a_check_that_ends_too_early_says_so(consistent, tiny_folder, tmp_path):
    assert check(tiny_folder, consistent, tmp_path / "o", max_steps=15, learning_rate=1e-4) == 1
    (cause,) = read_report(tmp_path / "o")["causes"]
    assert cause.startswith("not finished: the loss is still falling; give more steps (--max_steps 30)")


def test_replies_that_the_length_limit_cuts_are_named(tiny_folder, tmp_path):
    data = write(tmp_path / "d.jsonl", [*FACTS, ("小火龙呢？", "火、" * 40)])
    options = {"max_seq_length": 20, "truncation_strategy": "official", "max_steps": 2}
    assert check(tiny_folder, data, tmp_path / "o", **options) == 1
    report = read_report(tmp_path / "o")
    assert f"{data} line 4" in report["cut_rows"]
    assert any("replies are cut off by the length limit; raise --max_seq_length" in c for c in report["causes"])
    assert [failed["was_cut"] for failed in report["failed"] if failed["where"] == f"{data} line 4"] == [True]


def test_nothing_is_written_without_an_output_folder(consistent, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert check(tiny_folder, consistent, None, max_steps=2) == 1
    assert list(tmp_path.iterdir()) == []
    assert "report:" not in capsys.readouterr().out


def test_an_earlier_run_in_the_output_folder_is_left_alone(consistent, tiny_folder, tmp_path):
    (tmp_path / "o" / "checkpoint-500").mkdir(parents=True)
    assert check(tiny_folder, consistent, tmp_path / "o", max_steps=1) == 1
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"checkpoint-500", "overfit_check.json"}


@pytest.mark.thorough
@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}, {"packing": True}])
def test_the_settings_of_the_run_hold(options, consistent, tiny_folder, tmp_path, monkeypatch):
    models, original = [], overfit.overfit
    monkeypatch.setattr(overfit, "overfit", lambda model, *args: models.append(model) or original(model, *args))
    assert check(tiny_folder, consistent, tmp_path / "o", finetuning_type="lora", **options) == 0
    frozen = [value for value in models[0].parameters() if not value.requires_grad]
    assert {value.dtype for value in frozen} == {torch.bfloat16 if "bf16" in options else torch.float32}
    assert models[0].is_gradient_checkpointing == ("gradient_checkpointing" in options)
    report = read_report(tmp_path / "o")
    assert (report["rows"], report["replies"], report["reproduced"]) == (3, 3, 3)  # packing leaves each row its own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overfit_check": 0}, "--overfit_check is 0; it must be at least 1"),
        ({"stage": "pt"}, "--overfit_check looks at replies: use it with --stage sft"),
        ({"streaming": True}, "drop --streaming"),
        ({"do_predict": True, "val_size": 1}, "drop --do_predict"),
    ],
)
def test_impossible_checks_are_refused(options, message, consistent, model, tmp_path, capsys):
    assert check(model, consistent, tmp_path / "o", **options) == 2
    assert message in capsys.readouterr().err


def test_hope_ends_where_every_prompt_is_settled():
    first, other, third = (Reply(0, (1,), (5,), True), Reply(1, (1,), (6,), True), Reply(2, (2,), (7,), True))
    assert overfit.leaves_hope([first, other, third], [True, False, False])
    assert not overfit.leaves_hope([first, other, third], [True, False, True])
    assert overfit.leaves_hope([first, other], [False, False])
