"""Sources: files of every kind, folders, hubs and scripts give the records of a data set, or one clear error."""

import csv
import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from conversation_helpers import write_jsonl

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation import readers
from finetune_chatmodel_demo.conversation.registry import read_registry
from finetune_chatmodel_demo.conversation.sources import DatasetSource, open_dataset
from finetune_chatmodel_demo.evaluation.question_building import BuildOptions, read_and_build

ROWS = [{"instruction": f"问{i}", "input": "", "output": f"答{i}"} for i in range(4)]
TEXT_KEYS = ("instruction", "input", "output")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def open_one(folder: Path, /, kind: str = "multi-turn", options: dict | None = None, **block: Any) -> DatasetSource:
    """Registers one data set, as `x`, and opens it."""
    text = json.dumps({"x": block}, ensure_ascii=False)
    (folder / "dataset_info.json").write_text(text, encoding="utf-8")
    return open_dataset(read_registry(folder)["x"], folder, kind, **(options or {}))


def asked(source: DatasetSource) -> list[tuple[str, str]]:
    """(question, answer) of every record; each is one turn."""
    return [tuple(message["content"] for message in record["conversations"]) for record in source]


def places(source: DatasetSource) -> list[str]:
    return [source.where(located.number, located.line) for located in source.iterate_located()]


def complaint(folder: Path, /, **keys: Any) -> str:
    """What opening or reading the data set complains about, in one line, behind the registry's name."""
    with pytest.raises(UserError) as caught:
        list(open_one(folder, **keys))
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{folder / 'dataset_info.json'}: data set 'x'")


def write_json(path: Path, rows: list, indent: int | None = None) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict], encoding: str = "utf-8") -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding=encoding)
    return path


def write_tsv(path: Path, rows: list[dict]) -> Path:
    text = write_csv(path, rows).read_text(encoding="utf-8")
    path.write_text(text.replace(",", "\t"), encoding="utf-8")
    return path


def write_semicolons(path: Path, rows: list[dict]) -> Path:
    text = write_csv(path, rows).read_text(encoding="utf-8")
    path.write_text(text.replace(",", ";"), encoding="utf-8")
    return path


def write_xlsx(path: Path, rows: list[dict]) -> Path:
    import pandas

    pandas.DataFrame(rows).to_excel(path, index=False)
    return path


def write_parquet(path: Path, rows: list[dict], **options: Any) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


WRITERS = {
    "json": write_json,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "tsv": write_tsv,
    "xlsx": write_xlsx,
    "parquet": write_parquet,
}
EXPECTED = [(f"问{i}", f"答{i}") for i in range(4)]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("extension", WRITERS)
def test_every_kind_of_file_gives_the_same_records(folder: Path, extension: str):
    WRITERS[extension](folder / f"a.{extension}", ROWS)
    source = open_one(folder, file_name=f"a.{extension}")
    assert asked(source) == EXPECTED
    assert asked(source) == EXPECTED, "a second pass gives the same"
    assert (source.path, source.bad_count) == (folder / f"a.{extension}", 0)


@pytest.mark.parametrize(
    ("extension", "ends"),
    [
        ("json", [f"a.json record {i} (line 1)" for i in (1, 2, 3, 4)]),
        ("jsonl", [f"a.jsonl line {i}" for i in (1, 2, 3, 4)]),
        ("csv", [f"a.csv line {i}" for i in (2, 3, 4, 5)]),
        ("tsv", [f"a.tsv line {i}" for i in (2, 3, 4, 5)]),
        ("xlsx", [f"a.xlsx row {i}" for i in (2, 3, 4, 5)]),
        ("parquet", [f"a.parquet row {i}" for i in (1, 2, 3, 4)]),
    ],
)
def test_places(folder: Path, extension: str, ends: list[str]):
    WRITERS[extension](folder / f"a.{extension}", ROWS)
    assert places(open_one(folder, file_name=f"a.{extension}")) == [f"{folder}/{end}" for end in ends]


