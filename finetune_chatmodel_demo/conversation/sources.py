"""From an entry of the registry to its records: `open_dataset` finds the rows, wherever they are, and converts them.

Rows come from files (`readers`), from a hub or from a script (`hubs`); `formats` turns each into a canonical record,
and `validation` checks it.
"""

import difflib
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import hash_file
from finetune_chatmodel_demo.conversation.file_formats import MESSAGE_PARTS
from finetune_chatmodel_demo.conversation.formats import convert_row, needed_columns
from finetune_chatmodel_demo.conversation.hubs import open_hub, open_script
from finetune_chatmodel_demo.conversation.readers import EXTENSIONS, READERS, FolderRows, open_rows
from finetune_chatmodel_demo.conversation.records import RecordSource
from finetune_chatmodel_demo.conversation.registry import DatasetEntry, check_kind
from finetune_chatmodel_demo.conversation.text_files import Located, RowReader

logger = logging.getLogger(__name__)


def open_dataset(
    entry: DatasetEntry,
    dataset_dir: Path,
    kind: str,
    *,
    on_bad_record: Literal["error", "skip"] = "error",
    allow_dataset_scripts: bool = False,
    streaming: bool = False,
    strict_sha1: bool = False,
) -> "DatasetSource":
    """Opens a data set for lazy, validated reading.

    Args:
        entry: From `read_registry`.
        dataset_dir: The registry's folder, from which file_name and script_url count.
        kind: What the stage needs; see `records.STAGE_KINDS`.
        on_bad_record: "error" raises at the first bad row, "skip" counts it.
        allow_dataset_scripts: Whether the program that script_url names may run.
        strict_sha1: A `file_sha1` that does not match is an error, not a warning.
        streaming: Read a hub's data set while iterating, without downloading all of it first.

    Raises:
        UserError: The entry cannot give records of this kind, or its rows cannot be had.
    """
    check_kind(entry, kind)
    if entry.origin == "file":
        reader = open_files(entry, Path(dataset_dir), needed_columns(entry), strict_sha1)
    elif entry.origin == "script":
        reader = open_script(entry, Path(dataset_dir), is_allowed=allow_dataset_scripts)
    else:
        reader = open_hub(entry, streaming=streaming)
    return DatasetSource(entry, reader, kind, on_bad_record)


class DatasetSource(RecordSource):
    """The records of one data set of the registry; see `RecordSource`.

    With `num_samples` these are its first so many good records; where it has fewer, it is read again from the start.
    """

    def __init__(self, entry: DatasetEntry, reader: RowReader, kind: str, on_bad_record: str):
        super().__init__(reader, kind, on_bad_record)
        self.entry = entry

    def _iterate(self) -> Iterator[Located]:
        if self.entry.num_samples is None:
            yield from super()._iterate()
            return
        given, first_bad = 0, None
        for _ in itertools.count():
            for located in super()._iterate():
                given += 1
                yield located
                if given == self.entry.num_samples:
                    break
            # What is bad is counted once, however often the data set is read.
            first_bad = first_bad or (self.bad_count, self.bad_messages)
            self.bad_count, self.bad_messages = first_bad
            if given == self.entry.num_samples:
                return

    def fingerprint(self) -> str:
        """What the records follow from, beside the file's content."""
        return f"{type(self).__name__} {self.kind} {self.on_bad_record} {type(self.reader).__name__} {self.entry}"

    def _convert(self, row: Any, where: str) -> dict[str, Any]:
        return convert_row(row, self.entry, self.kind, where)

    def _known_keys(self) -> tuple[frozenset[str], frozenset[str]]:
        columns, tags = self.entry.columns, vars(self.entry.tags).values()
        used = [columns.prompt] if self.kind == "text" else vars(columns).values()
        return frozenset(filter(None, used)), MESSAGE_PARTS | frozenset(tags)

    def _explain_unknown(self, key: str) -> str:
        is_role = key in vars(self.entry.columns) and self.kind != "text"
        return f"; list it in 'columns' of {self.entry.name!r} if it should be" if is_role else ""

    def _expected_rows(self) -> str:
        return f"rows of the data set {self.entry.name!r}"


def open_files(entry: DatasetEntry, dataset_dir: Path, needed: frozenset[str], strict_sha1: bool = False) -> RowReader:
    """Opens what `file_name` names, in the registry's folder: a file, or a folder of files.

    Args:
        entry: The data set.
        dataset_dir: The registry's folder.
        needed: Keys that every row has; they tell records of a broken JSON file apart.
        strict_sha1: See `open_dataset`.

    Raises:
        UserError: There is no such file, its extension is unknown, its SHA-1 is not `file_sha1` (strict), or the entry
            has a key that only hubs and scripts know.
    """
    for key in ("subset", "folder", "split"):
        if getattr(entry, key) != getattr(DatasetEntry, key):
            raise UserError(
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
        raise UserError(f"{entry.where}: file {path} does not exist; {hint}")
    if path.suffix.lower() not in READERS:
        raise UserError(f"{entry.where}: {path} is no data file that can be read; use {EXTENSIONS}")
    if entry.file_sha1:
        _check_sha1(entry, path, strict_sha1)
    return open_rows(path, needed)


def _open_folder(entry: DatasetEntry, path: Path, needed: frozenset[str]) -> RowReader:
    if entry.file_sha1:
        raise UserError(f"{entry.where}: 'file_sha1' is that of one file, but {path} is a folder; remove the key")
    names = sorted(name for name in path.iterdir() if not name.name.startswith("."))
    files = [name for name in names if name.is_file() and name.suffix.lower() in READERS]
    if not files:
        raise UserError(f"{entry.where}: folder {path} holds no data file; use {EXTENSIONS}")
    left_out = [name.name for name in names if name not in files]
    if left_out:
        logger.warning("%s: not read in %s: %s (no %s file)", entry.where, path, ", ".join(left_out), EXTENSIONS)
    return FolderRows(path, [open_rows(file, needed) for file in files])


def _check_sha1(entry: DatasetEntry, path: Path, is_strict: bool) -> None:
    """The sum is a help and no lock: everybody edits self_cognition.json."""
    found = hash_file(path, "sha1")
    if found == entry.file_sha1:
        return
    message = f"{entry.where}: the SHA-1 of {path} is {found}, expected {entry.file_sha1} ('file_sha1')"
    if is_strict:
        raise UserError(f"{message}; get the file anew, write its sum into the registry, or drop --strict_sha1")
    logger.warning("%s: the file was changed; --strict_sha1 refuses it", message)
