"""The reference model of dpo and ppo: what the policy is compared with, without a second model where that is possible.

Exercise it with `pytest tests/test_dpo.py tests/test_ppo.py`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from finetune_chatmodel_demo.chatglm3.loading import load_model
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training.arguments import LORA, P_TUNING
from finetune_chatmodel_demo.training.methods import prepare_model, without_tuning
from finetune_chatmodel_demo.training.settings import Settings


class ReferenceModel:
    """The reference in one of three forms.

    A model of its own (--ref_model); the policy with its prefix or adapter switched off; or the policy with the values
    that its trained parameters had at the start, which needs a copy of those alone.
    """

    def __init__(
        self, model: nn.Module, *, is_own_model: bool = False, initial: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """
        Args:
            model: the policy's model, or the reference's own.
            is_own_model: whether it is the latter.
            initial: the trained parameters at the start; None: the prefix or adapter is switched off.
        """
        self.model = model
        self.is_own_model = is_own_model
        self.initial = None if initial is None else dict(initial)

    @contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        """Within this context the model that it gives computes as the reference. For use without gradients."""
        if self.is_own_model:
            yield self.model
        elif self.initial is None:
            with without_tuning(self.model):
                yield self.model
        else:
            self._swap()
            try:
                yield self.model
            finally:
                self._swap()

    def _swap(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self.initial:
                parameter.data, self.initial[name] = self.initial[name], parameter.data
        torch.clear_autocast_cache()  # autocast keeps half-precision copies by parameter, and would not see new values


Kind = TypeVar("Kind", bound=ReferenceModel)


def build_reference(model: nn.Module, settings: Settings, kind: type[Kind]) -> Kind:
    """The reference of a run: --ref_model, else the model as it was before its training began.

    A new prefix or adapter is switched off; dpo switches off a prefix that was trained before as well, so that its
    reference is always the base model. Everything else keeps a copy of the trained parameters as they were at the
    start; a resumed run reads them again.

    Args:
        model: the policy's model.
        settings: the run.
        kind: the class of the reference.

    Raises:
        UserError: when a model cannot be loaded.
    """
    if settings.stage.ref_model:
        try:
            own = load_model(
                settings.stage.ref_model,
                quantization_bit=settings.model.quantization_bit,
                dtype=getattr(torch, settings.precision),
                device=settings.training.device,
            )
        except (ValueError, OSError) as error:
            raise UserError(f"--ref_model: {error}") from error
        return kind(own.requires_grad_(False), is_own_model=True)
    if _is_base(settings):
        return kind(model)
    first = model if settings.checkpoint is None else prepare_model(replace(settings, checkpoint=None))
    return kind(model, initial=trained_values(first))


def _is_base(settings: Settings) -> bool:
    """Whether the reference is the base model, without the prefix or adapter that is trained."""
    if settings.method == P_TUNING:
        return settings.stage.stage == "dpo" or not settings.model.ptuning_checkpoint
    return settings.method == LORA and not settings.tuning.adapter_name_or_path


def describe_reference(settings: Settings) -> str:
    """The reference in words, for the table before the start."""
    if settings.stage.ref_model:
        return settings.stage.ref_model
    if _is_base(settings):
        return f"the base model, the {'prefix' if settings.method == P_TUNING else 'adapter'} off"
    start = settings.model.ptuning_checkpoint or settings.tuning.adapter_name_or_path
    return f"{start or settings.model.model_name_or_path}, a copy of what is trained, as it was at the start"


def trained_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters that are trained, by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def disable_dropout(model: nn.Module) -> None:
    """Switches all dropout off for good: prefix, adapter, attention.

    A probability has to be the same in every pass over the same parameters: in ppo the ratio would not start at 1
    (N details, arXiv:2403.17031), in dpo policy and reference would differ before anything was learned (its authors'
    code switches dropout off as well). Evaluation mode would do, but there is no gradient checkpointing in it.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if getattr(module, "attention_dropout", 0):
            module.attention_dropout = 0.0
