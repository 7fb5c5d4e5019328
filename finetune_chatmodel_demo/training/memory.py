"""How much memory a run will need, from its settings alone: `plan_memory.py`, and one line at each run's start.

Bytes are counted by hand from what autograd keeps; `tests/test_memory.py` compares them with what is allocated in
steps of small models, and `tests/benchmarks/bench_gpu.py` with the peaks of a GPU. H: hidden size, F: inner size of the
MLP, a: bytes of a number in the precision of the computation. A layer keeps, for each token,

    RMSNorms        8H: their input in float32, twice; with trained weights also the normed input
    attention       query, output: 2aH; keys and values: 2a × groups × head_dim, or, behind a prefix, of all heads
    MLP             3aF: gate and up, and the activated gate
    linear inputs   where the layer's weights or an adapter are trained

and with checkpointing its input alone (`full`), or the input in place of the MLP's inside (`mlp`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.modeling import LOSS_CHUNK
from finetune_chatmodel_demo.chatglm3.recomputing import CheckpointingPolicy
from finetune_chatmodel_demo.training.arguments import FREEZE, FULL, LORA, P_TUNING

GIB = 2**30
# NF4 with double quantization: half a byte, an int8 scale for 64 numbers, a float32 for 256 scales (arXiv:2305.14314).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Adam's two moments and a float32 master copy of half-precision weights.
MOMENTS, MASTER = 8, 4
# float32 log-probabilities, their gradient, and the logits or their gradient, for one chunk of the loss.
LOSS_BYTES = 12
# Not counted from anything: what a CUDA context and its libraries usually take.
CUDA_CONTEXT = 0.6 * GIB
# DeepSpeed's buckets, as in configs/ds_*.json: numbers that are gathered or reduced at a time.
ZERO_BUCKETS = 2 * 5e8


@dataclass(frozen=True)
class RunShape:
    """What of a run decides its memory.

    Attributes:
        config: of the base model.
        method: ptuning, lora, freeze or full.
        rows, tokens: of one batch on one GPU: rows (groups with packing), tokens of the longest row.
        supervised: tokens of the batch whose logits are computed.
        number_bytes: 2 (bfloat16, float16) or 4 (float32) of the computation.
        quantization_bit: 4, 8 or None.
        policy: of gradient checkpointing.
        pre_seq_len, prefix_projection: of the prefix.
        trained: trained parameters (adapters and frozen layers: counted by the caller).
        zero_stage: 0 (no DeepSpeed), 2 or 3.
        offload: optimizer (and with ZeRO-3 the weights) in the host's memory.
        gpus: processes that share what ZeRO partitions.
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
    zero_stage: Literal[0, 2, 3] = 0
    offload: bool = False
    gpus: int = 1
    is_cuda: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part, on each GPU; `host` and `disk` are for the machine and for one checkpoint."""

    parts: dict[str, float] = field(default_factory=dict)
    host: float = 0.0
    disk: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on each GPU."""
        return sum(self.parts.values())


def plan_memory(shape: RunShape) -> MemoryPlan:
    """The peak of a training step on each GPU, part by part."""
    weights, trained = weight_bytes(shape), shape.trained
    share = shape.gpus if shape.zero_stage else 1
    if shape.zero_stage:
        gradients, optimizer = 2 * trained / share, (MOMENTS + MASTER) * trained / share
        if shape.zero_stage == 3:
            weights = weights / share
    else:
        gradients, optimizer = 4 * trained, MOMENTS * trained
    host = 0.0
    if shape.offload:
        host, optimizer = optimizer * share, 0.0
        if shape.zero_stage == 3:
            host, weights = host + weights * share, 0.0
    parts = {
        "weights": weights,
        "prefix": prefix_bytes(shape),
        "gradients": gradients,
        "optimizer": optimizer,
        **activation_parts(shape),
        "DeepSpeed's buckets": 2 * ZERO_BUCKETS if shape.zero_stage else 0,
        "CUDA context": CUDA_CONTEXT if shape.is_cuda else 0,
    }
    return MemoryPlan({name: size for name, size in parts.items() if size}, host, disk_bytes(shape))


