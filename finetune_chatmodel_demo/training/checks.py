"""Refuses runs that cannot work, before anything is loaded: each error says what to do instead."""

import importlib.util
import math
import os
import shutil
from dataclasses import fields
from pathlib import Path

import torch

from finetune_chatmodel_demo.chatglm3.fingerprint import check_base
from finetune_chatmodel_demo.chatglm3.lora_files import is_adapter_checkpoint, read_adapter_config, read_settings
from finetune_chatmodel_demo.chatglm3.model_folder import check_model_folder
from finetune_chatmodel_demo.chatglm3.prefix_files import is_prefix_checkpoint, read_prefix_config
from finetune_chatmodel_demo.chatglm3.weights import LINEAR_MODULES, OFFICIAL_MODULES
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.flags import check_number
from finetune_chatmodel_demo.conversation.data_arguments import DataArguments
from finetune_chatmodel_demo.conversation.stage_data import check_flags
from finetune_chatmodel_demo.training.arguments import (
    FREEZE,
    FULL,
    LORA,
    P_TUNING,
    ModelArguments,
    StageArguments,
)
from finetune_chatmodel_demo.training.evaluation_checks import check_evaluation, check_overfit_check
from finetune_chatmodel_demo.training.settings import Settings, trains
from finetune_chatmodel_demo.training.stages.stage_checks import check_dpo, check_ppo
from finetune_chatmodel_demo.training.zero import read_stage

# Of transformers' arguments, and of flags that a plan gets without their dataclass.
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
COUNTS += ("max_seq_length", "pre_seq_len")
AMOUNTS = ("num_train_epochs", "save_steps", "eval_steps")  # may be fractions: epochs, and shares of the steps
# Flags that mean something for one method only → how to choose it.
FLAGS_OF_METHOD = {
    P_TUNING: (
        "ptuning_checkpoint",
        "pre_seq_len",
        "prefix_projection",
        "prefix_init_std",
        "prefix_init_text",
        "prefix_dropout",
    ),
    LORA: (
        "adapter_name_or_path",
        "create_new_adapter",
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
        "lora_target",
        "additional_target",
        "use_rslora",
        "use_dora",
    ),
    FREEZE: ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
}
HOW_TO_CHOOSE = {
    P_TUNING: "P-Tuning v2: add --pre_seq_len, e.g. 128",
    LORA: "LoRA: add --finetuning_type lora",
    FREEZE: "--finetuning_type freeze",
}
FLAGS_OF_STAGE = {
    "rm": ("center_rewards_coefficient",),
    "dpo": ("pref_beta", "pref_loss", "pref_ftx", "dpo_label_smoothing", "simpo_gamma"),
    "ppo": (
        "reward_model",
        "reward_function",
        *(item.name for item in fields(StageArguments) if item.name.startswith("ppo_")),
    ),
}
STREAMING_STAGES = ("pt", "sft")
TEXT_FILE_ENDINGS = (".txt", ".md", ".json", ".jsonl")


def check_files(
    model: ModelArguments, data: DataArguments, stage: str, given: dict[str, object], notices: list[str]
) -> None:
    """Files and folders that must be there.

    Raises:
        UserError: for the first that is missing.
    """
    _check_data(data, stage, given)
    if not model.model_name_or_path:
        raise UserError("--model_name_or_path is missing: the folder of the base model, e.g. THUDM/chatglm3-6b")
    folder = Path(model.model_name_or_path)
    if not (folder / "config.json").is_file():
        if folder.is_dir() or folder.is_absolute() or len(folder.parts) != 2:
            raise UserError(
                f"--model_name_or_path {folder} is not a folder with a config.json; THUDM/README.md says how to get "
                "the weights"
            )
        notices.append(f"there is no folder {folder.absolute()}: {folder} is taken for a name on the hub")
    check_model_folder(folder)
    if given.get("output_dir"):
        _check_output(Path(str(given["output_dir"])))
    elif not given.get("overfit_check"):
        raise UserError("--output_dir is missing: the folder for checkpoints and the result")
    deepspeed = given.get("deepspeed")
    if deepspeed and isinstance(deepspeed, str) and deepspeed[0] != "{" and not Path(deepspeed).is_file():
        raise UserError(
            f"--deepspeed {deepspeed} does not exist (the current folder is {Path.cwd()}); "
            "finetune_chatmodel_demo/configs has ds_zero2.json, ds_zero3.json and both with _offload"
        )


