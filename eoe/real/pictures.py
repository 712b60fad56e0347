"""Pictures of scale real: gains beyond irrelevant names, beta against the number of names, scores, names that fire."""

import json
import textwrap
from pathlib import Path

from lab import runs

import matplotlib.pyplot as plt
import numpy as np
import torch

import evaluation
import metrics
from real.sets import TITLES
from scores import reduce

SIDE, SHOWN = 96, 24  # pixels and number of the pictures that are kept
LIST = {"near": "own near", "fine": "own fine", "far": "own far", "davis": "own near"}
TITLE = {"near": "near", "fine": "fine-grained", "far": "far", "davis": "DAVIS"}
PHOTO = "lite0, a photo of a"  # the setting that is drawn
RANGES = {"FPR95": (0, 100, "viridis"), "AUROC": (50, 100, "viridis_r")}  # least, most, colours: dark is better
GAINS = {  # what a gain is over, its colour and its place beside the others
    "gain": ("over MCM", "#999999", 0.2),
    "beyond_irrelevant": ("over as many irrelevant names", "#0072b2", 0.0),
    "beyond_animals": ("over as many random animals", "#e69f00", -0.2),
}
SOURCES = (
    "Pictures: CIFAR-10 (Krizhevsky 2009, out of 80 Million Tiny Images; no licence stated), MNIST (LeCun, Cortes, "
    "Burges), Omniglot (Lake; MIT), textures of scikit-image (CC0), DAVIS 2016 (Perazzi et al.; BSD, copies of it name "
    "CC BY-NC 4.0). Faces are scored and not shown."
)


