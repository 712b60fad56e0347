"""EchoSelect: which originals to keep, the training set D_mix and its loss; and how well a selection did.

u(x) = f(x) / |f(x)|,   s_i = <u(x_i), u(x'_i)>,   S = {i : s_i > tau}
D_mix = {(x_i, y~_i, c=0) : i in S} + {(x'_i, y~_i, c=1) : all i}
w(c=1) = n0 / (n0 + n1),  w(c=0) = n1 / (n0 + n1),  n0 = |S|, n1 = number of modified images
L = (1/B) sum_b w(c_b) CE(h(x_b), y~_b)                      (divided by B, not by the sum of the weights)
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from torch import Tensor


def similarity(f: Tensor, g: Tensor) -> Tensor:
    """Cosine of rows of f and g [n, D] -> float64 [n]; NaN where a feature is zero or not finite."""
    f, g = f.double(), g.double()
    return (f * g).sum(1) / (f.norm(dim=1) * g.norm(dim=1))


def by_threshold(s: Tensor, tau: float) -> Tensor:
    """s_i > tau, strictly; NaN is not selected."""
    return s > tau


def automatic_threshold(s: Tensor, rule: str) -> float:
    """tau from the similarities alone, no label used. gmm: where the two components of a Gaussian mixture are equally
    likely, between their means; otsu: the histogram's best split."""
    if rule not in ("gmm", "otsu"):
        raise ValueError(f"a threshold is a number, gmm or otsu, not {rule}")
    v = s[torch.isfinite(s)].numpy()
    if len(np.unique(v)) < 2:
        raise ValueError(
            f"threshold {rule}: all similarities are equal, nothing tells the samples apart; give a number"
        )
    if rule == "otsu":
        from skimage.filters import threshold_otsu

        return float(threshold_otsu(v))
    mixture = GaussianMixture(2, random_state=0, n_init=3).fit(v[:, None])
    low, high = np.sort(mixture.means_[:, 0])
    grid = np.linspace(low, high, 10_001)
    upper = mixture.predict_proba(grid[:, None])[:, int(mixture.means_[:, 0].argmax())]
    return float(grid[int((upper >= 0.5).argmax())]) if (upper >= 0.5).any() else float(high)


@dataclass
class Selection:
    """What `select` found, rows in the order of the features."""

    keep: Tensor
    """bool [n]: S, the originals to keep with their labels."""
    similarity: Tensor
    """s [n], float64; NaN where a feature was zero or not finite, which is never kept."""
    threshold: float
    """tau."""
    empty: list[int]
    """Labels of which no original was kept: the classifier sees edited images of them alone."""


def select(features: Tensor, edited_features: Tensor, labels: Tensor, threshold: float | str = "gmm") -> Selection:
    """EchoSelect on your own tensors: features [n, D] of the originals and [n, D] of their edited images by the same
    network, noisy labels int [n]. S = {i : s_i > tau}, s_i the cosine of the two rows; threshold: tau itself, or gmm or
    otsu, which find it from the similarities. ValueError where the three do not belong together."""
    if features.dim() != 2 or features.shape != edited_features.shape or labels.shape != features.shape[:1]:
        shapes = ", ".join(str(tuple(v.shape)) for v in (features, edited_features, labels))
        raise ValueError(
            f"select takes features [n, D] of originals and of edited images, and labels [n]; not {shapes}"
        )
    s = similarity(features, edited_features).cpu()
    tau = automatic_threshold(s, threshold) if isinstance(threshold, str) else float(threshold)
    keep = by_threshold(s, tau)
    left = set(labels.cpu()[keep].tolist())
    return Selection(keep, s, tau, sorted(set(labels.tolist()) - left))


def small_loss_ratio(rho: float) -> float:
    """Share of each class to keep: min(1 - 1.2 rho, 0.9 (1 - rho))."""
    return max(0.0, min(1 - 1.2 * rho, 0.9 * (1 - rho)))


def by_small_loss(loss: Tensor, labels: Tensor, ratio: float) -> Tensor:
    """For each noisy class the floor(ratio n_class) samples of smallest loss; ties by index."""
    keep = torch.zeros(len(loss), dtype=torch.bool)
    for k in labels.unique():
        mine = torch.nonzero(labels == k)[:, 0]
        order = torch.argsort(loss[mine], stable=True)
        keep[mine[order[: math.floor(ratio * len(mine) + 1e-9)]]] = True
    return keep


