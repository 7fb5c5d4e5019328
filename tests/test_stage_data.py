"""The rows of every stage: items, cuts, packing, mixing, held-out rows, the table, and the registry as their source."""

import json
from pathlib import Path

import numpy as np
import pytest
from conversation_helpers import (
    ASSISTANT,
    OBSERVATION,
    TOKENIZER,
    assistant,
    conversation,
    message,
    pair,
    read_ids,
    read_targets,
    user,
    write_jsonl,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from wcwidth import wcswidth

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation import (
    DataArguments,
    Rows,
    build_dataset,
    read_records,
    tokenizing,
)
from finetune_chatmodel_demo.conversation import stage_data as stage_data_module
from finetune_chatmodel_demo.conversation.mixing import draw_held_out, mix_order, parse_probabilities
from finetune_chatmodel_demo.conversation.packing import PackedDataset
from finetune_chatmodel_demo.conversation.render import RowSettings, render_conversation
from finetune_chatmodel_demo.conversation.rows import DatasetReport
from finetune_chatmodel_demo.conversation.stage_data import WIDEST, build_stage_data, format_data_table
from finetune_chatmodel_demo.conversation.tokenizing import build_rows

STAGES = ("pt", "sft", "rm", "dpo", "ppo")
TEXTS = ["皮卡丘", "妙蛙种子。", "小火龙"]
CALL = {"role": "tool", "name": "f", "parameters": {"a": 1}}


def records_of(stage: str, count: int) -> list[dict]:
    if stage == "pt":
        return [{"text": f"{number}"} for number in range(count)]
    if stage in ("rm", "dpo"):
        return [pair([user(f"{number}")], "a", "b") for number in range(count)]
    return [conversation(user(f"{number}"), assistant("a")) for number in range(count)]


def build(folder: Path, stage: str, records: list[dict], seed: int = 0, **flags):
    needs_train = flags.pop("needs_train", True)
    path = str(write_jsonl(folder / "train.jsonl", records))
    data = DataArguments(**{"train_file": path} | flags)
    return build_stage_data(data, stage, TOKENIZER, seed, needs_train=needs_train)


def all_rows(rows) -> list[dict]:
    return [rows[row] for row in range(len(rows))]


def write_registry(folder: Path, entries: dict[str, tuple[dict, list[dict]]]) -> str:
    """Writes a registry; `entries` has the block and the rows of each data set."""
    folder.mkdir(exist_ok=True)
    blocks = {}
    for name, (block, rows) in entries.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
        blocks[name] = {"file_name": f"{name}.jsonl"} | block
    (folder / "dataset_info.json").write_text(json.dumps(blocks, ensure_ascii=False), encoding="utf-8")
    return str(folder)


def alpaca(name: str, count: int) -> tuple[dict, list[dict]]:
    return {}, [{"instruction": f"{name}{number}", "output": "a"} for number in range(count)]


# sft: what it was


def test_sft_rows_are_those_of_build_dataset(tmp_path):
    records = [conversation(message("system", "s"), user("u"), assistant("a"), user("v" * 50), assistant("b"))]
    path = write_jsonl(tmp_path / "train.jsonl", records)
    lengths = {"max_seq_length": 30, "max_source_length": 9, "max_target_length": 9}
    built = build_stage_data(DataArguments(train_file=str(path), **lengths), "sft", TOKENIZER, 0)
    expected = build_dataset("multi-turn", path, TOKENIZER, **lengths)
    assert all_rows(built.train) == all_rows(expected) and built.validation is None
    assert built.train.report == expected.report
    assert built.train.where(0) == f"{path} line 1"


def test_sft_files_of_both_formats_and_a_validation_file(tmp_path):
    validation = write_jsonl(tmp_path / "validation.jsonl", [{"prompt": "p", "response": "r"}] * 2)
    built = build(
        tmp_path, "sft", [{"prompt": "问", "response": "答"}], train_format="input-output",
        validation_file=str(validation),
    )  # fmt: skip
    assert read_ids(built.train[0]["input_ids"]) == "<1><2>问答<6>" and read_targets(built.train[0]) == "答<6>"
    assert len(built.validation) == 2 and read_targets(built.validation[1]) == "r<6>"
    assert "train.jsonl " in built.table and "validation.jsonl (eval)" in built.table


@pytest.mark.parametrize(
    ("template", "expected"), [("default", "<1><2>Human: u\nAssistant: a<6>"), ("raw", "<1><2>ua<6>")]
)
def test_sft_rows_in_other_templates(tmp_path, template, expected):
    built = build(tmp_path, "sft", [conversation(user("u"), assistant("a"))], template=template)
    assert read_ids(built.train[0]["input_ids"]) == expected


# rm, dpo: pairs


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_pairs_share_the_prompt_and_end_with_their_stop_token(tmp_path, stage):
    record = pair([message("system", "s"), user("u"), assistant("a"), user("v")], "好", "坏坏")
    rows = build(tmp_path, stage, [record]).train
    item = rows[0]
    assert list(item) == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert read_ids(item["prompt_ids"]) == "<1><2><3>\ns<4>\nu<5>\na<4>\nv<5>"
    assert item["prompt_ids"][-1] == ASSISTANT
    assert read_ids(item["chosen_ids"]) == "\n好<6>" and read_ids(item["rejected_ids"]) == "\n坏坏<6>"
    # Prompt and reply are the row that sft would have of the same conversation.
    whole = render_conversation(TOKENIZER, conversation(*record["conversations"], record["chosen"]))
    assert item["prompt_ids"] + item["chosen_ids"] == whole.input_ids
    assert rows.lengths == [len(item["prompt_ids"]) + 4], "of the longer reply"
    assert (rows.report.tokens_total, rows.report.tokens_supervised) == (len(item["prompt_ids"]) + 7, 7)


def test_a_call_as_a_reply_ends_with_the_observation_token(tmp_path):
    record = {"conversations": [user("u")], "chosen": CALL, "rejected": assistant("no")}
    record["tools"] = [{"name": "f"}]
    item = build(tmp_path, "dpo", [record]).train[0]
    assert read_ids(item["chosen_ids"]) == "f\n```python\ntool_call(a=1)\n```<7>"
    assert item["chosen_ids"][-1] == OBSERVATION and item["rejected_ids"][-1] == TOKENIZER.eos_token_id
    assert '"name": "f"' in read_ids(item["prompt_ids"])


@pytest.mark.parametrize(
    ("template", "prompt", "chosen"),
    [("default", "<1><2>Human: u\nAssistant: ", "好<6>"), ("raw", "<1><2>u", "好<6>")],
)
def test_pairs_in_other_templates(tmp_path, template, prompt, chosen):
    item = build(tmp_path, "dpo", [pair([user("u")], "好", "坏")], template=template).train[0]
    assert (read_ids(item["prompt_ids"]), read_ids(item["chosen_ids"])) == (prompt, chosen)


def test_long_pairs_lose_the_oldest_turns_of_the_prompt(tmp_path):
    rounds = [each for number in range(4) for each in (user(f"u{number}"), assistant(f"a{number}"))]
    records = [
        pair([message("system", "s"), *rounds, user("?")], "c" * 5, "r" * 9),
        pair([user("?")], "c", "r" * 60),
        pair([user("?")], "c", "r"),
    ]
    built = build(tmp_path, "dpo", records, max_seq_length=40)
    assert [built.train.where(row)[-6:] for row in range(2)] == ["line 1", "line 3"]
    item = built.train[0]
    assert read_ids(item["prompt_ids"]) == "<1><2><3>\ns<4>\nu2<5>\na2<4>\nu3<5>\na3<4>\n?<5>"
    assert read_ids(item["chosen_ids"]) == "\nccccc<6>" and read_ids(item["rejected_ids"]) == "\nrrrrrrrrr<6>"
    assert len(item["prompt_ids"]) + len(item["rejected_ids"]) <= 40
    report = built.train.report
    assert (report.rows_read, report.rows_kept, report.rows_dropped_long) == (3, 2, 1)
    assert (report.rows_cut, report.rows_cut_inside, report.turns_dropped) == (1, 0, 4)
    with pytest.raises(UserError, match=r"no row of .* is left: 1 records were read, and in none of them do"):
        build(tmp_path, "rm", [records[1]], max_seq_length=40)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=7),
    st.integers(8, 70),
    st.sampled_from(["chatglm3", "default", "raw"]),
)
def test_pairs_keep_as_much_as_fits(lengths, limit, template):
    messages = [user("u" * lengths[0])]
    for length in lengths[1:]:
        messages += [assistant("a"), user("u" * length)]
    records = [pair(messages, "c", "rr")]
    row = RowSettings("multi-turn", limit, 9, 9, "turns", "dpo", template).render(TOKENIZER, records[0])
    whole = RowSettings("multi-turn", 999, 9, 9, "turns", "dpo", template).render(TOKENIZER, records[0])
    total = len(row.parts[0]) + len(row.parts[2])
    assert row.parts[1:] == whole.parts[1:], "replies are never cut"
    assert (row.problem is None) == (total <= limit)
    if row.problem:
        assert row.turns_kept == 1, "only the newest question was left, and it does not fit"
    if row.turns_dropped:
        shorter = RowSettings("multi-turn", total, 9, 9, "turns", "dpo", template)
        assert shorter.render(TOKENIZER, records[0]).parts == row.parts, "no turn that fits is left out"
        assert len(whole.parts[0]) + len(whole.parts[2]) > limit


