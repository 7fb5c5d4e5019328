"""Reads JSON files as people have them: UTF-8 (with or without BOM) or GBK, an array or one object a line.

`JSONFile.values` is lazy: a file of a million records does not grow memory.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from finetune_chatmodel_demo.common.errors import UserError

BLOCK_BYTES = 1 << 20
MAX_BAD_MESSAGES = 20
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_JSON_SPACE = " \t\r\n\ufeff"
_SPACE_RUN = re.compile(f"[{_JSON_SPACE}]*")
# Longest token that can look wrong only because the text read so far ends in it: an escaped surrogate pair.
_LONGEST_CUT_TOKEN = 16


class RecordError(UserError):
    """A data file or one of its records is not what was expected; says where, what and the remedy."""


class SkipsBadRecords:
    """What a reader counts and goes on after.

    Attributes:
        bad_count: Bad records since `forget_bad`.
        bad_messages: What was wrong with the first of them (at most MAX_BAD_MESSAGES).
    """

    bad_count: int
    bad_messages: list[str]

    def forget_bad(self) -> None:
        """Starts to count."""
        self.bad_count, self.bad_messages = 0, []

    def note_bad(self, message: str) -> None:
        """Counts one more."""
        self.bad_count += 1
        if len(self.bad_messages) < MAX_BAD_MESSAGES:
            self.bad_messages.append(message)


@dataclass(frozen=True)
class Located:
    """One value of a file, or, where `problem` is set, the reason why there is none.

    `number` counts values from 1, `line` is the line that the value starts in, from 1.
    """

    number: int
    line: int
    value: Any
    problem: str | None = None


class JSONFile:
    """A JSON array or JSON lines, whatever the extension says. Nothing is read before it is asked for."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def encoding(self) -> str:
        """See `detect_encoding`."""
        return detect_encoding(self.path)

    @cached_property
    def is_array(self) -> bool:
        """Whether the first character that is not white space opens an array."""
        with open(self.path, encoding=self.encoding) as file:
            while block := file.read(4096):
                if text := block.lstrip(_JSON_SPACE):
                    return text[0] == "["
        return False

    def values(self, required_keys: frozenset[str] = frozenset()) -> Iterator[Located]:
        """Yields the values one by one.

        Args:
            required_keys: Keys of a whole record. They tell a line that starts a new record from the inside of
                a pretty-printed one, when the record before it never ended.

        Raises:
            RecordError: The bytes are neither UTF-8 nor GBK, or an array is not valid JSON (what follows the
                fault cannot be read then; a faulty JSON line is yielded as a problem instead).
        """
        with open(self.path, encoding=self.encoding) as file:
            if self.is_array:
                yield from _iterate_array(file, self.path)
            else:
                yield from _iterate_lines(file, required_keys)


def detect_encoding(path: Path) -> str:
    """Names the encoding of a text file: by its BOM, else UTF-8 where all of it is, else GB18030 (holds GBK).

    Raises:
        RecordError: The file is mostly UTF-8 with damaged bytes, or neither UTF-8 nor GBK. Says the line.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    fault = _first_fault(path, "utf-8")
    if fault is None:
        return "utf-8-sig"
    offset, line = fault
    if _is_mostly_utf8(path, offset):
        raise RecordError(f"{path} line {line}: byte {offset} is not UTF-8, although the text around it is; repair it")
    fault = _first_fault(path, "gb18030")
    if fault is None:
        return "gb18030"
    raise RecordError(
        f"{path} line {fault[1]}: the file is neither UTF-8 (first fault at byte {offset}) nor GBK (at byte "
        f"{fault[0]}); save it as UTF-8"
    )


def _first_fault(path: Path, encoding: str) -> tuple[int, int] | None:
    """(byte offset, line) of the first byte that does not decode, or None."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, line = 0, 1
    with open(path, "rb") as file:
        while True:
            block = file.read(BLOCK_BYTES)
            pending = decoder.getstate()[0]
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                newlines = (pending + block)[: error.start].count(b"\n")
                return offset - len(pending) + error.start, line + newlines
            if not block:
                return None
            offset += len(block)
            line += block.count(b"\n")


