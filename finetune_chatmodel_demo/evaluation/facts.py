"""The facts that answers are held against: what each column holds, every subject's cells, all names a reply may drop.

What a column holds (a number with a unit, a list, a text, yes and no) is inferred from its cells;
`question_builder.py --show_fields` prints it for a CSV, and a template's `evaluation.fields` overrides it.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from typing import Any

from finetune_chatmodel_demo.common.errors import UserError

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


def normalize(text: str) -> str:
    """NFKC, lower case, one kind of quotes, no repeated white space: what both sides of a comparison go through."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub("[‘’]", "'", re.sub("[“”]", '"', text))
    return re.sub(r"[^\S\n]+", " ", text).strip()


def check_texts(*values: Any) -> None:
    """Raises a TypeError where a value of a question file is no text."""
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"expected a text, got {value!r:.40}")


def canonical(number: Decimal) -> Decimal:
    """0.70 → 0.7, 100.0 → 100: the one spelling by which numbers are compared."""
    return Decimal(format(number.normalize(), "f"))


def is_cjk(character: str) -> bool:
    """A letter of a script that puts no spaces between words."""
    return character.isalpha() and not character.isascii() and ord(character) >= 0x2E80


@dataclass(frozen=True)
class Field:
    """One column.

    Attributes:
        column: its name in the CSV.
        kind: number, list, text or flag. A text of several clauses is compared clause by clause, as a list is.
        unit: of a number, as a key of UNITS or a word of its own; empty: none.
        separator: between the items of a list.
        labels: what questions and answers call the column; the first is used in new questions.
        aliases: other word → the item that it means.
        vocabulary: every item that the column has anywhere in the table, normalized.
        left, right: characters that the template puts directly before and after the column's value.
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

    @property
    def label(self) -> str:
        return self.labels[0] if self.labels else self.column

    @property
    def measure(self) -> str:
        """What the unit measures; empty without a unit."""
        return UNITS[self.unit][0] if self.unit in UNITS else self.unit

    def items(self, cell: str) -> tuple[str, ...]:
        """The normalized items of a cell; none for an empty one. A number is one item without its unit.

        Raises:
            UserError: a cell of a number column holds not exactly one number.
        """
        text = normalize(cell)
        if not text:
            return ()
        parts = [text]
        if self.kind == "number":
            found = NUMBER.findall(text)
            if len(found) != 1:
                raise UserError(f"column {self.column} is declared a number, but a cell is not: {text!r}")
            parts = [str(canonical(Decimal(found[0].replace(",", ""))))]
        elif self.kind == "list":
            parts = text.split(normalize(self.separator) or " ")
        elif self.kind == "text" and (len(text) > LONGEST_ITEM * 2 or SENTENCE_MARKS.search(text)):
            parts = CLAUSE_MARKS.split(text)
        return tuple(dict.fromkeys(item.strip() for item in parts if item.strip()))

    def to_json(self) -> dict[str, Any]:
        """As question files hold it."""
        return {**self.__dict__, "labels": list(self.labels), "vocabulary": sorted(self.vocabulary)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Field":
        """The inverse of `to_json`; files of older versions hold one key more."""
        plain = {key: data[key] for key in ("column", "kind", "unit", "separator", "left", "right")}
        check_texts(*plain.values(), *data["labels"], *data["vocabulary"], *data["aliases"].values())
        sets = {"labels": tuple(data["labels"]), "vocabulary": frozenset(data["vocabulary"])}
        return cls(**plain, **sets, aliases=data["aliases"])


def infer_kind(cells: Iterable[str]) -> tuple[str, str, str]:
    """Judge a column by its cells.

    Returns:
        (kind, unit, separator). "flag": nothing but 0 and 1, 是 and 否 and the like; "number": every cell is one
        number, bare or with one and the same unit; "list": a separator occurs, and all items of at least 98 % of the
        cells are short (14 characters) and hold no sentence; else "text".
    """
    texts = [text for cell in cells if (text := normalize(cell))]
    if set(texts) <= YES | NO and len(set(texts)) > 1:
        return "flag", "", "、"
    numbers = [re.fullmatch(rf"({NUMBER.pattern}) ?(\D{{0,4}})", text) for text in texts]
    if texts and all(numbers) and len(units := {match.group(2) for match in numbers}) == 1:
        return "number", units.pop(), "、"
    for separator in SEPARATORS:
        if any(separator in text for text in texts):
            short = [all(_is_short(item) for item in text.split(separator)) for text in texts]
            if sum(short) >= 0.98 * len(short):
                return "list", "", separator
    return "text", "", "、"


def _is_short(item: str) -> bool:
    return 0 < len(item.strip()) <= LONGEST_ITEM and not SENTENCE_MARKS.search(item)


def infer_unit(following: Sequence[str]) -> str:
    """The unit that answers put behind a column's placeholder: the longest word of UNITS that all texts start with."""
    starts = [normalize(text) for text in following]
    shared = [unit for unit in UNITS if starts and all(text.startswith(unit) for text in starts)]
    return max(shared, key=len, default="")


