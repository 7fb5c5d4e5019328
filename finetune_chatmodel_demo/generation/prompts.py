"""Prompts that fit the model's context: whole turns are dropped from the front, never half of one."""

from dataclasses import dataclass
from typing import Any

from finetune_chatmodel_demo.conversation.render import count_droppable_turns, drop_oldest_turns, render_prompt


class PromptTooLongError(ValueError):
    """The newest question alone leaves no room for an answer."""


@dataclass(frozen=True)
class FittedPrompt:
    """`input_ids` ends with the open assistant turn; `messages` is what is left of the conversation."""

    input_ids: list[int]
    messages: list[dict[str, Any]]
    turns_dropped: int


def drop_oldest_turn(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out the oldest question with all that answers it; system messages at the start stay.

    Returns:
        The shorter conversation, or the same one when only its newest question is left.
    """
    return drop_oldest_turns(messages, 1) if count_droppable_turns(messages) else messages


def fit_prompt(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    max_prompt_tokens: int,
    tools: list[dict[str, Any]] | None = None,
    prompt_format: str = "multi-turn",
) -> FittedPrompt:
    """Render a conversation whose answer comes next; drop its oldest turns while it is too long.

    Raises:
        PromptTooLongError: not even the newest question fits.
    """
    dropped = 0
    while True:
        ids = render_prompt(tokenizer, messages, tools=tools, prompt_format=prompt_format)
        if len(ids) <= max_prompt_tokens:
            return FittedPrompt(ids, messages, dropped)
        shorter = drop_oldest_turn(messages)
        if len(shorter) == len(messages):
            raise PromptTooLongError(
                f"the prompt is {len(ids)} tokens long, and the model's context leaves room for {max_prompt_tokens} "
                "before the answer; shorten the question or the system prompt, or lower --max-new-tokens"
            )
        messages, dropped = shorter, dropped + 1


def prompt_budget(model: Any, max_new_tokens: int) -> int:
    """Tokens that a prompt may have, so that the answer still ends inside the model's `seq_length`.

    Prefix tokens do not count: text positions start at 0 behind the prefix.

    Raises:
        ValueError: the answer alone would fill the context.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    budget = model.config.seq_length - max_new_tokens
    if budget < 1:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, and the model's context is {model.config.seq_length} tokens for "
            "question and answer together; use a smaller number"
        )
    return budget
