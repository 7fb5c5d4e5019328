"""A model of this machine as the writer of answers: any base, prefix or adapter that inference.py takes."""

from collections.abc import Iterator
from typing import Any

from finetune_chatmodel_demo.generation.session import ChatSession


class LocalModel:
    """Replies to prompts of `answering.build_prompt`; each stands alone, for its passages are its whole context.

    Args:
        model, tokenizer: of `load_choice`.
        prompt_format: the format that the model was trained with.
        max_new_tokens: longest reply.
    """

    def __init__(self, model: Any, tokenizer: Any, prompt_format: str, max_new_tokens: int):
        self.session = ChatSession(model, tokenizer, prompt_format=prompt_format, max_new_tokens=max_new_tokens)

    def fits(self, prompt: str) -> bool:
        """Whether prompt and reply fit into the model's context; some control tokens are counted generously."""
        budget = self.session.model.config.seq_length - self.session.settings.max_new_tokens
        return len(self.session.tokenizer.encode_text(prompt)) + 16 <= budget

    def reply(self, prompt: str) -> Iterator[str]:
        """The reply, in pieces."""
        self.session.reset()
        yield from self.session.reply(prompt)