# ppo: prompts


@pytest.mark.parametrize(
    ("messages", "prompt", "reference"),
    [
        ([user("u"), assistant("a"), user("v"), assistant("b")], "<1><2><4>\nu<5>\na<4>\nv<5>", "\nb<6>"),
        ([user("u")], "<1><2><4>\nu<5>", ""),
        ([user("u"), assistant("a"), user("v")], "<1><2><4>\nu<5>\na<4>\nv<5>", ""),
        ([user("u"), CALL | {"observation": "o"}], "<1><2><4>\nu<5>", "f\n```python\ntool_call(a=1)\n```<7>"),
        (
            [user("u"), CALL | {"observation": "o"}, assistant("b")],
            "<1><2><4>\nu<5>f\n```python\ntool_call(a=1)\n```<7>\no<5>",
            "\nb<6>",
        ),
    ],
)
def test_ppo_prompts_end_before_the_last_reply(tmp_path, messages, prompt, reference):
    rows = build(tmp_path, "ppo", [conversation(*messages)]).train
    assert read_ids(rows[0]["input_ids"]) == prompt and read_ids(rows[0]["labels"]) == reference
    assert rows.lengths == [len(rows[0]["input_ids"])]
    assert rows.report.tokens_supervised == 0


def test_long_ppo_prompts_lose_their_oldest_turns(tmp_path):
    messages = [user("u" * 20), assistant("a"), user("v"), assistant("b" * 99)]
    built = build(tmp_path, "ppo", [conversation(*messages), conversation(user("x" * 30))], max_seq_length=20)
    assert [read_ids(row["input_ids"]) for row in all_rows(built.train)] == ["<1><2><4>\nv<5>"]
    assert len(built.train[0]["labels"]) == 101, "the reference is not part of the limit"
    assert (built.train.report.rows_dropped_long, built.train.report.turns_dropped) == (1, 2)


