"""What a run leaves behind: trainer_log.jsonl, *_results.json, the curves, and its learning rates."""

import json
import math
import os
import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from training_helpers import decide, flags, losses, read_log, train, write_conversations

from finetune_chatmodel_demo import finetune
from finetune_chatmodel_demo.training import results
from finetune_chatmodel_demo.training.results import (
    TrainerLog,
    draw_chart,
    plot_curves,
    save_results,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(results, "time", SimpleNamespace(monotonic=lambda: self.now))


# trainer_log.jsonl


def test_a_line_has_the_keys_that_llama_factory_writes(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    log = TrainerLog(tmp_path)
    log.start(total_steps=200)
    clock.now += 100
    log.write(50, {"loss": 2.5, "learning_rate": 1e-4, "epoch": 0.25, "tokens_per_second": 321, "grad_norm": 1.0})
    clock.now += 3600
    log.write(50, {"eval_loss": 2.25, "epoch": 0.25, "eval_runtime": 3.0})
    assert read_lines(tmp_path) == [
        {
            "current_steps": 50,
            "total_steps": 200,
            "loss": 2.5,
            "lr": 1e-4,
            "epoch": 0.25,
            "throughput": 321,
            "percentage": 25.0,
            "elapsed_time": "0:01:40",
            "remaining_time": "0:05:00",
        },
        {
            "current_steps": 50,
            "total_steps": 200,
            "eval_loss": 2.25,
            "epoch": 0.25,
            "percentage": 25.0,
            "elapsed_time": "1:01:40",
            "remaining_time": "3:05:00",
        },
    ]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"rewards/accuracies": 0.75, "rewards/chosen": 1.0}, {"accuracy": 0.75}),
        ({"accuracy": 0.5}, {"accuracy": 0.5}),
        ({"eval_accuracy": 0.9}, {"eval_accuracy": 0.9}),
        ({"eval_rewards/accuracies": 0.9}, {"eval_accuracy": 0.9}),
        ({"reward": -1.5, "loss": 0.0}, {"reward": -1.5, "loss": 0.0}),
        ({"predict_loss": 3.0}, {"predict_loss": 3.0}),
        ({"num_input_tokens_seen": 700}, {"total_tokens": 700}),
        ({"loss": math.nan}, {"loss": None}),
    ],
)
def test_metrics_of_every_stage_find_their_key(tmp_path, entry, expected):
    log = TrainerLog(tmp_path)
    log.start(total_steps=4)
    log.write(1, entry)
    (line,) = read_lines(tmp_path)
    progress = {"current_steps", "total_steps", "percentage", "elapsed_time", "remaining_time"}
    assert {key: value for key, value in line.items() if key not in progress} == expected


