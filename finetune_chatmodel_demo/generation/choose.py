"""Which model, which checkpoint: from the flags of an entry point to a model that is ready to answer.

What a folder holds (a model, a prefix, an adapter) is told by its files, before gigabytes are read. torch and
transformers are imported where they are used: `--help` stays quick.
"""

import argparse
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.render import PROMPT_FORMATS

REPOSITORY = Path(__file__).resolve().parents[2]
# Tried in this order when neither --model nor the checkpoint names a base model.
DEFAULT_MODELS = (REPOSITORY / "THUDM" / "chatglm3-6b", REPOSITORY / "THUDM" / "chatglm3-tiny")
PREFIX_FILE, ADAPTER_CONFIG = "prefix_encoder.safetensors", "adapter_config.json"
# What a folder can hold → its flag, and what it is called.
MODEL, PREFIX, ADAPTER = "model", "prefix", "adapter"
FLAGS = {MODEL: "--model", PREFIX: "--pt-checkpoint", ADAPTER: "--adapter"}
TITLES = {MODEL: "a whole model", PREFIX: "a prefix checkpoint", ADAPTER: "a LoRA adapter"}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


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


class _Once(argparse.Action):
    """Keeps a value; a second one would win without a word, and is refused."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if getattr(namespace, self.dest) != self.default:
            parser.error(f"{option_string} is given twice ({getattr(namespace, self.dest)}, then {values}); give one")
        setattr(namespace, self.dest, values)


def add_flag(group: Any, *flags: str, **options: Any) -> None:
    """Adds a flag to a parser or a group of one, in both spellings: --max-new-tokens and --max_new_tokens.

    It may be given once, unless `options` name an action of their own.
    """
    options.setdefault("action", _Once)
    group.add_argument(*(f"--{name}" for flag in flags for name in _spellings(flag.removeprefix("--"))), **options)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((name.replace("_", "-"), name.replace("-", "_"))))


def add_model_arguments(group: Any) -> None:
    """Adds the flags that choose a model, with upstream's names."""
    add_flag(group, "--pt-checkpoint", metavar="DIR", help="prefix checkpoint, or the --output_dir of a run (its "
             "newest checkpoint is used then)")  # fmt: skip
    add_flag(group, "--adapter", "--adapter-name-or-path", "--adapter-checkpoint", metavar="DIR", help="LoRA adapter "
             "of this project or of the original code, or the --output_dir of a run")  # fmt: skip
    add_flag(group, "--model", "--model-name-or-path", metavar="DIR", help="base model, or a fully fine-tuned one "
             "(default: the one that the checkpoint was trained on, else THUDM/chatglm3-6b, else "
             "THUDM/chatglm3-tiny)")  # fmt: skip
    add_flag(group, "--tokenizer", metavar="DIR", help="folder with tokenizer.model (default: the same as --model)")
    add_flag(group, "--pt-pre-seq-len", type=int, metavar="N", help="check that the prefix has this length; the "
             "checkpoint knows its own")  # fmt: skip
    add_flag(group, "--format", choices=PROMPT_FORMATS, help="prompt format (default: the one that the checkpoint was "
             "trained with)")  # fmt: skip
    add_flag(group, "--quantization-bit", type=int, choices=(4, 8), help="load the base model in 4 or 8 bits "
             "(bitsandbytes)")  # fmt: skip
    add_flag(group, "--allow-other-base", action="store_true", help="use a prefix or adapter with another base model "
             "than it was trained on")  # fmt: skip
    add_flag(group, "--device", help="cuda, cuda:1, cpu … (default: cuda when there is a GPU, else cpu)")


def choose_model(arguments: argparse.Namespace) -> ModelChoice:
    """Turns the flags of `add_model_arguments` into folders, a prompt format and a device.

    Raises:
        UserError: a folder is missing, damaged or of the wrong kind, or flags contradict the checkpoint.
    """
    notices: list[str] = []
    kind, checkpoint = _choose_checkpoint(arguments, notices)
    config = _read_checkpoint_config(kind, checkpoint)
    _check_length(arguments.pt_pre_seq_len, kind, checkpoint, config)
    model = find_model(arguments.model, config.base_model if config else None, checkpoint, notices)
    check_base_of(checkpoint, config, model, arguments, notices)
    if any("SequenceClassification" in str(name) for name in read_config(Path(model)).get("architectures") or []):
        raise UserError(f"--model {model} is a reward model (stage rm): it scores texts and cannot write any")
    if arguments.quantization_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--quantization-bit needs the package bitsandbytes; pip install bitsandbytes (Linux)")
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
        device=_choose_device(arguments.device, notices),
        notices=tuple(notices),
        quantization_bit=arguments.quantization_bit,
    )


