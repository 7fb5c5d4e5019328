"""--streaming: the rows of the data sets in memory, each once, in little memory, shared out without overlap."""

import json
from collections import Counter

import numpy as np
import pytest
from conversation_helpers import TOKENIZER, assistant, conversation, pair, user, write_jsonl

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation import DataArguments, read_records
from finetune_chatmodel_demo.conversation.mixing import mix_order
from finetune_chatmodel_demo.conversation.render import RowSettings
from finetune_chatmodel_demo.conversation.stage_data import build_stage_data
from finetune_chatmodel_demo.conversation.streaming import StreamedRows, mix_streams, shuffle_in_buffer

STAGES = ("pt", "sft", "rm", "dpo", "ppo")


def records_of(stage: str, count: int, name: str = "") -> list[dict]:
    if stage == "pt":
        return [{"text": f"{name}{number} " * (number % 5 + 1)} for number in range(count)]
    if stage in ("rm", "dpo"):
        return [pair([user(f"{name}{number}")], "a" * (number % 3 + 1), "b") for number in range(count)]
    return [conversation(user(f"{name}{number}"), assistant("a" * (number % 4))) for number in range(count)]


def count_rows(rows) -> Counter:
    return Counter(json.dumps(row) for row in rows)


def write_registry(folder, stage: str, sizes: dict[str, int]):
    """Data sets of canonical records as files, and the sources that would be opened for them."""
    kind = {"pt": "text", "rm": "preference", "dpo": "preference"}.get(stage, "multi-turn")
    return [
        read_records(write_jsonl(folder / f"{name}.jsonl", records_of(stage, size, name)), kind)
        for name, size in sizes.items()
    ]


def settings_for(stage: str, max_seq_length: int = 64) -> RowSettings:
    return RowSettings("multi-turn", max_seq_length, 64, 64, "turns", stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_pass_gives_the_rows_of_the_data_in_memory(tmp_path, stage):
    path = str(write_jsonl(tmp_path / "x.jsonl", records_of(stage, 40)))
    options = {"train_file": path, "max_seq_length": 24}
    in_memory = build_stage_data(DataArguments(**options), stage, TOKENIZER, 0)
    streamed = build_stage_data(DataArguments(**options, streaming=True, buffer_size=8), stage, TOKENIZER, 0).train
    expected = [in_memory.train[row] for row in range(len(in_memory.train))]
    assert list(streamed) != expected, "shuffled"
    assert count_rows(streamed) == count_rows(expected)
    assert streamed.peek(3) == expected[:3]
    streamed.buffer_size = 1
    assert list(streamed) == expected
    report = streamed.report
    assert (report.rows_read, report.rows_kept) == (40, 40)
    assert report.tokens_total == sum(map(len, (ids for row in expected for ids in _sequences(row)))) - (
        2 * len(expected) if stage == "pt" else 0
    )


def _sequences(row: dict) -> list[list[int]]:
    return (
        [row["input_ids"]]
        if row.keys() == {"input_ids", "labels"} and len(row["labels"]) == len(row["input_ids"])
        else list(row.values())
    )


def test_dropped_records_are_counted_and_named(tmp_path):
    records = [*records_of("sft", 3), conversation(user("no reply")), {"broken": 1}]
    path = str(write_jsonl(tmp_path / "x.jsonl", records))
    data = DataArguments(train_file=path, streaming=True, on_bad_record="skip", buffer_size=2)
    rows = build_stage_data(data, "sft", TOKENIZER, 0).train
    assert len(list(rows)) == 3
    assert (rows.report.rows_read, rows.report.rows_bad, rows.report.rows_dropped_masked) == (4, 1, 1)
    assert len(list(rows)) == 3 and rows.report.rows_read == 4, "a second pass counts anew"


def test_the_order_is_a_function_of_seed_and_epoch(tmp_path):
    path = str(write_jsonl(tmp_path / "x.jsonl", records_of("sft", 60)))

    def order(seed: int, epoch: int) -> list:
        data = DataArguments(train_file=path, streaming=True, buffer_size=10)
        rows = build_stage_data(data, "sft", TOKENIZER, seed).train
        rows.set_epoch(epoch)
        return list(rows)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)
    assert count_rows(order(1, 0)) == count_rows(order(2, 5))


class CountingSource:
    """Makes up records while it is read, and counts them."""

    path = "generated"
    bad_count = 0

    def __init__(self, count: int):
        self.count, self.read = count, 0

    def iterate_located(self):
        from finetune_chatmodel_demo.conversation.text_files import Located

        for number in range(1, self.count + 1):
            self.read += 1
            yield Located(number, number, conversation(user(f"{number}"), assistant("a" * 200)))


