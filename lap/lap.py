"""Layer-aware adversarial weight perturbation (LAP), Lin, Yu, Han, Su, Liu, ICML 2024, arXiv 2405.16262.

Single-step adversarial training perturbs the images; LAP also moves the weights, most in the first layer and not at all
in the last, and never takes the move back. One backward pass at the start point x + eta gives both the gradient of the
images and that of the weights:

    w_1 .. w_L          weights with at least two dimensions, in the order in which the network registers them
    lambda_i = 1 - (ln i / ln L)^gamma                        1 in the first layer, 0 in the last
    v_i      = momentum * m_i + (g_i + weight_decay * w_i)    what an SGD step would subtract, without its rate;
                                                              dampening, Nesterov and maximize as in torch.optim.SGD
    diff_i   = -lr v_i |w_i| / (lr |v_i| + 1e-20)             that step, made as long as the weight itself
    w_i     <- w_i + beta lambda_i diff_i                     kept: the next step starts from here

The released code makes the SGD step on the network, measures it and restores weights and momentum; the closed form
needs neither the step nor a copy. It follows the gradient *downhill*, unlike AWP, from which its helper functions stem;
the paper calls the perturbation adversarial, and its own equation could not be obtained. `direction` chooses.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Start = Literal["v", "r", "n"]
Variant = Literal[
    *("lap", "awp", "modified-awp", "lap-a", "lap-r", "lap-linf", "lap-uniform", "lap-reversed", "lap-undone")
]
Levels = Literal["schedule", "ones", "mean", "reversed"]
Direction = Literal["official", "ascent", "random"]
Norm = Literal["l2", "linf"]


@dataclass(frozen=True)
class Geometry:
    """The attack of a start: noise U(-noise*eps, noise*eps), a step of step*eps, clamped to the eps-ball or not."""

    noise: float
    step: float
    clamp: bool


GEOMETRY: dict[str, Geometry] = {
    "v": Geometry(noise=0.0, step=1.0, clamp=True),
    "r": Geometry(noise=1.0, step=1.25, clamp=True),
    "n": Geometry(noise=2.0, step=1.0, clamp=False),
}

GAMMA = 0.3  # in every published command; the released code's own default is 1

# Published beta by start and 255 * eps; CIFAR-10, PreActResNet-18, 30 epochs, gamma 0.3.
PUBLISHED: dict[str, dict[int, float]] = {
    "v": {8: 0.03, 12: 0.058, 16: 0.07, 32: 0.48},
    "r": {8: 0.002, 12: 0.03, 16: 0.05, 32: 0.3},
    "n": {8: 0.001, 12: 0.002, 16: 0.005, 32: 0.75},
}


def published_beta(start: str, eps: float) -> tuple[float, bool]:
    """(beta, published?). At other radii the nearest published one's (of two equally near, the smaller), our choice."""
    table, radius = PUBLISHED[start], 255 * eps
    nearest = min(table, key=lambda r: (abs(r - radius), r))
    return table[nearest], abs(nearest - radius) < 1e-6


@dataclass(frozen=True)
class Recipe:
    """How a variant makes its weight perturbation; LAP is the default of every field."""

    levels: Levels = "schedule"
    """lambda_i: the layer schedule; 1 in every layer; the schedule's mean in every layer; the schedule from the last
    layer to the first."""
    accumulated: bool = True
    """The perturbation stays after the step; otherwise it is subtracted again."""
    own_pass: bool = False
    """Its gradient comes from a pass of its own at x + delta instead of the input perturbation's at x + eta."""
    bare: bool = False
    """v is the gradient alone, without momentum and weight decay."""
    direction: Direction = "official"
    norm: Norm = "l2"


# The recipes of the paper's ablation are not known in detail; these are the natural readings of their names.
RECIPES: dict[str, Recipe] = {
    "lap": Recipe(),
    "awp": Recipe(levels="ones", accumulated=False, own_pass=True, bare=True, direction="ascent"),  # Wu et al. 2020
    "modified-awp": Recipe(levels="ones"),
    "lap-a": Recipe(own_pass=True),
    "lap-r": Recipe(direction="random"),
    "lap-linf": Recipe(norm="linf"),
    # Controls that are not the paper's: the same perturbation without its idea, of the layers or of keeping it.
    "lap-uniform": Recipe(levels="mean"),
    "lap-reversed": Recipe(levels="reversed"),
    "lap-undone": Recipe(accumulated=False),
}


