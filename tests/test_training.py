"""Training: flags and settings, the order of rows, whole checkpoints, and real runs of a small model on the CPU."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import read_light_help
from safetensors.torch import load_file, save_file
from training_helpers import (
    assert_resumes_to_the_same_weights,
    die_at,
    flags,
    losses,
    read_log,
    train,
    write_conversations,
)

from finetune_chatmodel_demo import finetune
from finetune_chatmodel_demo.chatglm3 import load_model, load_tokenizer, prefix, read_prefix_config
from finetune_chatmodel_demo.common import files
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training import checkpoints, methods, trainer, workflow
from finetune_chatmodel_demo.training.arguments import FULL, P_TUNING
from finetune_chatmodel_demo.training.command_line import parse_given
from finetune_chatmodel_demo.training.deciding import decide_settings
from finetune_chatmodel_demo.training.sampling import LengthGroupedBatches

PREFIX_FILES = {"prefix_encoder.safetensors", "pytorch_model.bin", "config.json"}

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def assert_prefix_equal(first: Path, second: Path) -> None:
    left, right = (load_file(folder / "prefix_encoder.safetensors") for folder in (first, second))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# Flags


def test_help_needs_no_torch(tmp_path):
    printed = read_light_help(Path(finetune.__file__), tmp_path)
    for flag in ("--train_format", "--train_file", "--pre_seq_len", "--prefix_projection", "--quantization_bit"):
        assert flag in printed
    assert "--max_steps" in printed


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--prefix_projection"], {"prefix_projection": True}),
        (["--prefix_projection", "True"], {"prefix_projection": True}),
        (["--prefix-projection", "False"], {"prefix_projection": False}),
        (["--pre_seq_len=128", "--learning_rate", "2e-2"], {"pre_seq_len": 128, "learning_rate": 0.02}),
        (["--fp16"], {"fp16": True}),
        (["--evaluation_strategy", "steps"], {"eval_strategy": "steps"}),
        (["--warmup_ratio", "0.1"], {"warmup_steps": 0.1}),
        (["--group_by_length", "False"], {"train_sampling_strategy": "random"}),
        (["--no_cuda"], {"use_cpu": True}),
        (["--overwrite_output_dir"], {"overwrite_output_dir": True}),
        (["--resume_from_checkpoint", "True"], {"resume_from_checkpoint": "True"}),
        (["--gradient_checkpointing", "False"], {"gradient_checkpointing": False}),
    ],
)
def test_only_given_flags_are_returned(argv, expected):
    assert parse_given(argv) == (expected, [])


def test_flags_without_effect_are_named():
    given, (notice,) = parse_given(["--overwrite_cache", "--seed", "7"])
    assert given == {"seed": 7}
    assert notice.startswith("--overwrite_cache has no effect: rows are read anew")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pre_seq_length", "8"], "did you mean '--pre_seq_len'"),
        (["--xyzzy"], "--help_all lists every flag"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--quantization_bit", "5"], "invalid choice: 5"),
        (["--tokenizer_name", "x"], "the tokenizer and the configuration are read from --model_name_or_path"),
        (["missing.json"], "the settings file missing.json does not exist"),
    ],
)
def test_bad_flags_are_explained(argv, message):
    with pytest.raises(UserError, match=message):
        parse_given(argv)


def test_settings_files_mean_the_same_as_flags(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 2e-2\npre_seq_len: 8\nprefix_projection: true\nseed: null\n")
    (tmp_path / "run.json").write_text('{"learning_rate": 0.02, "pre_seq_len": 8, "prefix_projection": true}')
    expected = {"learning_rate": 0.02, "pre_seq_len": 8, "prefix_projection": True}
    assert parse_given([str(tmp_path / "run.yaml")])[0] == expected
    assert parse_given([str(tmp_path / "run.json")])[0] == expected
    assert parse_given([str(tmp_path / "run.json"), "--pre_seq_len", "16"])[0]["pre_seq_len"] == 16
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(UserError, match="one mapping of flag names to values"):
        parse_given([str(tmp_path / "bad.json")])


# Settings


def decide(argv: list[str]):
    return decide_settings(*parse_given(argv))


def test_defaults_depend_on_the_method(model, data, tmp_path):
    pt = decide(flags(model, data, tmp_path / "o", pre_seq_len=8))
    full = decide(flags(model, data, tmp_path / "o"))
    assert (pt.method, pt.training.learning_rate) == (P_TUNING, 2e-2)
    assert (full.method, full.training.learning_rate) == (FULL, 1e-4)
    assert pt.training.warmup_steps == 0  # 3% of 4 steps
    assert decide(flags(model, data, tmp_path / "o", max_steps=1000)).training.warmup_steps == 30
    assert decide(flags(model, data, tmp_path / "o", max_steps=None)).training.warmup_steps == 0.03
    assert pt.training.gradient_checkpointing is False  # on by default only where there is a GPU
    assert pt.precision == "float32"
    assert decide(flags(model, data, tmp_path / "o", learning_rate=5e-3)).training.learning_rate == 5e-3
    assert decide(flags(model, data, tmp_path / "o", bf16=True, pre_seq_len=8)).weights_dtype == torch.bfloat16
    assert decide(flags(model, data, tmp_path / "o", bf16=True)).weights_dtype == torch.float32
    assert not (tmp_path / "o").exists()


def test_a_gpu_turns_on_bf16_and_gradient_checkpointing(monkeypatch):
    from finetune_chatmodel_demo.training import deciding

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert deciding._default_precision({}) == {"bf16": True}
    assert deciding._default_precision({"fp16": True}) == {}
    assert deciding._default_precision({"use_cpu": True}) == {}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert deciding._default_precision({}) == {"fp16": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_file": None}, "there is nothing to read: give --train_file FILE"),
        ({"train_file": "nowhere.jsonl"}, "--train_file nowhere.jsonl does not exist"),
        ({"validation_file": "nowhere.jsonl"}, "--validation_file nowhere.jsonl does not exist"),
        ({"tokenized_cache": __file__}, f"--tokenized_cache {__file__} is a file; give a folder"),
        ({"model_name_or_path": "/nowhere"}, "--model_name_or_path /nowhere is not a folder"),
        ({"model_name_or_path": None}, "--model_name_or_path is missing"),
        ({"output_dir": None}, "--output_dir is missing"),
        ({"train_format": "chat"}, "invalid choice: 'chat'"),
        ({"max_seq_length": 0}, "--max_seq_length is 0; it must be at least 1"),
        ({"pre_seq_len": 0}, "--pre_seq_len is 0"),
        ({"prefix_projection": True}, "--prefix_projection belongs to P-Tuning v2"),
        ({"quantization_bit": 4}, "--quantization_bit 4 cannot train all parameters"),
        ({"deepspeed": "{"}, "--deepspeed { is not a DeepSpeed configuration"),
        ({"deepspeed": "{}", "do_eval": True}, "--deepspeed shares out what training needs"),
        ({"deepspeed": "nowhere.json"}, "--deepspeed nowhere.json does not exist (the current folder is "),
        ({"ptuning_checkpoint": "/nowhere"}, "--ptuning_checkpoint /nowhere is not a folder with a config.json; "),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size is 0; it must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps is 0; it must be at least 1"),
        ({"save_steps": 0}, "--save_steps is 0; it must be above 0"),
        ({"num_train_epochs": 0}, "--num_train_epochs is 0; it must be above 0"),
        ({"learning_rate": -0.02}, "--learning_rate is -0.02; it must be 0 or more"),
        ({"fp16": True}, "--fp16 needs a GPU"),
        ({"fp16": True, "bf16": True}, "--bf16 and --fp16 exclude each other"),
        ({"eval_strategy": "steps"}, "evaluation needs --validation_file"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor needs the logits"),
        ({"resume_from_checkpoint": "/nowhere"}, "the checkpoint /nowhere does not exist"),
    ],
)
def test_impossible_runs_are_refused_before_loading(model, data, tmp_path, options, message, monkeypatch, capsys):
    monkeypatch.setattr(methods, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert train(model, data, tmp_path / "o", **{"pre_seq_len": None, **options}) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


# Order of the rows


def test_units_hold_rows_of_similar_length():
    lengths = torch.randint(1, 1000, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    order = list(LengthGroupedBatches(lengths, unit=10, seed=1))
    assert sorted(order) == list(range(1003))
    units = [[lengths[i] for i in order[start : start + 10]] for start in range(0, 1000, 10)]
    assert sum(max(unit) - min(unit) for unit in units) / len(units) < 40  # random units: about 820
    means = [sum(unit) / 10 for unit in units]
    assert means not in (sorted(means), sorted(means, reverse=True))
    assert max(units[0]) == max(lengths)


def test_order_depends_on_seed_and_epoch_alone():
    order = LengthGroupedBatches(list(range(1, 101)), unit=4, seed=5)
    first = list(order)
    torch.rand(3)
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) != first
    order.set_epoch(0)
    assert list(order) == first
    assert list(LengthGroupedBatches(list(range(1, 101)), unit=4, seed=6)) != first


# Checkpoints


def make_checkpoint(output: Path, step: int) -> Path:
    folder = output / f"checkpoint-{step}"
    partial = checkpoints.start_partial(folder)
    (partial / "weights.bin").write_bytes(b"x" * 100)
    (partial / "sub").mkdir()
    (partial / "sub" / "state.json").write_text("{}")
    checkpoints.publish_checkpoint(folder, {"step": step})
    return folder


def test_a_checkpoint_with_a_flipped_bit_is_passed_over(tmp_path, caplog):
    for step in (1, 2):
        partial = checkpoints.start_partial(tmp_path / f"checkpoint-{step}")
        (partial / "optimizer.pt").write_bytes(bytes(5000))
        checkpoints.publish_checkpoint(tmp_path / f"checkpoint-{step}", {"step": step})
    assert checkpoints.find_last_checkpoint(tmp_path).name == "checkpoint-2"
    damaged = bytearray(5000)
    damaged[4321] = 1
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(damaged)
    assert checkpoints.find_last_checkpoint(tmp_path).name == "checkpoint-1"
    assert "passing over a checkpoint" in caplog.text and "optimizer.pt has the SHA-256" in caplog.text


def test_large_files_are_compared_by_size_and_header_or_on_request_by_hash(tmp_path, monkeypatch):
    """Here files above 10 bytes are large. Earlier versions wrote all hashes, as --hash_checkpoints does."""
    monkeypatch.setattr(checkpoints, "HASHED_BYTES", 10)
    for step, hash_all in ((1, False), (2, True)):
        partial = checkpoints.start_partial(tmp_path / f"checkpoint-{step}")
        save_file({"weights": torch.zeros(100)}, partial / "model.safetensors")
        checkpoints.publish_checkpoint(tmp_path / f"checkpoint-{step}", {"step": step}, hash_all)
        manifest = json.loads((tmp_path / f"checkpoint-{step}" / checkpoints.MANIFEST).read_text())
        assert ("sha256" in manifest["files"]["model.safetensors"]) == hash_all
        path = tmp_path / f"checkpoint-{step}" / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"x")  # within a value
        assert checkpoints.read_whole_checkpoint(path.parent)["step"] == step
        path.write_bytes(content[:20] + b"\0" * 8 + content[28:])  # within the header
        with pytest.raises(UserError, match=r"model\.safetensors has a header that does not fit"):
            checkpoints.read_whole_checkpoint(path.parent)
        path.write_bytes(content[:-1])
        with pytest.raises(UserError, match=f"has {len(content) - 1} bytes, expected {len(content)} bytes"):
            checkpoints.read_whole_checkpoint(path.parent)
        path.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match=r"model\.safetensors has the SHA-256"):
        checkpoints.read_whole_checkpoint(tmp_path / "checkpoint-2", hash_all=True)


def test_checkpoints_of_the_first_versions_are_read(tmp_path):
    """Their manifests hold sizes alone."""
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_bytes(bytes(10))
    manifest = tmp_path / "checkpoint-3" / checkpoints.MANIFEST
    manifest.write_text(json.dumps({"step": 3, "method": "P-Tuning v2", "files": {"optimizer.pt": 10}}))
    assert checkpoints.read_whole_checkpoint(tmp_path / "checkpoint-3")["step"] == 3
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_bytes(bytes(9))
    with pytest.raises(UserError, match="has 9 bytes, expected 10 bytes"):
        checkpoints.read_whole_checkpoint(tmp_path / "checkpoint-3")


def test_only_whole_checkpoints_are_found(tmp_path):
    assert checkpoints.find_last_checkpoint(tmp_path / "nowhere") is None
    whole = make_checkpoint(tmp_path, 500)
    make_checkpoint(tmp_path, 90)
    assert checkpoints.read_whole_checkpoint(whole)["step"] == 500
    truncated, missing, unlisted = (make_checkpoint(tmp_path, step) for step in (1000, 1500, 2000))
    (truncated / "weights.bin").write_bytes(b"x" * 99)
    (missing / "sub" / "state.json").unlink()
    (unlisted / checkpoints.MANIFEST).unlink()
    checkpoints.start_partial(tmp_path / "checkpoint-2500")
    assert checkpoints.find_last_checkpoint(tmp_path) == whole
    for folder, message in (
        (truncated, "weights.bin has 99 bytes, expected 100"),
        (missing, "sub/state.json is missing, expected 2"),
        (unlisted, "has no checkpoint_manifest.json"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoints.read_whole_checkpoint(folder)


def test_a_checkpoint_replaces_one_of_its_name(tmp_path):
    old = make_checkpoint(tmp_path, 5)
    (old / "old.txt").touch()
    make_checkpoint(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5"]
    assert not (old / "old.txt").exists()


def test_old_checkpoints_are_removed_but_not_the_best(tmp_path):
    for step in (5, 10, 15, 100):
        make_checkpoint(tmp_path, step)
    checkpoints.remove_old_checkpoints(tmp_path, None)
    assert len(checkpoints.list_checkpoints(tmp_path)) == 4
    checkpoints.remove_old_checkpoints(tmp_path, 2, keep=tmp_path / "checkpoint-5")
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-100"]
    checkpoints.remove_old_checkpoints(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100"]


# Runs


@pytest.fixture(scope="module")
def prefix_run(model, data, tmp_path_factory):
    """A finished P-Tuning run, drawn too: its folder, its trainer and its validation file."""
    output = tmp_path_factory.mktemp("run") / "output"
    validation = write_conversations(output.parent / "validation.jsonl", rows=7, seed=9)
    options = {"pre_seq_len": 4, "max_steps": 20, "save_steps": 6, "validation_file": validation, "save_total_limit": 2}
    with pytest.MonkeyPatch.context() as patch:
        trained = []
        original = workflow.run_finetuning
        patch.setattr(workflow, "run_finetuning", lambda settings: trained.append(original(settings)))
        assert train(model, data, output, gradient_accumulation_steps=2, **options) == 0
    return output, trained[0], validation


def test_p_tuning_changes_the_prefix_and_nothing_else(prefix_run, model):
    _, trained, _ = prefix_run
    base = dict(load_model(model).named_parameters())
    after = dict(trained.model.named_parameters())
    changed = {name for name in after if name not in base or not torch.equal(after[name], base[name])}
    assert changed == {"model.prefix_encoder.embedding.weight"}
    assert {name for name, value in after.items() if value.requires_grad} == changed
    assert after["model.prefix_encoder.embedding.weight"].dtype == torch.float32


def test_prefix_output_is_small_and_complete(prefix_run, model):
    output, trained, _ = prefix_run
    expected = {"settings.json", "trainer_state.json", "training_loss.png", "training_eval_loss.png", *PREFIX_FILES}
    expected |= {"trainer_log.jsonl", "train_results.json", "eval_results.json", "all_results.json"}
    expected |= {"run_manifest.json"}
    assert {path.name for path in output.iterdir()} == expected | {"checkpoint-18", "checkpoint-20"}
    assert (output / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = output / "checkpoint-20"
    names = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", checkpoints.MANIFEST}
    assert {path.name for path in checkpoint.iterdir()} == names | PREFIX_FILES
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 100_000
    config = read_prefix_config(output)
    assert (config.pre_seq_len, config.prompt_format, config.base_model) == (4, "multi-turn", str(model))
    assert_prefix_equal(output, checkpoint)
    loaded = load_model(model, pt_checkpoint=output)
    assert torch.equal(loaded.prefix_encoder.embedding.weight, trained.model.prefix_encoder.embedding.weight)


def test_log_has_losses_speed_and_validation(prefix_run):
    output, _, _ = prefix_run
    log = read_log(output)
    training = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in training] == list(range(1, 21))
    assert training[-1]["loss"] < training[0]["loss"]
    assert all(0 < entry["supervised_tokens_per_second"] < entry["tokens_per_second"] for entry in training)
    assert training[0]["learning_rate"] == pytest.approx(2e-2)
    validation = [entry["step"] for entry in log if "eval_loss" in entry]
    assert validation == [6, 12, 18, 20]  # with each checkpoint and at the end


def test_validation_loss_is_the_mean_over_tokens(prefix_run):
    _, trained, _ = prefix_run
    summed = tokens = 0
    for row in trained.eval_dataset.rows:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = trained.model.eval()(torch.tensor([row["input_ids"]]), labels=labels).loss
        count = int((labels != -100).sum())
        summed, tokens = summed + loss.item() * count, tokens + count
    assert [e for e in trained.state.log_history if "eval_loss" in e][-1]["eval_loss"] == pytest.approx(
        summed / tokens, rel=1e-5
    )


def test_start_is_described(model, data, tmp_path, capsys):
    assert train(model, data, tmp_path / "o", pre_seq_len=4, max_steps=3, gradient_accumulation_steps=4) == 0
    printed = capsys.readouterr().out
    for text in (
        "'<|assistant|>': ",
        " -> -100",
        "train:      24 rows",
        "P-Tuning v2, a prefix of 4 positions: 256 of ",
        "0.02, linear, warm-up over 0 steps",
        "2 rows × 4 accumulated × 1 processes = 8 rows a step",
        "3 of 8 rows = 1.00 epochs of 24 rows",
        "cpu, gradient checkpointing off",
        "a new run",
        "tokens_per_second",
        f"finished: {tmp_path / 'o'}",
    ):
        assert text in printed


def test_full_tuning_changes_everything_and_loads_alone(model, data, tmp_path):
    settings = {name: str(value) for name, value in zip(*[iter(flags(model, data, tmp_path / "o"))] * 2)}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({name.removeprefix("--"): value for name, value in settings.items()}))
    assert finetune.main([str(path)]) == 0
    base, trained = load_model(model), load_model(tmp_path / "o")
    before, after = base.state_dict(), trained.state_dict()
    assert before.keys() == after.keys()
    # Adam moves every element that has a gradient; the key's bias shifts all scores alike and has none.
    assert [name for name in before if torch.equal(before[name], after[name]) and "k_proj.bias" not in name] == []
    official = load_file(tmp_path / "o" / "model.safetensors")
    assert "transformer.encoder.layers.0.self_attention.query_key_value.weight" in official
    assert load_tokenizer(tmp_path / "o").encode_text("皮卡丘") == load_tokenizer(model).encode_text("皮卡丘")
    assert trained.config.use_cache is True
    assert json.loads((tmp_path / "o" / "settings.json").read_text())["max_steps"] == 4
    config = json.loads((tmp_path / "o" / "config.json").read_text(encoding="utf-8"))
    assert config["prompt_format"] == "multi-turn"


def test_full_tuning_resumes_to_the_same_weights(model, data, tmp_path):
    assert_resumes_to_the_same_weights(model, data, tmp_path, "model.safetensors")


def test_one_row_accumulated_equals_one_batch(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix, "PREFIX_DROPOUT", 0.0)  # each row draws its own dropout
    options = {"pre_seq_len": 4, "max_steps": 5, "train_sampling_strategy": "random", "learning_rate": 1e-2}
    for name, batch, accumulated in (("a", 4, 1), ("b", 1, 4)):
        options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        assert train(model, data, tmp_path / name, **options) == 0
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-6)
    norms = [[e["grad_norm"] for e in read_log(tmp_path / name) if "grad_norm" in e] for name in "ab"]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    first, second = (load_file(tmp_path / name / "prefix_encoder.safetensors")["embedding.weight"] for name in "ab")
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)


@pytest.mark.parametrize("projection", [False, True])
def test_gradient_checkpointing_is_on_and_changes_nothing(model, data, tmp_path, monkeypatch, projection):
    calls = []
    load = methods.load_model

    def load_counting(*args, **kwargs):
        loaded = load(*args, **kwargs)
        loaded.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        return loaded

    monkeypatch.setattr(methods, "load_model", load_counting)
    counts = {}
    for is_on in (False, True):
        calls.clear()
        options = {"pre_seq_len": 4, "prefix_projection": projection, "gradient_checkpointing": is_on}
        assert train(model, data, tmp_path / str(is_on), **options) == 0
        counts[is_on] = len(calls)
    assert counts == {False: 4, True: 8}  # each of 4 batches runs forward a second time for its gradients
    assert_prefix_equal(tmp_path / "False", tmp_path / "True")


def test_a_finished_run_is_not_continued(prefix_run, model, data, caplog):
    output, _, validation = prefix_run
    before = load_file(output / "prefix_encoder.safetensors")["embedding.weight"]
    options = {"pre_seq_len": 4, "max_steps": 20, "save_steps": 6, "validation_file": validation}
    assert train(model, data, output, gradient_accumulation_steps=2, resume_from_checkpoint=True, **options) == 0
    assert torch.equal(load_file(output / "prefix_encoder.safetensors")["embedding.weight"], before)
    assert max(entry["step"] for entry in read_log(output)) == 20
    assert "checkpoint-20 is the end of the run already: no step is left" in caplog.text


def test_runs_are_kept_apart(model, data, tmp_path, capsys):
    options = {"pre_seq_len": 4, "max_steps": 2, "save_steps": 1}
    assert train(model, data, tmp_path / "o", resume_from_checkpoint=True, **options) == 0
    assert f"no whole checkpoint in {tmp_path / 'o'}: starting from the beginning" in capsys.readouterr().out
    assert train(model, data, tmp_path / "o", **options) == 2
    assert "holds checkpoint-2 of an earlier run" in capsys.readouterr().err
    assert train(model, data, tmp_path / "o", resume_from_checkpoint=True, max_steps=2) == 2
    assert "is a checkpoint of P-Tuning v2, and this run trains all parameters" in capsys.readouterr().err
    options |= {"max_steps": 4, "save_steps": 3, "learning_rate": 1e-2}
    assert train(model, data, tmp_path / "o", resume_from_checkpoint=tmp_path / "o" / "checkpoint-1", **options) == 0
    assert "learning_rate was 0.02, is 0.01; max_steps was 2, is 4" in capsys.readouterr().out
    assert train(model, data, tmp_path / "o", overwrite_output_dir=True, **options) == 0
    names = [path.name for path in checkpoints.list_checkpoints(tmp_path / "o")]
    assert names == ["checkpoint-3", "checkpoint-4"]


def test_models_that_cannot_be_loaded_are_explained(prefix_run, model, data, tmp_path, capsys):
    output, _, _ = prefix_run
    assert train(model, data, tmp_path / "o", ptuning_checkpoint=output, pre_seq_len=5) == 2
    assert "the prefix has 4 positions, but 5 were asked for" in capsys.readouterr().err
    (tmp_path / "broken").mkdir()
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "broken" / name).write_bytes((model / name).read_bytes())
    assert train(tmp_path / "broken", data, tmp_path / "o") == 2
    assert str(tmp_path / "broken") in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def replace_in(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def split_weights(folder: Path) -> None:
    """Three shards and their index, of which the second is missing."""
    load_model(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (split_weights, "files that model.safetensors.index.json names: model-00002-of-"),
        (lambda f: replace_in(f / "config.json", model_type="llama"), "model_type is 'llama'"),
        (lambda f: replace_in(f / "config.json", padded_vocab_size=64), "config.json asks for (64, "),
        (lambda f: (f / "config.json").write_text('{"a": '), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json holds a list"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 50), "(50 bytes) is not a whole safetensors file"),
        (lambda f: os.truncate(f / "model.safetensors", 20_000), "(20,000 bytes) is not a whole safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"), "is a git-lfs pointer of 23"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"hello"), "is not a SentencePiece model"),
    ],
)
def test_damaged_model_folders_are_named_before_weights_are_read(model, data, tmp_path, damage, message, capsys):
    folder = tmp_path / "base"
    shutil.copytree(model, folder)
    damage(folder)
    assert train(folder, data, tmp_path / "o") == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert str(folder) in shown
    assert not (tmp_path / "o").exists()


def test_a_name_that_neither_disk_nor_hub_knows_is_explained(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train("no/model", data, tmp_path / "o") == 2
    assert "--model_name_or_path: no/model: there is no such folder, and as a name" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_length_of_training_without_training_is_pointed_out(model, data, tmp_path):
    expected = "--max_steps without --do_train True: nothing is trained; add it to train first"
    for given, is_told in (({"do_predict": True}, True), ({"do_predict": True, "do_train": True}, False), ({}, False)):
        argv = flags(model, data, tmp_path / "o", validation_file=data, max_steps=2, **given)
        assert (expected in decide(argv).notices) == is_told


def test_a_learning_rate_without_its_minus_is_pointed_out(model, data, tmp_path):
    argv = flags(model, data, tmp_path / "o", learning_rate="2e2")
    assert any("--learning_rate is 200, and 2e-2" in notice for notice in decide(argv).notices)


def test_the_checkpoint_that_a_run_continues_from_may_be_removed_by_it(model, data, tmp_path):
    options = {"pre_seq_len": 4, "save_steps": 2, "save_total_limit": 1, "resume_from_checkpoint": True}
    assert train(model, data, tmp_path / "o", max_steps=2, **options) == 0
    assert train(model, data, tmp_path / "o", max_steps=8, **options) == 0
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "o")] == ["checkpoint-8"]


def test_a_prefix_is_continued_from_a_checkpoint(prefix_run, model, data, tmp_path):
    output, _, _ = prefix_run
    options = {"ptuning_checkpoint": output, "max_steps": 1, "learning_rate": 1e-9}
    assert train(model, data, tmp_path / "o", **options) == 0
    first, second = (load_model(model, pt_checkpoint=folder).prefix_encoder for folder in (output, tmp_path / "o"))
    torch.testing.assert_close(first.embedding.weight, second.embedding.weight, rtol=0, atol=1e-7)


def test_prompts_and_responses_with_a_projected_prefix(model, tmp_path):
    data = tmp_path / "pairs.json"
    pairs = [{"prompt": f"宝可梦{i}" * 40, "response": "草属性" * (i % 3 + 1)} for i in range(6)]
    data.write_text(json.dumps(pairs, ensure_ascii=False), encoding="utf-8")
    options = {"train_format": "input-output", "max_source_length": 20, "pre_seq_len": 4, "prefix_projection": True}
    assert train(model, data, tmp_path / "o", prefix_init_std=0.5, **options) == 0
    config = read_prefix_config(tmp_path / "o")
    assert (config.prompt_format, config.prefix_projection) == ("input-output", True)


def test_the_spread_of_a_new_prefix_can_be_set(model, data, tmp_path):
    options = {"pre_seq_len": 64, "max_steps": 1, "learning_rate": 1e-9}
    for std in (1.0, 0.1):
        assert train(model, data, tmp_path / str(std), prefix_init_std=std, **options) == 0
        weight = load_file(tmp_path / str(std) / "prefix_encoder.safetensors")["embedding.weight"]
        assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_bfloat16_keeps_the_prefix_in_float32(model, data, tmp_path):
    assert train(model, data, tmp_path / "o", pre_seq_len=4, bf16=True) == 0
    assert load_file(tmp_path / "o" / "prefix_encoder.safetensors")["embedding.weight"].dtype == torch.float32
    assert all(5 < loss < 10 for loss in losses(tmp_path / "o"))


# Killed runs


def test_a_killed_run_ends_with_the_same_weights(model, data, tmp_path):
    """Killed twice, in the middle of a step and of writing a checkpoint; prefix dropout and row order included."""
    options = {"pre_seq_len": 4, "max_steps": 20, "save_steps": 5, "gradient_accumulation_steps": 2}
    assert train(model, data, tmp_path / "whole", **options) == 0
    killed = tmp_path / "killed"
    argv = flags(model, data, killed, resume_from_checkpoint=True, **options)
    # 10 files a checkpoint: 9 and the manifest. The first run dies in step 8, the second while flushing checkpoint-15.
    for owner, name, count, whole, partial in (
        (f"{trainer.__name__}:Trainer", "training_step", 16, "checkpoint-5", False),
        (files.__name__, "flush", 16, "checkpoint-10", True),
    ):
        die_at(owner, name, count, argv)
        assert checkpoints.find_last_checkpoint(killed).name == whole
        assert any(path.name.startswith(files.PARTIAL_PREFIX) for path in killed.iterdir()) == partial
    assert train(model, data, killed, resume_from_checkpoint=True, **options) == 0
    assert_prefix_equal(tmp_path / "whole", killed)
    assert losses(killed) == losses(tmp_path / "whole")
    assert not [path for path in killed.iterdir() if path.name.startswith(files.PARTIAL_PREFIX)]


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.thorough)])
def test_a_prefix_in_front_of_a_quantized_base(model, data, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    assert train(model, data, tmp_path / "o", pre_seq_len=4, quantization_bit=bits, max_steps=8) == 0
    assert losses(tmp_path / "o")[-1] < losses(tmp_path / "o")[0]
    assert load_model(model, pt_checkpoint=tmp_path / "o").prefix_encoder.length == 4
