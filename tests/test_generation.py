"""The generation room: replies read from ids, sessions, seeds, interruption, batches."""

import logging
import signal
import threading

import pytest
import torch
from generation_helpers import (
    build_prefix_folder,
    build_random_folder,
    build_scripted_model,
    greedy_without_cache,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_chatmodel_demo.chatglm3 import load_model
from finetune_chatmodel_demo.conversation.render import count_droppable_turns, drop_oldest_turns, render_prompt
from finetune_chatmodel_demo.generation.batch import BatchReply, generate_replies
from finetune_chatmodel_demo.generation.replies import ReplyReader, find_tool_name, read_reply
from finetune_chatmodel_demo.generation.session import ChatSession, PromptTooLongError, build_settings, fit_prompt
from finetune_chatmodel_demo.generation.streaming import stream_ids


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return max(tokenizer.get_command(token) for token in ("<|assistant|>", "<|observation|>")) + 1


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_folder, vocabulary):
    """A random model with a random prefix."""
    folder = build_random_folder(tmp_path_factory.mktemp("model"), tiny_folder, vocabulary)
    prefix = build_prefix_folder(tmp_path_factory.mktemp("prefix"), folder)
    return load_model(folder, pt_checkpoint=prefix, device="cpu")


def scripted(tokenizer, vocabulary, *scripts):
    """A model that says what it is told: each script is a list of ids and of texts of distinct pieces."""
    chains = []
    for script in scripts:
        chain = []
        for item in script:
            chain += [item] if isinstance(item, int) else pieces(tokenizer, item)
        chains.append(chain)
    return build_scripted_model(vocabulary, chains)


def pieces(tokenizer, text):
    """Ids of a text without the space that SentencePiece puts in front of it."""
    ids = tokenizer.encode_text("\n" + text)
    newline = tokenizer.encode_text("\n")
    assert ids[: len(newline)] == newline
    return ids[len(newline) :]


def newline(tokenizer):
    return tokenizer.encode_text("\n")[-1]


def command(tokenizer, name):
    return tokenizer.get_command(f"<|{name}|>")


def alive():
    """Threads that still generate; one that is done may take a moment to vanish."""
    threads = [thread for thread in threading.enumerate() if thread.name == "generate"]
    for thread in threads:
        thread.join(timeout=1)
    return [thread for thread in threads if thread.is_alive()]


# --- replies


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ("", None),
        (" ", None),
        ("\n", ""),
        (" \n电属性", ""),
        ("query_pokedex", None),
        ("query_pokedex\n", None),
        ("query_pokedex\n ``", None),
        ("query_pokedex\n ```python", "query_pokedex"),
        (" 查询图鉴\n```", "查询图鉴"),
        ("皮卡丘\n电属性", ""),
        ("电属性。", ""),
        ("x" * 65, ""),
    ],
)
def test_tool_name_is_told_from_the_first_line(head, name):
    assert find_tool_name(head) == name


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30))
def test_pieces_add_up_to_the_stripped_text(tokenizer, text):
    reader = ReplyReader(tokenizer)
    ids = tokenizer.encode_text("\n") + tokenizer.encode_text(text)
    shown = "".join(reader.put(token_id) for token_id in ids) + reader.end()
    assert shown == reader.text == read_reply(tokenizer, ids).text
    assert shown == text.strip()


def test_no_piece_ends_inside_a_character(tokenizer):
    ids = tokenizer.encode_text("\n") + tokenizer.encode_text("🐭的属性")
    assert len(ids) > 8, "the emoji must be spread over byte pieces"
    reader = ReplyReader(tokenizer)
    shown = [piece for piece in map(reader.put, ids) if piece]
    assert shown[0] == "🐭"
    assert "".join(shown) + reader.end() == "🐭的属性"


def test_a_plain_reply_without_metadata_line_is_not_lost(tokenizer):
    reader = read_reply(tokenizer, tokenizer.encode_text("皮卡丘"))
    assert (reader.text, reader.messages()) == ("皮卡丘", [{"role": "assistant", "content": "皮卡丘"}])