@pytest.mark.parametrize("extension", WRITERS)
def test_a_bad_row_is_named_or_counted(folder: Path, extension: str):
    rows = [*ROWS[:2], {**ROWS[2], "output": " "}, ROWS[3]]
    WRITERS[extension](folder / f"a.{extension}", rows)
    with pytest.raises(UserError) as caught:
        list(open_one(folder, file_name=f"a.{extension}"))
    places = {"json": "record 3 (line 1)", "jsonl": "line 3", "xlsx": "row 4", "parquet": "row 3"}
    place = places.get(extension, "line 4")
    message = f"{folder}/a.{extension} {place}: 'output' is empty; a reply needs text"
    assert str(caught.value).startswith(message)
    source = open_one(folder, file_name=f"a.{extension}", options={"on_bad_record": "skip"})
    assert asked(source) == [EXPECTED[0], EXPECTED[1], EXPECTED[3]]
    assert (source.bad_count, source.bad_messages) == (1, [message])


def test_only_bad_rows_and_no_rows(folder: Path):
    write_jsonl(folder / "a.jsonl", [{"instruction": "", "output": "a"}])
    source = open_one(folder, file_name="a.jsonl", options={"on_bad_record": "skip"})
    with pytest.raises(UserError, match=r"all 1 records of .*a\.jsonl are bad; the first: .*'instruction' is empty"):
        list(source)
    (folder / "a.jsonl").write_text("")
    with pytest.raises(UserError, match=r"a\.jsonl is empty; expected rows of the data set 'x'"):
        list(open_one(folder, file_name="a.jsonl"))


def test_a_broken_conversation_is_reported_with_its_index(folder: Path):
    good = {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}
    bad = {"conversations": [*good["conversations"], {"from": "gpt", "value": "又答"}]}
    write_json(folder / "a.json", [good, bad, good], indent=1)
    message = (
        f"{folder}/a.json record 2 (line 14): conversations[2]: expected 'human' or 'observation' at the odd place 3, "
        "got 'gpt'"
    )
    with pytest.raises(UserError) as caught:
        list(open_one(folder, file_name="a.json", formatting="sharegpt"))
    assert str(caught.value).startswith(message)
    source = open_one(folder, file_name="a.json", formatting="sharegpt", options={"on_bad_record": "skip"})
    assert asked(source) == [("问", "答")] * 2
    assert source.bad_messages == [message]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030"])
def test_csv_encodings(folder: Path, encoding: str):
    write_csv(folder / "a.csv", ROWS, encoding)
    assert asked(open_one(folder, file_name="a.csv")) == EXPECTED


def test_csv_is_read_row_by_row(folder: Path):
    """Of 3 MB, little has been read when the first row is handed out."""
    write_csv(folder / "a.csv", [{"instruction": str(i), "output": "答" * 100} for i in range(10_000)])
    source = open_one(folder, file_name="a.csv")
    records = iter(source)
    assert next(records)["conversations"][0] == {"role": "user", "content": "0"}
    assert source.reader.bytes_read < 100_000 < (folder / "a.csv").stat().st_size
    assert sum(1 for _ in records) == 9999


def test_csv_cells_stay_as_they_are(folder: Path):
    """Numbers keep their zeros, blank cells are blank, line breaks and commas in quotes are text."""
    (folder / "a.csv").write_text(
        'instruction,input,output,unnamed,\n7,,0.70,,\n\n"两行\n一格", ,"是, 的 ",,x\n,,,,\n007,1e3,-0,,\n',
        encoding="utf-8",
    )
    source = open_one(folder, file_name="a.csv")
    assert asked(source) == [("7", "0.70"), ("两行\n一格", "是, 的 "), ("007\n1e3", "-0")]
    assert places(source) == [f"{folder}/a.csv line {line}" for line in (2, 4, 7)]