def count_parameters(config: ChatGLM3Config) -> dict[str, int]:
    """Parameters of a ChatGLM3: `linear` of all layers' matrices, `other` of biases and norms, `embeddings` (both)."""
    queries, keys = config.num_attention_heads * config.kv_channels, config.multi_query_group_num * config.kv_channels
    hidden, inner = config.hidden_size, config.ffn_hidden_size
    linear = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * inner
    other = (queries + 2 * keys) * bool(config.add_qkv_bias) + 2 * hidden
    return {
        "linear": config.num_layers * linear,
        "other": config.num_layers * other + hidden,
        "embeddings": 2 * config.padded_vocab_size * hidden,
    }


def count_prefix(config: ChatGLM3Config, length: int, projection: bool) -> int:
    """Trained parameters of a prefix."""
    width = 2 * config.num_layers * config.multi_query_group_num * config.kv_channels
    hidden = config.hidden_size
    return length * width + ((width + 1) * hidden + (hidden + 1) * width if projection else 0)


def count_adapter(config: ChatGLM3Config, rank: int, modules: list[str]) -> int:
    """Trained parameters of a LoRA adapter."""
    queries, keys = config.num_attention_heads * config.kv_channels, config.multi_query_group_num * config.kv_channels
    hidden, inner = config.hidden_size, config.ffn_hidden_size
    sizes = {
        "q_proj": hidden + queries,
        "k_proj": hidden + keys,
        "v_proj": hidden + keys,
        "o_proj": queries + hidden,
        "gate_up_proj": hidden + 2 * inner,
        "down_proj": inner + hidden,
    }
    return config.num_layers * rank * sum(sizes.get(name, 0) for name in modules)


def weight_bytes(shape: RunShape) -> float:
    """The base model's weights; trained ones outside of DeepSpeed are float32."""
    count = count_parameters(shape.config)
    half = shape.number_bytes
    if shape.method == FULL and not shape.zero_stage:
        # Autocast keeps a copy in the precision of the computation during a step.
        return sum(count.values()) * (4 + (half if half < 4 else 0))
    if shape.method == FREEZE and not shape.zero_stage:
        return sum(count.values()) * half + shape.trained * (4 - half)
    linear = {4: NF4_BYTES, 8: 1.0}.get(shape.quantization_bit or 0, half)
    return count["linear"] * linear + (count["other"] + count["embeddings"]) * half


def prefix_bytes(shape: RunShape) -> float:
    """What a prefix (or an adapter) adds: float32 parameters, and the prefix as the layers see it, with its gradient."""
    if shape.method == LORA:
        return 4.0 * shape.trained
    if shape.method != P_TUNING:
        return 0.0
    numbers = count_prefix(shape.config, shape.pre_seq_len, projection=False)
    # float32 and converted; dropout's output and mask for each row; the gradient of each of them.
    return 4.0 * shape.trained + numbers * (4 + shape.number_bytes + shape.rows * (2 * shape.number_bytes + 1))


def activation_parts(shape: RunShape) -> dict[str, float]:
    """What the forward pass keeps, and what the larger of loss and one recomputed layer needs beside it."""
    tokens, layers = shape.rows * shape.tokens, shape.config.num_layers
    inside, kept = layer_bytes(shape, "none"), layer_bytes(shape, shape.policy)
    loss = LOSS_BYTES * min(shape.supervised, LOSS_CHUNK) * shape.config.padded_vocab_size
    # While a layer goes backward: what of it is computed again, and the gradients of its widest tensors.
    widest = 2 * (2 * shape.config.ffn_hidden_size) * shape.number_bytes
    layer = tokens * ((inside - kept if shape.policy != "none" else 0) + widest)
    return {
        f"activations ({shape.policy})": tokens * layers * kept,
        "loss or one layer": max(loss, layer),
    }


