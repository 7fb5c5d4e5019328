"""Forgetting probes: perplexity as computed by hand, obedience of scripted replies, the file that comes along."""

import json
import math
import re

import pytest
import torch

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.render import render_conversation
from finetune_chatmodel_demo.evaluation import probing
from finetune_chatmodel_demo.evaluation.probing import (
    PROBES_FILE,
    measure_obedience,
    measure_perplexity,
    probe_model,
    read_probes,
)
from finetune_chatmodel_demo.generation.batch import BatchReply


def nll(model, ids, first):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logits[i - 1, ids[i]]) for i in first)


def test_perplexity_of_texts_and_conversations_is_that_of_their_tokens(prefix_model, tokenizer):
    text, talk = "皮卡丘的颜色是黄色。", [("user", "你好"), ("assistant", "再见")]
    ids = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop"), *tokenizer.encode_text(text)]
    loss = nll(prefix_model, ids, range(2, len(ids)))
    found = measure_perplexity(prefix_model, tokenizer, [text])
    assert found["tokens"] == len(ids) - 2
    assert math.log(found["perplexity"]) == pytest.approx(loss / found["tokens"], rel=1e-4)
    assert found["bits_per_character"] == pytest.approx(loss / math.log(2) / len(text), rel=1e-4)
    row = render_conversation(
        tokenizer, {"conversations": [{"role": role, "content": content} for role, content in talk]}
    )
    counted = [i for i, label in enumerate(row.labels) if label != -100]
    both = measure_perplexity(prefix_model, tokenizer, [text, talk])
    loss += nll(prefix_model, row.input_ids, counted)
    assert both["tokens"] == found["tokens"] + len(counted)
    assert math.log(both["perplexity"]) == pytest.approx(loss / both["tokens"], rel=1e-4)


def test_the_prefix_makes_a_difference_that_can_be_switched_off(prefix_model, tokenizer):
    texts = ["春天来了。"]
    on = measure_perplexity(prefix_model, tokenizer, texts)
    with prefix_model.prefix_disabled():
        off = measure_perplexity(prefix_model, tokenizer, texts)
    assert on["perplexity"] != off["perplexity"]
    assert measure_perplexity(prefix_model, tokenizer, texts) == on


def test_obedience_is_ending_keeping_the_role_and_the_form(monkeypatch, prefix_model, tokenizer):
    replies = {
        "数字": [BatchReply("12", False), (True, True, True)],
        "长": [BatchReply("12", True), (False, True, False)],
        "空": [BatchReply("", False), (True, False, False)],
        "工具": [BatchReply("[tool call: x]\n12", False), (True, False, False)],
        "记号": [BatchReply("12<|user|>", False), (True, False, False)],
        "别的": [BatchReply("十二个月", False), (True, True, False)],
        "随便": [BatchReply("你好", False), (True, True, None)],
    }
    monkeypatch.setattr(probing, "generate_replies", lambda *_, **__: [reply for reply, _ in replies.values()])
    tasks = [(prompt, None if prompt == "随便" else re.compile(r"\d+")) for prompt in replies]
    found = measure_obedience(prefix_model, tokenizer, tasks, batch_size=2)
    for row, (_, expected) in zip(found["replies"], replies.values()):
        assert (row["ended"], row["role_format"], row["asked_form"]) == expected, row["prompt"]
    assert found["asked"] == 7
    assert (found["ended"], found["role_format"], found["asked_form"]) == pytest.approx((6 / 7, 4 / 7, 1 / 6))


def test_the_probes_that_come_along(prefix_model, tokenizer):
    probes = read_probes()
    assert {name: len(items) for name, items in probes.texts.items()} == {
        "general dialogues": 10,
        "general prose": 6,
        "domain prose": 6,
    }
    assert len(probes.tasks) == 10
    good = ["12", "不会", "苹果、梨、桃", "我是一个助手。", '{"answer": "蓝色"}', "Goodbye", "春风\n秋雨", "答：是的。"]
    for (prompt, form), reply in zip(probes.tasks, good):
        assert form.fullmatch(reply), prompt
        assert not form.fullmatch("皮卡丘的属性是电。") or "介绍" in prompt
    found = probe_model(prefix_model, tokenizer, probes, batch_size=8)
    assert set(found) == {"perplexity", "obedience"}
    assert all(1 < figures["perplexity"] < math.inf for figures in found["perplexity"].values())


@pytest.mark.parametrize(
    "data",
    [
        "[]",
        "{",
        '{"perplexity": {}}',
        '{"perplexity": {}, "obedience": []}',
        '{"perplexity": {"x": [1]}, "obedience": []}',
        '{"perplexity": {"x": [""]}, "obedience": []}',
        '{"perplexity": {"x": [[["user", "好"]]]}, "obedience": []}',
        '{"perplexity": {"x": [[["assistant", ""]]]}, "obedience": []}',
        '{"perplexity": {"x": [[["bot", "好"], ["assistant", "好"]]]}, "obedience": []}',
        '{"perplexity": {"x": [[["user", 1], ["assistant", "好"]]]}, "obedience": []}',
        "[" * 3000,
        '{"perplexity": {}, "obedience": [{"prompt": "x", "form": "("}]}',
    ],
)
def test_files_that_are_no_probes(tmp_path, data):
    (tmp_path / "p.json").write_text(data, encoding="utf-8")
    with pytest.raises(UserError, match=r"p\.json (is no probe file|holds no probe)"):
        read_probes(tmp_path / "p.json")


def test_own_probes(tmp_path):
    data = {"perplexity": {"x": ["文"]}, "obedience": [{"prompt": "好吗？"}]}
    (tmp_path / "p.json").write_text(json.dumps(data), encoding="utf-8")
    assert read_probes(tmp_path / "p.json").texts == {"x": ["文"]}
    assert PROBES_FILE.is_file()
