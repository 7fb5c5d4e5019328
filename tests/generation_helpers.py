"""Small models for the tests of the generation room: one with random weights, one that follows a script."""

import itertools
import shutil
from pathlib import Path

import torch

from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM, load_model, save_prefix

PREFIX_LENGTH = 6


def small_config(vocabulary: int, **changes: object) -> ChatGLM3Config:
    values = {
        "num_layers": 2,
        "padded_vocab_size": vocabulary,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "kv_channels": 16,
        "num_attention_heads": 4,
        "multi_query_group_num": 2,
        "seq_length": 256,
        "add_qkv_bias": True,
    }
    return ChatGLM3Config(**(values | changes))


def save_model_folder(model: ChatGLM3ForCausalLM, folder: Path, tokenizer_folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / name, folder / name)
    return folder


def build_random_folder(folder: Path, tokenizer_folder: Path, vocabulary: int, seed: int = 0) -> Path:
    """A model whose greedy replies are arbitrary but clear-cut (logits far apart)."""
    torch.manual_seed(seed)
    model = ChatGLM3ForCausalLM(small_config(vocabulary))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.2)
    return save_model_folder(model, folder, tokenizer_folder)


def build_prefix_folder(folder: Path, model_folder: Path, *, seed: int = 1, **recorded: str | None) -> Path:
    """A random prefix for the model of `model_folder`, strong enough to change every reply."""
    torch.manual_seed(seed)
    model = load_model(model_folder, pre_seq_len=PREFIX_LENGTH, device="cpu")
    with torch.no_grad():
        model.prefix_encoder.embedding.weight.mul_(3)
    save_prefix(model, folder, **recorded)
    return folder


def build_scripted_model(vocabulary: int, scripts: list[list[int]]) -> ChatGLM3ForCausalLM:
    """A model whose next id depends on the last one alone: each script is a chain of ids.

    Attention and MLP add nothing, so the last hidden state is the id's embedding; the head's row of the successor is
    that embedding too, and random vectors of width 256 are nearly orthogonal.
    """
    torch.manual_seed(0)
    model = ChatGLM3ForCausalLM(small_config(vocabulary, hidden_size=256)).eval()
    successors = {a: b for script in scripts for a, b in itertools.pairwise(script)}
    assert len(successors) == sum(len(script) - 1 for script in scripts), "an id has two successors"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        embeddings = model.get_input_embeddings().weight
        embeddings.normal_(0, 1)
        model.lm_head.weight.zero_()
        for token_id, successor in successors.items():
            model.lm_head.weight[successor] += embeddings[token_id]
    return model


def greedy_without_cache(model: ChatGLM3ForCausalLM, prompt: list[int], stop_ids: list[int], count: int) -> list[int]:
    """The reference: the whole text through the model for each id."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits
        token_id = int(logits[0, -1].argmax())
        if token_id in stop_ids:
            break
        ids.append(token_id)
    return ids[len(prompt) :]
