"""Attacks within an l_inf ball on images in [0, 1]. `forward` maps images [B, C, H, W] to logits [B, K].

An attack needs gradients of the input alone: they are taken by `torch.autograd.grad` with respect to the input, so no
weight gradient is computed and no `.grad` is touched. Passes over the network, a forward (F) and an input backward (B):
single_step 1F 1B; pgd n steps: nF nB; fgsm accuracy 2F 1B; strongest: at most restarts * (steps F + steps B + 1F), less
because only samples that are still classified correctly take part.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]
OUTSIDE = (
    "images must lie in [0, 1], where eps is measured: leave the normalisation out of the loader and make it the "
    "network's first layer, nn.Sequential(transforms.Normalize(mean, std), network)"
)


def uniform(x: Tensor, size: float, generator: torch.Generator | None) -> Tensor:
    """Noise U(-size, size) of the shape and memory format of x."""
    noise = torch.empty_like(x).uniform_(-1.0, 1.0, generator=generator)
    return noise.mul_(size)


def check_images(x: Tensor) -> None:
    """ValueError for images outside [0, 1]: normalised ones would be clamped into it, a move of many eps. On a GPU the
    check does not wait for the device: it stops the program there, with the same sentence."""
    inside = ((x >= -1e-3) & (x <= 1 + 1e-3)).all()  # resizing may overshoot by rounding; NaN is not inside
    if x.device.type == "cuda":
        torch._assert_async(inside, OUTSIDE)
    elif not inside:
        raise ValueError(OUTSIDE)


def into_image(x: Tensor, delta: Tensor) -> Tensor:
    """Clamp delta so that x + delta lies in [0, 1]."""
    return torch.maximum(torch.minimum(delta, 1.0 - x), -x)


def project(x: Tensor, delta: Tensor, eps: float | None) -> Tensor:
    """Clamp delta to [-eps, eps] (eps None: not), then so that x + delta lies in [0, 1]."""
    return into_image(x, delta if eps is None else delta.clamp(-eps, eps))


def input_gradient(forward: Forward, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of the summed cross-entropy with respect to x, logits); the sign is that of the mean's."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        z = forward(x).float()
        loss = F.cross_entropy(z, y, reduction="sum")
        (g,) = torch.autograd.grad(loss, x)
    return g, z.detach()


def single_step(
    forward: Forward, x: Tensor, y: Tensor, eta: Tensor, step: float, eps: float | None
) -> tuple[Tensor, Tensor]:
    """One sign step from x + eta: (delta, logits at x + eta). eps None: delta is not clamped to a ball."""
    check_images(x)
    g, z0 = input_gradient(forward, x + eta, y)
    return project(x, eta + step * g.sign(), eps), z0


def pgd(
    forward: Forward, x: Tensor, y: Tensor, eta: Tensor, step: float, eps: float, steps: int
) -> tuple[Tensor, Tensor]:
    """`steps` sign steps from x + eta, all samples move: (delta, logits at x + eta). The form used for training."""
    check_images(x)
    delta, z0 = eta, None
    for _ in range(steps):
        g, z = input_gradient(forward, x + delta, y)
        delta, z0 = project(x, delta + step * g.sign(), eps), z if z0 is None else z0
    return delta, z0


def strongest(
    forward: Forward,
    x: Tensor,
    y: Tensor,
    eps: float,
    step: float,
    steps: int,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """PGD for evaluation: (delta of the worst restart, robust [B] bool). The network must be in eval mode.

    Every restart begins at U(-eps, eps). A sample moves only while it is classified correctly, and takes part in a
    restart only if every restart before it failed; of the failed ones the delta of highest loss is kept.
    """
    check_images(x)
    best = torch.zeros_like(x)
    loss = torch.full((len(x),), -torch.inf, device=x.device)
    robust = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(restarts):
        # Noise for all samples: the draw of a sample does not depend on how many others are still in play.
        noise = into_image(x, uniform(x, eps, generator))
        alive = robust.nonzero().squeeze(1)
        if not len(alive):
            break
        xs, ys, delta = x[alive], y[alive], noise[alive]
        moving = torch.arange(len(alive), device=x.device)
        for _ in range(steps):
            g, z = input_gradient(forward, xs[moving] + delta[moving], ys[moving])
            right = z.argmax(1) == ys[moving]
            moving, g = moving[right], g[right]
            if not len(moving):
                break
            delta[moving] = project(xs[moving], delta[moving] + step * g.sign(), eps)
        with torch.no_grad():
            z = forward(xs + delta).float()
        c, wrong = F.cross_entropy(z, ys, reduction="none"), z.argmax(1) != ys
        better = wrong | (c >= loss[alive])
        best[alive[better]], loss[alive[better]] = delta[better], c[better]
        robust[alive[wrong]] = False
    return best, robust


def fgsm(forward: Forward, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """One step of size eps from x itself: delta."""
    return single_step(forward, x, y, torch.zeros_like(x), eps, eps)[0]


def auto_attack(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, batch: int, seed: int, version="standard"
) -> Tensor:
    """Adversarial images of AutoAttack (package pyautoattack, the original code). `version` "standard", or names of its
    attacks joined by commas. Misclassified images are left alone by the library. ValueError for images outside [0, 1]
    and for a network of fewer than 10 classes, of which the targeted attacks take 9 others."""
    check_images(x)
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    if classes < 10 and (version in ("standard", "plus") or "-t" in version):
        raise ValueError(
            f"AutoAttack's targeted attacks aim at 9 other classes and this network has {classes}: "
            "use version='apgd-ce,apgd-dlr,fab,square' (apgd-dlr from 3 classes on)"
        )
    from pyautoattack import AutoAttack

    names = None if version in ("standard", "plus", "rand") else version.split(",")
    kind = version if names is None else "custom"
    attack = AutoAttack(model, norm="Linf", eps=eps, version=kind, attacks=names, device=x.device, seed=seed)
    return attack.run_standard_evaluation(x.contiguous(), y, batch_size=batch)[0]
