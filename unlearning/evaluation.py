"""Scores, calibration and records of unlearned models: what training and evaluation both need."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats
from torch import Tensor

import control
import metrics
import study
from originals import Bench


def monotone(curve: dict[str, list[float]]) -> dict[str, float]:
    """Rank correlation of alpha with each ES and the largest jump between neighbouring alphas."""
    out = {}
    for key, values in curve.items():
        if key == "alpha":
            continue
        short = key.removeprefix("ES_")
        out[f"jump_{short}"] = float(np.abs(np.diff(values)).max())
        if np.ptp(values) > 0:
            out[f"spearman_{short}"] = float(stats.spearmanr(curve["alpha"], values).statistic)
    return out


def item_rows(sets: metrics.Sets, found: dict, alpha: dict[str, float], tau: float | None) -> list[dict]:
    """A line an item of each set: its question and its scores. alpha: {exact, perturb}."""
    out = []
    for (kind, part), s in found.items():
        for i, q in enumerate(sets.rows[part]):
            asked = q.question if kind == "exact" else q.paraphrased_question
            row = {"tau": tau, "alpha": alpha[kind], "questions": kind, "part": part, "item": i, "question": asked}
            row |= {"answer": q.answer, "es": s.es[i], "em": s.em[i], "nll": s.nll[i], "tokens": int(s.tokens[i])}
            out.append(row)
    return out


def at(mixer: control.Mixer, lm, sets: metrics.Sets, alpha: dict[str, float]) -> dict:
    """Scores with exact questions at alpha["exact"], with paraphrased ones at alpha["perturb"]."""
    if len(set(alpha.values())) == 1:
        mixer.set(alpha[control.KINDS[0]])
        return sets.scores(lm)
    found = {}
    for kind in control.KINDS:
        mixer.set(alpha[kind])
        found |= sets.scores(lm, [(kind, part) for part in study.PARTS])
    return found


class Calibrator:
    """The searches of one unlearned model. g(alpha) is the retain score of the mixture, apart for exact and paraphrased
    questions, and each point of it is evaluated once for all tau."""

    def __init__(self, mixer: control.Mixer, lm, sets: metrics.Sets, step: float = 0.05, tolerance: float = 1e-3):
        self.mixer, self.lm, self.sets, self.step, self.tolerance = mixer, lm, sets, step, tolerance
        self.curves = {kind: control.Curve(self.retain(kind)) for kind in control.KINDS}

    def retain(self, kind: str) -> Callable[[float], float]:
        def g(alpha: float) -> float:
            self.mixer.set(alpha)
            return self.sets.es(self.lm, kind, "retain")

        return g

    def know(self, curve: dict[str, list[float]]) -> None:
        """Take over the points of an alpha curve."""
        for kind in control.KINDS:
            known = {round(a, 9): v for a, v in zip(curve["alpha"], curve[f"ES_{kind}_retain"], strict=True)}
            self.curves[kind].known |= known

    def __call__(self, tau: float, how: control.Search, both: bool = False) -> tuple[dict, dict]:
        """-> (metrics of the record, scores of every item)."""
        found = {k: control.calibrate(c, tau, how, self.step, self.tolerance) for k, c in self.curves.items()}
        alpha = {k: c.alpha for k, c in found.items()}
        scores = at(self.mixer, self.lm, self.sets, alpha)
        out = metrics.four(scores) | {"tau": tau}
        for kind, c in found.items():
            out |= {f"alpha_{kind}": c.alpha, f"bar_{kind}": c.bar, f"vacuous_{kind}": int(c.vacuous)}
            if both:
                other: control.Search = "bisect" if how == "scan+bisect" else "scan+bisect"
                second = control.calibrate(self.curves[kind], tau, other, self.step, self.tolerance)
                out[f"alpha_{kind}_other"] = second.alpha
        return out, scores


def assess(b: Bench, split: str, tensors: dict[str, Tensor], retrained: metrics.Truth | None, full: list) -> tuple:
    """-> (metrics without calibration, {tau: metrics}, item lines) of one unlearned model."""
    s, sets = b.s, b.sets(split)
    mixer = control.Mixer(b.lm, b.original, tensors)
    mixer.set(1.0)
    scores = sets.scores(b.lm)
    found = metrics.four(scores) | {"alpha_exact": 1.0, "alpha_perturb": 1.0}
    lines = item_rows(sets, scores, dict.fromkeys(control.KINDS, 1.0), None)
    found |= summaries(b, split, retrained)
    curve = control.alpha_curve(mixer, b.lm, sets, s.alpha_step)
    found |= {f"curve_{k}": v for k, v in curve.items()} | monotone(curve)
    calibrated, search = {}, Calibrator(mixer, b.lm, sets, s.alpha_step, s.alpha_tolerance)
    search.know(curve)
    for tau in s.tau:
        clock = time.perf_counter()
        calibrated[tau], scores = search(tau, s.alpha_search, s.both_searches)
        calibrated[tau]["search_seconds"] = time.perf_counter() - clock
        alpha = {k: calibrated[tau][f"alpha_{k}"] for k in control.KINDS}
        lines += item_rows(sets, scores, alpha, tau)
    if s.attacks:
        mixer.set(1.0)
        own = {part: sets.items["exact", part] for part in study.PARTS}
        plain = study.measure(b.lm, b.chat, sets, own)
        found |= {f"study.{k}": v for k, v in plain.items()}
        for kind in s.attacks:
            mixer.set(1.0)  # relearning moved the weights
            after = study.attack(kind, b.lm, b.chat, sets, s, b.seed, full, plain)
            found |= {f"study.{k}@{kind}": v for k, v in after.items()}
    return found, calibrated, lines


def summaries(b: Bench, split: str, retrained: metrics.Truth | None) -> dict[str, float]:
    """Model utility and forget quality of the present weights, where they are asked for."""
    out: dict[str, float] = {}
    if b.s.utility:
        out["model_utility"], nine = metrics.utility_of(b.lm, b.chat, b.corpus, b.device, b.s.max_length)
        out |= {f"utility.{k}": v for k, v in nine.items()}
    if b.s.utility or retrained is not None:
        truth = metrics.truth(b.lm, b.chat, b.corpus.forget[split], b.device, b.s.max_length)
        out["forget_truth_ratio"] = float(truth.balanced.mean())
        if retrained is not None:
            out["forget_quality"] = metrics.forget_quality(truth, retrained)
    return out


def show(records: list[dict]) -> None:
    """A line a data set, setting and method: means over seeds of alpha and the four ES."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for r in records:
        if "ES_exact_retain" in r["metrics"]:
            groups.setdefault((r["dataset"], r["setting"], r["method"]), []).append(r["metrics"])
    last, rank = None, {"Original": -2, "Retrained": -1}
    order = sorted(groups, key=lambda k: (k[0], "none" not in k[1], k[1], rank.get(k[2], 0)))
    for dataset, setting, method in order:
        found = groups[dataset, setting, method]
        if (dataset, setting) != last:
            print(f"\n{dataset}, {setting}\n{'':24s} alpha  ES exact retain, unlearn   ES perturb retain, unlearn")
            last = dataset, setting
        m = {k: np.mean([f[k] for f in found]) for k in found[0] if k.startswith("ES_")}
        alpha = np.mean([f.get("alpha_exact", float("nan")) for f in found])
        four = [m[f"ES_{k}_{p}"] for k in control.KINDS for p in ("retain", "unlearn")]
        print(f"{method:24s} {alpha:5.3f}  {four[0]:13.3f} {four[1]:9.3f} {four[2]:18.3f} {four[3]:9.3f}")


def unlearned_path(folder: Path, split: str, method: str) -> Path:
    return folder / f"model-{split}-{method}.safetensors"
