"""The registry of data sets: reads `dataset_info.json`, in which each data set has a name, a place and a format.

Every key of both generations of such files is known, with its documented default; README.md in
`data_processing/datasets` lists them. A column that an entry does not list keeps its default. Show a data set's rows
with `inspect_data.py --dataset NAME`; tested by `pytest tests/test_registry.py`.
"""

import dataclasses
import difflib
import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.text_files import detect_encoding
from finetune_chatmodel_demo.conversation.validation import STAGE_KINDS

logger = logging.getLogger(__name__)

REGISTRY_NAME = "dataset_info.json"
FORMATTINGS = ("alpaca", "sharegpt", "openai")
MODELSCOPE_VARIABLE = "USE_MODELSCOPE_HUB"
# Keys of LLaMA-Factory's registries that stand for something ChatGLM3 or this project has no use for. An entry that
# has one is refused when it is used, so that it does not stand in the way of the others.
UNSERVED_KEYS = {
    "om_hub_url": "the OpenMind hub is not served; use hf_hub_url, ms_hub_url or file_name",
    "cloud_file_name": "cloud storage is not served; download the file and use file_name",
    "images": "ChatGLM3 reads text alone",
    "videos": "ChatGLM3 reads text alone",
    "audios": "ChatGLM3 reads text alone",
    "kto_tag": "there is no KTO stage; use pairs with ranking for rm and dpo",
}


@dataclass(frozen=True)
class Columns:
    """Which key of a row holds what; None: the data set has no such column."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    messages: str | None = "conversations"
    system: str | None = None
    tools: str | None = None
    chosen: str | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class Tags:
    """How sharegpt messages are written: the two keys of a message, and the names of the roles.

    `role_tag` and `content_tag` are `columns.role` and `columns.content` of the older generation.
    """

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"


OPENAI_TAGS = Tags("role", "content", "user", "assistant", "tool", "tool_calls", "system")


@dataclass(frozen=True)
class DatasetEntry:
    """One data set of a registry.

    Attributes:
        name: Its name there.
        registry: The registry's file.
        unserved: Keys of the entry that are known and not served, each with the reason.

    The others are the keys of `dataset_info.json`.
    """

    name: str
    registry: Path
    hf_hub_url: str | None = None
    ms_hub_url: str | None = None
    script_url: str | None = None
    file_name: str | None = None
    file_sha1: str | None = None
    subset: str | None = None
    folder: str | None = None
    ranking: bool = False
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    split: str = "train"
    num_samples: int | None = None
    columns: Columns = field(default_factory=Columns)
    tags: Tags = field(default_factory=Tags)
    unserved: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The start of every message about this entry."""
        return f"{self.registry}: data set {self.name!r}"

    @property
    def origin(self) -> Literal["hf_hub", "ms_hub", "script", "file"]:
        """Where the rows come from: a hub's address goes before a script, a script before a file.

        With both hubs' addresses, Hugging Face's counts unless USE_MODELSCOPE_HUB is 1 (or true).
        """
        if self.hf_hub_url or self.ms_hub_url:
            prefers_modelscope = os.environ.get(MODELSCOPE_VARIABLE, "").lower() in ("1", "true", "yes", "on")
            if self.ms_hub_url and (prefers_modelscope or not self.hf_hub_url):
                return "ms_hub"
            return "hf_hub"
        return "script" if self.script_url else "file"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of record that it can give: what `STAGE_KINDS` says the stages need."""
        if self.ranking:
            return ("preference",)
        return ("multi-turn", "text") if self.formatting == "alpaca" else ("multi-turn",)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that it can be used for."""
        return tuple(stage for stage, kind in STAGE_KINDS.items() if kind in self.kinds)


TOP_KEYS = tuple(entry.name for entry in dataclasses.fields(DatasetEntry)[2:-1])
COLUMN_KEYS = (*(entry.name for entry in dataclasses.fields(Columns)), "role", "content")
TAG_KEYS = tuple(entry.name for entry in dataclasses.fields(Tags))
BLOCKS = {"columns": COLUMN_KEYS, "tags": TAG_KEYS}
PLACE_KEYS = ("hf_hub_url", "ms_hub_url", "script_url", "file_name")
UNSERVED_PLACES = ("'om_hub_url'", "'cloud_file_name'")
OLD_TAG_KEYS = {"role": "role_tag", "content": "content_tag"}


