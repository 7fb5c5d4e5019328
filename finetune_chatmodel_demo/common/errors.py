"""The one exception for mistakes of a user, so that a program shows a line and not a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something that was given cannot be used; the message says what, where, what was found and what to do.

    `cli.run_program` shows the message in one line. Any other `ValueError` is a fault of ours and keeps its traceback.
    """


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.75) -> str:
    """`; did you mean 'X'?`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{near[0]}'?" if near else ""
