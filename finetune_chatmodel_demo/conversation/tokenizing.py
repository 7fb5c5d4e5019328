"""From records to tables of rows, in this process or in several, and the cache that keeps them.

Rows of large data files are kept (`--tokenized_cache`) under a key of everything that ids and labels follow from: the
file's content, the data set's entry, the vocabulary, the settings, the programs that read, render and tokenize, and the
libraries that these use. They are written while they are rendered and read through a memory map, so that a million rows
take hardly more memory than a thousand.

The table is written with pyarrow and read by `datasets`. `Dataset.from_generator` would take 50 µs a row more, which
doubles the time that a million rows take; `map(num_proc)` forks a process that runs threads.
"""

import hashlib
import inspect
import itertools
import json
import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import hash_file, whole_folder, write_json
from finetune_chatmodel_demo.conversation.records import RecordSource, read_records
from finetune_chatmodel_demo.conversation.render import ChatTokenizer, RowSettings, TruncationStrategy
from finetune_chatmodel_demo.conversation.rows import FACTS, PLACE, SEQUENCES, DatasetReport, Rows, make_columns
from finetune_chatmodel_demo.conversation.text_files import Located

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

BATCH_ROWS = 1000
# Up to here one process is faster: measured, 0.1 ms a row of 80 tokens, and 5 to 10 s until others have started.
IN_PROCESS_ROWS = 50_000
BATCHES_IN_FLIGHT = 4
# Not forked: a fork of a process that runs threads (PyTorch's, a progress bar's) can hang.
START_METHOD = "spawn"
# Smaller files are tokenized in a few seconds; measured, 32 MiB of Pokémon conversations are 34,000 rows.
SMALLEST_CACHED_FILE = 32 * 2**20
TABLE, FACTS_FILE = "rows.arrow", "facts.json"
LIBRARIES = ("sentencepiece", "transformers", "pyarrow")
# What to do where no record became a row, by stage.
NO_ROW = {
    "sft": "holds a target: {} records were read, and in none of them does a reply lie within the length limit; raise "
    "it, or check roles and 'loss'",
    **dict.fromkeys(
        ("rm", "dpo"),
        "is left: {} records were read, and in none of them do question and replies fit into --max_seq_length; raise "
        "it",
    ),
    "ppo": "is left: {} records were read, and in none of them does the newest question fit into --max_seq_length; "
    "raise it",
}


def build_dataset(
    train_format: Literal["multi-turn", "input-output"],
    path: str | Path,
    tokenizer: ChatTokenizer,
    *,
    max_seq_length: int,
    max_source_length: int,
    max_target_length: int,
    truncation_strategy: TruncationStrategy = "turns",
    on_bad_record: Literal["error", "skip"] = "error",
    num_workers: int | None = None,
    show_progress: bool | None = None,
) -> Rows:
    """Reads, validates, renders and cuts the records of a file, for sft.

    Args:
        train_format: What the records are.
        path: See `read_records`.
        tokenizer: See `ChatTokenizer`; must be picklable where several processes work.
        max_seq_length: Most ids of a multi-turn row.
        max_source_length: Most ids of an input-output prompt, with the two that start the row.
        max_target_length: Most ids of an input-output response, without eos.
        truncation_strategy: See `truncate`. With "official" a cut input-output response is followed by eos.
        on_bad_record: See `read_records`.
        num_workers: Processes that tokenize, where the file has more than IN_PROCESS_ROWS records.
        show_progress: Whether to draw a progress bar on stderr; None: where that is a terminal.

    Raises:
        FileNotFoundError: There is no such file.
        RecordError: A record is bad, or no row is left to train on.
    """
    records = read_records(path, train_format, on_bad_record)
    settings = RowSettings(train_format, max_seq_length, max_source_length, max_target_length, truncation_strategy)
    return build_rows(records, tokenizer, settings, num_workers=num_workers, show_progress=show_progress)


def build_rows(
    records: RecordSource,
    tokenizer: ChatTokenizer,
    settings: RowSettings,
    *,
    num_workers: int | None = None,
    show_progress: bool | None = None,
    tokenized_cache: str | None = "none",
) -> Rows:
    """Renders the records of one source into rows of the stage of `settings`, or finds those that are kept.

    Arguments and errors are those of `build_dataset`; `tokenized_cache`: see `find_cache_folder`.
    """
    import pyarrow as pa
    from datasets import Dataset
    from filelock import FileLock

    def render(sink: Any) -> dict[str, Any]:
        return write_table(records, tokenizer, settings, sink, num_workers or 1, show_progress)

    folder = find_cache_folder(tokenized_cache, records, tokenizer, settings)
    if folder is None:
        sink = pa.BufferOutputStream()
        facts, table = render(sink), Dataset.from_buffer(sink.getvalue())
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # another run may be making the same rows
            facts = read_facts(folder)
            if facts:
                records.bad_count, records.bad_messages = facts["report"]["rows_bad"], facts["bad_messages"]
                logger.info("%s was tokenized before: its rows are read from %s", records.path, folder)
            else:
                with whole_folder(folder) as partial:
                    with (partial / TABLE).open("wb") as file:
                        facts = render(file)
                    write_json(partial / FACTS_FILE, facts | {"sha256": hash_file(partial / TABLE)})
                logger.info("the rows of %s are kept in %s for later runs", records.path, folder)
        table = Dataset.from_file(str(folder / TABLE))
    report = DatasetReport(**facts["report"] | {"path": str(records.path)})
    if not report.rows_kept:
        raise UserError(f"no row of {records.path} {NO_ROW[settings.stage].format(report.rows_read)}")
    columns = [table.data.column(name).to_numpy() for name in FACTS]
    return Rows(settings.stage, table, np.stack([*columns, np.zeros_like(columns[0])]), [records], [report])


