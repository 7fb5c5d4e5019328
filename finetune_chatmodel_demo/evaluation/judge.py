"""Judges a reply against a fact: exact, partial, wrong or missing. What each cheat scores: tests/test_fact_checking.py.

Exact: the reply states the field's value and nothing that contradicts the table, in whatever words. Partial: of a list,
at least half of what it states is true, and something is missing or too much. Missing: no reply, a refusal, a question
in return. Wrong: all else, also where the right value stands beside a wrong one, is negated, belongs to another
subject, has another unit, is a piece of a longer word or number, or where the reply never ends.
"""

import os
import re
from dataclasses import dataclass

from finetune_chatmodel_demo.evaluation.facts import NO, YES, FactTable, Field, normalize
from finetune_chatmodel_demo.evaluation.reading import CLAUSE_BREAK, NEGATION, Number, Reading, read_reply

OUTCOMES = ("exact", "partial", "wrong", "missing")
IGNORANCE = re.compile(
    r"不(?:太)?(?:知道|清楚|了解|确定|记得|懂)|无法(?:回答|确定|得知|提供|查询|告诉)|不能(?:回答|确定|告诉)|抱歉|对不起"
    r"|没(?:有)?(?:听说|学过|见过)|回答不了"
)
# "The data do not say": right where the data indeed do not, a refusal where they do.
UNRECORDED = re.compile(
    r"(?:没有|并无|未|没)(?:被)?(?:找到|查到|相关的?|关于.{0,12}的)?(?:记载|记录|收录|资料|数据|信息|提供|提到|写明|注明|说明)"
    r"|(?:资料|数据|图鉴|表格|表)(?:里|中|上)?(?:没有|查不到|找不到|不包含|不包括)|查不到|找不到|空缺|不在(?:资料|数据|图鉴|表)"
    r"|没有(?:这|叫|名叫|名为)|不存在"
)
DECLINE = re.compile(f"{IGNORANCE.pattern}|{UNRECORDED.pattern}")
# A statement (它的主人叫小明), and who may make one about himself (我只是宝可梦助手).
ASSERTION = re.compile(r"是|叫|为(?!什么|何)|位于|住在|等于|应该|大概|可能|也许")
ABOUT_ME = re.compile(r"\s*(?:我|本|作为|您|你|请|如果|若|因为|由于)")
NONE = re.compile(r"没有|没|不|无|未|空缺|并非")
BARE_NONE = re.compile(r"(?:它)?(?:目前|暂时|并)?(?:没有|无|没|不存在|空缺)(?:的|哦|呢|了)?[。!.]?")
# Pairs of characters that stand in every other sentence, and so tie a reply to no question.
EMPTY_PAIRS = frozenset(
    {"没有", "有没", "这只", "宝可", "可梦", "资料", "什么", "哪只", "哪些", "是不", "不是", "知道", "请问", "告诉"}
)
# The same one to twenty characters four times on end, or what no decoder should leave behind.
LOOP = re.compile(r"(.{1,20}?)\1{3,}", re.DOTALL)
LOOP_LENGTH = 12
LATIN_WORD = re.compile(r"[a-z][a-z'’-]{2,}")
BROKEN = re.compile(r"[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f]|<\|\w+\|>")


@dataclass(frozen=True)
class Verdict:
    """A reply's outcome.

    Attributes:
        outcome: one of OUTCOMES.
        overlap: shared / all items of reply and fact (Jaccard); 1 for exact, above 0 also for some wrong replies.
        stated: what the reply was read to say.
        expected: the fact.
        reason: why it is not exact, in a few words.
    """

    outcome: str
    overlap: float
    stated: tuple[str, ...]
    expected: tuple[str, ...]
    reason: str = ""


