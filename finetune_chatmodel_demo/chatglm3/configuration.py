"""The configuration of ChatGLM2 and ChatGLM3 models, with the names that the official `config.json` uses.

transformers' Glm classes read the same values under their own names (`num_hidden_layers`, `vocab_size`, ...), which
`attribute_map` translates, so a saved configuration keeps the official names and other programs can still read it.
"""

import json
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from finetune_chatmodel_demo.common.errors import UserError

ROPE_BASE = 10000.0
# Half of each head is rotated (the rest carries no position), as in the original model.
ROTATED_SHARE = 0.5
# What the original code can also be told to do, and no published ChatGLM2/3 model does.
FIXED_BY_ARCHITECTURE = {
    "rmsnorm": True,
    "multi_query_attention": True,
    "post_layer_norm": True,
    "original_rope": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
}
OFFICIAL_ARCHITECTURES = {
    "ChatGLM3Model": "ChatGLMModel",
    "ChatGLM3ForCausalLM": "ChatGLMModel",
    "ChatGLM3ForSequenceClassification": "ChatGLMForSequenceClassification",
}


@strict
class ChatGLM3Config(PreTrainedConfig):
    r"""
    Configuration of ChatGLM3-6B, -base, -32k and ChatGLM2-6B; the defaults are those of ChatGLM3-6B.

    Args:
        num_layers (`int`): transformer blocks.
        padded_vocab_size (`int`): rows of the embedding and of the output layer; at least the tokenizer's size.
        hidden_size (`int`): width of the residual stream.
        ffn_hidden_size (`int`): width between the two linear layers of the gated MLP.
        kv_channels (`int`): channels of a head.
        num_attention_heads (`int`): query heads.
        multi_query_group_num (`int`): key and value heads; each serves num_attention_heads / groups query heads.
        seq_length (`int`): longest text, in tokens, that the model was trained for.
        layernorm_epsilon (`float`): epsilon of the RMS norms.
        add_qkv_bias (`bool`): whether query, key and value have a bias.
        rope_ratio (`float`): factor on the rotary base of 10,000 (the 32k model: 50).
        attention_dropout (`float`): dropout on attention weights.
        classifier_dropout (`float`, *optional*): dropout before the classification head.
        pre_seq_len (`int`, *optional*): length of the P-Tuning v2 prefix; None: the model has none.
        prefix_projection (`bool`): whether an MLP makes the prefix from a smaller embedding.

    Raises:
        UserError: for a configuration that asks for another architecture or for pre-quantized weights.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012 - transformers declares it as a class variable
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels",
        "num_key_value_heads": "multi_query_group_num",
        "max_position_embeddings": "seq_length",
        "rms_norm_eps": "layernorm_epsilon",
        "attention_bias": "add_qkv_bias",
    }

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    multi_query_group_num: int = 2
    seq_length: int = 8192
    layernorm_epsilon: float = 1e-5
    add_qkv_bias: bool = True
    rope_ratio: float | int = 1
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2
    rope_parameters: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("quantization_bit"):
            raise UserError(
                f"config.json says quantization_bit={kwargs['quantization_bit']}: these weights were quantized by "
                "ChatGLM's own kernels, which this project does not read. Use the fp16 model and quantize it while "
                "loading (--quantization_bit 4)."
            )
        for name, supported in FIXED_BY_ARCHITECTURE.items():
            if kwargs.get(name, supported) != supported:
                raise UserError(f"config.json says {name}={kwargs[name]}; only {supported} is supported.")
        if self.hidden_act != "silu":
            raise UserError(f"config.json says hidden_act={self.hidden_act!r}; ChatGLM3's MLP is SwiGLU: 'silu'.")
        if self.num_attention_heads % self.multi_query_group_num:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"multi_query_group_num={self.multi_query_group_num}."
            )
        self.rope_parameters = {
            "rope_type": "default",
            "rope_theta": ROPE_BASE * self.rope_ratio,
            "partial_rotary_factor": ROTATED_SHARE,
        }
        super().__post_init__(**kwargs)

    @property
    def kv_size(self) -> int:
        """Values of one prefix position: a key and a value of every group in every layer."""
        return self.num_layers * 2 * self.multi_query_group_num * self.kv_channels

    def to_dict(self) -> dict[str, Any]:
        """As in the official files: their architecture names, and nothing that is derived."""
        values = super().to_dict()
        values.pop("rope_parameters", None)
        for name, value in FIXED_BY_ARCHITECTURE.items():
            values.setdefault(name, value)
        if values.get("architectures"):
            values["architectures"] = [OFFICIAL_ARCHITECTURES.get(a, a) for a in values["architectures"]]
        return values

    def to_json_string(self, use_diff: bool = True) -> str:
        """What is saved: `dtype` stands there under its old name as well, which older programs read."""
        values = json.loads(super().to_json_string(use_diff))
        if values.get("dtype") is not None:
            values["torch_dtype"] = values["dtype"]
        return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
