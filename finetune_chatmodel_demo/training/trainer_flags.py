"""The flags of transformers' `TrainingArguments`, read from its source text: importing it would import torch first."""

import ast
from dataclasses import field, make_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SOURCES = ("trainer_utils.py", "training_args.py")


def read_trainer_arguments() -> type:
    """A dataclass with the fields of the installed `TrainingArguments`: their names, plain types, choices and help."""
    folder = Path(find_spec("transformers").origin).parent
    trees = [ast.parse((folder / name).read_text(encoding="utf-8")) for name in SOURCES]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    entries = [node for node in classes["TrainingArguments"].body if isinstance(node, ast.AnnAssign)]
    return make_dataclass("TrainerArguments", [_read_field(entry, classes) for entry in entries])


def _read_field(entry: ast.AnnAssign, classes: dict[str, ast.ClassDef]) -> tuple[str, Any, Any]:
    words = {node.id for node in ast.walk(entry.annotation) if isinstance(node, ast.Name)}
    metadata = _read_metadata(entry)
    if "dict" in words:  # a mapping arrives as JSON
        kind: Any = str
    elif "list" in words and not ast.unparse(entry.annotation).count("str |"):
        kind = list[str]
    else:
        kind = next((kind for kind in (bool, int, float) if kind.__name__ in words), str)
    choices = [name for name in words if name.endswith(("Type", "Strategy", "Names")) and name in classes]
    if choices:
        metadata["choices"] = [ast.literal_eval(node.value) for node in classes[choices[0]].body if _is_member(node)]
    return entry.target.id, kind, field(default=None, metadata=metadata)


def _is_member(node: ast.stmt) -> bool:
    """Whether a line of an enumeration is `NAME = "value"`."""
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)


def _read_metadata(entry: ast.AnnAssign) -> dict[str, Any]:
    """`help` and `choices` of a field, where they are written out."""
    found: dict[str, Any] = {}
    for node in ast.walk(entry):
        if isinstance(node, ast.keyword) and node.arg == "metadata" and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values):
                if isinstance(value, (ast.Constant, ast.List)):
                    found[ast.literal_eval(key)] = ast.literal_eval(value)
    return {"help": str(found.get("help", "")).replace("%%", "%"), "choices": found.get("choices")}
