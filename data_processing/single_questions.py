"""Every question that a template can open a conversation with, row by row, and fair samples of them.

Exercised by `python data_processing/question_builder.py`.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from data_processing.conversation_builder import find_answers, is_filled, say
from data_processing.conversation_template import Phrase, Question, Template
from data_processing.holding_out import is_held_out, subject_name
from finetune_chatmodel_demo.evaluation.fact_checking import check_reply
from finetune_chatmodel_demo.evaluation.facts import FactTable
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
                    if check_reply(self.table, column=column, subject=subject, reply=wording).outcome == "exact"
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
