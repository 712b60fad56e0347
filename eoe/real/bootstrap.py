"""Intervals where images share classes and splits share images: a paired bootstrap over groups, then over images.

A replicate draws the groups (classes, sequences) of each stratum with replacement, then the images of each group, and
every method is judged anew with these weights in every split. Splits are never counted as independent.
"""

import numpy as np
from scipy import stats


def weights(groups: np.ndarray, strata: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """float32 [replicates + 1, N]: how often each image counts; row 0 is the data itself, one each.

    groups [N]: group of each image; strata [N]: groups are drawn within their stratum. Images of a group that is drawn
    k times are drawn anew k times over.
    """
    rng = np.random.default_rng(seed)
    out = np.zeros((replicates + 1, len(groups)), np.float32)
    out[0] = 1
    members = {g: np.flatnonzero(groups == g) for g in np.unique(groups)}
    for stratum in np.unique(strata):
        inside = [g for g, m in members.items() if strata[m[0]] == stratum]
        for row in out[1:]:
            times = rng.multinomial(len(inside), np.full(len(inside), 1 / len(inside)))
            for g, k in zip(inside, times, strict=True):
                if k:
                    m = members[g]
                    row[m] = rng.multinomial(k * len(m), np.full(len(m), 1 / len(m)))
    return out


def measure(scores: np.ndarray, inside: np.ndarray, w: np.ndarray, recall: float = 0.95) -> dict[str, np.ndarray]:
    """Weighted FPR95 (the rule of metrics.fpr95_official) and AUROC in per cent, a value a replicate; NaN where one has
    no ID or no OOD weight.

    scores [N], inside [N] bool (ID), w [N, R] float32 whole numbers (the transpose of `weights`: its rows are gathered
    by score). A replicate of ones gives what metrics.measure gives. Sums are whole numbers below 2^24, so exact.
    """
    own, other = -np.sort(-scores[inside]), -np.sort(-scores[~inside])
    a = w[np.flatnonzero(inside)[np.argsort(-scores[inside], kind="stable")]]
    b = w[np.flatnonzero(~inside)[np.argsort(-scores[~inside], kind="stable")]]
    first = np.flatnonzero(np.r_[True, own[1:] != own[:-1]])  # ID images of one score stand or fall together
    if len(first) < len(own):
        own, a = own[first], np.add.reduceat(a, first, 0)
    ids = np.cumsum(a, 0)
    oods = np.zeros((len(other) + 1, w.shape[1]), np.float32)  # [k]: weight of the k highest OOD scores
    np.cumsum(b, 0, out=oods[1:])
    n_id, n_ood = ids[-1].astype(np.float64), oods[-1].astype(np.float64)
    over, reach = (np.searchsorted(-other, -own, side) for side in ("left", "right"))  # OOD scores > and >= each own
    columns, last = np.arange(w.shape[1]), len(ids) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        beaten = np.zeros(w.shape[1])  # pairs in which the OOD image is before the ID image, a tie for a half
        for k in range(0, len(own), 256):  # float32 inside a slice, float64 over them
            part = slice(k, k + 256)
            beaten += np.einsum("nr,nr->r", a[part], (oods[over[part]] + oods[reach[part]]) / 2)
        auroc = 100 * (1 - beaten / (n_id * n_ood))
        # `ids` rises: the first place with enough recall, and the one before it, have the two nearest recalls.
        high = np.minimum((ids < np.ceil(recall * n_id - 1e-9)).sum(0), last)
        found = ids[high, columns], ids[np.maximum(high - 1, 0), columns]
        gaps = [np.abs(x / n_id - recall) for x in found]
        chosen = np.where(gaps[1] < gaps[0], found[1], found[0])
        # Of the thresholds with that recall the lowest: just above the next ID image, or at the last one.
        end = np.where(chosen < n_id, (ids <= chosen).sum(0), (ids < n_id).sum(0))
        passed = np.where(chosen < n_id, over[np.minimum(end, last)], reach[np.minimum(end, last)])
        fpr = 100 * oods[passed, columns] / n_ood
    gone = (n_id == 0) | (n_ood == 0)
    return {"FPR95": np.where(gone, np.nan, fpr), "AUROC": np.where(gone, np.nan, auroc)}


def mean(v: np.ndarray) -> np.ndarray:
    """Mean of v [splits, replicates] over splits; a split without ID or OOD images in a replicate is left out there."""
    there = np.isfinite(v)
    with np.errstate(invalid="ignore"):
        return np.where(there, v, 0).sum(0) / there.sum(0)


def interval(values: np.ndarray, units: int) -> tuple[float, float, float]:
    """(value, low, high): value +- t s sqrt(G / (G - 1)), a 95 % interval of few classes.

    values [replicates + 1], row 0 the data; s: standard deviation of the others that are defined; units G: classes (of
    the stratum with the fewest), of which a bootstrap sees only the variance among G, not G - 1; t: 97.5 % quantile of
    Student's t with G - 1 degrees. Quantiles of the replicates themselves are too narrow for six classes
    (real/coverage.py). NaN bounds where there is nothing to tell them from: one class, or no replicate.
    """
    rest = values[1:][np.isfinite(values[1:])]
    if units < 2 or len(rest) < 2:
        return float(values[0]), np.nan, np.nan
    half = stats.t.ppf(0.975, units - 1) * rest.std(ddof=1) * np.sqrt(units / (units - 1))
    return float(values[0]), float(values[0] - half), float(values[0] + half)
