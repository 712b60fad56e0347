"""Unlearning with control: mix the unlearned weights back until the original retention is (almost) kept, then compare.

theta(alpha) = (1 - alpha) theta_ref + alpha theta_u; alpha* is the largest alpha with
ES(D_r; theta(alpha)) >= tau ES(D_r; theta_ref). The released code's `update_ratio` is 1 - alpha.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

from lab.runs import UserError

import torch
from torch import Tensor, nn

from models import weights

Search = Literal["scan+bisect", "bisect"]
KINDS = ("exact", "perturb")


class Mixer:
    """Writes theta(alpha) into `model` in place. `reference`, `unlearned`: {name: tensor} on the model's device. Sums
    are float32 and rounded to the parameter's precision at the end: in bf16 an epoch moves many weights by less than
    a step of that format. alpha 0 and 1 copy the ends, bit for bit."""

    def __init__(self, model: nn.Module, reference: dict[str, Tensor], unlearned: dict[str, Tensor]):
        own = weights(model)
        if not own.keys() == reference.keys() == unlearned.keys():
            raise UserError("the models to mix are not of one architecture")
        self.to, device = list(own.values()), next(iter(own.values())).device
        self.reference = [reference[k].to(device) for k in own]
        self.unlearned = [unlearned[k].to(device) for k in own]
        self.plain = all(t.dtype == torch.float32 for t in [*self.to, *self.reference, *self.unlearned])

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha must lie in [0, 1], not {alpha}")
        if alpha in (0, 1):
            torch._foreach_copy_(self.to, self.unlearned if alpha else self.reference)
        elif self.plain:  # one pass over memory, nothing allocated
            torch._foreach_copy_(self.to, self.reference)
            torch._foreach_lerp_(self.to, self.unlearned, alpha)
        else:
            for p, a, b in zip(self.to, self.reference, self.unlearned, strict=True):
                p.copy_(torch.lerp(a.float(), b.float(), alpha))


@dataclasses.dataclass
class Calibration:
    """alpha*, the retain score there, the bar tau * g(0), and how many points were evaluated. `vacuous`: the original
    model scores 0, every alpha passes, and nothing was controlled."""

    alpha: float
    score: float
    bar: float
    evaluations: int
    vacuous: bool


class Curve:
    """g(alpha), each point evaluated once: searches for several tau share them."""

    def __init__(self, g: Callable[[float], float]):
        self.g, self.known = g, {}

    def __call__(self, alpha: float) -> float:
        alpha = round(alpha, 9)
        if alpha not in self.known:
            self.known[alpha] = self.g(alpha)
        return self.known[alpha]


def check_tau(tau: float) -> None:
    if not 0 < tau <= 1:
        raise UserError(f"--tau must lie in (0, 1], not {tau:g}: it is a share of the original model's retention")


def calibrate(
    g: Callable[[float], float], tau: float, how: Search = "scan+bisect", step: float = 0.05, tolerance: float = 1e-3
) -> Calibration:
    """The largest alpha in [0, 1] with g(alpha) >= tau g(0).

    scan+bisect: from 1 downward in steps to the first alpha that passes, then halve the last interval down to
    `tolerance`; g need not be monotone on the whole. bisect: halve [0, 1], as the paper's algorithm is named; it
    needs a monotone g."""
    check_tau(tau)
    if not 0 < step <= 1 or not 0 < tolerance < 1:
        raise UserError("the step of the alpha grid must lie in (0, 1], its tolerance in (0, 1)")
    curve = g if isinstance(g, Curve) else Curve(g)
    before = len(curve.known)
    bar = tau * curve(0.0)
    low, high = 0.0, 1.0
    if curve(1.0) >= bar:
        low = 1.0
    elif how == "scan+bisect":
        # Grid points count from 1 down; the last step may be shorter and ends at 0, which always passes.
        points = [max(1 - step * k, 0.0) for k in range(1, int(1 / step + 2))]
        for point in points:
            if curve(point) >= bar:
                low = point
                break
            high = point
    while low < 1 and high - low > tolerance:
        middle = (low + high) / 2
        if curve(middle) >= bar:
            low = middle
        else:
            high = middle
    return Calibration(round(low, 9), curve(low), bar, len(curve.known) - before, curve(0.0) == 0)


def alpha_curve(mixer: Mixer, lm, sets, step: float = 0.05) -> dict[str, list[float]]:
    """The four ES on a grid of alpha from 0 to 1."""
    n = max(round(1 / step), 1)
    out: dict[str, list[float]] = {"alpha": [k / n for k in range(n + 1)]}
    for alpha in out["alpha"]:
        mixer.set(alpha)
        for (kind, part), found in sets.scores(lm).items():
            out.setdefault(f"ES_{kind}_{part}", []).append(float(found.es.mean()))
    return out
