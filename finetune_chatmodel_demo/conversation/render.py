"""From a checked record to a row: ids, labels, and what a length limit left out.

The tokenizer writes the ids (`render_chat`, one renderer for training, inference and evaluation); here they become what
each stage trains on: text for pt, a conversation for sft, a pair for rm and dpo, a prompt for ppo. A prompt is always
how the training row of the same conversation begins. See any row with `inspect_data.py --stage …`.

This is also the one place where a row is held to a length limit. A row loses its end: `turns`, the default, cuts where
a supervised turn ends, so that no reply loses its end; `official` is the head cut of the original demo. A prompt, whose
reply comes next, loses its oldest turns instead, whole ones; a reply of a pair is never cut.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

Template = Literal["chatglm3", "default", "raw"]
# What a checkpoint records; `multi-turn` is the template chatglm3.
PromptFormat = Literal["multi-turn", "input-output", "default", "raw"]
Stage = Literal["pt", "sft", "rm", "dpo", "ppo"]
TruncationStrategy = Literal["turns", "official"]
TEMPLATES = get_args(Template)
PROMPT_FORMATS = get_args(PromptFormat)
IGNORED_LABEL = -100
REPLY_ROLES = ("assistant", "tool")
# Sequences that a row holds: rm and dpo a prompt and two replies, ppo a prompt and the reference reply.
PARTS = {"pt": 1, "sft": 1, "rm": 3, "dpo": 3, "ppo": 2}


class ChatTokenizer(Protocol):
    """What rendering asks of a tokenizer; `chatglm3.chat` says what the methods do."""

    eos_token_id: int

    def get_prefix_tokens(self) -> list[int]: ...
    def encode_text(self, text: str) -> list[int]: ...
    def render_chat(self, messages, tools=None, *, template="chatglm3", ending="stop") -> Any: ...
    def render_reply(self, message, template="chatglm3") -> list[int]: ...


@dataclass(frozen=True)
class Rendering:
    """One row of a conversation.

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

    @property
    def has_target(self) -> bool:
        """Whether the loss counts anywhere."""
        return any(label != IGNORED_LABEL for label in self.labels)


@dataclass(frozen=True)
class Row:
    """One row before it is stored.

    Attributes:
        parts: Its sequences of token ids; PARTS says how many.
        labels: As many as all ids together: the id where the loss counts, else -100.
        problem: Why there is no such row: "masked" (no target), "long" (no reply, or not even the newest question,
            fits into the length limit); None where all is well.
        is_cut_inside: A length limit cut a turn, a prompt or a response in the middle.
        turns_kept: Turns in the row (0 for text and input-output).
        turns_dropped: Whole turns that a length limit left out.
    """

    parts: list[list[int]]
    labels: list[int]
    problem: Literal["masked", "long"] | None = None
    is_cut_inside: bool = False
    turns_kept: int = 0
    turns_dropped: int = 0


@dataclass(frozen=True)
class RowSettings:
    """How a record becomes a row. The fields are the flags of the same names."""

    train_format: Literal["multi-turn", "input-output"]
    max_seq_length: int
    max_source_length: int
    max_target_length: int
    truncation_strategy: TruncationStrategy
    stage: Stage = "sft"
    template: Template = "chatglm3"

    def render(self, tokenizer: ChatTokenizer, record: dict[str, Any]) -> Row:
        """Renders one validated record within the length limits."""
        if self.stage == "pt":
            return render_document(tokenizer, record)
        if self.stage == "sft":
            return self._supervised_row(tokenizer, record)
        render = render_ppo_prompt if self.stage == "ppo" else render_pair
        return render(tokenizer, record, self.template, self.max_seq_length)

    def _supervised_row(self, tokenizer: ChatTokenizer, record: dict[str, Any]) -> Row:
        if self.train_format == "multi-turn":
            whole = render_conversation(tokenizer, record, self.template)
            row = truncate(whole, self.max_seq_length, self.truncation_strategy)
        else:
            whole = row = render_input_output(
                tokenizer,
                record,
                self.max_source_length,
                self.max_target_length,
                ends_cut_response=self.truncation_strategy == "official",
            )
        problem = None
        if not row.has_target:
            problem = "long" if whole.has_target else "masked"
        return Row([row.input_ids], row.labels, problem, row.is_cut, len(row.turn_starts), row.turns_dropped)


