"""Does the fine-tuning file keep what the questions promise: unseen wordings unseen, held-out subjects held out?

Exercised by `evaluate.py --train_file FILE`.
"""

from dataclasses import dataclass
from pathlib import Path

from finetune_chatmodel_demo.conversation.records import read_records
from finetune_chatmodel_demo.evaluation.fields import normalize
from finetune_chatmodel_demo.evaluation.questions import HELD_OUT_TRAINED, HELD_OUT_UNSEEN, UNSEEN, QuestionSet


class LeakError(ValueError):
    """The fine-tuning data hold what they must not."""


@dataclass(frozen=True)
class Overlap:
    """Of a group of questions, how many stand in the training file to the letter."""

    asked: int
    found: int


def check_training_file(questions: QuestionSet, path: str | Path) -> dict[str, Overlap]:
    """Compare the questions with a file of training conversations.

    Returns:
        group → how many of its questions are user messages of the file.

    Raises:
        LeakError: a conversation opens with a question about a held-out subject, or an unseen wording is trained on.
        RecordError: the file cannot be read.
    """
    held_out = set(questions.notes.get("held_out", ()))
    said, leaks = set(), []
    for record in read_records(path):
        users = [message["content"] for message in record["conversations"] if message["role"] == "user"]
        said.update(map(normalize, users))
        named = {
            s for token in questions.table.lexicon.find(normalize(users[0] if users else "")) for s in token.subjects
        }
        if named and named <= held_out:
            leaks.append(users[0])
    if leaks:
        raise LeakError(
            f"{path}: {len(leaks)} conversations are about subjects that are said to be held out, e.g. {leaks[0]!r}; "
            "make it with data_processing.py and the same --hold_out"
        )
    groups: dict[str, list[bool]] = {}
    for turn in questions.turns:
        groups.setdefault(turn.group, []).append(normalize(turn.text) in said)
    overlaps = {group: Overlap(len(found), sum(found)) for group, found in groups.items()}
    for group in (UNSEEN, HELD_OUT_UNSEEN, HELD_OUT_TRAINED):
        if group in overlaps and overlaps[group].found:
            raise LeakError(
                f"{path}: {overlaps[group].found} questions of the group {group!r} are trained on to the letter"
            )
    return overlaps
