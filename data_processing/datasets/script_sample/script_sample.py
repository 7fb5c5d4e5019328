"""Makes questions and answers on the weight of Pokémon from data.csv: an example of a data set that is a program.

It runs only with `--allow_dataset_scripts`; README.md beside the registry says what such a program looks like.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

FACTS_FILE = Path(__file__).resolve().parents[2] / "data.csv"


def load(split: str) -> Iterator[dict[str, str]]:
    """Yields the rows of a split: "validation" is every tenth Pokémon, "train" the others."""
    with open(FACTS_FILE, encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            if (number % 10 == 9) == (split == "validation"):
                yield {
                    "instruction": f"{row['姓名']}有多重？",
                    "output": f"{row['姓名']}的体重是{row['体重']}公斤。",
                }
