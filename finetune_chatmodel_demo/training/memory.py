"""How much memory a training step takes on each GPU, from its settings alone: what `plan_memory.py` adds up.

Bytes are counted by hand from what autograd keeps. `tests/test_memory.py` compares them with what is allocated in steps
of small models and of the 6B model on fake tensors; `tests/benchmarks/bench_gpu.py` with the peaks of a GPU. H: hidden
size, F: inner size of the MLP, a: bytes of a number in the precision of the computation, r: of the residual stream
(float32 where autocast meets float32 weights). A layer keeps, for each token,

    RMSNorms        2rH + 8: their inputs and a float32 scale for each
    attention       query and output: 2a × heads × head_dim, and 4 × heads; keys and values: 2a × groups × head_dim, or,
                    behind a prefix, of all heads (they are repeated); on a CPU the mask, a × (prefix + tokens)
    MLP             2aF: gate and up
    linear inputs   where the layer's weights or an adapter are trained: of q, k and v one, or three copies where
                    autocast converts it for each; of the output projection, of the MLP, and of its last projection

and with checkpointing its input alone (`full`), or the MLP's input in place of its inside (`mlp`). The peak is one of
four moments: the loss (logits of a chunk), the backward pass at the last layer (all activations) or at the first (all
gradients), and the optimizer's step.
"""

from dataclasses import dataclass, field

from finetune_chatmodel_demo.chatglm3.kernels import LOSS_CHUNK, CheckpointingPolicy
from finetune_chatmodel_demo.training.arguments import FULL, LORA, P_TUNING
from finetune_chatmodel_demo.training.parameter_counts import count_parameters, count_prefix, linear_sizes
from finetune_chatmodel_demo.training.run_shape import MASTER, RunShape

