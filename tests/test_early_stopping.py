"""Early stopping and the choice of the best checkpoint, by loss and by the share of exactly written replies."""

import json

import pytest
import torch
from conversation_helpers import conversation, message, write_jsonl
from evaluation_helpers import build_questions
from safetensors.torch import load_file
from training_helpers import decide, read_log, train, write_conversations

from finetune_chatmodel_demo.chatglm3 import load_model, load_tokenizer
from finetune_chatmodel_demo.conversation import build_dataset
from finetune_chatmodel_demo.evaluation.questions import UNSEEN, write_questions
from finetune_chatmodel_demo.training import checkpoints, prediction
from finetune_chatmodel_demo.training.stages import sft

PREFIX = "prefix_encoder.safetensors"
THOROUGH = [pytest.param(method, marks=pytest.mark.thorough) for method in ("freeze", "full")]

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("data") / "validation.jsonl", rows=7, seed=9)


def evaluations(output, key="eval_loss"):
    return {entry["step"]: entry[key] for entry in read_log(output) if key in entry}


# Early stopping


def test_a_run_stops_after_evaluations_without_improvement(model, data, validation, tmp_path):
    """A threshold that no improvement reaches: the first evaluation is the best, two more follow."""
    options = {"pre_seq_len": 4, "max_steps": 40, "eval_steps": 2, "validation_file": validation}
    options |= {"early_stopping_patience": 2, "early_stopping_threshold": 100}
    assert train(model, data, tmp_path / "o", **options) == 0
    losses = evaluations(tmp_path / "o")
    state = json.loads((tmp_path / "o" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 6  # evaluated at 2 (best), 4 and 6 (no improvement)
    assert set(losses) >= {2, 4, 6} and max(losses) == 6
    assert {path.name for path in checkpoints.list_checkpoints(tmp_path / "o")} == {
        f"checkpoint-{i}" for i in (2, 4, 6)
    }
    # The best prefix is the result: --load_best_model_at_end comes with early stopping.
    best = min((step for step in (2, 4, 6)), key=losses.get)
    assert state["best_global_step"] == best
    saved, result = (load_file(folder / PREFIX) for folder in (tmp_path / "o" / f"checkpoint-{best}", tmp_path / "o"))
    assert all(torch.equal(saved[name], result[name]) for name in saved)


def test_a_run_that_improves_does_not_stop(model, data, validation, tmp_path):
    options = {"pre_seq_len": 4, "max_steps": 8, "eval_steps": 2, "validation_file": validation, "learning_rate": 0.1}
    assert train(model, data, tmp_path / "o", early_stopping_patience=1, **options) == 0
    losses = evaluations(tmp_path / "o")
    assert list(losses) == [2, 4, 6, 8]
    assert sorted(losses.values(), reverse=True) == list(losses.values())


def test_patience_is_counted_on_by_a_resumed_run(model, data, validation, tmp_path):
    options = {"pre_seq_len": 4, "max_steps": 40, "eval_steps": 2, "validation_file": validation}
    options |= {"early_stopping_patience": 3, "early_stopping_threshold": 100}
    for name in "ab":
        assert train(model, data, tmp_path / name, **options) == 0
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "b")][-1] == "checkpoint-8"
    for step in (6, 8):
        checkpoints.remove_checkpoint(tmp_path / "b" / f"checkpoint-{step}")
    assert train(model, data, tmp_path / "b", resume_from_checkpoint=True, **options) == 0
    assert evaluations(tmp_path / "a") == evaluations(tmp_path / "b")  # a new count would have gone on until step 10
    first, second = (load_file(tmp_path / name / PREFIX) for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stopped_run_is_at_its_end_when_it_is_started_again(model, data, validation, tmp_path, caplog):
    options = {"pre_seq_len": 4, "max_steps": 40, "eval_steps": 2, "validation_file": validation}
    options |= {"early_stopping_patience": 1, "early_stopping_threshold": 100}
    assert train(model, data, tmp_path / "o", **options) == 0
    before = evaluations(tmp_path / "o")
    assert train(model, data, tmp_path / "o", resume_from_checkpoint=True, **options) == 0
    assert "no step is left" in caplog.text
    assert evaluations(tmp_path / "o") == before
    assert (
        train(model, data, tmp_path / "o", resume_from_checkpoint=True, **options | {"early_stopping_patience": 3}) == 0
    )
    assert max(evaluations(tmp_path / "o")) == 8  # more patience goes on from the count of 1 at step 4


def test_the_best_evaluation_has_a_checkpoint(model, data, validation, tmp_path):
    options = {"pre_seq_len": 4, "validation_file": validation, "eval_steps": 2}
    training = decide(model, data, tmp_path / "o", load_best_model_at_end=True, **options).training
    assert (training.save_steps, training.eval_steps) == (2, 2)
    training = decide(model, data, tmp_path / "o", early_stopping_patience=2, **options).training
    assert (training.save_steps, training.load_best_model_at_end) == (2, True)
    assert (training.metric_for_best_model, training.greater_is_better) == ("loss", False)
    training = decide(model, data, tmp_path / "o", **options).training
    assert (training.save_steps, training.eval_steps, training.load_best_model_at_end) == (500, 2, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"early_stopping_patience": 2},
            "--early_stopping_patience follows the evaluations, and there is no",
        ),
        ({"early_stopping_patience": 0, "val_size": 0.5}, "--early_stopping_patience is 0; it must be at least 1"),
        ({"early_stopping_patience": 2, "val_size": 0.5, "eval_strategy": "no"}, "(or --save_strategy) no makes none"),
        ({"early_stopping_threshold": 0.1}, "--early_stopping_threshold belongs to --early_stopping_patience"),
        ({"eval_questions": 5}, "--eval_questions asks for replies of the validation data, and there is none"),
        ({"eval_questions": -1, "val_size": 0.5}, "--eval_questions is -1"),
        ({"eval_questions": 5, "val_size": 0.5, "stage": "dpo"}, "which --stage dpo does not train"),
        ({"eval_questions_file": "x.json", "val_size": 0.5}, "--eval_questions N how many; add it"),
        (
            {"eval_questions_file": "/x", "eval_questions": 1, "val_size": 0.5},
            "--eval_questions_file /x does not exist",
        ),
        ({"metric_for_best_model": "exact", "val_size": 0.5}, "exact needs --eval_questions N"),
    ],
)
def test_impossible_choices_are_refused(options, message, model, data, tmp_path, capsys):
    assert train(model, data, tmp_path / "o", **options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


# Replies of the validation data


def test_replies_are_the_supervised_spans(tokenizer, tmp_path):
    turns = [("user", "甲？"), ("assistant", "乙。"), ("user", "丙？"), ("assistant", "丁戊。")]
    record = conversation(*(message(role, text) for role, text in turns))
    record["conversations"][1]["loss"] = False
    both = conversation(*(message(role, text) for role, text in turns))
    path = write_jsonl(tmp_path / "d.jsonl", [record, both])
    lengths = {"max_seq_length": 99, "max_source_length": 9, "max_target_length": 9}
    rows = build_dataset("multi-turn", path, tokenizer, **lengths)
    found = [prediction.find_replies(i, rows[i], tokenizer.stop_token_ids) for i in range(2)]
    texts = [[tokenizer.decode(list(reply.expected_ids)).strip() for reply in row] for row in found]
    assert texts == [["丁戊。"], ["乙。", "丁戊。"]]
    assistant = tokenizer.get_command("<|assistant|>")
    assert all(reply.is_whole and reply.prompt_ids[-1] == assistant for row in found for reply in row)
    full = rows[1]["input_ids"]
    for reply in found[1]:
        place = len(reply.prompt_ids)
        assert tuple(full[:place]) == reply.prompt_ids
        assert tuple(full[place : place + len(reply.expected_ids)]) == reply.expected_ids
    cut = {"input_ids": full[:-2], "labels": rows[1]["labels"][:-2]}
    assert [reply.is_whole for reply in prediction.find_replies(0, cut, tokenizer.stop_token_ids)] == [True, False]


def test_a_sample_is_spread_over_rows_and_shared_out(model, data, tokenizer):
    lengths = {"max_seq_length": 999, "max_source_length": 9, "max_target_length": 9}
    rows = build_dataset("multi-turn", data, tokenizer, **lengths)
    stops = tokenizer.stop_token_ids
    chosen = prediction.sample_replies(rows, 10, 3, stops, 512)
    assert len(chosen) == 10 == len({reply.row for reply in chosen})
    assert chosen == prediction.sample_replies(rows, 10, 3, stops, 512)
    assert chosen != prediction.sample_replies(rows, 10, 4, stops, 512)
    everything = prediction.sample_replies(rows, 10_000, 3, stops, 512)
    assert len(everything) == sum(len(prediction.find_replies(i, rows[i], stops)) for i in range(len(rows)))
    assert prediction.sample_replies(rows, 10, 3, stops, 12) == []
    shares = [prediction.share_out(chosen[:7], process, 3) for process in range(3)]
    assert [len(share) for share in shares] == [3, 3, 3]
    counted = [reply for share in shares for reply, counts in share if counts]
    assert sorted(map(id, counted)) == sorted(map(id, chosen[:7]))


def test_what_is_written_is_what_a_forward_pass_predicts(model, data):
    """Greedy decoding reproduces a reply exactly when every token of it is the likeliest after the true ones."""
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    lengths = {"max_seq_length": 999, "max_source_length": 9, "max_target_length": 9}
    rows = build_dataset("multi-turn", data, tokenizer, **lengths)
    chosen = prediction.sample_replies(rows, 12, 3, tokenizer.stop_token_ids, 512)
    written = prediction.write_replies(loaded, tokenizer, chosen, batch_size=5)
    for reply, ids in zip(chosen, written):
        sequence = torch.tensor([[*reply.prompt_ids, *ids]])
        with torch.no_grad():
            likeliest = loaded(input_ids=sequence).logits.argmax(-1)[0, len(reply.prompt_ids) - 1 :].tolist()
        assert likeliest[: len(ids)] == ids
    right = [prediction.Reply(0, reply.prompt_ids, tuple(ids), True) for reply, ids in zip(chosen, written)]
    assert all(prediction.is_reproduced(tokenizer, reply, ids) for reply, ids in zip(right, written))
    cut = [prediction.Reply(0, reply.prompt_ids, tuple(ids[:3]), False) for reply, ids in zip(chosen, written) if ids]
    assert all(prediction.is_reproduced(tokenizer, reply, ids) for reply, ids in zip(cut, filter(None, written)))
    assert not prediction.is_reproduced(tokenizer, right[0], [*written[0], 99])


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param({flag: True}, marks=pytest.mark.thorough) for flag in ("gradient_checkpointing", "bf16"))],
)
def test_questions_are_logged_and_leave_the_training_alone(options, model, data, validation, tmp_path):
    """Bit-equal weights with and without evaluations; dropout on the prefix while training, and none while asked."""
    common = {"pre_seq_len": 4, "learning_rate": 0.1, "max_steps": 6, "save_steps": 6, **options}
    assert train(model, data, tmp_path / "a", **common) == 0
    asked = {"validation_file": validation, "eval_strategy": "steps", "eval_steps": 2, "eval_questions": 5}
    assert train(model, data, tmp_path / "b", **common, **asked) == 0
    first, second = (load_file(tmp_path / name / PREFIX) for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    shares = evaluations(tmp_path / "b", "eval_exact")
    assert list(shares) == [2, 4, 6]
    assert all(share in (0, 0.2, 0.4, 0.6, 0.8, 1) for share in shares.values())
    assert evaluations(tmp_path / "b").keys() == shares.keys()  # in one entry with the loss


def test_facts_are_asked(model, data, validation, tmp_path):
    """Questions from the CSV, judged field by field: more figures beside the share of exact ones."""
    questions = tmp_path / "questions.json"
    write_questions(build_questions(), questions)
    options = {"pre_seq_len": 4, "max_steps": 2, "validation_file": validation, "eval_steps": 1}
    asked = {"eval_questions": 8, "eval_questions_file": questions}
    assert train(model, data, tmp_path / "o", **options, **asked) == 0
    entries = [entry for entry in read_log(tmp_path / "o") if "eval_loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert entry["eval_asked"] == 8
        assert entry["eval_exact"] + entry["eval_wrong"] + entry["eval_missing"] <= 1
        assert f"eval_exact {UNSEEN}" in entry


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(each, marks=pytest.mark.thorough) for each in ("freeze", "full"))]
)
def test_every_method_is_asked(method, model, data, validation, tmp_path):
    options = {"finetuning_type": method, "max_steps": 2, "validation_file": validation, "eval_steps": 1}
    assert train(model, data, tmp_path / "o", eval_questions=3, **options) == 0
    assert list(evaluations(tmp_path / "o", "eval_exact")) == [1, 2]


@pytest.mark.parametrize("metric", ["exact", "loss"])
def test_the_best_checkpoint_by_exact_replies_or_by_loss(metric, model, data, validation, tmp_path, monkeypatch):
    """The share falls here while the loss falls too, so that the two choices differ."""
    shares = iter([0.8, 0.6, 0.4, 0.2])
    monkeypatch.setattr(
        sft.ChatTrainer, "_ask", lambda _: {"exact": next(shares, 0.8)}
    )  # the fifth: the best at the end
    options = {"pre_seq_len": 4, "validation_file": validation, "eval_steps": 1, "learning_rate": 0.1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": metric, "eval_questions": 5}
    assert train(model, data, tmp_path / "o", **options) == 0
    state = json.loads((tmp_path / "o" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_global_step"] == (1 if metric == "exact" else 4)
    assert state["best_metric"] == (0.8 if metric == "exact" else min(evaluations(tmp_path / "o").values()))
    best = load_file(tmp_path / "o" / f"checkpoint-{state['best_global_step']}" / PREFIX)
    result = load_file(tmp_path / "o" / PREFIX)
    assert all(torch.equal(best[name], result[name]) for name in best)
