"""Reads JSON arrays and JSON lines, one value in memory at a time; see `readers`."""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.text_files import Located, detect_encoding

BLOCK_CHARACTERS = 1 << 20
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_JSON_SPACE = " \t\r\n\ufeff"
_SPACE_RUN = re.compile(f"[{_JSON_SPACE}]*")
# Longest token that can look wrong only because the text read so far ends in it: an escaped surrogate pair.
_LONGEST_CUT_TOKEN = 16


class JSONRows:
    """A JSON array or JSON lines, whatever the extension says. Nothing is read before it is asked for.

    `needed`: keys of a whole record. They tell a line that starts a new record from the inside of a pretty-printed
    one, when the record before it never ended.
    """

    def __init__(self, path: Path, needed: frozenset[str] = frozenset()):
        self.path, self.needed = path, needed

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

    def rows(self) -> Iterator[Located]:
        """See `RowReader`.

        Raises:
            UserError: The bytes are no text, or an array is not valid JSON (what follows the fault cannot be read
                then; a faulty JSON line is yielded as a problem instead).
        """
        with open(self.path, encoding=self.encoding) as file:
            yield from _iterate_array(file, self.path) if self.is_array else _iterate_lines(file, self.needed)

    def where(self, number: int, line: int) -> str:
        """See `RowReader`. By the line, in an array also by the number."""
        return f"{self.path} record {number} (line {line})" if self.is_array else f"{self.path} line {line}"


def _iterate_lines(file: TextIO, needed: frozenset[str]) -> Iterator[Located]:
    """JSON lines, and objects that are spread over several lines."""
    number, start, open_lines, depth = 0, 0, [], 0
    decoder = _Decoder()
    for line_number, line in enumerate(file, 1):
        text = line.strip(_JSON_SPACE)
        if not text:
            continue
        value, problem = _parse(decoder, text)
        if open_lines and problem is None and isinstance(value, dict) and not needed.isdisjoint(value):
            number += 1
            yield Located(number, start, None, "not valid JSON: a record begins here and does not end")
            open_lines, depth = [], 0
        if not open_lines:
            start = line_number
            if problem is None:
                number += 1
                yield Located(number, start, value, None, decoder.take_doubled())
                continue
        change = _depth_change(text)
        open_lines.append(text)
        depth += change or 0
        if change is None or depth <= 0:
            value, problem = _parse(decoder, "\n".join(open_lines))
            number += 1
            yield Located(number, start, value, problem, decoder.take_doubled())
            open_lines, depth = [], 0
    if open_lines:
        yield Located(number + 1, start, None, "not valid JSON: a record begins here and does not end")


class _Decoder(json.JSONDecoder):
    """Remembers a key that an object has twice: `json` keeps the last one in silence."""

    def __init__(self):
        super().__init__(object_pairs_hook=self._make_object)
        self._doubled: str | None = None

    def take_doubled(self) -> str | None:
        """The key that was found twice since the last call."""
        doubled, self._doubled = self._doubled, None
        return doubled

    def _make_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            self._doubled = next(name for name in names if names.count(name) > 1)
        return made


def _parse(decoder: _Decoder, text: str) -> tuple[Any, str | None]:
    decoder.take_doubled()
    try:
        return decoder.decode(text), None
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 20) : error.pos + 20]
        remedy = ""
        if text[error.pos :].startswith(","):
            remedy = "; write no comma between the lines, or put all records into one array"
        return None, f"not valid JSON: {error.msg} at character {error.pos + 1}, near {near!r}{remedy}"
    except RecursionError:
        return None, "lists or objects are nested too deeply to be read"
    except ValueError as error:  # an integer of thousands of digits
        return None, f"a number cannot be read: {error}"


def _depth_change(text: str) -> int | None:
    """How many more brackets a line opens than it closes; None where a string does not end in it."""
    bare = _JSON_STRING.sub("", text)
    if '"' in bare:
        return None
    return sum(map(bare.count, "{[")) - sum(map(bare.count, "}]"))


def _iterate_array(file: TextIO, path: Path) -> Iterator[Located]:
    """The items of one JSON array, decoded by `json` out of a window that grows while an item does not fit into it.

    `ijson` would do it with less code. Its fast backend writes "?" for half a surrogate pair, refuses integers beyond
    64 bits and knows no lines.
    """
    decoder = _Decoder()
    text, position, line, number = file.read(BLOCK_CHARACTERS), 0, 1, 0

    def grow() -> bool:
        nonlocal text, position
        if block := file.read(max(BLOCK_CHARACTERS, len(text) - position)):
            text, position = text[position:] + block, 0
        return bool(block)

    def advance(end: int) -> str:
        """Moves to the next character that is not white space behind `end`; "" at the end of the file."""
        nonlocal line, position
        while True:
            end = _SPACE_RUN.match(text, end).end()
            line += text.count("\n", position, end)
            position = end
            if position < len(text) or not grow():
                return text[position : position + 1]
            end = position

    def fault(expected: str) -> UserError:
        got = repr(text[position : position + 30]) if position < len(text) else "the end of the file"
        return UserError(f"{path} line {line}: expected {expected}, got {got}; repair the file there")

    advance(0)
    character = advance(position + 1)  # behind the bracket
    while character != "]":
        number, start = number + 1, line
        while True:
            decoder.take_doubled()
            try:
                value, end = decoder.raw_decode(text, position)
                is_whole, error = end < len(text), None
            except json.JSONDecodeError as found:
                error = found
                is_whole = found.pos < len(text) - _LONGEST_CUT_TOKEN and not found.msg.startswith("Unterminated")
            if is_whole or not grow():
                break
        if error is not None:
            advance(error.pos)
            raise fault(f"valid JSON ({error.msg}) in record {number}")
        yield Located(number, start, value, None, decoder.take_doubled())
        character = advance(end)
        if character == ",":
            advance(position + 1)
        elif character != "]":
            raise fault(f"',' or ']' after record {number}")
    if advance(position + 1):
        raise fault("the end of the file after the array's ']'")
