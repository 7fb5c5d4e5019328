"""Which rows of a CSV are kept out of the fine-tuning data, so that questions about them test what the base knew.

`data_processing.py --hold_out 0.2` leaves them out; `evaluate.py --csv … --hold_out 0.2` asks about them.
"""

import hashlib
from collections.abc import Mapping

from data_processing.template import Template
from finetune_chatmodel_demo.common.errors import UserError


def subject_name(template: Template, row: Mapping[str, str]) -> str:
    """What a row is about: its first opening; without a subject in the template, its first filled cell."""
    if template.subject is not None:
        for way in template.subject.opening:
            if all(row[name] for name in way.names):
                return way.fill(row)
    return next((cell for cell in row.values() if cell), "")


def check_share(share: float, flag: str = "--hold_out") -> None:
    """Raises a UserError where `share` leaves nothing to train on, or is no share."""
    if not 0 <= share < 1:
        raise UserError(f"{flag} {share}: expected a share from 0 to below 1, e.g. 0.2")


def is_held_out(name: str, share: float) -> bool:
    """Decide by the name alone: the same rows in every program, whatever the order, the seed or the other rows.

    A name's SHA-256 is a number between 0 and 1; it is held out where that is below `share`, so a larger share holds
    out all that a smaller one does.
    """
    digest = hashlib.sha256(f"held out|{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share
