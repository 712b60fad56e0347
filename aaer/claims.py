"""The paper's claims as measured differences; how a verdict is made stands in lab/claims.py.

The photo patches (scale demo) were calibrated once on five seeds that are not shown and then fixed. At scale paper the
claims are the paper's qualitative statements, because the accuracies it prints are not known to us.
"""

from lab.claims import Claim, Difference, paired, values

import pandas as pd

RADII = (8, 12, 16, 32)
SMALL = 2  # points of PGD accuracy that a part of the regulariser has to be worth
NONE = 0.01  # a share below this is none: of three or ten runs a single one is more


def of(f: pd.DataFrame, metric: str, method: str, at: int | None = None) -> pd.Series:
    """A value a seed: on the photo patches, or `at` a radius on CIFAR-10."""
    place = {"dataset": "CIFAR-10", "setting": f"eps={at}/255"} if at else {"dataset": "Photo patches"}
    return values(f, metric, method=method, table="main", **place)


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


def rises(f: pd.DataFrame, base: str, at: int) -> Difference:
    """Only seeds whose onset lies in the second epoch or later have an epoch to compare with."""
    onset, before = (100 * of(f, f"abnormal_{k}_co", base, at) for k in ("at", "previous"))
    name = f"{base} at {at}/255, abnormal examples at the onset minus the epoch before"
    return Difference(name, paired(onset, before), unit="points")


def part_costs(f: pd.DataFrame, ours: str, without: str, at: int) -> Difference:
    gain = paired(of(f, "pgd", ours, at), of(f, "pgd", without, at))
    return Difference(f"{ours} - {without}, PGD accuracy at {at}/255", gain, above=SMALL, unit="points")


def no_cost(f: pd.DataFrame, start: str, at: int) -> list[Difference]:
    """Where the baseline does not collapse the regulariser takes at most a point."""
    names = {"clean": "clean accuracy", "pgd": "PGD accuracy"}
    ours, base = f"{start}-AAER", f"{start}-FGSM"
    gaps = {k: paired(of(f, k, ours, at), of(f, k, base, at)) for k in names}
    return [Difference(f"{ours} - {base} at {at}/255, {names[k]}", v, above=-1, unit="points") for k, v in gaps.items()]


def surge(f: pd.DataFrame, base: str, at: int | None = None) -> Difference:
    """Only seeds whose onset lies in the third epoch or later have an epoch to compare with."""
    onset, before = (100 * of(f, f"abnormal_{k}_co", base, at) for k in ("at", "before"))
    name = f"{base}, abnormal examples at the onset minus 3 x those two epochs before"
    return Difference(name, paired(onset, 3 * before), unit="points")


def fewer_abnormal(f: pd.DataFrame, at: int | None = None) -> Difference:
    a, b = (100 * of(f, "abnormal_final", m, at) for m in ("V-FGSM", "V-AAER"))
    return Difference("V-FGSM - V-AAER, abnormal examples in the last epoch", paired(a, b), unit="points")


def logit_gap(f: pd.DataFrame) -> list[Difference]:
    base, ours = (of(f, "gap_final", m) for m in ("V-FGSM", "V-AAER"))
    return [Difference("V-FGSM, V_A - V_N", base), Difference("V-AAER, V_A - V_N", ours, above=None, below=0)]


def same_cost(f: pd.DataFrame, ours: str, base: str, most: float, at: int | None = None) -> Difference:
    """CPU time for the demo, whose two runs share the machine; wall clock at scale paper."""
    a, b = (of(f, "train_seconds_epoch" if at else "train_cpu_seconds_epoch", m, at) for m in (ours, base))
    return Difference(f"{ours} over {base}, time of an epoch", (a / b).dropna(), above=None, below=most, digits=3)


def first_half(f: pd.DataFrame) -> Difference:
    onset, epochs = (of(f, m, "RS-FGSM", 16) for m in ("co_epoch", "epochs"))
    name = "half of the epochs minus the epoch of CO (in the paper's Figure 1 it is the 9th of 30)"
    return Difference(name, paired(epochs / 2, onset), unit="epochs")