# pt: blocks


def test_blocks_hold_every_token_of_every_document_in_order(tmp_path):
    rows = build(tmp_path, "pt", [{"text": text} for text in TEXTS], max_seq_length=6).train
    assert [read_ids(item["input_ids"]) for item in all_rows(rows)] == [
        "<1><2>皮卡丘<6>", "<1><2>妙蛙种子", "<1><2>。<6>小火", "<1><2>龙<6>",
    ]  # fmt: skip
    assert [read_targets(item) for item in all_rows(rows)] == ["皮卡丘<6>", "妙蛙种子", "。<6>小火", "龙<6>"]
    assert rows.lengths == [6, 6, 6, 4]
    path = tmp_path / "train.jsonl"
    assert rows.where(0) == f"{path} line 1"
    assert rows.where(2) == f"{path} line 2 to {path} line 3"
    assert [rows.document_starts(block) for block in range(4)] == [[2], [2], [4], []]
    assert (rows.report.rows_read, rows.report.rows_kept) == (3, 4)
    assert (rows.report.tokens_total, rows.report.tokens_supervised) == (22, 14)
    assert rows[-1] == rows[3]
    with pytest.raises(IndexError, match="block 4 does not exist; there are 4"):
        rows[4]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(3, 30), st.data())
def test_packing_loses_nothing_and_repeats_nothing(lengths, limit, data):
    class Documents:
        def __init__(self):
            self.lengths = [length + 1 for length in lengths]

        def ids(self, document: int) -> np.ndarray:
            start = 1000 * (document + 1)
            return np.arange(start, start + self.lengths[document], dtype=np.int32)

    documents = Documents()
    rows = PackedDataset(documents, TOKENIZER, limit)
    items = all_rows(rows)
    assert all(item["input_ids"][:2] == [1, 2] and item["labels"][:2] == [-100, -100] for item in items)
    assert all(item["labels"][2:] == item["input_ids"][2:] for item in items)
    tokens = [token for item in items for token in item["input_ids"][2:]]
    assert tokens == [token for number in range(len(lengths)) for token in documents.ids(number).tolist()]
    assert [len(item["input_ids"]) for item in items] == rows.lengths
    assert all(length == limit for length in rows.lengths[:-1]) and 2 < rows.lengths[-1] <= limit
    block = data.draw(st.integers(0, len(rows) - 1))
    starts = [place for place, token in enumerate(items[block]["input_ids"]) if token >= 1000 and token % 1000 == 0]
    assert rows.document_starts(block) == starts


