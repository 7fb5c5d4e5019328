"""Formats: rows of alpaca, sharegpt, preference, pre-training and tool-call data become exact canonical records."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_chatmodel_demo.conversation.formats import convert_row
from finetune_chatmodel_demo.conversation.records import (
    RecordError,
    read_records,
    validate_preference,
    validate_record,
    validate_text,
)
from finetune_chatmodel_demo.conversation.registry import Columns, DatasetEntry, Tags
from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL, render_conversation

REGISTRY = Path("dataset_info.json")
MESSAGE_TAGS = Tags(role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant")
CALL = '{"name": "pokedex", "arguments": {"name": "皮卡丘", "attribute": "身高"}}'
TOOLS = [{"name": "pokedex", "description": "图鉴", "parameters": {"name": "宝可梦"}}]

texts = st.text(min_size=1, max_size=12).filter(
    lambda text: text.strip() and not any("\ud800" <= c < "\ue000" for c in text)
)


def entry(**keys: Any) -> DatasetEntry:
    return DatasetEntry(name="x", registry=REGISTRY, file_name="f", **keys)


def alpaca(row: dict, kind: str = "multi-turn", ranking: bool = False, **columns: str | None) -> dict:
    record = convert_row(row, entry(columns=Columns(**columns), ranking=ranking), kind, "f line 1")
    validate_record(record, kind, "f line 1")
    return record


def sharegpt(row: dict, kind: str = "multi-turn", tags: Tags | None = None, **columns: str | None) -> dict:
    given_entry = entry(formatting="sharegpt", columns=Columns(**columns), tags=tags or Tags())
    record = convert_row(row, given_entry, kind, "f line 1")
    validate_record(record, kind, "f line 1")
    return record


def chat(*messages: str) -> list[dict[str, str]]:
    """`chat("human 问", "gpt 答")`: messages of the default tags."""
    return [dict(zip(("from", "value"), message.split(" ", 1))) for message in messages]


def turns(*messages: str) -> list[dict[str, str]]:
    """`turns("user 问", "assistant 答")`: canonical messages."""
    return [dict(zip(("role", "content"), message.split(" ", 1))) for message in messages]


def complaint(convert: Any, *arguments: Any, **keys: Any) -> str:
    """What a bad row's error says behind its place."""
    with pytest.raises(RecordError) as caught:
        convert(*arguments, **keys)
    assert str(caught.value).startswith("f line 1: ")
    return str(caught.value).removeprefix("f line 1: ")


# ---------------------------------------------------------------- alpaca


def test_alpaca_joins_prompt_and_query_by_a_newline():
    row = {"instruction": "翻译", "input": "你好", "output": "hello"}
    assert alpaca(row) == {"conversations": turns("user 翻译\n你好", "assistant hello")}


@pytest.mark.parametrize("blank", [{}, {"input": ""}, {"input": None}, {"input": " \n"}])
def test_alpaca_without_a_query_has_no_newline(blank: dict):
    assert alpaca({"instruction": "问", "output": "答", **blank}) == {"conversations": turns("user 问", "assistant 答")}


def test_alpaca_system_history_and_tools():
    row = {
        "instruction": "三",
        "output": "丙",
        "system": "你是助手。",
        "history": [["一", "甲"], ["二", "乙"]],
        "tools": json.dumps(TOOLS, ensure_ascii=False),
    }
    assert alpaca(row, system="system", history="history", tools="tools") == {
        "tools": TOOLS,
        "conversations": turns(
            "system 你是助手。", "user 一", "assistant 甲", "user 二", "assistant 乙", "user 三", "assistant 丙"
        ),
    }


@pytest.mark.parametrize("blank", [None, "", []])
def test_alpaca_blank_history_system_and_tools(blank: Any):
    row = {"instruction": "问", "output": "答", "history": blank, "system": blank or None, "tools": blank}
    record = alpaca(row, system="system", history="history", tools="tools")
    assert record == {"conversations": turns("user 问", "assistant 答")}


def test_every_turn_of_the_history_is_trained(tokenizer):
    """All replies have labels, and so has what ends each; questions have none."""
    row = {"instruction": "颜色？", "output": "黄色。", "history": [["属性？", "电。"], ["身高？", "0.4米。"]]}
    rendering = render_conversation(tokenizer, alpaca(row, history="history"))
    supervised = [label for label in rendering.labels if label != IGNORED_LABEL]
    bounds = [*rendering.turn_starts, len(rendering.input_ids) - 1]
    replies = [rendering.input_ids[bounds[turn] + 1 : bounds[turn + 1] + 1] for turn in (1, 3, 5)]
    assert supervised == [token for reply in replies for token in reply]