def test_a_resumed_log_has_every_step_once(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    log = TrainerLog(tmp_path)
    log.start(total_steps=8)
    for step in range(1, 7):
        clock.now += 10
        log.write(step, {"loss": float(step)})
    log.write(6, {"train_runtime": 60.0})
    with log.path.open("a") as file:
        file.write('{"current_steps": 7, "tot')  # the process was killed here
    resumed = TrainerLog(tmp_path)
    resumed.start(total_steps=8, first_step=4)
    assert [line["current_steps"] for line in read_lines(tmp_path)] == [1, 2, 3, 4]
    for step in range(5, 9):
        clock.now += 20
        resumed.write(step, {"loss": float(step)})
    lines = read_lines(tmp_path)
    assert [line["loss"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["elapsed_time"] for line in lines[3:6]] == ["0:00:40", "0:01:00", "0:01:20"]
    assert lines[5]["remaining_time"] == "0:00:40"  # two steps at the speed of this part


def test_a_line_at_the_end_of_a_run_goes_when_the_run_goes_on(tmp_path):
    log = TrainerLog(tmp_path)
    log.start(total_steps=2)
    log.write(2, {"loss": 1.0})
    log.write(2, {"train_runtime": 1.0})
    assert len(read_lines(tmp_path)) == 2
    TrainerLog(tmp_path).start(total_steps=4, first_step=2)
    assert [line.get("loss") for line in read_lines(tmp_path)] == [1.0]


def test_a_new_run_starts_a_new_log(tmp_path):
    for _ in range(2):
        log = TrainerLog(tmp_path)
        log.start(total_steps=2)
        log.write(1, {"loss": 1.0})
    assert len(read_lines(tmp_path)) == 1


@pytest.mark.parametrize("seconds", [0, 59, 3600, 86399, 86400, 93784, 86400 * 12 + 5])
def test_elapsed_times_are_read_as_they_are_written(seconds):
    assert results._read_seconds(str(timedelta(seconds=seconds))) == seconds
    assert results._read_seconds(None) == results._read_seconds("soon") == 0


def test_only_the_first_process_writes(tmp_path):
    callback = TrainerLog(tmp_path)
    state = SimpleNamespace(is_world_process_zero=False, max_steps=2, global_step=0, epoch=0.5, num_input_tokens_seen=0)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
    state.is_world_process_zero = True
    callback.on_train_begin(None, state, None)
    state.global_step = 1
    callback.on_log(None, state, None, logs={"loss": 1.0})
    (line,) = read_lines(tmp_path)
    assert (line["current_steps"], line["total_steps"], line["loss"], line["epoch"]) == (1, 2, 1.0, 0.5)


# *_results.json


def test_results_of_all_splits_are_collected(tmp_path):
    save_results(tmp_path, "train", {"train_loss": 1.5, "epoch": 2.0})
    save_results(tmp_path, "eval", {"eval_loss": 1.25, "eval_perplexity": math.inf})
    save_results(tmp_path, "eval", {"eval_loss": 1.0})
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert found == {
        "train_results.json": {"train_loss": 1.5, "epoch": 2.0},
        "eval_results.json": {"eval_loss": 1.0},
        "all_results.json": {"train_loss": 1.5, "epoch": 2.0, "eval_loss": 1.0, "eval_perplexity": None},
    }
    (tmp_path / "all_results.json").write_text("{")
    save_results(tmp_path, "predict", {"predict_rouge-1": 50.0})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"predict_rouge-1": 50.0}
    results.remove_results(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_results_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    save_results(tmp_path, "eval", {"eval_loss": 1.0})

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save_results(tmp_path, "eval", {"eval_loss": 2.0})
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {"eval_loss": 1.0}


HISTORY = [
    {"step": 2, "loss": 4.0, "learning_rate": 1e-3, "epoch": 0.5},
    {"step": 4, "loss": 2.0, "learning_rate": 1e-3, "epoch": 1.0},
    {"step": 4, "eval_loss": 1.0, "eval_runtime": 0.5, "eval_rewards/accuracies": 0.75, "epoch": 1.0},
    {"step": 8, "loss": 1.0, "epoch": 2.0},
    {
        "step": 8,
        "train_runtime": 2.0,
        "train_samples_per_second": 8.0,
        "train_steps_per_second": 4.0,
        "total_flos": 5.0,
        "train_loss": 0.5,
        "epoch": 2.0,
    },
]


def test_training_is_described():
    assert results.describe_training(HISTORY, 8) == {key: HISTORY[-1][key] for key in results.TRAINING_KEYS}
    assert results.describe_training(HISTORY[:-1], 8) == {}


def test_of_a_resumed_run_the_loss_is_that_of_all_steps_and_the_speed_that_of_the_last_part():
    metrics = results.describe_training(HISTORY, 8, resumed_step=4)
    assert metrics["train_loss"] == (2 * 4.0 + 2 * 2.0 + 4 * 1.0) / 8
    assert metrics["train_steps_per_second"] == 4 / 2.0
    assert metrics["train_samples_per_second"] == 4.0  # Trainer counted 8 steps where 4 were made
    right = [*HISTORY[:-1], {**HISTORY[-1], "train_steps_per_second": 2.0, "train_samples_per_second": 4.0}]
    assert results.describe_training(right, 8, resumed_step=4) == metrics


def test_evaluation_is_described():
    metrics = {"eval_loss": 1.0, "eval_runtime": 0.5, "eval_rewards/accuracies": 0.75, "epoch": 1.0}
    assert results.describe_evaluation(HISTORY, "dpo") == metrics
    assert results.describe_evaluation(HISTORY, "sft") == {**metrics, "eval_perplexity": math.e}
    assert results.describe_evaluation([{"eval_loss": 1e9}], "pt")["eval_perplexity"] == math.inf
    assert results.describe_evaluation(HISTORY[:2], "sft") == {}


# Curves


def drawn(figure) -> dict[str, list[tuple[float, float]]]:
    """Label → points of the lines of a figure."""
    (axes,) = figure.axes
    return {line.get_label(): list(zip(*line.get_data())) for line in axes.get_lines()}


def test_the_loss_is_drawn_as_logged_and_smoothed():
    pytest.importorskip("matplotlib")
    points = [(2, 4.0), (4, 2.0), (8, 1.0)]
    lines = drawn(draw_chart(HISTORY, "training_loss.png"))
    # An average in which a value weighs 0.9 times as much as the one after it; it starts at the first value.
    smoothed = [4.0, (0.9 * 4 + 2) / 1.9, (0.81 * 4 + 0.9 * 2 + 1) / 2.71]
    assert [y for _, y in lines.pop("training loss (smoothed)")] == pytest.approx(smoothed)
    assert lines == {
        "_training loss": points,
        "_validation loss": [(4, 1.0)],
        "validation loss (smoothed)": [(4, 1.0)],
    }
    figure = draw_chart(HISTORY, "training_loss.png")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "training loss (smoothed)",
        "validation loss (smoothed)",
    ]
    assert drawn(draw_chart(HISTORY, "training_eval_loss.png")).keys() == {
        "_validation loss",
        "validation loss (smoothed)",
    }


def test_rewards_and_accuracy_of_the_stages_that_have_them():
    pytest.importorskip("matplotlib")
    dpo = [
        {"step": 1, "loss": 0.7, "rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/margins": 0.2},
        {"step": 2, "loss": 0.6, "rewards/chosen": 0.2, "rewards/rejected": -0.3, "rewards/margins": 0.5},
        {"step": 2, "rewards/accuracies": 1.0},
    ]
    rewards = drawn(draw_chart(dpo, "training_rewards.png"))
    assert rewards["_chosen"] == [(1, 0.1), (2, 0.2)]
    assert rewards["_rejected"] == [(1, -0.1), (2, -0.3)]
    assert rewards["_margin"] == [(1, 0.2), (2, 0.5)]
    assert drawn(draw_chart(dpo, "training_accuracy.png"))["_accuracy"] == [(2, 1.0)]
    ppo = [{"step": 1, "reward": -1.0}, {"step": 2, "reward": 0.5}]
    assert drawn(draw_chart(ppo, "training_rewards.png"))["_reward"] == [(1, -1.0), (2, 0.5)]
    rm = [{"step": 1, "eval_accuracy": 0.25}]
    assert drawn(draw_chart(rm, "training_accuracy.png"))["_accuracy, validation"] == [(1, 0.25)]


def test_a_file_for_each_chart_that_has_a_curve(tmp_path):
    pytest.importorskip("matplotlib")
    assert plot_curves([], tmp_path) == []
    assert plot_curves([{"step": 1, "train_runtime": 2.0}, {"step": 1, "loss": math.nan}], tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    assert plot_curves(HISTORY, tmp_path) == [
        tmp_path / name for name in ("training_loss.png", "training_eval_loss.png", "training_accuracy.png")
    ]
    assert sorted(tmp_path.iterdir()) == sorted(plot_curves(HISTORY, tmp_path))
    assert (tmp_path / "training_loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    def draw(*_):
        raise ImportError("no module named matplotlib")

    monkeypatch.setattr(results, "draw_chart", draw)
    assert plot_curves(HISTORY, tmp_path) == []
    assert "matplotlib is not installed" in caplog.text


# Whole runs

RESULT_KEYS = {
    "train": {
        "epoch",
        "total_flos",
        "train_loss",
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
    },
    "eval": {
        "epoch",
        "eval_loss",
        "eval_perplexity",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
    },
}
PICTURES = {"training_loss.png", "training_eval_loss.png"}


@pytest.fixture(scope="module")
def validation(tmp_path_factory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "validation.jsonl", rows=5, seed=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model, data, validation) -> Path:
    """Eight steps of a prefix, validated and saved at the fourth and the eighth."""
    output = tmp_path_factory.mktemp("run") / "o"
    options = {"pre_seq_len": 4, "max_steps": 8, "save_steps": 4, "validation_file": validation}
    assert train(model, data, output, **options) == 0
    return output


def read_results(folder: Path, split: str) -> dict:
    return json.loads((folder / f"{split}_results.json").read_text())


def test_a_run_logs_each_step_while_it_goes(run):
    lines, log = read_lines(run), read_log(run)
    entries = [entry for entry in log if "loss" in entry]
    training = [line for line in lines if "loss" in line]
    assert [line["current_steps"] for line in training] == list(range(1, 9))
    assert [line["loss"] for line in training] == [entry["loss"] for entry in entries]
    assert [line["lr"] for line in training] == [entry["learning_rate"] for entry in entries]
    assert [line["throughput"] for line in training] == [entry["tokens_per_second"] for entry in entries]
    assert [line["percentage"] for line in training] == [12.5 * step for step in range(1, 9)]
    validated = [(line["current_steps"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    assert validated == [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    assert [step for step, _ in validated] == [4, 8]
    assert {line["total_steps"] for line in lines} == {8}


def test_a_run_leaves_its_results(run):
    log = read_log(run)
    train_results, eval_results = read_results(run, "train"), read_results(run, "eval")
    assert train_results.keys() == RESULT_KEYS["train"]
    assert eval_results.keys() >= RESULT_KEYS["eval"]
    mean = sum(entry["loss"] for entry in log if "loss" in entry) / 8
    assert train_results["train_loss"] == pytest.approx(mean, rel=1e-6)
    assert eval_results["eval_loss"] == [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1]
    assert eval_results["eval_perplexity"] == pytest.approx(math.exp(eval_results["eval_loss"]))
    assert read_results(run, "all") == {**train_results, **eval_results}
    assert {path.name for path in run.glob("*.png")} == PICTURES


def test_a_run_that_goes_on_logs_every_step_once(run, model, data, validation, tmp_path):
    output = tmp_path / "o"
    shutil.copytree(run, output)
    shutil.rmtree(output / "checkpoint-8")
    before = read_lines(run)
    assert len([line for line in before if line["current_steps"] > 4]) == 6
    options = {"pre_seq_len": 4, "max_steps": 8, "save_steps": 4, "validation_file": validation}
    assert train(model, data, output, resume_from_checkpoint=True, **options) == 0
    lines = read_lines(output)
    volatile = {"elapsed_time", "remaining_time", "throughput"}

    def steady(all_lines: list[dict]) -> list[dict]:
        return [{key: value for key, value in line.items() if key not in volatile} for line in all_lines]

    assert steady(lines) == steady(before)
    assert lines[:5] == before[:5]
    whole, resumed = read_results(run, "train"), read_results(output, "train")
    assert resumed["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)
    assert resumed["train_steps_per_second"] == pytest.approx(4 / resumed["train_runtime"], rel=0.02)
    assert resumed["train_samples_per_second"] == pytest.approx(8 / resumed["train_runtime"], rel=0.02)
    assert read_results(output, "eval")["eval_loss"] == read_results(run, "eval")["eval_loss"]


def test_a_finished_run_that_is_started_again_keeps_its_log_and_results(run, model, data, validation, tmp_path):
    output = tmp_path / "o"
    shutil.copytree(run, output)
    options = {"pre_seq_len": 4, "max_steps": 8, "save_steps": 4, "validation_file": validation}
    assert train(model, data, output, resume_from_checkpoint=True, **options) == 0
    assert read_lines(output) == read_lines(run)
    assert read_results(output, "all") == read_results(run, "all")


def test_a_new_run_in_the_same_folder_forgets_the_old_one(run, model, data, tmp_path):
    output = tmp_path / "o"
    shutil.copytree(run, output)
    options = {"pre_seq_len": 4, "max_steps": 2, "overwrite_output_dir": True}
    assert train(model, data, output, plot_loss=False, **options) == 0
    assert [line["current_steps"] for line in read_lines(output)] == [1, 2, 2]
    assert read_results(output, "all").keys() == RESULT_KEYS["train"]


def test_curves_can_be_turned_off(model, data, tmp_path):
    assert train(model, data, tmp_path / "o", pre_seq_len=4, max_steps=1, plot_loss=False) == 0
    assert list((tmp_path / "o").glob("*.png")) == []
    assert (tmp_path / "o" / "trainer_log.jsonl").is_file()


def test_do_eval_alone_trains_nothing(run, model, validation, tmp_path):
    output = tmp_path / "o"
    argv = flags(model, validation, output, ptuning_checkpoint=run, do_eval=True, max_steps=None, train_file=None)
    assert finetune.main([*argv, "--validation_file", str(validation)]) == 0
    assert {path.name for path in output.iterdir()} == {"settings.json", "eval_results.json", "all_results.json"}
    assert read_results(output, "eval")["eval_loss"] == pytest.approx(read_results(run, "eval")["eval_loss"], rel=1e-5)


def test_results_describe_the_best_model_where_that_is_kept(model, data, validation, tmp_path):
    output = tmp_path / "o"
    options = {"pre_seq_len": 4, "save_steps": 1, "eval_steps": 1, "max_steps": 3, "learning_rate": 2.0}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "validation_file": validation}
    assert train(model, data, output, plot_loss=False, **options) == 0
    best = min(entry["eval_loss"] for entry in read_log(output) if "eval_loss" in entry)
    assert read_results(output, "eval")["eval_loss"] == pytest.approx(best, rel=1e-5)


def test_a_reporter_without_its_package_is_refused_before_loading(model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results.importlib.util, "find_spec", lambda _: None)
    assert train(model, data, tmp_path / "o", report_to="tensorboard") == 2
    assert "--report_to tensorboard needs the package tensorboard: pip install" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_noise_on_embeddings_changes_the_training_alone(model, data, tmp_path):
    """--neftune_noise_alpha, a flag of transformers that LLaMA-Factory's users know."""
    options = {"pre_seq_len": 4, "max_steps": 3, "plot_loss": False}
    for name, alpha in (("plain", None), ("noisy", 5.0)):
        assert train(model, data, tmp_path / name, neftune_noise_alpha=alpha, **options) == 0
    plain, noisy = (losses(tmp_path / name) for name in ("plain", "noisy"))
    assert all(a != b for a, b in zip(plain, noisy)) and plain == pytest.approx(noisy, rel=0.2)


# Learning rates

STEPS, WARMUP, RATE = 12, 3, 1e-2
WARMING = [step / WARMUP for step in range(WARMUP)]
PROGRESS = [step / (STEPS - WARMUP) for step in range(STEPS - WARMUP)]  # after the warm-up, 0 to 1
# Name → its options, and the learning rate of each step as a share of RATE.
CURVES = {
    "linear": ({}, WARMING + [1 - p for p in PROGRESS]),
    "cosine": ({}, WARMING + [(1 + math.cos(math.pi * p)) / 2 for p in PROGRESS]),
    "cosine_with_restarts": ({"num_cycles": 3}, WARMING + [1, 0.75, 0.25] * 3),
    "polynomial": ({"power": 2, "lr_end": 1e-3}, WARMING + [0.1 + 0.9 * (1 - p) ** 2 for p in PROGRESS]),
    "constant": ({}, [1] * STEPS),
    "constant_with_warmup": ({}, WARMING + [1] * (STEPS - WARMUP)),
    "inverse_sqrt": ({}, WARMING + [math.sqrt(WARMUP / step) for step in range(WARMUP, STEPS)]),
    "reduce_lr_on_plateau": ({"factor": 0.5, "patience": 0, "threshold": 0.02}, None),
}


@pytest.fixture
def rates(monkeypatch) -> list[float]:
    """The optimizer's learning rate at the start of each step."""
    seen: list[float] = []
    monkeypatch.setattr(
        results.TrainerLog,
        "on_step_begin",
        lambda self, args, state, control, optimizer=None, **_: seen.append(optimizer.param_groups[0]["lr"]),
    )
    return seen


def follow_plateau(validation_losses: list[float], factor: float, threshold: float, every: int) -> list[float]:
    """Halved after each validation whose loss is not below the best by the threshold."""
    best, rate, result = math.inf, 1.0, []
    for loss in validation_losses:
        result += [rate] * every
        if loss < best * (1 - threshold):
            best = loss
        else:
            rate *= factor
    return result


@pytest.mark.parametrize("name", CURVES)
def test_learning_rates_follow_their_formula_and_go_on_after_a_resume(
    name, model, data, validation, tmp_path, rates, monkeypatch
):
    options, expected = CURVES[name]
    flags_of_run = {
        "pre_seq_len": 4,
        "learning_rate": RATE,
        "max_steps": STEPS,
        "warmup_steps": WARMUP,
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": json.dumps(options) if options else None,
        "save_steps": 6,
        "plot_loss": False,
    }
    if name == "reduce_lr_on_plateau":
        flags_of_run |= {"validation_file": validation, "eval_steps": 2, "learning_rate": 1.0, "warmup_steps": None}
    assert train(model, data, tmp_path / "whole", **flags_of_run) == 0
    whole = rates.copy()
    if expected is None:
        seen = [entry["eval_loss"] for entry in read_log(tmp_path / "whole") if "eval_loss" in entry]
        expected = follow_plateau(seen, options["factor"], options["threshold"], every=2)
        assert 0.5 in expected
    assert whole == pytest.approx([flags_of_run["learning_rate"] * share for share in expected], rel=1e-9)
    rates.clear()
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    assert train(model, data, tmp_path / "resumed", resume_from_checkpoint=checkpoint, **flags_of_run) == 0
    assert rates == whole[6:]
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_type": "cosin"}, "did you mean cosine?"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            "reduce_lr_on_plateau follows the validation loss, and there is no validation data: give "
            "--validation_file, --eval_dataset or --val_size",
        ),
        (
            {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": '{"num_cycle": 3}'},
            "cosine_with_restarts has no option 'num_cycle'; did you mean 'num_cycles'?",
        ),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": '{"power": 3}'},
            "constant has no option 'power'; it takes none",
        ),
        ({"lr_scheduler_kwargs": "num_cycles=3"}, "--lr_scheduler_kwargs num_cycles=3 is no JSON object"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"lr_end": 1.0}'},
            "must be smaller than initial lr",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "One of min_lr or min_lr_rate should be set",
        ),
    ],
)
def test_schedules_that_cannot_be_are_refused_before_loading(model, data, tmp_path, options, message, capsys):
    assert train(model, data, tmp_path / "o", pre_seq_len=4, **options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "notice"),
    [
        ({"lr_scheduler_type": "cosine", "learning_rate": 2.0}, "is a minus missing in its exponent?"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 2}, "constant has no warm-up: --warmup_steps is not used"),
        ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": "{num_cycles: 3}"}, None),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 2}, None),
    ],
)
def test_surprises_of_a_schedule_are_told(model, data, tmp_path, options, notice):
    settings = decide(model, data, tmp_path / "o", pre_seq_len=4, **options)
    assert [True for text in settings.notices if notice and notice in text] == [True] * bool(notice)
    assert len(settings.notices) == bool(notice)
