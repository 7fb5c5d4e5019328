"""The tokenizer: ids, chats, padding, streaming and saving.

Most tests train a SentencePiece model of their own; those that use the official one are skipped where it is absent.
"""

import copy
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, DataCollatorWithPadding

from finetune_chatmodel_demo.chatglm3 import load_tokenizer  # the package registers the classes with transformers
from finetune_chatmodel_demo.chatglm3.tokenizer import ChatGLMTokenizer
from finetune_chatmodel_demo.chatglm3.vocabulary import CONTROL_TOKENS

GOLDEN = Path(__file__).resolve().parent / "golden"
GOLDEN_CASES = [json.loads(line) for line in (GOLDEN / "tokenizer.jsonl").read_text(encoding="utf-8").splitlines()]
GOLDEN_ROWS = [json.loads(line) for line in (GOLDEN / "loss_masks.jsonl").read_text(encoding="utf-8").splitlines()]
OFFICIAL_CONFIG = {
    "name_or_path": "THUDM/chatglm3-6b",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}
CORPUS = """
皮卡丘是电属性的宝可梦。它的弱点是地面属性，分类是鼠宝可梦，身高0.4米，体重6.0千克。
妙蛙种子的属性是草和毒，弱点是火、冰、飞行、超能力；16级进化成妙蛙草，32级进化成妙蛙花。
小火龙天生喜欢热热的东西，据说当它被雨淋湿的时候，尾巴的末端会冒出烟来。属性是火，弱点是水、地面、岩石。
杰尼龟会把长长的脖子缩进甲壳里，然后发射出激烈的水柱。它住在水边，属性是水，弱点是草和电。
Pikachu is an Electric-type Pokemon. Its weakness is Ground. What is the ability of Charmander?
  def f(x):\n    return {"name": "pikachu", "height": 0.4, "weight": 6.0}
"""
# Texts in which control tokens, bytes and spaces appear more often than by chance.
FRAGMENTS = [*CONTROL_TOKENS, "<s>", "</s>", "<unk>", "<0x0A>", " ", "  ", "\n", "\t", "皮卡丘", "👋", "é", "\x00", "a"]
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "observation"]), "content": TEXTS},
        optional={"metadata": st.sampled_from(["", "get_weather"])},
    ),
    min_size=1,
    max_size=5,
)
MANY = settings(max_examples=150, deadline=None, derandomize=True)


