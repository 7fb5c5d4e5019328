"""The networks of PPO: the policy with its value head on one backbone, and the reference that it is held to.

Exercise it with `pytest tests/test_ppo.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from finetune_chatmodel_demo.training.stages.ppo_math import log_probs_and_entropy
from finetune_chatmodel_demo.training.stages.reference import ReferenceModel

# Reply positions whose logits exist at one time: 1,024 × 65,024 × 4 bytes = 254 MiB.
LOGITS_CHUNK = 1024


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


class PolicyWithValue(nn.Module):
    """A language model that also says how much reward is to come: a linear layer on its last hidden states.

    Attributes:
        model: ChatGLM3ForCausalLM, with or without PEFT's wrapper.
        value_head: (hidden) → 1 in float32; it starts at zero, so that the first advantages are the rewards alone.
    """

    def __init__(self, model: nn.Module, temperature: float) -> None:
        """
        Args:
            model: trained in place.
            temperature: that replies are drawn with; log-probabilities are of that distribution.
        """
        super().__init__()
        self.model = model
        self.temperature = temperature
        hidden_size = without_adapter_wrapper(model).config.hidden_size
        self.value_head = nn.Linear(hidden_size, 1, device=without_adapter_wrapper(model).device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self, input_ids: torch.Tensor, prompt_lengths: torch.Tensor, reply_lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            input_ids, prompt_lengths, reply_lengths: see `ReplyRows`.

        Returns:
            log_probs, entropies, values, each (B, T) in float32 and 0 at padding: of a reply's token, of the
            distribution it was drawn from, and of the text before it.
        """
        rows = ReplyRows(input_ids, prompt_lengths, reply_lengths)
        hidden = reply_states(self.model, rows)
        log_probs, entropies = reply_log_probs(self.model, hidden, rows, self.temperature)
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.value_head(hidden.float()).squeeze(-1)
        return log_probs, entropies, spread(values, rows.mask)


def spread(flat: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values (N,) at the places of `mask` (B, T) that are True, 0 elsewhere. Returns (B, T)."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def reply_states(model: nn.Module, rows: ReplyRows) -> torch.Tensor:
    """Last hidden states from which the replies' tokens are predicted: (N, hidden), N tokens of all replies."""
    hidden = without_adapter_wrapper(model).model(input_ids=rows.input_ids, use_cache=False).last_hidden_state
    row, position = rows.mask.nonzero(as_tuple=True)
    return hidden[row, rows.prompt_lengths[row] - 1 + position]


def reply_log_probs(
    model: nn.Module, hidden: torch.Tensor, rows: ReplyRows, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies, (B, T) each, from `hidden` (N, hidden) of `reply_states`; logits in chunks."""
    mask, head = rows.mask, without_adapter_wrapper(model).lm_head
    row, position = mask.nonzero(as_tuple=True)
    targets = rows.input_ids[row, rows.prompt_lengths[row] + position]

    def one_chunk(states: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return log_probs_and_entropy(head(states), ids, temperature)

    chunks = list(zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK)))
    if len(chunks) > 1 and torch.is_grad_enabled():
        parts = [checkpoint(one_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        parts = [one_chunk(*chunk) for chunk in chunks]
    log_probs, entropies = (torch.cat(column) for column in zip(*parts))
    return spread(log_probs, mask), spread(entropies, mask)


class Reference(ReferenceModel):
    """The model that the policy must not move far from."""

    @torch.no_grad()
    def log_probs(self, rows: ReplyRows, temperature: float) -> torch.Tensor:
        """Log-probabilities of the replies' tokens, (B, T), 0 at padding."""
        with self.in_place() as model:
            return reply_log_probs(model, reply_states(model, rows), rows, temperature)[0]
