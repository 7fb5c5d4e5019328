"""The chunked loss behind a frozen and a trained head: values, gradients, and what exists at one time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM, kernels
from finetune_chatmodel_demo.chatglm3.kernels import summed_cross_entropy
from finetune_chatmodel_demo.training.memory import PeakCounter

WIDTH, VOCABULARY, POSITIONS = 24, 96, 20


def make_head(dtype: torch.dtype = torch.float32, is_trained: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY, bias=False).to(dtype).requires_grad_(is_trained)


def draw(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    hidden = (3 * torch.randn(POSITIONS, WIDTH)).to(dtype).requires_grad_()
    return hidden, torch.randint(0, VOCABULARY, (POSITIONS,))


@pytest.mark.parametrize("chunk", [1024, 7])
@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradients_are_those_of_full_logits(dtype, is_trained, chunk, monkeypatch):
    monkeypatch.setattr(kernels, "LOSS_CHUNK", chunk)
    head, (hidden, targets) = make_head(dtype, is_trained), draw(dtype)
    expected = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    (expected / 3).backward()
    wanted = [hidden.grad] + ([head.weight.grad] if is_trained else [])
    hidden.grad = head.weight.grad = None
    found = summed_cross_entropy(head, hidden, targets)
    (found / 3).backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for ours, theirs in zip([hidden.grad, head.weight.grad], wanted):
        torch.testing.assert_close(ours, theirs, rtol=4 * step, atol=4 * step)
    assert is_trained or head.weight.grad is None


@pytest.mark.parametrize("chunk", [1024, 7])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_model_has_the_loss_and_gradients_of_full_logits(is_frozen, chunk, monkeypatch):
    monkeypatch.setattr(kernels, "LOSS_CHUNK", chunk)
    sizes = {"padded_vocab_size": 128, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16}
    model = ChatGLM3ForCausalLM(ChatGLM3Config(**sizes, num_attention_heads=4, num_layers=2))
    model.lm_head.requires_grad_(not is_frozen)
    torch.manual_seed(1)
    ids = torch.randint(3, 128, (3, 20))
    labels = torch.where(torch.rand(3, 20) < 0.6, ids, -100)
    full = model(ids).logits[:, :-1].flatten(0, 1)
    reference = F.cross_entropy(full, labels[:, 1:].flatten(), ignore_index=-100)
    reference.backward()
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    expected = {name: value.grad.clone() for name, value in trained}
    model.zero_grad()
    output = model(ids, labels=labels)
    assert output.logits is None
    output.loss.backward()
    assert output.loss.item() == pytest.approx(reference.item(), abs=1e-6)
    assert all(torch.allclose(value.grad, expected[name], atol=1e-6) for name, value in trained)
    assert model(ids, labels=labels, output_logits=True).logits.shape == (3, 20, 128)
    assert model(ids, logits_to_keep=2).logits.shape == (3, 2, 128)


def test_behind_a_frozen_head_each_chunk_is_computed_once(monkeypatch):
    monkeypatch.setattr(kernels, "LOSS_CHUNK", 7)
    calls = {}
    for is_trained in (False, True):
        head, (hidden, targets) = make_head(is_trained=is_trained), draw()
        sizes = calls.setdefault(is_trained, [])
        head.register_forward_hook(lambda module, inputs, output, sizes=sizes: sizes.append(len(output)))
        summed_cross_entropy(head, hidden, targets).backward()
    assert calls[False] == [7, 7, 6]
    assert sorted(calls[True]) == [6, 6, 7, 7, 7, 7]  # checkpointed


def test_without_gradients_a_trained_head_is_as_a_frozen_one(monkeypatch):
    monkeypatch.setattr(kernels, "LOSS_CHUNK", 7)
    head, (hidden, targets) = make_head(is_trained=True), draw()
    expected = summed_cross_entropy(head, hidden, targets).item()
    with torch.no_grad():
        assert summed_cross_entropy(head, hidden, targets).item() == pytest.approx(expected, rel=1e-6)


def test_a_head_that_is_no_plain_matrix_still_counts(monkeypatch):
    """An adapter around it, a bias, weights that DeepSpeed has shared out: the way that calls it."""
    head, (hidden, targets) = make_head(), draw()
    wrapped = nn.Sequential(copy.deepcopy(head))
    biased = nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)
    biased.weight.data, biased.bias.data = head.weight.data, torch.zeros(VOCABULARY)
    shared = copy.deepcopy(head)
    shared.weight.ds_id = 0
    expected = summed_cross_entropy(head, hidden, targets).item()
    for other in (wrapped, biased, shared):
        assert summed_cross_entropy(other, hidden, targets).item() == pytest.approx(expected, rel=1e-6)
        assert not kernels._is_frozen_matrix(other)


@pytest.mark.parametrize("is_trained", [False, True])
def test_no_positions_are_a_zero_with_a_graph(is_trained):
    """A head that is shared out among processes is called all the same: the others wait for it."""
    head, (hidden, targets) = make_head(is_trained=is_trained), draw()
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    loss = summed_cross_entropy(head, hidden[:0], targets[:0])
    loss.backward()
    assert loss.item() == 0 and loss.dtype == torch.float32
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    head.weight.ds_id = 0
    calls.clear()
    summed_cross_entropy(head, hidden[:0], targets[:0])
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_chunk_of_logits_exists_at_a_time(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "LOSS_CHUNK", 4)
    head, (hidden, targets) = make_head(dtype), draw(dtype)
    counter = PeakCounter()
    for tensor in (head.weight, hidden, targets):
        counter.add(tensor)
    before = counter.now
    with counter:
        summed_cross_entropy(head, hidden, targets).backward()
    logits = 4 * VOCABULARY * (4 if dtype == torch.float32 else 2 + 4)
    gradients = 3 * hidden.numel() * hidden.element_size()  # what is kept, and two while it is handed on
    assert logits <= counter.peak - before <= logits + gradients
    assert counter.peak - before < POSITIONS * VOCABULARY * 4
