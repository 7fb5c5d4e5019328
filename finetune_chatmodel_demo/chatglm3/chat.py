"""Chats as ids, built from their structure: the one renderer of training, inference and evaluation.

`render_chat` writes messages in one of three templates and says where the loss counts; `apply_chat_template` and
`build_chat_input` are the same ids for users of transformers. No Jinja template is involved: those write control tokens
as text, which this tokenizer never reads back as control ids. What a text holds never becomes a control id.

`chatglm3` is the format that the chat models were taught, held to `tests/golden/loss_masks.jsonl`: every turn is a role
token, a metadata line and the content. There is no end-of-turn token: the next role token ends a turn, and at the end
of the conversation eos, or `<|observation|>` after a call of a tool, whose result is what follows.

`default` and `raw` are for base models, which know no role tokens. Both write text and let eos end every reply:

    default   {system}\\nHuman: {user}\\nAssistant: {reply}<eos>\\nHuman: {user}\\nAssistant: {reply}<eos>
    raw       {system}\\n{user}{reply}<eos>\\n{user}{reply}<eos>

`default` has the text of LLaMA-Factory's template of this name as it was when that program served ChatGLM3 (March
2024: `Human: {{content}}\\nAssistant: ` with the blank at its end; later versions dropped the blank), cut into the same
pieces for the tokenizer: the system text with its newline, the newline between two rounds, a user's turn up to the
blank, the reply. What differs: a row begins with `[gMASK] sop` here in every template, because ChatGLM3's tokenizer
puts them in front of whatever a base model reads, and they were missing there. A tool's result is `Observation: …` in
`default` and its text in `raw`; a call is the tool's name on a line of its own and the call in its code fence; the
list of tools is the same system text as in `chatglm3`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from transformers import BatchEncoding
from transformers.utils.chat_template_utils import get_json_schema

ROLES = ("system", "user", "assistant", "observation")
# The official demo's system message for tools; the list of tools follows on a new line.
TOOLS_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:"


class Turn(NamedTuple):
    """One turn. `is_target`: the model learns to write it, and to end it."""

    role: str
    metadata: str
    content: str
    is_target: bool


@dataclass
class RenderedChat:
    """A chat as ids.

    Attributes:
        input_ids: Token ids, with the two that start a row.
        mask: As long as `input_ids`: 1 where the loss counts.
        turn_starts: Position at which each turn begins.
        turn_ends: Position of the token that ends each turn; in `chatglm3` that is where the next one begins. Empty
            where nothing ends the chat.
    """

    input_ids: list[int]
    mask: list[int]
    turn_starts: list[int] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)

    def add(self, ids: list[int], is_target: bool) -> None:
        """Appends ids; the loss counts at all of them, or at none."""
        self.input_ids += ids
        self.mask += [int(is_target)] * len(ids)


class TextTemplate(NamedTuple):
    """A template of text alone.

    Attributes:
        prefixes: What stands in front of the content of a turn that is no reply, by its role.
        reply: What stands in front of a reply.
        before_reply: What stands between such a turn and the reply that follows.
    """

    prefixes: dict[str, str]
    reply: str
    before_reply: str


TEXT_TEMPLATES = {
    "default": TextTemplate(
        {"system": "", "user": "Human: ", "observation": "Observation: "}, reply="Assistant: ", before_reply="\n"
    ),
    "raw": TextTemplate({"system": "", "user": "", "observation": ""}, reply="", before_reply=""),
}


def split_into_turns(messages: Sequence[dict[str, Any]], tools: list[Any] | None = None) -> list[Turn]:
    """The turns of checked messages: `tools` become the first, a `tool` message a call and its result.

    The loss is on for assistant messages and calls of tools, off for the rest; `loss` in a message overrides that (the
    original demo ignores it on system and user messages, and turns it on for observations that are messages of their
    own). The result of a `tool` message never counts.
    """
    if tools:
        messages = [{"role": "system", "content": TOOLS_INTRODUCTION, "tools": tools}, *messages]
    turns = []
    for message in messages:
        role, loss = message["role"], message.get("loss")
        is_target = role in ("assistant", "tool") if loss is None else bool(loss)
        if role == "tool":
            turns.append(Turn("assistant", message["name"], format_tool_call(message["parameters"]), is_target))
            if "observation" in message:
                turns.append(Turn("observation", "", _as_text(message["observation"]), False))
            continue
        content = message["content"]
        if role == "system" and message.get("tools"):
            content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
        turns.append(Turn(role, message.get("metadata") or "", content, is_target))
    return turns


def format_tool_call(parameters: dict[str, Any]) -> str:
    """Writes a call as ChatGLM3 was taught to: Python in a code fence, always of the function `tool_call`."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in parameters.items())
    return f"```python\ntool_call({arguments})\n```"


def _as_text(observation: Any) -> str:
    return observation if isinstance(observation, str) else json.dumps(observation, ensure_ascii=False)


