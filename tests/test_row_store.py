"""Tokenized rows that are kept: tokenized once, found again while nothing has changed, never in memory as a whole."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from conversation_helpers import assistant, conversation, user, write_jsonl

from finetune_chatmodel_demo.conversation import tokenizing
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
    passes, original = [], tokenizing.render_batches

    def render_batches(*args):
        passes.append(1)
        return original(*args)

    monkeypatch.setattr(tokenizing, "render_batches", render_batches)
    return passes


def kept_folders(cache: Path) -> list[Path]:
    """The rows in a cache; beside them are locks."""
    return [path for path in cache.iterdir() if path.is_dir()]


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
    (folder,) = kept_folders(tmp_path / "cache")
    assert caplog.messages == [
        f"the rows of {data} are kept in {folder} for later runs",
        f"{data} was tokenized before: its rows are read from {folder}",
    ]
    for kept in (first, second):
        assert [kept.train[i] for i in range(3)] == [plain.train[i] for i in range(3)]
        assert (kept.train.lengths, kept.table) == (plain.train.lengths, plain.table)
        assert kept.train.where(2) == plain.train.where(2) == f"{data} line 3"
    assert second.train._table.cache_files[0]["filename"] == str(folder / "rows.arrow"), "mapped, not read"


def test_whatever_rows_follow_from_makes_new_ones(data, tmp_path, tokenizer, renderings, monkeypatch):
    cache = tmp_path / "cache"
    build(data, tokenizer, cache)
    build(data, tokenizer, cache, max_seq_length=100)
    build(data, tokenizer, cache, max_samples=2)
    build(data, tokenizer, cache, template="raw")
    write(data, ["草属性。"])
    build(data, tokenizer, cache)
    monkeypatch.setattr(tokenizing, "hash_program", lambda folder: "a later version")
    build(data, tokenizer, cache)
    assert len(renderings) == 6
    assert len(kept_folders(cache)) == 6


def test_the_key_covers_the_tokenizer_its_programs_and_the_libraries(data, tmp_path, tokenizer, monkeypatch):
    settings = RowSettings("multi-turn", 64, 64, 64, "turns")

    def key() -> str:
        return tokenizing.find_cache_folder(str(tmp_path), read_records(data), tokenizer, settings).name

    keys, rooms = [key()], []
    monkeypatch.setattr(tokenizing, "hash_program", lambda folder: rooms.append(folder.name) or "same")
    keys.append(key())
    assert set(rooms) == {"conversation", "chatglm3"}, "vocabulary.py and chat.py decide ids too"
    monkeypatch.setattr(tokenizing, "version", lambda name: f"another {name}")
    keys.append(key())
    (tmp_path / "other.model").write_bytes(Path(tokenizer.vocab_file).read_bytes() + b" ")
    monkeypatch.setattr(tokenizer, "vocab_file", str(tmp_path / "other.model"))
    keys.append(key())
    assert len(set(keys)) == 4 and keys[-1] == key()


@pytest.mark.parametrize("damage", ["a byte", "the end", "its facts"])
def test_damaged_rows_are_made_anew(data, tmp_path, tokenizer, renderings, caplog, damage):
    expected = build(data, tokenizer, tmp_path / "cache").train[2]
    (folder,) = kept_folders(tmp_path / "cache")
    table = folder / "rows.arrow"
    content = table.read_bytes()
    if damage == "its facts":
        (folder / "facts.json").write_text("{", encoding="utf-8")
    else:
        half = len(content) // 2
        table.write_bytes(content[:half] + (bytes([content[half] ^ 1]) + content[half + 1 :]) * (damage == "a byte"))
    assert build(data, tokenizer, tmp_path / "cache").train[2] == expected
    assert f"{folder} is damaged" in caplog.text and len(renderings) == 2
    assert build(data, tokenizer, tmp_path / "cache").train[2] == expected and len(renderings) == 2


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
    assert kept_folders(tmp_path / "cache") == []


def test_small_files_are_not_kept_by_default(data, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = RowSettings("multi-turn", 64, 64, 64, "turns")
    records = read_records(data)
    assert tokenizing.find_cache_folder(None, records, tokenizer, settings) is None
    monkeypatch.setattr(tokenizing, "SMALLEST_CACHED_FILE", 10)
    folder = tokenizing.find_cache_folder(None, records, tokenizer, settings)
    assert folder.parent == tmp_path / "chatglm3-finetuning" / "rows"


GROWTH = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from pathlib import Path
import numpy as np
from conversation_helpers import TOKENIZER, assistant, conversation, user
from finetune_chatmodel_demo.conversation import records, render, tokenizing

class Made(records.RecordSource):
    limit = None
    def __init__(self, count): self.path, self.count, self.bad_count, self.bad_messages = "x.jsonl", count, 0, []
    def iterate_located(self):
        one = records.Located(1, 1, conversation(user("q"), assistant("a" * 500)))
        return (one for _ in range(self.count))

def own_memory():
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon"))

settings = render.RowSettings("multi-turn", 600, 9, 9, "turns")
folder, after = Path(sys.argv[2]), []
tokenizing.find_cache_folder = lambda option, records, *rest: folder / str(records.count)
for count in (10, 1_000, 20_000):
    rows = tokenizing.build_rows(Made(count), TOKENIZER, settings, show_progress=False)
    assert len(rows) == count and len(rows[count - 1]["input_ids"]) > 500
    after.append(own_memory())
print(after[2] - after[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, to tell own memory from mapped files")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """20,000 rows of 500 tokens are 43 MB."""
    command = [sys.executable, "-c", GROWTH, str(REPOSITORY), str(tmp_path / "rows")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) < 8 * 1024  # KiB