def load_choice(choice: ModelChoice) -> tuple[Any, Any]:
    """Loads what was chosen.

    Returns:
        (model in evaluation mode, tokenizer); with an adapter the model is PEFT's, which generates in the same way.

    Raises:
        UserError, OSError: see `load_model`, `load_adapter` and `load_tokenizer`.
    """
    from finetune_chatmodel_demo.chatglm3 import load_model, load_tokenizer
    from finetune_chatmodel_demo.chatglm3.lora import check_adapter, load_adapter
    from finetune_chatmodel_demo.chatglm3.model_folder import read_model_config

    tokenizer = load_tokenizer(choice.tokenizer)
    if choice.adapter and Path(choice.model).is_dir():
        check_adapter(choice.adapter, read_model_config(choice.model))
    model = load_model(
        choice.model,
        pt_checkpoint=choice.prefix,
        quantization_bit=choice.quantization_bit,
        device=choice.device,
    )
    if choice.adapter:
        model = load_adapter(model, choice.adapter).eval()
    if tokenizer.vocab_size > model.config.padded_vocab_size:
        raise UserError(
            f"{choice.tokenizer}: the tokenizer has {tokenizer.vocab_size} ids, the model {choice.model} only "
            f"{model.config.padded_vocab_size}; use the tokenizer that belongs to the model"
        )
    return model, tokenizer


