"""The registry: every key of both generations, documented defaults and precedence, mistakes that name the place."""

import json
from pathlib import Path

import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.records import STAGE_KINDS
from finetune_chatmodel_demo.conversation.registry import (
    COLUMN_KEYS,
    TAG_KEYS,
    TOP_KEYS,
    Columns,
    DatasetEntry,
    Tags,
    check_kind,
    choose_entries,
    find_dataset_dir,
    read_registry,
)

OWN = REPOSITORY / "data_processing" / "datasets"


def write_registry(folder: Path, text: str | dict) -> Path:
    path = folder / "dataset_info.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text, ensure_ascii=False), encoding="utf-8")
    return path


def read_one(folder: Path, block: dict) -> DatasetEntry:
    write_registry(folder, {"x": block})
    return read_registry(folder)["x"]


def mistake(folder: Path, block: object) -> str:
    """What reading an entry complains about, behind the place."""
    path = write_registry(folder, {"x": block})
    with pytest.raises(UserError) as caught:
        check_kind(read_registry(folder)["x"], "multi-turn")
    start = f"{path}: data set 'x'"
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start).lstrip(": ")


# ---------------------------------------------------------------- keys, defaults, precedence


def test_documented_defaults(tmp_path: Path):
    entry = read_one(tmp_path, {"file_name": "a.json"})
    assert entry == DatasetEntry(name="x", registry=tmp_path / "dataset_info.json", file_name="a.json")
    assert (entry.ranking, entry.formatting, entry.split, entry.num_samples) == (False, "alpaca", "train", None)
    assert (entry.subset, entry.folder, entry.file_sha1) == (None, None, None)
    assert vars(entry.columns) == {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": None,
        "messages": "conversations",
        "system": None,
        "tools": None,
        "chosen": None,
        "rejected": None,
    }
    assert vars(entry.tags) == {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "observation_tag": "observation",
        "function_tag": "function_call",
        "system_tag": "system",
    }


def test_every_key_of_the_document_and_the_later_ones_is_read(tmp_path: Path):
    block = {
        "hf_hub_url": "a/b",
        "ms_hub_url": "c/d",
        "script_url": "s",
        "file_name": "f.json",
        "file_sha1": "A" * 40,
        "subset": "zh",
        "folder": "data",
        "ranking": True,
        "formatting": "sharegpt",
        "split": "test",
        "num_samples": 5,
        "columns": {name: f"column {name}" for name in COLUMN_KEYS},
        "tags": {"user_tag": "u", "assistant_tag": "a", "observation_tag": "o", "function_tag": "f", "system_tag": "s"},
    }
    assert set(block) == set(TOP_KEYS)
    entry = read_one(tmp_path, block)
    assert entry.columns == Columns(**{name: f"column {name}" for name in vars(Columns())})
    assert entry.tags == Tags("column role", "column content", "u", "a", "o", "f", "s")
    assert entry.file_sha1 == "a" * 40
    expected = {key: block[key] for key in TOP_KEYS if key not in ("columns", "tags", "file_sha1")}
    assert {key: getattr(entry, key) for key in expected} == expected


def test_both_generations_name_the_keys_of_a_message(tmp_path: Path):
    old = {"file_name": "f", "formatting": "sharegpt", "columns": {"role": "who", "content": "text"}}
    new = {"file_name": "f", "formatting": "sharegpt", "tags": {"role_tag": "who", "content_tag": "text"}}
    assert read_one(tmp_path, old).tags == read_one(tmp_path, new).tags == Tags(role_tag="who", content_tag="text")
    both = {"file_name": "f", "columns": {"role": "who"}, "tags": {"role_tag": "who"}}
    assert read_one(tmp_path, both).tags.role_tag == "who"
    both["tags"]["role_tag"] = "sender"
    assert mistake(tmp_path, both) == (
        "'columns.role' is 'who' and 'tags.role_tag' is 'sender'; they mean the same, remove one"
    )


@given(listed=st.dictionaries(st.sampled_from(sorted(vars(Columns()))), st.text("abcxyz", min_size=1), max_size=9))
def test_columns_that_are_not_listed_are_absent(tmp_path_factory: pytest.TempPathFactory, listed: dict):
    folder = tmp_path_factory.mktemp("registry")
    columns = read_one(folder, {"file_name": "f", "columns": listed}).columns
    content = ("prompt", "query", "response")
    absent = dict.fromkeys(content) if set(content) & listed.keys() else {}
    assert vars(columns) == {**vars(Columns()), **absent, **listed}


