"""The paper's claims as measured differences; how a verdict is made stands in lab/claims.py.

Those of scale demo were set before they were tried (bars of the specification of the embedded default), tried once on
five seeds that are not shown, and then left as they were. H1 to H5 of scale real were set after a look at
seed 100, before the seeds that count, the N without one; H6 after the labels of people were measured and ELR's rows
known, before the rows of short training that it is about; H7 before any network was trained from random weights. Those
of scale paper are the abstract's statements.
"""

import functools
import math

from lab.claims import Claim, Difference, Either, interval, paired, values

import pandas as pd

DIGITS, CIFAR = "MNIST (5,000)", "CIFAR-10"
CLEAN = "CE on the clean pretraining images"  # those that the demo's generator is made of
FILTER = "filtered by the prior"  # noisy images whose label a classifier of those confirms
DROPPING = ("Co-teaching", "JoCoR", "small-loss")  # samples of large loss
CORRECTING = ("Forward", "ELR", "CORES")  # the loss
ROBUST = CORRECTING + DROPPING  # of scale real
STOPPED = "CE, 2 epochs"  # a row of plan.yaml; its rate falls a hundredfold before the second
CUT = "CE, cut after 2 of 20"  # the run of twenty epochs, at the rate it has there
FREE = ("small-loss", "kNN agreement", "cleanlab", "ImageNet's classes", "CLIPCleaner")  # of a generator
SELECTORS = ("small-loss", "GMM on loss", "kNN agreement", "cleanlab", "CLIP zero-shot", "CLIPCleaner")
OTHERS = (
    *("CE", "Modified-only", "Selected-only", "small-loss", "Forward", "Reweight", "T-Revision", "PTD"),
    *("Co-teaching", "JoCoR", "ELR", "CORES", "DivideMix", "ProMix"),
)


def edits(f: pd.DataFrame, metric: str, rate: str) -> pd.Series:
    """Of whatever generator ran."""
    return values(f, metric, table="main-edits", setting=f"instance {rate}", dataset=DIGITS)


def alignment(f: pd.DataFrame) -> list[Difference]:
    out = []
    for rate in ("0.3", "0.5"):
        after, before = (edits(f, k, rate) for k in ("agreement_wrong", "original_agreement_wrong"))
        out += [
            Difference(f"x' fits, noise {rate}", after, above=70, unit="%"),
            Difference(f"x fits, noise {rate}", before, above=None, below=5, unit="%"),
        ]
    return out


def kept(f: pd.DataFrame, method: str, metric: str = "retained_99", dataset: str = DIGITS) -> pd.Series:
    where = {"table": "main-selection", "method": method, "setting": "instance 0.3", "dataset": dataset}
    return values(f, metric, **where)


def separation(f: pd.DataFrame) -> list[Difference]:
    where = {"table": "main-selection", "method": "EchoSelect", "dataset": DIGITS}
    auc = {rate: values(f, "auc", setting=f"instance {rate}", **where) for rate in ("0.3", "0.5")}
    return [Difference(f"AUC, noise {rate}", v, above=0.95, digits=3) for rate, v in auc.items()]


def retention(f: pd.DataFrame) -> list[Difference]:
    gap = paired(kept(f, "EchoSelect"), 1.2 * kept(f, "small-loss"))
    return [
        Difference("share of the clean samples kept", kept(f, "EchoSelect", "retained_99_share"), above=60, unit="%"),
        Difference("EchoSelect - 1.2 x small-loss", gap, unit="samples", digits=0),
    ]


def accuracy(f: pd.DataFrame, method: str, dataset: str = DIGITS) -> pd.Series:
    return values(f, "accuracy", table="main", method=method, setting="instance 0.5", dataset=dataset)


def ahead(f: pd.DataFrame, other: str, above: float, ours: str = "EchoAlign") -> Difference:
    gap = paired(accuracy(f, ours), accuracy(f, other))
    return Difference(f"{ours} - {other}", gap, above=above, unit="points")


def better(f: pd.DataFrame) -> list[Difference]:
    return [ahead(f, "CE", 10), ahead(f, "Modified-only", 0)]


