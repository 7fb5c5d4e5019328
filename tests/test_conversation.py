"""The conversation room: reading and validating records, rendering, truncating, datasets, collating."""

import argparse
import json
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from conversation_helpers import ASSISTANT, OBSERVATION, TOKENIZER, USER, conversation, message, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.flags import add_fields
from finetune_chatmodel_demo.conversation import (
    PadCollator,
    RecordError,
    Rendering,
    build_dataset,
    json_rows,
    read_records,
    render_conversation,
    render_input_output,
    render_prompt,
    text_files,
    tokenizing,
    truncate,
    validate_conversation,
    validate_input_output,
)
from finetune_chatmodel_demo.conversation.data_arguments import DataArguments, read_data_arguments

ROLES = ("system", "user", "assistant", "observation")


PIKACHU = conversation(message("user", "皮卡丘？"), message("assistant", "电属性。"))
BULBASAUR = conversation(message("user", "妙蛙种子？"), message("assistant", "草，毒。"))
SETTINGS = {"max_seq_length": 2048, "max_source_length": 1024, "max_target_length": 128}


# Reading


@pytest.mark.parametrize("extension", ["json", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "utf-16"])
@pytest.mark.parametrize("form", ["array", "pretty array", "lines", "blank lines", "pretty objects", "windows lines"])
def test_reads_every_form_encoding_and_extension(tmp_path, form, encoding, extension):
    records = [PIKACHU, BULBASAUR]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    text = {
        "array": json.dumps(records, ensure_ascii=False),
        "pretty array": "\n" + json.dumps(records, ensure_ascii=False, indent=4) + "\n",
        "lines": "\n".join(lines),
        "blank lines": "\n\n" + "\n  \n\n".join(lines) + "\n\n",
        "pretty objects": "\n".join(json.dumps(record, ensure_ascii=False, indent=2) for record in records),
        "windows lines": "\r\n".join(lines) + "\r\n",
    }[form]
    path = tmp_path / f"data.{extension}"
    path.write_bytes(text.encode(encoding))
    assert list(read_records(path)) == records


json_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | json_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_text, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.dictionaries(json_text, json_values, max_size=3), max_size=5),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    block=st.integers(1, 40),
    is_array=st.booleans(),
)
def test_reading_agrees_with_the_json_module(tmp_path_factory, values, indent, ascii_only, block, is_array):
    path = tmp_path_factory.mktemp("json") / "data.json"
    if is_array:
        text = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
    else:
        text = "\n".join(json.dumps(value, ensure_ascii=ascii_only, indent=indent) for value in values)
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "BLOCK_CHARACTERS", block)
        located = list(json_rows.JSONRows(path).rows())
    assert [item.value for item in located] == values
    assert [item.number for item in located] == list(range(1, len(values) + 1))
    lines = text.split("\n")
    assert all(lines[item.line - 1].lstrip("[ ").startswith("{") for item in located)


