"""The formula of the memory plan against what is allocated: by autograd, in whole steps, for quantized weights."""

import copy
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import memory_helpers
import pytest
import torch
from memory_helpers import LORA_RANK, Case, PeakCounter, build_model, measure_kept, measure_peak
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Linear

from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM
from finetune_chatmodel_demo.chatglm3.kernels import set_policy, summed_cross_entropy
from finetune_chatmodel_demo.chatglm3.lora import add_adapter
from finetune_chatmodel_demo.chatglm3.prefix import PrefixEncoder
from finetune_chatmodel_demo.training.memory import (
    GIB,
    _weight_copies,
    layer_bytes,
    outer_bytes,
    plan_memory,
    weight_bytes,
)
from finetune_chatmodel_demo.training.parameter_counts import (
    count_adapter,
    count_frozen_rest,
    count_parameters,
    count_prefix,
)
from finetune_chatmodel_demo.training.run_shape import RunShape

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))

SMALL = ChatGLM3Config(
    num_layers=4, hidden_size=256, ffn_hidden_size=700, num_attention_heads=4, multi_query_group_num=2, kv_channels=64,
    padded_vocab_size=1024,
)  # fmt: skip
LARGER = ChatGLM3Config(
    num_layers=6, hidden_size=320, ffn_hidden_size=900, num_attention_heads=5, multi_query_group_num=1, kv_channels=64,
    padded_vocab_size=2048,
)  # fmt: skip
METHODS, POLICIES = ("ptuning", "lora", "freeze", "full"), ("none", "mlp", "full")
TRAINED_LAYERS = 2  # of method freeze, in `build_model`


def count_trained(case: Case) -> int:
    return {
        "ptuning": count_prefix(case.config, case.prefix, case.projection),
        "lora": count_adapter(case.config, LORA_RANK),
        "freeze": count_frozen_rest(case.config, TRAINED_LAYERS),
        "full": sum(count_parameters(case.config).values()),
    }[case.method]


def shape_of(case: Case) -> RunShape:
    return RunShape(
        config=case.config,
        method=case.method,
        rows=case.rows,
        tokens=case.tokens,
        supervised=case.rows * case.counted,
        trained=count_trained(case),
        number_bytes=2 if case.is_half else 4,
        policy=case.policy,
        pre_seq_len=case.prefix if case.method == "ptuning" else 0,
        segments=len(case.segments or ()),
        active_layers=TRAINED_LAYERS if case.method == "freeze" else None,
        accumulates=case.batches > 1,
        is_cuda=False,
    )


def planned_kept(shape: RunShape) -> float:
    """What the forward pass keeps by the formula, with the dropped-out prefix's mask."""
    rows = max(shape.rows, shape.segments)
    mask = rows * count_prefix(shape.config, shape.pre_seq_len, False) * shape.number_bytes
    layers = shape.rows * shape.tokens * shape.layers * layer_bytes(shape, shape.policy)
    return layers + outer_bytes(shape) + _weight_copies(shape)[1] + mask


def cases() -> list[Case]:
    found = [Case(SMALL, *one, tokens=512) for one in itertools.product(METHODS, POLICIES, (False, True))]
    found += [
        Case(LARGER, method, policy, True, tokens=640, batches=2)
        for method, policy in itertools.product(METHODS, POLICIES)
    ]
    found += [
        Case(SMALL, method, policy, True, tokens=512, segments=(128, 200, 100, 84))
        for method, policy in itertools.product(("ptuning", "lora", "full"), ("none", "full"))
    ]
    return [*found, Case(SMALL, "ptuning", "none", True, tokens=256, rows=3, projection=True)]


def name_of(case: Case) -> str:
    size = "larger" if case.config is LARGER else "small"
    packed = "-packed" if case.segments else ""
    return f"{case.method}-{case.policy}-{'bf16' if case.is_half else 'fp32'}-{size}{packed}-{case.rows}"


@pytest.mark.parametrize(
    "case",
    [pytest.param(one, marks=[pytest.mark.slow] if one.config is LARGER else []) for one in cases()],
    ids=[name_of(one) for one in cases()],
)
def test_formula_against_allocations(case: Case):
    shape = shape_of(case)
    assert planned_kept(shape) == pytest.approx(measure_kept(case), rel=0.1)
    assert plan_memory(shape).total == pytest.approx(measure_peak(case), rel=0.1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("config", [SMALL, LARGER], ids=["small", "larger"])
@pytest.mark.parametrize("projection", [False, True])
def test_trained_parameters(method, config, projection):
    case = Case(config, method, "none", False, tokens=8, projection=projection)
    model = build_model(case)
    assert count_trained(case) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_parameters_of_modules_by_name():
    assert sum(count_parameters(ChatGLM3Config()).values()) == 6_243_584_000  # the official checkpoint's
    model = add_adapter(
        ChatGLM3ForCausalLM(copy.deepcopy(SMALL)), rank=3, target="query_key_value,down_proj", use_dora=True,
        additional_target="lm_head",
    )  # fmt: skip
    counted = count_adapter(SMALL, 3, "query_key_value,down_proj", "lm_head", use_dora=True)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)
    layer = ChatGLM3ForCausalLM(copy.deepcopy(SMALL)).model.layers[0]
    counted = count_frozen_rest(SMALL, -3, "self_attention,input_layernorm", "lm_head")
    wanted = [layer.self_attn, layer.input_layernorm]
    assert counted == 3 * sum(p.numel() for m in wanted for p in m.parameters()) + 1024 * 256


