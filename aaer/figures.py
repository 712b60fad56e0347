"""Pictures of RESULTS.md, drawn from records: <scale>-<name>.png."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLOURS = {"FGSM": "#c1272d", "AAER": "#0072b2"}
STYLES = ("-", "--", "-.")  # of the starts RS, N, V, as far as they are there
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})


def draw(records: list[dict], folder: Path, scale: str) -> list[tuple[Path, str]]:
    """-> [(path, caption)] of the figures the records allow."""
    out = []

    def add(found, kind: str, name: str) -> None:
        if found:
            path = folder / f"{scale}-{kind}-{name.lower().replace(' ', '-').replace('/', '-').replace('=', '')}.png"
            found[0].savefig(path, bbox_inches="tight", metadata={"Software": None})
            plt.close(found[0])
            out.append((path, found[1]))

    every = [r for r in records if r["table"] == "main"]
    for dataset, setting in sorted({(r["dataset"], r["setting"]) for r in every}):
        rows = [r for r in every if (r["dataset"], r["setting"]) == (dataset, setting)]
        main = [r for r in rows if r["method"].rsplit("-", 1)[-1] in COLOURS]
        place, name = f"{dataset}, {setting}", f"{dataset}-{setting}"
        add(course(main, place), "course", name)
        add(variants(rows, place), "variants", name)
        add(surface(main, place), "surface", name)
    tried = [r for r in records if r["table"] == "calibration"]
    for dataset in sorted({r["dataset"] for r in tried}):
        add(weights_map([r for r in tried if r["dataset"] == dataset], f"{dataset}, RS-AAER"), "map", dataset)
    return out


def course(rows: list[dict], place: str):
    """Abnormal examples, their variations and the probe's accuracies against the epoch; thin lines are single seeds."""
    rows = [r for r in rows if "curve_abnormal" in r["metrics"]]
    methods = sorted({r["method"] for r in rows}, reverse=True)
    if not methods:
        return None
    starts = [s for s in ("RS", "N", "V") if any(m.startswith(f"{s}-") for m in methods)]
    styles = dict(zip(starts, STYLES, strict=False))
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.6), sharex=True)
    panels = (
        *(("abnormal", "abnormal examples (% of the epoch)", 100, axes[0, 0]),),
        *(("probe_pgd", "PGD-10 (solid) and FGSM accuracy (%)", 1, axes[0, 1]),),
        *(("gap", "logit variation: abnormal minus normal", 1, axes[1, 0]),),
        *(("e_a", "loss variation of abnormal examples", 1, axes[1, 1]),),
    )
    for key, title, factor, axis in panels:
        for m in methods:
            start, kind = m.rsplit("-", 1)
            look = {"color": COLOURS[kind], "ls": styles[start]}
            curves = [r["metrics"][f"curve_{key}"] for r in rows if r["method"] == m]
            several(axis, curves, factor, label=m, **look)
            if key == "probe_pgd":
                fgsm = [r["metrics"]["curve_probe_fgsm"] for r in rows if r["method"] == m]
                mean = np.mean(stacked(fgsm), 0)
                axis.plot(1 + np.arange(len(mean)), mean, color=COLOURS[kind], ls=":", lw=1.8)
        axis.set_title(title, fontsize=11)
    axes[0, 1].plot([], [], color="grey", ls=":", label="FGSM accuracy")
    for axis in axes[1]:
        axis.set_xlabel("epoch")
        axis.set_yscale("symlog", linthresh=1.0)
    axes[0, 0].legend(frameon=False, fontsize=9)
    axes[0, 1].legend(frameon=False, fontsize=9)
    figure.suptitle(place)
    figure.tight_layout()
    return figure, (
        f"{place}: course of training, means over {len({r['seed'] for r in rows})} seeds, thin lines are single seeds. "
        "Overfitting shows as abnormal examples and variations that grow while PGD accuracy leaves FGSM accuracy."
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


def weights_map(rows: list[dict], place: str):
    """PGD accuracy and clean accuracy over lambda3 and the radius, the best rate of each cell; lambda3 = 0 is FGSM."""
    found: dict[tuple, dict] = {}
    for r in rows:
        s = r["settings"]
        cell = (round(255 * s["eps"]), s["lambda3"] if s["method"] == "aaer" else 0.0)
        if cell not in found or r["metrics"]["pgd"] > found[cell]["metrics"]["pgd"]:
            found[cell] = r
    radii, weights = (sorted({c[k] for c in found}) for k in (0, 1))
    if len(radii) < 2 or len(weights) < 2:
        return None
    figure, axis = plt.subplots(figsize=(1.5 * len(weights) + 2.2, 1.0 * len(radii) + 1.6))
    grid = np.array([[found[e, w]["metrics"]["pgd"] if (e, w) in found else np.nan for w in weights] for e in radii])
    picture = axis.imshow(grid, cmap="viridis", vmin=0, aspect="auto", origin="lower")
    for i, e in enumerate(radii):
        for j, w in enumerate(weights):
            r = found.get((e, w))
            text = "not run" if r is None else f"PGD {grid[i, j]:.0f}, clean {r['metrics']['clean']:.0f}"
            text += "" if r is None else f"\nlr {r['settings']['lr']:g}" + (", CO" if r["metrics"]["collapsed"] else "")
            dark = r is not None and grid[i, j] < 0.7 * np.nanmax(grid)
            axis.text(j, i, text, ha="center", va="center", fontsize=9, color="w" if dark else "k")
    axis.set_xticks(range(len(weights)), [f"{w:g}" if w else "0 (FGSM)" for w in weights])
    axis.set_yticks(range(len(radii)), [f"{e}/255" for e in radii])
    axis.set(xlabel="lambda3", ylabel="radius", title=place)
    figure.colorbar(picture, ax=axis, label="PGD accuracy (%)")
    figure.tight_layout()
    seeds = ", ".join(str(k) for k in sorted({r["seed"] for r in rows}))
    return figure, (
        f"{place}: calibration on seed {seeds}, in each cell the rate of highest PGD accuracy. CO: the run "
        "ends in catastrophic overfitting."
    )


def stacked(curves: list[list]) -> np.ndarray:
    n = min(map(len, curves))
    return np.array([[np.nan if v is None else v for v in c[:n]] for c in curves], dtype=float)


def several(axis, curves: list[list], factor: float, label: str, **look) -> None:
    values = factor * stacked(curves)
    x = 1 + np.arange(values.shape[1])
    for v in values:
        axis.plot(x, v, lw=0.7, alpha=0.45, **look)
    axis.plot(x, values.mean(0), lw=2.2, label=label, **look)


def median_distance(rows: list[dict], r: dict) -> float:
    """How far a record's PGD accuracy is from the median of its method."""
    return abs(
        r["metrics"]["pgd"] - float(np.median([o["metrics"]["pgd"] for o in rows if o["method"] == r["method"]]))
    )


def surface(rows: list[dict], place: str):
    """Mean loss around the probe images early and at the end, for the seed of median final PGD accuracy of a method."""
    seeds = {}
    for r in sorted(rows, key=lambda r: (median_distance(rows, r), r["seed"])):
        if "surface_after" in r["metrics"]:
            seeds.setdefault(r["method"], r)
    if not seeds:
        return None
    methods = sorted(seeds, reverse=True)
    figure, axes = plt.subplots(len(methods), 2, figsize=(7.6, 3.1 * len(methods)), squeeze=False)
    for line, m in zip(axes, methods, strict=True):
        metrics, eps = seeds[m]["metrics"], 255 * seeds[m]["settings"]["eps"]
        both = [np.array(metrics[f"surface_{k}"]) for k in ("before", "after")]
        before = f"epoch {metrics['surface_epoch']}"
        for axis, values, when in zip(line, both, (before, f"epoch {metrics['epochs']}"), strict=True):
            half = eps / (len(values) - 1)  # half a cell: the points of the grid are the cells' centres
            reach = (-0.5 * eps - half, 1.5 * eps + half)
            picture = axis.imshow(values, origin="lower", extent=(*reach, *reach), aspect="auto", cmap="viridis")
            axis.plot(0, 0, "w+", ms=9)
            axis.plot(0, eps, "wx", ms=8)
            axis.set_title(f"{m}, {when}", fontsize=10)
            axis.set(xlabel="random sign (1/255)", ylabel="gradient sign (1/255)")
            figure.colorbar(picture, ax=axis, label="loss")
    figure.tight_layout()
    return figure, (
        f"{place}: mean cross-entropy around test images (+), along the sign of the gradient and a random sign image; "
        "x is the single-step attack. Where a network has collapsed, the loss on the way there is higher than at x."
    )