@given(
    rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), query=st.none() | texts, system=st.none() | texts
)
def test_alpaca_round_trip(rows: list[tuple[str, str]], query: str | None, system: str | None):
    """Every text of a row comes back unaltered, in order, and the loss is on for all replies."""
    *history, (prompt, response) = rows
    row = {"instruction": prompt, "input": query, "output": response, "system": system, "history": history}
    messages = alpaca(row, history="history", system="system")["conversations"]
    if system is not None:
        assert messages.pop(0) == {"role": "system", "content": system}
    asked = [message["content"] for message in messages[::2]]
    assert asked == [question for question, _ in history] + [prompt if query is None else f"{prompt}\n{query}"]
    assert [message["content"] for message in messages[1::2]] == [answer for _, answer in rows]
    assert {message["role"] for message in messages[1::2]} == {"assistant"}
    assert not any("loss" in message for message in messages)


def test_alpaca_with_columns_of_its_own():
    row = {"问": "a", "补充": "b", "答": "c", "instruction": "unused"}
    assert alpaca(row, prompt="问", query="补充", response="答") == {"conversations": turns("user a\nb", "assistant c")}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "", "output": "a"}, "'instruction' is empty; a prompt needs text"),
        ({"instruction": "a", "output": " \n"}, "'output' is empty; a reply needs text"),
        ({"instruction": "a", "output": 0.7}, "'output' must be a text, got 0.7"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "'input' must be a text, got [\"b\"]"),
        (
            {"question": "a", "output": "b"},
            "column 'instruction' is missing; found 'question', 'output'. If one of them is meant, name it in "
            "'columns.prompt' of 'x' in dataset_info.json",
        ),
        (
            {"instruction": "a", "output": None},
            "column 'output' is null; found 'instruction', 'output'. If one of them is meant, name it in "
            "'columns.response' of 'x' in dataset_info.json",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"], ["e"]]},
            "'history[1]' must be a list [instruction, reply], got [\"e\"]",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["c", ""]]},
            "'history[0]' has an empty reply; fill it in, or leave the whole turn out",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["", "c"]]},
            "'history[0]' has an empty instruction; fill it in, or leave the whole turn out",
        ),
        ({"instruction": "a", "output": "b", "history": [["c", 4]]}, "'history[0][1]' must be a text, got 4"),
        ({"instruction": "a", "output": "b", "history": {"c": "d"}}, '\'history\' must be a list, got {"c": "d"}'),
        (
            {"instruction": "a", "output": "b", "history": "[c"},
            "'history' must be a list or JSON text of one, got \"[c\" (Expecting value at character 2)",
        ),
        ({"instruction": "a", "output": "b", "tools": "5"}, "'tools' must be a list, got \"5\""),
    ],
)
def test_alpaca_mistakes(row: dict, message: str):
    assert complaint(alpaca, row, history="history", tools="tools") == message


def test_a_row_that_is_no_object():
    assert complaint(alpaca, ["a", "b"]) == 'expected an object with the columns of \'x\', got ["a", "b"]'


def test_a_column_that_is_switched_off_but_needed():
    message = complaint(alpaca, {"instruction": "a"}, response=None)
    assert message == "'columns.response' is not set for 'x' in dataset_info.json; name the column"


# ---------------------------------------------------------------- pre-training


def test_pretraining_takes_the_prompt_column_alone():
    assert alpaca({"text": "第一段。\n第二段。", "input": "b", "output": "c"}, "text", prompt="text") == {
        "text": "第一段。\n第二段。"
    }
    assert complaint(alpaca, {"text": "  "}, "text", prompt="text") == "'text' is empty; a prompt needs text"


# ---------------------------------------------------------------- preference


def test_preference_as_a_list_of_two():
    row = {"instruction": "问", "input": "补充", "output": ["好", "坏"], "system": "你是助手。"}
    assert alpaca(row, "preference", ranking=True, system="system") == {
        "conversations": turns("system 你是助手。", "user 问\n补充"),
        "chosen": {"role": "assistant", "content": "好"},
        "rejected": {"role": "assistant", "content": "坏"},
    }