def find_dataset_dir(given: str | Path | None = None) -> Path:
    """The folder that holds the registry: the given one, else ./data, else the one that comes with this project.

    Raises:
        UserError: There is no `dataset_info.json` in it.
    """
    if given is not None:
        if not (Path(given) / REGISTRY_NAME).is_file():
            state = "has no" if Path(given).is_dir() else "is no folder with a"
            raise UserError(
                f"--dataset_dir {given} {state} {REGISTRY_NAME} (current folder: {Path.cwd()}); name the folder of one"
            )
        return Path(given)
    own = Path(__file__).resolve().parents[2] / "data_processing" / "datasets"
    for folder in (Path("data"), own):
        if (folder / REGISTRY_NAME).is_file():
            return folder
    raise UserError(
        f"no {REGISTRY_NAME} was found in {Path.cwd() / 'data'} or {own}; name its folder with --dataset_dir"
    )


def read_registry(dataset_dir: str | Path) -> dict[str, DatasetEntry]:
    """Reads and checks every entry of a folder's `dataset_info.json`.

    Returns:
        name → entry, in the order of the file.

    Raises:
        UserError: No such file, no valid JSON, an unknown key (with the one that was probably meant), a value of
            the wrong type, or an entry that does not say where its rows are.
    """
    path = find_dataset_dir(dataset_dir) / REGISTRY_NAME
    try:
        text = path.read_text(encoding=detect_encoding(path))
        blocks = json.loads(text, object_pairs_hook=lambda pairs: _refuse_doubles(pairs, path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON: {error.msg}; repair it there") from None
    if not isinstance(blocks, dict):
        raise UserError(f'{path}: expected an object {{"NAME": {{...}}, ...}}, got {describe(blocks)}')
    return {name: _read_or_refuse(name, block, path) for name, block in blocks.items()}


def choose_entries(registry: dict[str, DatasetEntry], names: str | Iterable[str]) -> list[DatasetEntry]:
    """The entries that `--dataset a,b,c` names, in that order.

    Raises:
        UserError: A name is unknown (lists close ones), is given twice, or there is none.
    """
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    wanted = [name for name in wanted if name]
    if not wanted:
        raise UserError(f"no data set is named; use {', '.join(registry)}")
    path = next(iter(registry.values())).registry if registry else "the registry"
    for position, name in enumerate(wanted):
        if name not in registry:
            near = difflib.get_close_matches(name, registry, n=3, cutoff=0.5)
            meant = f"; did you mean {_join_or(near)}?" if near else ""
            raise UserError(f"{path}: data set {name!r} is unknown{meant} (it has {', '.join(registry) or 'none'})")
        if name in wanted[:position]:
            raise UserError(f"data set {name!r} is named twice; to use it more often, set num_samples in {path}")
    return [registry[name] for name in wanted]


def check_kind(entry: DatasetEntry, kind: str) -> None:
    """Checks that an entry can give records of a kind.

    Raises:
        UserError: It cannot: says which stages it serves and what would have to be otherwise.
    """
    if entry.unserved:
        raise UserError(f"{entry.where}: {'; '.join(entry.unserved)}")
    if kind in entry.kinds:
        return
    wanted = [stage for stage, stage_kind in STAGE_KINDS.items() if stage_kind == kind]
    if not wanted:
        raise ValueError(f"kind {kind!r} is unknown; use {', '.join(dict.fromkeys(STAGE_KINDS.values()))}")
    if kind == "preference":
        reason = "ranking is false: it has no better and worse replies. If it has, set ranking to true"
    elif entry.ranking:
        reason = "ranking is true: its rows are pairs of replies. If they are not, set ranking to false"
    else:
        reason = "formatting is sharegpt. For text, use formatting alpaca and name the text's column in columns.prompt"
    raise UserError(
        f"{entry.where} serves the stages {', '.join(entry.stages)} and not {' or '.join(wanted)}: {reason}"
    )


def _read_or_refuse(name: str, block: Any, path: Path) -> DatasetEntry:
    """An entry, or one that is refused when it is used: it must not stand in the way of the others."""
    try:
        return _read_entry(name, block, path)
    except UserError as error:
        if not name.startswith("_"):  # "_comment"
            logger.warning("%s; the data set cannot be used", error)
        where = DatasetEntry(name=name, registry=path).where
        return DatasetEntry(name=name, registry=path, unserved=(str(error).removeprefix(where).lstrip(": "),))


def _read_entry(name: str, block: Any, path: Path) -> DatasetEntry:
    where = f"{path}: data set {name!r}"
    if not isinstance(block, dict):
        raise UserError(f"{where}: expected an object, got {describe(block)}")
    unserved = [*_check_keys(block, TOP_KEYS, where, "")]
    for part, keys in BLOCKS.items():
        if not isinstance(block.get(part, {}), dict):
            raise UserError(f"{where}: {part!r} must be an object, got {describe(block[part])}")
        unserved += _check_keys(block.get(part, {}), keys, where, part)
    values = {key: _read_value(key, value, where) for key, value in block.items() if key in TOP_KEYS}
    columns, tags = _read_columns(block.get("columns", {}), block.get("tags", {}), where, values.get("formatting"))
    values = {key: value for key, value in values.items() if value is not None} | {"columns": columns, "tags": tags}
    has_place = any(values.get(key) for key in PLACE_KEYS)
    if has_place:
        unserved = [text for text in unserved if not text.startswith(UNSERVED_PLACES)]
    entry = DatasetEntry(name=name, registry=path, unserved=tuple(unserved), **values)
    if not has_place and not unserved:
        raise UserError(f"{where} does not say where its rows are; give file_name, script_url or hf_hub_url")
    return entry


def _check_keys(block: dict[str, Any], known: tuple[str, ...], where: str, part: str) -> list[str]:
    """Refuses unknown keys; returns the known ones that are not served, with the reason."""
    unserved = []
    for key in block:
        if key in known:
            continue
        place = f"{part}.{key}" if part else key
        if key in UNSERVED_KEYS:
            unserved.append(f"{place!r}: {UNSERVED_KEYS[key]}")
            continue
        home = next((other for other, keys in BLOCKS.items() if key in keys), "top" if key in TOP_KEYS else None)
        near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.5)
        if home is not None:
            hint = f"it belongs {'directly into the entry' if home == 'top' else f'into {home!r}'}"
        else:
            hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(known)}"
        raise UserError(f"{where}: key {place!r} is unknown; {hint}")
    return unserved


