"""What a column of a table holds: a number with a unit, a list, a text, or yes and no; inferred from its cells.

`question_builder.py --show_fields` prints what was inferred for a CSV; a template's `fields:` overrides it.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any

from finetune_chatmodel_demo.common.errors import UserError

KINDS = ("number", "list", "text", "flag")
MEASURES = {
    "length": "米 1, 公尺 1, m 1, 厘米 0.01, 公分 0.01, cm 0.01, 毫米 0.001, mm 0.001, 分米 0.1, 千米 1000, "
    "公里 1000, km 1000",
    "mass": "公斤 1, 千克 1, kg 1, 克 0.001, g 0.001, 斤 0.5, 吨 1000, 磅 0.45359237",
    "money": "元 1, 块 1, 块钱 1, 人民币 1",
    "age": "岁 1, 周岁 1",
    "time": "秒 1, 秒钟 1, 分钟 60, 小时 3600",
    "temperature": "℃ 1, °c 1, 摄氏度 1",
} | {unit: f"{unit} 1" for unit in ("级", "天", "年", "月", "次", "度", "层", "页", "分", "%")}
# Unit → (what it measures, how many of the measure's first unit it is). Keys are as `normalize` leaves them.
UNITS: dict[str, tuple[str, Decimal]] = {}
for _measure, _units in MEASURES.items():
    for _entry in _units.split(", "):
        _name, _factor = _entry.split(" ")
        UNITS[unicodedata.normalize("NFKC", _name)] = (_measure, Decimal(_factor))
NUMBER = re.compile(r"(?<!\d)(?<!\d\.)-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\.?\d)")
SEPARATORS = ("、", ";", "|", "/", ",")
YES = frozenset({"1", "是", "有", "true", "yes"})
NO = frozenset({"0", "否", "无", "没有", "false", "no"})
LONGEST_ITEM = 14
SENTENCE_MARKS = re.compile(r"[。!?\n:]")
CLAUSE_MARKS = re.compile(r"[。!?\n;,，、]+")


@dataclass(frozen=True)
class Field:
    """One column.

    Attributes:
        column: its name in the CSV.
        kind: one of KINDS. A "text" of several clauses is compared clause by clause, as a list is.
        unit: of a number, as a key of UNITS or a word of its own; empty: none.
        separator: between the items of a list.
        labels: what questions and answers call the column; the first is used in new questions.
        aliases: other word → the item that it means.
        vocabulary: every item that the column has anywhere in the table, normalized.
        left, right: characters that the template puts directly before and after the column's value.
        empty_words: pairs of characters from the template's wordings for an empty cell, which an answer "none" shares.
    """

    column: str
    kind: str
    unit: str = ""
    separator: str = "、"
    labels: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    vocabulary: frozenset[str] = frozenset()
    left: str = ""
    right: str = ""
    empty_words: frozenset[str] = frozenset()

    @property
    def label(self) -> str:
        return self.labels[0] if self.labels else self.column

    def items(self, cell: str) -> tuple[str, ...]:
        """The normalized items of a cell; none for an empty one. A number is one item without its unit."""
        text = normalize(cell)
        if not text:
            return ()
        if self.kind == "number":
            return (str(plain_number(text)),)
        if self.kind == "list":
            parts = text.split(normalize(self.separator) or " ")
            return tuple(dict.fromkeys(item.strip() for item in parts if item.strip()))
        if self.kind == "text" and (len(text) > LONGEST_ITEM * 2 or SENTENCE_MARKS.search(text)):
            return tuple(dict.fromkeys(filter(None, (part.strip() for part in CLAUSE_MARKS.split(text)))))
        return (text,)

    def to_json(self) -> dict[str, Any]:
        """As question files hold it."""
        return {
            "column": self.column, "kind": self.kind, "unit": self.unit, "separator": self.separator,
            "labels": list(self.labels), "aliases": dict(self.aliases), "vocabulary": sorted(self.vocabulary),
            "left": self.left, "right": self.right, "empty_words": sorted(self.empty_words),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Field":
        """The inverse of `to_json`."""
        return cls(
            **{key: data[key] for key in ("column", "kind", "unit", "separator", "left", "right")},
            labels=tuple(data["labels"]),
            aliases=dict(data["aliases"]),
            vocabulary=frozenset(data["vocabulary"]),
            empty_words=frozenset(data["empty_words"]),
        )


def normalize(text: str) -> str:
    """NFKC, lower case, one kind of quotes, no repeated white space: what both sides of a comparison go through."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub("[‘’]", "'", re.sub("[“”]", '"', text))
    return re.sub(r"[^\S\n]+", " ", text).strip()


