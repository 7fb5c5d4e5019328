"""Fixed prompts on which two forms of a model are compared: `export.py` asks both and expects the same logits."""

from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.render import render_prompt

CONVERSATIONS = (
    [{"role": "user", "content": "你好，请介绍一下你自己。"}],
    [
        {"role": "system", "content": "你是宝可梦图鉴。"},
        {"role": "user", "content": "皮卡丘是什么属性？"},
        {"role": "assistant", "content": "皮卡丘的属性是电。"},
        {"role": "user", "content": "它的弱点是什么？"},
    ],
    [{"role": "user", "content": "Write one sentence about the sea, and translate it into Chinese."}],
    [{"role": "user", "content": "1 + 1 = ?\n```python\nprint(1 + 1)\n```"}],
)
# Without a tokenizer: this many rows of ids, spread over the vocabulary.
ROWS, ROW_LENGTH, STRIDE = 4, 24, 7919


def build_probes(tokenizer: Any | None, vocabulary: int, prompt_format: str = "multi-turn") -> list[list[int]]:
    """Token ids of the probes.

    Args:
        tokenizer: of the model; None: there is none, and the ids mean nothing.
        vocabulary: rows of the model's embedding.
        prompt_format: the format that the model was trained with.

    Raises:
        UserError: the tokenizer has more ids than the model.
    """
    if tokenizer is None:
        ids = [(1 + i * STRIDE) % vocabulary for i in range(ROWS * ROW_LENGTH)]
        return [ids[start : start + ROW_LENGTH] for start in range(0, len(ids), ROW_LENGTH)]
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only {vocabulary}; give the model's own with "
            "--tokenizer DIR"
        )
    return [render_prompt(tokenizer, messages, prompt_format=prompt_format) for messages in CONVERSATIONS]


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer can be loaded from `folder`."""
    return (folder / "tokenizer.model").is_file()
