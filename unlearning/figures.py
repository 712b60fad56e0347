"""Pictures of RESULTS.md, drawn from records: <scale>-<name>.png."""

import re
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLOURS = {"GA": "#c1272d", "GD": "#0072b2", "KL": "#56b4e9", "PO": "#009e73", "NPO": "#e69f00", "RMU": "#cc79a7"}
MARKS = {"GA": "o", "GD": "s", "KL": "^", "PO": "D", "NPO": "v", "RMU": "P"}
PAPER = tuple(COLOURS)
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})


def draw(records: list[dict], folder: Path, scale: str) -> list[tuple[Path, str]]:
    """-> [(path, caption)] of the figures the records allow."""
    out = []
    for name, function in (("alpha-curves", alpha_curves), ("trade-off", trade_off), ("metric-study", metric_study)):
        made = function(records)
        if made:
            figure, caption = made
            path = folder / f"{scale}-{name}.png"
            figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            out.append((path, caption))
    return out


def main_group(records: list[dict]) -> tuple[list[dict], str]:
    """Records of the data set and model that have most of them in the main table, and their name."""
    groups = defaultdict(list)
    for r in records:
        if r["table"] == "main" and "ES_exact_retain" in r["metrics"]:
            groups[r["dataset"], r["setting"].rpartition("model=")[2]].append(r)
    if not groups:
        return [], ""
    key = max(groups, key=lambda k: (len(groups[k]), k))
    return groups[key], f"{key[0]}, {key[1]}"


def colour(method: str) -> str:
    return COLOURS.get(method, "#555555")


def methods_of(rows: list[dict]) -> list[str]:
    here = {r["method"] for r in rows}
    return [m for m in PAPER if m in here]


def alpha_curves(records: list[dict]):
    """Figure 3: ES of both sets against alpha."""
    rows, name = main_group(records)
    rows = [r for r in rows if "curve_alpha" in r["metrics"]]
    methods = methods_of(rows)
    if not methods:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for axis, part in zip(axes, ("retain", "unlearn"), strict=True):
        for m in methods:
            curves = [r["metrics"] for r in rows if r["method"] == m]
            values = np.mean([c[f"curve_ES_exact_{part}"] for c in curves], axis=0)
            axis.plot(curves[0]["curve_alpha"], values, color=colour(m), marker=MARKS[m], ms=3.5, lw=1.4, label=m)
        axis.set(
            xlabel="alpha (0: original, 1: unlearned)", title={"retain": "retain set", "unlearn": "forget set"}[part]
        )
    axes[0].set_ylabel("extraction strength (exact)")
    axes[0].set_ylim(-0.03, 1.03)
    axes[1].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    return figure, f"Extraction strength along the mixture of original and unlearned model, mean over seeds ({name})."


def trade_off(records: list[dict]):
    """Figure 1 and what calibration makes of it: removal against retention."""
    rows, name = main_group(records)
    methods = methods_of(rows)
    found = {m.group(1) for r in rows if (m := re.search(r"tau=([0-9.]+)", r["setting"]))}
    taus = ["0.9"] if "0.9" in found else sorted(found)[-1:]
    if not methods or not taus:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True, sharey=True)
    for axis, setting in zip(axes, ("calibration=none", f"calibration=UWC tau={taus[0]}"), strict=True):
        for m in methods:
            some = [r["metrics"] for r in rows if r["method"] == m and r["setting"].startswith(setting + ",")]
            if some:
                x, y = ([f[k] for f in some] for k in ("ES_exact_retain", "ES_exact_unlearn"))
                axis.scatter(x, y, s=16, color=colour(m), marker=MARKS[m], alpha=0.45, linewidths=0)
                axis.scatter(
                    np.mean(x), np.mean(y), s=70, color=colour(m), marker=MARKS[m], label=m, edgecolors="black"
                )
        axis.set(xlabel="ES on the retain set (higher: kept)", title=setting.removeprefix("calibration="))
    axes[0].set(ylabel="ES on the forget set (lower: removed)", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
    axes[0].set_title("before calibration")
    axes[1].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    return figure, f"Removal against retention; small marks are seeds, large ones their mean ({name})."


def metric_study(records: list[dict]):
    """Figure 2: each metric before and after each attack, a point a model."""
    rows = [r for r in records if r["setting"].startswith("attack=") and "before_retain" in r["metrics"]]
    attacks = list(dict.fromkeys(r["setting"][7:].partition(",")[0] for r in rows))
    order = ("ES", "EM", "logPPL", "ROUGE-L", "truth_ratio")
    names = [m for m in order if any(r["method"] == m for r in rows)]
    if not names:
        return None
    figure, axes = plt.subplots(len(names), len(attacks), figsize=(2.7 * len(attacks), 2.3 * len(names)), squeeze=False)
    for line, metric in zip(axes, names, strict=True):
        for axis, kind in zip(line, attacks, strict=True):
            some = [r["metrics"] for r in rows if r["method"] == metric and f"attack={kind}," in r["setting"] + ","]
            text = []
            for part, tint, mark in (("retain", "#0072b2", "o"), ("unlearn", "#e69f00", "^")):
                x = np.concatenate([f[f"before_{part}"] for f in some])
                y = np.concatenate([f[f"after_{part}"] for f in some])
                axis.scatter(x, y, s=11, color=tint, marker=mark, alpha=0.7, linewidths=0, label=part)
                pcc = [f[f"PCC_{part}"] for f in some if f"PCC_{part}" in f]
                text.append(f"{np.mean(pcc):.2f}" if pcc else "-")
            ends = [*axis.get_xlim(), *axis.get_ylim()]
            axis.plot([min(ends), max(ends)], [min(ends), max(ends)], color="grey", lw=0.7, ls=":")
            axis.set_title(f"PCC {text[0]} / {text[1]}", fontsize=9)
            axis.tick_params(labelsize=8)
        line[0].set_ylabel(f"{metric}\nafter", fontsize=10)
    for axis, kind in zip(axes[-1], attacks, strict=True):
        axis.set_xlabel(f"before\n{kind}", fontsize=10)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure, (
        "Metrics of unlearned models before and after attacks, a point a model and seed, retain and forget set; "
        "dotted: unchanged. PCC: Pearson correlation (retain / forget), mean over seeds."
    )
