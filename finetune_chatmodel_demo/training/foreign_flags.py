"""Flags of other programs: older versions of transformers, the original demos, and LLaMA-Factory of 2023 to 2026.

They are renamed where there is an equivalent, named where they have no effect, and refused with what to do instead
where a run without them would not be what was asked for. test_command_line.py checks that none is a flag of our own.
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
    "dev_ratio": "val_size",
    "val_ratio": "val_size",
    "probabilities": "interleave_probs",
    "checkpoint_dir": "adapter_name_or_path",
    "num_layer_trainable": "freeze_trainable_layers",
    "name_module_trainable": "freeze_trainable_modules",
    "dpo_beta": "pref_beta",
    "dpo_loss": "pref_loss",
    "dpo_ftx": "pref_ftx",
    "reward_model_adapters": "reward_model",
    "reward_model_checkpoint": "reward_model",
    "ppo_logger": "report_to",
    "quantization_bits": "quantization_bit",
    "early_stopping_steps": "early_stopping_patience",
    "neft_alpha": "neftune_noise_alpha",
    "sft_packing": "packing",
    "neat_packing": "packing",  # packed conversations never see each other here
}
# Why the run is the same without these flags.
WITHOUT_EFFECT = {
    "rows are read anew whenever a data file or the code has changed": "overwrite_cache",
    "rows are padded to the longest of their batch": "pad_to_max_length",
    "there is one tokenizer": "use_fast_tokenizer",
    "a prefix is saved in both formats, a whole model as safetensors": "save_safetensors",
    "--do_predict always generates": "predict_with_generate",
    "padding never counts": "ignore_pad_token_for_loss",
    "PyTorch's fused attention is always used": "flash_attn use_unsloth",
    "the log always has tokens per second": "include_tokens_per_second include_effective_tokens_per_second",
    "the log is trainer_log.jsonl in --output_dir": "logging_dir",
    "the model is part of this project, and no code is downloaded": "trust_remote_code",
    "text never becomes a control token here": "split_special_tokens",
    "weights are always loaded without a second copy": "low_cpu_mem_usage",
    "gradient checkpointing is PyTorch's, and not reentrant": "use_unsloth_gc use_reentrant_gc",
    "logits are computed only where a label counts, which is what it saves": "enable_liger_kernel",
    "norms and the loss are computed in float32 anyway": "upcast_layernorm upcast_lmhead_output",
    "4 bits are always quantized twice": "double_quantization",
    "the whole base lies on one device": "quantization_device_map",
    "the table before the start says what is trained": "print_param_status",
    "answers are generated with PyTorch, a cache and the run's precision": "infer_backend infer_dtype use_kv_cache",
    "nothing is offloaded": "offload_folder",
    "cuts fall between turns, so that a reply is whole or left out": "reserved_label_len",
    "rows are read one by one": "preprocessing_batch_size",
    "tool calls have ChatGLM3's own format": "tool_format",
    "rows of large files are kept by --tokenized_cache": "tokenized_path cache_path",
    "the folder --reward_model says what it is": "reward_model_type",
    "runs are started with torchrun": "ray_run_name",
}
# What to do instead of these flags, without which the run would be another one; switched off they are let through.
_NO_BEAMS = "answers are greedy, or drawn with --do_sample True"
_ONE_LOSS = "--pref_loss is sigmoid, hinge, ipo, orpo or simpo"
_BY_MESSAGE = 'write "loss": false into the messages that shall not count, true into those that shall'
_A_FOLDER = "give a folder as --model_name_or_path"
_NO_GROWTH = "ChatGLM3's vocabulary is fixed"
_LAUNCHER = "start with torchrun --nproc_per_node N finetune.py …, or with NUM_GPUS=N scripts/finetune_*.sh"
_TEXT_ONLY = "ChatGLM3 reads text only"
_COLUMNS = "name the columns in a dataset_info.json (data_processing/datasets/README.md), and give --dataset"
REPLACED = {
    "the tokenizer and the configuration are read from --model_name_or_path": "tokenizer_name config_name",
    _A_FOLDER: "cache_dir model_revision use_auth_token",
    "rotary positions need no resizing": "resize_position_embeddings",
    "use --max_samples": "max_train_samples max_eval_samples max_predict_samples",
    "use --fp16 or --bf16": "fp16_opt_level half_precision_backend compute_type",
    "use --bf16, which keeps the trained parameters in float32": "pure_bf16",
    "use --use_cpu to keep off an accelerator": "use_mps_device",
    "set the environment variable HF_TOKEN": "hf_hub_token hf_auth_token",
    "set the environment variable MODELSCOPE_API_TOKEN": "ms_hub_token",
    "only Hugging Face's hub and ModelScope are known": "om_hub_token",
    "give the adapter's folder as --adapter_name_or_path": "adapter_folder",
    _NO_GROWTH: "resize_vocab",
    "use a model for longer texts, e.g. THUDM/chatglm3-6b-32k": "rope_scaling",
    "every token sees all earlier ones; use --gradient_checkpointing True for long rows": "shift_attn",
    "the model's layers stay as they are": "mixture_of_depths",
    "no layers are added; train existing ones with --finetuning_type freeze": "use_llama_pro",
    "ChatGLM3 has no experts": "moe_aux_loss_coef",
    "train from a base model, e.g. THUDM/chatglm3-6b-base with --stage pt": "train_from_scratch",
    "bitsandbytes quantizes: --quantization_bit 4 (NF4) or 8": "quantization_method quantization_type",
    _BY_MESSAGE: "train_last_turn_only mask_history train_on_prompt",
    'name the split in the data set\'s block in dataset_info.json: "split": "train"': "split",
    "--eval_dataset gives one figure for all its data sets": "eval_on_each_dataset",
    _TEXT_ONLY: "media_dir",
    _NO_BEAMS: "num_beams eval_num_beams generation_num_beams length_penalty",
    "--do_predict measures the model as it is; inference.py has --repetition-penalty": "repetition_penalty",
    "use --max_new_tokens, the length of the answer alone": "max_length generation_max_length val_max_target_length",
    "write it into the data": "default_system system_prompt source_prefix",
    _COLUMNS: "prompt_column response_column history_column",
    "give it as --validation_file with --do_predict True": "test_file",
    "the whole adapter has --learning_rate": "loraplus_lr_ratio loraplus_lr_embedding lora_lr_ratio",
    "export.py merges an adapter; give the merged folder as --ref_model": "ref_model_adapters ref_model_checkpoint",
    "both models are loaded as they were saved": "ref_model_quantization_bit reward_model_quantization_bit",
    _ONE_LOSS: "pref_bco_weight ld_alpha",
    "--eval_questions N counts exact replies while training, evaluate.py afterwards": "compute_accuracy",
    "use --max_seq_length": "block_size",
    "use --optim adafactor": "adafactor",
    "use --deepspeed finetune_chatmodel_demo/configs/ds_zero2.json": "sharded_ddp",
    _LAUNCHER: "num_gpus num_processes nproc_per_node",
    # Families of flags, as regular expressions.
    "export.py writes models; it runs after the training": r"export_\w+",
    "this program trains, and generates with PyTorch": r"(vllm|sglang|kt|cpu_infer)_\w+ use_kt",
    f"{_TEXT_ONLY}.": r"(image|video|audio|visual)_\w+ crop_to_patches "
    r"freeze_(vision_tower|multi_modal_projector|language_model)",
    "use --optim, e.g. adafactor, or --finetuning_type lora": r"(use_)?(galore|apollo|badam|adam_mini|muon)(_\w+)?",
    "use --report_to swanlab": r"(use_)?swanlab(_\w+)?",
    "the methods are ptuning, lora, freeze and full (--finetuning_type)": r"(use_)?(pissa|oft)(_\w+)?",
    "use --bf16": r"fp8(_\w+)?",
    "the stages are pt, sft, rm, dpo and ppo (--stage)": r"kto_\w+",
    f"{_NO_GROWTH}.": r"(add_|new_|init_)(special_)?tokens?\w*",
    "it is not built; leave it out": "use_mca use_dft_loss use_asft_loss use_eaft_loss use_hyper_parallel",
}
OFF = {"false", "no", "none", "null", "off", "0", ""}
# Values with which a refused flag changes nothing.
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
    "prompt_column": {"prompt"},
    "response_column": {"response"},
    "history_column": {"history"},
    "freeze_vision_tower": {"true"},
    "freeze_multi_modal_projector": {"true"},
}
# Flag → values of another program → ours.
RENAMED_VALUES = {
    "template": {"vanilla": "raw", "empty": "raw", "chatglm3_raw": "chatglm3"},
    "resume_from_checkpoint": {"true": "True"},
}


def translate_flag(name: str, values: list[str]) -> tuple[str, list[str]] | str:
    """Translates one flag.

    Args:
        name: without dashes, with underscores.
        values: what follows it.

    Returns:
        The flag and the values to use in its place, or why it has no effect.

    Raises:
        UserError: for a flag without which the run would be another one.
    """
    is_on = not values or values[0].lower() in ("true", "1", "yes")
    if name == GROUP_BY_LENGTH:
        return "train_sampling_strategy", [GROUP_BY_LENGTH if is_on else "random"]
    if name == "disable_shuffling":
        if not is_on:
            return "--disable_shuffling False has no effect: rows are shuffled anyway"
        return "train_sampling_strategy", ["sequential"]
    if name == "resume_lora_training":
        return "create_new_adapter", [str(not is_on)]
    if name == "disable_gradient_checkpointing":
        return "gradient_checkpointing", [str(not is_on)]
    if name in RENAMED_VALUES and values:
        return name, [RENAMED_VALUES[name].get(values[0].lower(), values[0]), *values[1:]]
    if name in RENAMED:
        return RENAMED[name], values
    reason = find_advice(name, WITHOUT_EFFECT)
    if reason:
        return f"--{name} has no effect: {reason}"
    advice = find_advice(name, REPLACED)
    if advice is None:
        return name, values
    value = values[0].lower() if values else "true"
    if value in OFF or value in HARMLESS.get(name, ()):
        return f"--{name} {values[0]} has no effect: so it is here anyway"
    raise UserError(f"--{name} is not used here: {advice}")


def find_advice(name: str, table: dict[str, str]) -> str | None:
    """The key of `WITHOUT_EFFECT` or `REPLACED` whose names a flag is among; None for any other flag."""
    return next(
        (text for text, names in table.items() if any(re.fullmatch(each, name) for each in names.split())), None
    )
