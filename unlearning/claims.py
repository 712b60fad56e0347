"""The paper's claims as measured differences, tau = 0.9; how a verdict is made stands in lab/claims.py.

Those of scale demo are the specification of the small default, looked at once on five seeds that are not shown and then
fixed; those of scale paper are the orderings that the printed tables show.
"""

import dataclasses
from collections.abc import Callable

from lab.claims import Claim, Difference, paired, values

import pandas as pd

ATTACKS = ("jail-breaking", "embedding probing", "relearning", "token noising")
METHODS = ("GA", "GD", "KL", "PO", "NPO", "RMU")
MINI = "model=mini Llama"
SMALL = "miniature forget-small"
RAW, UWC = "calibration=none", "calibration=UWC tau=0.9"


def cell(f: pd.DataFrame, metric: str, method: str, calibration: str, dataset: str, model: str) -> pd.Series:
    return values(f, metric, table="main", method=method, setting=f"{calibration},{model}", dataset=dataset)


def raw(f: pd.DataFrame, method: str, part: str, dataset: str = SMALL, model: str = MINI) -> pd.Series:
    return cell(f, f"ES_exact_{part}", method, RAW, dataset, model)


def calibrated(
    f: pd.DataFrame, method: str, part: str, dataset: str = SMALL, model: str = MINI, tau="0.9"
) -> pd.Series:
    return cell(f, f"ES_exact_{part}", method, f"calibration=UWC tau={tau}", dataset, model)


def of_methods(found: dict[str, pd.Series], how: str) -> pd.Series:
    """The least or largest over methods, seed by seed; empty unless all were measured."""
    table = pd.DataFrame(found).dropna()
    return getattr(table, how)(axis=1) if len(table) and all(len(v) for v in found.values()) else pd.Series(dtype=float)


@dataclasses.dataclass(frozen=True)
class World:
    """Where claims A to E are judged: data set, model, and the methods that were run there."""

    dataset: str
    model: str
    methods: tuple[str, ...]
    holders: tuple[str, ...]
    """Of these the methods with a retain term, which are said to do better once all are calibrated."""
    jump: float
    """Claim E: most that ES may change in a step of the grid (0.05 in the demo, 0.125 at scale real)."""

    def raw(self, f: pd.DataFrame, method: str, part: str) -> pd.Series:
        return raw(f, method, part, self.dataset, self.model)

    def calibrated(self, f: pd.DataFrame, method: str, part: str) -> pd.Series:
        return calibrated(f, method, part, self.dataset, self.model)

    def of(self, f: pd.DataFrame, metric: str, method: str, calibration: str = UWC) -> pd.Series:
        return cell(f, metric, method, calibration, self.dataset, self.model)

    def memorised(self, f: pd.DataFrame) -> list[Difference]:
        parts = {"retain": "retain", "forget": "unlearn"}
        return [Difference(f"ES, {name}", self.raw(f, "Original", p), above=0.8, digits=3) for name, p in parts.items()]

    def excessive(self, f: pd.DataFrame) -> list[Difference]:
        left = paired(self.raw(f, "GA", "retain"), 0.5 * self.raw(f, "Original", "retain"))
        return [
            Difference("GA: ES, forget", self.raw(f, "GA", "unlearn"), above=None, below=0.05, digits=3),
            Difference("ES, retain, GA - half of the original's", left, above=None, below=0.0, digits=3),
        ]

    def aligned(self, f: pd.DataFrame) -> list[Difference]:
        gaps = {m: paired(self.calibrated(f, m, "retain"), self.of(f, "bar_exact", m)) for m in self.methods}
        alpha = {m: self.of(f, "alpha_exact", m) for m in ("GA", *self.holders)}
        higher = of_methods({m: alpha[m] for m in self.holders}, "max")
        return [
            Difference("least distance of a method from the bar", of_methods(gaps, "min"), above=-0.01, digits=3),
            Difference(f"alpha*, {larger(self.holders)} - GA", paired(higher, alpha["GA"])),
        ]

    def turned(self, f: pd.DataFrame) -> list[Difference]:
        after = {m: self.calibrated(f, m, "unlearn") for m in self.methods}
        before = {m: self.raw(f, m, "unlearn") for m in self.methods}
        best = of_methods({m: after[m] for m in self.holders}, "min")
        others = of_methods({m: v for m, v in before.items() if m != "GA"}, "min")
        first = paired(before["GA"], others)
        rest = [m for m in ("GA", "PO") if m in self.methods]
        return [
            Difference("before: ES, forget, GA - the least of the others", first, None, 0.02, digits=3),
            *(
                Difference(f"after: {m} - {lower(self.holders)}", paired(after[m], best), above=0.1, digits=3)
                for m in rest
            ),
        ]

    def smooth(self, f: pd.DataFrame) -> list[Difference]:
        out = []
        for m in ("GA", "NPO"):
            for part in ("retain", "unlearn"):
                rho, jump = (self.of(f, f"{k}_exact_{part}", m, RAW) for k in ("spearman", "jump"))
                out += [
                    Difference(f"{m}, {part}: rank correlation", rho, above=None, below=-0.9),
                    Difference("largest jump", jump, above=None, below=self.jump),
                ]
        return out


