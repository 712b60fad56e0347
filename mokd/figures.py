"""Pictures of RESULTS.md, drawn from records: <scale>-<name>.png."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})
HEADS = {"NCC": "#777777", "URL": "#e69f00", "MOKD": "#0072b2"}


def draw(records: list[dict], folder: Path, scale: str) -> list[tuple[Path, str]]:
    """-> [(path in folder, caption)] of the figures the records allow."""
    out = []

    def add(found, name: str) -> None:
        if found:
            figure, caption = found
            path = folder / f"{scale}-{re.sub('[(),]', '', name.lower().replace(' ', '-'))}.png"
            figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            out.append((path, caption))

    for table in sorted({r["table"] for r in records}):
        rows = [r for r in records if r["table"] == table]
        add(gains(rows), f"gains-{table}")
        for dataset in sorted({r["dataset"] for r in rows}):
            add(task(rows, dataset), f"task-{table}-{dataset}")
    add(gammas(records), "gamma")
    return out


def gains(rows: list[dict]):
    """Paired differences to NCC with their intervals, a group a domain."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for r in rows:
        m = r["metrics"]
        if "gain over NCC" in m:
            found.setdefault((r["dataset"], r["method"]), []).append((m["gain over NCC"], m["gain over NCC ci95"]))
    methods, sets = list(dict.fromkeys(m for _, m in found)), list(dict.fromkeys(d for d, _ in found))
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(2.2 + 1.6 * len(sets), 4))
    width = 0.8 / len(methods)
    for i, m in enumerate(methods):
        x = [k + width * (i - (len(methods) - 1) / 2) for k, d in enumerate(sets) if (d, m) in found]
        v = [np.array(found[d, m]) for d in sets if (d, m) in found]
        error = [np.sqrt((a[:, 1] ** 2).sum()) / len(a) for a in v]
        axis.bar(x, [a[:, 0].mean() for a in v], width, yerr=error, label=m, capsize=2, color=plt.cm.tab10(i % 10))
    axis.axhline(0, color="k", lw=0.8)
    axis.set_xticks(range(len(sets)), sets, rotation=20 if len(sets) > 4 else 0)
    axis.set_ylabel("accuracy over NCC (points)")
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    seeds = len({r["seed"] for r in rows})
    return figure, (
        f"Table {rows[0]['table']}: accuracy of each head minus that of NCC without adaptation, over the same tasks; "
        f"mean over {seeds} seeds, whiskers: 95 % interval over the tasks of these networks."
    )


def task(rows: list[dict], dataset: str):
    """One task: cosines of the support set, sorted by class, and a t-SNE of support and query, for each head."""
    found = {
        r["method"]: r["metrics"]["example"]
        for r in rows
        if r["dataset"] == dataset and r["method"] in HEADS and r["metrics"].get("example")
    }
    if len(found) < 2:
        return None
    figure, axes = plt.subplots(2, len(found), figsize=(3.6 * len(found), 7), squeeze=False, layout="constrained")
    for column, name in enumerate(k for k in HEADS if k in found):
        e = found[name]
        labels, targets = np.array(e["labels"]), np.array(e["targets"])
        picture = axes[0, column].imshow(e["cosine"], vmin=-0.2, vmax=1, cmap="magma")
        axes[0, column].set(title=name, xlabel="support image", ylabel="support image" if column == 0 else "")
        points, axis = np.array(e["tsne"]), axes[1, column]
        axis.scatter(*points[len(labels) :].T, c=targets, cmap="tab20", s=12, alpha=0.7, vmin=0, vmax=19)
        axis.scatter(
            *points[: len(labels)].T, c=labels, cmap="tab20", s=45, marker="^", ec="k", lw=0.5, vmin=0, vmax=19
        )
        axis.set(xticks=[], yticks=[], xlabel="t-SNE")
    figure.colorbar(picture, ax=axes[0], label="cosine", shrink=0.8)
    return figure, (
        f"{dataset}, one task: cosine similarity of its support images, sorted by class (above), t-SNE of its support "
        "(triangles) and query images (dots), coloured by class (below), before adaptation (NCC) and after it."
    )


def gammas(records: list[dict]):
    """Accuracy against gamma."""
    found: dict[str, dict[float, list[float]]] = {}
    for r in records:
        if r["table"] == "figure-gamma" and r["method"].startswith("MOKD(gamma="):
            g = float(r["method"][11:-1])
            found.setdefault(r["dataset"], {}).setdefault(g, []).append(r["metrics"]["accuracy"])
    if not found:
        return None
    figure, axes = plt.subplots(1, len(found), figsize=(4.4 * len(found), 3.6), squeeze=False)
    for axis, (dataset, curve) in zip(axes[0], sorted(found.items()), strict=True):
        x = sorted(curve)
        axis.errorbar(x, [np.mean(curve[g]) for g in x], [np.std(curve[g]) for g in x], marker="o", label="MOKD")
        url = [
            r["metrics"]["accuracy"]
            for r in records
            if (r["table"], r["dataset"], r["method"]) == ("figure-gamma", dataset, "URL")
        ]
        if url:
            axis.axhline(np.mean(url), color=HEADS["URL"], ls="--", label="URL")
        axis.set(title=dataset, xlabel="gamma", ylabel="accuracy (%)")
        axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    return figure, "Accuracy against gamma, the weight of HSIC(Z,Z); mean and standard deviation over seeds."
