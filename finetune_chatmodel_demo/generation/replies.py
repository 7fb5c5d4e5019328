"""From generated ids to a reply: whole characters, without the metadata line, tool calls marked.

A ChatGLM3 turn is a metadata line and the content. The line is empty for an ordinary answer; for a tool call it names
the tool, and the content is a code fence. One reply can hold several turns: an announcement and, after another
`<|assistant|>`, the call. Exercised by `python finetune_chatmodel_demo/inference.py`.
"""

import re
from dataclasses import dataclass
from typing import Any

LONGEST_TOOL_NAME = 64
_TOOL_NAME = re.compile(r"[\w.:/-]+")
_CODE_FENCE = "```"


@dataclass
class ReplyPart:
    """One assistant turn of a reply: `metadata` is the tool's name, empty for an ordinary answer."""

    metadata: str = ""
    content: str = ""


def find_tool_name(head: str) -> str | None:
    """Name of the tool that a turn calls, judged from its first characters.

    Args:
        head: what has arrived of the turn so far.

    Returns:
        The name; an empty string when this is an ordinary answer; None when more text is needed to tell.
    """
    line, newline, rest = head.partition("\n")
    name = line.strip()
    if not name:
        return "" if newline else None
    if len(name) > LONGEST_TOOL_NAME or not _TOOL_NAME.fullmatch(name):
        return ""
    start = rest.lstrip()[: len(_CODE_FENCE)]
    if not newline or (start != _CODE_FENCE and _CODE_FENCE.startswith(start)):
        return None
    return name if start == _CODE_FENCE else ""


class _PartReader:
    """One turn while it arrives: takes the metadata line off and strips the content as upstream does."""

    def __init__(self, has_metadata: bool):
        self.part = ReplyPart()
        self._head: str | None = "" if has_metadata else None
        self._spaces = ""

    def feed(self, text: str, *, is_last: bool = False) -> str:
        if self._head is not None:
            self._head += text
            name = find_tool_name(self._head)
            if name is None and not is_last:
                return ""
            text = self._head.partition("\n")[2] if name else self._head
            self.part.metadata, self._head = name or "", None
        return self._strip(text)

    def _strip(self, text: str) -> str:
        """Hold white space back until something follows it, so that the pieces add up to the stripped content."""
        text = self._spaces + text
        if not self.part.content:
            text = text.lstrip()
        visible = text.rstrip()
        self._spaces = text[len(visible) :]
        self.part.content += visible
        return visible


class ReplyReader:
    """Reads the ids of one reply and hands out the text to show.

    Args:
        tokenizer: a `ChatGLMTokenizer`.
        prompt_format: "multi-turn" replies have a metadata line, those of the other formats are plain text.

    Attributes:
        parts: the assistant turns read so far.
        text: everything that was handed out.
    """

    def __init__(self, tokenizer: Any, prompt_format: str = "multi-turn"):
        self.parts: list[ReplyPart] = []
        self.text = ""
        self._tokenizer = tokenizer
        self._assistant_id = tokenizer.get_command("<|assistant|>")
        self._has_metadata = prompt_format == "multi-turn"
        self._announced = 0
        self._open_part()

    def put(self, token_id: int) -> str:
        """Take one generated id (never a stop id); return the text that it completes, often none."""
        if token_id == self._assistant_id:
            piece = self.end()
            self._open_part()
            return piece
        return self._show(self._reader.feed(self._decoder.put(token_id)))

    def end(self) -> str:
        """Close the reply; return the rest of its text. A last character that is not whole is left out."""
        return self._show(self._reader.feed(self._decoder.end().rstrip("\ufffd"), is_last=True))

    def messages(self) -> list[dict[str, Any]]:
        """The reply as messages of a conversation; turns without content are left out."""
        messages = []
        for part in self.parts:
            if part.content:
                message = {"role": "assistant", "content": part.content}
                messages.append(message | ({"metadata": part.metadata} if part.metadata else {}))
        return messages

    def _open_part(self) -> None:
        self._decoder = self._tokenizer.stream_decoder()
        self._reader = _PartReader(self._has_metadata)
        self.parts.append(self._reader.part)

    def _show(self, piece: str) -> str:
        if piece and self._announced < len(self.parts):
            self._announced = len(self.parts)
            name = self.parts[-1].metadata
            piece = ("\n" if self.text else "") + (f"[tool call: {name}]\n" if name else "") + piece
        self.text += piece
        return piece


def read_reply(tokenizer: Any, ids: list[int], prompt_format: str = "multi-turn") -> ReplyReader:
    """Read a whole reply at once; its text is what streaming the same ids shows."""
    reader = ReplyReader(tokenizer, prompt_format)
    for token_id in ids:
        reader.put(token_id)
    reader.end()
    return reader
