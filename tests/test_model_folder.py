"""Model folders that cannot be used: nothing of them is run, and what is wrong is said before anything is built."""

import ast
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_helpers import make_adapter
from conftest import REPOSITORY
from generation_helpers import build_prefix_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from training_helpers import train, write_conversations

from finetune_chatmodel_demo import evaluate, export, finetune, inference, inspect_data
from finetune_chatmodel_demo.chatglm3 import load_model, load_tokenizer
from finetune_chatmodel_demo.chatglm3.fingerprint import read_fingerprint
from finetune_chatmodel_demo.chatglm3.model_folder import check_model_folder, read_model_config, read_shapes
from finetune_chatmodel_demo.common.errors import UserError

ADVICE = "weights_only"  # what torch would have its users set to False
CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
class Anything: pass
ChatGLMConfig = ChatGLMForConditionalGeneration = ChatGLMTokenizer = Anything
"""


def change_config(folder: Path, *removed: str, **changes: object) -> Path:
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in removed}), encoding="utf-8")
    return folder


@pytest.fixture
def folder(base, tmp_path) -> Path:
    """A small model's folder, to be damaged."""
    return Path(shutil.copytree(base, tmp_path / "model"))


# --- nothing of a folder is run


@pytest.mark.parametrize("program", [inference, evaluate, export, finetune, inspect_data])
@pytest.mark.parametrize("lacks", ["model_type", "tokenizer_class"])
def test_a_piped_yes_runs_no_code_of_a_model_folder(folder, tmp_path, monkeypatch, capsys, program, lacks):
    names = ("ChatGLMConfig", "ChatGLMForConditionalGeneration", "ChatGLMTokenizer")
    auto_map = dict(zip(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), (f"code.{name}" for name in names)))
    auto_map["AutoTokenizer"] = [auto_map["AutoTokenizer"], None]
    (folder / "code.py").write_text(CODE, encoding="utf-8")
    if lacks == "model_type":
        change_config(folder, "model_type", auto_map=auto_map)
        (folder / "tokenizer_config.json").unlink()
    else:
        config = {"auto_map": auto_map, "tokenizer_class": "AnythingTokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "column": "c"}]
    data = str(tmp_path / "rows.jsonl")
    Path(data).write_text(json.dumps({"conversations": turns}) + "\n", encoding="utf-8")
    flags = {
        inference: ["--model", str(folder), "--prompt", "y"],
        evaluate: ["--model", str(folder), "--data", data],
        export: ["--model", str(folder), "--output", str(tmp_path / "out")],
        finetune: ["--model_name_or_path", str(folder), "--train_file", data, "--output_dir", str(tmp_path / "out")],
        inspect_data: ["--tokenizer", str(folder), "--train_file", data],
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    try:
        status = program.main(flags[program])
    except SystemExit as end:
        status = end.code
    assert status not in (0, None)
    text = capsys.readouterr().err + str(status)
    assert str(folder) in text and ("model_type is None" in text or "'AnythingTokenizer'" in text)
    assert not list(folder.glob("**/ran"))


def test_every_call_of_an_auto_class_refuses_remote_code():
    """In the whole repository, tests too: without the keyword, transformers asks on standard input."""
    found = 0
    for path in REPOSITORY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value).rpartition(".")[2]
            if node.func.attr in ("from_pretrained", "from_config") and owner.lower().startswith("auto"):
                found += 1
                values = [keyword.value for keyword in node.keywords if keyword.arg == "trust_remote_code"]
                is_refused = values and isinstance(values[0], ast.Constant) and values[0].value is False
                assert is_refused, f"{path.relative_to(REPOSITORY)} line {node.lineno}: add trust_remote_code=False"
    assert found > 5


# --- pickles


class Foreign:
    """What a pickle of a training script holds beside tensors."""


@pytest.mark.parametrize("damage", ["cut", "foreign", "list", "text", "empty"])
def test_a_pickle_that_cannot_be_used_is_named_without_torchs_advice(folder, capsys, damage):
    path = folder / "pytorch_model.bin"
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, path)
    assert read_shapes(path).keys() == state.keys()
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "foreign":
        torch.save({"model": Foreign(), "args": {"a": 1}}, path)
    elif damage == "list":
        torch.save([torch.zeros(1)], path)
    elif damage == "text":
        path.write_bytes(pickle.dumps(Foreign()))
    else:
        path.write_bytes(b"")
    assert inference.main(["--model", str(folder), "--prompt", "x", "--device", "cpu"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert str(path) in line and "other things than" in line and "download it again" in line
    assert ADVICE not in line


# --- values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", 4.0),
        ("num_layers", 10**9),
        ("num_layers", True),
        ("num_layers", 3),
        ("kv_channels", 0),
        ("kv_channels", 6),
        ("hidden_size", "64"),
        ("hidden_size", 128),
        ("padded_vocab_size", 5),
        ("ffn_hidden_size", 10**7),
        ("num_attention_heads", None),
        ("multi_query_group_num", 3),
        ("seq_length", -1),
        ("layernorm_epsilon", "x"),
        ("rope_ratio", 0),
        ("rope_ratio", float("nan")),
        ("attention_dropout", 1.5),
        ("add_qkv_bias", "yes"),
        ("torch_dtype", "int8"),
        ("torch_dtype", "nonsense"),
        ("architectures", "ChatGLMModel"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("quantization_config", "int4"),
        ("hidden_act", "gelu"),
        ("model_type", None),
        ("id2label", 3),
    ],
)
def test_impossible_values_are_named(folder, name, value):
    change_config(folder, **{name: value})
    with pytest.raises(UserError) as error:
        check_model_folder(folder)
    text = str(error.value)
    assert str(folder) in text and "\n" not in text
    assert name in text or "the weights do not fit config.json" in text or "config.json cannot be used" in text


def test_another_attention_than_ours_is_not_needed(folder):
    change_config(folder, _attn_implementation="flash_attention_2", attn_implementation="flash_attention_2")
    assert load_model(folder, device="cpu").config._attn_implementation == "sdpa_with_prefix"


def test_every_model_folder_of_the_tests_is_in_order(base, golden, tiny_folder):
    for path in (base, tiny_folder, golden / "tiny_chatglm3"):
        check_model_folder(path)
        assert read_model_config(path).model_type == "chatglm"


def test_an_index_cannot_name_files_elsewhere(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"x": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"names ../outside.safetensors, which is not a file of this folder"):
        check_model_folder(folder)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.sampled_from([10**9, -(10**30), 4.0, 0.5, float("inf")]),
    st.text(max_size=4), st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers()),
)  # fmt: skip
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model", "model.safetensors")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_folders_load_or_are_explained(base, tmp_path, data):
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    file = folder / data.draw(st.sampled_from(FILES))
    way = data.draw(st.sampled_from(["value", "value", "value", "cut", "bytes", "absent"]))
    if way == "value" and file.suffix == ".json":
        values = json.loads(file.read_text(encoding="utf-8"))
        name = data.draw(st.sampled_from([*values, "quantization_config", "rope_parameters", "num_labels"]))
        file.write_text(json.dumps(values | {name: data.draw(JUNK)}), encoding="utf-8")
    elif way == "absent":
        file.unlink()
    elif way == "bytes":
        file.write_bytes(data.draw(st.binary(max_size=60)))
    else:
        os.truncate(file, data.draw(st.integers(0, file.stat().st_size - 1)))
    try:
        load_tokenizer(folder)
        load_model(folder, device="cpu")
    except (UserError, OSError) as error:
        assert str(folder) in str(error) and ADVICE not in str(error)


