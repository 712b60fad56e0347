"""The paper's claims as measured differences; how a verdict is made stands in lab/claims.py.

The photo patches (scale demo) were calibrated once on five seeds that are not shown and then fixed. At scale paper the
claims are the paper's statements; where it prints a number, RESULTS.md has it beside ours.
"""

from lab.claims import Claim, Difference, paired, values

import pandas as pd

RADII = (8, 12, 16, 32)
SMALL = 2  # points of PGD accuracy that a part of the method has to be worth
NONE = 0.01  # a share below this is none: of three or ten runs a single one is more


def of(f: pd.DataFrame, metric: str, method: str, at: int | None = None, table: str = "main", removed: str = ""):
    """A value a seed, on the photo patches (40/255) or `at` a radius on CIFAR-10; without some weights if `removed`."""
    data, radius = ("CIFAR-10", at) if at else ("Photo patches", 40)
    place = {"table": "removal" if removed else table, "dataset": data}
    return values(f, metric, method=method, setting=f"eps={radius}/255" + (f", {removed}" if removed else ""), **place)


def collapses(f: pd.DataFrame, base: str, at: int | None = None) -> list[Difference]:
    pgd, fgsm, clean = (of(f, m, base, at) for m in ("pgd", "fgsm", "clean"))
    return [
        Difference(f"{base}, PGD accuracy", pgd, above=None, below=5, unit="%"),
        Difference(f"{base}, FGSM minus clean accuracy", paired(fgsm, clean), unit="points"),
    ]


def rescued(f: pd.DataFrame, ours: str, base: str, at: int | None = None) -> Difference:
    gain = paired(of(f, "pgd", ours, at), of(f, "pgd", base, at))
    return Difference(f"{ours} - {base}, PGD accuracy", gain, above=10, unit="points")


def real_collapse(f: pd.DataFrame, base: str, at: int) -> list[Difference]:
    """No robustness is left while the attack it was trained with finds nothing."""
    pgd, fgsm = (of(f, m, base, at) for m in ("pgd", "fgsm"))
    return [
        Difference(f"{base} at {at}/255, PGD accuracy", pgd, above=None, below=5, unit="%"),
        Difference(f"{base} at {at}/255, FGSM minus PGD accuracy", paired(fgsm, pgd), above=10, unit="points"),
    ]


def real_rescue(f: pd.DataFrame, ours: str, base: str, at: int) -> list[Difference]:
    """On the seeds whose baseline overfits. A network that answers one class always has 10 % PGD accuracy: ours has to
    have learnt something too."""
    gain, clean = paired(of(f, "pgd", ours, at), of(f, "pgd", base, at)), of(f, "clean", ours, at)
    overfitted = of(f, "collapsed", base, at)
    gain = gain[gain.index.isin(overfitted.index[overfitted > 0.5])]
    return [
        Difference(f"{ours} - {base} with CO at {at}/255, PGD accuracy", gain, above=10, unit="points"),
        Difference(f"{ours} at {at}/255, clean accuracy", clean, above=25, unit="%"),
    ]


def part_costs(f: pd.DataFrame, ours: str, without: str, at: int) -> Difference:
    gain = paired(of(f, "pgd", ours, at), of(f, "pgd", without, at))
    return Difference(f"{ours} - {without}, PGD accuracy at {at}/255", gain, above=SMALL, unit="points")


def no_cost(f: pd.DataFrame, start: str, at: int) -> list[Difference]:
    """Where the baseline does not collapse LAP takes at most a point."""
    names = {"clean": "clean accuracy", "pgd": "PGD accuracy"}
    ours, base = f"{start}-LAP", f"{start}-FGSM"
    gaps = {k: paired(of(f, k, ours, at), of(f, k, base, at)) for k in names}
    return [Difference(f"{ours} - {base} at {at}/255, {names[k]}", v, above=-1, unit="points") for k, v in gaps.items()]


def after_co(f: pd.DataFrame, metric: str, base: str, at: int | None, removed: str) -> pd.Series:
    """A value of the removal study a seed, for the seeds whose network has overfitted catastrophically."""
    found, overfitted = of(f, metric, base, at, removed=removed), of(f, "collapsed", base, at)
    return found[found.index.isin(overfitted.index[overfitted > 0.5])]


def shortcut(f: pd.DataFrame, base: str, at: int | None = None) -> Difference:
    """Points of FGSM accuracy lost by a removal of 10 % of the former layers' weights."""
    large, small = (after_co(f, "fgsm_drop", base, at, f"former, {k}") for k in ("largest", "smallest"))
    return Difference("FGSM accuracy lost, largest minus smallest", paired(large, small), above=5, unit="points")