GIB = 2**30
# NF4 with double quantization: half a byte, an int8 scale for 64 numbers, a float32 for 256 scales (arXiv:2305.14314).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# For one chunk of the loss behind a trained head: float32 log-probabilities, their gradient, and the logits or theirs.
LOSS_BYTES = 12
# Not counted from anything: what a CUDA context and its libraries usually take.
CUDA_CONTEXT = 0.6 * GIB


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU: the parts of the peak, when it is, and the totals of the other moments."""

    parts: dict[str, float] = field(default_factory=dict)
    moment: str = ""
    moments: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Bytes on each GPU."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> float:
        """Bytes of tensors: what `torch.cuda.max_memory_allocated` counts."""
        return self.total - self.parts.get("CUDA context", 0.0)


def plan_memory(shape: RunShape) -> MemoryPlan:
    """The peak of a training step on each GPU, part by part."""
    resident, gradients = _resident_parts(shape), gradient_bytes(shape)
    before = gradients if shape.accumulates else 0.0
    kept = shape.rows * shape.tokens * shape.layers * layer_bytes(shape, shape.policy) + outer_bytes(shape)
    activations, layer = f"activations ({shape.policy})", _one_layer(shape)
    copies, kept_copies = _weight_copies(shape)
    head = 4.0 * shape.config.padded_vocab_size * shape.config.hidden_size if shape.method == FULL else 0.0
    if shape.zero:
        head = 0.0  # reduced and shared out at once
    moments = {
        "loss": {"gradients": before, activations: kept, "logits": loss_bytes(shape), "converted weights": copies},
        "backward, last layer": {
            "gradients": max(before, head),
            activations: kept,
            "one layer": layer,
            "converted weights": kept_copies,
        },
        "backward, first layer": {
            "gradients": max(before, gradients - _last_gradients(shape)),
            activations: kept / shape.layers,
            "one layer": layer,
        },
        # ZeRO converts its part of the gradients to float32.
        "optimizer step": {"gradients": gradients * (3 if shape.zero else 1)},
    }
    totals = {name: sum({**resident, **parts}.values()) for name, parts in moments.items()}
    moment = max(totals, key=lambda name: totals[name])
    parts = {**resident, **moments[moment]}
    return MemoryPlan({name: size for name, size in parts.items() if size}, moment, totals)


def _resident_parts(shape: RunShape) -> dict[str, float]:
    """What is there all the time."""
    weights = weight_bytes(shape)
    optimizer = shape.optimizer_bytes * shape.trained
    buffers = {}
    if shape.zero:
        optimizer = (optimizer + MASTER * shape.trained) / shape.gpus
        weights = weights / shape.gpus if shape.zero.stage == 3 else weights
        optimizer = 0.0 if shape.zero.offloads_optimizer else optimizer
        weights = 0.0 if shape.zero.offloads_weights else weights
        buffers = {"DeepSpeed's buckets": shape.zero.buffer_bytes}
    elif shape.gpus > 1:
        buffers = {"DDP's buckets": 4.0 * shape.trained}
    tuned = {P_TUNING: "prefix", LORA: "adapter"}.get(shape.method, "")
    return {
        "weights": weights,
        tuned: tuned_bytes(shape),
        "optimizer": optimizer,
        **buffers,
        "CUDA context": CUDA_CONTEXT if shape.is_cuda else 0.0,
    }


def weight_bytes(shape: RunShape) -> float:
    """The base model's weights, of all processes together; trained ones outside of DeepSpeed are float32.

    bitsandbytes quantizes the matrices of the layers; embeddings, head, norms and biases stay as they are.
    """
    count, number = count_parameters(shape.config), shape.number_bytes
    if shape.trains_weights and not shape.zero:
        everything = sum(count.values())
        return everything * number + shape.trained * (4 - number)
    linear: float = {4: NF4_BYTES, 8: 1.0}.get(shape.quantization_bit or 0, number)
    scales = 0.0
    if shape.quantization_bit == 8:  # a float32 for each row of a matrix
        scales = 4.0 * shape.config.num_layers * sum(outputs for _, outputs in linear_sizes(shape.config).values())
    return count["linear"] * linear + scales + (count["other"] + count["embeddings"]) * number


def tuned_bytes(shape: RunShape) -> float:
    """What is trained beside the model, in float32; and the prefix as the layers see it, with its gradient."""
    if shape.trains_weights:
        return 0.0
    trained = 4.0 if shape.zero is None else 2.0
    if shape.method == LORA:
        return trained * shape.trained
    numbers = count_prefix(shape.config, shape.pre_seq_len, projection=False)
    # Converted; then, for each row, dropout's output and mask, and the gradient of one layer spread out, and of all.
    rows, mask = max(shape.rows, shape.segments), 1 if shape.is_cuda else shape.number_bytes
    return trained * shape.trained + numbers * (shape.number_bytes + rows * (2 * shape.number_bytes + mask))


def gradient_bytes(shape: RunShape) -> float:
    """Gradients at the end of a backward pass; DeepSpeed's have the precision of the computation."""
    if shape.zero is None:
        return 4.0 * shape.trained
    return 0.0 if shape.zero.offloads_optimizer else 2.0 * shape.trained / shape.gpus


def _last_gradients(shape: RunShape) -> float:
    """Of the first layer that is trained, and of the embedding: they come last, where ZeRO does not share them out."""
    if shape.zero or not shape.trains_weights:
        return 0.0
    layer = sum(inputs * outputs for inputs, outputs in linear_sizes(shape.config).values())
    embedding = shape.config.padded_vocab_size * shape.config.hidden_size if shape.method == FULL else 0
    return min(4.0 * (layer + embedding), 4.0 * shape.trained)


def _weight_copies(shape: RunShape) -> tuple[float, float]:
    """Trained float32 weights as autocast converts them: all until the end of the forward pass, then those kept."""
    if not shape.has_autocast_weights:
        return 0.0, 0.0
    config = shape.config
    sizes = {name: inputs * outputs for name, (inputs, outputs) in linear_sizes(config).items()}
    head = config.padded_vocab_size * config.hidden_size if shape.method == FULL else 0
    layers = shape.layers * sum(sizes.values())
    kept = {"none": layers, "mlp": layers - shape.layers * sizes["gate_up_proj"], "full": 0}[shape.policy]
    return float(shape.number_bytes * (layers + head)), float(shape.number_bytes * kept)


