"""Builds the conversations of one row, from nothing but its cells, the template, the split and the seed."""

import json
import random
from collections.abc import Mapping
from typing import Any

from data_processing.template import Phrase, Question, Template


def build_conversations(
    template: Template, row: Mapping[str, str], split: str = "train", seed: int = 42
) -> list[dict[str, Any]]:
    """Builds the conversations of one row.

    Args:
        template: a template whose columns have been checked.
        row: column name → cell text.
        split: "train" or "validation"; says which pool of phrasings is asked.
        seed: another seed draws other turns and wordings; equal rows under one seed give equal conversations.

    Returns:
        Records `{"conversations": [{"role", "content", "column"?}, …]}`; an assistant message made from a
        column carries its name. Empty where fewer questions apply to the row than the fewest turns.
    """
    usable = [i for i, question in enumerate(template.questions) if _applies(template, question, row, split)]
    if len(_keep_one_opening(template, usable)) < template.turns[0]:
        return []
    rng = random.Random(f"{seed}|{split}|{json.dumps(row, ensure_ascii=False)}")
    times_asked = dict.fromkeys(usable, 0)
    records = []
    for _ in range(template.per_row[split]):
        chosen = _choose_questions(template, rng, times_asked)
        for i in chosen:
            times_asked[i] += 1
        records.append(
            {"conversations": _write_turns(template, [template.questions[i] for i in chosen], row, split, rng)}
        )
    return records


def _choose_questions(template: Template, rng: random.Random, times_asked: Mapping[int, int]) -> list[int]:
    """Draws the optional ones, then takes those asked least so far, so that all columns get their share."""
    fewest, most = template.turns
    order = list(times_asked)
    rng.shuffle(order)
    # Questions that were not drawn stand behind, and only fill a conversation up to `fewest`.
    drawn = [i for i in order if rng.random() < template.questions[i].probability]
    rest = [i for i in order if i not in drawn]
    ranked = _keep_one_opening(template, sorted(drawn, key=times_asked.__getitem__) + rest)
    enough = max(fewest, sum(i in drawn for i in ranked))
    chosen = ranked[: rng.randint(fewest, min(most, enough))]
    if template.order == "as_written":
        chosen.sort()
    else:
        rng.shuffle(chosen)
    return sorted(chosen, key=lambda i: not template.questions[i].opens)


def _keep_one_opening(template: Template, indices: list[int]) -> list[int]:
    """Leaves out all but the first question that only opens: a conversation has one first turn."""
    openings = [i for i in indices if template.questions[i].opens]
    return [i for i in indices if i not in openings[1:]]


def _write_turns(
    template: Template, questions: list[Question], row: Mapping[str, str], split: str, rng: random.Random
) -> list[dict[str, str]]:
    """The messages of one conversation."""
    messages = []
    prompts = [phrase for phrase in template.system_prompts if is_filled(template, phrase, row)]
    if prompts and rng.random() < template.system_probability:
        messages.append({"role": "system", "content": rng.choice(prompts).fill(row)})
    for number, question in enumerate(questions):
        pool = [phrase for phrase in question.phrasings[split] if is_filled(template, phrase, row)]
        if number == 0:
            pool = [phrase for phrase in pool if template.is_opening(phrase)]
        messages.append({"role": "user", "content": say(template, rng.choice(pool), row, number == 0, rng)})
        answer = say(template, rng.choice(find_answers(template, question, row)), row, False, rng)
        message = {"role": "assistant", "content": answer}
        if question.column:
            message["column"] = question.column
        messages.append(message)
    return messages


def say(template: Template, phrase: Phrase, row: Mapping[str, str], is_opening: bool, rng: random.Random) -> str:
    """Fills a wording; the subject is a name at the opening and a name or a pronoun later."""
    subject = template.subject
    if subject is None or subject.placeholder not in phrase.names:
        return phrase.fill(row)
    ways = [way for way in (subject.opening if is_opening else subject.later) if is_filled(template, way, row)]
    return phrase.fill({**row, subject.placeholder: rng.choice(ways).fill(row)})


def _applies(template: Template, question: Question, row: Mapping[str, str], split: str) -> bool:
    """Can this question be asked and answered from this row, at the opening too?"""
    return (
        all(condition.holds(row) for condition in question.where)
        and any(template.is_opening(p) and is_filled(template, p, row) for p in question.phrasings[split])
        and bool(find_answers(template, question, row))
    )


def find_answers(template: Template, question: Question, row: Mapping[str, str]) -> list[Phrase]:
    """The wordings of the first case that is true of the row and names no empty cell."""
    for case in question.answers:
        if all(condition.holds(row) for condition in case.where):
            filled = [phrase for phrase in case.say if is_filled(template, phrase, row)]
            if filled:
                return filled
    return []


def is_filled(template: Template, phrase: Phrase, row: Mapping[str, str]) -> bool:
    """Has the row a text for every placeholder of the wording?"""
    subject = template.subject
    for name in phrase.names:
        if subject and name == subject.placeholder:
            if not any(all(row[n] for n in way.names) for way in subject.opening):
                return False
        elif not row[name]:
            return False
    return True
