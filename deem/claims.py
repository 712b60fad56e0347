"""The paper's claims as measured differences; how a verdict is made stands in lab/claims.py.

Those of scale demo are the specification of the digit scenes, looked at on seeds that are not shown and then fixed;
those of scale paper are what the printed tables show.
"""

from lab.claims import FAILS, HOLDS, UNDECIDED, Claim, Difference, interval, paired, values

import pandas as pd

DEEM, CLEAN, BASE, BOTH = "DEEM", "DEEM without CSR", "DEEM* (baseline)", "DEEM + MM-Interleaved"
SETS = ("RobustVQA-A", "RobustVQA-R", "RobustVQA-V", "POPE-Random", "POPE-Popular", "POPE-Adversarial")
GROUPS = ("POPE", "RobustVQA")


# ---------------------------------------------------------------------------------------------------- the digit scenes


def digits(f: pd.DataFrame, metric: str, method: str, setting: str = "stage 1") -> pd.Series:
    return values(f, metric, table="digits", method=method, setting=setting)


def gap(f: pd.DataFrame, metric: str, other: str, setting: str = "stage 1") -> pd.Series:
    """DEEM minus another variant, seed by seed."""
    return paired(digits(f, metric, DEEM, setting), digits(f, metric, other, setting))


def feedback(f: pd.DataFrame) -> list[Difference]:
    ratio = {m: digits(f, "csr_ratio", m) for m in (DEEM, CLEAN)}
    return [
        Difference("own / other's tokens, DEEM", ratio[DEEM], above=None, below=0.9, digits=3),
        Difference("without CSR", ratio[CLEAN], above=0.97, digits=3),
    ]


def details(f: pd.DataFrame) -> Difference:
    return Difference("DEEM - without CSR, probe", gap(f, "probe_uncaptioned", CLEAN), above=5, unit="points")


def answers(setting: str, other: str):
    """DEEM answers both tiny benchmarks better than another variant."""

    def check(f: pd.DataFrame) -> list[Difference]:
        gaps = {name: gap(f, f"{name}_accuracy", other, setting) for name in GROUPS}
        return [Difference(f"DEEM - {other}, {name}", v, unit="points", digits=1) for name, v in gaps.items()]

    return check


def cost(f: pd.DataFrame) -> Difference:
    ratio = values(f, "step_ratio", table="cost")
    return Difference("with / without CSR (printed: 9.25 / 8.11 = 1.14)", ratio, above=1.0, below=1.6)


def always_yes(f: pd.DataFrame) -> Difference:
    lists = f[f["metric"].str.endswith("_always_yes")]
    off = (lists["value"] - 50).abs().groupby(lists["seed"]).max()
    name = f"largest distance from 50 % over {len(lists)} lists"
    return Difference(name, off, above=None, below=0.01, unit="points")


# ----------------------------------------------------------------------------------------------------------- the paper


def printed_order(better: str, worse: str):
    """`better` is ahead of `worse` in the mean of RobustVQA's three lists and in that of POPE's."""

    def mean(f: pd.DataFrame, method: str, group: str) -> pd.Series:
        sets = [s for s in SETS if s.startswith(group)]
        each = {s: values(f, "accuracy", table="main", method=method, dataset=s) for s in sets}
        return pd.DataFrame(each).dropna().mean(axis=1)  # seeds that have all three

    def check(f: pd.DataFrame) -> list[Difference]:
        gaps = {name: paired(mean(f, better, name), mean(f, worse, name)) for name in GROUPS}
        return [Difference(f"{better} - {worse}, {name}", v, unit="points", digits=1) for name, v in gaps.items()]

    return check


# --------------------------------------------------------------------------------------------------------- the finding


ANSWERS = {HOLDS: "the answers get better", FAILS: "the answers do not get better"}


