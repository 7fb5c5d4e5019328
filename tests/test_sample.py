"""The evaluation during training: figures, the same questions at every call, and a model that is left as it was."""

import json
import random

import pytest
import torch
from evaluation_helpers import Script, build_questions, right_answer

from finetune_chatmodel_demo.evaluation import asking
from finetune_chatmodel_demo.evaluation.questions import MULTI_TURN, TRAINED, UNANSWERABLE, UNSEEN, write_questions
from finetune_chatmodel_demo.evaluation.sample import build_training_evaluator


def test_figures(monkeypatch, prefix_model, tokenizer):
    script = Script(lambda text: right_answer("皮卡丘", "属性") if "皮卡丘" in text else "我不知道。")
    monkeypatch.setattr(asking, "generate_replies", script)
    evaluator = build_training_evaluator(build_questions(), tokenizer, count=8)
    figures = evaluator(prefix_model)
    assert figures == {
        "exact": 1 / 8,
        "wrong": 1 / 8,
        "missing": 6 / 8,
        "asked": 8,
        "overlap": 1 / 8,
        "not_ended": 0.0,
        f"exact {TRAINED}": 1 / 4,
        f"exact {UNSEEN}": 0.0,
    }
    first = list(script.prompts)
    evaluator(prefix_model)
    assert script.prompts == first * 2


def test_the_model_and_all_random_numbers_are_left_as_they_were(prefix_model, tokenizer):
    prefix_model.train()
    prefix_model.model.layers[0].eval()
    modes = [module.training for module in prefix_model.modules()]
    torch.manual_seed(4)
    random.seed(4)
    expected = torch.rand(3), random.random()
    torch.manual_seed(4)
    random.seed(4)
    figures = build_training_evaluator(build_questions(), tokenizer, count=2, max_new_tokens=4)(prefix_model)
    assert [module.training for module in prefix_model.modules()] == modes
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    assert figures["asked"] == 2
    prefix_model.eval()


def test_dropout_is_off_while_it_asks(prefix_model, tokenizer, monkeypatch):
    """In training mode the prefix has dropout; the evaluator's replies are those of evaluation mode."""
    seen = []

    def note(*arguments, **options):
        seen.append(arguments[0].training)
        return Script(lambda text: "电")(*arguments, **options)

    monkeypatch.setattr(asking, "generate_replies", note)
    prefix_model.train()
    build_training_evaluator(build_questions(), tokenizer, count=1)(prefix_model)
    assert seen == [False] and prefix_model.training
    prefix_model.eval()


def test_questions_are_chosen_by_group_count_and_seed(tokenizer):
    questions = build_questions()
    evaluator = build_training_evaluator(questions, tokenizer, count=4, seed=1)
    assert sorted(turn.group for turn in evaluator.questions.turns) == [TRAINED, TRAINED, UNSEEN, UNSEEN]
    again = build_training_evaluator(questions, tokenizer, count=4, seed=1)
    assert again.questions.dialogues == evaluator.questions.dialogues
    talks = questions.select([MULTI_TURN])
    chosen = build_training_evaluator(talks, tokenizer, count=20).questions
    assert {turn.group for turn in chosen.turns} == {MULTI_TURN, UNANSWERABLE}
    assert len(chosen.dialogues) == 2
    with pytest.raises(ValueError, match="the number of questions is 0"):
        build_training_evaluator(questions, tokenizer, count=0)


def test_question_files_and_conversation_files_are_told_apart(tmp_path, prefix_model, tokenizer):
    write_questions(build_questions(), tmp_path / "questions.json")
    facts = build_training_evaluator(tmp_path / "questions.json", tokenizer, count=3, max_new_tokens=4)(prefix_model)
    assert {"exact", "overlap", "missing"} <= set(facts)
    talk = [{"role": "user", "content": "？"}, {"role": "assistant", "content": "电", "column": "属性"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"conversations": talk}), encoding="utf-8")
    figures = build_training_evaluator(tmp_path / "talk.jsonl", tokenizer, count=3, max_new_tokens=4)(prefix_model)
    assert figures == {"exact": 0.0, "asked": 1, "not_ended": figures["not_ended"]}