def check_reply(
    table: FactTable, *, column: str | None, subject: str | None, reply: str, ended: bool = True, question: str = ""
) -> Verdict:
    """Judge one reply.

    Args:
        column: what was asked for; None: what the table cannot answer, where the right reply says so.
        subject: about whom; None: about somebody who is not in the table.
        ended: the model ended the reply by itself; one that only the token limit stopped is wrong.
        question: the wording that was asked, and perhaps a right answer: a reply may say "none" in its words, and
            name what it names.
    """
    is_answerable = column is not None and subject is not None
    items = table.items(subject, column) if is_answerable else ()
    text = normalize(reply)
    if fault := _fault(text, ended):
        outcome, reason = fault
        return Verdict(outcome, 0.0, (), items, reason)
    reading = read_reply(table, reply, column=column, subject=subject, expected=frozenset(items))
    if not is_answerable:
        return _check_unanswerable(table, reading, question)
    field = table.fields[column]
    others = reading.other_subjects
    if others and (others := others - _related_subjects(table, subject, reading, question)):
        return _wrong(reading, items, f"speaks about {', '.join(sorted(others))}")
    if field.kind == "flag":
        return _check_flag(table, field, reading, items)
    if false_column := _false_column(table, subject, reading):
        return _wrong(reading, items, f"false about {false_column}")
    if not items:
        return _check_none(field, reading, question)
    return _check_items(field, reading, frozenset(items))


def _fault(text: str, ended: bool) -> tuple[str, str] | None:
    """(outcome, reason) of a reply whose content does not matter."""
    if not any(character.isalnum() for character in text):
        return "missing", "empty"
    if not ended:
        return "wrong", "did not end by itself"
    loop = max((len(match[0]) for match in LOOP.finditer(text)), default=0)
    if loop >= LOOP_LENGTH:
        return "wrong", "repeats itself"
    if BROKEN.search(text):
        return "wrong", "holds broken or control characters"
    return None


def _related_subjects(table: FactTable, subject: str, reading: Reading, question: str) -> set[str]:
    """Whom a reply may name: those in the question and, beside the subject, those that its own cells name."""
    found = set()
    for token in table.find(normalize(question)):
        found |= token.subjects
    if reading.names_subject:
        named = {item for column in table.naming_columns for item in table.items(subject, column)}
        found |= {table.names[item] for item in named if item in table.names}
    return found


def _wrong(reading: Reading, items: tuple[str, ...], reason: str, overlap: float = 0.0) -> Verdict:
    return Verdict("wrong", overlap, tuple(sorted(reading.stated)), items, reason)


def _check_items(field: Field, reading: Reading, truth: frozenset[str]) -> Verdict:
    """Numbers, lists and texts: the set of stated items against the set of true ones."""
    stated = reading.stated | reading.unknown
    if field.kind == "text":
        stated |= _stems(field, reading) | _made_up_names(field, reading)
    # A piece of a longer word earns nothing, but a second answer does not hide in one.
    extra = {item for item in stated | reading.embedded if item not in truth and (item in stated or len(item) > 1)}
    shared = truth & stated
    found, expected = tuple(sorted(shared | extra)), tuple(sorted(truth))
    if reading.foreign:
        units = ", ".join(f"{number.value}{number.unit}" for number in reading.foreign)
        return Verdict("wrong", 0.0, (*found, units), expected, "a number of another unit")
    if not found:
        is_refusal = DECLINE.search(reading.text) or reading.is_question
        if is_refusal and not reading.denied:
            return Verdict("missing", 0.0, (), expected, "asks back" if reading.is_question else "declines")
        reason = "denies it" if reading.denied & truth else "speaks of another column" if reading.others else ""
        return Verdict("wrong", 0.0, (), expected, reason or "states no known value")
    overlap = len(shared) / len(truth | extra)
    if reading.denied & truth:
        return Verdict("wrong", overlap, found, expected, "says it and denies it")
    if overlap == 1:
        return Verdict("exact", 1.0, found, expected)
    is_set = field.kind == "list" or len(truth) > 1
    if is_set and shared and len(shared) >= len(extra):
        return Verdict("partial", overlap, found, expected, "incomplete" if not extra else "too much")
    reason = "another value" if not shared else "a wrong value beside the right one"
    return Verdict("wrong", overlap, found, expected, reason)


def _stems(field: Field, reading: Reading) -> set[str]:
    """Values said without the ending that all values of the column share (种子宝可梦 as 种子, 绿色 as 绿)."""
    ending = os.path.commonprefix([value[::-1] for value in field.vocabulary])[::-1]  # noqa: RUF071 - no paths
    if not ending or len(field.vocabulary) < 2:
        return set()
    parts = re.split(r"[是为叫作属于类的色系或和与及、,。!;:/\s\0]+", reading.masked)
    return {part + ending for part in parts if part + ending in field.vocabulary}


def _made_up_names(field: Field, reading: Reading) -> set[str]:
    """Words in Latin letters that the table does not know, in a column of such words (英文名)."""
    latin = sum(item.isascii() for item in field.vocabulary)
    return set(LATIN_WORD.findall(reading.masked)) if latin > 0.9 * len(field.vocabulary) else set()


