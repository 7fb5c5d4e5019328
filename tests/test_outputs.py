"""What a run leaves behind: trainer_log.jsonl, *_results.json, the curves, and its learning rates."""

import json
import math
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune_chatmodel_demo.training import plots, run_logs
from finetune_chatmodel_demo.training.plots import CHARTS, draw_chart, plot_curves, smooth
from finetune_chatmodel_demo.training.run_logs import TrainerLog, TrainerLogCallback, save_results

CHART = {chart.file: chart for chart in CHARTS}


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(run_logs, "time", SimpleNamespace(monotonic=lambda: self.now))


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
    assert run_logs._read_seconds(str(timedelta(seconds=seconds))) == seconds
    assert run_logs._read_seconds(None) == run_logs._read_seconds("soon") == 0


def test_only_the_first_process_writes(tmp_path):
    callback = TrainerLogCallback(tmp_path)
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
    results = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert results == {
        "train_results.json": {"train_loss": 1.5, "epoch": 2.0},
        "eval_results.json": {"eval_loss": 1.0},
        "all_results.json": {"train_loss": 1.5, "epoch": 2.0, "eval_loss": 1.0, "eval_perplexity": None},
    }
    (tmp_path / "all_results.json").write_text("{")
    save_results(tmp_path, "predict", {"predict_rouge-1": 50.0})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"predict_rouge-1": 50.0}
    run_logs.remove_results(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_results_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    save_results(tmp_path, "eval", {"eval_loss": 1.0})

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(run_logs.os, "fsync", fail)
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
    assert run_logs.describe_training(HISTORY, 8) == {key: HISTORY[-1][key] for key in run_logs.TRAINING_KEYS}
    assert run_logs.describe_training(HISTORY[:-1], 8) == {}


def test_of_a_resumed_run_the_loss_is_that_of_all_steps_and_the_speed_that_of_the_last_part():
    metrics = run_logs.describe_training(HISTORY, 8, resumed_step=4)
    assert metrics["train_loss"] == (2 * 4.0 + 2 * 2.0 + 4 * 1.0) / 8
    assert metrics["train_steps_per_second"] == 4 / 2.0
    assert metrics["train_samples_per_second"] == 4.0  # Trainer counted 8 steps where 4 were made
    right = [*HISTORY[:-1], {**HISTORY[-1], "train_steps_per_second": 2.0, "train_samples_per_second": 4.0}]
    assert run_logs.describe_training(right, 8, resumed_step=4) == metrics


def test_evaluation_is_described():
    metrics = {"eval_loss": 1.0, "eval_runtime": 0.5, "eval_rewards/accuracies": 0.75, "epoch": 1.0}
    assert run_logs.describe_evaluation(HISTORY, "dpo") == metrics
    assert run_logs.describe_evaluation(HISTORY, "sft") == {**metrics, "eval_perplexity": math.e}
    assert run_logs.describe_evaluation([{"eval_loss": 1e9}], "pt")["eval_perplexity"] == math.inf
    assert run_logs.describe_evaluation(HISTORY[:2], "sft") == {}


# Curves


def drawn(figure) -> dict[str, list[tuple[float, float]]]:
    """Label → points of the lines of a figure."""
    (axes,) = figure.axes
    return {line.get_label(): list(zip(*line.get_data())) for line in axes.get_lines()}


def test_smoothing_is_an_average_that_starts_at_the_first_value():
    assert smooth([(1, 4.0)], weight=0.5) == [(1, 4.0)]
    # 0.5 × 4 = 2; 0.5 × 2 + 0.5 × 1 = 1.5, over 1 − 0.25
    assert smooth([(1, 4.0), (3, 1.0)], weight=0.5) == [(1, 4.0), (3, 2.0)]


def test_the_loss_is_drawn_as_logged_and_smoothed():
    pytest.importorskip("matplotlib")
    points = [(2, 4.0), (4, 2.0), (8, 1.0)]
    lines = drawn(draw_chart(HISTORY, CHART["training_loss.png"]))
    assert lines == {
        "_training loss": points,
        "training loss (smoothed)": smooth(points),
        "_validation loss": [(4, 1.0)],
        "validation loss (smoothed)": [(4, 1.0)],
    }
    figure = draw_chart(HISTORY, CHART["training_loss.png"])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "training loss (smoothed)",
        "validation loss (smoothed)",
    ]
    assert drawn(draw_chart(HISTORY, CHART["training_eval_loss.png"])).keys() == {
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
    rewards = drawn(draw_chart(dpo, CHART["training_rewards.png"]))
    assert rewards["_chosen"] == [(1, 0.1), (2, 0.2)]
    assert rewards["_rejected"] == [(1, -0.1), (2, -0.3)]
    assert rewards["_margin"] == [(1, 0.2), (2, 0.5)]
    assert drawn(draw_chart(dpo, CHART["training_accuracy.png"]))["_accuracy"] == [(2, 1.0)]
    ppo = [{"step": 1, "reward": -1.0}, {"step": 2, "reward": 0.5}]
    assert drawn(draw_chart(ppo, CHART["training_rewards.png"]))["_reward"] == [(1, -1.0), (2, 0.5)]
    rm = [{"step": 1, "eval_accuracy": 0.25}]
    assert drawn(draw_chart(rm, CHART["training_accuracy.png"]))["_accuracy, validation"] == [(1, 0.25)]


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

    monkeypatch.setattr(plots, "draw_chart", draw)
    assert plot_curves(HISTORY, tmp_path) == []
    assert "matplotlib is not installed" in caplog.text
