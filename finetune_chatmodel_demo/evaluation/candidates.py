"""What is compared: the base model, prefixes, LoRA adapters, whole models; loaded one after the other.

`--compare base --compare prefix=DIR --compare lora=DIR --compare full=DIR`: what a folder holds is told by its files.
Candidates on the same base share one copy of it: a prefix or an adapter is put on and taken off again.
"""

import argparse
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.generation.choose import ModelChoice, choose_model, find_folder, identify, load_choice

BASE, PREFIX, ADAPTER, MODEL = "base", "prefix", "adapter", "model"


@dataclass(frozen=True)
class Candidate:
    """One model to ask. `kind` is one of BASE, PREFIX, ADAPTER and MODEL (a whole, fully tuned one)."""

    name: str
    kind: str
    choice: ModelChoice

    def to_json(self) -> dict[str, Any]:
        choice = self.choice
        tuned = choice.prefix or choice.adapter
        return {
            "name": self.name,
            "kind": self.kind,
            "model": choice.model,
            "checkpoint": str(tuned) if tuned else None,
            "prompt_format": choice.prompt_format,
        }


def choose_candidates(specs: Sequence[str], arguments: argparse.Namespace) -> list[Candidate]:
    """Turn `--compare` into candidates, before gigabytes are read.

    Args:
        specs: `base`, `NAME=DIR` or `DIR`; none: what `--pt-checkpoint`, `--adapter` or `--model` say, and its base.
        arguments: flags of `add_model_arguments`; `--model` is the base of every prefix and adapter.

    Raises:
        UserError: a folder holds nothing that can be asked, or a name is there twice.
    """
    if specs and (arguments.pt_checkpoint or arguments.adapter):
        raise UserError("--compare and --pt-checkpoint or --adapter exclude each other; write --compare NAME=DIR")
    if specs:
        candidates = [_choose(spec, arguments) for spec in specs]
    else:
        choice = choose_model(arguments)
        kind = PREFIX if choice.prefix else ADAPTER if choice.adapter else BASE
        tuned = [] if kind == BASE else [Candidate(f"base + {kind}", kind, choice)]
        candidates = [Candidate(BASE, BASE, _without_tuning(choice)), *tuned]
    names = [candidate.name for candidate in candidates]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise UserError(f"--compare: {min(doubled)} is there twice; name the candidates, NAME=DIR")
    return _settle_base(candidates, arguments)


def _choose(spec: str, arguments: argparse.Namespace) -> Candidate:
    name, equals, path = spec.partition("=")
    if spec == BASE:
        return Candidate(BASE, BASE, choose_model(arguments))
    if not equals or Path(find_folder(spec)).is_dir():
        name, path = Path(spec).name, spec
    folder = Path(find_folder(path))
    if not folder.is_dir():
        raise UserError(f"--compare {spec}: there is no folder {path}; write base, or NAME=DIR with a trained folder")
    flags = argparse.Namespace(**vars(arguments))
    kind = _kind_of(folder)
    if kind == PREFIX:
        flags.pt_checkpoint = str(folder)
    elif kind == ADAPTER:
        flags.adapter = str(folder)
    else:
        flags.model = str(folder)
    return Candidate(name, kind, choose_model(flags))


def _kind_of(folder: Path) -> str:
    """PREFIX, ADAPTER or MODEL; of what is none of them, `choose_model` says what is wrong."""
    return identify(folder)[0] or MODEL


def _without_tuning(choice: ModelChoice) -> ModelChoice:
    return replace(choice, prefix=None, adapter=None)


def _settle_base(candidates: list[Candidate], arguments: argparse.Namespace) -> list[Candidate]:
    """The base is the one that the others were trained on, and is asked in their format."""
    tuned = [candidate for candidate in candidates if candidate.kind in (PREFIX, ADAPTER)]
    if not tuned:
        return candidates
    bases = list(dict.fromkeys(_resolve(candidate.choice.model) for candidate in tuned))
    if len(bases) > 1 and any(candidate.kind == BASE for candidate in candidates):
        raise UserError(f"--compare base: the others have different bases ({', '.join(bases)}); write base=DIR")
    first = _without_tuning(tuned[0].choice)
    if arguments.format is None and any(candidate.choice.prompt_format != first.prompt_format for candidate in tuned):
        first = replace(first, prompt_format="multi-turn")
    return [replace(candidate, choice=first) if candidate.kind == BASE else candidate for candidate in candidates]


def _resolve(model: str) -> str:
    """One spelling for one folder; a hub name stays as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def load_candidates(candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Any, Any]]:
    """Yields (candidate, model in evaluation mode, tokenizer), the models one after the other in memory.

    Candidates that share a base come together; else the order is kept. A model is only good until the next is yielded.
    """
    from finetune_chatmodel_demo.chatglm3.lora_files import MERGED_FOLDER

    groups: dict[tuple[str | None, ...], list[Candidate]] = {}
    for candidate in candidates:
        choice = candidate.choice
        # An adapter on top of another one, which is merged, leaves another base behind.
        own = str(choice.adapter) if choice.adapter and (Path(choice.adapter) / MERGED_FOLDER).is_dir() else None
        key = (_resolve(choice.model), str(choice.quantization_bit), str(choice.device), own)
        groups.setdefault(key, []).append(candidate)
    for group in groups.values():
        model, tokenizer = load_choice(_without_tuning(group[0].choice))
        for candidate in group:
            yield from _with_tuning(candidate, model, tokenizer)
        del model
        gc.collect()


def _with_tuning(candidate: Candidate, model: Any, tokenizer: Any) -> Iterator[tuple[Candidate, Any, Any]]:
    """Puts the candidate's prefix or adapter on the base, and takes it off again."""
    from finetune_chatmodel_demo.chatglm3 import load_prefix
    from finetune_chatmodel_demo.chatglm3.lora import load_adapter

    if candidate.choice.prefix:
        load_prefix(model, candidate.choice.prefix)
        model.eval()
        yield candidate, model, tokenizer
        model.remove_prefix()
    elif candidate.choice.adapter:
        adapted = load_adapter(model, candidate.choice.adapter).eval()
        yield candidate, adapted, tokenizer
        adapted.unload()
    else:
        yield candidate, model, tokenizer
