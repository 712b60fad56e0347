"""Pictures of RESULTS.md, drawn from records: <scale>-<name>.png; analyse.py draws single runs."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, SymmetricalLogLocator

COLOURS = {"FGSM": "#c1272d", "LAP": "#0072b2"}
STYLES = {"V": "-", "R": "--", "N": "-."}
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def draw(records: list[dict], folder: Path, scale: str) -> list[tuple[Path, str]]:
    """-> [(path, caption)] of the figures the records allow."""
    out = []

    def add(found, kind: str, name: str) -> None:
        if found:
            path = folder / f"{scale}-{kind}-{name.lower().replace(' ', '-').replace('/', '-').replace('=', '')}.png"
            save(found[0], path)
            out.append((path, found[1]))

    every = [r for r in records if r["table"] == "main"]
    main = [r for r in every if r["method"].rsplit("-", 1)[-1] in COLOURS]
    for dataset, setting in sorted({(r["dataset"], r["setting"]) for r in every}):
        rows, few = ([r for r in k if (r["dataset"], r["setting"]) == (dataset, setting)] for k in (every, main))
        add(course(few, f"{dataset}, {setting}"), "course", f"{dataset}-{setting}")
        add(variants(rows, f"{dataset}, {setting}"), "variants", f"{dataset}-{setting}")
    removed = [r for r in records if r["table"] == "removal"]
    for dataset, method in sorted({(r["dataset"], r["method"]) for r in removed}):
        rows = [r for r in removed if (r["dataset"], r["method"]) == (dataset, method)]
        add(removal(rows, f"{method}, {dataset}"), "removal", f"{dataset}-{method}")
    layers = [r for r in records if r["table"] == "layers"]
    for r in {
        (r["dataset"], r["method"]): r for r in sorted(layers, key=lambda r: (r["metrics"]["collapsed"], -r["seed"]))
    }.values():  # the last one stays: the lowest seed with overfitting, if there is one
        place = f"{r['method']}, {r['dataset']}, {r['setting']}"
        name = f"{r['dataset']}-{r['method']}"
        add(surfaces(r["metrics"]["surfaces"], f"{place}, seed {r['seed']}"), "surfaces", name)
        same = [
            m["metrics"]
            for m in main
            if (m["dataset"], m["method"], m["setting"]) == (r["dataset"], r["method"], r["setting"])
        ]
        add(layer_curves(same, r["metrics"]["names"], place), "layers", name)
    return out


PLAIN = FuncFormatter(lambda v, _: f"{v:g}")


def log_axis(axis, signed: bool = False) -> None:
    """A logarithmic y axis whose ticks are plain numbers, also over less than a decade. signed: linear around 0."""
    if signed:
        axis.set_yscale("symlog", linthresh=1)
        axis.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1))
    else:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter(PLAIN)
    axis.yaxis.set_minor_formatter(NullFormatter())


def stacked(curves: list[list]) -> np.ndarray:
    n = min(map(len, curves))
    return np.array([c[:n] for c in curves], dtype=float)


def several(axis, curves: list[list], label: str, thin: bool = True, **look) -> None:
    """The mean against the epoch, single seeds as thin lines."""
    values = stacked(curves)
    x = 1 + np.arange(values.shape[1])
    for v in values if thin else ():
        axis.plot(x, v, lw=0.7, alpha=0.45, **look)
    axis.plot(x, values.mean(0), lw=2.2, label=label, **look)


def course(rows: list[dict], place: str):
    """Accuracies on the probe and the norm of the first layer against the epoch."""
    methods = sorted({r["method"] for r in rows}, reverse=True)
    if not methods:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), sharex=True)
    panels = (
        *(("curve_probe_fgsm", "FGSM accuracy (%)"), ("curve_probe_pgd", "PGD accuracy (%)")),
        ("curve_norm", "norm of the first layer"),
    )
    for (key, title), axis in zip(panels, axes, strict=True):
        for m in methods:
            begin, kind = m.rsplit("-", 1)
            curves = [r["metrics"][key] for r in rows if r["method"] == m]
            curves = [[v[0] for v in c] for c in curves] if key == "curve_norm" else curves
            several(axis, curves, label=m, color=COLOURS[kind], ls=STYLES[begin[0]])
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    log_axis(axes[2])
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(place)
    figure.tight_layout()
    return figure, (
        f"{place}: accuracy on a fixed part of the test images after every epoch, means over "
        f"{len({r['seed'] for r in rows})} seeds, thin lines are single seeds. Overfitting shows as PGD accuracy that "
        "falls to nothing while FGSM accuracy stays."
    )


def variants(rows: list[dict], place: str):
    """Accuracy of the last weights of every method and control, a point a seed."""
    names = sorted({r["method"] for r in rows}, key=lambda m: [r["method"] for r in rows].index(m))
    if len(names) < 3:
        return None
    figure, axis = plt.subplots(figsize=(8.4, 0.9 + 0.42 * len(names)))
    looks = (("clean", "#999999", "clean"), ("fgsm", "#c1272d", "FGSM"), ("pgd", "#0072b2", "PGD"))
    for k, (key, colour, label) in enumerate(looks):
        for i, name in enumerate(names):
            values = [r["metrics"][key] for r in rows if r["method"] == name]
            height = [i + 0.22 * (k - 1)] * len(values)
            axis.plot(values, height, "o", ms=5, color=colour, alpha=0.75, label=label if i == 0 else None)
            axis.plot([np.mean(values)] * 2, [height[0] - 0.1, height[0] + 0.1], color=colour, lw=2.2)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel="accuracy (%)", title=place)
    axis.set_xlim(left=0)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure, f"{place}: accuracy of the last weights; a point is a seed, a stroke the mean. Chance is 10 %."


def removal(rows: list[dict], place: str):
    """Accuracy after a share of a layer's weights has been set to zero."""
    kinds = ["nothing", "former, largest", "former, smallest", "latter, largest", "latter, smallest"]
    found = {k: [r["metrics"] for r in rows if r["setting"].endswith(f", {k}")] for k in kinds}
    if not all(found.values()):
        return None
    figure, axis = plt.subplots(figsize=(8.4, 3.8))
    looks = (("clean", "#999999"), ("fgsm", "#c1272d"), ("pgd", "#0072b2"))
    for i, (key, colour) in enumerate(looks):
        values = [[m[key] for m in found[k]] for k in kinds]
        at = np.arange(len(kinds)) + 0.27 * (i - 1)
        axis.bar(at, [np.mean(v) for v in values], 0.25, color=colour, label={"clean": "clean"}.get(key, key.upper()))
        for x, v in zip(at, values, strict=True):
            axis.plot([x] * len(v), v, "k.", ms=4, alpha=0.6)
    axis.set_xticks(range(len(kinds)), [k.replace(", ", "\n") for k in kinds])
    axis.set(ylabel="accuracy (%)", title=place)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the bars
    figure.tight_layout()
    return figure, (
        f"{place}: accuracy after the largest or smallest 10 % of the weights of each former or latter layer are "
        "set to zero; points are single seeds."
    )


