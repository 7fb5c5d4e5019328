"""The supervised replies of rows as questions: does the model write them, token by token, when it decodes greedily?

`--eval_questions N` asks some of the validation data while training, `--overfit_check N` all of the chosen rows. A
reply is a run of labels that count; what stands before it in its row is its prompt, whatever the data was made from.
Exercised by `pytest tests/test_early_stopping.py tests/test_overfit_check.py`.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune_chatmodel_demo.conversation.rendering import IGNORED_LABEL
from finetune_chatmodel_demo.generation.batch import generate_ids
from finetune_chatmodel_demo.generation.session import build_settings

SPARE_TOKENS = 8  # for a reply that spells the same text in more pieces
ROWS_OF_SAMPLE = 50_000  # a sample is drawn from at most so many rows


@dataclass(frozen=True)
class Reply:
    """One supervised reply.

    Args:
        row: the row that it is in.
        prompt_ids: everything before it.
        expected_ids: the reply without the token that ends it.
        is_whole: whether it ends with a stop token; a length limit may have cut it off.
    """

    row: int
    prompt_ids: tuple[int, ...]
    expected_ids: tuple[int, ...]
    is_whole: bool


def find_replies(row: int, item: dict[str, Any], stop_ids: Iterable[int]) -> list[Reply]:
    """The supervised replies of one row, in their order.

    Args:
        row: its number.
        item: `input_ids` and `labels` of the row.
        stop_ids: tokens that end a reply.
    """
    ids, labels = list(item["input_ids"]), list(item["labels"])
    stops, replies, start = set(stop_ids), [], None
    for position in range(1, len(ids) + 1):
        counts = position < len(ids) and labels[position] != IGNORED_LABEL
        if counts and start is None:
            start = position
        if start is not None and (not counts or ids[position] in stops):
            is_whole = counts and ids[position] in stops
            if position > start:
                replies.append(Reply(row, tuple(ids[:start]), tuple(ids[start:position]), is_whole))
            start = None
    return replies


def sample_replies(rows: Any, count: int, seed: int, stop_ids: Iterable[int], room: int) -> list[Reply]:
    """`count` whole replies of a data set, spread over its rows; the same for the same seed.

    Args:
        rows: map-style items with `input_ids` and `labels`.
        count: replies wanted; fewer where the data has fewer.
        seed: of the draw.
        stop_ids: tokens that end a reply.
        room: most tokens of prompt and reply together.
    """
    draw = random.Random(seed)
    order = draw.sample(range(len(rows)), min(len(rows), ROWS_OF_SAMPLE))
    first: list[Reply] = []
    later: list[Reply] = []
    for row in order:
        replies = [
            reply
            for reply in find_replies(row, rows[row], stop_ids)
            if reply.is_whole and len(reply.prompt_ids) + len(reply.expected_ids) + SPARE_TOKENS <= room
        ]
        draw.shuffle(replies)
        share = -(-len(replies) // 3)
        first += replies[:share]
        later += replies[share:]
        if len(first) >= count:
            break
    return (first + later)[:count]


def share_out(replies: Sequence[Reply], process: int, processes: int) -> list[tuple[Reply, bool]]:
    """The replies of one process, and whether they count: all get equally many, so some are asked twice."""
    each = -(-len(replies) // processes)
    places = [process + i * processes for i in range(each)]
    return [(replies[place % len(replies)], place < len(replies)) for place in places]


def write_replies(
    model: Any, tokenizer: Any, replies: Sequence[Reply], batch_size: int, spare: int = SPARE_TOKENS
) -> list[list[int]]:
    """What the model writes for each prompt, greedily, without the token that ends it.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        replies: the questions.
        batch_size: prompts at a time; those of similar length go together.
        spare: tokens that may be written beyond the longest expected reply of a batch.
    """
    order = sorted(range(len(replies)), key=lambda i: -len(replies[i].prompt_ids))
    stops, written = set(tokenizer.stop_token_ids), {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(replies[i].expected_ids) for i in batch)
        settings = build_settings(tokenizer, max_new_tokens=longest + spare)
        with torch.no_grad():
            rows = generate_ids(model, [list(replies[i].prompt_ids) for i in batch], settings)
        for i, ids in zip(batch, rows):
            end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
            written[i] = ids[:end]
    return [written[i] for i in range(len(replies))]


def is_reproduced(tokenizer: Any, reply: Reply, written: Sequence[int]) -> bool:
    """Whether the model wrote the reply: the same tokens, or the same text in other pieces.

    Of a reply that was cut off only the beginning is known.
    """
    if not reply.is_whole:
        return tuple(written[: len(reply.expected_ids)]) == reply.expected_ids
    if tuple(written) == reply.expected_ids:
        return True
    return tokenizer.decode(list(written)).strip() == tokenizer.decode(list(reply.expected_ids)).strip()
