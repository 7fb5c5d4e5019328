"""Builds a chat's ids from its messages, with a mask of what the assistant writes; `apply_chat_template` without Jinja.

Exercise it with `pytest tests/test_tokenizer.py`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_template_utils import get_json_schema

if TYPE_CHECKING:
    from finetune_chatmodel_demo.chatglm3.tokenizer import ChatGLMTokenizer

# The official demo's system message for tools; the list of tools follows on a new line.
TOOLS_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:"


@dataclass(frozen=True)
class Chat:
    """A rendered chat.

    Attributes:
        input_ids: `[gMASK] sop` and the messages.
        assistant_mask: As long: 1 where the assistant writes the token, the role token that ends its turn included.
    """

    input_ids: list[int] = field(default_factory=list)
    assistant_mask: list[int] = field(default_factory=list)

    def extend(self, ids: Sequence[int], mask: Sequence[int]) -> None:
        """Appends ids and their mask."""
        self.input_ids.extend(ids)
        self.assistant_mask.extend(mask)


def build_chat(
    tokenizer: "ChatGLMTokenizer",
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> Chat:
    """Renders messages.

    Args:
        tokenizer: Encodes single messages.
        messages: `role`, `content`, and where they apply `metadata` and (of a system message) `tools`.
        tools: Become a first system message.
        add_generation_prompt: Whether an open `<|assistant|>` follows.

    Raises:
        ValueError: A message is malformed.
    """
    chat = Chat()
    chat.extend(tokenizer.get_prefix_tokens(), [0, 0])
    if tools:
        messages = [{"role": "system", "content": TOOLS_INTRODUCTION, "tools": tools}, *messages]
    was_assistant = False
    for index, message in enumerate(messages):
        role, metadata, content = _read_message(message, f"message {index}")
        try:
            ids = tokenizer.build_single_message(role, metadata, content)
        except ValueError as error:
            raise ValueError(f"message {index}: {error}") from error
        is_assistant = role == "assistant"
        chat.extend(ids, [int(was_assistant)] + [int(is_assistant)] * (len(ids) - 1))
        was_assistant = is_assistant
    if add_generation_prompt:
        chat.extend([tokenizer.get_command("<|assistant|>")], [int(was_assistant)])
    return chat


def list_tools(tools: Sequence[dict[str, Any] | Callable] | None) -> list[dict[str, Any]]:
    """Descriptions of tools as ChatGLM3 was taught them: name, description, parameters.

    Args:
        tools: Such descriptions, or the same in OpenAI's `{"type": "function", "function": ...}`, or documented
            functions.
    """
    described = [get_json_schema(tool) if callable(tool) else tool for tool in tools or []]
    return [tool["function"] if tool.get("type") == "function" and "function" in tool else tool for tool in described]


def _read_message(message: dict[str, Any], where: str) -> tuple[str, str, str]:
    """Role, metadata and content of a message; the tools of a system message follow its content as JSON."""
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {message!r:.80}; use a dictionary with role and content")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise ValueError(f"{where}: {key!r} is {message.get(key)!r:.80}; it must be a string")
    content = message["content"]
    if message["role"] == "system" and "tools" in message:
        content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
    return message["role"], message.get("metadata") or "", content