def layers(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights LAP perturbs, by name, in the order of registration: two dimensions or more and "weight" in the
    name. Scales of normalisations, biases, class tokens and positions are left alone."""
    return {k: p for k, p in model.named_parameters() if "weight" in k and p.ndim >= 2}


def schedule(n: int, gamma: float) -> list[float]:
    """lambda_1 .. lambda_n. gamma -> 0 leaves the first layer alone, gamma -> infinity all layers but the last at 1."""
    if n < 1 or not gamma >= 0:
        raise ValueError(f"a schedule needs a layer and gamma >= 0, not {n} and {gamma}")
    if n == 1:
        return [1.0]
    return [1.0] + [1 - (math.log(i) / math.log(n)) ** gamma for i in range(2, n + 1)]


def levels_of(kind: Levels, n: int, gamma: float) -> list[float]:
    """lambda_1 .. lambda_n of a recipe."""
    found = schedule(n, gamma)
    return {"schedule": found, "ones": [1.0] * n, "mean": [sum(found) / n] * n, "reversed": found[::-1]}[kind]


@torch.no_grad()
def sgd_direction(
    weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor] | None, group: dict, scale: float = 1.0
) -> list[Tensor]:
    """v_i, what torch.optim.SGD would subtract next, without its rate, as new tensors. `group`: the parameter group of
    the weights; buffers None before the first step. `scale` turns the gradient of a summed loss into that of its
    mean."""
    momentum = group["momentum"]
    v = torch._foreach_mul(gradients, -scale if group["maximize"] else scale)
    if group["weight_decay"]:
        torch._foreach_add_(v, weights, alpha=group["weight_decay"])
    if not momentum:
        return v
    plain = torch._foreach_mul(v, 1.0) if group["nesterov"] else []
    if buffers is not None:
        if group["dampening"]:
            torch._foreach_mul_(v, 1 - group["dampening"])
        torch._foreach_add_(v, buffers, alpha=momentum)
    if group["nesterov"]:
        torch._foreach_mul_(v, momentum)
        torch._foreach_add_(v, plain)
    return v


@torch.no_grad()
def moves(weights: list[Tensor], v: list[Tensor], sizes: Tensor, lr: float, norm: Norm = "l2") -> list[Tensor]:
    """The perturbations, written over v: -sizes_i lr v_i |w_i| / (lr |v_i| + 1e-20), with sizes [L] = beta lambda_i.
    With lr = 0, the first step of the cyclic schedule, they are 0. "linf": -sizes_i mean|w_i| sign(v_i)."""
    if norm == "linf":
        means = torch._foreach_div(torch._foreach_norm(weights, 1), [float(w.numel()) for w in weights])
        torch._foreach_sign_(v)
        factors = -float(lr > 0) * sizes * torch.stack(means)
    else:
        w_norm, v_norm = (torch.stack(torch._foreach_norm(t)) for t in (weights, v))
        factors = -lr * sizes * w_norm / (lr * v_norm + 1e-20)
    torch._foreach_mul_(v, list(factors.unbind()))
    return v


def grouped(weights: list[Tensor], gradients: list[Tensor | None], optimizer: torch.optim.SGD) -> list[tuple]:
    """[(parameter group, whether its weights have momentum, their places in `weights`)]; ValueError for a weight the
    optimiser does not have. A weight without gradient is left out, as SGD leaves it out."""
    owner = {p: k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
    parts: dict[tuple[int, bool], list[int]] = {}
    for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
        if w not in owner:
            raise ValueError(
                f"weight {i} of shape {[*w.shape]} is not in the optimiser: give it all of lap.layers(model)"
            )
        if g is not None:
            began = optimizer.state.get(w, {}).get("momentum_buffer") is not None
            parts.setdefault((owner[w], began), []).append(i)
    return [(optimizer.param_groups[k], began, places) for (k, began), places in parts.items()]


@torch.no_grad()
def perturb_(
    weights: list[Tensor],
    gradients: list[Tensor | None],
    optimizer: torch.optim.SGD,
    sizes: Tensor,
    recipe: Recipe = RECIPES["lap"],
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Move `weights` in place and return the moves. Reads momentum, rate and weight decay of the optimiser, each
    weight's from its own group, and changes nothing in it; sizes [L] = beta lambda_i. A weight without gradient stays.

    TypeError for another optimiser than SGD, whose next step is not known here; ValueError for a weight that is not in
    the optimiser, and for sizes of another length."""
    if not isinstance(optimizer, torch.optim.SGD):
        raise TypeError(
            f"LAP moves the weights along the next step of torch.optim.SGD and does not know that of "
            f"{type(optimizer).__name__}: train with SGD, or hand over the SGD inside a wrapper"
        )
    if len(sizes) != len(weights):
        raise ValueError(
            f"{len(sizes)} sizes for {len(weights)} weights; give beta times lap.schedule({len(weights)}, gamma)"
        )
    found: list[Tensor | None] = [None] * len(weights)
    for group, began, places in grouped(weights, gradients, optimizer):
        w, g = [weights[i] for i in places], [gradients[i] for i in places]
        if recipe.direction == "random":  # a Gaussian in the place of v; normalised below like any other direction
            v = [torch.empty_like(t).normal_(generator=generator) for t in w]
        elif recipe.bare:
            v = torch._foreach_mul(g, -scale if group["maximize"] else scale)
        else:
            buffers = [optimizer.state[t]["momentum_buffer"] for t in w] if began else None
            v = sgd_direction(w, g, buffers, group, scale)
        size = torch.stack([sizes[i] for i in places])
        part = moves(w, v, -size if recipe.direction == "ascent" else size, group["lr"], recipe.norm)
        torch._foreach_add_(w, part)
        for i, move in zip(places, part, strict=True):
            found[i] = move
    return [torch.zeros_like(w) if move is None else move for w, move in zip(weights, found, strict=True)]
