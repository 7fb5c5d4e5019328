"""finetune.py's command line: the document's command, texts as typed, broken lines, flags of other programs."""

import json
import math
import os
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import REPOSITORY
from training_helpers import make_model, write_conversations

from finetune_chatmodel_demo import finetune
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training import foreign_flags
from finetune_chatmodel_demo.training.command_line import OWN_ARGUMENTS, PATH_FLAGS, build_parser, parse_given

# The command of the users' document, character by character: comments and blanks behind its backslashes included.
DOCUMENT = r"""
CUDA_VISIBLE_DEVICES=0 python src/train_bash.py \
    --stage sft \ # 训练阶段
    --do_train True \ 
    --model_name_or_path ./THUDM/chatglm3-6b-base \ 
    --finetuning_type lora \ 
    --template default \
    --dataset_dir data \
    --dataset function_call,alpaca_gpt4_en,alpaca_gpt4_zh \
    --cutoff_len 2048 \
    --learning_rate 0.002 \
    --num_train_epochs 10.0 \
    --max_samples 8000 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --lr_scheduler_type cosine \
    --max_grad_norm 1.0 \
    --logging_steps 5 \
    --save_steps 200 \
    --warmup_steps 0 \
    --lora_rank 8 \
    --lora_dropout 0.1 \
    --lora_target all \
    --output_dir saves\ChatGLM3-6B-Base\lora\train_full \
    --fp16 True \
    --plot_loss True 
"""  # noqa: W291
DOCUMENT_MEANS = {
    "stage": "sft",
    "do_train": True,
    "model_name_or_path": "./THUDM/chatglm3-6b-base",
    "finetuning_type": "lora",
    "template": "default",
    "dataset_dir": "data",
    "dataset": "function_call,alpaca_gpt4_en,alpaca_gpt4_zh",
    "max_seq_length": 2048,
    "learning_rate": 0.002,
    "num_train_epochs": 10.0,
    "max_samples": 8000,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "logging_steps": 5,
    "save_steps": 200,
    "warmup_steps": 0,
    "lora_rank": 8,
    "lora_dropout": 0.1,
    "lora_target": "all",
    "output_dir": "savesChatGLM3-6B-Baseloratrain_full",
    "fp16": True,
    "plot_loss": True,
}
RECORD_ARGUMENTS = """#!/bin/sh
[ -e "$ARRIVED" ] || printf '%s\\0' "$@" > "$ARRIVED"
"""


