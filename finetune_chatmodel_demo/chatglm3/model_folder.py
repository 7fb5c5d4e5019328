"""The one reader of a model folder: what its files say is checked before anything is built from it.

Nothing of a folder is ever run, and pickles are read for tensors alone. Names and shapes of the weights come from the
files' headers, so that this costs milliseconds for a model of gigabytes too. `THUDM/check_download.py` looks closer.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.weights import query_key_value_rows, read_pickle
from finetune_chatmodel_demo.common.errors import UserError

WEIGHT_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER_CLASS = "ChatGLMTokenizer"
POINTER_START = b"version https://git-lfs"
DOWNLOAD_HINT = "THUDM/README.md says how to get the weights and how to check them."
REPAIR = "download it again; THUDM/README.md says how, and `python THUDM/check_download.py` checks a folder"
# Whole numbers of config.json, each at least 1, and the largest that is believed.
SIZES = {
    "num_layers": 10**4,
    "padded_vocab_size": 10**8,
    "hidden_size": 10**6,
    "ffn_hidden_size": 10**7,
    "kv_channels": 10**5,
    "num_attention_heads": 10**5,
    "multi_query_group_num": 10**5,
    "seq_length": 10**9,
    "pre_seq_len": 10**6,
}
# Other numbers: least and largest value.
RANGES = {
    "layernorm_epsilon": (0.0, 1.0),
    "rope_ratio": (1e-6, 1e9),
    "attention_dropout": (0.0, 0.999),
    "classifier_dropout": (0.0, 0.999),
    "initializer_range": (0.0, 1e3),
}
SWITCHES = ("add_qkv_bias", "prefix_projection", "use_cache", "tie_word_embeddings")
OPTIONAL = ("pre_seq_len", "classifier_dropout")
_LAYER = re.compile(r"\blayers\.(\d+)\.")


def check_folder(path: str | Path, file: str) -> None:
    """Local folders must hold `file`; anything that is no folder and looks like a hub name is left to the hub.

    Raises:
        FileNotFoundError: there is no such folder, or no such file in it.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / file).is_file():
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{folder} has no {file} (found: {there}). {DOWNLOAD_HINT}")
    elif folder.is_absolute() or len(folder.parts) != 2 or str(path).startswith(".") or _is_below_a_folder(folder):
        raise FileNotFoundError(f"{folder} is not a folder. {DOWNLOAD_HINT}")


def _is_below_a_folder(path: Path) -> bool:
    """Whether `output/x` is a misspelt folder rather than a hub name; THUDM is a folder here and a name on the hub."""
    return path.parts[0] != "THUDM" and Path(path.parts[0]).is_dir()


def read_model_config(path: str | Path) -> ChatGLM3Config:
    """The configuration of a model folder, or of a hub name.

    Raises:
        FileNotFoundError: there is no config.json.
        UserError: it is not one of a ChatGLM2 or ChatGLM3, or a value in it is impossible.
    """
    check_folder(path, "config.json")
    source = Path(path) / "config.json"
    if Path(path).is_dir():
        values = read_json_object(source)
    else:
        try:
            values, _ = ChatGLM3Config.get_config_dict(str(path))
        except (OSError, ValueError) as error:
            raise UserError(explain_hub_error(path, error)) from error
    check_config(source, values)
    try:
        return ChatGLM3Config.from_dict(values | {"_name_or_path": str(path)})
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except Exception as error:  # whatever transformers says of a value that it does not expect
        raise UserError(f"{source} cannot be used ({_first_line(error)}); {REPAIR}") from error


def check_config(source: Path, values: dict[str, Any]) -> None:
    """Refuses the first value of a config.json that no ChatGLM2 or ChatGLM3 can have.

    Raises:
        UserError: says file, name, what was found and what is expected.
    """
    found = values.get("model_type")
    if found != ChatGLM3Config.model_type:
        names = values.get("architectures")
        names = ", ".join(map(str, names if isinstance(names, list) else [])) or "none are named"
        raise UserError(
            f"{source}: model_type is {found!r} (architectures: {names}), and only ChatGLM2 and ChatGLM3 "
            f"({ChatGLM3Config.model_type!r}) are loaded here; give the folder of such a model, or restore its "
            "config.json. Code of a model folder is never run"
        )
    for name, expected in _find_impossible(values):
        raise UserError(f"{source}: {name} is {values[name]!r}; expected {expected}. Restore the model's config.json")


