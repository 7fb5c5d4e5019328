"""The memory plan, counted on tensors without content, against what is allocated in whole steps with real ones."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from memory_helpers import measure_peak, step_of

from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.lora import add_adapter
from finetune_chatmodel_demo.training.deciding import read_settings
from finetune_chatmodel_demo.training.memory import GIB, NF4_BYTES, Step, build_model, plan_memory

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))

SMALL = ChatGLM3Config(
    num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=4, multi_query_group_num=2, kv_channels=64,
    padded_vocab_size=1024,
)  # fmt: skip
LARGER = ChatGLM3Config(
    num_layers=6, hidden_size=320, ffn_hidden_size=900, num_attention_heads=5, multi_query_group_num=1, kv_channels=64,
    padded_vocab_size=2048,
)  # fmt: skip
METHODS, POLICIES = ("ptuning", "lora", "freeze", "full"), ("none", "mlp", "full")
PARAMETERS = 6_243_584_000  # the official checkpoint's


def cases() -> dict[str, Step]:
    found = {
        f"{method}-{policy}": step_of(SMALL, method, policy, accumulates=method == "lora")
        for method in METHODS
        for policy in POLICIES
    }
    found |= {f"{method}-float32": step_of(SMALL, method, precision="float32") for method in METHODS}
    found |= {f"{method}-packed": step_of(SMALL, method, "full", segments=4) for method in ("ptuning", "lora")}
    found |= {f"{method}-larger": step_of(LARGER, method, "full", tokens=640, accumulates=True) for method in METHODS}
    found["projection"] = step_of(SMALL, "ptuning", prefix_projection=True, rows=3, tokens=256)
    return found


@pytest.mark.parametrize("step", cases().values(), ids=cases().keys())
def test_plan_against_allocations(step: Step):
    plan = plan_memory(step)
    assert plan.total == pytest.approx(measure_peak(step), rel=0.05)
    model = build_model(step)
    assert plan.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.parameters == sum(p.numel() for p in model.parameters())


def test_trained_parameters_by_the_flags():
    def trained(**flags) -> int:
        model = build_model(Step(SMALL, read_settings(flags), rows=1, tokens=8, supervised=8))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    layers, width = SMALL.num_layers, SMALL.hidden_size
    adapter = layers * 3 * (704 + width)
    lora = {"finetuning_type": "lora", "lora_rank": 3, "lora_target": "down_proj"}
    assert trained(pre_seq_len=5) == 5 * SMALL.kv_size
    assert trained(**lora) == adapter
    assert trained(**lora, additional_target="lm_head") == adapter + 1024 * width
    assert trained(**lora, stage="rm") == adapter + width + 1
    norms = {"freeze_trainable_layers": -3, "freeze_trainable_modules": "input_layernorm"}
    assert trained(finetuning_type="freeze", **norms) == 3 * width


@pytest.mark.parametrize("policy", [pytest.param("none", marks=pytest.mark.thorough), "full"])
def test_true_6b_configuration_on_a_gpu(policy):
    """The values of the formula that stood here before, which was held to the peaks of real steps."""
    wanted = {"none": 18.32, "full": 13.14}
    settings = read_settings({"pre_seq_len": 128})
    plan = plan_memory(Step(ChatGLM3Config(), settings, 1, 2048, 2048, policy=policy, accumulates=True))
    assert plan.parameters - plan.trained == PARAMETERS
    assert plan.parts["weights"] == pytest.approx(2 * PARAMETERS, rel=1e-4)
    assert plan.total / GIB == pytest.approx(wanted[policy], rel=0.05)


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
    assert held == pytest.approx({4: NF4_BYTES, 8: 1 + 4 / inputs}[bits] * inputs * outputs, rel=0.01)


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("method", ["ptuning", "lora"])
def test_peak_on_a_base_of_four_bits(method, policy):
    pytest.importorskip("bitsandbytes")
    from bench_gpu import build_model as build_random

    step = step_of(SMALL, method, policy, quantization_bit=4)
    model = build_random(SimpleNamespace(device="cpu"), SMALL, bits=4)
    model = add_adapter(model, rank=8) if method == "lora" else model
    if method == "ptuning":
        model.add_prefix(32)
    model.train()
    if policy == "full":
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert plan_memory(step).total == pytest.approx(measure_peak(step, model), rel=0.1)
