"""Warnings when a run is not learning: the published run is caught in its first tenth, healthy runs are left alone."""

import itertools
import json
import logging
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conversation_helpers import assistant, conversation, user, write_jsonl
from training_helpers import decide, read_log, train

from finetune_chatmodel_demo.training import watch
from finetune_chatmodel_demo.training.watch import LearningWatch

PUBLISHED_STEPS = 1000
# The published log: 5.06 on average in its first 50 steps, 4.99 in its last 50.
PUBLISHED_START, PUBLISHED_END = 5.06, 4.99

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def make_settings(model, data, tmp_path_factory):
    def make(method="ptuning", **options):
        options = {"finetuning_type": method} | options
        return decide(model, data, tmp_path_factory.mktemp("o") / "o", **options)

    return make


@pytest.fixture(scope="module")
def curves(golden):
    return json.loads((golden / "loss_curves.json").read_text(encoding="utf-8"))


class Run:
    """A run of which only the figures exist."""

    def __init__(self, settings, max_steps, learning_rate, *, warmup=None, spread=1.0, length=64, log=(), **options):
        self.watch = LearningWatch(settings, **options)
        warmup = int(0.03 * max_steps) if warmup is None else warmup
        self.args = SimpleNamespace(
            learning_rate=learning_rate, optim="adamw_torch", adam_epsilon=1e-8, get_warmup_steps=lambda _: warmup
        )
        weight = torch.nn.Parameter(torch.randn(length, 1024, generator=torch.Generator().manual_seed(0)) * spread)
        encoder = SimpleNamespace(embedding=SimpleNamespace(weight=weight), trans=None)
        self.model = SimpleNamespace(
            config=SimpleNamespace(vocab_size=65024),
            parameters=lambda: [weight],
            prefix_encoder=encoder if settings.method == "ptuning" else None,
        )
        step = log[-1]["step"] if log else 0
        self.state = SimpleNamespace(
            global_step=step, max_steps=max_steps, is_world_process_zero=True, log_history=list(log)
        )
        schedule = SimpleNamespace(lr_lambdas=[lambda step: 1 - step / max_steps])
        self.watch.on_train_begin(self.args, self.state, None, model=self.model, lr_scheduler=schedule)

    def go(self, losses, norms=None, supervised=40, tokens=100):
        """The steps; returns step → kinds of warnings that came with it."""
        came = {}
        for i, loss in enumerate(losses):
            before = set(self.watch.warned)
            self.state.global_step += 1
            self.watch.add_step(loss, supervised, tokens, norms[i] if norms else 1.0)
            self.watch.on_step_end(self.args, self.state, None)
            if new := set(self.watch.warned) - before:
                came[self.state.global_step] = new
        return came


def noisy(values, spread, seed):
    draw = random.Random(seed)
    return [value + draw.gauss(0, spread) for value in values]


def published(spread, seed, steps=PUBLISHED_STEPS):
    line = [PUBLISHED_START + (PUBLISHED_END - PUBLISHED_START) * i / PUBLISHED_STEPS for i in range(steps)]
    return noisy(line, spread, seed)


# The published run


@pytest.mark.parametrize("spread", [0.02, 0.05, 0.1, 0.15])
def test_the_published_losses_are_called_flat_after_a_tenth(spread, make_settings):
    """Its mean losses with noise between batches; the loss alone decides, in each of 20 runs."""
    settings = make_settings()
    for seed in range(20):
        run = Run(settings, PUBLISHED_STEPS, 2e-5)
        run.watch.warned.clear()  # what is known before the start
        came = run.go(published(spread, seed, 100))
        assert came == {100: {"flat"}}
    text = run.watch.warned["flat"]
    assert "the loss has not moved in 100 of 1000 steps (10% of the run): 5.0" in text
    assert "the learning rate 2e-05 is 1,000 times below the 0.02 that suits P-Tuning v2" in text
    assert "start anew with --learning_rate 0.02" in text


def test_the_published_learning_rate_is_told_before_the_start(make_settings):
    run = Run(make_settings(), PUBLISHED_STEPS, 2e-5)
    text = run.watch.warned["reach"]
    assert "a value of the prefix moves by at most 0.01 in 1000 steps, 0.01 of the prefix's spread of 1" in text
    assert "Use --learning_rate 0.02" in text
    assert "reach" not in Run(make_settings(), PUBLISHED_STEPS, 2e-2).watch.warned
    assert "reach" not in Run(make_settings(), PUBLISHED_STEPS, 2e-5, spread=1e-3).watch.warned
    assert "reach" not in Run(make_settings("lora"), PUBLISHED_STEPS, 2e-5).watch.warned
    assert "reach" not in Run(make_settings(), 4, 2e-2).watch.warned  # a trial