def layer_bytes(shape: RunShape, policy: CheckpointingPolicy) -> float:
    """Bytes that one layer keeps for each token."""
    config, a = shape.config, shape.number_bytes
    hidden, inner = config.hidden_size, config.ffn_hidden_size
    trains_weights = shape.method in (FREEZE, FULL)
    has_autocast_weights = shape.method == FULL and not shape.zero_stage and a < 4
    residual = 4 if has_autocast_weights else a  # float32 weights make a float32 residual stream
    if policy == "full":
        return residual * hidden
    norms = 8 * hidden + (2 * residual * hidden if trains_weights else 0)
    heads = 2 * a * config.num_attention_heads * config.kv_channels + 4 * config.num_attention_heads
    keys = 2 * a * config.multi_query_group_num * config.kv_channels
    if shape.method == P_TUNING:
        positions = (shape.pre_seq_len + shape.tokens) / shape.tokens
        keys = 2 * a * config.num_attention_heads * config.kv_channels * positions
        if not shape.is_cuda:
            keys += a * (shape.pre_seq_len + shape.tokens)  # the mask
    inputs = down = 0
    if trains_weights or shape.method == LORA:
        # Of q, k and v one input, or three copies where float32 parameters meet a half-precision computation.
        copies = 3 if a < 4 and (has_autocast_weights or shape.method == LORA) else 1
        inputs, down = (copies + 2) * a * hidden, a * inner
    mlp = 3 * a * inner
    if policy == "mlp":
        # The input of the MLP, which trained weights keep in any case, instead of its inside.
        mlp = 0 if inputs else a * hidden
    return norms + heads + keys + inputs + down + mlp


def disk_bytes(shape: RunShape) -> float:
    """One checkpoint: what is trained (a prefix in two forms, a whole model) and the optimizer's state."""
    if shape.method == P_TUNING:
        return (2 * 4 + MOMENTS) * shape.trained
    if shape.method == LORA:
        return (4 + MOMENTS) * shape.trained
    bytes_each = 4 if shape.method == FULL and not shape.zero_stage else shape.number_bytes
    state = MOMENTS + (MASTER if shape.zero_stage else 0)
    return bytes_each * sum(count_parameters(shape.config).values()) + state * shape.trained


def find_remedies(shape: RunShape, limit: float) -> list[tuple[str, MemoryPlan]]:
    """What to change, one after the other, until a run fits; empty: it fits, or nothing helps.

    Args:
        shape: the run.
        limit: bytes of one GPU.

    Returns:
        Flag → the plan with it and those before it.
    """
    changes: list[tuple[str, Callable[[RunShape], RunShape]]] = [
        ("--gradient_checkpointing full", lambda s: replace(s, policy="full")),
        (
            "--per_device_train_batch_size 1, and --gradient_accumulation_steps larger by as much",
            lambda s: replace(s, rows=1, supervised=-(-s.supervised // s.rows)),
        ),
    ]
    if shape.method in (P_TUNING, LORA):
        changes.append(("--quantization_bit 4", lambda s: replace(s, quantization_bit=4)))
    else:
        changes.append(("--deepspeed …/configs/ds_zero3.json", lambda s: replace(s, zero_stage=3)))
        changes.append(
            ("--deepspeed …/configs/ds_zero3_offload.json", lambda s: replace(s, zero_stage=3, offload=True))
        )
    changes.append((f"--max_seq_length {shape.tokens // 2}", _halve))
    found: list[tuple[str, MemoryPlan]] = []
    for flag, change in changes:
        if plan_memory(shape).total <= limit:
            break
        changed = change(shape)
        if plan_memory(changed).total < plan_memory(shape).total:
            shape = changed
            found.append((flag, plan_memory(shape)))
    return found if found and found[-1][1].total <= limit else []


def _halve(shape: RunShape) -> RunShape:
    return replace(shape, tokens=max(1, shape.tokens // 2), supervised=max(1, shape.supervised // 2))
