"""The P-Tuning v2 prefix: trainable keys and values for every layer (Liu et al., 2021, arXiv:2110.07602).

The conventions are those of the original ChatGLM code, on which checkpoints of its fine-tuning demo depend: one
embedding row is (layers × 2, groups, channels) with keys and values alternating by layer, prefix keys are not rotated,
the text's positions start at 0 behind the prefix, and dropout of 0.1 falls on the prefix while training.
"""

import torch
from torch import nn

from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config

PREFIX_DROPOUT = 0.1
PREFIX_INIT_STD = 1.0


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
