"""A chat with a model: prompts that fit its context, history, streamed replies, seeds. No terminal in here.

session = ChatSession(model, tokenizer, system="你是宝可梦图鉴。")
for piece in session.reply("皮卡丘是什么属性？"):
    print(piece, end="")
"""

import contextlib
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.render import count_droppable_turns, drop_oldest_turns, render_prompt
from finetune_chatmodel_demo.generation.replies import ReplyReader
from finetune_chatmodel_demo.generation.streaming import stream_ids

logger = logging.getLogger(__name__)


class PromptTooLongError(UserError):
    """The newest question alone leaves no room for an answer; a chat goes on after it."""


def build_settings(
    tokenizer: Any,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 0.8,
    top_p: float = 0.8,
    top_k: int = 50,
    repetition_penalty: float = 1.0,
) -> GenerationConfig:
    """Settings for `model.generate`, with ChatGLM3's three stop ids.

    Args:
        temperature, top_p: upstream's `model.chat` defaults; a temperature of 0 means greedy.
        top_k: upstream leaves transformers' 50 in force; 0 switches it off.

    Raises:
        UserError: a number is outside its range.
    """
    ranges = [
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("top_k", top_k, top_k >= 0, "0 (off) or more"),
        ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0 (1 changes nothing)"),
    ]
    for name, value, is_valid, expected in ranges:
        if not is_valid:
            raise UserError(f"{name} is {value}; it must be {expected}")
    sampling: dict[str, Any] = {"do_sample": do_sample and temperature > 0}
    if sampling["do_sample"]:
        sampling |= {"temperature": float(temperature), "top_p": float(top_p), "top_k": top_k}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=1,
        repetition_penalty=float(repetition_penalty),
        eos_token_id=list(tokenizer.stop_token_ids),
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )


@dataclass(frozen=True)
class FittedPrompt:
    """`input_ids` ends with the open assistant turn; `messages` is what is left of the conversation."""

    input_ids: list[int]
    messages: list[dict[str, Any]]
    turns_dropped: int


def fit_prompt(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    max_prompt_tokens: int,
    tools: list[dict[str, Any]] | None = None,
    prompt_format: str = "multi-turn",
) -> FittedPrompt:
    """Renders a conversation whose answer comes next; whole turns are dropped from the front, as few as possible.

    Raises:
        PromptTooLongError: not even the newest question fits.
    """
    for dropped in range(count_droppable_turns(messages) + 1):
        rest = drop_oldest_turns(messages, dropped)
        ids = render_prompt(tokenizer, rest, tools=tools, prompt_format=prompt_format)
        if len(ids) <= max_prompt_tokens:
            return FittedPrompt(ids, rest, dropped)
    raise PromptTooLongError(
        f"the prompt is {len(ids)} tokens long, and the model's context leaves room for {max_prompt_tokens} before the "
        "answer; shorten the question or the system prompt, or lower --max-new-tokens"
    )


def prompt_budget(model: Any, max_new_tokens: int) -> int:
    """Tokens that a prompt may have, so that the answer still ends inside the model's `seq_length`.

    Prefix tokens do not count: text positions start at 0 behind the prefix.

    Raises:
        UserError: the answer alone would fill the context.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    budget = model.config.seq_length - max_new_tokens
    if budget < 1:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}, and the model's context is {model.config.seq_length} tokens for "
            "question and answer together; use a smaller number"
        )
    return budget


class ChatSession:
    """One conversation with one model.

    Args:
        model: a `ChatGLM3ForCausalLM`, with or without a prefix.
        tokenizer: its `ChatGLMTokenizer`.
        prompt_format: the format the model was trained with; in "input-output" each question stands alone.
        system: system prompt of the conversation.
        tools: tool descriptions, rendered as the first system turn.
        max_new_tokens: longest reply, in tokens.
        seed: same seed, same conversation → same replies; each turn draws its own numbers.
        sampling: see `build_settings`; greedy by default.

    Raises:
        UserError: a setting is outside its range, or leaves no room for a question.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        prompt_format: str = "multi-turn",
        system: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        max_new_tokens: int = 128,
        seed: int | None = None,
        **sampling: Any,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format
        self.system = system
        self.tools = tools
        self.settings = build_settings(tokenizer, max_new_tokens=max_new_tokens, **sampling)
        self._max_prompt_tokens = prompt_budget(model, max_new_tokens)
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Forget the conversation; the next reply is what a new session would say."""
        self.history: list[dict[str, Any]] = []
        self._turn_seeds = None if self._seed is None else random.Random(self._seed)

    def reply(self, query: str, *, role: str = "user") -> Iterator[str]:
        """Answer, as pieces of whole characters; the history grows when the reply ends.

        A reply that the reader leaves early stays in the history as far as it came; one that failed does not.

        Args:
            query: what is said to the model, taken literally.
            role: "user", or "observation" for the result of a tool that the model has called.

        Raises:
            PromptTooLongError: the question alone does not fit the model's context.
        """
        fitted = self._fit(self.history + [{"role": role, "content": query}])
        seed = None if self._turn_seeds is None else self._turn_seeds.getrandbits(63)
        reader = ReplyReader(self.tokenizer, self.prompt_format)
        is_whole = False
        try:
            with contextlib.closing(stream_ids(self.model, fitted.input_ids, self.settings, seed=seed)) as token_ids:
                for token_id in token_ids:
                    if piece := reader.put(token_id):
                        yield piece
            is_whole = True
            if piece := reader.end():
                yield piece
        except (KeyboardInterrupt, GeneratorExit):
            self._remember(fitted, reader, is_whole)
            raise
        self._remember(fitted, reader, is_whole)

    @property
    def last_tool_call(self) -> str | None:
        """Name of the tool that waits for its result, when the conversation ends with a call."""
        return self.history[-1].get("metadata") if self.history else None

    def _fit(self, turns: list[dict[str, Any]]) -> FittedPrompt:
        opening = [{"role": "system", "content": self.system}] if self.system else []
        fitted = fit_prompt(
            self.tokenizer,
            opening + turns,
            max_prompt_tokens=self._max_prompt_tokens,
            tools=self.tools,
            prompt_format=self.prompt_format,
        )
        if fitted.turns_dropped:
            logger.warning(
                "the conversation no longer fits the context of %d tokens: its oldest %d turn(s) were forgotten",
                self.model.config.seq_length,
                fitted.turns_dropped,
            )
        return fitted

    def _remember(self, fitted: FittedPrompt, reader: ReplyReader, is_whole: bool) -> None:
        answer = reader.messages()
        if is_whole and not answer:
            answer = [{"role": "assistant", "content": ""}]
        if answer:
            self.history = fitted.messages[1 if self.system else 0 :] + answer