def test_a_tool_call_behind_an_announcement(tokenizer):
    call = "```python\ntool_call(name='皮卡丘')\n```"
    ids = tokenizer.build_single_message("assistant", "", "我来查。")[1:]
    ids += tokenizer.build_single_message("assistant", "query_pokedex", call)
    reader = read_reply(tokenizer, ids)
    assert reader.text == f"我来查。\n[tool call: query_pokedex]\n{call}"
    assert reader.messages() == [
        {"role": "assistant", "content": "我来查。"},
        {"role": "assistant", "content": call, "metadata": "query_pokedex"},
    ]


def test_input_output_replies_are_plain_text(tokenizer):
    ids = tokenizer.encode_text("interpreter\n```python```")
    assert read_reply(tokenizer, ids, "input-output").text == "interpreter\n```python```"
    assert read_reply(tokenizer, ids).text == "[tool call: interpreter]\n```python```"


# --- prompts


def turn(role, content):
    return {"role": role, "content": content}


def test_dropping_a_turn_takes_the_question_with_all_its_answers():
    system, last = turn("system", "s"), turn("user", "3")
    messages = [
        system,
        turn("user", "1"),
        turn("assistant", "a"),
        turn("observation", "o"),
        turn("assistant", "b"),
        last,
    ]
    assert drop_oldest_turns(messages, count_droppable_turns(messages)) == [system, last]
    assert count_droppable_turns([system, last]) == 0


def test_fit_prompt_drops_as_little_as_needed(tokenizer):
    messages = [turn("system", "图鉴"), turn("user", "一"), turn("assistant", "二"), turn("user", "三")]
    messages += [turn("assistant", "四"), turn("user", "五")]
    whole, shorter = (len(render_prompt(tokenizer, m)) for m in (messages, [messages[0], *messages[3:]]))
    assert fit_prompt(tokenizer, messages, max_prompt_tokens=whole).turns_dropped == 0
    fitted = fit_prompt(tokenizer, messages, max_prompt_tokens=whole - 1)
    assert (fitted.turns_dropped, len(fitted.input_ids)) == (1, shorter)
    assert fitted.messages == [messages[0], *messages[3:]]
    with pytest.raises(PromptTooLongError, match=r"leaves room for 5 before the answer; shorten"):
        fit_prompt(tokenizer, messages, max_prompt_tokens=5)


# --- sessions


@pytest.mark.parametrize("prompt_format", ["multi-turn", "input-output"])
@pytest.mark.parametrize("with_prefix", [True, False])
def test_greedy_streaming_equals_an_argmax_loop_without_cache(model, tokenizer, with_prefix, prompt_format):
    prompt = render_prompt(tokenizer, [turn("user", "皮卡丘是什么属性？")], prompt_format=prompt_format)
    build = build_settings(tokenizer, max_new_tokens=24)

    def compare():
        streamed = list(stream_ids(model, prompt, build))
        assert streamed == greedy_without_cache(model, prompt, tokenizer.stop_token_ids, 24)
        return streamed

    if with_prefix:
        compare()
        return
    with_it = list(stream_ids(model, prompt, build))
    with model.prefix_disabled():
        assert compare() != with_it


def test_history_is_what_the_next_prompt_renders(model, tokenizer, monkeypatch):
    session = ChatSession(model, tokenizer, system="图鉴", max_new_tokens=8)
    first = "".join(session.reply("一"))
    assert session.history == [turn("user", "一"), turn("assistant", first)]
    prompts = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: prompts.append(kwargs["input_ids"]) or generate(**kwargs))
    "".join(session.reply("二"))
    expected = [turn("system", "图鉴"), turn("user", "一"), turn("assistant", first), turn("user", "二")]
    assert prompts[0].tolist() == [render_prompt(tokenizer, expected)]
    session.reset()
    assert session.history == []
    assert "".join(session.reply("一")) == first


