"""Renders conversations into token ids and labels: the one renderer of training, inference and evaluation.

`templates` has the rules of the formats; here they become rows (ids and labels) and prompts (ids). A prompt is always
how the training row of the same conversation begins. Control ids come from structure; text is never altered. See the
result with `inspect_data.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune_chatmodel_demo.conversation.templates import (
    IGNORED_LABEL,
    TEMPLATES,
    ChatTokenizer,
    Template,
    Turn,
    format_tool_call,
    split_into_turns,
    start_ids,
    write_prompt,
    write_turns,
)

__all__ = [
    "IGNORED_LABEL",
    "PROMPT_FORMATS",
    "ChatTokenizer",
    "PromptFormat",
    "Rendering",
    "Turn",
    "format_tool_call",
    "render_conversation",
    "render_input_output",
    "render_prompt",
    "split_into_turns",
]

# What a checkpoint records; `multi-turn` is the template chatglm3.
PromptFormat = Literal["multi-turn", "input-output", "default", "raw"]
PROMPT_FORMATS = ("multi-turn", "input-output", "default", "raw")


@dataclass(frozen=True)
class Rendering:
    """One row.

    Attributes:
        input_ids: Token ids.
        labels: As long as `input_ids`: the id where the loss counts, else -100. The model shifts by one.
        turn_starts: Positions at which turns begin (chatglm3: the role tokens); empty for input-output.
        turn_ends: Positions of the tokens that end the turns; in chatglm3 the next turn's role token, or the last one.
        is_cut: A length limit cut a turn, a prompt or a response in the middle.
        turns_dropped: How many whole turns a length limit left out.
    """

    input_ids: list[int]
    labels: list[int]
    turn_starts: list[int] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)
    is_cut: bool = False
    turns_dropped: int = 0


def render_conversation(tokenizer: ChatTokenizer, record: dict[str, Any], template: Template = "chatglm3") -> Rendering:
    """Renders a validated multi-turn record at full length.

    Args:
        tokenizer: See `ChatTokenizer`.
        record: `{"tools": [...]?, "conversations": [...]}`.
        template: See `templates`.
    """
    turns = list(split_into_turns(record["conversations"], record.get("tools")))
    written = write_turns(tokenizer, turns, template)
    return Rendering(written.input_ids, written.labels, written.turn_starts, written.turn_ends)


def render_input_output(
    tokenizer: ChatTokenizer,
    record: dict[str, Any],
    max_source_length: int,
    max_target_length: int,
    ends_cut_response: bool = True,
) -> Rendering:
    """Renders a validated input-output record: `[gMASK] sop`, prompt, response, eos; no role tokens.

    Args:
        tokenizer: See `ChatTokenizer`.
        record: `{"prompt", "response"}`.
        max_source_length: Most ids of the prompt with the two that start the row; its end is cut off.
        max_target_length: Most ids of the response without eos; its end is cut off.
        ends_cut_response: Whether eos follows a response that was cut. It does in the original demo, which
            teaches the model to stop in the middle.
    """
    source = render_prompt(tokenizer, [{"role": "user", "content": record["prompt"]}], prompt_format="input-output")
    target = tokenizer.encode_text(record["response"])
    is_target_cut = len(target) > max_target_length
    is_cut = is_target_cut or len(source) > max_source_length
    source, target = source[:max_source_length], target[:max_target_length]
    if ends_cut_response or not is_target_cut:
        target.append(tokenizer.eos_token_id)
    return Rendering(source + target, [IGNORED_LABEL] * len(source) + target, is_cut=is_cut)


def render_prompt(
    tokenizer: ChatTokenizer,
    messages: Sequence[dict[str, Any]],
    *,
    tools: list[Any] | None = None,
    prompt_format: PromptFormat = "multi-turn",
) -> list[int]:
    """Renders what the model reads before it replies; a training row of the same conversation begins with it.

    Args:
        tokenizer: See `ChatTokenizer`.
        messages: The conversation so far. An assistant message may carry `metadata`, the name of a tool.
        tools: As in a record.
        prompt_format: "multi-turn" is the history and an open `<|assistant|>` (the reply starts with its
            metadata line); "input-output" is the last user message's text alone; "default" and "raw" are the history
            in the template of that name.

    Raises:
        ValueError: The format is unknown, or "input-output" has no user message.
    """
    if prompt_format not in PROMPT_FORMATS:
        raise ValueError(
            f"prompt_format {prompt_format!r} is unknown; use {', '.join(PROMPT_FORMATS[:-1])} or {PROMPT_FORMATS[-1]}"
        )
    if prompt_format != "input-output":
        template = prompt_format if prompt_format in TEMPLATES else "chatglm3"
        return write_prompt(tokenizer, list(split_into_turns(messages, tools)), template)
    questions = [message["content"] for message in messages if message["role"] == "user"]
    if not questions:
        raise ValueError(f"prompt_format input-output needs a user message, got {[m['role'] for m in messages]}")
    return start_ids(tokenizer) + tokenizer.encode_text(questions[-1])
