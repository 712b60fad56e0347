"""Pictures of RESULTS.md, drawn from records: <scale>-<name>.png."""

import base64
from pathlib import Path

from lab.claims import interval

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLOURS = {
    "EchoSelect": "#c1272d",
    "small-loss": "#0072b2",
    "GMM on loss": "#56b4e9",
    "kNN agreement": "#009e73",
    "cleanlab": "#e69f00",
    "pretrained classifier": "#555555",
    "CLIP zero-shot": "#555555",
    "ImageNet's classes": "#555555",
    "CLIPCleaner": "#a05aa0",
}
BESIDE = ("clean-images", "lite0", "sweep")  # tables that have no picture of each of their settings
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def draw(records: list[dict], folder: Path, scale: str) -> list[tuple[Path, str]]:
    """-> [(path, caption)] of the figures the records allow."""
    out = []

    def add(found, name: str) -> None:
        if found:
            path = folder / f"{scale}-{''.join(c if c.isalnum() else '-' for c in name.lower())}.png"
            save(found[0], path)
            out.append((path, found[1]))

    def places(suffix: str) -> list[tuple[str, str, str]]:
        found = [r for r in records if r["table"].endswith(suffix) and not r["table"].startswith(BESIDE)]
        return sorted({(r["table"], r["dataset"], r["setting"]) for r in found})

    def rows(place) -> list[dict]:
        return [r for r in records if (r["table"], r["dataset"], r["setting"]) == place]

    add(clean_images([r for r in records if r["table"] == "clean-images"]), "clean-images")
    for place in places("-edits"):
        name = f"{place[1]}, {place[2]}"
        add(gallery(rows(place), name), f"edits-{place[0]}-{name}")
    for place in places("-selection"):
        name = f"{place[1]}, {place[2]}"
        add(histogram(rows(place), name), f"similarity-{place[0]}-{name}")
        add(curves(rows(place), name), f"selection-{place[0]}-{name}")
    mains = [r for r in records if "curve_accuracy" in r["metrics"] and not r["table"].startswith(BESIDE)]
    for place in sorted({(r["table"], r["dataset"], r["setting"]) for r in mains}):
        found = [r for r in rows(place) if "accuracy" in r["metrics"]]
        add(accuracies(found, f"{place[1]}, {place[2]}"), f"accuracy-{place[0]}-{place[1]}-{place[2]}")
    return out


CLEAN = {
    "EchoAlign": ("#c1272d", "o"),
    "CE on the clean pretraining images": ("#0072b2", "s"),
    "filtered by the prior": ("#009e73", "^"),
}


def clean_images(rows: list[dict]):
    """Accuracy against the number of clean images, of those that use them; lines of those that use none."""
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(7.4, 4.4))
    for name, (colour, marker) in CLEAN.items():
        found: dict[int, list[float]] = {}
        for r in rows:
            if r["method"] == name:
                found.setdefault(r["data"]["n_pre"], []).append(r["metrics"]["accuracy"])
        n = sorted(found)
        axis.plot(n, [np.mean(found[k]) for k in n], "-", marker=marker, color=colour, lw=1.8, label=name)
        axis.plot(
            [k for k in n for _ in found[k]], [v for k in n for v in found[k]], ".", color=colour, ms=4, alpha=0.6
        )
    for name, style in (("ELR", "--"), ("CE", ":")):
        v = _of(rows, name)
        if v:
            axis.axhline(np.mean(v), color="#555555", ls=style, lw=1.2, label=f"{name}, no clean image")
    axis.set(xscale="log", xlabel="clean images", ylabel="test accuracy, last epoch (%)", title=rows[0]["dataset"])
    ticks = sorted({r["data"]["n_pre"] for r in rows})
    axis.set_xticks(ticks, [f"{k:,}" for k in ticks], minor=False)
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    return figure, (
        f"{rows[0]['dataset']} with half of the labels wrong (instance-dependent): who needs how many clean images. "
        "EchoAlign uses them for its generator and features, the others for a classifier, which is used as it is, or "
        "as a filter of the noisy images. Lines are means, dots seeds."
    )


def pictures(told: dict) -> list[np.ndarray]:
    """Images of a record: base64 of uint8 [n, H, W, C]."""
    raw = np.frombuffer(base64.b64decode(told["bytes"]), np.uint8)
    return list(raw.reshape(told["shape"]))


