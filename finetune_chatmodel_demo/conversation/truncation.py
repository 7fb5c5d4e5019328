"""The one place where a conversation is held to a length limit.

A row loses its end: `turns`, the default, cuts where a supervised turn ends, so that no reply loses its end;
`official` is the head cut of the original demo. A prompt, whose reply comes next, loses its oldest turns instead.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from finetune_chatmodel_demo.conversation.rendering import IGNORED_LABEL, Rendering

TruncationStrategy = Literal["turns", "official"]


def truncate(rendering: Rendering, max_seq_length: int, strategy: TruncationStrategy = "turns") -> Rendering:
    """Returns a prefix of a row of at most `max_seq_length` ids, with what is missing noted on it.

    `turns` keeps the longest prefix that ends with the token that ends a supervised turn (the next role token or
    eos), itself a target: system turns and as many turns as fit; what follows the last supervised turn, such as a
    question whose reply does not fit, goes too. Where not even the first supervised turn fits, the row is cut at the
    limit, inside that turn and so without an end that the model could learn to stop at.

    Args:
        rendering: A row from `render_conversation`.
        max_seq_length: Most ids of a row.
        strategy: "turns" or "official".

    Raises:
        ValueError: The limit is not positive or the strategy is unknown.
    """
    if strategy not in ("turns", "official"):
        raise ValueError(f"truncation_strategy {strategy!r} is unknown; use turns or official")
    if max_seq_length < 1:
        raise ValueError(f"max_seq_length must be at least 1, got {max_seq_length}")
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