class ChatMethods:
    """The methods of `ChatGLMTokenizer` that concern chats."""

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: list[Any] | None = None,
        *,
        template: Literal["chatglm3", "default", "raw"] = "chatglm3",
        ending: Literal["", "stop", "reply"] = "stop",
    ) -> RenderedChat:
        """Writes checked messages.

        Args:
            messages: `{"role", "content", "metadata"?, "loss"?}`, `{"role": "tool", "name", "parameters",
                "observation"}`, or a system message with `tools`.
            tools: Become a first system message in the official wording.
            template: See the module.
            ending: What follows the last turn: "stop" ends it as a training row ends, "reply" is what opens a reply.

        Raises:
            ValueError: The template is unknown.
        """
        turns = split_into_turns(messages, tools)
        if template in TEXT_TEMPLATES:
            return self._write_text(turns, TEXT_TEMPLATES[template], is_open=ending == "reply")
        if template != "chatglm3":
            raise ValueError(f"template {template!r} is unknown; use chatglm3, {' or '.join(TEXT_TEMPLATES)}")
        chat = RenderedChat(self.get_prefix_tokens(), [0, 0])
        was_target = False
        for turn in turns:
            ids = self.build_single_message(turn.role, turn.metadata, turn.content)
            chat.turn_starts.append(len(chat.input_ids))
            # The role token belongs to the turn that it ends.
            chat.add(ids[:1], was_target)
            chat.add(ids[1:], turn.is_target)
            was_target = turn.is_target
        if ending:
            last = self.get_command("<|assistant|>") if ending == "reply" else self._stop_id(turns[-1], template)
            chat.add([last], was_target)
            chat.turn_ends = [*chat.turn_starts[1:], len(chat.input_ids) - 1]
        return chat

    def render_reply(self, message: dict[str, Any], template: str = "chatglm3") -> list[int]:
        """What a model should write after a prompt: an assistant message or a call, with the token that it stops at."""
        turn = split_into_turns([message])[0]
        if template in TEXT_TEMPLATES:
            return [*self.encode_text(_reply_text(turn)), self._stop_id(turn, template)]
        ids = self.build_single_message(turn.role, turn.metadata, turn.content)
        return [*ids[1:], self._stop_id(turn, template)]

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

    def _stop_id(self, turn: Turn, template: str) -> int:
        """What ends a turn that nothing follows: eos; in `chatglm3`, after a call, the role of the awaited result."""
        is_call = template == "chatglm3" and turn.role == "assistant" and bool(turn.metadata)
        return self.get_command("<|observation|>") if is_call else self.eos_token_id

    def _write_text(self, turns: Sequence[Turn], template: TextTemplate, is_open: bool) -> RenderedChat:
        """The turns as text; where `is_open`, with what opens a reply after them."""
        chat = RenderedChat(self.get_prefix_tokens(), [0, 0])
        next_roles = [turn.role for turn in turns[1:]] + ["assistant" if is_open else ""]
        role_before = None
        for turn, next_role in zip(turns, next_roles):
            chat.turn_starts.append(len(chat.input_ids))
            self._open_turn(chat, template, role_before, turn.role)
            if turn.role == "assistant":
                chat.add([*self.encode_text(_reply_text(turn)), self.eos_token_id], turn.is_target)
            else:
                end = template.before_reply + template.reply if next_role == "assistant" else "\n"
                chat.add(self.encode_text(template.prefixes[turn.role] + turn.content + end), turn.is_target)
            chat.turn_ends.append(len(chat.input_ids) - 1)
            role_before = turn.role
        if is_open:
            self._open_turn(chat, template, role_before, "assistant")
        return chat

    def _open_turn(self, chat: RenderedChat, template: TextTemplate, role_before: str | None, role: str) -> None:
        """Writes what stands between a reply and the turn after it, and in front of a reply that answers nothing."""
        if role_before == "assistant":
            chat.add(self.encode_text("\n"), False)
        if role == "assistant" and template.reply and role_before in (None, "assistant"):
            chat.add(self.encode_text(template.reply), False)

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
        batch = conversation if is_batch else [conversation]
        chats = [self._check_and_render(messages, tools, add_generation_prompt) for messages in batch]
        if not tokenize:
            texts = [self.decode(chat.input_ids) for chat in chats]
            return texts if is_batch else texts[0]
        options = {"padding": padding, "truncation": truncation, "max_length": max_length, **(tokenizer_kwargs or {})}
        ids = [chat.input_ids for chat in chats] if is_batch else chats[0].input_ids
        encoded = self(ids, add_special_tokens=False, return_tensors=return_tensors, **options)
        if not return_dict:
            return encoded["input_ids"]
        if return_assistant_tokens_mask:
            self._add_assistant_masks(encoded, [chat.mask for chat in chats], options)
            encoded.convert_to_tensors(return_tensors)
        return encoded

    def _check_and_render(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]], add_generation_prompt: bool
    ) -> RenderedChat:
        for index, message in enumerate(messages):
            try:
                _check_message(message)
            except ValueError as error:
                raise ValueError(f"message {index}: {error}") from error
        return self.render_chat(messages, tools, ending="reply" if add_generation_prompt else "")

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


def _check_message(message: dict[str, Any]) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"got {message!r:.80}; use a dictionary with role and content")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise ValueError(f"{key!r} is {message.get(key)!r:.80}; it must be a string")
    if message["role"] not in ROLES:
        raise ValueError(f"role {message['role']!r} is unknown; use {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    message["content"].encode("utf-8")  # half a surrogate pair is no text


def _reply_text(turn: Turn) -> str:
    return f"{turn.metadata}\n{turn.content}" if turn.metadata else turn.content
