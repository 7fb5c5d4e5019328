"""The flags of a run that are this project's own, in groups; `command_line` parses them, `settings` decides.

Names and defaults are the original demo's for the prefix, and LLaMA-Factory's for methods and stages, unless a comment
gives another source.
"""

from dataclasses import dataclass, field
from typing import Literal

GROUP_BY_LENGTH = "group_by_length"


class SettingsError(ValueError):
    """The settings of a run contradict each other or the files that they name."""


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
    quantization_bit: int | None = field(
        default=None,
        metadata={"help": "Load the base model in 4 or 8 bits (ptuning and lora).", "choices": [4, 8]},
    )


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
    pref_loss: Literal["sigmoid", "hinge", "ipo"] = field(default="sigmoid", metadata={"help": "dpo: the loss."})
    pref_ftx: float = field(default=0.0, metadata={"help": "dpo: weight of the chosen answers' sft loss."})
    dpo_label_smoothing: float = field(
        default=0.0, metadata={"help": "dpo: share of preferences taken to be wrong, below 0.5."}
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "ppo: result of --stage rm, a folder (a model, or an adapter)."}
    )
    reward_function: str | None = field(
        default=None, metadata={"help": "ppo: FILE.py:NAME, a function of prompts and answers, as the reward."}
    )


@dataclass
class GenerationArguments:
    """How --do_predict and ppo write answers."""

    max_new_tokens: int = field(default=512, metadata={"help": "Most tokens of an answer."})
    do_sample: bool = field(default=False, metadata={"help": "--do_predict: draw tokens; default: take the likeliest."})
    temperature: float = field(default=0.95, metadata={"help": "Of drawn tokens."})
    top_p: float = field(default=0.7, metadata={"help": "Draw from the likeliest tokens that share this probability."})
    top_k: int = field(default=50, metadata={"help": "Draw from this many tokens; 0: all."})


@dataclass
class RunArguments:
    """What `TrainingArguments` does not have, or no longer."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start anew although --output_dir holds checkpoints of an earlier run; removes them."},
    )
    plot_loss: bool = field(default=True, metadata={"help": "Draw the loss curve into --output_dir."})