def former_first(f: pd.DataFrame, at: int | None = None) -> Difference:
    a, b = (after_co(f, "fgsm_drop", "V-FGSM", at, f"{k}, largest") for k in ("former", "latter"))
    return Difference("FGSM accuracy lost, former minus latter", paired(a, b), unit="points")


def comes_back(f: pd.DataFrame, base: str = "R-FGSM") -> Difference:
    after, before = (after_co(f, "pgd", base, 16, k) for k in ("former, largest", "nothing"))
    name = "PGD accuracy after minus before (printed: 2.65 and about 0 %)"
    return Difference(name, paired(after, before), unit="points")


def same_cost(f: pd.DataFrame, ours: str, base: str, most: float, at: int | None = None) -> Difference:
    """CPU time for the demo, whose two runs share the machine; wall clock at scale paper."""
    a, b = (of(f, "train_seconds_epoch" if at else "train_cpu_seconds_epoch", m, at) for m in (ours, base))
    return Difference(f"{ours} over {base}, time of an epoch", (a / b).dropna(), above=None, below=most, digits=3)


def no_collapse(f: pd.DataFrame) -> list[Difference]:
    cells = [(k, r) for r in RADII for k in "VRN"]
    return [Difference(f"{k} {r}/255", of(f, "collapsed", f"{k}-LAP", r), above=None, below=NONE) for k, r in cells]


def accumulation_matters(f: pd.DataFrame) -> list[Difference]:
    kept, undone = (of(f, "pgd", k, 16, "ablation") for k in ("R-AWP-accumulated", "R-AWP"))
    return [
        Difference("undone, PGD accuracy", undone, above=None, below=5, unit="%"),
        Difference("kept minus undone, PGD accuracy", paired(kept, undone), above=5, unit="points"),
    ]


def layers_matter(f: pd.DataFrame) -> Difference:
    """The schedule keeps more clean accuracy than the same perturbation in every layer alike."""
    a, b = of(f, "clean", "R-LAP", 16), of(f, "clean", "R-AWP-accumulated", 16, "ablation")
    name = "layer-aware minus uniform, clean accuracy (printed: 64.83 and 30.00 %)"
    return Difference(name, paired(a, b), above=10, unit="points")


def compared(f: pd.DataFrame, base: str, ours: str, at: int | None = None) -> str:
    """PGD accuracy and runs with CO of both, as half a sentence; empty where one is not measured."""
    pgd, co = ([of(f, key, m, at) for m in (base, ours)] for key in ("pgd", "collapsed"))
    if not all(map(len, [*pgd, *co])):
        return ""
    ends = [f"{v.mean():.1f} % {word}" for v, word in zip(pgd, ("without", "with"), strict=True)]
    runs = [f"{v.sum():.0f} of {len(v)}" for v in co]
    return f"PGD accuracy ends at {ends[0]} and {ends[1]} LAP, with CO in {runs[0]} and {runs[1]} runs"


CONTROLS = {"uniform": "every layer alike", "reversed": "most in the last layer", "undone": "the move undone"}


def bottom_line(frames: dict[str, pd.DataFrame]) -> list[str]:
    """What the seeds show, also where the claims stay undecided."""
    out = []
    f = frames.get("real")
    if f is not None:
        cells = [(s, r) for r in (16, 24, 32, 8) for s in "VRN"]  # what decides stands first
        said = [f"{s} at {r}/255: {text}" for s, r in cells if (text := compared(f, f"{s}-FGSM", f"{s}-LAP", r))]
        out += [f"On CIFAR-10 at width 8, {said[0]}."] if said else []
        out += [f"Other starts and radii: {'; '.join(said[1:])}."] if said[1:] else []
        for start, at in (("V", 16), ("R", 16)):
            parts = {k: of(f, "pgd", f"{start}-LAP-{k}", at) for k in CONTROLS}
            told = [f"{v.mean():.1f} % with {CONTROLS[k]}" for k, v in parts.items() if len(v)]
            out += [f"The controls at {start}, {at}/255: {', '.join(told)}."] if told else []
    f = frames.get("demo")
    text = compared(f, "V-FGSM", "V-LAP") if f is not None else ""
    return [*out, f"On photo patches {text}."] if text else out


