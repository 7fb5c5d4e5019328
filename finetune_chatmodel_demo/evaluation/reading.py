"""What a reply states, about which column of which subject: sentences, negations, headings, numbers with units.

`read_reply` finds; `judge.check_reply` judges.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property

from finetune_chatmodel_demo.evaluation.facts import (
    NUMBER,
    UNITS,
    FactTable,
    Field,
    Token,
    canonical,
    is_cjk,
    normalize,
)

SENTENCE = re.compile(r"[^。!?;\n]*(?:[。!?;\n]+|$)")
QUESTION_END = re.compile(r"\?|吗[。!;\n]*$")
# A clause is what a negation reaches: 、 does not end it, 而是 does.
CLAUSE_BREAK = re.compile(r"[,。!?;:\n\"]|而是|但是|但|而")
NEGATION = re.compile(r"不(?![过仅只止光但错知同论如管])|没(?!错|问题|事)|无(?!论|疑)|[并而绝]非")
# Adverbs that look like items of the Pokémon table (一般 is a type).
COMMON_WORDS = re.compile(r"一般(?:来说|来讲|而言|情况|都|会|在|能|可以|需要|只|不)")
HEADING_LINK = r"(?:种族值|属性|数值|值)?\s?(?:分别)?(?:是|为|:|=|有|包括|包含|写着|大约|约|达到|(?=\d))"
# What stands before a heading that is about the subject: its name (blanked out), a pronoun, or a word that joins.
HEADING_OWNER = re.compile(r"(?:(?:\0|[它他她该其]|宝可梦|家伙)的?|[和及与而且])$")
# A made-up item behind (草、光) or before (光、草) a known one. What begins with a pronoun or the like is no item.
JOIN = r"(?:、|/|或者|或是|或(?![者是])|以及|及|和|与)"
JOINED_BEHIND = re.compile(rf"\s?{JOIN}\s?((?![它他她其这那还都也等两三四不没])[^\W\d_][^\W_]{{0,7}})")
JOINED_BEFORE = re.compile(r"[是为有叫怕用:,。!\s]([^\W\d_是为有的]{1,6})(?:、|/|或者|或|和|与)$")
JOINED_LENGTH = 10  # what JOINED_BEFORE matches at most: 1 + 6 + 2, and a line break that `$` passes over
# Behind a name: 妙蛙种子的属性…, 妙蛙种子没有…; but 妙蛙种子的进化形态 is somebody else.
OWNS = re.compile(r"的(?!进化)|(?:并)?(?:没有?|不|无)")
# A word this long needs no boundary behind it (第一世代登场): no longer word begins with it.
LONG_WORD = 4
# Beside these a value still stands by itself, and so it does beside what is no Chinese letter, beside another known
# word, and beside what the template's own answers put there.
LEFT_NEIGHBOURS = frozenset(
    "是为叫做作成于有的被由从到在和与及或以跟同带怕呈归写着称名自属算指即含它只会还而就约者用让对种个"
)
RIGHT_NEIGHBOURS = frozenset("属系的和与及或以跟同色类型招两三四种这是也都会能吧呢啊哦喔呀了时等双单为宝群")
# Counting words: 两种属性, 第1世代 and 6项 are no values.
COUNTED = re.compile(r"\s?(?:种|只|个|位|世代|代|项|条|名|类|步|句)")
CHINESE_DIGITS = "零一二三四五六七八九"
CHINESE_NUMBER = re.compile(
    r"(?<![\d.])[零〇一二两三四五六七八九十][零〇一二两三四五六七八九十百千万]*(?:点[零〇一二三四五六七八九]+)?"
)
Span = tuple[int, int]


@dataclass(frozen=True)
class Number:
    """A number in a text: where it starts, its value, and its unit as written (empty: none)."""

    start: int
    value: Decimal
    unit: str

    def convert(self, unit: str) -> str | None:
        """The value in `unit`; None where its own unit measures something else. A bare number has the asked unit."""
        if self.unit in ("", unit):
            return str(canonical(self.value))
        measure, factor = UNITS.get(self.unit, (self.unit, Decimal(1)))
        wanted, wanted_factor = UNITS.get(unit, (unit, Decimal(1)))
        return str(canonical(self.value * factor / wanted_factor)) if measure == wanted else None


@dataclass
class Reading:
    """What a reply says.

    Attributes:
        text: the reply, normalized.
        masked: the same with every known word but labels blanked out.
        stated: items and numbers that it gives for the asked column.
        denied: those that it negates.
        embedded: items inside a longer word that the table does not know (大种子宝可梦).
        unknown: what it lists beside known items, and nobody in the table has (草、毒、光).
        others: column → what it gives under that column's own heading.
        names_subject: it names the asked subject.
        other_subjects: subjects that it speaks about without being asked about them.
        foreign: numbers whose unit does not measure what was asked for.
        is_question: it consists of questions alone.
    """

    text: str
    masked: str = ""
    stated: set[str] = field(default_factory=set)
    denied: set[str] = field(default_factory=set)
    embedded: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    others: dict[str, set[str]] = field(default_factory=dict)
    names_subject: bool = False
    other_subjects: set[str] = field(default_factory=set)
    foreign: list[Number] = field(default_factory=list)
    is_question: bool = False

    def note(self, value: str, heading: str | None, is_negated: bool) -> None:
        """A value of the asked column, or of the one under whose heading it stands."""
        if heading is None:
            (self.denied if is_negated else self.stated).add(value)
        elif not is_negated:
            self.others.setdefault(heading, set()).add(value)


def read_reply(
    table: FactTable,
    reply: str,
    *,
    column: str | None,
    subject: str | None,
    expected: frozenset[str] = frozenset(),
) -> Reading:
    """Read a reply to a question about one column of one subject.

    Args:
        table: its words and fields are used, never a cell.
        column: what was asked for; None: something that the table does not hold.
        subject: about whom; None: about nobody in the table.
        expected: items of the right answer: the asked subject's own name is a value only where it is one of them.
    """
    return _Reader(table, normalize(reply), column, subject, expected).read()


class _Reader:
    """One reply. Spans are (start, end) in the normalized text."""

    def __init__(
        self, table: FactTable, text: str, column: str | None, subject: str | None, expected: frozenset[str]
    ) -> None:
        self.table, self.text, self.column, self.subject, self.expected = table, text, column, subject, expected
        self.asked = table.fields[column] if column is not None else None
        idioms = [match.span() for match in COMMON_WORDS.finditer(text)]
        self.tokens = [token for token in table.find(text) if not _inside(token.start, idioms)]
        self.starts, self.ends = {token.start for token in self.tokens}, {token.end for token in self.tokens}
        self.masked = self._mask()
        self.questions = list(_question_spans(text))
        self.negated = list(_negated_spans(self.masked))
        self.reading = Reading(text, self.masked)

    def read(self) -> Reading:
        self.reading.is_question = bool(self.text) and sum(b - a for a, b in self.questions) == len(self.text)
        for token in self.tokens:
            if not _inside(token.start, self.questions):
                self._take_token(token)
        for number in find_numbers(self.masked, self.table, all_measures=self.asked is None):
            if not _inside(number.start, self.questions):
                self._take_number(number)
        return self.reading

    def _take_token(self, token: Token) -> None:
        """Note a known word as a value, as a value of another column, or as somebody's name."""
        heading, is_negated = self._heading_at(token.start), _inside(token.start, self.negated)
        owner = self.table.fields[heading] if heading else self.asked
        self.reading.names_subject |= self.subject in token.subjects
        if owner is not None and self._is_value(token, owner):
            item = owner.aliases.get(token.text, token.text)
            if heading or is_negated or self._stands_alone(token, owner):
                self.reading.note(item, heading, is_negated)
            else:
                self.reading.embedded.add(item)
            if not heading and not is_negated:
                self.reading.unknown.update(self._unknown_neighbours(token))
        elif token.subjects and self.subject not in token.subjects and not is_negated:
            self.reading.other_subjects.add(min(token.subjects))

    def _is_value(self, token: Token, owner: Field) -> bool:
        """Is the word a value of this column? Where values are names (进化自), every name but the subject's own is."""
        names_subjects = owner.column in self.table.naming_columns
        if names_subjects and self.subject in token.subjects:
            return token.text in self.expected
        if names_subjects and token.subjects and self._is_owner(token):
            return False
        return owner.column in token.columns or (names_subjects and bool(token.subjects))

    def _is_owner(self, token: Token) -> bool:
        """Is the name no answer, but the one of whom something else is said (妙蛙种子的属性是草, 妙蛙种子没有弱点)?"""
        if OWNS.match(self.masked, token.end):
            return True
        following = next((other for other in self.tokens if other.start == token.end + 1), None)
        return self.masked.startswith("是", token.end) and following is not None and not following.subjects

    def _stands_alone(self, token: Token, owner: Field) -> bool:
        """Is this the word itself, and not a part of a longer one that the table does not know?"""
        left = self.text[token.start - 1 : token.start] or " "
        right = self.text[token.end : token.end + 1] or " "
        is_left = not (is_cjk(left) and is_cjk(token.text[0])) or left in LEFT_NEIGHBOURS or left in owner.left
        is_right = not (is_cjk(right) and is_cjk(token.text[-1])) or right in RIGHT_NEIGHBOURS or right in owner.right
        is_right = is_right or token.end in self.starts or len(token.text) >= LONG_WORD
        return (is_left or token.start in self.ends) and is_right

    def _unknown_neighbours(self, token: Token) -> Iterator[str]:
        """What is joined to a value by 、 or 和 and is no word of the table: another value, made up."""
        behind = JOINED_BEHIND.match(self.masked, token.end)
        if behind and behind.start(1) not in self.starts and not behind[1].startswith(tuple(self.table.labels)):
            yield behind[1]
        before = JOINED_BEFORE.search(self.masked, max(token.start - JOINED_LENGTH, 0), token.start)
        if before and before.end(1) not in self.ends:
            yield before[1]

    def _take_number(self, number: Number) -> None:
        """Note a number as the answer, as another column's value, or as one of another unit."""
        heading, is_negated = self._heading_at(number.start), _inside(number.start, self.negated)
        owner = self.table.fields[heading] if heading else self.asked
        if owner is None:
            if not is_negated:
                self.reading.stated.add(str(number.value))
        elif owner.kind == "number":
            value = number.convert(owner.unit)
            if value is not None:
                self.reading.note(value, heading, is_negated)
            elif not heading and not is_negated:
                self.reading.foreign.append(number)

    def _mask(self) -> str:
        """The text with every known word that is no label blanked out, so that nothing is read inside of it."""
        characters = list(self.text)
        for token in self.tokens:
            if token.text not in self.table.labels:
                characters[token.start : token.end] = "\0" * (token.end - token.start)
        return "".join(characters)

    @cached_property
    def headings(self) -> list[tuple[int, int, str | None]]:
        """(from, to, column): up to the next heading or the end of the sentence, the text is about that column.

        The asked column's own heading gives None. 它的属性是 is a heading, and 它害怕的属性是 is none.
        """
        owners = self.table.labels
        words = "|".join(re.escape(label) for label in sorted(owners, key=len, reverse=True))
        found = [m for m in re.finditer(rf"({words}){HEADING_LINK}", self.masked) if self._begins_word(m.start())]
        edges = [match.start() for match in found[1:]] + [len(self.masked)]
        headings = []
        for match, edge in zip(found, edges):
            end = min(edge, SENTENCE.match(self.masked, match.end()).end())
            owner = owners[match.group(1)]
            headings.append((match.end(), end, None if owner == self.column else owner))
        return headings

    def _begins_word(self, start: int) -> bool:
        before = self.masked[:start]
        return not before or not is_cjk(before[-1]) or HEADING_OWNER.search(before) is not None

    def _heading_at(self, position: int) -> str | None:
        return next((owner for start, end, owner in self.headings if start <= position < end), None)