def _read_value(key: str, value: Any, where: str) -> Any:
    """The checked value of a key; None for null and for an empty text, which mean that it is not set."""
    if key in BLOCKS or value is None or value == "":
        return None
    if key == "ranking":
        if not isinstance(value, bool):
            raise UserError(f"{where}: 'ranking' must be true or false, got {describe(value)}")
    elif key == "num_samples":
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{where}: 'num_samples' must be a whole number from 1, got {describe(value)}")
    elif not isinstance(value, str):
        raise UserError(f"{where}: {key!r} must be a text, got {describe(value)}")
    elif key == "formatting" and value not in FORMATTINGS:
        near = difflib.get_close_matches(value.lower(), FORMATTINGS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{where}: formatting {value!r} is unknown; use {', '.join(FORMATTINGS)}{hint}")
    elif key == "file_sha1":
        value = value.lower()
        if not re.fullmatch("[0-9a-f]{40}", value):
            raise UserError(f"{where}: 'file_sha1' must be 40 hexadecimal digits, got {describe(value)}")
    return value


def _read_columns(
    columns: dict[str, Any], tags: dict[str, Any], where: str, formatting: str | None
) -> tuple[Columns, Tags]:
    """Where an entry lists the columns of prompt, query or response, those that it does not list are absent.

    null or an empty text says that there is no such column.
    """
    for part, block in (("columns", columns), ("tags", tags)):
        for key, value in block.items():
            is_optional = part == "columns" and key not in OLD_TAG_KEYS
            if not isinstance(value, str | None) or (not value and not is_optional):
                expected = "a text or null" if is_optional else "a text that is not empty"
                if key not in UNSERVED_KEYS:
                    raise UserError(f"{where}: '{part}.{key}' must be {expected}, got {describe(value)}")
    merged = {key: value for key, value in tags.items() if key in TAG_KEYS}
    for old, new in OLD_TAG_KEYS.items():
        if old in columns and merged.setdefault(new, columns[old]) != columns[old]:
            raise UserError(
                f"{where}: 'columns.{old}' is {columns[old]!r} and 'tags.{new}' is {tags[new]!r}; they mean the same, "
                "remove one"
            )
    named = {key: value or None for key, value in columns.items() if key in COLUMN_KEYS and key not in OLD_TAG_KEYS}
    if formatting == "openai":
        merged = dataclasses.asdict(OPENAI_TAGS) | merged
        named = {"messages": "messages"} | named
    elif any(named.get(key) for key in ("prompt", "query", "response")):
        named = {"prompt": None, "query": None, "response": None} | named
    return Columns(**named), Tags(**merged)


def _refuse_doubles(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: {name!r} stands twice in one object; remove or rename one")
    return dict(pairs)


def describe(value: Any) -> str:
    """A value for a message, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _join_or(names: list[str]) -> str:
    return " or ".join(repr(name) for name in names)