def test_a_document_ends_with_the_real_eos_whatever_its_text_says(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "</s>皮卡丘<|endoftext|>"}])
    item = build_stage_data(DataArguments(train_file=str(path)), "pt", tokenizer, 0).train[0]
    assert item["input_ids"][-1] == item["labels"][-1] == tokenizer.eos_token_id
    assert item["input_ids"].count(tokenizer.eos_token_id) == 1
    assert item["input_ids"][:2] == tokenizer.get_prefix_tokens()
    assert item["input_ids"][2:-1] == tokenizer.encode_text("</s>皮卡丘<|endoftext|>")


def test_a_block_needs_room_for_a_token(tmp_path):
    with pytest.raises(ValueError, match="--max_seq_length is 2; a block of text needs at least 3"):
        build(tmp_path, "pt", [{"text": "x"}], max_seq_length=2)


# Storage and processes


@pytest.mark.parametrize("stage", STAGES)
def test_several_processes_build_the_same_rows(tmp_path, stage, monkeypatch):
    records = records_of(stage, 300)
    alone = build(tmp_path, stage, records, max_seq_length=20).train
    monkeypatch.setattr(tokenizing, "BATCH_ROWS", 30)
    monkeypatch.setattr(tokenizing, "IN_PROCESS_ROWS", 70)
    monkeypatch.setattr(tokenizing, "START_METHOD", "fork")
    together = build(tmp_path, stage, records, max_seq_length=20, preprocessing_num_workers=2).train
    assert all_rows(together) == all_rows(alone) and len(alone) >= 60
    assert together.report == alone.report and together.lengths == alone.lengths


@pytest.mark.parametrize("stage", ["pt", "dpo", "ppo"])
def test_rows_are_kept_in_five_bytes_a_token(tmp_path, stage):
    record = {
        "pt": {"text": "字" * 200},
        "dpo": pair([user("字" * 100)], "好" * 50, "坏" * 50),
        "ppo": conversation(user("字" * 100), assistant("好" * 100)),
    }[stage]
    path = str(write_jsonl(tmp_path / "x.jsonl", [record] * 2000))
    rows = build_stage_data(DataArguments(train_file=path), stage, TOKENIZER, 0).train
    rows = rows.documents if stage == "pt" else rows
    tokens = rows.report.tokens_total
    assert tokens >= 2000 * 200 and rows._table.data.nbytes < 5 * tokens


# Mixing


def split_into(sizes: list[int]) -> list[np.ndarray]:
    """The rows of data sets of these sizes, joined."""
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("probabilities", [None, [0.7, 0.2, 0.1], [0.2, 0.3, 0.5]])
@pytest.mark.parametrize(
    ("strategy", "stopping"), [("interleave_under", "first_exhausted"), ("interleave_over", "all_exhausted")]
)
@pytest.mark.parametrize("sizes", [[3, 4, 5], [1, 1, 1], [2500, 40, 900]])
@pytest.mark.parametrize("seed", [0, 42])
def test_the_order_is_that_of_the_datasets_library(sizes, strategy, stopping, probabilities, seed):
    datasets = pytest.importorskip("datasets")
    parts = [
        datasets.Dataset.from_dict({"source": [number] * size, "row": list(range(size))})
        for number, size in enumerate(sizes)
    ]
    mixed = datasets.interleave_datasets(parts, probabilities=probabilities, seed=seed, stopping_strategy=stopping)
    order = mix_order(split_into(sizes), strategy, probabilities, seed)
    starts = np.cumsum([0, *sizes])[mixed["source"][:]]
    assert order.tolist() == (starts + mixed["row"][:]).tolist()


def test_concat_puts_data_sets_one_after_the_other():
    assert mix_order([np.array([0, 1]), np.array([3, 4, 5])], "concat").tolist() == [0, 1, 3, 4, 5]


