"""Flags of other programs: older versions of transformers, the original demo, and LLaMA-Factory of 2023 to 2026.

They are translated where there is an equivalent, named where they have no effect, and refused with what to do instead
where a run without them would not be what was asked for. `command_line` asks here first; test_command_line.py checks
that no flag of our own stands in these tables.
"""

import re

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training.arguments import GROUP_BY_LENGTH

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "warmup_ratio": "warmup_steps",
    # LLaMA-Factory's names, of both generations.
    "cutoff_len": "max_seq_length",
    "val_ratio": "val_size",
    "probabilities": "interleave_probs",
    "checkpoint_dir": "adapter_name_or_path",
    "num_layer_trainable": "freeze_trainable_layers",
    "name_module_trainable": "freeze_trainable_modules",
    "dpo_beta": "pref_beta",
    "dpo_loss": "pref_loss",
    "dpo_ftx": "pref_ftx",
    "reward_model_adapters": "reward_model",
    "ppo_logger": "report_to",
    "quantization_bits": "quantization_bit",
    "early_stopping_steps": "early_stopping_patience",
    "sft_packing": "packing",
    "neat_packing": "packing",  # packed conversations never see each other here
}
# The run is the same without these.
WITHOUT_EFFECT = {
    "overwrite_cache": "nothing is cached",
    "pad_to_max_length": "rows are padded to the longest of their batch",
    "use_fast_tokenizer": "there is one tokenizer",
    "save_safetensors": "a prefix is saved in both formats, a whole model as safetensors",
    "predict_with_generate": "--do_predict always generates",
    "ignore_pad_token_for_loss": "padding never counts",
    "flash_attn": "PyTorch's fused attention is always used",
    "include_tokens_per_second": "the log always has tokens per second",
    "include_effective_tokens_per_second": "the log always has tokens per second",
    "logging_dir": "the log is trainer_log.jsonl in --output_dir",
    "trust_remote_code": "the model is part of this project, and no code is downloaded",
    "split_special_tokens": "text never becomes a control token here",
    "low_cpu_mem_usage": "weights are always loaded without a second copy",
    "use_unsloth_gc": "gradient checkpointing is PyTorch's",
    "use_unsloth": "unsloth does not know ChatGLM3; PyTorch's fused attention is used",
    "enable_liger_kernel": "logits are computed only where a label counts, which is what it saves",
    "use_reentrant_gc": "gradient checkpointing is always the one that is not reentrant",
    "upcast_layernorm": "norms are computed in float32 anyway",
    "upcast_lmhead_output": "the loss is computed in float32 anyway",
    "double_quantization": "4 bits are always quantized twice",
    "quantization_device_map": "the whole base lies on one device",
    "print_param_status": "the table before the start says what is trained",
    "infer_backend": "answers are generated with PyTorch",
    "infer_dtype": "the precision is that of the run (--bf16, --fp16)",
    "use_kv_cache": "answers are always generated with a cache",
    "offload_folder": "nothing is offloaded",
    "reserved_label_len": "cuts fall between turns, so that a reply is whole or left out",
    "preprocessing_batch_size": "rows are read one by one",
    "tool_format": "tool calls have ChatGLM3's own format",
    "tokenized_path": "rows are tokenized anew, some thousands a second",
    "cache_path": "rows are tokenized anew, some thousands a second",
    "reward_model_type": "the folder --reward_model says what it is",
    "create_new_adapter": "without --adapter_name_or_path the adapter is new",
    "ray_run_name": "runs are started with torchrun",
}
# The run would be another one without these: they are refused, unless they are switched off anyway.
REPLACED = {
    "tokenizer_name": "the tokenizer is read from --model_name_or_path",
    "config_name": "the configuration is read from --model_name_or_path",
    "cache_dir": "give a folder as --model_name_or_path",
    "model_revision": "give a folder as --model_name_or_path",
    "use_auth_token": "give a folder as --model_name_or_path",
    "resize_position_embeddings": "rotary positions need no resizing",
    "max_train_samples": "use --max_samples",
    "fp16_opt_level": "use --fp16 or --bf16",
    "half_precision_backend": "use --fp16 or --bf16",
    "pure_bf16": "use --bf16, which keeps the trained parameters in float32",
    "use_mps_device": "use --use_cpu to keep off an accelerator",
    "hf_hub_token": "set the environment variable HF_TOKEN",
    "ms_hub_token": "set the environment variable MODELSCOPE_API_TOKEN",
    "om_hub_token": "only Hugging Face's hub and ModelScope are known",
    "adapter_folder": "give the adapter's folder as --adapter_name_or_path",
    "resize_vocab": "ChatGLM3's vocabulary is fixed",
    "rope_scaling": "use a model for longer texts, e.g. THUDM/chatglm3-6b-32k",
    "shift_attn": "every token sees all earlier ones; use --gradient_checkpointing True for long rows",
    "mixture_of_depths": "the model's layers stay as they are",
    "use_llama_pro": "no layers are added; train existing ones with --finetuning_type freeze",
    "moe_aux_loss_coef": "ChatGLM3 has no experts",
    "train_from_scratch": "train from a base model, e.g. THUDM/chatglm3-6b-base with --stage pt",
    "quantization_method": "bitsandbytes quantizes: --quantization_bit 4 or 8",
    "quantization_type": "4 bits are NF4",
    "train_last_turn_only": 'write "loss": false into the messages that shall not count',
    "mask_history": 'write "loss": false into the messages that shall not count',
    "train_on_prompt": 'write "loss": true into the messages that shall count, or use --stage pt',
    "split": 'name the split in the data set\'s block in dataset_info.json: "split": "train"',
    "eval_on_each_dataset": "--eval_dataset gives one figure for all its data sets",
    "media_dir": "ChatGLM3 reads text only",
    "num_beams": "answers are greedy, or drawn with --do_sample True",
    "eval_num_beams": "answers are greedy, or drawn with --do_sample True",
    "length_penalty": "it belongs to beam search; answers are greedy, or drawn with --do_sample True",
    "repetition_penalty": "--do_predict measures the model as it is; inference.py has --repetition-penalty",
    "max_length": "use --max_new_tokens, the length of the answer alone",
    "generation_max_length": "use --max_new_tokens, the length of the answer alone",
    "generation_num_beams": "answers are greedy, or drawn with --do_sample True",
    "default_system": "write the system prompt into the data",
    "loraplus_lr_ratio": "both matrices of an adapter have --learning_rate",
    "loraplus_lr_embedding": "the whole adapter has --learning_rate",
    "lora_lr_ratio": "both matrices of an adapter have --learning_rate",
    "ref_model_adapters": "export.py merges an adapter; give the merged folder as --ref_model",
    "ref_model_quantization_bit": "the reference is the base of the trained model, in its precision",
    "reward_model_quantization_bit": "the reward model is loaded as it was saved",
    "pref_bco_weight": "--pref_loss is sigmoid, hinge or ipo",
    "simpo_gamma": "--pref_loss is sigmoid, hinge or ipo",
    "ld_alpha": "--pref_loss is sigmoid, hinge or ipo",
    "compute_accuracy": "--eval_questions N counts exact replies while training, evaluate.py afterwards",
    "block_size": "use --max_seq_length",
    "adafactor": "use --optim adafactor",
    "sharded_ddp": "use --deepspeed finetune_chatmodel_demo/configs/ds_zero2.json",
    "num_gpus": "start with torchrun --nproc_per_node N finetune.py …, or with NUM_GPUS=N scripts/finetune_*.sh",
    "num_processes": "start with torchrun --nproc_per_node N finetune.py …",
    "nproc_per_node": "it belongs in front of finetune.py: torchrun --nproc_per_node N finetune.py …",
}
# Families of flags → the same.
REPLACED_FAMILIES = {
    r"export_\w+": "export.py writes models; it runs after the training",
    r"(vllm|sglang|kt|cpu_infer)_\w+|use_kt": "this program trains, and generates with PyTorch",
    r"(image|video|audio|visual)_\w+|crop_to_patches": "ChatGLM3 reads text only",
    r"freeze_(vision_tower|multi_modal_projector|language_model)": "ChatGLM3 reads text only",
    r"(use_)?(galore|apollo|badam|adam_mini|muon)(_\w+)?": "use --optim, e.g. adafactor, or --finetuning_type lora to "
    "save memory",
    r"(use_)?swanlab(_\w+)?": "use --report_to swanlab",
    r"(use_)?(pissa|oft)(_\w+)?": "the methods are ptuning, lora, freeze and full (--finetuning_type)",
    r"fp8(_\w+)?": "use --bf16",
    r"kto_\w+": "the stages are pt, sft, rm, dpo and ppo (--stage)",
    r"(add_|new_|init_)(special_)?tokens?\w*": "ChatGLM3's vocabulary is fixed",
    r"use_(mca|dft_loss|asft_loss|eaft_loss|hyper_parallel)": "it is not built; leave it out",
}
OFF = {"false", "no", "none", "null", "off", "0"}
# Values with which a flag of REPLACED changes nothing.
HARMLESS = {
    "quantization_method": {"bitsandbytes", "bnb"},
    "quantization_type": {"nf4"},
    "split": {"train"},
    "num_beams": {"1"},
    "eval_num_beams": {"1"},
    "generation_num_beams": {"1"},
    "length_penalty": {"1", "1.0"},
    "repetition_penalty": {"1", "1.0"},
    "model_revision": {"main"},
    "freeze_vision_tower": {"true"},
    "freeze_multi_modal_projector": {"true"},
}
# Flag → values of another program → ours.
RENAMED_VALUES = {
    "template": {"vanilla": "raw", "empty": "raw", "chatglm3_raw": "chatglm3"},
    "resume_from_checkpoint": {"true": "True"},
}