def no_collapse(f: pd.DataFrame) -> list[Difference]:
    cells = [(m, r) for r in RADII for m in ("RS-AAER", "N-AAER")]
    return [Difference(f"{m} {r}/255", of(f, "collapsed", m, r), above=None, below=NONE) for m, r in cells]


def not_worse(f: pd.DataFrame) -> list[Difference]:
    gaps = {r: paired(*(of(f, "pgd", m, r) for m in ("N-AAER", "N-FGSM"))) for r in RADII}
    return [Difference(f"N-AAER - N-FGSM at {r}/255, PGD accuracy", v, unit="points") for r, v in gaps.items()]


def compared(f: pd.DataFrame, base: str, ours: str, at: int | None = None) -> str:
    """PGD accuracy and runs with CO of both, as half a sentence; empty where one is not measured."""
    pgd, co = ([of(f, key, m, at) for m in (base, ours)] for key in ("pgd", "collapsed"))
    if not all(map(len, [*pgd, *co])):
        return ""
    ends = [f"{v.mean():.1f} % {word}" for v, word in zip(pgd, ("without", "with"), strict=True)]
    runs = [f"{v.sum():.0f} of {len(v)}" for v in co]
    return f"PGD accuracy ends at {ends[0]} and {ends[1]} the regulariser, with CO in {runs[0]} and {runs[1]} runs"


def bottom_line(frames: dict[str, pd.DataFrame]) -> list[str]:
    """What the seeds show, also where the claims stay undecided."""
    out = []
    f = frames.get("real")
    if f is not None:
        cells = [(s, r) for r in (12, 24, 32, 16, 8) for s in ("V", "RS", "N")]  # what decides stands first
        said = [f"{s} at {r}/255: {text}" for s, r in cells if (text := compared(f, f"{s}-FGSM", f"{s}-AAER", r))]
        out += [f"On CIFAR-10 at width 8, {said[0]}."] if said else []
        out += [f"Other starts and radii: {'; '.join(said[1:])}."] if said[1:] else []
        parts = {k: of(f, "pgd", f"V-AAER, {k}", 12) for k in ("difference alone", "count alone", "random examples")}
        told = [f"{v.mean():.1f} % with {k}" for k, v in parts.items() if len(v)]
        out += [f"The controls at V, 12/255: {', '.join(told)}."] if told else []
    f = frames.get("demo")
    text = compared(f, "V-FGSM", "V-AAER") if f is not None else ""
    return [*out, f"On photo patches {text}."] if text else out


