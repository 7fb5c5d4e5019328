"""Records of a data file: read lazily, validated one by one, every fault named with file, line and key.

Look at a file with `inspect_data.py`.
"""

import copy
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from finetune_chatmodel_demo.common.errors import UserError, did_you_mean
from finetune_chatmodel_demo.conversation.file_formats import MESSAGE_KEYS, MESSAGE_PARTS, TOP_KEYS, read_record
from finetune_chatmodel_demo.conversation.readers import open_rows
from finetune_chatmodel_demo.conversation.text_files import Located, RowReader, SkipsBadRecords
from finetune_chatmodel_demo.conversation.validation import (
    OPTIONAL_KEYS,
    RECORD_FORMS,
    REQUIRED_KEYS,
    STAGE_KINDS,
    RecordError,
    RecordKind,
    validate_conversation,
    validate_input_output,
    validate_preference,
    validate_record,
    validate_text,
)

__all__ = [
    "STAGE_KINDS",
    "RecordError",
    "RecordFile",
    "RecordSource",
    "read_records",
    "validate_conversation",
    "validate_input_output",
    "validate_preference",
    "validate_record",
    "validate_text",
]

# What programs write for an empty cell; and what else is counted, and said once with the first place.
EMPTY_WORDS = frozenset({"nan", "NaN", "NAN", "None", "<NA>"})
EMPTY_WORD_LENGTH = 12
EMPTY_WORD = "a text that is nan, NaN or None, as programs write an empty cell,"
NUL = "a NUL character"
KEY_TWICE = "the key {!r} twice in one object (the last one counts)"

logger = logging.getLogger(__name__)


def read_records(
    path: str | Path,
    kind: RecordKind = "multi-turn",
    on_bad_record: Literal["error", "skip"] = "error",
    formatting: str | None = None,
) -> "RecordFile":
    """Opens a data file for lazy, validated reading.

    Args:
        path: See `readers`.
        kind: Which keys a record has.
        on_bad_record: "error" raises at the first bad record, "skip" counts it and goes on.
        formatting: The format that the file has to be in; None: each record's keys tell.

    Raises:
        FileNotFoundError: There is no such file.
        RecordError: While iterating: a bad record (with "error").
        UserError: While iterating: no good record, or an unreadable file.
    """
    return RecordFile(open_rows(path, REQUIRED_KEYS[kind]), kind, on_bad_record, formatting)


