"""Compares training steps of the original demo with ours, padded and packed, on the Pokémon conversations; prints JSON.

    python tests/benchmarks/bench_training.py --output tests/benchmarks/results/training.json

Original: rows padded to --max_seq_length, logits of every position in float32. Ours: padded to the longest row of the
batch, logits where a label counts. The same random model, rows, prefix and gradient checkpointing on both sides; the
steps alternate, because other programs disturb a machine, and the losses of the two have to agree.

Packed (`packing_comparison.py`): one step on all of --packed_rows, in as many forward passes as a side needs: the
original one for each row, ours one for each group of rows that fills --max_seq_length, with and without checkpointing.
"""

import argparse
import multiprocessing
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark_helpers import Elapsed, ModelSize, describe_machine, prepare_threads, publish, summarize
from pokemon_rows import PokemonRows, Row, load_pokemon_rows

if TYPE_CHECKING:
    from training_sides import LossOf, Side

# What the project promises: samples per second of ours over the original's, by maximum length.
PROMISED_SPEEDUP = {2048: 20.0, 512: 4.0}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the report, and returns it."""
    options = parse_arguments(arguments)
    size = ModelSize(options.layers, options.hidden_size, options.ffn_hidden_size, options.vocabulary, options.prefix)
    threads = prepare_threads(options.threads)
    machine = describe_machine()
    data = load_pokemon_rows(options.rows, min(options.max_seq_length), options.csv_rows)
    batches = [data.rows[i : i + options.batch_size] for i in range(0, len(data.rows), options.batch_size)]
    packed_data = load_pokemon_rows(options.packed_rows or 1, min(options.max_seq_length), options.csv_rows)
    results = []
    for length in options.max_seq_length:
        results.append(compare(length, data.pad_token_id, batches, size, options.repeats))
        if options.packed_rows:
            from packing_comparison import compare_packing

            results[-1]["packing"] = compare_packing(length, packed_data, size, options.repeats, options.torch_compile)
        if not options.no_memory:
            results[-1]["memory"] = compare_memory(length, data, size, options.batch_size, threads)
    report = {
        "benchmark": "training",
        "machine": machine,
        "model": size.describe(),
        "data": data.description,
        "packed_data": packed_data.description if options.packed_rows else None,
        "settings": {
            "batch_size": options.batch_size,
            "repeats": options.repeats,
            "gradient_checkpointing": "both sides",
            "step": "forward, backward, gradient clipping, AdamW on the prefix; prefix dropout off",
            "order": "original, ours; in every second pass ours, original",
        },
        "results": results,
    }
    publish(report, options.output)
    return report


def compare(length: int, pad_token_id: int, batches: list[list[Row]], size: ModelSize, repeats: int) -> dict[str, Any]:
    """Trains both sides on the same batches, by turns."""
    from training_sides import OriginalLoss, OurLoss, Side

    original, ours = Side(OriginalLoss(length, pad_token_id), size), Side(OurLoss(pad_token_id), size)
    gradient_difference = compare_gradients(original, ours, batches[0])  # also the warm-up
    times: dict[str, list[Elapsed]] = {"original": [], "ours": []}
    losses: dict[str, list[float]] = {"original": [], "ours": []}
    for number in range(repeats):
        sides = [("original", original), ("ours", ours)]
        for batch in batches:
            for name, side in sides if number % 2 == 0 else reversed(sides):
                loss, elapsed = side.step(batch)
                times[name].append(elapsed)
                losses[name].append(loss)
    samples = sum(len(batch) for batch in batches) * repeats
    return {
        "max_seq_length": length,
        **{name: describe_side(elapsed, samples) for name, elapsed in times.items()},
        "speedup": describe_speedup(length, times),
        "agreement": describe_agreement(losses) | {"first_gradient_relative_difference": gradient_difference},
    }


def compare_gradients(original: "Side", ours: "Side", batch: list[Row]) -> float:
    """Length of the difference of the two prefix gradients, over the length of the original's."""
    reference = original.gradient(batch)
    return float((ours.gradient(batch) - reference).norm() / reference.norm())