def bottom_line(frames: dict[str, pd.DataFrame]) -> list[str]:
    """What CSR does to the image tokens of the digit scenes, and whether the answers follow."""
    f = frames.get("demo", pd.DataFrame())
    if not len(f) or not len(gap(f, "POPE_accuracy", CLEAN, "stage 2")):
        return []

    def told(metric: str, other: str, setting: str = "stage 1") -> str:
        mean, half = interval(gap(f, metric, other, setting))
        return f"{mean:+.1f} ± {half:.1f}"

    own, other = (digits(f, "csr_ratio", m).mean() for m in (DEEM, CLEAN))
    seen = all(d.verdict() == HOLDS for d in (*feedback(f), details(f)))
    after = [d.verdict() for m in (BASE, CLEAN) for d in answers("stage 2", m)(f)]
    word = FAILS if FAILS in after else HOLDS if set(after) == {HOLDS} else UNDECIDED
    return [
        f"On digit scenes CSR {'works' if seen else 'does not clearly work'} on the image tokens as the paper says (a "
        f"scene's own tokens bring its denoising error to {own:.2f} of that with another's, without CSR {other:.2f}; a "
        f"linear probe finds {told('probe_uncaptioned', CLEAN)} points more of the digits that no caption names).",
        f"After instruction tuning {ANSWERS.get(word, 'it is undecided whether the answers get better')}: tiny-POPE "
        f"{told('POPE_accuracy', CLEAN, 'stage 2')} points against the same training without CSR, "
        f"{told('POPE_accuracy', BASE, 'stage 2')} against DEEM*.",
    ]


CLAIMS = [
    Claim(
        *(
            "1",
            "CSR works as feedback: on held-out scenes the denoising error with a scene's own tokens is below 0.9 "
            "of that with another scene's tokens, and above 0.97 without CSR",
            "section 3, Eq. 5",
            "demo",
            feedback,
        ),
    ),
    Claim(
        *(
            "2",
            "details survive: a linear probe finds digits that no caption names in the tokens of DEEM, at least 5 "
            "points more often than without CSR",
            "section 1",
            "demo",
            details,
        ),
    ),
    Claim(
        *(
            "3",
            "less hallucination, more robustness: mean tiny-POPE and mean tiny-RobustVQA accuracy of DEEM exceed "
            "those of DEEM*",
            "tables 1, 3, 10",
            "demo",
            answers("stage 1", BASE),
        ),
    ),
    Claim("3b", "the same after instruction tuning", "table 3", "demo", answers("stage 2", BASE)),
    Claim(
        *("3c", "the gain is CSR's: both accuracies of DEEM exceed those of the same training without CSR"),
        *("not in the paper", "demo", answers("stage 1", CLEAN)),
        control=True,
        explanation="The diffusion model's feedback corrects what the encoder sees",
    ),
    Claim(
        *("3d", "the same after instruction tuning", "not in the paper", "demo", answers("stage 2", CLEAN)),
        control=True,
        explanation="The diffusion model's feedback corrects what the encoder sees",
    ),
    Claim("4", "a training step with CSR costs 1.0 to 1.6 times one without", "table 3", "demo", cost, timed=True),
    Claim("5", "always answering yes scores exactly 50 % on every balanced list", "section 4", "demo", always_yes),
    Claim("P1", "DEEM is ahead of DEEM* in RobustVQA and POPE", "tables 1, 3, 10", "paper", printed_order(DEEM, BASE)),
    Claim("P2", "freezing the U-Net is better than training it too", "table 10", "paper", printed_order(DEEM, BOTH)),
    Claim("P3", "CSR helps LLaVA", "table 5", "paper", printed_order("LLaVA + CSR", "LLaVA")),
    Claim("P4", "after instruction tuning CSR still helps", "table 3", "paper", printed_order("DEEM-VQA", "DEEM*-VQA")),
    Claim(
        *("P5", "the gain is CSR's: DEEM is ahead of the same training without CSR", "not in the paper", "paper"),
        printed_order(DEEM, CLEAN),
        control=True,
        explanation="The diffusion model's feedback corrects what the encoder sees",
    ),
]
