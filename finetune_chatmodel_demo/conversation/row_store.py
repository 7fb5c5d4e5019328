"""Rendered rows, in memory or in files that are mapped into it: tokenized once, and however many there are.

Rows of large data files are kept in a cache (`--tokenized_cache`), under a key of everything that they follow from:
the file's content, the data set's entry, the tokenizer, the settings, and the code that renders. They are written while
they are rendered, and read through a memory map, so that a million rows take hardly more memory than a thousand.
"""

import array
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune_chatmodel_demo.conversation.tokenizing import DatasetReport, RenderedChunk

# Smaller files are tokenized in a few seconds; measured, 32 MiB of Pokémon conversations are 34,000 rows.
SMALLEST_CACHED_FILE = 32 * 2**20
ARRAYS = {"input_ids": np.int32, "is_target": np.bool_, "lengths": np.int64, "origins": np.int64}
REPORT = "report.json"


@dataclass(frozen=True)
class RowStore:
    """Rows one after the other.

    Attributes:
        input_ids: (tokens,) int32.
        is_target: (tokens,) bool, 1 where the loss counts.
        lengths: (rows × parts,) int64.
        origins: (rows, 2) int64, number and line of each row's record.
        report: What became of the records.
        bad_messages: What was wrong with the first records that were skipped.
    """

    input_ids: np.ndarray
    is_target: np.ndarray
    lengths: np.ndarray
    origins: np.ndarray
    report: DatasetReport
    bad_messages: list[str]


def keep_in_memory(records: Any, chunks: Iterable[RenderedChunk]) -> RowStore:
    """Rows of a source, about five bytes a token."""
    report = DatasetReport(str(records.path))
    kept = {"input_ids": array.array("i"), "is_target": array.array("b")}
    kept |= {"lengths": array.array("q"), "origins": array.array("q")}
    for chunk in chunks:
        report.add(chunk.report)
        for name, values in kept.items():
            values.frombytes(getattr(chunk, name).tobytes())
    report.rows_bad = records.bad_count
    arrays = {name: np.frombuffer(values, dtype=ARRAYS[name]) for name, values in kept.items()}
    return _make_store(arrays, report, records.bad_messages)


def keep_in_files(records: Any, chunks: Iterable[RenderedChunk], folder: Path) -> RowStore:
    """The same, in the files of `folder`, which appears when all of them are written."""
    report = DatasetReport(str(records.path))
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        files = {name: (partial / name).open("wb") for name in ARRAYS}
        for chunk in chunks:
            report.add(chunk.report)
            for name, file in files.items():
                file.write(getattr(chunk, name).tobytes())
        for file in files.values():
            file.close()
        report.rows_bad = records.bad_count
        facts = {"report": asdict(report), "bad_messages": records.bad_messages}
        (partial / REPORT).write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            if not (folder / REPORT).is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return read_files(folder)


def read_files(folder: Path) -> RowStore:
    """Rows that `keep_in_files` wrote."""
    facts = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    arrays = {name: _map_file(folder / name, dtype) for name, dtype in ARRAYS.items()}
    return _make_store(arrays, DatasetReport(**facts["report"]), facts["bad_messages"])


def _map_file(path: Path, dtype: Any) -> np.ndarray:
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _make_store(arrays: dict[str, np.ndarray], report: DatasetReport, bad_messages: list[str]) -> RowStore:
    arrays["origins"] = arrays["origins"].reshape(-1, 2)
    return RowStore(**arrays, report=report, bad_messages=list(bad_messages))


def find_cache_folder(option: str | None, records: Any, tokenizer: Any, settings: Any) -> Path | None:
    """Where the rows of a source are, or will be, kept.

    Args:
        option: --tokenized_cache: a folder, "none", or None: the user's cache folder, for large files only.
        records: The source; one that is not a file is never kept.
        tokenizer: Its vocabulary file is part of the key.
        settings: `RowSettings`.

    Returns:
        The folder of these rows; None: they are not kept.
    """
    fingerprint = getattr(records, "fingerprint", lambda: None)
    path, vocabulary = Path(records.path), getattr(tokenizer, "vocab_file", None)
    if option == "none" or not path.is_file() or vocabulary is None:
        return None
    if option is None and path.stat().st_size < SMALLEST_CACHED_FILE:
        return None
    source = fingerprint()
    if source is None:
        return None
    parts = [source, _hash_file(path), _hash_file(Path(vocabulary)), repr(settings), _hash_code()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    return (Path(option) if option else default_cache()) / key


def default_cache() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "chatglm3-finetuning" / "rows"


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _hash_code() -> str:
    """Of the programs of this room: what another version rendered is not used."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
