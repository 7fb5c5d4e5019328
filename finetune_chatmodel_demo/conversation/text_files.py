"""What every reader of data files shares: a row with its place, what is counted as bad, and the encoding of a text."""

import codecs
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from finetune_chatmodel_demo.common.errors import UserError

BLOCK_BYTES = 1 << 20
MAX_BAD_MESSAGES = 20
# What charset-normalizer is asked about: so many pieces of so many bytes of lines that are not ASCII.
SAMPLES, SAMPLE_BYTES = 32, 4096
LEAST_UTF8 = 6

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Located:
    """One row of a file, or, where `problem` is set, the reason why there is none.

    `number` counts rows from 1, `line` is the line that the row starts in, from 1. `doubled` is a key that an object
    of the row has twice; the last one counts.
    """

    number: int
    line: int
    value: Any
    problem: str | None = None
    doubled: str | None = None


class RowReader(Protocol):
    """What yields the rows of a data set, again and again."""

    path: Path

    def rows(self) -> Iterator[Located]:
        """Yields the rows, numbered from 1."""
        ...

    def where(self, number: int, line: int) -> str:
        """Names the place of a row that was yielded."""
        ...


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


def detect_encoding(path: Path) -> str:
    """Names the encoding of a text file: by its BOM, else UTF-8 where all of it is, else GB18030 (holds GBK).

    Most Big5, Shift-JIS and EUC-KR texts decode as GB18030 too, into other characters: charset-normalizer has to agree.

    Raises:
        UserError: The file is mostly UTF-8 with damaged bytes, neither UTF-8 nor GBK, GBK that reads better as
            something else, or a mixture. Says the line.
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
        raise UserError(f"{path} line {line}: byte {offset} is not UTF-8, although the text around it is; repair it")
    fault = _first_fault(path, "gb18030")
    if fault is None:
        _check_guess(path)
        logger.warning("%s is read as GBK (GB18030), which is a guess; save it as UTF-8 if its text looks wrong", path)
        return "gb18030"
    raise UserError(
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


def _check_guess(path: Path) -> None:
    """Refuses a file that decodes as GB18030 and is something else, or has lines of UTF-8."""
    from charset_normalizer import from_bytes

    sample, start, checked = b"", 1, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.isascii():
                continue
            if _is_long_utf8(line):
                raise UserError(f"{path} line {number} is UTF-8 in a file of another encoding; save all of it as UTF-8")
            if checked == SAMPLES:
                continue
            sample += line[:SAMPLE_BYTES]
            if len(sample) >= SAMPLE_BYTES:
                _compare_guess(path, from_bytes(sample), start)
                sample, start, checked = b"", number + 1, checked + 1
    if sample:
        _compare_guess(path, from_bytes(sample), start)


def _compare_guess(path: Path, matches: Any, line: int) -> None:
    least = min((match.chaos for match in matches), default=0)
    if any("gb18030" in match.could_be_from_charset and match.chaos <= least for match in matches):
        return
    best = matches.best()
    found = f"reads like {best.encoding}" if best else "reads like no known encoding"
    raise UserError(f"{path}: the text from line {line} on {found}, not like UTF-8 or GBK; save the file as UTF-8")


def _is_long_utf8(line: bytes) -> bool:
    """Whether a line is UTF-8 with so many other characters than ASCII that GBK would hardly look like it."""
    try:
        return sum(not character.isascii() for character in line.decode("utf-8")) >= LEAST_UTF8
    except UnicodeDecodeError:
        return False


def _is_mostly_utf8(path: Path, offset: int) -> bool:
    """Whether more characters around `offset` decode as UTF-8 than fail; of GBK text few do."""
    with open(path, "rb") as file:
        file.seek(max(0, offset - BLOCK_BYTES // 2))
        text = file.read(BLOCK_BYTES).decode("utf-8", errors="replace")
    faults = text.count("\ufffd")
    return sum(not character.isascii() for character in text) - faults > faults