def mixture(x: Tensor, modified: Tensor, y: Tensor, selected: Tensor, usable: Tensor, modified_set: str = "all"):
    """D_mix as (images, labels, c): selected originals, then modified images. modified_set: all (released code) or
    unselected (its first version: those whose original was not kept). usable: False leaves a modified image out."""
    other = usable & ~selected if modified_set == "unselected" else usable
    images = torch.cat([x[selected], modified[other]])
    labels = torch.cat([y[selected], y[other]])
    return images, labels, torch.cat([torch.zeros(int(selected.sum())), torch.ones(int(other.sum()))]).long()


def loss_weights(c: Tensor) -> Tensor:
    """[w(0), w(1)] of the class flags c: each group gets the share of the OTHER one."""
    n1 = float(c.sum())
    n0 = len(c) - n1
    return torch.tensor([n1 / (n0 + n1), n0 / (n0 + n1)]) if n0 and n1 else torch.ones(2)


def weighted_loss(logits: Tensor, y: Tensor, c: Tensor, weights: Tensor, normalise: bool = False) -> Tensor:
    """(1/B) sum_b w(c_b) CE_b; normalise divides by the sum of the weights instead of B, which is another method."""
    w = weights.to(logits.device)[c]
    each = w * F.cross_entropy(logits, y, reduction="none")
    return each.sum() / w.sum() if normalise else each.mean()


# -------------------------------------------------------------------------------------------- how well a selection did


def quality(selected: Tensor, right: Tensor) -> dict[str, float]:
    """selected, right (label is true): bool [n]. Precision ("selection accuracy") and recall in per cent."""
    n, both = int(selected.sum()), int((selected & right).sum())
    out = {"selected": n, "recall": 100 * both / max(1, int(right.sum()))}
    return {**out, "precision": 100 * both / n} if n else out


def sweep(score: Tensor, right: Tensor, levels: tuple[float, ...] = (90, 95, 98, 99)) -> dict:
    """Every threshold of a score (higher: more surely right). For reporting only: it uses the true labels.

    auc: area under the ROC curve; retained_p: the largest number kept by any threshold with a precision of at least p
    per cent, ties kept or left together; retained_p_share: that number over the number of right samples, per cent. The
    wrong ones among the kept count too, so it reaches 100 / p x 100 at most, and the share of the right samples that
    are kept lies between p / 100 of it and it. curve: (number kept, precision) at up to 200 thresholds.
    """
    score = torch.where(torch.isfinite(score), score.double(), -torch.inf)
    order = torch.argsort(score, descending=True, stable=True)
    hits = right[order].double().cumsum(0)
    kept = torch.arange(1, len(order) + 1)
    last = torch.cat([score[order][1:] != score[order][:-1], torch.tensor([True])])  # end of a run of equal scores
    last &= torch.isfinite(score[order])
    precision = (100 * hits / kept)[last]
    kept = kept[last]
    out: dict = {}
    for p in levels:
        enough = kept[precision >= p - 1e-9]
        out[f"retained_{p:g}"] = int(enough.max()) if len(enough) else 0
        out[f"retained_{p:g}_share"] = 100 * out[f"retained_{p:g}"] / max(1, int(right.sum()))
    if right.any() and not right.all():
        out["auc"] = float(roc_auc_score(right.numpy(), score.clamp(-1e300, 1e300).numpy()))
    pick = np.unique(np.linspace(0, len(kept) - 1, 200).round().astype(int)) if len(kept) else []
    out["curve_kept"] = kept[pick].tolist() if len(kept) else []
    out["curve_precision"] = [round(v, 4) for v in precision[pick].tolist()] if len(kept) else []
    return out


def frechet(f: np.ndarray, g: np.ndarray) -> float:
    """Frechet distance of two Gaussians fitted to feature rows [n, D]: |m - m'|^2 + tr(S + S' - 2 (S S')^1/2)."""
    from scipy.linalg import eigvalsh

    f, g = f.astype(np.float64), g.astype(np.float64)
    a, b = (np.atleast_2d(np.cov(v, rowvar=False)) for v in (f, g))
    # tr (ab)^1/2 by the symmetric a^1/2 b a^1/2, whose eigenvalues are those of ab
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(eigvalsh(root @ b @ root), 0, None)).sum()
    value = max(0.0, float(((f.mean(0) - g.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross))
    return float(f"{value:.8g}")  # the digits behind depend on the number of threads of the linear algebra
