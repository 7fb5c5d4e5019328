"""Packed rows: the losses and gradients of conversations that share a row equal those of the same ones alone."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import create_mask
from training_helpers import losses, make_model, train, write_conversations

from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM, prefix
from finetune_chatmodel_demo.chatglm3.adapters import add_adapter
from finetune_chatmodel_demo.chatglm3.packing import Packing, _flex
from finetune_chatmodel_demo.conversation.collating import PackCollator
from finetune_chatmodel_demo.conversation.grouping import group_rows

LENGTHS = (7, 1, 12, 5)


def build(kind: str, seed: int = 0) -> torch.nn.Module:
    """A random model of 2 layers, in training, with dropout off."""
    torch.manual_seed(seed)
    config = ChatGLM3Config(
        num_layers=2,
        padded_vocab_size=96,
        hidden_size=32,
        ffn_hidden_size=64,
        kv_channels=8,
        num_attention_heads=4,
        multi_query_group_num=2,
        seq_length=64,
        initializer_range=0.2,
    )
    model = ChatGLM3ForCausalLM(config)
    if kind == "ptuning":
        model.add_prefix(3)
        model.prefix_encoder.dropout.p = 0.0
    elif kind == "lora":
        model = add_adapter(model, rank=2)
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.1)
    return model.train()


def make_rows(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Conversations with some labels masked; the first token of each is never a target."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(1, 96, (1, length), generator=draw)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=draw) < 0.4, -100)
        labels[:, 0] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def pack(rows: list[dict[str, torch.Tensor]]) -> dict[str, object]:
    return {
        "input_ids": torch.cat([row["input_ids"] for row in rows], dim=1),
        "labels": torch.cat([row["labels"] for row in rows], dim=1),
        "position_ids": torch.cat([torch.arange(length)[None] for length in LENGTHS], dim=1),
        "segment_lengths": list(LENGTHS),
    }


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["ptuning", "lora", "full"])
def test_packed_losses_and_gradients_equal_unpacked_ones(kind, checkpointing):
    model, rows = build(kind), make_rows()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    count = sum(int((row["labels"] != -100).sum()) for row in rows)
    loss = sum(model(**row, num_items_in_batch=count).loss for row in rows)
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    packed = model(**pack(rows), num_items_in_batch=count).loss
    packed.backward()
    assert packed.item() == pytest.approx(loss.item(), rel=1e-6)
    found = gradients(model)
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_conversations_do_not_see_each_other():
    model, rows = build("ptuning").eval(), make_rows()
    packed = pack(rows)
    del packed["labels"]
    with torch.no_grad():
        before = model(**packed).logits
        packed["input_ids"] = packed["input_ids"].clone()
        packed["input_ids"][0, :7] = 5  # the first conversation
        after = model(**packed).logits
    assert not torch.allclose(before[0, :7], after[0, :7])
    assert torch.equal(before[0, 7:], after[0, 7:])


def test_each_conversation_draws_its_own_prefix_dropout():
    """As rows of a batch do: with one conversation twice in a row, the two logits differ."""
    model = build("ptuning")
    model.prefix_encoder.dropout.p = 0.5
    ids = torch.arange(1, 6)[None]
    positions = torch.arange(5)[None]
    both = {"input_ids": ids.repeat(1, 2), "position_ids": positions.repeat(1, 2), "segment_lengths": [5, 5]}
    logits = model(**both).logits[0]
    assert not torch.allclose(logits[:5], logits[5:])


@pytest.mark.parametrize(("prefixes", "length"), [(0, 0), (1, 3), (4, 3)])
def test_the_mask_of_cuda_says_the_same(prefixes, length):
    """What FlexAttention gets, against a mask written out by hand."""
    packing, tokens = Packing(LENGTHS), sum(LENGTHS)
    keys = prefixes * length + tokens
    expected = torch.zeros(tokens, keys, dtype=torch.bool)
    for number, (start, end) in enumerate(packing.bounds):
        for query in range(start, end):
            copy = number if prefixes > 1 else 0
            expected[query, copy * length : (copy + 1) * length] = True
            expected[query, prefixes * length + start : prefixes * length + query + 1] = True
    mask = create_mask(packing.is_visible(prefixes, length, torch.device("cpu")), 1, 1, tokens, keys, "cpu")
    assert torch.equal(mask[0, 0], expected)


@pytest.mark.parametrize("copies", [1, 4])
def test_the_way_of_cuda_gives_the_same_output(copies, monkeypatch):
    """FlexAttention without its compiler, on the CPU."""
    from torch.nn.attention import flex_attention

    from finetune_chatmodel_demo.chatglm3 import packing
    from finetune_chatmodel_demo.chatglm3.attention import Prefix

    monkeypatch.setattr(packing, "_compiled_flex_attention", lambda: flex_attention.flex_attention)
    module = build("full").model.layers[1].self_attn
    torch.manual_seed(1)
    tokens = sum(LENGTHS)
    query, key, value = torch.randn(1, 4, tokens, 8), torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8)
    prefix = Prefix(3, torch.randn(2, 2, copies, 2, 3, 8))
    scale = module.scaling
    ours = packing.packed_attention(module, query, key, value, Packing(LENGTHS), prefix, scale)
    flex = _flex(module, query, key, value, Packing(LENGTHS), prefix, scale)
    torch.testing.assert_close(flex, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_ids": None}, "needs position_ids"),
        ({"attention_mask": torch.ones(1, 25)}, "takes no mask"),
        ({"segment_lengths": [7, 18, 1]}, "has 1 × 26 tokens, got 1 × 25"),
        ({"segment_lengths": [25, 0]}, "each is at least 1"),
    ],
)
def test_impossible_packings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build("ptuning")(**{**pack(make_rows()), **change})


# Groups of rows


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(20, 64), st.integers(0, 3))
def test_groups_hold_every_row_once_and_are_not_too_full(lengths, capacity, seed):
    groups = group_rows(lengths, capacity, seed)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[row] for row in group) <= capacity
    # Best fit never leaves two groups that would fit into one.
    sums = sorted(sum(lengths[row] for row in group) for group in groups)
    assert len(sums) < 2 or sums[0] + sums[1] > capacity


def test_groups_are_nearly_full():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(60, 320, (3000,), generator=draw).tolist()
    groups = group_rows(lengths, 2048, seed=1)
    assert sum(lengths) / (2048 * len(groups)) > 0.99
    assert groups == group_rows(lengths, 2048, seed=1) != group_rows(lengths, 2048, seed=2)


def test_a_packed_batch():
    items = [
        {"rows": [{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]},
        {"rows": [{"input_ids": [4], "labels": [-100]}]},
    ]
    batch = PackCollator(pad_token_id=0, pad_to_multiple_of=4)(items)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
    assert batch["segment_lengths"] == (3, 2, 1, 2)


# Runs


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_folder):
    return make_model(tmp_path_factory.mktemp("model"), tiny_folder)


@pytest.mark.parametrize(
    "options",
    [{"pre_seq_len": 4}, {"finetuning_type": "lora", "learning_rate": 1e-2}, {"learning_rate": 1e-3}],
    ids=["ptuning", "lora", "full"],
)
def test_a_packed_run_equals_one_with_the_same_rows_in_a_step(options, model, tmp_path, monkeypatch):
    """All 24 rows in each step, once as packed groups, once as rows of a batch."""
    monkeypatch.setattr(prefix, "PREFIX_DROPOUT", 0.0)
    data = write_conversations(tmp_path / "train.jsonl")
    options = options | {"max_steps": 3, "train_sampling_strategy": "random"}
    assert train(model, data, tmp_path / "rows", per_device_train_batch_size=24, **options) == 0
    lengths = {"max_seq_length": 512, "packing": True}
    assert train(model, data, tmp_path / "packed", per_device_train_batch_size=4, **options, **lengths) == 0
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "rows"), rel=1e-5)


def test_a_packed_run_resumes_to_the_same_weights(model, tmp_path):
    data = write_conversations(tmp_path / "train.jsonl")
    options = {"pre_seq_len": 4, "packing": True, "max_seq_length": 200, "per_device_train_batch_size": 1}
    for name, steps in (("a", 6), ("b", 3), ("b", 6)):
        flags = {"max_steps": steps, "save_steps": 3, "lr_scheduler_type": "constant", "resume_from_checkpoint": True}
        assert train(model, data, tmp_path / name, **options, **flags) == 0
    first, second = (load_file(tmp_path / name / "prefix_encoder.safetensors") for name in "ab")
    assert torch.equal(first["embedding.weight"], second["embedding.weight"])
    state = json.loads((tmp_path / "a" / "trainer_state.json").read_text())
    assert state["epoch"] < 1.5  # 24 rows of 1,480 tokens are 8 groups


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stage": "pt"}, "--stage pt always fills its blocks"), ({"streaming": True}, "--packing groups rows")],
)
def test_packing_is_refused_where_it_means_nothing(options, message, model, tmp_path, capsys):
    data = write_conversations(tmp_path / "train.jsonl")
    assert train(model, data, tmp_path / "o", packing=True, **options) == 1
    assert message in capsys.readouterr().err
