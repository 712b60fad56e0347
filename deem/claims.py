"""The paper's claims as measured differences; how a verdict is made stands in lab/claims.py.

Those of scale demo are the specification of the digit scenes, looked at on seeds that are not shown and then fixed;
those of scale real ask the same of the photo scenes; those of scale paper are what the printed tables show.
"""

from lab.claims import FAILS, HOLDS, UNDECIDED, Claim, Difference, interval, paired, values

import pandas as pd

DEEM, CLEAN, BASE, BOTH = "DEEM", "DEEM without CSR", "DEEM* (baseline)", "DEEM + MM-Interleaved"
SETS = ("RobustVQA-A", "RobustVQA-R", "RobustVQA-V", "POPE-Random", "POPE-Popular", "POPE-Adversarial")
GROUPS = ("POPE", "RobustVQA")


# ---------------------------------------------------------------------------------------------------------- the scenes


def scenes(f: pd.DataFrame, metric: str, method: str, setting: str = "stage 2") -> pd.Series:
    """The values of a scale, which has scenes of one kind: digits (demo) or photographs (real)."""
    table = "photos" if (f["table"] == "photos").any() else "digits"
    return values(f, metric, table=table, method=method, setting=setting)


def gap(f: pd.DataFrame, metric: str, other: str, setting: str = "stage 2") -> pd.Series:
    """DEEM minus another variant, seed by seed."""
    return paired(scenes(f, metric, DEEM, setting), scenes(f, metric, other, setting))


def sees(f: pd.DataFrame) -> list[Difference]:
    """Before answers are compared: the language model reads, and looks at pictures when instruction tuning begins."""
    read = Difference(
        "answers with the listing as text", scenes(f, "text_accuracy", DEEM, "stage 1"), above=95, unit="%"
    )
    gains = {m: scenes(f, "caption_gain", m, "stage 1") for m in (DEEM, CLEAN, BASE)}
    return [read, *(Difference(f"{m}, caption above the guess", v, unit="points") for m, v in gains.items())]


def feedback(f: pd.DataFrame) -> list[Difference]:
    ratio = {m: scenes(f, "csr_ratio", m, "stage 1") for m in (DEEM, CLEAN)}
    return [
        Difference("own / other's tokens, DEEM", ratio[DEEM], above=None, below=0.9, digits=3),
        Difference("without CSR", ratio[CLEAN], above=0.97, digits=3),
    ]


def details(f: pd.DataFrame) -> Difference:
    more = gap(f, "probe_uncaptioned", CLEAN, "stage 1")
    return Difference("DEEM - without CSR, probe", more, above=5, unit="points")


def better(metrics: dict[str, str], other: str):
    """DEEM answers better than another variant after instruction tuning."""

    def check(f: pd.DataFrame) -> list[Difference]:
        gaps = {name: gap(f, metric, other) for name, metric in metrics.items()}
        return [Difference(f"DEEM - {other}, {name}", v, unit="points", digits=1) for name, v in gaps.items()]

    return check


POPE = {"tiny-POPE": "POPE_accuracy"}
MMVP = {"tiny-MMVP, pairs": "MMVP_accuracy", "single questions": "MMVP_single_accuracy"}


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


WORDS = {HOLDS: "more accurate", FAILS: "less accurate", UNDECIDED: "undecided"}


