"""What a reproduction gives beside the committed records. The same in every folder.

    python -m lab.compare --scale demo

Every number of every record of runs/<scale> is put beside that of the committed record of the same run and seed: equal
(to EQUAL, relative), or not. Training is chaotic, and another CPU takes other kernels: then it is the means whose 95 %
intervals have to overlap, and the verdicts that have to be the same. Times and memory are left out. The exit code is 1
only if a verdict of `holds` and `does not hold` have changed places.
"""

import dataclasses
import math
import re
import sys

from lab import plan as plans
from lab.claims import FAILS, HOLDS, counted, interval, judged
from lab.cli import HERE, SCALES, UserError, command, parse
from lab.files import write_json
from lab.records import KEYS, committed, local, long

import claims

EQUAL = 1e-6
TIMED = re.compile(r"seconds|_ms\b|memory|per_second|speed|step_ratio|hours")
SHOWN = 5  # largest differences that are printed


@dataclasses.dataclass
class CompareSettings:
    """Numbers, means and verdicts of the runs here beside the committed ones."""

    scale: str = "demo"
    """demo, real or paper."""


def numbers(found: list[dict], timed: tuple[str, ...] = ()) -> dict[tuple, float]:
    """{(run, table, dataset, setting, method, metric, seed): value}, without times and memory; `timed` names more
    metrics that a clock decides."""
    out = {}
    for r in found:
        for metric, value in r["metrics"].items():
            if isinstance(value, int | float) and metric not in timed and not TIMED.search(metric):
                out[(r["run"], *(r[k] for k in KEYS), metric, r["seed"])] = float(value)
    return out


def same(a: float, b: float) -> bool:
    return a == b or math.isclose(a, b, rel_tol=EQUAL, abs_tol=1e-12)


def overlap(a: list[float], b: list[float]) -> bool:
    """Whether the 95 % intervals of two means overlap; for one value, which has none, whether it is the same."""
    (m, h), (n, k) = interval(a), interval(b)
    return same(m, n) or abs(m - n) <= h + k  # NaN, so False, without an interval


@dataclasses.dataclass
class Comparison:
    numbers: int
    equal: int
    means: int
    within: int
    verdicts: int
    kept: int
    flipped: list[str]
    """Claims whose `holds` and `does not hold` have changed places."""
    changed: list[str]
    """All claims whose verdict is another, with both."""
    largest: list[str]


def compare(
    ours: list[dict], theirs: list[dict], said: list[dict], before: list[dict], timed: tuple[str, ...] = ()
) -> Comparison:
    """Records here and committed ones, and what the claims say of each."""
    a, b = numbers(ours, timed), numbers(theirs, timed)
    both = sorted(a.keys() & b.keys(), key=str)
    groups: dict[tuple, list[tuple]] = {}
    for key in both:
        groups.setdefault(key[1:-1], []).append(key)  # a cell: its seeds may lie in several runs
    within = sum(overlap([a[k] for k in g], [b[k] for k in g]) for g in groups.values())
    apart = [k for k in both if not same(a[k], b[k])]
    apart.sort(key=lambda k: -abs(a[k] - b[k]) / max(abs(a[k]), abs(b[k])))
    largest = [f"{k[0]}, seed {k[-1]}, {' / '.join(k[1:-1])}: {a[k]:.6g}, committed {b[k]:.6g}" for k in apart[:SHOWN]]
    old = {c["id"]: c["verdict"] for c in before}
    pairs = [(c["id"], old[c["id"]], c["verdict"]) for c in said if not c["timed"] and c["id"] in old]
    changed = [f"{name}: {now}, committed {then}" for name, then, now in pairs if now != then]
    flipped = [name for name, then, now in pairs if {then, now} == {HOLDS, FAILS}]
    counts = len(both), len(both) - len(apart), len(groups), within, len(pairs), len(pairs) - len(changed)
    return Comparison(*counts, flipped, changed, largest)


def line(c: Comparison) -> str:
    return (
        f"verdicts {c.kept} of {c.verdicts} as committed; {c.equal:,} of {c.numbers:,} numbers equal, "
        f"{c.within:,} of {c.means:,} means within their intervals"
    )


def main() -> None:
    settings = parse(CompareSettings, CompareSettings.__doc__)
    root = HERE
    if settings.scale not in SCALES:
        raise UserError(f"no scale {settings.scale}; use one of {', '.join(SCALES)}")
    scale = plans.meant(plans.load_plan(root / "plan.yaml"), settings.scale)
    ours = local(root, scale, plans.names(root / "plan.yaml", scale))
    theirs = committed(root, scale)
    here = {r["run"] for r in ours}
    theirs = [r for r in theirs if r["run"] in here]  # verdicts, too, over what both have
    mine = [c for c in claims.CLAIMS if c.scale == scale]
    said, before = judged(mine, {scale: long(ours)}), judged(mine, {scale: long(theirs)})
    told = f"{root.name}: {counted(said, scale)}; "
    if not theirs:
        told += f"no committed record of scale {scale} is of a run that is here"
        flipped: list[str] = []
    else:
        timed = tuple(plans.load_plan(root / "plan.yaml").get("timed", ()))  # metrics that a clock decides
        c = compare(ours, theirs, said, before, timed)
        told, flipped = told + line(c), c.flipped
        for text in c.changed:
            print(f"{root.name}: verdict of {text}")
        for text in c.largest:
            print(f"{root.name}: differs: {text}")
    for name in {scale, settings.scale}:  # where the name that was asked for is looked for, too
        write_json(root / "runs" / name / "comparison.json", {"line": told, "flipped": flipped})
    print(told)
    if flipped:
        print(f"error: verdicts that changed places: claim {', '.join(flipped)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    command(main)
