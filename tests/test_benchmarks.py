"""The benchmarks run, on sizes that take no time; their original's side gives the original code's numbers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))

import bench_decoding
import bench_gpu
import bench_retrieval
import bench_rows
import bench_training
from benchmark_helpers import ModelSize, summarize
from pokemon_rows import choose_by_length
from training_sides import OriginalLoss, OurLoss, Side

from finetune_chatmodel_demo.chatglm3 import load_model

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"
SMALL = ["--layers", "2", "--hidden_size", "128", "--ffn_hidden_size", "96", "--vocabulary", "65024", "--prefix", "8"]
SMALL_TRAINING = [*SMALL, "--max_seq_length", "320", "--rows", "2", "--csv_rows", "12", "--packed_rows", "3"]


@pytest.fixture(scope="module")
def training_report(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmarks") / "new" / "training.json"
    report = bench_training.main([*SMALL_TRAINING, "--repeats", "2", "--no_memory", "--output", str(output)])
    assert json.loads(output.read_text(encoding="utf-8")) == report
    return report


def test_training_report(training_report):
    assert set(training_report) == {
        "benchmark", "machine", "model", "data", "packed_data", "settings", "results",
    }  # fmt: skip
    assert training_report["data"]["template"] == "pokemon.yaml"
    assert len(training_report["data"]["chosen_rows_tokens"]) == 2
    assert training_report["model"]["vocabulary"] == 65024
    (result,) = training_report["results"]
    assert result["max_seq_length"] == 320
    for side in ("original", "ours"):
        assert result[side]["seconds_per_step"]["count"] == 4
        steps = result[side]["seconds_per_step"]
        assert steps["min"] <= steps["median"] <= steps["max"]
        assert result[side]["samples_per_second"] > 0
    ratio = result["ours"]["samples_per_second"] / result["original"]["samples_per_second"]
    assert result["speedup"]["samples_per_second"] == pytest.approx(ratio, rel=1e-2)


def test_both_sides_of_training_agree(training_report):
    (result,) = training_report["results"]
    agreement = result["agreement"]
    assert agreement["first_loss"]["original"] == pytest.approx(np.log(65024), rel=0.02)  # a random model knows nothing
    assert agreement["first_relative_difference"] < 1e-5
    assert agreement["largest_relative_difference"] < 1e-3
    assert agreement["first_gradient_relative_difference"] < 1e-4
    assert agreement["last_loss"]["ours"] != agreement["first_loss"]["ours"]


def test_packed_steps_agree_with_the_original(training_report):
    (packing,) = [result["packing"] for result in training_report["results"]]
    assert packing["tokens_of_a_step"] == sum(training_report["packed_data"]["chosen_rows_tokens"])
    passes = packing["forward_passes"]
    assert passes["original"] == passes["padded"] == 3 > passes["packed"]
    assert packing["share_of_packed_rows_filled"] == round(packing["tokens_of_a_step"] / (passes["packed"] * 320), 3)
    assert packing["largest_relative_difference_of_losses"] < 1e-3
    speed = packing["tokens_per_second"]
    ratio = packing["over_original"]["packed"]["tokens_per_second"]
    assert ratio == pytest.approx(speed["packed"] / speed["original"], rel=1e-2)


def test_original_side_gives_the_original_numbers(golden):
    model = load_model(golden / "tiny_chatglm3", pt_checkpoint=golden / "tiny_prefix_checkpoint", device="cpu")
    with np.load(golden / "tiny_chatglm3_outputs.npz") as base, np.load(golden / "tiny_prefix_outputs.npz") as prefix:
        row = {"input_ids": base["single_input_ids"][0].tolist(), "labels": base["labels"][0].tolist()}
        expected_loss = torch.tensor(prefix["loss"])
        (expected_gradient,) = [torch.tensor(prefix[name]) for name in prefix if name.startswith("grad:")]
    for loss_of in (OriginalLoss(max_seq_length=40, pad_token_id=0), OurLoss(pad_token_id=0)):
        model.zero_grad()
        loss = loss_of(model, [row])
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected_loss.reshape(()), rtol=1e-5, atol=0)
        gradient = model.prefix_encoder.embedding.weight.grad
        assert (gradient - expected_gradient).norm() < 1e-4 * expected_gradient.norm()


def test_sides_start_alike_and_checkpoint():
    sides = [Side(OurLoss(0), ModelSize(2, 128, 96, 256, 4)) for _ in range(2)]
    first, second = [side.model.state_dict() for side in sides]
    assert all(torch.equal(first[name], second[name]) for name in first)
    for side in sides:
        assert side.model.training
        assert all(layer.gradient_checkpointing for layer in side.model.model.layers)
        assert [p.shape for p in side.model.parameters() if p.requires_grad] == [torch.Size([4, 2 * 2 * 2 * 64])]


def test_decoding_report(tmp_path):
    output = tmp_path / "decoding.json"
    arguments = [*SMALL, "--prompt_tokens", "6", "--new_tokens", "4", "--replies", "3", "--output", str(output)]
    report = bench_decoding.main(arguments)
    assert json.loads(output.read_text(encoding="utf-8")) == report
    results = report["results"]
    assert set(results) == {"with_prefix", "without_prefix", "overhead_of_prefix", "replies_differ"}
    for name in ("with_prefix", "without_prefix"):
        assert results[name]["milliseconds_of_a_token"]["count"] == 3 * (4 - 1)
        assert results[name]["milliseconds_to_first_token"]["count"] == 3
        assert results[name]["tokens_per_second"] > 0
    assert results["replies_differ"]
    assert report["settings"]["new_tokens"] == 4
    overhead = results["overhead_of_prefix"]
    assert overhead["is_kept"] == (overhead["token_wall"]["median"] <= overhead["promised_at_most"] == 0.03)


def test_decoding_writes_what_generate_writes():
    model = ModelSize(2, 128, 96, 256, 8).build().eval()
    prompt = bench_decoding.make_prompt(9, model)
    with_prefix, without_prefix = bench_decoding.write_replies(model, prompt, 6)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert with_prefix.token_ids == model.generate(prompt, **options)[0, 9:].tolist()
    with model.prefix_disabled():
        assert without_prefix.token_ids == model.generate(prompt, **options)[0, 9:].tolist()
    assert with_prefix.token_ids != without_prefix.token_ids


def test_statistics():
    assert summarize([3.0, 1.0, 2.0, 4.0]) == {
        "median": 2.5, "quarter": 1.75, "three_quarters": 3.25, "min": 1.0, "max": 4.0, "count": 4,
    }  # fmt: skip
    assert summarize([7.0])["three_quarters"] == 7.0
    assert choose_by_length([50, 10, 40, 20, 30, 60], 3) == [3, 2, 5]
    with pytest.raises(ValueError, match="9 rows are wanted, and the data has 2"):
        choose_by_length([1, 2], 9)


@pytest.mark.parametrize("program, flag", [(bench_training, "--repeats"), (bench_decoding, "--replies")])
def test_bad_numbers_are_refused(program, flag, capsys):
    with pytest.raises(SystemExit):
        program.main([flag, "0"])
    assert "at least" in capsys.readouterr().err


@pytest.mark.thorough
def test_command_measures_memory(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "bench_training.py"), *SMALL_TRAINING, "--repeats", "1"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert finished.returncode == 0, finished.stderr
    memory = json.loads(finished.stdout)["results"][0]["memory"]
    # The padded side holds 319 × 65,024 float32 logits and their gradient, 79 MiB each; ours a part of the rows.
    assert memory["original"]["step_mib"] > 2 * 79
    assert memory["ours"]["step_mib"] < memory["original"]["step_mib"]


SMALL_GPU = ["--device", "cpu", "--small", "--steps", "1", "--threads", "1"]


@pytest.mark.thorough
def test_gpu_report_on_the_cpu(tmp_path):
    output = tmp_path / "gpu.json"
    report = bench_gpu.main([*SMALL_GPU, "--output", str(output)])
    assert json.loads(output.read_text(encoding="utf-8")) == report
    results = report["results"]
    assert list(results) == list(bench_gpu.SECTIONS)
    runs = [
        *(results["ptuning"][policy] for policy in bench_gpu.POLICIES),
        *(results["lora"][policy] for policy in ("mlp", "full")),
        *(results["packed"][policy] for policy in ("none", "full")),
        *(results["quantized"][name] for name in ("nf4", "int8")),
    ]
    assert [run.get("error") for run in runs] == [None] * 9
    if shutil.which("c++"):
        assert results["compiled"]["none"]["loss"] == pytest.approx(results["packed"]["none"]["loss"], rel=1e-2)
        assert results["compiled"]["none"]["times_as_fast"] > 0
    # Random weights know nothing: the loss is about the logarithm of the vocabulary of 512.
    assert all(run["loss"] == pytest.approx(np.log(512), rel=0.25) and run["planned_gib"] > 0 for run in runs)
    assert results["packed"]["flex_attention"] is False
    assert results["decoding"]["replies_differ"]
    assert results["grouped_keys"]["largest_difference"] < 0.05
    assert report["plan_against_measured"] == {"settings": {}, "all_within_10_percent": None}


def test_a_failed_section_is_reported_and_the_rest_goes_on(monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setitem(bench_gpu.RUNS, "ptuning", fail)
    report = bench_gpu.main([*SMALL_GPU, "--sections", "ptuning,matmul"])
    assert report["results"]["ptuning"]["error"] == "OutOfMemoryError: no memory"
    assert report["results"]["matmul"]["teraflops"] > 0


def test_a_gpu_that_no_longer_answers_does_not_take_the_report_with_it(monkeypatch):
    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench_gpu, "_free_memory", fail)
    report = bench_gpu.main([*SMALL_GPU, "--sections", "matmul,ptuning"])
    assert report["results"]["matmul"]["teraflops"] > 0
    expected = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert [report["results"]["ptuning"][policy]["error"] for policy in bench_gpu.POLICIES] == [expected] * 3


def test_a_stopped_gpu_benchmark_leaves_what_it_measured(monkeypatch, tmp_path):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(bench_gpu.RUNS, "lora", stop)
    output = tmp_path / "results" / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.main([*SMALL_GPU, "--sections", "matmul,lora,packed", "--output", str(output)])
    report = json.loads(output.read_text(encoding="utf-8"))
    assert list(report["results"]) == ["matmul"] and report["results"]["matmul"]["teraflops"] > 0
    assert [file.name for file in output.parent.iterdir()] == ["gpu.json"]


def test_useful_operations_and_plans_of_a_gpu_report():
    options = bench_gpu.parse_arguments(["--conversations", "1", "--tokens", "4", "--prefix", "2"])
    config = bench_gpu.make_config(bench_gpu.parse_arguments([*SMALL_GPU]))
    linear = 2 * (128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 192)
    expected = 4 * linear * 4 + 4 * 512 * 128 * 2 + 12 * 2 * 128 * (4 * (2 + 2.5))
    assert bench_gpu.count_flops(options, config, supervised=2) == expected
    sizes = {"x": {"planned_gib": 9.5, "allocated_gib": 10.0}, "y": {"planned_gib": 12.0, "allocated_gib": 10.0}}
    compared = bench_gpu.compare_plans({"a": sizes})
    assert [one["planned_over_measured"] for one in compared["settings"].values()] == [0.95, 1.2]
    assert compared["all_within_10_percent"] is False


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_rows_are_counted_kept_and_watched(tmp_path):
    report = bench_rows.main(["--rows", "256", "2048", "--output", str(tmp_path / "rows.json")])
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8")) == report
    assert [one["rows"] for one in report["results"]] == [256, 2048]
    for one in report["results"]:
        assert one["kept_mib"] > 0 and min(one[run]["peak_mib"] for run in ("first", "again")) > 50


def test_retrieval_report(tmp_path):
    output = tmp_path / "retrieval.json"
    options = ["--rows", "30", "--others", "5", "--questions", "20", "--sizes", "--output", str(output)]
    report = bench_retrieval.main(options)
    assert json.loads(output.read_text(encoding="utf-8")) == report
    found = report["quality"]["none"]
    assert found["passages"] == 30 * 6 + 5 * 4
    assert found["same_words"]["recall@5"] >= 0.95 and found["same_words"]["refusal_f1"] >= 0.8
    assert found["paraphrased"]["answerable"] == 20
