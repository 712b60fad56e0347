"""Pictures of RESULTS.md, drawn from records: <scale>-<name>.png."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})
COLOURS = ("#555555", "#c1272d", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c564b", "#bcbd22", "#17becf")
MARKS = "os^Dv<>PX*"  # lines that lie on one another


def draw(records: list[dict], folder: Path, scale: str) -> list[tuple[Path, str]]:
    """-> [(path, caption)] of the figures the records allow."""
    out = []
    groups = sorted({(r["table"], r["dataset"], r["setting"]) for r in records if not r["table"].endswith("-eval")})
    for table, dataset, setting in groups:
        rows = [r for r in records if (r["table"], r["dataset"], r["setting"]) == (table, dataset, setting)]
        name = "".join(c if c.isalnum() else "-" for c in f"{table}-{dataset}-{setting}".lower())
        for kind, function in (("tradeoff", tradeoff), ("course", course), ("masks", masks)):
            found = function(rows, f"{dataset}, {setting}" + ("" if table == "main" else f" ({table})"))
            if found:
                figure, caption = found
                path = folder / f"{scale}-{kind}-{name}.png"
                figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
                plt.close(figure)
                out.append((path, caption))
    return out


def arms(rows: list[dict]) -> list[str]:
    return sorted({r["method"] for r in rows}, key=lambda m: ("PART" in m, m))


def tradeoff(rows: list[dict], place: str):
    """Natural against PGD accuracy, a point a seed, a large one for the mean."""
    if len(arms(rows)) < 2:
        return None
    figure, axis = plt.subplots(figsize=(6, 4.4))
    for colour, m in zip(COLOURS, arms(rows), strict=False):
        xy = np.array([[r["metrics"]["natural"], r["metrics"]["pgd"]] for r in rows if r["method"] == m])
        axis.plot(*xy.T, "o", color=colour, ms=4, alpha=0.5)
        axis.plot(*xy.mean(0), "P" if "PART" in m else "o", color=colour, ms=11, label=m, mec="white")
    axis.set(xlabel="natural accuracy (%)", ylabel="PGD accuracy at uniform eps (%)", title=place)
    axis.legend(frameon=False, fontsize=9)
    seeds = len({r["seed"] for r in rows})
    return (
        figure,
        f"{place}: the trade-off. Small points are seeds, large ones means over {seeds}; up and right is better.",
    )


def course(rows: list[dict], place: str):
    """Probe accuracies and mean budget against the epoch after the warm-up."""
    if any("curve_probe_pgd" not in r["metrics"] for r in rows):
        return None
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    panels = (
        ("probe_natural", "natural accuracy (%)"),
        ("probe_pgd", "PGD accuracy (%)"),
        ("budget", "mean budget (1/255)"),
    )
    for axis, (key, title) in zip(axes, panels, strict=True):
        for colour, mark, m in zip(COLOURS, MARKS, arms(rows), strict=False):
            curves = [r["metrics"][f"curve_{key}"] for r in rows if r["method"] == m]
            n = min(map(len, curves))
            mean = np.mean([[np.nan if v is None else v for v in c[:n]] for c in curves], 0)
            look = {"color": colour, "ls": "-" if "PART" in m else "--"}
            axis.plot(1 + np.arange(n), mean, **look, lw=2, marker=mark, ms=5, fillstyle="none", label=m)
        axis.set(title=title, xlabel="epoch after the warm-up")
    figure.suptitle(place)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=6, frameon=False)
    return figure, (
        f"{place}: accuracy on a fixed part of the test images and mean training budget after each epoch, mean over "
        f"{len({r['seed'] for r in rows})} seeds. The arms fork from one warm-up."
    )


def unpack(text: str, shape: list[int]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(shape)


def masks(rows: list[dict], place: str):
    """Test images, and over them the maps of each arm at each kept epoch, with the border of the mask."""
    first = {}
    for r in sorted(rows, key=lambda r: r["seed"]):
        if "gallery" in r["metrics"]:
            first.setdefault(r["method"], r["metrics"]["gallery"])
    if not first:
        return None
    names = [m for m in arms(rows) if m in first][:6]
    gallery = first[names[0]]
    images = unpack(gallery["images"], gallery["shape"])
    lines = [(m, k, e) for m in names for k, e in enumerate(first[m]["epochs"])]
    n = len(images)
    figure, axes = plt.subplots(1 + len(lines), n, figsize=(1.25 * n + 1.2, 1.25 * (1 + len(lines))), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)

    def show(axis, i: int) -> None:
        axis.imshow(images[i].squeeze(), cmap="gray" if images.shape[-1] == 1 else None, interpolation="nearest")

    for i in range(n):
        show(axes[0, i], i)
        for line, (m, k, _) in enumerate(lines, 1):
            kept = first[m]["maps"][k]
            show(axes[line, i], i)
            axes[line, i].imshow(unpack(kept["cam"], kept["shape"])[i], cmap="jet", alpha=0.5, vmin=0, vmax=255)
            m_i = unpack(kept["mask"], kept["shape"])[i]
            if 0 < m_i.sum() < 255 * m_i.size:
                axes[line, i].contour(m_i, levels=[127.5], colors="white", linewidths=1.3)
    axes[0, 0].set_ylabel("image", rotation=0, ha="right", va="center", fontsize=9)
    for line, (m, _, e) in enumerate(lines, 1):
        axes[line, 0].set_ylabel(f"{m}\nepoch {e}", rotation=0, ha="right", va="center", fontsize=9)
    seed = min(r["seed"] for r in rows)
    return figure, (
        f"{place}: class activation maps of the trained networks on {n} test images (seed {seed}; blue low, red high). "
        "The white line borders the mask: inside it the budget is eps, outside eps_low."
    )
