"""Pictures of RESULTS.md, drawn from records: <scale>-<name>.png."""

import re
import textwrap
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
    every = {"path": path_of_alpha, "answers": answers, "alpha-curves": alpha_curves, "trade-off": trade_off}
    for name, function in (every | {"metric-study": metric_study}).items():
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


def path_of_alpha(records: list[dict]):
    """ES of the forget set against ES of the retain set along alpha, and the model that never saw the forget set."""
    rows, name = main_group(records)
    never = [r["metrics"] for r in rows if r["method"] == "Retrained"]
    rows = [r for r in rows if "curve_alpha" in r["metrics"]]
    methods = sorted({r["method"] for r in rows}, key=lambda m: (m not in PAPER, [*PAPER, m].index(m)))
    if not methods or not never:
        return None
    figure, axis = plt.subplots(figsize=(6.4, 5.2))
    for m in methods:
        curves = [r["metrics"] for r in rows if r["method"] == m]
        x, y = (np.array([c[f"curve_ES_exact_{p}"] for c in curves]) for p in ("retain", "unlearn"))
        tint = COLOURS.get(m.split()[0], "#555555")
        if m == "Interpolation to retrained":
            axis.plot(x.mean(0), y.mean(0), label=m.lower(), lw=1.2, color="black", ls=":")
            continue
        if m not in PAPER:  # a control: only where it ends
            axis.plot(x.mean(0)[-1], y.mean(0)[-1], label=m, color=tint, marker="x", ms=9, mew=2, ls="none")
            continue
        axis.plot(x.mean(0), y.mean(0), label=m, lw=1.8, color=tint, marker=MARKS[m], ms=5)
        for a, b in zip(x, y, strict=True):
            axis.plot(a, b, color=tint, lw=0.6, alpha=0.35)
    x, y = (np.mean([m[f"ES_exact_{p}"] for m in never]) for p in ("retain", "unlearn"))
    axis.scatter(x, y, marker="*", s=260, color="black", zorder=5, label="retrained without the forget set")
    top = np.mean([r["metrics"]["curve_ES_exact_retain"][0] for r in rows])
    axis.axvline(0.9 * top, color="grey", lw=0.8, ls="--")
    axis.text(0.9 * top - 0.01, 1.0, "bar, tau 0.9", rotation=90, ha="right", va="top", fontsize=9, color="grey")
    axis.set(xlabel="ES on the retain set (right: kept)", ylabel="ES on the forget set (down: removed)")
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    figure.tight_layout()
    return figure, (
        f"Removal against retention along the mixture, alpha from 0 (top right) to 1; thin lines are seeds, thick ones "
        f"their mean; the star is a model that was trained without the forget set ({name})."
    )


def answers(records: list[dict]):
    """Ten forgotten questions with the answers of the original, of GA, of calibrated GA and of the retrained model."""
    rows, name = main_group(records)
    wanted = {
        "original": ("Original", "calibration=none"), "GA": ("GA", "calibration=none"),
        "GA, calibrated, tau 0.9": ("GA", "calibration=UWC tau=0.9"), "never saw it": ("Retrained", "calibration=none"),
    }  # fmt: skip
    found = {}
    for title, (method, setting) in wanted.items():
        of = [r for r in rows if r["method"] == method and r["setting"].startswith(setting + ",")]
        of = [r for r in of if r["metrics"].get("answers")]
        if not of:
            return None
        found[title] = min(of, key=lambda r: r["seed"])["metrics"]["answers"]
    heads = ["question", "what was to be forgotten", *found]
    first = next(iter(found.values()))
    body = [[a["question"], a["answer"], *(v[i]["model"] for v in found.values())] for i, a in enumerate(first)]
    cells = [[textwrap.fill(shorten(x), 27) for x in line] for line in body]
    heights = [1.2, *(max(c.count("\n") + 1 for c in line) + 0.6 for line in cells)]
    figure, axis = plt.subplots(figsize=(15, 0.165 * sum(heights)))
    axis.set_axis_off()
    axis.set(xlim=(0, len(heads)), ylim=(sum(heights), 0))
    y = 0.0
    for k, (line, high) in enumerate(zip([heads, *cells], heights, strict=True)):
        for column, text in enumerate(line):
            weight = "bold" if k == 0 else "normal"
            axis.text(column + 0.02, y + 0.3, text, va="top", fontsize=8.5, weight=weight, parse_math=False)
        y += high
        axis.axhline(y, color="grey", lw=0.5)
    figure.tight_layout()
    return figure, f"Answers to forgotten questions, the first seed ({name}); long ones are cut."


def shorten(text: str, most: int = 230) -> str:
    text = " ".join(text.split())
    text = text if len(text) <= most else text[:most] + " ..."
    # What a collapsed model says may hold signs that the font lacks.
    return "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in text) or "(nothing)"


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