@pytest.mark.parametrize("stop", ["eos", "user", "observation"])
def test_stops_at_each_stop_id(tokenizer, vocabulary, stop):
    stop_id = tokenizer.eos_token_id if stop == "eos" else command(tokenizer, stop)
    model = scripted(tokenizer, vocabulary, [command(tokenizer, "assistant"), newline(tokenizer), "电属性", stop_id])
    session = ChatSession(model, tokenizer)
    assert "".join(session.reply("皮卡丘？")) == "电属性"
    prompt = render_prompt(tokenizer, [turn("user", "？")])
    replies = generate_replies(model, tokenizer, [prompt], max_new_tokens=9, batch_size=1)
    assert replies == [BatchReply("电属性", hit_cap=False)]


def test_a_tool_call_waits_for_its_result(model, tokenizer, monkeypatch):
    replies = [
        tokenizer.build_single_message("assistant", "query_pokedex", "```python\ntool_call(name='皮卡丘')\n```")[1:],
        tokenizer.build_single_message("assistant", "", "电属性。")[1:],
    ]
    monkeypatch.setattr(
        "finetune_chatmodel_demo.generation.session.stream_ids", lambda *_, **__: (i for i in replies.pop(0))
    )
    session = ChatSession(model, tokenizer)
    "".join(session.reply("查一下皮卡丘"))
    assert session.last_tool_call == "query_pokedex"
    assert "".join(session.reply('{"属性": "电"}', role="observation")) == "电属性。"
    assert session.last_tool_call is None
    record = [turn("user", "查一下皮卡丘")]
    record += [
        {"role": "tool", "name": "query_pokedex", "parameters": {"name": "皮卡丘"}, "observation": {"属性": "电"}}
    ]
    assert render_prompt(tokenizer, session.history[:3]) == render_prompt(tokenizer, record)


def test_an_empty_reply_is_remembered_as_such(tokenizer, vocabulary):
    model = scripted(tokenizer, vocabulary, [command(tokenizer, "assistant"), tokenizer.eos_token_id])
    session = ChatSession(model, tokenizer)
    assert list(session.reply("？")) == []
    assert session.history == [turn("user", "？"), turn("assistant", "")]


def test_seeds(model, tokenizer):
    def talk(seed):
        session = ChatSession(
            model, tokenizer, do_sample=True, temperature=5.0, top_p=1.0, top_k=0, seed=seed, max_new_tokens=12
        )
        replies = ["".join(session.reply("一"))]
        session.history.clear()
        return [*replies, "".join(session.reply("一"))]

    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = talk(3)
    assert torch.equal(torch.get_rng_state(), before), "the process's random state must stay as it was"
    assert talk(3) == first
    assert first[0] != first[1], "two turns must not repeat the same noise"
    assert talk(4) != first


def test_reset_starts_the_seed_again(model, tokenizer):
    session = ChatSession(model, tokenizer, do_sample=True, temperature=5.0, seed=3, max_new_tokens=12)
    first = "".join(session.reply("一"))
    session.reset()
    assert "".join(session.reply("一")) == first


def test_an_error_in_the_thread_is_raised_in_the_loop(model, tokenizer, monkeypatch):
    def fail(**kwargs):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(model, "generate", fail)
    session = ChatSession(model, tokenizer)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        list(session.reply("一"))
    assert session.history == []
    assert not alive()


def test_leaving_a_reply_early_stops_the_thread_and_keeps_what_was_said(tokenizer, vocabulary):
    loop = pieces(tokenizer, "火水")
    model = scripted(tokenizer, vocabulary, [command(tokenizer, "assistant"), newline(tokenizer), *loop, loop[0]])
    session = ChatSession(model, tokenizer, max_new_tokens=200)
    reply = session.reply("一")
    said = next(reply) + next(reply)
    reply.close()
    assert not alive()
    assert said == "火水"
    assert session.history == [turn("user", "一"), turn("assistant", "火水")]


