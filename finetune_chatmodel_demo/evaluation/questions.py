"""Question files: dialogues with checkable questions, and the facts that the replies are held against.

Written by `python data_processing/question_builder.py --output questions.json`; read by `evaluate.py --questions_file`
and, during training, by `sample.build_training_evaluator`.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import write_whole
from finetune_chatmodel_demo.conversation.records import read_records
from finetune_chatmodel_demo.evaluation.facts import FactTable, check_texts, normalize

FORMAT = "chatglm3-questions-1"
TRAINED, UNSEEN = "trained phrasings", "unseen phrasings"
MULTI_TURN, UNANSWERABLE = "multi-turn", "unanswerable"
HELD_OUT_TRAINED, HELD_OUT_UNSEEN = "held out, trained phrasings", "held out, unseen phrasings"
GROUPS = (TRAINED, UNSEEN, MULTI_TURN, UNANSWERABLE, HELD_OUT_TRAINED, HELD_OUT_UNSEEN)


@dataclass(frozen=True)
class Turn:
    """One question of a dialogue.

    Attributes:
        text: what the user says.
        group: the set it counts in, one of GROUPS.
        kind: what it tests there: "opening", "pronoun", "second subject" …
        subject: about whom; None: somebody that the table does not hold.
        column: what is asked for; None: something that the table does not hold.
        reference: a right reply, in the template's words: the history that `history="reference"` shows.
        wordings: all replies that the template has for it; one of them to the letter counts as verbatim.
    """

    text: str
    group: str
    kind: str
    subject: str | None
    column: str | None
    reference: str
    wordings: tuple[str, ...] = ()

    @property
    def is_answerable(self) -> bool:
        return self.subject is not None and self.column is not None


@dataclass(frozen=True)
class Dialogue:
    """One conversation: its system prompt, if any, and its questions in order."""

    system: str | None
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class QuestionSet:
    """Dialogues and facts; `notes` says how they were made (seed, subjects held out, what was left out and why)."""

    table: FactTable
    dialogues: tuple[Dialogue, ...]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def turns(self) -> list[Turn]:
        return [turn for dialogue in self.dialogues for turn in dialogue.turns]

    def select(self, groups: Iterable[str]) -> "QuestionSet":
        """The dialogues that have a question of one of these groups."""
        wanted = set(groups)
        kept = [dialogue for dialogue in self.dialogues if wanted & {turn.group for turn in dialogue.turns}]
        return QuestionSet(self.table, tuple(kept), self.notes)


def write_questions(questions: QuestionSet, path: Path) -> None:
    """One JSON object; the inverse of `read_question_file`."""
    data = {
        "format": FORMAT,
        "notes": questions.notes,
        "facts": questions.table.to_json(),
        "dialogues": [
            {"system": dialogue.system, "turns": [asdict(turn) for turn in dialogue.turns]}
            for dialogue in questions.dialogues
        ],
    }
    write_whole(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n")


def is_question_file(path: Path) -> bool:
    """Whether a JSON file is one of `write_questions`, judged by its first characters."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return FORMAT in file.read(200)


def read_question_file(path: str | Path) -> QuestionSet:
    """Read what `write_questions` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is something else.
    """
    path = Path(path)
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"question file {path} {what}; make one with data_processing/question_builder.py")
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        form = data.get("format")
        if form == FORMAT:
            dialogues = tuple(
                Dialogue(entry["system"] or None, tuple(_read_turn(turn) for turn in entry["turns"]))
                for entry in data["dialogues"]
            )
            questions = QuestionSet(FactTable.from_json(data["facts"]), dialogues, dict(data["notes"]))
            check_texts(*(dialogue.system or "" for dialogue in dialogues))
            for turn in filter(lambda turn: turn.is_answerable, questions.turns):
                questions.table.items(turn.subject, turn.column)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no question file ({type(error).__name__}: {error})") from None
    if form != FORMAT:
        raise UserError(
            f"{path}: expected a question file (format {FORMAT}), got format {form!r}; make one with "
            "data_processing/question_builder.py, or use --data for a file of conversations"
        )
    if not questions.turns:
        raise UserError(f"{path} holds no question; make one with data_processing/question_builder.py")
    return questions


def _read_turn(data: dict[str, Any]) -> Turn:
    turn = Turn(**{**data, "wordings": tuple(data["wordings"])})
    check_texts(turn.text, turn.group, turn.kind, turn.reference, *turn.wordings, turn.subject or "", turn.column or "")
    return turn


class Overlap(NamedTuple):
    """Of the `asked` questions of a group, how many stand in the training file to the letter."""

    found: int
    asked: int


def check_training_file(questions: QuestionSet, path: str | Path) -> dict[str, Overlap]:
    """Compare the questions with a file of training conversations.

    Returns:
        group → how many of its questions are user messages of the file.

    Raises:
        UserError: a conversation opens with a question about a held-out subject, or an unseen wording is trained on.
        RecordError: the file cannot be read.
    """
    held_out = set(questions.notes.get("held_out", ()))
    said, leaks = set(), []
    for record in read_records(path):
        users = [message["content"] for message in record["conversations"] if message["role"] == "user"]
        said.update(map(normalize, users))
        named = {s for token in questions.table.find(normalize(users[0] if users else "")) for s in token.subjects}
        if named and named <= held_out:
            leaks.append(users[0])
    if leaks:
        raise UserError(
            f"{path}: {len(leaks)} conversations are about subjects that are said to be held out, e.g. {leaks[0]!r}; "
            "make it with data_processing.py and the same --hold_out"
        )
    groups: dict[str, list[bool]] = {}
    for turn in questions.turns:
        groups.setdefault(turn.group, []).append(normalize(turn.text) in said)
    overlaps = {group: Overlap(sum(found), len(found)) for group, found in groups.items()}
    for group in (UNSEEN, HELD_OUT_UNSEEN, HELD_OUT_TRAINED):
        if group in overlaps and overlaps[group].found:
            raise UserError(
                f"{path}: {overlaps[group].found} questions of the group {group!r} are trained on to the letter"
            )
    return overlaps
