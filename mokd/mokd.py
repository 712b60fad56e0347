"""MOKD: a linear head fitted on the support set of a task by maximising optimised kernel dependence (Algorithm 1).

Inner problem: the bandwidth that maximises the power of the HSIC test between features and labels. Outer problem:

    min over Theta   m (-HSIC_u(K_Z, L_Y) + gamma HSIC_u(K_Z, K_Z)),   Z = F Theta', rows of unit length.

`adapt` takes the features of one support set to its head. `solve` takes a batch of tasks at once: each has its own
Theta, bandwidth and optimiser state, none sees another.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

import hsic
from gradient import Gradient

GRID = (0.001, 0.01, 0.1, 0.2, 0.25, 0.5, 0.75, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Options:
    """Settings of the method; the defaults are the paper's, lr, weight decay and gamma depend on the data set."""

    lr: float = 0.25
    weight_decay: float = 0.0
    gamma: float = 1.0
    steps: int = 40
    kernel: str = "rbf"
    estimator: str = "unbiased"  # of the objective; the bandwidth search is always the unbiased one
    bandwidth: str = "grid"  # grid | gradient | none (scale 1: the plain median heuristic)
    zz: str = "shared"  # shared: HSIC(Z,Z) takes the scale of HSIC(Z,Y), as released; searched: its own, as printed
    eps: float = 1e-5  # in the power


@dataclass
class Found:
    """Heads of a batch of tasks and what the bandwidth search said."""

    theta: Tensor  # [B, d, d]
    scale: Tensor  # [B] of HSIC(Z,Y)
    scale_zz: Tensor  # [B] of HSIC(Z,Z)
    power: Tensor  # [B] test power at `scale`
    negative: Tensor  # [B] scales at which the variance estimate was below 0
    degenerate: Tensor  # [B] bool: no two support images share a class, so HSIC(Z,Y) is 0 whatever Theta is


