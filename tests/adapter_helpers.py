"""Adapters for the tests of adapters and of export.py: with strong random weights, in our names and the original's."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from finetune_chatmodel_demo.chatglm3 import load_model
from finetune_chatmodel_demo.chatglm3.lora import add_adapter, save_adapter

OFFICIAL_TARGETS = {
    "query_key_value": "self_attention.query_key_value",
    "dense": "self_attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives every adapter weight (B starts at zero) a value that shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)


def make_adapter(folder: Path, base: Path, *, head: str = "lm", seed: int = 0, **options: object) -> Path:
    """Saves a random adapter for the model in `base`; `prompt_format` is among the options, the rest is LoRA's."""
    facts = {"base_model": str(base), "prompt_format": options.pop("prompt_format", "multi-turn")}
    torch.manual_seed(seed)
    model = add_adapter(load_model(base, device="cpu", head=head), **options)
    randomize(model, seed)
    save_adapter(model, folder, **facts)
    return folder


def make_official_adapter(
    folder: Path, weights: dict[str, torch.Tensor], targets: list[str], **settings: object
) -> Path:
    """An adapter as PEFT saves it around the original code's model, which is not here: made by hand.

    Args:
        weights: of the base model, by official names; the shapes follow from them.
        targets: `query_key_value`, `dense` …
        settings: of adapter_config.json, over those of the official fine-tuning demo.
    """
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": "THUDM/chatglm3-6b",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 8,
        "revision": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    } | settings
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if not any(module.endswith(OFFICIAL_TARGETS[target]) for target in targets):
            continue
        rank = config.get("rank_pattern", {}).get(module.rpartition(".")[2], config["r"])
        shapes = {"lora_A": (rank, weight.shape[1]), "lora_B": (weight.shape[0], rank)}
        for part, shape in shapes.items():
            tensors[f"base_model.model.{module}.{part}.weight"] = 0.05 * torch.randn(shape, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
