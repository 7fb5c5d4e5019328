"""Every question that a template can open a conversation with, row by row, and fair samples of them."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from data_processing.conversation_builder import find_answers, is_filled, say
from data_processing.holding_out import is_held_out, subject_name
from data_processing.template import Phrase, Question, Template
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.evaluation.facts import (
    FactTable,
    Field,
    build_field,
    infer_kind,
    infer_unit,
    is_cjk,
    normalized_names,
)
from finetune_chatmodel_demo.evaluation.judge import check_reply
from finetune_chatmodel_demo.evaluation.questions import Dialogue, Turn
from finetune_chatmodel_demo.evaluation.reading import read_reply

Row = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Askable:
    """A question of the template that a row can answer."""

    subject: str
    question: Question
    row: Row


class QuestionPool:
    """What can be asked about the rows of a CSV.

    Args:
        hold_out: share of held-out rows, as `is_held_out` takes it.

    Attributes:
        held_out: subjects of the rows that are held out.
        left_out: reason → how many pairs of row and question cannot be asked.
    """

    def __init__(self, template: Template, table: FactTable, rows: Sequence[Row], hold_out: float) -> None:
        self.template, self.table = template, table
        self.left_out: Counter[str] = Counter()
        self._references: dict[Askable, str | None] = {}
        self.rows: dict[str, Row] = {}
        for row in filter(template.matches, rows):
            name = subject_name(template, row)
            if name in table.cells:
                self.rows[name] = row
            else:
                self.left_out["rows without a name of their own"] += 1
        self.held_out = {name for name in self.rows if is_held_out(name, hold_out)}
        self.askable = list(self._find_askable())

    def _find_askable(self) -> Iterator[Askable]:
        """Questions about one column that has an answer."""
        several = sum(question.column is None for question in self.template.questions)
        if several:
            self.left_out["questions about several columns at once"] = several
        for subject, row in self.rows.items():
            for question in self.template.questions:
                if question.column is None or not all(condition.holds(row) for condition in question.where):
                    continue
                if find_answers(self.template, question, row):
                    yield Askable(subject, question, row)
                else:
                    self.left_out["empty cells for which the template has no answer"] += 1

    def wordings(self, question: Question, row: Row) -> tuple[str, ...]:
        """The template's answers, with every way to name the subject."""
        found: dict[str, None] = {}
        for phrase in find_answers(self.template, question, row):
            for way in self._ways(phrase, row):
                found[way] = None
        return tuple(found)

    def _ways(self, phrase: Phrase, row: Row) -> Iterator[str]:
        subject = self.template.subject
        if subject is None or subject.placeholder not in phrase.names:
            yield phrase.fill(row)
            return
        for way in (*subject.opening, *subject.later):
            if is_filled(self.template, way, row):
                yield phrase.fill({**row, subject.placeholder: way.fill(row)})

    def reference(self, ask: Askable) -> str | None:
        """The first of the wordings that the checker finds exact.

        None where there is none, because the template's answers do not state the cell: then a question would be unfair.
        """
        if ask not in self._references:
            column, subject = ask.question.column, ask.subject
            self._references[ask] = next(
                (
                    wording
                    for wording in self.wordings(ask.question, ask.row)
                    if check_reply(self.table, column=column, subject=subject, reply=wording, question=wording).outcome
                    == "exact"
                ),
                None,
            )
            if self._references[ask] is None:
                self.left_out[f"answers about {column} that do not state the cell"] += 1
        return self._references[ask]

    def phrases(self, ask: Askable, split: str, *, opens: bool) -> list[Phrase]:
        """The wordings of a split that a row can fill, to open a conversation or to go on with it."""
        pool = [phrase for phrase in ask.question.phrasings[split] if is_filled(self.template, phrase, ask.row)]
        return [phrase for phrase in pool if self.template.is_opening(phrase)] if opens else pool

    def turn(self, ask: Askable, text: str, group: str, kind: str) -> Turn:
        """A turn that asks it in these words."""
        reference, wordings = self.reference(ask), self.wordings(ask.question, ask.row)
        assert reference is not None, "ask for the reference before the turn"
        return Turn(text, group, kind, ask.subject, ask.question.column, reference, wordings)

    def gives_away(self, ask: Askable, text: str) -> bool:
        """Does the question state a part of its answer (so that copying it would pay)?"""
        truth = frozenset(self.table.items(ask.subject, ask.question.column))
        statement = text.rstrip("？?。 ")
        reading = read_reply(self.table, statement, column=ask.question.column, subject=ask.subject, expected=truth)
        return bool(truth & (reading.stated | reading.embedded))

    def system(self, row: Row, draw: random.Random) -> str | None:
        """A system prompt, as often as the training data have one."""
        prompts = [phrase for phrase in self.template.system_prompts if is_filled(self.template, phrase, row)]
        if prompts and draw.random() < self.template.system_probability:
            return draw.choice(prompts).fill(row)
        return None

    def sample(self, group: str, split: str, held_out: bool, count: int, draw: random.Random) -> Iterator[Dialogue]:
        """Conversations of one question each: the columns in turn, rows and wordings at random, no pair twice."""
        by_column: dict[str, list[Askable]] = {}
        for ask in self.askable:
            if (ask.subject in self.held_out) == held_out and self.phrases(ask, split, opens=True):
                by_column.setdefault(ask.question.column, []).append(ask)
        for found in by_column.values():
            draw.shuffle(found)
        made = 0
        while made < count and any(by_column.values()):
            for found in by_column.values():
                while found and made < count:
                    ask = found.pop()
                    if self.reference(ask) is None:
                        continue
                    phrase = draw.choice(self.phrases(ask, split, opens=True))
                    text = say(self.template, phrase, ask.row, True, draw)
                    if self.gives_away(ask, text):
                        self.left_out["wordings that give the answer away"] += 1
                        continue
                    made += 1
                    yield Dialogue(self.system(ask.row, draw), (self.turn(ask, text, group, "opening"),))
                    break

    def report(self) -> str:
        """Why questions were left out, in one line."""
        return ", ".join(f"{reason}: {count}" for reason, count in self.left_out.items()) or "the CSV has no rows"