def test_no_more_is_read_than_the_buffer_holds():
    source = CountingSource(1_000_000)
    rows = StreamedRows([source], TOKENIZER, settings_for("sft", 512), buffer_size=100)
    iterator = iter(rows)
    assert source.read == 0
    drawn = [next(iterator) for _ in range(10)]
    assert len(drawn) == 10 and source.read == 110
    assert rows.report.rows_read == 110


def test_memory_does_not_grow_with_the_data():
    import tracemalloc

    def peak(count: int) -> int:
        rows = StreamedRows([CountingSource(count)], TOKENIZER, settings_for("sft", 512), buffer_size=50)
        tracemalloc.start()
        assert sum(1 for _ in rows) == count
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    small, large = peak(200), peak(4_000)
    assert large < 1.2 * small
    # 4,000 rows of 208 tokens are 4 MB at five bytes a token; 50 of them are 52 kB and a few objects each.
    assert large < 300_000


@pytest.mark.parametrize("strategy", ["concat", "interleave_under", "interleave_over"])
@pytest.mark.parametrize("probabilities", [None, [0.2, 0.3, 0.5]])
@pytest.mark.parametrize("sizes", [[3, 4, 5], [5, 1, 2], [4, 4, 4], [30, 7, 19]])
def test_streams_are_mixed_like_data_in_memory(strategy, probabilities, sizes):
    if strategy == "concat" and probabilities:
        pytest.skip("concat has no probabilities")
    openers = [lambda size=size: iter(range(size)) for size in sizes]
    starts = np.cumsum([0, *sizes])
    mixed = [starts[number] + item for number, item in mix_streams(openers, strategy, probabilities, seed=7)]
    parts = np.split(np.arange(sum(sizes)), starts[1:-1])
    assert mixed == mix_order(parts, strategy, probabilities, 7).tolist()


@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_mixed_streams_give_the_rows_of_mixed_data(tmp_path, stage):
    sources = write_registry(tmp_path, stage, {"甲": 9, "乙": 5})
    rows = StreamedRows(
        sources, TOKENIZER, settings_for(stage, 20), strategy="interleave_over", probabilities=[0.7, 0.3], seed=3
    )
    order = mix_order([np.arange(9), np.arange(9, 14)], "interleave_over", [0.7, 0.3], 3)
    records = [*records_of(stage, 9, "甲"), *records_of(stage, 5, "乙")]
    path = str(write_jsonl(tmp_path / "mixed.jsonl", [records[row] for row in order]))
    in_memory = build_stage_data(DataArguments(train_file=path, max_seq_length=20), stage, TOKENIZER, 0).train
    assert list(rows) == [in_memory[row] for row in range(len(in_memory))]
    assert [report.rows_read for report in rows.reports] == [sum(order < 9), sum(order >= 9)]


