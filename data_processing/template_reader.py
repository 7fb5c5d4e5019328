"""Reads a template file and says exactly what is wrong with a broken one: the file, the place in it, the remedy."""

import re
from pathlib import Path
from typing import Any

import yaml

from data_processing.csv_rows import check_input
from data_processing.template import (
    COMPARISONS,
    Answer,
    Condition,
    EvaluationHints,
    Phrase,
    Question,
    Subject,
    Template,
    normal_form,
)
from finetune_chatmodel_demo.common.errors import UserError, did_you_mean

TEMPLATES = Path(__file__).resolve().parent / "templates"
TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice instead of keeping the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if str(key_node.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key_node.value}' is written twice", key_node.start_mark
                )
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)


def load_template(path: str | Path) -> Template:
    """Reads and checks a template.

    Raises:
        UserError: not YAML, unknown or missing keys, wrong types, broken placeholders, a phrasing that stands in
            both pools, a question that cannot open a conversation.
    """
    path = check_input(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from None
    return _TemplateReader(path).read(data)


def check_columns(template: Template, columns: list[str], table: Path) -> None:
    """Raises a UserError that names every column of the template that the table lacks, and a template that fits it."""
    placeholder = template.subject.placeholder if template.subject else None
    if placeholder in columns:
        raise UserError(
            f"{template.path}: subject.placeholder '{placeholder}' is also a column of {table}; use another word for "
            "the placeholder"
        )
    missing = template.missing_columns(columns)
    if not missing:
        return
    known = [*columns, placeholder] if placeholder else columns
    lines = [
        f"  '{name}' (in {template.path} at {place}){did_you_mean(name, known, cutoff=0.6)}"
        for name, place in missing.items()
    ]
    others = [path for path in sorted(TEMPLATES.glob("*.yaml")) if not load_template(path).missing_columns(columns)]
    remedy = "".join(f"\n  --template {path} names only columns that are there" for path in others)
    raise UserError(
        f"{table} lacks {len(missing)} column(s) that the template names:\n"
        + "\n".join(lines)
        + f"\n  the table has: {', '.join(columns)}{remedy}"
    )


class _TemplateReader:
    """Turns parsed YAML into a Template; every complaint begins with the file and the place in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, place: str, message: str) -> UserError:
        return UserError(f"{self.path} at {place}: {message}" if place else f"{self.path}: {message}")

    def read(self, data: Any) -> Template:
        required = {"turns", "questions"}
        optional = {
            "description", "conversations_per_row", "validation_conversations_per_row", "order", "where",
            "subject", "system", "evaluation",
        }  # fmt: skip
        self.check_keys(data, "", required, optional)
        items = data["questions"]
        if not isinstance(items, list) or not items:
            raise self.fail("questions", f"expected a list with at least one question, got {items!r}")
        per_row = {
            "train": self.count(data.get("conversations_per_row", 1), "conversations_per_row", 1),
            "validation": self.count(
                data.get("validation_conversations_per_row", 0), "validation_conversations_per_row", 0
            ),
        }
        order = data.get("order", "shuffle")
        if order not in ("shuffle", "as_written"):
            raise self.fail("order", f"expected shuffle or as_written, got {order!r}")
        system = data.get("system") or {"prompts": []}
        self.check_keys(system, "system", {"prompts"}, {"probability"})
        template = Template(
            path=self.path,
            turns=self.turns(data["turns"]),
            per_row=per_row,
            order=order,
            where=self.conditions(data.get("where"), "where"),
            subject=self.subject(data.get("subject")),
            system_probability=self.probability(system.get("probability", 1), "system.probability"),
            system_prompts=self.phrases(system["prompts"], "system.prompts", may_be_empty=True),
            questions=tuple(self.question(item, f"questions[{i}]") for i, item in enumerate(items)),
            evaluation=self.evaluation(data.get("evaluation")),
        )
        self.check_pools(template)
        return template

    def check_keys(self, data: Any, place: str, required: set[str], optional: set[str]) -> None:
        if not isinstance(data, dict):
            raise self.fail(place, f"expected keys and values, got {data!r:.80}")
        for key in data:
            if key not in required | optional:
                near = did_you_mean(str(key), required | optional)
                known = ", ".join(sorted(required | optional))
                raise self.fail(place, f"unknown key '{key}'{near} (known: {known})")
        for key in sorted(required - set(data)):
            raise self.fail(place, f"the key '{key}' is missing")

    def count(self, value: Any, place: str, least: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.fail(place, f"expected a whole number of {least} or more, got {value!r}")
        return value

    def probability(self, value: Any, place: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise self.fail(place, f"expected a number from 0 to 1, got {value!r}")
        return float(value)

    def turns(self, value: Any) -> tuple[int, int]:
        pair = value if isinstance(value, list) else [value, value]
        if len(pair) != 2:
            raise self.fail("turns", f"expected a number or [fewest, most], got {value!r}")
        low, high = (self.count(number, "turns", 1) for number in pair)
        if low > high:
            raise self.fail("turns", f"fewest is above most in {value!r}")
        return low, high

    def subject(self, data: Any) -> Subject | None:
        if data is None:
            return None
        self.check_keys(data, "subject", {"placeholder", "opening", "later"}, {"known_by"})
        known_by = data.get("known_by", [])
        if not isinstance(known_by, list) or not all(isinstance(name, str) for name in known_by):
            raise self.fail("subject.known_by", f"expected a list of column names, got {known_by!r}")
        subject = Subject(
            placeholder=str(data["placeholder"]),
            opening=self.phrases(data["opening"], "subject.opening"),
            later=self.phrases(data["later"], "subject.later"),
            known_by=tuple(known_by),
        )
        for phrase in subject.opening:
            if not phrase.names:
                raise self.fail(phrase.place, f"{phrase.text!r} names no column; write for instance '{{姓名}}'")
        for phrase in (*subject.opening, *subject.later):
            if subject.placeholder in phrase.names:
                raise self.fail(phrase.place, f"'{{{subject.placeholder}}}' cannot stand for itself")
        return subject

    def question(self, data: Any, place: str) -> Question:
        required, optional = {"train", "answers"}, {"column", "validation", "probability", "position", "where"}
        self.check_keys(data, place, required, optional)
        column = data.get("column")
        if column is not None and not isinstance(column, str):
            raise self.fail(f"{place}.column", f"expected a column name, got {column!r}")
        if column:
            place = f"{place} ({column})"
        position = data.get("position", "any")
        if position not in ("any", "opening"):
            raise self.fail(f"{place}.position", f"expected any or opening, got {position!r}")
        pools = {"train": self.phrases(data["train"], f"{place}.train")}
        pools["validation"] = self.phrases(data.get("validation", []), f"{place}.validation", may_be_empty=True)
        return Question(
            place=place,
            column=column,
            probability=self.probability(data.get("probability", 1), f"{place}.probability"),
            opens=position == "opening",
            where=self.conditions(data.get("where"), f"{place}.where"),
            phrasings=pools,
            answers=self.answers(data["answers"], f"{place}.answers"),
        )

    def evaluation(self, data: Any) -> EvaluationHints:
        if data is None:
            return EvaluationHints()
        self.check_keys(data, "evaluation", set(), {"fields", "unanswerable"})
        fields = data.get("fields") or {}
        if not isinstance(fields, dict):
            raise self.fail("evaluation.fields", f"expected column names and what they hold, got {fields!r:.80}")
        for column, hints in fields.items():
            self.check_field(hints, f"evaluation.fields.{column}")
        unanswerable = self.phrases(data.get("unanswerable", []), "evaluation.unanswerable", may_be_empty=True)
        return EvaluationHints({str(column): hints for column, hints in fields.items()}, unanswerable)

    def check_field(self, data: Any, place: str) -> None:
        self.check_keys(data, place, set(), {"kind", "unit", "separator", "labels", "aliases"})
        kinds = ("number", "list", "text", "flag")
        if data.get("kind", "text") not in kinds:
            raise self.fail(f"{place}.kind", f"expected {', '.join(kinds[:-1])} or {kinds[-1]}, got {data['kind']!r}")
        for key in ("unit", "separator"):
            if key in data and (not isinstance(data[key], str) or not data[key]):
                raise self.fail(f"{place}.{key}", f"expected a text, got {data[key]!r}; put it in quotes")
        labels, aliases = data.get("labels", []), data.get("aliases", {})
        if not isinstance(labels, list) or not all(isinstance(label, str) and label.strip() for label in labels):
            raise self.fail(f"{place}.labels", f"expected a list of texts, got {labels!r:.80}")
        if not isinstance(aliases, dict) or not all(isinstance(word, str) for pair in aliases.items() for word in pair):
            raise self.fail(f"{place}.aliases", f"expected lines `other word: item`, got {aliases!r:.80}")

    def answers(self, data: Any, place: str) -> tuple[Answer, ...]:
        """A wording, a list of wordings, or a list of {where, say}: the first whose `where` holds is used."""
        if not isinstance(data, list) or not any(isinstance(item, dict) for item in data):
            return (Answer((), self.phrases(data, place)),)
        cases = []
        for i, item in enumerate(data):
            self.check_keys(item, f"{place}[{i}]", {"say"}, {"where"})
            where = self.conditions(item.get("where"), f"{place}[{i}].where")
            cases.append(Answer(where, self.phrases(item["say"], f"{place}[{i}].say")))
        return tuple(cases)

    def conditions(self, data: Any, place: str) -> tuple[Condition, ...]:
        if data is None:
            return ()
        if not isinstance(data, dict):
            raise self.fail(place, f"expected lines `column: value`, got {data!r:.80}")
        found = []
        for column, value in data.items():
            here = f"{place}.{column}"
            pairs = value.items() if isinstance(value, dict) else [("is", value)]
            for comparison, wanted in pairs:
                if comparison not in ("is", *COMPARISONS):
                    raise self.fail(here, f"unknown comparison '{comparison}'; use {', '.join(COMPARISONS)}")
                values = wanted if isinstance(wanted, list) else [wanted]
                for item in values:
                    self.check_value(item, comparison, here)
                found.append(Condition(str(column), comparison, tuple(values), here))
        return tuple(found)

    def check_value(self, value: Any, comparison: str, place: str) -> None:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise self.fail(place, f"expected a text or a number, got {value!r}; put the cell's text in quotes")
        if comparison.startswith("at_") and isinstance(value, str):
            raise self.fail(place, f"{comparison} wants a number, got {value!r}")

    def phrases(self, data: Any, place: str, may_be_empty: bool = False) -> tuple[Phrase, ...]:
        texts = [data] if isinstance(data, str) else data
        if not isinstance(texts, list) or (not texts and not may_be_empty):
            raise self.fail(place, f"expected a text or a list of texts, got {data!r:.80}")
        found = []
        for i, text in enumerate(texts):
            here = place if isinstance(data, str) else f"{place}[{i}]"
            if not isinstance(text, str) or not text.strip():
                raise self.fail(here, f"expected a text, got {text!r:.80}; put it in quotes")
            found.append(Phrase(text, here, self.parse(text, here)))
        return tuple(found)

    def parse(self, text: str, place: str) -> tuple[tuple[str, str | None], ...]:
        """Splits at placeholders; `{{` and `}}` are braces of the text."""
        parts, literal, end = [], "", 0
        for match in TOKEN.finditer(text):
            literal += text[end : match.start()]
            end = match.end()
            if match[0] in ("{{", "}}"):
                literal += match[0][0]
            elif match[1] and match[1].strip():
                parts.append((literal, match[1].strip()))
                literal = ""
            else:
                raise self.fail(place, f"a stray brace in {text!r}; write {{column}}, or {{{{ for a brace itself")
        return (*parts, (literal + text[end:], None))

    def check_pools(self, template: Template) -> None:
        """Train and validation share no wording, and every pool can open a conversation."""
        if template.has_validation and not any(q.phrasings["validation"] for q in template.questions):
            raise self.fail("validation_conversations_per_row", "no question has `validation` phrasings")
        trained = {
            normal_form(phrase, template.subject): phrase
            for question in template.questions
            for phrase in question.phrasings["train"]
        }
        for question in template.questions:
            for split, pool in question.phrasings.items():
                if pool and not any(template.is_opening(phrase) for phrase in pool):
                    name = template.subject.placeholder
                    raise self.fail(f"{question.place}.{split}", f"no phrasing names the subject; use {{{name}}}")
            for phrase in question.phrasings["validation"]:
                twin = trained.get(normal_form(phrase, template.subject))
                if twin:
                    raise self.fail(phrase.place, f"{phrase.text!r} is also trained on, at {twin.place}; reword it")
