"""The finetune_*.sh scripts: what each passes on by default, that every knob arrives, and real runs."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from training_helpers import losses, make_model, write_conversations

from finetune_chatmodel_demo.training.command_line import parse_given

DEMO = REPOSITORY / "finetune_chatmodel_demo"

# The original's defaults (its Pokémon descendant's LR is not kept, see finetune_ps_pt_m.sh).
MULTI_TURN = {"train_format": "multi-turn", "max_seq_length": 2048}
PAIRS = {"train_format": "input-output", "max_source_length": 1024, "max_target_length": 128}
PREFIX = {
    "pre_seq_len": 128,
    "learning_rate": 2e-2,
    "per_device_train_batch_size": 1,
    "max_steps": 1000,
    "save_steps": 500,
}
DEEPSPEED = {
    "learning_rate": 1e-4,
    "deepspeed": str(DEMO / "configs" / "ds_zero2.json"),
    "gradient_accumulation_steps": 1,
}
DEFAULTS = {
    "finetune_pt_multiturn.sh": MULTI_TURN | PREFIX | {"gradient_accumulation_steps": 16, "data": "tool_alpaca"},
    "finetune_ps_pt_m.sh": MULTI_TURN | PREFIX | {"gradient_accumulation_steps": 16, "data": "pokemon_conversations"},
    "finetune_pt.sh": PAIRS | PREFIX | {"gradient_accumulation_steps": 32, "data": "advertise_gen"},
    "finetune_ds_multiturn.sh": MULTI_TURN
    | DEEPSPEED
    | {"per_device_train_batch_size": 16, "max_steps": 200, "save_steps": 50, "data": "tool_alpaca"},
    "finetune_ds.sh": PAIRS
    | DEEPSPEED
    | {"per_device_train_batch_size": 4, "max_steps": 500, "save_steps": 500, "data": "advertise_gen"},
}
RUN_NAMES = {
    "finetune_pt_multiturn.sh": "tool_alpaca_pt-*-128-2e-2",
    "finetune_ps_pt_m.sh": "pokemon",
    "finetune_pt.sh": "advertise_gen_pt-*-128-2e-2",
    "finetune_ds_multiturn.sh": "tool_alpaca_ft-*-1e-4",
    "finetune_ds.sh": "advertise_gen_ft-*-1e-4",
}
FAKE_PROGRAM = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "w") as file:
    json.dump([os.path.basename(sys.argv[0]), *sys.argv[1:]], file)
print("fake training")
sys.exit(int(os.environ.get("FAKE_STATUS", "0")))
"""


