"""Renders conversations into token ids and labels: the one renderer of training, inference and evaluation.

The rules are ChatGLM3's, held to `tests/golden/loss_masks.jsonl`: `[gMASK] sop`, then every message as role
token, metadata line and content. There is no end-of-turn token: the next role token, or eos at the end, ends
a turn, so after a supervised message that token is a target too. Control ids come from structure; text is
never altered. See the result with `inspect_data.py`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

IGNORED_LABEL = -100
TOOLS_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:\n"
SUPERVISED_ROLES = frozenset({"assistant", "tool"})


class ChatTokenizer(Protocol):
    """What rendering asks of a tokenizer."""

    eos_token_id: int

    def get_command(self, token: str) -> int: ...
    def encode_text(self, text: str) -> list[int]: ...
    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]: ...


@dataclass(frozen=True)
class Rendering:
    """One row.

    Attributes:
        input_ids: Token ids.
        labels: As long as `input_ids`: the id where the loss counts, else -100. The model shifts by one.
        turn_starts: Positions of the role tokens; empty for input-output.
        is_cut: A length limit cut a turn, a prompt or a response in the middle.
        turns_dropped: How many whole turns a length limit left out.
    """

    input_ids: list[int]
    labels: list[int]
    turn_starts: list[int] = field(default_factory=list)
    is_cut: bool = False
    turns_dropped: int = 0


@dataclass(frozen=True)
class Turn:
    """One role token with what follows it. `is_supervised`: the model learns to write it, and to end it."""

    role: str
    metadata: str
    content: str
    is_supervised: bool


def split_into_turns(messages: Sequence[dict[str, Any]], tools: list[Any] | None = None) -> Iterator[Turn]:
    """Yields a conversation's turns: `tools` become the first, a `tool` message a call and its result.

    The loss is on for assistant messages and calls of tools, off for the rest; `loss` in a message overrides
    that (the original demo ignores it on system and user messages, and turns it on for observations that are
    messages of their own). The result of a `tool` message never counts.
    """
    if tools is not None:
        yield Turn("system", "", TOOLS_INTRODUCTION + json.dumps(tools, indent=4, ensure_ascii=False), False)
    for message in messages:
        role, loss = message["role"], message.get("loss")
        is_supervised = role in SUPERVISED_ROLES if loss is None else bool(loss)
        if role == "tool":
            yield Turn("assistant", message["name"], format_tool_call(message["parameters"]), is_supervised)
            observation = message["observation"]
            if not isinstance(observation, str):
                observation = json.dumps(observation, ensure_ascii=False)
            yield Turn("observation", "", observation, False)
        else:
            metadata = (message.get("metadata") or "") if role == "assistant" else ""
            yield Turn(role, metadata, message["content"], is_supervised)


def format_tool_call(parameters: dict[str, Any]) -> str:
    """Writes a call as ChatGLM3 was taught to: Python in a code fence, always of the function `tool_call`."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in parameters.items())
    return f"```python\ntool_call({arguments})\n```"


def render_conversation(tokenizer: ChatTokenizer, record: dict[str, Any]) -> Rendering:
    """Renders a validated multi-turn record at full length.

    Args:
        tokenizer: See `ChatTokenizer`.
        record: `{"tools": [...]?, "conversations": [...]}`.
    """
    input_ids, labels, turn_starts = _start_ids(tokenizer), [IGNORED_LABEL, IGNORED_LABEL], []
    was_supervised = False
    for turn in split_into_turns(record["conversations"], record.get("tools")):
        ids = tokenizer.build_single_message(turn.role, turn.metadata, turn.content)
        turn_starts.append(len(input_ids))
        labels.append(ids[0] if was_supervised else IGNORED_LABEL)
        labels.extend(ids[1:] if turn.is_supervised else [IGNORED_LABEL] * (len(ids) - 1))
        input_ids.extend(ids)
        was_supervised = turn.is_supervised
    input_ids.append(tokenizer.eos_token_id)
    labels.append(tokenizer.eos_token_id if was_supervised else IGNORED_LABEL)
    return Rendering(input_ids, labels, turn_starts)


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
    prompt_format: Literal["multi-turn", "input-output"] = "multi-turn",
) -> list[int]:
    """Renders what the model reads before it replies; a training row of the same conversation begins with it.

    Args:
        tokenizer: See `ChatTokenizer`.
        messages: The conversation so far. An assistant message may carry `metadata`, the name of a tool.
        tools: As in a record.
        prompt_format: "multi-turn" is the history and an open `<|assistant|>` (the reply starts with its
            metadata line); "input-output" is the last user message's text alone.

    Raises:
        ValueError: The format is unknown, or "input-output" has no user message.
    """
    if prompt_format == "multi-turn":
        ids = _start_ids(tokenizer)
        for turn in split_into_turns(messages, tools):
            ids += tokenizer.build_single_message(turn.role, turn.metadata, turn.content)
        return [*ids, tokenizer.get_command("<|assistant|>")]
    if prompt_format != "input-output":
        raise ValueError(f"prompt_format {prompt_format!r} is unknown; use multi-turn or input-output")
    questions = [message["content"] for message in messages if message["role"] == "user"]
    if not questions:
        raise ValueError(f"prompt_format input-output needs a user message, got {[m['role'] for m in messages]}")
    return _start_ids(tokenizer) + tokenizer.encode_text(questions[-1])


def _start_ids(tokenizer: ChatTokenizer) -> list[int]:
    return [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