def plain_number(text: str) -> Decimal:
    """The number of a normalized cell, with or without a unit behind it; equal numbers become equal.

    Raises:
        UserError: there is not exactly one number.
    """
    found = NUMBER.findall(text)
    if len(found) != 1:
        raise UserError(f"expected one number, got {text!r}")
    return canonical(Decimal(found[0].replace(",", "")))


def canonical(number: Decimal) -> Decimal:
    """0.70 → 0.7, 100.0 → 100: the one spelling by which numbers are compared."""
    return Decimal(format(number.normalize(), "f"))


def infer_kind(cells: Iterable[str]) -> tuple[str, str, str]:
    """Judge a column by its cells.

    Returns:
        (kind, unit, separator). "flag": nothing but 0 and 1, 是 and 否 and the like; "number": every cell is one
        number, bare or with one and the same unit; "list": a separator occurs, and all items of at least 98 % of the
        cells are short (14 characters) and hold no sentence; else "text".
    """
    texts = [text for cell in cells if (text := normalize(cell))]
    if not texts:
        return "text", "", "、"
    if set(texts) <= YES | NO and len(set(texts)) > 1:
        return "flag", "", "、"
    numbers = [re.fullmatch(rf"({NUMBER.pattern}) ?(\D{{0,4}})", text) for text in texts]
    if all(numbers):
        units = {match.group(2) for match in numbers}
        if len(units) == 1:
            return "number", units.pop(), "、"
    for separator in SEPARATORS:
        if not any(separator in text for text in texts):
            continue
        short = [all(_is_short(item) for item in text.split(separator)) for text in texts]
        if sum(short) >= 0.98 * len(short):
            return "list", "", separator
    return "text", "", "、"


def _is_short(item: str) -> bool:
    return 0 < len(item.strip()) <= LONGEST_ITEM and not SENTENCE_MARKS.search(item)


def infer_unit(following: Sequence[str]) -> str:
    """The unit that answers put behind a column's placeholder: the longest word of UNITS that all texts start with.

    A wording with nothing but punctuation there makes no difference to the others only where none has a unit.
    """
    starts = [normalize(text) for text in following]
    shared = [unit for unit in UNITS if starts and all(text.startswith(unit) for text in starts)]
    return max(shared, key=len, default="")


def build_field(
    column: str, cells: Sequence[str], *, declared: Mapping[str, Any] | None = None, unit: str = "", **hints: Any
) -> Field:
    """A field from its cells, the unit that the template's answers show, and what the template declares.

    Args:
        declared: any of kind, unit, separator, labels, aliases; wins over what is inferred.
        hints: left, right, empty_words, as in `Field`.

    Raises:
        UserError: a declared number column has a cell that is none.
    """
    declared = declared or {}
    kind, cell_unit, separator = infer_kind(cells)
    found = Field(
        column=column,
        kind=declared.get("kind", kind),
        unit=normalize(declared.get("unit", cell_unit or unit)),
        separator=declared.get("separator", separator),
        labels=tuple(dict.fromkeys([*declared.get("labels", ()), column])),
        aliases={normalize(word): normalize(item) for word, item in declared.get("aliases", {}).items()},
        **hints,
    )
    items: set[str] = set()
    for cell in cells:
        try:
            items.update(found.items(cell))
        except UserError as error:
            raise UserError(f"column {column} is declared a number, but a cell is not: {error}") from None
    unknown = sorted(set(found.aliases.values()) - items)
    if unknown and found.kind in ("list", "text"):
        raise UserError(f"aliases of column {column} stand for {unknown[0]!r}, which no cell holds")
    vocabulary = frozenset(items) if found.kind in ("list", "text") else frozenset()
    return Field(**{**found.__dict__, "vocabulary": vocabulary})


