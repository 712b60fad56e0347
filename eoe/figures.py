"""Pictures of RESULTS.md: <scale>-<name>.png, from records and from the scores kept in the folders of their runs."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from lab import runs

import matplotlib.pyplot as plt
import numpy as np

from real import pictures

TASKS = {"synthetic": "synthetic space", "far": "far", "near": "near", "fine-grained": "fine-grained"}
COLOURS = dict(zip(TASKS, ("#555555", "#0072b2", "#e69f00", "#c1272d"), strict=True))
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})


def draw(records: list[dict], folder: Path, scale: str) -> list[tuple[Path, str]]:
    """-> [(path, caption)] of the figures the records allow."""
    names = {r["run"] for r in records}
    kept = sorted((runs.HERE / "runs" / scale).glob("*/seed*/scores-*.safetensors"))
    kept = [p for p in kept if p.parents[1].name in names]  # not of runs that were started by hand
    out = []
    for name, made in (
        ("beta", beta(records)),
        ("names", numbers(records)),
        ("scores", densities(kept)),
        ("labels", embedding(kept)),
        *pictures.figures(records, scale),
    ):
        if made:
            figure, caption = made
            path = folder / f"{scale}-{name}.png"
            figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            out.append((path, caption))
    return out


def beta(records: list[dict]):
    """FPR95 of EOE against beta, mean and standard deviation over seeds."""
    points: dict[str, dict[float, list[float]]] = {}
    for r in records:
        if r["method"] == "EOE" and r["setting"].startswith("beta=") and r["dataset"] in TASKS:
            points.setdefault(r["dataset"], {}).setdefault(float(r["setting"][5:]), []).append(r["metrics"]["FPR95"])
    if not points:
        return None
    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    for name in (n for n in TASKS if n in points):
        x = sorted(points[name])
        mean, std = ([f(points[name][b]) for b in x] for f in (np.mean, np.std))
        axis.errorbar(x, mean, std, marker="o", capsize=3, color=COLOURS[name], label=TASKS[name])
    axis.set(xlabel="beta", ylabel="FPR95 (%)", xticks=[0, 0.25, 0.5, 0.75, 1], ylim=(0, None))
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure, "FPR95 of EOE against the weight beta of the outlier term; mean and standard deviation over seeds."


def numbers(records: list[dict]):
    """Fig. 7: FPR95 against the number of envisioned names, measured; L = 0 is MCM."""
    titles = {"figure7a": "far", "figure7b": "near (per ID class)", "figure7c": "fine-grained"}
    points: dict[str, dict[int, list[float]]] = {}
    for r in records:
        table = r["table"].removeprefix("own-")
        found = re.search(r"(?:L|l per ID class)=(\d+)", r["setting"])
        if table in titles and found:
            points.setdefault(table, {}).setdefault(int(found[1]), []).append(r["metrics"]["FPR95"])
    if not points:
        return None
    figure, axes = plt.subplots(1, len(points), figsize=(3.6 * len(points), 3.2), squeeze=False)
    for axis, table in zip(axes[0], sorted(points), strict=True):
        x = sorted(points[table])
        mean, std = ([f(points[table][n]) for n in x] for f in (np.mean, np.std))
        axis.errorbar(x, mean, std, marker="o", capsize=3, color="#0072b2")
        axis.set(title=titles[table], xlabel="names asked for", ylabel="FPR95 (%)", xticks=x)
    figure.tight_layout()
    return figure, "FPR95 against the number of envisioned names (Fig. 7); 0 is MCM; mean and deviation over runs."


def densities(kept: list[Path]):
    """Score histograms of ID and OOD pictures, MCM beside EOE (cf. Fig. 1)."""
    if not kept:
        return None
    figure, axes = plt.subplots(len(kept), 2, figsize=(8, 2.4 * len(kept)), squeeze=False)
    for row, path in zip(axes, kept, strict=True):
        tensors, _ = runs.read_tensors(path)
        for axis, method in zip(row, ("MCM", "EOE"), strict=True):
            both = [tensors[f"{w}.{method}"].double().numpy() for w in ("id", "ood")]
            edges = np.linspace(min(b.min() for b in both), max(b.max() for b in both), 41)
            for values, label, colour in zip(both, ("ID", "OOD"), ("#0072b2", "#c1272d"), strict=True):
                axis.hist(values, edges, density=True, alpha=0.55, label=label, color=colour)
            axis.set(title=f"{path.stem.removeprefix('scores-')}: {method}", xlabel="score", ylabel="density")
            axis.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    return figure, "Scores of ID and OOD pictures (first seed), MCM on the left and EOE on the right."


def embedding(kept: list[Path]):
    """t-SNE of ID, envisioned and real OOD label features (cf. Fig. 8, 9)."""
    from sklearn.manifold import TSNE

    kept = [p for p in kept if "fine" in p.stem]
    if not kept:
        return None
    tensors, _ = runs.read_tensors(kept[0])
    parts = [tensors[f"text.{k}"].float().numpy() for k in ("id", "envisioned", "ood")]
    points = np.concatenate(parts)
    if len(points) < 8:
        return None
    flat = TSNE(perplexity=min(15, len(points) // 3), init="pca", random_state=0, metric="cosine").fit_transform(points)
    figure, axis = plt.subplots(figsize=(5, 4))
    start = 0
    for part, label, colour in zip(parts, ("ID", "envisioned", "OOD"), ("#0072b2", "#e69f00", "#c1272d"), strict=True):
        axis.scatter(*flat[start : start + len(part)].T, s=16, label=label, color=colour)
        start += len(part)
    axis.set(xlabel="t-SNE 1", ylabel="t-SNE 2")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure, "t-SNE of the label features of the fine-grained task (first seed)."
