"""Pictures of RESULTS.md, drawn from records: <scale>-<name>.png."""

import re
from pathlib import Path

from lab.claims import interval

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})
HEADS = ("NCC", "URL", "MOKD")  # whose tasks are drawn
# One colour a method in all pictures; a method with settings of its own is hatched.
COLOURS = {
    **{"NCC": "#777777", "URL": "#e69f00", "MOKD": "#0072b2", "MOKD(no TPM)": "#56b4e9", "MOKD(gamma=0)": "#cc79a7"},
    **{"SSL-HSIC": "#d55e00", "linear layer": "#009e73", "cosine layer": "#8c564b", "ProtoNet (frozen)": "#bcbd22"},
    **{"FP-MAML (frozen)": "#17becf", "TSA": "#9467bd", "Finetune (all weights)": "#e377c2"},
}
HATCH = "///"  # of a method with settings of its own


def colour(method: str) -> tuple[str, str]:
    """(colour, hatch) of a method, the same whatever stands beside it."""
    base = method if method in COLOURS else method.partition("(")[0]
    base = "MOKD(no TPM)" if base == "MOKD" and "bandwidth=none" in method else base
    return COLOURS.get(base, "#000000"), "" if method in COLOURS else HATCH


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
        settings = sorted({r["setting"] for r in rows}, key=lambda x: ("varied" not in x, x))
        for setting in settings:
            tail = f"-{setting}" if len(settings) > 1 else ""
            add(gains([r for r in rows if r["setting"] == setting]), f"gains-{table}{tail}")
        for dataset in sorted({r["dataset"] for r in rows}):
            add(task([r for r in rows if r["setting"] == settings[0]], dataset), f"task-{table}-{dataset}")
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
    networks = any(rows[0]["settings"].get(k) for k in ("train", "run"))  # a network a seed
    for i, m in enumerate(methods):
        x = [k + width * (i - (len(methods) - 1) / 2) for k, d in enumerate(sets) if (d, m) in found]
        v = [np.array(found[d, m]) for d in sets if (d, m) in found]
        error = [interval(a[:, 0])[1] if networks else np.sqrt((a[:, 1] ** 2).sum()) / len(a) for a in v]
        paint, hatch = colour(m)
        style = {"color": paint, "hatch": hatch, "edgecolor": "w", "lw": 0}
        axis.bar(x, [a[:, 0].mean() for a in v], width, yerr=error, label=m, capsize=2, **style)
    axis.axhline(0, color="k", lw=0.8)
    axis.set_xticks(range(len(sets)), sets, rotation=20 if len(sets) > 4 else 0)
    axis.set_ylabel("accuracy over NCC (points)")
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    seeds = len({r["seed"] for r in rows})
    over = "seeds, each with a network of its own" if networks else "tasks"
    return figure, (
        f"Table {rows[0]['table']}, {rows[0]['setting']}: accuracy of each head minus that of NCC without adaptation, "
        f"over the same tasks; mean over {seeds} seeds, whiskers: 95 % interval over the {over}."
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
        axes[0, column].set(title=name, xlabel="support images, by class", ylabel="class" if column == 0 else "")
        classes, first, count = np.unique(labels, return_index=True, return_counts=True)
        for set_ticks in (axes[0, column].set_xticks, axes[0, column].set_yticks):
            set_ticks(first + (count - 1) / 2, classes + 1, fontsize=8)
            set_ticks(np.append(first, len(labels)) - 0.5, minor=True)
        axes[0, column].tick_params(which="major", length=0)
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
        axis.errorbar(
            x,
            [np.mean(curve[g]) for g in x],
            [np.std(curve[g]) for g in x],
            marker="o",
            color=COLOURS["MOKD"],
            label="MOKD",
        )
        url = [
            r["metrics"]["accuracy"]
            for r in records
            if (r["table"], r["dataset"], r["method"]) == ("figure-gamma", dataset, "URL")
        ]
        if url:
            axis.axhline(np.mean(url), color=COLOURS["URL"], ls="--", label="URL")
        axis.set(title=dataset, xlabel="gamma", ylabel="accuracy (%)")
        axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    return figure, "Accuracy against gamma, the weight of HSIC(Z,Z); mean and standard deviation over seeds."
