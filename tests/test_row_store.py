"""Tokenized rows that are kept: tokenized once, found again while nothing has changed, never in memory as a whole."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from conversation_helpers import assistant, conversation, user, write_jsonl

from finetune_chatmodel_demo.conversation import row_store, rows
from finetune_chatmodel_demo.conversation.data_arguments import DataArguments
from finetune_chatmodel_demo.conversation.records import read_records
from finetune_chatmodel_demo.conversation.render import RowSettings
from finetune_chatmodel_demo.conversation.stage_data import build_stage_data


def write(path: Path, answers: list[str]) -> Path:
    return write_jsonl(path, [conversation(user("属性？"), assistant(answer)) for answer in answers])


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "train.jsonl", ["电属性。", "水属性。" * 3, "火属性。"])


@pytest.fixture
def renderings(monkeypatch):
    """Counts the passes that render."""
    passes, original = [], rows.render_chunks

    def render_chunks(*args):
        passes.append(1)
        return original(*args)

    monkeypatch.setattr(rows, "render_chunks", render_chunks)
    return passes


def build(data, tokenizer, cache, **options):
    arguments = DataArguments(train_file=str(data), tokenized_cache=str(cache), **options)
    return build_stage_data(arguments, "sft", tokenizer, 1, show_progress=False)


def test_rows_are_tokenized_once(data, tmp_path, tokenizer, renderings, caplog):
    caplog.set_level("INFO")
    plain = build(data, tokenizer, "none")
    assert not caplog.messages
    first = build(data, tokenizer, tmp_path / "cache")
    second = build(data, tokenizer, tmp_path / "cache")
    assert len(renderings) == 2
    (folder,) = (tmp_path / "cache").iterdir()
    assert caplog.messages == [
        f"the rows of {data} are kept in {folder} for later runs",
        f"{data} was tokenized before: its rows are read from {folder}",
    ]
    for kept in (first, second):
        assert [kept.train[i] for i in range(3)] == [plain.train[i] for i in range(3)]
        assert (kept.train.lengths, kept.table) == (plain.train.lengths, plain.table)
        assert kept.train.where(2) == plain.train.where(2) == f"{data} line 3"
    assert isinstance(second.train._input_ids, np.memmap)


def test_whatever_rows_follow_from_makes_new_ones(data, tmp_path, tokenizer, renderings, monkeypatch):
    cache = tmp_path / "cache"
    build(data, tokenizer, cache)
    build(data, tokenizer, cache, max_seq_length=100)
    build(data, tokenizer, cache, max_samples=2)
    build(data, tokenizer, cache, template="raw")
    write(data, ["草属性。"])
    build(data, tokenizer, cache)
    monkeypatch.setattr(row_store, "_hash_code", lambda: "a later version")
    build(data, tokenizer, cache)
    assert len(renderings) == 6
    assert len(list(cache.iterdir())) == 6


def test_skipped_records_are_still_told(data, tmp_path, tokenizer, renderings):
    with data.open("a", encoding="utf-8") as file:
        file.write('{"conversations": []}\n')
    tables = [build(data, tokenizer, tmp_path / "cache", on_bad_record="skip").table for _ in range(2)]
    assert len(renderings) == 1
    assert tables[0] == tables[1]
    assert "'conversations' is empty" in tables[1]


def test_a_broken_run_leaves_nothing(data, tmp_path, tokenizer):
    with data.open("a", encoding="utf-8") as file:
        file.write('{"conversations": []}\n')
    with pytest.raises(ValueError, match="'conversations' is empty"):
        build(data, tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_small_files_are_not_kept_by_default(data, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = RowSettings("multi-turn", 64, 64, 64, "turns")
    records = read_records(data)
    assert row_store.find_cache_folder(None, records, tokenizer, settings) is None
    monkeypatch.setattr(row_store, "SMALLEST_CACHED_FILE", 10)
    folder = row_store.find_cache_folder(None, records, tokenizer, settings)
    assert folder.parent == tmp_path / "chatglm3-finetuning" / "rows"


GROWTH = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import numpy as np
from finetune_chatmodel_demo.conversation import row_store
from finetune_chatmodel_demo.conversation.tokenizing import DatasetReport, RenderedChunk

class Records:
    path, bad_count, bad_messages = "x.jsonl", 0, []

def chunks(count):
    for _ in range(count):
        ids = np.ones(256 * 100, dtype=np.int32)
        report = DatasetReport("", rows_read=256, rows_kept=256)
        yield RenderedChunk(ids, ids > 0, np.full(256, 100), np.ones((256, 2), dtype=np.int64), report)

def own_memory():
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon"))

before = own_memory()
store = row_store.keep_in_files(Records(), chunks(1000), Path(sys.argv[2]))
assert len(store.origins) == 256_000 and store.input_ids[-1] == 1
print(own_memory() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, to tell own memory from mapped files")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """256,000 rows of 100 tokens are 128 MB."""
    command = [sys.executable, "-c", GROWTH, str(REPOSITORY), str(tmp_path / "rows")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) < 8 * 1024  # KiB
