"""The paper's claims as inequalities over measured metrics.

Those of scale demo are the specification of the digit scenes, looked at on seeds that are not shown and then fixed;
those of scale paper are what the printed tables show.
"""

from lab.claims import Claim

import pandas as pd

Verdict = tuple[bool | None, str]
DEEM, CLEAN, BASE, BOTH = "DEEM", "DEEM without CSR", "DEEM* (baseline)", "DEEM + MM-Interleaved"
SETS = ("RobustVQA-A", "RobustVQA-R", "RobustVQA-V", "POPE-Random", "POPE-Popular", "POPE-Adversarial")


def values(f: pd.DataFrame, metric: str, method: str, setting: str = "stage 1", table: str = "digits") -> pd.Series:
    """The metric by seed; empty without records."""
    rows = f[(f["metric"] == metric) & (f["method"] == method) & (f["setting"] == setting) & (f["table"] == table)]
    return rows.set_index("seed")["value"].sort_index()


def gap(a: pd.Series, b: pd.Series) -> pd.Series:
    """a - b over the seeds that both have."""
    return (a - b).dropna()


def signed(v: pd.Series) -> str:
    return f"{v.mean():+.1f} ({', '.join(f'{x:+.1f}' for x in v)})"


def feedback(f: pd.DataFrame) -> Verdict:
    b, c = values(f, "csr_ratio", DEEM), values(f, "csr_ratio", CLEAN)
    if not len(b) or not len(c):
        return None, ""
    return bool(b.mean() < 0.9 and c.mean() > 0.97), f"DEEM {b.mean():.3f}, without CSR {c.mean():.3f}"


def details(f: pd.DataFrame) -> Verdict:
    b, c = values(f, "probe_uncaptioned", DEEM), values(f, "probe_uncaptioned", CLEAN)
    d = gap(b, c)
    if not len(d):
        return None, ""
    return bool(d.mean() >= 5), f"DEEM {b.mean():.1f} %, without CSR {c.mean():.1f} %; {signed(d)} points"


def answers(setting: str):
    def check(f: pd.DataFrame) -> Verdict:
        text, holds = [], []
        for name in ("POPE", "RobustVQA"):
            b, a, c = (values(f, f"{name}_accuracy", m, setting) for m in (DEEM, BASE, CLEAN))
            d = gap(b, a)
            if not len(d):
                return None, ""
            holds.append(d.mean() > 0)
            own = gap(b, c)
            text.append(f"{name}: DEEM {b.mean():.1f}, DEEM* {a.mean():.1f}; difference {signed(d)}"
                        + (f"; to DEEM without CSR {signed(own)}" if len(own) else ""))  # fmt: skip
        return all(holds), ". ".join(text)

    return check


def cost(table: str):
    def check(f: pd.DataFrame) -> Verdict:
        r = f[(f["metric"] == "step_ratio") & (f["table"] == table)]["value"]
        if not len(r):
            return None, ""
        return bool(1.0 <= r.mean() <= 1.6), f"{r.mean():.2f} (printed: 9.25 / 8.11 = 1.14)"

    return check


def always_yes(f: pd.DataFrame) -> Verdict:
    v = f[f["metric"].str.endswith("_always_yes")]["value"]
    if not len(v):
        return None, ""
    return bool((v == 50.0).all()), f"{len(v)} lists, from {v.min():.1f} to {v.max():.1f} %"


# ----------------------------------------------------------------------------------------------------------- the paper


def printed_order(better: str, worse: str):
    """`better` is ahead of `worse` in the mean of RobustVQA and in the mean of POPE."""

    def check(f: pd.DataFrame) -> Verdict:
        rows = f[(f["table"] == "main") & (f["metric"] == "accuracy")]
        means = {}
        for m in (better, worse):
            for name in ("RobustVQA", "POPE"):
                sets = [s for s in SETS if s.startswith(name)]
                own = rows[(rows["method"] == m) & rows["dataset"].isin(sets)]
                if set(own["dataset"]) != set(sets):
                    return None, ""
                means[m, name] = own["value"].mean()
        text = "; ".join(
            f"{n}: {better} {means[better, n]:.1f}, {worse} {means[worse, n]:.1f}" for n in ("RobustVQA", "POPE")
        )
        return all(means[better, n] > means[worse, n] for n in ("RobustVQA", "POPE")), text

    return check


CLAIMS = [
    Claim("1", "CSR works as feedback: on held-out scenes the denoising error with a scene's own tokens is below 0.9 "
          "of that with another scene's tokens, and above 0.97 without CSR", "section 3, Eq. 5", "demo", feedback),
    Claim("2", "details survive: a linear probe finds digits that no caption names in the tokens of DEEM, at least 5 "
          "points more often than without CSR", "section 1", "demo", details),
    Claim("3", "less hallucination, more robustness: mean tiny-POPE and mean tiny-RobustVQA accuracy of DEEM exceed "
          "those of DEEM*", "tables 1, 3, 10", "demo", answers("stage 1")),
    Claim("3b", "the same after instruction tuning", "table 3", "demo", answers("stage 2")),
    Claim("4", "a training step with CSR costs 1.0 to 1.6 times one without", "table 3", "demo", cost("cost")),
    Claim("5", "always answering yes scores exactly 50 % on every balanced list", "section 4", "demo", always_yes),
    Claim("P1", "DEEM is ahead of DEEM* in RobustVQA and POPE", "tables 1, 3, 10", "paper", printed_order(DEEM, BASE)),
    Claim("P2", "freezing the U-Net is better than training it too", "table 10", "paper", printed_order(DEEM, BOTH)),
    Claim("P3", "CSR helps LLaVA", "table 5", "paper", printed_order("LLaVA + CSR", "LLaVA")),
    Claim("P4", "after instruction tuning CSR still helps", "table 3", "paper", printed_order("DEEM-VQA", "DEEM*-VQA")),
    Claim("P5", "the gain is CSR's: DEEM is ahead of the same training without CSR (not in the paper)", "none", "paper",
          printed_order(DEEM, CLEAN)),
]  # fmt: skip