@pytest.fixture
def python_handles_ctrl_c():
    """Started in the background of a shell, a program inherits that SIGINT is ignored; so may these tests."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_ctrl_c_while_the_thread_starts_still_stops_it(model, tokenizer, monkeypatch, python_handles_ctrl_c):
    start = threading.Thread.start

    def start_interrupted(thread):
        start(thread)
        if thread.name == "generate":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(threading.Thread, "start", start_interrupted)
    handler = signal.getsignal(signal.SIGINT)
    session = ChatSession(model, tokenizer, max_new_tokens=200)
    with pytest.raises(KeyboardInterrupt):
        list(session.reply("一"))
    assert not alive()
    assert session.history == []
    assert signal.getsignal(signal.SIGINT) is handler


def test_interruption_before_the_first_word_forgets_the_question(model, tokenizer, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("finetune_chatmodel_demo.generation.session.stream_ids", interrupt)
    session = ChatSession(model, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        list(session.reply("一"))
    assert session.history == []


def test_a_long_conversation_forgets_its_oldest_turns_aloud(model, tokenizer, caplog):
    session = ChatSession(model, tokenizer, system="图鉴", max_new_tokens=64)
    session.history = [message for i in range(30) for message in (turn("user", f"问{i}"), turn("assistant", "答" * 5))]
    with caplog.at_level(logging.WARNING):
        "".join(session.reply("最后"))
    assert "context of 256 tokens: its oldest" in caplog.text
    assert session.history[-2] == turn("user", "最后")
    assert session.history[0]["role"] == "user" and session.history[0] != turn("user", "问0")
    with pytest.raises(PromptTooLongError, match=r"leaves room for 192 before the answer"):
        list(session.reply("长" * 300))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": 256}, "max_new_tokens is 256, and the model's context is 256 tokens"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0 .greedy. or more"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_settings_outside_their_range(model, tokenizer, setting, message):
    with pytest.raises(ValueError, match=message):
        ChatSession(model, tokenizer, **setting)


def test_temperature_zero_is_greedy(tokenizer):
    assert build_settings(tokenizer, max_new_tokens=1, do_sample=True, temperature=0).do_sample is False
    sampling = build_settings(tokenizer, max_new_tokens=1, do_sample=True)
    assert (sampling.do_sample, sampling.temperature, sampling.top_p, sampling.top_k) == (True, 0.8, 0.8, 50)


# --- batches


QUESTIONS = ["皮卡丘？", "妙蛙种子的弱点是什么？", "它", "小火龙怎么进化，几级？", "a b c", "杰尼龟" * 9, "喵"]


@pytest.mark.parametrize("with_prefix", [True, False])
def test_batches_equal_one_by_one(model, tokenizer, with_prefix):
    prompts = [render_prompt(tokenizer, [turn("user", text)]) for text in QUESTIONS]
    model.model.prefix_enabled = with_prefix
    try:
        together = generate_replies(model, tokenizer, prompts, max_new_tokens=16, batch_size=3)
        alone = ["".join(ChatSession(model, tokenizer, max_new_tokens=16).reply(text)) for text in QUESTIONS]
    finally:
        model.model.prefix_enabled = True
    assert [reply.text for reply in together] == alone
    assert len(set(alone)) > 3


def test_rows_of_one_batch_stop_by_themselves(tokenizer, vocabulary):
    user, eos = command(tokenizer, "user"), tokenizer.eos_token_id
    a, b, *many = pieces(tokenizer, "火水一三四五六七八九十")
    model = scripted(tokenizer, vocabulary, [a, newline(tokenizer)], [b, *many, user], [newline(tokenizer), eos])
    replies = generate_replies(model, tokenizer, [[5, a], [b], [b, 7, 8, a]], max_new_tokens=5, batch_size=3)
    assert [(reply.text, reply.hit_cap) for reply in replies] == [("", False), ("一三四五六", True), ("", False)]


def test_batch_errors(model, tokenizer):
    with pytest.raises(PromptTooLongError, match="prompt 1 has 255 tokens; at most 254 leave room"):
        generate_replies(model, tokenizer, [[5], [5] * 255], max_new_tokens=2, batch_size=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        generate_replies(model, tokenizer, [[5]], max_new_tokens=2, batch_size=0)
    assert generate_replies(model, tokenizer, [], max_new_tokens=2, batch_size=2) == []