def test_an_unlisted_input_column_is_not_read(tmp_path: Path):
    columns = read_one(tmp_path, {"file_name": "f", "columns": {"prompt": "question", "response": "answer"}}).columns
    assert (columns.prompt, columns.query, columns.response) == ("question", None, "answer")


def test_openai_messages_have_their_own_defaults(tmp_path: Path):
    entry = read_one(tmp_path, {"file_name": "f", "formatting": "openai", "tags": {"user_tag": "human"}})
    assert entry.columns.messages == "messages"
    assert (entry.tags.role_tag, entry.tags.content_tag, entry.tags.user_tag) == ("role", "content", "human")


@pytest.mark.parametrize(
    "block",
    [
        "x",
        {"file_name": "f", "formatting": "chatml"},
        {"file_name": "f", "own": 1},
        {"file_name": "f", "file_sha1": "1"},
    ],
)
def test_an_entry_that_is_wrong_blocks_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture, block: object):
    write_registry(tmp_path, {"_comment": "ours", "good": {"file_name": "f"}, "other": block})
    registry = read_registry(tmp_path)
    check_kind(registry["good"], "multi-turn")
    (warning,) = caplog.records
    assert "data set 'other'" in warning.getMessage() and "cannot be used" in warning.getMessage()
    with pytest.raises(UserError, match="data set 'other'"):
        check_kind(registry["other"], "multi-turn")


@pytest.mark.parametrize("nothing", [None, ""])
def test_null_and_empty_text_mean_not_set(tmp_path: Path, nothing: str | None):
    block = {"file_name": "f", "file_sha1": nothing, "subset": nothing, "hf_hub_url": nothing}
    entry = read_one(tmp_path, {**block, "columns": {"query": nothing}})
    assert (entry.file_sha1, entry.subset, entry.origin) == (None, None, "file")
    assert entry.columns == Columns(query=None)


HF, MS, SCRIPT, FILE = {"hf_hub_url": "a"}, {"ms_hub_url": "b"}, {"script_url": "c"}, {"file_name": "d"}