def test_gradients_stop_above_layers_that_freeze_leaves_alone():
    kept = {policy: measure_kept(Case(LARGER, "freeze", policy, True, tokens=256)) for policy in POLICIES}
    assert kept["full"] < kept["mlp"] < kept["none"]
    model = build_model(Case(SMALL, "freeze", "full", False, tokens=16))
    seen = []
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(input_ids=torch.ones(1, 16, dtype=torch.long), labels=torch.ones(1, 16, dtype=torch.long))
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert not output.requires_grad


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_of_quantized_weights(bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    inputs, outputs = 512, 768
    weight = torch.randn(outputs, inputs)
    if bits == 4:
        layer = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, compress_statistics=True, quant_type="nf4")
        layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
        layer = layer.to("cpu")
        state = layer.weight.quant_state
        parts = [layer.weight, state.absmax, state.state2.absmax]
    else:
        layer = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layer = layer.to("cpu")
        parts = [layer.weight, getattr(layer.weight, "SCB", None)]
    held = sum(part.numel() * part.element_size() for part in parts if part is not None)
    per_number = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1 + 4 / inputs}[bits]
    assert held == pytest.approx(per_number * inputs * outputs, rel=0.01)
    # The formula: matrices quantized, everything else as it was.
    config = ChatGLM3Config()
    shape = RunShape(config, "ptuning", 1, 2048, 2048, trained=0, quantization_bit=bits)
    count = count_parameters(config)
    rest = 2 * (count["embeddings"] + count["other"])
    linear = {4: per_number, 8: 1.0}[bits] * count["linear"]
    assert weight_bytes(shape) == pytest.approx(linear + rest, rel=0.01)


def measure_fake_step(policy: str, tokens: int, supervised: int) -> tuple[float, float]:
    """Bytes of the weights, and the peak beside them, of a P-Tuning step of the 6B model on fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True), patch.object(PrefixEncoder, "to", lambda self, *a, **k: self):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = ChatGLM3ForCausalLM(ChatGLM3Config())
        finally:
            torch.set_default_dtype(torch.float32)
        model.add_prefix(128)
        model.train()
        if policy != "none":
            set_policy(model, policy)
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        counter = PeakCounter()
        for tensor in [*model.parameters(), *model.buffers()]:
            counter.add(tensor)
        weights = counter.now
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with counter, torch.autocast("cpu", dtype=torch.bfloat16):
            # The choice of supervised positions depends on data, which fake tensors do not have.
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            summed_cross_entropy(model.lm_head, hidden[0, :supervised], ids[0, :supervised]).backward()
        return weights, counter.peak - weights


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_true_6b_configuration_on_fake_tensors(policy):
    config = ChatGLM3Config()
    weights, beside = measure_fake_step(policy, 2048, 962)
    shape = RunShape(
        config, "ptuning", 1, 2048, 962, trained=count_prefix(config, 128, False), policy=policy, pre_seq_len=128,
        is_cuda=False,
    )  # fmt: skip
    plan = plan_memory(shape)
    planned = plan.total - plan.parts["weights"] - plan.parts["optimizer"]
    assert plan.parts["weights"] / GIB == pytest.approx(weights / GIB, rel=0.01)
    assert planned / GIB == pytest.approx(beside / GIB, rel=0.05)


def test_quantization_leaves_the_head_alone():
    # transformers keeps lm_head out of bitsandbytes; the plan counts it in the precision of the computation.
    model = ChatGLM3ForCausalLM(copy.deepcopy(SMALL))
    linear = [m for name, m in model.named_modules() if isinstance(m, Linear) and "lm_head" not in name]
    assert sum(m.weight.numel() for m in linear) == count_parameters(SMALL)["linear"]


@pytest.mark.parametrize("policy", ["none", "full"])
def test_peak_on_a_base_of_four_bits(policy, monkeypatch):
    pytest.importorskip("bitsandbytes")
    from bench_gpu import build_model as build_random

    # bitsandbytes on a CPU wants widths that are multiples of 64.
    config = ChatGLM3Config(**{**SMALL.to_dict(), "ffn_hidden_size": 704})
    case = Case(config, "ptuning", policy, True, tokens=512)

    def build(case: Case) -> torch.nn.Module:
        model = build_random(SimpleNamespace(device="cpu"), case.config, bits=4)
        model.add_prefix(case.prefix)
        model.train()
        if policy == "full":
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        return model

    monkeypatch.setattr(memory_helpers, "build_model", build)
    shape = replace(shape_of(case), quantization_bit=4)
    assert plan_memory(shape).total == pytest.approx(measure_peak(case), rel=0.1)
