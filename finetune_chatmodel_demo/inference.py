"""Talks with ChatGLM3, with a P-Tuning v2 prefix, a LoRA adapter, or as it is.

    python finetune_chatmodel_demo/inference.py --pt-checkpoint output/pokemon --model THUDM/chatglm3-6b
    python finetune_chatmodel_demo/inference.py output/pokemon --prompt 皮卡丘是什么属性？
    python finetune_chatmodel_demo/inference.py --adapter output/pokemon_lora --quantization-bit 4
    python finetune_chatmodel_demo/inference.py --pt-checkpoint output/pokemon --prompt 皮卡丘是什么属性？
    cat questions.txt | python finetune_chatmodel_demo/inference.py --pt-checkpoint output/pokemon

In a terminal it chats (/help lists the commands). Prompts that are piped in, one a line, form one conversation. Replies
go to standard output, everything else to standard error.
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from finetune_chatmodel_demo.common.cli import run_program
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.generation.choose import (
    ModelChoice,
    add_model_arguments,
    choose_model,
    load_choice,
    use_result,
)


def build_parser() -> argparse.ArgumentParser:
    """The command line; every flag is also accepted with underscores."""
    parser = argparse.ArgumentParser(
        description="Talk with ChatGLM3, with a P-Tuning v2 prefix, a LoRA adapter, or as it is. In a terminal: a "
        "chat. With --prompt: one answer. Prompts piped through standard input, one a line, form one conversation.",
    )
    parser.add_argument("folder", nargs="?", metavar="DIR", help="the --output_dir of a run, or a model's folder: what "
                        "it holds says which of the next three flags it is")  # fmt: skip
    add_model_arguments(parser)
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="answer this and leave; several are answered one by one")
    add("--system", metavar="TEXT", help="system prompt")
    add("--max-new-tokens", "--max_new_tokens", type=int, default=128, metavar="N", help="longest reply (128)")
    add("--do-sample", "--do_sample", action="store_true", help="sample; each of the next three implies it")
    add("--temperature", type=float, metavar="X", help="0.8 when sampling; 0 means greedy")
    add("--top-p", "--top_p", type=float, metavar="X", help="0.8 when sampling")
    add("--top-k", "--top_k", type=int, metavar="N", help="50 when sampling; 0 switches it off")
    add(
        "--repetition-penalty",
        "--repetition_penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: repeat less (1, also when greedy)",
    )
    add("--seed", type=int, metavar="N", help="makes sampling repeatable")
    return parser


def sampling_options(arguments: argparse.Namespace) -> dict[str, object]:
    """The settings of `ChatSession` that were given; any number for sampling switches it on."""
    names = ("temperature", "top_p", "top_k")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return options | {
        "do_sample": arguments.do_sample or bool(options),
        "repetition_penalty": arguments.repetition_penalty,
        "max_new_tokens": arguments.max_new_tokens,
        "seed": arguments.seed,
    }


def decode_lines(raw_lines: Iterable[bytes]) -> Iterator[str]:
    """Lines of standard input: UTF-8, with or without BOM, or GBK.

    Raises:
        UserError: a line is neither.
    """
    for number, raw in enumerate(raw_lines, 1):
        for encoding in ("utf-8-sig", "gb18030"):
            try:
                line = raw.decode(encoding)
                break
            except UnicodeDecodeError:
                continue
        else:
            raise UserError(f"standard input line {number} is neither UTF-8 nor GBK; save the prompts as UTF-8")
        yield line


def describe(choice: ModelChoice) -> str:
    """One line on what answers."""
    tuned = f" + {choice.tuned} {choice.prefix or choice.adapter}" if choice.tuned else ""
    bits = f" in {choice.quantization_bit} bits" if choice.quantization_bit else ""
    alone = " (each question stands alone)" if choice.prompt_format == "input-output" else ""
    return f"{choice.model}{bits}{tuned}, {choice.prompt_format} prompts{alone}, on {choice.device}"


def chat(arguments: argparse.Namespace) -> None:
    """Load and answer: one prompt, the lines of a pipe, or a person.

    Raises:
        OSError, UserError: something that the user gave cannot be used.
    """
    prompts = arguments.prompt or []
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("--prompt is empty; say something")
    if arguments.folder is not None:
        use_result(arguments, arguments.folder)
    choice = choose_model(arguments)
    for notice in choice.notices:
        print(notice, file=sys.stderr)
    if arguments.system and choice.prompt_format == "input-output":
        raise UserError("--system has no place in the input-output format, which is the question alone; leave it out")
    model, tokenizer = load_choice(choice)
    from finetune_chatmodel_demo.generation.session import ChatSession
    from finetune_chatmodel_demo.generation.terminal import TerminalChat, answer_lines

    session = ChatSession(
        model,
        tokenizer,
        prompt_format=choice.prompt_format,
        system=arguments.system,
        **sampling_options(arguments),
    )
    print(describe(choice), file=sys.stderr)
    if arguments.seed is not None and not session.settings.do_sample:
        print("--seed changes nothing in greedy replies; --do-sample samples", file=sys.stderr)
    for prompt in prompts:
        session.reset()
        answer_lines(session, [prompt], sys.stdout)
    if prompts:
        return
    if not sys.stdin.isatty():
        answer_lines(session, decode_lines(sys.stdin.buffer), sys.stdout)
    else:
        _enable_line_editing()
        print("/help lists the commands, Ctrl-C ends a reply, /exit leaves", file=sys.stderr)
        TerminalChat(session, input, sys.stdout).run()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status of `run_program`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    return run_program(
        lambda: chat(build_parser().parse_args(argv)),
        out_of_memory_advice="close other programs, or use --device cpu, which is slow",
    )


def _enable_line_editing() -> None:
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - importing it is what makes `input` editable


if __name__ == "__main__":
    sys.exit(main())