@pytest.mark.parametrize(
    ("block", "variable", "origin"),
    [
        (HF | MS | SCRIPT | FILE, None, "hf_hub"),
        (HF | MS, "0", "hf_hub"),
        (HF | MS, "1", "ms_hub"),
        (HF | MS | FILE, "true", "ms_hub"),
        (HF | SCRIPT | FILE, "1", "hf_hub"),
        (MS | SCRIPT | FILE, None, "ms_hub"),
        (SCRIPT | FILE, None, "script"),
        (FILE, "1", "file"),
    ],
)
def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: dict, variable: str | None, origin: str):
    monkeypatch.delenv("USE_MODELSCOPE_HUB", raising=False)
    if variable is not None:
        monkeypatch.setenv("USE_MODELSCOPE_HUB", variable)
    assert read_one(tmp_path, block).origin == origin


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_encodings(tmp_path: Path, encoding: str):
    (tmp_path / "dataset_info.json").write_text('{"宝可梦": {"file_name": "数据.json"}}', encoding=encoding)
    assert read_registry(tmp_path)["宝可梦"].file_name == "数据.json"


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"file_nam": "a"}, "key 'file_nam' is unknown; did you mean 'file_name'?"),
        ({"file_name": "a", "Ranking": True}, "key 'Ranking' is unknown; did you mean 'ranking'?"),
        ({"file_name": "a", "columns": {"promt": "q"}}, "key 'columns.promt' is unknown; did you mean 'prompt'?"),
        ({"file_name": "a", "tags": {"usr_tag": "q"}}, "key 'tags.usr_tag' is unknown; did you mean 'user_tag'?"),
        ({"file_name": "a", "prompt": "q"}, "key 'prompt' is unknown; it belongs into 'columns'"),
        ({"file_name": "a", "columns": {"user_tag": "q"}}, "key 'columns.user_tag' is unknown; it belongs into 'tags'"),
        (
            {"file_name": "a", "tags": {"split": "q"}},
            "key 'tags.split' is unknown; it belongs directly into the entry",
        ),
        ({"file_name": "a", "tags": {"zzz": "q"}}, f"key 'tags.zzz' is unknown; use {', '.join(TAG_KEYS)}"),
        ({"file_name": 3}, "'file_name' must be a text, got 3"),
        ({"file_name": ["a"]}, "'file_name' must be a text, got [\"a\"]"),
        ({"file_name": "a", "ranking": "true"}, "'ranking' must be true or false, got \"true\""),
        ({"file_name": "a", "num_samples": 0}, "'num_samples' must be a whole number from 1, got 0"),
        ({"file_name": "a", "num_samples": True}, "'num_samples' must be a whole number from 1, got true"),
        ({"file_name": "a", "num_samples": 1.5}, "'num_samples' must be a whole number from 1, got 1.5"),
        ({"file_name": "a", "columns": []}, "'columns' must be an object, got []"),
        ({"file_name": "a", "tags": None}, "'tags' must be an object, got null"),
        ({"file_name": "a", "columns": {"prompt": 1}}, "'columns.prompt' must be a text or null, got 1"),
        ({"file_name": "a", "tags": {"user_tag": None}}, "'tags.user_tag' must be a text that is not empty, got null"),
        ({"file_name": "a", "columns": {"role": ""}}, "'columns.role' must be a text that is not empty, got \"\""),
        ({"file_name": "a", "file_sha1": "abc"}, "'file_sha1' must be 40 hexadecimal digits, got \"abc\""),
        (
            {"file_name": "a", "formatting": "share_gpt"},
            "formatting 'share_gpt' is unknown; use alpaca, sharegpt, openai; did you mean 'sharegpt'?",
        ),
        ({"columns": {}}, "does not say where its rows are; give file_name, script_url or hf_hub_url"),
        ({"file_name": ""}, "does not say where its rows are; give file_name, script_url or hf_hub_url"),
        ("a.json", 'expected an object, got "a.json"'),
    ],
)
def test_mistakes_in_an_entry(tmp_path: Path, block: object, message: str):
    assert mistake(tmp_path, block) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", 'expected an object {"NAME": {...}, ...}, got []'),
        ('{"a": {"file_name": "x"}, "a": {"file_name": "y"}}', "'a' stands twice in one object; remove or rename one"),
        (
            '{"a": {"file_name": "x", "file_name": "y"}}',
            "'file_name' stands twice in one object; remove or rename one",
        ),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, message: str):
    path = write_registry(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_registry(tmp_path)
    assert str(caught.value) == f"{path}: {message}"


def test_json_that_is_none(tmp_path: Path):
    path = write_registry(tmp_path, '{"a": {"file_name": "x"},\n}')
    with pytest.raises(UserError, match=f"^{path} line [12]: not valid JSON: .*; repair it there$"):
        read_registry(tmp_path)


def test_keys_of_other_programs_bar_their_entry_alone(tmp_path: Path):
    write_registry(
        tmp_path,
        {
            "pictures": {"file_name": "p.json", "columns": {"images": "images"}},
            "cloud": {"cloud_file_name": "s3://a"},
            "both": {"hf_hub_url": "a/b", "om_hub_url": "c/d"},
            "text": {"file_name": "t.json"},
        },
    )
    registry = read_registry(tmp_path)
    check_kind(registry["text"], "multi-turn")
    check_kind(registry["both"], "multi-turn")
    with pytest.raises(UserError, match=r"data set 'pictures': 'columns\.images': ChatGLM3 reads text alone$"):
        check_kind(registry["pictures"], "multi-turn")
    with pytest.raises(UserError, match="'cloud_file_name': cloud storage is not served; download the file"):
        check_kind(registry["cloud"], "multi-turn")


# ---------------------------------------------------------------- names, folders, stages


def test_names_of_data_sets(tmp_path: Path):
    path = write_registry(tmp_path, {name: {"file_name": "f"} for name in ("pokemon", "pokemon_tools", "alpaca")})
    registry = read_registry(tmp_path)
    assert [entry.name for entry in choose_entries(registry, " alpaca , pokemon,")] == ["alpaca", "pokemon"]
    assert choose_entries(registry, ["alpaca"]) == [registry["alpaca"]]
    with pytest.raises(UserError) as caught:
        choose_entries(registry, "alpaca,pokemn")
    assert str(caught.value) == (
        f"{path}: data set 'pokemn' is unknown; did you mean 'pokemon' or 'pokemon_tools'? "
        "(it has pokemon, pokemon_tools, alpaca)"
    )
    with pytest.raises(UserError, match=r"'alpaca' is named twice; to use it more often, set num_samples in "):
        choose_entries(registry, "alpaca,alpaca")
    with pytest.raises(UserError, match="no data set is named; use pokemon, pokemon_tools, alpaca"):
        choose_entries(registry, " ,")


def test_folder_of_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert find_dataset_dir(None) == OWN
    (tmp_path / "data").mkdir()
    assert find_dataset_dir(None) == OWN
    with pytest.raises(UserError, match=r"--dataset_dir data has no dataset_info\.json .*name the folder of one"):
        find_dataset_dir("data")
    with pytest.raises(UserError, match=r"--dataset_dir dat is no folder with a dataset_info\.json"):
        read_registry("dat")
    write_registry(tmp_path / "data", "{}")
    assert find_dataset_dir(None) == Path("data")
    assert find_dataset_dir(OWN) == OWN


def test_stages_that_an_entry_serves(tmp_path: Path):
    ranking = read_one(tmp_path, {"file_name": "a", "ranking": True})
    assert ranking.stages == ("rm", "dpo")
    assert read_one(tmp_path, {"file_name": "a", "ranking": True, "formatting": "sharegpt"}).stages == ("rm", "dpo")
    chat = read_one(tmp_path, {"file_name": "a", "formatting": "sharegpt"})
    assert chat.stages == ("sft", "ppo")
    alpaca = read_one(tmp_path, {"file_name": "a"})
    assert alpaca.stages == ("pt", "sft", "ppo")
    for entry in (ranking, chat, alpaca):
        for stage in entry.stages:
            check_kind(entry, STAGE_KINDS[stage])


@pytest.mark.parametrize(
    ("block", "kind", "message"),
    [
        (
            {},
            "preference",
            "serves the stages pt, sft, ppo and not rm or dpo: ranking is false: it has no better and worse replies. "
            "If it has, set ranking to true",
        ),
        (
            {"ranking": True},
            "text",
            "serves the stages rm, dpo and not pt: ranking is true: its rows are pairs of replies. If they are not, "
            "set ranking to false",
        ),
        (
            {"formatting": "sharegpt"},
            "text",
            "serves the stages sft, ppo and not pt: formatting is sharegpt. For text, use formatting alpaca and name "
            "the text's column in columns.prompt",
        ),
    ],
)
def test_a_stage_that_does_not_fit(tmp_path: Path, block: dict, kind: str, message: str):
    entry = read_one(tmp_path, {"file_name": "a", **block})
    with pytest.raises(UserError) as caught:
        check_kind(entry, kind)
    assert str(caught.value) == f"{tmp_path / 'dataset_info.json'}: data set 'x' {message}"


# ---------------------------------------------------------------- the registry that comes along


def test_own_registry_has_the_pokemon_data_and_a_sample_of_every_format():
    registry = read_registry(OWN)
    stages = {name: entry.stages for name, entry in registry.items()}
    assert stages["pokemon"] == stages["pokemon_validation"] == stages["pokemon_tools"] == ("sft", "ppo")
    assert stages["pokemon_preference"] == stages["pokemon_preference_validation"] == ("rm", "dpo")
    assert "pt" in stages["pokemon_text"]
    samples = {
        "alpaca_sample": ("alpaca", False),
        "alpaca_history_sample": ("alpaca", False),
        "sharegpt_sample": ("sharegpt", False),
        "preference_sample": ("alpaca", True),
        "preference_pairs_sample": ("alpaca", True),
        "sharegpt_preference_sample": ("sharegpt", True),
        "pretraining_sample": ("alpaca", False),
        "function_call_sample": ("sharegpt", False),
        "oasst1_sample": ("sharegpt", False),
    }
    assert {name: (registry[name].formatting, registry[name].ranking) for name in samples} == samples
    assert {entry.origin for entry in registry.values()} == {"file", "script", "hf_hub"}
    assert {"function_call", "alpaca_gpt4_en", "alpaca_gpt4_zh"} <= set(registry), "the document's command names these"


def test_the_readme_explains_every_key_and_names_every_data_set():
    text = (OWN / "README.md").read_text(encoding="utf-8")
    missing = [key for key in (*TOP_KEYS, *COLUMN_KEYS, *TAG_KEYS, *read_registry(OWN)) if f"`{key}`" not in text]
    assert missing == []
