"""Our RMSNorm and SwiGLU against transformers' modules: the same values, the same gradients, less kept."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from test_packing import build, gradients
from test_recomputing import enable
from torch import nn
from training_helpers import losses, make_model, train, write_conversations
from transformers.models.glm.modeling_glm import GlmRMSNorm

from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.kernels import ChatGLM3RMSNorm, compile_elementwise, swiglu

ROWS, TOKENS, WIDTH = 2, 7, 48
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_()


def kept_bytes(run) -> int:
    """Bytes that `run` keeps for its backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


def make_norm(kind: type[nn.Module], dtype: torch.dtype, is_trained: bool) -> nn.Module:
    norm = kind(WIDTH, eps=1e-5).to(dtype)
    norm.weight.data = draw(WIDTH, dtype=dtype, seed=1).data
    return norm.requires_grad_(is_trained)


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_equals_that_of_transformers(dtype, weight_dtype, is_trained):
    """Frozen or trained, also where a trained weight is float32 and the text is not."""
    found = []
    for kind in (GlmRMSNorm, ChatGLM3RMSNorm):
        norm, hidden = make_norm(kind, weight_dtype, is_trained), draw(ROWS, TOKENS, WIDTH, dtype=dtype)
        output = norm(hidden)
        output.backward(draw(ROWS, TOKENS, WIDTH, dtype=output.dtype, seed=2).detach())
        found.append((output.detach(), hidden.grad, norm.weight.grad))
    (output, of_hidden, of_weight), (our_output, ours_of_hidden, ours_of_weight) = found
    assert torch.equal(our_output, output) and our_output.dtype == output.dtype
    assert (of_weight is None) == (ours_of_weight is None) == (not is_trained)
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    torch.testing.assert_close(ours_of_hidden, of_hidden, rtol=2 * step[dtype], atol=step[dtype])
    if is_trained:
        assert torch.equal(ours_of_weight, of_weight)


def test_rms_norm_without_gradients_is_that_of_transformers():
    hidden = draw(ROWS, TOKENS, WIDTH, dtype=torch.bfloat16)
    ours, theirs = (make_norm(kind, torch.bfloat16, True) for kind in (ChatGLM3RMSNorm, GlmRMSNorm))
    with torch.no_grad():
        assert torch.equal(ours(hidden), theirs(hidden))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_equals_the_plain_formula(dtype):
    found = []
    for is_ours in (False, True):
        gate_up = draw(ROWS, TOKENS, 2 * WIDTH, dtype=dtype)
        gate, up = gate_up.chunk(2, dim=-1)
        output = swiglu(gate_up) if is_ours else up * F.silu(gate)
        output.backward(draw(ROWS, TOKENS, WIDTH, dtype=dtype, seed=2).detach())
        found.append((output.detach(), gate_up.grad))
    assert torch.equal(found[1][0], found[0][0])
    assert torch.equal(found[1][1], found[0][1])


def test_what_they_keep():
    """In bytes, against autograd's way of doing it."""
    tokens = ROWS * TOKENS
    hidden = draw(ROWS, TOKENS, WIDTH, dtype=torch.bfloat16)
    norms = {kind: make_norm(kind, torch.bfloat16, False) for kind in (GlmRMSNorm, ChatGLM3RMSNorm)}
    weight = 2 * WIDTH
    assert kept_bytes(lambda: norms[ChatGLM3RMSNorm](hidden)) == tokens * (2 * WIDTH + 4) + weight
    assert kept_bytes(lambda: norms[GlmRMSNorm](hidden)) >= tokens * (4 * WIDTH + 4) + weight
    gate_up = draw(ROWS, TOKENS, 2 * WIDTH, dtype=torch.bfloat16)
    gate, up = gate_up.chunk(2, dim=-1)
    assert kept_bytes(lambda: swiglu(gate_up)) == tokens * 2 * (2 * WIDTH)
    assert kept_bytes(lambda: up * F.silu(gate)) == tokens * 2 * (3 * WIDTH)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize(
    "policy",
    ["mlp", pytest.param("none", marks=pytest.mark.thorough), pytest.param("full", marks=pytest.mark.thorough)],
)
def test_compiled_functions_give_the_same_loss_and_gradients(policy):
    """For rows of several lengths, with few compilations."""
    plain, compiled = (build("ptuning") for _ in range(2))
    compile_elementwise(compiled)
    for model in (plain, compiled):
        enable(model, policy)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for length in (7, 12, 5, 9, 16):
        ids = torch.randint(1, 96, (1, length), generator=torch.Generator().manual_seed(length))
        losses = [model(input_ids=ids, labels=ids).loss for model in (plain, compiled)]
        for loss in losses:
            loss.backward()
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    found, expected = gradients(compiled), gradients(plain)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    kinds = 4  # norm, SwiGLU, and the gradients of both; each for one length, then for any
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3 * kinds


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_folder):
    """A small model, and data."""
    folder = tmp_path_factory.mktemp("files")
    return make_model(folder / "model", tiny_folder), write_conversations(folder / "train.jsonl")


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_torch_compile_trains_as_without_it(files, tmp_path, capsys):
    for name, more in (("plain", {}), ("compiled", {"torch_compile": True})):
        assert train(*files, tmp_path / name, pre_seq_len=4, learning_rate=1e-2, **more) == 0
        assert ("norms and SwiGLU compiled" in capsys.readouterr().out) == (name == "compiled")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"torch_compile_mode": "max-autotune"}, "--torch_compile_mode is not supported; --torch_compile True fuses"),
        ({"torch_compile": True}, "--torch_compile needs a C++ compiler on a CPU"),
    ],
)
def test_what_cannot_be_compiled_is_refused(options, message, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert train(*files, tmp_path / "o", pre_seq_len=4, **options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_another_activation_is_refused():
    with pytest.raises(ValueError, match="hidden_act='gelu'; ChatGLM3's MLP is SwiGLU"):
        ChatGLM3Config(hidden_act="gelu")