def loss_bytes(shape: RunShape) -> float:
    """Logits of a chunk with what the loss makes of them, the hidden states before them, and the head's gradient."""
    config = shape.config
    chunk = min(shape.supervised, LOSS_CHUNK) * config.padded_vocab_size
    hidden = shape.residual_bytes * config.hidden_size * (shape.supervised + shape.rows * shape.tokens)
    if shape.method != FULL and not (shape.zero and shape.zero.stage == 3):
        # Scores in float32 beside the logits or their gradient, and the gradient of the hidden states.
        scores = float(chunk * (4 if shape.number_bytes == 4 else 4 + shape.number_bytes))
        return hidden + scores + shape.residual_bytes * config.hidden_size * shape.supervised
    logits = float(LOSS_BYTES * chunk)
    if shape.method != FULL:
        return hidden + logits
    head = config.padded_vocab_size * config.hidden_size
    gradient = shape.number_bytes * (chunk + head) + 4 * head * shape.has_autocast_weights
    return hidden + max(logits, gradient)


def _one_layer(shape: RunShape) -> float:
    """What the backward pass of one layer needs beside what was kept: a second forward pass, and gradients."""
    config, number = shape.config, shape.number_bytes
    again = 0.0
    if shape.policy != "none":
        again = layer_bytes(shape, "none") - layer_bytes(shape, shape.policy)
    # Where gate and up meet: the gradients of their product (in place of what trained weights kept) and of both; and
    # of the residual stream.
    wide = 2 if shape.trains_weights else 3
    if shape.quantization_bit == 8:
        wide = 5  # int32 and float16 results of gate and up while bitsandbytes multiplies: on paper, not measured
    gradients = wide * number * config.ffn_hidden_size + 2 * shape.residual_bytes * config.hidden_size
    largest = max(inputs * outputs for inputs, outputs in linear_sizes(config).values())
    matrix = 0
    if shape.trains_weights:
        matrix = largest * (number + 4 * shape.has_autocast_weights)  # its gradient, and converted
    elif shape.quantization_bit:
        matrix = largest * number  # dequantized
    return shape.rows * shape.tokens * (again + gradients) + matrix


def outer_bytes(shape: RunShape) -> float:
    """What is kept once: the last norm's input and its scale, and the rotations."""
    config = shape.config
    rotations = shape.residual_bytes * config.kv_channels
    return shape.rows * shape.tokens * (shape.residual_bytes * config.hidden_size + 4) + shape.tokens * rotations


def layer_bytes(shape: RunShape, policy: CheckpointingPolicy) -> float:
    """Bytes that one layer keeps for each token."""
    config, a, residual = shape.config, shape.number_bytes, shape.residual_bytes
    hidden, inner, heads = config.hidden_size, config.ffn_hidden_size, config.num_attention_heads
    if policy == "full":
        return residual * hidden
    norms = 2 * residual * hidden + 8
    attention = 2 * a * heads * config.kv_channels + 4 * heads + _key_bytes(shape)
    qkv = other = down = 0
    if shape.trains_weights or shape.method == LORA:
        copies = 3 if a < 4 and (shape.has_autocast_weights or shape.method == LORA) else 1
        qkv, other, down = copies * a * hidden, a * hidden, a * inner
    if policy == "none":
        return norms + attention + qkv + 2 * other + down + 2 * a * inner
    # The MLP's input as the norm gives it: float32 where its weights are.
    mlp_input = (4 if shape.has_autocast_weights else a) * hidden
    return norms + attention + qkv + other + down + mlp_input


def _key_bytes(shape: RunShape) -> float:
    """Keys and values that a layer keeps, for each token, and on a CPU the mask."""
    config, a = shape.config, shape.number_bytes
    tokens = shape.rows * shape.tokens
    of_groups = 2 * a * config.multi_query_group_num * config.kv_channels
    # The heads of one group alone need no copies of its keys.
    heads = config.num_attention_heads if config.multi_query_group_num > 1 else 1
    of_heads = 2 * a * heads * config.kv_channels
    behind = shape.pre_seq_len * max(shape.rows, shape.segments) / tokens  # prefix positions for each token
    if shape.segments:  # FlexAttention takes groups; elsewhere each conversation is computed by itself
        mask = 0 if shape.is_cuda or not shape.pre_seq_len else a * (shape.pre_seq_len + tokens / shape.segments)
        return (of_groups if shape.is_cuda else of_heads) * (1 + behind) + mask
    if shape.method != P_TUNING:
        return of_groups
    mask = 0 if shape.is_cuda else a * (shape.pre_seq_len + shape.tokens) / shape.rows
    return of_heads * (1 + behind) + mask
