"""Data files of other projects: each is told by its keys and becomes the record, and the ids, that it means."""

import json
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY
from conversation_helpers import assistant, conversation, message, pair, user, write_jsonl

from finetune_chatmodel_demo.chatglm3 import load_tokenizer
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation import read_records, render_conversation
from finetune_chatmodel_demo.conversation.file_formats import FORMATTINGS, tell_formatting
from finetune_chatmodel_demo.conversation.render import render_pair

CORPORA = Path(__file__).parent / "corpora"
EXPECTED_IDS = json.loads((CORPORA / "expected_ids.json").read_text(encoding="utf-8"))
SYSTEM = message("system", "你是图鉴。")
FIRST = [user("皮卡丘是什么属性？"), assistant("电属性。")]
SECOND = [user("它的弱点呢？"), assistant("地面属性。")]
TOOL = {"name": "look_up", "description": "查图鉴", "parameters": {"name": {"type": "string"}}}


def call(name: str, observation: str) -> dict:
    return {"role": "tool", "name": "look_up", "parameters": {"name": name}, "observation": observation}


RECORDS = {
    "conversations.jsonl": [
        conversation(SYSTEM, *FIRST, *SECOND),
        conversation(
            SYSTEM, FIRST[0], assistant("电属性。", loss=False), SECOND[0], assistant("地面属性。", loss=True)
        ),
    ],
    "official_tools.jsonl": [
        conversation(
            message("system", "请查图鉴。", tools=[TOOL]),
            FIRST[0],
            assistant("```python\ntool_call(name='皮卡丘')\n```", metadata="look_up"),
            message("observation", "电"),
            FIRST[1],
        ),
        conversation(FIRST[0], call("皮卡丘", "电"), FIRST[1], tools=[TOOL]),
        conversation(*FIRST),
    ],
    "prompt_history.jsonl": [conversation(SYSTEM, *FIRST, *SECOND), conversation(*FIRST)],
    "alpaca.json": [
        conversation(user("说出属性。\n皮卡丘"), assistant("电")),
        conversation(*FIRST),
        conversation(SYSTEM, *FIRST, *SECOND),
    ],
    "sharegpt.jsonl": [
        conversation(SYSTEM, *FIRST),
        conversation(FIRST[0], call("皮卡丘", "电"), FIRST[1], tools=[TOOL]),
    ],
    "openai.jsonl": [
        conversation(
            SYSTEM,
            user("皮卡丘和小火龙？"),
            call("皮卡丘", "电"),
            call("小火龙", "火"),
            assistant("电和火。"),
            tools=[TOOL],
        ),
        conversation(*FIRST),
    ],
    "xtuner.json": [conversation(SYSTEM, *FIRST, *SECOND)],
    "firefly.jsonl": [conversation(*FIRST, *SECOND)],
    "swift.jsonl": [conversation(SYSTEM, *FIRST, *SECOND)],
    "pairs.jsonl": [pair(FIRST[:1], "电属性。", "火属性。")] * 5,
}