def larger(names: tuple[str, ...]) -> str:
    return f"the larger of {' and '.join(names)}" if len(names) > 1 else names[0]


def lower(names: tuple[str, ...]) -> str:
    return f"the lower of {' and '.join(names)}" if len(names) > 1 else names[0]


DEMO = World(SMALL, MINI, METHODS, ("GD", "KL"), 0.35)
REAL = World("TOFU forget05", "model=SmolLM2-135M", ("GA", "GD", "NPO"), ("GD",), 0.5)
SLOW = "GA at a lower rate"


def rate(f: pd.DataFrame) -> list[Difference]:
    """Does a lower learning rate of GA do what calibration does? On seed 100 GA kept 0.863 at 1e-4, just below the bar
    of 0.891; the lower rate is therefore 9e-5."""
    left = paired(REAL.raw(f, SLOW, "unlearn"), REAL.calibrated(f, "GA", "unlearn"))
    kept = paired(REAL.raw(f, SLOW, "retain"), REAL.of(f, "bar_exact", "GA"))
    beside = f" (its retention is {kept.mean():+.3f} from the bar)" if len(kept) else ""
    return [Difference(f"ES, forget, lower rate - calibrated{beside}", left, digits=3)]


def gold(f: pd.DataFrame) -> list[Difference]:
    """How near the calibrated models come to one that never saw the forget set."""
    never = REAL.raw(f, "Retrained", "unlearn").mean()  # one model: NaN where there is none
    gaps = {m: (REAL.calibrated(f, m, "unlearn") - never).dropna() for m in REAL.methods}
    beside = ", ".join(f"{m} {v.mean():+.3f}" for m, v in gaps.items() if len(v))
    name = f"ES, forget, the best calibrated method - retrained ({beside})"
    return [Difference(name, of_methods(gaps, "min"), above=None, below=0.1, digits=3)]


def study_mean(f: pd.DataFrame, metric: str) -> pd.Series:
    """Mean PCC over attacks and parts, one a seed; only with all of them."""
    parts = [(k, p) for k in ATTACKS for p in ("retain", "unlearn")]
    where = {"table": "study", "method": metric, "dataset": "miniature"}
    found = {(k, p): values(f, f"PCC_{p}", setting=f"attack={k},{MINI}", **where) for k, p in parts}
    return of_methods(found, "mean")


def reliable(f: pd.DataFrame) -> Difference:
    es, others = study_mean(f, "ES"), {m: study_mean(f, m) for m in ("PPL", "logPPL", "EM", "ROUGE-L")}
    beside = ", ".join(f"{m} {v.mean():.3f}" for m, v in others.items() if len(v))
    name = f"mean PCC, ES - PPL (ES {es.mean():.3f}; {beside})" if len(es) else "mean PCC, ES - PPL"
    return Difference(name, paired(es, others["PPL"]), digits=3)


# ----------------------------------------------------------------------------------------------------------- the paper

