"""ChatGLM's vocabulary: the pieces of a SentencePiece model, then nine control tokens that no text can produce.

Text and control tokens never mix: `encode` is SentencePiece alone and returns ids below `sp_model.vocab_size()`, the
control tokens have the ids from there on. `TextDecoder` is the one way back, for whole sequences and for streams.
Exercise it with `pytest tests/test_tokenizer.py`.
"""

import codecs
from collections.abc import Iterable, Set
from pathlib import Path

from sentencepiece import SentencePieceProcessor

CONTROL_TOKENS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
# SentencePiece writes a space as U+2581.
SPACE_MARK = "\u2581"
GIT_LFS_POINTER = b"version https://git-lfs"


class Piece(str):
    """A token's text that remembers its id.

    A vocabulary may hold an ordinary piece `sop` beside the control token `sop`. The id keeps the two apart on every
    way from text over tokens to ids.
    """

    id: int

    @classmethod
    def of(cls, text: str, token_id: int) -> "Piece":
        piece = cls(text)
        piece.id = token_id
        return piece


def read_sentencepiece_file(path: str | Path) -> bytes:
    """Reads a `tokenizer.model`.

    Raises:
        ValueError: The file is absent, empty, or the text that git leaves where git-lfs is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; the tokenizer needs the tokenizer.model of the model's folder")
    model = path.read_bytes()
    if not model:
        raise ValueError(f"{path} is empty; download it again")
    if model.startswith(GIT_LFS_POINTER):
        raise ValueError(
            f"{path} is a git-lfs pointer of {len(model)} bytes and not the file itself; run `git lfs pull` in "
            f"{path.parent} or download the file by its link"
        )
    return model


class SPTokenizer:
    """Pieces and control tokens, with the attributes of the original class of this name.

    Attributes:
        sp_model: The SentencePiece model.
        special_tokens: Id of each control token; the first has the id `sp_model.vocab_size()`.
        index_special_tokens: Control token of each id.
        n_words: Pieces and control tokens together (official: 64,798).
        bos_id: Id of `<s>`; -1 where the model has none.
        eos_id: Id of `</s>`.
        pad_id: Id of `<unk>`, with which ChatGLM pads.
    """

    def __init__(self, model: bytes, source: str = "tokenizer.model"):
        """
        Args:
            model: Bytes of a SentencePiece model; `save` writes them as they are.
            source: Where they are from, for error messages.

        Raises:
            ValueError: The bytes are no SentencePiece model, or it has no end token.
        """
        self.model, self.source = model, source
        try:
            self.sp_model = SentencePieceProcessor(model_proto=model)
        except Exception as error:
            raise ValueError(
                f"{source} is not a SentencePiece model ({len(model)} bytes); download it again"
            ) from error
        first_id = self.sp_model.vocab_size()
        self.special_tokens = {token: first_id + i for i, token in enumerate(CONTROL_TOKENS)}
        self.index_special_tokens = {token_id: token for token, token_id in self.special_tokens.items()}
        self.n_words = first_id + len(CONTROL_TOKENS)
        self.bos_id, self.eos_id, self.pad_id = (
            self.sp_model.bos_id(),
            self.sp_model.eos_id(),
            self.sp_model.unk_id(),
        )
        if self.eos_id < 0:
            raise ValueError(f"{source} has no end token; train it with an eos_id, ChatGLM's is 2")
        self.strips_leading_space = self._strips_leading_space()
        self._surfaces: dict[int, str | bytes] = {}

    def __reduce__(self) -> tuple:
        return type(self), (self.model, self.source)

    def encode(self, text: str) -> list[int]:
        """Ids of a text by SentencePiece alone: never a control id, whatever the text says.

        Raises:
            TypeError: `text` is not a string.
            ValueError: The text holds half a surrogate pair, which no UTF-8 text can.
        """
        if not isinstance(text, str):
            raise TypeError(f"a text must be a string, got {type(text).__name__}: {text!r:.80}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of the text is half a surrogate pair (U+{ord(text[error.start]):04X}), not "
                "a Unicode character; repair the text, it was cut or decoded wrongly"
            ) from error
        return self.sp_model.encode(text)

    def tokenize(self, text: str) -> list[Piece]:
        """Pieces of a text, with their ids."""
        return [self.convert_id_to_token(token_id) for token_id in self.encode(text)]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of ids; control tokens are written out."""
        decoder = TextDecoder(self)
        return decoder.put(token_ids) + decoder.end()

    def convert_token_to_id(self, token: str) -> int:
        """Id of a token: of a `Piece` its own, else a control token's, else a piece's; `<unk>`'s where unknown."""
        if isinstance(token, Piece):
            return token.id
        if token in self.special_tokens:
            return self.special_tokens[token]
        return self.sp_model.piece_to_id(str(token))

    def convert_id_to_token(self, token_id: int) -> Piece:
        """Token of an id; empty outside the vocabulary, whose embedding has spare rows."""
        if token_id in self.index_special_tokens:
            return Piece.of(self.index_special_tokens[token_id], token_id)
        is_piece = 0 <= token_id < self.sp_model.vocab_size()
        return Piece.of(self.sp_model.id_to_piece(token_id) if is_piece else "", token_id)

    def surface(self, token_id: int) -> str | bytes:
        """What an id adds to a text: a string with U+2581 for spaces, or one byte of a character."""
        if token_id not in self._surfaces:
            self._surfaces[token_id] = self._find_surface(token_id)
        return self._surfaces[token_id]

    def _find_surface(self, token_id: int) -> str | bytes:
        piece, sp_model = self.convert_id_to_token(token_id), self.sp_model
        if token_id in self.index_special_tokens or not piece:
            return str(piece)
        if sp_model.is_control(token_id) or sp_model.is_unknown(token_id):
            return ""
        if sp_model.is_byte(token_id):
            return bytes([int(piece[1:-1], 16)])
        return str(piece)

    def _strips_leading_space(self) -> bool:
        """Whether encoding put a space in front of a text, which decoding takes away (official: yes)."""
        for token_id in range(self.sp_model.vocab_size()):
            if self.sp_model.id_to_piece(token_id).startswith(SPACE_MARK):
                return not self.sp_model.decode([token_id]).startswith(" ")
        return False