def bottom_line(frames: dict[str, pd.DataFrame]) -> list[str]:
    """What CSR does to the image tokens of the digit scenes, and whether the answers follow."""
    f = frames.get("demo", pd.DataFrame())
    if not len(f) or not len(gap(f, "POPE_accuracy", CLEAN)):
        return []

    def told(metric: str, other: str, setting: str = "stage 2") -> str:
        mean, half = interval(gap(f, metric, other, setting))
        return f"{mean:+.1f} ± {half:.1f}"

    def verdict(metrics: dict[str, str], other: str) -> str:
        found = {d.verdict() for d in better(metrics, other)(f)}
        return WORDS[FAILS if FAILS in found else HOLDS if found == {HOLDS} else UNDECIDED]

    own, other = (scenes(f, "csr_ratio", m, "stage 1").mean() for m in (DEEM, CLEAN))
    works = all(d.verdict() == HOLDS for d in (*feedback(f), details(f)))
    blind = [d.name.split(",")[0] for d in sees(f)[1:] if d.verdict() != HOLDS]
    seen = f"not shown to look at pictures: {', '.join(blind)}" if blind else "all three models look at their pictures"
    named = {"tiny-POPE": (POPE, "POPE_accuracy"), "tiny-MMVP": (MMVP, "MMVP_single_accuracy")}

    def answers(m: str) -> str:
        said = (f"{k} {verdict(metrics, m)} ({told(metric, m)} points)" for k, (metrics, metric) in named.items())
        return ", ".join(said)

    return [
        f"On digit scenes CSR {'works' if works else 'does not clearly work'} on the image tokens as the paper says (a "
        f"probe finds {told('probe_uncaptioned', CLEAN, 'stage 1')} points more of the digits that short captions "
        f"leave out); after instruction tuning, against the same training without CSR: {answers(CLEAN)}.",
        f"Against DEEM*: {answers(BASE)}; {seen}. A scene's own tokens bring its denoising error to {own:.2f} of that "
        f"with another's, without CSR {other:.2f}.",
    ]


FEEDBACK = "The diffusion model's feedback corrects what the encoder sees"


def on_scenes(scale: str, mark: str, thing: str) -> list[Claim]:
    """The claims about scenes of one kind; `thing` is what a caption names."""
    return [
        Claim(
            f"{mark}0",
            "the models see and read: with a listing as text the language model answers 95 % right, and with a picture "
            f"each of the three names the caption's {thing} more often than the most frequent {thing} would be right",
            "not in the paper",
            scale,
            sees,
            control=True,
            explanation="Answers are given out of the picture",
        ),
        Claim(
            f"{mark}1",
            "CSR works as feedback: on held-out scenes the denoising error with a scene's own tokens is below 0.9 "
            "of that with another scene's tokens, and above 0.97 without CSR",
            "section 3, Eq. 5",
            scale,
            feedback,
        ),
        Claim(
            f"{mark}2",
            f"details survive: a linear probe finds {thing}s that short captions leave out in the tokens of DEEM, at "
            "least 5 points more often than without CSR",
            "section 1",
            scale,
            details,
        ),
        Claim(
            *(f"{mark}3", "less hallucination: after instruction tuning DEEM is more accurate on tiny-POPE than DEEM*"),
            *("tables 1, 3, 10", scale, better(POPE, BASE)),
        ),
        Claim(
            f"{mark}3c",
            "the gain is CSR's: DEEM is more accurate on tiny-POPE than the same training without CSR",
            *("not in the paper", scale, better(POPE, CLEAN)),
            control=True,
            explanation=FEEDBACK,
        ),
        Claim(
            *(f"{mark}4", "finer perception: after instruction tuning DEEM is more accurate on tiny-MMVP than DEEM*"),
            *("tables 1, 5", scale, better(MMVP, BASE)),
        ),
        Claim(
            f"{mark}4c",
            "the gain is CSR's: DEEM is more accurate on tiny-MMVP than the same training without CSR",
            *("not in the paper", scale, better(MMVP, CLEAN)),
            control=True,
            explanation=FEEDBACK,
        ),
    ]


CLAIMS = [
    *on_scenes("real", "R", "photograph"),
    *on_scenes("demo", "", "digit"),
    Claim("5", "a training step with CSR costs 1.0 to 1.6 times one without", "table 3", "demo", cost, timed=True),
    Claim("6", "always answering yes scores exactly 50 % on every balanced list", "section 4", "demo", always_yes),
    Claim("P1", "DEEM is ahead of DEEM* in RobustVQA and POPE", "tables 1, 3, 10", "paper", printed_order(DEEM, BASE)),
    Claim("P2", "freezing the U-Net is better than training it too", "table 10", "paper", printed_order(DEEM, BOTH)),
    Claim("P3", "CSR helps LLaVA", "table 5", "paper", printed_order("LLaVA + CSR", "LLaVA")),
    Claim("P4", "after instruction tuning CSR still helps", "table 3", "paper", printed_order("DEEM-VQA", "DEEM*-VQA")),
    Claim(
        *("P5", "the gain is CSR's: DEEM is ahead of the same training without CSR", "not in the paper", "paper"),
        printed_order(DEEM, CLEAN),
        control=True,
        explanation=FEEDBACK,
    ),
]
