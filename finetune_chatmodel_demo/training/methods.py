"""The four tuning methods: which parameters of a model are trained, how they are saved and loaded again.

ptuning   a P-Tuning v2 prefix in front of a frozen model        saved: the prefix
lora      low-rank adapters in a frozen model                    saved: the adapter
freeze    some layers, the rest is frozen                        saved: the model
full      all parameters                                         saved: the model
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune_chatmodel_demo.chatglm3.kernels import compile_elementwise, set_policy
from finetune_chatmodel_demo.chatglm3.loading import load_model, load_tokenizer
from finetune_chatmodel_demo.chatglm3.lora import add_adapter, load_adapter, merge_into_base, save_adapter
from finetune_chatmodel_demo.chatglm3.lora import without_tuning as without_tuning  # the stages find it here
from finetune_chatmodel_demo.chatglm3.lora_files import MERGED_FOLDER, copy_adapter
from finetune_chatmodel_demo.chatglm3.prefix import encode_start, start_prefix_as
from finetune_chatmodel_demo.chatglm3.prefix_files import load_prefix, read_prefix_config, save_prefix
from finetune_chatmodel_demo.chatglm3.weights import OFFICIAL_PARTS
from finetune_chatmodel_demo.common.errors import UserError, did_you_mean
from finetune_chatmodel_demo.training.arguments import (
    FREEZE,
    FULL,
    LORA,
    P_TUNING,
    MethodArguments,
)
from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.zero import connect

# Beside a half-precision model: the trained parameters as they were, so that a resumed run continues exactly.
TRAINED_FILE = "trained_parameters.safetensors"


def prepare_model(settings: Settings) -> nn.Module:
    """The base model with what the method trains, from the run's checkpoint where it is resumed.

    Returns:
        A model in evaluation mode. Trained parameters are float32, except under DeepSpeed, which keeps its own copy.

    Raises:
        UserError: when the model, prefix or adapter cannot be loaded.
    """
    if settings.training.deepspeed:
        connect()
    try:
        model = _load_base(settings)
        if settings.method == LORA:
            model = _put_adapter(model, settings)
        elif settings.method == FREEZE:
            freeze_rest(model, settings.tuning)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    if settings.recomputes_mlp_only:
        set_policy(model, "mlp")
    if settings.compiles_elementwise:
        compile_elementwise(model)
    if not settings.training.deepspeed:
        train_in_float32(model)
    if settings.method == FREEZE and settings.checkpoint:
        _load_trained_parameters(model, settings.checkpoint)
    return model.eval()


def _load_base(settings: Settings) -> nn.Module:
    arguments = settings.model
    is_prefix = settings.method == P_TUNING
    path: str | Path = arguments.model_name_or_path
    if settings.checkpoint and settings.method in (FREEZE, FULL):
        path = settings.checkpoint
    prefix_checkpoint = (settings.checkpoint or arguments.ptuning_checkpoint) if is_prefix else None
    model = load_model(
        path,
        pt_checkpoint=prefix_checkpoint,
        pre_seq_len=settings.pre_seq_len,
        prefix_projection=arguments.prefix_projection,
        quantization_bit=arguments.quantization_bit,
        dtype=settings.weights_dtype,
        device=settings.training.device,
        head="score" if settings.stage.stage == "rm" else "lm",
    )
    if is_prefix:
        _start_prefix(model, settings, prefix_checkpoint)
    return model


def _start_prefix(model: nn.Module, settings: Settings, checkpoint: str | Path | None) -> None:
    """Gives a new prefix its first values, and any prefix its dropout."""
    arguments, encoder = settings.model, model.prefix_encoder
    dropout = arguments.prefix_dropout
    if checkpoint is not None:
        if dropout is None:
            dropout = read_prefix_config(checkpoint).prefix_dropout
    elif arguments.prefix_init_text:
        tokenizer = load_tokenizer(arguments.model_name_or_path)
        start_prefix_as(model, encode_start(tokenizer, _read_text(arguments.prefix_init_text), encoder.length))
    else:
        encoder.reset_parameters(arguments.prefix_init_std)
    if dropout is not None:
        encoder.dropout.p = dropout


def _read_text(text: str) -> str:
    """The content of a file, or the words themselves."""
    try:
        is_file = Path(text).is_file()
    except OSError:  # a text can be too long for a name
        is_file = False
    return Path(text).read_text(encoding="utf-8-sig").strip() if is_file else text


def _put_adapter(model: nn.Module, settings: Settings) -> nn.Module:
    start = settings.checkpoint or settings.continued_adapter
    if start:
        return load_adapter(model, start, is_trainable=True)
    if settings.merged_adapter:
        model = merge_into_base(model, settings.merged_adapter)
    return add_new_adapter(model, settings.tuning)


def add_new_adapter(model: nn.Module, tuning: MethodArguments) -> nn.Module:
    """The model with an adapter that nothing has trained yet."""
    return add_adapter(
        model,
        rank=tuning.lora_rank,
        alpha=tuning.lora_alpha,
        dropout=tuning.lora_dropout,
        target=tuning.lora_target,
        additional_target=tuning.additional_target,
        use_rslora=tuning.use_rslora,
        use_dora=tuning.use_dora,
    )


def freeze_rest(model: nn.Module, tuning: MethodArguments) -> None:
    """Leaves only the parameters of the chosen layers and modules trainable, and a score head.

    Raises:
        UserError: for a number of layers that the model does not have, or an unknown module.
    """
    layers = model.model.layers
    count = tuning.freeze_trainable_layers
    if not 0 < abs(count) <= len(layers):
        raise UserError(
            f"--freeze_trainable_layers is {count}; the model has {len(layers)} layers: give 1 to {len(layers)} (the "
            f"last ones) or -1 to -{len(layers)} (the first ones)"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained: list[nn.Module] = [model.score] if hasattr(model, "score") else []
    for layer in list(layers)[-count:] if count > 0 else list(layers)[:-count]:
        if tuning.freeze_trainable_modules.strip() == "all":
            trained.append(layer)
        else:
            parts = dict(layer.named_modules())
            trained += _find_parts(parts, tuning.freeze_trainable_modules, "--freeze_trainable_modules")
    outside = {
        name: module
        for name, module in model.named_modules()
        if ".layers" not in name and any(True for _ in module.parameters(recurse=False))
    }
    for module in trained + _find_parts(outside, tuning.freeze_extra_modules or "", "--freeze_extra_modules"):
        module.requires_grad_(True)


def _find_parts(modules: dict[str, nn.Module], names: str, flag: str) -> list[nn.Module]:
    """The modules that are named in a,b,c; the original code's names count too."""
    known = {name.rpartition(".")[2]: module for name, module in modules.items() if name}
    found = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        parts = [name] if name in known else OFFICIAL_PARTS.get(name, ())
        if not parts or any(part not in known for part in parts):
            hint = did_you_mean(name, known, 0.6) or f"; there are {', '.join(sorted(known))}"
            raise UserError(f"{flag}: there is no module {name!r}{hint}")
        found += [known[part] for part in parts]
    return found


