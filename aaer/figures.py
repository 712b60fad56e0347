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
    main = [r for r in records if r["table"] == "main" and r["method"].rsplit("-", 1)[-1] in COLOURS]
    groups = sorted({(r["dataset"], r["setting"]) for r in main}, key=str)
    for dataset, setting in groups:
        rows = [r for r in main if (r["dataset"], r["setting"]) == (dataset, setting)]
        name = f"{dataset}-{setting}".lower().replace(" ", "-").replace("/", "-").replace("=", "")
        for kind, function in (("course", course), ("surface", surface)):
            found = function(rows, f"{dataset}, {setting}")
            if found:
                figure, caption = found
                path = folder / f"{scale}-{kind}-{name}.png"
                figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
                plt.close(figure)
                out.append((path, caption))
    return out


def course(rows: list[dict], place: str):
    """Abnormal examples, their variations and the probe's accuracies against the epoch; thin lines are single seeds."""
    methods = [m for m in sorted({r["method"] for r in rows}, reverse=True) if "curve_abnormal" in rows[0]["metrics"]]
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
