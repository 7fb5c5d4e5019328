"""How many parameters a ChatGLM3 has, and how many each method trains, from the configuration alone.

`pytest tests/test_memory.py` compares the counts with real models.
"""

from collections.abc import Sequence

from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.weights import LINEAR_MODULES, OFFICIAL_PARTS


def linear_sizes(config: ChatGLM3Config) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear module of a layer."""
    queries, keys = config.num_attention_heads * config.kv_channels, config.multi_query_group_num * config.kv_channels
    hidden, inner = config.hidden_size, config.ffn_hidden_size
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_up_proj": (hidden, 2 * inner),
        "down_proj": (inner, hidden),
    }


def part_sizes(config: ChatGLM3Config) -> dict[str, int]:
    """Parameters of each part of a layer, and of the parts outside of the layers."""
    linear = linear_sizes(config)
    parts = {name: inputs * outputs for name, (inputs, outputs) in linear.items()}
    for name in ("q_proj", "k_proj", "v_proj"):
        parts[name] += linear[name][1] * bool(config.add_qkv_bias)
    embedding = config.padded_vocab_size * config.hidden_size
    return {
        **parts,
        "self_attn": sum(parts[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        "mlp": parts["gate_up_proj"] + parts["down_proj"],
        "input_layernorm": config.hidden_size,
        "post_attention_layernorm": config.hidden_size,
        "embed_tokens": embedding,
        "norm": config.hidden_size,
        "lm_head": embedding,
    }


def count_parameters(config: ChatGLM3Config) -> dict[str, int]:
    """Parameters of a ChatGLM3: `linear` of all layers' matrices, `other` of biases and norms, `embeddings` (both)."""
    sizes = linear_sizes(config)
    bias = sum(sizes[name][1] for name in ("q_proj", "k_proj", "v_proj")) * bool(config.add_qkv_bias)
    return {
        "linear": config.num_layers * sum(inputs * outputs for inputs, outputs in sizes.values()),
        "other": config.num_layers * (bias + 2 * config.hidden_size) + config.hidden_size,
        "embeddings": 2 * config.padded_vocab_size * config.hidden_size,
    }


def count_prefix(config: ChatGLM3Config, length: int, projection: bool) -> int:
    """Trained parameters of a prefix."""
    width, hidden = config.kv_size, config.hidden_size
    return length * width + ((width + 1) * hidden + (hidden + 1) * width if projection else 0)


def count_adapter(
    config: ChatGLM3Config, rank: int, target: str = "all", whole_modules: str = "", use_dora: bool = False
) -> int:
    """Trained parameters of a LoRA adapter.

    Args:
        config: of the base model.
        rank: of each pair of matrices.
        target: modules, as --lora_target takes them.
        whole_modules: modules that are trained in full beside it, as --additional_target takes them.
        use_dora: whether there is a magnitude for each output.
    """
    sizes = linear_sizes(config)
    count = 0
    for name in LINEAR_MODULES if target.strip() == "all" else _names(target):
        inputs, outputs = sizes.get(name, (0, 0))
        count += config.num_layers * (rank * (inputs + outputs) + outputs * use_dora)
    return count + _count_parts(config, _names(whole_modules), config.num_layers)


def count_frozen_rest(config: ChatGLM3Config, layers: int, modules: str = "all", extra_modules: str = "") -> int:
    """Trained parameters of method freeze.

    Args:
        config: of the base model.
        layers: how many are trained, at either end.
        modules: of these layers, as --freeze_trainable_modules takes them.
        extra_modules: outside of them, as --freeze_extra_modules takes them.
    """
    names = _names(modules)
    if modules.strip() == "all":
        names = ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]
    return _count_parts(config, names, abs(layers)) + _count_parts(config, _names(extra_modules), 1)


def _names(names: str) -> list[str]:
    given = filter(None, (name.strip() for name in names.split(",")))
    return [part for name in given for part in OFFICIAL_PARTS.get(name, (name,))]


def _count_parts(config: ChatGLM3Config, names: Sequence[str], layers: int) -> int:
    sizes = part_sizes(config)
    outside = ("embed_tokens", "norm", "lm_head")
    return sum(sizes.get(name, 0) * (1 if name in outside else layers) for name in names)
