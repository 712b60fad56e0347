"""Class-prior estimators: which share pi of the unlabelled nodes U is positive, given a sample P of positives?

All of them see U as the mixture pi * positives + (1 - pi) * negatives and look for the largest share of P that fits
into U, so they are consistent only if some region holds (almost) no negatives; elsewhere they err upwards.

Score-based estimators take two 1-D arrays: `p`, the posteriors in [0, 1] of positives that the classifier was NOT
trained on (a classifier that has fitted P makes the estimate reproduce itself), and `u`, the posteriors of the
unlabelled nodes. KM takes features. Every result is a share of U in [0, 1]; wrong input raises ValueError with one
line.

    BBE     Garg et al., Mixture Proportion Estimation and PU Learning: A Modern Approach, NeurIPS 2021
    MPE     Scott, A Rate of Convergence for Mixture Proportion Estimation, AISTATS 2015
    DEDPUL  Ivanov, DEDPUL: Difference-of-Estimated-Densities-based Positive-Unlabeled Learning, ICMLA 2020
    EN      Elkan and Noto, Learning Classifiers from Only Positive and Unlabeled Data, KDD 2008
    KM1/2   Ramaswamy, Scott, Tewari, Mixture Proportion Estimation via Kernel Embeddings of Distributions, ICML 2016
    ReMPE   Yao et al., Rethinking Class-Prior Estimation for Positive-Unlabeled Learning, ICLR 2022
"""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from numpy import ndarray as Array
from scipy.stats import beta
from sklearn.decomposition import PCA


def _scores(values: Array, name: str) -> Array:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must be a non-empty 1-D array of scores, got shape {values.shape}")
    if not np.all((values >= 0) & (values <= 1)):  # NaN fails both comparisons
        raise ValueError(f"{name} must hold scores in [0, 1] without NaN")
    return values


def _features(values: Array, name: str) -> Array:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"{name} must be a non-empty matrix [n, d] of features, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must hold finite features")
    return values


def _check_bound(delta: float, gamma: float = 0.0) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")


def _count(values: Array, thresholds: Array) -> Array:
    """How many values are >= each threshold."""
    return values.size - np.searchsorted(np.sort(values), thresholds)


def bbe(p: Array, u: Array, delta: float = 0.1, gamma: float = 0.01) -> float:
    """Best bin estimation (Garg et al. 2021, Algorithm 1): q_u / q_p at the threshold with the smallest bound.

    p [n_p], u [n_u]: scores in [0, 1]. For every distinct U score c but the smallest

        k_p = #{p >= c}        (inclusive)                          q_p = k_p / n_p
        k_u = #{u >= c} - 1    (exclusive: one U score, c itself)   q_u = k_u / n_u
        bound = q_u / q_p + (1 + gamma) * (sqrt(log(4 / delta) / (2 n_u)) + sqrt(log(4 / delta) / (2 n_p))) / q_p

    over the c with k_p > 1 and k_u > 1; returns the plain ratio q_u / q_p at the smallest bound, clipped to [0, 1], or
    0 if no c qualifies (fewer than two P, constant U scores). Without ties k_u is #{u > c}; with tied (rounded) scores
    leaving out the whole tie would pull the estimate far down, so only one is left out, as in the authors' code.
    `delta`: the bound's failure probability, `gamma`: its slack; the authors' values are 0.1 and 0.01.
    """
    p, u = _scores(p, "p"), _scores(u, "u")
    _check_bound(delta, gamma)
    thresholds = np.unique(u)[1:]
    k_p, k_u = _count(p, thresholds), _count(u, thresholds) - 1
    valid = (k_p > 1) & (k_u > 1)
    if not valid.any():
        return 0.0
    q_p = k_p[valid] / p.size
    ratio = k_u[valid] / u.size / q_p
    width = np.sqrt(math.log(4 / delta) / (2 * u.size)) + np.sqrt(math.log(4 / delta) / (2 * p.size))
    return float(min(ratio[np.argmin(ratio + (1 + gamma) * width / q_p)], 1.0))


