"""Abnormal adversarial examples regularization (AAER), Lin, Yu, Liu, NeurIPS 2023, arXiv 2404.08154, Section 3.

Single-step adversarial training looks at every image twice with the same weights: at the start point x + eta, where the
attack takes its gradient, and at the adversarial point x + delta, where the weights take theirs. An example whose loss
*falls* from the first look to the second is an abnormal adversarial example (AAE): the attack made it easier. AAER
penalises how many there are and how much their outputs move. Everything it needs is in the logits of the two looks.

    z0 = f(x + eta), z1 = f(x + delta)      logits [B, K] of the two looks; z0 carries no gradient
    c0, c1                                  cross-entropy of each sample [B]
    A = {c0 > c1}, N = {c0 <= c1}           abnormal and normal; a tie is normal
    E_A = mean over A of (c0 - c1)          loss variation, a constant
    V_A = mean over A of |z0 - z1|^2        logit variation, summed over classes; gradient through z1
    V_N = mean over N of |z0 - z1|^2        a constant
    R   = lambda1 |A|/B (lambda2 E_A + lambda3 max(V_A - V_N, 0))          0 when A or N is empty
    L   = mean(c1) + R

E_A is built from detached losses in the released code, so lambda2 changes the printed loss and not the weights
(`ce_term="constant"`). `"differentiable"` lets the gradient through c1 instead, as a literal reading of the formula
would; it pulls the cross-entropy of abnormal examples *up* when lambda1 lambda2 > 1, and is another method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Start = Literal["v", "rs", "n"]
CeTerm = Literal["constant", "differentiable"]
Term = Literal["full", "count", "difference", "pull"]


@dataclass(frozen=True)
class Geometry:
    """The attack of a start: noise U(-noise*eps, noise*eps), a step of step*eps, clamped to the eps-ball or not."""

    noise: float
    step: float
    clamp: bool


# RS and N as in the released code; V (no noise) is an option there without a published setting.
GEOMETRY: dict[str, Geometry] = {
    "v": Geometry(noise=0.0, step=1.0, clamp=True),
    "rs": Geometry(noise=1.0, step=1.25, clamp=True),
    "n": Geometry(noise=2.0, step=1.0, clamp=False),
}

# Published lambda2, lambda3 (lambda1 = 1) by data set, start and 255 * eps; PreActResNet-18, 30 epochs.
PUBLISHED: dict[tuple[str, str], dict[int, tuple[float, float]]] = {
    ("cifar10", "rs"): {8: (2.5, 1.5), 12: (5.0, 2.75), 16: (7.0, 3.25), 32: (5.75, 1.5)},
    ("cifar10", "n"): {8: (1.5, 0.15), 12: (5.0, 0.55), 16: (8.5, 1.5), 32: (2.75, 0.75)},
    ("cifar100", "rs"): {8: (3.5, 1.5), 12: (3.5, 2.75), 16: (6.0, 2.25), 32: (5.0, 0.75)},
    ("cifar100", "n"): {8: (1.5, 0.15), 12: (3.5, 0.3), 16: (6.0, 0.5), 32: (3.5, 0.5)},
}


def lambdas(dataset: str, start: str, eps: float) -> tuple[float, float, float, bool]:
    """(lambda1, lambda2, lambda3, published?). Where nothing is published: CIFAR-10's at the nearest radius of the same
    start (RS for a zero start), which is our choice."""
    table = PUBLISHED.get((dataset, start), {})
    radius = round(255 * eps)
    if radius in table and abs(255 * eps - radius) < 1e-6:
        return 1.0, *table[radius], True
    table = table or PUBLISHED["cifar10", "n" if start == "n" else "rs"]
    return 1.0, *table[min(table, key=lambda r: (abs(r - 255 * eps), r))], False


@dataclass
class Variation:
    """What the two looks at a batch say, over all processes: scalars, of which v_a carries a gradient."""

    n_a: Tensor
    """Number of abnormal examples |A|."""
    n_n: Tensor
    """Number of normal examples |N|."""
    e_a: Tensor
    """Loss variation E_A of the abnormal examples; 0 when there are none."""
    v_a: Tensor
    """Logit variation V_A of the abnormal examples; 0 when there are none."""
    v_n: Tensor
    """Logit variation V_N of the normal examples; 0 when there are none."""


def fell(z0: Tensor, z1: Tensor, y: Tensor) -> Tensor:
    """Which examples are abnormal [B] bool: their loss is lower at z1 than at z0, both [B, K]; y [B]."""
    wide = torch.promote_types(z1.dtype, torch.float32)  # bf16 logits would decide c0 > c1 by rounding
    c0, c1 = (F.cross_entropy(z.detach().to(wide), y, reduction="none") for z in (z0, z1))
    return c0 > c1


def variation(
    z0: Tensor,
    z1: Tensor,
    y: Tensor,
    ce_term: CeTerm = "constant",
    reduce: Callable[[Tensor], Tensor] | None = None,
    world: int = 1,
    group: Tensor | None = None,
) -> Variation:
    """Split a batch into abnormal and normal examples and measure both; z0, z1 [B, K], y [B]. `group` [B] bool takes
    the place of the abnormal ones (a control: as many others).

    Masked sums instead of boolean indexing: no dynamic shape, so nothing waits for the device. With several processes
    `reduce` sums a vector over them and `world` is their number; the values are then those of the whole batch, and the
    gradient is world times the local part, because data-parallel training averages gradients.
    """
    if z0.shape != z1.shape or z1.ndim != 2 or y.shape != z1.shape[:1]:
        raise ValueError(
            f"logits [B, K] of the two looks and labels [B], not {[*z0.shape]}, {[*z1.shape]}, {[*y.shape]}"
        )
    wide = torch.promote_types(z1.dtype, torch.float32)
    z0, z1 = z0.detach().to(wide), z1.to(wide)
    c0 = F.cross_entropy(z0, y, reduction="none")
    c1 = F.cross_entropy(z1, y, reduction="none")
    abnormal = (fell(z0, z1, y) if group is None else group).to(c0.dtype)
    normal = 1 - abnormal
    fall = c0 - (c1 if ce_term == "differentiable" else c1.detach())
    distance = (z0 - z1).square().sum(1)
    falls, moves, rest = abnormal @ fall, abnormal @ distance, normal @ distance.detach()
    sums = torch.stack([abnormal.sum(), normal.sum(), falls.detach(), moves.detach(), rest])
    n_a, n_n, all_falls, all_moves, all_rest = (sums if reduce is None else reduce(sums)).unbind()
    # The value is that of all processes; the difference that follows is 0 and carries the gradient.
    e_a = (all_falls + world * (falls - falls.detach())) / n_a.clamp(min=1)
    v_a = (all_moves + world * (moves - moves.detach())) / n_a.clamp(min=1)
    return Variation(n_a=n_a, n_n=n_n, e_a=e_a, v_a=v_a, v_n=all_rest / n_n.clamp(min=1))


def regulariser(v: Variation, lambda1: float, lambda2: float, lambda3: float, term: Term = "full") -> Tensor:
    """R = lambda1 |A|/B (lambda2 E_A + lambda3 max(V_A - V_N, 0)), and 0 when A or N is empty.

    Other terms are controls that leave a part out: "count" is lambda1 lambda3 |A|/B alone, which has no gradient;
    "difference" leaves |A|/B out; "pull" leaves - V_N out, so that abnormal examples are always pulled."""
    share = torch.ones_like(v.n_a) if term == "difference" else v.n_a / (v.n_a + v.n_n)
    far = {"full": v.v_a - v.v_n, "difference": v.v_a - v.v_n, "pull": v.v_a, "count": torch.ones_like(v.n_a)}[term]
    inner = lambda2 * v.e_a + lambda3 * far.clamp(min=0)
    both = (v.n_a > 0) & (v.n_n > 0)
    return torch.where(both, lambda1 * share * inner, torch.zeros_like(inner))


def radius_warmup(epoch: int, done: float, length: float) -> float:
    """SVHN: factor u of step and clamp, from 0 to 1 over `length` epochs; `done` is the part of this epoch behind us.
    The start noise is not scaled. 1 when length is 0."""
    return min((epoch + done) / length, 1.0) if length > 0 else 1.0


def regulariser_warmup(epoch: int, length: float) -> float:
    """Long schedules: factor of R, min(epoch/length, 1); a comment in the released code (length 20), off by default."""
    return min(epoch / length, 1.0) if length > 0 else 1.0
