"""The templates default and raw: their bytes, labels, prompts and cuts. chatglm3 is held in test_conversation.py."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from conversation_helpers import (
    TOKENIZER,
    assistant,
    conversation,
    message,
    read_ids,
    read_targets,
    user,
    write_jsonl,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_chatmodel_demo.conversation import DataArguments, render_conversation, render_input_output, render_prompt
from finetune_chatmodel_demo.conversation.render import TEMPLATES, truncate

EOS = "<6>"
CALL = {"role": "tool", "name": "f", "parameters": {"a": 1}, "observation": {"键": 1}}
TWO_ROUNDS = conversation(message("system", "s"), user("u"), assistant("a"), user("v"), assistant("b"))
FORMATS = {"chatglm3": "multi-turn", "default": "default", "raw": "raw"}


def text_of(record: dict, template: str) -> str:
    return read_ids(render_conversation(TOKENIZER, record, template).input_ids)


def test_default_has_the_bytes_of_llama_factory():
    assert text_of(TWO_ROUNDS, "default") == (f"<1><2>s\nHuman: u\nAssistant: a{EOS}\nHuman: v\nAssistant: b{EOS}")
    rendering = render_conversation(TOKENIZER, TWO_ROUNDS, "default")
    assert read_targets(rendering) == f"a{EOS}b{EOS}"
    assert [read_ids(rendering.input_ids[start:])[:3] for start in rendering.turn_starts] == [
        "s\nH", "Hum", f"a{EOS}"[:3], "\nHu", f"b{EOS}"[:3],
    ]  # fmt: skip


def test_default_is_cut_into_llama_factorys_pieces_for_the_tokenizer(tokenizer):
    """System with its newline, the newline between rounds, a user's turn up to the blank, the reply: each alone."""
    record = conversation(
        message("system", "你是图鉴。"), user("皮卡丘？"), assistant("电。"), user("妙蛙种子？"), assistant("草。")
    )
    pieces = ["你是图鉴。\n", "Human: 皮卡丘？\nAssistant: ", "电。", "\n", "Human: 妙蛙种子？\nAssistant: ", "草。"]
    ids = [tokenizer.encode_text(piece) for piece in pieces]
    eos = [tokenizer.eos_token_id]
    start = tokenizer.get_prefix_tokens()
    rendering = render_conversation(tokenizer, record, "default")
    assert rendering.input_ids == [*start, *ids[0], *ids[1], *ids[2], *eos, *ids[3], *ids[4], *ids[5], *eos]
    masked = [-100] * len(start + ids[0] + ids[1])
    assert rendering.labels == [*masked, *ids[2], *eos, *[-100] * len(ids[3] + ids[4]), *ids[5], *eos]


def test_raw_writes_contents_alone():
    assert text_of(TWO_ROUNDS, "raw") == f"<1><2>s\nua{EOS}\nvb{EOS}"
    rendering = render_conversation(TOKENIZER, TWO_ROUNDS, "raw")
    assert read_targets(rendering) == f"a{EOS}b{EOS}"


def test_raw_with_one_question_is_the_input_output_row(tokenizer):
    for each in (TOKENIZER, tokenizer):
        row = render_conversation(each, conversation(user("问"), assistant("答")), "raw")
        expected = render_input_output(each, {"prompt": "问", "response": "答"}, 99, 99)
        assert (row.input_ids, row.labels) == (expected.input_ids, expected.labels)


def test_messages_in_unusual_order_stay_readable():
    record = conversation(assistant("hi"), assistant("so?"), user("u"), user("v"), message("system", "s"))
    assert text_of(record, "default") == (f"<1><2>Assistant: hi{EOS}\nAssistant: so?{EOS}\nHuman: u\nHuman: v\ns\n")
    assert text_of(record, "raw") == f"<1><2>hi{EOS}\nso?{EOS}\nu\nv\ns\n"


def test_calls_of_tools_and_their_results_are_text():
    record = conversation(user("u"), CALL, assistant("a"), tools=[{"name": "f"}])
    tools = "Answer the following questions as best as you can. You have access to the following tools:\n"
    tools += '[\n    {\n        "name": "f"\n    }\n]\n'
    call = "f\n```python\ntool_call(a=1)\n```"
    assert text_of(record, "default") == (
        f'<1><2>{tools}Human: u\nAssistant: {call}{EOS}\nObservation: {{"键": 1}}\nAssistant: a{EOS}'
    )
    assert text_of(record, "raw") == f'<1><2>{tools}u{call}{EOS}\n{{"键": 1}}a{EOS}'
    rendering = render_conversation(TOKENIZER, record, "default")
    assert read_targets(rendering) == f"{call}{EOS}a{EOS}"


@pytest.mark.parametrize("template", ["default", "raw"])
def test_loss_overrides_any_role(template):
    record = conversation(user("u", loss=True), assistant("a", loss=False), user("v"), assistant("b"))
    rendering = render_conversation(TOKENIZER, record, template)
    question = {"default": "Human: u\nAssistant: ", "raw": "u"}[template]
    assert read_targets(rendering) == f"{question}b{EOS}"
    assert f"a{EOS}" in read_ids(rendering.input_ids), "eos ends a reply that the loss does not count on, too"


