"""The paper's printed numbers (paper.csv) and what follows from them."""

import dataclasses
import functools
import math
from collections.abc import Sequence

from lab.claims import FAILS, HOLDS
from lab.cli import HERE

import pandas as pd

from sets import PAPER, TITLES

ALL = [TITLES[n] for n in PAPER]
SPANS = {
    "table1": {"Average Seen": (0, 1), "Average Unseen": (1, 13), "Average All": (0, 13)},
    "table2": {"Average Seen": (0, 8), "Average Unseen": (8, 13), "Average All": (0, 13)},
}


@functools.cache
def _paper() -> pd.DataFrame:
    return pd.read_csv(HERE / "paper.csv", dtype={"dataset": str})


def number(table: str, dataset: str, method: str, metric: str = "accuracy") -> float:
    """A printed number; NaN where there is none."""
    f = _paper()
    rows = f[(f["table"] == table) & (f["dataset"] == dataset) & (f["method"] == method) & (f["metric"] == metric)]
    return float(rows["value"].iloc[0]) if len(rows) else math.nan


def gap(table: str, datasets: Sequence[str], method: str, other: str) -> str:
    """` (paper: +1.5)`: the mean over the data sets of the printed difference."""
    found = [number(table, d, method) - number(table, d, other) for d in datasets]
    return f" (paper: {sum(found) / len(found):+.1f})"


def bars(datasets: Sequence[str]) -> str:
    """The same of the figure on test power maximisation."""
    found = [number("figure-tpm", d, "MOKD", "accuracy_difference") for d in datasets]
    return f" (paper: {sum(found) / len(found):+.1f})"


@dataclasses.dataclass(frozen=True)
class Averages:
    """Printed averages against the means of the printed rows: those that differ by more than rounding can make."""

    wrong: tuple[str, ...]
    count: int

    def verdict(self) -> str:
        return FAILS if self.wrong else HOLDS

    def text(self) -> str:
        return f"{len(self.wrong)} of {self.count} differ: {'; '.join(self.wrong)}"


def averages() -> Averages:
    """Every printed average of Tables 1 and 2 whose rows are all printed, recomputed from them."""
    wrong, count = [], 0
    for table, rows in SPANS.items():
        for method in dict.fromkeys(_paper()[_paper()["table"] == table]["method"]):
            for row, (start, stop) in rows.items():
                said = number(table, row, method)
                own = [number(table, d, method) for d in ALL[start:stop]]
                mean = sum(own) / len(own)
                if math.isnan(said) or math.isnan(mean):
                    continue
                count += 1
                if abs(said - mean) > 0.1 + 1e-9:  # rows and average are rounded to 0.1
                    wrong.append(f"{table.title()}, {method}, {row}: {said:.1f} printed, {mean:.2f} by its rows")
    return Averages(tuple(wrong), count)
