"""A prefix that starts as a text: the keys and values that the base model computes for it.

A random prefix is noise that training has to get rid of first; one made from text is something that the model
can read from the beginning. Exercised by `finetune.py --pre_seq_len 64 --prefix_init_text "…"`.

Prefix keys are not rotated by their position, and the text behind the prefix counts from 0. A key is therefore stored
as the base model would rotate it at the positions -length to -1: rotary scores depend on the distance alone, so that
the model with this prefix computes for any text exactly what the base computes for that text behind the prefix's.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from finetune_chatmodel_demo.chatglm3.modeling import ChatGLM3ForCausalLM

START_TOKENS = ("[gMASK]", "sop")  # every text that the base model has seen began with these


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
def start_prefix_as(model: "ChatGLM3ForCausalLM", input_ids: Sequence[int]) -> None:
    """Overwrites the model's prefix with the keys and values of a text.

    Args:
        model: with a prefix of `len(input_ids)` positions that no MLP makes.
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
def keys_and_values(model: "ChatGLM3ForCausalLM", input_ids: Sequence[int]) -> torch.Tensor:
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
