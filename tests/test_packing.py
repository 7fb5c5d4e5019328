"""Packed rows: the losses and gradients of conversations that share a row equal those of the same ones alone."""

import json
import random
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.bias import CausalBias
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import losses, make_model, train, write_conversations

from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM, attention, prefix
from finetune_chatmodel_demo.chatglm3.attention import Packing, Prefix, _flex
from finetune_chatmodel_demo.chatglm3.lora import add_adapter
from finetune_chatmodel_demo.conversation.collating import PackCollator
from finetune_chatmodel_demo.conversation.packing import group_rows

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


CPU = torch.device("cpu")


@pytest.mark.parametrize("lengths", [(7, 1, 12, 5), (128, 128), (300, 128, 1, 55), (130, 20, 400, 256)])
@pytest.mark.parametrize(("shared", "length"), [(False, 0), (True, 3), (True, 128), (False, 24), (False, 128)])
def test_blocks_are_those_that_pytorch_finds(lengths, shared, length):
    """From the lengths, without a mask of all queries and keys."""
    prefixes = 1 if shared else len(lengths) if length else 0
    row, tokens = Packing(lengths), sum(lengths)
    visible = row.is_visible(prefixes, length, CPU)
    expected = create_block_mask(visible, None, None, tokens, tokens + prefixes * length, device="cpu")
    found = row.block_mask(prefixes, length, CPU)
    assert found.shape == expected.shape and found.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_blocks_of_a_long_row_take_little_memory():
    """`create_block_mask` makes a mask of 8,192 × 14,592: 114 MiB, and copies of it."""
    row = Packing([8192 // 50] * 49 + [8192 - 49 * (8192 // 50)])
    with LargestTensor() as largest:
        row.block_mask(50, 128, CPU)
    assert largest.bytes == 8192 * 8 * (8192 + 50 * 128) // 128  # a number for each query and block of keys


def make_tensors(heads: int, tokens: int, groups: int, keys: int, channels: int, **options) -> list[torch.Tensor]:
    return [torch.randn(1, n, length, channels, **options) for n, length in ((heads, tokens), *[(groups, keys)] * 2)]


@pytest.mark.parametrize("copies", [1, 4])
def test_the_way_of_cuda_gives_the_same_output(copies, monkeypatch):
    """FlexAttention without its compiler, on the CPU."""
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: flex.flex_attention)
    module = build("full").model.layers[1].self_attn
    torch.manual_seed(1)
    query, key, value = make_tensors(4, sum(LENGTHS), 2, sum(LENGTHS), 8)
    prefix = Prefix(3, torch.randn(2, 2, copies, 2, 3, 8))
    ours = attention.packed_attention(module, query, key, value, Packing(LENGTHS), prefix, module.scaling)
    found = _flex(module, query, key, value, Packing(LENGTHS), prefix, module.scaling)
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ptuning", "full"])
def test_the_way_of_cuda_under_autocast(kind, monkeypatch):
    """Float32 weights make float32 queries and keys and bfloat16 values; older FlexAttention wants one dtype."""
    seen = []

    def attend(query, key, value, **options):
        seen.append({query.dtype, key.dtype, value.dtype})
        return flex.flex_attention(query, key, value, **options)

    model, rows = build(kind).eval(), make_rows()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**pack(rows)).loss
        monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: attend)
        monkeypatch.setattr(attention, "uses_flex", lambda *arguments: True)
        loss = model(**pack(rows)).loss
    assert seen == [{torch.bfloat16}] * 2  # layers
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)


def random_rows(count: int) -> list[Packing]:
    """Rows that differ in everything that can change from step to step."""
    draw = random.Random(0)
    return [Packing([draw.randint(5, 120) for _ in range(draw.randint(3, 9))]) for _ in range(count)]