@pytest.mark.parametrize(
    ("prompt_format", "expected"),
    [
        ("multi-turn", "<1><2><3>\ns<4>\nu<5>\na<4>\nv<5>"),
        ("default", f"<1><2>s\nHuman: u\nAssistant: a{EOS}\nHuman: v\nAssistant: "),
        ("raw", f"<1><2>s\nua{EOS}\nv"),
        ("input-output", "<1><2>v"),
    ],
)
def test_prompts_of_every_format(prompt_format, expected):
    messages = TWO_ROUNDS["conversations"][:-1]
    assert read_ids(render_prompt(TOKENIZER, messages, prompt_format=prompt_format)) == expected


def test_a_prompt_without_a_question_opens_a_reply():
    assert read_ids(render_prompt(TOKENIZER, [], prompt_format="default")) == "<1><2>Assistant: "
    after_reply = render_prompt(TOKENIZER, [assistant("a")], prompt_format="default")
    assert read_ids(after_reply) == f"<1><2>Assistant: a{EOS}\nAssistant: "
    with pytest.raises(
        ValueError, match="prompt_format 'chat' is unknown; use one of multi-turn, input-output, default"
    ):
        render_prompt(TOKENIZER, [], prompt_format="chat")
    with pytest.raises(ValueError, match="template 'alpaca' is unknown; use chatglm3, default or raw"):
        render_conversation(TOKENIZER, TWO_ROUNDS, "alpaca")


def test_a_call_at_the_end_of_a_row_stops_at_the_observation_token():
    call = assistant("```python\ntool_call(a=1)\n```", metadata="f")
    rendering = render_conversation(TOKENIZER, conversation(user("u"), call))
    assert read_targets(rendering) == "f\n```python\ntool_call(a=1)\n```<7>"
    silent = render_conversation(TOKENIZER, conversation(user("u"), call | {"loss": False}))
    assert silent.input_ids == rendering.input_ids and read_targets(silent) == ""
    assert read_targets(render_conversation(TOKENIZER, conversation(user("u"), call), "default")).endswith(EOS)


# Properties

words = st.text("ab\n<|user|>", max_size=6)
messages_strategy = st.lists(
    st.builds(
        lambda role, content, loss: message(role, content) | ({} if loss is None else {"loss": loss}),
        st.sampled_from(["system", "user", "assistant", "observation"]),
        words,
        st.none() | st.booleans(),
    )
    | st.just(CALL),
    min_size=1,
    max_size=6,
)
templates = st.sampled_from(TEMPLATES)


@given(messages_strategy, st.none() | st.just([{"name": "f"}]), templates)
def test_a_training_row_begins_with_the_prompt(messages, tools, template):
    row = render_conversation(TOKENIZER, conversation(*messages, tools=tools), template).input_ids
    for index, each in enumerate(messages):
        if each["role"] in ("assistant", "tool"):
            prompt = render_prompt(TOKENIZER, messages[:index], tools=tools, prompt_format=FORMATS[template])
            assert row[: len(prompt)] == prompt


@given(messages_strategy, templates)
def test_control_ids_come_from_structure_alone(messages, template):
    rendering = render_conversation(TOKENIZER, conversation(*messages), template)
    assert all(label in (-100, token) for token, label in zip(rendering.input_ids, rendering.labels, strict=True))
    controls = [token for token in rendering.input_ids if token < 100]
    replies = sum(each["role"] in ("assistant", "tool") for each in messages)
    if template == "chatglm3":
        assert len(controls) == 3 + len(rendering.turn_starts)
    else:
        assert controls == [1, 2, *[TOKENIZER.eos_token_id] * replies]


@settings(max_examples=300)
@given(messages_strategy, st.integers(1, 120), templates)
def test_cuts_fall_on_the_ends_of_supervised_turns(messages, limit, template):
    whole = render_conversation(TOKENIZER, conversation(*messages), template)
    kept = truncate(whole, limit)
    length = len(kept.input_ids)
    assert length <= limit and kept.input_ids == whole.input_ids[:length] and kept.labels == whole.labels[:length]
    assert kept.turn_starts == whole.turn_starts[: len(kept.turn_starts)]
    if len(whole.input_ids) <= limit:
        assert kept == whole
        return
    fitting = [end for end in whole.turn_ends if end < limit and whole.labels[end] != -100]
    assert length == (fitting[-1] + 1 if fitting else limit)
    assert kept.is_cut == (not fitting)
    if fitting:
        assert kept.turn_ends[-1] == length - 1, "the last turn kept is whole"
        assert kept.turns_dropped == len(whole.turn_starts) - len(kept.turn_starts)


