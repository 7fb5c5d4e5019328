"""Makes the data sets in data_processing/datasets from data.csv: `python data_processing/make_datasets.py`.

Conversations (pokemon), pairs of a true and a false answer (pokemon_preference), documents (pokemon_text), tool calls
(pokemon_tools), each with a validation set. Equal facts and seeds give equal files; `dataset_info.json` there is
written by hand.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the rooms are packages; this folder is not on the path

import argparse
import json
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from data_processing import dataset_wordings as wordings
from data_processing.holding_out import is_held_out
from finetune_chatmodel_demo.common.cli import run_program
from finetune_chatmodel_demo.common.files import flag_path, whole_files

if TYPE_CHECKING:
    from data_processing.template import Question, Template

HERE = Path(__file__).resolve().parent
NAME = "姓名"
# This share of the Pokémon is in the validation sets alone, the one that `evaluate.py --hold_out 0.2` asks about. The
# conversations and tool calls hold out wordings instead.
HELD_OUT_SHARE = 0.2
CONVERSATIONS_PER_ROW = {"train": 2, "validation": 1}
# Pairs: of five columns of each Pokémon, two pairs for training; of two of these, another for validation.
PREFERENCE_COLUMNS = 5
COLUMNS_ASKED = {"train": 5, "validation": 2, "unseen": 5}
FALSE_ANSWERS = {"train": slice(0, 2), "validation": slice(2, 3), "unseen": slice(0, 1)}
DOCUMENTS_PER_ROW = {"train": 2, "validation": 1}
TOOL_CALLS_PER_ROW = {"train": 3, "validation": 1}
SAMPLE_DOCUMENTS = 5

Row = dict[str, str]


def make_datasets(facts: list[Row], template: "Template", seed: int) -> dict[str, str]:
    """Makes all files.

    Args:
        facts: Rows of data.csv that the template is about.
        template: pokemon_kanto.yaml.
        seed: Draws wordings, columns and false answers.

    Returns:
        file name → its text.
    """
    files = {}
    known = [row for row in facts if not is_held_out(row[NAME], HELD_OUT_SHARE)]
    unseen = [row for row in facts if is_held_out(row[NAME], HELD_OUT_SHARE)]
    for split, ending in (("train", ""), ("validation", "_validation")):
        rows = known if split == "train" else unseen
        files[f"pokemon{ending}.jsonl"] = to_lines(conversations(facts, template, split, seed))
        files[f"pokemon_text{ending}.jsonl"] = to_lines(documents(rows, split, seed))
        files[f"pokemon_tools{ending}.jsonl"] = to_lines(tool_calls(facts, split, seed))
    known, unseen = (
        [row for row in facts if is_held_out(row[NAME], HELD_OUT_SHARE) == wanted] for wanted in (False, True)
    )
    files["pokemon_preference.jsonl"] = to_lines(preferences(known, template, "train", seed))
    files["pokemon_preference_validation.jsonl"] = to_lines(preferences(known, template, "validation", seed))
    files["pokemon_preference_unseen.jsonl"] = to_lines(preferences(unseen, template, "unseen", seed))
    texts = [record["text"] for record in documents(facts, "sample", seed)][:SAMPLE_DOCUMENTS]
    files["pretraining_sample.csv"] = "".join(f"{line}\n" for line in ["text", *texts])
    return files


def conversations(rows: list[Row], template: "Template", split: str, seed: int) -> Iterator[dict[str, Any]]:
    """The first conversations of each row that data_processing.py makes, without its notes for evaluate.py."""
    from data_processing.conversation_builder import build_conversations

    for row in rows:
        for record in build_conversations(template, row, split, seed)[: CONVERSATIONS_PER_ROW[split]]:
            messages = [{key: message[key] for key in ("role", "content")} for message in record["conversations"]]
            yield {"conversations": messages}


def preferences(rows: list[Row], template: "Template", split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Questions with a true answer and one that is true of another Pokémon, in equal words.

    Validation asks about facts that training has, in its own wordings and with other false answers.
    """
    phrasings = "train" if split == "train" else "validation"
    name = template.subject.placeholder
    for row in rows:
        # The splits draw the same questions and the same order of false answers, of which each takes others.
        key = f"{seed}|preference|{row[NAME]}"
        questions = random.Random(key).sample(template.questions, PREFERENCE_COLUMNS)
        for question in questions[: COLUMNS_ASKED[split]]:
            draw = random.Random(f"{key}|{question.column}")
            false = _false_answers(question, row, rows, draw)[FALSE_ANSWERS[split]]
            pool = [phrase for phrase in question.phrasings[phrasings] if name in phrase.names]
            for phrase, answer in zip(draw.sample(pool, len(false)), false):
                yield {
                    "instruction": phrase.fill({**row, name: row[NAME]}),
                    "output": [_answer(question, row), answer],
                }