def _question_spans(text: str) -> Iterator[Span]:
    """Where the reply asks instead of telling."""
    for match in SENTENCE.finditer(text):
        if match[0].strip() and QUESTION_END.search(match[0].rstrip()):
            yield match.span()


def _negated_spans(masked: str) -> Iterator[Span]:
    """From a negation to the end of its clause."""
    edges = [0, *(match.end() for match in CLAUSE_BREAK.finditer(masked)), len(masked)]
    for start, end in itertools.pairwise(edges):
        if match := NEGATION.search(masked, start, end):
            yield match.start(), end


def _inside(position: int, spans: list[Span]) -> bool:
    return any(start <= position < end for start, end in spans)


def find_numbers(text: str, table: FactTable, *, all_measures: bool) -> Iterator[Number]:
    """Numbers of a normalized text. 16.9 is one number and holds no 6.9.

    Args:
        all_measures: a Chinese number counts before every known unit; else before a unit of what the table measures
            (七十厘米). It always counts with a fraction (零点七).
    """
    own = {field.unit for field in table.fields.values() if field.unit}
    measures = {measure for measure, _ in UNITS.values()} if all_measures else set()
    measures |= {field.measure for field in table.fields.values() if field.unit}
    units = sorted(own | UNITS.keys(), key=len, reverse=True)
    for match in NUMBER.finditer(text):
        unit = _unit_behind(text, match.end(), units)
        is_ordinal = text[: match.start()].endswith("第") and text[match.end() :].startswith(("位", "名"))
        if unit or is_ordinal or not COUNTED.match(text, match.end()):
            yield Number(match.start(), canonical(Decimal(match[0].replace(",", ""))), unit)
    for match in CHINESE_NUMBER.finditer(text):
        unit = _unit_behind(text, match.end(), units)
        if "点" in match[0] or (unit and UNITS.get(unit, (unit, 1))[0] in measures):
            yield Number(match.start(), canonical(read_chinese_number(match[0])), unit)


def _unit_behind(text: str, position: int, units: list[str]) -> str:
    """The longest unit that the text goes on with, or nothing; `m` must not be the beginning of a word."""
    following = text[position : position + 20].removeprefix(" ")
    for unit in units:
        if following.startswith(unit):
            joint = unit[-1] + following[len(unit) : len(unit) + 1]
            if not (len(joint) == 2 and joint.isascii() and joint.isalpha()):
                return unit
    return ""


def read_chinese_number(text: str) -> Decimal:
    """零点七 → 0.7, 一百二十 → 120."""
    whole, _, fraction = text.replace("〇", "零").replace("两", "二").partition("点")
    total = section = digit = 0
    for character in whole:
        if character in CHINESE_DIGITS:
            digit = CHINESE_DIGITS.index(character)
        elif character == "万":
            total, section, digit = (total + section + digit) * 10_000, 0, 0
        else:
            section += (digit or 1) * {"十": 10, "百": 100, "千": 1000}[character]
            digit = 0
    digits = "".join(str(CHINESE_DIGITS.index(character)) for character in fraction)
    return Decimal(f"{total + section + digit}.{digits or '0'}")
