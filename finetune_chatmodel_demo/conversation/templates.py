"""How the turns of a conversation become token ids: the templates `chatglm3`, `default` and `raw`.

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
list of tools is the same system text as in `chatglm3`. `raw` with one question is the row of `--train_format
input-output`.

Control ids come from structure in all three; what a text holds never becomes one. See rows with
`inspect_data.py --template default`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Template = Literal["chatglm3", "default", "raw"]
TEMPLATES = ("chatglm3", "default", "raw")
IGNORED_LABEL = -100
TOOLS_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:\n"
SUPERVISED_ROLES = frozenset({"assistant", "tool"})
REPLY_ROLE = "assistant"


class ChatTokenizer(Protocol):
    """What rendering asks of a tokenizer."""

    eos_token_id: int

    def get_command(self, token: str) -> int: ...
    def encode_text(self, text: str) -> list[int]: ...
    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]: ...


@dataclass(frozen=True)
class Turn:
    """One turn. `is_supervised`: the model learns to write it, and to end it."""

    role: str
    metadata: str
    content: str
    is_supervised: bool


@dataclass
class Written:
    """Turns as ids.

    Attributes:
        input_ids: Token ids, with the two that start a row.
        labels: As long as `input_ids`: the id where the loss counts, else -100. The model shifts by one.
        turn_starts: Position at which each turn begins.
        turn_ends: Position of the token that ends each turn; in `chatglm3` that is where the next one begins.
    """

    input_ids: list[int]
    labels: list[int]
    turn_starts: list[int] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)

    def add(self, ids: list[int], is_supervised: bool) -> None:
        """Appends ids; the loss counts at all of them, or at none."""
        self.input_ids += ids
        self.labels += ids if is_supervised else [IGNORED_LABEL] * len(ids)


@dataclass(frozen=True)
class TextTemplate:
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


def check_template(template: str) -> None:
    """Refuses a template that does not exist.

    Raises:
        ValueError: Names those that do.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown; use {', '.join(TEMPLATES[:-1])} or {TEMPLATES[-1]}")


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
        if role in SUPERVISED_ROLES:
            yield make_reply(message, is_supervised)
        else:
            yield Turn(role, "", message["content"], is_supervised)
        if role == "tool":
            observation = message["observation"]
            if not isinstance(observation, str):
                observation = json.dumps(observation, ensure_ascii=False)
            yield Turn("observation", "", observation, False)


def make_reply(message: dict[str, Any], is_supervised: bool = True) -> Turn:
    """The turn that an assistant message is, or the call of a `tool` message."""
    if message["role"] == "tool":
        return Turn(REPLY_ROLE, message["name"], format_tool_call(message["parameters"]), is_supervised)
    return Turn(REPLY_ROLE, message.get("metadata") or "", message["content"], is_supervised)


def format_tool_call(parameters: dict[str, Any]) -> str:
    """Writes a call as ChatGLM3 was taught to: Python in a code fence, always of the function `tool_call`."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in parameters.items())
    return f"```python\ntool_call({arguments})\n```"


def start_ids(tokenizer: ChatTokenizer) -> list[int]:
    """The two ids that begin every sequence that ChatGLM3 reads."""
    return [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]


def write_turns(tokenizer: ChatTokenizer, turns: Sequence[Turn], template: Template) -> Written:
    """Writes a whole conversation, with what ends it."""
    check_template(template)
    if template != "chatglm3":
        return _write_text(tokenizer, turns, TEXT_TEMPLATES[template], is_open=False)
    written = _write_chatglm3(tokenizer, turns)
    written.add([_stop_id(tokenizer, turns[-1], template)], turns[-1].is_supervised)
    written.turn_ends = [*written.turn_starts[1:], len(written.input_ids) - 1]
    return written


def write_prompt(tokenizer: ChatTokenizer, turns: Sequence[Turn], template: Template) -> list[int]:
    """Ids of what comes before a reply, up to the token or text that opens it."""
    check_template(template)
    if template != "chatglm3":
        return _write_text(tokenizer, turns, TEXT_TEMPLATES[template], is_open=True).input_ids
    return [*_write_chatglm3(tokenizer, turns).input_ids, tokenizer.get_command("<|assistant|>")]


def write_reply(tokenizer: ChatTokenizer, turn: Turn, template: Template) -> list[int]:
    """Ids of what a model should write after a prompt, with the token that it stops at."""
    check_template(template)
    if template == "chatglm3":
        ids = tokenizer.build_single_message(turn.role, turn.metadata, turn.content)[1:]
    else:
        ids = tokenizer.encode_text(_reply_text(turn))
    return [*ids, _stop_id(tokenizer, turn, template)]


def _write_chatglm3(tokenizer: ChatTokenizer, turns: Sequence[Turn]) -> Written:
    """The turns without what ends the last one. The role token belongs to the turn that it ends."""
    ids = start_ids(tokenizer)
    written = Written(ids, [IGNORED_LABEL] * len(ids))
    was_supervised = False
    for turn in turns:
        ids = tokenizer.build_single_message(turn.role, turn.metadata, turn.content)
        written.turn_starts.append(len(written.input_ids))
        written.add(ids[:1], was_supervised)
        written.add(ids[1:], turn.is_supervised)
        was_supervised = turn.is_supervised
    return written


def _write_text(tokenizer: ChatTokenizer, turns: Sequence[Turn], template: TextTemplate, is_open: bool) -> Written:
    """The turns as text; where `is_open`, with what opens a reply after them."""
    ids = start_ids(tokenizer)
    written = Written(ids, [IGNORED_LABEL] * len(ids))
    next_roles = [turn.role for turn in turns[1:]] + [REPLY_ROLE if is_open else ""]
    role_before = None
    for turn, next_role in zip(turns, next_roles):
        written.turn_starts.append(len(written.input_ids))
        _open_turn(tokenizer, written, template, role_before, turn.role)
        if turn.role == REPLY_ROLE:
            written.add([*tokenizer.encode_text(_reply_text(turn)), tokenizer.eos_token_id], turn.is_supervised)
        else:
            end = template.before_reply + template.reply if next_role == REPLY_ROLE else "\n"
            written.add(tokenizer.encode_text(template.prefixes[turn.role] + turn.content + end), turn.is_supervised)
        written.turn_ends.append(len(written.input_ids) - 1)
        role_before = turn.role
    if is_open:
        _open_turn(tokenizer, written, template, role_before, REPLY_ROLE)
    return written


def _open_turn(
    tokenizer: ChatTokenizer, written: Written, template: TextTemplate, role_before: str | None, role: str
) -> None:
    """Writes what stands between a reply and the turn after it, and in front of a reply that answers nothing."""
    if role_before == REPLY_ROLE:
        written.add(tokenizer.encode_text("\n"), False)
    if role == REPLY_ROLE and template.reply and role_before in (None, REPLY_ROLE):
        written.add(tokenizer.encode_text(template.reply), False)


def _reply_text(turn: Turn) -> str:
    return f"{turn.metadata}\n{turn.content}" if turn.metadata else turn.content


def _stop_id(tokenizer: ChatTokenizer, turn: Turn, template: Template) -> int:
    """What ends a turn that nothing follows: eos; in `chatglm3`, after a call, the role of the awaited result."""
    is_call = template == "chatglm3" and turn.role == REPLY_ROLE and bool(turn.metadata)
    return tokenizer.get_command("<|observation|>") if is_call else tokenizer.eos_token_id
