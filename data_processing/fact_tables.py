"""From a CSV and a template to the facts that `evaluate.py` holds answers against: which column is what, who is who.

What a column holds is inferred from its cells and from what the template's answers put around its placeholder; the
template's `evaluation.fields` overrides it. Look: `python data_processing/question_builder.py --show_fields`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from data_processing.common import DataError
from data_processing.conversation_template import Phrase, Question, Template
from data_processing.holding_out import subject_name
from finetune_chatmodel_demo.evaluation.fact_checking import none_words
from finetune_chatmodel_demo.evaluation.facts import FactTable, is_cjk, normalized_names
from finetune_chatmodel_demo.evaluation.fields import Field, FieldError, build_field, infer_kind, infer_unit

Row = Mapping[str, str]


def build_fact_table(template: Template, rows: Sequence[Row]) -> FactTable:
    """The facts of a CSV.

    Args:
        template: its columns have been checked.
        rows: all rows of the CSV: those outside of the template's `where` lend their names and values, so that a reply
            which uses them is found out, and are not asked about.

    Raises:
        DataError: a declaration contradicts the cells, or no question names a column.
    """
    columns = list(dict.fromkeys(question.column for question in template.questions if question.column))
    unknown = [column for column in template.evaluation.fields if column not in columns]
    if unknown:
        raise DataError(f"{template.path} at evaluation.fields.{unknown[0]}: no question has this column")
    if not columns:
        raise DataError(f"{template.path}: no question has a `column`, so no answer can be checked against a cell")
    try:
        fields = {column: _build_field(template, column, [row[column] for row in rows]) for column in columns}
    except FieldError as error:
        raise DataError(f"{template.path}: {error}") from None
    fields = {column: _with_related_words(field, fields) for column, field in fields.items()}
    doubled = _doubled_names(template, rows)
    cells = {}
    for row in filter(template.matches, rows):
        name = subject_name(template, row)
        if name and name not in doubled:
            cells[name] = {column: row[column] for column in columns}
    return FactTable(fields, cells, normalized_names(dict(_names(template, rows, fields))))


def _build_field(template: Template, column: str, cells: Sequence[str]) -> Field:
    wordings = [phrase for question in template.questions if question.column == column for phrase in _said(question)]
    around = list(_around(wordings, column))
    empty = [
        phrase.text
        for question in template.questions
        if question.column == column
        for case in question.answers
        if any(c.column == column and c.comparison == "is" and "" in c.wanted for c in case.where)
        for phrase in case.say
    ]
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
        empty_words=none_words(empty),
    )


def _with_related_words(field: Field, fields: Mapping[str, Field]) -> Field:
    """Adds the words of columns that share half of theirs: 一般 is nobody's weakness, and a wrong answer there."""
    vocabulary = set(field.vocabulary)
    for other in fields.values():
        shared = field.vocabulary & other.vocabulary
        if shared and 2 * len(shared) >= min(len(field.vocabulary), len(other.vocabulary)):
            vocabulary |= other.vocabulary
    return replace(field, vocabulary=frozenset(vocabulary))


def _said(question: Question) -> Iterator[Phrase]:
    for case in question.answers:
        yield from case.say


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
