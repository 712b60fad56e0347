"""Pictures of RESULTS.md, drawn from records and from what runs leave beside them in runs/<scale>/."""

import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from lab import runs
from lab.runs import HERE

import matplotlib.pyplot as plt
import numpy as np

COLOURS = {"DEEM": "#0072b2", "DEEM without CSR": "#e69f00", "DEEM* (baseline)": "#c1272d"}
COLOURS |= {"DEEM + MM-Interleaved": "#009e73", "DEEM, with maps": "#56b4e9"}
POPE = ("random", "popular", "adversarial")
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})


def draw(records: list[dict], folder: Path, scale: str) -> list[tuple[Path, str]]:
    """-> [(path, caption)] of the figures the records allow."""
    base, out = HERE / "runs" / scale, []
    for name, function in (
        ("reconstructions", reconstructions), ("attention", attention), ("pope", pope), ("losses", losses),
    ):  # fmt: skip
        try:
            made = function(records, base)
        except runs.UserError as error:  # a damaged picture file of a run: the other figures are drawn
            print(f"figure {name} left out: {error}")
            continue
        if made:
            figure, caption = made
            path = folder / f"{scale}-{name}.png"
            figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            out.append((path, caption))
    return out


def own(records: list[dict], stage: str = "stage 1") -> list[dict]:
    return [r for r in records if r["table"] in ("digits", "photos") and r["setting"] == stage]


def drawable(image) -> np.ndarray:
    """(H, W) or (H, W, 3) in [0, 1]."""
    return image.float().clamp(0, 1).numpy()


def pictures(records: list[dict], base: Path) -> dict[str, dict]:
    """{method: tensors of pictures.safetensors} of each method's first seed."""
    out: dict[str, dict] = {}
    for r in sorted(own(records), key=lambda r: r["seed"]):
        path = base / r["run"] / f"seed{r['seed']}" / "pictures.safetensors"
        if r["method"] not in out and path.is_file():
            out[r["method"]] = runs.read_tensors(path)[0] | {"seed": r["seed"]}
    return {m: out[m] for m in [*COLOURS, *out] if m in out}  # one order in every picture