def render_document(tokenizer: ChatTokenizer, record: dict[str, Any]) -> Row:
    """Renders a validated text record at full length: its text and the real eos id, every token a target.

    `packing` puts documents into blocks of equal length.
    """
    ids = [*tokenizer.encode_text(record["text"]), tokenizer.eos_token_id]
    return Row([ids], ids)


def render_conversation(tokenizer: ChatTokenizer, record: dict[str, Any], template: Template = "chatglm3") -> Rendering:
    """Renders a validated multi-turn record at full length.

    Args:
        tokenizer: See `ChatTokenizer`.
        record: `{"tools": [...]?, "conversations": [...]}`.
        template: See `chatglm3.chat`.
    """
    chat = tokenizer.render_chat(record["conversations"], record.get("tools"), template=template)
    labels = [token if counts else IGNORED_LABEL for token, counts in zip(chat.input_ids, chat.mask)]
    return Rendering(chat.input_ids, labels, chat.turn_starts, chat.turn_ends)


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
        raise ValueError(f"prompt_format {prompt_format!r} is unknown; use one of {', '.join(PROMPT_FORMATS)}")
    if prompt_format != "input-output":
        template = prompt_format if prompt_format in TEMPLATES else "chatglm3"
        return tokenizer.render_chat(messages, tools, template=template, ending="reply").input_ids
    questions = [message["content"] for message in messages if message["role"] == "user"]
    if not questions:
        raise ValueError(f"prompt_format input-output needs a user message, got {[m['role'] for m in messages]}")
    return tokenizer.get_prefix_tokens() + tokenizer.encode_text(questions[-1])


def render_pair(tokenizer: ChatTokenizer, record: dict[str, Any], template: Template, max_seq_length: int) -> Row:
    """Renders a validated preference record: prompt, chosen and rejected reply.

    Args:
        tokenizer: See `ChatTokenizer`.
        record: `{"tools"?, "conversations": [...], "chosen": {...}, "rejected": {...}}`.
        template: See `chatglm3.chat`.
        max_seq_length: Most ids of the prompt together with the longer reply.
    """
    replies = [tokenizer.render_reply(_open_call(record[key]), template) for key in ("chosen", "rejected")]
    room = max_seq_length - max(map(len, replies))
    return _fit(tokenizer, record["conversations"], record.get("tools"), template, replies, room)


def render_ppo_prompt(tokenizer: ChatTokenizer, record: dict[str, Any], template: Template, max_seq_length: int) -> Row:
    """Renders a validated multi-turn record as a prompt and, where there is one, the reference reply.

    The prompt is everything before the last assistant message (or call of a tool). A conversation that ends with a
    question, or with the result of a call that is a message of its own, is a prompt as a whole, with `[]` as the
    reference. Nothing is a target: ppo only compares with its reference.

    Args:
        tokenizer: See `ChatTokenizer`.
        record: `{"tools"?, "conversations": [...]}`.
        template: See `chatglm3.chat`.
        max_seq_length: Most ids of the prompt.
    """
    messages = record["conversations"]
    end, reference = len(messages), []
    if messages[-1]["role"] not in ("user", "observation"):
        end = max((i for i, each in enumerate(messages) if each["role"] in REPLY_ROLES), default=end)
    if end < len(messages):
        reference = tokenizer.render_reply(_open_call(messages[end]), template)
    row = _fit(tokenizer, messages[:end], record.get("tools"), template, [reference], max_seq_length)
    return replace(row, labels=[IGNORED_LABEL] * len(row.labels))


