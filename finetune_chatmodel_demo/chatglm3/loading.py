"""The functions with which everything else gets its tokenizer and its model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig

from finetune_chatmodel_demo.chatglm3.model_folder import (
    DOWNLOAD_HINT,
    check_folder,
    check_model_folder,
    check_tokenizer_folder,
    explain_hub_error,
    read_model_config,
)
from finetune_chatmodel_demo.chatglm3.modeling import ChatGLM3ForCausalLM, ChatGLM3ForSequenceClassification
from finetune_chatmodel_demo.chatglm3.prefix_files import check_prefix, load_prefix
from finetune_chatmodel_demo.chatglm3.tokenizer import ChatGLMTokenizer
from finetune_chatmodel_demo.chatglm3.weights import check_finite
from finetune_chatmodel_demo.common.errors import UserError

MODEL_CLASSES = {"lm": ChatGLM3ForCausalLM, "score": ChatGLM3ForSequenceClassification}
# A language model becomes a reward model: its own head goes, a score head comes.
OTHER_HEADS = {
    "lm": {},
    "score": {"missing_keys": {"score.weight", "score.bias"}, "unexpected_keys": {"lm_head.weight"}},
}
# It warns that an optional package is missing, and in every layer of every step that activations become float16.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load_tokenizer(path: str | Path) -> ChatGLMTokenizer:
    """The tokenizer of a model folder, or of a hub name.

    Raises:
        FileNotFoundError: when the folder has no `tokenizer.model`.
        UserError: for a tokenizer that is damaged or of another model.
    """
    check_folder(path, "tokenizer.model")
    if (Path(path) / "config.json").is_file():
        read_model_config(path)
    check_tokenizer_folder(Path(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # whatever SentencePiece or transformers say of a file that they do not expect
        raise UserError(_explain(path, error)) from error
    if not isinstance(tokenizer, ChatGLMTokenizer):
        raise UserError(f"{path} holds a {type(tokenizer).__name__}, and only ChatGLM's tokenizer is loaded here")
    return tokenizer


def load_model(
    path: str | Path,
    *,
    pt_checkpoint: str | Path | None = None,
    pre_seq_len: int | None = None,
    prefix_projection: bool = False,
    quantization_bit: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    head: Literal["lm", "score"] = "lm",
) -> ChatGLM3ForCausalLM | ChatGLM3ForSequenceClassification:
    """A ChatGLM3 in evaluation mode, with a prefix if asked for.

    Args:
        path: folder of the official layout (ChatGLM3-6B, -base, -32k, ChatGLM2-6B, or saved here), or a hub name.
        pt_checkpoint: folder of a trained prefix, of this project or of the original demo. The base is then frozen.
        pre_seq_len: length of a new N(0, 1) prefix; beside `pt_checkpoint` only a check of its length.
        prefix_projection: whether an MLP makes the new prefix.
        quantization_bit: 4 (NF4) or 8 (int8): quantizes the base with bitsandbytes while loading.
        dtype: of the base; default: bfloat16 where the GPU has it, float16 on other GPUs, float32 on the CPU.
        device: default: the GPU if there is one, else the CPU.
        head: "lm" writes text; "score" gives one number for a text (a reward model). A language model that is loaded
            with "score" gets a new head.

    Raises:
        FileNotFoundError: for a folder without configuration or weights.
        UserError: for impossible settings, weights that do not fit the configuration, or a prefix that
            cannot be read or does not fit.
    """
    if quantization_bit not in (None, 4, 8):
        raise UserError(f"quantization_bit is {quantization_bit}; use 4 or 8, or leave it out")
    if pre_seq_len is not None and pre_seq_len < 1:
        raise UserError(f"pre_seq_len is {pre_seq_len}; a prefix has at least 1 position")
    if prefix_projection and pre_seq_len is None and pt_checkpoint is None:
        raise UserError("prefix_projection without a prefix: give pre_seq_len as well")
    config = read_model_config(path)
    check_model_folder(path)
    if pt_checkpoint is not None:
        check_prefix(pt_checkpoint, config)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    quantization = None if quantization_bit is None else _quantization(quantization_bit, _dtype(dtype, device))
    with _without_report():
        model, report = MODEL_CLASSES[head].from_pretrained(
            str(path),
            dtype=_dtype(dtype, device),
            device_map={"": device} if quantization is not None else None,
            quantization_config=quantization,
            output_loading_info=True,
            attn_implementation="sdpa",
            trust_remote_code=False,
            **({"num_labels": 1} if head == "score" else {}),
        )
    _check_report(path, report, head)
    check_finite(path, model.named_parameters())
    if quantization is None:
        model = model.to(device)
    elif device.type == "cpu":
        _keep_4bit_layout(model)
    if pt_checkpoint is not None:
        load_prefix(model, pt_checkpoint, pre_seq_len=pre_seq_len)
    elif pre_seq_len is not None:
        model.add_prefix(pre_seq_len, prefix_projection)
    return model.eval()


def _explain(path: str | Path, error: Exception) -> str:
    if not Path(path).is_dir():
        return explain_hub_error(path, error)
    return f"the tokenizer in {path} cannot be loaded: {str(error).strip() or type(error).__name__}"


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | str:
    if dtype is not None:
        return dtype
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _quantization(bits: int, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _keep_4bit_layout(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights for AVX512 in the first forward pass without gradients.

    It cannot do so for widths that are no multiple of 64, and would round an adapter's activations to bfloat16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers warns of every new score head; `_check_report` tells what is as it should be from what is not."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _check_report(path: str | Path, report: dict[str, Any], head: str) -> None:
    """A model whose weights were loaded in part answers nonsense: say what is missing instead."""
    problems = []
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted({str(key) for key in report.get(kind) or ()} - OTHER_HEADS[head].get(kind, set()))
        if keys:
            problems.append(f"{kind.replace('_', ' ')}: {', '.join(keys[:5])}{' …' if len(keys) > 5 else ''}")
    if head == "lm" and "score.weight" in (report.get("unexpected_keys") or ()):
        raise UserError(f"{path} is a reward model (stage rm): it scores texts and cannot write any")
    if problems:
        raise UserError(f"{path}: the weights do not fit config.json: {'; '.join(problems)}. {DOWNLOAD_HINT}")
