"""`run_manifest.json`: what a run was made of, so that it can be made again; and the check that it would be the same.

    python finetune_chatmodel_demo/finetune.py --replay output/pokemon/run_manifest.json

The manifest has the options, the effective settings, sizes of the data and of the base model's small files, versions,
the state of git, and a hash of the rows of each of the first steps (with ppo: of the prompts of each of the first
rollouts). Files up to 64 MiB are hashed; of a larger one the size and the time of its last change say that it is the
same. `--replay` reads the data again with the same options and compares; no weights are read and nothing is trained.
"""

import hashlib
import itertools
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import hash_file
from finetune_chatmodel_demo.conversation.data_arguments import DataArguments
from finetune_chatmodel_demo.conversation.packing import GroupedRows
from finetune_chatmodel_demo.conversation.registry import choose_entries, find_dataset_dir, read_registry
from finetune_chatmodel_demo.conversation.stage_data import build_stage_data
from finetune_chatmodel_demo.training.arguments import MethodArguments, ModelArguments, StageArguments
from finetune_chatmodel_demo.training.base_model import load_base_tokenizer
from finetune_chatmodel_demo.training.deciding import decide_settings
from finetune_chatmodel_demo.training.sampling import order_rows
from finetune_chatmodel_demo.training.settings import Settings

RUN_MANIFEST = "run_manifest.json"
CONSENT = "allow_dataset_scripts"
FIRST_STEPS = 8
HASHED_BYTES = 2**26  # a tenth of a second
# Options that say where things lie and how long it takes: another value is no other model, data or method.
PLACES = {"train_file", "validation_file", "dataset_dir", "tokenized_cache", "preprocessing_num_workers"}
DECISIVE = (ModelArguments, MethodArguments, StageArguments, DataArguments)
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes", "numpy")
# Files of a base model that decide its shape and its tokens, and are small enough to be hashed each time.
MODEL_FILES = ("config.json", "tokenizer.model", "tokenizer_config.json", "model.safetensors.index.json")


def describe_run(settings: Settings, train_rows: Any) -> dict[str, Any]:
    """The manifest of a run; every value can be written as JSON."""
    args = settings.training
    return {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in settings.given.items()},
        "method": settings.method,
        "stage": settings.stage.stage,
        "effective": {
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "warmup_steps": args.warmup_steps,
            "max_steps": args.max_steps,
            "num_train_epochs": args.num_train_epochs,
            "rows_of_a_step": rows_of_a_step(settings),
            "processes": args.world_size,
            "precision": settings.precision,
            "seed": args.seed,
        },
        "data": describe_data(settings.data),
        "model": _describe_files(_files_of_model(Path(settings.model.model_name_or_path))),
        "first_steps": hash_first_steps(settings, train_rows),
        "versions": describe_versions(),
        "git": describe_git(),
        "command": sys.argv,
    }


def rows_of_a_step(settings: Settings) -> int:
    """Rows (with --packing: groups of them) of one optimizer step, over all processes."""
    args = settings.training
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def hash_first_steps(settings: Settings, rows: Any, steps: int = FIRST_STEPS) -> list[str]:
    """SHA-256 of the rows of each of the first steps, ids and labels, in their order."""
    size = rows_of_a_step(settings) * (settings.stage.ppo_buffer_size if settings.stage.stage == "ppo" else 1)
    items = itertools.islice(_iterate_rows(settings, rows), steps * size)
    return [
        hashlib.sha256(json.dumps(batch).encode()).hexdigest()
        for batch in iter(lambda: list(itertools.islice(items, size)), [])
    ]


def _iterate_rows(settings: Settings, rows: Any) -> Iterator[Any]:
    """Rows in the order of the first pass."""
    if isinstance(rows, IterableDataset):
        rows.set_epoch(0)
        yield from rows
        return
    args = settings.training
    if settings.stage.stage == "ppo":
        from finetune_chatmodel_demo.training.stages.ppo_rollouts import order_of_prompts

        seed = args.seed if args.data_seed is None else args.data_seed
        rollout = rows_of_a_step(settings) * settings.stage.ppo_buffer_size
        for start in itertools.count(step=rollout):
            yield from (rows[index] for index in order_of_prompts(len(rows), start, rollout, seed))
    if settings.data.packing:
        rows = GroupedRows(rows, settings.data.max_seq_length, args.seed)
    order = order_rows(rows.lengths, args)
    for index in range(len(rows)) if order is None else order:
        yield rows[index]


def describe_data(data: DataArguments) -> list[dict[str, Any]]:
    """The data files; data sets that are not files by their address."""
    files = [Path(path) for path in (data.train_file, data.validation_file) if path]
    found: list[dict[str, Any]] = []
    if data.dataset or data.eval_dataset:
        folder = find_dataset_dir(data.dataset_dir)
        files.append(folder / "dataset_info.json")
        names = ",".join(filter(None, (data.dataset, data.eval_dataset)))
        for entry in choose_entries(read_registry(folder), names):
            if entry.origin == "file":
                path = folder / str(entry.file_name)
                files += sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
            else:
                address = entry.hf_hub_url or entry.ms_hub_url or entry.script_url
                found.append({"path": address, "origin": entry.origin})
    return _describe_files(dict.fromkeys(files)) + found


