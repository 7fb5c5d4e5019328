"""Turns what training left into what others read: whole models of the official layout, prefixes in either form,
adapters of the original code in PEFT's form.

    python finetune_chatmodel_demo/export.py --adapter output/pokemon_lora --output output/pokemon_merged
    python finetune_chatmodel_demo/export.py --model output/full --output output/full_fp16 --dtype float16
    python finetune_chatmodel_demo/export.py --pt-checkpoint output/pokemon --output prefix --to official
    python finetune_chatmodel_demo/export.py --adapter old_lora --output lora --to safetensors

What was written is read again, in a fresh load, and its logits on fixed prompts are compared with those of the model
before; only then does the output get its name. Exit codes: 0, 1 when the comparison fails, 2 for a mistake in what was
given (one line on standard error), 130 after Ctrl-C. Nothing half-written stays behind.
"""

import argparse
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the rooms are packages; this folder's own are not modules

from finetune_chatmodel_demo.common.cli import EXIT_NO, run_program
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.render import PROMPT_FORMATS
from finetune_chatmodel_demo.generation.choose import (
    ADAPTER,
    FLAGS,
    PREFIX,
    TITLES,
    check_base_of,
    find_checkpoint,
    find_folder,
    find_model,
    read_config,
)

DTYPES = ("float32", "float16", "bfloat16")
SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]i?B", re.IGNORECASE)


