"""Checkpoints that are whole or not there: written beside, flushed to disk, then renamed.

`checkpoint-500` is first written as `.partial-checkpoint-500`. A manifest with the size and the SHA-256 of every file
is written last; a folder whose files disagree with it (a full disk, a lost power supply, a bad copy) is not resumed
from.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from finetune_chatmodel_demo.common.errors import UserError

MANIFEST = "checkpoint_manifest.json"
PARTIAL_PREFIX = ".partial-"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
READ_BYTES = 2**22

logger = logging.getLogger(__name__)


def partial_folder(folder: Path) -> Path:
    """Where `folder` is written before it gets its name."""
    return folder.with_name(PARTIAL_PREFIX + folder.name)


def start_partial(folder: Path) -> Path:
    """Returns the empty partial folder of `folder`; leftovers of a killed run are removed."""
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def publish_checkpoint(folder: Path, content: dict[str, object]) -> None:
    """Writes the manifest of the partial folder, flushes all of it to disk and gives it its name.

    Args:
        folder: the final name; an older folder of this name is replaced.
        content: what else the manifest shall say (the run's settings).
    """
    partial = partial_folder(folder)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in files:
        _flush(path)
    found = {
        path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in files
    }
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps({**content, "files": found}, ensure_ascii=False, indent=1), encoding="utf-8")
    _flush(manifest)
    _flush(partial)
    if folder.exists():
        replaced = folder.with_name(f"{PARTIAL_PREFIX}replaced-{folder.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced)
    else:
        partial.rename(folder)
    _flush(folder.parent)


def publish_files(partial: Path, folder: Path) -> None:
    """Moves the files of a partial folder into `folder`, which keeps its other files; config.json comes last.

    The weights are complete before the file by which programs recognise a model appears.
    """
    files = sorted((path for path in partial.iterdir()), key=lambda path: path.name == "config.json")
    for path in files:
        _flush(path)
    for path in files:
        os.replace(path, folder / path.name)
    partial.rmdir()
    _flush(folder)


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


def read_whole_checkpoint(folder: str | Path) -> dict[str, object]:
    """Returns the manifest of a checkpoint after comparing every byte of it.

    Raises:
        UserError: when the checkpoint is not whole; the message says why.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    for name, expected in manifest["files"].items():
        # The first versions of this project wrote sizes alone.
        size, digest = (expected, None) if isinstance(expected, int) else (expected["bytes"], expected["sha256"])
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise UserError(f"the checkpoint {folder} is damaged: {name} {state}, expected {size} bytes")
        if digest is not None and (other := hash_file(path)) != digest:
            raise UserError(
                f"the checkpoint {folder} is damaged: the SHA-256 of {name} is {other[:12]}…, expected {digest[:12]}…"
            )
    return manifest


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Returns the folders `checkpoint-N` in `output_dir`, whole or not, by rising N."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = [(CHECKPOINT_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return [path for match, path in sorted((int(match[1]), path) for match, path in found if match)]


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """Returns the newest whole checkpoint in `output_dir`, or None; says which ones it passes over, and why."""
    for checkpoint in reversed(list_checkpoints(output_dir)):
        try:
            read_whole_checkpoint(checkpoint)
        except UserError as error:
            logger.warning("passing over a checkpoint: %s", error)
            continue
        return checkpoint
    return None


def remove_old_checkpoints(output_dir: str | Path, limit: int | None, keep: str | Path | None = None) -> None:
    """Removes the oldest checkpoints until `limit` are left; the newest and `keep` (the best one) stay."""
    if not limit or limit < 1:
        return
    checkpoints = list_checkpoints(output_dir)
    protected = {checkpoints[-1].resolve()} if checkpoints else set()
    if keep is not None:
        protected.add(Path(keep).resolve())
    removable = [path for path in checkpoints if path.resolve() not in protected]
    for path in removable[: max(0, len(checkpoints) - max(limit, len(protected)))]:
        remove_checkpoint(path)


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint; it loses its name first, so that a kill leaves nothing that looks like one."""
    doomed = partial_folder(folder)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(output_dir: str | Path) -> None:
    """Removes what a killed run had not finished writing."""
    for path in Path(output_dir).glob(f"{PARTIAL_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _flush(path: Path) -> None:
    """Flushes a file or a folder to disk; systems that cannot flush a folder are left alone."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
