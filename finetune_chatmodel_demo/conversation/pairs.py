"""Prompts with the replies to them: pairs of a better and a worse reply (rm, dpo), and prompts for ppo.

A prompt that is too long loses its oldest turns, whole ones, and the same for both replies; a reply is never cut.
Where not even the newest question fits together with the replies, there is no row, and the report says so. Look at
rows with `inspect_data.py --stage dpo`.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune_chatmodel_demo.conversation.templates import (
    SUPERVISED_ROLES,
    ChatTokenizer,
    Template,
    make_reply,
    split_into_turns,
    write_prompt,
    write_reply,
)
from finetune_chatmodel_demo.conversation.truncation import count_droppable_turns, drop_oldest_turns


@dataclass(frozen=True)
class PromptedReplies:
    """A prompt and what may follow it.

    Attributes:
        prompt_ids: Ends with `<|assistant|>` (chatglm3), or with the text that opens a reply.
        replies: Ids of each reply, ending with its stop token.
        turns_kept: Turns in the prompt.
        turns_dropped: Oldest turns that the length limit left out.
        fits: Whether prompt and longest reply are within the limit.
    """

    prompt_ids: list[int]
    replies: list[list[int]]
    turns_kept: int
    turns_dropped: int
    fits: bool


def render_pair(
    tokenizer: ChatTokenizer, record: dict[str, Any], template: Template, max_seq_length: int
) -> PromptedReplies:
    """Renders a validated preference record; `replies` are the chosen and the rejected one.

    Args:
        tokenizer: See `ChatTokenizer`.
        record: `{"tools"?, "conversations": [...], "chosen": {...}, "rejected": {...}}`.
        template: See `templates`.
        max_seq_length: Most ids of the prompt together with the longer reply.
    """
    replies = [write_reply(tokenizer, make_reply(record[key]), template) for key in ("chosen", "rejected")]
    room = max_seq_length - max(map(len, replies))
    return _fit(tokenizer, record["conversations"], record.get("tools"), template, replies, room)


def render_ppo_prompt(
    tokenizer: ChatTokenizer, record: dict[str, Any], template: Template, max_seq_length: int
) -> PromptedReplies:
    """Renders a validated multi-turn record as a prompt and, where there is one, the reference reply.

    The prompt is everything before the last assistant message (or call of a tool). A conversation that ends with a
    question, or with the result of a call that is a message of its own, is a prompt as a whole, with `[]` as the
    reference.

    Args:
        tokenizer: See `ChatTokenizer`.
        record: `{"tools"?, "conversations": [...]}`.
        template: See `templates`.
        max_seq_length: Most ids of the prompt.
    """
    messages = record["conversations"]
    end, replies = len(messages), [[]]
    if messages[-1]["role"] not in ("user", "observation"):
        end = max((i for i, each in enumerate(messages) if each["role"] in SUPERVISED_ROLES), default=end)
    if end < len(messages):
        replies = [write_reply(tokenizer, make_reply(messages[end]), template)]
    return _fit(tokenizer, messages[:end], record.get("tools"), template, replies, max_seq_length)


def _fit(
    tokenizer: ChatTokenizer,
    messages: Sequence[dict[str, Any]],
    tools: list[Any] | None,
    template: Template,
    replies: list[list[int]],
    room: int,
) -> PromptedReplies:
    """Leaves out as many of the oldest turns as the room demands; the newest question always stays."""

    def render(dropped: int) -> list[int]:
        turns = split_into_turns(drop_oldest_turns(messages, dropped), tools)
        return write_prompt(tokenizer, list(turns), template)

    ids, dropped = render(0), 0
    if len(ids) > room:
        # A record may have hundreds of turns: a search, not one try after the other.
        most = count_droppable_turns(messages)
        dropped = bisect.bisect_left(range(most), True, key=lambda count: len(render(count)) <= room)
        ids = render(dropped)
    all_turns = len(list(split_into_turns(messages, tools)))
    kept = len(list(split_into_turns(drop_oldest_turns(messages, dropped), tools)))
    return PromptedReplies(ids, replies, kept, all_turns - kept, fits=len(ids) <= room)
