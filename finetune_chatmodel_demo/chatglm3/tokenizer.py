"""ChatGLM3's tokenizer for current transformers: the original's ids, chats built from structure, streaming text.

Control ids (`[gMASK]`, `sop`, the roles) come from `get_command` and from the structure of a chat, never out of a text:
what a user types is encoded by SentencePiece alone. So `<|user|>` inside a message stays five pieces of text, with
`tokenizer(text)`, with `tokenize` and with `apply_chat_template` alike.

    from finetune_chatmodel_demo.chatglm3 import load_tokenizer
    tokenizer = load_tokenizer("THUDM/chatglm3-6b")
    tokenizer.build_chat_input("你好").input_ids

Exercise it with `pytest tests/test_tokenizer.py`.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from finetune_chatmodel_demo.chatglm3.chat import ChatMethods
from finetune_chatmodel_demo.chatglm3.vocabulary import (
    CONTROL_TOKENS,
    SPTokenizer,
    TextDecoder,
    read_sentencepiece_file,
)

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatGLMTokenizer(ChatMethods, PreTrainedTokenizer):
    """The tokenizer of ChatGLM3-6B, -base, -32k and ChatGLM2-6B, and of any other SentencePiece model in their layout.

    The class has the official name because `AutoTokenizer` looks it up by that name. `tokenizer.tokenizer` holds the
    pieces and control tokens, as in the original.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 - transformers declares it so
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | Path | None = None,
        padding_side: str = "left",
        clean_up_tokenization_spaces: bool = False,
        encode_special_tokens: bool = False,
        **kwargs: Any,
    ):
        """
        Args:
            vocab_file: The `tokenizer.model`.
            padding_side: "left", so that generation continues every row at its end.
            clean_up_tokenization_spaces: Passed on; changes decoded English text.
            encode_special_tokens: Only False: True would turn text into control ids.
            **kwargs: What `tokenizer_config.json` says besides.

        Raises:
            ValueError: `vocab_file` cannot be read, `encode_special_tokens` is set, or the configuration adds tokens.
        """
        if encode_special_tokens:
            raise ValueError(
                "encode_special_tokens=True would turn what a user types into control tokens; remove it, and take "
                "control ids from get_command or build_single_message"
            )
        if vocab_file is None:
            raise ValueError(
                f"{kwargs.get('name_or_path') or 'the folder'} has no tokenizer.model; copy it from the model's folder"
            )
        self.vocab_file = str(vocab_file)
        self.tokenizer = SPTokenizer(read_sentencepiece_file(vocab_file), source=str(vocab_file))
        self._vocab: dict[str, int] = {}
        self._check_added_tokens(kwargs)
        super().__init__(
            padding_side=padding_side,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            extra_special_tokens=list(CONTROL_TOKENS),
            **{**self._default_named_tokens(), **kwargs},
        )

    @property
    def vocab_size(self) -> int:
        """Pieces and control tokens (official: 64,798)."""
        return self.tokenizer.n_words

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end a reply: eos, `<|user|>` and `<|observation|>`."""
        return [self.tokenizer.eos_id, self.get_command("<|user|>"), self.get_command("<|observation|>")]

    def get_vocab(self) -> dict[str, int]:
        """Id of every token; where a piece has the name of a control token, the control token's."""
        if not self._vocab:
            sp_model = self.tokenizer.sp_model
            pieces = [sp_model.id_to_piece(i) for i in range(sp_model.vocab_size())]
            self._vocab = {piece: i for i, piece in enumerate(pieces)} | self.tokenizer.special_tokens
        return dict(self._vocab)

    def get_command(self, token: str) -> int:
        """Id of a control token (`[gMASK]`, `sop`, `<|user|>`, ...), or of `<bos>`, `<eos>`, `<unk>`, `<pad>`.

        Raises:
            ValueError: There is no such token.
        """
        vocabulary = self.tokenizer
        commands = vocabulary.special_tokens | {
            "<bos>": vocabulary.bos_id,
            "<eos>": vocabulary.eos_id,
            "<unk>": vocabulary.pad_id,
            "<pad>": vocabulary.pad_id,
        }
        if token not in commands:
            raise ValueError(f"{token!r} is not a control token; use one of {', '.join(commands)}")
        return commands[token]

    def _add_tokens(self, new_tokens: Sequence[Any], special_tokens: bool = False) -> int:
        # Beyond the base class' own call for the tokens that exist, an added token would never be found in a text.
        vocabulary = self.get_vocab()
        unknown = [str(token) for token in new_tokens or [] if str(token) not in vocabulary]
        if unknown:
            raise ValueError(
                f"cannot add {', '.join(unknown)}: text is encoded by SentencePiece alone and would never become an "
                "added token; write it as ordinary text"
            )
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)

    def _default_named_tokens(self) -> dict[str, str]:
        """Names of begin, end, unknown and padding token; ChatGLM pads with `<unk>`."""
        vocabulary = self.tokenizer
        ids = zip(
            NAMED_TOKENS, (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id, vocabulary.pad_id), strict=True
        )
        return {name: str(vocabulary.convert_id_to_token(token_id)) for name, token_id in ids if token_id >= 0}

    def _check_added_tokens(self, config: dict[str, Any]) -> None:
        """Takes out of a configuration the lists of tokens that later official files repeat; refuses others."""
        listed = config.pop("added_tokens_decoder", None) or {}
        wrong = [
            f"{token} = {i}" for i, token in listed.items() if self.tokenizer.convert_id_to_token(int(i)) != str(token)
        ]
        for name in ("additional_special_tokens", "extra_special_tokens"):
            wrong += [str(token) for token in config.pop(name, None) or [] if str(token) not in self.get_vocab()]
        if wrong:
            raise ValueError(
                f"tokenizer_config.json or added_tokens.json beside {self.vocab_file} adds tokens that this vocabulary "
                f"does not hold: {', '.join(wrong)}; remove them there or use the tokenizer.model that they belong to"
            )

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text by SentencePiece alone: no `[gMASK] sop`, and never a control id.

        Raises:
            TypeError: `text` is not a string.
            ValueError: `text` is not valid Unicode.
        """
        return self.tokenizer.encode(text)

    def tokenize(self, text: str, pair: str | None = None, **kwargs: Any) -> list[str]:
        """Pieces of a text. Unlike the base class', it does not search the text for special tokens."""
        tokens = self.tokenizer.tokenize(text)
        return tokens if pair is None else tokens + self.tokenizer.tokenize(pair)

    def _convert_token_to_id_with_added_voc(self, token: str) -> int:
        return self.tokenizer.convert_token_to_id(token)

    def _convert_token_to_id(self, token: str) -> int:
        return self.tokenizer.convert_token_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.tokenizer.convert_id_to_token(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens; control tokens are written out."""
        return self.tokenizer.decode(self.convert_tokens_to_ids(tokens))

    def stream_decoder(self, skip_special_tokens: bool = True) -> TextDecoder:
        """A decoder for ids that arrive one by one; what it returns, joined, is `decode` of all of them.

        Args:
            skip_special_tokens: Whether control tokens, begin, end, unknown and padding are left out.
        """
        return TextDecoder(self.tokenizer, frozenset(self.all_special_ids) if skip_special_tokens else frozenset())

    def _decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        decoder = self.stream_decoder(skip_special_tokens)
        text = decoder.put(token_ids) + decoder.end()
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def get_prefix_tokens(self) -> list[int]:
        """The two ids that begin every sequence: `[gMASK] sop`."""
        return [self.get_command("[gMASK]"), self.get_command("sop")]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[gMASK] sop` and the ids; after a pair also eos, as in the original."""
        ids = self.get_prefix_tokens() + list(token_ids_0)
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.tokenizer.eos_id]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 where `build_inputs_with_special_tokens` adds a token (or, if it has them already, at any special id)."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        mask = [1, 1] + [0] * len(token_ids_0)
        return mask if token_ids_1 is None else [*mask, *[0] * len(token_ids_1), 1]

    def _pad(self, encoded_inputs: dict[str, Any], padding_side: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Adds position ids, which count from the first real token; padding has position 0 and attention 0."""
        length = len(encoded_inputs["input_ids"])
        if "position_ids" in self.model_input_names and "position_ids" not in encoded_inputs:
            encoded_inputs["position_ids"] = list(range(length))
        padded = super()._pad(encoded_inputs, padding_side=padding_side, **kwargs)
        zeros = [0] * (len(padded["input_ids"]) - length)
        if zeros and "position_ids" in padded:
            is_left = (padding_side or self.padding_side) == "left"
            positions = padded["position_ids"]
            padded["position_ids"] = zeros + positions if is_left else positions + zeros
        return padded

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes `tokenizer.model`, byte for byte the one that was loaded, unless it is there already."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory) / f"{prefix}{self.vocab_files_names['vocab_file']}"
        if not path.is_file() or path.read_bytes() != self.tokenizer.model:
            scratch = path.with_name(f"{path.name}.{os.getpid()}")
            scratch.write_bytes(self.tokenizer.model)
            scratch.replace(path)
        return (str(path),)

    def _save_pretrained(self, save_directory: Any, file_names: tuple[str, ...], **kwargs: Any) -> tuple[str, ...]:
        # The original class has fixed special tokens and fails on a configuration that sets them.
        config_file = Path(file_names[0])
        config = json.loads(config_file.read_text(encoding="utf-8"))
        defaults = {
            **self._default_named_tokens(),
            "extra_special_tokens": list(CONTROL_TOKENS),
            "model_max_length": VERY_LARGE_INTEGER,
        }
        dropped = {"added_tokens_decoder", "backend", "is_local", "local_files_only"}
        dropped |= {key for key, value in defaults.items() if config.get(key) == value}
        config = {key: value for key, value in config.items() if key not in dropped}
        config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, **kwargs)
