"""The paper's claims as inequalities over measured metrics, tau = 0.9.

Those of scale demo are the specification of the small default, looked at once on five seeds that are not shown and then
fixed; those of scale paper are the orderings that the printed tables show.
"""

from lab.claims import Claim

import pandas as pd

ATTACKS = ("jail-breaking", "embedding probing", "relearning", "token noising")
METHODS = ("GA", "GD", "KL", "PO", "NPO", "RMU")
MINI = "model=mini Llama"
Verdict = tuple[bool | None, str]


def mean(f: pd.DataFrame, metric: str, method: str, setting: str, dataset: str, table: str = "main") -> float:
    """Mean over seeds, NaN when there is no record."""
    rows = f[(f["metric"] == metric) & (f["method"] == method) & (f["setting"] == setting)]
    rows = rows[(rows["dataset"] == dataset) & (rows["table"] == table)]
    return rows["value"].mean() if len(rows) else float("nan")


def judge(holds: bool, *values: float, text: str) -> Verdict:
    """`holds`, unless one of the numbers was not measured."""
    return (None, "") if any(v != v for v in values) else (bool(holds), text)


SMALL = "miniature forget-small"


def raw(f, method: str, part: str, dataset: str = SMALL, model: str = MINI) -> float:
    return mean(f, f"ES_exact_{part}", method, f"calibration=none,{model}", dataset)


def calibrated(f, method: str, part: str, dataset: str = SMALL, model: str = MINI, tau: str = "0.9") -> float:
    return mean(f, f"ES_exact_{part}", method, f"calibration=UWC tau={tau},{model}", dataset)


def alpha(f, method: str) -> float:
    return mean(f, "alpha_exact", method, f"calibration=UWC tau=0.9,{MINI}", SMALL)


def memorised(f: pd.DataFrame) -> Verdict:
    r, t = (raw(f, "Original", part) for part in ("retain", "unlearn"))
    return judge(r >= 0.8 and t >= 0.8, r, t, text=f"retain {r:.3f}, forget {t:.3f}")


def excessive(f: pd.DataFrame) -> Verdict:
    t, r, ref = raw(f, "GA", "unlearn"), raw(f, "GA", "retain"), raw(f, "Original", "retain")
    text = f"GA: forget {t:.3f}, retain {r:.3f} of {ref:.3f}"
    return judge(t <= 0.05 and r <= 0.5 * ref, t, r, ref, text=text)


def aligned(f: pd.DataFrame) -> Verdict:
    """Every method and seed by itself, not the mean: that is what calibration promises."""
    here = f[(f["setting"] == f"calibration=UWC tau=0.9,{MINI}") & (f["dataset"] == SMALL) & (f["table"] == "main")]
    kept, bar = (here[here["metric"] == m] for m in ("ES_exact_retain", "bar_exact"))
    if not set(METHODS) <= set(kept["method"]):
        return None, ""
    both = kept.merge(bar, on=["method", "seed"])
    low = (both["value_x"] - both["value_y"]).min()
    a = {m: alpha(f, m) for m in ("GA", "GD", "KL")}
    holds = low >= -1e-9 and a["GA"] < max(a["GD"], a["KL"])
    text = f"least distance from the bar {low:+.3f}; alpha* " + ", ".join(f"{m} {v:.2f}" for m, v in a.items())
    return judge(holds, *a.values(), text=text)


def turned(f: pd.DataFrame) -> Verdict:
    t = {m: calibrated(f, m, "unlearn") for m in METHODS}
    before = {m: raw(f, m, "unlearn") for m in METHODS}
    best = min(t["GD"], t["KL"])
    first = before["GA"] <= min(before.values())
    text = (
        f"forget after: best of GD, KL {best:.3f}, GA {t['GA']:.3f}, PO {t['PO']:.3f}; before: GA {before['GA']:.3f}, "
    )
    text += f"least of the others {min(v for m, v in before.items() if m != 'GA'):.3f}"
    holds = best <= t["GA"] - 0.1 and best <= t["PO"] - 0.1 and first
    return judge(holds, *t.values(), *before.values(), text=text)


def smooth(f: pd.DataFrame) -> Verdict:
    setting, values, text = f"calibration=none,{MINI}", [], []
    for m in ("GA", "NPO"):
        rho = [mean(f, f"spearman_exact_{part}", m, setting, SMALL) for part in ("retain", "unlearn")]
        jump = [mean(f, f"jump_exact_{part}", m, setting, SMALL) for part in ("retain", "unlearn")]
        values += [*(r <= -0.9 for r in rho), *(j <= 0.35 for j in jump)]
        if any(v != v for v in (*rho, *jump)):
            return None, ""
        text.append(f"{m}: rank correlation {rho[0]:.2f}, {rho[1]:.2f}, largest jump {jump[0]:.2f}, {jump[1]:.2f}")
    return all(values), "; ".join(text)