# --- from the shell


@pytest.mark.parametrize("tokenizer", ["no/model", "/no/such/model"])
def test_a_tokenizer_that_is_nowhere_is_explained_in_one_line(tokenizer):
    with pytest.raises(UserError if tokenizer == "no/model" else FileNotFoundError) as error:
        load_tokenizer(tokenizer)
    expected = {
        "no/model": "there is no such folder, and as a name",
        "/no/such/model": "is not a folder. THUDM/README.md",
    }
    assert expected[tokenizer] in str(error.value) and "\n" not in str(error.value)


def test_an_error_comes_without_warnings_of_optional_packages():
    script = REPOSITORY / "finetune_chatmodel_demo" / "finetune.py"
    completed = subprocess.run([sys.executable, script, "--stage", "sftt"], capture_output=True, text=True)
    assert completed.stdout == ""
    assert completed.stderr.startswith("finetune.py: error: argument --stage: invalid choice: 'sftt'")


# --- the base that a result was trained on


@pytest.fixture(scope="module")
def other_base(base, tmp_path_factory) -> Path:
    """A base of the same shape with other weights."""
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("other") / "model"))
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if name.endswith("layers.1.self_attention.query_key_value.weight"))
    save_file(state | {name: state[name] * 1.1}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["prefix", "adapter"])
