"""Files into a base: only what changed is read, each file is whole or absent, a killed run goes on where it stopped."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import hash_file
from finetune_chatmodel_demo.retrieval.documents import find_files, read_document
from finetune_chatmodel_demo.retrieval.embedding import NONE, Embedding, load_embedding
from finetune_chatmodel_demo.retrieval.splitting import DEFAULT_TOKENS, Count, split_document
from finetune_chatmodel_demo.retrieval.store import Store, indexed_text


@dataclass
class IngestReport:
    """What became of the files: paths with what was noticed or why they were skipped."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notices: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    passages: int = 0


def open_embedding(store: Store, wanted: str | None, device: str | None = None) -> Embedding | None:
    """The embedding that a base was made with; a new base takes the wanted one and remembers it.

    Raises:
        UserError: another embedding is wanted, or the same name gives other vectors now.
    """
    remembered = store.manifest.get("embedding")
    if remembered is None:
        embedding = load_embedding(wanted, device)
        values = {"name": NONE} if embedding is None else describe_embedding(embedding)
        with store.transaction():
            store.set_manifest(embedding=values)
        return embedding
    if wanted not in (None, remembered["name"]):
        raise UserError(
            f"the base {store.path.parent.name} was made with --embedding {remembered['name']}, and its vectors "
            f"cannot be compared with those of {wanted}; leave the flag out, or ingest into a new base"
        )
    embedding = load_embedding(remembered["name"], device)
    if embedding is not None and (found := describe_embedding(embedding)) != remembered:
        raise UserError(
            f"{embedding.name} gives other vectors than when {store.path.parent.name} was made ({found} against "
            f"{remembered}); install that version again, or ingest into a new base"
        )
    return embedding


def describe_embedding(embedding: Embedding) -> dict[str, Any]:
    """What a base remembers of its embedding."""
    return {"name": embedding.name, "dimension": embedding.dimension, "fingerprint": embedding.fingerprint}


def ingest(
    store: Store,
    paths: Sequence[Path],
    embedding: Embedding | None,
    count: Count,
    *,
    limit: int = DEFAULT_TOKENS,
    progress: Callable[[Iterable[Path]], Iterable[Path]] = iter,
) -> IngestReport:
    """Reads files and folders into a base.

    Args:
        paths: files, and folders that are searched for files of known kinds.
        count: tokens of a text; see `split_document`.
        progress: wraps the files, for a progress bar.

    Returns:
        What became of each file; `missing` are stored files below a folder of `paths` that are no longer there.

    Raises:
        UserError: a path does not exist, or the base was made with another limit.
    """
    remembered = store.manifest.get("chunk_tokens")
    if remembered is None:
        with store.transaction():
            store.set_manifest(chunk_tokens=limit)
    elif remembered != limit:
        raise UserError(f"the base was made with --chunk_tokens {remembered}, not {limit}; ingest into a new base")
    report = IngestReport()
    files = list(find_files(paths))
    for path in progress(files):
        name = str(path.resolve())
        try:
            digest = hash_file(path)
            before = store.hash_of(name)
            if before == digest:
                report.unchanged.append(name)
                continue
            document = read_document(path)
        except (UserError, OSError) as error:
            report.skipped.append((name, str(error)))
            continue
        chunks = split_document(document, count, limit)
        texts = [indexed_text(document.title, each.heading, document.text[each.start : each.end]) for each in chunks]
        vectors = embedding.encode(texts, is_query=False) if embedding is not None and texts else None
        store.put(name, document.title, digest, path.stat().st_size, document.text, document.notices, chunks, vectors)
        (report.changed if before else report.added).append(name)
        report.notices += [(name, notice) for notice in document.notices]
        report.passages += len(chunks)
    folders = [path.resolve() for path in paths if path.is_dir()]
    for stored in store.files():
        where = Path(stored.path)
        if any(where.is_relative_to(folder) for folder in folders) and not where.exists():
            report.missing.append(stored.path)
    return report