@pytest.fixture
def arrive(tmp_path):
    """Lets bash run a command that begins with `python`; what arrives as its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(RECORD_ARGUMENTS)
    (folder / "python").chmod(0o755)

    def run(command: str) -> list[str]:
        script, arrived = tmp_path / "command.sh", tmp_path / "arrived"
        arrived.unlink(missing_ok=True)
        script.write_bytes(command.encode())
        environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "ARRIVED": str(arrived)}
        subprocess.run(["bash", str(script)], env=environment, capture_output=True)
        return arrived.read_bytes().decode().split("\0")[:-1]

    return run


# The document's command


def test_the_documents_command_is_diagnosed_where_the_shell_cuts_it(arrive):
    argv = arrive(DOCUMENT)
    assert argv == ["src/train_bash.py", "--stage", "sft", " #", "训练阶段"]
    with pytest.raises(UserError) as raised:
        parse_given(argv)
    message = str(raised.value)
    assert message.startswith("line 2 of the command, if each flag has its line (--stage sft): a backslash must be the")
    assert "the lines below it never arrived" in message and "put comments above the command" in message


def test_a_blank_behind_a_backslash_is_diagnosed(arrive):
    argv = arrive(DOCUMENT.replace(" # 训练阶段", ""))
    assert argv[-1] == " "
    with pytest.raises(UserError, match=r"line 3 of the command, .*\(--do_train True\): a backslash .* a blank"):
        parse_given(argv)


def test_the_command_is_an_error_message_and_no_stack_trace(arrive, capsys):
    assert finetune.main(arrive(DOCUMENT)) == 2
    printed = capsys.readouterr()
    assert "error: line 2 of the command" in printed.err and not printed.out


def without_comments(command: str) -> str:
    return "\n".join(line.partition(" #")[0].rstrip() for line in command.splitlines())


def test_without_comments_every_flag_of_the_document_is_known(arrive):
    program, *argv = arrive(without_comments(DOCUMENT))
    assert program == "src/train_bash.py"
    assert parse_given(argv) == (DOCUMENT_MEANS, [])
    with pytest.raises(UserError, match=r"'src/train_bash.py'; this program is finetune.py already"):
        parse_given([program, *argv])


def test_quoted_backslashes_become_slashes(arrive):
    argv = arrive(r"python --output_dir 'saves\ChatGLM3-6B-Base\lora\train_full' --plot_loss True")
    given, notices = parse_given(argv)
    assert given == {"output_dir": "saves/ChatGLM3-6B-Base/lora/train_full", "plot_loss": True}
    assert notices == [
        r"--output_dir saves\ChatGLM3-6B-Base\lora\train_full: backslashes are read as slashes, "
        "saves/ChatGLM3-6B-Base/lora/train_full"
    ]


def test_backslashes_in_a_settings_file_become_slashes(tmp_path):
    (tmp_path / "run.yaml").write_text("output_dir: saves\\lora\ncutoff_len: 64\n")
    (tmp_path / "run.json").write_text('{"output_dir": "saves\\\\lora", "cutoff_len": 64}')
    for name in ("run.yaml", "run.json"):
        assert parse_given([str(tmp_path / name)])[0] == {"output_dir": "saves/lora", "max_seq_length": 64}


def test_a_file_with_a_backslash_in_its_name_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        Path("a\\b").mkdir()
    except OSError:
        pytest.skip("no such names here")
    assert parse_given(["--output_dir", "a\\b"]) == ({"output_dir": "a\\b"}, [])


def test_a_comment_in_front_of_a_backslash_is_suspected(arrive, capsys):
    argv = arrive("python --stage sft # 训练阶段 \\\n --do_train True")
    assert argv == ["--stage", "sft"]
    assert finetune.main(argv) == 2
    error = capsys.readouterr().err
    assert "there is nothing to read" in error
    assert "in a command of several lines each but the last must end with a backslash, and no comment" in error


@pytest.fixture
def documents_folder(tmp_path, tiny_folder, monkeypatch) -> Path:
    """A folder as the document has it: its model's name, and a registry `data` with its three data sets."""
    make_model(tmp_path / "THUDM" / "chatglm3-6b-base", tiny_folder)
    samples = REPOSITORY / "data_processing" / "datasets"
    blocks = json.loads((samples / "dataset_info.json").read_text(encoding="utf-8"))
    names = {"function_call": "function_call", "alpaca_gpt4_en": "alpaca_sample", "alpaca_gpt4_zh": "alpaca_sample"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({a: blocks[b] for a, b in names.items()}))
    for name in names.values():
        shutil.copy(samples / blocks[name]["file_name"], tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_documents_command_trains(arrive, documents_folder):
    """As it stands there, without the comments, and without --fp16 where there is no GPU."""
    folder = r"saves\ChatGLM3-6B-Base\lora\train_full"
    _, *argv = arrive(without_comments(DOCUMENT).replace(folder, f"'{folder}'"))
    assert finetune.main([*argv, "--use_cpu", "True", "--fp16", "False", "--cutoff_len", "512"]) == 0
    output = documents_folder / "saves" / "ChatGLM3-6B-Base" / "lora" / "train_full"
    names = {"adapter_config.json", "adapter_model.safetensors", "trainer_log.jsonl", "all_results.json"}
    assert names | {"training_loss.png", "train_results.json"} <= {path.name for path in output.iterdir()}
    settings = json.loads((output / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (8, 16, 0.1)
    results = json.loads((output / "train_results.json").read_text())
    assert results["epoch"] == 10 and math.isfinite(results["train_loss"])
    lines = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    logged = [line["loss"] for line in lines if "loss" in line]
    assert logged[-1] < logged[0]


def test_the_documents_fp16_needs_a_gpu(arrive, documents_folder, capsys):
    _, *argv = arrive(without_comments(DOCUMENT))
    assert finetune.main([*argv, "--use_cpu"]) == 2
    assert "--fp16 needs a GPU, and there is none; drop --fp16" in capsys.readouterr().err


# Broken continuations


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python --stage sft \\ # x\n--seed 1", r"line 2 .*\(--stage sft\): a backslash must .* a comment follows"),
        ("python --stage sft --seed 1 \\ \n --fp16", r"line 3 .*\(--seed 1\): .* a blank follows"),
        ("python --stage sft \\\t\n --fp16", r"line 2 .*\(--stage sft\): .* a blank follows"),
        ("python \\ \n --fp16", r"line 1 of the command, .* a blank follows"),
        ("python --stage sft \\\r\n --fp16 \\\r\n", r"line 2 .*: the script has Windows line ends"),
        ("python --stage sft \\ --seed 1", r"line 2 .*\(--stage sft\): .* a blank follows"),
        ("python --stage sft '\\'", r"something stands behind it, or this shell does not continue lines with it"),
        ("python --stage sft ^", r"cmd\.exe with \^"),
    ],
)
def test_a_continuation_that_is_none_is_diagnosed(arrive, command, message):
    with pytest.raises(UserError, match=message):
        parse_given(arrive(command))


@pytest.mark.parametrize(
    "text", ["「宝可梦」图鉴是什么", "——你好", "\u3000你好", "“引号”", "a\u00a0b", "c:\\d", "—", "-1", "--x y"]
)
def test_texts_arrive_as_they_were_typed(text):
    for argv in (["--prefix_init_text", text], [f"--prefix_init_text={text}"]):
        if text.startswith("--") and len(argv) == 2:
            continue  # a word of its own that begins so is a flag
        assert parse_given(argv) == ({"prefix_init_text": text}, [])


@pytest.mark.parametrize("flag", ["——stage", "－－stage", "—stage", "–stage", "−−stage", "-stage", "——stage=sft"])
def test_wide_dashes_are_explained(flag):
    with pytest.raises(UserError, match=r"unknown argument .*did you mean '--stage'\?.* two plain dashes"):
        parse_given([flag, "sft"])


# Flags of other programs

LLAMA_FACTORY_YAML = """\
### model
model_name_or_path: THUDM/chatglm3-6b
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity,alpaca_en_demo
template: chatglm3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/chatglm3-6b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""


def test_a_settings_file_of_llama_factory_is_read(tmp_path):
    (tmp_path / "sft.yaml").write_text(LLAMA_FACTORY_YAML)
    given, notices = parse_given([str(tmp_path / "sft.yaml")])
    assert (given["max_seq_length"], given["warmup_steps"], given["val_size"]) == (2048, 0.1, 0.1)
    assert (given["report_to"], given["learning_rate"], given["overwrite_output_dir"]) == ("none", 1e-4, True)
    assert [notice.partition(" ")[0] for notice in notices] == ["--trust_remote_code", "--overwrite_cache"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--checkpoint_dir", "a"], {"adapter_name_or_path": "a"}),
        (["--num_layer_trainable", "3", "--name_module_trainable", "mlp"], None),
        (["--dpo_beta", "0.2", "--dpo_loss", "ipo"], {"pref_beta": 0.2, "pref_loss": "ipo"}),
        (["--disable_gradient_checkpointing", "True"], {"gradient_checkpointing": False}),
        (["--disable_shuffling"], {"train_sampling_strategy": "sequential"}),
        (["--template", "vanilla"], {"template": "raw"}),
        (["--resume_from_checkpoint", "true"], {"resume_from_checkpoint": "True"}),
        (["--neftune_noise_alpha", "5"], {"neftune_noise_alpha": 5.0}),
    ],
)
def test_flags_of_llama_factory_are_translated(argv, expected):
    expected = {"freeze_trainable_layers": 3, "freeze_trainable_modules": "mlp"} if expected is None else expected
    assert parse_given(argv) == (expected, [])


def names_of(table: dict[str, str]) -> list[str]:
    """Flags of `WITHOUT_EFFECT` or `REPLACED` that are written out, without regular expressions."""
    return sorted(name for names in table.values() for name in names.split() if name.isidentifier())


@pytest.mark.parametrize("name", names_of(foreign_flags.WITHOUT_EFFECT))
def test_flags_without_effect_are_named(name):
    given, (notice,) = parse_given([f"--{name}", "True", "--seed", "1"])
    assert given == {"seed": 1}
    assert notice.startswith(f"--{name} has no effect: ")


@pytest.mark.parametrize(
    "name",
    [
        *names_of(foreign_flags.REPLACED),
        *("export_dir", "vllm_maxlen", "sglang_maxlen", "kt_mode", "use_kt", "image_max_pixels", "freeze_vision_tower"),
        *("use_galore", "galore_rank", "use_apollo", "use_badam", "badam_mode", "use_adam_mini", "use_muon"),
        *("use_swanlab", "swanlab_project", "pissa_init", "oft_rank", "fp8", "fp8_backend", "kto_chosen_weight"),
        *("add_tokens", "add_special_tokens", "new_special_tokens_config", "init_special_tokens", "use_dft_loss"),
    ],
)
def test_flags_that_would_change_the_run_are_refused(name):
    with pytest.raises(UserError, match=f"^--{name} is not used here: "):
        parse_given([f"--{name}", "something"])
    given, notices = parse_given([f"--{name}", "False"])
    assert given == {} and notices == [f"--{name} False has no effect: so it is here anyway"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("quantization_method", "bitsandbytes"), ("quantization_type", "nf4"), ("num_beams", "1"), ("split", "train")],
)
def test_refused_flags_with_our_value_are_let_through(name, value):
    assert parse_given([f"--{name}", value])[0] == {}


def test_shuffling_that_stays_on_changes_nothing():
    given, (notice,) = parse_given(["--disable_shuffling", "False"])
    assert given == {} and "--disable_shuffling" in notice


def test_the_tables_hold_no_flag_of_our_own():
    own = {item.name for arguments in OWN_ARGUMENTS.values() for item in fields(arguments)}
    tables = (foreign_flags.WITHOUT_EFFECT, foreign_flags.REPLACED)
    assert own.isdisjoint(foreign_flags.RENAMED)
    assert [name for name in own if any(foreign_flags.find_advice(name, table) for table in tables)] == []
    every = {option.lstrip("-") for action in build_parser()._actions for option in action.option_strings}
    assert set(foreign_flags.RENAMED.values()) <= every
    assert every >= PATH_FLAGS
    assert all(foreign_flags.find_advice(name, foreign_flags.REPLACED) for name in foreign_flags.HARMLESS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr_scheduler_type", "cosin"], "invalid choice: 'cosin'.*did you mean cosine?"),
        (["--lr_scheduler_type", "reduce_on_plateau"], "did you mean reduce_lr_on_plateau?"),
        (["--stage", "SFT"], "did you mean sft?"),
        (["--finetuning_type", "lorra"], "did you mean lora?"),
        (["--stage", "kto"], r"invalid choice: 'kto' \(choose from"),
        (["--gradient_checkpointing", "maybe"], "'maybe' is none of none, mlp, full"),
        (["--lora_ranck", "8"], "unknown argument '--lora_ranck'; did you mean '--lora_rank'"),
    ],
)
def test_mistakes_get_a_suggestion(argv, message):
    with pytest.raises(UserError, match=message):
        parse_given(argv)


def test_a_mapping_in_a_settings_file_is_a_flag_with_json(tmp_path):
    (tmp_path / "run.yaml").write_text("lr_scheduler_kwargs:\n  num_cycles: 3\n")
    ((name, value),) = parse_given([str(tmp_path / "run.yaml")])[0].items()
    assert name == "lr_scheduler_kwargs" and json.loads(value) == {"num_cycles": 3}


# Settings files of the later official demo

DEMO_YAML = """\
data_config:
  train_file: train.json
  val_file: dev.json
  test_file: dev.json
  num_proc: 1
max_input_length: 128
max_output_length: 128
training_args:
  # see `transformers.Seq2SeqTrainingArguments`
  output_dir: ./output
  max_steps: 2
  learning_rate: 5e-5
  per_device_train_batch_size: 1
  dataloader_num_workers: 0
  remove_unused_columns: false
  save_strategy: steps
  save_steps: 1
  log_level: info
  logging_strategy: steps
  logging_steps: 1
  per_device_eval_batch_size: 2
  evaluation_strategy: steps
  eval_steps: 2
  predict_with_generate: true
  generation_config:
    max_new_tokens: 16
  use_cpu: true
peft_config:
"""
DEMO_METHODS = {
    "lora": (
        "  peft_type: LORA\n  task_type: CAUSAL_LM\n  r: 4\n  lora_alpha: 32\n  lora_dropout: 0.1\n",
        "adapter_config.json",
    ),
    "ptuning": (
        "  peft_type: PREFIX_TUNING\n  task_type: CAUSAL_LM\n  num_virtual_tokens: 4\n",
        "prefix_encoder.safetensors",
    ),
    "full": ("", "model.safetensors"),
}


@pytest.fixture
def demo_folder(tmp_path, tiny_folder, monkeypatch) -> Path:
    """A folder with data/ and a model as the later demo's commands name them."""
    make_model(tmp_path / "model", tiny_folder)
    (tmp_path / "data").mkdir()
    for name in ("train.json", "dev.json"):
        write_conversations(tmp_path / "data" / name, rows=4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("method", DEMO_METHODS)
def test_a_settings_file_of_the_later_demo_runs(demo_folder, method):
    peft, result = DEMO_METHODS[method]
    (demo_folder / "run.yaml").write_text(DEMO_YAML + peft)
    command = ["data", "model", "run.yaml"]
    assert finetune.main([*command, "no", "--plot_loss", "False"]) == 0
    assert (demo_folder / "output" / result).is_file()
    assert finetune.main([*command, "--plot_loss", "False"]) == 2  # there are checkpoints
    assert finetune.main([*command, "yes", "--plot_loss", "False"]) == 0
    assert finetune.main([*command, "1", "--plot_loss", "False"]) == 0


def test_what_the_later_demos_keys_mean(tmp_path):
    (tmp_path / "run.yaml").write_text(DEMO_YAML + DEMO_METHODS["lora"][0])
    given, _ = parse_given([str(tmp_path / "run.yaml"), "--seed", "1"])
    assert (given["train_file"], given["validation_file"], given["max_seq_length"]) == ("train.json", "dev.json", 256)
    assert (given["lora_rank"], given["lora_alpha"], given["lora_target"]) == (4, 32, "query_key_value")
    assert (given["max_new_tokens"], given["eval_strategy"], given["seed"]) == (16, "steps", 1)
    given, _ = parse_given([str(tmp_path), "m", str(tmp_path / "run.yaml"), "7"])
    assert given["train_file"] == str(tmp_path / "train.json") and given["model_name_or_path"] == "m"
    assert given["resume_from_checkpoint"] == "output/checkpoint-7"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("num_proc", "num_procs"), "data_config has a key 'num_procs' that is not known; did you mean 'num_proc'"),
        (("LORA", "ADALORA"), "peft_type is ADALORA; it must be LORA or PREFIX_TUNING"),
        (("max_steps", "max_step"), "unknown argument '--max_step'; did you mean '--max_steps'"),
    ],
)
def test_keys_that_the_later_demo_does_not_have(tmp_path, change, message):
    (tmp_path / "run.yaml").write_text((DEMO_YAML + DEMO_METHODS["lora"][0]).replace(*change))
    with pytest.raises(UserError, match=message):
        parse_given([str(tmp_path / "run.yaml")])
    with pytest.raises(UserError, match="is not a folder; the three words are DATA_DIR MODEL"):
        parse_given(["nowhere", "m", str(tmp_path / "run.yaml")])
