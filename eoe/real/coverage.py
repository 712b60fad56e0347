"""How often a 95 % interval of scale real holds the truth: worlds drawn from a formula, with six classes as in `fine`.

    python -m real.coverage

In a world each class c has a place p_c and gains d_mc under method m when it is ID; an image scores
p_c / 2 + d_mc [ID] + noise. What is asked for is what scale real reports: the difference of two methods' FPR95 (and
AUROC), mean over all splits of the classes into halves. The truth is its mean over many worlds.
"""

import itertools

import numpy as np
from scipy import stats

from real import bootstrap

CLASSES, IMAGES, SPREAD = 6, 60, 0.5


def world(rng: np.random.Generator, classes: int = CLASSES) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(score [2, N] when OOD, what ID adds to it [2, N], class of each image [N])."""
    groups = np.repeat(np.arange(classes), IMAGES)
    place, gain = rng.normal(size=classes) / 2, rng.normal([[1.0], [1.5]], SPREAD, (2, classes))
    noise = rng.normal(size=(2, len(groups)))
    noise[1] = (noise[0] + noise[1]) / np.sqrt(2)  # the two methods see the same images
    return place[groups] + noise, gain[:, groups], groups


def difference(made: tuple, w: np.ndarray) -> dict[str, np.ndarray]:
    """{metric: second method - first, mean over splits, a value a replicate}; w [N, replicates] as in measure."""
    score, more, groups = made
    classes = int(groups.max()) + 1
    found: dict[str, list] = {}
    for ids in itertools.combinations(range(classes), classes // 2):
        inside = np.isin(groups, ids)
        first, second = (bootstrap.measure(s + m * inside, inside, w) for s, m in zip(score, more, strict=True))
        for metric in first:
            found.setdefault(metric, []).append(second[metric] - first[metric])
    return {k: bootstrap.mean(np.array(v)) for k, v in found.items()}


def rivals(values: np.ndarray, left_out: np.ndarray, units: int) -> dict[str, tuple[float, float]]:
    """{name: (low, high)} of the interval in use and of others. left_out [G]: the value without each class (BCa)."""
    point, rest = values[0], values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(rest, [0.025, 0.975])
    gap = left_out.mean() - left_out
    acceleration = (gap**3).sum() / (6 * (gap**2).sum() ** 1.5)
    z0 = stats.norm.ppf(np.clip((rest < point).mean() + (rest == point).mean() / 2, 1e-3, 1 - 1e-3))
    z = z0 + stats.norm.ppf([0.025, 0.975])
    return {
        "t": bootstrap.interval(values, units)[1:],
        "percentile": (low, high),
        "basic": (2 * point - high, 2 * point - low),
        "BCa": tuple(np.quantile(rest, stats.norm.cdf(z0 + z / (1 - acceleration * z)))),
    }


def coverage(worlds: int, replicates: int, truth_of: int, seed: int, classes: int = CLASSES) -> dict[str, dict]:
    """{metric: {interval: % of the worlds whose interval holds the truth}}."""
    rng = np.random.default_rng(seed)
    plain = [
        difference(w, np.ones((w[0].shape[1], 1), np.float32)) for w in (world(rng, classes) for _ in range(truth_of))
    ]
    truth = {k: float(np.mean([p[k][0] for p in plain])) for k in plain[0]}
    held: dict[str, dict[str, list[bool]]] = {}
    for k in range(worlds):
        made = world(rng, classes)
        groups = made[2]
        w = bootstrap.weights(groups, np.zeros(len(groups), int), replicates, seed + k)
        without = np.stack([groups != g for g in range(classes)]).astype(np.float32)
        found = difference(made, np.ascontiguousarray(np.vstack([w, without]).T))
        for metric, values in found.items():
            for name, (low, high) in rivals(values[: replicates + 1], values[replicates + 1 :], classes).items():
                held.setdefault(metric, {}).setdefault(name, []).append(low <= truth[metric] <= high)
    return {m: {n: 100 * float(np.mean(h)) for n, h in each.items()} for m, each in held.items()}


if __name__ == "__main__":
    for name, each in coverage(400, 200, 3000, 1000).items():
        print(f"{name}: " + ", ".join(f"{k} {v:.1f} %" for k, v in each.items()))
