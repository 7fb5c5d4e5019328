"""Answers to many prompts, greedy unless asked otherwise: sorted by length, left-padded, equal to asking one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from finetune_chatmodel_demo.generation.prompts import PromptTooLongError, prompt_budget
from finetune_chatmodel_demo.generation.replies import read_reply
from finetune_chatmodel_demo.generation.session import build_settings


@dataclass(frozen=True)
class BatchReply:
    """`text` as `ChatSession.reply` streams it; `hit_cap` when max_new_tokens ended it and not the model."""

    text: str
    hit_cap: bool


def generate_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    prompt_format: str = "multi-turn",
    sampling: Mapping[str, Any] | None = None,
    progress: bool = False,
    description: str = "answering",
) -> list[BatchReply]:
    """Answer every prompt.

    Args:
        prompts: rendered prompts, as from `render_prompt`.
        batch_size: prompts a step; rows of a batch have similar lengths.
        sampling: `do_sample` and what belongs to it, as `build_settings` takes them; default: greedy.
        progress: show a bar on standard error.

    Returns:
        Replies in the order of the prompts.

    Raises:
        PromptTooLongError: a prompt leaves no room for `max_new_tokens`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    budget = prompt_budget(model, max_new_tokens)
    for i, prompt in enumerate(prompts):
        if len(prompt) > budget:
            raise PromptTooLongError(f"prompt {i} has {len(prompt)} tokens; at most {budget} leave room for the answer")
    settings = build_settings(tokenizer, max_new_tokens=max_new_tokens, **(sampling or {}))
    # Longest first: a batch that does not fit into memory fails at once, and the bar's estimate is never too low.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    replies: dict[int, BatchReply] = {}
    with tqdm(total=len(prompts), desc=description, unit="reply", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            for i, ids in zip(rows, generate_ids(model, [prompts[i] for i in rows], settings)):
                replies[i] = _read_row(tokenizer, ids, settings.eos_token_id, prompt_format)
            bar.update(len(rows))
    return [replies[i] for i in range(len(prompts))]


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    prompt_format: str = "multi-turn",
    progress: bool = False,
) -> list[str]:
    """Texts of `generate_replies`."""
    replies = generate_replies(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        prompt_format=prompt_format,
        progress=progress,
    )
    return [reply.text for reply in replies]


def generate_ids(model: Any, prompts: list[list[int]], settings: Any) -> list[list[int]]:
    """New ids of one left-padded batch, each row with whatever follows its stop id."""
    width = max(map(len, prompts))
    pad = settings.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    # 1 = a token of the prompt, 0 = padding in front of it
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
    return output[:, width:].tolist()


def _read_row(tokenizer: Any, ids: list[int], stop_ids: list[int], prompt_format: str) -> BatchReply:
    end = next((i for i, token_id in enumerate(ids) if token_id in stop_ids), None)
    return BatchReply(read_reply(tokenizer, ids[:end], prompt_format).text, hit_cap=end is None)
