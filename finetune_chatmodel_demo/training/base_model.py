"""The base model's tokenizer, with errors that name the flag."""

from typing import Any

from finetune_chatmodel_demo.chatglm3.loading import load_tokenizer
from finetune_chatmodel_demo.chatglm3.model_folder import read_model_config
from finetune_chatmodel_demo.common.errors import UserError


def load_base_tokenizer(path: str) -> Any:
    """The tokenizer of --model_name_or_path, once it is sure that the model has a row for each of its ids.

    Raises:
        UserError: it cannot be read, or belongs to another model.
    """
    try:
        tokenizer = load_tokenizer(path)
        rows = read_model_config(path).padded_vocab_size
    except (OSError, UserError) as error:
        raise UserError(f"--model_name_or_path: {error}") from error
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"--model_name_or_path {path}: the tokenizer has {tokenizer.vocab_size} ids, the model only {rows}; "
            "put the tokenizer.model there that belongs to the model"
        )
    return tokenizer
