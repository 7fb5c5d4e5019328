"""From the flags of export.py to what is written: which folders, which form, what is refused before anything is read.

The work itself is in `chatglm3/exporting.py` (whole models) and `chatglm3/conversion.py` (prefixes and adapters). torch
and transformers are imported where they are used: `--help` stays quick.
"""

import argparse
import re
import sys
from pathlib import Path

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.render import PROMPT_FORMATS
from finetune_chatmodel_demo.generation.choose import (
    ADAPTER,
    FLAGS,
    PREFIX,
    TITLES,
    find_checkpoint,
    find_folder,
    find_model,
    read_config,
)

FORMS = ("safetensors", "official", "both")
DTYPES = ("float32", "float16", "bfloat16")
SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]i?B", re.IGNORECASE)


def export(arguments: argparse.Namespace) -> None:
    """Do what the flags say.

    Raises:
        OSError, ValueError: something that the user gave cannot be used.
        ComparisonError: what was written does not compute the same.
    """
    if arguments.pt_checkpoint is not None:
        _export_prefix(arguments)
    elif arguments.to is not None:
        _export_adapter(arguments)
    else:
        _export_model(arguments)


def _export_prefix(arguments: argparse.Namespace) -> None:
    from finetune_chatmodel_demo.chatglm3.conversion import convert_prefix
    from finetune_chatmodel_demo.chatglm3.whole_folder import check_output

    _refuse(arguments, "--pt-checkpoint", ("adapter", "dtype", "low_memory"))
    notices: list[str] = []
    source = _find(arguments.pt_checkpoint, PREFIX, notices)
    model = None if arguments.model is None else Path(_find_base(arguments.model, None, None, notices))
    check_output(arguments.output, overwrite=arguments.overwrite, sources=[source])
    _say(notices)
    comparison = convert_prefix(
        source,
        arguments.output,
        form=arguments.to or "both",
        fold_projection=arguments.fold_projection,
        model=model,
        probes=[] if model is None else _probes(arguments, model, "multi-turn")[1],
        device=arguments.device,
    )
    folded = ", its projection computed once" if arguments.fold_projection else ""
    print(f"written: {arguments.output} from {source}{folded}; read again, the same bit for bit")
    if comparison is not None:
        print(f"compared in front of {model}: {comparison}")


def _export_adapter(arguments: argparse.Namespace) -> None:
    from finetune_chatmodel_demo.chatglm3.adapters import read_adapter_config
    from finetune_chatmodel_demo.chatglm3.conversion import convert_adapter
    from finetune_chatmodel_demo.chatglm3.whole_folder import check_output

    folders = _split(arguments.adapter)
    if not folders:
        raise UserError("--to converts a prefix (--pt-checkpoint) or an adapter (--adapter); give one, or drop --to")
    if len(folders) > 1:
        raise UserError(f"--to converts one adapter, got {len(folders)}; without --to they are merged into the model")
    _refuse(arguments, "--to with --adapter", ("fold_projection", "dtype", "low_memory"))
    notices: list[str] = []
    source = _find(folders[0], ADAPTER, notices)
    model = _find_base(arguments.model, read_adapter_config(source).base_model, source, notices)
    check_output(arguments.output, overwrite=arguments.overwrite, sources=[source])
    _say(notices)
    difference = convert_adapter(source, arguments.output, Path(model), form=arguments.to)
    print(f"written: {arguments.output}, read again; what it adds to the weights differs by {difference:.1e} of it")