def test_a_cut_default_row_ends_with_the_eos_of_a_whole_reply():
    record = conversation(user("u"), assistant("a"), user("v" * 9), assistant("b" * 90))
    kept = truncate(render_conversation(TOKENIZER, record, "default"), 80)
    assert read_ids(kept.input_ids) == f"<1><2>Human: u\nAssistant: a{EOS}"
    assert (kept.turns_dropped, kept.is_cut) == (2, False)


def test_arguments_know_the_format_that_a_checkpoint_records():
    assert DataArguments().prompt_format == "multi-turn"
    assert DataArguments(train_format="input-output").prompt_format == "input-output"
    assert DataArguments(template="default").prompt_format == "default"
    assert DataArguments(template="raw").prompt_format == "raw"
    with pytest.raises(ValueError, match="--train_format input-output has its own form; drop --template raw"):
        DataArguments(train_format="input-output", template="raw")


def test_the_formats_are_named_alike_everywhere():
    from finetune_chatmodel_demo.conversation import render
    from finetune_chatmodel_demo.generation import choose

    assert render.PROMPT_FORMATS == choose.PROMPT_FORMATS
    assert {DataArguments(template=template).prompt_format for template in TEMPLATES} < set(render.PROMPT_FORMATS)


@pytest.mark.parametrize("prompt_format", ["default", "raw"])
def test_replies_of_text_formats_have_no_metadata_line(tokenizer, prompt_format):
    from finetune_chatmodel_demo.generation.replies import read_reply

    ids = tokenizer.encode_text("f\n```python\ntool_call(a=1)\n```")
    reply = read_reply(tokenizer, ids, prompt_format)
    assert reply.text == "f\n```python\ntool_call(a=1)\n```"
    assert reply.messages() == [{"role": "assistant", "content": reply.text}]
    # Said again as history, it is what training wrote for the call of a tool.
    history = render_prompt(tokenizer, [user("u"), *reply.messages()], prompt_format=prompt_format)
    assert history == render_prompt(
        tokenizer, [user("u"), {"role": "assistant", "metadata": "f", "content": "```python\ntool_call(a=1)\n```"}],
        prompt_format=prompt_format,
    )  # fmt: skip


# From training to talking

ROUNDS = {
    "皮卡丘": [user("皮卡丘是什么属性？"), assistant("电属性。"), user("它的弱点呢？"), assistant("地面属性。")],
    "妙蛙种子": [user("妙蛙种子是什么属性？"), assistant("草、毒属性。"), user("它的弱点呢？"), assistant("火属性。")],
}


def overfit(folder: Path, tokenizer_folder: Path, records: list[dict], **flags) -> Path:
    """Trains a random small model on a few records until it knows them by heart."""
    from training_helpers import make_model, train

    data = write_jsonl(folder / "train.jsonl", records)
    schedule = {"max_steps": 120, "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": 10}
    model = make_model(folder / "model", tokenizer_folder)
    assert train(model, data, folder / "out", logging_steps=60, **schedule, **flags) == 0
    return folder / "out"


@pytest.mark.parametrize("template", ["default", "raw"])
def test_a_model_is_asked_in_the_template_that_it_was_trained_in(tiny_folder, tmp_path, monkeypatch, capsys, template):
    from finetune_chatmodel_demo import inference

    system = message("system", "你是图鉴。")
    records = [conversation(system, *rounds) for rounds in ROUNDS.values()]
    folder = overfit(tmp_path, tiny_folder, records, template=template)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["prompt_format"] == template
    for rounds in ROUNDS.values():
        questions = "".join(each["content"] + "\n" for each in rounds[::2])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(questions.encode("utf-8"))))
        capsys.readouterr()
        assert inference.main(["--model", str(folder), "--system", system["content"], "--device", "cpu"]) == 0
        assert capsys.readouterr().out.split() == [each["content"] for each in rounds[1::2]]


def test_a_trained_call_stops_at_the_observation_token_and_parses(tiny_folder, tmp_path):
    from finetune_chatmodel_demo.chatglm3 import load_model, load_tokenizer
    from finetune_chatmodel_demo.generation.session import ChatSession

    tools = [{"name": "look_up"}]
    call = {"role": "tool", "name": "look_up", "parameters": {"a": "皮卡丘"}, "observation": "电"}
    records = [conversation(user("皮卡丘？"), call, assistant("电属性。"), tools=tools)]
    folder = overfit(tmp_path, tiny_folder, records)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    session = ChatSession(model, tokenizer, tools=tools)
    said = "".join(session.reply("皮卡丘？"))
    assert session.last_tool_call == "look_up"
    code = session.history[-1]["content"]
    assert code in said and code.removeprefix("```python\n").removesuffix("\n```") == "tool_call(a='皮卡丘')"
    prompt = render_prompt(tokenizer, [user("皮卡丘？")], tools=tools)
    ids = model.generate(input_ids=torch.tensor([prompt]), generation_config=session.settings)[0].tolist()
    assert ids[-1] == tokenizer.get_command("<|observation|>")
    assert "".join(session.reply("电", role="observation")) == "电属性。"