def test_csv_cells_that_hold_lists(folder: Path):
    history = json.dumps([["一", "甲"]], ensure_ascii=False)
    write_csv(folder / "a.csv", [{"q": "二", "a": "乙", "h": history}, {"q": "三", "a": "丙", "h": ""}])
    source = open_one(folder, file_name="a.csv", columns={"prompt": "q", "response": "a", "history": "h"})
    assert asked(source) == [("一", "甲", "二", "乙"), ("三", "丙")]
    pair = json.dumps(["好", "坏"], ensure_ascii=False)
    write_csv(folder / "b.csv", [{"instruction": "问", "output": pair}])
    (record,) = open_one(folder, "preference", file_name="b.csv", ranking=True)
    assert (record["chosen"]["content"], record["rejected"]["content"]) == ("好", "坏")
    spoken = json.dumps([{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], ensure_ascii=False)
    write_csv(folder / "c.csv", [{"conversations": spoken}])
    assert asked(open_one(folder, file_name="c.csv", formatting="sharegpt")) == [("问", "答")]


def test_semicolons_separate_where_the_header_has_no_comma(folder: Path):
    write_semicolons(folder / "a.csv", ROWS)
    assert asked(open_one(folder, file_name="a.csv")) == EXPECTED


def test_cells_of_a_workbook_are_text(folder: Path):
    import openpyxl

    workbook = openpyxl.Workbook()
    for cells in (["instruction", "output"], ["身高", 0.4], [None, None], ["nan", "NA"]):
        workbook.active.append(cells)
    workbook.save(folder / "a.xlsx")
    source = open_one(folder, file_name="a.xlsx")
    assert asked(source) == [("身高", "0.4"), ("nan", "NA")]
    assert places(source) == [f"{folder}/a.xlsx row 2", f"{folder}/a.xlsx row 4"]
    (folder / "b.xlsx").write_bytes(b"no workbook")
    assert "b.xlsx cannot be read as an Excel workbook" in complaint(folder, file_name="b.xlsx")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "instruction,output\na,b\nc\n",
            "{path} line 3: 1 cells where the header has 2 columns (it starts 'c'); add the missing separators",
        ),
        (
            "instruction,output\na,b,c\n",
            "{path} line 2: 3 cells where the header has 2 columns (it starts 'a,b,c'); quote cells that hold the "
            "separator",
        ),
        (
            'instruction,output\n"a,b\n',
            "{path}: the row that starts at line 2 cannot be read (unexpected end of data); look for a quote that is "
            "not closed, or double the quotes inside a cell",
        ),
        ("a,a\n1,2\n", "{path}: the header names columns twice: {{'a': [1, 2]}}; rename them"),
        ("\n\n", "{path} has no header: every line is blank"),
        ("instruction,output\n", "{path} is empty; expected rows of the data set 'x'"),
    ],
)
def test_broken_csv(folder: Path, text: str, message: str):
    path = folder / "a.csv"
    path.write_text(text, encoding="utf-8")
    told = complaint(folder, file_name="a.csv").removesuffix(" (--on_bad_record skip goes on without such records)")
    assert told == message.format(path=path)


def test_parquet_holds_nested_columns(folder: Path):
    spoken = [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]
    write_parquet(folder / "a.parquet", [{"conversations": spoken, "system": None}] * 2)
    assert asked(open_one(folder, file_name="a.parquet", formatting="sharegpt")) == [("问", "答")] * 2


