"""What fine-tuning has spoilt: perplexity of text that it was not about, and whether replies still obey.

Measured for every candidate of a comparison, so that base and base + prefix stand side by side. `probes.json` holds the
texts; `evaluate.py --probes FILE` takes others in the same form.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL, render_conversation, render_prompt
from finetune_chatmodel_demo.conversation.validation import validate_conversation
from finetune_chatmodel_demo.evaluation.judge import BROKEN
from finetune_chatmodel_demo.generation.batch import BatchReply, generate_replies

PROBES_FILE = Path(__file__).resolve().parent / "probes.json"
LONGEST_REPLY = 128


@dataclass(frozen=True)
class Probes:
    """`texts`: name of a set → texts or conversations of (role, content). `tasks`: (prompt, form or None)."""

    texts: dict[str, list[str | list[tuple[str, str]]]]
    tasks: list[tuple[str, re.Pattern[str] | None]]


def read_probes(path: str | Path = PROBES_FILE) -> Probes:
    """Read a probe file.

    Raises:
        OSError: it cannot be read.
        UserError: it is no probe file.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        texts = {
            name: [item if isinstance(item, str) else [(role, text) for role, text in item] for item in items]
            for name, items in data["perplexity"].items()
        }
        forms = [task.get("form") for task in data["obedience"]]
        tasks = [(str(task["prompt"]), form and re.compile(form)) for task, form in zip(data["obedience"], forms)]
    except (KeyError, TypeError, ValueError, AttributeError, re.error, RecursionError) as error:
        raise UserError(
            f"{path} is no probe file ({type(error).__name__}: {error}); it needs the keys perplexity and obedience, "
            f"as {PROBES_FILE.name} beside probing.py has them"
        ) from None
    for name, items in texts.items():
        for i, item in enumerate(items):
            _check_probe(item, f"{path} is no probe file: perplexity.{name}[{i}]")
    if not any(texts.values()) and not tasks:
        raise UserError(f"{path} holds no probe")
    return Probes(texts, tasks)


def _check_probe(item: str | list[tuple[str, str]], where: str) -> None:
    """Raises a UserError where nothing of a text or conversation could be measured."""
    said = [item]
    if not isinstance(item, str):
        validate_conversation({"conversations": [{"role": role, "content": text} for role, text in item]}, where)
        said = [text for role, text in item if role == "assistant"]
    if not "".join(said).strip():
        raise UserError(f"{where}: there is no text of the assistant to measure")


def probe_model(
    model: Any, tokenizer: Any, probes: Probes, *, batch_size: int, progress: bool = False
) -> dict[str, Any]:
    """Measure one model as it is: with its prefix or adapter on.

    Returns:
        {"perplexity": {SET: {"items", "tokens", "perplexity" of a token, "bits_per_character"}},
         "obedience": {"asked", "ended", "role_format", "asked_form": shares, "replies": [{"prompt", "reply", …}]}}
    """
    sets = {name: measure_perplexity(model, tokenizer, items) for name, items in probes.texts.items() if items}
    result: dict[str, Any] = {"perplexity": sets}
    if probes.tasks:
        result["obedience"] = measure_obedience(model, tokenizer, probes.tasks, batch_size, progress)
    return result


@torch.no_grad()
def measure_perplexity(
    model: Any, tokenizer: Any, items: Sequence[str | list[tuple[str, str]]]
) -> dict[str, float | int]:
    """The loss on a set of texts, all tokens of a text and what the assistant says in a conversation.

    A token's perplexity depends on the vocabulary; bits per character do not, and compare models with different ones.
    """
    loss = tokens = characters = 0.0
    for item in items:
        if isinstance(item, str):
            start = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
            ids = start + tokenizer.encode_text(item)
            labels, said = [IGNORED_LABEL] * len(start) + ids[len(start) :], item
        else:
            messages = [{"role": role, "content": text} for role, text in item]
            row = render_conversation(tokenizer, {"conversations": messages})
            ids, labels = row.input_ids, row.labels
            said = "".join(text for role, text in item if role == "assistant")
        counted = sum(label != IGNORED_LABEL for label in labels)
        inputs = torch.tensor([ids], device=model.device)
        targets = torch.tensor([labels], device=model.device)
        loss += float(model(input_ids=inputs, labels=targets).loss) * counted
        tokens, characters = tokens + counted, characters + len(said)
    return {
        "items": len(items),
        "tokens": int(tokens),
        "perplexity": math.exp(min(loss / tokens, 700.0)),
        "bits_per_character": loss / math.log(2) / characters,
    }


def measure_obedience(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[tuple[str, re.Pattern[str] | None]],
    batch_size: int,
    progress: bool = False,
) -> dict[str, Any]:
    """Does a reply end by itself, is it one plain assistant turn, has it the form that the prompt asks for (if any)?"""
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt, _ in tasks]
    replies = generate_replies(
        model,
        tokenizer,
        prompts,
        max_new_tokens=LONGEST_REPLY,
        batch_size=batch_size,
        progress=progress,
        description="probes",
    )
    rows = [_judge(prompt, form, reply) for (prompt, form), reply in zip(tasks, replies)]
    shares = {}
    for key in ("ended", "role_format", "asked_form"):
        judged = [row[key] for row in rows if row[key] is not None]
        shares[key] = sum(judged) / len(judged) if judged else None
    return {"asked": len(rows), **shares, "replies": rows}


def _judge(prompt: str, form: re.Pattern[str] | None, reply: BatchReply) -> dict[str, Any]:
    """An endless reply has no form. A tool call, a control token or nothing at all is no plain assistant turn."""
    ended = not reply.hit_cap
    text = reply.text.strip()
    is_plain = bool(text) and not BROKEN.search(text) and not text.startswith("[tool call:")
    has_form = None if form is None else ended and is_plain and form.fullmatch(text) is not None
    return {"prompt": prompt, "reply": reply.text, "ended": ended, "role_format": is_plain, "asked_form": has_form}