def test_a_result_of_another_base_is_refused_unless_it_is_meant(base, other_base, tmp_path, capsys, kind):
    if kind == "prefix":
        folder = build_prefix_folder(tmp_path / "result", base, base_model=str(base))
    else:
        folder = make_adapter(tmp_path / "result", base)
    flag = {"prefix": "--pt-checkpoint", "adapter": "--adapter"}[kind]

    def answer(*flags: object) -> tuple[int, str]:
        argv = [flag, folder, "--prompt", "x", "--device", "cpu", "--max-new-tokens", "2", *flags]
        status = inference.main([str(part) for part in argv])
        return status, capsys.readouterr().err

    assert answer()[0] == 0
    status, text = answer("--model", other_base)
    assert status == 2
    name = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
    assert f"another base model than {other_base}: {name} differs (recorded: {base})" in text
    status, text = answer("--model", other_base, "--allow_other_base")
    assert status == 0 and f"{name} differs" in text
    flags = [flag, str(folder), "--model", str(other_base), "--output", str(tmp_path / "out")]
    assert export.main(flags) == 2
    assert "--allow_other_base" in capsys.readouterr().err
    assert export.main([*flags, "--allow_other_base"]) == 0

    half = tmp_path / "half"
    load_model(base, dtype=torch.bfloat16, device="cpu").save_pretrained(half)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(base / file, half)
    assert answer("--model", half)[0] == 0  # the same model, rounded

    path = folder / ("config.json" if kind == "prefix" else "chatglm3_run.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values.pop("base_fingerprint")[name]
    path.write_text(json.dumps(values), encoding="utf-8")
    status, text = answer("--model", other_base)
    assert status == 0 and f"does not record what its base looked like; it names {base}" in text
    assert "does not record" not in answer()[1]


def test_training_goes_on_from_a_result_of_its_own_base_only(base, other_base, tmp_path, capsys):
    prefix = build_prefix_folder(tmp_path / "prefix", base, base_model=str(base))
    data = write_conversations(tmp_path / "rows.jsonl", rows=4)
    options = {"ptuning_checkpoint": str(prefix), "max_steps": 1}
    assert train(other_base, data, tmp_path / "out", **options) in (1, 2)
    assert "was trained on another base model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fingerprints_of_pickles_and_of_safetensors_are_equal(golden, base, tmp_path):
    folder = golden / "tiny_chatglm3"
    found = read_fingerprint(folder)
    assert {len(values) for values in found.values()} == {4} and len(found) == 2 + 3 * 4
    load_model(folder, device="cpu").save_pretrained(tmp_path / "safe")
    assert read_fingerprint(tmp_path / "safe") == found
    assert read_fingerprint("THUDM/chatglm3-6b") is None and read_fingerprint(None) is None


# --- numbers that are not finite


@pytest.mark.parametrize("kind", ["model", "prefix", "adapter"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_said(base, tmp_path, capsys, kind, value):
    if kind == "model":
        folder, name = Path(shutil.copytree(base, tmp_path / kind)), "model.safetensors"
    elif kind == "prefix":
        folder, name = build_prefix_folder(tmp_path / kind, base, base_model=str(base)), "prefix_encoder.safetensors"
    else:
        folder, name = make_adapter(tmp_path / kind, base), "adapter_model.safetensors"
    state = load_file(folder / name)
    tensor = state[sorted(state)[0]]
    tensor.view(-1)[tensor.numel() // 2] = value
    save_file(state, folder / name, metadata={"format": "pt"})
    flag = {"model": "--model", "prefix": "--pt-checkpoint", "adapter": "--adapter"}[kind]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "column": "c"}]
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"conversations": turns}) + "\n", encoding="utf-8")
    for program, flags in (
        (inference, ["--prompt", "x"]),
        (evaluate, ["--data", data]),
        (export, ["--output", tmp_path / "out"]),
    ):
        assert program.main([str(part) for part in (flag, folder, "--device", "cpu", *flags)]) == 2
        text = capsys.readouterr().err
        assert "1 of its " in text and "not finite" in text and str(folder) in text
    assert not (tmp_path / "out").exists()
