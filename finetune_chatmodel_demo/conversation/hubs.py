"""Rows of data sets that are no files here: on a hub, or made by a Python program.

Hugging Face's hub is read through `datasets`, ModelScope's through its own client, which is optional (`pip install
modelscope`). It fetches the files, and `datasets` reads them: the client's own reader, MsDataset, refuses versions of
`datasets` that this project uses.

A program, NAME/NAME.py beside the registry (`script_url` names the folder), runs only where that was allowed. It has
one of two forms:

    def load(split):                          # a generator of rows; may also take subset= and folder=
        yield {"instruction": ..., "output": ...}

or, as older data sets have it, a class with `_split_generators(self, dl_manager)` and `_generate_examples(self, ...)`,
which `datasets` itself runs no more. README.md in `data_processing/datasets` has an example.
"""

import importlib.util
import inspect
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.registry import MODELSCOPE_VARIABLE, DatasetEntry
from finetune_chatmodel_demo.conversation.text_files import Located

NETWORK_WORDS = ("offline", "couldn't reach", "could not reach", "connection", "connect to", "resolve", "timed out")
ERROR_LENGTH = 300
LOAD_FUNCTION = "load"
BUILDER_METHODS = ("_split_generators", "_generate_examples")


class HubRows:
    """The rows of one split of a data set on a hub; see `text_files.RowReader`."""

    def __init__(self, entry: DatasetEntry, address: str, dataset: Iterable[dict[str, Any]]):
        self.entry, self.address, self.dataset = entry, address, dataset
        self.path = Path(address)

    def rows(self) -> Iterator[Located]:
        """See `RowReader`. Lines are the numbers of rows."""
        number = 0
        rows = iter(self.dataset)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise hub_error(self.entry, self.address, error, f"behind row {number}") from error
            number += 1
            yield Located(number, number, row)

    def where(self, number: int, line: int) -> str:
        """See `RowReader`."""
        return f"{self.address} (split {self.entry.split}) row {number}"


def open_hub(entry: DatasetEntry, *, streaming: bool = False) -> HubRows:
    """Opens a data set of the hub that `entry.origin` names.

    Args:
        entry: The data set; `subset`, `folder` and `split` say which part of it.
        streaming: Read it while iterating, instead of downloading it first (Hugging Face alone).

    Raises:
        UserError: No network, no such data set, subset or split, or no client of ModelScope: one line.
    """
    if entry.origin == "ms_hub":
        address = entry.ms_hub_url
        path = _download_from_modelscope(entry)
    else:
        address = path = entry.hf_hub_url
    import datasets

    try:
        dataset = datasets.load_dataset(
            path, name=entry.subset, data_dir=entry.folder, split=entry.split, streaming=streaming
        )
    except Exception as error:
        raise hub_error(entry, address, error) from error
    return HubRows(entry, address, dataset)


def _download_from_modelscope(entry: DatasetEntry) -> str:
    """The local folder that the files of a data set of ModelScope's were downloaded to."""
    try:
        from modelscope.hub.snapshot_download import dataset_snapshot_download
    except ImportError as error:
        other = f", or unset {MODELSCOPE_VARIABLE} to take it from hf_hub_url" if entry.hf_hub_url else ""
        raise UserError(
            f"{entry.where}: ms_hub_url needs ModelScope's client ({error}); install it with "
            f"`pip install modelscope`{other}"
        ) from None
    patterns = {"allow_patterns": [f"{entry.folder.strip('/')}/**", "README.md"]} if entry.folder else {}
    try:
        return str(dataset_snapshot_download(entry.ms_hub_url, **patterns))
    except Exception as error:
        raise hub_error(entry, entry.ms_hub_url, error) from error


def hub_error(entry: DatasetEntry, address: str, error: Exception, place: str = "") -> UserError:
    """One line that says what went wrong with a hub, whatever a client raised."""
    chain, texts = error, []
    while chain is not None and len(texts) < 5:
        texts.append(f"{type(chain).__name__} {chain}".lower())
        chain = chain.__cause__ or chain.__context__
    is_network = isinstance(error, ConnectionError | TimeoutError) or any(
        word in text for word in NETWORK_WORDS for text in texts
    )
    hub = "ModelScope" if entry.origin == "ms_hub" else "the Hugging Face hub"
    reason = " ".join(str(error).split())[:ERROR_LENGTH] or "no message"
    what = f"{entry.where}: {address!r} cannot be read from {hub}{f' {place}' if place else ''}"
    if is_network:
        remedy = "check the network and HF_HUB_OFFLINE"
        if entry.origin == "hf_hub":
            remedy += f"; a mirror can be named with HF_ENDPOINT{_other_hub(entry)}"
        return UserError(f"{what}, there is no connection to it ({reason}); {remedy}, or use file_name")
    part = ", ".join(f"{key} {getattr(entry, key)!r}" for key in ("subset", "folder", "split") if getattr(entry, key))
    return UserError(f"{what} ({type(error).__name__}: {reason}); check its name and {part}")


def _other_hub(entry: DatasetEntry) -> str:
    return f", ModelScope chosen with {MODELSCOPE_VARIABLE}=1" if entry.ms_hub_url else ""


class ScriptRows:
    """The rows of a script; see `text_files.RowReader`. Each pass runs the script's functions anew."""

    def __init__(self, entry: DatasetEntry, path: Path, generate: Callable[[], Iterator[Any]]):
        self.entry, self.path, self.generate = entry, path, generate

    def rows(self) -> Iterator[Located]:
        """See `RowReader`. Lines are the numbers of rows."""
        number = 0
        try:
            for row in self.generate():
                number += 1
                yield Located(number, number, row)
        except UserError:
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
        UserError: It may not run, does not exist, fails, or has neither form.
    """
    path = _find_script(entry, dataset_dir)
    if not is_allowed:
        raise UserError(
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
        raise UserError(
            f"{entry.where}: {path} has {len(builders)} classes with {' and '.join(BUILDER_METHODS)}, and no function "
            "load(split); write one of them"
        )
    return ScriptRows(entry, path, lambda: _run_builder(builders[0], entry, path))


def _find_script(entry: DatasetEntry, dataset_dir: Path) -> Path:
    folder = dataset_dir / (entry.script_url or "")
    path = folder if folder.suffix == ".py" else folder / f"{folder.name}.py"
    if not path.is_file():
        raise UserError(f"{entry.where}: script {path} does not exist; 'script_url' names the folder of NAME/NAME.py")
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
            raise UserError(f"{entry.where}: {key!r} is given, but load of {path} takes no {key}")
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
        generators = builder._split_generators(
            datasets.DownloadManager(data_dir=entry.folder, base_path=str(path.parent))
        )
        splits = {str(generator.name): generator for generator in generators}
        if entry.split not in splits:
            raise UserError(f"{entry.where}: {path} has no split {entry.split!r}; it has {', '.join(splits)}")
        for _, row in builder._generate_examples(**splits[entry.split].gen_kwargs):
            yield row


def _script_error(entry: DatasetEntry, path: Path, error: Exception, when: str) -> UserError:
    """One line that says where in the script it was."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f" at line {lines[-1]}" if lines else ""
    reason = " ".join(str(error).split())
    return UserError(f"{entry.where}: {path} failed {when}{place}: {type(error).__name__}: {reason}")
