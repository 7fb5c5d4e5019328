"""A little evaluation in the middle of training: some questions, greedy answers, a share of exact ones.

    evaluator = build_training_evaluator("questions.json", tokenizer, count=60, seed=1)
    evaluator(model)  →  {"exact": 0.85, "asked": 60, "overlap": …, "wrong": …, "missing": …, "not_ended": …}

For `--eval_steps`, for keeping the best checkpoint, for stopping early.
"""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.evaluation.asking import ask_questions, choose_cap
from finetune_chatmodel_demo.evaluation.comparison import as_frame
from finetune_chatmodel_demo.evaluation.exact import (
    Question,
    longest_reply_needed,
    read_questions,
    score_questions,
)
from finetune_chatmodel_demo.evaluation.questions import (
    TRAINED,
    UNSEEN,
    Dialogue,
    QuestionSet,
    is_question_file,
    read_question_file,
)

DEFAULT_GROUPS = (TRAINED, UNSEEN)


@dataclass(frozen=True)
class TrainingEvaluator:
    """Asks the same questions at every call; the model is left as it was found.

    Attributes:
        questions: dialogues that are held against facts, or single questions that are held against reference texts.
        tokenizer, prompt_format, max_new_tokens, batch_size: as for `ask_questions`.
    """

    questions: QuestionSet | tuple[Question, ...]
    tokenizer: Any
    prompt_format: str
    max_new_tokens: int
    batch_size: int

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Figures of a model as it is, in the middle of training or not.

        Args:
            model: with its prefix or adapter on; not wrapped (DDP), and not spread over processes (ZeRO-3).

        Returns:
            "exact" (share), "asked", "not_ended" (share); against facts also "overlap", "wrong", "missing" (shares) and
            "exact GROUP" for each group.
        """
        with unchanged(model):
            if isinstance(self.questions, QuestionSet):
                return self._ask_facts(model)
            score = score_questions(model, self.tokenizer, self.questions, **self._options())
        asked = score["asked"]
        return {"exact": score["share"], "asked": asked, "not_ended": score["hit_cap"] / asked}

    def _ask_facts(self, model: nn.Module) -> dict[str, float]:
        frame = as_frame(ask_questions(model, self.tokenizer, self.questions, **self._options()))
        shares = {outcome: float((frame["outcome"] == outcome).mean()) for outcome in ("exact", "wrong", "missing")}
        figures = shares | {
            "asked": len(frame),
            "overlap": float(frame["credit"].mean()),
            "not_ended": 1 - float(frame["ended"].mean()),
        }
        by_group = (frame["outcome"] == "exact").groupby(frame["group"], sort=False).mean()
        if len(by_group) > 1:
            figures |= {f"exact {group}": float(share) for group, share in by_group.items()}
        return figures

    def _options(self) -> dict[str, Any]:
        return {
            "prompt_format": self.prompt_format,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
        }


def build_training_evaluator(
    source: QuestionSet | str | Path,
    tokenizer: Any,
    *,
    count: int = 64,
    seed: int = 0,
    prompt_format: str = "multi-turn",
    max_new_tokens: int | None = None,
    batch_size: int = 32,
) -> TrainingEvaluator:
    """Choose the questions.

    Args:
        source: a question set (from a CSV and a template: `question_building.read_and_build`), a file of
            one, or a file of conversations, whose replies must then equal the reference.
        count: questions, as many of each group: trained and unseen phrasings, or all where there is neither.
        seed: of the choice.
        max_new_tokens: longest reply; default: what the references need.

    Raises:
        OSError, UserError: the file cannot be used, or has no such questions.
    """
    if count < 1:
        raise UserError(f"the number of questions is {count}; it must be at least 1")
    if isinstance(source, QuestionSet) or is_question_file(Path(source)):
        found = source if isinstance(source, QuestionSet) else read_question_file(source)
        questions: Any = _choose_dialogues(found, count, seed)
        cap = choose_cap(tokenizer, questions)
    else:
        questions = tuple(read_questions(source, count, seed)[0])
        cap = longest_reply_needed(tokenizer, questions)
    return TrainingEvaluator(questions, tokenizer, prompt_format, max_new_tokens or cap, batch_size)


def _choose_dialogues(questions: QuestionSet, count: int, seed: int) -> QuestionSet:
    """Whole dialogues, the groups in turn, until they have `count` questions."""
    groups = {dialogue.turns[0].group for dialogue in questions.dialogues}
    draw = random.Random(seed)
    piles: list[list[Dialogue]] = []
    for group in [group for group in DEFAULT_GROUPS if group in groups] or sorted(groups):
        pile = [dialogue for dialogue in questions.dialogues if dialogue.turns[0].group == group]
        piles.append(draw.sample(pile, len(pile))[::-1])
    chosen: list[Dialogue] = []
    for dialogue in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*piles))):
        if sum(len(other.turns) for other in chosen) < count:
            chosen.append(dialogue)
    return QuestionSet(questions.table, tuple(chosen), questions.notes)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's mode and all random numbers are what they were before."""
    modes = {module: module.training for module in model.modules()}
    state = random.getstate()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        for module, mode in modes.items():
            module.training = mode
