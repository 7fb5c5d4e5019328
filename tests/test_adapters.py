"""LoRA adapters: of this project and of the original code, quantized bases, reward models, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapter_helpers import make_adapter, make_official_adapter, randomize
from safetensors.torch import load_file, save_file

from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, load_model
from finetune_chatmodel_demo.chatglm3.lora import (
    add_adapter,
    check_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
    without_tuning,
)
from finetune_chatmodel_demo.chatglm3.lora_files import (
    is_adapter_checkpoint,
    read_adapter_config,
    to_own_names,
    write_adapter,
)
from finetune_chatmodel_demo.common.errors import UserError

IDS = torch.arange(5, 29).view(1, -1)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
FUSED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True, "rank": 4, "alpha": 5},
    "dora": {"use_dora": True},
    "part": {"target": "q_proj,v_proj", "rank": 3, "alpha": 7},
}


@pytest.fixture(scope="module")
def base(golden) -> Path:
    return golden / "tiny_chatglm3"


@pytest.fixture(scope="module")
def weights(base) -> dict[str, torch.Tensor]:
    return {k: v for shard in sorted(base.glob("*.bin")) for k, v in torch.load(shard, weights_only=True).items()}


def load(base: Path, **options):
    return load_model(base, device="cpu", **options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def rewrite(folder: Path, copy: Path, **settings: object) -> Path:
    """A copy of an adapter whose adapter_config.json says something else."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "adapter_config.json").read_text(encoding="utf-8"))
    (copy / "adapter_config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    return copy


# --- save, load, switch off, merge


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_off_and_merged(base, tmp_path, kind):
    model = add_adapter(load(base), **KINDS[kind]).eval()
    plain = logits(load(base))
    if kind != "dora":  # DoRA divides by the norms and multiplies them again
        assert torch.equal(logits(model), plain)
    randomize(model)
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 0.3
    save_adapter(model, tmp_path, base_model=str(base), prompt_format="multi-turn")
    again = load_adapter(load(base), tmp_path).eval()
    assert torch.equal(logits(again), adapted)
    with without_tuning(again):
        assert torch.equal(logits(again), plain)
    assert torch.equal(logits(again), adapted)
    assert (logits(again.merge_and_unload()) - adapted).abs().max() <= 1e-5


def test_an_adapter_says_what_it_is(base, tmp_path):
    make_adapter(tmp_path, base, target="all", rank=4, prompt_format="default")
    found = read_adapter_config(tmp_path)
    assert (found.rank, found.target_modules) == (4, tuple(sorted(ALL)))
    assert (found.base_model, found.prompt_format, found.is_reward_model) == (str(base), "default", False)
    assert is_adapter_checkpoint(tmp_path) and not is_adapter_checkpoint(base)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chatglm3_run.json",
    ]