def shift(f: pd.DataFrame) -> Either:
    far, near = (edits(f, f"frechet_{k}_test", "0.5") for k in ("modified", "mixed"))
    nearer = Difference("Frechet distance to the test images, modified - D_mix", paired(far, near), digits=3)
    return Either((ahead(f, "Modified-only", 0, "Selected-only"), nearer))


def enough(f: pd.DataFrame) -> Difference:
    return ahead(f, CLEAN, 0)


def human(f: pd.DataFrame, method: str, setting: str = "worse") -> pd.Series:
    """Accuracy at scale real; `worse`: CIFAR-10N's labels, 40 % of them wrong."""
    return values(f, "accuracy", table="main", method=method, setting=setting, dataset=CIFAR)


def harder(f: pd.DataFrame) -> list[Difference]:
    """Than noise of the same rate that a generator draws."""
    drawn = {kind: human(f, "CE", f"{kind} 0.4") for kind in ("symmetric", "instance")}
    return [Difference(f"CE, {k} - worse", paired(v, human(f, "CE")), unit="points") for k, v in drawn.items()]


def robust(f: pd.DataFrame) -> list[Difference]:
    return [Difference(f"{m} - CE", paired(human(f, m), human(f, "CE")), unit="points") for m in ROBUST]


def ceiling(f: pd.DataFrame) -> list[Difference]:
    gaps = {m: paired(human(f, "CE-clean"), human(f, m)) for m in ROBUST}
    return [Difference(f"CE-clean - {m}", v, above=2, unit="points") for m, v in gaps.items()]


def dropped(f: pd.DataFrame) -> Difference:
    means = [sum(human(f, m) for m in kind) / len(kind) for kind in (DROPPING, CORRECTING)]
    return Difference("mean of the three - mean of the three", paired(*means), above=5, unit="points")


def stopping(f: pd.DataFrame) -> list[Difference]:
    """Whether what a method gains by the end is more than plain training has after a short schedule."""
    places = ("instance 0.4", "symmetric 0.4", "random1")
    gaps = {s: paired(human(f, STOPPED, s), human(f, "ELR", s)) for s in places}
    return [Difference(f"{STOPPED} - ELR, {s}", v, unit="points") for s, v in gaps.items()]


def from_nothing(f: pd.DataFrame) -> list[Difference]:
    """Networks from random weights. The best epoch is chosen by the test set, which favours plain training."""
    where = {"table": "scratch", "setting": "worse", "dataset": CIFAR}
    ours = values(f, "accuracy", method="small-loss", **where)
    kinds = {"CE": "accuracy", "CE's best epoch": "accuracy_best"}
    plain = {name: values(f, metric, method="CE", **where) for name, metric in kinds.items()}
    return [Difference(f"small-loss - {name}", paired(ours, v), unit="points") for name, v in plain.items()]


def selectors(f: pd.DataFrame) -> list[Difference]:
    """What a similarity before and after an edit would have to beat."""
    where = {"table": "main-selection", "setting": "worse", "dataset": CIFAR}
    found = {m: values(f, "retained_99_share", method=m, **where) for m in FREE}
    return [Difference(m, v, above=None, below=33, unit="% of the right ones") for m, v in found.items()]


def directly(f: pd.DataFrame, n: str) -> list[Difference]:
    """EchoAlign with n clean images against the two ways to use them without a generator."""
    where = {"table": "clean-images", "setting": n, "dataset": DIGITS}
    got = {m: values(f, "accuracy", method=m, **where) for m in ("EchoAlign", CLEAN, FILTER)}
    ours = got.pop("EchoAlign")
    return [Difference(f"EchoAlign - {m}", paired(ours, v), unit="points") for m, v in got.items()]


def best_of(found: dict[str, pd.Series]) -> str:
    """Name with the highest mean; empty while one is not measured."""
    if any(not len(v) for v in found.values()):
        return ""
    return max(found, key=lambda m: found[m].mean())


