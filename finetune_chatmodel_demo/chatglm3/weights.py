"""How official ChatGLM weights map onto transformers' Glm modules, in both directions.

transformers applies the mapping while it loads and reverts it while it saves, so folders of the official layout go in
and out without a copy of the whole model in memory.
"""

import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.common.errors import UserError

# Official name of a module → its name here.
OFFICIAL_NAMES = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.layers": "model.layers",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
    "transformer.prefix_encoder": "model.prefix_encoder",
    "transformer.rotary_pos_emb": "model.rotary_emb",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
    "classifier_head": "score",
}
# The one official module that is three here.
FUSED_MODULE = "self_attention.query_key_value"
SPLIT_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Linear modules of a decoder layer, in the order of their computation.
LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
# What flags call modules: the original code's names, which published commands use, → the names here.
OFFICIAL_MODULES = {
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "dense": ("o_proj",),
    "dense_h_to_4h": ("gate_up_proj",),
    "dense_4h_to_h": ("down_proj",),
}
OFFICIAL_PARTS = {
    **OFFICIAL_MODULES,
    "self_attention": ("self_attn",),
    "word_embeddings": ("embed_tokens",),
    "embedding": ("embed_tokens",),
    "final_layernorm": ("norm",),
    "output_layer": ("lm_head",),
}


def query_key_value_rows(config: ChatGLM3Config) -> list[int]:
    """Rows of query, key and value in the official `query_key_value`."""
    group_rows = config.multi_query_group_num * config.kv_channels
    return [config.num_attention_heads * config.kv_channels, group_rows, group_rows]


class SplitQueryKeyValue(ConversionOps):
    """Splits the rows of `query_key_value` into query, key and value.

    The sizes come from the configuration: under DeepSpeed ZeRO-3 the shapes of the parameters are zero.
    """

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        config: ChatGLM3Config,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            input_dict: one fused tensor, (queries + 2 × groups × channels, hidden) or its bias.
            target_patterns: the names of query, key and value, in this order.
        """
        (tensors,) = input_dict.values()
        fused = tensors[0] if isinstance(tensors, list) else tensors
        sizes = query_key_value_rows(config)
        if fused.shape[0] != sum(sizes):
            raise ValueError(
                f"query_key_value has {fused.shape[0]} rows; the configuration asks for {sum(sizes)} = {sizes} "
                "(num_attention_heads × kv_channels + 2 × multi_query_group_num × kv_channels)."
            )
        return {name: part.contiguous() for name, part in zip(target_patterns, fused.split(sizes))}

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinQueryKeyValue()


class JoinQueryKeyValue(ConversionOps):
    """Reverse of `SplitQueryKeyValue`."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        parts = [input_dict[name] for name in source_patterns]
        return {target_patterns[0]: torch.cat([p[0] if isinstance(p, list) else p for p in parts])}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitQueryKeyValue()


def official_layout() -> list[WeightRenaming | WeightConverter]:
    """The mapping from official names (left) to transformers' (right)."""
    return [
        *(WeightRenaming(official, ours) for official, ours in OFFICIAL_NAMES.items()),
        WeightConverter(FUSED_MODULE, list(SPLIT_MODULES), operations=[SplitQueryKeyValue()]),
    ]


def register_official_layout() -> None:
    """Tells transformers about the mapping (once for each process)."""
    register_checkpoint_conversion_mapping(ChatGLM3Config.model_type, official_layout(), overwrite=True)


def read_tensor_file(file: Path, remedy: str) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` file or a pickle.

    Args:
        remedy: what to do with a damaged file, for the message.

    Raises:
        UserError: for a file that is cut, damaged or something else.
    """
    if file.suffix != ".safetensors":
        return read_pickle(file, remedy)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}). {remedy}") from error


def check_finite(where: str | Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuses weights with NaN or infinity in them: whatever is computed with them is NaN, and every reply is empty.

    Args:
        where: file or folder, for the message.
        tensors: names and tensors; integers (quantized weights) are left alone.

    Raises:
        UserError: says how many tensors there are, and the first.
    """
    numbers = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    with torch.no_grad():
        # A sum is NaN or infinite where a number is, and needs no copy; one wait for the device in all.
        sums = torch.stack([tensor.detach().sum(dtype=torch.float32) for _, tensor in numbers]) if numbers else None
    if sums is None or sums.isfinite().all():
        return
    bad = [name for (name, _), is_good in zip(numbers, sums.isfinite().tolist()) if not is_good]
    raise UserError(
        f"{where}: {len(bad)} of its {len(numbers)} tensors hold numbers that are not finite (NaN or infinity), the "
        f"first is {bad[0]}: no reply can be computed. Use an earlier checkpoint, or train again with a lower "
        "--learning_rate"
    )


def read_pickle(
    file: Path, remedy: str, map_location: str = "cpu", *, is_mapped: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, of which nothing but tensors is ever read; on "meta" only their shapes.

    Args:
        is_mapped: whether values are read when they are looked at, where the file's form allows it.

    Raises:
        UserError: for a file that is cut, damaged, or holds anything else.
    """
    is_mapped = (is_mapped or map_location == "meta") and zipfile.is_zipfile(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch asks a user to report what his file is
            state = torch.load(file, map_location=map_location, weights_only=True, mmap=is_mapped)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes spell, a foreign one the advice to run it
        raise UserError(f"{file} is damaged, or holds other things than tensors. {remedy}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file} holds other things than a mapping of names to tensors. {remedy}")
    return {str(name): value for name, value in state.items()}
