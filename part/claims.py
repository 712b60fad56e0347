"""The paper's claims as measured differences; how a verdict is made stands in lab/claims.py.

Claims 1 and 2 are the paper's central one on the embedded default, with bars laid down before the first measurement;
the controls ask what the paper does not: whether the map matters, or any smaller budget would do. Differences are
between arms of the same seed, forked from the same warm-up and evaluated on the same images from the same start noise.
"""

from collections.abc import Callable

from lab.claims import Claim, Difference, interval, paired, values

import pandas as pd

Check = Callable[[pd.DataFrame], list[Difference]]
WORDS = {"natural": "natural", "pgd": "PGD-20", "autoattack": "AutoAttack"}


def at_least(metric: str, bar: float, ours: str = "PART", base: str = "AT", **where: str) -> Check:
    """ours - base on the seeds that have both."""

    def check(f: pd.DataFrame) -> list[Difference]:
        a, b = (values(f, metric, method=m, **{"table": "main", **where}) for m in (ours, base))
        return [Difference(f"{ours} - {base}, {WORDS[metric]}", paired(a, b), above=bar, unit="points")]

    return check


def both(*checks: Check) -> Check:
    return lambda f: [d for check in checks for d in check(f)]


def on_objects(f: pd.DataFrame) -> Difference:
    """Share of the mask's pixels in the object's box, minus the same of another image's mask."""
    keys = ("mask_inside", "mask_inside_shuffled")
    own, other = (values(f, k, table="main", method="PART") for k in keys)
    return Difference("share of the mask in the box - that of another image's", paired(own, other), unit="points")


def cost(f: pd.DataFrame) -> Difference:
    part, at = (values(f, "train_cpu_seconds_epoch", table="main", method=m) for m in ("PART", "AT"))
    return Difference("CPU time of an epoch, PART / AT", (part / at).dropna(), above=None, below=1.15, digits=3)


PAPER_SETS = ("CIFAR-10", "SVHN", "Tiny-ImageNet")
PAIRS = (("AT", "PART"), ("TRADES", "PART-T"), ("MART", "PART-M"))


def everywhere(metric: str, bar: float, s: int) -> Check:
    """ours - base on each of three data sets and three methods, all nine of which have to be measured."""

    def check(f: pd.DataFrame) -> list[Difference]:
        out = []
        for d in PAPER_SETS:
            where = {"table": "main", "dataset": d, "setting": "eps=8/255"}
            for base, ours in PAIRS:
                a, b = (values(f, metric, method=m, **where) for m in (f"{ours} (s={s})", base))
                out.append(Difference(f"{d}, {ours} - {base}", paired(a, b), above=bar, unit="points"))
        return out

    return check


CIFAR = {"dataset": "CIFAR-10", "setting": "eps=8/255"}
FIGURE1 = {"table": "figure1", "ours": "AT low upper-left", "base": "AT low lower-right"}
CLAIMS = [
    Claim("1", "Natural accuracy: PART >= AT + 1 point", "abstract", "demo", at_least("natural", 1.0)),
    Claim("2", "PGD-20 accuracy at uniform eps: PART >= AT - 2 points", "abstract", "demo", at_least("pgd", -2.0)),
    Claim("3", "PART's masks lie on the object, more than those of other images", "Figure 2", "demo", on_objects),
    Claim(
        *("4", "PART >= PART shuffled + 0.5 points natural, - 0.5 PGD-20: the map matters", "ours", "demo"),
        both(at_least("natural", 0.5, base="PART shuffled"), at_least("pgd", -0.5, base="PART shuffled")),
        control=True,
    ),
    Claim(
        *("5", "PART >= AT mean budget + 0.5 points natural, - 0.5 PGD-20: where matters", "ours", "demo"),
        both(at_least("natural", 0.5, base="AT mean budget"), at_least("pgd", -0.5, base="AT mean budget")),
        control=True,
    ),
    Claim(
        *("6", "An epoch of PART takes at most 1.15 x the CPU time of AT's", "ours", "demo", cost),
        control=True,
        timed=True,
    ),
    Claim(
        *("A", "Natural accuracy rises, s = 1: three data sets, three methods", "main table", "paper"),
        everywhere("natural", 0, 1),
    ),
    Claim("B", "PGD-20 falls by at most 0.5 points, s = 1", "main table", "paper", everywhere("pgd", -0.5, 1)),
    Claim(
        *("C", "AutoAttack falls by at most 0.5 points, s = 1", "main table", "paper"),
        everywhere("autoattack", -0.5, 1),
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
        *("F", "On CIFAR-10 PART >= PART shuffled and >= AT at the mean budget, natural", "ours", "paper"),
        both(*(at_least("natural", 0.0, base=b, table="controls") for b in ("PART shuffled", "AT mean budget"))),
        control=True,
    ),
]


def bottom_line(frames: dict[str, pd.DataFrame]) -> list[str]:
    """What the smaller budget brings, beside what its place brings."""
    f = frames.get("demo", pd.DataFrame())
    found = []
    for base in ("AT", "PART shuffled", "AT mean budget") if len(f) else ():
        (d,) = at_least("natural", 0.0, base=base)(f)
        mean, half = interval(d.values)
        found += [f"{mean:+.2f} ± {half:.2f} points against {base}"] if len(d.values) > 1 else []
    return [f"Natural accuracy of PART on the embedded default: {', '.join(found)}."] if found else []
