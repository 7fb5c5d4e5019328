"""Rows that share one row of a batch, and documents that share a block: nothing is cut away, nothing is padded.

`--packing` (sft): `GroupedRows` groups conversations that fill `max_seq_length` tokens together, trained in one
row. They do not see each other (`chatglm3/attention.py`); none is cut, none is left out. A batch then has hardly any
padding and few, large matrix products.

Stage pt: `PackedDataset` lays documents one after the other, each with its eos, and cuts them every
`max_seq_length - 2` tokens, wherever that falls; the last block is as short as it comes. Every block begins with
`[gMASK] sop`, whose labels are -100: ChatGLM3 has read these two in front of every sequence, in pre-training and
whenever its tokenizer encodes a text, so that a block without them would train (and a measured perplexity count)
something that no use of the model looks like. The other labels are the tokens themselves, the first of a block too:
`sop` predicts it. Causal attention does not stop at the end of a document inside a block, as in ChatGLM3's own
pre-training; eos tells.
"""

import bisect
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL, ChatTokenizer
from finetune_chatmodel_demo.conversation.rows import DatasetReport

# Rows among which groups are formed: 7,000 rows of 60 to 322 tokens then fill 99.3% of 2,048 (98.9% in pools of 1,000).
POOL_ROWS = 10_000


def group_rows(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Best fit, longest first, within pools of rows in random order.

    Args:
        lengths: Tokens of each row.
        capacity: Most tokens of a group. A longer row is a group of its own.
        seed: Of the random order.

    Returns:
        The rows of each group; every row is in exactly one.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    groups: list[list[int]] = []
    for start in range(0, len(order), POOL_ROWS):
        groups += _fill_groups(order[start : start + POOL_ROWS], lengths, capacity)
    return groups


def _fill_groups(rows: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens that still fit, group), sorted
    for row in sorted(rows, key=lambda row: -lengths[row]):
        place = bisect.bisect_left(free, (lengths[row], -1))
        if place < len(free):
            room, group = free.pop(place)
            groups[group].append(row)
        else:
            room, group = capacity, len(groups)
            groups.append([row])
        if room > lengths[row]:
            bisect.insort(free, (room - lengths[row], group))
    return groups


class GroupedRows:
    """A map-style data set of groups: an item is `{"rows": [the rows' items]}`."""

    def __init__(self, rows: Any, capacity: int, seed: int):
        """
        Args:
            rows: Map-style rows with `.lengths` and `.where(row)`.
            capacity: See `group_rows`.
            seed: See `group_rows`.
        """
        self.rows = rows
        self._lengths = rows.lengths
        self.capacity = capacity
        self.groups = group_rows(self._lengths, capacity, seed)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, group: int) -> dict[str, list[dict[str, list[int]]]]:
        return {"rows": [self.rows[row] for row in self.groups[group]]}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each group."""
        return [sum(self._lengths[row] for row in group) for group in self.groups]

    def describe(self) -> str:
        """How many rows became how many, and how full these are."""
        count = len(self.groups)
        filled = sum(self.lengths) / (count * self.capacity)
        return f"{len(self._lengths):,} rows in {count:,} of up to {self.capacity:,} tokens, {filled:.1%} filled"

    def where(self, group: int) -> str:
        """The places of a group's records."""
        return ", ".join(self.rows.where(row) for row in self.groups[group])


class PackedDataset:
    """Blocks of documents, map-style. Nothing is copied: a block is put together when it is asked for.

    An item is `{"input_ids": list[int], "labels": list[int]}`.
    """

    def __init__(self, documents: Any, tokenizer: ChatTokenizer, max_seq_length: int):
        """
        Args:
            documents: `Rows` of pt.
            tokenizer: See `ChatTokenizer`.
            max_seq_length: Ids of a block, with the two that start it.

        Raises:
            ValueError: The limit leaves no room for a token of a document.
        """
        self._start = tokenizer.get_prefix_tokens()
        self._capacity = block_capacity(max_seq_length)
        self.documents = documents
        # Document d is between offsets[d] and offsets[d + 1] of all documents' tokens.
        self._offsets = np.concatenate([[0], np.cumsum(documents.lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return -(-int(self._offsets[-1]) // self._capacity)

    def __getitem__(self, block: int) -> dict[str, list[int]]:
        pieces = [self.documents.ids(document)[span] for document, span in self._pieces(block)]
        tokens = np.concatenate(pieces).tolist()
        return make_block(self._start, tokens)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each block; all the same but the last."""
        total = int(self._offsets[-1])
        starts = range(0, total, self._capacity)
        return [len(self._start) + min(self._capacity, total - start) for start in starts]

    @property
    def report(self) -> DatasetReport:
        """What became of the records; `rows_kept` are blocks, and the tokens include the two that start each."""
        report = self.documents.report
        starts = len(self) * len(self._start)
        return replace(report, rows_kept=len(self), tokens_total=report.tokens_total + starts)

    def where(self, block: int) -> str:
        """The places of the first and the last document of a block."""
        documents = [document for document, _ in self._pieces(block)]
        first, last = self.documents.where(documents[0]), self.documents.where(documents[-1])
        return first if first == last else f"{first} to {last}"

    def document_starts(self, block: int) -> list[int]:
        """Positions in a block at which a document begins."""
        start = self._normalize(block) * self._capacity
        begins = self._offsets[:-1]
        inside = begins[(begins >= start) & (begins < start + self._capacity)]
        return (inside - start + len(self._start)).tolist()

    def _pieces(self, block: int) -> Iterator[tuple[int, slice]]:
        """Which part of which document a block holds, in order."""
        start = self._normalize(block) * self._capacity
        end = min(start + self._capacity, int(self._offsets[-1]))
        document = int(np.searchsorted(self._offsets, start, side="right")) - 1
        while document < len(self._offsets) - 1 and self._offsets[document] < end:
            begin = int(self._offsets[document])
            yield document, slice(max(0, start - begin), end - begin)
            document += 1

    def _normalize(self, block: int) -> int:
        if not -len(self) <= block < len(self):
            raise IndexError(f"block {block} does not exist; there are {len(self)}")
        return block % len(self)


def block_capacity(max_seq_length: int) -> int:
    """Tokens of documents in a block.

    Raises:
        ValueError: The limit leaves no room for one.
    """
    if max_seq_length < 3:
        raise ValueError(
            f"--max_seq_length is {max_seq_length}; a block of text needs at least 3: [gMASK], sop and a token"
        )
    return max_seq_length - 2


def make_block(start: list[int], tokens: list[int]) -> dict[str, list[int]]:
    """A row of pt: the two ids that start it, and tokens of documents, all of which are targets."""
    return {"input_ids": start + tokens, "labels": [IGNORED_LABEL] * len(start) + tokens}