@dataclass(frozen=True)
class Token:
    """A known word in a normalized text: `text[start:end]`. `subjects` it names, `columns` of which it is an item."""

    start: int
    end: int
    text: str
    subjects: frozenset[str]
    columns: frozenset[str]


@dataclass(frozen=True)
class FactTable:
    """What is known.

    Attributes:
        fields: column → its field.
        cells: subject → column → cell, for the subjects that questions are about.
        names: normalized name → subject, for every row of the table: also rows that nobody asks about.
    """

    fields: Mapping[str, Field]
    cells: Mapping[str, Mapping[str, str]]
    names: Mapping[str, str]

    @cached_property
    def lexicon(self) -> "Lexicon":
        return Lexicon(self)

    @cached_property
    def labels(self) -> dict[str, str]:
        """What a column is called, normalized → the column; of two with one label, the first."""
        pairs = [(normalize(label), field.column) for field in self.fields.values() for label in field.labels]
        return dict(reversed(pairs))

    @cached_property
    def naming_columns(self) -> frozenset[str]:
        """Columns whose values are names of subjects (进化自)."""
        kinds = ("list", "text")
        return frozenset(
            column
            for column, field in self.fields.items()
            if field.kind in kinds and any(item in self.names for item in field.vocabulary)
        )

    def items(self, subject: str, column: str) -> tuple[str, ...]:
        """Normalized items of a subject's cell; none where the cell is empty."""
        return self.fields[column].items(self.cells[subject].get(column, ""))

    def to_json(self) -> dict[str, Any]:
        """As question files hold it."""
        return {
            "fields": [field.to_json() for field in self.fields.values()],
            "cells": {subject: dict(cells) for subject, cells in self.cells.items()},
            "names": dict(self.names),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FactTable":
        """The inverse of `to_json`."""
        fields = [Field.from_json(field) for field in data["fields"]]
        return cls({field.column: field for field in fields}, data["cells"], data["names"])


class Lexicon:
    """Finds names and items of a table in a text, the longest first: 火恐龙 is a name, and no 火 stands in it."""

    def __init__(self, table: FactTable) -> None:
        subjects: dict[str, set[str]] = {}
        columns: dict[str, set[str]] = {}
        for name, subject in table.names.items():
            subjects.setdefault(name, set()).add(subject)
        for column, held in table.fields.items():
            for word in (*held.vocabulary, *held.aliases):
                columns.setdefault(word, set()).add(column)
        self._meanings = {
            word: (frozenset(subjects.get(word, ())), frozenset(columns.get(word, ())))
            for word in subjects.keys() | columns.keys()
            if word
        }
        lengths: dict[str, set[int]] = {}
        for word in self._meanings:
            lengths.setdefault(word[0], set()).add(len(word))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}

    def find(self, text: str) -> list[Token]:
        """The known words of a normalized text, from left to right, without overlaps."""
        tokens, i = [], 0
        while i < len(text):
            token = self._at(text, i)
            if token is not None:
                tokens.append(token)
            i = token.end if token else i + 1
        return tokens

    def _at(self, text: str, start: int) -> Token | None:
        if _is_latin(text[start]) and start and _is_latin(text[start - 1]):
            return None  # inside a word
        for length in self._lengths.get(text[start], ()):
            end = start + length
            word = text[start:end]
            if word not in self._meanings:
                continue
            if end < len(text) and _is_latin(word[-1]) and _is_latin(text[end]):
                continue
            subjects, columns = self._meanings[word]
            return Token(start, end, word, subjects, columns)
        return None


def _is_latin(character: str) -> bool:
    """A letter or digit of a script that puts spaces between words."""
    return character.isascii() and character.isalnum()


def is_cjk(character: str) -> bool:
    """A letter of a script that puts no spaces between words."""
    return character.isalpha() and not character.isascii() and ord(character) >= 0x2E80


def normalized_names(names: Mapping[str, str]) -> dict[str, str]:
    """`names` with normalized keys, as `FactTable` wants them."""
    return {normalize(name): subject for name, subject in names.items() if normalize(name)}
