"""Which settings teach a prefix best? Trains one prefix a setting on the embedded model, counts exact answers; JSON.

    python tests/benchmarks/sweep_prefix.py --threads 1 --report tests/benchmarks/results

Settings differ from the base setting (the recipe of scripts/quickstart.sh, in fewer steps) in one thing at a time;
a grid crosses learning rate and start. Each run is finetune.py itself, then questions in trained and in unseen
wordings, as evaluate.py asks them. A finished run is a line of --runs, which a later call does not repeat: stop the
program when you like. --quick proves that it works, in seconds.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark_helpers import REPOSITORY, describe_machine, prepare_threads, publish

MODEL = REPOSITORY / "THUDM" / "chatglm3-tiny"
TEMPLATE = REPOSITORY / "data_processing" / "templates" / "pokemon_kanto.yaml"
RUNS = REPOSITORY / "tests" / "benchmarks" / "results" / "sweep_prefix.jsonl"
DATA_SEED = 42
QUICK_LIMIT = 4
LONGEST_REPLY = 40
# Texts that a prefix can start as. "dialogue" is what training shows: the first conversations of the training file.
DIALOGUE, INSTRUCTION = "dialogue", "instruction"
INSTRUCTION_TEXT = "你是宝可梦图鉴，请用一句话准确回答关于宝可梦的问题。"


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        init: "0.5" for N(0, 0.5²), or the name of a text.
        warmup: share of the steps.
        questions: asked in trained wordings, and as many in unseen ones.
    """

    steps: int
    learning_rate: float = 0.15
    warmup: float = 0.03
    pre_seq_len: int = 64
    init: str = "0.5"
    projection: bool = False
    dropout: float = 0.1
    seed: int = 42
    questions: int = 300

    @property
    def key(self) -> str:
        """Equal for equal settings, whatever the order of a file."""
        return json.dumps(asdict(self), sort_keys=True)


def plan() -> dict[str, list[Setting]]:
    """The settings by what they vary.

    What matters most, learning rate and start, is measured in a third of the quickstart's 900 steps, the rest in a
    ninth with fewer questions: enough to see what helps and what hurts.
    """
    base, short = Setting(steps=300), Setting(steps=100, questions=100)
    return {
        "learning rate": [replace(base, learning_rate=rate) for rate in (2e-5, 0.02, 0.05, 0.15, 0.3)],
        "start": [replace(base, init=init) for init in ("1.0", "0.5", "0.1", "0.02", DIALOGUE, INSTRUCTION)],
        "learning rate × start": [
            replace(base, learning_rate=rate, init=init)
            for rate, inits in ((0.02, ("0.1", DIALOGUE)), (0.15, ("0.1", DIALOGUE)), (0.3, ()))
            for init in ("1.0", "0.5", *inits)
        ],
        "projection": [short] + [replace(short, projection=True, learning_rate=rate) for rate in (0.02, 0.005)],
        "prefix length": [replace(short, pre_seq_len=length) for length in (8, 32, 64, 128)],
        "dropout": [replace(short, dropout=dropout) for dropout in (0.0, 0.1, 0.3)],
        "warm-up": [replace(short, warmup=warmup) for warmup in (0.0, 0.03, 0.1)],
        "start and seed": [replace(base, init=init, seed=seed) for init in ("1.0", "0.5") for seed in (42, 43)],
        "what helped": [
            base,
            replace(base, dropout=0.0),
            replace(base, projection=True, learning_rate=0.005),
        ],
    }


def quick_plan() -> dict[str, list[Setting]]:
    """A few steps of a few settings."""
    base = Setting(steps=2, pre_seq_len=4, questions=4)
    return {
        "start": [base, replace(base, init=DIALOGUE)],
        "projection": [base, replace(base, projection=True, learning_rate=0.02)],
    }


class Sweep:
    """Makes the runs that are still missing."""

    def __init__(self, runs: Path, limit: int | None = None) -> None:
        """
        Args:
            runs: JSON lines, one for each finished run.
            limit: Pokémon to make conversations about; default: all 151.
        """
        self.runs, self.limit = runs, limit
        self.results: dict[str, dict[str, Any]] = {}
        if runs.is_file():
            for line in runs.read_text(encoding="utf-8").splitlines():
                result = json.loads(line)
                self.results[Setting(**result["setting"]).key] = result

    def run(self, settings: list[Setting]) -> None:
        """Trains and asks; each result is written at once."""
        missing = [setting for setting in dict.fromkeys(settings) if setting.key not in self.results]
        with tempfile.TemporaryDirectory() as scratch:
            files = write_data(Path(scratch), self.limit) if missing else {}
            for number, setting in enumerate(missing, start=1):
                print(f"run {number} of {len(missing)}: {setting}", file=sys.stderr, flush=True)
                result = {"setting": asdict(setting)} | self.measure(setting, files)
                self.results[setting.key] = result
                self.runs.parent.mkdir(parents=True, exist_ok=True)
                with self.runs.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")

    def measure(self, setting: Setting, files: dict[str, Path]) -> dict[str, Any]:
        """One run: losses, exact answers by file, seconds of the processor."""
        started = time.process_time()
        with tempfile.TemporaryDirectory() as scratch:
            losses = train(setting, files, Path(scratch) / "prefix")
            trained = time.process_time()
            scores = ask(Path(scratch) / "prefix", files, setting.questions) if losses else {}
        return {
            **(losses or {"failed": True}),
            "exact": scores,
            "training_cpu_seconds": round(trained - started, 1),
            "cpu_seconds": round(time.process_time() - started, 1),
        }


