"""Runs that survive: SIGTERM, SIGKILL at random moments, full disks; and run_manifest.json with --replay."""

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from training_helpers import decide, flags, losses, train

from finetune_chatmodel_demo import finetune
from finetune_chatmodel_demo.chatglm3 import load_tokenizer
from finetune_chatmodel_demo.common import files
from finetune_chatmodel_demo.conversation.stage_data import build_stage_data
from finetune_chatmodel_demo.training import checkpoints, manifest, trainer
from finetune_chatmodel_demo.training.manifest import RUN_MANIFEST
from finetune_chatmodel_demo.training.stages import ppo

STEPS, SAVE_STEPS = 120, 10

pytestmark = pytest.mark.usefixtures("no_pictures")


def weights(folder: Path) -> torch.Tensor:
    return load_file(folder / "prefix_encoder.safetensors")["embedding.weight"]


# SIGTERM


def signal_at(step: int, monkeypatch, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal in the middle of a step."""
    original, calls = trainer.RunTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.RunTrainer, "training_step", training_step)


def test_sigterm_saves_and_ends_and_the_run_goes_on(model, data, tmp_path, monkeypatch, capsys):
    options = {"pre_seq_len": 4, "max_steps": 9, "save_steps": 100}
    assert train(model, data, tmp_path / "whole", **options) == 0
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        signal_at(5, patch)
        assert train(model, data, tmp_path / "o", **options) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopped by SIGTERM after step 5" in capsys.readouterr().err
    assert checkpoints.find_last_checkpoint(tmp_path / "o").name == "checkpoint-5"
    assert not (tmp_path / "o" / "prefix_encoder.safetensors").exists()  # no result: the run is not at its end
    assert train(model, data, tmp_path / "o", resume_from_checkpoint=True, **options) == 0
    assert torch.equal(weights(tmp_path / "o"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "o") == losses(tmp_path / "whole")


# SIGKILL


def run_in_child(argv: list[str], printed: Path) -> None:
    os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    os._exit(finetune.main(argv))


@pytest.mark.parametrize("wanted", [6, pytest.param(20, marks=pytest.mark.thorough)])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked from a server, so that they start at once")
def test_kills_at_random_moments_lose_at_most_one_save_interval(wanted, model, data, tmp_path):
    """Kills fall where they fall: in steps, while a checkpoint is written, while old ones are removed."""
    draw = random.Random(7)
    options = {"pre_seq_len": 4, "max_steps": STEPS, "save_steps": SAVE_STEPS, "save_total_limit": 3}
    options |= {"resume_from_checkpoint": True, "plot_loss": False}
    context, printed = multiprocessing.get_context("forkserver"), tmp_path / "printed"
    context.set_forkserver_preload(["finetune_chatmodel_demo.training.workflow", "finetune_chatmodel_demo.finetune"])
    first = context.Process(target=time.sleep, args=(0,))  # starts the server, which imports everything
    first.start()
    first.join()
    whole = context.Process(target=run_in_child, args=(flags(model, data, tmp_path / "whole", **options), printed))
    started = time.monotonic()
    whole.start()
    whole.join()
    assert whole.exitcode == 0, printed.read_text()[-3000:]
    seconds = time.monotonic() - started
    killed, kills, reached = tmp_path / "killed", 0, 0
    for _ in range(80):
        child = context.Process(target=run_in_child, args=(flags(model, data, killed, **options), printed))
        child.start()
        child.join(timeout=draw.uniform(0.2, 0.7) * seconds)
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        else:
            seconds *= 0.9  # it was faster than the first one
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL), printed.read_text()[-3000:]
        newest, before = checkpoints.find_last_checkpoint(killed), reached
        reached = json.loads((newest / checkpoints.MANIFEST).read_text())["step"] if newest else 0
        assert reached >= before  # nothing that was saved is lost
        log = killed / "trainer_log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        assert max((json.loads(line)["current_steps"] for line in lines), default=0) - reached <= SAVE_STEPS
        if kills == wanted:
            break
        if reached > STEPS / 2:  # start anew, so that kills find a run at work
            shutil.rmtree(killed)
            reached = 0
    assert kills == wanted
    last = context.Process(target=run_in_child, args=(flags(model, data, killed, **options), printed))
    last.start()
    last.join()
    assert last.exitcode == 0, printed.read_text()[-3000:]
    assert torch.equal(weights(killed), weights(tmp_path / "whole"))
    assert losses(killed) == losses(tmp_path / "whole")
    assert not list(killed.glob(f"{files.PARTIAL_PREFIX}*"))


# Disks


def test_a_full_disk_leaves_nothing_half_written(model, data, tmp_path, monkeypatch, capsys):
    options = {"pre_seq_len": 4, "max_steps": 6, "save_steps": 2}
    original, calls = files.flush, []

    def flush(path):
        calls.append(path)
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "flush", flush)
        assert train(model, data, tmp_path / "o", **options) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "make room" in error
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "o")] == ["checkpoint-2"]
    assert not list((tmp_path / "o").glob(f"{files.PARTIAL_PREFIX}*"))
    assert train(model, data, tmp_path / "o", resume_from_checkpoint=True, **options) == 0


@pytest.mark.parametrize("kilobytes", [40, 120, 200, 260])
def test_a_disk_that_is_really_full(model, data, tmp_path, kilobytes):
    """Whatever is being written when it is full: one line with a remedy, nothing unfinished, and a way to go on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        options = {"pre_seq_len": 32, "max_steps": 6, "save_steps": 1, "plot_loss": kilobytes < 100}
        printed = tmp_path / "printed"
        with printed.open("w") as errors, contextlib.redirect_stderr(errors):
            assert train(model, data, disk / "o", **options) == 2
        error = printed.read_text()
        assert "No space left on device" in error and "make room" in error
        assert "Traceback" not in error and "weights_only" not in error
        assert [path.name for path in disk.rglob("*") if path.name.startswith(files.PARTIAL_PREFIX)] == []
        whole = checkpoints.list_checkpoints(disk / "o")
        assert all(checkpoints.read_whole_checkpoint(folder) for folder in whole)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_what_a_dead_run_left_is_removed_at_the_next_start(model, data, tmp_path):
    (tmp_path / "o" / ".partial-checkpoint-3").mkdir(parents=True)
    (tmp_path / "o" / ".partial-checkpoint-3" / "optimizer.pt").write_bytes(b"x")
    (tmp_path / "o" / ".partial-run_manifest.json").write_text("{")
    (tmp_path / "o" / files.LOCK_FILE).write_text("process 1 on nowhere")
    assert train(model, data, tmp_path / "o", pre_seq_len=4, max_steps=1) == 0
    assert [path.name for path in (tmp_path / "o").iterdir() if path.name.startswith(".")] == []


def test_a_symbolic_link_among_the_checkpoints_goes_and_what_it_names_stays(model, data, tmp_path):
    options = {"pre_seq_len": 4, "save_steps": 1, "resume_from_checkpoint": True}
    assert train(model, data, tmp_path / "o", max_steps=2, **options) == 0
    (tmp_path / "o" / "checkpoint-1").rename(tmp_path / "elsewhere")
    (tmp_path / "o" / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    assert train(model, data, tmp_path / "o", max_steps=4, save_total_limit=2, **options) == 0
    names = [path.name for path in checkpoints.list_checkpoints(tmp_path / "o")]
    assert names == ["checkpoint-3", "checkpoint-4"]
    assert checkpoints.read_whole_checkpoint(tmp_path / "elsewhere")["step"] == 1


# Two runs


HOLD = """
import sys
from pathlib import Path
from finetune_chatmodel_demo.common.files import hold_folder
with hold_folder(Path(sys.argv[1]), "--output_dir"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(model, data, tmp_path, capsys):
    output = tmp_path / "o"
    command = [sys.executable, "-c", HOLD, output]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        assert train(model, data, output, pre_seq_len=4) == 2
        error = capsys.readouterr().err
        assert f"--output_dir {output} is in use" in error and f"process {first.pid} on" in error
        assert [path.name for path in output.iterdir()] == [files.LOCK_FILE]
        first.kill()
        first.wait()
    assert train(model, data, output, pre_seq_len=4, max_steps=1) == 0  # a dead process holds nothing
    assert not (output / files.LOCK_FILE).exists()


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), files.hold_folder(tmp_path / "a" / "o", "--output_dir"):
        raise ZeroDivisionError
    assert not (tmp_path / "a" / "o").exists()


def test_an_output_folder_that_cannot_be_written_to_is_refused_at_once(model, data, tmp_path, monkeypatch, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert train(model, data, blocked / "o", pre_seq_len=4) == 2
    assert f"cannot be written to: {blocked} is no folder" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    assert train(model, data, tmp_path / "a" / "b", pre_seq_len=4) == 2
    assert f"cannot be written to: {tmp_path} is read-only" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


# The manifest


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "o"
    assert train(model, data, folder, pre_seq_len=4, max_steps=10, gradient_accumulation_steps=2) == 0
    return folder


def test_the_manifest_says_what_a_run_was_made_of(finished, model, data):
    manifest = json.loads((finished / RUN_MANIFEST).read_text(encoding="utf-8"))
    assert manifest["options"]["max_steps"] == 10
    assert manifest["effective"]["rows_of_a_step"] == 4
    assert manifest["effective"]["learning_rate"] == 2e-2
    assert manifest["data"] == [{"path": str(data), "bytes": data.stat().st_size, "sha256": files.hash_file(data)}]
    assert [Path(each["path"]).name for each in manifest["model"]][:2] == ["config.json", "tokenizer.model"]
    assert len(manifest["first_steps"]) == 6  # 24 rows, 4 a step
    assert len(set(manifest["first_steps"])) == 6
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["git"] or {"commit", "has_changes"}) == {"commit", "has_changes"}


def test_the_first_steps_are_those_that_were_trained(finished, model, data, tmp_path, monkeypatch):
    """The hashes come from the order alone; here they are compared with the batches of a real run."""
    seen = []
    original = trainer.RunTrainer.training_step

    def training_step(self, model, inputs, *args):
        seen.append(inputs["row_index"].tolist())
        return original(self, model, inputs, *args)

    monkeypatch.setattr(trainer.RunTrainer, "training_step", training_step)
    assert train(model, data, tmp_path / "o", pre_seq_len=4, max_steps=6, gradient_accumulation_steps=2) == 0
    from finetune_chatmodel_demo.training.sampling import LengthGroupedBatches

    rows = [row for batch in seen for row in batch]
    assert sorted(rows) == list(range(24))
    from finetune_chatmodel_demo.training.command_line import parse_given
    from finetune_chatmodel_demo.training.deciding import decide_settings

    given = flags(model, data, tmp_path / "x", pre_seq_len=4, max_steps=6, gradient_accumulation_steps=2)
    settings = decide_settings(*parse_given(given))
    lengths = build_stage_data(settings.data, "sft", load_tokenizer(model), 3).train.lengths
    assert rows == list(LengthGroupedBatches(lengths, 2, 3))


def test_a_replay_finds_the_same_first_steps(finished, capsys):
    assert finetune.main(["--replay", str(finished)]) == 0
    assert "the first steps are identical" in capsys.readouterr().out


def test_a_replay_names_what_has_changed(finished, data, tmp_path, capsys):
    manifest = json.loads((finished / RUN_MANIFEST).read_text(encoding="utf-8"))
    changed = tmp_path / "train.jsonl"
    changed.write_text(data.read_text(encoding="utf-8").replace("皮卡丘", "雷丘"), encoding="utf-8")
    manifest["options"] |= {"train_file": str(changed), "learning_rate": 1e-2}
    manifest["data"][0]["path"] = str(changed)
    (tmp_path / "m.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert finetune.main(["--replay", str(tmp_path / "m.json")]) == 1
    printed = capsys.readouterr().out
    assert "the rows of step 1 differ" in printed
    assert f"data: {changed} has changed" in printed
    assert "learning_rate was 0.02, is 0.01" in printed


def test_a_missing_manifest_is_explained(tmp_path, capsys):
    path = tmp_path / "nothing.json"
    assert finetune.main(["--replay", str(path)]) == 2
    expected = f"error: --replay {path}: no such file; give the --output_dir of a run that has trained\n"
    assert capsys.readouterr().err.endswith(expected)  # and nothing about flags that a replay does without
    path.write_text("{}")
    assert finetune.main(["--replay", str(path)]) == 2
    assert "no manifest of a run can be read there" in capsys.readouterr().err


def test_a_large_file_is_told_by_size_and_time(finished, data, tmp_path, monkeypatch, capsys):
    """Hashing it would keep a start waiting; a hash that is there is compared all the same."""
    monkeypatch.setattr(manifest, "HASHED_BYTES", 100)
    copy = tmp_path / "train.jsonl"
    shutil.copy(data, copy)
    (found,) = manifest._describe_files([copy])
    assert found == {"path": str(copy), "bytes": copy.stat().st_size, "modified": copy.stat().st_mtime_ns}
    os.utime(copy, ns=(0, 0))
    assert manifest._differ(found, manifest._describe_files([copy])[0])
    assert finetune.main(["--replay", str(finished)]) == 0


def test_a_replay_of_ppo_compares_the_prompts_of_its_rollouts(model, data, tmp_path, monkeypatch, capsys):
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def length(prompts, replies):\n    return [len(reply) for reply in replies]\n")
    options = {"stage": "ppo", "finetuning_type": "lora", "reward_function": f"{rewards}:length", "train_format": None}
    options |= {"max_new_tokens": 2, "ppo_epochs": 1, "ppo_buffer_size": 2, "max_steps": 6, "plot_loss": False}
    seen = []
    collect = ppo.Collector.collect

    def collecting(self, prompts, rows):
        seen.append(prompts)
        return collect(self, prompts, rows)

    monkeypatch.setattr(ppo.Collector, "collect", collecting)
    assert train(model, data, tmp_path / "o", **options) == 0
    assert [len(prompts) for prompts in seen] == [4, 4, 4]
    settings = decide(model, data, tmp_path / "x", **options)
    rows = build_stage_data(settings.data, "ppo", load_tokenizer(model), settings.training.seed).train
    hashed = [row["input_ids"] for row in itertools.islice(manifest._iterate_rows(settings, rows), 12)]
    assert hashed == [prompt for prompts in seen for prompt in prompts]
    assert finetune.main(["--replay", str(tmp_path / "o")]) == 0


def test_a_replay_takes_no_consent_from_the_manifest(finished, tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    ran = tmp_path / "ran"
    (tmp_path / "rows" / "rows.py").write_text(f"open({str(ran)!r}, 'w')\n", encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"script_url": "rows"}}), encoding="utf-8")
    written = json.loads((finished / RUN_MANIFEST).read_text(encoding="utf-8"))
    del written["options"]["train_file"]
    written["options"] |= {"dataset_dir": str(tmp_path), "dataset": "x", "allow_dataset_scripts": True}
    (tmp_path / "m.json").write_text(json.dumps(written), encoding="utf-8")
    assert finetune.main(["--replay", str(tmp_path / "m.json")]) == 2
    assert "--allow_dataset_scripts" in capsys.readouterr().err
    assert not ran.exists()
    finetune.main(["--replay", str(tmp_path / "m.json"), "--allow_dataset_scripts", "True"])
    assert ran.exists()


# A run that is at its end


def test_a_finished_run_with_other_content_is_refused(finished, model, data, tmp_path, capsys):
    """As scripts start it, with --resume_from_checkpoint True: nothing would be trained, and the old result stay."""
    again = {"max_steps": 10, "gradient_accumulation_steps": 2, "resume_from_checkpoint": True}
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text(encoding="utf-8").replace("皮卡丘", "雷丘"), encoding="utf-8")
    moved = tmp_path / "moved.jsonl"
    shutil.copy(data, moved)
    base = tmp_path / "base"
    shutil.copytree(model, base)
    before = weights(finished), (finished / RUN_MANIFEST).read_bytes()
    for files_of_run, options, fact in (
        ((model, other), {}, f"data: was {data} "),
        ((base, data), {}, f"--model_name_or_path was {model.resolve()}, is {base}"),
        ((model, data), {"max_seq_length": 50}, "--max_seq_length was None, is 50"),
        ((model, data), {"prefix_dropout": 0.5}, "--prefix_dropout was None, is 0.5"),
    ):
        assert train(*files_of_run, finished, pre_seq_len=4, **again, **options) == 2
        error = capsys.readouterr().err
        assert fact in error and str(finished) in error and "--overwrite_output_dir" in error
    assert torch.equal(weights(finished), before[0]) and (finished / RUN_MANIFEST).read_bytes() == before[1]
    for same in (data, moved):
        assert train(model, same, finished, pre_seq_len=4, **again) == 0
        assert "finished" in capsys.readouterr().out


def test_settings_are_not_written_through_a_link(model, data, tmp_path):
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text("mine")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "settings.json").symlink_to(elsewhere)
    (tmp_path / "o" / RUN_MANIFEST).symlink_to(elsewhere)
    assert train(model, data, tmp_path / "o", pre_seq_len=4, max_steps=1) == 0
    assert elsewhere.read_text() == "mine"
    assert json.loads((tmp_path / "o" / "settings.json").read_text(encoding="utf-8"))["max_steps"] == 1
