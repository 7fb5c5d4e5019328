"""export.py: merged models, whole models, prefixes and adapters in either form; what it refuses, what it leaves."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_helpers import make_adapter, make_official_adapter, randomize
from conftest import read_light_help
from generation_helpers import build_prefix_folder
from safetensors.torch import load_file, save_file
from training_helpers import train
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from finetune_chatmodel_demo import export, inference
from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, load_model, read_prefix_config
from finetune_chatmodel_demo.chatglm3 import export as exporting
from finetune_chatmodel_demo.chatglm3.comparing import Comparison, ComparisonError, compare_logits, probe_logits
from finetune_chatmodel_demo.chatglm3.export import check_disk, check_output, convert_prefix, fold, merge_adapter
from finetune_chatmodel_demo.chatglm3.lora import add_adapter, load_adapter, save_adapter
from finetune_chatmodel_demo.generation.choose import choose_model
from finetune_chatmodel_demo.generation.probes import CONVERSATIONS, build_probes
from finetune_chatmodel_demo.inference import build_parser as inference_parser

SCRIPT = Path(export.__file__)
IDS = torch.arange(5, 29).view(1, -1)


@pytest.fixture(scope="module")
def golden_base(golden) -> Path:
    return golden / "tiny_chatglm3"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), base, prompt_format="default")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS.to(next(model.parameters()).device)).logits


def load(folder: Path, **options):
    return load_model(folder, device="cpu", **{"dtype": torch.float32, **options})


def run(capsys, *flags) -> tuple[int, str, str]:
    code = export.main([str(flag) for flag in flags])
    return (code, *capsys.readouterr())


def official_keys(base: Path) -> set[str]:
    return set(json.loads((base / "pytorch_model.bin.index.json").read_text(encoding="utf-8"))["weight_map"])


# --- merging


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"target": "q_proj,down_proj"}])
def test_merged_equals_unmerged_within_1e_5(capsys, golden_base, tmp_path, options):
    adapter = make_adapter(tmp_path / "adapter", golden_base, rank=4, alpha=6, **options)
    expected = logits(load_adapter(load(golden_base), adapter))
    assert (expected - logits(load(golden_base))).abs().max() > 0.3
    code, out, err = run(capsys, "--adapter", adapter, "--output", tmp_path / "merged")
    assert code == 0, err
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() <= 1e-5
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert written.keys() == official_keys(golden_base)
    assert all(value.dtype == torch.float32 for value in written.values())
    assert "reloaded and compared with the unmerged model: largest difference" in out
    assert f"base model: {golden_base} (recorded in the checkpoint)" in err
    assert f"{golden_base} has no tokenizer.model, and neither will the result" in err


def test_the_folder_is_complete_and_opens_without_this_project_knowing(capsys, base, adapter, tiny_folder, tmp_path):
    output = tmp_path / "merged"
    flags = ["--adapter", adapter, "--output", output, "--max_shard_size", "100KB", "--dtype", "float16"]
    assert run(capsys, *flags)[0] == 0
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "tokenizer.model", "tokenizer_config.json", "model.safetensors.index.json"} <= names
    assert len([name for name in names if name.startswith("model-")]) > 2
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (tiny_folder / name).read_bytes()
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    assert (config["torch_dtype"], config["num_layers"], config["prompt_format"]) == ("float16", 2, "default")
    assert config["architectures"] == ["ChatGLMModel"] and "num_hidden_layers" not in config
    assert AutoConfig.from_pretrained(output, trust_remote_code=False).padded_vocab_size == config["padded_vocab_size"]
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, trust_remote_code=False)
    expected = logits(load_adapter(load(base), adapter))
    assert (logits(model) - expected).abs().max() <= 2e-2 * expected.abs().max()
    choice = choose_model(inference_parser().parse_args(["--model", str(output)]))
    assert choice.prompt_format == "default"
    assert all(path.stat().st_mode & 0o044 for path in output.iterdir())


@pytest.mark.parametrize(("dtype", "share"), [("float32", 5e-5), ("float16", 2e-2), ("bfloat16", 0.15)])
@pytest.mark.parametrize("low_memory", [False, True])
def test_dtypes(capsys, base, adapter, tmp_path, dtype, share, low_memory):
    stored = tmp_path / "base"
    load(base).to(torch.bfloat16).save_pretrained(stored)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(base / name, stored)
    flags = ["--model", stored, "--adapter", adapter, "--output", tmp_path / "out", "--dtype", dtype]
    code, _, err = run(capsys, *flags, *(["--low_memory"] if low_memory else []))
    if low_memory and dtype == "float32":
        message = "--low-memory keeps the merged weights in the base's bfloat16, and --dtype float32 would write them"
        assert code == 2 and message in err.splitlines()[-1]
        return
    assert code == 0, err
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(value.dtype) for value in written.values()} == {f"torch.{dtype}"}
    expected = logits(load_adapter(load(stored), adapter))
    assert (logits(load(tmp_path / "out")) - expected).abs().max() <= share * expected.abs().max()


def test_the_default_dtype_is_the_bases(capsys, tiny_folder, tmp_path):
    make_adapter(tmp_path / "adapter", tiny_folder)
    assert run(capsys, "--adapter", tmp_path / "adapter", "--output", tmp_path / "out")[0] == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.float16}
    assert written.keys() == load_file(tiny_folder / "model.safetensors").keys()


def test_half_precision_weights_are_merged_in_float32(golden_base):
    model = add_adapter(load(golden_base, dtype=torch.bfloat16), target="q_proj")
    randomize(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    merged = merge_adapter(model)
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, exact.to(torch.bfloat16))


def test_several_adapters_one_after_the_other(capsys, golden_base, tmp_path):
    first = make_adapter(tmp_path / "1", golden_base, seed=1)
    second = make_adapter(tmp_path / "2", golden_base, seed=2, target="q_proj,o_proj", use_rslora=True)
    one = merge_adapter(load_adapter(load(golden_base), first))
    expected = logits(merge_adapter(load_adapter(one, second)))
    for name, flags in {
        "a": ["--adapter", first, "--adapter", second],
        "b": ["--adapter", f"{first},{second}"],
    }.items():
        code, out, _ = run(capsys, *flags, "--output", tmp_path / name)
        assert code == 0
        assert out.count("merged: ") == 2
        assert (logits(load(tmp_path / name)) - expected).abs().max() <= 1e-5


def test_an_adapter_of_the_original_code_is_merged(capsys, golden_base, tmp_path):
    weights = {k: v for shard in golden_base.glob("*.bin") for k, v in torch.load(shard, weights_only=True).items()}
    adapter = make_official_adapter(tmp_path / "adapter", weights, ["query_key_value"])
    flags = ["--model", golden_base, "--adapter", adapter, "--output", tmp_path / "merged"]
    assert run(capsys, *flags)[0] == 0
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "transformer.encoder.layers.2.self_attention.query_key_value"
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    expected = weights[f"{name}.weight"].double() + b @ a * 32 / 8
    assert (written[f"{name}.weight"].double() - expected).abs().max() < 1e-6
    unchanged = weights.keys() - {key for key in weights if key.endswith("query_key_value.weight")}
    assert all(torch.equal(written[key], weights[key]) for key in unchanged)


def test_a_reward_model(capsys, golden_base, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", golden_base, head="score")
    code, out, err = run(capsys, "--adapter", adapter, "--output", tmp_path / "merged")
    assert code == 0, err
    assert "likeliest token" not in out
    expected = logits(load_adapter(load(golden_base, head="score"), adapter))
    merged = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, trust_remote_code=False
    )
    assert expected.shape == (1, 1)
    assert (logits(merged) - expected).abs().max() <= 1e-5
    written = load_file(tmp_path / "merged" / "model.safetensors")
    heads = {"classifier_head.weight", "classifier_head.bias"}
    assert written.keys() == official_keys(golden_base) - {"transformer.output_layer.weight"} | heads
    assert run(capsys, "--model", tmp_path / "merged", "--output", tmp_path / "again")[0] == 0
    assert (logits(load(tmp_path / "again", head="score")) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_quantized_base_goes_into_the_unquantized(capsys, golden_base, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    model = add_adapter(load(golden_base, quantization_bit=bits))
    randomize(model)
    save_adapter(model, tmp_path / "adapter", base_model=str(golden_base))
    code, _, err = run(capsys, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert code == 0
    assert f"trained on the base in {bits} bits; it is merged into the unquantized weights" in err
    expected = logits(load_adapter(load(golden_base), tmp_path / "adapter"))
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() <= 1e-5


def test_an_untrained_adapter_and_a_rounded_away_one_are_noted(capsys, base, tmp_path):
    model = add_adapter(load(base))
    save_adapter(model, tmp_path / "new", base_model=str(base), prompt_format="multi-turn")
    code, out, _ = run(capsys, "--adapter", tmp_path / "new", "--output", tmp_path / "out")
    assert code == 0
    assert f"note: {tmp_path / 'new'} changes nothing; was it trained?" in out
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-3)
    save_adapter(model, tmp_path / "weak", base_model=str(base), prompt_format="multi-turn")
    flags = ["--adapter", tmp_path / "weak", "--output", tmp_path / "weak_out"]
    code, out, _ = run(capsys, *flags, "--dtype", "bfloat16")
    assert code == 0
    assert "note: the last adapter changes the logits by no more than" in out and "--dtype float32 keeps all" in out
    assert "note:" not in run(capsys, *flags, "--overwrite")[1]


# --- whole models


def test_a_training_checkpoint_becomes_a_model(capsys, base, tmp_path):
    run_folder = tmp_path / "run"
    for step in (5, 10):
        checkpoint = run_folder / f"checkpoint-{step}"
        shutil.copytree(base, checkpoint)
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        (checkpoint / "config.json").write_text(json.dumps(config | {"prompt_format": "raw"}), encoding="utf-8")
        for name in (
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "trainer_state.json",
            "trained_parameters.safetensors",
        ):
            (checkpoint / name).write_bytes(b"x")
    code, out, err = run(capsys, "--model", run_folder, "--output", tmp_path / "out")
    assert code == 0, err
    assert f"{run_folder} holds checkpoints: using the newest, checkpoint-10" in err
    assert "reloaded and compared with the model: largest difference 0.0e+00" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["prompt_format"] == "raw"


def test_files_of_the_original_code_come_along(capsys, golden_base, tiny_folder, tmp_path):
    shutil.copytree(golden_base, tmp_path / "base")
    for name in ("modeling_chatglm.py", "configuration_chatglm.py", "quantization.py", "MODEL_LICENSE"):
        (tmp_path / "base" / name).write_text(f"# {name}\n", encoding="utf-8")
    flags = ["--model", tmp_path / "base", "--output", tmp_path / "out", "--tokenizer", tiny_folder]
    assert run(capsys, *flags)[0] == 2  # 2,180 ids for a model of 512
    assert run(capsys, *flags[:-2])[0] == 0
    assert (tmp_path / "out" / "modeling_chatglm.py").read_text(encoding="utf-8") == "# modeling_chatglm.py\n"
    assert (tmp_path / "out" / "MODEL_LICENSE").is_file()
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"]["AutoModel"] == "modeling_chatglm.ChatGLMForConditionalGeneration"


def test_a_model_with_a_prefix_inside_keeps_it_in_float32(capsys, golden_base, tmp_path):
    model = load(golden_base, pre_seq_len=4)
    model.config.pre_seq_len = 4
    model.save_pretrained(tmp_path / "whole")
    assert run(capsys, "--model", tmp_path / "whole", "--output", tmp_path / "out", "--dtype", "float16")[0] == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["transformer.prefix_encoder.embedding.weight"].dtype == torch.float32
    assert torch.equal(written["transformer.prefix_encoder.embedding.weight"], model.prefix_encoder.embedding.weight)
    assert written["transformer.output_layer.weight"].dtype == torch.float16


# --- prefixes


@pytest.mark.parametrize("name", ["tiny_prefix", "tiny_prefix_projection"])
def test_prefixes_go_over_and_back_bit_for_bit(capsys, golden, golden_base, tmp_path, name):
    original = golden / f"{name}_checkpoint"
    first, second, both = tmp_path / "safe", tmp_path / "official", tmp_path / "both"
    assert run(capsys, "--pt-checkpoint", original, "--output", first, "--to", "safetensors")[0] == 0
    assert {path.name for path in first.iterdir()} == {"config.json", "prefix_encoder.safetensors"}
    code, out, _ = run(capsys, "--pt-checkpoint", first, "--output", second, "--to", "official", "--model", golden_base)
    assert code == 0
    assert f"compared in front of {golden_base}: largest difference 0.0e+00" in out
    assert {path.name for path in second.iterdir()} == {"config.json", "pytorch_model.bin"}
    state, expected = (torch.load(folder / "pytorch_model.bin", weights_only=True) for folder in (second, original))
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
    assert run(capsys, "--pt-checkpoint", second, "--output", both)[0] == 0
    assert {path.name for path in both.iterdir()} == {"config.json", "prefix_encoder.safetensors", "pytorch_model.bin"}
    prefixed = logits(load(golden_base, pt_checkpoint=original))
    for folder in (first, second, both):
        assert torch.equal(logits(load(golden_base, pt_checkpoint=folder)), prefixed)


def test_what_a_prefix_records_is_kept(capsys, base, tmp_path):
    source = build_prefix_folder(tmp_path / "prefix", base, base_model=str(base), prompt_format="input-output")
    assert run(capsys, "--pt-checkpoint", source, "--output", tmp_path / "out", "--to", "official")[0] == 0
    found, expected = read_prefix_config(tmp_path / "out"), read_prefix_config(source)
    assert found == expected and found.prompt_format == "input-output" and found.base_model == str(base)


def test_a_projection_is_folded(capsys, golden, golden_base, tmp_path):
    source = golden / "tiny_prefix_projection_checkpoint"
    flags = ["--pt-checkpoint", source, "--output", tmp_path / "out", "--fold_projection", "--model", golden_base]
    code, out, _ = run(capsys, *flags)
    assert code == 0 and "largest difference" in out
    assert f"written: {tmp_path / 'out'} from {source}, its projection computed once; read again" in out
    found = read_prefix_config(tmp_path / "out")
    assert not found.prefix_projection and found.pre_seq_len == read_prefix_config(source).pre_seq_len
    parameters = load_file(tmp_path / "out" / "prefix_encoder.safetensors")
    config = ChatGLM3Config.from_pretrained(golden_base)
    assert {name: tuple(value.shape) for name, value in parameters.items()} == {
        "embedding.weight": (found.pre_seq_len, config.kv_size)
    }
    projected, plain = (load(golden_base, pt_checkpoint=folder) for folder in (source, tmp_path / "out"))
    assert (logits(plain) - logits(projected)).abs().max() <= 1e-5
    assert (logits(plain) - logits(load(golden_base))).abs().max() > 0.3
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["prefix_projection"] is False


# --- adapters


def test_an_adapter_of_the_original_code_becomes_one_of_pefts_form(capsys, golden_base, tmp_path):
    weights = {k: v for shard in golden_base.glob("*.bin") for k, v in torch.load(shard, weights_only=True).items()}
    adapter = make_official_adapter(tmp_path / "original", weights, ["query_key_value", "dense"])
    flags = ["--model", golden_base, "--adapter", adapter, "--output", tmp_path / "own", "--to", "safetensors"]
    code, out, _ = run(capsys, *flags)
    assert code == 0 and "read again, the same bit for bit" in out
    settings = json.loads((tmp_path / "own" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    expected = logits(load_adapter(load(golden_base), adapter))
    assert torch.equal(logits(load_adapter(load(golden_base), tmp_path / "own")), expected)


# --- the comparison


def test_comparisons_see_what_is_wrong():
    right = [torch.zeros(3, 5), torch.ones(2, 5)]
    assert compare_logits(right, right, torch.float32).difference == 0
    wrong = [torch.zeros(3, 5), torch.full((2, 5), 1.5)]
    comparison = compare_logits(wrong, right, torch.float32, torch.bfloat16)
    assert (comparison.difference, comparison.positions, comparison.same_choice) == (0.5, 5, 5)
    assert comparison.allowed == pytest.approx(0.15)
    with pytest.raises(ComparisonError, match=r"x: largest difference 5.0e-01 \(allowed 1.5e-01\) at 5 positions"):
        comparison.check("x")
    broken = [right[0], torch.full((2, 5), float("nan"))]
    with pytest.raises(ComparisonError):
        compare_logits(broken, right, torch.float32).check("x")
    assert str(Comparison(0.0, 1.0, 2, None)).endswith("at 2 positions")


def test_probes_are_the_models_own_prompts(tokenizer):
    probes = build_probes(tokenizer, tokenizer.vocab_size)
    assert len(probes) == len(CONVERSATIONS) and probes[0] != build_probes(tokenizer, 3000, "default")[0]
    bare = build_probes(None, 512)
    assert [len(row) for row in bare] == [24] * 4 and len({i for row in bare for i in row}) == 96
    with pytest.raises(ValueError, match="the tokenizer has 2180 ids, the model only 512; give the model's own"):
        build_probes(tokenizer, 512)


@pytest.mark.parametrize("damage", ["k_proj", "lost"])
def test_a_wrong_result_is_not_left_behind(capsys, golden_base, tmp_path, monkeypatch, damage):
    adapter = make_adapter(tmp_path / "adapter", golden_base)
    write = exporting._write

    def write_wrongly(model, folder, job):
        if damage == "lost":
            model = load(golden_base)  # the adapter was never merged
        else:
            model.model.layers[1].self_attn.k_proj.weight.data.mul_(-1)
        write(model, folder, job)

    monkeypatch.setattr(exporting, "_write", write_wrongly)
    code, _, err = run(capsys, "--adapter", adapter, "--output", tmp_path / "merged")
    assert code == 1
    assert "reloaded, does not compute what the model before it computed: largest difference" in err
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_a_damaged_prefix_file_is_noticed(golden, tmp_path, monkeypatch):
    def write_wrongly(folder, parameters, config, *, files):
        wrong = {name: value + 1 for name, value in parameters.items()}
        save_file(wrong, folder / "prefix_encoder.safetensors")

    monkeypatch.setattr(exporting, "write_prefix", write_wrongly)
    with pytest.raises(ComparisonError, match="the files, read again, are not what was written"):
        convert_prefix(golden / "tiny_prefix_checkpoint", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- the output folder


def test_outputs_that_would_destroy_something_are_refused(tmp_path):
    source = tmp_path / "source"
    (source / "inside").mkdir(parents=True)
    check_output(source / "inside", overwrite=False, sources=[source])
    for output in (source, tmp_path):
        with pytest.raises(ValueError, match=r"which is read; choose another folder"):
            check_output(output, overwrite=True, sources=[source])
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(ValueError, match=r"is not empty \(found: inside\); --overwrite replaces it"):
        check_output(source, overwrite=False)
    with pytest.raises(
        ValueError, match=r"is no earlier result \(found: inside\); --overwrite replaces earlier results"
    ):
        check_output(source, overwrite=True)
    (source / "config.json").write_text("{}", encoding="utf-8")
    check_output(source, overwrite=True)
    (source / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="holds checkpoint-3 of a training run; --overwrite replaces earlier results"):
        check_output(source, overwrite=True)


def test_disk_and_memory_are_checked_before_anything_is_read(capsys, base, adapter, tmp_path, monkeypatch):
    check_disk(tmp_path / "not" / "there", 1000)
    with pytest.raises(OSError, match=r"needs 5000000.0 GB, and .* are free at .*smaller --dtype"):
        check_disk(tmp_path / "not" / "there", 5 * 10**15)

    import psutil

    class Little:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    code, _, err = run(capsys, "--adapter", adapter, "--output", tmp_path / "out")
    assert code == 2
    assert "of memory in float32, and 1.0 kB are free; --low_memory needs half of it" in err


def test_an_existing_output_needs_overwrite(capsys, base, tmp_path):
    flags = ["--model", base, "--output", tmp_path / "out"]
    assert run(capsys, *flags)[0] == 0
    assert run(capsys, *flags)[0] == 2
    (tmp_path / "out" / "old").write_text("", encoding="utf-8")
    assert run(capsys, *flags, "--overwrite")[0] == 0
    assert not (tmp_path / "out" / "old").exists()


# --- mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to export: give --adapter, --model or --pt-checkpoint"),
        (["--adapter", "nowhere"], "--adapter nowhere: no such folder"),
        (["--adapter", "{prefix}"], "is a prefix checkpoint; give it as --pt-checkpoint"),
        (["--pt-checkpoint", "{adapter}"], "is a LoRA adapter; give it as --adapter"),
        (["--pt-checkpoint", "{base}"], "holds a whole model, not a prefix checkpoint; give it as --model"),
        (["--pt-checkpoint", "{prefix}", "--adapter", "{adapter}"], "--adapter has no place with --pt-checkpoint"),
        (["--pt-checkpoint", "{prefix}", "--dtype", "float16"], "--dtype has no place with --pt-checkpoint"),
        (["--pt-checkpoint", "{prefix}", "--fold_projection"], "has no projection to fold"),
        (["--pt-checkpoint", "{prefix}", "--model", "{golden}"], "another base model"),
        (["--model", "{base}", "--to", "official"], "--to converts a prefix (--pt-checkpoint) or an adapter"),
        (["--model", "{base}", "--fold_projection"], "--fold-projection has no place with a whole model"),
        (["--adapter", "{adapter},{adapter}", "--to", "safetensors"], "--to converts one adapter, got 2"),
        (["--adapter", "{adapter}", "--to", "both"], "not written in the original code's layout"),
        (["--adapter", "{adapter}", "--to", "official"], "Merge it (leave --to out)"),
        (["--adapter", "{adapter}", "--to", "safetensors", "--dtype", "float16"], "--dtype has no place with --to"),
        (["--adapter", "{adapter}", "--model", "{golden}"], "was trained on another base model than"),
        (["--adapter", "{adapter}", "--model", "{golden}", "--to", "safetensors"], "trained for another base model"),
        (["--adapter", "{adapter}", "--model", "{adapter}"], "is a LoRA adapter; give it as --adapter"),
        (["--adapter", "{adapter}", "--model", "THUDM/none"], "--model THUDM/none is not a folder"),
        (["--adapter", "{adapter}", "--adapter", "{reward}"], "cannot be merged in one go"),
        (["--model", "{base}", "--max_shard_size", "5 gigs"], "--max-shard-size 5 gigs is no size"),
        (["--model", "{quantized}"], "holds weights that bitsandbytes has quantized"),
        (["--model", "{official_int4}"], "quantized by ChatGLM's own kernels"),
        (["--model", "{rm}", "--adapter", "{adapter}"], "is a reward model (stage rm), and the adapter is a language"),
    ],
)
def test_mistakes_end_with_code_2_and_say_what_to_do(capsys, mistakes, tmp_path, flags, message):
    flags = [flag.format(**mistakes) for flag in flags]
    code, out, err = run(capsys, *flags, "--output", tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory, golden_base, base, adapter) -> dict[str, Path]:
    """Folders by the names in the flags above."""
    root = tmp_path_factory.mktemp("mistakes")
    changes = {
        "quantized": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "official_int4": {"quantization_bit": 4},
        "rm": {"architectures": ["ChatGLMForSequenceClassification"]},
    }
    for name, change in changes.items():
        shutil.copytree(base, root / name)
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        (root / name / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    return {
        **{name: root / name for name in changes},
        "golden": golden_base,
        "base": base,
        "adapter": adapter,
        "prefix": build_prefix_folder(root / "prefix", base, base_model=str(base), prompt_format="multi-turn"),
        "reward": make_adapter(root / "reward", base, head="score"),
    }


def test_an_abbreviated_or_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        export.main(["--output", "x", "--fold"])
    assert "unrecognized arguments: --fold" in capsys.readouterr().err


def test_from_training_to_a_merged_model_that_answers_the_same(model, data, capsys, tmp_path):
    output = tmp_path / "lora"
    options = {"finetuning_type": "lora", "learning_rate": 2e-2, "max_steps": 30, "logging_steps": 30}
    assert train(model, data, output, **options) == 0
    assert export.main(["--adapter", str(output), "--output", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    replies = []
    for flags in (["--adapter", output], ["--model", tmp_path / "merged"], ["--model", model]):
        given = [*map(str, flags), "--device", "cpu", "--prompt", "皮卡丘的属性是什么", "--max-new-tokens", "16"]
        assert inference.main(given) == 0
        replies.append(capsys.readouterr().out)
    assert replies[0] == replies[1] != replies[2]
    assert replies[0].startswith("电属性的宝可梦")


@pytest.mark.thorough
def test_the_program_runs_from_anywhere(golden_base, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", golden_base)
    done = subprocess.run(
        [sys.executable, SCRIPT, "--adapter", adapter, "--output", "merged"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "written: merged (1 file of weights" in done.stdout


def test_help_is_light(tmp_path):
    assert "--fold" in read_light_help(SCRIPT, tmp_path, "peft")


def test_the_folded_prefix_is_what_the_encoder_computes(golden, golden_base):
    model = load(golden_base, pt_checkpoint=golden / "tiny_prefix_projection_checkpoint")
    folded = fold(model.prefix_encoder.state_dict())["embedding.weight"]
    with torch.no_grad():
        computed = model.prefix_encoder(1, torch.float32)
    config = model.config
    shape = (config.num_layers, 2, config.multi_query_group_num, config.kv_channels)
    assert (folded.view(-1, *shape).permute(1, 2, 3, 0, 4).unsqueeze(2) - computed).abs().max() <= 1e-6
    assert probe_logits(model, [[1, 2, 3]])[0].shape == (3, config.padded_vocab_size)
