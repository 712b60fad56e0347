"""Attacks in a box on images in [0, 1]; others are refused. `forward` maps [B, C, H, W] to float32 logits [B, K], in
eval mode.

The box is `e`: a number, a budget per pixel that broadcasts to the images, or (pgd, mma) a function that makes one out
of the images as they are before a step, for an attacker who knows the masks. Gradients are taken with respect to the
input alone (`torch.autograd.grad`): no weight gradient is computed and no `.grad` is touched. Passes over the network,
a forward (F) and an input backward (b): pgd, fat n steps: nF nb; trades, fat up the divergence: (n+1)F nb; mma with k
targets: 1F and nF nb of k times the batch, 1F of it to choose.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixel_reweighting import check_images, project

Forward = Callable[[Tensor], Tensor]
Objective = Callable[[Tensor], Tensor]
Box = float | Tensor | Callable[[Tensor], Tensor]


def ascend(forward: Forward, x: Tensor, delta: Tensor, objective: Objective) -> Tensor:
    """Gradient with respect to the image of objective(logits at x + delta), a scalar."""
    at = (x + delta).detach().requires_grad_(True)
    with torch.enable_grad():
        (g,) = torch.autograd.grad(objective(forward(at)), at)
    return g


def pgd(forward: Forward, x: Tensor, y: Tensor, start: Tensor, step: float, e: Box, steps: int) -> Tensor:
    """delta after `steps` sign steps up the cross-entropy from x + start, each followed by the projection."""

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="sum")

    check_images(x)
    delta = start
    for _ in range(steps):
        box = e(x + delta) if callable(e) else e
        delta = project(x, delta + step * ascend(forward, x, delta, loss).sign(), box)
    return delta


def trades(forward: Forward, x: Tensor, start: Tensor, step: float, e: Tensor | float, steps: int) -> Tensor:
    """delta after `steps` sign steps up KL(softmax f(x) || softmax f(x + delta)); f(x) is taken once."""
    check_images(x)
    with torch.no_grad():
        p = forward(x).softmax(1)

    def loss(z: Tensor) -> Tensor:
        return F.kl_div(z.log_softmax(1), p, reduction="sum")

    delta = start
    for _ in range(steps):
        delta = project(x, delta + step * ascend(forward, x, delta, loss).sign(), e)
    return delta


def fat(
    forward: Forward,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    step: float,
    e: Tensor | float,
    steps: int,
    tau: int,
    kl: bool = False,
) -> Tensor:
    """Friendly attack: PGD (`kl`: the attack of TRADES) in which a sample stops at the (tau + 1)-th point at which it
    is misclassified and keeps that point; tau = steps never stops. The start is clamped into the box and the image."""
    check_images(x)
    p = None
    if kl:
        with torch.no_grad():
            p = forward(x).softmax(1)

    def loss(z: Tensor) -> Tensor:
        if p is None:
            return F.cross_entropy(z, y, reduction="sum")
        return F.kl_div(z.log_softmax(1), p, reduction="sum")

    delta, left = project(x, start, e), torch.full((len(x),), tau, device=x.device)
    moving = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(steps):
        at = (x + delta).detach().requires_grad_(True)
        with torch.enable_grad():
            z = forward(at)
            (g,) = torch.autograd.grad(loss(z), at)
        wrong = z.detach().argmax(1) != y
        moving = moving & ~(wrong & (left == 0))
        left = left - (wrong & moving).long()
        delta = torch.where(moving[:, None, None, None], project(x, delta + step * g.sign(), e), delta)
    return delta


def rivals(z: Tensor, y: Tensor, k: int) -> Tensor:
    """The k wrong classes [B, k] of largest logit, ascending; z [B, K]. k is cut to K - 1."""
    k = min(k, z.shape[1] - 1)
    barred = z.scatter(1, y[:, None], -torch.inf)
    return barred.topk(k, dim=1).indices.flip(1)


def mma(
    forward: Forward,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    step: float,
    e: Box,
    steps: int,
    k: int = 3,
) -> Tensor:
    """Minimum-margin attack: delta of the target on which the margin f_y - f_t ends smallest.

    From the same start, clamped into the image, each of the k targets t (the largest wrong logits at x) is pursued for
    `steps` sign steps down sum max(f_y - f_t + 50, 0); the 50 keeps the hinge active. Targets are stacked in the batch,
    [k B, C, H, W]: samples do not meet in eval mode.
    """
    check_images(x)
    with torch.no_grad():
        targets = rivals(forward(x), y, k)
    k = targets.shape[1]
    own, t = y.repeat(k), targets.t().reshape(-1)
    many = x.repeat(k, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    delta = project(x, start, torch.inf).repeat(k, 1, 1, 1)
    if isinstance(e, Tensor):
        e = e.expand(len(x), *e.shape[1:]).repeat(k, 1, 1, 1)

    def margin(z: Tensor) -> Tensor:
        return (z.gather(1, own[:, None]) - z.gather(1, t[:, None]))[:, 0]

    for _ in range(steps):
        box = e(many + delta) if callable(e) else e
        g = ascend(forward, many, delta, lambda z: -(margin(z) + 50).clamp(min=0).sum())
        delta = project(many, delta + step * g.sign(), box)
    with torch.no_grad():
        left = margin(forward(many + delta)).view(k, len(x))
    best = k - 1 - left.flip(0).argmin(0)  # of ties the last, the target of largest logit
    return delta.view(k, *x.shape)[best, torch.arange(len(x), device=x.device)]


def uniform(x: Tensor, size: float, generator: torch.Generator | None) -> Tensor:
    """Noise U(-size, size) of the shape and memory format of x."""
    return torch.empty_like(x).uniform_(-1.0, 1.0, generator=generator).mul_(size)


def normal(x: Tensor, size: float, generator: torch.Generator | None) -> Tensor:
    """Noise N(0, size^2) of the shape and memory format of x."""
    return torch.empty_like(x).normal_(0.0, 1.0, generator=generator).mul_(size)


def auto_attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, batch: int, seed: int, version: str) -> Tensor:
    """Adversarial images of AutoAttack (package pyautoattack, the original code). `version` "standard", or names of its
    attacks joined by commas. The number of targets of its targeted parts is 9, or all wrong classes if these are
    fewer."""
    from pyautoattack import AutoAttack

    names = None if version in ("standard", "plus", "rand") else version.split(",")
    kind = version if names is None else "custom"
    attack = AutoAttack(model, norm="Linf", eps=eps, version=kind, attacks=names, device=x.device, seed=seed)
    with torch.no_grad():
        wrong = model(x[:1]).shape[1] - 1
    for part in ("apgd_targeted", "fab"):
        found = getattr(attack, part, None)
        if found is not None and getattr(found, "n_target_classes", 0) > wrong:
            found.n_target_classes = wrong
    return attack.run_standard_evaluation(x.contiguous(), y, batch_size=batch)[0]