class TextDecoder:
    """Turns ids into text as they come, in whole characters.

    The pieces of text that `put` and `end` return, joined, are the text of all ids: a character whose bytes are spread
    over several ids appears with its last byte, only the first space of a text is SentencePiece's own and is left
    out, and a byte that belongs to no character becomes U+FFFD.
    """

    def __init__(self, vocabulary: SPTokenizer, skipped_ids: Set[int] = frozenset()):
        """
        Args:
            vocabulary: Pieces and control tokens.
            skipped_ids: Ids that are treated as if they were not there.
        """
        self._vocabulary, self._skipped_ids = vocabulary, skipped_ids
        self._held_bytes, self._is_at_start = b"", True

    def put(self, token_ids: int | Iterable[int]) -> str:
        """Takes one id or several (also a tensor) and returns the text that is certain by now."""
        if hasattr(token_ids, "tolist"):
            token_ids = token_ids.reshape(-1).tolist()
        token_ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return "".join([self._text_of(i) for i in token_ids if i not in self._skipped_ids])

    def end(self) -> str:
        """Returns what `put` held back, and starts over for another text."""
        text = self._release(is_final=True)
        self._is_at_start = True
        return text

    def _text_of(self, token_id: int) -> str:
        surface = self._vocabulary.surface(token_id)
        if isinstance(surface, bytes):
            self._held_bytes += surface
            self._is_at_start = False
            return self._release(is_final=False)
        text = self._release(is_final=True)
        if self._is_at_start and surface:
            self._is_at_start = False
            if self._vocabulary.strips_leading_space:
                surface = surface.removeprefix(SPACE_MARK)
        return text + surface.replace(SPACE_MARK, " ")

    def _release(self, is_final: bool) -> str:
        """Whole characters of the held bytes; as in SentencePiece, each byte outside a character is one U+FFFD."""
        text = ""
        while self._held_bytes:
            try:
                characters, used = codecs.utf_8_decode(self._held_bytes, "strict", is_final)
            except UnicodeDecodeError as error:
                text += self._held_bytes[: error.start].decode("utf-8") + "\ufffd"
                self._held_bytes = self._held_bytes[error.start + 1 :]
            else:
                self._held_bytes = self._held_bytes[used:]
                return text + characters
        return text
