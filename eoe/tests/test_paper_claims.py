"""Every claim on hand-made records: true, false and not measured; a hair on either side of its bar."""

import math

from lab.claims import FAILS, HOLDS, UNDECIDED, UNKNOWN

import pandas as pd
import pytest

from claims import CLAIMS, DRAWN, FAR, OWN, PUBLISHED, Bootstrapped, bottom_line

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


# ----------------------------------------------------------------------------------------------------------- scale real

NEAR, FINE, PUB = OWN["near"], OWN["fine-grained"], (PUBLISHED, "near")
ALL = tuple((m, d) for d, m in OWN.items())
ENDS = (" without OOD names", " without OOD names and kinds")
PHOTO = "lite0, a photo of a"
REAL = {  # claim: (what, metric, setting, (method, data set) of each of its parts)
    "R1": ("gain", "FPR95", PHOTO, ((OWN[FAR], FAR),)),
    "R2": ("gain", "FPR95", PHOTO, (PUB, (NEAR, "near"))),
    "R3": ("gain", "FPR95", PHOTO, ((FINE, "fine-grained"),)),
    "R3a": ("beyond_animals", "FPR95", PHOTO, ((FINE, "fine-grained"), (FINE + ENDS[1], "fine-grained"))),
    "R4": ("beyond_irrelevant", "FPR95", PHOTO, ALL),
    "R5": ("beyond_irrelevant", "FPR95", PHOTO, (PUB,)),
    "R5a": ("beyond_irrelevant", "FPR95", PHOTO, tuple((PUBLISHED + e, "near") for e in ENDS)),
    "R6": ("left_to_truth", "FPR95", PHOTO, ALL),
    "R7": ("gain", "FPR95", PHOTO, ((f"irrelevant names for {NEAR}", "near"),)),
    "R8": ("beyond_irrelevant", "AUROC", PHOTO, ALL),
    "R9": ("beyond_nouns", "FPR95", PHOTO, ALL),
    "R10": ("beyond_irrelevant", "FPR95", "lite0, bare", ALL),
    "R11": ("beyond_irrelevant", "FPR95", PHOTO, tuple((FINE + e, "fine-grained") for e in ENDS)),
    "R12": ("beyond_irrelevant", "FPR95", "lite2, a photo of a", ALL),
    "R13": ("beyond_irrelevant", "FPR95", PHOTO, ((NEAR, "DAVIS"),)),
    "R14": ("beyond_maxlogit", "FPR95", PHOTO, (PUB, *ALL)),
    "R15": ("beyond_beta0", "FPR95", PHOTO, (PUB, *ALL)),
}


def told(what, metric, setting, parts, numbers=(1.0, 0.1, 2.0)) -> list[dict]:
    ends = zip(("", "_low", "_high"), numbers, strict=True)
    rows = [(f"{what}_{metric}{end}", v) for end, v in ends]
    if what == "gain":  # R7 asks for both metrics
        rows += [(f"gain_AUROC{end}", v) for end, v in zip(("", "_low", "_high"), numbers, strict=True)]
    common = dict(table="real", setting=setting, seed=0)
    return [dict(metric=m, value=v, method=a, dataset=d, **common) for a, d in parts for m, v in rows]


@pytest.mark.parametrize("claim", REAL)
def test_claims_on_real_images_are_judged_by_their_bootstrap_interval(claim):
    what, metric, setting, parts = REAL[claim]

    def verdict(rows):
        return BY_ID[claim].judge(pd.DataFrame(rows))[0]

    good = told(*REAL[claim])
    assert verdict(good) == HOLDS
    for k in range(len(parts)):  # every part counts
        rest = told(what, metric, setting, parts[:k] + parts[k + 1 :])
        assert verdict(rest + told(what, metric, setting, parts[k : k + 1], (1.0, -0.1, 2.0))) == UNDECIDED
        assert verdict(rest + told(what, metric, setting, parts[k : k + 1], (-1.0, -2.0, 0.0))) == FAILS
        assert verdict(rest + told("other", metric, setting, parts[k : k + 1])) == UNKNOWN
        bare = [r for r in told(what, metric, setting, parts[k : k + 1]) if not r["metric"].endswith(("_low", "_high"))]
        assert verdict(rest + bare) == UNDECIDED  # a value whose interval cannot be had


def test_the_bottom_line_says_what_names_are_worth_beyond_irrelevant_ones():
    rows = told("beyond_irrelevant", "FPR95", PHOTO, ((NEAR, "near"), (FINE, "fine-grained")), (1.5, -0.5, 3.0))
    rows += told("beyond_animals", "FPR95", PHOTO, ((FINE, "fine-grained"),), (2.0, 1.0, 3.0))
    rows += told("beyond_animals", "FPR95", PHOTO, ((FINE + ENDS[1], "fine-grained"),), (0.5, -1.0, 2.0))
    rows += told("beyond_irrelevant", "FPR95", PHOTO, ((OWN[FAR], FAR),), (-5.0, -9.0, -1.0))
    rows += told("beyond_nouns", "FPR95", PHOTO, ((OWN[FAR], FAR),), (-2.5, -6.0, 1.0))
    (text,) = bottom_line({"real": pd.DataFrame(rows)})
    assert "near not measured with the published names and +1.5 [-0.5, +3.0] with own ones" in text
    assert "fine-grained +1.5 [-0.5, +3.0] (+2.0 [+1.0, +3.0] over as many random animals, +0.5 [-1.0, +2.0]" in text
    assert "OOD classes and kinds of them), far -5.0 [-9.0, -1.0] (-2.5 [-6.0, +1.0] over as many random nouns" in text
    assert bottom_line({}) == [] and bottom_line({"real": pd.DataFrame()}) == []
    assert bottom_line({"real": pd.DataFrame(told("gain", "FPR95", PHOTO, ((NEAR, "near"),)))}) == []
    assert Bootstrapped("x", (1.0, 0.5, 2.0)).text() == "x: +1.00 [+0.50, +2.00] points (above 0)"
    alone = Bootstrapped("x", (1.0, math.nan, math.nan))
    assert alone.text() == "x: +1.00 points, without an interval: one group of images (above 0)"
    assert alone.verdict() == UNDECIDED and Bootstrapped("x", None).verdict() == UNKNOWN


def test_every_claim_is_tested():
    assert {c for c, *_ in CASES} | {*REAL} == {*BY_ID} and len(BY_ID) == len(CLAIMS)