@pytest.mark.parametrize("is_array", [True, False])
def test_reading_is_lazy(tmp_path, is_array, monkeypatch):
    monkeypatch.setattr(json_rows, "BLOCK_CHARACTERS", 1 << 15)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1 << 15)
    path = tmp_path / "data.json"
    lines = [json.dumps(PIKACHU | {"number": number}) for number in range(10_000)]
    path.write_text("[" + ",\n".join(lines) + "]" if is_array else "\n".join(lines), encoding="utf-8")
    size = path.stat().st_size
    del lines
    tracemalloc.start()
    count = sum(1 for _ in read_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000
    assert size > 1_500_000 and peak < 300_000


def test_a_pass_can_be_repeated(tmp_path):
    records = read_records(write_jsonl(tmp_path / "x.jsonl", [PIKACHU, {}, BULBASAUR]), on_bad_record="skip")
    for _ in range(2):
        assert list(records) == [PIKACHU, BULBASAUR]
        assert records.bad_count == 1


# What is wrong, and where


def reading_error(tmp_path: Path, text: str | bytes, **options) -> str:
    path = tmp_path / "train.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    with pytest.raises(UserError) as caught:
        list(read_records(path, **options))
    told = str(caught.value).replace(str(path), "train.jsonl")
    return told.removesuffix(" (--on_bad_record skip goes on without such records)")


GOOD = json.dumps(PIKACHU, ensure_ascii=False)


def test_errors_of_json_lines_name_the_line(tmp_path):
    text = f"{GOOD}\n\n{GOOD[:-1]}\n{GOOD}\n"
    assert reading_error(tmp_path, text) == (
        "train.jsonl line 3: not valid JSON: a record begins here and does not end"
    )
    assert reading_error(tmp_path, f"{GOOD}\n{{'role': 1}}\n").startswith(
        "train.jsonl line 2: not valid JSON: Expecting property name enclosed in double quotes at character 2, near"
    )
    assert reading_error(tmp_path, f"{GOOD},\n{GOOD}").endswith(
        "write no comma between the lines, or put all records into one array"
    )
    assert reading_error(tmp_path, GOOD + "\n" + GOOD[:30]).startswith("train.jsonl line 2: not valid JSON")


def test_errors_of_arrays_name_line_and_record(tmp_path):
    message_text = reading_error(tmp_path, f"[{GOOD},\n\n{{'a': 1}},\n{GOOD}]")
    assert message_text.startswith("train.jsonl line 3: expected valid JSON (Expecting property name")
    assert "in record 2, got" in message_text and message_text.endswith("repair the file there")
    assert "line 2: expected ',' or ']' after record 1, got '{" in reading_error(tmp_path, f"[{GOOD}\n{GOOD}]")
    assert "expected ',' or ']' after record 1, got the end of the file" in reading_error(tmp_path, f"[{GOOD}\n")
    assert "expected the end of the file after the array's ']', got '[]'" in reading_error(tmp_path, f"[{GOOD}][]")
    assert reading_error(tmp_path, f"[{GOOD},\n 7]") == (
        'train.jsonl record 2 (line 2): expected an object {"conversations": [{"role": ..., "content": ...}, ...]}, '
        "got a number 7"
    )


@pytest.mark.parametrize("text", ["", "\n \n", "[]", "\ufeff"])
def test_an_empty_file_is_an_error(tmp_path, text):
    assert "train.jsonl is empty; expected" in reading_error(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no_such\.jsonl does not exist"):
        read_records(tmp_path / "no_such.jsonl")


def test_damaged_utf8_is_not_taken_for_gbk(tmp_path):
    data = f"{GOOD}\n{GOOD}\n".encode()
    broken = data[: len(data) - 10] + data[len(data) - 9 :]
    assert "line 2: byte" in reading_error(tmp_path, broken)
    assert "is not UTF-8, although the text around it is" in reading_error(tmp_path, broken)
    assert "neither UTF-8" in reading_error(tmp_path, b'{"\xff\xff": 1}')


CHINESE = conversation(
    message("user", "皮卡丘是什么属性？"), message("assistant", "皮卡丘是电属性的宝可梦，弱点是地面。")
)
FOREIGN = {
    "big5": "皮卡丘是電屬性的寶可夢，弱點是地面。",
    "shift_jis": "ピカチュウのタイプはでんきです。",
    "euc-kr": "피카츄의 타입은 전기입니다. 무엇입니까?",
}


@pytest.mark.parametrize("encoding", FOREIGN)
def test_other_encodings_are_not_taken_for_gbk(tmp_path, encoding):
    text = json.dumps(conversation(message("user", FOREIGN[encoding])), ensure_ascii=False)
    complaint = reading_error(tmp_path, f"{text}\n{text}\n".encode(encoding))
    assert "train.jsonl: the text from line 1 on reads like" in complaint and "save the file as UTF-8" in complaint


def test_a_file_of_two_encodings_is_named(tmp_path):
    line = json.dumps(CHINESE, ensure_ascii=False) + "\n"
    other = json.dumps(conversation(message("user", "皮卡丘属性好")), ensure_ascii=False) + "\n"
    assert other.encode("utf-8").decode("gb18030")
    assert "train.jsonl line 31 is UTF-8" in reading_error(tmp_path, (line * 30).encode("gbk") + other.encode("utf-8"))


def test_a_guess_is_said(tmp_path, caplog):
    (tmp_path / "x.jsonl").write_text(json.dumps(CHINESE, ensure_ascii=False), encoding="gbk")
    assert list(read_records(tmp_path / "x.jsonl")) == [CHINESE]
    (entry,) = caplog.records
    assert "x.jsonl is read as GBK (GB18030), which is a guess" in entry.getMessage()


@pytest.mark.parametrize("is_array", [True, False])
def test_what_no_author_meant_is_counted_and_said_once(tmp_path, caplog, is_array):
    twice = '{"conversations": [{"role": "assistant", "content": "a", "content": "b"}]}'
    rows = [conversation(message("assistant", text)) for text in ("nan", "x\0y", "None", "Nancy")]
    lines = [*map(json.dumps, rows), twice]
    path = tmp_path / "x.jsonl"
    path.write_text("[" + ",\n".join(lines) + "]" if is_array else "\n".join(lines), encoding="utf-8")
    records = read_records(path)
    assert [record["conversations"][0]["content"] for record in records][-1] == "b"
    assert len(list(records)) == 5
    said = sorted(entry.getMessage() for entry in caplog.records)
    assert len(said) == 3
    assert said[0].startswith("a NUL character in 1 records") and "line 2" in said[0]
    assert "nan, NaN or None" in said[1] and " in 2 records" in said[1] and "line 1" in said[1]
    assert "the key 'content' twice" in said[2] and "in 1 records" in said[2] and "line 5" in said[2]


BAD_RECORDS = [
    ({"messages": []}, "key 'conversations' is missing; found 'messages'; did you mean 'conversations' where"),
    ({"conversation": []}, "did you mean 'conversations' where it says 'conversation'?"),
    ({}, "key 'conversations' is missing; found no keys"),
    ([1], "expected an object"),
    (conversation(), "'conversations' is empty"),
    ({"conversations": "x"}, "'conversations' must be a list, got a string \"x\""),
    (conversation("x"), 'conversations[0]: expected an object {"role"'),
    (conversation({"from": "user", "value": "x"}), "conversations[0]: key 'role' is missing; found 'from', 'value'"),
    (conversation({"role": "user", "value": "x"}), "did you mean 'content' where it says 'value'?"),
    (
        conversation(message("user", "x"), message("bot", "x")),
        "conversations[1]: role 'bot' is unknown; use system, user, assistant, tool or observation; "
        "did you mean 'assistant'?",
    ),
    (conversation(message("assitant", "x")), "did you mean 'assistant'?"),
    (conversation(message("User", "x")), "did you mean 'user'?"),
    (conversation(message("user", None)), "conversations[0]: 'content' must be a string, got null"),
    (conversation(message("user", ["x"])), "'content' must be a string, got a list [\"x\"]"),
    (conversation(message("user", "x", loss="yes")), "'loss' must be true or false, got a string \"yes\""),
    (conversation(message("assistant", "x", metadata=3)), "'metadata' must be a string, got a number 3"),
    (
        conversation({"role": "tool", "name": "f", "parameters": "x", "observation": 1}),
        "'parameters' must be an object",
    ),
    (conversation({"role": "tool", "name": "f", "parameters": {}}), "key 'observation' is missing"),
    (conversation(message("user", "\ud83d")), "'content' holds '\\ud83d' at character 1, half of a character"),
    (conversation(message("user", "x"), tools={"a": 1}), "'tools' must be a list, got an object"),
]


@pytest.mark.parametrize(("record", "expected"), BAD_RECORDS)
def test_validation_names_place_key_and_remedy(record, expected):
    with pytest.raises(RecordError) as caught:
        validate_conversation(record, "x.jsonl line 7")
    assert str(caught.value).startswith("x.jsonl line 7: ")
    assert expected in str(caught.value)


def test_validation_of_input_output_records():
    validate_input_output({"prompt": "a", "response": "", "id": 3}, "x")
    with pytest.raises(RecordError, match="did you mean 'response' where it says 'output'"):
        validate_input_output({"prompt": "a", "output": "b"}, "x")
    with pytest.raises(RecordError, match=r"'response' must be a string, got a number 1\.5"):
        validate_input_output({"prompt": "a", "response": 1.5}, "x")


def test_null_stands_for_an_absent_option():
    record = conversation(message("user", "x", loss=None, metadata=None), tools=None)
    validate_conversation(record, "x")
    assert render_conversation(TOKENIZER, record) == render_conversation(TOKENIZER, conversation(message("user", "x")))


def test_bad_records_are_skipped_and_counted(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(f"{GOOD}\n{GOOD[:-1]}\n{GOOD}\n{{}}\n", encoding="utf-8")
    records = read_records(path, on_bad_record="skip")
    assert list(records) == [PIKACHU, PIKACHU]
    assert records.bad_count == 2
    assert [text.split(": ")[0] for text in records.bad_messages] == [f"{path} line 2", f"{path} line 4"]
    assert "all 1 records of train.jsonl are bad; the first: " in reading_error(tmp_path, "{}", on_bad_record="skip")


def test_keys_that_are_not_read_are_named_once_with_their_count(tmp_path, caplog):
    record = conversation(message("assistant", "x", Loss=False), source="wiki")
    records = read_records(write_jsonl(tmp_path / "x.jsonl", [record, record, PIKACHU]))
    assert len(list(records)) == len(list(records)) == 3
    (entry,) = caplog.records
    assert str(tmp_path / "x.jsonl") in entry.getMessage()
    assert "'Loss' (2; did you mean 'loss'?)" in entry.getMessage() and "'source' (2)" in entry.getMessage()


# Rendering


@pytest.fixture(scope="module")
def official_tokenizer(official_tokenizer_folder):
    from finetune_chatmodel_demo.chatglm3 import load_tokenizer

    return load_tokenizer(official_tokenizer_folder)


def golden_cases() -> list[dict]:
    path = Path(__file__).parent / "golden" / "loss_masks.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("case", golden_cases())
def test_golden_labels(official_tokenizer, case):
    if case["format"] == "multi-turn":
        rendering = render_conversation(official_tokenizer, case["record"])
        rendering = truncate(rendering, case["max_seq_length"], "official")
    else:
        lengths = case["max_source_length"], case["max_target_length"]
        rendering = render_input_output(official_tokenizer, case["record"], *lengths)
    assert rendering.input_ids == case["input_ids"]
    assert rendering.labels == case["labels"]


def targets(rendering: Rendering) -> str:
    """The supervised part, control tokens as digits."""
    ids = (label for label in rendering.labels if label != -100)
    return "".join(chr(token - 100) if token > 100 else str(token) for token in ids)


def test_the_loss_counts_on_replies_and_what_ends_them():
    record = conversation(message("system", "s"), message("user", "u"), message("assistant", "a"), message("user", "v"))
    rendering = render_conversation(TOKENIZER, record)
    assert targets(rendering) == f"\na{USER}"
    assert rendering.turn_starts == [2, 5, 8, 11]
    assert [rendering.input_ids[start] for start in rendering.turn_starts] == [3, USER, ASSISTANT, USER]


def test_loss_overrides_any_role():
    record = conversation(
        message("user", "u", loss=True), message("assistant", "a", loss=False), message("observation", "o")
    )
    assert targets(render_conversation(TOKENIZER, record)) == f"\nu{ASSISTANT}"


def test_a_tool_message_is_a_call_and_its_result():
    call = {"role": "tool", "name": "f", "parameters": {"a": "x'y", "b": [1, None]}, "observation": {"键": 1}}
    rendering = render_conversation(TOKENIZER, conversation(message("user", "u"), call))
    code = '```python\ntool_call(a="x\'y", b=[1, None])\n```'
    assert targets(rendering) == f"f\n{code}{OBSERVATION}"
    assert rendering.input_ids[-11:] == [OBSERVATION, *TOKENIZER.encode_text('\n{"键": 1}'), TOKENIZER.eos_token_id]
    silent = render_conversation(TOKENIZER, conversation(message("user", "u"), call | {"loss": False}))
    assert targets(silent) == "" and silent.input_ids == rendering.input_ids


def test_a_tool_call_reads_the_same_from_a_chat_history():
    call = {"role": "tool", "name": "f", "parameters": {"a": 1}, "observation": "r"}
    history = [message("assistant", "```python\ntool_call(a=1)\n```", metadata="f"), message("observation", "r")]
    assert render_prompt(TOKENIZER, [call]) == render_prompt(TOKENIZER, history)


def test_input_output_prompt_is_the_start_of_the_row():
    row = render_input_output(TOKENIZER, {"prompt": "问", "response": "答"}, 10, 10)
    prompt = render_prompt(TOKENIZER, [message("assistant", "x"), message("user", "问")], prompt_format="input-output")
    assert row.input_ids == prompt + TOKENIZER.encode_text("答") + [6]
    assert row.labels == [-100] * len(prompt) + TOKENIZER.encode_text("答") + [6]
    with pytest.raises(ValueError, match="needs a user message"):
        render_prompt(TOKENIZER, [message("system", "x")], prompt_format="input-output")
    with pytest.raises(ValueError, match="prompt_format 'chat' is unknown"):
        render_prompt(TOKENIZER, [], prompt_format="chat")


def test_a_cut_response_need_not_end():
    record = {"prompt": "ab", "response": "cdef"}
    cut = render_input_output(TOKENIZER, record, 3, 2, ends_cut_response=False)
    assert cut.input_ids == [1, 2, *TOKENIZER.encode_text("acd")] and cut.is_cut
    whole = render_input_output(TOKENIZER, record, 4, 4, ends_cut_response=False)
    assert whole.input_ids[-1] == TOKENIZER.eos_token_id and not whole.is_cut


# Properties of rendering and truncation

words = st.text("ab\n<|user|>", max_size=6)
plain_messages = st.builds(
    lambda role, content, loss: message(role, content) | ({} if loss is None else {"loss": loss}),
    st.sampled_from(ROLES),
    words,
    st.none() | st.booleans(),
)
tool_messages = st.fixed_dictionaries(
    {
        "role": st.just("tool"),
        "name": st.text("fg", min_size=1, max_size=2),
        "parameters": st.dictionaries(st.text("ab", min_size=1, max_size=2), words | st.integers(), max_size=2),
        "observation": words | st.dictionaries(words, st.integers(), max_size=1),
    },
    optional={"loss": st.booleans()},
)
records_strategy = st.fixed_dictionaries(
    {"conversations": st.lists(plain_messages | tool_messages, min_size=1, max_size=6)},
    optional={"tools": st.lists(words, max_size=1)},
)


@given(records_strategy)
def test_prompts_are_prefixes_of_training_rows(record):
    row = render_conversation(TOKENIZER, record).input_ids
    messages = record["conversations"]
    for index, each in enumerate(messages):
        if each["role"] in ("assistant", "tool"):
            prompt = render_prompt(TOKENIZER, messages[:index], tools=record.get("tools"))
            assert row[: len(prompt)] == prompt


@given(records_strategy)
def test_a_turn_is_supervised_as_a_whole(record):
    rendering = render_conversation(TOKENIZER, record)
    assert len(rendering.labels) == len(rendering.input_ids)
    assert all(label in (-100, token) for token, label in zip(rendering.input_ids, rendering.labels))
    ends = [*rendering.turn_starts[1:], len(rendering.input_ids) - 1]
    for start, end in zip(rendering.turn_starts, ends):
        assert len({label == -100 for label in rendering.labels[start + 1 : end + 1]}) == 1
    controls = {*map(TOKENIZER.get_command, TOKENIZER.commands), TOKENIZER.eos_token_id}
    positions = [place for place, token in enumerate(rendering.input_ids) if token in controls]
    assert positions == [0, 1, *rendering.turn_starts, len(rendering.input_ids) - 1]


@settings(max_examples=300)
@given(records_strategy, st.integers(1, 120), st.sampled_from(["turns", "official"]))
def test_truncation_keeps_a_prefix_within_the_limit(record, limit, strategy):
    whole = render_conversation(TOKENIZER, record)
    kept = truncate(whole, limit, strategy)
    length = len(kept.input_ids)
    assert length <= limit
    assert kept.input_ids == whole.input_ids[:length] and kept.labels == whole.labels[:length]
    assert kept.turn_starts == whole.turn_starts[: len(kept.turn_starts)]
    assert kept.turns_dropped == len(whole.turn_starts) - len(kept.turn_starts)
    if len(whole.input_ids) <= limit:
        assert kept == whole
        return
    ends = [end for end in [*whole.turn_starts[1:], len(whole.input_ids) - 1] if whole.labels[end] != -100]
    fitting = [end for end in ends if end < limit]
    if strategy == "turns" and fitting:
        assert length == fitting[-1] + 1 and not kept.is_cut
        assert kept.labels[-1] == kept.input_ids[-1]
    else:
        assert length == limit and kept.is_cut
    if strategy == "turns" and not fitting:
        assert all(label > 100 or label == -100 for label in kept.labels), "no target ends a turn that was cut"


def test_truncation_drops_a_question_whose_reply_does_not_fit():
    record = conversation(
        message("system", "s"), message("user", "u"), message("assistant", "a"), message("user", "v" * 9),
        message("assistant", "b" * 90), message("user", "w"), message("assistant", "c")
    )  # fmt: skip
    kept = truncate(render_conversation(TOKENIZER, record), 60)
    assert targets(kept) == f"\na{USER}"
    assert kept.input_ids[-1] == kept.labels[-1] == USER
    assert (kept.turns_dropped, kept.is_cut, len(kept.turn_starts)) == (4, False, 3)


# Datasets


def test_dataset_items_lengths_report_and_places(tmp_path):
    records = [
        PIKACHU,
        conversation(message("user", "没有回答")),
        conversation(*BULBASAUR["conversations"], message("user", "x" * 50), message("assistant", "y")),
        {"broken": 1},
        conversation(message("user", "u" * 40), message("assistant", "a")),
        conversation(message("user", "u"), message("assistant", "a" * 40)),
    ]
    path = write_jsonl(tmp_path / "x.jsonl", records)
    dataset = build_dataset("multi-turn", path, TOKENIZER, **SETTINGS | {"max_seq_length": 30}, on_bad_record="skip")
    assert len(dataset) == 3
    assert dataset[0] == {
        name: getattr(render_conversation(TOKENIZER, PIKACHU), name) for name in ("input_ids", "labels")
    }
    assert dataset.lengths == [len(dataset[row]["input_ids"]) for row in range(3)] == [15, 16, 30]
    assert dataset[-1] == dataset[2] and dataset[1]["labels"][-1] == USER
    assert [dataset.where(row) for row in range(3)] == [f"{path} line {line}" for line in (1, 3, 6)]
    with pytest.raises(IndexError):
        dataset[3]
    supervised = sum(label != -100 for row in range(3) for label in dataset[row]["labels"])
    assert vars(dataset.report) == {
        "path": str(path), "rows_read": 5, "rows_bad": 1, "rows_kept": 3, "rows_dropped_masked": 1,
        "rows_dropped_long": 1, "rows_cut": 2, "rows_cut_inside": 1, "turns_kept": 6, "turns_dropped": 2,
        "tokens_total": 61, "tokens_supervised": supervised,
    }  # fmt: skip
    assert str(dataset.report) == (
        f"{path}: 3 rows of 6 records (1 bad, 1 dropped without a target, 1 too long; 2 rows cut, 1 of them inside a "
        f"turn, 2 turns left out); 61 tokens, {supervised / 61:.1%} supervised"
    )


@pytest.mark.parametrize(("strategy", "end"), [("turns", "答"), ("official", None)])
def test_input_output_dataset(tmp_path, strategy, end):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "问", "response": "答答答"}])
    lengths = SETTINGS | {"max_target_length": 2}
    dataset = build_dataset("input-output", path, TOKENIZER, **lengths, truncation_strategy=strategy)
    last = TOKENIZER.eos_token_id if end is None else TOKENIZER.encode_text(end)[0]
    assert dataset[0]["input_ids"][-1] == dataset[0]["labels"][-1] == last
    assert (dataset.report.rows_cut, dataset.report.rows_cut_inside, dataset.report.turns_kept) == (1, 1, 0)