def translate_flag(name: str, values: list[str]) -> tuple[list[str] | None, str | None]:
    """Translates one flag.

    Args:
        name: without dashes, with underscores.
        values: what follows it.

    Returns:
        The arguments to use in its place (None: the flag as it is), and a notice or None.

    Raises:
        UserError: for a flag without which the run would be another one.
    """
    if name == GROUP_BY_LENGTH:
        return ["--train_sampling_strategy", GROUP_BY_LENGTH if _is_on(values) else "random"], None
    if name == "disable_shuffling":
        return (["--train_sampling_strategy", "sequential"] if _is_on(values) else []), None
    if name == "disable_gradient_checkpointing":
        return ["--gradient_checkpointing", str(not _is_on(values))], None
    if name in RENAMED_VALUES and values:
        return [f"--{name}", RENAMED_VALUES[name].get(values[0].lower(), values[0]), *values[1:]], None
    if name in RENAMED:
        return [f"--{RENAMED[name]}", *values], None
    if name in WITHOUT_EFFECT:
        return [], f"--{name} has no effect: {WITHOUT_EFFECT[name]}"
    advice = find_replacement(name)
    if advice is None:
        return None, None
    value = values[0].lower() if values else "true"
    if value in OFF or value in HARMLESS.get(name, ()):
        return [], f"--{name} {values[0]} has no effect: so it is here anyway"
    raise UserError(f"--{name} is not used here: {advice}")


def find_replacement(name: str) -> str | None:
    """What to do instead of a flag that is refused; None for any other flag."""
    if name in REPLACED:
        return REPLACED[name]
    return next((advice for family, advice in REPLACED_FAMILIES.items() if re.fullmatch(family, name)), None)


def _is_on(values: list[str]) -> bool:
    return not values or values[0].lower() in ("true", "1", "yes")
