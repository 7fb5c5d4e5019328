"""Puts the dialogues of a question set to a model, all at once and turn by turn, and judges every reply.

`history="own"` shows the model its own earlier replies, as a user would have it; "reference" shows the right ones,
which tells a single mistake from one that was dragged along.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune_chatmodel_demo.evaluation.facts import normalize
from finetune_chatmodel_demo.evaluation.judge import Verdict, check_reply
from finetune_chatmodel_demo.evaluation.questions import Dialogue, QuestionSet, Turn
from finetune_chatmodel_demo.generation.batch import generate_replies
from finetune_chatmodel_demo.generation.session import fit_prompt, prompt_budget

HISTORIES = ("own", "reference")
# A right reply may say more than the template's. Twice its tokens and these are enough for a sentence around a value.
SPARE_TOKENS = 16
LEAST_CAP = 48


@dataclass(frozen=True)
class Answer:
    """A judged reply.

    Attributes:
        dialogue: index of its dialogue in the question set.
        turn: what was asked.
        reply: what the model said.
        ended: it ended by itself.
        verdict: whether it states the fact.
        is_verbatim: it is one of the template's own answers, character for character.
        begins_right: its first line or sentence, taken alone, is exact: the model knows, whatever it says after that.
    """

    dialogue: int
    turn: Turn
    reply: str
    ended: bool
    verdict: Verdict
    is_verbatim: bool
    begins_right: bool


def choose_cap(tokenizer: Any, questions: QuestionSet) -> int:
    """The longest reply, in tokens, that is waited for: twice the longest reference, and some to spare."""
    longest = max((len(tokenizer.encode_text(turn.reference)) for turn in questions.turns), default=0)
    return max(LEAST_CAP, 2 * longest + SPARE_TOKENS)


def ask_questions(
    model: Any,
    tokenizer: Any,
    questions: QuestionSet,
    *,
    prompt_format: str,
    max_new_tokens: int,
    batch_size: int,
    history: str = "own",
    progress: bool = False,
    description: str = "answering",
) -> list[Answer]:
    """Ask every dialogue greedily.

    Args:
        history: "own" or "reference": which replies later questions of a dialogue see before them.

    Returns:
        One answer a question, in the order of `questions.turns`.

    Raises:
        ValueError: `history` is unknown.
        PromptTooLongError: a question without its history is still too long for the model.
    """
    if history not in HISTORIES:
        raise ValueError(f"history is {history!r}; use {' or '.join(HISTORIES)}")
    budget = prompt_budget(model, max_new_tokens)
    talks: list[list[dict[str, Any]]] = [_opening(dialogue) for dialogue in questions.dialogues]
    answers: list[list[Answer]] = [[] for _ in talks]
    for number in range(max((len(dialogue.turns) for dialogue in questions.dialogues), default=0)):
        asked = [i for i, dialogue in enumerate(questions.dialogues) if len(dialogue.turns) > number]
        prompts = []
        for i in asked:
            talks[i].append({"role": "user", "content": questions.dialogues[i].turns[number].text})
            prompts.append(
                fit_prompt(tokenizer, talks[i], max_prompt_tokens=budget, prompt_format=prompt_format).input_ids
            )
        replies = generate_replies(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            prompt_format=prompt_format,
            progress=progress,
            description=description if number == 0 else f"{description}, turn {number + 1}",
        )
        for i, reply in zip(asked, replies):
            turn = questions.dialogues[i].turns[number]
            answers[i].append(judge(questions, i, turn, reply.text, not reply.hit_cap))
            said = reply.text if history == "own" else turn.reference
            talks[i].append({"role": "assistant", "content": said})
    return [answer for found in answers for answer in found]


def judge(questions: QuestionSet, dialogue: int, turn: Turn, reply: str, ended: bool) -> Answer:
    """One reply against the facts."""
    # The words of the reference are as good as those of the question: a reply may say "none" in them.
    words = f"{turn.text}\n{turn.reference}" if turn.is_answerable else turn.text
    asked = {"column": turn.column, "subject": turn.subject, "question": words}
    verdict = check_reply(questions.table, reply=reply, ended=ended, **asked)
    is_verbatim = ended and normalize(reply) in map(normalize, turn.wordings)
    beginning = re.split(r"[\n。！？]", reply.strip(), maxsplit=1)[0]
    begins_right = check_reply(questions.table, reply=beginning, **asked).outcome == "exact"
    return Answer(dialogue, turn, reply, ended, verdict, is_verbatim, begins_right)


def constant_replies(questions: QuestionSet, answers: Sequence[Answer]) -> list[bool]:
    """For every question: would it be right to say the column's most frequent value, whoever is asked about?

    What a candidate scores above this share is knowledge of the subjects. Unanswerable questions count as not right.
    """
    counts: dict[str, dict[tuple[str, ...], int]] = {}
    for cells in questions.table.cells.values():
        for column, field in questions.table.fields.items():
            items = tuple(sorted(field.items(cells[column])))
            found = counts.setdefault(column, {})
            found[items] = found.get(items, 0) + 1
    favourites = {column: max(found, key=found.get) for column, found in counts.items()}
    right = []
    for turn in (answer.turn for answer in answers):
        items = tuple(sorted(questions.table.items(turn.subject, turn.column))) if turn.is_answerable else None
        right.append(items is not None and items == favourites[turn.column])
    return right


def _opening(dialogue: Dialogue) -> list[dict[str, Any]]:
    return [{"role": "system", "content": dialogue.system}] if dialogue.system else []
