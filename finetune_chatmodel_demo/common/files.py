"""Files and folders that are whole or absent: written beside, flushed to disk, then renamed. And their hashes.

What is being written is called `.partial-NAME` beside `NAME`. The name is always the same, so that the next run
overwrites what a killed one left.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from finetune_chatmodel_demo.common.errors import UserError

PARTIAL_PREFIX = ".partial-"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
LOCK_FILE = ".lock"


def partial_path(path: Path) -> Path:
    """Where `path` is written before it gets its name."""
    return path.with_name(PARTIAL_PREFIX + path.name)


@contextmanager
def whole_files(*paths: Path) -> Iterator[list[IO[str]]]:
    """Opens UTF-8 text files that appear under their names only when the block ends well, all of them or none.

    After an error or Ctrl-C nothing is left, and what stood there before is untouched. A symbolic link is replaced,
    never written through.

    Raises:
        UserError: a destination is named twice or is not a regular file.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"two outputs have the same path {paths[0]}; give them different names")
    for path in paths:
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is not a regular file; name an output file")
    files: list[IO[str]] = []
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.append(partial_path(path).open("w", encoding="utf-8", newline="\n"))
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for path in paths:
            os.replace(partial_path(path), path)
    except OSError as error:
        if error.errno in DISK_ERRORS and error.filename is None:
            error.filename = str(paths[0])  # a write does not know its file
        raise
    finally:
        for file, path in zip(files, paths):
            # On a full disk, closing fails a second time: it tries to write what was not written.
            with suppress(OSError):
                file.close()
            partial_path(path).unlink(missing_ok=True)


def flag_path(text: str) -> Path:
    """A path from the command line, where backslashes separate folders on every system."""
    return Path(text) if os.path.exists(text) else Path(text.replace("\\", "/"))


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that is whole or absent; see `whole_files`."""
    with whole_files(path) as (file,):
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON; see `whole_files`."""
    write_whole(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write into, which becomes `folder` when the block ends well, replacing an older one.

    After an exception nothing is left behind, and what stood there before is untouched.
    """
    partial = partial_path(folder)
    remove_tree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish_folder(partial, folder)
    finally:
        remove_tree(partial)


def publish_folder(partial: Path, folder: Path) -> None:
    """Flushes a folder to disk and gives it its final name; an older folder of that name is replaced."""
    for path in [*partial.rglob("*"), partial]:
        flush(path)
    if folder.exists() or folder.is_symlink():
        replaced = partial_path(folder.with_name(f"replaced-{folder.name}"))
        remove_tree(replaced)
        folder.rename(replaced)
        partial.rename(folder)
        remove_tree(replaced)
    else:
        partial.rename(folder)
    flush(folder.parent)


def publish_files(partial: Path, folder: Path) -> None:
    """Moves the files of a partial folder into `folder`, which keeps its other files; config.json comes last.

    The weights are complete before the file by which programs recognise a model appears.
    """
    files = sorted(partial.iterdir(), key=lambda path: path.name == "config.json")
    for path in files:
        flush(path)
    for path in files:
        if path.is_dir():
            remove_tree(folder / path.name)
        os.replace(path, folder / path.name)
    partial.rmdir()
    flush(folder)


def remove_tree(path: Path) -> None:
    """Removes a folder, a file or a symbolic link (never what it points to); nothing happens where there is none."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed runs had not finished writing into `folder`."""
    for path in folder.glob(f"{PARTIAL_PREFIX}*"):
        remove_tree(path)


@contextmanager
def hold_folder(folder: Path, option: str) -> Iterator[None]:
    """Keeps other processes from holding the same folder in the meantime; a killed process holds nothing any more.

    The lock is a file in the folder. A folder that is made for it and stays empty goes again.

    Args:
        folder: is made where there is none.
        option: names it in the message.

    Raises:
        UserError: when another process holds it.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    file = _lock(folder, option)
    try:
        yield
    finally:
        if file is not None:
            (folder / LOCK_FILE).unlink(missing_ok=True)
            file.close()
        if is_new:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _lock(folder: Path, option: str) -> IO[str] | None:
    """The open lock file; None where the system, or the file system, has no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return None
            raise UserError(
                f"{option} {folder} is in use by a run at work ({holder}); wait for its end, or choose another folder"
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK_FILE)):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}\n")
                file.flush()
                return file
        file.close()  # its holder has just removed it


def flush(path: Path) -> None:
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


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """A file's checksum, in hex."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def format_size(size: float) -> str:
    """Bytes in words: `12.5 GB` (10⁹)."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