def gallery(rows: list[dict], place: str):
    """Originals over modified images, with both labels, of the first seed."""
    found = sorted((r for r in rows if "gallery" in r["metrics"]), key=lambda r: r["seed"])
    if not found:
        return None
    g = found[0]["metrics"]["gallery"]
    one, two = pictures(g["original"]), pictures(g["modified"])
    figure, axes = plt.subplots(2, len(one), figsize=(1.05 * len(one), 2.6), squeeze=False)
    for k, (x, y) in enumerate(zip(one, two, strict=True)):
        for axis, image in ((axes[0, k], x), (axes[1, k], y)):
            axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
        wrong = g["true"][k] != g["given"][k]
        axes[0, k].set_title(f"{g['true'][k]} → {g['given'][k]}", fontsize=8, color="#c1272d" if wrong else "k")
        axes[1, k].set_xlabel(f"s = {g['similarity'][k]:.2f}", fontsize=8)
    axes[0, 0].set_ylabel("original", fontsize=8)
    axes[1, 0].set_ylabel("modified", fontsize=8)
    figure.tight_layout(pad=0.4)
    return figure, (
        f"{place}, seed {found[0]['seed']}: originals (true → given label; wrong ones red) above what EchoMod made of "
        "them, with the similarity s of their features. Samples of either kind at even distances, not chosen."
    )


def histogram(rows: list[dict], place: str):
    """Similarities of right and wrong labels of each seed, and the threshold."""
    found = sorted((r for r in rows if "histogram_right" in r["metrics"]), key=lambda r: r["seed"])
    if not found:
        return None
    size = {"figsize": (4.2 * len(found), 3.3), "squeeze": False, "sharey": True}
    figure, axes = plt.subplots(1, len(found), **size)
    for axis, r in zip(axes[0], found, strict=True):
        m = r["metrics"]
        for kind, colour in (("right", "#0072b2"), ("wrong", "#c1272d")):
            axis.stairs(m[f"histogram_{kind}"], m["edges"], fill=True, alpha=0.55, color=colour, label=f"label {kind}")
        if "tau" in m:
            axis.axvline(m["tau"], color="k", ls="--", lw=1.2, label=f"tau = {m['tau']:.2f}")
        axis.set(title=f"seed {r['seed']}", xlabel="similarity of original and modified")
        axis.legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("samples")
    figure.suptitle(place)
    figure.tight_layout()
    return figure, f"{place}: similarity of original and modified image for right and wrong labels, and the threshold."


def curves(rows: list[dict], place: str):
    """Selection accuracy against the number kept, every threshold of every selector; the first seed."""
    found = [r for r in rows if r["metrics"].get("curve_kept")]
    if not found:
        return None
    seed = min(r["seed"] for r in found)
    figure, axis = plt.subplots(figsize=(7.4, 4.2))
    lowest = 100.0
    for r in (r for r in found if r["seed"] == seed):
        m = r["metrics"]
        x, y = np.array(m["curve_kept"]), np.array(m["curve_precision"])
        axis.plot(x, y, lw=1.8, label=r["method"], color=COLOURS.get(r["method"]))
        if "precision" in m:
            axis.plot(m["selected"], m["precision"], "o", ms=7, color=COLOURS.get(r["method"]))
        lowest = min(lowest, y[-1])
    axis.axhline(99, color="k", lw=0.8, ls=":")
    axis.set(xlabel="samples kept", ylabel="selection accuracy (%)", title=place, ylim=(max(0, lowest - 3), 101))
    axis.legend(frameon=False, fontsize=9, loc="lower left")
    figure.tight_layout()
    return figure, (
        f"{place}, seed {seed}: share of right labels among the samples kept, over all thresholds; dots are the "
        "selectors' own decisions, the dotted line is 99 per cent."
    )


def accuracies(rows: list[dict], place: str):
    """Accuracy of every method: means with their intervals, small points are seeds."""
    names = sorted({r["method"] for r in rows}, key=lambda n: np.mean(_of(rows, n)))
    if len(names) < 2:
        return None
    figure, axis = plt.subplots(figsize=(7.6, 0.33 * len(names) + 1.2))
    for k, name in enumerate(names):
        v = _of(rows, name)
        mean, half = interval(v)
        colour = "#c1272d" if name.startswith("EchoAlign") else "#333333"
        axis.errorbar(mean, k, xerr=None if half != half else half, fmt="o", ms=5, color=colour, capsize=3, lw=1.4)
        axis.plot(v, [k + 0.25] * len(v), ".", ms=4, color=colour, alpha=0.5)
    axis.set_yticks(range(len(names)), names)
    axis.grid(axis="x", lw=0.4, alpha=0.5)
    axis.set(xlabel="test accuracy, last epoch (%)", title=place, ylim=(-0.6, len(names) - 0.3))
    figure.tight_layout()
    how = "; heads on fixed features" if all(r.get("settings", {}).get("model") == "head" for r in rows) else ""
    how += "; networks from random weights" if rows[0]["table"] == "scratch" else ""
    seen = {len(_of(rows, n)) for n in names}
    what = "means with their 95 % intervals over the seeds (small points)" if max(seen) > 1 else "one seed each"
    return figure, f"{place}{how}: test accuracy of the last epoch; {what}."


def _of(rows: list[dict], name: str) -> list[float]:
    return [r["metrics"]["accuracy"] for r in rows if r["method"] == name]