def twice(f: pd.DataFrame) -> list[Difference]:
    found = {m: kept(f, m, dataset=CIFAR) for m in SELECTORS}
    best = best_of(found)
    gap = paired(kept(f, "EchoSelect", dataset=CIFAR), 1.8 * found[best]) if best else pd.Series(dtype=float)
    return [Difference(f"EchoSelect - 1.8 x {best}", gap, unit="samples", digits=0)] if best else []


def lead(f: pd.DataFrame, points: float) -> list[Difference]:
    found = {m: accuracy(f, m, CIFAR) for m in OTHERS}
    best = best_of(found)
    if not best:
        return []
    gap = paired(accuracy(f, "EchoAlign", CIFAR), found[best])
    return [Difference(f"EchoAlign - {best}", gap, above=points, unit="points")]


CLAIMS = [
    Claim(
        *("1", "Alignment: on wrong labels x' fits the label in at least 70 %, x in at most 5 %", "abstract", "demo"),
        alignment,
    ),
    Claim(
        *("2", "Separation: AUC of the similarity, right against wrong labels, at least 0.95", "abstract", "demo"),
        separation,
    ),
    Claim(
        "3",
        "Selection at 30 % noise and 99 % selection accuracy: at least 60 % of the clean samples, and 1.2 x small-loss",
        *("abstract", "demo", retention),
    ),
    Claim("4", "Accuracy at 50 % noise: 10 points above CE, and above Modified-only", "abstract", "demo", better),
    Claim(
        "5",
        "Shift: Modified-only is less accurate than Selected-only, or D_mix is nearer to the test images than the "
        "modified images are",
        *("abstract", "demo", shift),
    ),
    Claim(
        *("6", "EchoAlign is more accurate than training on the generator's clean images alone", "ours", "demo"),
        enough,
        control=True,
        explanation="images edited to fit their noisy labels make every sample usable",
    ),
    Claim(
        *("H1", "Labels of people are harder than drawn ones of the same rate: CE is less accurate on them", "ours"),
        *("real", harder),
        control=True,
        explanation="instance-dependent noise stands for the noise of people",
    ),
    Claim(
        *("H2", "On labels of people, 40 % of them wrong, each method for noisy labels is above CE", "ours", "real"),
        robust,
        control=True,
        explanation="baselines that correct labels or drop samples lose information",
    ),
    Claim(
        *("H3", "On labels of people each method stays 2 points below training on true labels", "ours", "real"),
        ceiling,
        control=True,
        explanation="noisy labels can be treated as accurate",
    ),
    Claim(
        "H4",
        "On labels of people no selector without a generator keeps a third of the rightly labelled images at 99 % "
        "selection accuracy",
        *("ours", "real", selectors),
        control=True,
        explanation="the similarity before and after an edit tells right labels from wrong ones",
    ),
    Claim(
        "H5",
        "On labels of people dropping samples of large loss is 5 points above correcting the loss",
        *("ours", "real", dropped),
        control=True,
        explanation="methods that drop samples lose information",
    ),
    Claim(
        *("H6", "On drawn labels and random1 too plain training of two epochs, its rate falling, is above ELR", "ours"),
        *("real", stopping),
        control=True,
        explanation="methods for noisy labels gain by what they do with those labels",
    ),
    Claim(
        "H7",
        "On labels of people, from random weights too, training on samples of small loss is above plain training, at "
        "its end and at its best epoch",
        *("ours", "real", from_nothing),
        control=True,
        explanation="methods that drop samples lose information",
    ),
    *(
        Claim(
            *(f"N{n.replace(',', '')}", f"With {n} clean images EchoAlign is above both ways to use them directly"),
            *("ours", "real", functools.partial(directly, n=n)),
            control=True,
            explanation="images edited to fit their noisy labels make every sample usable",
        )
        for n in ("100", "300", "1,000")
    ),
    Claim(
        "A",
        "Instance-dependent noise 30 %, selection accuracy 99 %: at least 1.8 x the samples of the best other selector",
        *("abstract: nearly twice", "paper", twice),
    ),
    Claim(
        *("B", "CIFAR-10, instance 0.5: more accurate than every other method", "abstract", "paper"),
        lambda f: lead(f, 0.0),
    ),
    Claim(
        *("C", "CIFAR-10, instance 0.5: by 7 points", "text of an early version of the repository", "paper"),
        lambda f: lead(f, 7.0),
    ),
]


