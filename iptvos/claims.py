"""The paper's claims as inequalities over measured metrics; its own numbers are not known.

Those of scale demo were looked at once on seeds 100 to 102, not shown. "Above" means outside the 95 % interval of the
mean paired difference (Student's t, std with ddof 1; n seeds for demo, sequences for paper), which ± gives.
"""

from lab.claims import Claim

import pandas as pd
from scipy import stats

Verdict = tuple[bool | None, str]


def values(f: pd.DataFrame, table: str, method: str, metric: str, unit: str, dataset: str = "") -> pd.Series:
    """Means over the other axis, one a `unit` (seed or dataset)."""
    rows = f[(f["table"] == table) & (f["method"] == method) & (f["metric"] == metric)]
    if dataset:
        rows = rows[rows["dataset"] == dataset]
    return rows.groupby(unit)["value"].mean()


def above(f, table: str, unit: str, a: tuple[str, str], b: tuple[str, str], strict: bool = True) -> Verdict:
    """Mean of (method, metric) a above the mean of b, paired by unit: strictly, outside the 95 % interval of the mean
    difference; else simply not below."""
    x, y = values(f, table, *a, unit), values(f, table, *b, unit)
    d = (x - y).dropna()
    if not len(d) or len(d) != len(x) or len(d) != len(y):
        return None, ""
    half = float(stats.t.ppf(0.975, len(d) - 1)) * d.std(ddof=1) / len(d) ** 0.5  # NaN, so not above, for n = 1
    text = f"{x.mean():.3f} against {y.mean():.3f}, difference {d.mean():+.3f} ± {half:.3f} (n={len(d)})"
    return bool(d.mean() - half > 0 if strict else d.mean() >= 0), text


def every(*verdicts: Verdict) -> Verdict:
    if any(v is None for v, _ in verdicts):
        return None, ""
    return all(v for v, _ in verdicts), "; ".join(t for _, t in verdicts)


def occluded(f) -> Verdict:
    points, full = (values(f, "drawn", m, "j_after_1", "seed", "occluder") for m in ("points", "full"))
    if not len(points) or not len(full):
        return None, ""
    text = f"points {points.mean():.3f} ± {points.std(ddof=0):.3f}, full {full.mean():.3f} ± {full.std(ddof=0):.3f}"
    return bool(points.mean() < 0.5 < full.mean()), text


def ladder(table: str, unit: str):
    def first(f):
        return above(f, table, unit, ("full", "jf_1"), ("points", "jf_1"))

    def rounds(f):
        more = above(f, table, unit, ("full", "jf_3"), ("full", "jf_1"))
        return every(more, above(f, table, unit, ("full", "auc"), ("points", "auc")))

    def memory(f):
        return every(*(above(f, table, unit, ("full", k), ("newest", k), False) for k in ("jf_2", "jf_3")))

    def module(f):
        return above(f, table, unit, ("full", "jf_3"), ("points+box", "jf_3"))

    return first, rounds, memory, module


DEMO, REAL = ladder("drawn", "seed"), ladder("davis2016", "dataset")
CLAIMS = [
    Claim("1", "Round 1: full > points only, J&F", "joint tracking, abstract", "demo", DEMO[0]),
    Claim("2", "Full after round 3 > after round 1; AUC full > points", "interaction, abstract", "demo", DEMO[1]),
    Claim("3", "Memory over all rounds >= newest only, rounds 2, 3", "CRSTM, abstract", "demo", DEMO[2]),
    Claim("4", "Behind the occluder: points J < 0.5, full > 0.5", "robustness, abstract", "demo", occluded),
    Claim("5", "Round 3: with CRSTM > points + box", "CRSTM, abstract", "demo", DEMO[3]),
    Claim("A", "Real, round 1: full > points only, J&F", "joint tracking, abstract", "paper", REAL[0]),
    Claim("B", "Real: full after round 3 > round 1; AUC full > points", "interaction, abstract", "paper", REAL[1]),
    Claim("C", "Real: memory over all rounds >= newest only", "CRSTM, abstract", "paper", REAL[2]),
    Claim("D", "Real, round 3: with CRSTM > points + box", "CRSTM, abstract", "paper", REAL[3]),
]
