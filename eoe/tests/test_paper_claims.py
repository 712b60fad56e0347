"""Every claim on hand-made records: true, false and not measured; a hair on either side of its bar."""

from lab.claims import FAILS, HOLDS, UNDECIDED, UNKNOWN

import pandas as pd
import pytest

from claims import CLAIMS, DRAWN

BY_ID = {c.id: c for c in CLAIMS}


def frame(values: dict[tuple[str, str, str], float]) -> pd.DataFrame:
    """{(metric, method, dataset): mean over two seeds, whose differences agree} -> a long frame."""
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
UP = {("AUROC", "EOE", "synthetic"): 95.1, ("AUROC", "MCM", "synthetic"): 94.0}
CASES = [  # claim, records a hair beyond its bar, what breaks it
    ("A1", {TRUTH: 10.0, EOE: 20.0, ZERO: 30.0, MCM: 30.1}, {MCM: 29.9}),
    ("A1", {TRUTH: 10.0, EOE: 20.0, ZERO: 30.0, MCM: 40.0}, {TRUTH: 20.0}),
    ("A1", {TRUTH: 10.0, EOE: 20.0, ZERO: 30.0, MCM: 40.0}, {EOE: 30.0}),
    ("A2", {MCM: 45.1, EOE: 40.0, **UP}, {EOE: 40.2}),
    ("A2", {MCM: 45.1, EOE: 40.0, **UP}, {("AUROC", "EOE", "synthetic"): 94.9}),
    ("A3", {OTHER: 45.1, EOE: 40.0}, {EOE: 40.2}),
    ("B1", fpr("far", MCM=43.1, EOE=40.0), {("FPR95", "EOE", "far"): 40.2}),
    ("B2", fpr("near", MCM=43.1, EOE=40.0), {("FPR95", "EOE", "near"): 40.2}),
    ("B3", fpr("fine-grained", MCM=43.1, EOE=40.0), {("FPR95", "EOE", "fine-grained"): 40.2}),
    *(("B4", everywhere(EOE=40.0, irrelevant=40.1), {("FPR95", "EOE", d): 40.1}) for d in DRAWN),
    *(("B5", everywhere(EOE=40.0, truth=39.9), {("FPR95", "Ground Truth", d): 40.0}) for d in DRAWN),
    *(("B6", everywhere(MCM=43.1, free=40.0), {("FPR95", "EOE(no OOD name)", d): 40.2}) for d in DRAWN),
    ("B7", fpr("fine-grained", S_MAX=50.1, EOE=40.0), {("FPR95", "S_MAX", "fine-grained"): 50.0}),
    *(("B8", everywhere(EOE=40.0, MaxLogit=40.1, Energy=50.0), {("FPR95", "MaxLogit", d): 40.0}) for d in DRAWN),
    *(("B8", everywhere(EOE=40.0, MaxLogit=50.0, Energy=40.1), {("FPR95", "Energy", d): 40.0}) for d in DRAWN),
]


@pytest.mark.parametrize(("claim", "good", "change"), CASES)
def test_both_sides_of_the_bar(claim, good, change):
    verdict, text = BY_ID[claim].judge(frame(good))
    assert verdict == HOLDS and text
    assert BY_ID[claim].judge(frame({**good, **change}))[0] == FAILS
    for key in good:
        assert BY_ID[claim].judge(frame({k: v for k, v in good.items() if k != key}))[0] == UNKNOWN, key


def test_seeds_that_disagree_decide_nothing():
    found = frame(fpr("far", MCM=50.0, EOE=40.0))
    found.loc[(found["method"] == "MCM") & (found["seed"] == 1) & (found["setting"] == "tier B"), "value"] = 40.0
    assert BY_ID["B1"].judge(found)[0] == UNDECIDED


def test_every_claim_is_tested():
    assert {c for c, *_ in CASES} == {*BY_ID} and len(BY_ID) == len(CLAIMS)
