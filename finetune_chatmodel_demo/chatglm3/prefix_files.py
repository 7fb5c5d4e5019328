"""Prefix checkpoints: folders with a prefix and what one must know to use it, in our form and the original's.

`prefix_encoder.safetensors` holds the parameters, `config.json` the base model's configuration with `pre_seq_len`,
`prefix_projection`, the base model's name and the prompt format; `pytorch_model.bin` holds the same parameters under
the names that the original fine-tuning demo reads. Checkpoints that have only the latter are read as well.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.fingerprint import Fingerprint, read_fingerprint
from finetune_chatmodel_demo.chatglm3.weights import check_finite, read_tensor_file
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import partial_path, publish_files, remove_tree, write_json

if TYPE_CHECKING:
    from finetune_chatmodel_demo.chatglm3.modeling import ChatGLM3ForCausalLM

SAFE_FILE = "prefix_encoder.safetensors"
OFFICIAL_FILE = "pytorch_model.bin"
CONFIG_FILE = "config.json"
OFFICIAL_KEY = "transformer.prefix_encoder."
COPY_AGAIN = "Copy the checkpoint again."


@dataclass(frozen=True)
class PrefixConfig:
    """What a prefix checkpoint says of itself.

    Args:
        pre_seq_len: prefix positions.
        prefix_projection: whether an MLP makes the prefix.
        base_model: folder or hub name of the model it was trained for; None: unknown.
        prompt_format: see `conversation.render`; None: an old checkpoint, which does not say.
        prefix_dropout: the dropout that it was trained with; None: an old checkpoint, which does not say.
        base_fingerprint: see `fingerprint`; None: an old checkpoint, which does not say.
    """

    pre_seq_len: int
    prefix_projection: bool
    base_model: str | None = None
    prompt_format: str | None = None
    prefix_dropout: float | None = None
    base_fingerprint: Fingerprint | None = None


def is_prefix_checkpoint(folder: str | Path) -> bool:
    """Whether `folder` holds prefix weights in either form."""
    folder = Path(folder)
    if (folder / SAFE_FILE).is_file():
        return True
    return (folder / OFFICIAL_FILE).is_file() and bool(_parameters_of(folder))


def read_prefix_config(folder: str | Path) -> PrefixConfig:
    """What the checkpoint in `folder` says of itself; length and projection come from the weights.

    Raises:
        UserError: when there is no readable prefix in the folder.
    """
    return _describe(Path(folder), read_prefix_parameters(Path(folder)))


def load_prefix(model: "ChatGLM3ForCausalLM", folder: str | Path, *, pre_seq_len: int | None = None) -> PrefixConfig:
    """Loads a prefix in front of `model`, which is frozen; an existing prefix of the same form is overwritten.

    Args:
        model: the base model.
        folder: a prefix checkpoint of this project or of the original demo.
        pre_seq_len: what the caller believes the length to be: a check, not a setting.

    Raises:
        UserError: for a missing or damaged checkpoint, missing or left-over keys, or shapes of another base model.
    """
    folder = Path(folder)
    parameters = read_prefix_parameters(folder)
    found = _describe(folder, parameters)
    if pre_seq_len is not None and pre_seq_len != found.pre_seq_len:
        raise UserError(
            f"{folder}: the prefix has {found.pre_seq_len} positions, but {pre_seq_len} were asked for. "
            f"Leave the length out, or say {found.pre_seq_len}."
        )
    _check_base(folder, parameters, found, model.config)
    encoder = model.prefix_encoder
    if encoder is None:
        model.add_prefix(found.pre_seq_len, found.prefix_projection)
        encoder = model.prefix_encoder
    _check_parameters(folder, parameters, encoder.state_dict())
    encoder.load_state_dict(parameters)
    return found


def check_prefix(folder: str | Path, config: ChatGLM3Config) -> None:
    """Refuses a prefix that was trained for another base model than `config` describes, before gigabytes are read.

    Raises:
        UserError: as `load_prefix`.
    """
    parameters = read_prefix_parameters(Path(folder))
    _check_base(Path(folder), parameters, _describe(Path(folder), parameters), config)


def save_prefix(
    model: "ChatGLM3ForCausalLM",
    folder: str | Path,
    *,
    base_model: str | None = None,
    prompt_format: str | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes the model's prefix to `folder`, which keeps its other files; nothing half-written stays behind.

    Args:
        model: a model with a prefix.
        folder: created when missing.
        base_model: folder or hub name of the base model, kept for `inference.py`.
        prompt_format: the format it was trained with.
        state_dict: the model's state where its parameters are spread over processes (DeepSpeed ZeRO-3).

    Raises:
        ValueError: for a model without a prefix.
    """
    if model.prefix_encoder is None:
        raise ValueError("the model has no prefix to save; load it with pre_seq_len=… or pt_checkpoint=…")
    parameters = _prefix_state(model, state_dict)
    config = json.loads(model.config.to_json_string(use_diff=False)) | {
        "base_model_name_or_path": base_model,
        "base_fingerprint": read_fingerprint(base_model),
        "prompt_format": prompt_format,
        "prefix_dropout": model.prefix_encoder.dropout.p,  # for a run that goes on from here
    }
    write_prefix(folder, parameters, config)


