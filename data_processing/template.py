"""The YAML template that says which turns a row of the CSV becomes; see `templates/*.yaml` for the language.

`template_reader.load_template` reads one; `template_reader.check_columns` holds it against a table.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation")
COMPARISONS = ("not", "at_least", "at_most")


@dataclass(frozen=True)
class Phrase:
    """A wording: literal text and {column} placeholders in turn. `place` is where the template says it."""

    text: str
    place: str
    parts: tuple[tuple[str, str | None], ...]

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(name for _, name in self.parts if name)

    def fill(self, values: Mapping[str, str]) -> str:
        return "".join(literal + (values[name] if name else "") for literal, name in self.parts)


@dataclass(frozen=True)
class Condition:
    """One line of a `where`: what a column's cell must be. `comparison` is "is" or one of COMPARISONS."""

    column: str
    comparison: str
    wanted: tuple[str | float, ...]
    place: str

    def holds(self, row: Mapping[str, str]) -> bool:
        cell = row[self.column]
        if self.comparison in ("is", "not"):
            return any(_equals(cell, value) for value in self.wanted) == (self.comparison == "is")
        number, limit = _as_number(cell), float(self.wanted[0])
        if number is None:
            return False
        return number >= limit if self.comparison == "at_least" else number <= limit


@dataclass(frozen=True)
class Answer:
    """Wordings that are true of a row where every condition holds and no cell they name is empty."""

    where: tuple[Condition, ...]
    say: tuple[Phrase, ...]


@dataclass(frozen=True)
class Question:
    """One optional turn. `phrasings`: a pool for each split; `probability`: that a conversation considers it.

    `opens`: only ever asked first.
    """

    place: str
    column: str | None
    probability: float
    opens: bool
    where: tuple[Condition, ...]
    phrasings: Mapping[str, tuple[Phrase, ...]]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Subject:
    """The placeholder for what a conversation is about: named in the first turn, mostly a pronoun later.

    `known_by`: columns that tell which row is meant as well as its name does (an English name, a number).
    """

    placeholder: str
    opening: tuple[Phrase, ...]
    later: tuple[Phrase, ...]
    known_by: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationHints:
    """What `question_builder` and `evaluate.py` are told beyond what they infer from the cells.

    `fields`: column → any of kind, unit, separator, labels, aliases. `unanswerable`: questions about what the CSV does
    not hold.
    """

    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unanswerable: tuple[Phrase, ...] = ()


@dataclass(frozen=True)
class Template:
    """A loaded template file. `turns`: fewest and most question-answer pairs of a conversation."""

    path: Path
    turns: tuple[int, int]
    per_row: Mapping[str, int]
    order: str
    where: tuple[Condition, ...]
    subject: Subject | None
    system_probability: float
    system_prompts: tuple[Phrase, ...]
    questions: tuple[Question, ...]
    evaluation: EvaluationHints = EvaluationHints()

    @property
    def has_validation(self) -> bool:
        return self.per_row["validation"] > 0

    def matches(self, row: Mapping[str, str]) -> bool:
        return all(condition.holds(row) for condition in self.where)

    def is_opening(self, phrase: Phrase) -> bool:
        """Can a conversation begin with this wording, i.e. does it name what the conversation is about?"""
        if self.subject is None or phrase.names & {self.subject.placeholder, *self.subject.known_by}:
            return True
        return any(opening.names <= phrase.names for opening in self.subject.opening)

    def missing_columns(self, columns: list[str]) -> dict[str, str]:
        """Column that the template names and the table lacks → where the template names it first."""
        own = {self.subject.placeholder} if self.subject else set()
        missing: dict[str, str] = {}
        for name, place in self._named_columns():
            if name not in columns and name not in own:
                missing.setdefault(name, place)
        return missing

    def _named_columns(self) -> Iterable[tuple[str, str]]:
        """Every (column, place) that the template mentions."""
        conditions, phrases = [*self.where], [*self.system_prompts, *self.evaluation.unanswerable]
        yield from ((column, f"evaluation.fields.{column}") for column in self.evaluation.fields)
        if self.subject:
            phrases += [*self.subject.opening, *self.subject.later]
            yield from ((name, "subject.known_by") for name in self.subject.known_by)
        for question in self.questions:
            if question.column:
                yield question.column, f"{question.place}.column"
            conditions += question.where
            for split in SPLITS:
                phrases += question.phrasings[split]
            for answer in question.answers:
                conditions += answer.where
                phrases += answer.say
        for condition in conditions:
            yield condition.column, condition.place
        for phrase in phrases:
            for _, name in phrase.parts:
                if name:
                    yield name, phrase.place


def normal_form(phrase: Phrase, subject: Subject | None) -> str:
    """The wording without punctuation and blanks, with one mark (\\0) for every way to name the subject."""
    text = "".join(literal + (f"{{{name}}}" if name else "") for literal, name in phrase.parts)
    if subject:
        ways = sorted({way.text for way in (*subject.opening, *subject.later)}, key=len, reverse=True)
        for way in (f"{{{subject.placeholder}}}", *ways):
            text = text.replace(way, "\0")
    return re.sub(r"[^\w\0{}]", "", text)


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _equals(cell: str, value: str | float) -> bool:
    """A number in the YAML matches by value (1 and a cell 1.0), a text to the letter."""
    return cell == value if isinstance(value, str) else _as_number(cell) == value
