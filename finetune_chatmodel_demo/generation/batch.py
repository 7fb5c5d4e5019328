"""Answers to many prompts, greedy unless asked otherwise: sorted by length, left-padded, equal to asking one by one."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from transformers import GenerationConfig

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.generation.replies import read_reply
from finetune_chatmodel_demo.generation.session import PromptTooLongError, build_settings, prompt_budget
from finetune_chatmodel_demo.generation.streaming import generate


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
        UserError: a setting is outside its range.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    budget = prompt_budget(model, max_new_tokens)
    for i, prompt in enumerate(prompts):
        if len(prompt) > budget:
            raise PromptTooLongError(f"prompt {i} has {len(prompt)} tokens; at most {budget} leave room for the answer")
    settings = build_settings(tokenizer, max_new_tokens=max_new_tokens, **(sampling or {}))
    replies = []
    for ids in generate_all(model, prompts, settings, batch_size, description=description if progress else None):
        hit_cap = ids[-1] not in settings.eos_token_id
        text = read_reply(tokenizer, ids if hit_cap else ids[:-1], prompt_format).text
        replies.append(BatchReply(text, hit_cap))
    return replies


def generate_all(
    model: Any,
    prompts: Sequence[list[int]],
    settings: GenerationConfig,
    batch_size: int,
    *,
    limits: Sequence[int] | None = None,
    description: str | None = None,
) -> list[list[int]]:
    """New ids after every prompt, in the order of the prompts, each with the stop id that ends it.

    Args:
        prompts: rendered prompts; those of similar length are answered together.
        settings: how ids are drawn, from `build_settings`; without a stop id at its end a reply hit its limit.
        batch_size: prompts a step.
        limits: most new ids after each prompt, in place of the settings' one; a batch has that of its longest.
        description: stands before a bar on standard error; None: no bar.
    """
    # Longest first: a batch that does not fit into memory fails at once, and the bar's estimate is never too low.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    stop_ids, found = set(settings.eos_token_id), {}
    with tqdm(total=len(prompts), desc=description, unit="reply", disable=description is None) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            if limits is not None:
                settings = copy.deepcopy(settings)
                settings.max_new_tokens = max(limits[i] for i in rows)
            for i, ids in zip(rows, generate(model, [prompts[i] for i in rows], settings)):
                end = next((place for place, token_id in enumerate(ids, 1) if token_id in stop_ids), len(ids))
                found[i] = ids[:end]
            bar.update(len(rows))
    return [found[i] for i in range(len(prompts))]
