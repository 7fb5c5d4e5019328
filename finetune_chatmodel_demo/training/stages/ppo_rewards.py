"""Where the scores of replies come from: a reward model (the result of --stage rm), or a function in a Python file.

    def mentions_grass(prompts: list[str], replies: list[str]) -> list[float]:
        return [1.0 if "草" in reply else 0.0 for reply in replies]

`--reward_function rewards.py:mentions_grass` scores with it.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune_chatmodel_demo.chatglm3.fingerprint import check_base
from finetune_chatmodel_demo.chatglm3.loading import load_model
from finetune_chatmodel_demo.chatglm3.lora import load_adapter
from finetune_chatmodel_demo.chatglm3.lora_files import is_adapter_checkpoint, read_adapter_config
from finetune_chatmodel_demo.chatglm3.model_folder import read_model_config
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.generation.replies import read_reply
from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.stages.reference import build_rows, without_adapter_wrapper

# Scores (B,) in float32 of prompts and replies, ids of B each; a reply has its stop token.
Reward = Callable[[list[list[int]], list[list[int]]], torch.Tensor]
LONGEST_EXCERPT = 80
SIGNATURE = "NAME(prompts: list[str], replies: list[str]) -> list[float]"


class RewardError(UserError):
    """A reward function failed, or returned something that is no list of finite numbers."""


class RewardFunction:
    """A user's function of texts.

    It gets each prompt as the model reads it, role tokens written out (`[gMASK]sop<|user|>\\n 你好<|assistant|>`), and
    each reply as inference.py shows it: without stop token and metadata line, tool calls marked.
    """

    def __init__(self, reference: str, tokenizer: Any, prompt_format: str) -> None:
        """
        Args:
            reference: FILE.py:NAME.
            tokenizer: of the policy.
            prompt_format: of the policy.

        Raises:
            UserError: when there is no such file or function, or the file cannot be run.
        """
        self.reference = reference
        self.function = load_function(reference)
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format

    def __call__(self, prompts: list[list[int]], replies: list[list[int]]) -> torch.Tensor:
        """See `Reward`.

        Raises:
            RewardError: when the function fails or returns anything but a finite number for each reply.
        """
        asked = [self.tokenizer.decode(ids) for ids in prompts]
        answers = [self._read(ids) for ids in replies]
        try:
            scores = [float(score) for score in self.function(asked, answers)]
        except Exception as error:
            raise RewardError(
                f"--reward_function {self.reference} failed, or returned no list of numbers: {type(error).__name__}: "
                f"{error}; the first of its {len(answers)} replies was {_shorten(answers[0])}"
            ) from error
        if len(scores) != len(answers):
            raise RewardError(
                f"--reward_function {self.reference} returned {len(scores)} scores for {len(answers)} replies; it "
                "must return one each, in their order"
            )
        for score, answer in zip(scores, answers):
            if not math.isfinite(score):
                raise RewardError(
                    f"--reward_function {self.reference} returned {score} for the reply {_shorten(answer)}; expected "
                    "a finite number"
                )
        return torch.tensor(scores, dtype=torch.float32)

    def _read(self, ids: list[int]) -> str:
        stop = ids[-1] in self.tokenizer.stop_token_ids
        return read_reply(self.tokenizer, ids[:-1] if stop else ids, self.prompt_format).text


def check_reward_function(reference: str) -> tuple[Path, str]:
    """Splits FILE.py:NAME, without running the file.

    Raises:
        UserError: when it is of another form, or the file is missing or no Python.
    """
    file, colon, name = reference.rpartition(":")
    if not colon or not name or not file.endswith(".py"):
        raise UserError(f"--reward_function {reference} is not of the form FILE.py:NAME, e.g. rewards.py:score")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--reward_function: {path} does not exist (the current folder is {Path.cwd()})")
    try:
        compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, ValueError) as error:
        raise UserError(f"--reward_function: {path} is no Python program: {error}") from error
    return path, name


def load_function(reference: str) -> Callable[[list[str], list[str]], Sequence[float]]:
    """Imports NAME from FILE.py.

    Raises:
        UserError: the message says what is wrong.
    """
    path, name = check_reward_function(reference)
    spec = importlib.util.spec_from_file_location(f"reward_function_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--reward_function: {path} cannot be run: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(
            f"--reward_function: {path} has no function {name!r} (found: {', '.join(found) or 'none'}); it needs "
            f"{SIGNATURE}"
        )
    return function


class RewardModel:
    """The score of a reward model at the last token of prompt and reply."""

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int) -> None:
        """
        Args:
            model: ChatGLM3ForSequenceClassification with one label, with or without PEFT's wrapper.
            tokenizer: of the policy, which must be the reward model's.
            batch_size: rows scored at a time.
        """
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], replies: list[list[int]]) -> torch.Tensor:
        """See `Reward`. A reply that ended with `<|user|>` is scored with eos in its place, as in rm's data."""
        eos, user = self.tokenizer.eos_token_id, self.tokenizer.get_command("<|user|>")
        replies = [[*ids[:-1], eos] if ids[-1] == user else ids for ids in replies]
        inner = without_adapter_wrapper(self.model)
        scores = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            rows = build_rows(prompts[part], replies[part], self.tokenizer.pad_token_id, inner.device)
            hidden = inner.model(input_ids=rows.input_ids, use_cache=False).last_hidden_state
            last = rows.prompt_lengths + rows.reply_lengths - 1
            states = hidden[torch.arange(len(last), device=hidden.device), last]
            with torch.autocast(states.device.type, enabled=False):  # scores keep the head's precision
                scores.append(inner.score(states.to(inner.score.weight.dtype))[:, 0].float().cpu())
        return torch.cat(scores)


