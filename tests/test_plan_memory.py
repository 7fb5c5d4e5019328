"""plan_memory.py: the user's two settings on paper, remedies, DeepSpeed's settings, errors; finetune.py --dry_run."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from training_helpers import train, write_conversations

from finetune_chatmodel_demo import plan_memory
from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config
from finetune_chatmodel_demo.training.memory import GIB
from finetune_chatmodel_demo.training.run_plan import (
    describe_plan,
    find_faster_policy,
    find_remedies,
    make_plan,
    plan_as_json,
    read_gpu_memory,
)
from finetune_chatmodel_demo.training.zero import read_zero

CONFIGS = REPOSITORY / "finetune_chatmodel_demo" / "configs"
GB = 10**9
PARAMETERS = 6_243_584_000
# scripts/finetune_pt_multiturn.sh and scripts/finetune_ds_multiturn.sh
P_TUNING = {
    "model_name_or_path": "6b", "pre_seq_len": 128, "max_seq_length": 2048, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16, "max_steps": 1000, "save_steps": 500,
}  # fmt: skip
ALL_PARAMETERS = {
    "model_name_or_path": "6b", "max_seq_length": 2048, "per_device_train_batch_size": 16, "max_steps": 200,
    "save_steps": 50, "deepspeed": str(CONFIGS / "ds_zero2.json"),
}  # fmt: skip


OUTSIDE = (2 * 65_024 + 1) * 4096  # embedding, head, last norm
SHALLOW_PARAMETERS = OUTSIDE + 2 * (PARAMETERS - OUTSIDE) // 28  # of ChatGLM3-6B with 2 of its 28 layers


def flags(options: dict) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def shallow(tmp_path_factory) -> str:
    """A folder with nothing but the configuration of ChatGLM3-6B, of which 2 layers are left."""
    folder = tmp_path_factory.mktemp("shallow")
    ChatGLM3Config(num_layers=2).save_pretrained(folder)
    return str(folder)


def test_p_tuning_of_the_users_setting_fits_an_rtx_4090(capsys):
    assert plan_memory.main([*flags(P_TUNING), "--gpu_memory", "RTX 4090", "--rows", "3900", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["total_gib_per_gpu"] == pytest.approx(13.14, abs=0.1)  # the original code is said to need 21 GB
    assert report["total_bytes_per_gpu"] < 15 * GB  # bf16, full checkpointing
    assert report["total_bytes_per_gpu"] < read_gpu_memory("RTX 4090") == 24 * GIB * 0.98
    assert (report["steps"], report["rows_per_step"]) == (1000, 16)
    assert report["epochs"] == pytest.approx(4.10, abs=0.01)
    assert report["faster"]["gradient_checkpointing"] == "none"
    assert report["faster"]["total_bytes_per_gpu"] / GIB == pytest.approx(18.5, abs=0.2)


@pytest.mark.thorough
def test_the_users_settings_in_four_bits_and_with_all_parameters():
    assert 5.5 * GB < make_plan({**P_TUNING, "quantization_bit": 4}).memory.total < 6.5 * GB
    plan = make_plan(ALL_PARAMETERS, gpus=4, rows=3900)
    assert plan.memory.total / GIB == pytest.approx(48.2, abs=0.2)
    assert plan.memory.total < read_gpu_memory("A100-80GB")
    assert plan.memory.parts["optimizer"] == 12 * PARAMETERS / 4


def test_all_parameters_with_deepspeed(shallow):
    given = {**ALL_PARAMETERS, "model_name_or_path": shallow, "per_device_train_batch_size": 1}
    plan = make_plan(given, gpus=4, rows=3900)
    assert plan.memory.parameters == plan.memory.trained == SHALLOW_PARAMETERS
    assert plan.memory.parts["weights"] == pytest.approx(2 * SHALLOW_PARAMETERS, rel=1e-4)
    assert plan.memory.parts["optimizer"] == 12 * SHALLOW_PARAMETERS / 4
    assert plan.rows_per_step == 4
    # Four checkpoints of bfloat16 weights (twice), moments and a float32 copy; and the result.
    assert plan.disk == (4 * 16 + 2) * SHALLOW_PARAMETERS
    shared = {**given, "deepspeed": str(CONFIGS / "ds_zero3.json")}
    alone, together = make_plan(shared, gpus=1), make_plan(shared, gpus=4)
    assert together.memory.parts["weights"] == alone.memory.parts["weights"] / 4
    offloaded = make_plan({**given, "deepspeed": str(CONFIGS / "ds_zero3_offload.json")}, gpus=4)
    assert "optimizer" not in offloaded.memory.parts
    assert offloaded.host > 12 * SHALLOW_PARAMETERS


def test_zero_settings_of_the_configurations():
    two, three = (read_zero(str(CONFIGS / f"{name}.json"), 4096, 10**9) for name in ("ds_zero2", "ds_zero3_offload"))
    assert (two.stage, two.offloads_optimizer, two.offloads_weights) == (2, False, False)
    assert two.buffer_bytes == 2e8 * 2 * 2 + 2 * 2e8
    assert (three.stage, three.offloads_optimizer, three.offloads_weights) == (3, True, True)
    assert read_zero(None, 4096, 10**9) is None


def test_remedies_make_it_fit(shallow):
    given = {**P_TUNING, "model_name_or_path": shallow, "per_device_train_batch_size": 4}
    plan = make_plan({**given, "gradient_checkpointing": False})
    four_bits = make_plan({**given, "quantization_bit": 4, "per_device_train_batch_size": 1})
    limit = four_bits.memory.total * 1.01
    found = find_remedies(plan, limit)
    assert [flag.split()[0] for flag, _ in found] == [
        "--gradient_checkpointing", "--per_device_train_batch_size", "--quantization_bit",
    ]  # fmt: skip
    assert found[0][0] == "--gradient_checkpointing full"
    totals = [plan.memory.total, *(changed.total for _, changed in found)]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] <= limit < totals[-2]
    assert find_remedies(plan, 100 * GIB) == []
    assert find_remedies(plan, GIB / 2) == []
    assert "none of the settings makes it fit" in describe_plan(plan, GIB / 2)
    alone = make_plan({"model_name_or_path": shallow, "per_device_train_batch_size": 1, "max_seq_length": 256})
    assert "ds_zero3" in find_remedies(alone, alone.memory.total * 0.9)[-1][0]


@pytest.mark.parametrize(
    "text, size", [("24", 24), ("24GB", 24), ("4090", 24), ("NVIDIA A100-80GB", 80), ("h200", 141)]
)
def test_gpus_by_name(text, size):
    assert read_gpu_memory(text) == pytest.approx(size * GIB * 0.98)


def test_table_and_exit_status(shallow, capsys):
    given = flags({**P_TUNING, "model_name_or_path": shallow})
    assert plan_memory.main([*given, "--gpu_memory", "RTX 4090", "--rows_per_epoch", "3900"]) == 0
    text = capsys.readouterr().out
    for wanted in ("weights", "prefix", "gradients", "optimizer", "activations (full)", "logits", "CUDA context"):
        assert f"  {wanted} " in text
    assert "fits:" in text
    assert "1000 = 4.10 epochs" in text
    assert plan_memory.main([*given, "--gpu_memory", "2.5"]) == 1
    assert "--quantization_bit 4: " in capsys.readouterr().out


def test_a_policy_that_recomputes_less_is_named_where_it_fits_with_room(shallow):
    given = {**P_TUNING, "model_name_or_path": shallow}
    plan = make_plan(given)
    totals = {
        policy: make_plan({**given, "gradient_checkpointing": policy and "mlp"}).memory.total for policy in ("mlp", "")
    }
    for limit, policy in ((totals[""] * 1.11, "none"), (totals["mlp"] * 1.11, "mlp"), (plan.memory.total, None)):
        faster = find_faster_policy(plan, limit)
        assert (faster and faster[0]) == policy
        assert f"faster: --gradient_checkpointing {policy} fits as well" in describe_plan(plan, limit) or not policy
        assert ((plan_as_json(plan, limit)["faster"] or {}).get("gradient_checkpointing")) == policy


def test_json_from_a_folder_with_only_its_configuration(shallow, capsys):
    given = {"model_name_or_path": shallow, "finetuning_type": "lora", "lora_rank": 4}
    assert plan_memory.main([*flags(given), "--gpu_memory", "48", "--json", "--rows", "100"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"]
    assert report["remedies"] == []
    assert report["total_bytes_per_gpu"] == pytest.approx(sum(report["bytes_per_gpu"].values()), abs=10)
    assert report["steps"] == 39  # 3 epochs of 13 batches of 8


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_settings_file_has_a_plan_or_a_reason(config, shallow, capsys):
    status = plan_memory.main([str(config), "--model_name_or_path", shallow])
    captured = capsys.readouterr()
    if config.stem.startswith("ppo"):
        assert status == 2
        assert "no plan for stage ppo" in captured.err
    else:
        assert status == 0, captured.err
        assert "total" in captured.out


@pytest.mark.parametrize(
    "argv, facts",
    [
        (["--model_name_or_path", "nowhere/at/all"], ["nowhere/at/all", "config.json", "6b"]),
        (["--model_name_or_path", "6b", "--gpu_memory", "RTX 9999"], ["--gpu_memory", "RTX 9999", "RTX 4090"]),
        (["--model_name_or_path", "6b", "--deepspeed", "missing.json"], ["--deepspeed", "missing.json"]),
        (["--model_name_or_path", "6b", "--gpus", "0"], ["--gpus is 0"]),
        (["--model_name_or_path", "6b", "--pre_seq_len", "-1"], ["--pre_seq_len", "-1"]),
        (["--model_name_or_path", "6b", "--max_seq_length", "0"], ["--max_seq_length", "0"]),
        (["--model_name_or_path", "6b", "--save_steps", "0"], ["--save_steps", "0"]),
        (["--model_name_or_path", "6b", "--supervised", "-1"], ["--supervised is -1"]),
        (["--model_name_or_path", "6b", "--pre_seq_lenn", "8"], ["did you mean '--pre_seq_len'"]),
    ],
)
def test_errors(argv, facts, capsys):
    try:
        status = plan_memory.main(argv)
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(fact in message for fact in facts)


def test_help_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, runpy; sys.argv = ['plan_memory.py', '--help']\n"
        "try: runpy.run_path(r'%s', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    ) % (REPOSITORY / "finetune_chatmodel_demo" / "plan_memory.py")
    finished = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "--gpu_memory" in finished.stdout


@pytest.mark.parametrize("options", [{"pre_seq_len": 4}, {"finetuning_type": "lora", "packing": True}])
def test_dry_run_plans_with_the_real_rows_and_writes_nothing(model, tmp_path, capsys, options):
    data, weights = write_conversations(tmp_path / "rows.jsonl"), tmp_path / "model"
    shutil.copytree(model, weights)
    for file in weights.glob("*.safetensors"):
        file.unlink()  # the model is not loaded
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert train(weights, data, tmp_path / "out", dry_run=True, max_seq_length=400, **options) == 0
    text = capsys.readouterr().out
    for wanted in ("rows.jsonl", "the plan: ", "nothing was trained or written"):
        assert wanted in text
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    if "packing" not in options:
        assert "batches of 2 × 400" not in text  # the longest row is shorter