CLAIMS = [
    Claim(
        *("1", "Without LAP: PGD <= 5 % and FGSM above clean accuracy (CO)", "Section 3", "demo"),
        lambda f: collapses(f, "V-FGSM"),
    ),
    Claim(
        *("2", "With it: PGD accuracy at least 10 points higher", "main table", "demo"),
        lambda f: rescued(f, "V-LAP", "V-FGSM"),
    ),
    Claim(
        "3",
        "After CO, zeroing the largest 10 % of the former layers' weights costs 5 points of FGSM accuracy more than "
        "zeroing the smallest 10 % (the shortcut)",
        *("weight-removal figure", "demo", lambda f: shortcut(f, "V-FGSM")),
    ),
    Claim("4", "It costs more than in the latter layers", "weight-removal figure", "demo", former_first),
    Claim(
        *("5", "An epoch takes at most 1.3 x the time of the baseline's", "cost table", "demo"),
        lambda f: same_cost(f, "V-LAP", "V-FGSM", 1.3),
        timed=True,
    ),
    Claim(
        *("R1", "Without start noise FGSM training collapses at 16/255", "main table", "real"),
        lambda f: real_collapse(f, "V-FGSM", 16),
    ),
    Claim(
        *("R2", "Where it does LAP rescues: at least 10 points more PGD accuracy", "main table", "real"),
        lambda f: real_rescue(f, "V-LAP", "V-FGSM", 16),
    ),
    Claim(
        *("R3", "Layer-aware beats every layer alike at the same mean by 2 points of PGD accuracy (V, 16/255)", "ours"),
        *("real", lambda f: part_costs(f, "V-LAP", "V-LAP-uniform", 16)),
        control=True,
        explanation="The former layers are where the weights have to be moved",
    ),
    Claim(
        *("R4", "Layer-aware beats the reversed schedule by 2 points (V, 16/255)", "ours", "real"),
        lambda f: part_costs(f, "V-LAP", "V-LAP-reversed", 16),
        control=True,
        explanation="The former layers are where the weights have to be moved",
    ),
    Claim(
        *("R5", "A perturbation that is kept beats one that is undone by 2 points (V, 16/255)", "ablation", "real"),
        lambda f: part_costs(f, "V-LAP", "V-LAP-undone", 16),
    ),
    Claim(
        *("R6", "Shortcut: claim 3 for V-FGSM at 16/255", "weight-removal figure", "real"),
        lambda f: shortcut(f, "V-FGSM", 16),
    ),
    Claim(
        *("R7", "It costs more than in the latter layers", "weight-removal figure", "real"),
        lambda f: former_first(f, 16),
    ),
    Claim(
        *("R8", "The same removal brings PGD accuracy back", "weight-removal figure", "real"),
        lambda f: comes_back(f, "V-FGSM"),
    ),
    Claim(
        *("R9", "Where nothing collapses LAP costs at most a point: R, 8/255", "main table", "real"),
        lambda f: no_cost(f, "R", 8),
    ),
    Claim("R10", "The same: R, 16/255", "main table", "real", lambda f: no_cost(f, "R", 16)),
    Claim("R11", "The same: N, 16/255", "main table", "real", lambda f: no_cost(f, "N", 16)),
    Claim(
        *("R12", "Layer-aware beats every layer alike by 2 points of PGD accuracy (R, 16/255)", "ours", "real"),
        lambda f: part_costs(f, "R-LAP", "R-LAP-uniform", 16),
        control=True,
        explanation="The former layers are where the weights have to be moved",
    ),
    Claim(
        *("R13", "Layer-aware beats the reversed schedule by 2 points (R, 16/255)", "ours", "real"),
        lambda f: part_costs(f, "R-LAP", "R-LAP-reversed", 16),
        control=True,
        explanation="The former layers are where the weights have to be moved",
    ),
    Claim("A", "R-FGSM collapses at 16/255", "main table", "paper", lambda f: collapses(f, "R-FGSM", 16)),
    Claim(
        *("B", "R-LAP beats R-FGSM at 16/255 by at least 10 points of PGD accuracy", "main table", "paper"),
        lambda f: rescued(f, "R-LAP", "R-FGSM", 16),
    ),
    Claim("C", "No run of V-, R- or N-LAP collapses, at any radius", "main table", "paper", no_collapse),
    Claim(
        *("D", "Shortcut: claim 3 for R-FGSM at 16/255", "weight-removal figure", "paper"),
        lambda f: shortcut(f, "R-FGSM", 16),
    ),
    Claim("E", "The same removal brings PGD accuracy back", "weight-removal figure", "paper", comes_back),
    Claim(
        *("F", "A perturbation that is kept prevents CO, one that is undone does not (AWP, 16/255)", "ablation"),
        *("paper", accumulation_matters),
    ),
    Claim(
        *("G", "The layer schedule keeps 10 points of clean accuracy more than uniform layers", "ablation", "paper"),
        layers_matter,
    ),
    Claim(
        *("H", "R-LAP takes at most 1.10 x the time of R-FGSM an epoch", "cost table", "paper"),
        lambda f: same_cost(f, "R-LAP", "R-FGSM", 1.10, 8),
        timed=True,
    ),
]