def reconstructions(records: list[dict], base: Path):
    """Figures 9 and 10: scenes, and what the denoiser draws from their tokens alone."""
    found = {k: v for k, v in pictures(records, base).items() if "drawn" in v}
    seeds = {v["seed"] for v in found.values()}
    if not found:
        return None
    first = next(iter(found.values()))
    n = min(8, len(first["scenes"]))
    rows = [("scene", first["scenes"])] + [(m, v["drawn"]) for m, v in found.items() if v["seed"] == first["seed"]]
    figure, axes = plt.subplots(len(rows), n, figsize=(1.15 * n + 2, 1.2 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(drawable(image), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.tight_layout()
    return figure, (
        f"Held-out scenes and what the denoiser draws from their image tokens alone, from pure noise without guidance "
        f"(seed {min(seeds)}). Where tokens are not trained for it, the drawings have nothing to do with the scene."
    )


def attention(records: list[dict], base: Path):
    """What each query of the resampler looks at."""
    found = pictures(records, base).get("DEEM")
    if not found or "attention" not in found:
        return None
    maps, scenes_ = found["attention"], found["scenes"]
    n, queries, side = min(3, len(maps)), maps.shape[1], scenes_.shape[1] - 0.5
    figure, axes = plt.subplots(n, queries + 1, figsize=(1.15 * (queries + 1), 1.3 * n), squeeze=False)
    for i, line in enumerate(axes):
        line[0].imshow(drawable(scenes_[i]), cmap="gray", vmin=0, vmax=1)
        line[0].set_ylabel(f"scene {i + 1}", fontsize=9)
        for q in range(queries):
            line[q + 1].imshow(drawable(scenes_[i]), cmap="gray", vmin=0, vmax=1)
            line[q + 1].imshow(maps[i, q].numpy(), cmap="magma", alpha=0.6, extent=(-0.5, side, side, -0.5), vmin=0)
            if i == 0:
                line[q + 1].set_title(f"query {q + 1}", fontsize=9)
        for axis in line:
            axis.set(xticks=[], yticks=[])
    figure.tight_layout()
    h, w = maps.shape[2:]
    return figure, (
        f"Attention of the resampler's queries over the {h} x {w} grid of image tokens, last layer that reads them, "
        f"mean over heads (DEEM, seed {found['seed']}); the pooled token is left out."
    )


def pope(records: list[dict], base: Path):
    """tiny-POPE: accuracy and share of yes."""
    groups = defaultdict(list)
    for stage in ("stage 1", "stage 2"):
        for r in own(records, stage):
            if "POPE_random_accuracy" in r["metrics"]:
                groups[stage, r["method"]].append(r["metrics"])
    methods = [m for m in COLOURS if any(k[1] == m for k in groups)]
    stages = [s for s in ("stage 1", "stage 2") if any(k[0] == s for k in groups)]
    if not methods:
        return None
    figure, axes = plt.subplots(2, len(stages), figsize=(5.2 * len(stages), 5.2), sharey="row", squeeze=False)
    for column, stage in enumerate(stages):
        here = [m for m in methods if (stage, m) in groups]
        for row, (key, label) in enumerate((("accuracy", "accuracy (%)"), ("yes_ratio", "answers yes (%)"))):
            axis, width = axes[row][column], 0.8 / max(1, len(here))
            for i, m in enumerate(here):
                some = [[g[f"POPE_{kind}_{key}"] for kind in POPE] for g in groups[stage, m]]
                x = np.arange(3) + (i - (len(here) - 1) / 2) * width
                axis.bar(x, np.mean(some, 0), width * 0.9, yerr=np.std(some, 0), color=COLOURS[m], label=m, capsize=2)
            axis.axhline(50, color="grey", lw=0.8, ls=":")
            axis.set_xticks(range(3), POPE)
            axis.set_ylim(0, 100)
            if column == 0:
                axis.set_ylabel(label)
        axes[0][column].set_title({"stage 1": "after alignment", "stage 2": "after instruction tuning"}[stage])
    figure.tight_layout()
    handles = {h.get_label(): h for axis in axes[0] for h in axis.containers if h.get_label() in methods}
    more = {"ncols": len(handles), "frameon": False, "fontsize": 9}
    figure.legend([handles[m] for m in methods], methods, loc="lower center", bbox_to_anchor=(0.5, 1.0), **more)
    return (
        figure,
        "tiny-POPE: accuracy and share of yes, mean and deviation over seeds; dotted: always yes, and balance.",
    )


def losses(records: list[dict], base: Path):
    """Losses of stage 1 against steps."""
    curves = defaultdict(list)
    for r in own(records):
        path = base / r["run"] / f"seed{r['seed']}" / "metrics.jsonl"
        lines = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        if lines:
            curves[r["method"]].append(lines)
    if not curves:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    for axis, (key, title) in zip(
        axes, (("ntp", "next token"), ("nip", "next image"), ("csr", "own image (CSR)")), strict=True
    ):
        for method in [*(m for m in COLOURS if m in curves), *sorted(curves.keys() - COLOURS.keys())]:
            runs_ = curves[method]
            rows = [[(x["step"], x[key]) for x in lines if key in x] for lines in runs_]
            rows = [r for r in rows if r and len(r) == len(rows[0])]
            if rows:
                mean = np.mean(rows, 0)
                axis.plot(mean[:, 0], mean[:, 1], color=COLOURS.get(method, "#555555"), label=method, lw=1.3)
        axis.set(xlabel="step", title=title, ylim=(0, None))
    axes[0].set_ylabel("loss")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure, "Losses of the last micro-batch in stage 1, mean over seeds; without CSR there is no third one."
