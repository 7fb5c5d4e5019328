"""How long finetune.py takes to its first steps, and how much memory, with few rows and with many; prints JSON.

    python tests/benchmarks/bench_rows.py --output tests/benchmarks/results/rows.json

Each number of rows is a file of short conversations and two runs of three steps on THUDM/chatglm3-tiny: the first
tokenizes, the second finds the kept rows (--tokenized_cache).
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark_helpers import REPOSITORY, describe_machine, own_memory, publish

NAMES = ("皮卡丘", "妙蛙种子", "小火龙", "杰尼龟", "喷火龙")
STEPS = 3
SECONDS_BETWEEN_LOOKS = 0.1
MIB = 2**20


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the report, and returns it."""
    options = parse_arguments(arguments)
    report: dict[str, Any] = {
        "benchmark": "rows",
        "machine": describe_machine(),
        "settings": {"model": "THUDM/chatglm3-tiny", "steps": STEPS, "batch_size": 4, "workers": options.workers},
        "memory": "anonymous resident memory of all processes of the run; pages of mapped files belong to nobody",
        "results": [],
    }
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            report["results"].append(measure(rows, Path(folder), options.workers))
    peaks = [one["first"]["peak_mib"] for one in report["results"]]
    report["more_mib_than_with_the_fewest_rows"] = max(peaks) - peaks[0]
    publish(report, options.output)
    return report


def measure(rows: int, folder: Path, workers: int) -> dict[str, Any]:
    """Both runs on a file of `rows` conversations."""
    data = folder / "rows.jsonl"
    write_rows(data, rows)
    found = {"rows": rows, "file_mib": round(data.stat().st_size / MIB, 1)}
    for name in ("first", "again"):
        found[name] = watch_run(data, folder, workers)
    found["kept_mib"] = round(sum(p.stat().st_size for p in (folder / "cache").rglob("*") if p.is_file()) / MIB, 1)
    return found


def write_rows(path: Path, rows: int) -> None:
    """Conversations of one or two questions, as JSON lines."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            turns = []
            for _ in range(draw.randint(1, 2)):
                name = draw.choice(NAMES)
                turns.append({"role": "user", "content": f"{name}的身高是多少？"})
                turns.append({"role": "assistant", "content": f"{name}的身高是{draw.randint(1, 300) / 10}米。"})
            file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")


def watch_run(data: Path, folder: Path, workers: int) -> dict[str, float]:
    """Seconds and peak memory of a run of finetune.py with all its processes.

    Raises:
        RuntimeError: when the run fails.
    """
    command = [sys.executable, str(REPOSITORY / "finetune_chatmodel_demo" / "finetune.py"), "--use_cpu"]
    options = {
        "train_file": data,
        "model_name_or_path": REPOSITORY / "THUDM" / "chatglm3-tiny",
        "output_dir": folder / "output",
        "tokenized_cache": folder / "cache",
        "preprocessing_num_workers": workers,
        "pre_seq_len": 8,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "plot_loss": False,
    }
    command += [str(text) for name, value in options.items() for text in (f"--{name}", value)]
    log = folder / "printed"
    started, peak = time.perf_counter(), 0.0
    with log.open("w", encoding="utf-8") as printed:
        run = subprocess.Popen([*command, "--overwrite_output_dir"], stdout=printed, stderr=subprocess.STDOUT)
        while run.poll() is None:
            peak = max(peak, sum(own_memory(process) for process in family(run.pid)))
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if run.returncode:
        raise RuntimeError(f"finetune.py ended with {run.returncode}: {log.read_text(encoding='utf-8')[-2000:]}")
    return {"seconds": round(time.perf_counter() - started, 1), "peak_mib": round(peak)}


def family(process: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [process, *(one for child in children for one in family(int(child)))]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 1_000_000], help="default: 1000 1000000")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args(arguments)
    if min(options.rows) < 16 or options.workers < 1:
        parser.error("--rows are at least 16, --workers at least 1")
    return options


if __name__ == "__main__":
    main()
