"""The paper's claims as measured differences over seeds; how a verdict is made stands in lab/claims.py.

Those of scale demo were calibrated once on seeds 10-14, which are not shown, and then fixed; those of scale real ask
whether a difference is positive, so nothing was calibrated. One that fails is printed as such.
"""

import dataclasses
import math

from lab.claims import FAILS, HOLDS, UNDECIDED, UNKNOWN, Claim, Difference, paired, values

import pandas as pd

DRAWN = ("far", "near", "fine-grained")
IRRELEVANT, FREE = "EOE(prompt=irrelevant)", "EOE(no OOD name)"


def of(f: pd.DataFrame, method: str, dataset: str, metric: str = "FPR95") -> pd.Series:
    """A value a seed, in per cent."""
    setting = "tier A" if dataset == "synthetic" else "tier B"
    return values(f, metric, method=method, dataset=dataset, setting=setting)


def better(f: pd.DataFrame, dataset: str, method: str, than: str, by: float = 0) -> Difference:
    """FPR95 of `than` minus that of `method`: how much lower the method's is, seed by seed."""
    gap = paired(of(f, than, dataset), of(f, method, dataset))
    return Difference(f"{dataset}: FPR95 of {than} - {method}", gap, above=by, unit="points")


def order(f: pd.DataFrame) -> list[Difference]:
    names = ("Ground Truth", "EOE", "S_MSP", "MCM")
    return [better(f, "synthetic", a, b) for a, b in zip(names, names[1:], strict=False)]


def gain(f: pd.DataFrame) -> list[Difference]:
    rise = paired(*(of(f, m, "synthetic", "AUROC") for m in ("EOE", "MCM")))
    name = "synthetic: AUROC of EOE - MCM"
    return [better(f, "synthetic", "EOE", "MCM", 5), Difference(name, rise, above=1, unit="points")]


def everywhere(method: str, *than: str, by: float = 0):
    return lambda f: [better(f, d, method, t, by) for d in DRAWN for t in than]


# ------------------------------------------------------------------------------- scale real: one network, many images

PHOTO = "a photo of a"
FAR = "far: mean of 4 sets"
OWN = {"near": "EOE(own near)", "fine-grained": "EOE(own fine)", FAR: "EOE(own far)"}  # the prompt that each task has
PUBLISHED = "EOE(published near)"
FREED, KINDLESS = " without OOD names", " without OOD names and kinds"
OVER = {  # what a gain is over
    **{"gain": "over MCM", "beyond_maxlogit": "over MaxLogit", "beyond_beta0": "over beta = 0"},
    **{"beyond_irrelevant": "over as many irrelevant names", "beyond_nouns": "over as many random nouns"},
    **{"beyond_animals": "over as many random animals", "left_to_truth": "of Ground Truth"},
}


@dataclasses.dataclass(frozen=True)
class Bootstrapped:
    """A mean over splits whose 95 % interval was made by a bootstrap over classes and images (real/bootstrap.py):
    splits share images, so no interval over splits would do. Judged as lab.claims.Difference is; without an interval
    nothing is decided."""

    name: str
    numbers: tuple[float, float, float] | None  # value and interval, whose ends are NaN where it cannot be had
    above: float = 0.0

    def verdict(self) -> str:
        if self.numbers is None:
            return UNKNOWN
        _, low, high = self.numbers
        return HOLDS if low > self.above else FAILS if high <= self.above else UNDECIDED

    def text(self) -> str:
        if self.numbers is None:
            return f"{self.name}: not measured"
        value, low, high = self.numbers
        told = f"[{low:+.2f}, {high:+.2f}] points" if low == low else "points, without an interval: one group of images"
        return f"{self.name}: {value:+.2f} {told} (above {self.above:g})"


def real(f: pd.DataFrame, metric: str, method: str, dataset: str, setting: str = f"lite0, {PHOTO}") -> float | None:
    """One number of scale real; None where there is none."""
    found = values(f, metric, table="real", method=method, dataset=dataset, setting=setting)
    return float(found.mean()) if len(found) else None


def booted(f: pd.DataFrame, what: str, metric: str, method: str, dataset: str, backbone="lite0", template=PHOTO):
    """What a method gains (`gain` over MCM, `beyond_irrelevant`, ...) in a metric, with its interval."""
    value, low, high = (
        real(f, f"{what}_{metric}{end}", method, dataset, f"{backbone}, {template}") for end in ("", "_low", "_high")
    )
    place = {FAR: "far (4 sets, of 10, 20, 3 and 1 groups)"}.get(dataset, dataset)
    place = f"{place}, {metric} of {method}{f', {backbone}' * (backbone != 'lite0')}"
    numbers = None if value is None else (value, *(math.nan if x is None else x for x in (low, high)))
    return Bootstrapped(f"{place}{', bare prompt' * (template != PHOTO)}, gain {OVER[what]}", numbers)