def train_in_float32(model: nn.Module) -> None:
    """Half precision would round small steps away."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def _load_trained_parameters(model: nn.Module, folder: Path) -> None:
    if (folder / TRAINED_FILE).is_file():
        model.load_state_dict(load_file(folder / TRAINED_FILE), strict=False)


def save_trained(
    model: nn.Module,
    settings: Settings,
    folder: Path,
    tokenizer: Any,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes what the method trains, in the form that inference.py and `prepare_model` read.

    Args:
        model: from `prepare_model`.
        settings: the run.
        folder: where to.
        tokenizer: saved beside a whole model.
        state_dict: the model's state where its parameters are spread over processes.
    """
    facts = {"base_model": settings.model.model_name_or_path, "prompt_format": settings.prompt_format}
    if settings.method == P_TUNING:
        save_prefix(model, folder, state_dict=state_dict, **facts)
    elif settings.method == LORA:
        save_adapter(model, folder, state_dict=state_dict, **facts)
        if settings.merged_adapter:
            copy_adapter(Path(settings.merged_adapter), folder / MERGED_FOLDER)
    else:
        _save_model(model, settings, folder, state_dict)
        tokenizer.save_pretrained(folder)


def _save_model(
    model: nn.Module, settings: Settings, folder: Path, state_dict: Mapping[str, torch.Tensor] | None
) -> None:
    """Writes the model in the official layout, all of it in one dtype."""
    model.config.prompt_format = settings.prompt_format  # inference.py reads it
    if settings.method == FREEZE and settings.weights_dtype != torch.float32 and state_dict is None:
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: value.data.contiguous() for name, value in model.named_parameters() if value.requires_grad}
        save_file(trained, folder / TRAINED_FILE, metadata={"format": "pt"})
        state_dict = {name: value.to(settings.weights_dtype) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=None if state_dict is None else dict(state_dict))


def load_trained(model: nn.Module, settings: Settings, folder: str | Path) -> None:
    """Puts the parameters of a checkpoint into `model`, which the same method prepared (the best one, at the end)."""
    if settings.method == P_TUNING:
        load_prefix(model, folder)
    elif settings.method == LORA:
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    else:
        head = "score" if settings.stage.stage == "rm" else "lm"
        saved = load_model(folder, dtype=torch.float32, device="cpu", head=head).state_dict()
        model.load_state_dict(saved)
        _load_trained_parameters(model, Path(folder))


def load_shared(model: nn.Module, settings: Settings, folder: str | Path) -> None:
    """Puts the parameters of a checkpoint into a model whose parameters are spread over processes.

    Args:
        model: from `prepare_model` under ZeRO-3; all processes call this.
        settings: the run.
        folder: what `save_trained` wrote.
    """
    import deepspeed

    if settings.method in (P_TUNING, LORA):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with deepspeed.zero.GatheredParameters(trained, modifier_rank=0):
            load_trained(model, settings, folder)
        return
    # Loaded now, another model is spread in the same way; parameter by parameter its values are taken over.
    source = dict(load_model(folder, dtype=settings.weights_dtype, device=settings.training.device).named_parameters())
    for name, parameter in model.named_parameters():
        with (
            deepspeed.zero.GatheredParameters([source[name]]),
            deepspeed.zero.GatheredParameters([parameter], modifier_rank=0),
        ):
            parameter.data.copy_(source[name].data)


def describe_method(settings: Settings, model: nn.Module) -> str:
    """The method in words, for the table before the start."""
    if settings.method == P_TUNING:
        return f"{settings.method_title}, a prefix of {model.prefix_encoder.length} positions"
    if settings.method == LORA:
        config = model.peft_config[model.active_adapter]
        modules = ", ".join(sorted(config.target_modules))
        return f"{settings.method_title}, rank {config.r}, alpha {config.lora_alpha}, in {modules}"
    return settings.method_title
