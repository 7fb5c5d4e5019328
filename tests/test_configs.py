"""The example settings in finetune_chatmodel_demo/configs: each is parsed down to a decided run, and each runs."""

import json
import math
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from training_helpers import read_log

from finetune_chatmodel_demo import finetune
from finetune_chatmodel_demo.conversation.registry import choose_entries, find_dataset_dir, read_registry
from finetune_chatmodel_demo.training.command_line import build_parser, parse_given
from finetune_chatmodel_demo.training.deciding import decide_settings
from finetune_chatmodel_demo.training.settings import Settings

CONFIGS = REPOSITORY / "finetune_chatmodel_demo" / "configs"
METHODS = ("ptuning", "lora", "freeze", "full")
STAGE_METHODS = [(stage, method) for stage in ("pt", "sft", "dpo", "ppo") for method in METHODS]
STAGE_METHODS += [("rm", method) for method in METHODS[1:]]
QLORA = "qlora_oasst1"
NAMES = sorted([f"{stage}_{method}" for stage, method in STAGE_METHODS] + [QLORA])
# The learning rates, sources in the files.
RATES = {
    "ptuning": {"pt": 2e-2, "sft": 2e-2, "dpo": 1e-2, "ppo": 2e-3},
    "lora": {"pt": 1e-4, "sft": 1e-4, "rm": 1e-4, "dpo": 5e-6, "ppo": 1e-5},
    "freeze": {"pt": 1e-4, "sft": 1e-4, "rm": 1e-4, "dpo": 5e-6, "ppo": 1e-5},
    "full": {"pt": 1e-5, "sft": 1e-5, "rm": 1e-5, "dpo": 5e-7, "ppo": 1e-6},
}
# From the result of another configuration: flag → whose.
STARTS_FROM = {
    "dpo_ptuning": {"ptuning_checkpoint": "sft_ptuning"},
    "ppo_ptuning": {"ptuning_checkpoint": "sft_ptuning", "reward_model": "rm_lora"},
    "ppo_lora": {"reward_model": "rm_lora"},
    "ppo_freeze": {"reward_model": "rm_freeze"},
    "ppo_full": {"reward_model": "rm_full"},
}
PICTURES = {
    "pt": {"training_loss.png", "training_eval_loss.png"},
    "sft": {"training_loss.png", "training_eval_loss.png"},
    "rm": {"training_loss.png", "training_eval_loss.png", "training_rewards.png", "training_accuracy.png"},
    "dpo": {"training_loss.png", "training_eval_loss.png", "training_rewards.png", "training_accuracy.png"},
    "ppo": {"training_loss.png", "training_rewards.png"},
}
KINDS = {"pt": "text", "sft": "multi-turn", "ppo": "multi-turn", "rm": "preference", "dpo": "preference"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Where the files say that they are started."""
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """Where the runs leave their results; later ones start from those of earlier ones."""
    return tmp_path_factory.mktemp("output")


def read_config(name: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


def command(name: str, model: Path, outputs: Path, **overrides: object) -> list[str]:
    """A configuration with a small model on the CPU in place of the 6B model."""
    given = {"model_name_or_path": model, "output_dir": outputs / name, "use_cpu": True, "deepspeed": "", **overrides}
    for flag, owner in STARTS_FROM.get(name, {}).items():
        given[flag] = outputs / owner
    return [str(CONFIGS / f"{name}.yaml"), *(f"--{flag}={value}" for flag, value in given.items())]


def decide(name: str, model: Path, outputs: Path) -> Settings:
    return decide_settings(*parse_given(command(name, model, outputs)))


def test_there_is_a_file_for_every_stage_and_method():
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_a_flag_with_a_reason(name):
    own = {option.lstrip("-") for action in build_parser()._actions for option in action.option_strings}
    config = read_config(name)
    assert config.keys() <= own
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"finetune_chatmodel_demo/finetune.py finetune_chatmodel_demo/configs/{name}.yaml" in text
    obvious = {"stage", "do_train", "output_dir", "finetuning_type", "eval_dataset", "plot_loss", "max_grad_norm"}
    for line in text.splitlines():
        key = line.partition(":")[0]
        if key in config and key not in obvious and name != QLORA:
            assert "# " in line, f"{name}.yaml: no reason for {line!r}"
    assert max(map(len, text.splitlines())) <= 130
    for flag, owner in STARTS_FROM.get(name, {}).items():
        assert config[flag] == read_config(owner)["output_dir"]


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_parsed_to_a_decided_run(name, model, tmp_path):
    stage, method = ("sft", "lora") if name == QLORA else name.split("_")
    for owner in STARTS_FROM.get(name, {}).values():  # as a result of the other configuration looks from outside
        (tmp_path / owner).mkdir()
        config = json.loads((model / "config.json").read_text())
        if owner.startswith("rm"):
            config["architectures"] = ["ChatGLMForSequenceClassification"]
        (tmp_path / owner / "config.json").write_text(json.dumps(config))
    if name == QLORA:
        pytest.importorskip("bitsandbytes")
    settings = decide(name, model, tmp_path)
    assert (settings.stage.stage, settings.method) == (stage, method)
    rate = 2e-4 if name == QLORA else RATES[method][stage]
    assert settings.training.learning_rate == rate
    assert settings.does_train and settings.run.plot_loss
    assert settings.notices == []
    assert settings.has_validation == (stage != "ppo")
    config = read_config(name)
    assert config["output_dir"] == f"output/{name}"
    registry = read_registry(find_dataset_dir(settings.data.dataset_dir))
    for key in ("dataset", "eval_dataset"):
        for entry in choose_entries(registry, config[key]) if key in config else ():
            assert bool(entry.ranking) == (KINDS[stage] == "preference")
            assert entry.file_name, f"{entry.name} needs a network"


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_full")])
def test_all_parameters_of_the_large_model_fit_somewhere(name):
    """16 bytes a parameter are 100 GB: shared out by DeepSpeed, or without Adam's two moments."""
    config = read_config(name)
    if name in ("pt_full", "sft_full"):
        assert json.loads((REPOSITORY / config["deepspeed"]).read_text())["zero_optimization"]["stage"] == 2
        assert "torchrun --nproc_per_node 4" in (CONFIGS / f"{name}.yaml").read_text()
    else:
        assert config["optim"] == "adafactor"


def test_the_settings_of_qlora_are_xtuners(model, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = decide(QLORA, model, tmp_path)
    training, tuning = settings.training, settings.tuning
    assert settings.model.quantization_bit == 4
    assert (tuning.lora_rank, tuning.lora_alpha, tuning.lora_dropout) == (64, 16, 0.1)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 16)
    assert (training.num_train_epochs, training.max_grad_norm, training.warmup_steps) == (3, 1, 0.03)
    assert (settings.data.max_seq_length, settings.data.packing) == (2048, True)
    assert settings.data.dataset == "oasst1_sample"


# In an order in which each finds what it starts from.
ORDER = sorted(NAMES, key=lambda name: (name in STARTS_FROM, name))


@pytest.mark.parametrize("name", ORDER)
def test_every_file_runs(name, model, outputs):
    """Two steps of a small model; results of rm and sft are what dpo and ppo start from."""
    if name == QLORA:
        pytest.importorskip("bitsandbytes")
    for owner in STARTS_FROM.get(name, {}).values():
        if not (outputs / owner).exists():
            pytest.skip(f"starts from {owner}, which did not run")
    short = {
        "max_steps": 2,
        "max_samples": 8,
        "max_seq_length": 448,
        "logging_steps": 1,
        "gradient_accumulation_steps": 1,
    }
    short |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "pre_seq_len": 4}
    config = read_config(name)
    if config["finetuning_type"] != "ptuning" or "ptuning_checkpoint" in config:
        del short["pre_seq_len"]
    if config["finetuning_type"] == "freeze":
        short["freeze_trainable_layers"] = 1
    if config["stage"] == "ppo":
        short |= {"max_new_tokens": 4, "ppo_epochs": 1}
    assert finetune.main(command(name, model, outputs, **short)) == 0
    folder = outputs / name
    log = read_log(folder)
    assert log[-1]["step"] == 2
    results = json.loads((folder / "all_results.json").read_text())
    assert math.isfinite(results["train_loss"])
    if "eval_dataset" in config or name == QLORA:
        assert math.isfinite(results["eval_loss"])
    assert {path.name for path in folder.glob("*.png")} == PICTURES[config["stage"]]
    assert [json.loads(line)["current_steps"] for line in (folder / "trainer_log.jsonl").open()][-1] == 2
