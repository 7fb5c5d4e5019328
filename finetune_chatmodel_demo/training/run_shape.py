"""What of a run decides its memory: the input of the formula in `memory`."""

from dataclasses import dataclass
from typing import Literal

from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.kernels import CheckpointingPolicy
from finetune_chatmodel_demo.training.arguments import FREEZE, FULL

# Bytes of a trained parameter: Adam's two moments in float32, and DeepSpeed's float32 copy of the weights.
MOMENTS, MASTER = 8, 4


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed configuration decides memory.

    Attributes:
        stage: 2 or 3.
        offloads_optimizer, offloads_weights: to the host's memory.
        buffer_bytes: of the buckets in which gradients are reduced and weights are gathered.
    """

    stage: Literal[1, 2, 3]
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    buffer_bytes: float = 0.0


@dataclass(frozen=True)
class RunShape:
    """What of a run decides its memory.

    Attributes:
        config: of the base model.
        method: ptuning, lora, freeze or full.
        rows, tokens: of one batch on one GPU, and of its longest row; with packing one row of all tokens.
        supervised: tokens of the batch whose logits are computed.
        trained: trained parameters, see `parameter_counts`.
        number_bytes: 2 (bfloat16, float16) or 4 (float32) of the computation.
        quantization_bit: 4, 8 or None.
        policy: of gradient checkpointing.
        pre_seq_len: of the prefix.
        segments: conversations of a packed row; 0: no packing.
        active_layers: layers that the gradient passes, the last ones; None: all.
        accumulates: whether gradients of an earlier batch are there during the forward pass.
        optimizer_bytes: of the optimizer's state, for a trained parameter.
        zero: DeepSpeed's settings, or None.
        gpus: processes; they share what ZeRO partitions.
        is_cuda: on a CPU there is no CUDA context, and a prefix's mask is written out.
    """

    config: ChatGLM3Config
    method: str
    rows: int
    tokens: int
    supervised: int
    trained: int
    number_bytes: int = 2
    quantization_bit: int | None = None
    policy: CheckpointingPolicy = "full"
    pre_seq_len: int = 0
    segments: int = 0
    active_layers: int | None = None
    accumulates: bool = False
    optimizer_bytes: float = MOMENTS
    zero: Zero | None = None
    gpus: int = 1
    is_cuda: bool = True

    @property
    def trains_weights(self) -> bool:
        """Whether layers themselves are trained, rather than something beside them."""
        return self.method in (FREEZE, FULL)

    @property
    def has_autocast_weights(self) -> bool:
        """Whether trained weights are float32 and are converted in the forward pass."""
        return self.trains_weights and self.zero is None and self.number_bytes < 4

    @property
    def residual_bytes(self) -> int:
        """Of a number in the residual stream: the embedding's, which only full training holds in float32."""
        return 4 if self.has_autocast_weights and self.method == FULL else self.number_bytes

    @property
    def layers(self) -> int:
        """Layers that keep activations."""
        return self.config.num_layers if self.active_layers is None else self.active_layers