def test_a_stream_without_records_cannot_be_interleaved():
    with pytest.raises(UserError, match="data set 2 has no record left to mix; use --mix_strategy concat"):
        list(mix_streams([lambda: iter([1]), lambda: iter([])], "interleave_under", None, 0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_processes_and_workers_share_the_rows_out(tmp_path, stage, processes, workers):
    from accelerate.data_loader import IterableDatasetShard
    from torch.utils.data import DataLoader

    path = str(write_jsonl(tmp_path / "x.jsonl", records_of(stage, 48)))
    data = DataArguments(train_file=path, streaming=True, buffer_size=8, max_seq_length=24)
    drawn = []
    for process in range(processes):
        rows = build_stage_data(data, stage, TOKENIZER, 0).train
        if processes > 1:
            rows = IterableDatasetShard(rows, 2, num_processes=processes, process_index=process)
        for batch in DataLoader(rows, batch_size=2, num_workers=workers, collate_fn=list):
            drawn += batch
    in_memory = build_stage_data(DataArguments(train_file=path, max_seq_length=24), stage, TOKENIZER, 0).train
    expected = count_rows(in_memory[row] for row in range(len(in_memory)))
    if stage == "sft":
        assert count_rows(drawn) == expected, "48 rows come out even: nothing is repeated"
    elif workers == 0:
        assert not expected - count_rows(drawn), "a last batch that is not full is filled up from the beginning"
        assert len(drawn) < len(in_memory) + 2 * processes
    if stage == "pt" and processes == 1:
        # Each worker packs its own documents: other blocks, the same tokens.
        count = Counter(token for row in drawn for token in row["input_ids"][2:])
        assert count == Counter(token for row in range(len(in_memory)) for token in in_memory[row]["input_ids"][2:])


def test_more_workers_than_records(tmp_path):
    """A run goes through the data again and again; workers without a share leave that to the others."""
    from torch.utils.data import DataLoader

    from finetune_chatmodel_demo.training.sampling import number_rows

    path = str(write_jsonl(tmp_path / "x.jsonl", records_of("sft", 3)))
    rows = build_stage_data(DataArguments(train_file=path, streaming=True), "sft", TOKENIZER, 0).train
    loader = iter(DataLoader(number_rows(rows), batch_size=1, num_workers=5, collate_fn=list))
    drawn = [json.dumps(next(loader)[0]["input_ids"]) for _ in range(9)]
    assert Counter(drawn) == {json.dumps(row["input_ids"]): 3 for row in rows.peek(3)}


def test_a_stream_without_a_row_is_told_at_the_start(tmp_path):
    path = str(write_jsonl(tmp_path / "x.jsonl", [conversation(user("no reply"))]))
    rows = build_stage_data(DataArguments(train_file=path, streaming=True), "sft", TOKENIZER, 0).train
    with pytest.raises(UserError, match=r"no row is left to train on: .*1 dropped without a target"):
        rows.peek(1)


def test_the_first_rows_are_held_out(tmp_path):
    # One record without a target stands among the first: rows count, not records.
    records = records_of("sft", 20)
    records.insert(1, conversation(user("no reply")))
    path = str(write_jsonl(tmp_path / "x.jsonl", records))
    data = DataArguments(train_file=path, streaming=True, val_size=4, buffer_size=3)
    built = build_stage_data(data, "sft", TOKENIZER, 0)
    everything = build_stage_data(DataArguments(train_file=path), "sft", TOKENIZER, 0).train
    expected = [everything[row] for row in range(20)]
    assert [built.validation[row] for row in range(4)] == expected[:4] and len(built.validation) == 4
    assert count_rows(built.train) == count_rows(expected[4:])
    assert "train:      x.jsonl: read while training, shuffled among 3 rows" in built.table
    assert "validation: 4 rows" in built.table
    with pytest.raises(ValueError, match=r"--val_size 0\.1 is a share, and --streaming does not know"):
        build_stage_data(DataArguments(train_file=path, streaming=True, val_size=0.1), "sft", TOKENIZER, 0)
    with pytest.raises(UserError, match=r"--val_size would hold out 20 rows of x\.jsonl, which leaves nothing"):
        build_stage_data(DataArguments(train_file=path, streaming=True, val_size=20), "sft", TOKENIZER, 0)


def test_held_out_rows_of_several_data_sets_and_of_text(tmp_path):
    folder = tmp_path / "registry"
    folder.mkdir()
    entries = {}
    for name, size in (("one", 10), ("two", 10)):
        write_jsonl(folder / f"{name}.jsonl", [{"instruction": row["text"]} for row in records_of("pt", size, name)])
        entries[name] = {"file_name": f"{name}.jsonl", "columns": {"prompt": "instruction"}}
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    data = DataArguments(
        dataset="one,two", dataset_dir=str(folder), streaming=True, val_size=5, max_seq_length=10, buffer_size=1,
        mix_strategy="interleave_under",
    )  # fmt: skip
    built = build_stage_data(data, "pt", TOKENIZER, 0)
    assert built.train.skipped == [3, 2], "documents are held out, shared out among the data sets"
    texts = [[f"{name}{number} " * (number % 5 + 1) for number in range(10)] for name in ("one", "two")]
    held_out = [*texts[0][:3], *texts[1][:2]]
    tokens = [token for text in held_out for token in [*TOKENIZER.encode_text(text), 6]]
    assert [token for row in range(len(built.validation)) for token in built.validation[row]["input_ids"][2:]] == tokens
    mixed = [text for pair_ in zip(texts[0][3:], texts[1][2:]) for text in pair_]
    tokens = [token for text in mixed for token in [*TOKENIZER.encode_text(text), 6]]
    assert [token for row in built.train for token in row["input_ids"][2:]] == tokens


def test_shuffling_in_a_buffer_keeps_every_row():
    generator = np.random.default_rng(0)
    shuffled = list(shuffle_in_buffer(iter(range(100)), 10, generator))
    assert sorted(shuffled) == list(range(100)) and shuffled != list(range(100))
    assert all(row < place + 10 for place, row in enumerate(shuffled)), "nothing is drawn before it was read"
    assert list(shuffle_in_buffer(iter(range(5)), 1, generator)) == list(range(5))
    assert list(shuffle_in_buffer(iter([]), 10, generator)) == []


def test_max_samples_ends_the_reading(tmp_path):
    path = str(write_jsonl(tmp_path / "x.jsonl", records_of("sft", 30)))
    data = DataArguments(train_file=path, streaming=True, max_samples=7, buffer_size=3)
    assert len(list(build_stage_data(data, "sft", TOKENIZER, 0).train)) == 7
