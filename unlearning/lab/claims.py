"""Claims and their verdicts. The same in every folder; the paper's own claims stand in claims.py beside it.

A claim is a difference with a threshold: `value(unit) > threshold`, paired by seed (by task, image, split where one
network is judged; runs of different networks are never joined into one interval). The verdict is that of the 95 %
interval of the mean, Student's t over the units:

    holds            the whole interval lies beyond the threshold
    does not hold    the whole interval lies on its other side
    undecided        it straddles the threshold, or there is one unit alone
    not measured     no value
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import pandas as pd
from scipy import stats

HOLDS, FAILS, UNDECIDED, UNKNOWN = "holds", "does not hold", "undecided", "not measured"
MOST = 1000  # more units than this to decide are not counted


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of its 95 % interval by Student's t); the half is NaN for one value, both for none."""
    v = pd.Series(values, dtype=float)
    if len(v) < 2:
        return (float(v.mean()) if len(v) else math.nan), math.nan
    return float(v.mean()), float(stats.t.ppf(0.975, len(v) - 1) * v.std(ddof=1) / len(v) ** 0.5)


@dataclasses.dataclass(frozen=True)
class Difference:
    """One value a unit, whose mean is asked to lie above and/or below a threshold."""

    name: str
    """What the value is, in words: `PART - AT, natural`."""
    values: pd.Series
    """Indexed by the unit; without NaN."""
    above: float | None = 0.0
    below: float | None = None
    unit: str = ""
    """`points`, `%`: printed behind the number."""
    digits: int = 2
    units: str = "seeds"
    """What the values are over: seeds, tasks, images, splits."""

    def verdict(self) -> str:
        mean, half = interval(self.values)
        if not len(self.values):
            return UNKNOWN
        if half != half:
            return UNDECIDED
        low, high = mean - half, mean + half
        sides = [(low, high, self.above)] if self.above is not None else []
        sides += [(-high, -low, -self.below)] if self.below is not None else []
        if any(h <= t for _, h, t in sides):
            return FAILS
        return HOLDS if all(low > t for low, _, t in sides) else UNDECIDED

    def needed(self) -> int | None:
        """About how many units would decide, if mean and spread stay as they are; None if more than MOST."""
        v = pd.Series(self.values, dtype=float)
        gaps = [abs(v.mean() - t) for t in (self.above, self.below) if t is not None]
        for n in range(len(v) + 1, MOST + 1) if len(v) > 1 else ():
            if stats.t.ppf(0.975, n - 1) * v.std(ddof=1) / n**0.5 < min(gaps):
                return n
        return None

    def text(self) -> str:
        """`PART - AT, natural: +2.00 ± 1.15 points (3 seeds; above 1)`."""
        if not len(self.values):
            return f"{self.name}: not measured"
        mean, half = interval(self.values)
        spread = f" ± {half:.{self.digits}f}" if half == half else ""
        unit = f" {self.unit}" if self.unit else ""
        sign = "+" if 0 in (self.above, self.below) or " - " in self.name else ""  # of a difference, not of a level
        bars = [f"above {self.above:g}"] if self.above is not None else []
        bars += [f"below {self.below:g}"] if self.below is not None else []
        n = len(self.values)
        units = self.units.removesuffix("s") if n == 1 else self.units
        more = ""
        if self.verdict() == UNDECIDED:
            needed = self.needed()
            more = "; one decides nothing" if n == 1 else f"; about {needed} would decide" if needed else ""
            more = more or f"; more than {MOST} would be needed"
        return f"{self.name}: {mean:{sign}.{self.digits}f}{spread}{unit} ({n} {units}; {' and '.join(bars)}{more})"


@dataclasses.dataclass(frozen=True)
class Either:
    """Holds if one of its differences holds; does not hold if none does."""

    parts: tuple[Difference, ...]

    def verdict(self) -> str:
        found = [p.verdict() for p in self.parts]
        for word in (HOLDS, UNKNOWN, UNDECIDED):
            if word in found:
                return word
        return FAILS

    def text(self) -> str:
        return "; or ".join(p.text() for p in self.parts)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of the paper, or a control that the paper does not make, as differences with thresholds.

    `check(frame)` gets the long frame of one scale's records and returns the differences, one or a list; all of them
    have to hold. An empty list means that nothing was measured.
    """

    id: str
    text: str
    source: str
    scale: str
    check: Callable[[pd.DataFrame], Difference | Either | list[Difference | Either]]
    control: bool = False
    """Not in the paper: what could break its explanation."""
    timed: bool = False
    """Of times or memory: another machine may judge otherwise, so a rerun's verdict is not compared."""
    explanation: str = ""
    """Of a control: the paper's explanation that it could break, in a few words. The report's front page sets both
    side by side."""

    def judge(self, frame: pd.DataFrame) -> tuple[str, str]:
        """(verdict, the numbers as text)."""
        found = self.check(frame) if len(frame) else []
        parts = found if isinstance(found, list) else [found]
        verdicts = [p.verdict() for p in parts]
        text = "; ".join(p.text() for p in parts) if set(verdicts) - {UNKNOWN} else ""
        for word in (FAILS, UNKNOWN, UNDECIDED):
            if word in verdicts:
                return word, text
        return (HOLDS if parts else UNKNOWN), text


# ----------------------------------------------------------------------------------------- values out of a long frame


def values(frame: pd.DataFrame, metric: str, by: str = "seed", **where: str | list[str]) -> pd.Series:
    """One value a `by` (seed, dataset), sorted; the mean where a `by` has more than one row. `where` selects rows by
    their columns: `values(f, "accuracy", method="GPL", dataset="Cora")`."""
    rows = frame[frame["metric"] == metric]
    for key, value in where.items():
        rows = rows[rows[key].isin(value if isinstance(value, list) else [value])]
    return rows.groupby(by)["value"].mean().sort_index()


def paired(a: pd.Series, b: pd.Series) -> pd.Series:
    """a - b over the units that both have."""
    return (a - b).dropna()


def judged(claims: list[Claim], frames: dict[str, pd.DataFrame]) -> list[dict]:
    """Every claim with its numbers and verdict, as data."""
    out = []
    for claim in claims:
        verdict, numbers = claim.judge(frames[claim.scale]) if claim.scale in frames else (UNKNOWN, "")
        said = {"id": claim.id, "text": claim.text, "source": claim.source, "scale": claim.scale}
        said |= {"control": claim.control, "timed": claim.timed, "explanation": claim.explanation}
        out.append({**said, "numbers": numbers, "verdict": verdict})
    return out


def counted(said: list[dict], scale: str) -> str:
    """`4 of 6 claims hold, 1 undecided; 2 of 3 controls, 1 undecided` of a scale: what the paper says apart from what
    it does not."""
    parts = []
    for control, name in ((False, "claims"), (True, "controls")):
        mine = [c["verdict"] for c in said if c["scale"] == scale and c["control"] == control]
        rest = [f"{mine.count(word)} {word}" for word in (UNDECIDED, UNKNOWN) if word in mine]
        if mine:
            verb = "" if parts else " hold"
            parts.append(", ".join([f"{mine.count(HOLDS)} of {len(mine)} {name}{verb}", *rest]))
    return "; ".join(parts) or "no claim"
