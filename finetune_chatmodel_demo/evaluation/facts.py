"""The facts that answers are held against: fields, the cells of every subject, and all names that a reply may drop.

Built by `data_processing/question_builder.py`; kept inside a question file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finetune_chatmodel_demo.evaluation.fields import Field, normalize


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
        for column, field in table.fields.items():
            for word in (*field.vocabulary, *field.aliases):
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