def test_a_replay_of_the_published_setting_is_caught_within_its_first_tenth(model, data, tmp_path, monkeypatch, caplog):
    """A real run, P-Tuning at 2e-5 for 1,000 steps, stopped after a tenth."""
    steps = stop_after(monkeypatch, PUBLISHED_STEPS // 10)
    options = {"pre_seq_len": 16, "learning_rate": 2e-5, "max_steps": PUBLISHED_STEPS, "logging_steps": 10}
    with caplog.at_level(logging.WARNING, logger="finetune_chatmodel_demo"):
        assert train(model, data, tmp_path / "o", **options) == 0
    assert max(entry["step"] for entry in read_log(tmp_path / "o")) == PUBLISHED_STEPS // 10
    told = [record.message for record in caplog.records if record.name == watch.__name__]
    assert [text.split(":")[0] for text in told] == [
        "this run cannot learn",
        "the loss has not moved in 100 of 1000 steps (10% of the run)",
    ]
    assert steps == {0: {"reach"}, 100: {"flat"}}


def stop_after(monkeypatch, last):
    """Ends runs after a step; returns what fills up with step → kinds of warnings."""
    steps = {}
    end, begin = LearningWatch.on_step_end, LearningWatch.on_train_begin

    def note(watch, state):
        new = set(watch.warned) - set().union(*steps.values())
        if new:
            steps[state.global_step] = new

    def on_train_begin(self, args, state, control, **kwargs):
        begin(self, args, state, control, **kwargs)
        note(self, state)

    def on_step_end(self, args, state, control, **kwargs):
        end(self, args, state, control, **kwargs)
        note(self, state)
        control.should_training_stop = state.global_step >= last

    monkeypatch.setattr(LearningWatch, "on_train_begin", on_train_begin)
    monkeypatch.setattr(LearningWatch, "on_step_end", on_step_end)
    return steps


# Healthy runs


@pytest.mark.parametrize("name", ["quickstart", "prefix of 128 at 2e-2", "LoRA at 2e-3", "LoRA at 1e-4"])
def test_recorded_healthy_runs_get_no_warning(name, curves, make_settings):
    curve = curves[name]
    spread = 0.5 if name == "quickstart" else 1.0
    run = Run(make_settings(curve["method"]), curve["max_steps"], curve["learning_rate"], spread=spread)
    assert len(curve["losses"]) >= 0.25 * curve["max_steps"]
    assert run.go(curve["losses"], curve["norms"]) == {}
    assert run.watch.warned == {}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("start", "end", "spread", "steps", "warmup"),
    [
        (1.4, 1.15, 0.08, 1000, 30),  # a strong base on ordinary chats: most of the fall comes early
        (2.5, 0.9, 0.4, 300, 9),  # small, noisy batches
        (6.0, 0.1, 0.05, 60, 0),  # a short run
        (3.0, 1.0, 0.2, 1000, 300),  # nothing can happen in a long warm-up
        (0.2, 0.19, 0.02, 500, 15),  # learned already
    ],
)
def test_simulated_healthy_runs_get_no_warning(start, end, spread, steps, warmup, seed, make_settings):
    fall = [end + (start - end) * math.exp(-6 * max(0, i - warmup / 2) / (steps - warmup)) for i in range(steps)]
    run = Run(make_settings("lora"), steps, 1e-4, warmup=warmup)
    norms = [abs(value) for value in noisy([0.5 + 2 * math.exp(-5 * i / steps) for i in range(steps)], 0.1, seed)]
    assert run.go(noisy(fall, spread, seed), norms) == {}


def test_a_resumed_run_remembers_that_it_has_learned(make_settings):
    """Flat at the end of a run is not flat from its start."""
    log = [{"step": step, "loss": 5 * math.exp(-step / 100) + 1} for step in range(10, 401, 10)]
    run = Run(make_settings("lora"), 1000, 1e-4, log=log)
    assert run.go(noisy([1.05] * 300, 0.05, 0)) == {}
    fresh = Run(make_settings("lora"), 1000, 1e-4)
    assert fresh.go(noisy([1.05] * 300, 0.05, 0)) == {100: {"flat"}}