def test_parquet_is_read_in_batches(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Before the first of 5,000 rows is handed out, one batch has been read and not the file."""
    import pyarrow.parquet

    write_parquet(folder / "a.parquet", [{"instruction": str(i), "output": "a"} for i in range(5000)])
    sizes = []

    class CountingFile(pyarrow.parquet.ParquetFile):
        def iter_batches(self, **keys: Any) -> Any:
            for batch in super().iter_batches(**keys):
                sizes.append(len(batch))
                yield batch

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", CountingFile)
    rows = readers.ParquetRows(folder / "a.parquet").rows()
    assert next(rows).value == {"instruction": "0", "output": "a"}
    assert sizes == [readers.PARQUET_BATCH_ROWS]
    assert sum(1 for _ in rows) == 4999
    assert max(sizes) == readers.PARQUET_BATCH_ROWS and sum(sizes) == 5000


def test_a_file_that_is_no_parquet(folder: Path):
    (folder / "a.parquet").write_text("no parquet")
    message = complaint(folder, file_name="a.parquet")
    assert message.startswith(f"{folder}/a.parquet cannot be read as parquet behind row 0 (")


def test_a_folder_of_files(folder: Path, caplog: pytest.LogCaptureFixture):
    (folder / "rows").mkdir()
    write_jsonl(folder / "rows" / "b.jsonl", ROWS[2:])
    write_csv(folder / "rows" / "a.csv", ROWS[:2])
    (folder / "rows" / "README.md").write_text("no data")
    (folder / "rows" / ".hidden.json").write_text("no data")
    with caplog.at_level(logging.WARNING):
        source = open_one(folder, file_name="rows")
    assert asked(source) == EXPECTED
    assert places(source) == [
        f"{folder}/rows/a.csv line 2",
        f"{folder}/rows/a.csv line 3",
        f"{folder}/rows/b.jsonl line 1",
        f"{folder}/rows/b.jsonl line 2",
    ]
    assert [located.number for located in source.iterate_located()] == [1, 2, 3, 4]
    assert "not read in" in caplog.text and "README.md" in caplog.text and ".hidden" not in caplog.text


def test_files_that_are_not_there(folder: Path):
    write_jsonl(folder / "train.jsonl", ROWS)
    (folder / "empty").mkdir()
    (folder / "a.pdf").write_text("a")
    assert complaint(folder, file_name="trian.jsonl") == (
        f": file {folder}/trian.jsonl does not exist; did you mean 'train.jsonl'?"
    )
    assert complaint(folder, file_name="no/where.csv") == (
        f": file {folder}/no/where.csv does not exist; file_name counts from the folder of the registry"
    )
    assert complaint(folder, file_name="a.pdf") == (
        f": {folder}/a.pdf is no data file that can be read; use json, jsonl, csv, tsv, xlsx or parquet"
    )
    assert complaint(folder, file_name="empty") == (
        f": folder {folder}/empty holds no data file; use json, jsonl, csv, tsv, xlsx or parquet"
    )


def test_sha1(folder: Path, caplog: pytest.LogCaptureFixture):
    path = write_jsonl(folder / "a.jsonl", ROWS)
    right = hashlib.sha1(path.read_bytes()).hexdigest()
    wrong = "0" * 40
    for accepted in (right, right.upper(), "", None):
        assert asked(open_one(folder, file_name="a.jsonl", file_sha1=accepted)) == EXPECTED
    with caplog.at_level(logging.WARNING):
        assert asked(open_one(folder, file_name="a.jsonl", file_sha1=wrong)) == EXPECTED
    (warning,) = caplog.records
    assert right in warning.message and wrong in warning.message and "--strict_sha1" in warning.message
    refused = complaint(folder, file_name="a.jsonl", file_sha1=wrong, options={"strict_sha1": True})
    assert right in refused and wrong in refused
    (folder / "rows").mkdir()
    write_jsonl(folder / "rows" / "a.jsonl", ROWS)
    assert complaint(folder, file_name="rows", file_sha1=right) == (
        f": 'file_sha1' is that of one file, but {folder}/rows is a folder; remove the key"
    )


@pytest.mark.parametrize("key", ["subset", "folder", "split"])
def test_a_file_has_no_subset_folder_or_split(folder: Path, key: str):
    write_jsonl(folder / "a.jsonl", ROWS)
    assert complaint(folder, file_name="a.jsonl", **{key: "validation"}) == (
        f": '{key}' is 'validation', but a file has no {key}; remove the key, or give hf_hub_url, ms_hub_url or "
        "script_url"
    )
    assert asked(open_one(folder, file_name="a.jsonl", split="train")) == EXPECTED


def test_openai_messages_by_the_registry(folder: Path):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "human", "content": "问"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "果"},
        {"role": "assistant", "content": [{"type": "text", "text": "答"}]},
    ]
    write_jsonl(
        folder / "a.jsonl", [{"messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]}]
    )
    block = {"formatting": "openai", "columns": {"tools": "tools"}, "tags": {"user_tag": "human"}}
    assert list(open_one(folder, file_name="a.jsonl", **block)) == [
        {
            "tools": [{"name": "f"}],
            "conversations": [
                {"role": "user", "content": "问"},
                {"role": "tool", "name": "f", "parameters": {"a": 1}, "observation": "果"},
                {"role": "assistant", "content": "答"},
            ],
        }
    ]


def test_an_empty_instruction_leaves_the_input(folder: Path):
    write_jsonl(folder / "a.jsonl", [{"instruction": "", "input": "问", "output": "答"}])
    assert asked(open_one(folder, file_name="a.jsonl")) == [("问", "答")]


def test_num_samples(folder: Path):
    rows = [ROWS[0], {"instruction": "", "output": "x"}, *ROWS[1:]]
    write_jsonl(folder / "a.jsonl", rows)
    skip = {"on_bad_record": "skip"}
    assert asked(open_one(folder, file_name="a.jsonl", num_samples=1)) == EXPECTED[:1]
    source = open_one(folder, file_name="a.jsonl", num_samples=3, options=skip)
    assert asked(source) == EXPECTED[:3]
    assert asked(source) == EXPECTED[:3]
    assert source.bad_count == 1
    source = open_one(folder, file_name="a.jsonl", num_samples=9, options=skip)
    assert asked(source) == [*EXPECTED, *EXPECTED, EXPECTED[0]]
    assert source.bad_count == len(source.bad_messages) == 1


def test_columns_that_nothing_uses_are_told(folder: Path, caplog: pytest.LogCaptureFixture):
    write_jsonl(folder / "a.jsonl", [{**row, "system": "你是助手。", "history": []} for row in ROWS])
    with caplog.at_level(logging.WARNING):
        list(open_one(folder, file_name="a.jsonl"))
    (warning,) = caplog.records
    assert warning.message == (
        f"{folder}/a.jsonl: keys that are not read, with the records that have them: 'system' (4; list it in "
        "'columns' of 'x' if it should be)"
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        list(open_one(folder, file_name="a.jsonl", columns={"system": "system"}))
    assert caplog.records == []
    with caplog.at_level(logging.WARNING):
        list(open_one(folder, "text", file_name="a.jsonl"))
    (warning,) = caplog.records
    assert "'output' (4)" in warning.message and "'system' (4)" in warning.message


def test_a_stage_that_does_not_fit(folder: Path):
    write_jsonl(folder / "a.jsonl", ROWS)
    assert complaint(folder, kind="preference", file_name="a.jsonl").startswith(
        " serves the stages pt, sft, ppo and not rm or dpo: ranking is false"
    )


# ---------------------------------------------------------------- hubs


@pytest.fixture
def hub_folder(folder: Path) -> Path:
    """A local folder that `datasets` reads like a repository of the hub: two folders, in one of them two splits."""
    repository = folder / "repository"
    for name in ("en", "zh"):
        (repository / name).mkdir(parents=True)
    write_jsonl(repository / "en" / "train.jsonl", ROWS[:1])
    write_jsonl(repository / "en" / "test.jsonl", ROWS[3:])
    write_jsonl(repository / "zh" / "train.jsonl", ROWS[1:3])
    return repository


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_through_datasets(folder: Path, hub_folder: Path, streaming: bool):
    options = {"streaming": streaming}
    source = open_one(folder, hf_hub_url=str(hub_folder), file_name="ignored.json", options=options)
    assert asked(source) == asked(source) == EXPECTED[:3]
    assert places(source)[1] == f"{hub_folder} (split train) row 2"
    assert asked(open_one(folder, hf_hub_url=str(hub_folder), split="test", options=options)) == EXPECTED[3:]
    assert asked(open_one(folder, hf_hub_url=str(hub_folder), folder="zh", options=options)) == EXPECTED[1:3]


def test_hub_gets_subset_folder_split_and_streaming(folder: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    calls = []

    def load_dataset(path: str, **keys: Any) -> list[dict]:
        calls.append((path, keys))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    block = {"hf_hub_url": "a/b", "subset": "zh", "folder": "python", "split": "test"}
    assert asked(open_one(folder, **block, options={"streaming": True})) == EXPECTED
    assert calls == [("a/b", {"name": "zh", "data_dir": "python", "split": "test", "streaming": True})]


def test_hub_without_a_split_or_a_subset(folder: Path, hub_folder: Path):
    message = complaint(folder, hf_hub_url=str(hub_folder), split="validation")
    assert message.startswith(f": '{hub_folder}' cannot be read from the Hugging Face hub (ValueError: Unknown split")
    assert message.endswith("); check its name and split 'validation'")
    message = complaint(folder, hf_hub_url=str(hub_folder), subset="en")
    assert "BuilderConfig 'en' not found" in message
    assert message.endswith("); check its name and subset 'en', split 'train'")


def test_no_network_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """HF_HUB_OFFLINE=1 is set for all tests."""
    message = complaint(folder, hf_hub_url="nobody/nothing", ms_hub_url="c/d")
    assert message.startswith(
        ": 'nobody/nothing' cannot be read from the Hugging Face hub, there is no connection to it ("
    )
    assert message.endswith(
        "); check the network and HF_HUB_OFFLINE; a mirror can be named with HF_ENDPOINT, ModelScope chosen with "
        "USE_MODELSCOPE_HUB=1, or use file_name"
    )


def test_a_connection_that_breaks_while_reading(folder: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    class Breaking:
        def __iter__(self) -> Any:
            yield ROWS[0]
            raise OSError("Max retries exceeded\n  Caused by: Failed to resolve 'hub'")

    monkeypatch.setattr(datasets, "load_dataset", lambda path, **keys: Breaking())
    message = complaint(folder, hf_hub_url="a/b", options={"streaming": True})
    assert message == (
        ": 'a/b' cannot be read from the Hugging Face hub behind row 1, there is no connection to it (Max retries "
        "exceeded Caused by: Failed to resolve 'hub'); check the network and HF_HUB_OFFLINE; a mirror can be named "
        "with HF_ENDPOINT, or use file_name"
    )


def use_fake_modelscope(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    module = types.ModuleType("modelscope.hub.snapshot_download")
    module.dataset_snapshot_download = download
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", module)


def test_modelscope_downloads_and_datasets_reads(folder: Path, hub_folder: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def download(dataset_id: str, **keys: Any) -> str:
        calls.append((dataset_id, keys))
        return str(hub_folder)

    use_fake_modelscope(monkeypatch, download)
    source = open_one(folder, ms_hub_url="a/b")
    assert asked(source) == EXPECTED[:3]
    assert places(source)[0] == "a/b (split train) row 1"
    assert asked(open_one(folder, ms_hub_url="a/b", folder="zh")) == EXPECTED[1:3]
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert asked(open_one(folder, ms_hub_url="c/d", hf_hub_url="never/asked", split="test")) == EXPECTED[3:]
    assert calls == [("a/b", {}), ("a/b", {"allow_patterns": ["zh/**", "README.md"]}), ("c/d", {})]


def test_modelscope_without_network(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def download(dataset_id: str) -> str:
        raise ConnectionError("[E1020] Connection failed: no route")

    use_fake_modelscope(monkeypatch, download)
    assert complaint(folder, ms_hub_url="a/b") == (
        ": 'a/b' cannot be read from ModelScope, there is no connection to it ([E1020] Connection failed: no route); "
        "check the network and HF_HUB_OFFLINE, or use file_name"
    )


def test_modelscope_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    message = complaint(folder, ms_hub_url="a/b")
    assert message.startswith(": ms_hub_url needs ModelScope's client (")
    assert message.endswith("); install it with `pip install modelscope`")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert complaint(folder, ms_hub_url="a/b", hf_hub_url="c/d").endswith(
        "); install it with `pip install modelscope`, or unset USE_MODELSCOPE_HUB to take it from hf_hub_url"
    )


# ---------------------------------------------------------------- scripts

FUNCTION = """
from pathlib import Path

(Path(__file__).parent / "was_run").touch()

def load(split, subset="none"):
    for number in range(2 if split == "train" else 1):
        yield {"instruction": f"{split} {subset}", "output": str(number)}
"""
BUILDER = """
import json
from pathlib import Path

import datasets

FILE = Path(__file__).with_name("rows.jsonl")


class Rows(datasets.GeneratorBasedBuilder):
    VERSION = datasets.Version("0.0.0")

    def _info(self):
        return datasets.DatasetInfo(features=datasets.Features({"instruction": datasets.Value("string")}))

    def _split_generators(self, dl_manager):
        path = dl_manager.download(str(FILE))
        return [
            datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"path": path, "first": 0}),
            datasets.SplitGenerator(name=datasets.Split.TEST, gen_kwargs={"path": path, "first": 3}),
        ]

    def _generate_examples(self, path, first):
        for key, line in enumerate(open(path, encoding="utf-8")):
            if key >= first:
                yield key, json.loads(line)