def _check_output(folder: Path) -> None:
    """Hours of training for a result that cannot be written: the folder, or what it will be made in, must be ours."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--output_dir {folder} cannot be written to: {there} is no folder; choose another one")
    if not os.access(there, os.W_OK):
        raise UserError(f"--output_dir {folder} cannot be written to: {there} is read-only; choose another one")


def _check_data(data: DataArguments, stage: str, given: dict[str, object]) -> None:
    for flag in ("train_file", "validation_file"):
        path = getattr(data, flag)
        if path and not Path(path).is_file():
            raise UserError(f"--{flag} {path} does not exist (the current folder is {Path.cwd()})")
    if data.tokenized_cache and Path(data.tokenized_cache).is_file():
        raise UserError(f"--tokenized_cache {data.tokenized_cache} is a file; give a folder, new or not")
    try:
        check_flags(data, stage, needs_train=trains(given))
    except ValueError as error:
        raise UserError(str(error)) from error


def check_settings(settings: Settings) -> None:
    """Combinations of method, stage, data and hardware.

    Args:
        settings: decided but for `training` and `checkpoint`, which are None. Notices are added to it.

    Raises:
        UserError: for the first combination that cannot work.
    """
    check_counts(settings.given)
    _tell_of_no_training(settings)
    _check_method(settings)
    _check_stage(settings)
    _check_quantization(settings)
    _check_deepspeed(settings)
    _check_unsupported(settings.given)
    check_evaluation(settings)
    _check_streaming(settings)
    _check_packing(settings)
    check_overfit_check(settings)


def check_counts(given: dict[str, object]) -> None:
    """Numbers that cannot be zero or negative, refused before something divides by them.

    Raises:
        UserError: for the first that is too small.
    """
    for interval, names in (("[1, inf)", COUNTS), ("(0, inf)", AMOUNTS)):
        for name in names:
            check_number(name, given.get(name), interval)


def _tell_of_no_training(settings: Settings) -> None:
    lengths = [flag for flag in ("max_steps", "num_train_epochs") if settings.given.get(flag)]
    if lengths and not trains(settings.given):
        settings.notices.append(f"--{lengths[0]} without --do_train True: nothing is trained; add it to train first")


def _check_start(settings: Settings) -> None:
    """A prefix or adapter that is trained further belongs to the base it was trained on."""
    model, adapter = settings.model, settings.tuning.adapter_name_or_path
    prefix = model.ptuning_checkpoint
    if settings.method == P_TUNING and prefix and is_prefix_checkpoint(prefix):
        start, found = prefix, read_prefix_config(prefix)
    elif settings.method == LORA and adapter and is_adapter_checkpoint(adapter):
        start, found = adapter, read_adapter_config(adapter)
    else:
        return
    notice = check_base(
        Path(start),
        found.base_fingerprint,
        found.base_model,
        model.model_name_or_path,
        allow_other=model.allow_other_base,
    )
    if notice:
        settings.notices.append(notice)


def _check_method(settings: Settings) -> None:
    model, method, given = settings.model, settings.method, settings.given
    if model.ptuning_checkpoint and not (Path(model.ptuning_checkpoint) / "config.json").is_file():
        raise UserError(
            f"--ptuning_checkpoint {model.ptuning_checkpoint} is not a folder with a config.json; "
            "give the --output_dir of a finished run of P-Tuning v2, or leave the flag out for a new prefix"
        )
    _check_prefix_start(model, given)
    _check_start(settings)
    _check_continued(settings)
    for owner, flags in FLAGS_OF_METHOD.items():
        for flag in flags:
            if owner != method and given.get(flag):
                raise UserError(
                    f"--{flag} belongs to {HOW_TO_CHOOSE[owner]} (this run trains {settings.method_title}), or drop it"
                )


def _check_continued(settings: Settings) -> None:
    """What is trained on keeps its shape: a flag that asks for another one would be passed over.

    Raises:
        UserError: for such a flag, or a new adapter that has nothing, or nothing possible, to stand on.
    """
    model, tuning, given = settings.model, settings.tuning, settings.given
    if tuning.create_new_adapter:
        if not tuning.adapter_name_or_path:
            raise UserError("--create_new_adapter merges --adapter_name_or_path first: add it, or drop the flag")
        if model.quantization_bit:
            raise UserError(
                f"--create_new_adapter cannot merge {tuning.adapter_name_or_path} into weights of "
                f"{model.quantization_bit} bits: drop --quantization_bit, or merge it before (export.py)"
            )
        return
    prefix, adapter = model.ptuning_checkpoint, tuning.adapter_name_or_path
    if settings.method == P_TUNING and prefix and is_prefix_checkpoint(prefix):
        found = read_prefix_config(model.ptuning_checkpoint)
        known = {"prefix_projection": found.prefix_projection, "prefix_init_std": None}
        start, instead = f"the prefix {model.ptuning_checkpoint}", "drop it, or --ptuning_checkpoint for a new prefix"
    elif settings.method == LORA and adapter and is_adapter_checkpoint(adapter):
        found = read_settings(Path(tuning.adapter_name_or_path))
        names = {"lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
        known = {flag: found.get(name) for flag, name in names.items()}
        known |= {flag: bool(found.get(flag)) for flag in ("use_dora", "use_rslora")}
        known["lora_target"] = ",".join(sorted(found.get("target_modules") or ()))
        named = [name.strip() for name in tuning.lora_target.replace("all", ",".join(LINEAR_MODULES)).split(",")]
        if {part for name in named for part in OFFICIAL_MODULES.get(name, (name,))} == {*found["target_modules"]}:
            del known["lora_target"]
        start = f"the adapter {tuning.adapter_name_or_path}"
        instead = "drop it, or add --create_new_adapter True to merge that one and train a new one on top"
    else:
        return
    for flag, value in known.items():
        if flag in given and given[flag] != value:
            has = "values of its own" if value is None else value
            raise UserError(f"--{flag} is {given[flag]}, but {start}, which is trained on, has {has}: {instead}")


def _check_prefix_start(model: ModelArguments, given: dict[str, object]) -> None:
    text = model.prefix_init_text
    if text is None:
        return
    if model.prefix_projection:
        raise UserError(
            "--prefix_init_text with --prefix_projection: an MLP computes the prefix, which cannot start as a text; "
            "drop one of the two"
        )
    if model.ptuning_checkpoint:
        raise UserError("--prefix_init_text is for a new prefix, --ptuning_checkpoint has one; drop one of the two")
    if "prefix_init_std" in given:
        raise UserError("--prefix_init_std is of a random prefix, --prefix_init_text takes a text's; drop one")
    if not text.strip():
        raise UserError("--prefix_init_text is empty; give a file, or some words")
    if Path(text).suffix in TEXT_FILE_ENDINGS and len(text) < 260 and not Path(text).is_file():
        raise UserError(f"--prefix_init_text {text} does not exist (the current folder is {Path.cwd()})")


def _check_stage(settings: Settings) -> None:
    stage, given = settings.stage.stage, settings.given
    for owner, flags in FLAGS_OF_STAGE.items():
        for flag in flags:
            if owner != stage and given.get(flag) is not None:
                raise UserError(f"--{flag} belongs to --stage {owner}, and this run's stage is {stage}; drop it")
    if given.get("ref_model") and stage not in ("dpo", "ppo"):
        raise UserError(f"--ref_model belongs to --stage dpo or ppo, and this run's stage is {stage}; drop it")
    if stage == "rm" and settings.method == P_TUNING:
        raise UserError(
            "--stage rm trains a score head, which a prefix checkpoint has no place for; use --finetuning_type lora, "
            "freeze or full"
        )
    if given.get("do_predict") and stage != "sft":
        raise UserError(f"--do_predict writes answers, which --stage {stage} does not train; use it with sft")
    if not 0 <= settings.stage.center_rewards_coefficient < math.inf:
        raise UserError(
            f"--center_rewards_coefficient is {settings.stage.center_rewards_coefficient:g}; it must be 0 or more"
        )
    if stage == "dpo":
        check_dpo(settings)
    if stage == "ppo":
        check_ppo(settings)


def _check_quantization(settings: Settings) -> None:
    bits = settings.model.quantization_bit
    if not bits:
        return
    if settings.method in (FREEZE, FULL):
        raise UserError(
            f"--quantization_bit {bits} cannot train {settings.method_title}; add --pre_seq_len for P-Tuning v2 or "
            "--finetuning_type lora, or drop --quantization_bit"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--quantization_bit needs the package bitsandbytes: pip install bitsandbytes")


def _check_deepspeed(settings: Settings) -> None:
    if not settings.given.get("deepspeed"):
        return
    if settings.stage.stage not in ("pt", "sft"):
        raise UserError(f"--deepspeed works with --stage pt and sft, not with {settings.stage.stage}; drop it")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("--deepspeed needs the package deepspeed: pip install deepspeed")
    if not trains(settings.given):
        raise UserError("--deepspeed shares out what training needs, and this run does not train; drop it")
    if read_stage(settings.given["deepspeed"]) == 3:
        _check_zero3(settings)
    elif settings.method in (P_TUNING, LORA):
        settings.notices.append(
            f"--deepspeed below ZeRO-3 shares out the optimizer's state, which is small with {settings.method_title}: "
            "torchrun alone does the same"
        )


def _check_zero3(settings: Settings) -> None:
    """No process has a whole weight, but for the moment in which all of them compute with it."""
    if settings.compiles_elementwise:
        raise UserError("--torch_compile with ZeRO-3 is not supported: its weights come and go; drop it")
    if settings.model.quantization_bit:
        raise UserError(
            "--quantization_bit with ZeRO-3: quantized weights cannot be shared out; use ds_zero2, or torchrun alone"
        )
    if settings.merged_adapter:
        raise UserError(
            "--create_new_adapter with ZeRO-3: no process has whole weights to merge into; use ds_zero2, or merge it "
            "before (export.py)"
        )
    if settings.model.prefix_init_text:
        raise UserError(
            "--prefix_init_text with ZeRO-3: the text's keys and values are computed before the training, when no "
            "process has whole weights; use ds_zero2, or torchrun alone"
        )
    for flag in ("do_predict", "eval_questions"):
        if settings.given.get(flag):
            raise UserError(
                f"--{flag} with ZeRO-3: processes that write replies of different lengths would wait for each other's "
                "weights forever; use ds_zero2, or ask the result without --deepspeed"
            )


def _check_unsupported(given: dict[str, object]) -> None:
    if given.get("bf16") and given.get("fp16"):
        raise UserError("--bf16 and --fp16 exclude each other; give one, or neither (the hardware decides)")
    if given.get("fp16") and not has_gpu(given):
        raise UserError("--fp16 needs a GPU, and there is none; drop --fp16 (or use --bf16)")
    if given.get("label_smoothing_factor"):
        raise UserError("--label_smoothing_factor needs the logits of every position, which are not computed")
    if given.get("push_to_hub"):
        raise UserError("--push_to_hub is not supported; upload the folder --output_dir when it is finished")
    for flag in ("torch_compile_backend", "torch_compile_mode"):
        if given.get(flag):
            raise UserError(f"--{flag} is not supported; --torch_compile True fuses the element-wise operations")
    if given.get("torch_compile"):
        _check_compiler(given)
    if given.get("fsdp"):
        raise UserError("--fsdp is not supported; use --deepspeed finetune_chatmodel_demo/configs/ds_zero2.json")


def _check_compiler(given: dict[str, object]) -> None:
    if has_gpu(given):
        if importlib.util.find_spec("triton") is None:
            raise UserError("--torch_compile needs the package triton on a GPU: pip install triton; or drop it")
    elif shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("--torch_compile needs a C++ compiler on a CPU (g++, or the one that CXX names); or drop it")


def _check_streaming(settings: Settings) -> None:
    if not settings.data.streaming:
        return
    if settings.given.get("max_steps", -1) <= 0:
        raise UserError("--streaming does not know how many rows there are; say how long to train: --max_steps N")
    if settings.stage.stage not in STREAMING_STAGES:
        raise UserError(f"--streaming works with --stage pt and sft, not with {settings.stage.stage}; drop it")
    if 0 < settings.data.val_size < 1:
        raise UserError("--streaming cannot split off a share; give --val_size as a number of rows, e.g. 100")


def _check_packing(settings: Settings) -> None:
    if not settings.data.packing:
        return
    if settings.stage.stage == "pt":
        raise UserError("--packing is for conversations; --stage pt always fills its blocks: drop it")
    if settings.stage.stage != "sft":
        raise UserError(f"--packing works with --stage sft, not with {settings.stage.stage}; drop it")
    if settings.data.streaming:
        raise UserError("--packing groups rows by their lengths, which --streaming does not know; drop one of them")


def has_gpu(given: dict[str, object]) -> bool:
    """Whether the run will use a GPU."""
    return torch.cuda.is_available() and not given.get("use_cpu")