def own_lists(what: str, *metrics: str, **more):
    """Each task with the list of its own prompt."""
    return lambda f: [booted(f, what, m, method, d, **more) for d, method in OWN.items() for m in metrics]


WHY = "names that a language model thinks of resemble what may turn up, and so expose it"
CLAIMS = [
    Claim("A1", "FPR95 (synthetic): Ground Truth < EOE < EOE with beta = 0 <= MCM", "Tables 1-4, 9", "demo", order),
    Claim(
        "A2",
        "EOE gains at least 5 points FPR95 and 1 point AUROC over MCM although no envisioned name is an OOD name",
        *("Tables 1-4", "demo", gain),
    ),
    Claim(
        *("A3", "Similar names beat irrelevant ones by at least 5 points FPR95", "Table 23", "demo"),
        lambda f: better(f, "synthetic", "EOE", IRRELEVANT, 5),
    ),
    Claim(
        *("B1", "Far: EOE is at least 3 points FPR95 better than MCM", "Tables 1, 2", "demo"),
        lambda f: better(f, "far", "EOE", "MCM", 3),
    ),
    Claim(
        *("B2", "Near: EOE is at least 3 points FPR95 better than MCM", "Table 3", "demo"),
        lambda f: better(f, "near", "EOE", "MCM", 3),
    ),
    Claim(
        *("B3", "Fine-grained: EOE is at least 3 points FPR95 better than MCM", "Table 4", "demo"),
        lambda f: better(f, "fine-grained", "EOE", "MCM", 3),
    ),
    Claim(
        "B4",
        "The resemble prompt gives a lower FPR95 than the irrelevant one on all three tasks",
        *("Table 23", "demo", everywhere("EOE", IRRELEVANT)),
    ),
    Claim(
        "B5",
        "Ground Truth names give a lower FPR95 than envisioned ones on all three tasks",
        *("Tables 1-4", "demo", everywhere("Ground Truth", "EOE")),
    ),
    Claim(
        "B6",
        "Without any envisioned name that is an OOD name, EOE stays 3 points FPR95 better than MCM on all three tasks",
        *("Sec. 1: no knowledge of the outliers", "demo", everywhere(FREE, "MCM", by=3)),
        control=True,
    ),
    Claim(
        "B7",
        "S_MAX, whose rejected images tie, is at least 10 points FPR95 worse than EOE (fine-grained)",
        *("Table 22", "demo", lambda f: better(f, "fine-grained", "EOE", "S_MAX", 10)),
    ),
    Claim(
        *("B8", "EOE has a lower FPR95 than MaxLogit and Energy on all three tasks", "Tables 1-4", "demo"),
        everywhere("EOE", "MaxLogit", "Energy"),
    ),
    Claim(
        *("R1", "Far: EOE has a lower FPR95 than MCM, with names written for the far prompt", "Tables 1, 2", "real"),
        lambda f: booted(f, "gain", "FPR95", OWN[FAR], FAR),
    ),
    Claim(
        "R2",
        "Near: EOE has a lower FPR95 than MCM, with the published names of GPT-3.5 and with own names",
        *("Tables 3, 11", "real"),
        lambda f: [booted(f, "gain", "FPR95", m, "near") for m in (PUBLISHED, OWN["near"])],
    ),
    Claim(
        *("R3", "Fine-grained: EOE has a lower FPR95 than MCM", "Table 4", "real"),
        lambda f: booted(f, "gain", "FPR95", OWN["fine-grained"], "fine-grained"),
    ),
    Claim(
        "R3a",
        "Fine-grained: the names, with and without OOD names and kinds of them, beat as many animals drawn at random",
        *("any animals would do", "real"),
        lambda f: [
            booted(f, "beyond_animals", "FPR95", OWN["fine-grained"] + x, "fine-grained") for x in ("", KINDLESS)
        ],
        control=True,
        explanation=WHY,
    ),
    Claim(
        "R4",
        "Names that resemble the ID classes beat as many irrelevant ones, FPR95: near, fine-grained, far",
        *("Table 23", "real", own_lists("beyond_irrelevant", "FPR95")),
    ),
    Claim(
        "R5",
        "The published near names beat as many irrelevant ones, FPR95: near",
        *("Table 23", "real"),
        lambda f: booted(f, "beyond_irrelevant", "FPR95", PUBLISHED, "near"),
    ),
    Claim(
        "R5a",
        "Those of them that are no OOD name, and no kind of one, still beat as many irrelevant ones, FPR95: near",
        *("Sec. 1: no knowledge of the outliers", "real"),
        lambda f: [booted(f, "beyond_irrelevant", "FPR95", PUBLISHED + x, "near") for x in (FREED, KINDLESS)],
        control=True,
        explanation=WHY,
    ),
    Claim(
        "R6",
        "The real OOD names would be better than envisioned ones, FPR95: near, fine-grained, far",
        *("Tables 1-4", "real", own_lists("left_to_truth", "FPR95")),
    ),
    Claim(
        "R7",
        "Irrelevant names alone, as many as the near prompt brings, gain over MCM",
        *("the longer denominator", "real"),
        lambda f: [booted(f, "gain", m, f"irrelevant names for {OWN['near']}", "near") for m in ("FPR95", "AUROC")],
        control=True,
    ),
    Claim(
        "R8",
        "Names that resemble the ID classes beat as many irrelevant ones in AUROC, too: near, fine-grained, far",
        *("Table 23, which prints both metrics", "real", own_lists("beyond_irrelevant", "AUROC")),
        control=True,
        explanation=WHY,
    ),
    Claim(
        "R9",
        "They beat as many random nouns of WordNet (no animals), FPR95: near, fine-grained, far",
        *("any names of things would do", "real", own_lists("beyond_nouns", "FPR95")),
        control=True,
        explanation=WHY,
    ),
    Claim(
        "R10",
        "They beat as many irrelevant ones with the bare name as prompt, FPR95: near, fine-grained, far",
        *("the prompt template", "real", own_lists("beyond_irrelevant", "FPR95", template="bare")),
        control=True,
        explanation=WHY,
    ),
    Claim(
        "R11",
        "Fine-grained: without OOD names, and without kinds of them, the rest beats as many irrelevant ones, FPR95",
        *("Sec. 1: no knowledge of the outliers", "real"),
        lambda f: [
            booted(f, "beyond_irrelevant", "FPR95", OWN["fine-grained"] + x, "fine-grained") for x in (FREED, KINDLESS)
        ],
        control=True,
        explanation=WHY,
    ),
    Claim(
        "R12",
        "With a larger network names beat as many irrelevant ones, FPR95: near, fine-grained, far",
        *("Tables 19, 20", "real", own_lists("beyond_irrelevant", "FPR95", backbone="lite2")),
        control=True,
        explanation=WHY,
    ),
    Claim(
        "R13",
        "Objects of DAVIS sequences: near names beat as many irrelevant ones, FPR95",
        *("other photographs", "real"),
        lambda f: booted(f, "beyond_irrelevant", "FPR95", OWN["near"], "DAVIS"),
        control=True,
    ),
    Claim(
        "R14",
        "EOE has a lower FPR95 than MaxLogit: near, with published and own names, fine-grained, far",
        *("Tables 1-4", "real"),
        lambda f: [booted(f, "beyond_maxlogit", "FPR95", PUBLISHED, "near"), *own_lists("beyond_maxlogit", "FPR95")(f)],
    ),
    Claim(
        "R15",
        "beta = 0.25 has a lower FPR95 than beta = 0 (S_MSP): near, with published and own names, fine-grained, far",
        *("Tables 5-9, 22", "real"),
        lambda f: [booted(f, "beyond_beta0", "FPR95", PUBLISHED, "near"), *own_lists("beyond_beta0", "FPR95")(f)],
    ),
]


