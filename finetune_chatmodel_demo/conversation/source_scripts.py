"""Rows that a Python program makes: `script_url` names its folder. It runs only where that was allowed.

A script is `NAME/NAME.py` beside the registry. It has one of two forms:

    def load(split):                          # a generator of rows; may also take subset= and folder=
        yield {"instruction": ..., "output": ...}

or, as older data sets have it, a class with `_split_generators(self, dl_manager)` and `_generate_examples(self, ...)`,
which `datasets` itself runs no more. README.md in `data_processing/datasets` has an example. See `sources.py`.
"""

import importlib.util
import inspect
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune_chatmodel_demo.conversation.json_files import Located
from finetune_chatmodel_demo.conversation.registry import DatasetEntry, RegistryError

LOAD_FUNCTION = "load"
BUILDER_METHODS = ("_split_generators", "_generate_examples")


class ScriptRows:
    """The rows of a script; see `source_files.RowReader`. Each pass runs the script's functions anew."""

    def __init__(self, entry: DatasetEntry, path: Path, generate: Callable[[], Iterator[Any]]):
        self.entry, self.path, self.generate = entry, path, generate

    def rows(self) -> Iterator[Located]:
        """See `RowReader`. Lines are the numbers of rows."""
        number = 0
        try:
            for row in self.generate():
                number += 1
                yield Located(number, number, row)
        except RegistryError:
            raise
        except Exception as error:
            raise _script_error(self.entry, self.path, error, f"behind row {number}") from error

    def where(self, number: int, line: int) -> str:
        """See `RowReader`."""
        return f"{self.path} (split {self.entry.split}) row {number}"


def open_script(entry: DatasetEntry, dataset_dir: Path, *, is_allowed: bool) -> ScriptRows:
    """Imports the script of a data set.

    Args:
        entry: The data set; `split`, `subset` and `folder` are handed to the script.
        dataset_dir: The registry's folder.
        is_allowed: Whether it may run; nothing of it is executed otherwise.

    Raises:
        RegistryError: It may not run, does not exist, fails, or has neither form.
    """
    path = _find_script(entry, dataset_dir)
    if not is_allowed:
        raise RegistryError(
            f"{entry.where}: its rows are made by a Python program, {path}. Read it, and if it may run on this "
            "machine, add --allow_dataset_scripts"
        )
    try:
        module = _import_script(path)
    except Exception as error:
        raise _script_error(entry, path, error, "when it was imported") from error
    if hasattr(module, LOAD_FUNCTION):
        return ScriptRows(entry, path, lambda: _call_load(module.load, entry, path))
    builders = [value for value in vars(module).values() if _is_builder(value, module)]
    if len(builders) != 1:
        raise RegistryError(
            f"{entry.where}: {path} has {len(builders)} classes with {' and '.join(BUILDER_METHODS)}, and no function "
            "load(split); write one of them"
        )
    return ScriptRows(entry, path, lambda: _run_builder(builders[0], entry, path))


def _find_script(entry: DatasetEntry, dataset_dir: Path) -> Path:
    folder = dataset_dir / (entry.script_url or "")
    path = folder if folder.suffix == ".py" else folder / f"{folder.name}.py"
    if not path.is_file():
        raise RegistryError(
            f"{entry.where}: script {path} does not exist; 'script_url' names the folder of NAME/NAME.py"
        )
    return path


def _import_script(path: Path) -> ModuleType:
    """Executes the file as a module under a name of its own; `datasets` looks a builder's module up by its name."""
    spec = importlib.util.spec_from_file_location(f"dataset_script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _call_load(load: Callable[..., Iterator[Any]], entry: DatasetEntry, path: Path) -> Iterator[Any]:
    """Rows of the form `load(split)`, which gets subset and folder as well where the entry has them."""
    given = {key: getattr(entry, key) for key in ("subset", "folder") if getattr(entry, key)}
    parameters = inspect.signature(load).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in given:
        if key not in parameters and not takes_all:
            raise RegistryError(f"{entry.where}: {key!r} is given, but load of {path} takes no {key}")
    return iter(load(entry.split, **given))


def _is_builder(value: Any, module: ModuleType) -> bool:
    is_own_class = isinstance(value, type) and value.__module__ == module.__name__
    return is_own_class and all(hasattr(value, name) for name in BUILDER_METHODS)


def _run_builder(builder_class: type, entry: DatasetEntry, path: Path) -> Iterator[Any]:
    """Rows of the builder form: one split's generator, without the tables that `datasets` would write."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        options: dict[str, Any] = {}
        if issubclass(builder_class, datasets.DatasetBuilder):
            options = {"cache_dir": cache, "config_name": entry.subset, "data_dir": entry.folder}
        builder = builder_class(**options)
        generators = builder._split_generators(datasets.DownloadManager(data_dir=entry.folder))
        splits = {str(generator.name): generator for generator in generators}
        if entry.split not in splits:
            raise RegistryError(f"{entry.where}: {path} has no split {entry.split!r}; it has {', '.join(splits)}")
        for _, row in builder._generate_examples(**splits[entry.split].gen_kwargs):
            yield row


def _script_error(entry: DatasetEntry, path: Path, error: Exception, when: str) -> RegistryError:
    """One line that says where in the script it was."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f" at line {lines[-1]}" if lines else ""
    reason = " ".join(str(error).split())
    return RegistryError(f"{entry.where}: {path} failed {when}{place}: {type(error).__name__}: {reason}")