@pytest.mark.thorough
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_rows_of_all_lengths_share_three_kernels():
    """The first row's, the second's, which has as many blocks of keys, and one for whatever lengths come.

    PyTorch's limit is 8, and the next row would be computed by a version that writes out all scores.
    """
    module, length = build("full").model.layers[1].self_attn, 24
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for number, row in enumerate(random_rows(14)):
            copies = (len(row.lengths), 1, 0)[number // 5]
            prefix = Prefix(length, torch.randn(2, 2, copies, 2, length, 16)) if copies else None
            tensors = make_tensors(4, sum(row.lengths), 2, sum(row.lengths), 16)
            expected = attention.packed_attention(module, *tensors, row, prefix, 0.25)
            torch.testing.assert_close(_flex(module, *tensors, row, prefix, 0.25), expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.thorough
def test_training_and_evaluation_compile_four_times(monkeypatch):
    """Both rows of the trial, the first layer (whose queries need no gradient), evaluation; PyTorch's limit is 8.

    Without a compiler, on the CPU: counts what would be compiled.
    """
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)  # refuses gradients on the CPU
    function = torch.compile(flex.flex_attention, fullgraph=True, backend=count)
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: function)
    torch._dynamo.reset()
    assert attention._works_in_flex.__wrapped__(CPU, torch.bfloat16, 4, 2, 16, 0.25, True)
    assert len(compiled) == 2
    for number, row in enumerate(random_rows(12)):
        is_training = number % 4 < 3
        copies = len(row.lengths) if is_training else 1  # dropout gives each conversation its own
        tokens, keys = sum(row.lengths), sum(row.lengths) + copies * 24
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(is_training):
            for layer in range(3):
                query, key, value = make_tensors(4, tokens, 2, keys, 16, dtype=torch.bfloat16)
                for tensor, has_gradient in ((query, layer > 0), (key, True), (value, True)):
                    tensor.requires_grad_(is_training and has_gradient)
                attention._attend(query, key, value, row.block_mask(copies, 24, CPU), 0.25)
    assert len(compiled) == 4


TRIAL = (CPU, torch.float32, 4, 2, 16, 0.25, False)


def test_where_flex_attention_fails_packing_goes_on_without(monkeypatch, caplog):
    """No Triton, no compiler, too few channels or too little shared memory: all show when it is first compiled."""
    calls = []

    def fail(*arguments, **options):
        calls.append(arguments)
        raise RuntimeError("No valid triton configs.\nRequired: 131074 Hardware limit: 101376")

    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: fail)
    attention._works_in_flex.cache_clear()
    assert [attention._works_in_flex(*TRIAL) for _ in range(3)] == [False] * 3
    attention._works_in_flex.cache_clear()
    assert len(calls) == 1
    assert caplog.messages == [
        "packed rows are computed conversation by conversation, which is slower: FlexAttention fails here "
        "(RuntimeError: No valid triton configs.)"
    ]


def test_the_trial_is_invisible_to_checkpointing(monkeypatch):
    def attend(query, key, value, block_mask, scale, enable_gqa):
        return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=enable_gqa)

    saved = []
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: attend)
    before = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor), torch.no_grad():
        assert attention._works_in_flex.__wrapped__(*TRIAL)
    assert saved == [] and torch.equal(before, torch.get_rng_state())


def test_too_little_memory_is_no_reason_to_do_without(monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: fail)
    with pytest.raises(torch.OutOfMemoryError):
        attention._works_in_flex.__wrapped__(*TRIAL)


def test_old_versions_do_without(monkeypatch):
    monkeypatch.setattr(attention, "_attend", None)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.6.0+cu124"))
    assert attention._works_in_flex.__wrapped__(*TRIAL) is False


def test_cuda_gets_a_mask_that_keeps_its_fused_kernel():
    mask = Packing((2,)).causal_mask(2, 3, torch.device("cuda"))
    assert type(mask) is CausalBias
    assert mask._materialize(CPU).tolist() == [[True, True, True, True, False], [True] * 5]
    assert torch.equal(Packing((2,)).causal_mask(2, 3, CPU), mask._materialize(CPU))


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
    [
        pytest.param({"pre_seq_len": 4}, id="ptuning"),
        pytest.param({"finetuning_type": "lora", "learning_rate": 1e-2}, id="lora", marks=pytest.mark.thorough),
        pytest.param({"learning_rate": 1e-3}, id="full", marks=pytest.mark.thorough),
    ],
)
def test_a_packed_run_equals_one_with_the_same_rows_in_a_step(options, model, tmp_path, monkeypatch, capsys):
    """All 24 rows in each step, once as packed groups, once as rows of a batch."""
    monkeypatch.setattr(prefix, "PREFIX_DROPOUT", 0.0)
    data = write_conversations(tmp_path / "train.jsonl")
    options = options | {"max_steps": 3, "train_sampling_strategy": "random"}
    assert train(model, data, tmp_path / "rows", per_device_train_batch_size=24, **options) == 0
    lengths = {"max_seq_length": 512, "packing": True}
    assert train(model, data, tmp_path / "packed", per_device_train_batch_size=4, **options, **lengths) == 0
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "rows"), rel=1e-5)
    printed = capsys.readouterr().out
    (groups, filled), (tokens,) = (
        re.search(pattern, printed).groups()
        for pattern in (r"packing +24 rows in (\d) of up to 512 tokens, ([\d.]+)% filled", r"24 rows, ([\d,]+) tokens")
    )
    assert float(filled) == pytest.approx(100 * int(tokens.replace(",", "")) / (int(groups) * 512), abs=0.05)


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
    assert train(model, data, tmp_path / "o", packing=True, **options) == 2
    assert message in capsys.readouterr().err