def check_reward_model(folder: str | Path) -> Path | None:
    """Refuses what is no result of --stage rm, before anything is loaded.

    Returns:
        The base model of an adapter; None for a model.

    Raises:
        UserError: the message says what the folder is instead.
    """
    folder = Path(folder)
    if is_adapter_checkpoint(folder):
        config = read_adapter_config(folder)
        if not config.is_reward_model:
            raise UserError(f"--reward_model {folder} is an adapter of a language model, not of a reward model")
        if not config.base_model:
            raise UserError(f"--reward_model {folder} does not say which base model it belongs to")
        return Path(config.base_model)
    if not (folder / "config.json").is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise UserError(
            f"--reward_model {folder} is no model and no adapter: it has no config.json (found: {there or 'nothing'})"
        )
    # Loaded as one, a language model would get a new, random score head.
    architectures = read_model_config(folder).architectures or []
    if not any("SequenceClassification" in name for name in architectures):
        raise UserError(
            f"--reward_model {folder} is a {', '.join(architectures) or 'model of unknown kind'}, not a reward model; "
            "train one with --stage rm"
        )
    return None


def load_reward_model(
    folder: str | Path, *, dtype: torch.dtype, device: torch.device, quantization_bit: int | None = None
) -> nn.Module:
    """Loads the result of --stage rm: a model, or an adapter in front of the base model that it names.

    Args:
        folder: of the model or adapter.
        dtype: of its weights.
        device: where it computes.
        quantization_bit: an adapter's base model in 4 or 8 bits.

    Raises:
        UserError: for anything that is no reward model, or cannot be loaded.
    """
    base = check_reward_model(folder)
    try:
        if base is None:
            return load_model(folder, dtype=dtype, device=device, head="score")
        found = read_adapter_config(folder)
        check_base(Path(folder), found.base_fingerprint, found.base_model, base, allow_other=False)
        model = load_model(base, dtype=dtype, device=device, quantization_bit=quantization_bit, head="score")
        return load_adapter(model, folder)
    except (ValueError, OSError) as error:
        raise UserError(f"--reward_model {folder} cannot be loaded: {error}") from error


def build_reward(settings: Settings, tokenizer: Any) -> Reward:
    """The reward of a run, from --reward_model or --reward_function.

    Raises:
        UserError: when it cannot be loaded.
    """
    if settings.stage.reward_function:
        return RewardFunction(settings.stage.reward_function, tokenizer, settings.prompt_format)
    model = load_reward_model(
        settings.stage.reward_model,
        dtype=getattr(torch, settings.precision),
        device=settings.training.device,
        quantization_bit=settings.model.quantization_bit,
    )
    return RewardModel(model, tokenizer, settings.training.per_device_eval_batch_size)


def _shorten(text: str) -> str:
    return repr(text if len(text) <= LONGEST_EXCERPT else text[:LONGEST_EXCERPT] + "…")
