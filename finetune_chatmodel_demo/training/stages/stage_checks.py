"""Which flags of rm, dpo and ppo cannot work together; everything here happens before anything is loaded."""

from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training.arguments import LORA, P_TUNING
from finetune_chatmodel_demo.training.settings import Settings

# What an evaluation measures beside the loss of pt and sft; the first chooses the best checkpoint.
EVALUATED = {
    "rm": ("loss", "accuracy", "rewards/chosen", "rewards/rejected", "rewards/margins"),
    "dpo": (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    ),
    "ppo": ("reward", "reward_std", "reply_tokens", "hit_cap"),
}
WITHOUT_REFERENCE = ("orpo", "simpo")  # values of --pref_loss
# Replies are drawn from the whole distribution unless a flag says otherwise: its log-probabilities are what the ratio
# and the KL are made of (N details, arXiv:2403.17031).
SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def default_metric(stage: str) -> str:
    """What chooses the best checkpoint where --metric_for_best_model is not given."""
    return EVALUATED.get(stage, ("loss",))[0]


def check_metric(settings: Settings) -> None:
    """Refuses a --metric_for_best_model that no evaluation of the stage measures.

    Raises:
        UserError: says what is measured.
    """
    stage, given = settings.stage.stage, settings.given.get("metric_for_best_model")
    if given is None or settings.run.eval_questions_file:  # questions have figures for each of their groups
        return
    metric = str(given).removeprefix("eval_")
    measured = EVALUATED.get(stage, ("loss", "exact") if settings.run.eval_questions else ("loss",))
    if metric == "exact" and stage not in EVALUATED and metric not in measured:
        raise UserError("--metric_for_best_model exact needs --eval_questions N, e.g. 100, which measures it")
    if metric not in measured:
        raise UserError(
            f"--metric_for_best_model {given} is not measured by --stage {stage}; use {', '.join(measured)}"
        )


def check_dpo(settings: Settings) -> None:
    """Refuses what --stage dpo cannot do.

    Args:
        settings: decided but for `training` and `checkpoint`, which may be None. Notices are added to it.

    Raises:
        UserError: for the first such value.
    """
    stage = settings.stage
    if stage.dpo_label_smoothing and stage.pref_loss != "sigmoid":
        raise UserError(f"--dpo_label_smoothing is for --pref_loss sigmoid, not {stage.pref_loss}; drop one of them")
    if settings.given.get("simpo_gamma") is not None and stage.pref_loss != "simpo":
        raise UserError(f"--simpo_gamma is for --pref_loss simpo, not {stage.pref_loss}; drop one of them")
    if stage.ref_model and stage.pref_loss in WITHOUT_REFERENCE:
        raise UserError(f"--pref_loss {stage.pref_loss} compares with no reference; drop --ref_model")
    _check_reference(stage.ref_model)
    if settings.method == LORA and settings.tuning.lora_dropout:
        settings.notices.append(
            "--stage dpo trains without dropout, so that policy and reference start out equal: --lora_dropout is only "
            "recorded in the adapter"
        )


def check_ppo(settings: Settings) -> None:
    """Refuses what --stage ppo cannot do.

    Args:
        settings: decided but for `training` and `checkpoint`, which may be None. Notices are added to it.

    Raises:
        UserError: for the first such value.
    """
    given = settings.given
    if settings.data.train_format != "multi-turn":
        raise UserError(f"--train_format {settings.data.train_format} belongs to --stage sft; drop it for ppo")
    _check_reward(settings)
    _check_sampling(settings)
    if given.get("deepspeed"):
        raise UserError("--deepspeed does not work with --stage ppo; drop it (several GPUs: torchrun alone)")
    if given.get("lr_scheduler_type") == "reduce_lr_on_plateau":
        raise UserError(
            "--lr_scheduler_type reduce_lr_on_plateau follows the validation loss, which --stage ppo does not have; "
            "use linear, cosine or constant"
        )
    _check_reference(settings.stage.ref_model)
    model = settings.model
    if settings.method == P_TUNING and not (model.ptuning_checkpoint or model.prefix_init_text):
        settings.notices.append(
            "behind a new random prefix a model talks nonsense, and PPO can only choose among what it says; start from "
            "a trained prefix (--ptuning_checkpoint, a result of --stage sft) or from a text (--prefix_init_text)"
        )


def _check_reference(folder: str | None) -> None:
    if folder and not (Path(folder) / "config.json").is_file():
        raise UserError(f"--ref_model {folder} is not a folder with a config.json; give a whole model")


def _check_reward(settings: Settings) -> None:
    from finetune_chatmodel_demo.training.stages.ppo_rewards import check_reward_function, check_reward_model

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
    if not sampling["temperature"] > 0:
        raise UserError(
            f"--temperature is {sampling['temperature']}; with ppo it must be above 0 (PPO learns from drawn replies)"
        )
    if sampling["top_p"] < 1 or sampling["top_k"] > 0:
        settings.notices.append(
            "--top_p and --top_k leave out unlikely tokens when replies are drawn, while ratio and KL are of the whole "
            "distribution; ppo's defaults, --top_p 1 --top_k 0, make the two agree"
        )


def sampling_of(settings: Settings) -> dict[str, Any]:
    """`temperature`, `top_p` and `top_k` of a rollout: those that were given, else the whole distribution."""
    return {
        name: getattr(settings.generation, name) if settings.given.get(name) is not None else default
        for name, default in SAMPLING_DEFAULTS.items()
    }
