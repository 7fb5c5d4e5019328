"""Log-probabilities of replies, and the reference model of dpo and ppo that they are compared with.

There is no second model where the policy can be the reference itself: with its prefix or adapter off, or with the
values that its trained parameters had at the start.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from finetune_chatmodel_demo.chatglm3.loading import load_model
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training.arguments import LORA, P_TUNING
from finetune_chatmodel_demo.training.methods import prepare_model, without_tuning
from finetune_chatmodel_demo.training.settings import Settings

# Reply positions whose logits exist at one time: 1,024 × 65,024 × 4 bytes = 254 MiB.
LOGITS_CHUNK = 1024

# Log-probabilities


@dataclass(frozen=True)
class ReplyRows:
    """Prompts with their replies, B rows.

    Attributes:
        input_ids: (B, L), prompt and reply without a gap, then padding on the right; so no mask is needed.
        prompt_lengths: (B,).
        reply_lengths: (B,), at least 1 each; the longest is T.
    """

    input_ids: torch.Tensor
    prompt_lengths: torch.Tensor
    reply_lengths: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """(B, T), True where there is a token of the reply."""
        positions = torch.arange(int(self.reply_lengths.max()), device=self.reply_lengths.device)
        return positions[None] < self.reply_lengths[:, None]


def build_rows(prompts: list[list[int]], replies: list[list[int]], pad_token_id: int, device: Any) -> ReplyRows:
    """Puts each reply behind its prompt."""
    rows = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
    width = max(map(len, rows))
    return ReplyRows(
        input_ids=torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows], device=device),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts], device=device),
        reply_lengths=torch.tensor([len(reply) for reply in replies], device=device),
    )


def without_adapter_wrapper(model: nn.Module) -> nn.Module:
    """The ChatGLM3 inside PEFT's wrapper, with the adapter in its layers; any other model is returned as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def last_hidden_states(model: nn.Module, rows: ReplyRows) -> torch.Tensor:
    """(B, L, hidden)"""
    return without_adapter_wrapper(model).model(input_ids=rows.input_ids, use_cache=False).last_hidden_state


def reply_states(hidden: torch.Tensor, rows: ReplyRows) -> torch.Tensor:
    """Of `hidden` (B, L, hidden) those from which the replies' tokens are predicted: (N, hidden), N tokens in all."""
    row, position = rows.mask.nonzero(as_tuple=True)
    return hidden[row, rows.prompt_lengths[row] - 1 + position]


def reply_log_probs(
    model: nn.Module, states: torch.Tensor, rows: ReplyRows, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the replies' tokens and entropies, (B, T) each in float32, 0 at padding.

    Args:
        model: its head computes the logits, in chunks.
        states: (N, hidden), from `reply_states`.
        rows: the replies.
        temperature: see `log_probs_and_entropy`.
    """
    mask, head = rows.mask, without_adapter_wrapper(model).lm_head
    row, position = mask.nonzero(as_tuple=True)
    targets = rows.input_ids[row, rows.prompt_lengths[row] + position]

    def one_chunk(states: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return log_probs_and_entropy(head(states), ids, temperature)

    chunks = list(zip(states.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK)))
    if len(chunks) > 1 and torch.is_grad_enabled():
        parts = [checkpoint(one_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        parts = [one_chunk(*chunk) for chunk in chunks]
    log_probs, entropies = (torch.cat(column) for column in zip(*parts))
    return spread(log_probs, mask), spread(entropies, mask)


def log_probs_and_entropy(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each id, and the entropy of the distribution that it was drawn from, at a temperature.

    Args:
        logits: (N, vocabulary); computed with in float32.
        ids: (N,).
        temperature: divides the logits: the policy is the distribution that replies are drawn from (arXiv:2403.17031).

    Returns:
        (N,), (N,): log softmax(logits / temperature)[id], and -Σ p log p in nats, into which no gradient flows.
    """
    log_probs = F.log_softmax(logits.float() / temperature, dim=-1)
    constant = log_probs.detach()
    entropy = -(constant.exp() * constant).sum(dim=-1)
    return log_probs.gather(-1, ids[:, None]).squeeze(-1), entropy


def spread(flat: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values (N,) at the places of `mask` (B, T) that are True, 0 elsewhere. Returns (B, T)."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


# The reference


class Reference:
    """The model that the policy is compared with, in one of three forms.

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

    @torch.no_grad()
    def log_probs(self, rows: ReplyRows, temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities of the replies' tokens, (B, T), 0 at padding."""
        with self._in_place() as model:
            states = reply_states(last_hidden_states(model, rows), rows)
            return reply_log_probs(model, states, rows, temperature)[0]

    @contextmanager
    def _in_place(self) -> Iterator[nn.Module]:
        """Within this context the model that it gives computes as the reference."""
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


def build_reference(model: nn.Module, settings: Settings) -> Reference:
    """The reference of a run: --ref_model, else the model as it was before its training began.

    A new prefix or adapter is switched off; dpo switches off a prefix that was trained before as well, so that its
    reference is always the base model. Everything else keeps a copy of the trained parameters as they were at the
    start; a resumed run reads them again.

    Args:
        model: the policy's model.
        settings: the run.

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
        return Reference(own.requires_grad_(False), is_own_model=True)
    if _is_base(settings):
        return Reference(model)
    first = model if settings.checkpoint is None else prepare_model(replace(settings, checkpoint=None))
    trained = {name: value.detach().clone() for name, value in first.named_parameters() if value.requires_grad}
    return Reference(model, initial=trained)


def _is_base(settings: Settings) -> bool:
    """Whether the reference is the base model, without the prefix or adapter that is trained."""
    if settings.method == P_TUNING:
        return settings.stage.stage == "dpo" or not settings.model.ptuning_checkpoint
    return settings.method == LORA and not settings.continued_adapter


def describe_reference(settings: Settings) -> str:
    """The reference in words, for the table before the start."""
    if settings.stage.ref_model:
        return settings.stage.ref_model
    if _is_base(settings):
        return f"the base model, the {'prefix' if settings.method == P_TUNING else 'adapter'} off"
    start = settings.model.ptuning_checkpoint or settings.continued_adapter
    return f"{start or settings.model.model_name_or_path}, a copy of what is trained, as it was at the start"


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