def write_data(folder: Path, limit: int | None) -> dict[str, Path]:
    """The Kanto conversations, made anew: trained and unseen wordings."""
    from data_processing.csv_rows import CsvRows
    from data_processing.data_processing import convert
    from data_processing.template_reader import load_template

    files = {"train": folder / "train.json", "validation": folder / "validation.json"}
    rows = CsvRows(REPOSITORY / "data_processing" / "data.csv")
    convert(rows, load_template(TEMPLATE), files, seed=DATA_SEED, limit=limit)
    return files


def train(setting: Setting, files: dict[str, Path], output: Path) -> dict[str, float] | None:
    """finetune.py with this setting.

    Returns:
        Mean training loss of the first and of the last tenth of the steps, and the validation loss; None for a run
        that finetune.py stopped.
    """
    from finetune_chatmodel_demo import finetune

    options = {
        "train_file": files["train"],
        "validation_file": files["validation"],
        "model_name_or_path": MODEL,
        "output_dir": output,
        "pre_seq_len": setting.pre_seq_len,
        "prefix_projection": setting.projection,
        "prefix_dropout": setting.dropout,
        "max_seq_length": 512,
        "per_device_train_batch_size": 4,
        "learning_rate": setting.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(setting.warmup * setting.steps),
        "max_steps": setting.steps,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_steps": max(1, setting.steps // 10),
        "plot_loss": False,
        "seed": setting.seed,
        "use_cpu": True,
    }
    text = start_text(setting.init, files["train"])
    options |= {"prefix_init_std": setting.init} if text is None else {"prefix_init_text": text}
    with contextlib.redirect_stdout(sys.stderr):
        status = finetune.main([argument for name, value in options.items() for argument in (f"--{name}", str(value))])
    if status != 0:
        return None
    log = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    validation = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return {"first_loss": losses[0], "last_loss": losses[-1], "validation_loss": validation[-1]}


def start_text(init: str, train_file: Path) -> str | None:
    """The text of a named start; None for a spread."""
    if init == INSTRUCTION:
        return INSTRUCTION_TEXT
    if init != DIALOGUE:
        return None
    records = json.loads(train_file.read_text(encoding="utf-8"))[:20]
    return "\n".join(message["content"] for record in records for message in record["conversations"])


def ask(prefix: Path, files: dict[str, Path], count: int) -> dict[str, int]:
    """Exact answers to `count` questions of each file."""
    from finetune_chatmodel_demo.chatglm3 import load_model, load_tokenizer
    from finetune_chatmodel_demo.evaluation.exact import read_questions, score_questions

    model, tokenizer = load_model(MODEL, pt_checkpoint=prefix, device="cpu"), load_tokenizer(MODEL)
    options = {"prompt_format": "multi-turn", "max_new_tokens": LONGEST_REPLY, "batch_size": 100}
    exact = {}
    for name, path in files.items():
        questions, _ = read_questions(path, count, DATA_SEED)
        exact[name] = score_questions(model, tokenizer, questions, **options)["exact"]
    return exact


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", help="only these groups of settings, a,b,c")
    parser.add_argument("--runs", type=Path, default=RUNS, help="finished runs, JSON lines (%(default)s)")
    parser.add_argument("--report", type=Path, help="folder for sweep_prefix.md and sweep_prefix.png")
    parser.add_argument("--report_only", action="store_true", help="make no run, report on the finished ones")
    parser.add_argument("--quick", action="store_true", help="3 runs of 2 steps on 4 Pokémon")
    parser.add_argument("--threads", type=int, help="torch's threads")
    return parser.parse_args(arguments)


def collect(groups: dict[str, list[Setting]], results: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The finished runs of each group, in the order of the plan."""
    for name, settings in groups.items():
        finished = [results[setting.key] for setting in settings if setting.key in results]
        if finished:
            yield {"group": name, "runs": finished}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the command line and returns the report that it prints."""
    options = parse_arguments(arguments)
    threads = prepare_threads(options.threads)
    machine = describe_machine()
    groups = quick_plan() if options.quick else plan()
    if options.groups:
        groups = {name: groups[name] for name in options.groups.split(",")}
    sweep = Sweep(options.runs, QUICK_LIMIT if options.quick else None)
    if not options.report_only:
        sweep.run([setting for settings in groups.values() for setting in settings])
    report = {
        "benchmark": "sweep_prefix",
        "machine": machine,
        "settings": {"model": MODEL.name, "template": TEMPLATE.name, "batch": 4, "threads": threads},
        "results": list(collect(groups, sweep.results)),
    }
    publish(report, None)
    if options.report is not None:
        from sweep_report import write_report

        write_report(report["results"], options.report)
    return report


if __name__ == "__main__":
    main()
