"""The base model's tokenizer, with errors that name the flag."""

from typing import Any

from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.loading import load_tokenizer
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.generation.model_files import explain_load_error


def load_base_tokenizer(path: str) -> Any:
    """The tokenizer of --model_name_or_path, once it is sure that the model has a row for each of its ids.

    Raises:
        UserError: it cannot be read, or belongs to another model.
    """
    try:
        tokenizer = load_tokenizer(path)
        rows = ChatGLM3Config.from_pretrained(path).padded_vocab_size
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path: {explain_load_error(path, error)}") from error
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"--model_name_or_path {path}: the tokenizer has {tokenizer.vocab_size} ids, the model only {rows}; "
            "put the tokenizer.model there that belongs to the model"
        )
    return tokenizer
