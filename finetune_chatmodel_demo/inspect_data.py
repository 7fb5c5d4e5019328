"""Shows what the model will be trained on: ids, labels and loss mask of any row, and a summary of the file.

    python finetune_chatmodel_demo/inspect_data.py --train_file X.jsonl --tokenizer THUDM/chatglm3-tiny --row 0 7
    python finetune_chatmodel_demo/inspect_data.py --train_file X.jsonl --tokenizer THUDM/chatglm3-tiny --html x.html
    python finetune_chatmodel_demo/inspect_data.py --train_file X.jsonl --tokenizer THUDM/chatglm3-tiny --json

The data flags are those of finetune.py. Rows are counted from 0, and are those that training sees.
"""

import argparse
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune_chatmodel_demo.conversation.arguments import add_data_arguments, read_data_arguments
from finetune_chatmodel_demo.conversation.datasets import ConversationDataset, build_dataset
from finetune_chatmodel_demo.conversation.viewing import format_html, format_row, format_summary

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
    parser.add_argument(
        "--row",
        type=int,
        nargs="+",
        help=f"Rows to show, of --train_file where both files are given [terminal: 0, --html: the first {HTML_ROWS}, "
        "--json: all].",
    )
    parser.add_argument("--html", metavar="OUT.html", help="Write a self-contained page instead of printing rows.")
    parser.add_argument("--json", action="store_true", help="Print rows as JSON lines, and nothing else, on stdout.")
    add_data_arguments(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the program.

    Args:
        arguments: The command line; None takes the process's.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        data = read_data_arguments(options)
        paths = [path for path in (data.train_file, data.validation_file) if path]
        if not paths:
            raise ValueError("give --train_file or --validation_file")
        from finetune_chatmodel_demo.chatglm3 import load_tokenizer  # heavy: not for --help

        tokenizer = load_tokenizer(options.tokenizer)
        datasets = [build_dataset(data.train_format, path, tokenizer, **data.dataset_options()) for path in paths]
        show(options, tokenizer, datasets)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; keep the interpreter from flushing into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")


def show(options: argparse.Namespace, tokenizer, datasets: list[ConversationDataset]) -> None:
    """Prints the summaries, and shows the rows of the first data set in the form that was asked for."""
    shown = datasets[0]
    wanted = options.row
    for row in wanted or ():
        if not 0 <= row < len(shown):
            raise ValueError(f"--row {row} does not exist; {shown.report.path} has rows 0 to {len(shown) - 1}")
    summary_stream = sys.stderr if options.json else sys.stdout
    print("\n\n".join(map(format_summary, datasets)), file=summary_stream)
    if options.html:
        rows = wanted or list(range(min(HTML_ROWS, len(shown))))
        Path(options.html).write_text(format_html(tokenizer, shown, rows), encoding="utf-8")
        print(f"\n{len(rows)} rows written to {options.html}", file=summary_stream)
    if options.json:
        for row in wanted or range(len(shown)):
            print(json.dumps(shown[row]))
    elif not options.html:
        for row in wanted or [0]:
            title = f"row {row} ({shown.where(row)})"
            print("\n" + format_row(tokenizer, shown[row], title, use_color=wants_color(sys.stdout)))
    sys.stdout.flush()


def wants_color(stream) -> bool:
    """Colour on a terminal only, and not where NO_COLOR is set (no-color.org) or the terminal is dumb."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    main()
