"""What a run will do: its flags in groups, and what follows from them. `deciding` fills it in."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments

from finetune_chatmodel_demo.conversation.data_arguments import DataArguments
from finetune_chatmodel_demo.training.arguments import (
    FREEZE,
    FULL,
    LORA,
    P_TUNING,
    GenerationArguments,
    MethodArguments,
    ModelArguments,
    RunArguments,
    StageArguments,
)

METHOD_TITLES = {
    P_TUNING: "P-Tuning v2",
    LORA: "LoRA",
    FREEZE: "some layers (freeze)",
    FULL: "all parameters",
}
DEFAULT_PRE_SEQ_LEN = 128  # the original's finetune_pt*.sh
# ptuning and full: the original's finetune_pt*.sh and finetune_ds*.sh. lora, freeze: LLaMA-Factory's examples.
DEFAULT_LEARNING_RATE = {P_TUNING: 2e-2, LORA: 1e-4, FREEZE: 1e-4, FULL: 1e-4}
# The stages beside pt and sft. lora, freeze: LLaMA-Factory's examples of LoRA. full: InstructGPT's 6B reward model
# (arXiv:2203.02155, C.2), and DPO's paper (arXiv:2305.18290, B). A prefix in dpo: measured on THUDM/chatglm3-tiny,
# share of held-out pairs learned in 60 steps of 16: 1e-3 58%, 3e-3 76%, 1e-2 91%, 3e-2 94%.
STAGE_LEARNING_RATE = {
    "rm": {LORA: 1e-4, FREEZE: 1e-4, FULL: 9e-6},
    "dpo": {P_TUNING: 1e-2, LORA: 5e-6, FREEZE: 5e-6, FULL: 1e-6},
    "ppo": {P_TUNING: 2e-3, LORA: 1e-5, FREEZE: 1e-5, FULL: 1e-5},
}


def trains(given: dict[str, object]) -> bool:
    """Commands without any of --do_train, --do_eval and --do_predict train, as the original demo's do."""
    return bool(given.get("do_train") or not (given.get("do_eval") or given.get("do_predict")))


def choose_policy(given: dict[str, object], is_cuda: bool) -> str:
    """The policy of gradient checkpointing: none, mlp or full; on a GPU activations are recomputed by default."""
    wanted = given.get("gradient_checkpointing", given.get("activation_checkpointing"))
    wanted = is_cuda if wanted is None else wanted
    return "mlp" if wanted == "mlp" else "full" if wanted else "none"


def choose_precision(given: dict[str, object], is_cuda: bool, has_bf16: bool = True) -> str:
    """What the model computes in: by --bf16 and --fp16, else half precision on a GPU."""
    if "bf16" in given or "fp16" in given:
        return "bfloat16" if given.get("bf16") else "float16" if given.get("fp16") else "float32"
    return "float32" if not is_cuda else "bfloat16" if has_bf16 else "float16"


@dataclass(frozen=True)
class Settings:
    """A run, decided.

    While `deciding` is at work, `training` and `checkpoint` are None.
    """

    model: ModelArguments
    tuning: MethodArguments
    stage: StageArguments
    data: DataArguments
    generation: GenerationArguments
    training: TrainingArguments
    run: RunArguments
    method: str  # P_TUNING, LORA, FREEZE or FULL
    checkpoint: Path | None  # to resume from
    given: dict[str, object]  # the options that were given
    notices: list[str]  # told at the start

    @property
    def method_title(self) -> str:
        """The method in words."""
        return METHOD_TITLES[self.method]

    @property
    def pre_seq_len(self) -> int | None:
        """Length of a new prefix, or what an existing one must have; None: no prefix, or a length of its own."""
        if self.method != P_TUNING or self.model.pre_seq_len or self.checkpoint or self.model.ptuning_checkpoint:
            return self.model.pre_seq_len
        return DEFAULT_PRE_SEQ_LEN

    @property
    def continued_adapter(self) -> str | None:
        """The adapter that is trained on; None: a new one."""
        return None if self.tuning.create_new_adapter else self.tuning.adapter_name_or_path

    @property
    def merged_adapter(self) -> str | None:
        """The adapter that is merged into the base before a new one is trained."""
        return self.tuning.adapter_name_or_path if self.tuning.create_new_adapter else None

    @property
    def prompt_format(self) -> str:
        """How conversations become text, as checkpoints record it."""
        if self.data.template == "chatglm3":
            return self.data.train_format
        return self.data.template

    @property
    def does_train(self) -> bool:
        """Whether anything is trained; see `trains`."""
        return trains(self.given)

    @property
    def does_evaluate(self) -> bool:
        """Whether the validation loss is computed: after training, or where it was asked for."""
        return bool(self.does_train or self.given.get("do_eval"))

    @property
    def does_predict(self) -> bool:
        """Whether the validation data is answered and the answers are scored."""
        return bool(self.given.get("do_predict"))

    @property
    def has_validation(self) -> bool:
        """Whether there is something to validate on; where nothing is trained, the training data is."""
        is_named = self.data.validation_file or self.data.eval_dataset or self.data.val_size
        return bool(is_named or not self.does_train)

    @property
    def recomputes_mlp_only(self) -> bool:
        """Whether the policy of gradient checkpointing is "mlp"."""
        return choose_policy(self.given, is_cuda=False) == "mlp"

    @property
    def compiles_elementwise(self) -> bool:
        """Whether torch.compile fuses the element-wise parts of the layers."""
        return bool(self.given.get("torch_compile"))

    @property
    def usual_learning_rate(self) -> float:
        """The learning rate of a run that names none."""
        return STAGE_LEARNING_RATE.get(self.stage.stage, DEFAULT_LEARNING_RATE)[self.method]

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
