"""BLEU-4 and ROUGE of Chinese answers, computed as LLaMA-Factory does: characters for BLEU, jieba's words for ROUGE.

    python -c "from finetune_chatmodel_demo.training.text_scores import score_pair as s; print(s('电属性', '水属性'))"

The packages are imported when they are used, so that only --do_predict needs them.
"""

import functools
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from finetune_chatmodel_demo.common.errors import UserError

# Module → its name for pip.
PACKAGES = {"jieba": "jieba", "nltk": "nltk", "rouge_chinese": "rouge-chinese"}
SCORES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")


def check_packages() -> None:
    """Refuses a run whose answers could not be scored, before the model is loaded.

    Raises:
        UserError: names all packages that are missing.
    """
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"--do_predict computes BLEU and ROUGE with {', '.join(missing)}: pip install {' '.join(missing)}"
        )


def score_pair(predicted: str, label: str) -> dict[str, float]:
    """Scores one answer, 0 to 100.

    BLEU-4 is nltk's `sentence_bleu` over characters with smoothing method 3 (Chen and Cherry, 2014), ROUGE the F1 of
    rouge-chinese over jieba's words. An answer or reference without any word has no ROUGE: 0, where the package fails.

    Returns:
        `bleu-4`, `rouge-1`, `rouge-2`, `rouge-l`, rounded to 4 places.
    """
    cut, sentence_bleu, smoothing, get_rouge = _load_packages()
    words, expected = " ".join(cut(predicted)), " ".join(cut(label))
    scores = {"bleu-4": 100 * sentence_bleu([list(label)], list(predicted), smoothing_function=smoothing)}
    rouge: dict[str, Any] = {}
    if words.split() and expected.split():
        (rouge,) = get_rouge(words, expected)
    for name in ("rouge-1", "rouge-2", "rouge-l"):
        scores[name] = 100 * rouge[name]["f"] if rouge else 0.0
    return {name: round(float(value), 4) for name, value in scores.items()}


def mean_scores(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """The mean of `score_pair` over (answer, reference); 0 for no pair at all."""
    scores = [score_pair(predicted, label) for predicted, label in pairs]
    return {name: sum(each[name] for each in scores) / max(1, len(scores)) for name in SCORES}


@functools.cache
def _load_packages() -> tuple[Callable, Callable, Callable, Callable]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba's regular expressions are of an older Python
        import jieba
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        from rouge_chinese import Rouge
    jieba.setLogLevel(logging.WARNING)  # it reports loading its dictionary as debugging, on standard error
    return jieba.cut, sentence_bleu, SmoothingFunction().method3, Rouge().get_scores
