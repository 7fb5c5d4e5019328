"""Packing: several conversations share one row of tokens without seeing each other; each sees the prefix.

Their losses and gradients equal those of the conversations one by one (`pytest tests/test_packing.py`); what changes is
the size of the matrices. Positions start anew with every conversation (the caller's `position_ids`).
"""

from collections.abc import Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.glm.modeling_glm import repeat_kv

if TYPE_CHECKING:
    from finetune_chatmodel_demo.chatglm3.attention import Prefix


class Packing:
    """Where the conversations of a packed row lie.

    Attributes:
        lengths: tokens of each conversation, in the order of the row; their sum is the row's length.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        """
        Raises:
            ValueError: for a conversation without tokens.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"the lengths of a packed row's conversations are {list(lengths)}; each is at least 1")
        self.lengths = tuple(int(length) for length in lengths)
        self._block_mask: Any = None
        self._causal_masks: dict[tuple[int, int], torch.Tensor | None] = {}

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """(start, end) of each conversation."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return list(zip([0, *ends[:-1]], ends))

    def segments(self, device: torch.device) -> torch.Tensor:
        """(tokens,): which conversation each token belongs to."""
        return torch.repeat_interleave(torch.tensor(self.lengths, device=device))

    def is_visible(self, prefixes: int, prefix_length: int, device: torch.device) -> Any:
        """The mask as a function of (batch, head, query, key): True where a query may look.

        Keys are `prefixes` copies of the prefix, `prefix_length` positions each, and behind them the row. With one copy
        every conversation sees it; else conversation i sees copy i.
        """
        segments, offset = self.segments(device), prefixes * prefix_length

        def mask(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            text = (key - offset).clamp(min=0)
            is_own_text = (key >= offset) & (segments[text] == segments[query]) & (text <= query)
            is_prefix = key < offset
            if prefixes > 1:
                is_prefix = is_prefix & (key // prefix_length == segments[query])
            return is_prefix | is_own_text

        return mask

    def block_mask(self, prefixes: int, prefix_length: int, device: torch.device) -> Any:
        """FlexAttention's form of `is_visible`, made by the first layer and shared by the rest."""
        if self._block_mask is None:
            from torch.nn.attention.flex_attention import create_block_mask

            tokens = sum(self.lengths)
            mask = self.is_visible(prefixes, prefix_length, device)
            keys = tokens + prefixes * prefix_length
            self._block_mask = create_block_mask(mask, B=None, H=None, Q_LEN=tokens, KV_LEN=keys, device=str(device))
        return self._block_mask

    def causal_mask(self, queries: int, prefix_length: int, device: torch.device) -> torch.Tensor:
        """(queries, prefix_length + queries), True where a query may look: the prefix and the text up to itself."""
        shape = (queries, prefix_length)
        if shape not in self._causal_masks:
            mask = torch.ones(queries, prefix_length + queries, dtype=torch.bool, device=device)
            self._causal_masks[shape] = mask.tril_(prefix_length)
        return self._causal_masks[shape]


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    prefix: "Prefix | None",
    scaling: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention within each conversation of a packed row.

    Args:
        query: (1, heads, tokens, head_dim).
        key, value: (1, groups, tokens, head_dim).
        prefix: its `keys_values` (layers, 2, 1 or conversations, groups, length, head_dim).

    Returns:
        (1, tokens, heads, head_dim)

    Raises:
        ValueError: when the row's length is not that of the packing.
    """
    tokens = sum(packing.lengths)
    if query.shape[0] != 1 or query.shape[2] != tokens:
        raise ValueError(
            f"a packed row of {len(packing.lengths)} conversations has 1 × {tokens} tokens, got {query.shape[0]} × "
            f"{query.shape[2]}"
        )
    if query.is_cuda and dropout == 0:
        return _flex(module, query, key, value, packing, prefix, scaling)
    outputs = []
    for number, (start, end) in enumerate(packing.bounds):
        keys, values = key[:, :, start:end], value[:, :, start:end]
        mask = None
        if prefix is not None:
            keys, values = prefix.put_in_front_of(module.layer_idx, number, keys, values)
            mask = packing.causal_mask(end - start, prefix.length, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                repeat_kv(keys, module.num_key_value_groups),
                repeat_kv(values, module.num_key_value_groups),
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=scaling,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _flex(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    prefix: "Prefix | None",
    scaling: float | None,
) -> torch.Tensor:
    """One kernel for the whole row; blocks between different conversations are left out."""
    copies = length = 0
    if prefix is not None:
        copies, length = prefix.keys_values.shape[2], prefix.length
        own = prefix.keys_values[module.layer_idx].to(key.dtype)
        # (copies, groups, length, head_dim) → (1, groups, copies × length, head_dim)
        front = own.transpose(1, 2).reshape(2, 1, own.shape[2], copies * length, own.shape[4])
        key, value = torch.cat((front[0], key), dim=2), torch.cat((front[1], value), dim=2)
    output = _compiled_flex_attention()(
        query,
        key,
        value,
        block_mask=packing.block_mask(copies, length, query.device),
        scale=scaling,
        enable_gqa=module.num_key_value_groups > 1,
    )
    return output.transpose(1, 2).contiguous()


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