Check = Callable[[pd.DataFrame], list[Difference]]


def order(model: str, wanted: tuple[str, ...]) -> Check:
    """Each method leaves more of the forget set than the one before it."""

    def check(f: pd.DataFrame) -> list[Difference]:
        t = {m: calibrated(f, m, "unlearn", "TOFU forget05", f"model={model}") for m in wanted}
        steps = zip(wanted, wanted[1:], strict=False)
        return [Difference(f"{b} - {a}", paired(t[b], t[a]), digits=3) for a, b in steps]

    return check


def not_comparable(model: str) -> Check:
    def check(f: pd.DataFrame) -> list[Difference]:
        ga, npo = (
            {p: raw(f, m, p, "TOFU forget05", f"model={model}") for p in ("retain", "unlearn")} for m in ("GA", "NPO")
        )
        return [Difference(f"NPO - GA, {p}", paired(npo[p], ga[p]), digits=3) for p in ga]

    return check


def smaller_bar(model: str) -> Check:
    def check(f: pd.DataFrame) -> list[Difference]:
        out = []
        for m in ("GA", "GD", "KL"):
            low, high = (calibrated(f, m, "unlearn", "TOFU forget05", f"model={model}", t) for t in ("0.4", "0.9"))
            out.append(Difference(f"{m}, tau 0.9 - 0.4", paired(high, low), digits=3))
        return out

    return check


CLAIMS = [
    Claim("A", "the original model has memorised both sets: ES at least 0.8", "premise", "demo", DEMO.memorised),
    Claim(
        "B",
        "GA unlearns to excess: ES at most 0.05 on the forget set and half of the original's on the retain set",
        "figure 1",
        "demo",
        DEMO.excessive,
    ),
    Claim(
        "C",
        "after calibration every method keeps 0.9 of the original retention (to 0.01), and alpha* of GA is below "
        "the larger of GD's and KL's",
        "section 5",
        "demo",
        DEMO.aligned,
    ),
    Claim(
        "D",
        "calibration turns the order: before it no method removes 0.02 more than GA; after it GD or KL removes "
        "more than GA and PO, by 0.1 or more",
        "reply table, tau 0.9",
        "demo",
        DEMO.turned,
    ),
    Claim(
        "E",
        "control is smooth: ES falls with alpha (rank correlation at most -0.9, steps of 0.05 change ES by at "
        "most 0.35) for GA and NPO",
        "figure 3",
        "demo",
        DEMO.smooth,
    ),
    Claim(
        "F",
        "ES keeps the order of models under attacks at least as well as PPL: mean PCC",
        "figure 2",
        "demo",
        reliable,
    ),
    Claim("RA", "SmolLM2-135M, TOFU: the original has memorised both sets", "premise", "real", REAL.memorised),
    Claim("RB", "SmolLM2-135M, TOFU: GA unlearns to excess, as in B", "figure 1", "real", REAL.excessive),
    Claim(
        "RC",
        "SmolLM2-135M, TOFU: after calibration GA, GD and NPO keep 0.9 of the original retention (to 0.01), and alpha* "
        "of GA is below that of GD",
        "section 5",
        "real",
        REAL.aligned,
    ),
    Claim(
        "RD",
        "SmolLM2-135M, TOFU: calibration turns the order: before it neither GD nor NPO removes 0.02 more than GA; "
        "after it GD removes more than GA, by 0.1 or more",
        "reply table, tau 0.9",
        "real",
        REAL.turned,
    ),
    Claim(
        "RE",
        "SmolLM2-135M, TOFU: control is smooth: rank correlations at most -0.9, steps of 0.125 change ES by at "
        "most 0.5, for GA and NPO",
        "figure 3",
        "real",
        REAL.smooth,
    ),
    Claim(
        "RL",
        "a lower learning rate does not do what calibration does: GA at a rate chosen to keep the bar by itself "
        "leaves more of the forget set than GA calibrated to it",
        "section 5",
        "real",
        rate,
        control=True,
        explanation="only mixing compares methods at equal retention without losing removal",
    ),
    Claim(
        "RG",
        "the best calibrated method comes within 0.1 of the ES that a model has which never saw the forget set",
        "none",
        "real",
        gold,
        control=True,
        explanation="calibrated unlearning removes what was to be forgotten",
    ),
    Claim(
        "P1",
        "Phi-1.5: uncalibrated rows cannot be compared: GA removes more than NPO, NPO keeps more than GA",
        "figure 1",
        "paper",
        not_comparable("Phi-1.5"),
    ),
    Claim("P2", "Llama-2-7B: the same", "figure 1", "paper", not_comparable("Llama-2-7B-chat")),
    Claim(
        "P3",
        "Phi-1.5, tau 0.9: ES on the forget set grows in the order GA, KL, GD, NPO, PO, RMU",
        "reply table",
        "paper",
        order("Phi-1.5", ("GA", "KL", "GD", "NPO", "PO", "RMU")),
    ),
    Claim(
        "P4",
        "Llama-2-7B, tau 0.9: ES on the forget set grows in the order KL, NPO, GD, RMU, PO, GA",
        "reply table",
        "paper",
        order("Llama-2-7B-chat", ("KL", "NPO", "GD", "RMU", "PO", "GA")),
    ),
    Claim(
        "P5", "Phi-1.5: a smaller bar lets GA, GD and KL remove more", "reply tables", "paper", smaller_bar("Phi-1.5")
    ),
    Claim("P6", "Llama-2-7B: the same", "reply tables", "paper", smaller_bar("Llama-2-7B-chat")),
]