def _is_mostly_utf8(path: Path, offset: int) -> bool:
    """Whether more characters around `offset` decode as UTF-8 than fail; of GBK text few do."""
    with open(path, "rb") as file:
        file.seek(max(0, offset - BLOCK_BYTES // 2))
        text = file.read(BLOCK_BYTES).decode("utf-8", errors="replace")
    faults = text.count("\ufffd")
    return sum(not character.isascii() for character in text) - faults > faults


def _iterate_lines(file: TextIO, required_keys: frozenset[str]) -> Iterator[Located]:
    """JSON lines, and objects that are spread over several lines."""
    number, start, open_lines, depth = 0, 0, [], 0
    for line_number, line in enumerate(file, 1):
        text = line.strip(_JSON_SPACE)
        if not text:
            continue
        value, problem = _parse(text)
        if open_lines and problem is None and _is_record(value, required_keys):
            number += 1
            yield Located(number, start, None, "not valid JSON: a record begins here and does not end")
            open_lines, depth = [], 0
        if not open_lines:
            start = line_number
            if problem is None:
                number += 1
                yield Located(number, start, value)
                continue
        change = _depth_change(text)
        open_lines.append(text)
        depth += change or 0
        if change is None or depth <= 0:
            value, problem = _parse("\n".join(open_lines))
            number += 1
            yield Located(number, start, value, problem)
            open_lines, depth = [], 0
    if open_lines:
        yield Located(number + 1, start, None, "not valid JSON: a record begins here and does not end")


def _parse(text: str) -> tuple[Any, str | None]:
    try:
        return json.loads(text), None
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 20) : error.pos + 20]
        remedy = ""
        if text[error.pos :].startswith(","):
            remedy = "; write no comma between the lines, or put all records into one array"
        return None, f"not valid JSON: {error.msg} at character {error.pos + 1}, near {near!r}{remedy}"


def _is_record(value: Any, required_keys: frozenset[str]) -> bool:
    return isinstance(value, dict) and not required_keys.isdisjoint(value)


def _depth_change(text: str) -> int | None:
    """How many more brackets a line opens than it closes; None where a string does not end in it."""
    bare = _JSON_STRING.sub("", text)
    if '"' in bare:
        return None
    return sum(map(bare.count, "{[")) - sum(map(bare.count, "}]"))


def _iterate_array(file: TextIO, path: Path) -> Iterator[Located]:
    """The items of one JSON array, without ever holding more than a few blocks of it."""
    window = _Window(file, path)
    window.expect("[", "an array")
    number = 0
    if window.next_character() == "]":
        window.expect("]", "the end of the array")
    else:
        while True:
            number += 1
            window.next_character()
            line = window.line
            yield Located(number, line, window.decode(number))
            if window.next_character() == "]":
                window.expect("]", "the end of the array")
                break
            window.expect(",", f"',' or ']' after record {number}")
    if window.next_character():
        raise window.error("the end of the file after the array's ']'")


class _Window:
    """The part of a text file that is being decoded, with the line that it starts in."""

    def __init__(self, file: TextIO, path: Path):
        self.file, self.path = file, path
        self.text, self.position, self.line, self.is_last = "", 0, 1, False
        self.decoder = json.JSONDecoder()

    def next_character(self) -> str:
        """Moves to the next character that is not white space; "" at the end of the file."""
        while True:
            self._advance(_SPACE_RUN.match(self.text, self.position).end() - self.position)
            if self.position < len(self.text) or not self._grow():
                return self.text[self.position : self.position + 1]

    def expect(self, character: str, what: str) -> None:
        """Steps over one character, or says what should have been there."""
        if self.next_character() != character:
            raise self.error(what)
        self._advance(1)

    def decode(self, number: int) -> Any:
        """Decodes the value at the position and steps over it, reading as much as it needs."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string")
                is_cut = is_cut or error.pos >= len(self.text) - _LONGEST_CUT_TOKEN
                if is_cut and self._grow():
                    continue
                self._advance(error.pos - self.position)
                raise self.error(f"valid JSON ({error.msg}) in record {number}") from None
            if end == len(self.text) and self._grow():
                continue
            self._advance(end - self.position)
            return value

    def error(self, expected: str) -> RecordError:
        """The fault at the position. Nothing tells where the next record begins, so it ends the reading."""
        got = repr(self.text[self.position : self.position + 30]) if self.next_character() else "the end of the file"
        return RecordError(f"{self.path} line {self.line}: expected {expected}, got {got}; repair the file there")

    def _advance(self, count: int) -> None:
        self.line += self.text.count("\n", self.position, self.position + count)
        self.position += count

    def _grow(self) -> bool:
        """Reads at least as much again as is not decoded yet; False at the end of the file."""
        if self.is_last:
            return False
        rest = self.text[self.position :]
        block = self.file.read(max(BLOCK_BYTES, len(rest)))
        self.is_last = not block
        self.text, self.position = rest + block, 0
        return bool(block)