def bottom_line(frames: dict[str, pd.DataFrame]) -> list[str]:
    """What the names are worth on real images, in one sentence made from the records."""
    f = frames.get("real")
    if f is None or not len(f):
        return []

    def part(what: str, dataset: str, method: str) -> str:
        numbers = booted(f, what, "FPR95", method, dataset).numbers
        return "not measured" if numbers is None else f"{numbers[0]:+.1f} [{numbers[1]:+.1f}, {numbers[2]:+.1f}]"

    near = ("beyond_irrelevant", "near", OWN["near"]), ("beyond_irrelevant", "near", PUBLISHED)
    list_ = OWN["fine-grained"]
    fine = [("beyond_irrelevant", list_), ("beyond_animals", list_), ("beyond_animals", list_ + KINDLESS)]
    far_both = ((what, FAR, OWN[FAR]) for what in ("beyond_irrelevant", "beyond_nouns"))
    own, published, far, nouns = (part(*x) for x in (*near, *far_both))
    fine, animals, bare = (part(what, "fine-grained", method) for what, method in fine)
    if {own, published, fine, far} == {"not measured"}:
        return []
    accuracy = real(f, "accuracy", "MCM", FAR)
    known = f" (CIFAR-10: {accuracy:.1f} %)" if accuracy is not None else ""
    return [
        f"On real images, by a zero-shot classifier without CLIP{known}, EOE's names lower FPR95 by this many points "
        f"more than as many irrelevant names: near {published} with the published names and {own} "
        f"with own ones, fine-grained {fine} ({animals} over as many random animals, {bare} without names of OOD "
        f"classes and kinds of them), far {far} ({nouns} over as many random nouns: many irrelevant names are of "
        "signs and writing, which the far sets show); the own lists were written knowing the OOD sets."
    ]
