"""Gradient checkpointing policies: the same gradients, other activations kept."""

import pytest
import torch
from test_packing import build, gradients, make_rows
from training_helpers import losses, train

from finetune_chatmodel_demo.chatglm3.kernels import set_policy
from finetune_chatmodel_demo.training.command_line import parse_given


def enable(model, policy):
    set_policy(model, policy)
    if policy != "none":
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def kept_numbers(model, row) -> int:
    """Numbers that the forward pass keeps for the backward pass, without parameters."""
    parameters = {value.data_ptr() for value in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**row).loss
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["ptuning", "lora", "full"])
def test_gradients_are_the_same(kind):
    row = make_rows()[2]
    found = {}
    for policy in ("none", "mlp", "full"):
        model = build(kind)
        enable(model, policy)
        model(**row).loss.backward()
        found[policy] = gradients(model)
    for policy in ("mlp", "full"):
        assert found[policy].keys() == found["none"].keys()
        for name, value in found["none"].items():
            torch.testing.assert_close(found[policy][name], value, rtol=1e-5, atol=1e-7)


def test_each_policy_computes_its_own_part_twice():
    row, counts = make_rows()[2], {}
    for policy in ("none", "mlp", "full"):
        model, calls = build("ptuning"), {"gate_up": 0, "down": 0, "query": 0}
        enable(model, policy)
        layer = model.model.layers[1]
        parts = {"gate_up": layer.mlp.gate_up_proj, "down": layer.mlp.down_proj, "query": layer.self_attn.q_proj}
        for name, module in parts.items():
            module.register_forward_hook(lambda *_, name=name, calls=calls: calls.update({name: calls[name] + 1}))
        model(**row).loss.backward()
        counts[policy] = calls
    assert counts == {
        "none": {"gate_up": 1, "down": 1, "query": 1},
        "mlp": {"gate_up": 2, "down": 1, "query": 1},
        "full": {"gate_up": 2, "down": 1, "query": 2},  # recomputing ends with the last activation that is needed
    }


def test_frozen_weights_keep_no_activations():
    row = make_rows()[2]
    kept = {}
    for kind in ("ptuning", "full"):
        for policy in ("none", "mlp", "full"):
            model = build(kind)
            enable(model, policy)
            kept[kind, policy] = kept_numbers(model, row)
    assert kept["ptuning", "full"] < kept["ptuning", "mlp"] < kept["ptuning", "none"]
    assert kept["ptuning", "none"] < 0.8 * kept["full", "none"]
    # The MLP's inside, 2 × 64 and 64 and 64 wide, is most of what a layer of width 32 keeps.
    assert kept["ptuning", "mlp"] < 0.75 * kept["ptuning", "none"]


def test_evaluation_computes_nothing_twice():
    model = build("ptuning").eval()
    enable(model, "mlp")
    calls = []
    model.model.layers[0].mlp.gate_up_proj.register_forward_hook(lambda *_: calls.append(1))
    model(**make_rows()[2]).loss.backward()
    assert len(calls) == 1


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match="'half'; use one of none, mlp, full"):
        set_policy(build("full"), "half")


@pytest.mark.parametrize(
    ("value", "expected"), [("none", False), ("full", True), ("mlp", "mlp"), ("True", True), ("false", False)]
)
def test_the_flag_takes_policies_and_truth_values(value, expected):
    assert parse_given(["--gradient_checkpointing", value])[0] == {"gradient_checkpointing": expected}


@pytest.mark.usefixtures("no_pictures")
def test_a_run_with_each_policy(model, data, tmp_path, capsys):
    for policy, text in (("none", "off"), ("mlp", "of MLPs"), ("full", "on")):
        assert train(model, data, tmp_path / policy, pre_seq_len=4, gradient_checkpointing=policy) == 0
        assert f"gradient checkpointing {text}" in capsys.readouterr().out
    assert losses(tmp_path / "mlp") == pytest.approx(losses(tmp_path / "none"), rel=1e-6)
    assert losses(tmp_path / "full") == pytest.approx(losses(tmp_path / "none"), rel=1e-6)
