"""A chat in the terminal: reads lines, streams replies, knows a few commands. inference.py starts it.

Ctrl-C ends the reply and not the program; Ctrl-D or /exit leaves.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import TextIO

from finetune_chatmodel_demo.generation.session import ChatSession, PromptTooLongError

HELP = """\
/clear              forget the conversation (also: clear)
/system TEXT        new system prompt and new conversation; /system - for none; /system alone shows it
/history            show the conversation
/observation TEXT   hand the result of a tool call to the model
/help               this list
/exit               leave (also: stop, Ctrl-D)
Ctrl-C ends a reply. A message that begins with a slash: type two, //like this."""

PROMPT = "user> "


def stream_reply(session: ChatSession, query: str, out: TextIO, *, role: str = "user") -> str:
    """Write one reply piece by piece, with a line end behind it.

    Returns:
        What was written, without the line end.

    Raises:
        KeyboardInterrupt: Ctrl-C; generation has stopped and the line is ended.
    """
    pieces = []
    with contextlib.closing(session.reply(query, role=role)) as reply:
        try:
            for piece in reply:
                pieces.append(piece)
                out.write(piece)
                out.flush()
        except KeyboardInterrupt:
            out.write("\n")
            raise
    out.write("\n")
    out.flush()
    return "".join(pieces)


class TerminalChat:
    """An interactive chat.

    Args:
        session: the conversation.
        read_line: shows a prompt and returns what was typed; raises EOFError at the end, as `input` does.
        out: where everything is written.
    """

    def __init__(self, session: ChatSession, read_line: Callable[[str], str], out: TextIO):
        self.session = session
        self._read_line = read_line
        self._out = out

    def run(self) -> None:
        """Chat until /exit or the end of the input."""
        while True:
            try:
                line = self._read_line(PROMPT)
            except EOFError:
                self._say("")
                return
            except KeyboardInterrupt:
                self._say("\n(/exit or Ctrl-D to leave)")
                continue
            try:
                if not self.handle(line):
                    return
            except KeyboardInterrupt:
                self._say("(stopped)")
            except PromptTooLongError as error:
                self._say(f"({error})")

    def handle(self, line: str) -> bool:
        """Answer or obey one line; False means leave."""
        # A terminal may hand over bytes that are not UTF-8; the tokenizer needs text.
        line = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        command, _, argument = line.strip().partition(" ")
        if not command:
            return True
        if command == "/exit" or line.strip() == "stop":
            return False
        if command == "/clear" or line.strip() == "clear":
            self.session.reset()
            self._say("(the conversation was forgotten)")
        elif command == "/system":
            self._set_system(argument.strip())
        elif command == "/history":
            self._show_history()
        elif command == "/help":
            self._say(HELP)
        elif command == "/observation":
            self._observe(argument.strip())
        elif command.startswith("/") and not line.startswith("//"):
            self._say(f"({command} is no command; /help lists them, // sends a message that begins with a slash)")
        else:
            self._answer(line[1:] if line.startswith("//") else line)
        return True

    def _answer(self, query: str, role: str = "user") -> None:
        self._out.write("assistant> ")
        if not stream_reply(self.session, query, self._out, role=role):
            self._say("(an empty reply)")
        if self.session.last_tool_call:
            self._say(f"({self.session.last_tool_call} was called; /observation TEXT hands its result back)")

    def _observe(self, text: str) -> None:
        if self.session.last_tool_call:
            self._answer(text, "observation")
        else:
            self._say("(the model has not called a tool)")

    def _set_system(self, text: str) -> None:
        if self.session.prompt_format == "input-output":
            self._say("(the input-output format is the question alone: it has no system prompt)")
            return
        if text:
            self.session.system = None if text == "-" else text
            self.session.reset()
        self._say(f"(system prompt: {self.session.system or 'none'})")

    def _show_history(self) -> None:
        opening = [{"role": "system", "content": self.session.system}] if self.session.system else []
        for message in opening + self.session.history:
            metadata = f" {message['metadata']}" if message.get("metadata") else ""
            self._say(f"{message['role']}{metadata}: {message['content']}")
        if not opening + self.session.history:
            self._say("(nothing was said yet)")

    def _say(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()


def answer_lines(session: ChatSession, lines: Iterable[str], out: TextIO) -> None:
    """Answer lines that were piped in: one conversation, every line taken literally, empty ones skipped."""
    for line in lines:
        if line.strip():
            stream_reply(session, line.rstrip("\r\n"), out)
