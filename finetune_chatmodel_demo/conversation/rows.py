"""Rows of token ids: an Arrow table for each data set, in memory or mapped from a file, however many rows there are.

`tokenizing` builds the tables, `stage_data` joins, splits and mixes them; no row is copied for that. Each stage has its
kind of item, see `make_item`. Look at rows with `inspect_data.py`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from finetune_chatmodel_demo.conversation.records import RecordSource
from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL, Row

# The sequences that a row holds, by stage. A row of sft also says where its loss counts, in `is_target`.
SEQUENCES = {
    "pt": ("input_ids",),
    "sft": ("input_ids",),
    "rm": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "dpo": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "ppo": ("input_ids", "labels"),
}
# Beside the sequences: tokens of what a step trains on at once, of all sequences, of targets; the record's place.
FACTS = ("length", "tokens", "supervised")
PLACE = ("number", "line")


@dataclass
class DatasetReport:
    """What became of the records of one file or data set; `str()` is the line to print.

    Attributes:
        rows_read: Valid records.
        rows_bad: Bad records that were skipped.
        rows_kept: Rows of the dataset.
        rows_dropped_masked: Records without a target.
        rows_dropped_long: Records of which the length limit leaves no target, or whose newest question does not fit
            into it together with the replies.
        rows_cut: Kept rows that lack something because of a length limit.
        rows_cut_inside: Those of them that end inside a turn, or hold a cut prompt or response.
        turns_kept: Turns in the kept rows (0 for input-output).
        turns_dropped: Whole turns that the kept rows lack.
        tokens_total: Tokens of the kept rows.
        tokens_supervised: Those of them that are targets.
    """

    path: str
    rows_read: int = 0
    rows_bad: int = 0
    rows_kept: int = 0
    rows_dropped_masked: int = 0
    rows_dropped_long: int = 0
    rows_cut: int = 0
    rows_cut_inside: int = 0
    turns_kept: int = 0
    turns_dropped: int = 0
    tokens_total: int = 0
    tokens_supervised: int = 0

    def __str__(self) -> str:
        share = self.tokens_supervised / max(1, self.tokens_total)
        return (
            f"{self.path}: {self.rows_kept:,} rows of {self.rows_read + self.rows_bad:,} records "
            f"({self.rows_bad:,} bad, {self.rows_dropped_masked:,} dropped without a target"
            f"{f', {self.rows_dropped_long:,} too long' if self.rows_dropped_long else ''}; "
            f"{self.rows_cut:,} rows cut, {self.rows_cut_inside:,} of them inside a turn, "
            f"{self.turns_dropped:,} turns left out); "
            f"{self.tokens_total:,} tokens, {share:.1%} supervised"
        )

    def count(self, row: Row) -> bool:
        """Counts what became of one record; returns whether the row is kept."""
        self.rows_read += 1
        if row.problem is not None:
            self.rows_dropped_masked += row.problem == "masked"
            self.rows_dropped_long += row.problem == "long"
            return False
        self.rows_kept += 1
        self.rows_cut += row.is_cut_inside or row.turns_dropped > 0
        self.rows_cut_inside += row.is_cut_inside
        self.turns_kept += row.turns_kept
        self.turns_dropped += row.turns_dropped
        self.tokens_total += len(row.labels)
        self.tokens_supervised += len(row.labels) - row.labels.count(IGNORED_LABEL)
        return True

    def add(self, other: "DatasetReport") -> None:
        """Adds the counts of another part of the same file."""
        for name, value in asdict(other).items():
            if name != "path":
                setattr(self, name, getattr(self, name) + value)


class Rows:
    """Rows of a stage, map-style: `len(rows)`, `rows[row]`. They may come from several data sets.

    Attributes:
        stage: What the rows are for.
        reports: What became of the records, for each data set.
    """

    def __init__(
        self,
        stage: str,
        table: Any,
        facts: np.ndarray,
        sources: Sequence[RecordSource],
        reports: Sequence[DatasetReport],
    ):
        """
        Args:
            stage: See above.
            table: A `datasets.Dataset` with the columns SEQUENCES, FACTS and PLACE.
            facts: (4, rows) int32: FACTS, and the number of the data set.
            sources: The records of each data set.
            reports: See above.
        """
        self.stage, self.sources, self.reports = stage, list(sources), list(reports)
        self._table, self._facts = table, facts
        self._sequences = table.select_columns([*SEQUENCES[stage], *(["is_target"] if stage == "sft" else [])])

    def __len__(self) -> int:
        return self._facts.shape[1]

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        return make_item(self.stage, self._sequences[row])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row: of a pair the prompt with the longer reply, of ppo the prompt."""
        return self._facts[0].tolist()

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of one data set, in their order."""
        return len(self.reports) == 1 and len(self) == self.reports[0].rows_kept

    @property
    def report(self) -> DatasetReport:
        """The sums of the data sets' reports, but for the rows and tokens, which are those of the rows here."""
        total = DatasetReport(", ".join(report.path for report in self.reports))
        for report in self.reports:
            total.add(report)
        total.rows_kept = len(self)
        total.tokens_total, total.tokens_supervised = self._facts[1:3].sum(axis=1, dtype=np.int64).tolist()
        return total

    def count_by_source(self) -> list[int]:
        """How many of the rows come from each data set."""
        return np.bincount(self._facts[3], minlength=len(self.sources)).tolist()

    def where(self, row: int) -> str:
        """The place of a row's record in its file."""
        place = self._table.select_columns(list(PLACE))[row]
        return self.sources[self._facts[3, row]].where(place["number"], place["line"])

    def ids(self, row: int) -> np.ndarray:
        """(T,) int32: the ids of a row's first sequence; nothing is copied."""
        return self._sequences.with_format("arrow")[row].column(0)[0].values.to_numpy()

    def select(self, order: np.ndarray) -> "Rows":
        """Some of the rows, in some order."""
        return Rows(self.stage, self._table.select(order), self._facts[:, order], self.sources, self.reports)


