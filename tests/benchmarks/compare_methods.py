"""Base, prefix, LoRA, freeze and full on the embedded model, trained with stated settings, asked in one table; JSON.

    python tests/benchmarks/compare_methods.py --threads 1 --output tests/benchmarks/results/compare_methods.json

Each method is finetune.py itself on the Kanto conversations, of which a fifth of the Pokémon is held out, then
`evaluate.py --csv` asks all of them the same questions: trained wordings, unseen ones, conversations in new orders,
what the table cannot answer, and the Pokémon that were held out. --quick proves that it works, in seconds.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark_helpers import REPOSITORY, describe_machine, prepare_threads, publish

MODEL = REPOSITORY / "THUDM" / "chatglm3-tiny"
CSV = REPOSITORY / "data_processing" / "data.csv"
TEMPLATE = REPOSITORY / "data_processing" / "templates" / "pokemon_kanto.yaml"
DATA_SEED = 42
HOLD_OUT = 0.2


@dataclass(frozen=True)
class Recipe:
    """How a method is trained: flags of finetune.py. The prefix's are those of scripts/quickstart.sh.

    The others' learning rates are the best of two or three that were tried on 400 steps (full: 5e-4 and 2e-4, of which
    the larger forgot a tenth of the held-out facts; lora: 5e-3 at once).
    """

    name: str
    method: str
    steps: int
    learning_rate: float
    batch: int = 4
    flags: tuple[tuple[str, Any], ...] = ()
    seed: int = 42


RECIPES = (
    Recipe("prefix", "ptuning", 900, 0.15, flags=(("pre_seq_len", 64), ("prefix_init_std", 0.5))),
    Recipe("lora", "lora", 400, 5e-3, flags=(("lora_rank", 8),)),
    Recipe("freeze", "freeze", 400, 1e-3, flags=(("freeze_trainable_layers", 2),)),
    Recipe("full", "full", 400, 2e-4),
)


def make_data(folder: Path) -> Path:
    """The Kanto conversations without the Pokémon that are held out."""
    from data_processing.csv_rows import CsvRows
    from data_processing.data_processing import convert
    from data_processing.template_reader import load_template

    path = folder / "train.json"
    convert(CsvRows(CSV), load_template(TEMPLATE), {"train": path}, seed=DATA_SEED, hold_out=HOLD_OUT)
    return path


def train(recipe: Recipe, data: Path, output: Path) -> dict[str, Any]:
    """finetune.py with this recipe.

    Returns:
        Seconds of the clock and of the processor, trained parameters, and the first and last logged loss.
    """
    from finetune_chatmodel_demo import finetune

    options = {
        "finetuning_type": recipe.method,
        "train_file": data,
        "model_name_or_path": MODEL,
        "output_dir": output,
        "max_seq_length": 512,
        "per_device_train_batch_size": recipe.batch,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "cosine",
        "max_steps": recipe.steps,
        "save_strategy": "no",
        "logging_steps": max(1, recipe.steps // 20),
        "plot_loss": False,
        "seed": recipe.seed,
        "use_cpu": True,
    } | dict(recipe.flags)
    wall, cpu = time.monotonic(), time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        status = finetune.main([part for name, value in options.items() for part in (f"--{name}", str(value))])
    if status != 0:
        raise SystemExit(f"finetune.py ended with {status} for {recipe}")
    log = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    return {
        "wall_seconds": round(time.monotonic() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def ask(folders: dict[str, Path], data: Path, count: int, probed: bool) -> dict[str, Any]:
    """The figures of base and all trained folders, on the same questions."""
    from finetune_chatmodel_demo import evaluate
    from finetune_chatmodel_demo.evaluation.candidates import choose_candidates
    from finetune_chatmodel_demo.evaluation.comparison import AskOptions, compare_candidates
    from finetune_chatmodel_demo.evaluation.probing import read_probes
    from finetune_chatmodel_demo.evaluation.question_building import BuildOptions, read_and_build
    from finetune_chatmodel_demo.evaluation.questions import check_training_file

    questions = read_and_build(CSV, TEMPLATE, BuildOptions(count, DATA_SEED, HOLD_OUT))
    overlaps = check_training_file(questions, data)
    arguments = evaluate.build_parser().parse_args(["--device", "cpu", "--model", str(MODEL)])
    specs = ["base", *(f"{name}={folder}" for name, folder in folders.items())]
    options = AskOptions(history="both", batch_size=100, probes=read_probes() if probed else None)
    candidates = choose_candidates(specs, arguments)
    result, _ = compare_candidates(
        candidates, questions, options, lambda line: print(line, file=sys.stderr, flush=True)
    )
    for candidate in result["candidates"]:
        candidate["checkpoint"], candidate["model"] = None, MODEL.name  # folders of a machine that nobody else has
    training_file = {group: f"{overlap.found} of {overlap.asked}" for group, overlap in overlaps.items()}
    run = {"csv": CSV.name, "template": TEMPLATE.name, "hold_out": HOLD_OUT, "in_training_file": training_file}
    return {"run": run} | result


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", help="only these, a,b,c")
    parser.add_argument("--questions", type=int, default=300, help="of each group (%(default)s)")
    parser.add_argument("--learning_rate", type=float, help="in place of the recipe's, for trying")
    parser.add_argument("--steps", type=int, help="in place of the recipe's")
    parser.add_argument("--batch", type=int, help="in place of the recipe's")
    parser.add_argument("--seed", type=int, help="in place of the recipe's")
    parser.add_argument("--no_probes", action="store_true", help="facts alone")
    parser.add_argument("--folder", type=Path, help="keep what is trained here; a method that is there is not trained")
    parser.add_argument("--quick", action="store_true", help="2 steps and 2 questions of each group")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--output", type=Path, help="also write the report here, and as Markdown beside it")
    return parser.parse_args(arguments)


def choose_recipes(options: argparse.Namespace) -> list[Recipe]:
    """The recipes of --methods, with what the command line says otherwise."""
    wanted = options.methods.split(",") if options.methods else [recipe.name for recipe in RECIPES]
    changes = {name: getattr(options, name) for name in ("learning_rate", "steps", "batch", "seed")}
    if options.quick:
        changes["steps"] = 2
    changes = {name: value for name, value in changes.items() if value is not None}
    return [replace(recipe, **changes) for recipe in RECIPES if recipe.name in wanted]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the command line and returns the report that it prints."""
    options = parse_arguments(arguments)
    threads = prepare_threads(options.threads)
    machine, recipes, trained = describe_machine(), choose_recipes(options), {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        data = make_data(folder)
        for recipe in recipes:
            figures = folder / f"{recipe.name}.json"
            if not figures.is_file():
                print(f"training {recipe}", file=sys.stderr, flush=True)
                figures.write_text(json.dumps(train(recipe, data, folder / recipe.name)), encoding="utf-8")
            trained[recipe.name] = json.loads(figures.read_text(encoding="utf-8"))
        folders = {recipe.name: folder / recipe.name for recipe in recipes}
        result = ask(folders, data, 2 if options.quick else options.questions, not options.no_probes)
    report = {
        "benchmark": "compare_methods",
        "machine": machine | {"torch_threads": threads},
        "recipes": [asdict(recipe) | {"flags": dict(recipe.flags)} | trained[recipe.name] for recipe in recipes],
    } | result
    publish(report, options.output)
    if options.output is not None:
        from finetune_chatmodel_demo.evaluation.comparison_report import to_markdown

        options.output.with_suffix(".md").write_text(to_markdown(report), encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
