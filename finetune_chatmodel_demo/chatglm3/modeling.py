"""ChatGLM3 on transformers' Glm classes, which are the same architecture, plus the P-Tuning v2 prefix and its loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel, initialization
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.glm.modeling_glm import GlmForCausalLM, GlmModel, GlmPreTrainedModel

from finetune_chatmodel_demo.chatglm3.attention import PREFIX_ATTENTION, Packing
from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.kernels import (
    ChatGLM3MLP,
    ChatGLM3RMSNorm,
    recompute_mlp,
    summed_cross_entropy,
)
from finetune_chatmodel_demo.chatglm3.prefix import (
    PREFIX_INIT_STD,
    Prefix,
    PrefixEmbedding,
    PrefixEncoder,
    cache_with_prefix,
)

IGNORED_LABEL = -100


class ChatGLM3PreTrainedModel(GlmPreTrainedModel):
    """What all ChatGLM3 models share: configuration, official weight names, the attention that knows prefixes."""

    config_class = ChatGLM3Config
    config: ChatGLM3Config
    _keep_in_fp32_modules_strict = frozenset({"prefix_encoder"})
    # The original stores its rotary frequencies; they follow from the configuration.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012 - extended in place by transformers

    def _init_weights(self, module: nn.Module) -> None:
        """As transformers does it, and N(0, 1) for a prefix that a configuration with `pre_seq_len` asks for."""
        if isinstance(module, PrefixEmbedding):
            initialization.normal_(module.weight, std=PREFIX_INIT_STD)  # leaves loaded weights alone
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        """Every way of switching checkpointing on ends here; with re-entry the prefix would get no gradients."""
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("use_reentrant=True loses the prefix's gradients; leave it out or set it to False.")
        recompute_mlp(self, enable and self.base_model.recomputes_mlp_only)
        if not (enable and self.base_model.recomputes_mlp_only):
            super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def enable_input_require_grads(self) -> None:
        """Does nothing: only checkpointing with re-entry needs gradients of the embeddings.

        With them, the backward pass would run through all the frozen layers below those that --finetuning_type freeze
        trains, and keep their activations.
        """

    def disable_input_require_grads(self) -> None:
        """Does nothing; see `enable_input_require_grads`."""

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: dict | None = None, **kwargs: Any) -> None:
        """Writes the official layout, with the rotary frequencies that the original code keeps among the weights."""
        # transformers would reuse the renamings that loading needed, which lack those of a new prefix or head.
        self._weight_conversions = None
        if state_dict is None:
            state_dict = self.state_dict()
        frequencies = self.base_model.rotary_emb.inv_freq.to("cpu", self.dtype, copy=True)
        state_dict = {**state_dict, "model.rotary_emb.inv_freq": frequencies}
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)


class ChatGLM3Model(ChatGLM3PreTrainedModel, GlmModel):
    """The transformer without a head."""

    recomputes_mlp_only = False  # see `kernels.set_policy`

    def __init__(self, config: ChatGLM3Config) -> None:
        super().__init__(config)
        # The same modules with forward methods of ours; transformers builds a layer's parts itself.
        for layer in self.layers:
            layer.mlp.__class__ = ChatGLM3MLP
            layer.input_layernorm.__class__ = layer.post_attention_layernorm.__class__ = ChatGLM3RMSNorm
        self.norm.__class__ = ChatGLM3RMSNorm
        config._attn_implementation = PREFIX_ATTENTION.get(config._attn_implementation, config._attn_implementation)
        self.prefix_encoder: PrefixEncoder | None = None
        self.prefix_enabled = True
        if config.pre_seq_len:
            self.add_prefix(config.pre_seq_len, config.prefix_projection)

    def add_prefix(self, pre_seq_len: int, prefix_projection: bool = False) -> None:
        """Puts a new N(0, 1) prefix in front of the model and freezes everything else.

        Raises:
            ValueError: when there is a prefix already, or `pre_seq_len` is not positive.
        """
        if self.prefix_encoder is not None:
            raise ValueError(f"the model has a prefix of {self.prefix_encoder.length} positions already")
        if pre_seq_len < 1:
            raise ValueError(f"pre_seq_len is {pre_seq_len}; a prefix has at least 1 position")
        self.config.pre_seq_len, self.config.prefix_projection = pre_seq_len, prefix_projection
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        encoder = PrefixEncoder(self.config).to(self.embed_tokens.weight.device, torch.float32)
        self.prefix_encoder = encoder.train(self.training)
        if not self.prefix_encoder.embedding.weight.is_meta:
            self.prefix_encoder.reset_parameters()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        segment_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (batch, tokens); or `inputs_embeds` (batch, tokens, hidden).
            attention_mask: (batch, all tokens so far), 1 where there is text. Not needed where rows are padded on the
                right only: causal attention never looks there.
            position_ids: (batch, tokens), from 0 behind the prefix; default: 0, 1, …
            past_key_values: cache of earlier tokens; text lengths in it do not count the prefix.
            segment_lengths: makes `input_ids` (1, tokens) a packed row: tokens of each conversation, which do not see
                each other. `position_ids` then start at 0 in each.

        Raises:
            ValueError: for a packed row without `position_ids`, with a mask or a cache, or with "eager" attention.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and segment_lengths is None
        if segment_lengths is not None:
            self._check_packed(attention_mask, position_ids, past_key_values, use_cache)
            kwargs["packing"] = Packing(segment_lengths)
            # transformers takes a mask of four dimensions as it is; ours is in the packing.
            attention_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=position_ids.device)
        if self.prefix_encoder is not None and self.prefix_enabled:
            text = input_ids if inputs_embeds is None else inputs_embeds
            rows = text.shape[0] if segment_lengths is None else len(segment_lengths)
            prefix = self._prefix_of(rows, past_key_values)
            if use_cache or past_key_values is not None:
                past_key_values = cache_with_prefix(past_key_values, prefix)
                prefix.keys_values = None
            kwargs["prefix"] = prefix
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _check_packed(self, attention_mask: Any, position_ids: Any, cache: Any, use_cache: bool) -> None:
        if position_ids is None or attention_mask is not None or cache is not None or use_cache:
            raise ValueError("a packed row (segment_lengths) needs position_ids, and takes no mask and no cache")
        if self.config._attn_implementation != PREFIX_ATTENTION["sdpa"]:
            raise ValueError(f"a packed row needs attention 'sdpa', got {self.config._attn_implementation!r}")

    def _prefix_of(self, rows: int, cache: Cache | None) -> Prefix:
        if self.config._attn_implementation not in PREFIX_ATTENTION.values():
            raise ValueError(
                f"attention {self.config._attn_implementation!r} does not know prefixes; load the model with "
                "attn_implementation='sdpa' or 'eager'"
            )
        keys_values = None
        if cache is None or cache.get_seq_length() == 0:
            keys_values = self.prefix_encoder(rows, self.embed_tokens.weight.dtype)
        return Prefix(self.prefix_encoder.length, keys_values)


class PrefixSwitch:
    """For models with a head: reach the prefix, and switch it off for a while."""

    @property
    def prefix_encoder(self) -> PrefixEncoder | None:
        """The trainable prefix, or None."""
        return self.model.prefix_encoder

    def remove_prefix(self) -> None:
        """Makes the model its base again, ready for a prefix of another length; without a prefix nothing happens."""
        self.model.prefix_encoder = None
        self.config.pre_seq_len, self.config.prefix_projection = None, False

    @contextmanager
    def prefix_disabled(self) -> Iterator[None]:
        """Within this context the model is its base: the same weights without the prefix."""
        before, self.model.prefix_enabled = self.model.prefix_enabled, False
        try:
            yield
        finally:
            self.model.prefix_enabled = before


class ChatGLM3ForCausalLM(PrefixSwitch, ChatGLM3PreTrainedModel, GlmForCausalLM):
    """ChatGLM3 with its language-model head."""

    _tied_weights_keys = None

    def __init__(self, config: ChatGLM3Config) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = ChatGLM3Model(config)
        self.vocab_size = config.padded_vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.lm_head.requires_grad_(not config.pre_seq_len)
        self.post_init()

    def add_prefix(self, pre_seq_len: int, prefix_projection: bool = False) -> None:
        """Puts a new prefix in front of the model and freezes the rest; see `ChatGLM3Model.add_prefix`."""
        self.model.add_prefix(pre_seq_len, prefix_projection)
        self.lm_head.requires_grad_(False)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        output_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: (batch, tokens); the id at a position where the loss counts, else -100. Position i is predicted
                from the text before it.
            num_items_in_batch: divides the summed loss (the labels of all accumulated batches); default: the labels of
                this one, a mean.
            output_logits: whether `logits` are returned; default: only without `labels`, because at 65,024 columns
                they are most of a training step's memory.

        Returns:
            `loss` () in float32 with `labels`; `logits` (batch, tokens kept, vocabulary).
        """
        if use_cache is None and labels is not None:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        logits = loss = None
        if labels is None if output_logits is None else output_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        if labels is not None:
            loss = self._loss(hidden, labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(
        self, hidden: torch.Tensor, labels: torch.Tensor, num_items_in_batch: int | torch.Tensor | None
    ) -> torch.Tensor:
        """Cross-entropy of the supervised positions of (batch, tokens, hidden), their logits in chunks."""
        targets = labels[:, 1:].to(hidden.device)
        counts = targets != IGNORED_LABEL
        hidden, targets = hidden[:, :-1][counts], targets[counts]
        total = summed_cross_entropy(self.lm_head, hidden, targets)
        divisor = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch
        return total / (divisor.to(total.device) if isinstance(divisor, torch.Tensor) else divisor)


class ScoreHead(nn.Linear):
    """A linear layer that computes in its own dtype: in bfloat16 autocast, close scores would become equal ones."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, hidden) → (…, labels)"""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


class ChatGLM3ForSequenceClassification(PrefixSwitch, GenericForSequenceClassification, ChatGLM3PreTrainedModel):
    """ChatGLM3 with a classification head on each row's last token, as the original `classifier_head`."""

    def __init__(self, config: ChatGLM3Config) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = ChatGLM3Model(config)
        self.score = ScoreHead(config.hidden_size, config.num_labels)
        self.post_init()
