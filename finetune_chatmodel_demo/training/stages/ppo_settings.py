"""What the flags of --stage ppo mean, and which of their values cannot work.

A rollout has `per_device_train_batch_size × gradient_accumulation_steps × ppo_buffer_size` replies on each process.
Every one of its `ppo_epochs` passes makes `ppo_buffer_size` optimizer updates, each from batch size × accumulation
replies. `--max_steps` and everything else in steps counts updates. `--num_train_epochs N` is as many rollouts as it
takes to answer every prompt N times.
"""

import math
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.generation.session import build_settings
from finetune_chatmodel_demo.training.arguments import P_TUNING
from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.stages.ppo_rewards import check_reward_function, check_reward_model

# Replies are drawn from the whole distribution unless a flag says otherwise: its log-probabilities are what the ratio
# and the KL are made of (N details, arXiv:2403.17031).
SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
POSITIVE = ("ppo_target", "ppo_kl_horizon", "ppo_cliprange", "ppo_cliprange_value", "ppo_value_lr")
NOT_NEGATIVE = ("ppo_kl_coef", "ppo_vf_coef", "ppo_missing_eos_penalty")
AT_LEAST_ONE = ("ppo_epochs", "ppo_buffer_size")


def check_ppo_settings(settings: Settings) -> None:
    """Refuses what cannot work, before anything is loaded.

    Args:
        settings: decided but for `training` and `checkpoint`, which may be None. Notices are added to it.

    Raises:
        UserError: for the first such value.
    """
    _check_numbers(settings)
    _check_reward(settings)
    _check_sampling(settings)
    _check_unsupported(settings.given)
    _note_new_prefix(settings)
    folder = settings.stage.ref_model
    if folder and not (Path(folder) / "config.json").is_file():
        raise UserError(f"--ref_model {folder} is not a folder with a config.json; give a whole model")


def _check_numbers(settings: Settings) -> None:
    stage = settings.stage
    wrong = [(name, "at least 1") for name in AT_LEAST_ONE if getattr(stage, name) < 1]
    wrong += [(name, "above 0") for name in POSITIVE if not 0 < getattr(stage, name) < math.inf]
    wrong += [(name, "0 or more") for name in NOT_NEGATIVE if not 0 <= getattr(stage, name) < math.inf]
    wrong += [("ppo_gamma", "above 0 and at most 1")] * (not 0 < stage.ppo_gamma <= 1)
    wrong += [("ppo_lam", "between 0 and 1")] * (not 0 <= stage.ppo_lam <= 1)
    for name, expected in wrong:
        raise UserError(f"--{name} is {getattr(stage, name)}; it must be {expected}")
    if settings.data.train_format != "multi-turn":
        raise UserError(f"--train_format {settings.data.train_format} belongs to --stage sft; drop it for ppo")


def _check_reward(settings: Settings) -> None:
    model, function = settings.stage.reward_model, settings.stage.reward_function
    if bool(model) == bool(function):
        raise UserError(
            "--stage ppo needs one reward: --reward_model FOLDER (a result of --stage rm), or --reward_function "
            f"FILE.py:NAME; {'both were given' if model else 'none was given'}"
        )
    if model:
        check_reward_model(model)
    else:
        check_reward_function(function)


def _check_sampling(settings: Settings) -> None:
    sampling = sampling_of(settings)
    ranges = [
        ("max_new_tokens", settings.generation.max_new_tokens >= 1, "at least 1"),
        ("temperature", sampling["temperature"] > 0, "above 0 (PPO learns from drawn replies)"),
        ("top_p", 0 < sampling["top_p"] <= 1, "above 0 and at most 1"),
        ("top_k", sampling["top_k"] >= 0, "0 (off) or more"),
    ]
    for name, is_valid, expected in ranges:
        if not is_valid:
            raise UserError(f"--{name} is {getattr(settings.generation, name)}; with ppo it must be {expected}")
    if sampling["top_p"] < 1 or sampling["top_k"] > 0:
        settings.notices.append(
            "--top_p and --top_k leave out unlikely tokens when replies are drawn, while ratio and KL are of the whole "
            "distribution; ppo's defaults, --top_p 1 --top_k 0, make the two agree"
        )


def _note_new_prefix(settings: Settings) -> None:
    model = settings.model
    if settings.method == P_TUNING and not (model.ptuning_checkpoint or model.prefix_init_text):
        settings.notices.append(
            "behind a new random prefix a model talks nonsense, and PPO can only choose among what it says; start from "
            "a trained prefix (--ptuning_checkpoint, a result of --stage sft) or from a text (--prefix_init_text)"
        )


def _check_unsupported(given: dict[str, object]) -> None:
    if given.get("deepspeed"):
        raise UserError("--deepspeed does not work with --stage ppo; drop it (several GPUs: torchrun alone)")
    if given.get("lr_scheduler_type") == "reduce_lr_on_plateau":
        raise UserError(
            "--lr_scheduler_type reduce_lr_on_plateau follows the validation loss, which --stage ppo does not have; "
            "use linear, cosine or constant"
        )
    if given.get("load_best_model_at_end") and given.get("metric_for_best_model") not in ("reward", "eval_reward"):
        raise UserError("--load_best_model_at_end with --stage ppo needs --metric_for_best_model reward")


def sampling_of(settings: Settings) -> dict[str, Any]:
    """`temperature`, `top_p` and `top_k` of a rollout: those that were given, else the whole distribution."""
    return {
        name: getattr(settings.generation, name) if settings.given.get(name) is not None else default
        for name, default in SAMPLING_DEFAULTS.items()
    }


def build_generation(settings: Settings, tokenizer: Any, is_greedy: bool = False) -> GenerationConfig:
    """How rollouts draw replies; greedy for validation."""
    length = settings.generation.max_new_tokens
    if is_greedy:
        return build_settings(tokenizer, max_new_tokens=length)
    return build_settings(tokenizer, max_new_tokens=length, do_sample=True, **sampling_of(settings))


def replies_of_update(args: Any) -> int:
    """Replies of one process that an optimizer update learns from."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps


def replies_of_rollout(settings: Settings) -> int:
    """Replies of one process in a rollout."""
    return replies_of_update(settings.training) * settings.stage.ppo_buffer_size


def updates_of_rollout(settings: Settings) -> int:
    """Optimizer updates that learn from a rollout."""
    return settings.stage.ppo_epochs * settings.stage.ppo_buffer_size


def count_updates(settings: Settings, prompts: int) -> int:
    """Optimizer updates of a whole run over so many prompts."""
    args = settings.training
    if args.max_steps > 0:
        return args.max_steps
    rollout = replies_of_rollout(settings) * args.world_size
    rollouts = max(1, math.ceil(args.num_train_epochs * prompts / rollout))
    return rollouts * updates_of_rollout(settings)
