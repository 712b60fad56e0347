"""Scores, calibration and records of unlearned models: what training and evaluation both need."""

import time
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
            row = {"tau": tau, "alpha": alpha.get(kind), "questions": kind, "part": part, "item": i, "question": asked}
            row |= {"answer": q.answer, "es": s.es[i], "em": s.em[i], "nll": s.nll[i], "tokens": int(s.tokens[i])}
            out.append(row)
    return out


class Along:
    """Scores of theta(alpha). Each (alpha, kind of question, part) is evaluated once, always in the batches of its set:
    what a search saw is what the record says, also where rounding would turn an argmax in another batch. `start`:
    scores at alpha 0, which all methods share."""

    def __init__(self, mixer: control.Mixer, lm, sets: metrics.Sets, start: dict | None = None):
        self.mixer, self.lm, self.sets = mixer, lm, sets
        self.known: dict[tuple[float, str, str], metrics.Scores] = {}
        self.known |= {(0.0, *key): s for key, s in (start or {}).items()}

    def __call__(self, alpha: float, kind: str, part: str) -> metrics.Scores:
        key = round(alpha, 9), kind, part
        if key not in self.known:
            self.mixer.set(key[0])
            self.known[key] = self.sets.scores(self.lm, kind, part)
        return self.known[key]

    def at(self, alpha: dict[str, float]) -> dict[tuple[str, str], metrics.Scores]:
        """Scores of all sets, those of a kind of question at its alpha."""
        return {(kind, part): self(alpha[kind], kind, part) for kind, part in self.sets.items}

    def curve(self, step: float) -> dict[str, list[float]]:
        """ES of both parts with the exact questions on a grid of alpha from 0 to 1."""
        n = max(round(1 / step), 1)
        out: dict[str, list[float]] = {"alpha": [k / n for k in range(n + 1)]}
        for part in metrics.PARTS:
            out[f"ES_exact_{part}"] = [float(self(a, "exact", part).es.mean()) for a in out["alpha"]]
        return out

    def calibrate(
        self, tau: float, how: control.Search, step: float = 0.05, tolerance: float = 1e-3, both: bool = False
    ) -> tuple[dict, dict]:
        """-> (metrics of the record, scores of every item). alpha* is searched apart for each kind of question."""
        out, alpha = {"tau": tau}, {}
        for kind in self.sets.kinds:

            def g(a: float, kind: str = kind) -> float:
                return float(self(a, kind, "retain").es.mean())

            c = control.search(g, tau, how, step, tolerance)
            alpha[kind] = c.alpha
            out |= {f"alpha_{kind}": c.alpha, f"bar_{kind}": c.bar, f"vacuous_{kind}": int(c.vacuous)}
            if both:
                other: control.Search = "bisect" if how == "scan+bisect" else "scan+bisect"
                out[f"alpha_{kind}_other"] = control.search(g, tau, other, step, tolerance).alpha
        scores = self.at(alpha)
        return metrics.four(scores) | out, scores


def assess(b: Bench, split: str, tensors: dict[str, Tensor], retrained: metrics.Truth | None, full: list) -> tuple:
    """-> (metrics without calibration, {tau: metrics}, item lines) of one unlearned model."""
    s, sets = b.s, b.sets(split)
    mixer = control.Mixer(b.lm, b.original, tensors)
    along = Along(mixer, b.lm, sets, b.start(split))
    scores = along.at(dict.fromkeys(sets.kinds, 1.0))
    found = metrics.four(scores) | {f"alpha_{k}": 1.0 for k in sets.kinds}
    lines = item_rows(sets, scores, dict.fromkeys(sets.kinds, 1.0), None)
    mixer.set(1.0)
    found |= summaries(b, split, retrained)
    curve = along.curve(s.alpha_step)
    found |= {f"curve_{k}": v for k, v in curve.items()} | monotone(curve)
    calibrated = {}
    for tau in s.tau:
        clock = time.perf_counter()
        m, scores = along.calibrate(tau, s.alpha_search, s.alpha_step, s.alpha_tolerance, s.both_searches)
        m["search_seconds"] = time.perf_counter() - clock
        alpha = {k: m[f"alpha_{k}"] for k in sets.kinds}
        lines += item_rows(sets, scores, alpha, tau)
        mixer.set(alpha["exact"])
        m |= summaries(b, split, retrained)
        calibrated[tau] = m
    if s.attacks:
        mixer.set(1.0)
        own = {part: sets.items["exact", part] for part in metrics.PARTS}
        plain = study.measure(b.lm, b.chat, sets, own)
        found |= {f"study.{k}": v for k, v in plain.items()}
        for kind in s.attacks:
            mixer.set(1.0)  # relearning moved the weights
            after = study.attack(kind, b.lm, b.chat, sets, s, b.seed, full, plain)
            found |= {f"study.{k}@{kind}": v for k, v in after.items()}
    return found, calibrated, lines


def summaries(b: Bench, split: str, retrained: metrics.Truth | None) -> dict:
    """Of the present weights, what is asked for: model utility, forget quality, answers to forgotten questions."""
    out: dict = {}
    if b.s.utility:
        out |= metrics.utility_of(b.lm, b.chat, b.corpus, b.device, b.s.max_length)
    if b.s.utility or retrained is not None:
        truth = metrics.truth(b.lm, b.chat, b.corpus.forget[split], b.device, b.s.max_length)
        out["forget_truth_ratio"] = float(truth.balanced.mean())
        out["forget_truth_ratio_arithmetic"] = float(truth.balanced_arithmetic.mean())
        if retrained is not None:
            out["forget_quality"] = metrics.forget_quality(truth, retrained)
    if b.s.answers:
        sets = b.sets(split)
        rows = sets.rows["unlearn"][: b.s.answers]
        rouge, texts = metrics.rouge_items(b.lm, b.chat, rows, sets.items["exact", "unlearn"][: len(rows)], b.device)
        told = zip(rows, texts, strict=True)
        out["answers"] = [{"question": q.question, "answer": q.answer, "model": text} for q, text in told]
        out["answers_rouge"] = float(rouge.mean())
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
        four = [m.get(f"ES_{k}_{p}", float("nan")) for k in metrics.KINDS for p in metrics.PARTS]
        cells = zip([alpha, *four], (5, 14, 9, 18, 9), strict=True)  # a dash: without paraphrases, without a mixture
        print(f"{method:24s} " + " ".join(f"{v:{n}.3f}" if v == v else f"{'-':>{n}}" for v, n in cells))
        if any(f.get("vacuous_exact") for f in found):
            print("    the original scores 0 on the retain set: there was nothing to keep, and nothing was controlled")


def unlearned_path(folder: Path, split: str, method: str) -> Path:
    return folder / f"model-{split}-{method}.safetensors"
