"""Checkpoints that are whole or not there: written beside, flushed to disk, then renamed.

`checkpoint-500` is first written as `.partial-checkpoint-500`. A manifest of all files is written last; a folder whose
files disagree with it (a full disk, a lost power supply, a bad copy) is not resumed from. Of each file it has the size,
and the SHA-256 up to 64 MiB, which is all of a prefix's or an adapter's checkpoint. Larger files would be hashed while
all processes wait (93 GiB of the 6B model on four GPUs), so of these there is found

    always               that they are missing, cut or too long, or that a safetensors header does not fit
    --hash_checkpoints   every bit that differs: hashed when they are written, and compared when a run goes on
"""

import errno
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import (
    hash_file,
    partial_path,
    publish_folder,
    remove_leftovers,
    remove_tree,
    write_json,
)

MANIFEST = "checkpoint_manifest.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
HASHED_BYTES = 2**26
# What torch and safetensors say of a disk that takes no more, in place of an OSError.
FAILED_WRITES = ("inline_container", "PytorchStreamWriter", "No space left", "os error 28")

logger = logging.getLogger(__name__)


def start_partial(folder: Path) -> Path:
    """Returns the empty partial folder of `folder`; leftovers of a killed run are removed."""
    partial = partial_path(folder)
    remove_tree(partial)
    partial.mkdir(parents=True)
    return partial


def publish_checkpoint(folder: Path, content: dict[str, object], hash_all: bool = False) -> None:
    """Writes the manifest of the partial folder, flushes all of it to disk and gives it its name.

    Args:
        folder: the final name; an older folder of this name is replaced.
        content: what else the manifest shall say (the run's settings).
        hash_all: hashes large files too.
    """
    partial = partial_path(folder)
    found = {}
    for path in sorted(path for path in partial.rglob("*") if path.is_file()):
        entry: dict[str, object] = {"bytes": path.stat().st_size}
        if hash_all or path.stat().st_size <= HASHED_BYTES:
            entry["sha256"] = hash_file(path)
        found[path.relative_to(partial).as_posix()] = entry
    write_json(partial / MANIFEST, {**content, "files": found})
    publish_folder(partial, folder)


@contextmanager
def nothing_half_written(output_dir: str | Path, is_cleaned: bool = True) -> Iterator[None]:
    """When what is written in this context fails, it is removed; a full disk is an `OSError` whoever finds it full.

    Args:
        output_dir: where something is being written.
        is_cleaned: False in processes that leave the removal to another one.

    Raises:
        OSError: with ENOSPC where torch or safetensors could not write.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_cleaned:
            remove_leftovers(Path(output_dir))
        if not isinstance(error, OSError) and any(words in str(error) for words in FAILED_WRITES):
            raise OSError(errno.ENOSPC, "No space left on device", str(output_dir)) from error
        raise


def read_manifest(folder: str | Path) -> dict[str, object]:
    """Returns the manifest of a checkpoint, whose files are not looked at.

    Raises:
        UserError: when there is none; the message says why.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the checkpoint {folder} does not exist")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"the checkpoint {folder} has no {MANIFEST}: it was not finished, or not written here")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error!r}") from error
    return manifest


def read_whole_checkpoint(folder: str | Path, hash_all: bool = False) -> dict[str, object]:
    """Returns the manifest of a checkpoint after comparing its files with it.

    Args:
        folder: the checkpoint.
        hash_all: compares the hashes of large files too, where the manifest has them.

    Raises:
        UserError: when the checkpoint is not whole; the message says why.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    for name, entry in manifest["files"].items():
        # The first versions of this project wrote sizes alone.
        expected = {"bytes": entry} if isinstance(entry, int) else entry
        if problem := _find_damage(folder / name, expected, hash_all):
            raise UserError(f"the checkpoint {folder} is damaged: {name} {problem}")
    return manifest


def _find_damage(path: Path, expected: dict[str, object], hash_all: bool) -> str | None:
    size = expected["bytes"]
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        return f"{'is missing' if found is None else f'has {found} bytes'}, expected {size} bytes"
    if "sha256" in expected and (hash_all or size <= HASHED_BYTES):
        digest = hash_file(path)
        if digest != expected["sha256"]:
            return f"has the SHA-256 {digest[:12]}…, expected {str(expected['sha256'])[:12]}…"
    elif path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            return f"has a header that does not fit it ({error})"
    return None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Returns the folders `checkpoint-N` in `output_dir`, whole or not, by rising N."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = [(CHECKPOINT_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return [path for match, path in sorted((int(match[1]), path) for match, path in found if match)]


def find_last_checkpoint(output_dir: str | Path, hash_all: bool = False) -> Path | None:
    """Returns the newest whole checkpoint in `output_dir`, or None; says which ones it passes over, and why."""
    for checkpoint in reversed(list_checkpoints(output_dir)):
        try:
            read_whole_checkpoint(checkpoint, hash_all)
        except UserError as error:
            logger.warning("passing over a checkpoint: %s", error)
            continue
        return checkpoint
    return None


def remove_old_checkpoints(output_dir: str | Path, limit: int | None, keep: str | Path | None = None) -> None:
    """Removes the oldest checkpoints until `limit` are left; the newest and `keep` (the best one) stay."""
    checkpoints = list_checkpoints(output_dir)
    if not limit or limit < 1 or not checkpoints:
        return
    protected = {checkpoints[-1]} | {path for path in checkpoints if keep is not None and path.name == Path(keep).name}
    removable = [path for path in checkpoints if path not in protected]
    for path in removable[: max(0, len(checkpoints) - max(limit, len(protected)))]:
        remove_checkpoint(path)


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint; it loses its name first, so that a kill leaves nothing that looks like one.

    Of a symbolic link only the link goes.
    """
    doomed = partial_path(folder)
    remove_tree(doomed)
    folder.rename(doomed)
    remove_tree(doomed)