def _describe_files(paths: Iterable[Path]) -> list[dict[str, Any]]:
    return [
        {"path": str(path), "bytes": (found := path.stat()).st_size}
        | ({"sha256": hash_file(path)} if found.st_size <= HASHED_BYTES else {"modified": found.st_mtime_ns})
        for path in paths
    ]


def _files_of_model(folder: Path) -> list[Path]:
    return [folder / name for name in MODEL_FILES if (folder / name).is_file()]


def describe_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a run; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def describe_git() -> dict[str, Any] | None:
    """Commit of this code, and whether files differ from it; None where this is no git checkout."""
    folder = str(Path(__file__).resolve().parent)
    commands = {"commit": ["rev-parse", "HEAD"], "changed": ["status", "--porcelain", "--untracked-files=no"]}
    found = {}
    for name, command in commands.items():
        try:
            finished = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if finished.returncode:
            return None
        found[name] = finished.stdout.strip()
    return {"commit": found["commit"], "has_changes": bool(found["changed"])}


def replay(path: str | Path, given: dict[str, Any]) -> list[str]:
    """Makes the first steps of a run again and compares.

    Args:
        path: a `run_manifest.json`.
        given: the options of this command line. Consent to run a data set's program comes from here alone: whoever
            wrote the manifest cannot give it.

    Returns:
        What differs, one line each; empty: the first steps are identical.

    Raises:
        UserError: the manifest cannot be read, or the run could not start any more.
    """
    manifest = read_run_manifest(path)
    options = {name: value for name, value in manifest["options"].items() if name != CONSENT} | {
        name: value for name, value in given.items() if name == CONSENT
    }
    settings = decide_settings(options | {"overwrite_output_dir": True})
    tokenizer = load_base_tokenizer(settings.model.model_name_or_path)
    data = build_stage_data(settings.data, settings.stage.stage, tokenizer, settings.training.seed)
    return compare_runs(manifest, describe_run(settings, data.train))


def read_run_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest in a file, or in the folder of a run.

    Raises:
        UserError: when there is none.
    """
    path = Path(path) / RUN_MANIFEST if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"--replay {path}: no such file; give the --output_dir of a run that has trained")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["options"], manifest["first_steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--replay {path}: no manifest of a run can be read there ({error!r})") from error
    return manifest


def compare_runs(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two manifests and can change a run, one line each."""
    lines = []
    for step, (old, new) in enumerate(itertools.zip_longest(before["first_steps"], now["first_steps"]), 1):
        if old != new:
            lines.append(f"the rows of step {step} differ (the first of {len(before['first_steps'])} compared that do)")
            break
    for part in ("data", "model"):
        old, new = ({each["path"]: each for each in run[part]} for run in (before, now))
        lines += [f"{part}: {path} has changed" for path in old if path in new and _differ(old[path], new[path])]
        lines += [f"{part}: {path} is not read any more" for path in old if path not in new]
        lines += [f"{part}: {path} is new" for path in new if path not in old]
    for part in ("effective", "versions"):
        old, new = before.get(part) or {}, now.get(part) or {}
        lines += [f"{name} was {old.get(name)}, is {new[name]}" for name in new if old.get(name) != new[name]]
    return lines


def _differ(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two descriptions are of different files: by what both of them say."""
    return any(old[name] != new[name] for name in ("bytes", "sha256", "modified") if name in old and name in new)


def find_other_content(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes a run train something else: other data, another model or method, wherever the files lie.

    Args:
        before: the manifest of a run.
        now: that of another one.

    Returns:
        One line for each difference.
    """
    lines = []
    for part in ("data", "model"):
        old, new = before.get(part, ()), now[part]
        if len(old) != len(new) or any(_differ(*pair) for pair in zip(old, new)):
            lines.append(f"{part}: was {_name_files(old)}, is {_name_files(new)}")
    known, given = before["options"], now["options"]
    names = sorted({entry.name for kind in DECISIVE for entry in fields(kind)} - PLACES - {CONSENT})
    for name in names:
        old, new = (_follow(name, options.get(name)) for options in (known, given))
        if old != new:
            lines.append(f"--{name} was {old}, is {new}")
    return lines


def _name_files(files: Iterable[dict[str, Any]]) -> str:
    return ", ".join(f"{each['path']} ({each.get('bytes', '?')} bytes)" for each in files)


def _follow(name: str, value: Any) -> Any:
    """An option's value; a folder by its absolute path, however it was named."""
    is_folder = name.endswith(("path", "checkpoint", "model")) and value is not None and Path(str(value)).exists()
    return str(Path(str(value)).resolve()) if is_folder else value
