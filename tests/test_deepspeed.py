"""DeepSpeed ZeRO-2 and ZeRO-3 on two processes of the CPU, against one process without it; ranks that die; nodes."""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import flags, losses, make_model, read_log, train, write_conversations

from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM, load_model, load_tokenizer
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training.checkpoints import MANIFEST, find_last_checkpoint
from finetune_chatmodel_demo.training.zero import LONGEST_BUILD, check_pickles, remove_stale_locks

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "finetune_chatmodel_demo" / "configs"
METHODS = {
    "full": {},
    "lora": {"finetuning_type": "lora"},
    # Dropout draws from the random numbers of each process.
    "ptuning": {"pre_seq_len": 4, "prefix_dropout": 0, "learning_rate": 2e-2},
}
WEIGHTS = {
    "full": "model.safetensors",
    "lora": "adapter_model.safetensors",
    "ptuning": "prefix_encoder.safetensors",
}
STAGES = ("zero2", "zero3")
DDP = ("lora", "ptuning")
ROWS_OF_A_STEP = 8
STEPS = 4
# Every kind of ZeRO, and DDP, once; what the thorough tests repeat over the methods stands behind it.
USUAL = ("ddp/lora", "zero2/ptuning", "zero3/full")

pytestmark = pytest.mark.usefixtures("extensions")


def each(*runs: str) -> list:
    """Names of runs as parameters; those that are not of USUAL are for thorough tests."""
    return [run if run in USUAL else pytest.param(run, marks=pytest.mark.thorough) for run in runs]


DEEPSPEED_RUNS = each(*(f"{zero}/{method}" for zero in STAGES for method in METHODS))