CLAIMS = [
    Claim(
        *("1", "Without the regulariser: PGD <= 5 % and FGSM above clean accuracy (CO)", "Figure 1", "demo"),
        lambda f: collapses(f, "V-FGSM"),
    ),
    Claim(
        *("2", "With it: PGD accuracy at least 10 points higher", "Section 4", "demo"),
        lambda f: rescued(f, "V-AAER", "V-FGSM"),
    ),
    Claim(
        *("3", "Abnormal examples at the onset of CO >= 3 x those two epochs before", "Section 3.1", "demo"),
        lambda f: surge(f, "V-FGSM"),
    ),
    Claim("4", "At the end fewer abnormal examples with the regulariser", "Section 3.3", "demo", fewer_abnormal),
    Claim(
        *("5", "An epoch takes at most 1.15 x the time of the baseline's", "Section 4", "demo"),
        lambda f: same_cost(f, "V-AAER", "V-FGSM", 1.15),
        timed=True,
    ),
    Claim(
        *("6", "At the end V_A - V_N is positive without the regulariser and not with it", "Section 3.2", "demo"),
        logit_gap,
    ),
    Claim(
        *("R1", "Without start noise FGSM training collapses at 12/255", "Section 1", "real"),
        lambda f: real_collapse(f, "V-FGSM", 12),
    ),
    Claim(
        *("R2", "Where it does the regulariser rescues: at least 10 points more PGD accuracy", "Section 4", "real"),
        lambda f: real_rescue(f, "V-AAER", "V-FGSM", 12),
    ),
    Claim(
        "R3",
        "Abnormal examples rise at the onset of CO (V, 12/255)",
        "Section 3.1",
        "real",
        lambda f: rises(f, "V-FGSM", 12),
    ),
    Claim(
        *("R4", "Without the count the regulariser loses 2 points of PGD accuracy (V, 12/255)", "ours", "real"),
        lambda f: part_costs(f, "V-AAER", "V-AAER, difference alone", 12),
        control=True,
        explanation="The number of abnormal examples and their variation are both needed",
    ),
    Claim(
        *("R5", "With the count but without - V_N it loses 2 points (V, 12/255)", "ours", "real"),
        lambda f: part_costs(f, "V-AAER", "V-AAER, count alone", 12),
        control=True,
        explanation="Only variation beyond that of normal examples is to be pulled",
    ),
    Claim(
        *(
            "R6",
            "Pulling as many random examples instead of the abnormal ones loses 2 points (V, 12/255)",
            "ours",
            "real",
        ),
        lambda f: part_costs(f, "V-AAER, count alone", "V-AAER, random examples", 12),
        control=True,
        explanation="It is the abnormal examples that have to be pulled",
    ),
    Claim(
        *("R7", "Where nothing collapses the regulariser costs at most a point: RS, 8/255", "Section 4", "real"),
        lambda f: no_cost(f, "RS", 8),
    ),
    Claim("R8", "The same: N, 8/255", "Section 4", "real", lambda f: no_cost(f, "N", 8)),
    Claim("R9", "The same: RS, 16/255", "Section 4", "real", lambda f: no_cost(f, "RS", 16)),
    Claim("R10", "The same: N, 16/255", "Section 4", "real", lambda f: no_cost(f, "N", 16)),
    Claim(
        *(
            "R11",
            "Two steps (PGD-2) are no better than one with the regulariser by 2 points (V, 12/255)",
            "ours",
            "real",
        ),
        lambda f: Difference(
            "V-AAER - PGD-2, PGD accuracy at 12/255",
            paired(of(f, "pgd", "V-AAER", 12), of(f, "pgd", "PGD-2", 12)),
            *(-SMALL, None, "points"),
        ),
        control=True,
        explanation="One step with the regulariser does what several steps do",
    ),
    Claim(
        *("R12", "At the end fewer abnormal examples with the regulariser (V, 12/255)", "Section 3.3", "real"),
        lambda f: fewer_abnormal(f, 12),
    ),
    Claim("R13", "Collapse as R1: RS, 24/255", "Figure 1", "real", lambda f: real_collapse(f, "RS-FGSM", 24)),
    Claim("R14", "Rescue as R2: RS, 24/255", "Section 4", "real", lambda f: real_rescue(f, "RS-AAER", "RS-FGSM", 24)),
    Claim("R15", "Collapse as R1: RS, 32/255", "Figure 1", "real", lambda f: real_collapse(f, "RS-FGSM", 32)),
    Claim("R16", "Rescue as R2: RS, 32/255", "Table 2", "real", lambda f: real_rescue(f, "RS-AAER", "RS-FGSM", 32)),
    Claim("A", "RS-FGSM collapses at 16/255", "Figure 1", "paper", lambda f: collapses(f, "RS-FGSM", 16)),
    Claim("B", "It does so in the first half of training", "Figure 1", "paper", first_half),
    Claim(
        *("C", "RS-AAER beats RS-FGSM at 16/255 by at least 10 points of PGD accuracy", "Table 2", "paper"),
        lambda f: rescued(f, "RS-AAER", "RS-FGSM", 16),
    ),
    Claim("D", "No run of RS-AAER or N-AAER collapses, at any radius", "Table 2", "paper", no_collapse),
    Claim("E", "N-AAER is at least as robust as N-FGSM, at every radius", "Table 2", "paper", not_worse),
    Claim(
        *("F", "Abnormal examples surge at the onset of CO of RS-FGSM at 16/255", "Section 3.1", "paper"),
        lambda f: surge(f, "RS-FGSM", 16),
    ),
    Claim(
        *("G", "RS-AAER takes at most 1.10 x the time of RS-FGSM an epoch", "Section 4", "paper"),
        lambda f: same_cost(f, "RS-AAER", "RS-FGSM", 1.10, 8),
        timed=True,
    ),
]
