"""Every claim on hand-made records: true, false and not measured; a hair on either side of its bar."""

import pandas as pd
import pytest

from claims import CLAIMS, DRAWN

CHECKS = {c.id: c.check for c in CLAIMS}


def frame(values: dict[tuple[str, str, str], float]) -> pd.DataFrame:
    """{(metric, method, dataset): mean over two seeds} -> rows as tables.py hands them over."""
    rows = []
    for (metric, method, dataset), mean in values.items():
        setting = "tier A" if dataset == "synthetic" else "tier B"
        rows += [
            dict(metric=metric, method=method, dataset=dataset, setting=setting, seed=s, value=mean + d)
            for s, d in ((0, 1.0), (1, -1.0))
        ]
        rows.append(dict(metric=metric, method=method, dataset=dataset, setting="beta=0", seed=0, value=-99.0))
    return pd.DataFrame(rows)


def fpr(dataset: str, **methods: float) -> dict[tuple[str, str, str], float]:
    return {("FPR95", m, dataset): v for m, v in methods.items()}


def everywhere(**methods: float) -> dict[tuple[str, str, str], float]:
    names = {"truth": "Ground Truth", "irrelevant": "EOE(prompt=irrelevant)", "free": "EOE(no OOD name)"}
    return {("FPR95", names.get(m, m), d): v for d in DRAWN for m, v in methods.items()}


TRUTH, ZERO = ("FPR95", "Ground Truth", "synthetic"), ("FPR95", "S_MSP", "synthetic")
EOE, MCM = ("FPR95", "EOE", "synthetic"), ("FPR95", "MCM", "synthetic")
OTHER = ("FPR95", "EOE(prompt=irrelevant)", "synthetic")
UP = {("AUROC", "EOE", "synthetic"): 95.0, ("AUROC", "MCM", "synthetic"): 94.0}
CASES = [  # claim, records that fulfil it exactly at its bar, what breaks it
    ("A1", {TRUTH: 10.0, EOE: 20.0, ZERO: 30.0, MCM: 30.0}, {MCM: 29.9}),
    ("A1", {TRUTH: 10.0, EOE: 20.0, ZERO: 30.0, MCM: 40.0}, {TRUTH: 20.0}),
    ("A1", {TRUTH: 10.0, EOE: 20.0, ZERO: 30.0, MCM: 40.0}, {EOE: 30.0}),
    ("A2", {MCM: 45.0, EOE: 40.0, **UP}, {EOE: 40.1}),
    ("A2", {MCM: 45.0, EOE: 40.0, **UP}, {("AUROC", "EOE", "synthetic"): 94.9}),
    ("A3", {OTHER: 45.0, EOE: 40.0}, {EOE: 40.1}),
    ("B1", fpr("far", MCM=43.0, EOE=40.0), {("FPR95", "EOE", "far"): 40.1}),
    ("B2", fpr("near", MCM=43.0, EOE=40.0), {("FPR95", "EOE", "near"): 40.1}),
    ("B3", fpr("fine-grained", MCM=43.0, EOE=40.0), {("FPR95", "EOE", "fine-grained"): 40.1}),
    *(("B4", everywhere(EOE=40.0, irrelevant=40.1), {("FPR95", "EOE", d): 40.1}) for d in DRAWN),
    *(("B5", everywhere(EOE=40.0, truth=39.9), {("FPR95", "Ground Truth", d): 40.0}) for d in DRAWN),
    *(("B6", everywhere(MCM=43.0, free=40.0), {("FPR95", "EOE(no OOD name)", d): 40.1}) for d in DRAWN),
    ("B7", fpr("fine-grained", S_MAX=50.1, EOE=40.0), {("FPR95", "S_MAX", "fine-grained"): 50.0}),
    *(("B8", everywhere(EOE=40.0, MaxLogit=40.1, Energy=50.0), {("FPR95", "MaxLogit", d): 40.0}) for d in DRAWN),
    *(("B8", everywhere(EOE=40.0, MaxLogit=50.0, Energy=40.1), {("FPR95", "Energy", d): 40.0}) for d in DRAWN),
]


@pytest.mark.parametrize(("claim", "good", "change"), CASES)
def test_both_sides_of_the_bar(claim, good, change):
    verdict, text = CHECKS[claim](frame(good))
    assert verdict is True and text
    assert CHECKS[claim](frame({**good, **change}))[0] is False
    for key in good:
        assert CHECKS[claim](frame({k: v for k, v in good.items() if k != key}))[0] is None, key  # never "holds"


def test_every_claim_is_tested():
    assert {c for c, *_ in CASES} == {*CHECKS} and len(CHECKS) == len(CLAIMS)
