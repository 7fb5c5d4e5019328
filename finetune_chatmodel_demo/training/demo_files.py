"""Settings files of the later official demo (`finetune_hf.py`): data_config, training_args, peft_config → flags.

python finetune_chatmodel_demo/finetune.py DATA_DIR THUDM/chatglm3-6b configs/lora.yaml [yes|no|checkpoint]
"""

from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.common.errors import UserError, did_you_mean

SECTIONS = ("data_config", "training_args", "peft_config")
# Each section's keys → flags; None: nothing depends on it here.
DATA_KEYS = {"train_file": "train_file", "val_file": "validation_file", "num_proc": "preprocessing_num_workers"}
DATA_KEYS |= {"test_file": None}  # the original predicts it after the training: --do_predict with --validation_file
TOP_KEYS = {"combine": None, "freezeV": None, "max_input_length": None, "max_output_length": None}
GENERATION_KEYS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k")
PEFT_KEYS = {
    "LORA": {
        "r": "lora_rank",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "target_modules": "lora_target",
        "modules_to_save": "additional_target",
        "use_dora": "use_dora",
        "use_rslora": "use_rslora",
    },
    "PREFIX_TUNING": {"num_virtual_tokens": "pre_seq_len", "prefix_projection": "prefix_projection"},
}
PEFT_IGNORED = ("peft_type", "task_type", "inference_mode", "num_attention_heads", "num_layers", "token_dim")


def is_demo_file(settings: dict[str, Any]) -> bool:
    """Whether a settings file has the later demo's sections."""
    return any(isinstance(settings.get(section), dict) for section in SECTIONS)


def translate_demo_file(settings: dict[str, Any], data_dir: str | None = None) -> dict[str, Any]:
    """The file's content as flags and their values.

    Args:
        settings: the whole file.
        data_dir: where its data files lie; default: the current folder.

    Raises:
        UserError: for a key that is not known, or a method of PEFT that is not built.
    """
    flags = _rename(settings, {**dict.fromkeys(SECTIONS), **TOP_KEYS}, "the settings file")
    data = _rename(settings.get("data_config") or {}, DATA_KEYS, "data_config")
    for name in ("train_file", "validation_file"):
        if name in data:
            data[name] = str(Path(data_dir or "") / data[name])
    lengths = [settings.get(name) for name in ("max_input_length", "max_output_length")]
    if None not in lengths:
        flags["max_seq_length"] = sum(map(int, lengths))
    training = dict(settings.get("training_args") or {})
    generation = _rename(
        training.pop("generation_config", None) or {}, dict(zip(GENERATION_KEYS, GENERATION_KEYS)), "generation_config"
    )
    training.pop("remove_unused_columns", None)
    return flags | data | training | generation | _translate_method(settings.get("peft_config"))


def _translate_method(section: dict[str, Any] | None) -> dict[str, Any]:
    if not section:
        return {"finetuning_type": "full"}
    kind = str(section.get("peft_type")).upper()
    if kind not in PEFT_KEYS:
        raise UserError(f"peft_config: peft_type is {section.get('peft_type')}; it must be LORA or PREFIX_TUNING")
    flags = _rename(section, {**dict.fromkeys(PEFT_IGNORED), **PEFT_KEYS[kind]}, "peft_config")
    for name in ("lora_target", "additional_target"):
        if isinstance(flags.get(name), list):
            flags[name] = ",".join(flags[name])
    if kind == "LORA":
        return {"finetuning_type": "lora", "lora_target": "query_key_value", **flags}  # PEFT's default for ChatGLM
    return {"finetuning_type": "ptuning", **flags}


def _rename(section: dict[str, Any], names: dict[str, str | None], where: str) -> dict[str, Any]:
    unknown = [key for key in section if key not in names]
    if unknown:
        hint = did_you_mean(unknown[0], names) or f"; there are {', '.join(names)}"
        raise UserError(f"{where} has a key {unknown[0]!r} that is not known{hint}")
    return {names[key]: value for key, value in section.items() if names[key] is not None and value is not None}
