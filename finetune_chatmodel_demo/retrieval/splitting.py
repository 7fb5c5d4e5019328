"""From a document's blocks to chunks: passages that an index holds, each an exact substring of the document's text.

Paragraphs under one heading are put together up to the limit and cut at sentence ends; a table row and a question with
its answer stay whole where the limit allows. The time grows with the text: no part is counted more than a few times.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from finetune_chatmodel_demo.retrieval.documents import Block, Document

DEFAULT_TOKENS = 256
# Ends of sentences in Chinese and English, with closing quotes; a line's end is one too.
SENTENCE_END = re.compile(r"[。！？；!?]+[”’」』）)\"']*|(?<=[^\d])\.(?=\s)|\n+")

Count = Callable[[str], int]


@dataclass(frozen=True)
class Chunk:
    """A passage.

    Attributes:
        start, end: span in the document's text, in characters.
        heading: the headings above it, outermost first.
        page: page or slide where it begins, from 1; None where there are none.
        kind: as in `Block`.
    """

    start: int
    end: int
    heading: tuple[str, ...]
    page: int | None
    kind: str


def split_document(document: Document, count: Count, limit: int = DEFAULT_TOKENS) -> list[Chunk]:
    """Splits a document.

    Args:
        document: what `read_document` returned.
        count: tokens of a text, by the tokenizer of the model that will read the chunks.
        limit: most tokens of a chunk.

    Returns:
        Chunks in reading order, none of them blank, none over the limit.
    """
    chunks = []
    for run in _runs(document.blocks):
        first = run[0]
        spans = [span for block in run for span in _sentences(document.text, block, count, limit)]
        for start, end in _fill(spans, limit):
            chunks.append(_trim(document.text, Chunk(start, end, first.heading, _page_at(run, start), first.kind)))
    return [chunk for chunk in chunks if chunk.start < chunk.end]


def _runs(blocks: tuple[Block, ...]) -> Iterator[list[Block]]:
    """Blocks that may share a chunk: text under the same heading; rows and pairs stand alone."""
    run: list[Block] = []
    for block in blocks:
        if run and (block.kind != "text" or run[-1].kind != "text" or block.heading != run[-1].heading):
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _sentences(text: str, block: Block, count: Count, limit: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, tokens) of the pieces that may be put together: a short block whole, else its sentences."""
    tokens = count(text[block.start : block.end])
    if tokens <= limit:
        yield block.start, block.end, tokens
        return
    start = block.start
    ends = [found.end() for found in SENTENCE_END.finditer(text, block.start, block.end)]
    for end in dict.fromkeys([*ends, block.end]):
        yield from _cut(text, start, end, count, limit)
        start = end


def _cut(text: str, start: int, end: int, count: Count, limit: int) -> Iterator[tuple[int, int, int]]:
    """Pieces of a sentence that is too long by itself. A token has a character at least in ordinary text, so windows of
    `limit` characters are counted, and halved where bytes make tokens."""
    for place in range(start, end, limit):
        stop = min(place + limit, end)
        tokens = count(text[place:stop])
        if tokens <= limit or stop - place == 1:
            yield place, stop, tokens
        else:
            middle = (place + stop) // 2
            yield from _cut(text, place, middle, count, middle - place)
            yield from _cut(text, middle, stop, count, stop - middle)


def _fill(spans: list[tuple[int, int, int]], limit: int) -> Iterator[tuple[int, int]]:
    """Joins neighbours up to the limit. Counts are added up, which is never less than the count of the whole."""
    start = end = None
    total = 0
    for begin, stop, tokens in spans:
        if start is not None and total + tokens + 1 > limit:  # 1: the line end between two blocks
            yield start, end
            start, total = None, 0
        if start is None:
            start = begin
        end = stop
        total += tokens + 1
    if start is not None:
        yield start, end


def _page_at(run: list[Block], start: int) -> int | None:
    return next((block.page for block in reversed(run) if block.start <= start), run[0].page)


def _trim(text: str, chunk: Chunk) -> Chunk:
    """Leaves out blanks at both ends."""
    passage = text[chunk.start : chunk.end]
    start = chunk.start + len(passage) - len(passage.lstrip())
    return Chunk(start, start + len(passage.strip()), chunk.heading, chunk.page, chunk.kind)