def test_preference_in_two_columns():
    row = {"instruction": "问", "good": "好", "bad": "坏", "output": "unused"}
    assert alpaca(row, "preference", ranking=True, chosen="good", rejected="bad") == {
        "conversations": turns("user 问"),
        "chosen": {"role": "assistant", "content": "好"},
        "rejected": {"role": "assistant", "content": "坏"},
    }


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (
            {"output": "好"},
            {},
            "'output' must be a list or JSON text of one, got \"好\" (Expecting value at character 1)",
        ),
        (
            {"chosen": "好", "rejected": "坏"},
            {},
            "the pair is not in 'output'; to read the columns 'chosen' and 'rejected', list both in 'columns' of 'x' "
            "in dataset_info.json",
        ),
        ({"output": ["好"]}, {}, "'output' must be a list of two replies, the better one first, got 1"),
        ({"output": ["a", "b", "c"]}, {}, "'output' must be a list of two replies, the better one first, got 3"),
        ({"output": ["a", " "]}, {}, "'output[1]' is empty; a reply needs text"),
        ({"output": [1, "b"]}, {}, "'output[0]' must be a text, got 1"),
        ({"output": ["a", "a"]}, {}, "'chosen' and 'rejected' are the same; there is nothing to prefer"),
        (
            {"chosen": "a"},
            {"chosen": "chosen"},
            "'columns.rejected' is not set for 'x' in dataset_info.json; name the column",
        ),
        (
            {"chosen": "a", "rejected": ""},
            {"chosen": "chosen", "rejected": "rejected"},
            "'rejected' is empty; a reply needs text",
        ),
    ],
)
def test_preference_mistakes(row: dict, columns: dict, message: str):
    assert complaint(alpaca, {"instruction": "问", **row}, "preference", ranking=True, **columns) == message


PAIR = {"chosen": "chosen", "rejected": "rejected"}


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ({"from": "gpt", "value": "好"}, {"from": "gpt", "value": "坏"}),
        ("好", "坏"),
        ([{"from": "gpt", "value": "好"}], ["坏"]),
        ('{"from": "gpt", "value": "好"}', '{"from": "gpt", "value": "坏"}'),
    ],
)
def test_sharegpt_pairs_are_messages_or_texts(chosen: Any, rejected: Any):
    row = {"conversations": chat("human 一", "gpt 甲", "human 二"), "chosen": chosen, "rejected": rejected}
    assert sharegpt(row, "preference", **PAIR) == {
        "conversations": turns("user 一", "assistant 甲", "user 二"),
        "chosen": {"role": "assistant", "content": "好"},
        "rejected": {"role": "assistant", "content": "坏"},
    }


def test_sharegpt_pair_of_a_call_and_a_text():
    row = {
        "conversations": chat("human 多高？"),
        "chosen": {"from": "function_call", "value": CALL},
        "rejected": {"from": "gpt", "value": "{不是 JSON"},
    }
    record = sharegpt(row, "preference", **PAIR)
    assert record["chosen"] == {
        "role": "tool",
        "name": "pokedex",
        "parameters": {"name": "皮卡丘", "attribute": "身高"},
    }
    assert record["rejected"] == {"role": "assistant", "content": "{不是 JSON"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"conversations": chat("human 一", "gpt 甲"), "chosen": "a", "rejected": "b"},
            "conversations: the conversation ends with 'gpt' at place 2; expected 'human' or 'observation' at its end, "
            "for 'chosen' and 'rejected' to follow",
        ),
        (
            {"conversations": chat("human 一"), "chosen": chat("human a")[0], "rejected": "b"},
            "chosen: expected 'gpt' or 'function_call', got 'human'",
        ),
        (
            {"conversations": chat("human 一"), "chosen": "a", "rejected": chat("human 一", "gpt b")},
            "rejected: expected one reply, got a list of 2; the messages that both replies follow belong into the "
            "column of messages",
        ),
        ({"conversations": chat("human 一"), "chosen": "a", "rejected": ""}, "rejected is empty; a reply needs text"),
        (
            {"conversations": chat("human 一"), "chosen": "a", "rejected": 5},
            'rejected: expected a message {"from": ..., "value": ...}, got 5',
        ),
    ],
)
def test_sharegpt_pair_mistakes(row: dict, message: str):
    assert complaint(sharegpt, row, "preference", **PAIR) == message


# ---------------------------------------------------------------- sharegpt


def test_sharegpt_with_its_system_prompt_in_a_column_or_in_front():
    expected = {"conversations": turns("system 你是助手。", "user 一", "assistant 甲", "user 二", "assistant 乙")}
    spoken = chat("human 一", "gpt 甲", "human 二", "gpt 乙")
    in_front = [*chat("system 你是助手。"), *spoken]
    assert sharegpt({"conversations": spoken, "system": "你是助手。"}, system="system") == expected
    assert sharegpt({"conversations": in_front}) == expected
    assert sharegpt({"conversations": in_front, "system": ""}, system="system") == expected
    assert sharegpt({"conversations": in_front, "system": "你是助手。"}, system="system") == expected
    assert complaint(sharegpt, {"conversations": in_front, "system": "别的"}, system="system") == (
        "two system prompts, in the column 'system' and in the first message; keep one"
    )