def train_model(**options) -> bytes:
    """A SentencePiece model with the official one's settings and some hundred pieces."""
    written = io.BytesIO()
    defaults = {
        "sentence_iterator": iter(CORPUS.splitlines()),
        "model_writer": written,
        "model_type": "bpe",
        "vocab_size": 600,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "character_coverage": 1.0,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(**defaults | options)
    return written.getvalue()


def write_folder(folder: Path, model: bytes, tokenizer_config: dict | None = None, **files: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in {"tokenizer_config": tokenizer_config or OFFICIAL_CONFIG, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def small_model() -> bytes:
    return train_model()


@pytest.fixture(scope="module")
def folder(small_model, tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("tokenizer"), small_model)


@pytest.fixture(scope="module")
def tok(folder) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> ChatGLMTokenizer:
    """Its vocabulary holds ordinary pieces with the names of control tokens."""
    model = train_model(user_defined_symbols=["sop", "<|user|>", "[gMASK]"])
    return ChatGLMTokenizer.from_pretrained(write_folder(tmp_path_factory.mktemp("hostile"), model))


@pytest.fixture(scope="module")
def official(official_tokenizer_folder) -> ChatGLMTokenizer:
    return AutoTokenizer.from_pretrained(official_tokenizer_folder, trust_remote_code=False)


@pytest.fixture
def no_questions(monkeypatch):
    """Fails a test that asks something on the terminal."""

    def refuse(*_):
        raise AssertionError("asked a question on the terminal")

    monkeypatch.setattr("builtins.input", refuse)


# Golden: every case of the original tokenizer.


def cases(*kinds: str) -> list:
    return [case for case in GOLDEN_CASES if case["kind"] in kinds]


def test_golden_file_has_every_kind():
    kinds = [case["kind"] for case in GOLDEN_CASES]
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts == {"encode": 33, "single_message": 8, "chat_input": 3, "batch": 1, "batch_max_length_12": 1}


@pytest.mark.parametrize("case", cases("encode"), ids=lambda case: repr(case["text"][:16]))
def test_golden_encode(official, case):
    text = case["text"]
    assert official(text)["input_ids"] == official.encode(text) == case["input_ids"]
    assert official.encode(text, add_special_tokens=False) == case["input_ids_no_special"]
    assert official.encode_text(text) == official.tokenizer.encode(text) == case["input_ids_no_special"]
    assert official.convert_tokens_to_ids(official.tokenize(text)) == case["input_ids_no_special"]
    assert official.decode(case["input_ids"], skip_special_tokens=True) == case["decoded"]
    assert official.decode(case["input_ids_no_special"]) == case["decoded"]
    assert official.decode(case["input_ids"]) == case["decoded_all"]
    assert official.convert_tokens_to_string(official.convert_ids_to_tokens(case["input_ids"])) == case["decoded_all"]
    decoder = official.stream_decoder()
    assert "".join([decoder.put(i) for i in case["input_ids"]]) + decoder.end() == case["decoded"]


@pytest.mark.parametrize("case", cases("single_message"), ids=lambda case: case["content"][:16] or "empty")
def test_golden_single_message(official, case):
    ids = official.build_single_message(case["role"], case["metadata"], case["content"])
    assert ids == case["input_ids"]


@pytest.mark.parametrize("case", cases("chat_input"), ids=lambda case: case["query"])
def test_golden_chat_input(official, case):
    encoded = official.build_chat_input(case["query"], case["history"], case["role"])
    length = len(case["input_ids"])
    assert encoded["input_ids"].tolist() == [case["input_ids"]]
    assert encoded["attention_mask"].tolist() == [[1] * length]
    assert encoded["position_ids"].tolist() == [list(range(length))]
    messages = [*case["history"], {"role": case["role"], "content": case["query"]}]
    rendered = official.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert rendered == case["input_ids"]


def test_golden_tools_argument_is_the_first_system_message(official):
    case = next(case for case in cases("chat_input") if case["role"] == "observation")
    system, *rest = case["history"]
    messages = [*rest, {"role": "observation", "content": case["query"]}]
    for tools in (system["tools"], [{"type": "function", "function": tool} for tool in system["tools"]]):
        ids = official.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        assert ids == case["input_ids"]


@pytest.mark.parametrize("case", cases("batch", "batch_max_length_12"), ids=lambda case: case["kind"])
def test_golden_batches(official, case):
    options = {"padding": True}
    if case["kind"] == "batch_max_length_12":
        options = {"padding": "max_length", "max_length": 12, "truncation": True}
    encoded = official(case["texts"], **options)
    assert set(encoded) == {"input_ids", "attention_mask", "position_ids"}
    for name in encoded:
        assert encoded[name] == case[name]
        assert official(case["texts"], return_tensors="pt", **options)[name].tolist() == case[name]


def test_golden_assistant_mask_is_the_loss_mask(official):
    compared = 0
    for row in GOLDEN_ROWS:
        record = row["record"]
        messages = record.get("conversations", [])
        is_plain = all(m["role"] != "tool" and "loss" not in m for m in messages)
        if row["format"] != "multi-turn" or row["max_seq_length"] != 512 or not is_plain:
            continue
        if any(message["role"] == "observation" for message in messages):
            continue  # the original turns the loss on for observations that are messages of their own
        encoded = official.apply_chat_template(messages, tools=record.get("tools"), return_assistant_tokens_mask=True)
        assert encoded["input_ids"] == row["input_ids"][:-1]  # without eos
        assert encoded["assistant_masks"] == [int(label != -100) for label in row["labels"][:-1]]
        compared += 1
    assert compared >= 3


def test_official_ids(official):
    assert (official.vocab_size, len(official), official.tokenizer.n_words) == (64798, 64798, 64798)
    commands = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
    assert [official.get_command(token) for token in commands] == [64789, 64790, 64791, 64792, 64793]
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    assert official.convert_tokens_to_ids(roles) == [64794, 64795, 64796, 64797]
    assert official.convert_ids_to_tokens([64794, 64795, 64796, 64797]) == roles
    assert official.stop_token_ids == [2, 64795, 64797]
    named = (official.bos_token_id, official.eos_token_id, official.unk_token_id, official.pad_token_id)
    assert named == (1, 2, 0, 0)
    assert official.get_vocab()["<|user|>"] == 64795
    assert official.tokenizer.special_tokens["sop"] == 64792
    assert official.tokenizer.index_special_tokens[64797] == "<|observation|>"


def test_official_folder_saves_its_own_bytes(official, official_tokenizer_folder, tmp_path):
    official.save_pretrained(tmp_path)
    saved = (tmp_path / "tokenizer.model").read_bytes()
    assert saved == (official_tokenizer_folder / "tokenizer.model").read_bytes()


@MANY
@given(text=TEXTS)
def test_official_round_trip(official, text):
    check_round_trip(official, text)


@MANY
@given(data=st.data())
def test_official_stream(official, data):
    check_stream(official, data)


# Properties, on the small vocabulary.


def check_round_trip(tokenizer: ChatGLMTokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text)
    assert all(2 < i < tokenizer.tokenizer.sp_model.vocab_size() for i in ids)
    # U+2581 is SentencePiece's own sign for a space; nothing else is lost.
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")
    assert tokenizer.encode(text) == [*tokenizer.get_prefix_tokens(), *ids]


def check_stream(tokenizer: ChatGLMTokenizer, data: st.DataObject) -> None:
    sp_model = tokenizer.tokenizer.sp_model
    bytes_ = st.integers(sp_model.piece_to_id("<0x00>"), sp_model.piece_to_id("<0xFF>"))
    spaces = st.just(sp_model.piece_to_id("\u2581"))
    ids = data.draw(st.lists(st.one_of(st.integers(1, sp_model.vocab_size() - 1), bytes_, spaces), max_size=30))
    expected = sp_model.decode(ids) if ids else ""
    assert tokenizer.decode(ids) == expected
    decoder = tokenizer.stream_decoder(skip_special_tokens=False)
    chunks = [decoder.put(i) for i in ids]
    assert "".join(chunks) + decoder.end() == expected
    mixed = data.draw(st.lists(st.sampled_from([0, 1, 2, *ids, tokenizer.vocab_size - 1]), max_size=30))
    for is_skipping in (False, True):
        decoder = tokenizer.stream_decoder(skip_special_tokens=is_skipping)
        text = "".join([decoder.put(i) for i in mixed]) + decoder.end()
        assert text == tokenizer.decode(mixed, skip_special_tokens=is_skipping)


@MANY
@given(text=TEXTS)
def test_round_trip_and_no_control_id_out_of_any_text(tok, text):
    check_round_trip(tok, text)


@MANY
@given(data=st.data())
def test_streamed_text_is_the_text_of_the_whole_and_sentencepieces(tok, data):
    check_stream(tok, data)


@MANY
@given(messages=MESSAGES)
def test_chat_template_is_the_sum_of_its_messages(tok, messages):
    expected = tok.get_prefix_tokens()
    for message in messages:
        expected += tok.build_single_message(message["role"], message.get("metadata", ""), message["content"])
    assert tok.apply_chat_template(messages, return_dict=False) == expected
    *history, last = messages
    if not last.get("metadata"):
        built = tok.build_chat_input(last["content"], history, last["role"])["input_ids"][0].tolist()
        assert built == [*expected, tok.get_command("<|assistant|>")]
        assert tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == built
    role_ids = [tok.get_command(f"<|{message['role']}|>") for message in messages]
    first_control_id = tok.get_command("[MASK]")
    assert [i for i in expected[2:] if i >= first_control_id] == role_ids


@MANY
@given(messages=MESSAGES)
def test_assistant_mask_marks_what_the_assistant_writes(tok, messages):
    encoded = tok.apply_chat_template(messages, add_generation_prompt=True, return_assistant_tokens_mask=True)
    expected = [0, 0]
    previous = None
    for message in messages:
        ids = tok.build_single_message(message["role"], message.get("metadata", ""), message["content"])
        expected += [int(previous == "assistant")] + [int(message["role"] == "assistant")] * (len(ids) - 1)
        previous = message["role"]
    assert encoded["assistant_masks"] == [*expected, int(previous == "assistant")]
    assert len(encoded["assistant_masks"]) == len(encoded["input_ids"])


@MANY
@given(text=TEXTS)
def test_pieces_named_like_control_tokens_stay_text(hostile, text):
    first_control_id = hostile.get_command("[MASK]")
    for ids in (
        hostile.encode_text(text),
        hostile(text, add_special_tokens=False)["input_ids"],
        hostile.convert_tokens_to_ids(hostile.tokenize(text)),
        hostile.build_single_message("user", "", text)[1:],
        hostile(text, text)["input_ids"][2:],
    ):
        assert all(i < first_control_id for i in ids)
    assert hostile.decode(hostile.encode_text(text)) == text.replace("\u2581", " ")


def test_hostile_vocabulary_has_both(hostile):
    piece_id = hostile.tokenizer.sp_model.piece_to_id("<|user|>")
    assert hostile.encode_text("<|user|>")[-1] == piece_id < hostile.get_command("<|user|>")
    assert hostile.convert_tokens_to_ids("<|user|>") == hostile.get_vocab()["<|user|>"] == hostile.vocab_size - 3
    assert hostile.tokenize("sop")[-1] == "sop"
    assert len(hostile) == hostile.vocab_size == hostile.tokenizer.sp_model.vocab_size() + 9


# Streaming.


def test_stream_holds_back_half_characters(tok):
    ids = tok.encode_text("👋a")
    decoder = tok.stream_decoder()
    assert [decoder.put(i) for i in ids] == ["", "", "", "", "👋", "a"]
    assert decoder.end() == ""


def test_stream_shows_a_broken_character_at_the_end(tok):
    decoder = tok.stream_decoder()
    assert decoder.put(tok.encode_text("好👋")[:-2]) == "好"
    assert decoder.end() == "\ufffd\ufffd" == tok.decode(tok.encode_text("👋")[:-2])


def test_stream_leaves_out_only_the_first_space(tok):
    space = tok.tokenizer.sp_model.piece_to_id("\u2581")
    decoder = tok.stream_decoder()
    assert [decoder.put(space), decoder.put(space), decoder.put([space, space])] == ["", " ", "  "]
    assert decoder.end() == ""
    assert decoder.put(tok.encode_text("皮卡丘")) == "皮卡丘"  # after end it starts over


def test_stream_takes_ids_lists_and_tensors(tok):
    ids = tok.encode_text("皮卡丘的属性")
    for chunks in ([ids], [torch.tensor([ids])], [torch.tensor(i) for i in ids], [np.array(ids)], ids):
        decoder = tok.stream_decoder()
        assert "".join(decoder.put(chunk) for chunk in chunks) + decoder.end() == "皮卡丘的属性"


def test_decode_skips_or_shows_special_tokens(tok):
    ids = [0, 0, *tok.apply_chat_template([{"role": "user", "content": "你好"}], return_dict=False), 2]
    assert tok.decode(ids) == "[gMASK]sop<|user|> \n 你好"
    assert tok.decode(ids, skip_special_tokens=True) == "\n 你好"
    assert tok.decode([[tok.get_command("<|observation|>")], [-100, 64000]]) == ["<|observation|>", ""]
    assert tok.decode(tok.get_command("<|user|>")) == "<|user|>"
    assert tok.batch_decode([tok.encode_text("火"), tok.encode_text(" 水")]) == ["火", " 水"]
    assert tok.decode([]) == ""


# Padding.


def test_left_padding_counts_positions_from_the_first_token(tok):
    texts = ["火", "皮卡丘是电属性的宝可梦。"]
    short, long = (tok.encode(text) for text in texts)
    pad = len(long) - len(short)
    encoded = tok(texts, padding=True, return_tensors="pt")
    assert encoded["input_ids"].tolist() == [[0] * pad + short, long]
    assert encoded["attention_mask"].tolist() == [[0] * pad + [1] * len(short), [1] * len(long)]
    assert encoded["position_ids"].tolist() == [[0] * pad + list(range(len(short))), list(range(len(long)))]


def test_right_padding_and_multiples(tok):
    encoded = tok(["火"], padding=True, padding_side="right", pad_to_multiple_of=8)
    ids = tok.encode("火")
    zeros = [0] * (8 - len(ids))
    assert encoded["input_ids"] == [ids + zeros]
    assert encoded["position_ids"] == [list(range(len(ids))) + zeros]
    assert encoded["attention_mask"] == [[1] * len(ids) + zeros]


def test_pad_takes_features_of_a_data_loader(tok):
    features = [{"input_ids": tok.encode("火")}, {"input_ids": tok.encode("皮卡丘的弱点")}]
    batch = DataCollatorWithPadding(tok)(features)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["position_ids"].shape
    assert batch["position_ids"][0, -1] == len(features[0]["input_ids"]) - 1
    length = batch["input_ids"].shape[1]
    padded_again = tok.pad(batch, padding="max_length", max_length=length + 2)
    assert padded_again["position_ids"][1].tolist() == [0, 0, *range(length)]


def test_empty_texts_and_pairs(tok):
    assert tok("")["input_ids"] == tok.get_prefix_tokens()
    assert tok("", add_special_tokens=False)["input_ids"] == []
    assert tok(["", "火"], padding=True)["attention_mask"][0][:2] != [1, 1]
    fire, water = tok.encode_text("火"), tok.encode_text("水")
    pair = tok("火", "水", return_special_tokens_mask=True)
    assert pair["input_ids"] == [*tok.get_prefix_tokens(), *fire, *water, 2]
    assert pair["special_tokens_mask"] == [1, 1] + [0] * len(fire + water) + [1]
    assert (
        tok.get_special_tokens_mask(pair["input_ids"], already_has_special_tokens=True) == pair["special_tokens_mask"]
    )


# Chats.

CHAT = [{"role": "user", "content": "皮卡丘的属性"}, {"role": "assistant", "content": "电"}]


def test_chat_template_returns_what_was_asked_for(tok):
    ids = tok.apply_chat_template(CHAT, return_dict=False)
    assert tok.apply_chat_template(CHAT)["input_ids"] == ids
    assert tok.apply_chat_template(CHAT)["position_ids"] == list(range(len(ids)))
    assert tok.apply_chat_template(CHAT, return_tensors="pt", return_dict=False).tolist() == [ids]
    assert tok.apply_chat_template(CHAT, return_tensors="np")["attention_mask"].tolist() == [[1] * len(ids)]
    assert tok.apply_chat_template([CHAT], return_dict=False) == [ids]
    assert tok.apply_chat_template(CHAT, continue_final_message=True, return_dict=False) == ids
    text = tok.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == "[gMASK]sop<|user|> \n 皮卡丘的属性<|assistant|> \n 电<|assistant|>"
    assert tok.apply_chat_template([CHAT], tokenize=False) == [text.removesuffix("<|assistant|>")]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("truncation_side", ["left", "right"])
def test_chat_batches_are_cut_and_padded_with_their_masks(tok, padding_side, truncation_side):
    chats = [CHAT[:1], CHAT, [*CHAT, *CHAT, *CHAT]]
    alone = [tok.apply_chat_template(chat, return_assistant_tokens_mask=True) for chat in chats]
    limit = len(alone[1]["input_ids"]) + 3
    cutting = copy.copy(tok)
    cutting.truncation_side = truncation_side
    batch = cutting.apply_chat_template(
        chats,
        padding=True,
        truncation=True,
        max_length=limit,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"padding_side": padding_side},
    )
    assert batch["input_ids"].shape == batch["assistant_masks"].shape == batch["position_ids"].shape == (3, limit)
    for i, row in enumerate(alone):
        kept = slice(-limit, None) if truncation_side == "left" else slice(limit)
        is_real = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][is_real].tolist() == row["input_ids"][kept]
        assert batch["assistant_masks"][i][is_real].tolist() == row["assistant_masks"][kept]
        assert batch["assistant_masks"][i][~is_real].sum() == 0


def test_chat_mask_of_one_chat_as_tensor(tok):
    encoded = tok.apply_chat_template(CHAT, return_tensors="pt", return_assistant_tokens_mask=True)
    answer = len(tok.build_single_message("assistant", "", "电")) - 1
    assert encoded["assistant_masks"].shape == encoded["input_ids"].shape
    assert encoded["assistant_masks"][0].tolist() == [0] * (encoded["input_ids"].shape[1] - answer) + [1] * answer


def test_chat_template_in_the_configuration_is_not_used(tok, small_model, tmp_path):
    config = OFFICIAL_CONFIG | {"chat_template": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"}
    other = ChatGLMTokenizer.from_pretrained(write_folder(tmp_path, small_model, config))
    assert other.apply_chat_template(CHAT, return_dict=False) == tok.apply_chat_template(CHAT, return_dict=False)


def test_functions_can_be_tools(tok):
    def look_up(name: str) -> str:
        """Looks a Pokémon up.

        Args:
            name: Its name.
        """

    ids = tok.apply_chat_template(CHAT, tools=[look_up], return_dict=False)
    text = tok.decode(ids)
    assert '"name": "look_up",' in text and '"description": "Its name."' in text
    assert ids[-5:] == tok.apply_chat_template(CHAT, return_dict=False)[-5:]


@pytest.mark.parametrize(
    ("messages", "options", "error"),
    [
        ([], {}, "the conversation is empty"),
        (["你好"], {}, "message 0: got '你好'; use a dictionary"),
        ([{"role": "bot", "content": ""}], {}, "message 0: role 'bot' is unknown; use system, user, assistant or"),
        ([*CHAT, {"role": "user"}], {}, "message 2: 'content' is None; it must be a string"),
        ([{"content": "火"}], {}, "message 0: 'role' is None"),
        ([{"role": "user", "content": "a\ud83d"}], {}, r"message 0: .*ud83d"),
        (CHAT, {"chat_template": "{{ messages }}"}, "chat_template is not supported"),
        (CHAT, {"documents": [{"text": "火"}]}, "documents is not supported"),
        (CHAT, {"add_generation_prompt": True, "continue_final_message": True}, "exclude each other"),
        (CHAT, {"return_assistant_tokens_mask": True, "return_dict": False}, "needs tokenize=True and return_dict"),
    ],
)
def test_bad_chats_are_refused(tok, messages, options, error):
    with pytest.raises(ValueError, match=error):
        tok.apply_chat_template(messages, **options)


def test_bad_arguments_are_refused(tok, folder):
    with pytest.raises(ValueError, match=r"'<\|bot\|>' is not a control token; use one of \[MASK\], \[gMASK\]"):
        tok.get_command("<|bot|>")
    with pytest.raises(ValueError, match="role 'tool' is unknown; use system, user, assistant or observation"):
        tok.build_single_message("tool", "", "")
    with pytest.raises(TypeError, match="a text must be a string, got NoneType"):
        tok.encode_text(None)
    with pytest.raises(ValueError, match="cannot add <extra>: text is encoded by SentencePiece alone"):
        tok.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match="encode_special_tokens=True would turn what a user types into control"):
        ChatGLMTokenizer.from_pretrained(folder, encode_special_tokens=True)


# Loading and saving.

MODEL_CONFIGS = {
    "chatglm3": json.loads((GOLDEN / "tiny_chatglm3" / "config.json").read_text(encoding="utf-8")),
    "chatglm2": {
        "_name_or_path": "THUDM/chatglm2-6b",
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
        "num_layers": 2,
        "padded_vocab_size": 1024,
    },
}
# As later official files and files saved by older transformers have it.
REPETITIVE_CONFIG = OFFICIAL_CONFIG | {
    "eos_token": "</s>",
    "pad_token": "<unk>",
    "unk_token": "<unk>",
    "encode_special_tokens": False,
    "padding_side": "left",
    "additional_special_tokens": ["<|user|>", "<|observation|>"],
}


@pytest.mark.parametrize("model", [None, "chatglm3", "chatglm2"])
@pytest.mark.parametrize("config", [OFFICIAL_CONFIG, REPETITIVE_CONFIG], ids=["official", "repetitive"])
def test_auto_tokenizer_loads_official_folders(tok, small_model, tmp_path, no_questions, model, config):
    files = {"config": MODEL_CONFIGS[model]} if model else {}
    loaded = AutoTokenizer.from_pretrained(
        write_folder(tmp_path, small_model, config, **files), trust_remote_code=False
    )
    assert type(loaded) is ChatGLMTokenizer
    assert loaded("皮卡丘", return_tensors="pt")["input_ids"].tolist() == [tok.encode("皮卡丘")]
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.padding_side) == (2, 0, "left")
    assert loaded.all_special_tokens == tok.all_special_tokens