def test_data_sets_of_the_registry_are_mixed(tmp_path):
    folder = write_registry(tmp_path / "r", {"甲": alpaca("甲", 3), "乙": alpaca("乙", 5)})
    flags = {"dataset": "甲,乙", "dataset_dir": folder}

    def questions(**more) -> list[str]:
        rows = build_stage_data(DataArguments(**flags | more), "sft", TOKENIZER, 7).train
        return [read_ids(row["input_ids"])[10:12] for row in all_rows(rows)]

    assert questions() == ["甲0", "甲1", "甲2", "乙0", "乙1", "乙2", "乙3", "乙4"]
    assert questions(dataset="乙,甲")[0] == "乙0"
    assert questions(mix_strategy="interleave_under") == ["甲0", "乙0", "甲1", "乙1", "甲2", "乙2"]
    over = questions(mix_strategy="interleave_over")
    assert over == ["甲0", "乙0", "甲1", "乙1", "甲2", "乙2", "甲0", "乙3", "甲1", "乙4"]
    drawn = questions(mix_strategy="interleave_over", interleave_probs="0.5,0.5")
    expected = mix_order(split_into([3, 5]), "interleave_over", [0.5, 0.5], 7)
    assert drawn == [questions()[row] for row in expected]


def test_a_mixture_knows_lengths_places_and_counts(tmp_path):
    folder = write_registry(tmp_path / "r", {"甲": alpaca("甲", 2), "乙": alpaca("乙" * 5, 2)})
    data = DataArguments(dataset="甲,乙", dataset_dir=folder, mix_strategy="interleave_under")
    built = build_stage_data(data, "sft", TOKENIZER, 0)
    rows = built.train
    assert not rows.is_whole and rows.lengths == [len(row["input_ids"]) for row in all_rows(rows)]
    assert [Path(rows.where(row)).name for row in range(4)] == [
        "甲.jsonl line 1", "乙.jsonl line 1", "甲.jsonl line 2", "乙.jsonl line 2",
    ]  # fmt: skip
    assert rows[-1] == rows[3]
    with pytest.raises(IndexError):
        rows[4]
    report = rows.report
    assert (report.rows_read, report.rows_kept, report.tokens_total) == (4, 4, sum(rows.lengths))
    assert report.tokens_supervised == sum(len(read_targets(row)) > 0 for row in all_rows(rows)) * 3


@pytest.mark.parametrize(
    ("text", "strategy", "expected"),
    [
        ("0.5", "interleave_under", "has 1 numbers and there are 2 data sets; give one for each"),
        ("0.5,half", "interleave_under", "'0.5,half' is not a list of numbers; write it like 0.7,0.3"),
        ("1.5,-0.5", "interleave_over", "every number must be above 0; leave out a data set of share 0"),
        ("1,0", "interleave_over", "every number must be above 0"),
        ("nan,1", "interleave_over", "every number must be above 0"),
        ("0.5,0.3", "interleave_over", r"add up to 0\.8 instead of 1; such as 0\.625,0\.375"),
        ("0.5,0.5", "concat", "is for --mix_strategy interleave_under or interleave_over; add one of them, or drop"),
    ],
)
def test_probabilities_that_make_no_sense(text, strategy, expected):
    with pytest.raises(ValueError, match=f"--interleave_probs .*{expected}"):
        parse_probabilities(text, 2, strategy)


def test_probabilities_are_numbers_that_add_up_to_one():
    assert parse_probabilities("0.7, 0.3", 2, "interleave_over") == [0.7, 0.3]
    assert sum(parse_probabilities("0.3333333,0.6666666", 2, "interleave_over")) == 1
    assert parse_probabilities(None, 2, "concat") is None


# Held-out rows, and the first so many


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("val_size", "expected"), [(0.25, 5), (3, 3), (0.01, 1)])
def test_held_out_rows_and_the_rest_are_all_rows(tmp_path, stage, val_size, expected):
    # One document fills one block here.
    limit = {"max_seq_length": 5} if stage == "pt" else {}
    records = [{"text": f"{number:02}"} for number in range(20)] if stage == "pt" else records_of(stage, 20)
    built = build(tmp_path, stage, records, val_size=val_size, **limit)
    everything = all_rows(build(tmp_path, stage, records, **limit).train)
    train, validation = all_rows(built.train), all_rows(built.validation)
    assert len(validation) == expected and len(train) + len(validation) == 20
    assert sorted(map(json.dumps, train + validation)) == sorted(map(json.dumps, everything))
    assert train == [row for row in everything if row in train], "the rest keeps its order"
    assert validation != everything[:expected] and validation != everything[-expected:], "drawn, not cut off"
    again = build(tmp_path, stage, records, val_size=val_size, **limit)
    assert all_rows(again.validation) == validation
    other = build(tmp_path, stage, records, val_size=val_size, seed=1, **limit)
    assert all_rows(other.validation) != validation


