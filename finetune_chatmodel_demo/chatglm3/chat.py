"""Chats as ids, built from their structure: `build_single_message`, `build_chat_input` and `apply_chat_template`.

No Jinja template is involved. Those write control tokens as text, which this tokenizer never reads back as control ids.
Exercise it with `pytest tests/test_tokenizer.py`.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import BatchEncoding
from transformers.utils.chat_template_utils import get_json_schema

ROLES = ("system", "user", "assistant", "observation")
# The official demo's system message for tools; the list of tools follows on a new line.
TOOLS_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:"


class Chat(NamedTuple):
    """A rendered chat: its ids, and as many mask values, 1 where the assistant writes the token."""

    input_ids: list[int]
    assistant_mask: list[int]


class ChatMethods:
    """The methods of `ChatGLMTokenizer` that concern chats."""

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """Ids of one turn: role token, metadata and a line break, content.

        Args:
            role: system, user, assistant or observation.
            metadata: Of an assistant that calls a tool, its name; else empty.
            message: The content, encoded by SentencePiece alone.

        Raises:
            ValueError: The role is unknown.
        """
        if role not in ROLES:
            raise ValueError(f"role {role!r} is unknown; use {', '.join(ROLES[:-1])} or {ROLES[-1]}")
        return [self.get_command(f"<|{role}|>"), *self.encode_text(f"{metadata}\n"), *self.encode_text(message)]

    def build_chat_input(
        self, query: str, history: Sequence[dict[str, Any]] | None = None, role: str = "user"
    ) -> BatchEncoding:
        """What the model reads before it replies: `[gMASK] sop`, history, query, open `<|assistant|>`.

        Args:
            query: The newest message.
            history: Messages with `role`, `content`, and where they apply `metadata` and (of a system message) `tools`.
            role: Whose message the query is; "observation" for the result of a tool.

        Returns:
            `input_ids`, `attention_mask` and `position_ids`, tensors of shape (1, T).

        Raises:
            ValueError: A message is malformed.
        """
        messages = [*(history or []), {"role": role, "content": query}]
        return self.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")

    def apply_chat_template(
        self,
        conversation: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        tools: Sequence[dict[str, Any] | Callable] | None = None,
        documents: Sequence[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | list[int] | list[list[int]] | BatchEncoding:
        """Ids of a chat or of a batch of chats; with `add_generation_prompt` the same as `build_chat_input`'s.

        Args:
            conversation: Messages as in `build_chat_input`'s history, or several such lists.
            tools: Become a first system message in the official wording: descriptions with name, description and
                parameters, the same in OpenAI's form, or documented functions.
            documents: Not supported.
            chat_template: Not supported, and a template in `tokenizer_config.json` is not used.
            add_generation_prompt: Whether an open `<|assistant|>` ends the chat.
            continue_final_message: Whether the last message is to be continued. ChatGLM3 has no token that ends a
                turn, so this only excludes `add_generation_prompt`.
            tokenize: False gives a text to read, not to encode: control tokens in a text are only text.
            padding: As in `tokenizer(...)`, and so are `truncation`, `max_length`, `return_tensors`.
            return_dict: False gives `input_ids` alone.
            return_assistant_tokens_mask: Adds `assistant_masks`: 1 at every token that the assistant writes, which are
                metadata line, content, and the role token after them, with which it stops.
            tokenizer_kwargs: More arguments of `tokenizer(...)`.
            **kwargs: Variables of Jinja templates; they have no effect.

        Raises:
            ValueError: A message is malformed, arguments exclude each other, or one is not supported.
        """
        if documents or chat_template is not None:
            raise ValueError(
                f"{'documents' if documents else 'chat_template'} is not supported: chats are built from structure, so "
                "that no text becomes a control token; put the text into the messages"
            )
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other; choose one")
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ValueError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
        if not conversation:
            raise ValueError("the conversation is empty; give at least one message")
        is_batch = isinstance(next(iter(conversation)), (list, tuple))
        tools = _describe_tools(tools)
        chats = [
            self._build_chat(c, tools, add_generation_prompt) for c in (conversation if is_batch else [conversation])
        ]
        if not tokenize:
            texts = [self.decode(chat.input_ids) for chat in chats]
            return texts if is_batch else texts[0]
        options = {"padding": padding, "truncation": truncation, "max_length": max_length, **(tokenizer_kwargs or {})}
        ids = [chat.input_ids for chat in chats] if is_batch else chats[0].input_ids
        encoded = self(ids, add_special_tokens=False, return_tensors=return_tensors, **options)
        if not return_dict:
            return encoded["input_ids"]
        if return_assistant_tokens_mask:
            self._add_assistant_masks(encoded, [chat.assistant_mask for chat in chats], options)
            encoded.convert_to_tensors(return_tensors)
        return encoded

    def _build_chat(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]], add_generation_prompt: bool
    ) -> Chat:
        input_ids, mask = self.get_prefix_tokens(), [0, 0]
        if tools:
            messages = [{"role": "system", "content": TOOLS_INTRODUCTION, "tools": tools}, *messages]
        was_assistant = False
        for index, message in enumerate(messages):
            try:
                ids = self.build_single_message(*_read_message(message))
            except ValueError as error:
                raise ValueError(f"message {index}: {error}") from error
            is_assistant = message["role"] == "assistant"
            input_ids += ids
            mask += [int(was_assistant), *[int(is_assistant)] * (len(ids) - 1)]
            was_assistant = is_assistant
        if add_generation_prompt:
            input_ids.append(self.get_command("<|assistant|>"))
            mask.append(int(was_assistant))
        return Chat(input_ids, mask)

    def _add_assistant_masks(self, encoded: BatchEncoding, masks: list[list[int]], options: dict[str, Any]) -> None:
        """Adds `assistant_masks`, cut and padded as `input_ids` are."""
        rows = encoded["input_ids"]
        is_flat = isinstance(rows, list) and not isinstance(rows[0], list)
        limit = (options["max_length"] or self.model_max_length) if options["truncation"] else None
        pads_left = (options.get("padding_side") or self.padding_side) == "left"
        fitted = []
        for mask, row in zip(masks, [rows] if is_flat else rows, strict=True):
            cut = max(len(mask) - limit, 0) if limit else 0
            mask = mask[cut:] if self.truncation_side == "left" else mask[: len(mask) - cut]
            zeros = [0] * (len(row) - len(mask))
            fitted.append(zeros + mask if pads_left else mask + zeros)
        encoded["assistant_masks"] = fitted[0] if is_flat else fitted


def _describe_tools(tools: Sequence[dict[str, Any] | Callable] | None) -> list[dict[str, Any]]:
    """Descriptions as ChatGLM3 was taught them, out of OpenAI's `{"type": "function", ...}` and of functions."""
    described = [get_json_schema(tool) if callable(tool) else tool for tool in tools or []]
    return [tool["function"] if tool.get("type") == "function" and "function" in tool else tool for tool in described]


def _read_message(message: dict[str, Any]) -> tuple[str, str, str]:
    """Role, metadata and content of a message; the tools of a system message follow its content as JSON."""
    if not isinstance(message, dict):
        raise ValueError(f"got {message!r:.80}; use a dictionary with role and content")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise ValueError(f"{key!r} is {message.get(key)!r:.80}; it must be a string")
    content = message["content"]
    if message["role"] == "system" and message.get("tools") is not None:
        content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
    return message["role"], message.get("metadata") or "", content
