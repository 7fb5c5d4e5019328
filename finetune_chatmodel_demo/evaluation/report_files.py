"""Writes a comparison down: report.json, report.md, report.html and answers.jsonl in one folder.

Exercised by `evaluate.py --csv … --report DIR`.
"""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.evaluation.asking import Answer
from finetune_chatmodel_demo.evaluation.questions import QuestionSet
from finetune_chatmodel_demo.evaluation.report_html import to_html
from finetune_chatmodel_demo.evaluation.report_text import to_markdown
from finetune_chatmodel_demo.evaluation.scoring import describe_answer
from finetune_chatmodel_demo.evaluation.training_data import check_training_file

RECORDED_FLAGS = ("csv", "template", "questions_file", "train_file", "seed", "hold_out", "history", "batch_size")


def describe_run(arguments: argparse.Namespace, questions: QuestionSet) -> dict[str, Any]:
    """What a report says of the run: flags, how the questions came about, what the training file has of them.

    Raises:
        LeakError: `--train_file` holds what it must not.
    """
    import torch
    import transformers

    flags = {name: getattr(arguments, name) for name in RECORDED_FLAGS}
    run = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    run |= {key: questions.notes[key] for key in ("fields", "held_out", "left_out") if questions.notes.get(key)}
    if arguments.train_file:
        overlaps = check_training_file(questions, arguments.train_file)
        run["in_training_file"] = {group: f"{found.found} of {found.asked}" for group, found in overlaps.items()}
    versions = f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return run | {"versions": versions}


def write_reports(folder: Path, result: dict[str, Any], answers: Mapping[str, Sequence[Answer]]) -> None:
    """Write all four files; the folder is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, ensure_ascii=False, indent=2) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    (folder / "report.md").write_text(to_markdown(result), encoding="utf-8")
    (folder / "report.html").write_text(to_html(result), encoding="utf-8")
    with (folder / "answers.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for name, found in answers.items():
            for answer in found:
                row = {"candidate": name, "dialogue": answer.dialogue} | describe_answer(answer)
                row |= {"overlap": answer.verdict.overlap, "verbatim": answer.is_verbatim}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
