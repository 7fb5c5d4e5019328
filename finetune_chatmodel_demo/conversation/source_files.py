"""Rows of files: JSON, JSON lines, CSV and parquet, one file or a folder of them, read lazily. See `sources.py`."""

import bisect
import difflib
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from finetune_chatmodel_demo.conversation.csv_files import CSVFile
from finetune_chatmodel_demo.conversation.json_files import JSONFile, Located, RecordError
from finetune_chatmodel_demo.conversation.registry import DatasetEntry, RegistryError

PARQUET_BATCH_ROWS = 512
HASH_BLOCK_BYTES = 1 << 20

logger = logging.getLogger(__name__)


class RowReader(Protocol):
    """What yields the rows of a data set, again and again."""

    path: Path

    def rows(self) -> Iterator[Located]:
        """Yields the rows, numbered from 1."""
        ...

    def where(self, number: int, line: int) -> str:
        """Names the place of a row that was yielded."""
        ...


class JSONRows:
    """A JSON array or JSON lines. `needed`: keys that every row has."""

    def __init__(self, path: Path, needed: frozenset[str]):
        self.path, self.needed, self.file = path, needed, JSONFile(path)

    def rows(self) -> Iterator[Located]:
        """See `RowReader`."""
        return self.file.values(self.needed)

    def where(self, number: int, line: int) -> str:
        """See `RowReader`."""
        return f"{self.path} record {number} (line {line})" if self.file.is_array else f"{self.path} line {line}"


class CSVRows:
    """A comma-separated file with a header."""

    def __init__(self, path: Path):
        self.path, self.file = path, CSVFile(path)

    def rows(self) -> Iterator[Located]:
        """See `RowReader`."""
        return self.file.values()

    def where(self, number: int, line: int) -> str:
        """See `RowReader`."""
        return f"{self.path} line {line}"


class ParquetRows:
    """A parquet file, of which PARQUET_BATCH_ROWS rows are in memory at a time."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> Iterator[Located]:
        """See `RowReader`. Lines are the numbers of rows."""
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        number = 0
        try:
            with ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                    for row in batch.to_pylist():
                        number += 1
                        yield Located(number, number, row)
        except ArrowException as error:
            reason = str(error).splitlines()[0]
            raise RecordError(f"{self.path} cannot be read as parquet behind row {number} ({reason})") from None

    def where(self, number: int, line: int) -> str:
        """See `RowReader`."""
        return f"{self.path} row {number}"


class FolderRows:
    """The files of a folder one after the other, in the order of their names; rows are numbered through."""

    def __init__(self, path: Path, readers: list[RowReader]):
        self.path, self.readers = path, readers
        self._starts: list[int] = []

    def rows(self) -> Iterator[Located]:
        """See `RowReader`."""
        self._starts, number = [], 0
        for reader in self.readers:
            self._starts.append(number)
            for located in reader.rows():
                number += 1
                yield Located(number, located.line, located.value, located.problem)

    def where(self, number: int, line: int) -> str:
        """See `RowReader`."""
        index = bisect.bisect_left(self._starts, number) - 1
        return self.readers[index].where(number - self._starts[index], line)


READERS = {
    ".json": JSONRows,
    ".jsonl": JSONRows,
    ".csv": lambda path, needed: CSVRows(path),
    ".parquet": lambda path, needed: ParquetRows(path),
}
EXTENSIONS = "json, jsonl, csv or parquet"


def open_files(entry: DatasetEntry, dataset_dir: Path, needed: frozenset[str]) -> RowReader:
    """Opens what `file_name` names, in the registry's folder: a file, or a folder of files.

    Args:
        entry: The data set.
        dataset_dir: The registry's folder.
        needed: Keys that every row has; they tell records of a broken JSON file apart.

    Raises:
        RegistryError: There is no such file, its extension is unknown, its SHA-1 is not `file_sha1`, or the entry has
            a key that only hubs and scripts know.
    """
    for key in ("subset", "folder", "split"):
        if getattr(entry, key) != getattr(DatasetEntry, key):
            raise RegistryError(
                f"{entry.where}: {key!r} is {getattr(entry, key)!r}, but a file has no {key}; remove the key, or give "
                "hf_hub_url, ms_hub_url or script_url"
            )
    path = dataset_dir / (entry.file_name or "")
    if path.is_dir():
        return _open_folder(entry, path, needed)
    if not path.is_file():
        found = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, found, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "file_name counts from the folder of the registry"
        raise RegistryError(f"{entry.where}: file {path} does not exist; {hint}")
    if path.suffix.lower() not in READERS:
        raise RegistryError(f"{entry.where}: {path} is no data file that can be read; use {EXTENSIONS}")
    if entry.file_sha1:
        _check_sha1(entry, path)
    return READERS[path.suffix.lower()](path, needed)


def _open_folder(entry: DatasetEntry, path: Path, needed: frozenset[str]) -> RowReader:
    if entry.file_sha1:
        raise RegistryError(f"{entry.where}: 'file_sha1' is that of one file, but {path} is a folder; remove the key")
    names = sorted(name for name in path.iterdir() if not name.name.startswith("."))
    files = [name for name in names if name.is_file() and name.suffix.lower() in READERS]
    if not files:
        raise RegistryError(f"{entry.where}: folder {path} holds no data file; use {EXTENSIONS}")
    left_out = [name.name for name in names if name not in files]
    if left_out:
        logger.warning("%s: not read in %s: %s (no %s file)", entry.where, path, ", ".join(left_out), EXTENSIONS)
    return FolderRows(path, [READERS[file.suffix.lower()](file, needed) for file in files])


def _check_sha1(entry: DatasetEntry, path: Path) -> None:
    digest = hashlib.sha1(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != entry.file_sha1:
        raise RegistryError(
            f"{entry.where}: the SHA-1 of {path} is {digest.hexdigest()}, expected {entry.file_sha1} ('file_sha1'); "
            "get the file anew, or write its sum into the registry"
        )