Row = Mapping[str, str]


def build_fact_table(template: Template, rows: Sequence[Row]) -> FactTable:
    """The facts of a CSV.

    Args:
        template: its columns have been checked.
        rows: all rows of the CSV: those outside of the template's `where` lend their names and values, so that a reply
            which uses them is found out, and are not asked about.

    Raises:
        UserError: a declaration contradicts the cells, or no question names a column.
    """
    columns = list(dict.fromkeys(question.column for question in template.questions if question.column))
    unknown = [column for column in template.evaluation.fields if column not in columns]
    if unknown:
        raise UserError(f"{template.path} at evaluation.fields.{unknown[0]}: no question has this column")
    if not columns:
        raise UserError(f"{template.path}: no question has a `column`, so no answer can be checked against a cell")
    try:
        fields = {column: _build_field(template, column, [row[column] for row in rows]) for column in columns}
    except UserError as error:
        raise UserError(f"{template.path}: {error}") from None
    fields = {column: _with_related_words(field, fields) for column, field in fields.items()}
    doubled = _doubled_names(template, rows)
    cells = {}
    for row in filter(template.matches, rows):
        name = subject_name(template, row)
        if name and name not in doubled:
            cells[name] = {column: row[column] for column in columns}
    return FactTable(fields, cells, normalized_names(dict(_names(template, rows, fields))))


def _build_field(template: Template, column: str, cells: Sequence[str]) -> Field:
    answers = [case.say for question in template.questions if question.column == column for case in question.answers]
    around = list(_around([phrase for say in answers for phrase in say], column))
    declared = template.evaluation.fields.get(column, {})
    if around and "kind" not in declared and infer_kind(cells)[0] == "flag" and set(cells) <= {"0", "1", ""}:
        declared = {**declared, "kind": "number"}  # an answer that spells 0 and 1 out is no yes or no
    return build_field(
        column,
        cells,
        declared=declared,
        unit=infer_unit([behind for _, behind in around]),
        left="".join(sorted({before[-1] for before, _ in around if before and is_cjk(before[-1])})),
        right="".join(sorted({behind[0] for _, behind in around if behind and is_cjk(behind[0])})),
    )


def _with_related_words(field: Field, fields: Mapping[str, Field]) -> Field:
    """Adds the words of columns that share half of theirs: 一般 is nobody's weakness, and a wrong answer there."""
    vocabulary = set(field.vocabulary)
    for other in fields.values():
        shared = field.vocabulary & other.vocabulary
        if shared and 2 * len(shared) >= min(len(field.vocabulary), len(other.vocabulary)):
            vocabulary |= other.vocabulary
    return replace(field, vocabulary=frozenset(vocabulary))


def _around(wordings: Sequence[Phrase], column: str) -> Iterator[tuple[str, str]]:
    """(literal text before, literal text behind) of every placeholder of the column."""
    for phrase in wordings:
        for i, (literal, name) in enumerate(phrase.parts):
            if name == column:
                yield literal, phrase.parts[i + 1][0]


def _doubled_names(template: Template, rows: Sequence[Row]) -> set[str]:
    """Names that several rows share: nobody could say which of them a question means."""
    names = [subject_name(template, row) for row in rows]
    return {name for name in set(names) if names.count(name) > 1}


def _names(template: Template, rows: Sequence[Row], fields: Mapping[str, Field]) -> Iterator[tuple[str, str]]:
    """(a way to name a row, its subject): the openings, and columns of texts that are different in every row."""
    known_by = set(template.subject.known_by) if template.subject else set()
    identifying = [
        column
        for column, field in fields.items()
        if field.kind == "text" and (column in known_by or _is_identifier([row[column] for row in rows]))
    ]
    for row in rows:
        subject = subject_name(template, row)
        for way in template.subject.opening if template.subject else ():
            if all(row[name] for name in way.names):
                yield way.fill(row), subject
        yield subject, subject
        yield from ((row[column], subject) for column in identifying if row[column])


def _is_identifier(cells: Sequence[str]) -> bool:
    filled = [cell for cell in cells if cell]
    return len(filled) > 9 and len(set(filled)) == len(filled) == len(cells)