def test_a_dataset_without_targets_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [conversation(message("user", "x"))])
    with pytest.raises(UserError, match="holds a target: 1 records were read"):
        build_dataset("multi-turn", path, TOKENIZER, **SETTINGS)


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_several_processes_build_the_same_rows(tmp_path, start_method, monkeypatch):
    records = [conversation(message("user", f"{n}"), message("assistant", f"{n}" * (n % 7))) for n in range(700)]
    path = write_jsonl(tmp_path / "x.jsonl", records)
    alone = build_dataset("multi-turn", path, TOKENIZER, **SETTINGS)
    monkeypatch.setattr(tokenizing, "BATCH_ROWS", 50)
    monkeypatch.setattr(tokenizing, "IN_PROCESS_ROWS", 120)
    monkeypatch.setattr(tokenizing, "START_METHOD", start_method)
    together = build_dataset("multi-turn", path, TOKENIZER, **SETTINGS, num_workers=2)
    assert [together[row] for row in range(700)] == [alone[row] for row in range(700)]
    assert together.report == alone.report and together.where(699) == alone.where(699)


def test_the_real_tokenizer_can_be_sent_to_other_processes(tiny_folder):
    from finetune_chatmodel_demo.chatglm3 import load_tokenizer

    tokenizer = load_tokenizer(tiny_folder)
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert render_conversation(sent, PIKACHU) == render_conversation(tokenizer, PIKACHU)