def keep(study, texts, path: Path) -> None:
    """Scores of the first split (far: of each set) under MCM and EOE, and OOD images drawn at random with their nearest
    ID and envisioned names, for the figures."""
    made, label = study.made, LIST[study.s.study]
    images = [image for part in made.parts for image in part.items]
    sets = [p for p in made.parts for _ in range(len(p))]
    rng, tensors, told, shown = np.random.default_rng(study.seed), {}, [], []
    chosen = range(len(made.splits)) if study.s.study == "far" else [0]
    for i in chosen:
        split, names = made.splits[i], study.lists[label][0][i]
        ids, out = texts(split.id_names), texts(names)
        stats = {w: reduce(study.features[torch.from_numpy(m)], ids, out)
                 for w, m in (("id", split.inside), ("ood", split.outside))}  # fmt: skip
        for where, found in stats.items():
            for method in ("MCM", "EOE"):
                tensors[f"{i}.{where}.{method}"] = torch.as_tensor(evaluation.score(found, method, study.s.beta))
        cut = metrics.threshold95(tensors[f"{i}.id.EOE"])
        if split.truth == ["face"]:
            continue  # portraits are scored, and not shown
        rows = np.flatnonzero(split.outside)
        for k in np.sort(rng.choice(len(rows), min(SHOWN // len(chosen), len(rows)), replace=False)):
            picture = torch.from_numpy(np.array(images[rows[k]])).permute(2, 0, 1)[None].float()
            shown.append(torch.nn.functional.interpolate(picture, (SIDE, SIDE), mode="nearest")[0].byte())
            told.append(
                {
                    "set": TITLES.get(sets[rows[k]].name, sets[rows[k]].name),
                    "true": sets[rows[k]].names[made.labels[rows[k]]],
                    "id": split.id_names[int(stats["ood"].id_name[k])],
                    "envisioned": names[int(stats["ood"].out_name[k])],
                    "nearer": bool(stats["ood"].top_out[k] > stats["ood"].top_id[k]),
                    "flagged": bool(tensors[f"{i}.ood.EOE"][k] < cut),
                }
            )
    about = {"told": told, "study": study.s.study, "list": label, "id_names": made.splits[0].id_names}
    runs.write_tensors(path, {**tensors, "pictures": torch.stack(shown)}, {"about": json.dumps(about)})


def _kept(records: list[dict], scale: str) -> list[tuple[dict, dict]]:
    """(tensors, about) that planned runs of the first backbone kept."""
    names = sorted({r["run"] for r in records if r["setting"] == PHOTO})
    paths = [p for n in names for p in sorted((runs.HERE / "runs" / scale / n).glob("seed*/pictures-*.safetensors"))]
    found = [runs.read_tensors(p) for p in paths]
    return [(tensors, json.loads(meta["about"])) for tensors, meta in found]


def _short(method: str) -> str:
    return method[4:].replace(")", "").replace(" without OOD names and kinds", ",\nno OOD names or kinds")


def gains(records: list[dict]):
    """What each list gains beyond as many irrelevant names, both metrics, with bootstrap intervals."""
    found = {}
    for r in records:
        if r["table"] == "real" and r["setting"] == PHOTO and "beyond_irrelevant_FPR95_low" in r["metrics"]:
            if r["method"].startswith("EOE(") and not r["method"].endswith("names"):
                found[r["dataset"], r["method"]] = r["metrics"]
    sets = [d for d in ("near", "fine-grained", "far: mean of 4 sets", "DAVIS") if any(k[0] == d for k in found)]
    methods = sorted({m for _, m in found})
    if not found:
        return None
    figure, axes = plt.subplots(2, len(sets), figsize=(2.9 * len(sets) + 1.5, 6.6), sharey=True, squeeze=False)
    for row, metric in zip(axes, ("FPR95", "AUROC"), strict=True):
        for axis, dataset in zip(row, sets, strict=True):
            for name, (told, colour, shift) in GAINS.items():
                for y, method in enumerate(methods):
                    m = found.get((dataset, method), {})
                    if f"{name}_{metric}_low" in m:
                        x, low, high = (m[f"{name}_{metric}{e}"] for e in ("", "_low", "_high"))
                        axis.plot([low, high], [y + shift] * 2, color=colour, lw=2)
                        axis.plot(x, y + shift, "o", ms=5, color=colour, label=told)
            axis.axvline(0, color="black", lw=0.8)
            axis.set_title(dataset if metric == "FPR95" else "", fontsize=11)
            axis.set_xlabel(f"gain in {metric} (points)", fontsize=9)
            axis.set_yticks(range(len(methods)), [_short(m) for m in methods], fontsize=9)
    marks = {k: h for a in axes.flat for h, k in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(marks.values(), marks, frameon=False, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.04))
    figure.tight_layout()
    return figure, (
        "What envisioned names gain over MCM (grey), over as many irrelevant names (blue) and over as many random "
        "animals (orange, animals against animals only), on real images; to the right is better; bars are 95 % "
        "intervals of a bootstrap over classes and images."
    )


def heat(records: list[dict]):
    """FPR95 and AUROC over beta and the number of names; a metric has one range of colours in all panels."""
    found: dict[tuple[str, str], dict[tuple[int, float], dict]] = {}
    for r in records:
        if (
            r["table"] == "real-sweep"
            and r["setting"].startswith("lite0,")
            and r["dataset"] in ("near", "far: mean of 4 sets")
        ):
            n, b = (float(x.split("=")[1]) for x in r["setting"].split(", ")[1:])
            found.setdefault((r["dataset"], r["method"]), {})[int(n), b] = r["metrics"]
    if not found:
        return None
    wide = len(found)
    figure, axes = plt.subplots(2, wide, figsize=(3.4 * wide + 1, 5.6), squeeze=False, layout="constrained")
    for row, (metric, (low, high, colours)) in zip(axes, RANGES.items(), strict=True):
        for axis, (key, cells) in zip(row, sorted(found.items()), strict=True):
            sizes, betas = sorted({n for n, _ in cells}), sorted({b for _, b in cells})
            grid = np.array([[cells[n, b][metric] for b in betas] for n in sizes])
            shown = axis.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto")
            for (i, k), v in np.ndenumerate(grid):
                red, green, blue, _ = shown.cmap(shown.norm(v))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                axis.text(k, i, f"{v:.1f}", ha="center", va="center", color="white" if dark else "black", fontsize=9)
            axis.set_xticks(range(len(betas)), [f"{b:g}" for b in betas])
            axis.set_yticks(range(len(sizes)), sizes)
            each = " a class" if "near" in key[1] else ""
            axis.set(xlabel="beta", ylabel=f"names asked for{each}")
            axis.set_title(f"{key[0].split(': ')[0]}: {key[1][4:-1]} names", fontsize=10)
        figure.colorbar(shown, ax=row.tolist(), label=f"{metric} (%)")
    return figure, (
        "FPR95 (0 to 100 %, lower is better) and AUROC (50 %, chance, to 100 %, higher is better) over the weight beta "
        "and the number of envisioned names, mean over splits or sets; dark is better, one range of colours a metric."
    )


def histograms(kept: list[tuple[dict, dict]]):
    """Scores of ID and OOD images under MCM and EOE."""
    rows = [(t, a) for t, a in kept if a["study"] != "far"] + [(t, a) for t, a in kept if a["study"] == "far"]
    if not rows:
        return None
    figure, axes = plt.subplots(len(rows), 2, figsize=(8, 2.3 * len(rows)), squeeze=False)
    for row, (tensors, about) in zip(axes, rows, strict=True):
        splits = sorted({k.split(".")[0] for k in tensors if ".id." in k})
        for axis, method in zip(row, ("MCM", "EOE"), strict=True):
            ids = tensors[f"{splits[0]}.id.{method}"].numpy()
            oods = np.concatenate([tensors[f"{i}.ood.{method}"].numpy() for i in splits])
            edges = np.linspace(min(ids.min(), oods.min()), max(ids.max(), oods.max()), 61)
            for values, name, colour in ((ids, "ID", "#0072b2"), (oods, "OOD", "#c1272d")):
                axis.hist(values, edges, density=True, alpha=0.55, label=name, color=colour)
            cut = metrics.threshold95(ids)
            axis.axvline(cut, color="black", lw=0.8, ls="--")
            names = f" ({about['list']} names)" if method == "EOE" else ""
            axis.set(title=f"{TITLE[about['study']]}: {method}{names}", xlabel="score", ylabel="density")
            axis.ticklabel_format(axis="both", style="sci", scilimits=(-2, 3))
            axis.locator_params(axis="x", nbins=5)
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    return (
        figure,
        "Scores of ID and OOD images; the dashed line keeps 95 % of the ID images. First split; far: all sets.",
    )


def names(kept: list[tuple[dict, dict]]):
    """OOD images with their nearest ID name and nearest envisioned name."""
    shown = [(p, t, a) for tensors, a in kept for p, t in zip(tensors["pictures"], a["told"], strict=True)]
    studies = [s for s in ("near", "fine", "far", "davis") if any(a["study"] == s for *_, a in shown)]
    if not shown:
        return None
    wide = 8
    figure, axes = plt.subplots(2 * len(studies), wide, figsize=(1.55 * wide, 4.1 * len(studies)), squeeze=False)
    for i, study in enumerate(studies):
        mine = [(p, t) for p, t, a in shown if a["study"] == study and t["set"] != "faces"]
        mine = [mine[k] for k in np.linspace(0, len(mine) - 1, min(len(mine), 2 * wide)).astype(int)]
        for j, axis in enumerate(axes[2 * i : 2 * i + 2].flat):
            axis.axis("off")
            if j >= len(mine):
                continue
            picture, t = mine[j]
            axis.imshow(picture.permute(1, 2, 0).numpy())
            text = f"{t['true']}\nID: {t['id']}\n" + "\n".join(textwrap.wrap(t["envisioned"], 18))
            colour = "#c1272d" if t["nearer"] else "black"
            axis.set_title(text, fontsize=7.5, color=colour)
        axes[2 * i][0].text(-0.25, 0.5, TITLE[study], rotation=90, va="center", transform=axes[2 * i][0].transAxes)
    figure.tight_layout()
    return figure, (
        "OOD images drawn at random: their true class, nearest ID name and nearest envisioned name of the own list "
        f"(red: nearer than any ID name). {SOURCES}"
    )


def figures(records: list[dict], scale: str) -> list[tuple[str, tuple | None]]:
    """(name, (figure, caption) or None) of all that the records and the runs' folders allow."""
    kept = _kept(records, scale)
    return [
        *(("gains", gains(records)), ("heat", heat(records))),
        *(("score-histograms", histograms(kept)), ("images", names(kept))),
    ]