"""
PLAIN_BUILDER = """
class Split:
    name, gen_kwargs = "train", {"count": 2}

class Rows:
    def _split_generators(self, dl_manager):
        return [Split]

    def _generate_examples(self, count):
        for key in range(count):
            yield key, {"instruction": "a", "output": str(key)}
"""


def write_script(folder: Path, text: str) -> Path:
    (folder / "rows").mkdir(exist_ok=True)
    (folder / "rows" / "rows.py").write_text(text, encoding="utf-8")
    return folder / "rows" / "rows.py"


ALLOWED = {"allow_dataset_scripts": True}


def test_a_script_does_not_run_unasked(folder: Path):
    path = write_script(folder, FUNCTION)
    assert complaint(folder, script_url="rows") == (
        f": its rows are made by a Python program, {path}. Read it, and if it may run on this machine, add "
        "--allow_dataset_scripts"
    )
    assert not (folder / "rows" / "was_run").exists()


def test_a_script_with_a_function(folder: Path):
    path = write_script(folder, FUNCTION)
    source = open_one(folder, script_url="rows", options=ALLOWED)
    assert asked(source) == asked(source) == [("train none", "0"), ("train none", "1")]
    assert places(source)[1] == f"{path} (split train) row 2"
    block = {"script_url": "rows/rows.py", "split": "test", "subset": "zh"}
    assert asked(open_one(folder, **block, options=ALLOWED)) == [("test zh", "0")]
    assert complaint(folder, script_url="rows", folder="a", options=ALLOWED) == (
        f": 'folder' is given, but load of {path} takes no folder"
    )


def test_a_script_with_a_builder(folder: Path):
    path = write_script(folder, BUILDER)
    write_jsonl(folder / "rows" / "rows.jsonl", ROWS)
    assert asked(open_one(folder, script_url="rows", options=ALLOWED)) == EXPECTED
    assert asked(open_one(folder, script_url="rows", split="test", options=ALLOWED)) == EXPECTED[3:]
    assert complaint(folder, script_url="rows", split="validation", options=ALLOWED) == (
        f": {path} has no split 'validation'; it has train, test"
    )
    write_script(folder, PLAIN_BUILDER)
    assert asked(open_one(folder, script_url="rows", options=ALLOWED)) == [("a", "0"), ("a", "1")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "x = 1",
            "has 0 classes with _split_generators and _generate_examples, and no function load(split); write one of "
            "them",
        ),
        ("x = 1\nx.y", "failed when it was imported at line 2: AttributeError: 'int' object has no attribute 'y'"),
        ("def load(:", "failed when it was imported: SyntaxError: "),
        (
            "def load(split):\n    yield {'instruction': 'a', 'output': 'b'}\n    raise KeyError('c')",
            "failed behind row 1 at line 3: KeyError: 'c'",
        ),
    ],
)
def test_broken_scripts(folder: Path, text: str, message: str):
    path = write_script(folder, text)
    assert complaint(folder, script_url="rows", options=ALLOWED).startswith(f": {path} {message}")


def test_a_script_that_is_not_there(folder: Path):
    assert complaint(folder, script_url="rows", options=ALLOWED) == (
        f": script {folder}/rows/rows.py does not exist; 'script_url' names the folder of NAME/NAME.py"
    )


# ---------------------------------------------------------------- the registry that comes along

OWN = REPOSITORY / "data_processing" / "datasets"
COUNTS = {
    "pokemon": 302,
    "pokemon_validation": 151,
    "pokemon_preference": 1130,
    "pokemon_preference_validation": 226,
    "pokemon_preference_unseen": 190,
    "pokemon_preference_small": 400,
    "pokemon_preference_small_validation": 80,
    "pokemon_text": 226,
    "pokemon_text_validation": 38,
    "pokemon_tools": 453,
    "pokemon_tools_validation": 151,
    "alpaca_sample": 6,
    "alpaca_history_sample": 4,
    "sharegpt_sample": 3,
    "preference_sample": 4,
    "preference_pairs_sample": 3,
    "sharegpt_preference_sample": 2,
    "pretraining_sample": 5,
    "function_call_sample": 3,
    "oasst1_sample": 16,
    "script_sample": 923,
}


@pytest.mark.parametrize("name", COUNTS)
def test_own_data_sets(name: str):
    """Every row of what comes along is good; `text` where the name says so, else what the stages but pt need."""
    entry = read_registry(OWN)[name]
    kind = "text" if "text" in name or "pretraining" in name else entry.kinds[0]
    records = list(open_dataset(entry, OWN, kind, allow_dataset_scripts=True))
    assert len(records) == COUNTS[name]


def test_own_data_sets_of_hubs_need_a_network():
    for name, entry in read_registry(OWN).items():
        if entry.origin == "hf_hub":
            with pytest.raises(UserError, match=f"data set '{name}': .* there is no connection to it"):
                open_dataset(entry, OWN, "multi-turn")


def test_generated_files_are_what_the_program_makes(folder: Path):
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    program = [sys.executable, str(REPOSITORY / "data_processing" / "make_datasets.py"), "--output", str(folder)]
    subprocess.run(program, check=True, capture_output=True, env=environment)
    made = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert len(made) == 10
    assert made == {name: (OWN / name).read_text(encoding="utf-8") for name in made}


def test_pokemon_preferences_are_true_and_false_of_the_facts():
    """The better answer is the CSV's, the worse one is another Pokémon's; validation repeats no pair of training."""
    with open(REPOSITORY / "data_processing" / "data.csv", encoding="utf-8-sig", newline="") as file:
        facts = {row["姓名"]: row for row in csv.DictReader(file)}
    registry = read_registry(OWN)
    pairs, names = {}, {}
    for split in ("", "_validation", "_unseen"):
        pairs[split], names[split] = set(), set()
        for record in open_dataset(registry[f"pokemon_preference{split}"], OWN, "preference"):
            chosen, rejected = record["chosen"]["content"], record["rejected"]["content"]
            name = max((name for name in facts if chosen.startswith(name)), key=len)
            values = [value for value in facts[name].values() if value]
            assert any(value in chosen for value in values) or "没有进化前的形态" in chosen
            assert chosen != rejected and rejected.startswith(name)
            names[split].add(name)
            pairs[split].add((chosen, rejected))
    assert len(pairs[""]) == COUNTS["pokemon_preference"]
    assert names["_validation"] <= names[""] and not pairs["_validation"] & pairs[""]
    assert {chosen for chosen, _ in pairs["_validation"]} <= {chosen for chosen, _ in pairs[""]}
    assert len(names["_unseen"]) == 38 and not names["_unseen"] & names[""]


def test_the_same_pokemon_are_held_out_of_data_sets_and_by_evaluate():
    """`evaluate.py --hold_out 0.2` asks about nobody that the pairs or documents of training are about."""
    data = REPOSITORY / "data_processing"
    options = BuildOptions(count=1, hold_out=0.2)
    questions = read_and_build(data / "data.csv", data / "templates" / "pokemon_kanto.yaml", options)
    held_out = tuple(questions.notes["held_out"])
    assert len(held_out) == 38
    registry = read_registry(OWN)
    for name in ("pokemon_preference", "pokemon_preference_validation"):
        pairs = open_dataset(registry[name], OWN, "preference")
        assert not [record for record in pairs if record["chosen"]["content"].startswith(held_out)]
    texts = [record["text"] for record in open_dataset(registry["pokemon_text"], OWN, "text")]
    endings = [f"{start}{name}{end}" for name in held_out for start, end in (("关于", "的记录"), ("", "的这一页就"))]
    assert not [text for text in texts if any(ending in text for ending in endings)]


def test_the_small_preference_sets_are_about_the_same_pokemon():
    registry = read_registry(OWN)
    answers = {
        name: {record["chosen"]["content"] for record in open_dataset(registry[name], OWN, "preference")}
        for name in ("pokemon_preference_small", "pokemon_preference_small_validation")
    }
    assert answers["pokemon_preference_small_validation"] < answers["pokemon_preference_small"]


def test_pokemon_of_the_validation_documents_are_not_trained():
    registry = read_registry(OWN)
    texts = {
        split: "".join(record["text"] for record in open_dataset(registry[f"pokemon_text{split}"], OWN, "text"))
        for split in ("", "_validation")
    }
    names = ("小火龙", "喷火龙")
    assert [f"{name}的" in texts[""] for name in names] == [True, False]
    assert [f"{name}的" in texts["_validation"] for name in names] == [False, True]


def test_pokemon_tool_calls_ask_for_what_the_question_says():
    """Call, observation and answer agree with question and CSV; validation has wordings of its own."""
    with open(REPOSITORY / "data_processing" / "data.csv", encoding="utf-8-sig", newline="") as file:
        facts = {row["姓名"]: row for row in csv.DictReader(file)}
    wordings = {}
    for split in ("", "_validation"):
        wordings[split] = set()
        for record in open_dataset(read_registry(OWN)[f"pokemon_tools{split}"], OWN, "multi-turn"):
            question, call, answer = record["conversations"]
            name = call["parameters"]["query"]
            assert (call["role"], call["name"]) == ("tool", "pokedex")
            values = dict(part.split("：") for part in call["observation"].split("；"))
            row = facts[name]
            assert values == {
                "属性": row["属性"],
                "特性": row["特征"],
                "身高": f"{row['身高']}米",
                "体重": f"{row['体重']}公斤",
            }
            (attribute,) = [attribute for attribute in values if f"{name}的{attribute}" in question["content"]]
            assert answer["content"] == f"{name}的{attribute}是{values[attribute]}。"
            wordings[split].add(question["content"].replace(name, "").replace(attribute, ""))
    assert wordings[""] and wordings["_validation"] and not wordings[""] & wordings["_validation"]
