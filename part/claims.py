"""The paper's claims as inequalities over measured metrics.

Claims 1 and 2 are the paper's central one on the embedded default, with bars laid down before the first measurement; 3
to 5 ask what the paper does not: whether the map matters, or any smaller budget would do. Differences are between arms
of the same seed, forked from the same warm-up and evaluated on the same images from the same start noise.
"""

from collections.abc import Callable

from lab.claims import Claim

import pandas as pd

Verdict = tuple[bool | None, str]


def values(f: pd.DataFrame, metric: str, method: str, **where: str) -> pd.Series:
    """A value a seed, indexed by the seed."""
    rows = f[(f["metric"] == metric) & (f["method"] == method)]
    for key, value in {"table": "main", **where}.items():
        rows = rows[rows[key] == value]
    return rows.set_index("seed")["value"]


def gaps(f: pd.DataFrame, metric: str, ours: str, base: str, **where: str) -> pd.Series:
    """ours - base on the seeds that have both."""
    return (values(f, metric, ours, **where) - values(f, metric, base, **where)).dropna()


def listed(v: pd.Series) -> str:
    return f"{v.mean():+.2f} points ({', '.join(f'{x:+.1f}' for x in v)})"


def at_least(
    metric: str, bar: float, ours: str = "PART", base: str = "AT", **where: str
) -> Callable[[pd.DataFrame], Verdict]:
    """The mean of ours - base over seeds is at least `bar`."""

    def check(f: pd.DataFrame) -> Verdict:
        v = gaps(f, metric, ours, base, **where)
        return (bool(v.mean() >= bar), listed(v)) if len(v) else (None, "")

    return check


def both(*checks: Callable[[pd.DataFrame], Verdict]) -> Callable[[pd.DataFrame], Verdict]:
    """All hold; one that fails decides, one that was not measured leaves it open."""

    def check(f: pd.DataFrame) -> Verdict:
        found = [c(f) for c in checks]
        text = "; ".join(t for _, t in found if t)
        verdicts = [v for v, _ in found]
        return (False if False in verdicts else None if None in verdicts else True), text

    return check


def on_objects(f: pd.DataFrame, method: str = "PART") -> Verdict:
    """The mask lies on the object's box more often than the mask of another image, on every seed."""
    own, other = values(f, "mask_inside", method), values(f, "mask_inside_shuffled", method)
    v = (own - other).dropna()
    if not len(v):
        return None, ""
    return bool(
        (v > 0).all()
    ), f"{own.mean():.1f} % of its pixels inside, with another image's mask {other.mean():.1f} %"


def cost(f: pd.DataFrame, key: str, most: float = 1.15, **where: str) -> Verdict:
    a, b = (values(f, key, m, **where) for m in ("PART", "AT"))
    ratio = (a / b).dropna()
    if not len(ratio):
        return None, ""
    return bool(ratio.mean() <= most), f"{a.mean():.2f} s against {b.mean():.2f} s an epoch, ratio {ratio.mean():.3f}"


PAPER_SETS = ("CIFAR-10", "SVHN", "Tiny-ImageNet")
PAIRS = (("AT", "PART"), ("TRADES", "PART-T"), ("MART", "PART-M"))


def everywhere(metric: str, bar: float, s: int) -> Callable[[pd.DataFrame], Verdict]:
    """ours - base >= bar on each of three data sets and three methods; open until all nine are measured."""

    def check(f: pd.DataFrame) -> Verdict:
        found = [
            (d, o, gaps(f, metric, f"{o} (s={s})", b, dataset=d, setting="eps=8/255"))
            for d in PAPER_SETS
            for b, o in PAIRS
        ]
        there = [(d, o, v.mean()) for d, o, v in found if len(v)]
        text = "; ".join(f"{d}, {o}: {m:+.2f}" for d, o, m in there)
        bad = any(m < bar for _, _, m in there)
        return (False if bad else True if len(there) == len(found) else None), text

    return check


CIFAR = {"dataset": "CIFAR-10", "setting": "eps=8/255"}
FIGURE1 = {"table": "figure1", "ours": "AT low upper-left", "base": "AT low lower-right"}
CLAIMS = [
    Claim("1", "Natural accuracy: PART >= AT + 1 point", "abstract", "demo", at_least("natural", 1.0)),
    Claim("2", "PGD-20 accuracy at uniform eps: PART >= AT - 2 points", "abstract", "demo", at_least("pgd", -2.0)),
    Claim("3", "PART's masks lie on the object, more than those of other images", "Figure 2", "demo", on_objects),
    Claim(
        *("4", "Control: PART >= PART shuffled + 0.5 points natural, - 0.5 PGD-20: the map matters", "ours", "demo"),
        both(at_least("natural", 0.5, base="PART shuffled"), at_least("pgd", -0.5, base="PART shuffled")),
    ),
    Claim(
        *("5", "Control: PART >= AT mean budget + 0.5 points natural, - 0.5 PGD-20: where matters", "ours", "demo"),
        both(at_least("natural", 0.5, base="AT mean budget"), at_least("pgd", -0.5, base="AT mean budget")),
    ),
    Claim(
        *("6", "An epoch of PART takes at most 1.15 x the CPU time of AT's", "ours", "demo"),
        lambda f: cost(f, "train_cpu_seconds_epoch"),
    ),
    Claim(
        "A",
        "Natural accuracy rises, s = 1: three data sets, three methods",
        "main table",
        "paper",
        everywhere("natural", 0, 1),
    ),
    Claim("B", "PGD-20 falls by at most 0.5 points, s = 1", "main table", "paper", everywhere("pgd", -0.5, 1)),
    Claim(
        "C", "AutoAttack falls by at most 0.5 points, s = 1", "main table", "paper", everywhere("autoattack", -0.5, 1)
    ),
    Claim(
        *("D", "s = 10 gains more natural accuracy than s = 1 (CIFAR-10, PART)", "main table", "paper"),
        at_least("natural", 0.0, ours="PART (s=10)", base="PART (s=1)", **CIFAR),
    ),
    Claim(
        *("E", "A low budget upper left beats one lower right, natural and PGD-20", "Figure 1", "paper"),
        both(*(at_least(k, 0.0, **FIGURE1) for k in ("natural", "pgd"))),
    ),
    Claim(
        *("F", "Control on CIFAR-10: PART >= PART shuffled and >= AT at the mean budget, natural", "ours", "paper"),
        both(
            *(
                at_least("natural", 0.0, ours="PART", base=b, table="controls")
                for b in ("PART shuffled", "AT mean budget")
            )
        ),
    ),
]
