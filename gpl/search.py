"""The small search that gave each method its learning rate, features and prior (RECIPES in settings.py).

    python search.py --dataset citeseer --methods grab gcn-ted

Every method is trained with the same settings on seeds that no table uses, and the choice is made by F1 on validation
graphs (README, "Equal care"). The Lee-Liu score, which needs no label of U, is printed beside it: it does not follow
F1.
"""

from dataclasses import dataclass
from typing import Literal

from lab import runs
from lab.runs import Number

import numpy as np
import torch

import evaluation
from methods import CLASSES
from settings import MethodName, Settings
from trainer import Trainer

GRID: dict[str, list[dict]] = {
    "recipe": [
        {"lr": 0.01, "features": "row"},
        {"lr": 0.01, "features": "binary"},
        {"lr": 0.003, "features": "binary"},
        {"lr": 0.001, "features": "binary"},
    ],
    "prior": [{"prior": "bbe"}, {"prior": "rempe"}, {"prior": "frozen"}],
    "inner": [{"inner_lr": 0.003}, {"inner_lr": 0.03}, {"inner_lr": 0.3}],
}
PRIORS = ("gpl", "gcn-ted", "mlp-ted", "gcn-nnpu", "mlp-nnpu", "lsdan")


@dataclass
class SearchSettings:
    dataset: str = "texas"
    """A data set of train.py."""
    methods: tuple[MethodName, ...] = tuple(CLASSES)
    """Which methods are searched."""
    what: Literal["recipe", "prior", "inner"] = "recipe"
    """Learning rate and features of every method, the prior of those that have one, or the steps on GPL's mask."""
    h: Number = 0.7
    """Synthetic only: share of edges that join a positive and a negative."""
    seeds: tuple[int, ...] = (100, 101, 102)
    """Calibration seeds; the tables use 0 to 9."""
    data_dir: str = ""
    """Folder with graphs/; default $REPRO_DATA, else ./data."""


def answers(s: Settings) -> tuple[list[dict], Trainer]:
    """Train without a run folder; metrics of every seed."""
    s.check()
    t = Trainer(s, torch.device("cpu"))
    return evaluation.measure(t, t.fit()), t


def main() -> None:
    s = runs.parse(SearchSettings, __doc__)
    for method in s.methods:
        if s.what == "prior" and method not in PRIORS or s.what == "inner" and method != "gpl":
            continue
        for changes in GRID[s.what]:
            own = Settings(
                method=method, dataset=s.dataset, h=s.h, seeds=s.seeds, data_dir=s.data_dir, cpe_holdout=0.2, **changes
            )
            rows, t = answers(own)
            said = {k: np.mean([r[k] for r in rows]) for k in ("lee_liu", "f1", "auc", "one_class")}
            said |= {k: np.mean([r[k] for r in rows]) for k in ("pi_signed_error", "h_weighted") if k in rows[0]}
            print(
                f"{s.dataset:10s} {method:10s} {' '.join(f'{k}={v}' for k, v in changes.items()):24s} "
                + "  ".join(f"{k} {v:.3f}" for k, v in said.items()),
                flush=True,
            )


if __name__ == "__main__":
    runs.command(main)