@torch.no_grad()
def bbe_batch(
    scores: torch.Tensor, is_p: torch.Tensor, is_u: torch.Tensor, delta: float = 0.1, gamma: float = 0.01
) -> torch.Tensor:
    """`bbe` for S seeds at once, on the device of `scores` and without waiting for it.

    scores [S, N] floating point in [0, 1]; is_p, is_u [S, N] bool: row s uses scores[s, is_p[s]] and scores[s,
    is_u[s]]. Returns [S] in the dtype of `scores`; counts and ratios are float64. A row without a candidate (also:
    without P or U) gives 0. The values cannot be checked without a host sync: a NaN among a row's P or U gives NaN for
    that row. Wrong shapes raise ValueError.
    """
    if scores.ndim != 2 or scores.shape[1] == 0 or not scores.is_floating_point():
        raise ValueError(f"scores must be a floating-point tensor [S, N], got {scores.dtype} {tuple(scores.shape)}")
    for name, mask in (("is_p", is_p), ("is_u", is_u)):
        if mask.shape != scores.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"{name} must be bool of shape {tuple(scores.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
    _check_bound(delta, gamma)
    scores = scores.contiguous()
    # Non-members become -1, below every score: they sort to the front and are never counted.
    sorted_p = torch.where(is_p, scores, -1).sort(dim=-1).values
    sorted_u = torch.where(is_u, scores, -1).sort(dim=-1).values
    k_p = (scores.shape[1] - torch.searchsorted(sorted_p, scores)).double()
    k_u = (scores.shape[1] - torch.searchsorted(sorted_u, scores)).double() - 1
    n_p, n_u = is_p.sum(-1, keepdim=True).double(), is_u.sum(-1, keepdim=True).double()
    q_p = k_p / n_p
    ratio = k_u / n_u / q_p
    width = torch.sqrt(math.log(4 / delta) / (2 * n_u)) + torch.sqrt(math.log(4 / delta) / (2 * n_p))
    valid = is_u & (k_p > 1) & (k_u > 1) & (k_u < n_u - 1)  # the smallest U score is no threshold
    bound = (ratio + (1 + gamma) * width / q_p).masked_fill(~valid, torch.inf)
    best = bound.argmin(dim=-1, keepdim=True)
    estimate = torch.where(valid, ratio.clamp(max=1.0), 0.0).gather(-1, best).squeeze(-1)
    spoiled = (scores.isnan() & (is_p | is_u)).any(-1)
    return estimate.masked_fill(spoiled, torch.nan).to(scores.dtype)


def elkan_noto(p: Array, u: Array) -> float:
    """Elkan and Noto (2008): mean(u) / mean(p), clipped to [0, 1]; p [n_p], u [n_u] scores. All p zero: 1."""
    p, u = _scores(p, "p"), _scores(u, "u")
    return float(min(u.mean() / p.mean(), 1.0)) if p.mean() > 0 else 1.0


def clopper_pearson(k: Array, n: int, delta: float) -> tuple[Array, Array]:
    """One-sided binomial bounds for k [m] successes out of n: (lower, upper) [m], each failing with probability delta.

    upper solves P(Bin(n, x) <= k) = delta, lower solves P(Bin(n, x) >= k) = delta; lower(0) = 0 and upper(n) = 1.
    """
    k = np.asarray(k, dtype=np.float64)
    lower = np.where(k > 0, beta.ppf(delta, np.maximum(k, 1), n - k + 1), 0.0)
    upper = np.where(k < n, beta.ppf(1 - delta, k + 1, np.maximum(n - k, 1)), 1.0)
    return lower, upper


def scott_mpe(p: Array, u: Array, delta: float = 0.1) -> float:
    """Scott (2015): min over thresholds c of (upper bound of Q_u(c)) / (lower bound of Q_p(c)), clipped to [0, 1].

    p [n_p], u [n_u] scores; Q(c) = share of scores >= c, bounded by inverting the binomial tail at level delta. The
    shares change only at observed scores, so trying every score of P and of U is the exact minimum. An upper bound:
    with few P it is well above pi.
    """
    p, u = _scores(p, "p"), _scores(u, "u")
    _check_bound(delta)
    thresholds = np.unique(np.concatenate((p, u)))
    lower_p, _ = clopper_pearson(_count(p, thresholds), p.size, delta)
    _, upper_u = clopper_pearson(_count(u, thresholds), u.size, delta)
    return float(min(np.min(upper_u[lower_p > 0] / lower_p[lower_p > 0]), 1.0))


