"""Words of a text for the index: character pairs of Chinese, words of letters and digits, and how well they match.

The score is BM25 (Robertson and Zaragoza, 2009) with a fixed average length, so that the weights of a passage depend on
that passage alone: adding or deleting another one changes nothing but counts. Character pairs rank better than a word
segmenter on our pages (recall@1 0.72 against 0.60), and have no dictionary that could differ between index and query.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

# Measured on our pages (bench_retrieval.py): recall@1 0.75 with the usual 1.2 and 0.75, 0.87 with these. Titles and
# headings stand in every passage, so that repeated terms and length tell less than in whole documents.
K1, B = 0.6, 0.4
AVERAGE_LENGTH = 60  # terms of a passage; only the ratio of lengths matters
# What makes a sentence a question, or joins its words. Those of one character may be part of a name as well.
QUESTION_WORDS = re.compile(
    "请问|请告诉我|告诉我|我想知道|想知道|为什么|什么|怎么样|怎么|怎样|如何|多少|哪一个|哪一只|哪一|哪些|哪个|哪里|哪儿|"
    "是不是|有没有|能不能|可以|需要|我们|你们|[哪谁几是的了吗呢吧啊有和与在由把被给从到它他她我你要]"
)
WORD = re.compile(r"[a-z0-9]+(?:\.[0-9]+)*|[\u3400-\u9fff\uf900-\ufaff\u3040-\u30ff\uac00-\ud7af]+")


def terms_of(text: str) -> list[str]:
    """`妙蛙种子 HP 0.7` → 妙蛙, 蛙种, 种子, hp, 0.7; a lone character is a term of its own."""
    return [term for term, _ in _terms_with_places(_normal_form(text))]


def question_terms(question: str) -> dict[str, bool]:
    """The different terms of a question, without those that only make it one.

    Returns:
        Term → whether it is certain. One that is not touches a word such as 的 or 是: it counts where the base has it
        (迷你 in 迷你芙), and is no word at all where it does not (的身 in 它的身高).
    """
    text = _normal_form(question)
    touched: dict[int, int] = {}  # place → length of the question word there
    for found in QUESTION_WORDS.finditer(text):
        touched |= dict.fromkeys(range(*found.span()), len(found[0]))
    terms: dict[str, bool] = {}
    for term, place in _terms_with_places(text):
        lengths = [touched.get(each, 0) for each in range(place, place + len(term))]
        if not all(lengths) or max(lengths) == 1:
            terms[term] = terms.get(term, False) or not any(lengths)
    return terms or dict.fromkeys(terms_of(text), True)


def _normal_form(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def _terms_with_places(text: str) -> Iterator[tuple[str, int]]:
    for found in WORD.finditer(text):
        word, start = found[0], found.start()
        if word[0].isascii() or len(word) == 1:
            yield word, start
        else:
            yield from ((word[place : place + 2], start + place) for place in range(len(word) - 1))


def term_weights(terms: Iterable[str]) -> dict[str, float]:
    """What a passage stores: its saturated, length-normalised term frequencies, each below K1 + 1."""
    counts = Counter(terms)
    norm = K1 * (1 - B + B * counts.total() / AVERAGE_LENGTH)
    return {term: count * (K1 + 1) / (count + norm) for term, count in counts.items()}


def inverse_frequency(passages: int, containing: int) -> float:
    """How much a term tells: the logarithm of BM25, always positive."""
    return math.log(1 + (passages - containing + 0.5) / (containing + 0.5))


def lexical_score(query: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """0 to 1: the BM25 of a passage over the most that any passage could reach for this query.

    Args:
        query: inverse frequency of each of its terms.
        weights: `term_weights` of the passage.
    """
    most = (K1 + 1) * sum(query.values())
    return sum(value * weights.get(term, 0.0) for term, value in query.items()) / most if most else 0.0