def _open_call(message: dict[str, Any]) -> dict[str, Any]:
    """A reply without the result of its call: what the model itself writes."""
    return {key: value for key, value in message.items() if key != "observation"}


def _fit(
    tokenizer: ChatTokenizer,
    messages: Sequence[dict[str, Any]],
    tools: list[Any] | None,
    template: Template,
    replies: list[list[int]],
    room: int,
) -> Row:
    """Leaves out as many of the oldest turns as the room demands; the newest question always stays."""

    def render(dropped: int) -> Any:
        return tokenizer.render_chat(drop_oldest_turns(messages, dropped), tools, template=template, ending="reply")

    whole = prompt = render(0)
    if len(prompt.input_ids) > room:
        # A record may have hundreds of turns: a search, not one try after the other.
        most = count_droppable_turns(messages)
        prompt = render(bisect.bisect_left(range(most), True, key=lambda count: len(render(count).input_ids) <= room))
    kept = len(prompt.turn_starts)
    return Row(
        [prompt.input_ids, *replies],
        [IGNORED_LABEL] * len(prompt.input_ids) + [token for reply in replies for token in reply],
        None if len(prompt.input_ids) <= room else "long",
        turns_kept=kept,
        turns_dropped=len(whole.turn_starts) - kept,
    )


def truncate(rendering: Rendering, max_seq_length: int, strategy: TruncationStrategy = "turns") -> Rendering:
    """Returns a prefix of a row of at most `max_seq_length` ids, with what is missing noted on it.

    `turns` keeps the longest prefix that ends with the token that ends a supervised turn (the next role token or
    eos), itself a target: system turns and as many turns as fit; what follows the last supervised turn, such as a
    question whose reply does not fit, goes too. Where not even the first supervised turn fits, the row is cut at the
    limit, inside that turn and so without an end that the model could learn to stop at.

    Args:
        rendering: A row from `render_conversation`.
        max_seq_length: Most ids of a row, at least 1.
        strategy: "turns" or "official".
    """
    if len(rendering.input_ids) <= max_seq_length:
        return rendering
    end = _last_supervised_end(rendering, max_seq_length) if strategy == "turns" else None
    length = max_seq_length if end is None else end + 1
    kept_starts = [start for start in rendering.turn_starts if start < (length if end is None else end)]
    return replace(
        rendering,
        input_ids=rendering.input_ids[:length],
        labels=rendering.labels[:length],
        turn_starts=kept_starts,
        turn_ends=[end for end in rendering.turn_ends if end < length],
        is_cut=end is None,
        turns_dropped=len(rendering.turn_starts) - len(kept_starts),
    )


def _last_supervised_end(rendering: Rendering, max_seq_length: int) -> int | None:
    """Position of the last token within the limit that ends a supervised turn; None where there is none."""
    fitting = [end for end in rendering.turn_ends if end < max_seq_length and rendering.labels[end] != IGNORED_LABEL]
    return max(fitting, default=None)


def drop_oldest_turns(messages: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Leaves out the `count` oldest questions, each with all that answers it; system messages at the start stay.

    Raises:
        ValueError: Less than `count` questions come before the newest one.
    """
    if count == 0:
        return list(messages)
    head, starts = _find_questions(messages)
    if count > len(starts):
        raise ValueError(f"{count} turns cannot be left out; {len(starts)} come before the newest question")
    return [*messages[:head], *messages[starts[count - 1] :]]


def count_droppable_turns(messages: Sequence[dict[str, Any]]) -> int:
    """How many questions come before the newest one."""
    return len(_find_questions(messages)[1])


def _find_questions(messages: Sequence[dict[str, Any]]) -> tuple[int, list[int]]:
    """How many system messages stand in front, and where all but the oldest questions are."""
    head = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return head, [i for i in range(head + 1, len(messages)) if messages[i]["role"] == "user"]
