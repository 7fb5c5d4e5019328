"""The flags of a run that are this project's own, in groups; `command_line` parses them, `deciding` decides.

Names and defaults are the original demo's for the prefix, and LLaMA-Factory's for methods and stages, unless a comment
gives another source.
"""

from dataclasses import dataclass, field
from typing import Literal

from finetune_chatmodel_demo.common.flags import check_range

GROUP_BY_LENGTH = "group_by_length"
# The values of --finetuning_type.
P_TUNING, LORA, FREEZE, FULL = "ptuning", "lora", "freeze", "full"


@dataclass
class ModelArguments:
    """Which model is trained, and what its prefix is like."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of the base model, e.g. THUDM/chatglm3-6b."}
    )
    ptuning_checkpoint: str | None = field(
        default=None, metadata={"help": "Prefix checkpoint to start from (a folder), instead of a random prefix."}
    )
    pre_seq_len: int | None = field(
        default=None, metadata={"help": "Prefix length; given, the method is ptuning. Default of ptuning: 128."}
    )
    prefix_projection: bool = field(
        default=False, metadata={"help": "Compute the prefix with an MLP instead of storing it."}
    )
    prefix_init_std: float = field(
        default=1.0, metadata={"help": "Standard deviation of a new prefix (1.0 is the original's)."}
    )
    prefix_init_text: str | None = field(
        default=None,
        metadata={"help": "A new prefix starts as the keys and values of this text (a UTF-8 file, or the words)."},
    )
    allow_other_base: bool = field(
        default=False,
        metadata={"help": "Train a prefix or adapter further on another base model than it was trained on."},
    )
    prefix_dropout: float | None = field(
        default=None,
        metadata={"help": "Dropout on the prefix while training; default: --ptuning_checkpoint's, else 0.1."},
    )
    quantization_bit: int | None = field(
        default=None,
        metadata={"help": "Load the base model in 4 or 8 bits (ptuning and lora).", "choices": [4, 8]},
    )

    def __post_init__(self) -> None:
        check_range(self, "[1, inf)", "pre_seq_len")
        check_range(self, "(0, inf)", "prefix_init_std")
        check_range(self, "[0, 1)", "prefix_dropout")


@dataclass
class MethodArguments:
    """Which parameters are trained."""

    finetuning_type: Literal["ptuning", "lora", "freeze", "full"] | None = field(
        default=None,
        metadata={"help": "What is trained; default: ptuning with --pre_seq_len or --ptuning_checkpoint, else full."},
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "LoRA adapter to start from (a folder), instead of a new one."}
    )
    create_new_adapter: bool = field(
        default=False, metadata={"help": "Merge --adapter_name_or_path into the base and train a new adapter on top."}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of a new LoRA adapter."})
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA's scale × rank; default: 2 × --lora_rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of a LoRA adapter."})
    lora_target: str = field(
        default="all",
        metadata={"help": "Modules with an adapter, a,b,c, in transformers' or the original's names; all: every one."},
    )
    additional_target: str | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter, a,b,c."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale LoRA by alpha / √rank (arXiv:2312.03732)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA (arXiv:2402.09353)."})
    freeze_trainable_layers: int = field(
        default=2, metadata={"help": "freeze: the last N layers are trained; a negative N: the first."}
    )
    freeze_trainable_modules: str = field(
        default="all", metadata={"help": "freeze: modules of these layers that are trained, a,b,c; all: every one."}
    )
    freeze_extra_modules: str | None = field(
        default=None, metadata={"help": "freeze: modules outside of the layers that are trained as well, a,b,c."}
    )

    def __post_init__(self) -> None:
        check_range(self, "[1, inf)", "lora_rank", "lora_alpha")
        check_range(self, "[0, 1)", "lora_dropout")


@dataclass
class StageArguments:
    """What the model learns from: text, answers, preferences or a reward."""

    stage: Literal["pt", "sft", "rm", "dpo", "ppo"] = field(
        default="sft",
        metadata={"help": "pt: text, sft: answers, rm: a reward model, dpo: preferences, ppo: a reward."},
    )
    ref_model: str | None = field(
        default=None,
        metadata={"help": "dpo, ppo: folder of the reference model; default: the model as it is before training."},
    )
    pref_beta: float = field(default=0.1, metadata={"help": "dpo: weight of the reference (arXiv:2305.18290)."})
    pref_loss: Literal["sigmoid", "hinge", "ipo", "orpo", "simpo"] = field(
        default="sigmoid", metadata={"help": "dpo: the loss; orpo and simpo do without a reference."}
    )
    pref_ftx: float = field(default=0.0, metadata={"help": "dpo: weight of the chosen answers' sft loss."})
    dpo_label_smoothing: float = field(
        default=0.0, metadata={"help": "dpo: share of preferences taken to be wrong, below 0.5."}
    )
    simpo_gamma: float = field(
        default=0.5, metadata={"help": "dpo: the margin that --pref_loss simpo wants (arXiv:2405.14734)."}
    )
    center_rewards_coefficient: float = field(
        default=0.0, metadata={"help": "rm: weight of a pair's squared sum of scores, e.g. 0.01 (arXiv:2312.09244)."}
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "ppo: result of --stage rm, a folder (a model, or an adapter)."}
    )
    reward_function: str | None = field(
        default=None, metadata={"help": "ppo: FILE.py:NAME, a function of prompts and answers, as the reward."}
    )
    ppo_epochs: int = field(default=4, metadata={"help": "ppo: how often the answers of a rollout are learned from."})
    ppo_buffer_size: int = field(
        default=1, metadata={"help": "ppo: optimizer batches in a rollout; its updates: this × --ppo_epochs."}
    )
    ppo_score_norm: bool = field(
        default=False, metadata={"help": "ppo: scores minus their running mean, over their running deviation."}
    )
    ppo_whiten_rewards: bool = field(
        default=False, metadata={"help": "ppo: scale the rewards of a rollout's tokens to variance 1."}
    )
    # The KL's values are those of OpenAI's code (arXiv:1909.08593) in TRL's first PPO; the rest is TRL's last PPO's.
    ppo_kl_coef: float = field(default=0.2, metadata={"help": "ppo: weight of the KL to the reference, at the start."})
    ppo_adaptive_kl: bool = field(
        default=True, metadata={"help": "ppo: move the weight until the KL is --ppo_target; False: keep it."}
    )
    ppo_target: float = field(default=6.0, metadata={"help": "ppo: wanted KL of an answer to the reference, in nats."})
    ppo_kl_horizon: float = field(
        default=10_000, metadata={"help": "ppo: answers in which the weight can move by a fifth."}
    )
    ppo_kl_estimator: Literal["k1", "k2", "k3"] = field(
        default="k1", metadata={"help": "ppo: the KL of a token: log p/q, its square / 2, or q/p - 1 - log q/p."}
    )
    ppo_gamma: float = field(default=1.0, metadata={"help": "ppo: discount of later rewards."})
    ppo_lam: float = field(default=0.95, metadata={"help": "ppo: λ of the advantages (arXiv:1506.02438)."})
    ppo_cliprange: float = field(default=0.2, metadata={"help": "ppo: how far the ratio of an update counts."})
    ppo_cliprange_value: float = field(default=0.2, metadata={"help": "ppo: how far the value of an update counts."})
    ppo_vf_coef: float = field(default=0.1, metadata={"help": "ppo: weight of the value function's loss."})
    ppo_value_lr: float = field(default=1e-3, metadata={"help": "ppo: learning rate of the value head."})
    ppo_missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "ppo: taken off the score of an answer that --max_new_tokens ended."}
    )

    def __post_init__(self) -> None:
        check_range(self, "[1, inf)", "ppo_epochs", "ppo_buffer_size")
        check_range(
            self,
            "(0, inf)",
            "pref_beta",
            "ppo_target",
            "ppo_kl_horizon",
            "ppo_cliprange",
            "ppo_cliprange_value",
            "ppo_value_lr",
        )
        check_range(
            self,
            "[0, inf)",
            "pref_ftx",
            "simpo_gamma",
            "center_rewards_coefficient",
            "ppo_kl_coef",
            "ppo_vf_coef",
            "ppo_missing_eos_penalty",
        )
        check_range(self, "[0, 0.5)", "dpo_label_smoothing")
        check_range(self, "(0, 1]", "ppo_gamma")
        check_range(self, "[0, 1]", "ppo_lam")


@dataclass
class GenerationArguments:
    """How --do_predict and ppo write answers."""

    max_new_tokens: int = field(default=512, metadata={"help": "Most tokens of an answer."})
    do_sample: bool = field(default=False, metadata={"help": "--do_predict: draw tokens; default: take the likeliest."})
    temperature: float = field(default=0.95, metadata={"help": "Of drawn tokens."})
    top_p: float = field(default=0.7, metadata={"help": "Draw from the likeliest tokens that share this probability."})
    top_k: int = field(default=50, metadata={"help": "Draw from this many tokens; 0: all."})

    def __post_init__(self) -> None:
        check_range(self, "[1, inf)", "max_new_tokens")
        check_range(self, "[0, inf)", "temperature", "top_k")
        check_range(self, "(0, 1]", "top_p")


@dataclass
class RunArguments:
    """What `TrainingArguments` does not have, or no longer."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start anew although --output_dir holds checkpoints of an earlier run; removes them."},
    )
    hash_checkpoints: bool = field(
        default=False,
        metadata={
            "help": "Hash files above 64 MiB of checkpoints too: every bit that differs is found when a run goes on, "
            "and all processes wait while a checkpoint is written and read."
        },
    )
    trust_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "I made the DeepSpeed checkpoint that the run goes on with: read it although it holds more than "
            "data, which may run code."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Read the data, show its table and what the run will need, and stop; writes nothing."},
    )
    replay: str | None = field(
        default=None,
        metadata={"help": "run_manifest.json of a run: checks that its first steps would be the same; trains nothing."},
    )
    plot_loss: bool = field(default=True, metadata={"help": "Draw the loss curve into --output_dir."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations in which --metric_for_best_model did not improve."},
    )
    early_stopping_threshold: float = field(default=0.0, metadata={"help": "What counts as an improvement."})
    eval_questions: int = field(
        default=0,
        metadata={
            "help": "Replies of the validation data that each evaluation lets the model write; eval_exact is the share "
            "that it writes exactly (--metric_for_best_model exact)."
        },
    )
    eval_questions_file: str | None = field(
        default=None,
        metadata={
            "help": "--eval_questions: ask these instead, against facts (of data_processing/question_builder.py), or "
            "those of a file of conversations with 'column' keys."
        },
    )
    overfit_check: int | None = field(
        default=None,
        metadata={"help": "Self-test instead of a run: train on N rows until their replies are reproduced exactly."},
    )

    def __post_init__(self) -> None:
        check_range(self, "[1, inf)", "early_stopping_patience", "overfit_check")
        check_range(self, "[0, inf)", "early_stopping_threshold", "eval_questions")
