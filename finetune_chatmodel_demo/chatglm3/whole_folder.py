"""Output folders that are whole or not there: written beside, checked, then renamed.

`export.py` uses it for all it writes; `pytest tests/test_export.py` exercises it.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PARTIAL_PREFIX = ".partial-"
# A folder that has one of these is a model, a prefix or an adapter, and may be replaced when that is asked for.
REPLACEABLE = ("config.json", "adapter_config.json")
# Of the bytes that are counted, for file headers and what is not counted.
DISK_RESERVE = 1.02


def check_output(folder: Path, *, overwrite: bool, sources: Sequence[Path] = ()) -> None:
    """Refuses an output folder that would destroy something.

    Args:
        folder: where the result shall be.
        overwrite: whether an earlier result may be replaced.
        sources: folders that are read.

    Raises:
        ValueError: for a folder that is read from, or that holds something and may not be replaced.
    """
    target = folder.resolve()
    for source in (path.resolve() for path in sources):
        if target == source or target in source.parents:
            raise ValueError(f"--output {folder} is (or holds) {source}, which is read; choose another folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; give a folder")
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return
    if not overwrite:
        raise ValueError(f"--output {folder} is not empty (found: {', '.join(names[:5])}); --overwrite replaces it")
    runs = [name for name in names if name.startswith("checkpoint-")]
    if runs or not any(name in names for name in REPLACEABLE):
        what = f"holds {runs[0]} of a training run" if runs else f"is no earlier result (found: {', '.join(names[:5])})"
        raise ValueError(f"--output {folder} {what}; --overwrite replaces earlier results only, choose another folder")


def check_disk(folder: Path, needed: int) -> None:
    """Refuses to start what the disk cannot hold.

    Args:
        folder: where the result shall be.
        needed: bytes.

    Raises:
        OSError: when they are not free.
    """
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed * DISK_RESERVE > free:
        raise OSError(
            f"--output {folder} needs {format_size(needed)}, and {format_size(free)} are free at {place}; free some "
            "space, choose another disk, or a smaller --dtype"
        )


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, which becomes `folder` when the context ends without an exception.

    An earlier `folder` is replaced at that moment; see `check_output`. After an exception nothing is left behind.
    """
    partial = folder.with_name(PARTIAL_PREFIX + folder.name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if hasattr(os, "sync"):  # not on Windows
            os.sync()
        if folder.exists():
            replaced = folder.with_name(f"{PARTIAL_PREFIX}replaced-{folder.name}")
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
            partial.rename(folder)
            shutil.rmtree(replaced)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def format_size(size: float) -> str:
    """Bytes in words: `12.5 GB` (10⁹)."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