def test_refining_an_adapter_may_be_flat(make_settings, tmp_path):
    (tmp_path / "adapter").mkdir()
    run = Run(make_settings("lora", adapter_name_or_path=tmp_path / "adapter"), 1000, 1e-4)
    assert run.go(noisy([1.05] * 300, 0.05, 0)) == {}


@pytest.mark.parametrize(
    ("method", "stage"),
    [
        ("ptuning", "sft"),
        ("freeze", "pt"),
        *(
            pytest.param(*each, marks=pytest.mark.thorough)
            for each in itertools.product(("ptuning", "lora", "freeze", "full"), ("sft", "pt"))
            if each not in (("ptuning", "sft"), ("freeze", "pt"))
        ),
    ],
)
def test_real_healthy_runs_get_no_warning(method, stage, model, data, tmp_path, caplog):
    options = {"finetuning_type": method, "stage": stage, "learning_rate": 1e-1 if method == "ptuning" else 1e-2}
    options |= {"max_steps": 40, "lr_scheduler_type": "cosine"} | ({"pre_seq_len": 8} if method == "ptuning" else {})
    if method == "freeze":
        options["freeze_trainable_layers"] = 1
    file = data
    if stage == "pt":
        file = tmp_path / "text.jsonl"
        text = "".join(json.dumps({"text": f"皮卡丘的属性是电。第{i % 7}句。" * 3}) + "\n" for i in range(40))
        file.write_text(text, encoding="utf-8")
        options["max_seq_length"] = 64
    with caplog.at_level(logging.WARNING, logger="finetune_chatmodel_demo"):
        assert train(model, file, tmp_path / "o", **options) == 0
    assert [record.message for record in caplog.records if record.name == watch.__name__] == []


# Other causes


def test_a_wrong_rate_is_named_in_either_direction(make_settings):
    losses = noisy([5.0] * 100, 0.05, 0)
    for rate, cause in (
        (1e-6, "100 times below the 0.0001 that suits LoRA"),
        (1e-2, "100 times above the 0.0001 that suits LoRA"),
        (1e-4, "not the learning rate 0.0001 alone"),
    ):
        run = Run(make_settings("lora"), 1000, rate)
        assert run.go(losses) == {100: {"flat"}}
        assert cause in run.watch.warned["flat"]
    assert "--overfit_check 8" in run.watch.warned["flat"]


def test_a_warning_comes_once(make_settings, caplog):
    run = Run(make_settings("lora"), 1000, 1e-4)
    with caplog.at_level(logging.WARNING, logger="finetune_chatmodel_demo"):
        assert run.go(noisy([5.0] * 1000, 0.05, 0)) == {100: {"flat"}}
    ours = [record.levelname for record in caplog.records if record.name.startswith("finetune_chatmodel_demo")]
    assert ours == ["WARNING"]


@pytest.mark.parametrize(
    ("tokens", "supervised", "warns"), [(100_000, 400, True), (100_000, 0, True), (100_000, 1_000, False)]
)
def test_a_small_supervised_share_is_told_before_the_start(tokens, supervised, warns, make_settings):
    report = SimpleNamespace(tokens_total=tokens, tokens_supervised=supervised)
    run = Run(make_settings("lora"), 1000, 1e-4, report=report)
    assert ("masked" in run.watch.warned) == warns
    if warns:
        assert f"only {supervised:,} of 100,000 tokens of the training data" in run.watch.warned["masked"]
        assert "raise --max_seq_length" in run.watch.warned["masked"]


def test_batches_with_next_to_nothing_supervised(make_settings):
    run = Run(make_settings("lora"), 1000, 1e-4)
    fall = [5 - 0.1 * i for i in range(40)]
    assert run.go(fall[:15], supervised=40) == {}
    assert run.go(fall[15:], supervised=0) == {35: {"masked"}}  # 20 such batches in a row
    assert "only 0 of 2,000 tokens of the last 20 steps up to step 35" in run.watch.warned["masked"]


def test_data_with_few_supervised_tokens_for_real(model, tmp_path, caplog):
    path = write_jsonl(tmp_path / "d.jsonl", [conversation(user("皮卡丘" * 900), assistant("电"))])
    options = {"finetuning_type": "lora", "max_steps": 1, "per_device_train_batch_size": 1}
    with caplog.at_level(logging.WARNING, logger="finetune_chatmodel_demo"):
        assert train(model, path, tmp_path / "o", **options) == 0
    assert "tokens of the training data (" in caplog.text and "are supervised" in caplog.text


