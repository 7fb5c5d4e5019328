"""From the flags of an entry point to a model that is ready to answer: which folders, which format, which device.

Shared by inference.py and evaluate.py. torch and transformers are imported where they are used: `--help` stays quick.
"""

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.conversation.render import PROMPT_FORMATS
from finetune_chatmodel_demo.generation.errors import UsageError
from finetune_chatmodel_demo.generation.folders import (
    ADAPTER,
    FLAGS,
    PREFIX,
    TITLES,
    find_checkpoint,
    find_folder,
    find_model,
    is_reward_model,
    read_config,
)
from finetune_chatmodel_demo.generation.model_files import explain_load_error


@dataclass(frozen=True)
class ModelChoice:
    """What the flags came to.

    Attributes:
        model: folder or hub name of the base or whole model.
        tokenizer: folder or hub name with `tokenizer.model`.
        prefix: folder of the prefix checkpoint.
        adapter: folder of the LoRA adapter; at most one of the two is given.
        prompt_format: one of `PROMPT_FORMATS`.
        device: for torch.
        notices: one line each, for the user: what was chosen and why, where that is not what the flags say.
        quantization_bit: 4 or 8: the base model is quantized while it is loaded.
    """

    model: str
    tokenizer: str
    prefix: Path | None
    prompt_format: str
    device: str
    notices: tuple[str, ...]
    adapter: Path | None = None
    quantization_bit: int | None = None

    @property
    def tuned(self) -> str | None:
        """What stands on the base model: "prefix", "adapter" or None. `without_tuning` switches it off."""
        return PREFIX if self.prefix else ADAPTER if self.adapter else None


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose a model, with upstream's names; each also with underscores."""
    add = parser.add_argument
    add(
        "--pt-checkpoint",
        "--pt_checkpoint",
        metavar="DIR",
        help="prefix checkpoint, or the --output_dir of a run (its newest checkpoint is used then)",
    )
    add(
        "--adapter",
        "--adapter-name-or-path",
        "--adapter_name_or_path",
        "--adapter-checkpoint",
        "--adapter_checkpoint",
        metavar="DIR",
        help="LoRA adapter of this project or of the original code, or the --output_dir of a run",
    )
    add(
        "--model",
        metavar="DIR",
        help="base model, or a fully fine-tuned one (default: the one that the checkpoint was trained on, "
        "else THUDM/chatglm3-6b, else THUDM/chatglm3-tiny)",
    )
    add("--tokenizer", metavar="DIR", help="folder with tokenizer.model (default: the same as --model)")
    add(
        "--pt-pre-seq-len",
        "--pt_pre_seq_len",
        type=int,
        metavar="N",
        help="check that the prefix has this length; the checkpoint knows its own",
    )
    add(
        "--format",
        choices=PROMPT_FORMATS,
        help="prompt format (default: the one that the checkpoint was trained with)",
    )
    add(
        "--quantization-bit",
        "--quantization_bit",
        type=int,
        choices=(4, 8),
        help="load the base model in 4 or 8 bits (bitsandbytes)",
    )
    add("--device", help="cuda, cuda:1, cpu … (default: cuda when there is a GPU, else cpu)")


def choose_model(arguments: argparse.Namespace) -> ModelChoice:
    """Turn the flags of `add_model_arguments` into folders, a prompt format and a device, before gigabytes are read.

    Raises:
        UsageError: a folder is missing or is of the wrong kind, or flags contradict the checkpoint.
        PrefixError, AdapterError: the checkpoint cannot be read (ValueErrors).
    """
    notices: list[str] = []
    kind, checkpoint = _choose_checkpoint(arguments, notices)
    config = _describe(kind, checkpoint)
    _check_length(arguments.pt_pre_seq_len, kind, checkpoint, config)
    model = find_model(arguments.model, config.base_model if config else None, checkpoint, notices)
    if is_reward_model(Path(model)):
        raise UsageError(f"--model {model} is a reward model (stage rm): it scores texts and cannot write any")
    if arguments.quantization_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("--quantization-bit needs the package bitsandbytes; pip install bitsandbytes (Linux)")
    trained_in = getattr(config, "quantization_bit", None)
    if trained_in and not arguments.quantization_bit:
        notices.append(
            f"the adapter was trained on the base in {trained_in} bits; --quantization-bit {trained_in} loads it so"
        )
    return ModelChoice(
        model=model,
        tokenizer=find_folder(arguments.tokenizer or model),
        prefix=checkpoint if kind == PREFIX else None,
        adapter=checkpoint if kind == ADAPTER else None,
        prompt_format=_choose_format(arguments.format, config, model, notices),
        device=choose_device(arguments.device, notices),
        notices=tuple(notices),
        quantization_bit=arguments.quantization_bit,
    )


