"""A knowledge base as one SQLite file: manifest, files, passages with their offsets, words (FTS5) and vectors.

A file is replaced or removed in one transaction, so that a kill leaves the state before or after it. Several processes
may read, and write one after the other. Deleted text is overwritten and its pages are given back.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_chatmodel_demo.common.errors import UserError, did_you_mean
from finetune_chatmodel_demo.retrieval.splitting import Chunk
from finetune_chatmodel_demo.retrieval.terms import terms_of

if TYPE_CHECKING:
    import numpy

# Of everything that decides what stands in a base: tables, terms, splitting. Another number is another base.
FORMAT = 1
BASE_FILE = "base.sqlite"
BUSY_SECONDS = 60
TABLES = """
CREATE TABLE manifest (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE files (
    id INTEGER PRIMARY KEY, path TEXT UNIQUE NOT NULL, title TEXT NOT NULL, sha256 TEXT NOT NULL,
    bytes INTEGER NOT NULL, text TEXT NOT NULL, notices TEXT NOT NULL);
CREATE TABLE passages (
    id INTEGER PRIMARY KEY, file INTEGER NOT NULL REFERENCES files(id), place INTEGER NOT NULL, start INTEGER NOT NULL,
    "end" INTEGER NOT NULL, heading TEXT NOT NULL, page INTEGER, kind TEXT NOT NULL, text TEXT NOT NULL, vector BLOB);
CREATE INDEX passages_of_file ON passages(file, place);
CREATE VIRTUAL TABLE words USING fts5(
    terms, content='', tokenize="unicode61 remove_diacritics 0 categories 'L* N* Co M*' tokenchars '.'");
CREATE VIRTUAL TABLE word_counts USING fts5vocab(words, 'row');
"""


@dataclass(frozen=True)
class StoredFile:
    """A file of a base, as `list` shows it."""

    path: str
    title: str
    sha256: str
    bytes: int
    passages: int
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Passage:
    """A passage of a base: `Chunk`, where it is from, and its text."""

    id: int
    file: str
    title: str
    place: int
    start: int
    end: int
    heading: tuple[str, ...]
    page: int | None
    kind: str
    text: str

    @property
    def indexed_text(self) -> str:
        """What is indexed: the title and the headings stand in front, for passages seldom name their subject."""
        return indexed_text(self.title, self.heading, self.text)


def indexed_text(title: str, heading: Sequence[str], text: str) -> str:
    """See `Passage.indexed_text`."""
    return f"{title} {' '.join(heading)}\n{text}"


def base_folder(knowledge_dir: Path, name: str) -> Path:
    """Folder of a base.

    Raises:
        UserError: the name cannot be a folder's.
    """
    if not name.strip() or name.startswith(".") or len(name) > 100 or any(each in name for each in '/\\:*?"<>|\0'):
        raise UserError(f"--base {name!r} cannot be a folder's name; use letters, digits, Chinese characters, - and _")
    return knowledge_dir / name


def list_bases(knowledge_dir: Path) -> list[str]:
    """Names of the bases in a folder."""
    return sorted(path.parent.name for path in knowledge_dir.glob(f"*/{BASE_FILE}"))


class Store:
    """One open knowledge base.

    Args:
        folder: of the base.
        create: whether to make it where there is none.

    Raises:
        UserError: there is no such base, it is damaged, or it is of another version.
    """

    def __init__(self, folder: Path, *, create: bool = False):
        self.path = folder / BASE_FILE
        is_new = not self.path.exists()
        if is_new and not create:
            known = list_bases(folder.parent)
            hint = f"; there are: {', '.join(known)}" if known else ""
            raise UserError(
                f"there is no knowledge base {folder.name!r} in {folder.parent}{hint}"
                f"{did_you_mean(folder.name, known)}; `ingest` makes one"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        self._vectors: tuple[int, Any, Any] | None = None
        try:
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA secure_delete = ON")
            with self.transaction():
                if not self.connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'manifest'").fetchone():
                    for statement in TABLES.split(";\n"):
                        self.connection.execute(statement)
                    self.set_manifest(format=FORMAT)
            found = self.manifest.get("format")
        except sqlite3.DatabaseError as error:
            self.connection.close()
            raise UserError(f"{self.path} cannot be read ({error}); remove it and ingest its files again") from error
        if found != FORMAT:
            self.connection.close()
            raise UserError(
                f"{self.path} is a base of format {found}, this version reads {FORMAT}; ingest into a new base"
            )

    def close(self) -> None:
        """Closes the file."""
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block happens or none of it; other writers wait."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.connection.execute("ROLLBACK")
            raise
        self.connection.execute("COMMIT")

    @property
    def manifest(self) -> dict[str, Any]:
        """What the base remembers of how it was made."""
        return {key: json.loads(value) for key, value in self.connection.execute("SELECT key, value FROM manifest")}

    def set_manifest(self, **values: Any) -> None:
        """Remembers values."""
        rows = [(key, json.dumps(value, ensure_ascii=False)) for key, value in values.items()]
        self.connection.executemany("INSERT OR REPLACE INTO manifest VALUES (?, ?)", rows)

    def hash_of(self, path: str) -> str | None:
        """SHA-256 of a file as it was ingested; None where it was not."""
        row = self.connection.execute("SELECT sha256 FROM files WHERE path = ?", (path,)).fetchone()
        return row[0] if row else None

    def put(
        self,
        path: str,
        title: str,
        sha256: str,
        size: int,
        text: str,
        notices: Sequence[str],
        chunks: Sequence[Chunk],
        vectors: "numpy.ndarray | None",
    ) -> None:
        """Stores a file in place of its earlier state, in one transaction.

        Args:
            vectors: float (chunks, dimension), unit rows; None without an embedding.
        """
        with self.transaction():
            self._remove(path)
            row = (path, title, sha256, size, text, json.dumps(list(notices), ensure_ascii=False))
            file = self.connection.execute(
                "INSERT INTO files (path, title, sha256, bytes, text, notices) VALUES (?, ?, ?, ?, ?, ?)", row
            ).lastrowid
            for place, chunk in enumerate(chunks):
                passage = text[chunk.start : chunk.end]
                vector = None if vectors is None else vectors[place].astype("float16").tobytes()
                values = (
                    file,
                    place,
                    chunk.start,
                    chunk.end,
                    json.dumps(chunk.heading, ensure_ascii=False),
                    chunk.page,
                )
                number = self.connection.execute(
                    'INSERT INTO passages (file, place, start, "end", heading, page, kind, text, vector) '
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*values, chunk.kind, passage, vector),
                ).lastrowid
                terms = " ".join(terms_of(indexed_text(title, chunk.heading, passage)))
                self.connection.execute("INSERT INTO words (rowid, terms) VALUES (?, ?)", (number, terms))

    def remove(self, paths: Iterable[str]) -> None:
        """Removes files from every index, in one transaction, and gives their pages back."""
        with self.transaction():
            for path in paths:
                self._remove(path)
            self.connection.execute("INSERT INTO words (words) VALUES ('optimize')")
        self.connection.execute("VACUUM")
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _remove(self, path: str) -> None:
        row = self.connection.execute("SELECT id FROM files WHERE path = ?", (path,)).fetchone()
        if row is None:
            return
        for passage in self.passages("files.id = ?", row):
            terms = " ".join(terms_of(passage.indexed_text))
            self.connection.execute(
                "INSERT INTO words (words, rowid, terms) VALUES ('delete', ?, ?)", (passage.id, terms)
            )
        self.connection.execute("DELETE FROM passages WHERE file = ?", row)
        self.connection.execute("DELETE FROM files WHERE id = ?", row)

    def files(self) -> list[StoredFile]:
        """All files, by path."""
        rows = self.connection.execute(
            "SELECT path, title, sha256, bytes, (SELECT count(*) FROM passages WHERE file = files.id), notices "
            "FROM files ORDER BY path"
        )
        return [StoredFile(*row[:5], tuple(json.loads(row[5]))) for row in rows]

    def text_of(self, path: str) -> str:
        """The text of a file, which offsets count in."""
        return self.connection.execute("SELECT text FROM files WHERE path = ?", (path,)).fetchone()[0]

    def count(self) -> int:
        """How many passages there are."""
        return self.connection.execute("SELECT count(*) FROM passages").fetchone()[0]

    def passages(self, where: str, values: Sequence[Any] = ()) -> list[Passage]:
        """Passages for which a condition of SQL holds."""
        rows = self.connection.execute(
            'SELECT passages.id, path, title, place, start, "end", heading, page, kind, passages.text '
            f"FROM passages JOIN files ON files.id = passages.file WHERE {where}",
            values,
        )
        return [Passage(*row[:6], tuple(json.loads(row[6])), *row[7:]) for row in rows]

    def get(self, ids: Sequence[int]) -> list[Passage]:
        """Passages by their numbers."""
        return self.passages(f"passages.id IN ({','.join('?' * len(ids))})", list(ids))

    def frequencies(self, terms: Iterable[str]) -> dict[str, int]:
        """In how many passages each term stands."""
        terms = list(dict.fromkeys(terms))
        marks = ",".join("?" * len(terms))
        found = dict(self.connection.execute(f"SELECT term, doc FROM word_counts WHERE term IN ({marks})", terms))
        return {term: found.get(term, 0) for term in terms}

    def match(self, terms: Sequence[str], limit: int) -> list[int]:
        """Numbers of the passages that contain some of the terms, the best by BM25 first."""
        if not terms:
            return []
        query = " OR ".join(f'"{term}"' for term in terms)
        rows = self.connection.execute(
            "SELECT rowid FROM words WHERE words MATCH ? ORDER BY rank LIMIT ?", (query, limit)
        )
        return [number for (number,) in rows]

    def vectors(self) -> "tuple[numpy.ndarray, numpy.ndarray]":
        """(ids, vectors): int64 (passages,) and float32 (passages, dimension); read again when somebody wrote."""
        import numpy

        version = self.connection.execute("PRAGMA data_version").fetchone()[0], self.connection.total_changes
        if self._vectors is None or self._vectors[0] != version:
            rows = self.connection.execute("SELECT id, vector FROM passages WHERE vector IS NOT NULL").fetchall()
            ids = numpy.array([number for number, _ in rows], dtype=numpy.int64)
            joined = numpy.frombuffer(b"".join(vector for _, vector in rows), dtype=numpy.float16)
            self._vectors = (version, ids, joined.reshape(len(rows), -1).astype(numpy.float32))
        return self._vectors[1], self._vectors[2]
