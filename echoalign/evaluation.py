"""Metrics, pictures and printed lines of a run: what training and evaluation both need."""

import base64
import csv
import io
from collections.abc import Iterable
from pathlib import Path

from lab import runs

import numpy as np
import torch
from torch import Tensor


def official_seed(seed: int) -> int:
    """Of the crops and flips of the released code's evaluation outside training."""
    return 77_000_003 + seed


def summary(curve: list[dict]) -> dict:
    """Metrics of a training: accuracy of the last epoch (per cent), best over epochs, the curve; `before`: the same at
    the end of the main stage where fine-tuning followed."""

    def of(rows: list[dict]) -> dict:
        out = {}
        for key in ("accuracy", "accuracy_official"):
            seen = [r[key] for r in rows if key in r]
            if seen:
                out |= {key: seen[-1], f"{key}_best": max(seen)}
        if rows and "val_accuracy" in rows[-1]:
            out["val_accuracy"] = rows[-1]["val_accuracy"]
        return out

    main = [r for r in curve if r["main"]]
    out = {**of(curve), "epochs": len(curve)}
    out["curve_epoch"] = [r["epoch"] for r in curve if "accuracy" in r]
    out["curve_accuracy"] = [r["accuracy"] for r in curve if "accuracy" in r]
    out["curve_loss"] = [r["loss"] for r in curve]
    if len(main) < len(curve):
        tuned = of([r for r in curve if not r["main"]])
        out |= {k.replace("_best", "_finetune_best"): v for k, v in tuned.items() if k.endswith("_best")}
        out["before"] = {**of(main), "epochs": len(main)}
    return out


def histograms(s: Tensor, right: Tensor, bins: int = 40) -> dict:
    """Counts of the similarity among right and wrong labels, with the edges."""
    fine = torch.isfinite(s)
    if not fine.any():
        return {}
    v = s[fine].numpy()
    edges = np.linspace(v.min(), max(v.max(), v.min() + 1e-9), bins + 1)
    out: dict = {"edges": edges.tolist()}
    for name, mask in (("right", right), ("wrong", ~right)):
        out[f"histogram_{name}"] = np.histogram(s[fine & mask].numpy(), edges)[0].tolist()
    return out


def spread(mask: Tensor, n: int) -> Tensor:
    """n indices of True entries, evenly over their order, which is by class in sorted data sets."""
    index = torch.nonzero(mask)[:, 0]
    return index[torch.linspace(0, len(index) - 1, min(n, len(index))).round().long()]


def gallery(p, path: Path, n: int = 8) -> None:
    """Originals, modified images and both labels, for right and wrong labels, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [("label right", p.right), ("label wrong", ~p.right)]
    rows = [(t, spread(mask, n)) for t, mask in rows if mask.any()]
    figure, axes = plt.subplots(2 * len(rows), n, figsize=(1.25 * n, 2.7 * len(rows)), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for r, (title, index) in enumerate(rows):
        for c, i in enumerate(index.tolist()):
            for k, image in enumerate((p.data.train.x[i], p.modified.small[i])):
                axis = axes[2 * r + k, c]
                axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
                true = f"true {int(p.data.train.y[i])}, "
                text = f"{true}given {int(p.y[i])}" if k == 0 else f"s = {float(p.similarity[i]):.2f}"
                axis.set_title(text, fontsize=7)
        axes[2 * r, 0].text(
            -0.15, -0.15, title, transform=axes[2 * r, 0].transAxes, rotation=90, ha="right", fontsize=8
        )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def thumbnails(p, n: int = 6) -> dict:
    """n samples with wrong and n with right labels, for figures.py: base64 of uint8 [n, H, W, C]."""
    index = torch.cat([spread(mask, n) for mask in (~p.right, p.right)])

    def packed(x: Tensor) -> dict:
        return {"shape": list(x.shape), "bytes": base64.b64encode(x.contiguous().numpy().tobytes()).decode()}

    s = torch.nan_to_num(p.similarity[index], nan=-1.0)
    told = {"true": p.data.train.y[index].tolist(), "given": p.y[index].tolist(), "similarity": s.tolist()}
    return {"original": packed(p.data.train.x[index]), "modified": packed(p.modified.small[index]), **told}


def report(p, path: Path) -> None:
    """A line a sample, least similar first: index, given label, similarity, kept, true label."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["index", "given_label", "similarity", "kept_original", "modified_ok", "true_label"])
    order = torch.argsort(torch.nan_to_num(p.similarity, nan=-2.0), stable=True)
    for i in order.tolist():
        true = int(p.data.train.y[i])
        kept, fine = int(p.selected[i]), int(p.modified.ok[i])
        out.writerow([i, int(p.y[i]), f"{float(p.similarity[i]):.6f}", kept, fine, true])
    runs.write_text(path, text.getvalue())


def weights(learner) -> dict[str, Tensor]:
    """All networks of a learner in one file."""
    return {f"{k}.{n}": v for k, net in enumerate(learner.plain) for n, v in net.state_dict().items()}


def show(records: Iterable[dict]) -> None:
    """Print a line a method: mean over the seeds."""
    rows: dict[str, list[dict]] = {}
    for r in records:
        rows.setdefault(r["method"], []).append(r["metrics"])
    for name, found in rows.items():
        v = np.array([m["accuracy"] for m in found])
        best = np.mean([m["accuracy_best"] for m in found])
        spread = f" +- {v.std():.2f}" if len(v) > 1 else ""
        seeds = f"{len(v)} seed{'s' if len(v) > 1 else ''}"
        print(f"{name:36s} accuracy {v.mean():.2f}{spread} % (best epoch {best:.2f} %), {seeds}")