def test_documents_are_held_out_and_not_blocks(tmp_path):
    records = [{"text": chr(ord("a") + number) * 7} for number in range(10)]
    built = build(tmp_path, "pt", records, val_size=0.3, max_seq_length=6)
    letters = [
        {chr(token - 100) for item in all_rows(rows) for token in item["input_ids"] if token > 100}
        for rows in (built.train, built.validation)
    ]
    assert len(letters[0]) == 7 and len(letters[1]) == 3 and not letters[0] & letters[1]
    assert built.validation.lengths == [6] * 6


@pytest.mark.parametrize("strategy", ["concat", "interleave_under", "interleave_over"])
def test_no_row_is_on_both_sides(tmp_path, strategy):
    folder = write_registry(tmp_path / "r", {"one": alpaca("one", 30), "two": alpaca("two", 7)})
    data = DataArguments(dataset="one,two", dataset_dir=folder, val_size=0.2, mix_strategy=strategy)
    built = build_stage_data(data, "sft", TOKENIZER, 0)
    train, validation = ({json.dumps(row) for row in all_rows(rows)} for rows in (built.train, built.validation))
    assert len(validation) == 7 and not train & validation
    if strategy != "interleave_under":
        assert len(train) == 30
    assert "--val_size 0.2" in built.table


@pytest.mark.parametrize(
    ("val_size", "expected"),
    [
        (4, r"--val_size 4 would hold out 4 of 4 rows and leave nothing to train on; make it smaller"),
        (0.99, r"--val_size 0.99 would hold out 4 of 4 rows"),
        (1.5, r"--val_size 1\.5 is neither a share below 1 nor a whole number of rows"),
    ],
)
def test_held_out_parts_that_cannot_be(tmp_path, val_size, expected):
    with pytest.raises(ValueError, match=expected):
        build(tmp_path, "sft", records_of("sft", 4), val_size=val_size)


def test_a_data_set_without_a_row_left_cannot_be_interleaved(tmp_path):
    folder = write_registry(tmp_path / "r", {"one": alpaca("one", 12), "two": alpaca("two", 1)})
    flags = {"dataset": "one,two", "dataset_dir": folder, "val_size": 12}
    for seed in range(200):
        if draw_held_out(12, 13, seed)[-1]:
            break
    with pytest.raises(ValueError, match=r"--val_size holds out every row of .*two\.jsonl, and --mix_strategy interl"):
        build_stage_data(DataArguments(**flags, mix_strategy="interleave_over"), "sft", TOKENIZER, seed)
    assert len(build_stage_data(DataArguments(**flags), "sft", TOKENIZER, seed).train) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_max_samples_takes_the_first_of_each_data_set_and_reads_no_further(tmp_path, stage):
    path = tmp_path / "train.jsonl"
    lines = [json.dumps(record) for record in records_of(stage, 5)]
    path.write_text("\n".join([lines[0], "{}", *lines[1:], "broken"]), encoding="utf-8")
    data = DataArguments(train_file=str(path), max_samples=3, on_bad_record="skip")
    built = build_stage_data(data, stage, TOKENIZER, 0)
    expected = build(tmp_path, stage, records_of(stage, 3)).train
    assert all_rows(built.train) == all_rows(expected)
    assert (built.train.report.rows_read, built.train.report.rows_bad) == (3, 1)


# The table


def test_the_table_counts_what_became_of_every_record(tmp_path):
    folder = write_registry(
        tmp_path / "r",
        {
            "宝可梦问答": (
                {},
                [*alpaca("x", 3)[1], {"instruction": "q", "output": 7}, {"instruction": "y" * 60, "output": "a"}],
            ),
            "b": alpaca("b", 2),
        },
    )
    data = DataArguments(dataset="宝可梦问答,b", dataset_dir=folder, on_bad_record="skip", max_seq_length=40)
    built = build_stage_data(data, "sft", TOKENIZER, 0)
    # Two tokens that start it, two roles, a line break each, a question of two, a reply of one, eos; three are targets.
    assert built.table.splitlines() == [
        "data set    read  bad  no target  too long  kept  cut  tokens  supervised  train",
        "----------  ----  ---  ---------  --------  ----  ---  ------  ----------  -----",
        "宝可梦问答     5    1          0         1     3    0      30       30.0%      3",
        "b              2    0          0         0     2    0      20       30.0%      2",
        f"bad: {folder}/宝可梦问答.jsonl line 4: 'output' must be a text, got 7",
        "train:      5 rows, 50 tokens, concat",
    ]


