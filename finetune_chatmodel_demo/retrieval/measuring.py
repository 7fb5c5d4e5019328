"""How well a base answers questions whose passages are known: recall, mean reciprocal rank, refusals."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.retrieval.embedding import Embedding
from finetune_chatmodel_demo.retrieval.retrieving import Hit, retrieve
from finetune_chatmodel_demo.retrieval.store import Store

DEPTH = 10


@dataclass(frozen=True)
class LabelledQuestion:
    """A question, and what its passage is known by; neither file nor text: nothing answers it.

    Attributes:
        question: what is asked.
        file: end of the path of the file that answers it.
        text: what the passage that answers it holds.
    """

    question: str
    file: str | None = None
    text: str | None = None

    @property
    def is_answerable(self) -> bool:
        return bool(self.file or self.text)

    def is_answered_by(self, hit: Hit) -> bool:
        """Whether a hit is the passage that was meant."""
        return (self.file is None or hit.passage.file.endswith(self.file)) and (self.text or "") in hit.passage.text


def read_labelled_questions(path: Path) -> list[LabelledQuestion]:
    """Reads JSON lines of `{"question", "file"?, "text"?}`.

    Raises:
        UserError: a line is something else, or there is none.
    """
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            questions.append(LabelledQuestion(record["question"], record.get("file"), record.get("text")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{path} line {number}: expected {{"question", "file"?, "text"?}}, got {line[:80]}'
            ) from error
    if not questions:
        raise UserError(f"{path} has no question")
    return questions


def evaluate(
    store: Store, embedding: Embedding | None, questions: Sequence[LabelledQuestion], threshold: float
) -> dict[str, float | int | None]:
    """Recall at 1 and 5 and MRR over answerable questions; precision, recall and F1 of refusing the others."""
    ranks: list[int] = []
    refused_right = refused_wrong = 0
    for question in questions:
        hits = retrieve(store, question.question, embedding, DEPTH)
        is_refused = not hits or hits[0].score < threshold
        if question.is_answerable:
            ranks.append(next((place for place, hit in enumerate(hits, 1) if question.is_answered_by(hit)), 0))
            refused_wrong += is_refused
        else:
            refused_right += is_refused
    answerable, others = len(ranks), len(questions) - len(ranks)

    def share(part: float, whole: int) -> float | None:
        return round(part / whole, 4) if whole else None

    return {
        "questions": len(questions),
        "answerable": answerable,
        "recall@1": share(sum(rank == 1 for rank in ranks), answerable),
        "recall@5": share(sum(0 < rank <= 5 for rank in ranks), answerable),
        "mrr": share(sum(1 / rank for rank in ranks if rank), answerable),
        "refusal_precision": share(refused_right, refused_right + refused_wrong),
        "refusal_recall": share(refused_right, others),
        "refusal_f1": share(2 * refused_right, refused_right + refused_wrong + others),
    }