def surfaces(found: dict, place: str):
    """Rows: moments in their order; columns: single layers, then all; colour: mean loss, one scale for all."""
    if not found["values"]:
        return None
    moments, layers = sorted(found["values"], key=found["epochs"].get), found["layers"]
    grids = np.array([found["values"][m] for m in moments], dtype=float).clip(1e-3, 1e4)  # [moment, layer, p, q]
    size = (2.1 * len(layers) + 1.2, 2.1 * len(moments) + 0.6)
    look = {"figsize": size, "squeeze": False, "sharex": True, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(len(moments), len(layers), **look)
    # Noise in all layers goes far beyond noise in one; the scale ends at a loss of 10 or the largest of a single layer.
    single = grids[:, :-1].max() if len(layers) > 1 else grids.max()
    low, high = grids.min(), min(grids.max(), max(single, 10.0))
    norm = LogNorm(low, max(high, 1.001 * low))
    reach = 1 + 1 / (grids.shape[-1] - 1)  # half a cell more: the points of the grid are the cells' centres
    box = {"facecolor": "k", "alpha": 0.45, "pad": 1.5, "lw": 0}
    for i, m in enumerate(moments):
        for j, layer in enumerate(layers):
            axis, values = axes[i, j], grids[i, j].T  # noise 1 runs along the rows of a grid: to the right
            extent = (-reach, reach, -reach, reach)
            picture = axis.imshow(values, origin="lower", extent=extent, cmap="viridis", norm=norm)
            axis.set_title(f"{layer.removeprefix('1.').removesuffix('.weight')}" if i == 0 else "", fontsize=9)
            text = f"{values.min():.2f} to {values.max():.3g}"
            axis.text(-0.95, -0.92, text, color="w", fontsize=8, bbox=box)
            axis.set_xlabel("noise 1" if i == len(moments) - 1 else "")
            axis.set_ylabel(f"{m}: epoch {found['epochs'][m]}\nnoise 2" if j == 0 else "")
    bar = figure.colorbar(picture, ax=axes, label="mean loss", shrink=0.8, extend="max" if grids.max() > high else None)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    bar.ax.yaxis.set_major_formatter(PLAIN)
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(place)
    return figure, (
        f"{place}: mean loss on single-step images when filter-normalised noise is added to one layer, or to all (last "
        "column); the unchanged network is in the middle. Numbers are the lowest and highest loss of a panel."
    )


def layer_curves(metrics: list[dict], names: list[str], place: str):
    """Sensitivity, norm, top singular value and share of large entries of every layer against the epoch."""
    panels = [
        *(("distortion", "rise of the loss under weight noise"), ("norm", "Frobenius norm")),
        *(("singular", "top singular value"), ("top10", "share of |w|² in the largest 10 %")),
    ]
    panels = [p for p in panels if metrics and all(f"curve_{p[0]}" in m for m in metrics)]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.7), squeeze=False)
    colours = plt.cm.plasma(np.linspace(0, 0.9, len(names)))
    for axis, (key, title) in zip(axes[0], panels, strict=True):
        values = stacked([m[f"curve_{key}"] for m in metrics]).mean(0)  # [epochs, layers]
        for k in range(len(names)):
            ends = k in (0, len(names) - 1)
            label = names[k].removeprefix("1.").removesuffix(".weight") if ends else None
            axis.plot(1 + np.arange(len(values)), values[:, k], color=colours[k], lw=1.6, label=label)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if key in ("norm", "singular") or np.abs(values).max() > 10:
            log_axis(axis, signed=key == "distortion")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(place)
    figure.tight_layout()
    seeds = f"mean over {len(metrics)} seeds" if len(metrics) > 1 else "one seed"
    return figure, f"{place}: every layer against the epoch, from the first (dark) to the last (bright); {seeds}."
