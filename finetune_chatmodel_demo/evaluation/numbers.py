"""Numbers in a reply: digits and Chinese numerals, with the unit behind them, converted to the column's unit.

Exercised by `python -m pytest tests/test_fact_checking.py`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from finetune_chatmodel_demo.evaluation.facts import FactTable
from finetune_chatmodel_demo.evaluation.fields import NUMBER, UNITS, canonical

# Counting words: 两种属性, 第1世代 and 6项 are no values.
COUNTED = re.compile(r"\s?(?:种|只|个|位|世代|代|项|条|名|类|步|句)")
CHINESE_DIGITS = "零一二三四五六七八九"
CHINESE_NUMBER = re.compile(
    r"(?<![\d.])[零〇一二两三四五六七八九十][零〇一二两三四五六七八九十百千万]*(?:点[零〇一二三四五六七八九]+)?"
)


@dataclass(frozen=True)
class Number:
    """A number in a text: where it starts, its value, and its unit as written (empty: none)."""

    start: int
    value: Decimal
    unit: str


def convert(number: Number, unit: str) -> Decimal | None:
    """The number in `unit`; None where its own unit measures something else. A bare number has the asked unit."""
    if number.unit in ("", unit):
        return canonical(number.value)
    measure, factor = UNITS.get(number.unit, (number.unit, Decimal(1)))
    wanted, wanted_factor = UNITS.get(unit, (unit, Decimal(1)))
    return canonical(number.value * factor / wanted_factor) if measure == wanted else None


def find_numbers(text: str, units: frozenset[str], measures: frozenset[str]) -> Iterator[Number]:
    """Numbers of a normalized text. 16.9 is one number and holds no 6.9.

    Args:
        units: words that are a unit when they stand directly behind a number.
        measures: what the table measures: Chinese numbers count only before a unit of one of these (七十厘米), or with
            a fraction (零点七).
    """
    for match in NUMBER.finditer(text):
        unit = _unit_behind(text, match.end(), units)
        is_ordinal = text[: match.start()].endswith("第") and text[match.end() :].startswith(("位", "名"))
        if unit or is_ordinal or not COUNTED.match(text, match.end()):
            yield Number(match.start(), canonical(Decimal(match[0].replace(",", ""))), unit)
    for match in CHINESE_NUMBER.finditer(text):
        unit = _unit_behind(text, match.end(), units)
        if "点" in match[0] or (unit and UNITS.get(unit, (unit, 1))[0] in measures):
            yield Number(match.start(), canonical(read_chinese_number(match[0])), unit)


def _unit_behind(text: str, position: int, units: frozenset[str]) -> str:
    """The longest unit that the text goes on with, or nothing; `m` must not be the beginning of a word."""
    if text[position : position + 1] == " ":
        position += 1
    for length in range(max(map(len, units), default=0), 0, -1):
        unit, after = text[position : position + length], text[position + length : position + length + 1]
        goes_on = unit[-1:].isascii() and unit[-1:].isalpha() and after.isascii() and after.isalpha()
        if len(unit) == length and unit in units and not goes_on:
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


def units_of(table: FactTable) -> frozenset[str]:
    return frozenset(UNITS) | {field.unit for field in table.fields.values() if field.unit}


def measures_of(table: FactTable) -> frozenset[str]:
    return frozenset(UNITS.get(field.unit, (field.unit, 1))[0] for field in table.fields.values() if field.unit)