def join(sets: Sequence[Rows]) -> Rows | None:
    """All rows of all data sets, one after the other; None where there is none."""
    if len(sets) < 2:
        return sets[0] if sets else None
    import datasets  # here, so that a `--help` need not wait for it

    facts = [rows._facts.copy() for rows in sets]
    for number, each in enumerate(facts):
        each[3] = number
    sources, reports = ([each for rows in sets for each in getattr(rows, name)] for name in ("sources", "reports"))
    table = datasets.concatenate_datasets([rows._table for rows in sets])
    return Rows(sets[0].stage, table, np.concatenate(facts, axis=1), sources, reports)


def make_columns(stage: str, row: Row) -> dict[str, list]:
    """A rendered row as the table holds it, without its place."""
    lengths = [len(part) for part in row.parts]
    columns: dict[str, Any] = dict(zip(SEQUENCES[stage], row.parts, strict=True))
    if stage == "sft":
        columns["is_target"] = [label != IGNORED_LABEL for label in row.labels]
    columns["length"] = lengths[0] + (max(lengths[1:]) if stage in ("rm", "dpo") else 0)
    columns["tokens"] = sum(lengths)
    columns["supervised"] = sum(label != IGNORED_LABEL for label in row.labels)
    return columns


def make_item(stage: str, columns: dict[str, list]) -> dict[str, list[int]]:
    """A row as a trainer takes it, from the columns of the table.

    Returns:
        pt and sft: `input_ids` and `labels`, -100 where the loss does not count. rm and dpo: `prompt_ids`, `chosen_ids`
        and `rejected_ids`; what a model reads is prompt + reply. ppo: `input_ids`, the prompt, and `labels`, the
        reference reply, `[]` where the data has none.
    """
    if stage == "pt":
        return {"input_ids": columns["input_ids"], "labels": list(columns["input_ids"])}
    if stage == "sft":
        pairs = zip(columns["input_ids"], columns["is_target"], strict=True)
        labels = [token if is_target else IGNORED_LABEL for token, is_target in pairs]
        return {"input_ids": columns["input_ids"], "labels": labels}
    return {name: columns[name] for name in SEQUENCES[stage]}
