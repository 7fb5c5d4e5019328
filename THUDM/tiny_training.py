"""Trains the weights of `THUDM/chatglm3-tiny` on the generated corpus. Run by `THUDM/build_chatglm3_tiny.py`."""

import math
import re
import time
from collections.abc import Iterator

import tiny_corpus
import torch
import torch.nn.functional as F

from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM, ChatGLMTokenizer

ARCHITECTURE = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 688,
    "num_attention_heads": 4,
    "multi_query_group_num": 4,
    "kv_channels": 64,
    "seq_length": 2048,
}
BLOCK_TOKENS = 320  # longer than the conversations that the prefix will see
ROWS = 4  # few rows and many steps: facts are learned by the number of updates rather than of tokens
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 60
LAST_RATE_SHARE = 0.02
# Twelve Pokémon alone at first: the attention that looks a name up forms sooner among few names. In a trial of 700
# steps, recall was 82 % with this and 31 % without it.
FIRST_STEPS, FIRST_POKEMON = 150, 12
DENSE_SHARE = 0.4  # of the steps, with documents of many facts; the rest is mostly questions
OTHER_TOKENS_WEIGHT = 0.25  # in the loss; a value's tokens count 1
# Control tokens are never seen; their output rows start longer, so that a prefix can call for one.
EMBEDDING_STD, OUTPUT_STD, CONTROL_OUTPUT_STD = 0.5, 0.02, 0.06


def first_weights(pieces: int, vocabulary: int, seed: int) -> ChatGLM3ForCausalLM:
    """A model with random weights.

    Args:
        pieces: of the SentencePiece model; control tokens follow.
        vocabulary: rows of the embedding.
        seed: of the weights.

    The linear layers start at 1/√inputs. At the 0.02 that is usual for wide models, this narrow one recalled next to
    nothing (9 %) after 500 steps on all names and had not begun to look names up after 900.
    """
    torch.manual_seed(seed)
    model = ChatGLM3ForCausalLM(ChatGLM3Config(padded_vocab_size=vocabulary, **ARCHITECTURE))
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2:
            continue
        std = parameter.shape[1] ** -0.5
        if "embed_tokens" in name:
            std = EMBEDDING_STD
        elif "lm_head" in name:
            std = OUTPUT_STD
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * ARCHITECTURE["num_layers"])
        torch.nn.init.normal_(parameter, std=std)
    torch.nn.init.normal_(model.lm_head.weight.data[pieces:], std=CONTROL_OUTPUT_STD)
    return model


def encode_document(tokenizer: ChatGLMTokenizer, document: str) -> tuple[list[int], list[float]]:
    """Ids of a document between its start and end tokens, and what each counts in the loss."""
    ids = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
    weights = [0.0, 0.0]
    parts = re.split(f"[{tiny_corpus.VALUE_START}{tiny_corpus.VALUE_END}]", document)
    is_first = True
    for number, part in enumerate(parts):
        if not part:
            continue
        # SentencePiece puts a space before any text; inside a document there is none.
        part_ids = tokenizer.encode_text(part)[0 if is_first else 1 :]
        is_first = False
        ids += part_ids
        weights += [1.0 if number % 2 else OTHER_TOKENS_WEIGHT] * len(part_ids)
    return [*ids, tokenizer.eos_token_id], [*weights, OTHER_TOKENS_WEIGHT]


class Blocks:
    """Documents one after the other, cut into blocks of equal length; `progress` decides which documents come.

    Attributes:
        step: the step that is being drawn for; to be kept up to date.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, steps: int, seed: int) -> None:
        self.tokenizer = tokenizer
        self.generator = tiny_corpus.CorpusGenerator(tiny_corpus.load_facts(), seed)
        self.steps = steps
        self.step = 0
        self.blocks = self._blocks()

    def _blocks(self) -> Iterator[tuple[list[int], list[float]]]:
        ids: list[int] = []
        weights: list[float] = []
        while True:
            self.generator.use_first(FIRST_POKEMON if self.step < FIRST_STEPS else None)
            document = self.generator.document(dense=self.step < self.steps * DENSE_SHARE)
            more_ids, more_weights = encode_document(self.tokenizer, document)
            ids += more_ids
            weights += more_weights
            while len(ids) >= BLOCK_TOKENS:
                yield ids[:BLOCK_TOKENS], weights[:BLOCK_TOKENS]
                del ids[:BLOCK_TOKENS], weights[:BLOCK_TOKENS]

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and loss weights, both (ROWS, BLOCK_TOKENS)."""
        ids, weights = zip(*(next(self.blocks) for _ in range(ROWS)))
        return torch.tensor(ids), torch.tensor(weights)


def weighted_loss(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the next token, a mean with the given weights.

    Args:
        logits: (rows, tokens, vocabulary).
        ids: (rows, tokens).
        weights: (rows, tokens); 0: does not count.
    """
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate: warm-up, then half a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (LAST_RATE_SHARE + (1 - LAST_RATE_SHARE) * cosine)


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself; elsewhere they are slower than float32."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def train(model: ChatGLM3ForCausalLM, tokenizer: ChatGLMTokenizer, steps: int, seed: int, use_bf16: bool) -> None:
    """Train all weights on the corpus and print the loss every 100 steps."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    blocks = Blocks(tokenizer, steps, seed)
    model.train()
    started, total = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate_at(step, steps)
        blocks.step = step
        ids, weights = blocks.batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = weighted_loss(logits, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            done = step % 100 + 1
            print(f"step {step + 1}/{steps}  loss {total / done:.3f}  {time.monotonic() - started:.0f} s", flush=True)
            total = 0.0
    model.eval()