def _false_column(table: FactTable, subject: str, reading: Reading) -> str | None:
    """A column that the reply speaks of without being asked, and wrongly."""
    for column, stated in reading.others.items():
        field = table.fields[column]
        if field.kind != "flag" and not stated <= set(table.items(subject, column)):
            return column
    reading.foreign[:] = [number for number in reading.foreign if not _is_other_fact(table, subject, number)]
    return None


def _is_other_fact(table: FactTable, subject: str, number: Number) -> bool:
    """Is it, by its unit, the true value of the one column that is measured so (重6.9公斤, after the height)?"""
    fits = [(field, value) for field in table.fields.values() if field.unit and (value := number.convert(field.unit))]
    return number.unit != "" and len(fits) == 1 and fits[0][1] in table.items(subject, fits[0][0].column)


def _check_none(field: Field, reading: Reading, question: str) -> Verdict:
    """The cell is empty: the reply says so, about this column, and names no value."""
    if reading.stated or any(len(item) > 1 for item in reading.embedded) or reading.foreign:
        return _wrong(reading, (), "a value where there is none")
    if IGNORANCE.search(reading.text) or reading.is_question:
        return Verdict("missing", 0.0, (), (), "asks back" if reading.is_question else "declines")
    pairs = _pairs(normalize(question)) | {pair for label in field.labels for pair in _pairs(label)}
    is_about = bool(_pairs(reading.text) & (pairs - EMPTY_PAIRS)) or BARE_NONE.fullmatch(reading.text)
    if NONE.search(reading.masked) and is_about:
        return Verdict("exact", 1.0, (), ())
    return _wrong(reading, (), "does not say that there is none")


def _pairs(text: str) -> frozenset[str]:
    return frozenset(text[i : i + 2] for i in range(len(text) - 1) if text[i : i + 2].isalpha())


def _check_flag(table: FactTable, field: Field, reading: Reading, items: tuple[str, ...]) -> Verdict:
    """Yes or no: every clause that speaks of this column, or of none, must say the same."""
    labels = {normalize(label) for label in field.labels}
    rivals = {
        normalize(label) for other in table.fields.values() if other.kind == "flag" and other != field
        for label in other.labels
    }  # fmt: skip
    answers = set()
    for clause in filter(None, (part.strip() for part in CLAUSE_BREAK.split(reading.masked))):
        is_about = any(label in clause for label in labels)
        if not is_about and any(rival in clause for rival in rivals):
            continue
        if NEGATION.search(clause) or clause in ("否", "no"):
            answers.add("0")
        elif is_about or re.match(r"(?:是|对|没错|有|属于|当然|yes)", clause):
            answers.add("1")
    expected = "1" if set(items) & YES else "0" if set(items) & NO else ""
    if IGNORANCE.search(reading.text) or (not answers and reading.is_question):
        return Verdict("missing", 0.0, (), items, "declines")
    found = tuple(sorted(answers))
    if answers == {expected}:
        return Verdict("exact", 1.0, found, items)
    return Verdict("wrong", 0.0, found, items, "says yes and no" if len(answers) == 2 else "another value")


def _check_unanswerable(table: FactTable, reading: Reading, question: str) -> Verdict:
    """The table has no answer: right is a reply that says so and states nothing that the question did not."""
    asked = read_reply(table, question.rstrip("?？ "), column=None, subject=None)
    values = _known_values(table, reading.text) - _known_values(table, asked.text)
    if invented := values | (reading.stated - asked.stated):
        return Verdict("wrong", 0.0, tuple(sorted(invented)), (), "invents a value")
    for clause in CLAUSE_BREAK.split(reading.masked):
        if ASSERTION.search(clause) and not (
            DECLINE.search(clause) or NEGATION.search(clause) or ABOUT_ME.match(clause)
        ):
            return Verdict("wrong", 0.0, (clause,), (), "asserts something")
    if DECLINE.search(reading.text):
        return Verdict("exact", 1.0, (), ())
    if reading.is_question:
        return Verdict("missing", 0.0, (), (), "asks back")
    return Verdict("wrong", 0.0, (), (), "does not say that it does not know")


def _known_values(table: FactTable, text: str) -> set[str]:
    return {token.text for token in table.find(text) if token.columns and not token.subjects}