class Recorder:
    """Runs scripts with a `python` and a `torchrun` that only note their arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = folder / "repository"
        shutil.copytree(REPOSITORY / "scripts", self.repository / "scripts")
        (folder / "bin").mkdir()
        for name in ("python", "torchrun"):
            program = folder / "bin" / name
            program.write_text(FAKE_PROGRAM.format(python=sys.executable))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def run(
        self, script: str, *arguments: str, cwd: Path | None = None, **knobs: object
    ) -> subprocess.CompletedProcess:
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "RECORD": str(self.folder / "record.json"),
        }
        environment |= {name: str(value) for name, value in knobs.items()}
        return subprocess.run(
            [self.repository / "scripts" / script, *arguments],
            cwd=cwd or self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )

    def command(self, script: str, *arguments: str, **options: object) -> tuple[list[str], dict[str, object]]:
        """Returns what stands before finetune.py, and the parsed flags after it."""
        completed = self.run(script, *arguments, **options)
        assert completed.returncode == 0, completed.stderr
        argv = json.loads((self.folder / "record.json").read_text())
        entry = argv.index(str(self.repository / "finetune_chatmodel_demo" / "finetune.py"))
        return argv[:entry], parse_given(argv[entry + 1 :])[0]


@pytest.fixture
def recorder(tmp_path) -> Recorder:
    return Recorder(tmp_path)


def test_the_quickstarts_environment_is_used_where_none_is_active(recorder):
    programs = recorder.repository / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text("#!/bin/sh\necho the python of .venv\n")
    (programs / "python").chmod(0o755)
    script = "finetune_ps_pt_m.sh"
    assert "the python of .venv" in recorder.run(script).stdout
    for active in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        assert "the python of .venv" not in recorder.run(script, **{active: "/somewhere"}).stdout
    assert "the python of .venv" not in recorder.run(script, PYTHON=recorder.folder / "bin" / "python").stdout


@pytest.mark.parametrize("script", DEFAULTS)
def test_defaults_are_the_originals(recorder, script):
    launcher, given = recorder.command(script)
    expected = {name: value for name, value in DEFAULTS[script].items() if name not in ("data", "deepspeed")}
    root = recorder.repository
    expected |= {
        "train_file": str(root / "formatted_data" / f"{DEFAULTS[script]['data']}.jsonl"),
        "model_name_or_path": str(root / "THUDM" / "chatglm3-6b"),
        "output_dir": given["output_dir"],
        "preprocessing_num_workers": 1,
        "logging_steps": 1,
        "resume_from_checkpoint": "True",
    }
    if "deepspeed" in DEFAULTS[script]:
        expected["deepspeed"] = str(root / "finetune_chatmodel_demo" / "configs" / "ds_zero2.json")
        assert launcher == ["torchrun", "--standalone", "--nnodes=1", "--nproc_per_node=4"]
    else:
        assert launcher == ["python"]
    assert given == expected
    output = Path(given["output_dir"])
    assert output.parent == root / "output"
    assert output.match(RUN_NAMES[script])
    log = (output / "train.log").read_text()
    assert "finetune.py" in log and "fake training" in log


@pytest.mark.parametrize("script", DEFAULTS)
@pytest.mark.parametrize("spelling", ["GRAD_ACCUMULATION_STEPS", "GRAD_ACCUMULARION_STEPS"])
def test_every_knob_arrives(recorder, script, spelling):
    knobs = {
        "PRE_SEQ_LEN": ("pre_seq_len", 7),
        "LR": ("learning_rate", 0.125),
        "MAX_SEQ_LEN": ("max_seq_length", 77),
        "MAX_SOURCE_LEN": ("max_source_length", 78),
        "MAX_TARGET_LEN": ("max_target_length", 79),
        "DEV_BATCH_SIZE": ("per_device_train_batch_size", 3),
        spelling: ("gradient_accumulation_steps", 5),
        "MAX_STEP": ("max_steps", 11),
        "SAVE_INTERVAL": ("save_steps", 13),
        "BASE_MODEL_PATH": ("model_name_or_path", "/absolute/model"),
        "DATASET_PATH": ("train_file", "/absolute/data.jsonl"),
        "VALIDATION_PATH": ("validation_file", "/absolute/validation.jsonl"),
        "AUTORESUME_FROM_CHECKPOINT": ("resume_from_checkpoint", "False"),
        "PREPROCESSING_NUM_WORKERS": ("preprocessing_num_workers", 2),
    }
    launcher, given = recorder.command(script, NUM_GPUS=2, RUN_NAME="mine", **{k: v for k, (_, v) in knobs.items()})
    known = set(DEFAULTS[script]) | {"model_name_or_path", "train_file", "validation_file", "resume_from_checkpoint"}
    for flag, value in knobs.values():
        if flag in known:
            assert given[flag] == value
    assert launcher == ["torchrun", "--standalone", "--nnodes=1", "--nproc_per_node=2"]
    assert Path(given["output_dir"]).name.startswith("mine")


def test_extra_arguments_override_knobs(recorder):
    _, given = recorder.command("finetune_pt_multiturn.sh", "--learning_rate", "0.5", "--prefix_projection", LR=0.1)
    assert given["learning_rate"] == 0.5
    assert given["prefix_projection"] is True


def test_master_port_is_honoured(recorder):
    launcher, _ = recorder.command("finetune_ds.sh", MASTER_ADDR="10.0.0.1", MASTER_PORT=29999, NUM_GPUS=1)
    assert launcher == [
        *("torchrun", "--nnodes=1", "--master_addr=10.0.0.1", "--master_port=29999", "--nproc_per_node=1"),
    ]


NODES = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "10.0.0.1", "OUTPUT_DIR": "output/shared"}


@pytest.mark.parametrize("script", DEFAULTS)
def test_several_nodes(recorder, script):
    launcher, given = recorder.command(script, NUM_GPUS=8, **NODES)
    start = ["torchrun", "--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1"]
    assert launcher == [*start, "--master_port=29500", "--nproc_per_node=8"]
    assert given["resume_from_checkpoint"] == "True"
    assert (Path(given["output_dir"]) / "train-node1.log").is_file()
    launcher, given = recorder.command(script, MASTER_PORT=29999, **NODES | {"NODE_RANK": 0}, NUM_GPUS=1)
    assert launcher[2:] == ["--node_rank=0", *start[3:], "--master_port=29999", "--nproc_per_node=1"]
    assert (Path(given["output_dir"]) / "train.log").is_file()


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"MASTER_ADDR": ""}, "NNODES=2 needs MASTER_ADDR, the address of the node with NODE_RANK=0"),
        ({"NODE_RANK": ""}, "NNODES=2 needs NODE_RANK, 0 to 1"),
        ({"NODE_RANK": 2}, "NODE_RANK=2: with NNODES=2 it is 0 to 1"),
        ({"OUTPUT_DIR": ""}, "NNODES=2 needs OUTPUT_DIR, one folder that all nodes see"),
    ],
)
def test_nodes_that_could_not_find_each_other(recorder, knobs, message):
    completed = recorder.run("finetune_ds.sh", **NODES | knobs)
    assert completed.returncode == 2
    assert f"finetune_ds.sh: error: {message}" in completed.stderr
    assert not (recorder.folder / "record.json").exists()


@pytest.mark.parametrize("script", ["finetune_ds.sh", "finetune_ds_multiturn.sh"])
def test_deepspeed_config_is_a_name_or_a_path(recorder, script, tmp_path):
    configs = recorder.repository / "finetune_chatmodel_demo" / "configs"
    shutil.copytree(DEMO / "configs", configs)
    for name in ("ds_zero2", "ds_zero2_offload", "ds_zero3", "ds_zero3_offload"):
        assert recorder.command(script, DEEPSPEED_CONFIG=name)[1]["deepspeed"] == str(configs / f"{name}.json")
    path = f"finetune_chatmodel_demo/configs/{name}.json"
    assert recorder.command(script, DEEPSPEED_CONFIG=path)[1]["deepspeed"] == str(recorder.repository / path)
    (tmp_path / "mine.json").touch()
    assert recorder.command(script, DEEPSPEED_CONFIG="mine.json")[1]["deepspeed"] == str(tmp_path / "mine.json")
    completed = recorder.run(script, DEEPSPEED_CONFIG="ds_zero4")
    assert completed.returncode == 2
    assert "DEEPSPEED_CONFIG=ds_zero4: there is no" in completed.stderr and "ds_zero3.json" in completed.stderr


def test_relative_paths_start_at_the_repository(recorder, tmp_path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (elsewhere / "mine.jsonl").touch()
    options = {"cwd": elsewhere, "OUTPUT_DIR": "output/my run", "BASE_MODEL_PATH": "THUDM/other"}
    _, given = recorder.command("finetune_ps_pt_m.sh", DATASET_PATH="formatted_data/x.jsonl", **options)
    assert given["train_file"] == str(recorder.repository / "formatted_data" / "x.jsonl")
    assert given["model_name_or_path"] == str(recorder.repository / "THUDM" / "other")
    assert given["output_dir"] == str(elsewhere / "output" / "my run")  # a user's own name lies where the user is
    _, given = recorder.command("finetune_ps_pt_m.sh", DATASET_PATH="mine.jsonl", **options)
    assert given["train_file"] == str(elsewhere / "mine.jsonl")
    assert len((elsewhere / "output" / "my run" / "train.log").read_text().splitlines()) == 4
    del options["OUTPUT_DIR"]
    _, given = recorder.command("finetune_ps_pt_m.sh", DATASET_PATH="mine.jsonl", **options)
    assert given["output_dir"] == str(recorder.repository / "output" / "pokemon")


def test_paths_with_backslashes(recorder, tmp_path):
    _, given = recorder.command("finetune_pt.sh", DATASET_PATH="formatted_data\\x.jsonl", OUTPUT_DIR="saves\\mine")
    assert given["train_file"] == str(recorder.repository / "formatted_data" / "x.jsonl")
    assert given["output_dir"] == str(recorder.folder / "saves" / "mine")


def test_numbers_with_zeros_in_front(recorder):
    launcher, given = recorder.command("finetune_pt.sh", NUM_GPUS="08", DEV_BATCH_SIZE="010")
    assert "--nproc_per_node=8" in launcher
    assert given["per_device_train_batch_size"] == 10


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_scripts_start_through_links_and_with_any_shell(recorder, tmp_path, shell):
    link = tmp_path / "start"
    link.symlink_to(recorder.repository / "scripts" / "finetune_pt.sh")
    environment = {"PATH": f"{recorder.folder / 'bin'}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record.json")}
    completed = subprocess.run([shell, str(link), "--seed", "5"], env=environment, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert json.loads((tmp_path / "record.json").read_text())[-2:] == ["--seed", "5"]


def test_the_originals_deepspeed_file_is_there():
    ours = [json.loads((DEMO / "configs" / name).read_text()) for name in ("deepspeed.json", "ds_zero2.json")]
    assert ours[0] == ours[1]
    assert parse_given(["--deepspeed", str(DEMO / "configs" / "deepspeed.json")])[0]


def test_a_failed_run_fails_through_the_log(recorder):
    completed = recorder.run("finetune_pt.sh", FAKE_STATUS=3)
    assert completed.returncode == 3
    assert "fake training" in completed.stdout
    assert "ended early" not in completed.stdout


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"NUM_GPUS": "one"}, "NUM_GPUS=one is not a whole number; give one, or leave it out"),
        ({"NUM_GPUS": 0}, "NUM_GPUS=0: it is the number of processes, 1 or more"),
        ({"MAX_STEP": "1e3"}, "MAX_STEP=1e3 is not a whole number"),
        ({"lr": "1e-2"}, "lr=1e-2 has no effect: knobs are written in capitals, LR=1e-2 (else: unset lr)"),
        (
            {"dataset_path": "a.jsonl"},
            "dataset_path=a.jsonl has no effect: knobs are written in capitals, DATASET_PATH=a.jsonl",
        ),
    ],
)
def test_knobs_that_cannot_work(recorder, knobs, message):
    completed = recorder.run("finetune_pt.sh", **knobs)
    assert completed.returncode == 2
    assert f"finetune_pt.sh: error: {message}" in completed.stderr
    assert not (recorder.repository / "output").exists()
    assert not (recorder.folder / "record.json").exists()


def test_epochs_and_shares_reach_the_program(recorder):
    _, given = recorder.command("finetune_pt.sh", MAX_STEP=-1, SAVE_INTERVAL=0.25)
    assert (given["max_steps"], given["save_steps"]) == (-1, 0.25)


def test_the_last_words_of_an_interrupted_run_arrive(recorder):
    program = recorder.folder / "waits.py"
    program.write_text(
        "import os, pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--output_dir') + 1])\n"
        "(folder / 'checkpoint-5').mkdir()\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('interrupted', flush=True)\n    sys.exit(130)\n"
    )
    python = recorder.folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    output = recorder.folder / "run"
    run = subprocess.Popen(
        [recorder.repository / "scripts" / "finetune_pt.sh"],
        env={"PATH": f"{recorder.folder / 'bin'}:{os.environ['PATH']}", "OUTPUT_DIR": str(output)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (output / "checkpoint-5").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all of the pipeline
    shown, _ = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "interrupted" in shown and f"OUTPUT_DIR={output} continues from checkpoint-5" in shown
    assert "continues from checkpoint-5" in (output / "train.log").read_text()


def test_a_run_that_ended_early_says_how_it_continues(recorder):
    output = recorder.folder / "output" / "mine"
    for step in (2, 10, 9):
        (output / f"checkpoint-{step}").mkdir(parents=True)
    completed = recorder.run("finetune_ds.sh", FAKE_STATUS=3, OUTPUT_DIR="output/mine")
    assert completed.returncode == 3
    message = f"The same command with OUTPUT_DIR={output} continues from checkpoint-10."
    assert message in completed.stdout and message in (output / "train.log").read_text()


@pytest.mark.parametrize("script", sorted(path.name for path in (REPOSITORY / "scripts").glob("finetune_*.sh")))
def test_scripts_can_be_run(script):
    path = REPOSITORY / "scripts" / script
    assert os.access(path, os.X_OK)
    assert script in DEFAULTS
    subprocess.run(["bash", "-n", path], check=True)


def test_the_pokemon_script_trains_on_two_processes(tmp_path, tiny_folder):
    """A real run, from another folder, with the demo's folder copied alone into another checkout."""
    checkout = tmp_path / "checkout"
    for name in ("scripts", "finetune_chatmodel_demo"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    make_model(checkout / "THUDM" / "chatglm3-6b", tiny_folder)
    (checkout / "formatted_data").mkdir()
    write_conversations(checkout / "formatted_data" / "pokemon_conversations.jsonl")
    knobs = {"PRE_SEQ_LEN": "4", "GRAD_ACCUMULATION_STEPS": "2", "MAX_STEP": "6", "NUM_GPUS": "2"}
    knobs["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [checkout / "scripts" / "finetune_ps_pt_m.sh", "--use_cpu"]
    environment = {**os.environ, **knobs, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    output = checkout / "output" / "pokemon"
    assert len(losses(output)) == 6
    log = (output / "train.log").read_text(encoding="utf-8")
    assert "P-Tuning v2, a prefix of 4 positions" in log and "learning rate  0.02" in log