def powers(
    g: Tensor, delta: Tensor, mask: Tensor, scale: Tensor, o: Options, zz: bool, median: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(J, v) [B] at scale [B]: dependence of the features on the labels, or with zz on themselves."""
    K = hsic.kernel(o.kernel, g, scale, mask, median)
    if zz:
        value, variance = hsic.with_variance(K, K, mask)
    else:
        gain = hsic.label_gain(o.kernel, scale, hsic.count(mask, g))
        value, variance = hsic.with_variance(K, delta * gain[:, None, None], mask)
    return hsic.power(value, variance, o.eps), variance


@torch.no_grad()
def best_scale(
    features: Tensor, delta: Tensor, mask: Tensor, o: Options, zz: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (scale, power, scales with a negative variance), each [B]. In float64: it is done once a task.

    As released: in the order of the grid, a scale replaces the best so far if its power is larger and above 0; where
    none is, the scale stays 1.
    """
    g, delta = hsic.gram(features.double()), delta.double()
    best = torch.ones(len(g), dtype=g.dtype, device=g.device)
    negative = torch.zeros(len(g), dtype=torch.long, device=g.device)
    if o.kernel not in hsic.SCALED or o.bandwidth == "none":
        j, v = powers(g, delta, mask, best, o, zz)
        return best, j, negative + (v < 0)
    highest = torch.zeros_like(best)
    median = hsic.median_distance(hsic.squared_distances(g), mask) if o.kernel == "rbf" else None  # of all scales
    for s in GRID:
        j, v = powers(g, delta, mask, torch.full_like(best, s), o, zz, median)
        better = j > highest
        best, highest = torch.where(better, s, best), torch.where(better, j, highest)
        negative += v < 0
    if o.bandwidth == "gradient":
        best, highest = _climb(g, delta, mask, best, highest, o, zz, median)
    return best, highest, negative


@torch.enable_grad()
def _climb(g, delta, mask, best, highest, o: Options, zz: bool, median, steps: int = 30) -> tuple[Tensor, Tensor]:
    """Gradient ascent of the power in log(scale) from the best of the grid; the best value on the way counts."""
    log = best.log().requires_grad_()
    optimizer = torch.optim.Adam([log], lr=0.05)
    for _ in range(steps):
        j, _ = powers(g, delta, mask, log.exp(), o, zz, median)
        with torch.no_grad():
            better = j > highest
            best, highest = torch.where(better, log.exp(), best), torch.where(better, j, highest)
        optimizer.zero_grad()
        (-j.sum()).backward()
        optimizer.step()
    return best.detach(), highest.detach()


def objective(z: Tensor, delta: Tensor, mask: Tensor, scale: Tensor, scale_zz: Tensor, o: Options) -> Tensor:
    """The loss of each task, [B]; z [B, M, d] is made of unit rows here, delta [B, M, M] from hsic.same_class."""
    measure = hsic.unbiased if o.estimator == "unbiased" else hsic.biased
    g, m = hsic.gram(z), hsic.count(mask, z)
    K = hsic.kernel(o.kernel, g, scale, mask)
    loss = -measure(K, delta, mask) * hsic.label_gain(o.kernel, scale, m)
    if o.gamma:
        K = K if o.zz == "shared" else hsic.kernel(o.kernel, g, scale_zz, mask)
        loss = loss + o.gamma * measure(K, K, mask)
    return m * loss


def solve(features: Tensor, labels: Tensor, o: Options) -> Found:
    """Fit Theta for each task. features [B, M, d] float32 (padding 0), labels [B, M] long (padding -1).

    Raises ValueError if a task has fewer than 4 support images.
    """
    mask = labels >= 0
    if bool((mask.sum(-1) < 4).any()):
        raise ValueError("HSIC needs at least 4 support images in each task")
    delta = hsic.same_class(labels)
    scale, found, negative = best_scale(features, delta, mask, o)
    other = best_scale(features, delta, mask, o, zz=True)[0] if o.zz == "searched" and o.gamma else scale
    scales = scale.to(features.dtype), other.to(features.dtype)

    theta = torch.eye(features.shape[-1], device=features.device).repeat(len(features), 1, 1).requires_grad_()
    optimizer = torch.optim.Adadelta([theta], lr=o.lr, weight_decay=o.weight_decay)
    closed = o.kernel == "rbf" and o.estimator == "unbiased" and (o.zz == "shared" or not o.gamma)
    closed = closed and not bool((mask & ~features.any(-1)).any())  # a picture without features has no direction
    gradient = Gradient(delta, mask, scales[0], o.gamma) if closed else None
    for _ in range(o.steps):
        z = features @ theta.transpose(-1, -2)
        optimizer.zero_grad(set_to_none=True)
        if gradient:
            z = hsic.unit(z)
            z.backward(gradient(z.detach()))
        else:
            objective(z, delta, mask, *scales, o).sum().backward()  # no task sees another's
        optimizer.step()
    degenerate = ~(hsic.pairs(mask) & (delta > 0)).flatten(1).any(1)
    return Found(theta.detach(), *scales, found, negative, degenerate)


class Head:
    """What `adapt` returns: Theta and the centroids of the support set behind it.

    theta [d, d]; classes [C], the labels in rising order; centroids [C, d] after the head; found: the bandwidth search.
    """

    def __init__(self, found: Found, features: Tensor, labels: Tensor):
        self.theta, self.found = found.theta[0], found
        self.classes, place = labels.unique(return_inverse=True)
        z = features.float() @ self.theta.T
        sums = z.new_zeros(len(self.classes), z.shape[1]).index_add_(0, place, z)
        self.centroids = sums / place.bincount()[:, None]

    def __call__(self, features: Tensor) -> Tensor:
        """[Q, d] -> cosines of each picture and each class's centroid, [Q, C]."""
        return hsic.unit(features.float() @ self.theta.T) @ hsic.unit(self.centroids).T

    def predict(self, features: Tensor) -> Tensor:
        """[Q, d] -> labels [Q]."""
        return self.classes[self(features).argmax(-1)]


def adapt(features: Tensor, labels: Tensor, o: Options | None = None) -> Head:
    """The head of one support set: features [m, d], not centred and of any scale, and whole-number labels [m].

    Raises ValueError for fewer than 4 pictures, for a single class, and for features that are not finite. Warns where
    every class has one picture: HSIC(Z,Y) is 0 then whatever Theta is, and the labels teach nothing.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(f"features [m, d] and labels [m], not {list(features.shape)} and {list(labels.shape)}")
    if not features.isfinite().all():
        raise ValueError("features hold a number that is not finite")
    classes, place = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"a support set has at least 2 classes, not {len(classes)}")
    with torch.enable_grad():
        found = solve(features.detach().float()[None], place[None], o or Options())
    if found.degenerate[0]:
        warnings.warn("one picture a class: HSIC(Z,Y) is 0 whatever the head is, labels teach nothing", stacklevel=2)
    return Head(found, features.detach(), labels)