def test_the_table_lines_up_and_is_no_wider_than_a_terminal():
    counts = {"rows_read": 12_345_678, "rows_bad": 1_234, "rows_kept": 12_345_000, "rows_dropped_masked": 678_000}
    report = DatasetReport("x", **counts, rows_cut=99_999, tokens_total=9_876_543_210, tokens_supervised=9_876_543)
    names = ["短", "a", "数据" * 40, "x" * 90, "e\u0301t\u00e9", "全角ＡＢ"]
    lines = format_data_table([(name, report, 12_345_000) for name in names]).splitlines()
    assert len({wcswidth(line) for line in lines}) == 1
    assert wcswidth(lines[0]) <= WIDEST == 100
    assert "9,877M" in lines[2] and lines[4].startswith("…") and "数据" in lines[4] and lines[5].startswith("…x")


def test_the_table_says_how_many_rows_of_each_data_set_are_trained_on(tmp_path):
    folder = write_registry(tmp_path / "r", {"one": alpaca("one", 6), "two": alpaca("two", 2)})
    validation = str(write_jsonl(tmp_path / "v.jsonl", records_of("sft", 3)))

    def last_column(stage: str = "sft", **flags) -> list[str]:
        data = DataArguments(dataset="one,two", dataset_dir=folder, **flags)
        table = build_stage_data(data, stage, TOKENIZER, 0).table.splitlines()
        return [line.split()[-1] for line in table if line.startswith(("one", "two", "v."))]

    assert last_column(validation_file=validation) == ["6", "2", "-"]
    assert last_column(mix_strategy="interleave_over") == ["6", "6"]
    assert last_column("pt", mix_strategy="interleave_under") == ["2", "2"]
    held_out = last_column(val_size=3)
    assert sum(map(int, held_out)) == 5


def test_stages_without_targets_show_no_share(tmp_path):
    table = build(tmp_path, "ppo", records_of("ppo", 2)).table
    assert table.splitlines()[2].split() == ["train.jsonl", "2", "0", "0", "0", "2", "0", "18", "-", "2"]


# Which data


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "there is nothing to read: give --train_file FILE, or --dataset with names of the registry"),
        ({"train_file": "x", "dataset": "y"}, "--train_file and --dataset exclude each other; give one"),
        (
            {"train_file": "x", "validation_file": "y", "eval_dataset": "z"},
            "--validation_file and --eval_dataset exclude each other",
        ),
        (
            {"train_file": "x", "validation_file": "y", "val_size": 0.1},
            "--val_size holds rows of the training data out, and validation data is given as well; drop one of them",
        ),
        ({"dataset": "x", "train_format": "input-output"}, "--train_format input-output is for --train_file with"),
    ],
)
def test_flags_that_contradict_each_other(flags, expected):
    with pytest.raises(ValueError, match=expected):
        build_stage_data(DataArguments(**flags), "sft", TOKENIZER, 0)


def test_unknown_names_and_stages(tmp_path):
    folder = write_registry(tmp_path / "r", {"pokemon": alpaca("x", 2)})
    with pytest.raises(UserError, match="data set 'pokemn' is unknown; did you mean 'pokemon'"):
        build_stage_data(DataArguments(dataset="pokemn", dataset_dir=folder), "sft", TOKENIZER, 0)
    with pytest.raises(UserError, match="serves the stages pt, sft, ppo and not rm or dpo: ranking is false"):
        build_stage_data(DataArguments(dataset="pokemon", dataset_dir=folder), "dpo", TOKENIZER, 0)
    with pytest.raises(ValueError, match="stage 'kto' is unknown; use pt, sft, ppo, rm, dpo"):
        build_stage_data(DataArguments(dataset="pokemon", dataset_dir=folder), "kto", TOKENIZER, 0)
    with pytest.raises(ValueError, match="--train_format input-output is for --train_file with --stage sft"):
        build_stage_data(DataArguments(train_file="x", train_format="input-output"), "pt", TOKENIZER, 0)


def test_an_empty_data_set_is_named(tmp_path):
    folder = write_registry(tmp_path / "r", {"full": alpaca("x", 2), "empty": ({}, [])})
    with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
        build_stage_data(DataArguments(dataset="full,empty", dataset_dir=folder), "sft", TOKENIZER, 0)


def test_files_of_the_other_stages_hold_canonical_records(tmp_path):
    with pytest.raises(UserError, match=r"line 1: key 'chosen' is missing|line 1: key 'conversations' is missing"):
        build(tmp_path, "dpo", [{"text": "x"}])
    with pytest.raises(UserError, match="line 1: key 'text' is missing; found 'conversations'"):
        build(tmp_path, "pt", records_of("sft", 1))