def test_embedded_tiny_tokenizer(tiny_folder):
    tokenizer = load_tokenizer(tiny_folder)
    text = "皮卡丘是电属性的宝可梦。👋 <|user|>"
    assert tokenizer.decode(tokenizer.encode_text(text)) == text
    assert max(tokenizer.encode_text(text)) < tokenizer.get_command("[MASK]")
    assert tokenizer.stop_token_ids == [2, tokenizer.vocab_size - 3, tokenizer.vocab_size - 1]


def test_listed_tokens_must_be_the_vocabularys(tok, small_model, tmp_path):
    user_id = tok.get_command("<|user|>")
    for listed, is_right in (({user_id: "<|user|>"}, True), ({user_id: "<|im_end|>"}, False)):
        decoder = {str(i): {"content": token, "special": True} for i, token in listed.items()}
        write_folder(tmp_path, small_model, OFFICIAL_CONFIG | {"added_tokens_decoder": decoder})
        if is_right:
            assert ChatGLMTokenizer.from_pretrained(tmp_path).get_command("<|user|>") == user_id
        else:
            with pytest.raises(ValueError, match=rf"adds tokens .* does not hold: <\|im_end\|> = {user_id}"):
                ChatGLMTokenizer.from_pretrained(tmp_path)
    write_folder(tmp_path, small_model, OFFICIAL_CONFIG | {"additional_special_tokens": ["<|im_end|>"]})
    with pytest.raises(ValueError, match=r"does not hold: <\|im_end\|>; remove them"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_saving_round_trip(tok, folder, tmp_path, no_questions):
    files = [Path(file).name for file in tok.save_pretrained(tmp_path)]
    assert {"tokenizer.model", "tokenizer_config.json"} <= set(files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    assert (tmp_path / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    # The original class cannot be built with special tokens in its configuration.
    assert config == {key: value for key, value in OFFICIAL_CONFIG.items() if key != "name_or_path"} | {
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert again.get_vocab() == tok.get_vocab()
    assert again.apply_chat_template(CHAT, return_dict=False) == tok.apply_chat_template(CHAT, return_dict=False)


def test_saving_keeps_what_was_changed(folder, tmp_path):
    changed = ChatGLMTokenizer.from_pretrained(folder, model_max_length=2048, padding_side="right")
    changed.pad_token = changed.eos_token
    changed.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert (again.model_max_length, again.padding_side, again.pad_token_id) == (2048, "right", 2)


def test_saving_into_its_own_folder_and_after_the_source_is_gone(small_model, tmp_path):
    source = write_folder(tmp_path / "source", small_model)
    tokenizer = ChatGLMTokenizer.from_pretrained(source)
    modified = (source / "tokenizer.model").stat().st_mtime_ns
    tokenizer.save_pretrained(source)
    assert (source / "tokenizer.model").stat().st_mtime_ns == modified
    (source / "tokenizer.model").unlink()
    (path,) = tokenizer.save_vocabulary(str(source), filename_prefix="copy")
    assert Path(path).name == "copy-tokenizer.model"
    assert Path(path).read_bytes() == small_model


def test_copies_and_pickles_are_equal(tok):
    for other in (copy.deepcopy(tok), pickle.loads(pickle.dumps(tok))):
        assert other.encode("皮卡丘👋") == tok.encode("皮卡丘👋")
        assert other.stop_token_ids == tok.stop_token_ids
    tokens = pickle.loads(pickle.dumps(tok.tokenize("皮卡丘")))
    assert tok.convert_tokens_to_ids(tokens) == tok.encode_text("皮卡丘")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:e7dc\nsize 1018370\n", "is a git-lfs pointer"),
        (b"<html>not found</html>", "is not a SentencePiece model"),
        (b"", "is empty; download it again"),
        (None, "no tokenizer.model"),
    ],
)
def test_broken_tokenizer_files_are_named(folder, tmp_path, content, error):
    write_folder(tmp_path, content or b"")
    if content is None:
        (tmp_path / "tokenizer.model").unlink()
    with pytest.raises((ValueError, OSError), match=error):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_models_without_end_or_begin(tmp_path):
    with pytest.raises(ValueError, match="has no end token"):
        ChatGLMTokenizer(write_folder(tmp_path, train_model(eos_id=-1)) / "tokenizer.model")
    tokenizer = ChatGLMTokenizer(write_folder(tmp_path, train_model(bos_id=-1, eos_id=1)) / "tokenizer.model")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.stop_token_ids[0]) == (None, 1, 1)


def test_models_that_add_no_space_keep_the_users(tmp_path):
    model = train_model(add_dummy_prefix=False)
    tokenizer = ChatGLMTokenizer(write_folder(tmp_path, model) / "tokenizer.model")
    for text in (" 火", "火", "  a"):
        assert tokenizer.decode(tokenizer.encode_text(text)) == text