def bottom_line(frames: dict[str, pd.DataFrame]) -> list[str]:
    """What gradient ascent leaves of the rest before and after calibration, and of what it should forget."""
    return on_a_real_model(frames.get("real", pd.DataFrame())) + on_a_small_one(frames.get("demo", pd.DataFrame()))


def on_a_real_model(f: pd.DataFrame) -> list[str]:
    if not len(f):
        return []
    lost, kept = (REAL.raw(f, "GA", p) for p in ("unlearn", "retain"))
    after = {m: REAL.calibrated(f, m, "unlearn") for m in REAL.methods}
    held = REAL.calibrated(f, "GA", "retain")
    never = {p: REAL.raw(f, "Retrained", p) for p in ("unlearn", "retain")}
    if not all(map(len, (lost, kept, held, *after.values(), *never.values()))):
        return []
    left = ", ".join(f"{m} {v.mean():.2f}" for m, v in after.items())
    slow = {p: REAL.raw(f, SLOW, p) for p in ("unlearn", "retain")}
    alone = ""
    if all(map(len, slow.values())):
        alone = (
            f"; GA at a lower rate leaves {slow['unlearn'].mean():.2f} at a retention of {slow['retain'].mean():.2f} "
        )
        alone += "without any mixing"
    return [
        f"On SmolLM2-135M and TOFU gradient ascent lowers the extraction strength of a forgotten author to "
        f"{lost.mean():.2f} and of all the others to {kept.mean():.2f}; mixed back to nine tenths of the original's "
        f"retention ({held.mean():.2f}) it still leaves {after['GA'].mean():.2f} of the author.",
        f"Calibrated to that bar the methods leave {left} of the author{alone}.",
        f"A model that never saw the author has {never['unlearn'].mean():.2f} there, {never['retain'].mean():.2f} on "
        "the others.",
    ]


def on_a_small_one(f: pd.DataFrame) -> list[str]:
    if not len(f):
        return []
    kept = raw(f, "GA", "retain"), calibrated(f, "GA", "retain")
    left = raw(f, "GA", "unlearn"), calibrated(f, "GA", "unlearn")
    if not all(map(len, (*kept, *left))):
        return []
    return [
        f"On a small language model and generated authors gradient ascent lowers the extraction strength of what it "
        f"shall forget to {left[0].mean():.2f} and of all the rest to {kept[0].mean():.2f}; calibrated to keep nine "
        f"tenths of the rest ({kept[1].mean():.2f}) it leaves {left[1].mean():.2f} of what it shall forget."
    ]