def _find_impossible(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name of an impossible value, and what is expected instead."""

    def is_number(value: Any, *kinds: type) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)

    given = {name: value for name, value in values.items() if not (value is None and name in OPTIONAL)}
    for name, largest in SIZES.items():
        if name in given and not (is_number(given[name], int) and 1 <= given[name] <= largest):
            yield name, f"a whole number from 1 to {largest:,}"
    for name, (least, largest) in RANGES.items():
        if name in given and not (is_number(given[name], int, float) and least <= given[name] <= largest):
            yield name, f"a number from {least} to {largest}"
    for name in SWITCHES:
        if name in given and not isinstance(given[name], bool):
            yield name, "true or false"
    if given.get("kv_channels", 4) % 4:
        yield "kv_channels", "a multiple of 4, because pairs of one half of each head are rotated"
    for name in ("torch_dtype", "dtype"):
        dtype = getattr(torch, str(given.get(name) or "float32").removeprefix("torch."), None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            yield name, "float16, bfloat16 or float32"
    architectures = given.get("architectures")
    if architectures is not None and not isinstance(architectures, list):
        yield "architectures", "a list of names"
    quantization = given.get("quantization_config")
    if quantization and (not isinstance(quantization, dict) or quantization.get("quant_method") != "bitsandbytes"):
        yield (
            "quantization_config",
            "none, or bitsandbytes'; use the unquantized model and --quantization_bit 4, which quantizes while loading",
        )


def check_model_folder(folder: str | Path) -> None:
    """Refuses a local model folder that cannot be used, before gigabytes are read; other paths are left alone.

    Raises:
        UserError: config.json cannot be read, is of another architecture or has an impossible value, a file of weights
            is missing, cut or holds other things, or their shapes are not those that config.json says.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        return
    config = read_model_config(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_json_object(folder / name)
    check_generation_config(folder / "generation_config.json")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        shapes |= read_shapes(file)
    if shapes and not getattr(config, "quantization_config", None):
        _check_shapes(folder, config, shapes)


def check_generation_config(file: Path) -> None:
    """Refuses a generation_config.json whose values transformers would stumble over while it generates.

    Raises:
        UserError: an id is no number, or transformers refuses the file.
    """
    if not file.is_file():
        return
    values = read_json_object(file)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = values.get(name)
        if not all(each is None or type(each) is int for each in (value if isinstance(value, list) else [value])):
            raise UserError(f"{file}: {name} is {value!r}; it must be a number or a list of numbers, {REPAIR}")
    try:
        GenerationConfig.from_dict(values)
    except Exception as error:  # it refuses values in many ways
        raise UserError(f"{file} cannot be used ({_first_line(error)}); {REPAIR}") from error


def check_tokenizer_folder(folder: Path) -> None:
    """Refuses a tokenizer of another model.

    Raises:
        UserError: tokenizer_config.json cannot be read or names another class.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    name = read_json_object(path).get("tokenizer_class", TOKENIZER_CLASS)
    if name != TOKENIZER_CLASS:
        raise UserError(
            f"{path}: tokenizer_class is {name!r}, and only {TOKENIZER_CLASS} is loaded here; give the folder of "
            "the model's own tokenizer"
        )


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a file of weights; safetensors compares its header with the file's size.

    Raises:
        UserError: for a file that is cut, damaged or something else.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        if opened.read(len(POINTER_START)) == POINTER_START:
            raise UserError(f"{file} is a git-lfs pointer of {size} bytes; run `git lfs pull` in {file.parent}")
    if file.suffix != ".safetensors":
        state = read_pickle(file, f"It has {size:,} bytes; {REPAIR}", map_location="meta")
        return {name: tuple(value.shape) for name, value in state.items()}
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file} ({size:,} bytes) is not a whole safetensors file ({error}); {REPAIR}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that would be loaded, in the order in which transformers looks for them."""
    for whole, index in (("model.safetensors", WEIGHT_INDEXES[0]), ("pytorch_model.bin", WEIGHT_INDEXES[1])):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            return _indexed_files(folder / index)
    return []


def _indexed_files(index: Path) -> list[Path]:
    shards = read_json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} names no file of weights (no weight_map); {REPAIR}")
    names = sorted({str(name) for name in shards.values()})
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index} names {outside[0]}, which is not a file of this folder; {REPAIR}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} files that {index.name} names: "
            f"{', '.join(missing)}; {REPAIR}"
        )
    return [index.parent / name for name in names]


def _check_shapes(folder: Path, config: ChatGLM3Config, shapes: dict[str, tuple[int, ...]]) -> None:
    hidden, inner = config.hidden_size, config.ffn_hidden_size
    expected = {
        "word_embeddings.weight": (config.padded_vocab_size, hidden),
        "output_layer.weight": (config.padded_vocab_size, hidden),
        "query_key_value.weight": (sum(query_key_value_rows(config)), hidden),
        "self_attention.dense.weight": (hidden, config.num_attention_heads * config.kv_channels),
        "dense_h_to_4h.weight": (2 * inner, hidden),
        "dense_4h_to_h.weight": (hidden, inner),
        "layernorm.weight": (hidden,),
    }
    for name, shape in shapes.items():
        wanted = next((value for end, value in expected.items() if name.endswith(end)), shape)
        if shape != wanted:
            raise UserError(
                f"{folder}: the weights do not fit config.json: {name} is {shape}, and config.json asks for {wanted}. "
                f"{DOWNLOAD_HINT}"
            )
    layers = {int(match[1]) for name in shapes if (match := _LAYER.search(name))}
    if len(layers) != config.num_layers:
        raise UserError(
            f"{folder}: the weights do not fit config.json: they hold {len(layers)} layers, and num_layers is "
            f"{config.num_layers}. {DOWNLOAD_HINT}"
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        UserError: it is not JSON, or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); {REPAIR}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} and not a mapping; {REPAIR}")
    return content


def explain_hub_error(name: str | Path, error: Exception) -> str:
    """One line for a hub name that cannot be loaded; transformers takes several for an unreachable hub."""
    return f"{name}: there is no such folder, and as a name on the hub: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
