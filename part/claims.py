"""The paper's claims as measured differences; how a verdict is made stands in lab/claims.py.

Claims 1 and 2 are the paper's central one on the embedded default, with bars laid down before the first measurement;
the controls ask what the paper does not: whether the map matters, or any smaller budget would do. Differences are
between arms of the same seed, forked from the same warm-up and evaluated on the same images from the same start noise.
"""

from collections.abc import Callable

from lab.claims import Claim, Difference, interval, paired, values

import numpy as np
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


def beyond(base: str, **where: str) -> Check:
    """PART against a control of it as a trade-off: more PGD accuracy, at most 0.5 points less natural accuracy."""
    return both(at_least("pgd", 0.0, base=base, **where), at_least("natural", -0.5, base=base, **where))


# Scale real: networks of one seed fork from one warm-up; a setting names the smaller budget.
REAL = {"table": "tradeoff", "dataset": "CIFAR-10"}
BUDGETS = ("4", "5", "6", "7")  # of AT at a uniform budget, in 1/255, beside AT at 8/255


def low(budget: str) -> dict:
    return {**REAL, "setting": f"eps_low={budget}/255"}


def curve(f: pd.DataFrame) -> dict[int, np.ndarray]:
    """For each seed AT's own trade-off: the straight line PGD = a natural + b (least squares) through its five networks
    at uniform budgets of 4 to 8/255, (a, b)."""
    points = [[values(f, k, method="AT at eps_low", **low(b)) for k in ("natural", "pgd")] for b in BUDGETS]
    points.append([values(f, k, method="AT", **REAL) for k in ("natural", "pgd")])
    seeds = set.intersection(*(set(v.index) for pair in points for v in pair))
    return {k: np.polyfit([x[k] for x, _ in points], [y[k] for _, y in points], 1) for k in sorted(seeds)}


def above_curve(f: pd.DataFrame, method: str, budget: str) -> pd.Series:
    """PGD accuracy above AT's line at the same natural accuracy, a value a seed."""
    line = curve(f)
    natural, pgd = (values(f, k, method=method, **low(budget)) for k in ("natural", "pgd"))
    seeds = [k for k in natural.index if k in line]
    return pd.Series({k: pgd[k] - np.polyval(line[k], natural[k]) for k in seeds}, dtype=float)


def on_curve(method: str, against: str = "") -> Check:
    """PGD accuracy of `method` above AT's own trade-off at both budgets; or how much higher it lies than `against`."""

    def check(f: pd.DataFrame) -> list[Difference]:
        out = []
        for b in ("4", "7"):
            v = above_curve(f, method, b)
            if against:
                v = paired(v, above_curve(f, against, b))
            name = f"{method} - {against or 'AT at the same natural accuracy'}, eps_low {b}/255"
            out.append(Difference(f"{name}, PGD-20", v, above=0.0, unit="points"))
        return out

    return check


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


def part_and_at(f: pd.DataFrame) -> list[Difference]:
    """PART at the published eps_low against AT, which stands in the run of the other budget."""
    out = []
    for key, bar in (("natural", 0.0), ("pgd", -0.5)):
        v = paired(values(f, key, method="PART", **low("7")), values(f, key, method="AT", **REAL))
        out.append(Difference(f"PART - AT, {WORDS[key]}, eps_low 7/255", v, above=bar, unit="points"))
    return out


CIFAR = {"dataset": "CIFAR-10", "setting": "eps=8/255"}
FIGURE1 = {"table": "figure1", "ours": "AT low upper-left", "base": "AT low lower-right"}
WHY = "a network that keeps eps only where it looks trades accuracy for robustness better"
CLAIMS = [
    Claim(
        *("R1", "PART lies above AT's own trade-off of budgets: more PGD-20 at equal natural accuracy"),
        *("abstract", "real", on_curve("PART")),
    ),
    Claim(
        *("R2", "With the map of another image PART lies lower above that trade-off: the map matters"),
        *("ours", "real", on_curve("PART", "PART shuffled")),
        control=True,
        explanation=WHY,
    ),
    Claim(
        *("R3", "With its mean budget at every pixel it lies lower, too: where the budget lies matters"),
        *("ours", "real", on_curve("PART", "AT mean budget")),
        control=True,
        explanation=WHY,
    ),
    Claim(
        *("R4", "With the map turned round it lies lower, too", "ours", "real", on_curve("PART", "PART inverted")),
        control=True,
        explanation=WHY,
    ),
    Claim(
        *("R5", "At the published budgets natural accuracy rises and PGD-20 falls by at most 0.5 points", "main table"),
        *("real", part_and_at),
    ),
    Claim("1", "Natural accuracy: PART >= AT + 1 point", "abstract", "demo", at_least("natural", 1.0)),
    Claim("2", "PGD-20 accuracy at uniform eps: PART >= AT - 2 points", "abstract", "demo", at_least("pgd", -2.0)),
    Claim("3", "PART's masks lie on the object, more than those of other images", "Figure 2", "demo", on_objects),
    Claim(
        *("4", "PART keeps more PGD-20 than PART shuffled, natural within 0.5: the map matters", "ours", "demo"),
        beyond("PART shuffled"),
        control=True,
        explanation=WHY,
    ),
    Claim(
        *("5", "PART keeps more PGD-20 than AT mean budget, natural within 0.5: where matters", "ours", "demo"),
        beyond("AT mean budget"),
        control=True,
        explanation=WHY,
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
        *("F", "On CIFAR-10 PART keeps more PGD-20 than its two controls, natural within 0.5", "ours", "paper"),
        both(*(beyond(b, table="controls") for b in ("PART shuffled", "AT mean budget"))),
        control=True,
    ),
]


def bottom_line(frames: dict[str, pd.DataFrame]) -> list[str]:
    """What the smaller budget brings, beside what its place brings."""
    out, real = [], frames.get("real", pd.DataFrame())
    for b in ("4", "7") if len(real) else ():
        found = []
        for method in ("PART", "PART shuffled", "AT mean budget"):
            mean, half = interval(above_curve(real, method, b))
            found += [f"{method} {mean:+.2f} ± {half:.2f}"] if half == half else []
        if found:
            out.append(
                f"CIFAR-10, eps_low {b}/255, PGD-20 accuracy above that of AT with a smaller budget everywhere, at "
                f"equal natural accuracy: {', '.join(found)} points."
            )
    f = frames.get("demo", pd.DataFrame())
    found = []
    for base in ("AT", "PART shuffled", "AT mean budget") if len(f) else ():
        (d,) = at_least("natural", 0.0, base=base)(f)
        mean, half = interval(d.values)
        found += [f"{mean:+.2f} ± {half:.2f} points against {base}"] if len(d.values) > 1 else []
    return [*out, f"Natural accuracy of PART on generated glyphs: {', '.join(found)}."] if found else out
