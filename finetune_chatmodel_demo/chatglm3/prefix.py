"""The P-Tuning v2 prefix: trainable keys and values for every layer (Liu et al., 2021, arXiv:2110.07602).

The conventions are those of the original ChatGLM code, on which checkpoints of its fine-tuning demo depend: one
embedding row is (layers × 2, groups, channels) with keys and values alternating by layer, prefix keys are not rotated,
the text's positions start at 0 behind the prefix, and dropout of 0.1 falls on the prefix while training.

It reaches the layers as an argument of the attention function (`Prefix`) and not through the key-value cache, which
transformers drops under gradient checkpointing. While decoding, the cache itself holds it (`cache_with_prefix`), so
that no step has to put the two together again.

A random prefix is noise that training has to get rid of first; one that starts as a text (`start_prefix_as`) is
something that the model can read from the beginning. As prefix keys are not rotated, a key is then stored as the base
model would rotate it at the positions -length to -1: rotary scores depend on the distance alone, so that the model with
this prefix computes for any text exactly what the base computes for that text behind the prefix's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config

PREFIX_DROPOUT = 0.1
PREFIX_INIT_STD = 1.0
START_TOKENS = ("[gMASK]", "sop")  # every text that the base model has seen began with these


class PrefixEmbedding(nn.Embedding):
    """One row for each prefix position; a class of its own because it starts wider than a word embedding."""


class PrefixEncoder(nn.Module):
    """Holds the parameters of a prefix and computes its keys and values.

    Without projection the embedding is the prefix itself. With projection an MLP (Linear, Tanh, Linear) computes it
    from the embedding; all of it is trained.
    """

    def __init__(self, config: ChatGLM3Config) -> None:
        """
        Args:
            config: its `pre_seq_len` and `prefix_projection` say which prefix; the rest says for which model.
        """
        super().__init__()
        assert config.pre_seq_len, "a prefix encoder needs config.pre_seq_len"
        self.shape = (config.num_layers, 2, config.multi_query_group_num, config.kv_channels)
        self.embedding = PrefixEmbedding(config.pre_seq_len, config.kv_size)
        self.trans = None
        if config.prefix_projection:
            self.trans = nn.Sequential(
                nn.Linear(config.kv_size, config.hidden_size),
                nn.Tanh(),
                nn.Linear(config.hidden_size, config.kv_size),
            )
        self.dropout = nn.Dropout(PREFIX_DROPOUT)

    @property
    def length(self) -> int:
        """Prefix positions."""
        return self.embedding.num_embeddings

    @torch.no_grad()
    def reset_parameters(self, std: float = PREFIX_INIT_STD) -> None:
        """Draws the prefix anew: N(0, std²) for the embedding (upstream: std 1), PyTorch's default for the MLP."""
        nn.init.normal_(self.embedding.weight, std=std)
        for module in self.trans or ():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def forward(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """
        Args:
            rows: rows of the batch.
            dtype: of the model's activations.

        Returns:
            (layers, 2, rows or 1, groups, prefix length, head_dim); index 0 of the second axis is the key, 1 the value.
            While dropout acts, every row has its own; else one prefix serves all rows.
        """
        positions = torch.arange(self.length, device=self.embedding.weight.device)
        prefix = self.embedding(positions)
        if self.trans is not None:
            prefix = self.trans(prefix)
        prefix = prefix.to(dtype).view(1, self.length, *self.shape)
        if self.training and self.dropout.p > 0:
            prefix = self.dropout(prefix.expand(rows, *prefix.shape[1:]))
        return prefix.permute(2, 3, 0, 4, 1, 5)


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


def lower_right_mask(queries: int, keys: int, device: torch.device) -> Any:
    """(queries, keys), True where a query may look: the last query sees all keys, each one before it one less.

    On CUDA an object that picks a fused kernel; elsewhere it would be written out again in every layer.
    """
    if device.type == "cuda":
        return causal_lower_right(queries, keys)
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)


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


def encode_start(tokenizer: Any, text: str, length: int) -> list[int]:
    """Returns `length` ids: the two that start a text, then the text's, repeated or cut.

    Raises:
        ValueError: the text has no token.
    """
    ids = tokenizer.encode_text(text)
    if not ids:
        raise ValueError("the text that the prefix shall start as is empty; give some words")
    start = [tokenizer.get_command(token) for token in START_TOKENS]
    repeated = ids * -(-length // len(ids))
    return (start + repeated)[:length]


@torch.no_grad()
def start_prefix_as(model: nn.Module, input_ids: Sequence[int]) -> None:
    """Overwrites the model's prefix with the keys and values of a text.

    Args:
        model: ChatGLM3ForCausalLM with a prefix of `len(input_ids)` positions that no MLP makes.
        input_ids: from `encode_start`.

    Raises:
        ValueError: the model has no prefix, one with projection, or one of another length.
    """
    encoder = model.prefix_encoder
    if encoder is None or encoder.trans is not None:
        raise ValueError("only a prefix without projection can start as a text: an MLP computes the other kind")
    if encoder.length != len(input_ids):
        raise ValueError(f"the prefix has {encoder.length} positions, and the text {len(input_ids)} tokens")
    encoder.embedding.weight.copy_(keys_and_values(model, input_ids))


@torch.no_grad()
def keys_and_values(model: nn.Module, input_ids: Sequence[int]) -> torch.Tensor:
    """Returns (tokens, layers × 2 × groups × channels), the layout of a prefix's rows, in float32.

    Keys are rotated to the positions -tokens to -1. The model's own prefix, if any, is left out.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([list(input_ids)], device=device)
    positions = torch.arange(-ids.shape[1], 0, device=device)[None]
    was_training = model.training
    model.eval()
    with model.prefix_disabled():
        cache = model.model(input_ids=ids, position_ids=positions, use_cache=True).past_key_values
    model.train(was_training)
    layers = [torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]
    # (layers, 2, groups, tokens, channels) → (tokens, layers, 2, groups, channels)
    return torch.stack(layers).permute(3, 0, 1, 2, 4).flatten(1).float()