def bottom_line(frames: dict[str, pd.DataFrame]) -> list[str]:
    """EchoAlign beside plain training and beside the clean images that its generator was trained on."""
    f = frames.get("demo", pd.DataFrame())
    gaps = [interval(ahead(f, m, 0).values) if len(f) else (math.nan, math.nan) for m in ("CE", CLEAN)]
    if any(half != half for _, half in gaps):
        return []
    (gain, a), (over, b) = gaps
    text = "On MNIST digits with half of the labels wrong EchoAlign's accuracy is "
    text += f"{gain:+.1f} ± {a:.1f} points against plain"
    text += f" training, and {over:+.1f} ± {b:.1f} against training on the generator's own clean images alone"
    ends = ": at this size the clean images explain the gain." if over + b <= 0 else "."
    ends = ": a gain beyond what those images give by themselves is not shown." if over - b <= 0 < over + b else ends
    out = [text + ends]
    real = frames.get("real", f[:0])
    return out + [line for line in (of_people(real), at_random(real), by_number(real)) if line]


def of_people(f: pd.DataFrame) -> str:
    """Labels of people: the best method beside CE and the ceiling."""
    found = {m: v for m in (*ROBUST, "DivideMix") if len(f) and len(v := human(f, m)) > 1}
    best = best_of(found) if found else ""
    if not best or len(human(f, "CE")) < 2:
        return ""
    (gain, a), (left, b) = (
        interval(paired(human(f, best), human(f, "CE"))),
        interval(paired(human(f, "CE-clean"), human(f, best))),
    )
    text = (
        "On CIFAR-10 with labels of people, 40 % of them wrong, by heads on fixed features of a network of ImageNet, "
    )
    text += f"the best of {len(found)} methods for noisy labels, {best}, gains {gain:+.1f} ± {a:.1f} points"
    text += " (which is told how many labels are wrong)" if best in DROPPING else ""
    text += f" and lacks {left:.1f} ± {b:.1f} to true labels"
    early, c = interval(paired(human(f, STOPPED), human(f, "CE")))
    text += f"; plain training of two epochs, its rate falling, gains {early:+.1f} ± {c:.1f}" if c == c else ""
    cut, d = interval(paired(human(f, CUT), human(f, "CE")))
    return text + (f", cut after two of the twenty {cut:+.1f} ± {d:.1f}." if d == d else ".")


def at_random(f: pd.DataFrame) -> str:
    """The same labels, networks from random weights."""
    found = [interval(d.values) for d in from_nothing(f)] if len(f) else []
    if not found or any(half != half for _, half in found):
        return ""
    (end, a), (best, b) = found
    text = "From random weights small-loss is, against plain training at its end and at its best epoch, "
    return text + f"{end:+.1f} ± {a:.1f} and {best:+.1f} ± {b:.1f} points."


def by_number(f: pd.DataFrame) -> str:
    """The digits again, with fewer clean images, against the two ways to use them directly, and ELR without any."""
    out = []
    for n in ("100", "300", "1,000"):
        found = [interval(d.values) for d in directly(f, n)] if len(f) else []
        if not found or any(half != half for _, half in found):
            continue
        (alone, a), (kept, b) = found
        out.append(f"{alone:+.1f} ± {a:.1f} and {kept:+.1f} ± {b:.1f} with {n}")
    if not out:
        return ""
    text = (
        "With fewer clean digits EchoAlign is, against training on them alone and against filtering the noisy ones by "
    )
    text += "them, " + ", ".join(out)
    where = {"table": "clean-images", "setting": "100", "dataset": DIGITS}
    none = paired(*(values(f, "accuracy", method=m, **where) for m in ("ELR", "EchoAlign")))
    gap, half = interval(none)
    if half != half:
        return text + "."
    return text + f"; ELR, which uses none, is {gap:+.1f} ± {half:.1f} points against EchoAlign with 100."
