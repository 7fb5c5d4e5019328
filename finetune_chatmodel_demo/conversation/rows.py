"""How a record becomes a row, by stage: text for pt, a conversation for sft, a pair for rm and dpo, a prompt for ppo.

`datasets` keeps the rows; `tokenizing` renders them, in several processes where there are many. See any row with
`inspect_data.py --stage …`.
"""

from dataclasses import dataclass
from typing import Any, Literal

from finetune_chatmodel_demo.conversation.pairs import PromptedReplies, render_pair, render_ppo_prompt
from finetune_chatmodel_demo.conversation.rendering import Rendering, render_conversation, render_input_output
from finetune_chatmodel_demo.conversation.templates import IGNORED_LABEL, ChatTokenizer, Template
from finetune_chatmodel_demo.conversation.truncation import TruncationStrategy, truncate

Stage = Literal["pt", "sft", "rm", "dpo", "ppo"]
# Sequences that a row holds: rm and dpo a prompt and two replies, ppo a prompt and the reference reply.
PARTS = {"pt": 1, "sft": 1, "rm": 3, "dpo": 3, "ppo": 2}


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
        if self.stage == "ppo":
            return _prompted_row(render_ppo_prompt(tokenizer, record, self.template, self.max_seq_length), False)
        return _prompted_row(render_pair(tokenizer, record, self.template, self.max_seq_length), True)

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
        if not has_target(row):
            problem = "long" if has_target(whole) else "masked"
        return Row([row.input_ids], row.labels, problem, row.is_cut, len(row.turn_starts), row.turns_dropped)


def render_document(tokenizer: ChatTokenizer, record: dict[str, Any]) -> Row:
    """Renders a validated text record at full length: its text and the real eos id, every token a target.

    `packing` puts documents into blocks of equal length.
    """
    ids = [*tokenizer.encode_text(record["text"]), tokenizer.eos_token_id]
    return Row([ids], ids)


def has_target(rendering: Rendering) -> bool:
    """Whether the loss counts anywhere."""
    return any(label != IGNORED_LABEL for label in rendering.labels)


def _prompted_row(found: PromptedReplies, is_trained_on: bool) -> Row:
    """`is_trained_on`: the replies count as supervised; ppo only compares with its reference."""
    labels = [IGNORED_LABEL] * len(found.prompt_ids)
    for reply in found.replies:
        labels += reply if is_trained_on else [IGNORED_LABEL] * len(reply)
    parts = [found.prompt_ids, *found.replies]
    problem = None if found.fits else "long"
    return Row(parts, labels, problem, False, found.turns_kept, found.turns_dropped)
