"""Attention that sees a P-Tuning v2 prefix, over rows of one conversation or of several.

In a packed row several conversations share one row of tokens without seeing each other; each sees the prefix. Their
losses and gradients equal those of the conversations one by one; what changes is the size of the matrices. Positions
start anew with every conversation (the caller's `position_ids`). On a GPU one FlexAttention kernel computes the whole
row. Where that does not work, and on a CPU, the conversations are computed one after the other.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.models.glm.modeling_glm import eager_attention_forward, repeat_kv

from finetune_chatmodel_demo.chatglm3.prefix import Prefix, lower_right_mask

logger = logging.getLogger(__name__)

# transformers' name of an attention function → ours, which does the same and knows prefixes.
PREFIX_ATTENTION = {"sdpa": "sdpa_with_prefix", "eager": "eager_with_prefix"}
BLOCK = 128  # queries, and keys, that FlexAttention computes or leaves out together
# In 2.6 compiled backward passes fail (github.com/pytorch/pytorch/issues/146260), and so do dynamic shapes (147756).
FIRST_FLEX_VERSION = "2.7"
# The second differs in every length, so that it is compiled for all lengths that come.
TRIAL_ROWS = ((150, 100), (300, 90, 20))


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
        self._causal_masks: dict[tuple[int, int], Any] = {}

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """(start, end) of each conversation."""
        ends = list(accumulate(self.lengths))
        return list(zip([0, *ends[:-1]], ends))

    def segments(self, device: torch.device) -> torch.Tensor:
        """(tokens,): which conversation each token belongs to."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.repeat_interleave(lengths, output_size=sum(self.lengths))

    def is_visible(self, prefixes: int, prefix_length: int, device: torch.device) -> Any:
        """The mask as a function of (batch, head, query, key): True where a query may look.

        Keys are `prefixes` copies of the prefix, `prefix_length` positions each, and behind them the row. With one copy
        every conversation sees it; else conversation i sees copy i.
        """
        # The function reads tensors alone: a number among them would be compiled into the kernel, for this row only.
        segments = self.segments(device)
        everyone, before_all = -1, -1
        owners = torch.arange(prefixes, device=device).repeat_interleave(prefix_length)
        owners = torch.cat((owners if prefixes > 1 else torch.full_like(owners, everyone), segments))
        places = torch.arange(len(segments), device=device)
        places = torch.cat((places.new_full((prefixes * prefix_length,), before_all), places))

        def mask(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return ((owners[key] == segments[query]) | (owners[key] < 0)) & (places[key] <= query)

        return mask

    def block_mask(self, prefixes: int, prefix_length: int, device: torch.device) -> Any:
        """FlexAttention's form of `is_visible`, made by the first layer and shared by the rest."""
        if self._block_mask is None:
            from torch.nn.attention.flex_attention import BlockMask

            is_full, is_partial = self._count_blocks(prefixes, prefix_length, device)
            tokens = sum(self.lengths)
            self._block_mask = BlockMask.from_kv_blocks(
                *_list_blocks(is_partial),
                *_list_blocks(is_full),
                BLOCK_SIZE=BLOCK,
                mask_mod=self.is_visible(prefixes, prefix_length, device),
                seq_lengths=(tokens, tokens + prefixes * prefix_length),
            )
        return self._block_mask

    def _count_blocks(
        self, prefixes: int, prefix_length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(query blocks, key blocks) twice: True where all of a block is visible, and where some of it is.

        `create_block_mask` finds the same from a mask of all queries and keys: 342 MiB for 8,192 tokens behind 50
        copies of a prefix of 128.
        """
        tokens, offset = sum(self.lengths), prefixes * prefix_length
        segments, place = self.segments(device), torch.arange(tokens, device=device)
        starts = torch.tensor([start for start, _ in self.bounds], device=device)[segments]
        copy = segments * prefix_length if prefixes > 1 else torch.zeros_like(segments)
        block = torch.arange(0, offset + tokens, BLOCK, device=device)

        def overlap(first: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
            """(tokens, key blocks): keys of each block that are among those of a query."""
            return (end[:, None].minimum(block + BLOCK) - first[:, None].maximum(block)).clamp(min=0)

        seen = overlap(copy, copy + prefix_length) + overlap(offset + starts, offset + place + 1)
        seen = F.pad(seen, (0, 0, 0, -tokens % BLOCK)).view(-1, BLOCK, len(block))
        is_full = seen.amin(dim=1) == BLOCK
        return is_full, (seen.amax(dim=1) > 0) & ~is_full

    def causal_mask(self, queries: int, prefix_length: int, device: torch.device) -> torch.Tensor:
        """The prefix and the text up to itself, (queries, prefix_length + queries); see `lower_right_mask`."""
        shape = (queries, prefix_length)
        if shape not in self._causal_masks:
            self._causal_masks[shape] = lower_right_mask(queries, prefix_length + queries, device)
        return self._causal_masks[shape]


def _list_blocks(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of each row of (query blocks, key blocks) are chosen, and all numbers, the chosen ones first."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32)[None, None], order.int()[None, None]


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


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    prefix: Prefix | None,
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
    # In autocast, rotations in float32 (where the embeddings are) leave the values behind in half precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if dropout == 0 and uses_flex(query, key, scaling):
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
    prefix: Prefix | None,
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
    output = _attend(query, key, value, packing.block_mask(copies, length, query.device), scaling)
    return output.transpose(1, 2).contiguous()


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_mask: Any, scaling: float | None
) -> torch.Tensor:
    is_grouped = query.shape[1] > key.shape[1]
    return _compiled_flex_attention()(query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=is_grouped)


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # After too many compilations PyTorch would go on, without a word, with a version that writes out all scores;
    # `fullgraph` makes that an error. A test counts the compilations.
    return torch.compile(flex_attention, fullgraph=True)


def uses_flex(query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> bool:
    """Whether one FlexAttention kernel computes packed rows of such tensors."""
    if not query.is_cuda:  # on a CPU it has no backward pass
        return False
    in_autocast = torch.is_autocast_enabled(query.device.type)
    return _works_in_flex(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], scaling, in_autocast)


@cache
def _works_in_flex(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    groups: int,
    channels: int,
    scaling: float | None,
    in_autocast: bool,
) -> bool:
    """Whether FlexAttention computes such tensors, forward and backward; tried once, on short rows.

    It needs Triton, a C compiler, at least 16 channels, and a GPU with enough shared memory for them.
    """
    if torch.__version__ < FIRST_FLEX_VERSION:
        return False

    def attempt(lengths: tuple[int, ...]) -> None:
        packing, tokens, copies, length = Packing(lengths), sum(lengths), len(lengths), 24
        query, key, value = (
            torch.zeros(1, count, positions, channels, device=device, dtype=dtype, requires_grad=True)
            for count, positions in ((heads, tokens), *[(groups, tokens + copies * length)] * 2)
        )
        half = torch.autocast(device.type, dtype=dtype if in_autocast else None, enabled=in_autocast)
        with torch.cuda.device(device if device.type == "cuda" else -1), half:  # threads begin on the first GPU
            _attend(query, key, value, packing.block_mask(copies, length, device), scaling).sum().backward()

    try:
        # In a thread of its own: gradient checkpointing would count these tensors among the layer's.
        with ThreadPoolExecutor(1) as threads:
            for lengths in TRIAL_ROWS:
                threads.submit(attempt, lengths).result()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever is missing or does not fit, there is another way
        reason = str(error).strip().partition("\n")[0][:300]
        logger.warning(
            "packed rows are computed conversation by conversation, which is slower: FlexAttention fails here (%s: %s)",
            type(error).__name__,
            reason,
        )
        return False
    return True
