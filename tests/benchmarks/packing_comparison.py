"""Packed rows against the padded original, in tokens per second; part of `bench_training.py`."""

from typing import Any

from benchmark_helpers import Elapsed, ModelSize, summarize
from pokemon_rows import PokemonRows, Row

from finetune_chatmodel_demo.conversation.packing import group_rows

# What the project aims at: tokens per second, packed over padded, by maximum length.
TARGET_SPEEDUP = {2048: 40.0, 512: 7.0}


def compare_packing(
    length: int, data: PokemonRows, size: ModelSize, repeats: int, is_compiled: bool = False
) -> dict[str, Any]:
    """Makes the same optimizer steps on every side, by turns.

    Args:
        length: MAX_SEQ_LEN: what the original pads each row to, and what a packed row holds.
        data: the rows of a step.
        size: of the random model.
        repeats: steps of each side, after one for warming up.
        is_compiled: adds a side whose element-wise operations torch.compile fuses (--torch_compile).
    """
    from training_sides import OriginalLoss, OurLoss, PackedLoss, Side

    from finetune_chatmodel_demo.chatglm3.kernels import compile_elementwise

    rows = data.rows
    single: list[list[Row]] = [[row] for row in rows]
    groups = [[rows[i] for i in group] for group in group_rows([len(row["input_ids"]) for row in rows], length, seed=0)]
    sides = {
        "original": (Side(OriginalLoss(length, data.pad_token_id), size), single),
        "padded": (Side(OurLoss(data.pad_token_id), size), single),
        "packed": (Side(PackedLoss(data.pad_token_id), size), groups),
        "packed_without_checkpointing": (Side(PackedLoss(data.pad_token_id), size, "none"), groups),
    }
    if is_compiled:
        compiled = Side(PackedLoss(data.pad_token_id), size, "none")
        compile_elementwise(compiled.model)
        sides["packed_without_checkpointing_compiled"] = (compiled, groups)
    times: dict[str, list[Elapsed]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name in sides if number % 2 else reversed(sides):
            side, batches = sides[name]
            loss, elapsed = side.accumulate(batches)
            losses[name].append(loss)
            if number:  # the first one warms up
                times[name].append(elapsed)
    tokens = sum(len(row["input_ids"]) for row in rows)
    result: dict[str, Any] = {
        "tokens_of_a_step": tokens,
        "forward_passes": {name: len(batches) for name, (_, batches) in sides.items()},
        "share_of_packed_rows_filled": round(tokens / (len(groups) * length), 3),
        "tokens_per_second": {
            name: round(tokens * len(elapsed) / sum(t.wall for t in elapsed), 1) for name, elapsed in times.items()
        },
        "seconds_per_step": {name: summarize([t.wall for t in elapsed]) for name, elapsed in times.items()},
    }
    result["over_original"] = {name: _describe_ratio(times["original"], times[name]) for name in list(sides)[1:]}
    result["largest_relative_difference_of_losses"] = max(
        abs(loss / reference - 1)
        for name in sides
        for loss, reference in zip(losses[name], losses["original"], strict=True)
    )
    if is_compiled:
        plain, fused = (times[f"packed_without_checkpointing{end}"] for end in ("", "_compiled"))
        result["compiled_over_plain"] = _describe_ratio(plain, fused)
    if length in TARGET_SPEEDUP:
        reached = result["over_original"]["packed_without_checkpointing"]["tokens_per_second"]
        result["target"] = {
            "tokens_per_second": TARGET_SPEEDUP[length],
            "is_reached": reached >= TARGET_SPEEDUP[length],
        }
    return result


def _describe_ratio(original: list[Elapsed], other: list[Elapsed]) -> dict[str, Any]:
    ratios = [a.wall / b.wall for a, b in zip(original, other)]
    return {
        "tokens_per_second": round(sum(t.wall for t in original) / sum(t.wall for t in other), 2),
        "per_pair": summarize(ratios),
    }