def test_the_table_of_formats_has_an_example_of_each():
    text = (REPOSITORY / "data_processing" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| `(\{.*\})` \|$", text, flags=re.M)
    assert {name for name, _ in rows} == set(FORMATTINGS)
    for name, example in rows:
        assert tell_formatting(json.loads(example.replace(", …", ""))) == name, example


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_tokenizer(tiny_folder)


def kind_of(name: str) -> str:
    return "preference" if name == "pairs.jsonl" else "multi-turn"


def test_every_file_has_its_expectation():
    assert {path.name for path in CORPORA.iterdir()} == {*RECORDS, "kto.jsonl", "expected_ids.json"}
    assert set(EXPECTED_IDS) == set(RECORDS)


@pytest.mark.parametrize("name", RECORDS)
def test_records(name):
    assert list(read_records(CORPORA / name, kind_of(name))) == RECORDS[name]


@pytest.mark.parametrize("name", RECORDS)
def test_ids(name, tiny):
    rows = []
    for record in read_records(CORPORA / name, kind_of(name)):
        if name == "pairs.jsonl":
            rows.append(render_pair(tiny, record, "chatglm3", 999).parts)
        else:
            rendering = render_conversation(tiny, record)
            rows.append([rendering.input_ids, rendering.labels])
    assert rows == EXPECTED_IDS[name]


def test_tools_inside_the_system_message_are_what_the_tokenizer_writes(tiny):
    """The official form: training reads what `build_chat_input` reads."""
    (record, *_) = read_records(CORPORA / "official_tools.jsonl")
    messages = record["conversations"]
    prompt = tiny.build_chat_input("皮卡丘是什么属性？", history=messages[:1])["input_ids"][0].tolist()
    assert render_conversation(tiny, record).input_ids[: len(prompt)] == prompt
    assert '"name": "look_up"' in tiny.decode(prompt)


@pytest.mark.parametrize("empty", ["", " ", [], None, "[]"])
def test_no_tools(tmp_path, empty):
    record = conversation(message("system", "s", tools=empty), *FIRST, tools=empty)
    (found,) = read_records(write_jsonl(tmp_path / "x.jsonl", [record]))
    assert found == conversation(message("system", "s"), *FIRST)


@pytest.mark.parametrize(
    ("formatting", "name"),
    [("openai", "openai.jsonl"), ("alpaca", "alpaca.json"), ("sharegpt", "sharegpt.jsonl"), ("swift", "swift.jsonl")],
)
def test_a_named_format_is_checked(formatting, name):
    assert list(read_records(CORPORA / name, formatting=formatting)) == RECORDS[name]
    other = next(each for each in FORMATTINGS if each != formatting)
    with pytest.raises(UserError, match=f"expected --formatting {other}, found {formatting}"):
        list(read_records(CORPORA / name, formatting=other))


def complaint(tmp_path, record: dict, kind: str = "multi-turn") -> str:
    with pytest.raises(UserError) as caught:
        list(read_records(write_jsonl(tmp_path / "x.jsonl", [record]), kind))
    return str(caught.value)


def tool_calls(*names: str) -> dict:
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in names]
    return {"role": "assistant", "content": "", "tool_calls": calls}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q", "completion": "a", "label": False}, "'label' says whether a reply is good (KTO)"),
        ({"prompt": "q", "answer": "a"}, "the reply is missing; found 'prompt', 'answer'"),
        ({"prompt": "q", "response": "a", "output": "b"}, "'response' and 'output' are both there"),
        ({"prompt": "", "response": "a"}, "'prompt' is empty"),
        ({"prompt": "q", "response": "a", "history": [["x"]]}, "history[0] must be a list [question, reply]"),
        ({"system": "s", "conversations": [message("system", "t"), *FIRST]}, "two system prompts"),
        ({"conversations": [message("user", [{"type": "image_url"}])]}, "a part that is no text"),
        ({"conversations": [user("q"), assistant("a", weight=0.5)]}, "'weight' is a number 0.5"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "'from' is a string \"robot\""),
        ({"messages": [user("q"), tool_calls("f"), user("r")]}, "messages[2]: the call of 'f' has no result"),
        ({"messages": [user("q"), tool_calls("f", "g")]}, "2 calls at the end have no result"),
        ({"conversations": FIRST, "tools": "{"}, "'tools' must be a list or JSON text of one"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, record, expected):
    assert expected in complaint(tmp_path, record)
    assert "x.jsonl line 1: " in complaint(tmp_path, record)


def test_pairs_that_cannot_be_pairs_are_named(tmp_path):
    record = {"chosen": [user("q"), assistant("a"), user("r")], "rejected": [user("q"), assistant("b")]}
    assert "part behind message 1 and go on with 2 and 1 messages" in complaint(tmp_path, record, "preference")
    assert "a list of 1 replies" in complaint(tmp_path, {"instruction": "q", "output": ["a"]}, "preference")


def test_input_output_reads_one_question_and_nothing_else(tmp_path):
    rows = [{"prompt": "q", "response": "a"}, {"instruction": "q", "input": "i", "output": "a"}]
    found = list(read_records(write_jsonl(tmp_path / "x.jsonl", rows), "input-output"))
    assert found == [rows[0], {"prompt": "q\ni", "response": "a"}]
    record = {"prompt": "q", "response": "a", "history": [["x", "y"]]}
    assert "'history' has no place in --train_format input-output" in complaint(tmp_path, record, "input-output")


def test_a_prompt_alone_is_read_for_ppo(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "q", "system": "s"}])
    assert list(read_records(path)) == [conversation(message("system", "s"), user("q"))]


def test_a_call_with_words_in_front_of_it_is_two_messages(tmp_path):
    said = tool_calls("f") | {"content": "我查一下。"}
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": [user("q"), said, message("tool", "r"), assistant("a")]}])
    expected = {"role": "tool", "name": "f", "parameters": {}, "observation": "r"}
    assert list(read_records(path)) == [conversation(user("q"), assistant("我查一下。"), expected, assistant("a"))]


@pytest.mark.parametrize("bad", ["[" * 3000 + "]" * 3000, '{"n": ' + "1" * 5000 + "}"])
def test_lines_that_no_parser_takes_are_bad_records(tmp_path, bad):
    from finetune_chatmodel_demo.conversation import RecordError, read_records

    good = '{"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    path = tmp_path / "x.jsonl"
    path.write_text(f"{good}\n{bad}\n{good}\n", encoding="utf-8")
    skipping = read_records(path, on_bad_record="skip")
    assert len(list(skipping)) == 2 and skipping.bad_count == 1 and "line 2: " in skipping.bad_messages[0]
    with pytest.raises(RecordError, match=r"line 2: .*--on_bad_record skip"):
        list(read_records(path))
