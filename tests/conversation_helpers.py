"""What the tests of the conversation room share: a tokenizer of single characters, and records."""

import json
from pathlib import Path

from finetune_chatmodel_demo.chatglm3.chat import ChatMethods


class CharacterTokenizer(ChatMethods):
    """Stands in for ChatGLM3's: a token is a character, control tokens are 1 to 7."""

    eos_token_id = 6
    commands = ("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

    def get_command(self, token: str) -> int:
        return (1, 2, 3, 4, 5, 7)[self.commands.index(token)]

    def encode_text(self, text: str) -> list[int]:
        return [100 + ord(character) for character in text]

    def get_prefix_tokens(self) -> list[int]:
        return [1, 2]


TOKENIZER = CharacterTokenizer()
USER, ASSISTANT, OBSERVATION = (TOKENIZER.get_command(f"<|{role}|>") for role in ("user", "assistant", "observation"))


def message(role: str, content: str, **extra) -> dict:
    return {"role": role, "content": content, **extra}


def user(content: str, **extra) -> dict:
    return message("user", content, **extra)


def assistant(content: str, **extra) -> dict:
    return message("assistant", content, **extra)


def conversation(*messages: dict, **extra) -> dict:
    return {"conversations": list(messages), **extra}


def pair(prompt: list[dict], chosen: str, rejected: str) -> dict:
    return {"conversations": prompt, "chosen": assistant(chosen), "rejected": assistant(rejected)}


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_ids(ids: list[int]) -> str:
    """The text of a `CharacterTokenizer`'s ids, control tokens as digits in angle brackets."""
    return "".join(chr(token - 100) if token > 100 else f"<{token}>" for token in ids)


def read_targets(item) -> str:
    """The text that the loss counts on; `item` has `labels`."""
    labels = item["labels"] if isinstance(item, dict) else item.labels
    return read_ids([label for label in labels if label != -100])