def test_without_training_only_validation_rows_are_built(tmp_path, monkeypatch):
    records = records_of("sft", 8)
    validation = str(write_jsonl(tmp_path / "v.jsonl", records[:2]))
    opened = []
    monkeypatch.setattr(
        stage_data_module,
        "build_rows",
        lambda *args, **kwargs: opened.append(args[0].path) or build_rows(*args, **kwargs),
    )
    built = build(tmp_path, "sft", records, validation_file=validation, needs_train=False)
    assert built.train is None and len(built.validation) == 2 and [path.name for path in opened] == ["v.jsonl"]
    assert "train:" not in built.table
    held_out = build(tmp_path, "sft", records, val_size=3, needs_train=False)
    assert held_out.train is None and len(held_out.validation) == 3
    assert all_rows(held_out.validation) == all_rows(build(tmp_path, "sft", records, val_size=3).validation)
    assert len(build(tmp_path, "sft", records, needs_train=False).validation) == 8, "--train_file alone is asked"
    only = build_stage_data(DataArguments(validation_file=validation), "sft", TOKENIZER, 0, needs_train=False)
    assert len(only.validation) == 2
    with pytest.raises(ValueError, match="there is nothing to read"):
        build_stage_data(DataArguments(validation_file=validation), "sft", TOKENIZER, 0)


# Every format of the registry, to its stage


TOOL_TAGS = {"formatting": "sharegpt", "columns": {"tools": "tools"}}


def test_a_tool_call_of_the_registry_stops_at_the_observation_token(tmp_path, tokenizer):
    tools = [{"name": "get_weather", "description": "d", "parameters": {"type": "object", "properties": {}}}]
    turns = [
        {"from": "human", "value": "天气？"},
        {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": {"city": "北京"}})},
        {"from": "observation", "value": "晴"},
        {"from": "gpt", "value": "北京晴。"},
    ]
    rows = [{"conversations": turns, "tools": json.dumps(tools)}]
    folder = write_registry(tmp_path / "r", {"calls": (TOOL_TAGS, rows)})
    data = DataArguments(dataset="calls", dataset_dir=folder)
    item = build_stage_data(data, "sft", tokenizer, 0).train[0]
    stop = tokenizer.get_command("<|observation|>")
    call = tokenizer.encode_text("get_weather\n") + tokenizer.encode_text("```python\ntool_call(city='北京')\n```")
    targets = [label for label in item["labels"] if label != -100]
    assert targets[: len(call) + 1] == [*call, stop]
    assert targets[-1] == tokenizer.eos_token_id and targets.count(stop) == 1
    item = build_stage_data(data, "ppo", tokenizer, 0).train[0]
    assert item["labels"][-1] == tokenizer.eos_token_id and stop in item["input_ids"]


def test_formats_of_the_registry_reach_their_stages(tmp_path):
    folder = write_registry(
        tmp_path / "r",
        {
            "history": (
                {"columns": {"history": "history", "system": "system"}},
                [{"instruction": "v", "input": "w", "output": "b", "system": "s", "history": [["u", "a"]]}],
            ),
            "ranked": ({"ranking": True}, [{"instruction": "u", "output": ["好", "坏"]}]),
            "text": ({"columns": {"prompt": "content"}}, [{"content": "文"}]),
        },
    )

    def first(name: str, stage: str) -> dict:
        return build_stage_data(DataArguments(dataset=name, dataset_dir=folder), stage, TOKENIZER, 0).train[0]

    assert read_ids(first("history", "sft")["input_ids"]) == "<1><2><3>\ns<4>\nu<5>\na<4>\nv\nw<5>\nb<6>"
    assert read_targets(first("history", "sft")) == "\na<4>\nb<6>", "every turn of the history is trained"
    assert {name: read_ids(ids) for name, ids in first("ranked", "rm").items()} == {
        "prompt_ids": "<1><2><4>\nu<5>", "chosen_ids": "\n好<6>", "rejected_ids": "\n坏<6>",
    }  # fmt: skip
    assert read_ids(first("text", "pt")["input_ids"]) == "<1><2>文<6>"


def test_documents_need_no_mask_of_their_own(tmp_path):
    rows = build(tmp_path, "pt", [{"text": "x"}]).train
    assert isinstance(rows.documents, Rows)
    assert build_rows(
        read_records(tmp_path / "train.jsonl", "text"), TOKENIZER, RowSettings("multi-turn", 9, 9, 9, "turns", "pt")
    )[0] == {"input_ids": [220, 6], "labels": [220, 6]}
