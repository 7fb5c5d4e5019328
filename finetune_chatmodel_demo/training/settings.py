"""What a run will do: fills in the defaults that depend on method and device, and refuses what cannot work.

Everything here happens before the model is loaded, and writes nothing.
"""

import importlib.util
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from transformers import TrainingArguments

from finetune_chatmodel_demo.chatglm3.checkpoints import is_prefix_checkpoint
from finetune_chatmodel_demo.conversation.arguments import DataArguments
from finetune_chatmodel_demo.training.arguments import GROUP_BY_LENGTH, ModelArguments, RunArguments, SettingsError
from finetune_chatmodel_demo.training.checkpoints import (
    find_last_checkpoint,
    list_checkpoints,
    read_whole_checkpoint,
)

P_TUNING = "P-Tuning v2"
FULL = "all parameters"

# The original's scripts: finetune_pt*.sh say 2e-2, finetune_ds*.sh say 1e-4.
DEFAULT_LEARNING_RATE = {P_TUNING: 2e-2, FULL: 1e-4}
# A prefix starts at N(0, 1). A published run at 2e-5 moved it by 0.01 in 1,000 steps and learned nothing.
LOWEST_SENSIBLE_PREFIX_LEARNING_RATE = 1e-3
DEFAULT_WARMUP_SHARE = 0.03


