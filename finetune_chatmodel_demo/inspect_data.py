"""Shows what the model will be trained on: ids, labels and loss mask of any row of any stage, and a summary.

    python finetune_chatmodel_demo/inspect_data.py --train_file X.jsonl --tokenizer THUDM/chatglm3-tiny --row 0 7
    python finetune_chatmodel_demo/inspect_data.py --train_file X.jsonl --tokenizer THUDM/chatglm3-tiny --html x.html
    python finetune_chatmodel_demo/inspect_data.py --train_file X.jsonl --tokenizer THUDM/chatglm3-tiny --json
    python finetune_chatmodel_demo/inspect_data.py --stage dpo --dataset a,b --tokenizer THUDM/chatglm3-tiny

The data flags are those of finetune.py. Rows are counted from 0, and are those that training sees, mixed and cut like
there: conversations (sft), blocks of documents (pt), a prompt with two replies (rm, dpo), a prompt (ppo).
"""

import argparse
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from finetune_chatmodel_demo.common.cli import run_program
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.flags import add_fields
from finetune_chatmodel_demo.conversation.data_arguments import DataArguments, read_data_arguments
from finetune_chatmodel_demo.conversation.records import STAGE_KINDS
from finetune_chatmodel_demo.conversation.stage_data import StageData, build_stage_data
from finetune_chatmodel_demo.conversation.view import format_html, format_row, format_summary

HTML_ROWS = 50


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    parser = argparse.ArgumentParser(
        prog="inspect_data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--tokenizer", required=True, help="Folder with the tokenizer, e.g. THUDM/chatglm3-6b.")
    parser.add_argument("--stage", choices=tuple(STAGE_KINDS), default="sft", help="What the rows are for [sft].")
    parser.add_argument(
        "--row",
        type=int,
        nargs="+",
        help=f"Rows to show [terminal: 0, --html: the first {HTML_ROWS}, --json: all].",
    )
    parser.add_argument(
        "--part",
        choices=("train", "validation"),
        help="Whose rows to show [train, where there is data to train on].",
    )
    parser.add_argument("--seed", type=int, default=42, help="Of --val_size and --interleave_probs, as a run's [42].")
    parser.add_argument("--html", metavar="OUT.html", help="Write a self-contained page instead of printing rows.")
    parser.add_argument("--json", action="store_true", help="Print rows as JSON lines, and nothing else, on stdout.")
    add_fields(parser, DataArguments)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: The command line; None takes the process's.

    Returns:
        The exit status; see `run_program`.
    """
    return run_program(lambda: inspect(build_parser().parse_args(arguments)))


def inspect(options: argparse.Namespace) -> None:
    """Builds the rows and shows them.

    Raises:
        UserError: flags contradict each other, or something that they name cannot be used.
    """
    data = read_data_arguments(options)
    has_train = bool(data.train_file or data.dataset)
    if not (has_train or data.validation_file or data.eval_dataset):
        raise UserError("give --train_file or --validation_file, or --dataset or --eval_dataset")
    if data.streaming:
        raise UserError("--streaming is for training; drop it, and give --max_samples 100 to read no further")
    from finetune_chatmodel_demo.chatglm3 import load_tokenizer  # heavy: not for --help

    try:
        tokenizer = load_tokenizer(options.tokenizer)
    except (UserError, OSError) as error:
        raise UserError(f"--tokenizer: {error}") from error
    show(options, tokenizer, build_stage_data(data, options.stage, tokenizer, options.seed, needs_train=has_train))


def show(options: argparse.Namespace, tokenizer, built: StageData) -> None:
    """Prints the summaries and the table, and shows rows in the form that was asked for."""
    parts = {name: getattr(built, name) for name in ("train", "validation") if getattr(built, name) is not None}
    shown = parts.get(options.part or next(iter(parts)))
    if shown is None:
        raise UserError(f"there are no rows of --part {options.part}; there are those of {', '.join(parts)}")
    wanted = options.row
    for row in wanted or ():
        if not 0 <= row < len(shown):
            raise UserError(f"--row {row} does not exist; {shown.report.path} has rows 0 to {len(shown) - 1}")
    summary_stream = sys.stderr if options.json else sys.stdout
    is_split = len({rows.report.path for rows in parts.values()}) < len(parts)
    summaries = [format_summary(rows, f" ({name})" if is_split else "") for name, rows in parts.items()]
    print("\n\n".join([*summaries, built.table]), file=summary_stream)
    if options.html:
        rows = wanted or list(range(min(HTML_ROWS, len(shown))))
        Path(options.html).write_text(format_html(tokenizer, shown, rows, built.table), encoding="utf-8")
        print(f"\n{len(rows)} rows written to {options.html}", file=summary_stream)
    if options.json:
        for row in wanted or range(len(shown)):
            print(json.dumps(shown[row]))
    elif not options.html:
        for row in wanted or [0]:
            starts = shown.document_starts(row) if options.stage == "pt" else ()
            title = f"row {row} ({shown.where(row)})"
            print("\n" + format_row(tokenizer, shown[row], title, wants_color(sys.stdout), starts))


def wants_color(stream) -> bool:
    """Colour on a terminal only, and not where NO_COLOR is set (no-color.org) or the terminal is dumb."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


if __name__ == "__main__":
    sys.exit(main())