def load_choice(choice: ModelChoice) -> tuple[Any, Any]:
    """Load what was chosen.

    Returns:
        (model in evaluation mode, tokenizer); with an adapter the model is PEFT's, which generates in the same way.

    Raises:
        OSError, ValueError: see `load_model`, `load_adapter` and `load_tokenizer`.
    """
    from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, load_model, load_tokenizer
    from finetune_chatmodel_demo.chatglm3.adapters import check_adapter, load_adapter

    try:
        tokenizer = load_tokenizer(choice.tokenizer)
    except OSError as error:
        raise UsageError(explain_load_error(choice.tokenizer, error)) from error
    if choice.adapter and Path(choice.model).is_dir():
        check_adapter(choice.adapter, ChatGLM3Config.from_pretrained(choice.model))
    model = load_model(
        choice.model,
        pt_checkpoint=choice.prefix,
        quantization_bit=choice.quantization_bit,
        device=choice.device,
    )
    if choice.adapter:
        model = load_adapter(model, choice.adapter).eval()
    if tokenizer.vocab_size > model.config.padded_vocab_size:
        raise UsageError(
            f"{choice.tokenizer}: the tokenizer has {tokenizer.vocab_size} ids, the model {choice.model} only "
            f"{model.config.padded_vocab_size}; use the tokenizer that belongs to the model"
        )
    return model, tokenizer


def _choose_checkpoint(arguments: argparse.Namespace, notices: list[str]) -> tuple[str | None, Path | None]:
    """The prefix or adapter among the flags; each is also accepted behind the other's flag, which is said."""
    if arguments.pt_checkpoint is not None and arguments.adapter is not None:
        raise UsageError(
            "--pt-checkpoint and --adapter exclude each other: each was trained without the other. Merge the adapter "
            "with export.py first, and train the prefix on the result"
        )
    for expected, path in ((PREFIX, arguments.pt_checkpoint), (ADAPTER, arguments.adapter)):
        if path is not None:
            kind, folder = find_checkpoint(path, FLAGS[expected], notices)
            if kind != expected:
                notices.append(f"{folder} is {TITLES[kind]}: it is used as with {FLAGS[kind]}")
            return kind, folder
    return None, None


def _describe(kind: str | None, folder: Path | None) -> Any:
    """`PrefixConfig`, `AdapterConfig` or None.

    Raises:
        UsageError: an adapter of a reward model.
    """
    if kind == PREFIX:
        from finetune_chatmodel_demo.chatglm3 import read_prefix_config

        return read_prefix_config(folder)
    if kind == ADAPTER:
        from finetune_chatmodel_demo.chatglm3.adapters import read_adapter_config

        config = read_adapter_config(folder)
        if config.is_reward_model:
            raise UsageError(f"{folder} belongs to a reward model (stage rm): it scores texts and cannot write any")
        return config
    return None


def _check_length(wanted: int | None, kind: str | None, folder: Path | None, config: Any) -> None:
    if wanted is None:
        return
    if kind is None:
        raise UsageError("--pt-pre-seq-len describes a prefix, but there is no --pt-checkpoint; add it")
    if kind != PREFIX:
        raise UsageError(f"--pt-pre-seq-len describes a prefix, but {folder} is {TITLES[kind]}; leave it out")
    if wanted != config.pre_seq_len:
        raise UsageError(
            f"{folder}: the prefix has {config.pre_seq_len} positions, --pt-pre-seq-len says {wanted}; "
            f"leave the flag out, or say {config.pre_seq_len}"
        )


def _choose_format(given: str | None, config: Any, model: str, notices: list[str]) -> str:
    """What was asked for, else what the checkpoint or the fully tuned model was trained with, else multi-turn."""
    recorded = config.prompt_format if config else read_config(Path(model)).get("prompt_format")
    recorded = recorded if recorded in PROMPT_FORMATS else None
    if given is not None:
        if recorded not in (None, given):
            notices.append(f"--format {given}, although the checkpoint was trained with {recorded}")
        return given
    if recorded is None and config is not None:
        notices.append(
            "the checkpoint does not say which prompt format it was trained with: "
            "multi-turn is assumed (--format chooses another)"
        )
    return recorded or "multi-turn"


def choose_device(wanted: str | None, notices: list[str]) -> str:
    """The device to use: the GPU where there is one, else the CPU, which is said.

    Raises:
        UsageError: torch does not know such a device.
    """
    import torch

    device = wanted or "cuda"
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"--device {device} is unknown; use cuda, cuda:0, mps or cpu") from error
    if kind.type == "cuda":
        if not torch.cuda.is_available():
            notices.append("there is no GPU that torch can use: running on the CPU")
            return "cpu"
        if (kind.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device {device}: this machine has {torch.cuda.device_count()} GPU(s), from cuda:0 on")
    elif kind.type == "mps" and not torch.backends.mps.is_available():
        notices.append("torch cannot use mps here: running on the CPU")
        return "cpu"
    return device