def write_prefix(
    folder: str | Path,
    parameters: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    files: Sequence[str] = (SAFE_FILE, OFFICIAL_FILE),
) -> None:
    """Writes a prefix checkpoint.

    Args:
        folder: created when missing; keeps its other files.
        parameters: by their own names: `embedding.weight`, `trans.0.weight` …
        config: what goes into config.json.
        files: which of the two forms of the parameters are written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = partial_path(folder / "prefix")
    remove_tree(scratch)
    scratch.mkdir()
    try:
        write_json(scratch / CONFIG_FILE, dict(config))
        if SAFE_FILE in files:
            save_file(dict(parameters), scratch / SAFE_FILE, metadata={"format": "pt"})
        if OFFICIAL_FILE in files:
            torch.save({OFFICIAL_KEY + name: value for name, value in parameters.items()}, scratch / OFFICIAL_FILE)
        for name in files:  # safetensors lets nobody else read its files
            shutil.copymode(scratch / CONFIG_FILE, scratch / name)
        publish_files(scratch, folder)
    finally:
        remove_tree(scratch)


def _prefix_state(model: "ChatGLM3ForCausalLM", state: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """The prefix's parameters by their own names, as float32 on the CPU."""
    if state is None:
        own = model.prefix_encoder.state_dict()
    else:
        key = "model.prefix_encoder."
        own = {name.removeprefix(key): value for name, value in state.items() if name.startswith(key)}
    return {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in own.items()}


def _parameters_of(folder: Path) -> dict[str, torch.Tensor]:
    """The prefix in the original demo's file, by this project's names; {} when the file holds no prefix."""
    state = read_tensor_file(folder / OFFICIAL_FILE, COPY_AGAIN)
    return {k.removeprefix(OFFICIAL_KEY): v for k, v in state.items() if k.startswith(OFFICIAL_KEY)}


def read_prefix_parameters(folder: Path) -> dict[str, torch.Tensor]:
    """The prefix's parameters by their own names, from either form.

    Raises:
        UserError: when there is no readable prefix in the folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the folder that finetune.py wrote (its --output_dir).")
    if (folder / SAFE_FILE).is_file():
        parameters = read_tensor_file(folder / SAFE_FILE, COPY_AGAIN)
    elif (folder / OFFICIAL_FILE).is_file():
        parameters = _parameters_of(folder)
    else:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder} holds neither {SAFE_FILE} nor {OFFICIAL_FILE} (found: {there}).")
    if "embedding.weight" not in parameters:
        raise UserError(
            f"{folder}: no prefix among the weights (expected embedding.weight, found "
            f"{', '.join(sorted(parameters)[:6]) or 'no key of a prefix'}). A model that was tuned in full is given "
            "as the model, not as a prefix."
        )
    check_finite(folder, parameters.items())
    return parameters


def _describe(folder: Path, parameters: dict[str, torch.Tensor]) -> PrefixConfig:
    values: dict = {}
    if (folder / CONFIG_FILE).is_file():
        try:
            values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{folder / CONFIG_FILE} is not JSON ({error}). Copy the checkpoint again.") from error
    return PrefixConfig(
        pre_seq_len=parameters["embedding.weight"].shape[0],
        prefix_projection=any(name.startswith("trans.") for name in parameters),
        base_model=values.get("base_model_name_or_path") or values.get("_name_or_path"),
        prompt_format=values.get("prompt_format"),
        prefix_dropout=values.get("prefix_dropout"),
        base_fingerprint=values.get("base_fingerprint"),
    )


def _check_base(folder: Path, parameters: dict[str, torch.Tensor], found: PrefixConfig, config: ChatGLM3Config) -> None:
    kv_size = parameters["embedding.weight"].shape[1]
    if kv_size != config.kv_size:
        raise UserError(
            f"{folder}: a prefix row has {kv_size} values; this base model needs {config.kv_size} "
            "(layers × 2 × groups × channels). The prefix was trained for another base model"
            + (f": {found.base_model}." if found.base_model else ".")
        )


def _check_parameters(folder: Path, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise UserError(
            f"{folder}: keys missing: {', '.join(missing) or 'none'}; left over: {', '.join(extra) or 'none'}. "
            "Is the checkpoint of the other form (with or without prefix_projection)?"
        )
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise UserError(
                f"{folder}: {name} is {tuple(found[name].shape)}, the model needs {tuple(value.shape)}. "
                "Was it trained for another base model or another pre_seq_len?"
            )