class RecordSource(SkipsBadRecords):
    """The validated records of one place. Iterate as often as needed; each pass reads it anew.

    A subclass may turn a row into a record (`_convert`).

    Attributes:
        reader: Yields the rows.
        path: The file, or the name of what is no file.
        kind: What the records are.
        limit: How many good records are read at most; None: all.
    """

    limit: int | None = None

    def __init__(self, reader: RowReader, kind: str, on_bad_record: str):
        self.reader, self.path = reader, reader.path
        self.kind, self.on_bad_record = kind, on_bad_record
        self.forget_bad()
        self._unknown: Counter[str] = Counter()
        self._odd: dict[str, tuple[int, str]] = {}  # how many records, and the first place
        self._has_reported = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for located in self.iterate_located():
            yield located.value

    def first(self, count: int) -> "RecordSource":
        """The same source up to its `count`-th good record; what comes after that is not read."""
        limited = copy.copy(self)
        limited.limit = count if self.limit is None else min(count, self.limit)
        return limited

    def iterate_located(self) -> Iterator[Located]:
        """Like iterating, with the number and the line of each record."""
        return itertools.islice(self._iterate(), self.limit)

    def _iterate(self) -> Iterator[Located]:
        self.forget_bad()
        self._unknown.clear()
        self._odd.clear()
        try:
            yield from self._iterate_good()
        finally:
            self._report()

    def _iterate_good(self) -> Iterator[Located]:
        good_count = 0
        for located in self.reader.rows():
            where = self.where(located.number, located.line)
            try:
                if located.problem is not None:
                    raise RecordError(f"{where}: {located.problem}")
                record = self._convert(located.value, where)
                validate_record(record, self.kind, where)
            except (RecordError, RecursionError) as error:
                if isinstance(error, RecursionError):
                    error = RecordError(f"{where}: lists or objects are nested too deeply")
                if self.on_bad_record == "error":
                    raise RecordError(f"{error} (--on_bad_record skip goes on without such records)") from None
                self.note_bad(str(error))
                continue
            good_count += 1
            self._count_unknown_keys(located.value)
            self._count_oddities(located, where)
            yield Located(located.number, located.line, record)
        if self.bad_count and not good_count:
            raise UserError(f"all {self.bad_count} records of {self.path} are bad; the first: {self.bad_messages[0]}")
        if not good_count:
            raise UserError(f"{self.path} is empty; expected {self._expected_rows()}")

    def where(self, number: int, line: int) -> str:
        """Names the place of a record."""
        return self.reader.where(number, line)

    def _convert(self, row: Any, where: str) -> Any:
        return row

    def _expected_rows(self) -> str:
        return f"{RECORD_FORMS[self.kind]}, one a line or in an array"

    def _known_keys(self) -> tuple[frozenset[str], frozenset[str]]:
        """The keys of a row, and those of its messages, that mean something."""
        return TOP_KEYS, MESSAGE_PARTS

    def _explain_unknown(self, key: str) -> str:
        return did_you_mean(key.lower(), OPTIONAL_KEYS)

    def _count_unknown_keys(self, row: dict[str, Any]) -> None:
        """Counts what is there, not empty, and not read, of the record and of its messages."""
        of_row, of_messages = self._known_keys()
        self._unknown.update(key for key in row.keys() - of_row if row[key])
        for key in MESSAGE_KEYS:
            if isinstance(row.get(key), list):
                found = set().union(*(message for message in row[key] if isinstance(message, dict)))
                self._unknown.update(found - of_messages)

    def _count_oddities(self, located: Located, where: str) -> None:
        """Remembers what no author meant, though it can be trained on."""
        found = {KEY_TWICE.format(located.doubled)} if located.doubled is not None else set()
        for text in _texts(located.value):
            if len(text) < EMPTY_WORD_LENGTH and text.strip() in EMPTY_WORDS:
                found.add(EMPTY_WORD)
            if "\0" in text:
                found.add(NUL)
        for what in found:
            count, first = self._odd.get(what, (0, where))
            self._odd[what] = (count + 1, first)

    def _report(self) -> None:
        """Says once what was found in a pass: what is ignored in silence may have been meant."""
        if self._has_reported:
            return
        self._has_reported = bool(self._unknown or self._odd)
        if self._unknown:
            named = [f"{key!r} ({count:,}{self._explain_unknown(key)})" for key, count in self._unknown.items()]
            logger.warning(
                "%s: keys that are not read, with the records that have them: %s", self.path, ", ".join(named)
            )
        for what, (count, first) in self._odd.items():
            logger.warning("%s in %s records, the first: %s", what, f"{count:,}", first)


def _texts(row: dict[str, Any]) -> Iterator[str]:
    """The texts of a row and of its messages."""
    for value in row.values():
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, dict):
                    yield from (text for text in item.values() if isinstance(text, str))


class RecordFile(RecordSource):
    """The validated records of one file; see `RecordSource`. `formatting`: see `file_formats.read_record`."""

    def __init__(self, reader: RowReader, kind: str, on_bad_record: str, formatting: str | None = None):
        super().__init__(reader, kind, on_bad_record)
        self.formatting = formatting

    def fingerprint(self) -> str:
        """What the records follow from, beside the file's content."""
        return f"{type(self).__name__} {self.kind} {self.on_bad_record} {self.formatting}"

    def _convert(self, row: Any, where: str) -> Any:
        return read_record(row, self.kind, where, self.formatting)