def study_mean(f: pd.DataFrame, metric: str) -> float:
    """Mean PCC over attacks, parts and seeds; NaN when one is missing."""
    found = []
    for kind in ATTACKS:
        for part in ("retain", "unlearn"):
            found.append(mean(f, f"PCC_{part}", metric, f"attack={kind},{MINI}", "miniature"))
    return sum(found) / len(found)


def reliable(f: pd.DataFrame) -> Verdict:
    es, ppl, log, em, rouge = (study_mean(f, m) for m in ("ES", "PPL", "logPPL", "EM", "ROUGE-L"))
    text = f"ES {es:.3f}, PPL {ppl:.3f}; beside them log PPL {log:.3f}, EM {em:.3f}, ROUGE-L {rouge:.3f}"
    return judge(es >= ppl, es, ppl, text=text)


# ----------------------------------------------------------------------------------------------------------- the paper


def order(model: str, wanted: tuple[str, ...]):
    def check(f: pd.DataFrame) -> Verdict:
        t = {m: calibrated(f, m, "unlearn", "TOFU forget05", f"model={model}") for m in wanted}
        text = ", ".join(f"{m} {v:.3f}" for m, v in t.items())
        return judge(list(t.values()) == sorted(t.values()), *t.values(), text=text)

    return check


def not_comparable(model: str):
    def check(f: pd.DataFrame) -> Verdict:
        place = ("TOFU forget05", f"model={model}")
        ga = [raw(f, "GA", part, *place) for part in ("retain", "unlearn")]
        npo = [raw(f, "NPO", part, *place) for part in ("retain", "unlearn")]
        text = f"GA: retain {ga[0]:.3f}, forget {ga[1]:.3f}; NPO: {npo[0]:.3f}, {npo[1]:.3f}"
        return judge(ga[1] <= npo[1] and npo[0] >= ga[0], *ga, *npo, text=text)

    return check


def smaller_bar(model: str):
    def check(f: pd.DataFrame) -> Verdict:
        pairs = {m: [calibrated(f, m, "unlearn", "TOFU forget05", f"model={model}", t) for t in ("0.4", "0.9")]
                 for m in ("GA", "GD", "KL")}  # fmt: skip
        text = ", ".join(f"{m} {a:.3f} at 0.4, {b:.3f} at 0.9" for m, (a, b) in pairs.items())
        values = [v for pair in pairs.values() for v in pair]
        return judge(all(a < b for a, b in pairs.values()), *values, text=text)

    return check


CLAIMS = [
    Claim("A", "the original model has memorised both sets: ES at least 0.8", "premise", "demo", memorised),
    Claim("B", "GA unlearns to excess: ES at most 0.05 on the forget set and half of the original's on the retain set",
          "figure 1", "demo", excessive),
    Claim("C", "after calibration every method keeps 0.9 of the original retention, and alpha* of GA is below that of "
          "GD or KL", "section 5", "demo", aligned),
    Claim("D", "calibration turns the order: GA removes most before it; after it GD or KL removes more than GA and PO, "
          "by 0.1 or more", "reply table, tau 0.9", "demo", turned),
    Claim("E", "control is smooth: ES falls with alpha (rank correlation at most -0.9, steps of 0.05 change ES by at "
          "most 0.35) for GA and NPO", "figure 3", "demo", smooth),
    Claim("F", "ES keeps the order of models under attacks at least as well as PPL: mean PCC", "figure 2", "demo",
          reliable),
    Claim("P1", "Phi-1.5: uncalibrated rows cannot be compared: GA removes more than NPO, NPO keeps more than GA",
          "figure 1", "paper", not_comparable("Phi-1.5")),
    Claim("P2", "Llama-2-7B: the same", "figure 1", "paper", not_comparable("Llama-2-7B-chat")),
    Claim("P3", "Phi-1.5, tau 0.9: ES on the forget set grows in the order GA, KL, GD, NPO, PO, RMU", "reply table",
          "paper", order("Phi-1.5", ("GA", "KL", "GD", "NPO", "PO", "RMU"))),
    Claim("P4", "Llama-2-7B, tau 0.9: ES on the forget set grows in the order KL, NPO, GD, RMU, PO, GA", "reply table",
          "paper", order("Llama-2-7B-chat", ("KL", "NPO", "GD", "RMU", "PO", "GA"))),
    Claim("P5", "Phi-1.5: a smaller bar lets GA, GD and KL remove more", "reply tables", "paper",
          smaller_bar("Phi-1.5")),
    Claim("P6", "Llama-2-7B: the same", "reply tables", "paper", smaller_bar("Llama-2-7B-chat")),
]  # fmt: skip