def build_field(
    column: str, cells: Sequence[str], *, declared: Mapping[str, Any] | None = None, unit: str = "", **hints: Any
) -> Field:
    """A field from its cells, the unit that the template's answers show, and what the template declares.

    Args:
        declared: any of kind, unit, separator, labels, aliases; wins over what is inferred.
        hints: left, right, as in `Field`.

    Raises:
        UserError: a declared number column has a cell that is none, or an alias stands for no item.
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
    items = frozenset(item for cell in cells for item in found.items(cell))
    if found.kind not in ("list", "text"):
        return found
    if unknown := sorted(set(found.aliases.values()) - items):
        raise UserError(f"aliases of column {column} stand for {unknown[0]!r}, which no cell holds")
    return replace(found, vocabulary=items)


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
    """What is known; kept inside a question file.

    Attributes:
        fields: column → its field.
        cells: subject → column → cell, for the subjects that questions are about.
        names: normalized name → subject, for every row of the table: also rows that nobody asks about.
    """

    fields: Mapping[str, Field]
    cells: Mapping[str, Mapping[str, str]]
    names: Mapping[str, str]

    @cached_property
    def labels(self) -> dict[str, str]:
        """What a column is called, normalized → the column; of two with one label, the first."""
        pairs = [(normalize(label), field.column) for field in self.fields.values() for label in field.labels]
        return dict(reversed(pairs))

    @cached_property
    def naming_columns(self) -> frozenset[str]:
        """Columns whose values are names of subjects (进化自)."""
        return frozenset(
            column for column, field in self.fields.items() if any(item in self.names for item in field.vocabulary)
        )

    @cached_property
    def _words(self) -> dict[str, tuple[set[str], set[str]]]:
        """Known word → (subjects that it names, columns of which it is an item)."""
        words: dict[str, tuple[set[str], set[str]]] = {}
        for name, subject in self.names.items():
            words.setdefault(name, (set(), set()))[0].add(subject)
        for column, held in self.fields.items():
            for word in (*held.vocabulary, *held.aliases):
                words.setdefault(word, (set(), set()))[1].add(column)
        return words

    @cached_property
    def _lengths(self) -> dict[str, list[int]]:
        """First character of a known word → lengths of such words, the longest first."""
        lengths: dict[str, set[int]] = {}
        for word in filter(None, self._words):
            lengths.setdefault(word[0], set()).add(len(word))
        return {first: sorted(found, reverse=True) for first, found in lengths.items()}

    def items(self, subject: str, column: str) -> tuple[str, ...]:
        """Normalized items of a subject's cell; none where the cell is empty."""
        return self.fields[column].items(self.cells[subject].get(column, ""))

    def find(self, text: str) -> list[Token]:
        """The known words of a normalized text, without overlaps, the longest first: no 火 stands in 火恐龙."""
        tokens, start = [], 0
        while start < len(text):
            token = self._find_at(text, start)
            if token is not None:
                tokens.append(token)
            start = token.end if token else start + 1
        return tokens

    def _find_at(self, text: str, start: int) -> Token | None:
        """The longest known word that starts here; one in Latin letters is a whole word."""
        for length in self._lengths.get(text[start], ()):
            end = start + length
            if text[start:end] in self._words and not (_cuts_word(text, start) or _cuts_word(text, end)):
                subjects, columns = self._words[text[start:end]]
                return Token(start, end, text[start:end], frozenset(subjects), frozenset(columns))
        return None

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
        check_texts(*data["names"].values(), *(cell for row in data["cells"].values() for cell in row.values()))
        return cls({field.column: field for field in fields}, data["cells"], data["names"])


def _cuts_word(text: str, position: int) -> bool:
    """Does the position lie between two letters of a script that puts spaces between words?"""
    pair = text[max(position - 1, 0) : position + 1]
    return position > 0 and len(pair) == 2 and pair.isascii() and pair.isalnum()


def normalized_names(names: Mapping[str, str]) -> dict[str, str]:
    """`names` with normalized keys, as `FactTable` wants them."""
    return {normalize(name): subject for name, subject in names.items() if normalize(name)}