def test_sharegpt_with_tags_of_its_own():
    row = {"messages": [{"role": "user", "content": "一"}, {"role": "assistant", "content": "甲"}]}
    assert sharegpt(row, messages="messages", tags=MESSAGE_TAGS) == {"conversations": turns("user 一", "assistant 甲")}


def test_loss_of_a_message_is_kept():
    row = {"conversations": [{"from": "human", "value": "一"}, {"from": "gpt", "value": "甲", "loss": False}]}
    assert sharegpt(row)["conversations"][1] == {"role": "assistant", "content": "甲", "loss": False}


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS, ensure_ascii=False)])
@pytest.mark.parametrize("call", [CALL, json.loads(CALL), f"[{CALL}]"])
def test_a_call_and_its_observation_become_one_message(tools: Any, call: Any):
    spoken = chat("human 多高？", "function_call ", "observation 0.4米", "gpt 0.4米。")
    spoken[1]["value"] = call
    assert sharegpt({"conversations": spoken, "tools": tools}, tools="tools") == {
        "tools": TOOLS,
        "conversations": [
            {"role": "user", "content": "多高？"},
            {
                "role": "tool",
                "name": "pokedex",
                "parameters": {"name": "皮卡丘", "attribute": "身高"},
                "observation": "0.4米",
            },
            {"role": "assistant", "content": "0.4米。"},
        ],
    }


def test_a_conversation_that_ends_with_a_call_stops_for_the_observation(tokenizer):
    """The label behind the call is `<|observation|>`, and nothing behind it counts."""
    record = sharegpt({"conversations": chat("human 多高？", f"function_call {CALL}")})
    assert record["conversations"][1]["observation"] == ""
    rendering = render_conversation(tokenizer, record)
    start = rendering.turn_starts[-1]
    assert rendering.labels[start] == tokenizer.get_command("<|observation|>")
    assert set(rendering.labels[start + 1 :]) == {IGNORED_LABEL}


def test_an_observation_without_a_call_is_a_message():
    row = {"conversations": chat("human 一", "gpt 甲", "observation 二", "gpt 乙")}
    assert sharegpt(row)["conversations"][2] == {"role": "observation", "content": "二"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "conversations: there is no message (of 'human')"),
        (chat("system 只有"), "conversations: there is no message (of 'human')"),
        (
            chat("human 一", "human 二"),
            "conversations[1]: expected 'gpt' or 'function_call' at the even place 2, got 'human'",
        ),
        (chat("gpt 甲"), "conversations[0]: expected 'human' or 'observation' at the odd place 1, got 'gpt'"),
        (
            chat("system 系", "human 一", "gpt 甲", "gpt 乙"),
            "conversations[3]: expected 'human' or 'observation' at the odd place 3, got 'gpt'",
        ),
        (
            chat("human 一", "gpt 甲", "system 系"),
            "conversations[2]: expected 'human' or 'observation' at the odd place 3, got 'system'",
        ),
        (
            chat("human 一", "gpt 甲", "human 二"),
            "conversations: the conversation ends with 'human' at place 3; expected 'gpt' or 'function_call' at its "
            "end",
        ),
        (
            chat("human 一", f"function_call {CALL}", "human 二", "gpt 乙"),
            "conversations[2]: expected 'observation' behind 'function_call', got 'human'",
        ),
        (
            chat("user 一", "assistant 甲"),
            "conversations[0]: role 'user' is unknown; this data set has system, human, observation, gpt, "
            "function_call. If others are meant, name them in 'tags' of its entry",
        ),
        (chat("human 一", "gpt "), "conversations[1]: the content of 'gpt' is empty; a message needs text"),
        (
            [{"from": "human", "value": 3}],
            "conversations[0]: the content of 'human' must be a text, got 3",
        ),
        (
            [{"role": "user", "content": "一"}],
            "conversations[0]: key 'from' is missing; found 'role', 'content'. If one of them is meant, name it as "
            "'role_tag' in 'tags' of the entry",
        ),
        (["一"], 'conversations[0]: expected a message {"from": ..., "value": ...}, got "一"'),
        (
            chat("human 一", "function_call 多高"),
            'conversations[1]: expected a call {"name": ..., "arguments": {...}} as JSON, got "多高" (Expecting value '
            "at character 1)",
        ),
        (
            chat("human 一", 'function_call {"name": "f"}'),
            'conversations[1]: key \'arguments\' is missing in the call "{\\"name\\": \\"f\\"}"; expected a call '
            '{"name": ..., "arguments": {...}}',
        ),
        (
            chat("human 一", f"function_call [{CALL}, {CALL}]"),
            "conversations[1]: 2 calls in one message; ChatGLM3 makes one at a time, give each its own",
        ),
    ],
)
def test_broken_conversations(messages: list, message: str):
    assert complaint(sharegpt, {"conversations": messages}) == message