def write_table(
    records: RecordSource,
    tokenizer: ChatTokenizer,
    settings: RowSettings,
    sink: Any,
    num_workers: int = 1,
    show_progress: bool | None = None,
) -> dict[str, Any]:
    """Writes the rows of a source to a binary file as an Arrow stream.

    Returns:
        `report` (a `DatasetReport` as a dict) and `bad_messages`, what was wrong with the first skipped records.
    """
    import pyarrow as pa

    report = DatasetReport(str(records.path))
    is_disabled = None if show_progress is None else not show_progress
    with (
        tqdm(desc=f"Tokenizing {Path(records.path).name}", unit=" rows", disable=is_disabled) as bar,
        pa.ipc.new_stream(sink, _schema(settings.stage)) as writer,
    ):
        for batch, counts in render_batches(records, tokenizer, settings, num_workers):
            writer.write_batch(batch)
            report.add(counts)
            bar.update(counts.rows_read)
    report.rows_bad = records.bad_count
    return {"report": asdict(report), "bad_messages": list(records.bad_messages)}


def _schema(stage: str) -> "pyarrow.Schema":
    import pyarrow as pa

    names = dict.fromkeys(SEQUENCES[stage], pa.list_(pa.int32()))
    names |= {"is_target": pa.list_(pa.bool_())} if stage == "sft" else {}
    return pa.schema(names | dict.fromkeys(FACTS, pa.int32()) | dict.fromkeys(PLACE, pa.int64()))


def render_batches(
    records: RecordSource, tokenizer: ChatTokenizer, settings: RowSettings, num_workers: int
) -> Iterator[tuple["pyarrow.RecordBatch", DatasetReport]]:
    """Renders in this process, and where there are to be several, in others from row IN_PROCESS_ROWS on."""
    located = records.iterate_located()
    here = itertools.islice(located, IN_PROCESS_ROWS) if num_workers > 1 else located
    for batch in _batched(here, BATCH_ROWS):
        yield _render_batch(tokenizer, settings, batch)
    batches = _batched(located, BATCH_ROWS)
    under_way = list(itertools.islice(batches, num_workers * BATCHES_IN_FLIGHT))
    if not under_way:
        return
    context = multiprocessing.get_context(START_METHOD)
    try:
        with ProcessPoolExecutor(num_workers, context, _start_worker, (tokenizer, settings)) as pool:
            while under_way:  # a few batches a worker, so that neither records nor rows pile up
                yield from pool.map(_render_in_worker, under_way)
                under_way = list(itertools.islice(batches, num_workers * BATCHES_IN_FLIGHT))
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {num_workers} tokenizing processes died, perhaps for want of memory; "
            "try --preprocessing_num_workers 1"
        ) from error


_worker_state: tuple[ChatTokenizer, RowSettings]


def _start_worker(tokenizer: ChatTokenizer, settings: RowSettings) -> None:
    global _worker_state
    _worker_state = (tokenizer, settings)


def _render_in_worker(located: list[Located]) -> tuple["pyarrow.RecordBatch", DatasetReport]:
    return _render_batch(*_worker_state, located)


def _render_batch(
    tokenizer: ChatTokenizer, settings: RowSettings, located: list[Located]
) -> tuple["pyarrow.RecordBatch", DatasetReport]:
    import pyarrow as pa

    report, kept = DatasetReport(path=""), []
    for each in located:
        row = settings.render(tokenizer, each.value)
        if report.count(row):
            kept.append(make_columns(settings.stage, row) | {"number": each.number, "line": each.line})
    return pa.RecordBatch.from_pylist(kept, schema=_schema(settings.stage)), report


def _batched(items: Iterator[Located], size: int) -> Iterator[list[Located]]:
    """Lists of `size` items (itertools.batched needs Python 3.12)."""
    while batch := list(itertools.islice(items, size)):
        yield batch


def find_cache_folder(option: str | None, records: RecordSource, tokenizer: Any, settings: RowSettings) -> Path | None:
    """Where the rows of a source are, or will be, kept.

    Args:
        option: --tokenized_cache: a folder, "none", or None: the user's cache folder, for large files only.
        records: The source; one that is not a file is never kept.
        tokenizer: One with a vocabulary file, `vocab_file`.
        settings: How a record becomes a row.

    Returns:
        The folder of these rows; None: they are not kept.
    """
    path, vocabulary = Path(records.path), getattr(tokenizer, "vocab_file", None)
    if option == "none" or not path.is_file() or vocabulary is None:
        return None
    if option is None and path.stat().st_size < SMALLEST_CACHED_FILE:
        return None
    programs = [hash_program(Path(file).parent) for file in (__file__, inspect.getfile(type(tokenizer)))]
    versions = [version(name) for name in LIBRARIES]
    parts = [
        records.fingerprint(),
        records.limit,
        hash_file(path),
        hash_file(Path(vocabulary)),
        settings,
        *programs,
        *versions,
    ]
    key = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
    return (Path(option) if option else default_cache()) / key


def default_cache() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "chatglm3-finetuning" / "rows"


def hash_program(folder: Path) -> str:
    """Of the programs of a room: what another version rendered is not used."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What `write_table` said of the rows that are kept in a folder; None where there are none, or damaged ones."""
    try:
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        is_whole = facts["sha256"] == hash_file(folder / TABLE)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        logger.warning("%s is damaged (its sum is another one); the rows are made anew", folder)
    return facts if is_whole else None