def test_gradients(make_settings):
    settings = make_settings("lora")

    def go(losses, norms):
        run = Run(settings, 1000, 1e-4)
        return run.go(losses, norms), run.watch.warned.get("gradients", "")

    high = noisy([5.0] * 90, 0.05, 0)
    came, text = go(high, [1.0] * 10 + [0.0] * 80)
    assert came == {13: {"gradients"}} and "the gradient is zero in 3 steps in a row, up to step 13" in text
    came, text = go(high, [1.0] * 10 + [math.inf] * 80)
    assert came == {30: {"gradients"}} and "Use --bf16 instead of --fp16" in text
    came, text = go(high, [1.0] * 40 + [1e-4] * 50)
    assert list(came.values()) == [{"gradients"}] and "a norm of 0.0001" in text and "1 at the start" in text
    came, text = go(high, [1e-6] * 90)  # 65,536 parameters: 4e-9 each, below Adam's epsilon
    assert list(came) == [20] and "which Adam's epsilon of 1e-08 holds back" in text
    low = [5 * math.exp(-i / 10) for i in range(90)]
    assert go(low, [math.exp(-i / 5) for i in range(90)]) == ({}, "")  # learned: gradients are small for a good reason
    assert go(high, [math.inf] * 15 + [1.0] * 75) == ({}, "")  # a loss scale that is found


def test_a_loss_that_rises(make_settings):
    settings = make_settings("lora")
    run = Run(settings, 1000, 1e-1)
    fall, rise = [5 - 0.03 * i for i in range(90)], [2.3 + 0.05 * i for i in range(120)]
    came = run.go(noisy(fall + rise, 0.2, 0))
    (step,) = came
    assert came[step] == {"rising"} and 150 <= step <= 210
    assert "the learning rate 0.1 is too high. Lower it, e.g. to 0.03" in run.watch.warned["rising"]
    spike = fall + [6.0] * 12 + [2.3] * 200  # one bad moment that passes
    assert Run(settings, 1000, 1e-4).go(noisy(spike, 0.2, 0)) == {}


def test_a_loss_above_guessing(make_settings):
    run = Run(make_settings("lora"), 1000, 1e-4)
    came = run.go(noisy([14.0] * 80, 0.2, 0))
    assert came == {60: {"high"}}
    assert "above the 11.08 of a model that guesses" in run.watch.warned["high"]
    falling = [14 - 0.1 * i for i in range(80)]
    assert Run(make_settings("lora"), 1000, 1e-4).go(falling) == {}


def test_a_real_run_that_diverges(model, data, tmp_path, caplog):
    options = {"finetuning_type": "full", "learning_rate": 3.0, "max_steps": 60, "max_grad_norm": 1e9}
    options |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 40}
    with caplog.at_level(logging.WARNING, logger="finetune_chatmodel_demo"):
        assert train(model, data, tmp_path / "o", **options) == 0
    (text,) = [record.message for record in caplog.records if record.name == watch.__name__]
    assert "above the 7.71 of a model that guesses" in text and "and was 7." in text
    assert "the learning rate 3 is too high. Lower it, e.g. to 1" in text


# The statistics


def test_improvement_has_an_upper_bound():
    exact = watch.measure_improvement([3.0] * 4 + [2.5] * 4 + [2.0] * 4)
    assert (exact.before, exact.now, exact.third) == (3.0, 2.0, 4)
    assert exact.most == exact.share == pytest.approx(1 / 3)
    noise = watch.measure_improvement(noisy([3.0] * 90, 0.3, 0))
    assert noise.most == pytest.approx(noise.share + 2 * 0.3 * math.sqrt(2 / 30) / 3, rel=0.3)


def test_the_log_of_an_earlier_part_becomes_a_loss_for_each_step():
    log = [{"step": 2, "loss": 4.0}, {"step": 2, "eval_loss": 9.0}, {"step": 5, "loss": 3.0}]
    assert watch.spread_log(log) == [4.0, 4.0, 3.0, 3.0, 3.0]


def test_the_sum_of_a_schedule():
    linear = SimpleNamespace(lr_lambdas=[lambda step: 1 - step / 1000])
    assert watch.sum_schedule(linear, 1000) == pytest.approx(500, rel=0.01)
    assert watch.sum_schedule(SimpleNamespace(lr_lambdas=[lambda step: 1.0]), 123_456) == pytest.approx(123_456)
    assert watch.sum_schedule(object(), 70) == 70