@dataclass(frozen=True)
class Settings:
    """A run, decided."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    run: RunArguments
    method: str
    checkpoint: Path | None  # to resume from
    given: dict[str, object]  # the options that were given
    notices: list[str]  # told at the start

    @property
    def precision(self) -> str:
        """bfloat16, float16 or float32: what the model computes in."""
        return "bfloat16" if self.training.bf16 else "float16" if self.training.fp16 else "float32"

    @property
    def weights_dtype(self) -> torch.dtype:
        """What the base model's weights are loaded as.

        Frozen weights take the precision of the computation. Trained ones stay in float32 and are cast in the
        forward pass, except under DeepSpeed, which keeps its own float32 copy.
        """
        if self.method == FULL and not self.training.deepspeed:
            return torch.float32
        return getattr(torch, self.precision)


def decide_settings(given: dict[str, object], notices: list[str] | None = None) -> Settings:
    """Turns the options that were given into a run.

    Args:
        given: option → value, see `arguments.parse_given`.
        notices: what is to be told at the start already; more is appended.

    Raises:
        SettingsError: when the run cannot work as described.
    """
    notices = list(notices or [])
    model = ModelArguments(**_select(given, ModelArguments))
    try:
        data = DataArguments(**_select(given, DataArguments))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    _check_files(model, data, given, notices)
    method = P_TUNING if model.pre_seq_len is not None or model.ptuning_checkpoint else FULL
    _check_method(model, method, given)
    _check_unsupported(given, data)
    training = _build_training_arguments(given, data, method, notices)
    run = RunArguments(**_select(given, RunArguments))
    checkpoint = None if run.overwrite_output_dir else _find_checkpoint(training, method)
    if method == P_TUNING and training.learning_rate < LOWEST_SENSIBLE_PREFIX_LEARNING_RATE:
        notices.append(
            f"the learning rate {training.learning_rate:g} is low for P-Tuning v2: a prefix starts at N(0, 1) and "
            "hardly moves at such a rate; the original's scripts use 2e-2"
        )
    _check_earlier_run(training, run, checkpoint, notices)
    return Settings(model, data, training, run, method, checkpoint, given, notices)


def _select(given: dict[str, object], arguments: type) -> dict[str, object]:
    names = {item.name for item in fields(arguments) if item.init}
    return {name: value for name, value in given.items() if name in names}


def _check_files(model: ModelArguments, data: DataArguments, given: dict[str, object], notices: list[str]) -> None:
    if not data.train_file:
        raise SettingsError("--train_file is missing: the JSON or JSON lines file to train on")
    for flag in ("train_file", "validation_file"):
        path = getattr(data, flag)
        if path and not Path(path).is_file():
            raise SettingsError(f"--{flag} {path} does not exist (the current folder is {Path.cwd()})")
    if not model.model_name_or_path:
        raise SettingsError("--model_name_or_path is missing: the folder of the base model, e.g. THUDM/chatglm3-6b")
    folder = Path(model.model_name_or_path)
    if not (folder / "config.json").is_file():
        if folder.is_dir() or folder.is_absolute() or len(folder.parts) != 2:
            raise SettingsError(
                f"--model_name_or_path {folder} is not a folder with a config.json; THUDM/README.md says how to get "
                "the weights"
            )
        notices.append(f"there is no folder {folder.absolute()}: {folder} is taken for a name on the hub")
    if not given.get("output_dir"):
        raise SettingsError("--output_dir is missing: the folder for checkpoints and the result")
    deepspeed = given.get("deepspeed")
    if isinstance(deepspeed, str) and not deepspeed.startswith("{") and not Path(deepspeed).is_file():
        raise SettingsError(f"--deepspeed {deepspeed} does not exist")


def _check_method(model: ModelArguments, method: str, given: dict[str, object]) -> None:
    if model.ptuning_checkpoint and not (Path(model.ptuning_checkpoint) / "config.json").is_file():
        raise SettingsError(f"--ptuning_checkpoint {model.ptuning_checkpoint} is not a folder with a config.json")
    if model.pre_seq_len is not None and model.pre_seq_len < 1:
        raise SettingsError(f"--pre_seq_len is {model.pre_seq_len}; give a length of 1 or more, e.g. 128")
    if model.prefix_init_std <= 0:
        raise SettingsError(f"--prefix_init_std is {model.prefix_init_std}; give a number above 0")
    if method == FULL:
        for flag in ("prefix_projection", "prefix_init_std"):
            if given.get(flag):
                raise SettingsError(f"--{flag} belongs to P-Tuning v2: add --pre_seq_len, e.g. 128")
        if model.quantization_bit:
            raise SettingsError(
                f"--quantization_bit {model.quantization_bit} cannot train all parameters; add --pre_seq_len for "
                "P-Tuning v2, or drop --quantization_bit"
            )
    elif given.get("deepspeed"):
        raise SettingsError(
            "--deepspeed with --pre_seq_len would train the prefix in half precision, and a prefix has no memory to "
            "share out; drop --deepspeed (several GPUs work with torchrun alone)"
        )
    if model.quantization_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise SettingsError("--quantization_bit needs the package bitsandbytes: pip install bitsandbytes")
    if given.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise SettingsError("--deepspeed needs the package deepspeed: pip install deepspeed")


def _check_unsupported(given: dict[str, object], data: DataArguments) -> None:
    if given.get("bf16") and given.get("fp16"):
        raise SettingsError("--bf16 and --fp16 exclude each other; give one, or neither (the hardware decides)")
    if given.get("fp16") and not _has_gpu(given):
        raise SettingsError("--fp16 needs a GPU, and there is none; drop --fp16 (or use --bf16)")
    if given.get("label_smoothing_factor"):
        raise SettingsError("--label_smoothing_factor needs the logits of every position, which are not computed")
    if given.get("push_to_hub"):
        raise SettingsError("--push_to_hub is not supported; upload the folder --output_dir when it is finished")
    if given.get("fsdp"):
        raise SettingsError("--fsdp is not supported; use --deepspeed finetune_chatmodel_demo/configs/ds_zero2.json")
    wants_evaluation = given.get("do_eval") or given.get("eval_strategy", "no") != "no"
    if wants_evaluation and not data.validation_file:
        raise SettingsError("evaluation needs --validation_file; give one, or drop --eval_strategy and --do_eval")


def _has_gpu(given: dict[str, object]) -> bool:
    return torch.cuda.is_available() and not given.get("use_cpu")


def _build_training_arguments(
    given: dict[str, object], data: DataArguments, method: str, notices: list[str]
) -> TrainingArguments:
    names = {item.name for item in fields(TrainingArguments)}
    chosen = _select(given, TrainingArguments)
    # transformers 5.23 renamed the flag; both names work, and the old one warns.
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    wanted = chosen.pop("gradient_checkpointing", None)
    if chosen.get(checkpointing) is None:
        chosen[checkpointing] = _has_gpu(given) if wanted is None else wanted
    defaults = {
        "learning_rate": DEFAULT_LEARNING_RATE[method],
        "warmup_steps": _default_warmup(given),
        "logging_steps": 10,
        "train_sampling_strategy": GROUP_BY_LENGTH,
        "ddp_find_unused_parameters": False,
        f"{checkpointing}_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": _has_gpu(given),
        **_default_precision(given),
        **_default_evaluation(given, data),
    }
    forced = {"remove_unused_columns": False, "label_names": ["labels"], "logging_nan_inf_filter": False}
    try:
        training = TrainingArguments(**{**defaults, **chosen, **forced})
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if training.n_gpu > 1:
        notices.append(f"one of {training.n_gpu} GPUs is used; start with torchrun (NUM_GPUS in the scripts) for more")
        training._n_gpu = 1  # DataParallel would gather every batch on one GPU
    return training


def _default_warmup(given: dict[str, object]) -> float:
    """3% of the steps; none in a run of less than 34, whose first step would have a learning rate of 0."""
    steps = given.get("max_steps", -1)
    return int(DEFAULT_WARMUP_SHARE * steps) if steps > 0 else DEFAULT_WARMUP_SHARE


def _default_precision(given: dict[str, object]) -> dict[str, bool]:
    if "bf16" in given or "fp16" in given or not _has_gpu(given):
        return {}
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return {"bf16": True} if has_bf16 else {"fp16": True}


def _default_evaluation(given: dict[str, object], data: DataArguments) -> dict[str, object]:
    """Evaluation at each checkpoint, when there is something to evaluate on."""
    if not data.validation_file:
        return {}
    strategy = given.get("save_strategy", "steps")
    return {"eval_strategy": strategy, "eval_steps": given.get("save_steps", 500) if strategy == "steps" else None}


def _find_checkpoint(training: TrainingArguments, method: str) -> Path | None:
    """Resolves --resume_from_checkpoint: True (the newest whole one in output_dir), a path, or False."""
    wanted = training.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none", "no", ""):
        return None
    if _is_true(wanted):
        checkpoint = find_last_checkpoint(training.output_dir)
    else:
        checkpoint = Path(wanted)
        read_whole_checkpoint(checkpoint)
    if checkpoint is not None:
        found = P_TUNING if is_prefix_checkpoint(checkpoint) else FULL
        if found != method:
            raise SettingsError(
                f"{checkpoint} is a checkpoint of {found}, and this run trains {method}; choose another --output_dir"
            )
    return checkpoint


def _is_true(value: object) -> bool:
    return str(value).lower() in ("true", "yes")


def _check_earlier_run(
    training: TrainingArguments, run: RunArguments, checkpoint: Path | None, notices: list[str]
) -> None:
    """Keeps two runs apart: a later resume would otherwise continue with the checkpoint of the wrong one."""
    earlier = list_checkpoints(training.output_dir)
    if checkpoint is not None or run.overwrite_output_dir:
        return
    if _is_true(training.resume_from_checkpoint):
        damaged = f" ({len(earlier)} damaged)" if earlier else ""
        notices.append(f"no whole checkpoint in {training.output_dir}{damaged}: starting from the beginning")
    elif earlier:
        raise SettingsError(
            f"--output_dir {training.output_dir} holds {earlier[-1].name} of an earlier run; continue it with "
            "--resume_from_checkpoint True, start anew with --overwrite_output_dir, or choose another folder"
        )