def _false_answers(question: "Question", row: Row, rows: list[Row], draw: random.Random) -> list[str]:
    """The different answers that are true of others, as if said of this one, in a random order."""
    others = [other for other in rows if _values(other, question) != _values(row, question)]
    answers = list(dict.fromkeys(_answer(question, {**other, NAME: row[NAME]}) for other in others))
    draw.shuffle(answers)
    return answers


def _values(row: Row, question: "Question") -> set[str]:
    """The values of a cell: two orders of the same list are the same."""
    return set(row[question.column].split("、"))


def _answer(question: "Question", row: Row) -> str:
    case = next(case for case in question.answers if all(condition.holds(row) for condition in case.where))
    return case.say[0].fill(row)


def documents(rows: list[Row], split: str, seed: int) -> Iterator[dict[str, str]]:
    """Prose on each row, a sentence a column."""
    for row in rows:
        draw = random.Random(f"{seed}|text|{split}|{row[NAME]}")
        for _ in range(DOCUMENTS_PER_ROW.get(split, 1)):
            columns = list(wordings.DOCUMENT_SENTENCES)
            draw.shuffle(columns)
            forms = [wordings.DOCUMENT_OPENINGS]
            for column in columns:
                forms.append((wordings.DOCUMENT_SENTENCES if row[column] else wordings.DOCUMENT_MISSING)[column])
            forms.append(wordings.DOCUMENT_ENDINGS)
            yield {"text": "".join(draw.choice(choices).format(**row) for choices in forms)}


def tool_calls(rows: list[Row], split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Questions about every Pokémon, answered through a call of the tool `pokedex`; validation in its own wordings."""
    tools = json.dumps([wordings.TOOL], ensure_ascii=False)
    for row in rows:
        draw = random.Random(f"{seed}|tools|{split}|{row[NAME]}")
        for attribute in draw.sample(list(wordings.TOOL_ATTRIBUTES), TOOL_CALLS_PER_ROW[split]):
            yield {
                "conversations": _ask_tool(row, attribute, draw.choice(wordings.TOOL_QUESTIONS[split])),
                "tools": tools,
            }


def _ask_tool(row: Row, attribute: str, question: str) -> list[dict[str, str]]:
    """A question, the call, what the tool says, and the answer."""
    entry = {name: row[column] + unit for name, (column, unit) in wordings.TOOL_ATTRIBUTES.items()}
    values = {"name": row[NAME], "attribute": attribute, "value": entry[attribute]}
    call = {"name": wordings.TOOL["name"], "arguments": {"query": row[NAME]}}
    return [
        {"from": "human", "value": question.format(**values)},
        {"from": "function_call", "value": json.dumps(call, ensure_ascii=False)},
        {"from": "observation", "value": "；".join(f"{name}：{value}" for name, value in entry.items())},
        {"from": "gpt", "value": wordings.TOOL_ANSWER.format(**values)},
    ]


def to_lines(records: Iterator[dict[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main(arguments: list[str] | None = None) -> None:
    """Makes and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=flag_path, default=HERE / "datasets", help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="draws wordings and columns (default: %(default)s)")
    options = parser.parse_args(arguments)
    from data_processing.csv_rows import CsvRows
    from data_processing.template_reader import load_template

    template = load_template(HERE / "templates" / "pokemon_kanto.yaml")
    facts = [row for row in CsvRows(HERE / "data.csv") if template.matches(row)]
    files = make_datasets(facts, template, options.seed)
    paths = [options.output / name for name in files]
    with whole_files(*paths) as outputs:
        for output, path, text in zip(outputs, paths, files.values()):
            output.write(text)
            print(f"{path.name}: {text.count(chr(10))} lines, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    sys.exit(run_program(main, interrupted="interrupted: no output was written"))