def describe_side(times: list[Elapsed], samples: int) -> dict[str, Any]:
    """Samples per second over all steps, and the spread of the steps."""
    return {
        "samples_per_second": round(samples / sum(t.wall for t in times), 4),
        "samples_per_cpu_second": round(samples / sum(t.cpu for t in times), 4),
        "seconds_per_step": summarize([t.wall for t in times]),
        "cpu_seconds_per_step": summarize([t.cpu for t in times]),
    }


def describe_speedup(length: int, times: dict[str, list[Elapsed]]) -> dict[str, Any]:
    """Ratios of the original's time to ours: of the sums, and pair by pair."""
    pairs = list(zip(times["original"], times["ours"]))
    speedup: dict[str, Any] = {}
    for clock in ("wall", "cpu"):
        original, ours = [getattr(a, clock) for a, _ in pairs], [getattr(b, clock) for _, b in pairs]
        speedup["samples_per_second" if clock == "wall" else "samples_per_cpu_second"] = round(
            sum(original) / sum(ours), 3
        )
        speedup[f"per_pair_{clock}"] = summarize([a / b for a, b in zip(original, ours)])
    if length in PROMISED_SPEEDUP:
        promised = PROMISED_SPEEDUP[length]
        speedup |= {"promised": promised, "is_kept": speedup["samples_per_second"] >= promised}
    return speedup


def describe_agreement(losses: dict[str, list[float]]) -> dict[str, Any]:
    """How close the losses are; they are computed before each step, with a prefix that each side trained itself."""
    differences = [abs(a - b) / abs(a) for a, b in zip(losses["original"], losses["ours"])]
    return {
        "first_loss": {name: values[0] for name, values in losses.items()},
        "last_loss": {name: values[-1] for name, values in losses.items()},
        "first_relative_difference": differences[0],
        "largest_relative_difference": max(differences),
    }


def compare_memory(length: int, data: PokemonRows, size: ModelSize, batch_size: int, threads: int) -> dict[str, Any]:
    """Peak memory of each side in a new process, on the longest of the rows."""
    from training_sides import OriginalLoss, OurLoss

    longest = sorted(data.rows, key=lambda row: len(row["input_ids"]))[-batch_size:]
    sides: dict[str, LossOf] = {
        "original": OriginalLoss(length, data.pad_token_id),
        "ours": OurLoss(data.pad_token_id),
    }
    memory: dict[str, Any] = {"how": "resident set of a new process for each side, two steps on the longest rows"}
    for name, loss_of in sides.items():
        memory[name] = measure_in_new_process(loss_of, size, longest, threads)
    if memory["original"]:
        for key in ("step_mib", "resident_peak_mib"):
            memory[f"{key}_ours_over_original"] = round(memory["ours"][key] / max(memory["original"][key], 1), 3)
    return memory


def measure_in_new_process(loss_of: "LossOf", size: ModelSize, rows: list[Row], threads: int) -> Any:
    """`measure_memory` in a process that has done nothing else."""
    from training_sides import measure_memory

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_memory, (loss_of, size, rows, threads))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ModelSize()
    numbers = {
        "--rows": (8, "rows of different lengths, see pokemon_rows.py"),
        "--packed_rows": (14, "rows of a step of the packed comparison; 0 leaves it out"),
        "--repeats": (3, "passes over the rows"),
        "--batch_size": (1, "rows of a step; 1 is the official script's DEV_BATCH_SIZE"),
        "--layers": (default.layers, "transformer blocks"),
        "--hidden_size": (default.hidden_size, "width, a multiple of 128"),
        "--ffn_hidden_size": (default.ffn_hidden_size, "width inside the MLP"),
        "--vocabulary": (default.vocabulary, "columns of the logits"),
        "--prefix": (default.pre_seq_len, "PRE_SEQ_LEN"),
    }
    parser.add_argument("--max_seq_length", type=int, nargs="+", default=[2048, 512], help="default: 2048 512")
    for flag, (value, text) in numbers.items():
        parser.add_argument(flag, type=int, default=value, help=f"{text} (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's choice)")
    parser.add_argument("--csv_rows", type=int, help="Pokémon to read (default: all)")
    parser.add_argument("--torch_compile", action="store_true", help="packed rows also with element-wise parts fused")
    parser.add_argument("--no_memory", action="store_true", help="leave the memory measurement out")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args(arguments)
    for name in ("rows", "repeats", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


if __name__ == "__main__":
    main()