def _gaussian_density(x: Array, sample: Array, factor: float) -> Array:
    """Gaussian KDE of `sample` at x; bandwidth = factor * standard deviation, with a floor for constant scores."""
    h = max(factor * sample.std(), 1e-3)
    chunks = np.array_split(x, 1 + x.size * sample.size // 10**6)  # about 8 MB a chunk
    sums = np.concatenate([np.exp(-0.5 * ((c[:, None] - sample) / h) ** 2).sum(1) for c in chunks])
    return sums / (sample.size * h * np.sqrt(2 * np.pi))


def dedpul(p: Array, u: Array, bandwidth_p: float = 0.1, bandwidth_u: float = 0.05, max_ratio: float = 50.0) -> float:
    """DEDPUL's prior (Ivanov 2020): EM on the density ratio r = f_p / f_u of the score logits, taken at the U scores.

    p [n_p], u [n_u] scores. Bandwidths in standard deviations of the logits. r is clipped at max_ratio, smoothed by a
    rolling median of 5 neighbours a side, made non-decreasing in the score above the mid threshold (the mean of
    mean(p) and mean(u); the paper scores "unlabelled", there it is below), and smoothed by n_u / 20 neighbours a side.
    EM iterates pi <- mean(min(1, r * pi)) from pi = 1. Where smoothing leaves mean(r) < 1, EM slides to 0; then the
    sharpest bend of pi - mean(min(1, r * pi)) is taken, as in the paper.
    """
    p, u = _scores(p, "p"), np.sort(_scores(u, "u"))
    logit_p, logit_u = (np.log(x / (1 - x)) for x in (np.clip(p, 1e-6, 1 - 1e-6), np.clip(u, 1e-6, 1 - 1e-6)))
    ratio = _gaussian_density(logit_u, logit_p, bandwidth_p) / _gaussian_density(logit_u, logit_u, bandwidth_u)

    def smooth(values: Array, neighbours: int) -> Array:
        return pd.Series(values).rolling(2 * neighbours + 1, center=True, min_periods=1).median().to_numpy(copy=True)

    ratio = smooth(np.minimum(ratio, max_ratio), 5)
    above = u >= (p.mean() + u.mean()) / 2
    ratio[above] = np.maximum.accumulate(ratio[above])
    ratio = smooth(ratio, u.size // 20)

    converged = 1.0
    for _ in range(1000):
        new = np.minimum(1.0, ratio * converged).mean()
        if abs(new - converged) < 1e-5 or ratio.max() * converged < 1:
            break
        converged = new
    step = 0.001
    grid = 1 - np.arange(0, 1, step)
    excess = np.array([pi - np.minimum(1.0, ratio * pi).mean() for pi in grid])
    bend = np.where(excess[1:-1] < 0.05, np.diff(excess, 2), -np.inf)  # 0.05: pi must nearly explain itself
    bent = grid[1:-1][np.argmax(bend)]
    settled = np.count_nonzero(excess < 0) > 1 and converged > step
    return float(np.clip(converged if bent <= converged or settled else bent, 0.0, 1.0))


def nearest_in_simplex(
    kernel: Array, target: Array, start: Array, tol: float = 1e-5, max_steps: int = 100_000
) -> tuple[Array, float]:
    """Nearest point w of the simplex (w >= 0, sum 1) to `target`: minimises (target - w)' K (target - w).

    kernel K [n, n] positive semidefinite with unit diagonal, target [n] summing to 1, start [n] in the simplex.
    Returns (w [n], squared distance >= 0). Pairwise coordinate descent as in SVM solvers (SMO, second-order choice):
    each step moves weight between two points and costs O(n). Stops when no pair's gradients differ by more than tol;
    the squared distance is then within tol of its minimum (Frank-Wolfe gap). Own code, because cvxopt is GPL; an
    accelerated projected gradient needs thousands of n^2 steps here, as smooth kernels are badly conditioned. Stopping
    at max_steps still returns a feasible w.
    """
    w = start.copy()
    gradient = 2 * (kernel @ (w - target))
    for _ in range(max_steps):
        i = gradient.argmin()
        violation = np.where(w > 0, gradient - gradient[i], 0.0)
        if violation.max() <= tol:
            break
        curvature = np.maximum(2 - 2 * kernel[i], 1e-12)
        j = (violation * violation / curvature).argmax()  # the pair with the largest decrease
        move = min(w[j], violation[j] / (2 * curvature[j]))
        w[i] += move
        w[j] -= move
        gradient += 2 * move * (kernel[i] - kernel[j])
    return w, max(float((target - w) @ kernel @ (target - w)), 0.0)


def km_both(features_p: Array, features_u: Array, max_points: int = 1000, seed: int = 0) -> dict[str, float]:
    """KM1 and KM2 (Ramaswamy et al. 2016): gradient thresholding of the RKHS distance d(lambda) from
    lambda * mean(U) + (1 - lambda) * mean(P) to the convex hull of the sample. Returns {"KM1": pi, "KM2": pi}.

    features_p [n_p, d], features_u [n_u, d]: at most max_points random rows of each (`seed`), projected on 50
    principal components. RBF kernel; width = median distance times the factor in logspace(-1, 1, 5) with the largest
    distance |mean(U) - mean(P)|. d is 0 until lambda* = 1 / (1 - pi) and grows convexly after it; bisection on [1, 8]
    finds where its slope passes a threshold, so the results lie in [0, 0.875]. KM1: 0.8 * slope at 1 + 0.2 * |mean(U)
    - mean(P)|. KM2: 1 / sqrt(min(n_p, n_u)), or KM1's threshold where that is over 0.9 |mean(U) - mean(P)|. Memory:
    three matrices of (n_p + n_u)^2 float64.
    """
    features_p, features_u = _features(features_p, "features_p"), _features(features_u, "features_u")
    if features_p.shape[1] != features_u.shape[1]:
        raise ValueError(f"features differ in width: P has {features_p.shape[1]}, U has {features_u.shape[1]}")
    if max_points < 1:
        raise ValueError(f"max_points must be at least 1, got {max_points}")
    rng = np.random.default_rng(seed)
    rows_u, rows_p = (x[rng.permutation(len(x))[:max_points]] for x in (features_u, features_p))
    x = np.concatenate((rows_u, rows_p))
    if x.shape[1] > 50 and len(x) > 50:  # below 50 it would be a rotation, which no distance sees
        x = PCA(50, random_state=seed).fit_transform(x)
    mean_u = np.repeat([1 / len(rows_u), 0.0], [len(rows_u), len(rows_p)])
    mean_p = np.repeat([0.0, 1 / len(rows_p)], [len(rows_u), len(rows_p)])

    x = x - x.mean(0)  # for the accuracy of the next two lines
    norms = np.square(x).sum(1)
    squared = np.maximum(norms[:, None] + norms - 2 * x @ x.T, 0.0)
    median = np.median(squared) or squared.mean() or 1.0  # many duplicate rows: fall back to the mean
    kernel, between = None, -1.0
    for factor in np.logspace(-1, 1, 5):
        candidate = np.exp(squared / (-2 * factor**2 * median))
        distance = np.sqrt(max((mean_u - mean_p) @ candidate @ (mean_u - mean_p), 0.0))
        if distance > between:
            kernel, between = candidate, distance
    np.fill_diagonal(kernel, 1.0)  # the squared distances carry rounding errors

    known = {1.0: 0.0}  # at lambda = 1 the target mean(U) is in the hull
    weights = mean_u

    def hull_distance(lam: float) -> float:
        nonlocal weights
        if lam not in known:  # KM1 and KM2 share most of their bisection; each solve starts at the last solution
            weights, squared_distance = nearest_in_simplex(kernel, lam * mean_u + (1 - lam) * mean_p, weights)
            known[lam] = np.sqrt(squared_distance)
        return known[lam]

    def prior(threshold: float, step: float = 0.04) -> float:
        low, high = 1.0, 8.0
        while high - low > step:
            middle = (low + high) / 2
            slope = (hull_distance(middle + step / 2) - hull_distance(middle)) / (step / 2)
            low, high = (low, middle) if slope > threshold else (middle, high)
        return 1 - 2 / (low + high)

    threshold_1 = 0.8 * hull_distance(1.05) / 0.05 + 0.2 * between
    threshold_2 = 1 / np.sqrt(min(len(rows_u), len(rows_p)))
    return {"KM1": prior(threshold_1), "KM2": prior(threshold_2 if threshold_2 <= 0.9 * between else threshold_1)}


def km(features_p: Array, features_u: Array, variant: str = "KM2", max_points: int = 1000, seed: int = 0) -> float:
    """One of the two results of `km_both`; variant "KM1" or "KM2" (ValueError otherwise)."""
    if variant not in ("KM1", "KM2"):
        raise ValueError(f"unknown KM variant {variant!r}, choose KM1 or KM2")
    return km_both(features_p, features_u, max_points, seed)[variant]


def regroup(
    base: Callable[..., float],
    p: Array,
    u: Array,
    features_p: Array | None = None,
    features_u: Array | None = None,
    share: float = 0.1,
) -> float:
    """ReCPE / ReMPE (Yao et al. 2022): copy the int(share * n_u) top-scored U points into P, then run `base`.

    p [n_p], u [n_u] scores; without features `base` is called as base(p', u), with features_p [n_p, d] and features_u
    [n_u, d] as base(features_p', features_u), the scores choosing the rows. P' is P plus the U points least likely to
    be mixed with it, so that P' is not hidden inside the negatives. The share of 10 % is from memory of the paper and
    unverified against its text; the authors' scripts do pass 0.1 (their program's own default is 0.01). share = 0 is
    `base` itself. ValueError: share outside [0, 1]. The copies must be few beside P: with share * n_u comparable to
    n_p they dominate P' at the top and pull the result far down.
    """
    p, u = _scores(p, "p"), _scores(u, "u")
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    copied = np.argsort(-u, kind="stable")[: int(share * u.size)]
    if features_p is None and features_u is None:
        return base(np.concatenate((p, u[copied])), u)
    if features_p is None or features_u is None or len(features_p) != p.size or len(features_u) != u.size:
        raise ValueError("regrouping on features needs both features_p and features_u, a row for each score")
    return base(np.concatenate((features_p, np.asarray(features_u)[copied])), features_u)


def bootstrap(
    estimator: Callable[[Array, Array], float], p: Array, u: Array, n: int = 200, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval (Efron 1979) of estimator(p, u): (low, high), from n draws with replacement.

    p [n_p], u [n_u] scores. It holds the sampling spread only, not the bias of an estimator whose assumptions fail.
    ValueError: n < 1, level outside (0, 1).
    """
    p, u = _scores(p, "p"), _scores(u, "u")
    if n < 1 or not 0 < level < 1:
        raise ValueError(f"bootstrap needs n >= 1 and a level in (0, 1), got n={n}, level={level}")
    rng = np.random.default_rng(seed)
    draws = [estimator(rng.choice(p, p.size), rng.choice(u, u.size)) for _ in range(n)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def estimate_all(
    p: Array, u: Array, features_p: Array | None = None, features_u: Array | None = None, seed: int = 0
) -> dict[str, float]:
    """Every estimator on p [n_p], u [n_u]: {"BBE", "DEDPUL", "MPE", "EN", "ReMPE": pi}; ReMPE is BBE after regrouping.

    With features_p [m_p, d] and features_u [m_u, d] (any rows of P and U) also "KM1", "KM2"; `seed` draws KM's
    subsample.
    """
    if (features_p is None) != (features_u is None):
        raise ValueError("give features of both P and U, or of neither")
    result = {
        "BBE": bbe(p, u),
        "DEDPUL": dedpul(p, u),
        "MPE": scott_mpe(p, u),
        "EN": elkan_noto(p, u),
        "ReMPE": regroup(bbe, p, u),
    }
    return result if features_p is None else result | km_both(features_p, features_u, seed=seed)