def _export_model(arguments: argparse.Namespace) -> None:
    import torch

    from finetune_chatmodel_demo.chatglm3.adapters import read_adapter_config
    from finetune_chatmodel_demo.chatglm3.exporting import ModelExport, export_model
    from finetune_chatmodel_demo.chatglm3.whole_folder import check_output

    notices: list[str] = []
    _refuse(arguments, "a whole model", ("fold_projection",))
    adapters = [_find(path, ADAPTER, notices) for path in _split(arguments.adapter)]
    if not adapters and arguments.model is None:
        raise UserError("nothing to export: give --adapter, --model or --pt-checkpoint (--help has examples)")
    facts = [read_adapter_config(adapter) for adapter in adapters]
    # The first adapter's base: a later one may have been trained on the merged model before it.
    base = facts[0].base_model if facts else None
    model = Path(_find_base(arguments.model, base, adapters[0] if adapters else None, notices))
    _check_weights(model)
    check_output(arguments.output, overwrite=arguments.overwrite, sources=[model, *adapters])
    stored = getattr(torch, _stored_dtype(model))
    dtype = stored if arguments.dtype is None else getattr(torch, arguments.dtype)
    if adapters and arguments.low_memory and dtype.itemsize > stored.itemsize:
        raise UserError(
            f"--low-memory keeps the merged weights in the base's {_stored_dtype(model)}, and --dtype "
            f"{arguments.dtype} would write them rounded; leave one of the two out"
        )
    bits = next((fact.quantization_bit for fact in facts if fact.quantization_bit), None)
    if bits:
        notices.append(
            f"the adapter was trained on the base in {bits} bits; it is merged into the unquantized weights, whose "
            f"answers differ a little (as trained: inference.py --adapter … --quantization-bit {bits})"
        )
    if SHARD_SIZE.fullmatch(arguments.max_shard_size) is None:
        raise UserError(f"--max-shard-size {arguments.max_shard_size} is no size; write for example 5GB or 500MB")
    recorded = (facts[-1].prompt_format if facts else None) or read_config(model).get("prompt_format")
    recorded = recorded if recorded in PROMPT_FORMATS else None
    tokenizer, probes = _probes(arguments, model, recorded or "multi-turn", notices)
    _say(notices)
    job = ModelExport(
        model=model,
        adapters=adapters,
        output=arguments.output,
        tokenizer=tokenizer,
        dtype=dtype,
        compute_dtype=stored if arguments.low_memory else torch.float32,
        device=arguments.device,
        max_shard_size=arguments.max_shard_size,
        prompt_format=recorded,
    )
    export_model(job, probes)


def _find(path: str, kind: str, notices: list[str]) -> Path:
    """The prefix or adapter that `path` means; the other kind is refused."""
    found, folder = find_checkpoint(path, FLAGS[kind], notices)
    if found != kind:
        raise UserError(f"{FLAGS[kind]} {folder} is {TITLES[found]}; give it as {FLAGS[found]}")
    return folder


def _find_base(path: str | None, recorded: str | None, checkpoint: Path | None, notices: list[str]) -> str:
    """Folder of the base or whole model.

    Raises:
        UserError: there is none on this machine.
    """
    model = find_model(path, recorded, checkpoint, notices)
    if not Path(model).is_dir():
        raise UserError(f"--model {model} is not a folder; THUDM/README.md says how to download the weights")
    return model


def _check_weights(model: Path) -> None:
    """Refuses weights that were quantized before they were saved."""
    config = read_config(model)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "another program")
        raise UserError(
            f"--model {model} holds weights that {method} has quantized: nothing can be merged into them, and rounding "
            "them back gains nothing. Give the folder of the unquantized model"
        )


def _stored_dtype(model: Path) -> str:
    config = read_config(model)
    stored = str(config.get("torch_dtype") or config.get("dtype") or "float32").removeprefix("torch.")
    return stored if stored in DTYPES else "float32"


def _probes(
    arguments: argparse.Namespace, model: Path, prompt_format: str, notices: list[str] | None = None
) -> tuple[Path | None, list[list[int]]]:
    """The tokenizer's folder (None: there is none) and the probes."""
    from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, load_tokenizer
    from finetune_chatmodel_demo.generation.probes import build_probes, has_tokenizer

    folder = Path(find_folder(arguments.tokenizer)) if arguments.tokenizer else model
    if arguments.tokenizer is None and not has_tokenizer(model):
        if notices is not None:
            notices.append(f"{model} has no tokenizer.model, and neither will the result; --tokenizer DIR adds one")
        folder = None
    tokenizer = None if folder is None else load_tokenizer(folder)
    vocabulary = ChatGLM3Config.from_pretrained(model).padded_vocab_size
    return folder, build_probes(tokenizer, vocabulary, prompt_format)


def _refuse(arguments: argparse.Namespace, what: str, names: tuple[str, ...]) -> None:
    """Flags that mean nothing beside `what` are mistakes, not wishes."""
    for name in names:
        if getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} has no place with {what}; leave it out")


def _split(values: list[str] | None) -> list[str]:
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def _say(notices: list[str]) -> None:
    for notice in notices:
        print(notice, file=sys.stderr)
