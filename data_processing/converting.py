"""Streams a public data set through a conversion into validated records; counts and explains what cannot be converted.

Exercised by `format_tool_alpaca.py` and `format_advertise_gen.py`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.conversation.json_files import JSONFile, RecordError, SkipsBadRecords


class ConvertedRecords(SkipsBadRecords):
    """Iterates over the converted records of one file, one entry in memory at a time.

    Args:
        path: JSON array or JSON lines.
        required_keys: keys that every entry must have.
        convert: (entry, where) → the entry's records, each with its own where; a RecordError in place of a record
            that cannot be made.
        validate: (record, where) raises a RecordError for a record that finetune.py would refuse.
        on_bad_record: "error" raises at the first bad record, "skip" counts it.
    """

    def __init__(
        self,
        path: Path,
        required_keys: tuple[str, ...],
        convert: Callable[[dict[str, Any], str], Iterator[tuple[str, dict[str, Any] | RecordError]]],
        validate: Callable[[Any, str], None],
        on_bad_record: str,
    ) -> None:
        self.path, self.required_keys = path, required_keys
        self.convert, self.validate = convert, validate
        self.on_bad_record = on_bad_record
        self.forget_bad()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for located in JSONFile(self.path).values(frozenset(self.required_keys)):
            where = f"{self.path} record {located.number} (line {located.line})"
            problem = located.problem or self._missing(located.value)
            found = [(where, RecordError(f"{where}: {problem}"))] if problem else self.convert(located.value, where)
            for place, record in found:
                try:
                    if isinstance(record, RecordError):
                        raise record
                    self.validate(record, place)
                except RecordError as error:
                    if self.on_bad_record == "error":
                        raise
                    self.note_bad(str(error))
                else:
                    yield record

    def _missing(self, entry: Any) -> str | None:
        if not isinstance(entry, dict):
            return f"expected an object with {', '.join(self.required_keys)}, got {type(entry).__name__}"
        missing = [key for key in self.required_keys if key not in entry]
        return f"lacks {', '.join(missing)}; found {', '.join(map(repr, entry)) or 'no keys'}" if missing else None