@pytest.fixture(scope="session")
def extensions(request, tmp_path_factory) -> None:
    """A folder of the tests' own for DeepSpeed's extensions, kept between sessions, so that they are built once."""
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("torch_extensions") if cache else tmp_path_factory.mktemp("torch_extensions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        yield


def environment(**knobs: object) -> dict[str, str]:
    """Of processes that shall train on the CPU."""
    knobs = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": 1,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    } | knobs
    return {**os.environ, **{name: str(value) for name, value in knobs.items()}}


def options(processes: int, method: str, zero: str | None = None, **more: object) -> dict[str, object]:
    """Flags of a short run with 8 rows a step, whatever the number of processes."""
    config = {"deepspeed": CONFIGS / f"ds_{zero}.json"} if zero else {}
    return {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ROWS_OF_A_STEP // 2 // processes,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "random",
        "save_steps": 2,
        "max_steps": STEPS,
        "seed": 42,
        "plot_loss": False,
        **config,
        **METHODS[method],
        **more,
    }


def launch(processes: int, commands: list[list[str]], folder: Path) -> str:
    """Runs command lines of finetune.py one after the other with torchrun, and returns what they print."""
    file = folder / "commands.json"
    file.write_text(json.dumps(commands), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*torchrun, str(REPOSITORY / "tests" / "run_several.py"), str(file)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    return run.stdout


class Runs:
    """A model, data, and the runs on them: `one/METHOD`, `ddp/METHOD`, `zero2/METHOD`, `zero3/METHOD`.

    Those that the tests of this session ask for are made; `wanted` has their names.
    """

    wanted: tuple[str, ...] = ()

    def __init__(self, folder: Path, tokenizer_folder: Path) -> None:
        self.folder = folder
        self.model = make_model(folder / "model", tokenizer_folder)
        self.data = write_conversations(folder / "train.jsonl")

    def command(self, output: Path, given: dict[str, object]) -> list[str]:
        return flags(self.model, self.data, output, **given)

    def copy_until(self, step: int, run: str, to: str) -> Path:
        """A copy of a run as it was after `step` steps."""
        target = self.folder / to / run
        shutil.copytree(self.folder / run, target, ignore=shutil.ignore_patterns("model.safetensors.tmp"))
        for checkpoint in target.glob("checkpoint-*"):
            if int(checkpoint.name.partition("-")[2]) > step:
                shutil.rmtree(checkpoint)
        for result in ("trainer_state.json", *WEIGHTS.values()):
            (target / result).unlink(missing_ok=True)
        return target

    def trained(self, run: Path | str) -> dict[str, torch.Tensor]:
        folder = self.folder / run
        return load_file(folder / WEIGHTS[folder.name])


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_folder) -> Runs:
    """The model and the data, before any run."""
    pytest.importorskip("deepspeed")
    return Runs(tmp_path_factory.mktemp("deepspeed"), tiny_folder)


@pytest.fixture(scope="module")
def runs(files, request) -> Runs:
    runs = files
    asked = {
        item.callspec.params["run"]
        for item in request.session.items
        if item.path == request.path and "run" in getattr(getattr(item, "callspec", None), "params", {})
    }
    every = [*(f"ddp/{method}" for method in DDP), *(f"{zero}/{method}" for zero in STAGES for method in METHODS)]
    runs.wanted = tuple(run for run in every if run in asked or run in USUAL)
    commands = []
    for run in runs.wanted:
        kind, method = run.split("/")
        commands.append(runs.command(runs.folder / run, options(2, method, None if kind == "ddp" else kind)))
    launch(2, commands, runs.folder)
    for method in METHODS:
        assert train(runs.model, runs.data, runs.folder / "one" / method, **options(1, method)) == 0
    return runs


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """But for the biases of keys: attention does not depend on them, so that their gradients are rounding errors."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        other = found[name]
        if name.endswith("query_key_value.bias"):
            other, value = (torch.cat([bias[:32], bias[48:]]) for bias in (other, value))
        torch.testing.assert_close(other, value, rtol=0, atol=2e-4)


@pytest.mark.parametrize("run", [*each(*(f"ddp/{method}" for method in DDP)), *DEEPSPEED_RUNS])
def test_losses_and_result_are_those_of_one_process(runs, run):
    one = f"one/{Path(run).name}"
    assert len(losses(runs.folder / run)) == STEPS
    assert losses(runs.folder / run) == pytest.approx(losses(runs.folder / one), rel=1e-4)
    assert_close(runs.trained(run), runs.trained(one))


@pytest.mark.parametrize("run", each(*(f"{zero}/{method}" for zero in STAGES for method in ("full", "ptuning"))))
def test_results_load_alone(runs, run):
    """Official layout, as inference.py reads it; ZeRO-3 gathers what it had shared out."""
    if run.endswith("ptuning"):
        assert load_model(runs.model, pt_checkpoint=runs.folder / run).prefix_encoder.length == 4
        return
    official = load_file(runs.model / "model.safetensors")
    base, state = load_model(runs.model).state_dict(), load_model(runs.folder / run).state_dict()
    shapes = {name: value.shape for name, value in runs.trained(run).items()}
    assert shapes == {name: value.shape for name, value in official.items()}
    assert [name for name in base if torch.equal(base[name], state[name]) and "k_proj.bias" not in name] == []
    command = load_tokenizer(runs.folder / run).get_command("<|user|>")
    assert command == load_tokenizer(runs.model).get_command("<|user|>")


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed builds its Adam for the host with a C++ compiler")
def test_offloading_gives_the_losses_of_one_process(runs):
    """With the optimizer's state, and with the weights too, in the host's memory; and with half a run taken up."""
    offloads = [f"{zero}_offload" for zero in STAGES]
    commands = [runs.command(runs.folder / zero / "full", options(2, "full", zero)) for zero in offloads]
    launch(2, commands, runs.folder)
    again = [
        runs.command(runs.copy_until(2, f"{zero}/full", "same"), options(2, "full", zero, resume_from_checkpoint=True))
        for zero in offloads
    ]
    launch(2, again, runs.folder)
    for zero in offloads:
        for run in (f"{zero}/full", f"same/{zero}/full"):
            assert losses(runs.folder / run) == pytest.approx(losses(runs.folder / "one" / "full"), rel=1e-4)
            assert_close(runs.trained(run), runs.trained("one/full"))


@pytest.mark.parametrize("run", each(*(f"{zero}/{method}" for zero in STAGES for method in DDP)))
def test_checkpoints_leave_frozen_weights_out(runs, run):
    """The base model has them; those of 6B are 12 GB."""
    checkpoint = runs.folder / run / "checkpoint-2"
    trained = sum(4 * value.numel() for value in runs.trained(run).values())
    tensors = 0
    for path in checkpoint.rglob("*model_states.pt"):
        with zipfile.ZipFile(path) as archive:
            tensors += sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
    assert tensors <= 2 * trained < (runs.model / "model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def later(runs) -> dict[str, str]:
    """What later calls on copies of the runs print: same, again, best (two processes), other (one process)."""
    kinds = {"same": [], "other": []}
    for run in runs.wanted:  # ddp first: accelerate takes every run after one with DeepSpeed for another
        kind, method = run.split("/")
        zero = None if kind == "ddp" else kind
        for name, processes in (("same", 2), ("other", 1))[kind == "ddp" :]:
            given = options(processes, method, zero, resume_from_checkpoint=True)
            kinds[name].append(runs.command(runs.copy_until(2, run, name), given))
        if zero:
            # The "best" one is the worst: not the last.
            choice = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
            given = options(2, method, zero, validation_file=runs.data, **choice)
            kinds["same"].append(runs.command(runs.folder / "best" / run, given))
        if zero and method == "full":
            # All steps are done, the result is lost.
            given = options(2, method, zero, resume_from_checkpoint=True, validation_file=runs.data)
            kinds["same"].append(runs.command(runs.copy_until(STEPS, run, "again"), given))
    return {"same": launch(2, kinds["same"], runs.folder), "other": launch(1, kinds["other"], runs.folder)}


@pytest.mark.parametrize("kind", ["same", "other"])
@pytest.mark.parametrize("run", DEEPSPEED_RUNS)
def test_a_resumed_run_ends_as_the_whole_one(runs, later, kind, run):
    """Also with another number of processes, through DeepSpeed's universal checkpoint."""
    folder = runs.folder / kind / run
    assert losses(folder) == pytest.approx(losses(runs.folder / run), rel=1e-6 if kind == "same" else 1e-5)
    assert_close(runs.trained(f"{kind}/{run}"), runs.trained(run))
    assert {path.name for path in (folder / "checkpoint-2").iterdir()}.isdisjoint({"universal", "latest_universal"})


@pytest.mark.parametrize("run", each(*(f"ddp/{method}" for method in DDP)))
def test_without_deepspeed_the_number_of_processes_may_change(runs, later, run):
    one = runs.folder / "one" / Path(run).name
    assert losses(runs.folder / "other" / run) == pytest.approx(losses(one), rel=1e-5)
    assert "gradient_accumulation_steps was 2, is 4; processes was 2, is 1" in later["other"]


@pytest.mark.parametrize("run", each(*(f"{zero}/full" for zero in STAGES)))
def test_a_finished_run_without_its_result_writes_it(runs, later, run):
    assert_close(runs.trained(f"again/{run}"), runs.trained(run))
    assert "eval_loss" in read_log(runs.folder / "again" / run)[-1]


@pytest.mark.parametrize("run", DEEPSPEED_RUNS)
def test_the_best_checkpoint_is_the_result(runs, later, run):
    folder = runs.folder / "best" / run
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-2"
    best, last = (load_file(folder / f"checkpoint-{step}" / WEIGHTS[folder.name]) for step in (2, 4))
    result = runs.trained(f"best/{run}")
    assert all(torch.equal(result[name], best[name]) for name in best)
    assert not all(torch.equal(result[name], last[name]) for name in last)


def script_knobs(runs: Runs, output: Path, **knobs: object) -> dict[str, str]:
    knobs = {"DATASET_PATH": runs.data, "OUTPUT_DIR": output, "LR": 1e-3, "DEV_BATCH_SIZE": 2, **knobs}
    knobs |= {"BASE_MODEL_PATH": runs.model, "GRAD_ACCUMULATION_STEPS": 2}
    return environment(**knobs)


SCRIPT = [REPOSITORY / "scripts" / "finetune_ds_multiturn.sh", "--use_cpu", "--train_sampling_strategy", "random"]
SCRIPT += ["--lr_scheduler_type", "constant", "--seed", "42", "--plot_loss", "False"]


@pytest.mark.thorough
def test_the_script_of_prompts_and_responses_goes_on_with_another_number_of_processes(files, tmp_path):
    """Two steps on two processes, three more on one, against five on one without DeepSpeed."""
    pairs = [{"prompt": f"宝可梦{i}的属性", "response": "草属性" * (i % 3 + 1)} for i in range(16)]
    data, output = tmp_path / "pairs.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    script = [REPOSITORY / "scripts" / "finetune_ds.sh", *SCRIPT[1:]]
    for processes, accumulated, steps in ((2, 2, 2), (1, 4, 5)):
        knobs = script_knobs(files, output, DATASET_PATH=data, NUM_GPUS=processes, MAX_STEP=steps, SAVE_INTERVAL=2)
        knobs["GRAD_ACCUMULATION_STEPS"] = str(accumulated)
        run = subprocess.run(
            script, env=knobs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
        )
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    whole = options(1, "full", max_steps=5, train_format="input-output", max_source_length=1024, max_target_length=128)
    assert train(files.model, data, tmp_path / "whole", **whole) == 0
    assert len(losses(output)) == 5
    assert losses(output) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert_close(load_file(output / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors"))


@pytest.mark.thorough
def test_two_nodes_give_the_losses_of_one_process(runs, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    knobs = {"NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NUM_GPUS": 1, "MAX_STEP": STEPS}
    nodes = [
        subprocess.Popen(
            SCRIPT,
            env=script_knobs(
                runs, tmp_path / "out", NODE_RANK=rank, DEEPSPEED_CONFIG="ds_zero3", SAVE_INTERVAL=2, **knobs
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed[0][-3000:] + printed[1][-3000:]
    assert losses(tmp_path / "out") == pytest.approx(losses(runs.folder / "one" / "full"), rel=1e-4)
    assert_close(load_file(tmp_path / "out" / "model.safetensors"), runs.trained("one/full"))
    assert {"train.log", "train-node1.log", "checkpoint-2", "checkpoint-4"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


def workers_of(launcher: int) -> list[int]:
    """Processes of torchrun that train, below a process."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(pid)
    found, waiting = [], [launcher]
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"finetune.py" in command and b"torchrun" not in command:
            found.append(pid)
    return sorted(pid for pid in found if not children.get(pid) or pid != launcher)


def test_a_killed_rank_ends_the_run_which_then_goes_on(files, tmp_path):
    steps, output = 20, tmp_path / "out"
    knobs = script_knobs(files, output, NUM_GPUS=2, MAX_STEP=steps, SAVE_INTERVAL=5)
    run = subprocess.Popen(SCRIPT, env=knobs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 300
    while not (output / "checkpoint-5").is_dir():
        assert run.poll() is None and time.monotonic() < end, run.communicate()[0][-3000:]
        time.sleep(0.01)
    os.kill(workers_of(run.pid)[-1], signal.SIGKILL)
    killed = time.monotonic()
    printed = run.communicate(timeout=120)[0]
    assert run.returncode != 0
    assert time.monotonic() - killed < 60
    assert "SIGKILL" in printed
    checkpoint = find_last_checkpoint(output)
    assert f"OUTPUT_DIR={output} continues from {checkpoint.name}" in printed
    subprocess.run(SCRIPT, env=knobs, check=True, capture_output=True, timeout=300)
    whole = options(1, "full", max_steps=steps, save_steps=100)
    assert train(files.model, files.data, tmp_path / "whole", **whole) == 0
    assert losses(output) == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}


@pytest.mark.thorough
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["ds_zero2", "ds_zero2_offload", "ds_zero3", "ds_zero3_offload"])
def test_configurations_take_their_precision_from_the_flags(files, tmp_path, name, precision):
    """--bf16 and --fp16 decide; "auto" stands for them."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers import TrainingArguments
    from transformers.integrations import HfTrainerDeepSpeedConfig

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    args.bf16, args.fp16 = precision == "bf16", precision == "fp16"
    model = load_model(files.model)  # before a configuration of ZeRO-3 is there, which would share it out
    hf_config = HfTrainerDeepSpeedConfig(str(CONFIGS / f"{name}.json"))
    hf_config.trainer_config_process(args)
    hf_config.trainer_config_finalize(args, model, 10)
    config = DeepSpeedConfig(hf_config.config)
    assert "auto" not in json.dumps(hf_config.config)
    assert (config.bfloat16_config.enabled, config.float16_config.enabled) == (args.bf16, args.fp16)
    assert hf_config.dtype() == PRECISIONS[precision]
    zero = config.zero_config
    assert zero.stage == int(name[7])
    assert (zero.offload_optimizer is not None) == name.endswith("offload")
    assert (zero.offload_param is not None) == (name == "ds_zero3_offload")


@pytest.mark.thorough
def test_four_ranks_load_one_copy(tmp_path):
    """Each keeps its quarter, and holds one whole parameter at a time beside it."""
    config = ChatGLM3Config(
        num_layers=12,
        padded_vocab_size=4096,
        hidden_size=512,
        ffn_hidden_size=1408,
        kv_channels=64,
        num_attention_heads=8,
        multi_query_group_num=2,
    )
    model = ChatGLM3ForCausalLM(config)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    command += [REPOSITORY / "tests" / "measure_loading.py", tmp_path / "model", CONFIGS / "ds_zero3.json"]
    # Freed memory goes back at once, and does not count.
    knobs = environment(MALLOC_MMAP_THRESHOLD_=65536)
    run = subprocess.run(command, env=knobs, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"rank"')]
    assert len(ranks) == 4
    assert sum(rank["kept_bytes"] for rank in ranks) == pytest.approx(size, rel=0.01)
    assert all(rank["peak_bytes"] < 0.5 * size for rank in ranks)
    assert sum(rank["peak_bytes"] for rank in ranks) < 2 * size


def test_locks_of_builds_that_were_killed_are_removed(tmp_path, monkeypatch, caplog):
    """DeepSpeed waits for them forever; those that a process holds stay, and young ones where other nodes may build."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def make_lock(name: str, age: float = 5) -> Path:
        lock = tmp_path / "py311_cpu" / name / "lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
        return lock

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    old, young, built = make_lock("old", LONGEST_BUILD + 60), make_lock("young"), make_lock("built", 10**6)
    with built.open():
        remove_stale_locks()
        assert (old.exists(), young.exists(), built.exists()) == (False, True, True)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        remove_stale_locks()
    assert (young.exists(), built.exists()) == (False, True)
    assert f"removed {young}: no process holds it" in caplog.text and str(built) not in caplog.text

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=r"it cannot be removed .read-only.: remove it, or name another folder"):
        remove_stale_locks()


# Pickles in checkpoints


class Evil:
    """Pickled, it writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def plant(file: Path, mark: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module": {"weight": torch.zeros(2)}, "ds_version": Evil(mark)}, file)


@pytest.mark.parametrize(
    "name",
    [
        "global_step2/mp_rank_00_model_states.pt",
        "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "universal/zero/weight/fp32.pt",
    ],
)
def test_a_planted_pickle_is_refused_unread(name, tmp_path):
    (tmp_path / "latest").write_text("global_step2")
    plant(tmp_path / name, tmp_path / "mark")
    with pytest.raises(UserError, match=r"holds more than data \(posix\.system\).*--trust_checkpoint True") as told:
        check_pickles(tmp_path)
    assert str(tmp_path / name) in str(told.value) and "weights_only" not in str(told.value)
    assert not (tmp_path / "mark").exists()
    check_pickles(tmp_path, is_trusted=True)
    torch.save({"module": {"weight": torch.zeros(2)}, "step": 2}, tmp_path / name)
    check_pickles(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps({"step": 2}))  # not as torch writes: DeepSpeed would unpickle it
    with pytest.raises(UserError, match="cannot be read as data"):
        check_pickles(tmp_path)


class CallsGetattr:
    """Pickled, it is a call of getattr, as members of enumerations are under Python 3.11.0 to 3.11.3."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self):
        from deepspeed.runtime.zero.config import ZeroStageEnum

        return getattr, (ZeroStageEnum, self.name)


def test_of_getattr_only_members_of_enumerations_are_data(tmp_path):
    file = tmp_path / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    file.parent.mkdir()
    torch.save({"zero_stage": CallsGetattr("gradients")}, file)
    check_pickles(tmp_path)
    torch.save({"zero_stage": CallsGetattr("__init__")}, file)
    with pytest.raises(UserError, match=r"holds more than data \(builtins\.getattr\)"):
        check_pickles(tmp_path)


@pytest.mark.parametrize("tag", ["../elsewhere", "/elsewhere", "global_step2/../../elsewhere"])
def test_a_tag_that_leads_out_of_the_checkpoint_is_refused(tag, tmp_path):
    (tmp_path / "latest").write_text(tag)
    with pytest.raises(UserError, match="leads out of the checkpoint"):
        check_pickles(tmp_path)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_does_not_go_on_from_a_planted_pickle(runs, tmp_path, processes):
    """Neither DeepSpeed nor the conversion for another number of processes opens it."""
    output = runs.copy_until(2, "zero2/ptuning", f"planted{processes}")
    checkpoint = output / "checkpoint-2"
    plant(next(checkpoint.glob("global_step2/*model_states.pt")), tmp_path / "mark")
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for name in manifest["files"]:  # as whoever plants it would write it
        manifest["files"][name] = (checkpoint / name).stat().st_size
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    given = options(processes, "ptuning", "zero2", resume_from_checkpoint=True)
    with pytest.raises(AssertionError, match=r"holds more than data \(posix\.system\)"):
        launch(processes, [runs.command(output, given)], tmp_path)
    assert not (tmp_path / "mark").exists()
    assert not (checkpoint / "universal").exists()