def _choose_checkpoint(arguments: argparse.Namespace, notices: list[str]) -> tuple[str | None, Path | None]:
    """The prefix or adapter among the flags; each is also accepted behind the other's flag, which is said."""
    if arguments.pt_checkpoint is not None and arguments.adapter is not None:
        raise UserError(
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


def _read_checkpoint_config(kind: str | None, folder: Path | None) -> Any:
    """`PrefixConfig`, `AdapterConfig` or None.

    Raises:
        UserError: an adapter of a reward model.
    """
    if kind == PREFIX:
        from finetune_chatmodel_demo.chatglm3 import read_prefix_config

        return read_prefix_config(folder)
    if kind == ADAPTER:
        from finetune_chatmodel_demo.chatglm3.lora_files import read_adapter_config

        config = read_adapter_config(folder)
        if config.is_reward_model:
            raise UserError(f"{folder} belongs to a reward model (stage rm): it scores texts and cannot write any")
        return config
    return None


def check_base_of(
    checkpoint: Path | None, config: Any, model: str | Path, arguments: argparse.Namespace, notices: list[str]
) -> None:
    """Refuses a base that the prefix or adapter was not trained on; --allow_other_base makes that a notice.

    An old result does not say what its base looked like: its recorded name is shown where --model chose another.
    """
    if config is None:
        return
    from finetune_chatmodel_demo.chatglm3.fingerprint import check_base

    notice = check_base(
        checkpoint, config.base_fingerprint, config.base_model, model, allow_other=arguments.allow_other_base
    )
    if notice and (config.base_fingerprint or arguments.model):
        notices.append(notice)


def _check_length(wanted: int | None, kind: str | None, folder: Path | None, config: Any) -> None:
    if wanted is None:
        return
    if kind is None:
        raise UserError("--pt-pre-seq-len describes a prefix, but there is no --pt-checkpoint; add it")
    if kind != PREFIX:
        raise UserError(f"--pt-pre-seq-len describes a prefix, but {folder} is {TITLES[kind]}; leave it out")
    if wanted != config.pre_seq_len:
        raise UserError(
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


def _choose_device(wanted: str | None, notices: list[str]) -> str:
    """The GPU where there is one, else the CPU, which is said.

    Raises:
        UserError: torch does not know such a device.
    """
    import torch

    device = wanted or "cuda"
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device} is unknown; use cuda, cuda:0, mps or cpu") from error
    if kind.type == "cuda":
        if not torch.cuda.is_available():
            notices.append("there is no GPU that torch can use: running on the CPU")
            return "cpu"
        if (kind.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} GPU(s), from cuda:0 on")
    elif kind.type == "mps" and not torch.backends.mps.is_available():
        notices.append("torch cannot use mps here: running on the CPU")
        return "cpu"
    return device


def find_folder(path: str) -> str:
    """A folder as it was typed, or the same below the repository; what is neither may be a hub name."""
    for candidate in (Path(path).expanduser(), REPOSITORY / path):
        if candidate.is_dir():
            return str(candidate)
    return path


def use_result(arguments: argparse.Namespace, path: str) -> None:
    """Reads a run's result as the flag that its content asks for: `inference.py OUTPUT_DIR`, as the later demo has it.

    Raises:
        UserError: there is no such folder, it holds no result, or the flag is given as well.
    """
    folder = Path(find_folder(path))
    if not folder.is_dir():
        raise UserError(f"{path} is not a folder; give the --output_dir of a run, or a model's folder")
    kind, _ = identify(folder)
    if kind is None:
        raise UserError(f"{path} holds no model, prefix or adapter: it holds {list_files(folder)}")
    name = {MODEL: "model", PREFIX: "pt_checkpoint", ADAPTER: "adapter"}[kind]
    if getattr(arguments, name) is not None:
        raise UserError(f"{path} is {TITLES[kind]}, and {FLAGS.get(kind, '--model')} is given as well; give one")
    setattr(arguments, name, str(folder))


def identify(folder: Path) -> tuple[str | None, Path]:
    """What a folder holds: itself, or its newest checkpoint-N where it is the folder of a run.

    Returns:
        (MODEL, PREFIX, ADAPTER, or None for neither; the folder or the checkpoint in it)
    """
    if kind := _kind_of(folder):
        return kind, folder
    steps = [(int(match[1]), child) for child in folder.iterdir() if (match := _CHECKPOINT.fullmatch(child.name))]
    for _, child in sorted(steps, reverse=True):
        if child.is_dir() and (kind := _kind_of(child)):
            return kind, child
    return None, folder


def _kind_of(folder: Path) -> str | None:
    if (folder / ADAPTER_CONFIG).is_file():
        return ADAPTER
    has_config = (folder / "config.json").is_file()
    is_single_bin = (folder / "pytorch_model.bin").is_file() and not (folder / "model.safetensors").is_file()
    # The original demo writes a prefix of 7 MB for the 6B model under the name of whole models.
    is_original_prefix = is_single_bin and (not has_config or read_config(folder).get("pre_seq_len") is not None)
    if (folder / PREFIX_FILE).is_file() or is_original_prefix:
        return PREFIX
    has_weights = any(next(folder.glob(name), None) for name in ("*.safetensors", "pytorch_model*.bin"))
    return MODEL if has_config and has_weights else None


def _identify_aloud(folder: Path, notices: list[str]) -> tuple[str | None, Path]:
    kind, found = identify(folder)
    if found != folder:
        notices.append(f"{folder} holds checkpoints: using the newest, {found.name}")
    return kind, found


def find_checkpoint(path: str, flag: str, notices: list[str]) -> tuple[str, Path]:
    """The prefix or adapter that `path` means: the folder itself, or the newest checkpoint-N in it.

    Args:
        path: as it was typed.
        flag: the flag it was typed behind, for messages.
        notices: lines for the user are added here.

    Returns:
        (PREFIX or ADAPTER, folder)

    Raises:
        UserError: there is neither; says what the folder holds instead.
    """
    folder = Path(find_folder(path))
    if not folder.is_dir():
        raise UserError(f"{flag} {path}: no such folder; give the --output_dir of the training run")
    kind, found = _identify_aloud(folder, notices)
    title = TITLES[next(kind for kind in FLAGS if FLAGS[kind] == flag)]
    if kind == MODEL:
        raise UserError(f"{flag} {folder} holds {TITLES[MODEL]}, not {title}; give it as --model")
    if kind is None:
        raise UserError(
            f"{flag} {folder} is not {title}: it holds {list_files(folder)}, but neither {PREFIX_FILE} nor "
            f"pytorch_model.bin nor {ADAPTER_CONFIG}; has the training run saved one yet?"
        )
    return kind, found


def find_model(path: str | None, base_model: str | None, checkpoint: Path | None, notices: list[str]) -> str:
    """Folder or hub name of the model: what was asked for, else what the checkpoint records, else the default.

    Args:
        path: --model.
        base_model: what the checkpoint records.
        checkpoint: folder of the prefix or adapter, or None without one.
        notices: lines for the user are added here.

    Raises:
        UserError: there is no such model.
    """
    if path is not None:
        return _check_model(find_folder(path), notices)
    if base_model:
        here = REPOSITORY / "THUDM" / Path(base_model.replace("\\", "/")).name
        for candidate in (Path(base_model), checkpoint / base_model, REPOSITORY / base_model, here):
            if candidate.is_dir():
                notices.append(f"base model: {candidate} (recorded in the checkpoint)")
                return _check_model(str(candidate), notices)
        raise UserError(
            f"{checkpoint} was trained on {base_model}, which is not on this machine; say where it is with --model DIR "
            "(THUDM/README.md says how to get the official weights)"
        )
    for candidate in DEFAULT_MODELS:
        if candidate.is_dir():
            why = "the checkpoint names no base model" if checkpoint else "no --model was given"
            notices.append(f"model: {candidate} ({why})")
            return _check_model(str(candidate), notices)
    raise UserError(f"no --model was given, and there is none at {' or '.join(map(str, DEFAULT_MODELS))}")


def _check_model(path: str, notices: list[str]) -> str:
    from finetune_chatmodel_demo.chatglm3.model_folder import check_model_folder

    folder = Path(path)
    if not folder.is_dir():
        return path
    kind, found = _identify_aloud(folder, notices)
    if kind is None:
        check_model_folder(folder)
        raise UserError(
            f"--model {folder} holds no weights (found: {list_files(folder)}); THUDM/README.md says how to get them"
        )
    if kind != MODEL:
        raise UserError(f"--model {found} is {TITLES[kind]}; give it as {FLAGS[kind]}")
    check_model_folder(found)
    return str(found)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, or {} where there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def list_files(folder: Path) -> str:
    """The first files of a folder, for messages."""
    return ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