def test_older_adapters_are_pickles(base, tmp_path):
    make_adapter(tmp_path, base)
    adapted = logits(load_adapter(load(base), tmp_path))
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert torch.equal(logits(load_adapter(load(base), tmp_path)), adapted)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore")
def test_a_quantized_base(base, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    model = add_adapter(load(base, quantization_bit=bits)).eval()
    randomize(model)
    adapted = logits(model)
    save_adapter(model, tmp_path)
    again = load_adapter(load(base, quantization_bit=bits), tmp_path)
    assert torch.equal(logits(again), adapted)
    unquantized = logits(load_adapter(load(base), tmp_path))
    assert torch.nn.functional.cosine_similarity(adapted, unquantized, dim=-1).mean() > {4: 0.8, 8: 0.99}[bits]


def test_a_reward_model_keeps_its_head(base, tmp_path):
    make_adapter(tmp_path, base, head="score")
    torch.manual_seed(1)
    first = load_adapter(load(base, head="score"), tmp_path)
    torch.manual_seed(2)
    second = load_adapter(load(base, head="score"), tmp_path)
    assert logits(first).shape == (1, 1)
    assert torch.equal(logits(first), logits(second))
    assert read_adapter_config(tmp_path).is_reward_model
    with pytest.raises(UserError, match=r"an adapter of a reward model \(stage rm\), not of a language model"):
        load_adapter(load(base), tmp_path)
    with pytest.raises(UserError, match="an adapter of a language model, not of a reward model"):
        load_adapter(load(base, head="score"), make_adapter(tmp_path / "lm", base))


def test_modules_that_are_held_whole(base, tmp_path):
    make_adapter(tmp_path, base, additional_target="lm_head,embed_tokens")
    adapted = load_adapter(load(base), tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(adapted.base_model.model.lm_head.weight, saved["base_model.model.lm_head.weight"])
    expected = logits(adapted)
    with without_tuning(adapted):
        assert torch.equal(logits(adapted), logits(load(base)))
    merged = adapted.merge_and_unload()
    assert (logits(merged) - expected).abs().max() <= 1e-5
    assert torch.equal(merged.lm_head.weight, saved["base_model.model.lm_head.weight"])


def test_only_prefixes_and_adapters_can_be_switched_off(base):
    with pytest.raises(ValueError, match="neither a prefix nor an adapter"), without_tuning(load(base)):
        pass
    model = load(base, pre_seq_len=4)
    with without_tuning(model):
        assert torch.equal(logits(model), logits(load(base)))


# --- adapters of the original code


def merge_by_hand(weights: dict[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    """The original's weights + scale × B × A, in float64, by the names in the adapter."""
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    merged = dict(weights)
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            short = module.rpartition(".")[2]
            alpha = settings.get("alpha_pattern", {}).get(short, settings["lora_alpha"])
            rank = settings.get("rank_pattern", {}).get(short, settings["r"])
            scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
            change = tensors[name.replace("lora_A", "lora_B")].double() @ a.double() * scale
            merged[f"{module}.weight"] = (weights[f"{module}.weight"].double() + change).float()
    return merged


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (["query_key_value"], {}),
        (list(FUSED), {"r": 4, "lora_alpha": 8, "task_type": None}),
        (["query_key_value", "dense"], {"use_rslora": True, "r": 4, "lora_alpha": 4}),
        (["query_key_value", "dense_4h_to_h"], {"rank_pattern": {"query_key_value": 6}, "alpha_pattern": {"dense": 3}}),
        (["dense_h_to_4h"], {"rank_pattern": {"dense_h_to_4h": 2}, "alpha_pattern": {"dense_h_to_4h": 6}}),
    ],
)
def test_adapters_of_the_original_code(base, weights, tmp_path, targets, settings):
    adapter = make_official_adapter(tmp_path / "adapter", weights, targets, **settings)
    merged = tmp_path / "merged"
    merged.mkdir()
    shutil.copy(base / "config.json", merged)
    save_file(merge_by_hand(weights, adapter), merged / "model.safetensors", metadata={"format": "pt"})
    check_adapter(adapter, ChatGLM3Config.from_pretrained(base))
    model = load_adapter(load(base), adapter)
    assert (logits(model) - logits(load(base))).abs().max() > 0.3
    assert (logits(model) - logits(load(merged))).abs().max() <= 1e-5
    assert (logits(model.merge_and_unload()) - logits(load(merged))).abs().max() <= 1e-5


def test_an_original_adapter_is_read_bit_for_bit(base, weights, tmp_path):
    adapter = make_official_adapter(tmp_path, weights, list(FUSED))
    config = ChatGLM3Config.from_pretrained(base)
    settings, tensors = read_adapter(adapter, config)
    assert settings["target_modules"] == sorted(ALL)
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    name = "base_model.model.{}.lora_{}.weight"
    original = load_file(adapter / "adapter_model.safetensors")
    fused = "transformer.encoder.layers.1.self_attention.query_key_value"
    for part, rows in {"q": slice(0, 64), "k": slice(64, 96), "v": slice(96, 128)}.items():
        own = f"model.layers.1.self_attn.{part}_proj"
        assert torch.equal(tensors[name.format(own, "A")], original[name.format(fused, "A")])
        assert torch.equal(tensors[name.format(own, "B")], original[name.format(fused, "B")][rows])


def test_ranks_layers_and_whole_modules_of_original_adapters(base, weights, tmp_path):
    """Patterns name original modules, some layers are left out, the head is held whole."""
    patterns = {"rank_pattern": {"layers\\.2\\..*query_key_value": 6}, "alpha_pattern": {"query_key_value": 3}}
    folder = make_official_adapter(tmp_path / "all", weights, ["query_key_value"])
    tensors = {
        name: value for name, value in load_file(folder / "adapter_model.safetensors").items() if ".0." not in name
    }
    for name in [name for name in tensors if ".layers.2." in name]:
        tensors[name] = tensors[name][:6] if "lora_A" in name else tensors[name][:, :6].contiguous()
    tensors["base_model.model.transformer.output_layer.weight"] = weights["transformer.output_layer.weight"]
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings |= {**patterns, "layers_to_transform": [1, 2], "modules_to_save": ["output_layer"]}
    own, found = to_own_names(settings, tensors, ChatGLM3Config.from_pretrained(base))
    parts = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in (1, 2) for part in "kqv"]
    assert own["target_modules"] == parts and own["modules_to_save"] == ["lm_head"]
    assert own["rank_pattern"] == dict.fromkeys(parts[3:], 6) and own["alpha_pattern"] == dict.fromkeys(parts, 3)
    assert own["layers_to_transform"] is None
    assert "base_model.model.lm_head.weight" in found and len(found) == 2 * 6 + 1
    write_adapter(tmp_path / "own", own, found)
    merged = load_adapter(load(base), tmp_path / "own").merge_and_unload().model.layers
    for layer, rank in ((1, 8), (2, 6)):
        name = f"transformer.encoder.layers.{layer}.self_attention.query_key_value"
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        whole = torch.cat([getattr(merged[layer].self_attn, f"{part}_proj").weight for part in "qkv"])
        assert (whole - weights[f"{name}.weight"] - 3 / rank * b @ a).abs().max() <= 1e-6


# --- mistakes


def test_what_cannot_be_read_is_explained(base, weights, tmp_path):
    def refuse(folder: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_adapter(load(base), folder)

    refuse(tmp_path / "nowhere", r"nowhere is no adapter: it needs adapter_config.json .*\(found: no such folder\)")
    refuse(base, r"tiny_chatglm3 is no adapter: it needs adapter_config.json")
    good = make_adapter(tmp_path / "good", base)
    refuse(rewrite(good, tmp_path / "ia3", peft_type="IA3"), "is a IA3 adapter; only LORA is supported")
    refuse(rewrite(good, tmp_path / "r", r=None), "r is None; expected a number")
    refuse(rewrite(good, tmp_path / "less", target_modules=["q_proj"]), "keys missing: none; left over: .*down_proj")
    broken = rewrite(good, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"not safetensors")
    refuse(broken, "adapter_model.safetensors is damaged")
    save_file({"base_model.model.x": torch.ones(1)}, broken / "adapter_model.safetensors")
    refuse(broken, "holds no LoRA matrices")
    (broken / "adapter_config.json").write_text("{", encoding="utf-8")
    refuse(broken, "adapter_config.json cannot be read")
    tensors = load_file(good / "adapter_model.safetensors")
    empty = rewrite(good, tmp_path / "empty")
    save_file({name: value[:0] for name, value in tensors.items()}, empty / "adapter_model.safetensors")
    refuse(empty, "is empty; it was saved under DeepSpeed ZeRO-3")
    part = rewrite(good, tmp_path / "part")
    kept = {name: value for name, value in tensors.items() if "layers.0" not in name}
    save_file(kept, part / "adapter_model.safetensors", metadata={"format": "pt"})
    refuse(part, r"keys missing: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight")
    official = make_official_adapter(tmp_path / "official", weights, ["query_key_value"], bias="all")
    refuse(official, "adapter_config.json says bias='all': such an adapter depends on how the model's modules are cut")
    official = make_official_adapter(tmp_path / "pissa", weights, ["query_key_value"], init_lora_weights="pissa")
    refuse(official, "init_lora_weights='pissa'")


def test_adapters_of_other_models_are_refused_before_loading(base, tiny_folder, weights, tmp_path):
    config = ChatGLM3Config.from_pretrained(tiny_folder)
    own = make_adapter(tmp_path / "own", base)
    check_adapter(own, ChatGLM3Config.from_pretrained(base))
    with pytest.raises(UserError, match=r"another base model: .*tiny_chatglm3"):
        check_adapter(own, config)
    official = make_official_adapter(tmp_path / "official", weights, ["query_key_value"])
    with pytest.raises(UserError, match="has 128 rows; this base model's query_key_value has 768"):
        check_adapter(official, config)
    shallow = ChatGLM3Config.from_pretrained(base, num_layers=2)
    with pytest.raises(UserError, match=r"the model has no module model.layers.2"):
        check_adapter(own, shallow)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "the rank of a LoRA adapter is 0"),
        ({"dropout": 1.0}, "the dropout of a LoRA adapter is 1.0"),
        ({"target": "q_porj"}, "no linear module 'q_porj'; did you mean 'q_proj'"),
        ({"target": ","}, "no module is named in ','"),
        ({"additional_target": "lm_haed"}, "no module 'lm_haed'; did you mean 'lm_head'"),
    ],
)
def test_impossible_adapters_are_refused(base, options, message):
    with pytest.raises(UserError, match=message):
        add_adapter(load(base), **options)


def test_official_names_choose_targets(base):
    model = add_adapter(load(base), target="query_key_value,dense", additional_target="lm_head")
    settings = model.peft_config["default"]
    assert settings.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert settings.modules_to_save == ["lm_head"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "lm_head" in name for name in trained) and len(trained) == 3 * 4 * 2 + 1
