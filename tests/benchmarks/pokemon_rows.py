"""The Pokémon conversations as rows of token ids, made anew from data.csv by the steps that users take."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark_helpers import OFFICIAL_TOKENIZER_VARIABLE, REPOSITORY, summarize

TEMPLATE = REPOSITORY / "data_processing" / "templates" / "pokemon.yaml"
Row = dict[str, list[int]]


@dataclass(frozen=True)
class PokemonRows:
    """Rows to measure with.

    Attributes:
        rows: items with `input_ids` and `labels`, chosen by length from all rows.
        pad_token_id: what fills short rows.
        description: where they come from and how long they are, for a report.
    """

    rows: list[Row]
    pad_token_id: int
    description: dict[str, Any]


def find_tokenizer() -> tuple[str, Path]:
    """Name and folder of the official tokenizer where there is one, else of the embedded tiny model's."""
    candidates = [os.environ.get(OFFICIAL_TOKENIZER_VARIABLE), REPOSITORY / "THUDM" / "chatglm3-6b"]
    for folder in filter(None, candidates):
        if (Path(folder) / "tokenizer.model").is_file():
            return "official ChatGLM3", Path(folder)
    return "THUDM/chatglm3-tiny", REPOSITORY / "THUDM" / "chatglm3-tiny"


def load_pokemon_rows(count: int, max_seq_length: int, csv_rows: int | None = None) -> PokemonRows:
    """Converts, tokenizes, and chooses rows.

    Args:
        count: rows to choose: those in the middle of as many equal parts of all rows, ordered by length, so that a
            few rows are as long on average as all of them.
        max_seq_length: most ids of a row.
        csv_rows: Pokémon to read; default: all.
    """
    from finetune_chatmodel_demo.chatglm3 import load_tokenizer
    from finetune_chatmodel_demo.conversation import build_dataset

    name, folder = find_tokenizer()
    tokenizer = load_tokenizer(folder)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "pokemon_conversations.json"
        _write_conversations(path, csv_rows)
        dataset = build_dataset(
            "multi-turn",
            path,
            tokenizer,
            max_seq_length=max_seq_length,
            max_source_length=max_seq_length,
            max_target_length=max_seq_length,
            show_progress=False,
        )
    chosen = [dataset[i] for i in choose_by_length(dataset.lengths, count)]
    description = {
        "template": TEMPLATE.name,
        "tokenizer": name,
        "rows": len(dataset),
        "tokens_of_all_rows": _describe_lengths(dataset.lengths),
        "chosen_rows_tokens": [len(row["input_ids"]) for row in chosen],
        "chosen_rows_mean": round(sum(len(row["input_ids"]) for row in chosen) / len(chosen), 1),
        "chosen_rows_supervised_tokens": [sum(label != -100 for label in row["labels"]) for row in chosen],
    }
    return PokemonRows(chosen, tokenizer.pad_token_id, description)


def choose_by_length(lengths: Sequence[int], count: int) -> list[int]:
    """Indices of `count` rows at the middles of equal parts of the order by length."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    if not 1 <= count <= len(order):
        raise ValueError(f"{count} rows are wanted, and the data has {len(order)}; choose from 1 to {len(order)}")
    return [order[int((part + 0.5) * len(order) / count)] for part in range(count)]


def _write_conversations(path: Path, csv_rows: int | None) -> None:
    from data_processing.csv_rows import CsvRows
    from data_processing.data_processing import convert
    from data_processing.template_reader import load_template

    rows = CsvRows(REPOSITORY / "data_processing" / "data.csv")
    convert(rows, load_template(TEMPLATE), {"train": path}, limit=csv_rows)


def _describe_lengths(lengths: Sequence[int]) -> dict[str, float]:
    return {"mean": round(sum(lengths) / len(lengths), 1)} | summarize(lengths)
