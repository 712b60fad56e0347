"""The paper's claims as measured differences; its own numbers are not known. How a verdict is made: lab/claims.py.

A value is the mean of a seed over the procedural videos (scale demo, looked at once on seeds 100 to 102, not shown), or
of a sequence (scale paper, one seed): methods are paired over them. The area under the curve counts seconds, so the
claims on it are timed.
"""

from collections.abc import Callable

from lab.claims import Claim, Difference, interval, paired, values

import pandas as pd


def gain(table: str, units: str, a: tuple[str, str], b: tuple[str, str]) -> Callable[[pd.DataFrame], Difference]:
    """(method, metric) a minus b, seed by seed or sequence by sequence."""

    def check(f: pd.DataFrame) -> Difference:
        by = "seed" if units == "seeds" else "dataset"
        x, y = (values(f, metric, by, table=table, method=method) for method, metric in (a, b))
        name = " - ".join(f"{method} {SAID[metric]}" for method, metric in (a, b))
        return Difference(name, paired(x, y), digits=3, units=units)

    return check


def both(*checks: Callable[[pd.DataFrame], Difference]) -> Callable[[pd.DataFrame], list[Difference]]:
    return lambda f: [check(f) for check in checks]


def occluded(f: pd.DataFrame) -> list[Difference]:
    """J behind the occluder: a loss for points alone, found again by the whole method."""
    points, full = (
        values(f, "j_after_1", table="drawn", dataset="occluder", method=method) for method in ("points", "full")
    )
    return [
        Difference("points, J behind it", points, above=None, below=0.5, digits=3),
        Difference("full, J behind it", full, above=0.5, digits=3),
    ]


SAID = {"jf_1": "J&F 1", "jf_2": "J&F 2", "jf_3": "J&F 3", "auc": "AUC"}


def ladder(table: str, units: str) -> tuple[Callable, ...]:
    def of(a: tuple[str, str], b: tuple[str, str]) -> Callable:
        return gain(table, units, a, b)

    return (
        of(("full", "jf_1"), ("points", "jf_1")),
        both(of(("full", "jf_3"), ("full", "jf_1")), of(("full", "auc"), ("points", "auc"))),
        both(*(of(("full", k), ("newest", k)) for k in ("jf_2", "jf_3"))),
        of(("full", "jf_3"), ("points+box", "jf_3")),
    )


DEMO, REAL = ladder("drawn", "seeds"), ladder("davis2016", "sequences")
CLAIMS = [
    Claim("1", "Round 1: full > points only, J&F", "joint tracking, abstract", "demo", DEMO[0]),
    Claim(
        *("2", "Full after round 3 > after round 1; AUC full > points", "interaction, abstract", "demo", DEMO[1]),
        timed=True,
    ),
    Claim("3", "Memory over all rounds >= newest only, rounds 2, 3", "CRSTM, abstract", "demo", DEMO[2]),
    Claim("4", "Behind the occluder: points J < 0.5, full > 0.5", "robustness, abstract", "demo", occluded),
    Claim("5", "Round 3: with CRSTM > points + box", "CRSTM, abstract", "demo", DEMO[3]),
    Claim("A", "Real, round 1: full > points only, J&F", "joint tracking, abstract", "paper", REAL[0]),
    Claim(
        *("B", "Real: full after round 3 > round 1; AUC full > points", "interaction, abstract", "paper", REAL[1]),
        timed=True,
    ),
    Claim("C", "Real: memory over all rounds >= newest only", "CRSTM, abstract", "paper", REAL[2]),
    Claim("D", "Real, round 3: with CRSTM > points + box", "CRSTM, abstract", "paper", REAL[3]),
]


def bottom_line(frames: dict[str, pd.DataFrame]) -> list[str]:
    """The whole method beside its strongest part, the box alone: what no claim of the paper asks."""
    found = []
    for scale, check, where in (
        ("demo", gain("drawn", "seeds", ("full", "jf_3"), ("box", "jf_3")), "procedural videos"),
        ("paper", gain("davis2016", "sequences", ("full", "jf_3"), ("box", "jf_3")), "sequences of DAVIS 2016"),
    ):
        v = check(frames[scale]).values if len(frames.get(scale, [])) else []
        if len(v) > 1:
            mean, half = interval(v)
            found.append(f"{mean:+.3f} ± {half:.3f} on the {where}")
    return [f"After round 3 the whole method's J&F minus that of the box alone is {', '.join(found)}."] if found else []
