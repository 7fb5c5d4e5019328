"""Finding the passages that answer a question: words and vectors, fused by absolute scores.

The score is 0 to 1 and means the same on every base: how much of what the question says a passage has. Ranks are not
fused: reciprocal ranks cost 0.11 recall@1 on paraphrases and cannot refuse, for the best of nothing is first as well.
`search` and `ask` both come through `retrieve`, so that they cannot disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune_chatmodel_demo.retrieval.embedding import Embedding
from finetune_chatmodel_demo.retrieval.store import Passage, Store
from finetune_chatmodel_demo.retrieval.terms import (
    inverse_frequency,
    lexical_score,
    question_terms,
    term_weights,
    terms_of,
)

CANDIDATES = 200
LONGEST_QUESTION = 2000  # characters; the rest of a longer one is left out of the search, and that is said
# In a large base a term that stands in a larger share of the passages does not choose candidates, where rarer ones can.
LARGE_BASE = 5000
COMMON = 0.2


@dataclass(frozen=True)
class Hit:
    """A passage that was found.

    Attributes:
        passage: the passage.
        score: 0 to 1, the fused score.
        lexical: 0 to 1, by words.
        dense: 0 to 1, by vectors; None without an embedding.
    """

    passage: Passage
    score: float
    lexical: float
    dense: float | None


def retrieve(store: Store, question: str, embedding: Embedding | None, top_k: int = 5) -> list[Hit]:
    """The best passages for a question, best first.

    Args:
        store: an open base.
        question: in any language; beyond LONGEST_QUESTION characters it is cut.
        embedding: the base's; None: words alone.
        top_k: most passages to return.
    """
    question = question[:LONGEST_QUESTION]
    passages = store.count()
    terms = question_terms(question)
    frequencies = store.frequencies(terms)
    frequencies = {term: count for term, count in frequencies.items() if count or terms[term]}
    query = {term: inverse_frequency(passages, count) for term, count in frequencies.items()}
    candidates = set(store.match(choose_terms(frequencies, passages), CANDIDATES))
    dense: dict[int, float] = {}
    if embedding is not None and passages:
        dense = search_vectors(store, embedding, question)
        candidates |= set(sorted(dense, key=dense.__getitem__, reverse=True)[:CANDIDATES])
    hits = []
    for passage in store.get(sorted(candidates)):
        lexical = lexical_score(query, term_weights(terms_of(passage.indexed_text)))
        near = dense.get(passage.id, 0.0) if embedding is not None else None
        hits.append(Hit(passage, lexical if near is None else 0.5 * lexical + 0.5 * near, lexical, near))
    hits.sort(key=lambda hit: (-hit.score, hit.passage.file, hit.passage.place))
    return hits[:top_k]


def choose_terms(frequencies: dict[str, int], passages: int) -> list[str]:
    """The terms that choose candidates: those that stand somewhere; see COMMON."""
    known = [term for term, count in frequencies.items() if count]
    if passages < LARGE_BASE:
        return known
    return [term for term in known if frequencies[term] <= COMMON * passages] or known


def search_vectors(store: Store, embedding: Embedding, question: str) -> dict[int, float]:
    """The dense score of the nearest passages, by their numbers."""
    import numpy

    ids, vectors = store.vectors()
    if not len(ids):
        return {}
    cosines = vectors @ embedding.encode([question], is_query=True)[0]
    nearest = numpy.argpartition(-cosines, min(CANDIDATES, len(ids)) - 1)[:CANDIDATES]
    return dict(zip(ids[nearest].tolist(), embedding.stretch(cosines[nearest]).tolist()))


def join_neighbours(hits: Sequence[Hit], store: Store) -> list[Hit]:
    """Puts running text that was cut in two together again: a hit that follows a better one, or is followed by it, in a
    file and under a heading, becomes part of it."""
    joined: list[Hit] = []
    last_place: list[int] = []  # of each joined hit, which may have grown
    for hit in hits:
        for number, other in enumerate(joined):
            old, new = other.passage, hit.passage
            is_near = old.file == new.file and (new.place in (old.place - 1, last_place[number] + 1))
            if is_near and old.heading == new.heading and old.kind == new.kind == "text":
                start, end = min(old.start, new.start), max(old.end, new.end)
                text = store.text_of(old.file)[start:end]
                whole = replace(old, place=min(old.place, new.place), start=start, end=end, text=text)
                joined[number] = replace(other, passage=whole)
                last_place[number] = max(last_place[number], new.place)
                break
        else:
            joined.append(hit)
            last_place.append(hit.passage.place)
    return joined