@given(
    pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=5),
    cut=st.integers(1, 9),
    kind=st.sampled_from(["multi-turn", "preference"]),
)
def test_parity_decides_whether_a_conversation_is_whole(pairs: list[tuple[str, str]], cut: int, kind: str):
    """Even conversations are for sft, odd ones for pairs; every text comes back unaltered."""
    spoken = [{"from": name, "value": text} for pair in pairs for name, text in zip(("human", "gpt"), pair)][:cut]
    row = {"conversations": spoken, "chosen": "a", "rejected": "b"}
    if (len(spoken) % 2 == 0) == (kind == "multi-turn"):
        messages = sharegpt(row, kind, **PAIR)["conversations"]
        assert [message["content"] for message in messages] == [message["value"] for message in spoken]
    else:
        assert "the conversation ends with" in complaint(sharegpt, row, kind, **PAIR)


# ---------------------------------------------------------------- canonical records of the new kinds


def test_preference_records_are_checked():
    good = {"conversations": turns("user 问"), "chosen": turns("assistant 好")[0], "rejected": turns("assistant 坏")[0]}
    validate_preference(good, "f")
    tool = {"role": "tool", "name": "f", "parameters": {}}
    validate_preference({**good, "chosen": tool}, "f")
    validate_preference({**good, "conversations": turns("user 问", "assistant 答", "observation 值")}, "f")
    validate_preference({**good, "conversations": [*turns("user 问"), {**tool, "observation": "值"}]}, "f")
    for change, message in [
        ({"chosen": turns("user 好")[0]}, "f: chosen: role 'user' does not reply; use assistant or tool"),
        ({"chosen": good["rejected"]}, "f: 'chosen' and 'rejected' are the same; there is nothing to prefer"),
        ({"chosen": "好"}, "f: 'chosen' must be an object, got a string \"好\""),
        ({"conversations": []}, "f: 'conversations' is empty; expected at least one message"),
        (
            {"conversations": turns("user 问", "assistant 答")},
            "f: 'conversations' ends with role 'assistant'; expected user or observation, since 'chosen' and "
            "'rejected' are what follows",
        ),
        (
            {"conversations": [*turns("user 问"), tool]},
            "f: conversations[1]: key 'observation' is missing; found 'role', 'name', 'parameters'",
        ),
    ]:
        with pytest.raises(RecordError) as caught:
            validate_preference({**good, **change}, "f")
        assert str(caught.value) == message
    with pytest.raises(RecordError, match="did you mean 'rejected' where it says 'worse'"):
        validate_preference({**{k: good[k] for k in ("conversations", "chosen")}, "worse": good["rejected"]}, "f")


def test_text_records_are_checked():
    validate_text({"text": "一"}, "f")
    for record, message in [
        ({"text": " "}, "f: 'text' is empty"),
        ({"text": 3}, "f: 'text' must be a string, got a number 3"),
        ({"content": "一"}, "f: key 'text' is missing; found 'content'; did you mean 'text' where it says 'content'?"),
        ("一", 'f: expected an object {"text": ...}, got a string "一"'),
        ({"text": "\ud83d"}, "f: 'text' holds '\\ud83d' at character 1, half of a character; remove it"),
    ]:
        with pytest.raises(RecordError) as caught:
            validate_text(record, "f")
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (
            "preference",
            {
                "conversations": turns("user 问"),
                "chosen": turns("assistant 好")[0],
                "rejected": turns("assistant 坏")[0],
            },
            {"conversations": turns("user 问"), "chosen": turns("assistant 好")[0]},
        ),
        ("text", {"text": "一"}, {"text": ""}),
    ],
)
def test_canonical_files_of_the_new_kinds(tmp_path: Path, kind: str, good: dict, bad: dict):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (good, bad, good)), encoding="utf-8")
    records = read_records(path, kind, on_bad_record="skip")
    assert list(records) == [good, good]
    assert (records.bad_count, len(records.bad_messages)) == (1, 1)
    assert records.bad_messages[0].startswith(f"{path} line 2: ")
    with pytest.raises(RecordError, match="line 2"):
        list(read_records(path, kind))
