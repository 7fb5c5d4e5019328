"""Questions out of a CSV and a template: `evaluate.py --csv` or `python data_processing/question_builder.py`.

Never from the training text: every question is a wording of the template, filled from a row, and its right answer is
the row's cell. Four ways to ask: wordings that training shows (`train`), wordings that it does not (`validation`),
conversations in an order that it does not have (pronouns that refer back, a second subject in the middle, a question
that the table cannot answer), and rows that were held out of it.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_processing.conversation_builder import say
from data_processing.csv_rows import CsvRows
from data_processing.holding_out import check_share
from data_processing.template import Phrase, Template, normal_form
from data_processing.template_reader import check_columns, load_template
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.evaluation.facts import FactTable, normalize
from finetune_chatmodel_demo.evaluation.question_pool import Askable, QuestionPool, build_fact_table
from finetune_chatmodel_demo.evaluation.questions import (
    GROUPS,
    HELD_OUT_TRAINED,
    HELD_OUT_UNSEEN,
    MULTI_TURN,
    TRAINED,
    UNANSWERABLE,
    UNSEEN,
    Dialogue,
    QuestionSet,
    Turn,
)

# What no table here has, with the word that a column of that content would have in its name.
UNANSWERABLE_QUESTIONS = {
    "生日": "{}的生日是哪一天？",
    "价格": "{}的价格是多少元？",
    "电话": "{}的电话号码是多少？",
    "设计": "{}的设计者叫什么名字？",
    "网": "{}的官方网站是什么？",
    "住": "{}住在哪条街上？",
    "血型": "{}是什么血型？",
    "学校": "{}毕业于哪所学校？",
}
# The history that `history="reference"` shows behind such a question.
UNRECORDED = "资料里没有记载。"
TRIES = 50


@dataclass(frozen=True)
class BuildOptions:
    """What to ask, and how much.

    Attributes:
        count: questions of every group (dialogues have several, and are made until their questions are as many).
        seed: of the choice.
        hold_out: share of the rows that the fine-tuning data do not have; 0: none, and no groups of held-out rows.
        groups: which of `questions.GROUPS`; None: all that there is something for.
    """

    count: int = 300
    seed: int = 0
    hold_out: float = 0.0
    groups: tuple[str, ...] | None = None


def build_questions(template: Template, rows: Sequence[dict[str, str]], options: BuildOptions) -> QuestionSet:
    """Build the question set of a CSV.

    Args:
        template: a template whose columns have been checked.
        rows: all rows of the CSV.

    Raises:
        UserError: nothing can be asked, or a group is unknown.
    """
    check_share(options.hold_out)
    if options.count < 1:
        raise UserError(f"the number of questions is {options.count}; expected 1 or more")
    groups = GROUPS if options.groups is None else options.groups
    if unknown := set(groups) - set(GROUPS):
        raise UserError(f"unknown group of questions {min(unknown)!r}; use {', '.join(GROUPS)}")
    table = build_fact_table(template, rows)
    pool = QuestionPool(template, table, rows, options.hold_out)
    dialogues = []
    for group, split, held_out in (
        (TRAINED, "train", False),
        (UNSEEN, "validation", False),
        (HELD_OUT_TRAINED, "train", True),
        (HELD_OUT_UNSEEN, "validation", True),
    ):
        if group in groups:
            dialogues += pool.sample(group, split, held_out, options.count, random.Random(f"{options.seed}|{group}"))
    if {MULTI_TURN, UNANSWERABLE} & set(groups):
        builder = DialogueBuilder(template, table, pool, random.Random(f"{options.seed}|{MULTI_TURN}"))
        dialogues += builder.build(options.count)
    if not dialogues:
        raise UserError(f"{template.path}: no question of the template can be asked and checked; {pool.report()}")
    notes = {
        "template": str(template.path),
        "seed": options.seed,
        "hold_out": options.hold_out,
        "held_out": sorted(pool.held_out),
        "left_out": dict(pool.left_out),
        "fields": {name: f"{field.kind} {field.unit}".strip() for name, field in table.fields.items()},
    }
    return QuestionSet(table, tuple(dialogues), notes)


def read_and_build(
    csv_path: Path, template_path: Path, options: BuildOptions, on_bad_record: str = "error"
) -> QuestionSet:
    """`build_questions` from files.

    Raises:
        UserError: anything wrong with the CSV, the template or the options.
    """
    template = load_template(template_path)
    reader = CsvRows(csv_path, on_bad_record)
    check_columns(template, reader.columns, reader.path)
    return build_questions(template, list(reader), options)


def describe(questions: QuestionSet) -> Iterator[str]:
    """Lines for the terminal: what is asked, what was held and left out."""
    counts = Counter(turn.group for turn in questions.turns)
    yield "questions: " + ", ".join(f"{group} {count}" for group, count in counts.items())
    if questions.notes.get("held_out"):
        yield f"held out: {len(questions.notes['held_out'])} subjects"
    for reason, count in questions.notes.get("left_out", {}).items():
        yield f"left out: {reason}: {count}"


def describe_fields(questions: QuestionSet) -> Iterator[str]:
    """What every column was taken for."""
    for field in questions.table.fields.values():
        details = {
            "number": f", unit {field.unit or 'none'}",
            "list": f", separated by {field.separator}, {len(field.vocabulary)} different items",
            "text": f", {len(field.vocabulary)} different texts",
        }.get(field.kind, "")
        yield f"{field.column}: {field.kind}{details}; called {'、'.join(field.labels)}"


class DialogueBuilder:
    """Makes dialogues of five kinds in turn, those with unanswerable questions twice as often.

    Args:
        pool: what can be asked; held-out subjects do not come up.
        draw: decides everything.
    """

    def __init__(self, template: Template, table: FactTable, pool: QuestionPool, draw: random.Random) -> None:
        self.template, self.table, self.pool, self.draw = template, table, pool, draw
        self.by_subject: dict[str, list[Askable]] = {}
        for ask in pool.askable:
            # What only opens a conversation cannot be asked in the middle of one.
            if ask.question.opens or ask.subject in pool.held_out:
                continue
            if pool.phrases(ask, self._split(ask), opens=True):
                self.by_subject.setdefault(ask.subject, []).append(ask)
        self.trained = {
            normal_form(phrase, template.subject)
            for question in template.questions
            for phrase in question.phrasings["train"]
        }

    def build(self, count: int) -> Iterator[Dialogue]:
        """Dialogues until `count` of their questions belong to the group multi-turn; none without a subject."""
        if self.template.subject is None or not self._pronouns() or len(self.by_subject) < 2:
            self.pool.left_out["multi-turn: the template has no subject with a pronoun, or too few rows"] += 1
            return
        kinds: list[Callable[[], list[Turn] | None]] = [
            self.second_subject,
            self.unknown_column,
            self.unknown_subject,
            self.pronouns,
            self.unknown_column,
            self.unknown_subject,
            self.same_question,
        ]
        made, failures = 0, 0
        for make in itertools.cycle(kinds):
            if made >= count or failures > TRIES:
                return
            turns = make()
            if turns is None:
                failures += 1
                continue
            made += sum(turn.group == MULTI_TURN for turn in turns)
            first = next(turn.subject for turn in turns if turn.subject)
            yield Dialogue(self.pool.system(self.pool.rows[first], self.draw), tuple(turns))

    def pronouns(self) -> list[Turn] | None:
        """One subject, named once; one question more than a training conversation has (the first again, if need be)."""
        asks = self._asks(self._subject(), self.template.turns[1] + 1)
        if len(asks) < 2:
            return None
        again = asks[:1] if len(asks) <= self.template.turns[1] else []
        return [self._open(asks[0], "opening"), *(self._follow(ask, "pronoun") for ask in (*asks[1:], *again))]

    def second_subject(self) -> list[Turn] | None:
        """A question about one, two about another (the second with a pronoun), and back to the first by name."""
        first, second = self._asks(self._subject(), 2), self._asks(self._subject(), 2)
        if len(first) < 2 or len(second) < 2 or first[0].subject == second[0].subject:
            return None
        return [
            self._open(first[0], "opening"),
            self._open(second[0], "second subject"),
            self._follow(second[1], "pronoun after the change"),
            self._open(first[1], "back to the first"),
        ]

    def same_question(self) -> list[Turn] | None:
        """那妙蛙草呢？ asks the last question about somebody else; a pronoun then means that one."""
        first, second = self._asks(self._subject(), 1), self._asks(self._subject(), len(self.table.fields))
        same = [ask for ask in second if first and ask.question is first[0].question]
        rest = [ask for ask in second if ask not in same]
        if not same or not rest or first[0].subject == same[0].subject:
            return None
        name = self._name(same[0])
        return [
            self._open(first[0], "opening"),
            self.pool.turn(same[0], f"那{name}呢？", MULTI_TURN, "same question, second subject"),
            self._follow(rest[0], "pronoun after the change"),
        ]

    def unknown_column(self) -> list[Turn] | None:
        """In the middle, something that no column holds."""
        asks = self._asks(self._subject(), 2)
        questions = self._unanswerable_questions()
        if len(asks) < 2 or not questions:
            return None
        text = self.draw.choice(questions)
        if isinstance(text, Phrase):
            text = say(self.template, text, asks[0].row, False, self.draw)
        else:
            text = text.format(self.draw.choice(self._pronouns()))
        return [
            self._open(asks[0], "opening"),
            Turn(text, UNANSWERABLE, "unknown column", asks[0].subject, None, UNRECORDED),
            self._follow(asks[1], "after an unanswerable question"),
        ]

    def unknown_subject(self) -> list[Turn] | None:
        """First about a name that nobody has, then about somebody."""
        asks, name = self._asks(self._subject(), 2), self._unknown_name()
        if len(asks) < 2 or name is None:
            return None
        phrases = [p for p in self._phrases(asks[0], opens=True) if self.template.subject.placeholder in p.names]
        if not phrases:
            return None
        text = self.draw.choice(phrases).fill({**asks[0].row, self.template.subject.placeholder: name})
        return [
            Turn(text, UNANSWERABLE, "unknown subject", None, asks[0].question.column, UNRECORDED),
            self._open(asks[1], "after an unanswerable question"),
        ]

    def _subject(self) -> str:
        return self.draw.choice(list(self.by_subject))

    def _asks(self, subject: str, count: int) -> list[Askable]:
        """Up to `count` questions about a subject, of different columns, whose answers can be checked."""
        found: dict[str, Askable] = {}
        for ask in self.draw.sample(self.by_subject[subject], len(self.by_subject[subject])):
            if len(found) < count and self.pool.reference(ask) is not None:
                found.setdefault(ask.question.column, ask)
        return list(found.values())

    def _split(self, ask: Askable) -> str:
        """Unseen wordings where the question has some."""
        return "validation" if self.pool.phrases(ask, "validation", opens=True) else "train"

    def _phrases(self, ask: Askable, *, opens: bool) -> list[Phrase]:
        return self.pool.phrases(ask, self._split(ask), opens=opens)

    def _open(self, ask: Askable, kind: str) -> Turn:
        """A question that names its subject."""
        text = say(self.template, self.draw.choice(self._phrases(ask, opens=True)), ask.row, True, self.draw)
        return self.pool.turn(ask, text, MULTI_TURN, kind)

    def _follow(self, ask: Askable, kind: str) -> Turn:
        """A question that does not: 它的身高呢？, or an unseen wording with a pronoun."""
        pronoun = self.draw.choice(self._pronouns())
        placeholder = self.template.subject.placeholder
        texts = [
            phrase.fill({**ask.row, placeholder: pronoun})
            for phrase in self._phrases(ask, opens=False)
            if placeholder in phrase.names or not self.template.is_opening(phrase)
        ]
        label = self.table.fields[ask.question.column].label
        if f"\0的{label}呢" not in self.trained:
            texts.append(f"{pronoun}的{label}呢？")
        return self.pool.turn(ask, self.draw.choice(texts), MULTI_TURN, kind)

    def _pronouns(self) -> list[str]:
        return list(dict.fromkeys(way.text for way in self.template.subject.later if not way.names))

    def _name(self, ask: Askable) -> str:
        return next(way.fill(ask.row) for way in self.template.subject.opening if all(ask.row[n] for n in way.names))

    def _unanswerable_questions(self) -> list[Phrase | str]:
        declared: list[Phrase | str] = [*self.template.evaluation.unanswerable]
        row = next(iter(self.pool.rows.values()))
        words = [label for field in self.table.fields.values() for label in (*field.labels, *row)]
        return declared or [
            text for word, text in UNANSWERABLE_QUESTIONS.items() if not any(word in label for label in words)
        ]

    def _unknown_name(self) -> str | None:
        """The beginning of one name and the end of another; it holds no name that somebody has."""
        names = [name for name in self.table.cells if len(name) > 2]
        for _ in range(TRIES if len(names) > 1 else 0):
            first, second = self.draw.sample(names, 2)
            name = first[: (len(first) + 1) // 2] + second[(len(second) + 1) // 2 :]
            if not any(token.subjects for token in self.table.find(normalize(name))):
                return name
        return None