def build_parser() -> argparse.ArgumentParser:
    """The command line; every flag is also accepted with underscores."""
    parser = argparse.ArgumentParser(
        description="Write a whole model in the official layout (with --adapter: merged), or convert a prefix or an "
        "adapter. The result is reloaded and compared before it gets its name.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", "--export_dir", required=True, type=Path, metavar="DIR", help="a new folder")
    add(
        "--model",
        "--model-name-or-path",
        "--model_name_or_path",
        metavar="DIR",
        help="base model, whole model, or the --output_dir of a run (default: the one that the checkpoint records)",
    )
    add(
        "--adapter",
        "--adapter-name-or-path",
        "--adapter_name_or_path",
        action="append",
        metavar="DIR",
        help="LoRA adapter to merge; several (repeat the flag, or a,b) are merged one after the other",
    )
    add("--pt-checkpoint", "--pt_checkpoint", metavar="DIR", help="prefix checkpoint to convert")
    add(
        "--to",
        choices=("safetensors", "official", "both"),
        help="form of a converted prefix: this project's, the original code's, both; safetensors: an adapter of the "
        "original code becomes one of PEFT's form",
    )
    add(
        "--fold-projection",
        "--fold_projection",
        action="store_true",
        help="prefix: compute the MLP once and write a plain prefix",
    )
    add("--dtype", choices=DTYPES, help="of a whole model's weights (default: the base's)")
    add("--max-shard-size", "--max_shard_size", default="5GB", metavar="SIZE", help="of a weights file (5GB)")
    add("--tokenizer", metavar="DIR", help="folder with tokenizer.model (default: the model's)")
    add("--device", default="cpu", help="where it is computed (cpu)")
    add("--low-memory", "--low_memory", action="store_true", help="load the base as it is stored, not in float32")
    add(
        "--allow-other-base",
        "--allow_other_base",
        action="store_true",
        help="take a prefix or adapter with another base model than it was trained on",
    )
    add("--overwrite", action="store_true", help="replace an earlier result in --output")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code that the module docstring explains."""
    return run_program(lambda: export(build_parser().parse_args(argv)), out_of_memory_advice="use --device cpu")


def export(arguments: argparse.Namespace) -> int:
    """Do what the flags say.

    Returns:
        0, or 1 when what was written does not compute the same.

    Raises:
        OSError, UserError: something that the user gave cannot be used.
    """
    from finetune_chatmodel_demo.chatglm3.comparing import ComparisonError

    try:
        if arguments.pt_checkpoint is not None:
            _export_prefix(arguments)
        elif arguments.to is not None:
            _export_adapter(arguments)
        else:
            _export_model(arguments)
    except ComparisonError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_NO
    return 0


def _export_prefix(arguments: argparse.Namespace) -> None:
    from finetune_chatmodel_demo.chatglm3 import read_prefix_config
    from finetune_chatmodel_demo.chatglm3.export import check_output, convert_prefix

    _refuse(arguments, "--pt-checkpoint", ("adapter", "dtype", "low_memory"))
    notices: list[str] = []
    source = _find(arguments.pt_checkpoint, PREFIX, notices)
    model = None if arguments.model is None else _find_base(arguments.model, None, None, notices)
    check_output(arguments.output, overwrite=arguments.overwrite, sources=[source])
    if model is not None:
        check_base_of(source, read_prefix_config(source), model, arguments, notices)
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
    from finetune_chatmodel_demo.chatglm3.export import check_output, convert_adapter
    from finetune_chatmodel_demo.chatglm3.lora_files import read_adapter_config

    folders = _split(arguments.adapter)
    if not folders:
        raise UserError("--to converts a prefix (--pt-checkpoint) or an adapter (--adapter); give one, or drop --to")
    if len(folders) > 1:
        raise UserError(f"--to converts one adapter, got {len(folders)}; without --to they are merged into the model")
    if arguments.to != "safetensors":
        raise UserError(
            f"--to {arguments.to}: an adapter is not written in the original code's layout, whose query, key and value "
            "are one module. Merge it (leave --to out): the original code reads the whole model that comes out"
        )
    _refuse(arguments, "--to with --adapter", ("fold_projection", "dtype", "low_memory"))
    notices: list[str] = []
    source = _find(folders[0], ADAPTER, notices)
    model = _find_base(arguments.model, read_adapter_config(source).base_model, source, notices)
    check_output(arguments.output, overwrite=arguments.overwrite, sources=[source])
    _say(notices)
    convert_adapter(source, arguments.output, model)
    print(f"written: {arguments.output} from {source}; read again, the same bit for bit")


def _export_model(arguments: argparse.Namespace) -> None:
    import torch

    from finetune_chatmodel_demo.chatglm3.export import ModelExport, check_output, export_model
    from finetune_chatmodel_demo.chatglm3.lora_files import read_adapter_config

    notices: list[str] = []
    _refuse(arguments, "a whole model", ("fold_projection",))
    adapters = [_find(path, ADAPTER, notices) for path in _split(arguments.adapter)]
    if not adapters and arguments.model is None:
        raise UserError("nothing to export: give --adapter, --model or --pt-checkpoint (--help has examples)")
    facts = [read_adapter_config(adapter) for adapter in adapters]
    # The first adapter's base: a later one may have been trained on the merged model before it.
    base = facts[0].base_model if facts else None
    model = _find_base(arguments.model, base, adapters[0] if adapters else None, notices)
    check_output(arguments.output, overwrite=arguments.overwrite, sources=[model, *adapters])
    if adapters:
        check_base_of(adapters[0], facts[0], model, arguments, notices)
    stored, written = _choose_dtypes(arguments, model, bool(adapters))
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
        dtype=getattr(torch, written),
        compute_dtype=getattr(torch, stored) if arguments.low_memory else torch.float32,
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


def _find_base(path: str | None, recorded: str | None, checkpoint: Path | None, notices: list[str]) -> Path:
    """Folder of the base or whole model.

    Raises:
        UserError: there is none on this machine.
    """
    model = Path(find_model(path, recorded, checkpoint, notices))
    if not model.is_dir():
        raise UserError(f"--model {model} is not a folder; THUDM/README.md says how to download the weights")
    return model


def _choose_dtypes(arguments: argparse.Namespace, model: Path, is_merged: bool) -> tuple[str, str]:
    """The dtype of the model's weights, and that of the result's.

    Raises:
        UserError: for weights that were quantized before they were saved, or a result that would pretend to be exact.
    """
    config = read_config(model)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "another program")
        raise UserError(
            f"--model {model} holds weights that {method} has quantized: nothing can be merged into them, and rounding "
            "them back gains nothing. Give the folder of the unquantized model"
        )
    stored = str(config.get("torch_dtype") or config.get("dtype") or "float32").removeprefix("torch.")
    stored = stored if stored in DTYPES else "float32"
    written = arguments.dtype or stored
    if is_merged and arguments.low_memory and written == "float32" != stored:
        raise UserError(
            f"--low-memory keeps the merged weights in the base's {stored}, and --dtype float32 would write them "
            "rounded; leave one of the two out"
        )
    return stored, written


def _probes(
    arguments: argparse.Namespace, model: Path, prompt_format: str, notices: list[str] | None = None
) -> tuple[Path | None, list[list[int]]]:
    """The tokenizer's folder (None: there is none) and the probes."""
    from finetune_chatmodel_demo.chatglm3 import load_tokenizer
    from finetune_chatmodel_demo.chatglm3.model_folder import read_model_config
    from finetune_chatmodel_demo.generation.probes import build_probes, has_tokenizer

    folder = Path(find_folder(arguments.tokenizer)) if arguments.tokenizer else model
    if arguments.tokenizer is None and not has_tokenizer(model):
        if notices is not None:
            notices.append(f"{model} has no tokenizer.model, and neither will the result; --tokenizer DIR adds one")
        folder = None
    tokenizer = None if folder is None else load_tokenizer(folder)
    vocabulary = read_model_config(model).padded_vocab_size
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


if __name__ == "__main__":
    sys.exit(main())
