"""Attention that sees a P-Tuning v2 prefix: keys and values that stand in front of every text.

The prefix reaches the layers as an argument of the attention function and not through the key-value cache, which
transformers drops under gradient checkpointing. While decoding, the cache itself holds the prefix (`PrefixedCache`),
so that no step has to put the two together again.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.models.glm.modeling_glm import eager_attention_forward, repeat_kv

from finetune_chatmodel_demo.chatglm3.packing import Packing, lower_right_mask, packed_attention

# transformers' name of an attention function → ours, which does the same and knows prefixes.
PREFIX_ATTENTION = {"sdpa": "sdpa_with_prefix", "eager": "eager_with_prefix"}


@dataclass
class Prefix:
    """What a forward pass tells every layer about the prefix.

    Args:
        length: prefix positions.
        keys_values: (layers, 2, batch or 1, groups, length, head_dim), or None where the cache holds them already.
        mask: the mask of this pass with the prefix columns, made by the first layer and shared by the rest.
    """

    length: int
    keys_values: torch.Tensor | None
    mask: Any = field(default=None, repr=False)

    def put_in_front(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value (batch, groups, tokens, head_dim) with the prefix of `layer` in front."""
        if self.keys_values is None:
            return key, value
        prefix = self.keys_values[layer].to(key.dtype).expand(-1, key.shape[0], -1, -1, -1)
        return torch.cat((prefix[0], key), dim=2), torch.cat((prefix[1], value), dim=2)

    def put_in_front_of(
        self, layer: int, conversation: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `put_in_front`, for one conversation of a packed row, which may have a prefix of its own (dropout)."""
        copies = self.keys_values.shape[2]
        prefix = self.keys_values[layer][:, conversation % copies, None].to(key.dtype)
        return torch.cat((prefix[0], key), dim=2), torch.cat((prefix[1], value), dim=2)

    def open_columns(self, mask: torch.Tensor) -> torch.Tensor:
        """`mask` (batch, 1, queries, tokens) with the prefix columns in front: True, or 0 where masks are added."""
        if self.mask is None:
            self.mask = F.pad(mask, (self.length, 0), value=True if mask.dtype == torch.bool else 0.0)
        return self.mask

    def causal_mask(self, queries: int, keys: int, device: torch.device) -> torch.Tensor:
        """ "Every query sees the prefix and the text up to itself": lower-right causal, (queries, keys)."""
        if self.mask is None:
            self.mask = lower_right_mask(queries, keys, device)
        return self.mask


def sdpa_with_prefix(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prefix: Prefix | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """PyTorch's fused attention, with `prefix` (if any) in front of the keys.

    Args:
        query: (batch, heads, queries, head_dim).
        key, value: (batch, groups, tokens, head_dim).
        attention_mask: True where a query may look, (batch, 1, queries, tokens); None: causal.
        packing: the conversations of a packed row, which do not see each other; takes the mask's place.

    Returns:
        (batch, queries, heads, head_dim), None.
    """
    if packing is not None:
        scale, dropout = kwargs.get("scaling"), kwargs.get("dropout", 0.0)
        return packed_attention(module, query, key, value, packing, prefix, scale, dropout), None
    if prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # Under autocast, embeddings in float32 make queries and keys of float32. Behind CUDA's mask object no autocast
    # would convert them, and there is no flash kernel for float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    key, value = prefix.put_in_front(module.layer_idx, key, value)
    if attention_mask is not None:
        mask = prefix.open_columns(attention_mask)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    if query.shape[2] == 1:
        # The heads of a group stand as the queries of its one key head. Where a step is short, on a CPU, this makes up
        # for the longer keys: with 8 heads, 278 keys take the time of 150 in the usual layout.
        batch, heads, _, channels = query.shape
        output = F.scaled_dot_product_attention(
            query.reshape(batch, key.shape[1], -1, channels),
            key,
            value,
            dropout_p=kwargs.get("dropout", 0.0),
            scale=kwargs.get("scaling"),
        )
        return output.reshape(batch, 1, heads, channels), None
    output = F.scaled_dot_product_attention(
        query,
        repeat_kv(key, module.num_key_value_groups),
        repeat_kv(value, module.num_key_value_groups),
        attn_mask=prefix.causal_mask(query.shape[2], key.shape[2], query.device),
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
    )
    return output.transpose(1, 2).contiguous(), None


def eager_with_prefix(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prefix: Prefix | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain matrix products, which also returns its weights; shapes as in `sdpa_with_prefix`."""
    if prefix is not None:
        key, value = prefix.put_in_front(module.layer_idx, key, value)
        if attention_mask is not None:
            attention_mask = prefix.open_columns(attention_mask)
    return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)


def register_prefix_attention() -> None:
    """Makes both functions, and the masks that they expect, known to transformers."""
    AttentionInterface.register(PREFIX_ATTENTION["sdpa"], sdpa_with_prefix)
    AttentionMaskInterface.register(PREFIX_ATTENTION["sdpa"], sdpa_mask)
    AttentionInterface.register(PREFIX_ATTENTION["eager"], eager_with_prefix)
    AttentionMaskInterface.register(PREFIX_ATTENTION["eager"], eager_mask)


class PrefixedLayer(DynamicLayer):
    """A layer of a growing cache that starts with a prefix and reports the length of the text alone."""

    def __init__(self, prefix_key: torch.Tensor, prefix_value: torch.Tensor) -> None:
        """
        Args:
            prefix_key, prefix_value: (1, groups, prefix length, head_dim).
        """
        super().__init__()
        self.prefix_key, self.prefix_value = prefix_key, prefix_value

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        rows = key_states.shape[0]
        self.keys = self.prefix_key.to(key_states).expand(rows, -1, -1, -1)
        self.values = self.prefix_value.to(value_states).expand(rows, -1, -1, -1)

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] - self.prefix_key.shape[-2] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def cache_with_prefix(cache: Cache | None, prefix: Prefix) -> Cache:
    """The cache of a decoding run, with the prefix in it; an empty one is filled in place.

    Raises:
        ValueError: for a cache that was filled without the prefix, or is of a kind that cannot hold one.
    """
    if cache is None:
        cache = DynamicCache()
    if cache.layers and isinstance(cache.layers[0], PrefixedLayer):
        return cache
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise ValueError(
            f"A P-Tuning prefix decodes with a DynamicCache, not with {type(cache).__name__} of "
            f"{sorted({type(layer).__name__ for layer in cache.layers})}. Leave cache_implementation unset."
        )
    if cache.get_seq_length():
        raise ValueError(
            f"The cache holds {cache.get_seq_length()} tokens that were computed without the prefix. "
            "Start with an empty cache after switching the prefix on."
        )
    cache.layers = [PrefixedLayer(layer[0], layer[1]) for layer in prefix.keys_values]
    return cache