def test_a_bad_record_stops_several_processes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "BATCH_ROWS", 10)
    monkeypatch.setattr(tokenizing, "IN_PROCESS_ROWS", 10)
    path = write_jsonl(tmp_path / "x.jsonl", [PIKACHU] * 50 + [{}])
    with pytest.raises(RecordError, match="line 51: key 'conversations' is missing"):
        build_dataset("multi-turn", path, TOKENIZER, **SETTINGS, num_workers=2)


def test_rows_are_kept_compactly(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [conversation(message("assistant", "字" * 100))] * 3000)
    dataset = build_dataset("multi-turn", path, TOKENIZER, **SETTINGS)
    assert dataset.report.tokens_total == 3000 * 105
    assert dataset._table.data.nbytes < 5 * dataset.report.tokens_total


# Collating and arguments


def test_collator_pads_to_the_longest_row():
    items = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = PadCollator(pad_token_id=0)(items)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }
    assert PadCollator(0, pad_to_multiple_of=8)(items)["labels"].shape == (2, 8)
    assert items[1] == {"input_ids": [8], "labels": [8]}, "the rows themselves stay as they are"


def test_data_flags():
    parser = argparse.ArgumentParser()
    add_fields(parser, DataArguments)
    line = "--train_format input-output --cutoff_len 64 --preprocessing_num_workers 3 --train_file x --streaming"
    data = read_data_arguments(parser.parse_args(line.split()))
    assert (data.train_file, data.streaming, data.packing) == ("x", True, False)
    assert data.dataset_options() == {
        "max_seq_length": 64, "max_source_length": 1024, "max_target_length": 128, "truncation_strategy": "turns",
        "on_bad_record": "error", "num_workers": 3,
    }  # fmt: skip
    with pytest.raises(UserError, match="--max_seq_length is 0; it must be at least 1"):
        DataArguments(max_seq_length=0)


def test_the_room_stands_on_the_ground():
    code = (
        "import sys, finetune_chatmodel_demo.conversation as room\n"
        "print([name for name in ('torch', 'transformers', 'finetune_chatmodel_demo.chatglm3') if name in sys.modules])"
    )
    repository = Path(__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
