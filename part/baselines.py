"""The arms: which base method each is, where its budget comes from, its attack and its loss; and AWP around them.

Base methods: AT (Madry et al., ICLR 2018), TRADES (Zhang et al., ICML 2019), MART (Wang et al., ICLR 2020), FAT (Zhang
et al., ICML 2020). PART, PART-T and PART-M are AT, TRADES and MART in the box of pixel_reweighting.py, and nothing
else: with eps_low = eps they are the same program step by step. AWP: Wu et al., NeurIPS 2020.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attacks

QUADRANTS = ("upper-left", "upper-right", "lower-left", "lower-right")


@dataclass(frozen=True)
class Arm:
    base: str
    """at, trades, mart, fat or fat-trades: attack and loss."""
    region: str
    """Where the budget is eps: everywhere, cam (PART), a control of it (shuffled, inverted, mean, low: nowhere), or
    all but a quadrant."""
    label: str
    """Row of the tables."""


def _arms() -> dict[str, Arm]:
    out = {}
    for base, ours, title in (("at", "part", "PART"), ("trades", "part-t", "PART-T"), ("mart", "part-m", "PART-M")):
        out[base] = Arm(base, "everywhere", base.upper())
        out[ours] = Arm(base, "cam", title)
        for control in ("shuffled", "inverted"):
            out[f"{ours}-{control}"] = Arm(base, control, f"{title} {control}")
        out[f"{base}-mean"] = Arm(base, "mean", f"{base.upper()} mean budget")
        out[f"{base}-low"] = Arm(base, "low", f"{base.upper()} at eps_low")
    for q in QUADRANTS:
        out[f"at-{q}"] = Arm("at", q, f"AT low {q}")
    out["fat"] = Arm("fat", "everywhere", "FAT")
    out["fat-trades"] = Arm("fat-trades", "everywhere", "FAT for TRADES")
    return out


ARMS = _arms()
# Which base method warms an arm up, and the attack and loss of which it has.
WARMUP = {"at": "at", "fat": "at", "trades": "trades", "mart": "mart", "fat-trades": "trades"}
# Epochs after which the friendly attack goes one misclassified point further (published code).
TAU_EPOCHS = {"fat": (50, 90), "fat-trades": (30, 50, 70)}


# ------------------------------------------------------------------------------------------------------ inner attacks


def start(s, base: str, x: Tensor, generator: torch.Generator, u: float = 1.0) -> Tensor:
    """Start noise of images x [B, C, H, W]: U(-u eps, u eps), or 0.001 N(0, 1) for TRADES and MART."""
    if WARMUP[base] == "at":
        return attacks.uniform(x, u * s.eps, generator)
    return attacks.normal(x, 0.001, generator)


def tau(s, base: str, epoch: int) -> int:
    """Misclassified points that the friendly attack passes in `epoch` (from 0, warm-up included)."""
    return sum(epoch >= last for last in TAU_EPOCHS.get(base, ())) if s.tau == -1 else s.tau


def perturb(
    s,
    base: str,
    forward: attacks.Forward,
    x: Tensor,
    y: Tensor,
    e: attacks.Box,
    start: Tensor,
    u: float = 1.0,
    epoch: int = 0,
) -> Tensor:
    """delta of the training images x [B, C, H, W] in the box e, from `start`. u scales the step. The network is in eval
    mode."""
    step = u * s.step
    if base in TAU_EPOCHS:
        kl = base == "fat-trades"
        return attacks.fat(forward, x, y, start, step, e, s.steps, tau(s, base, epoch), kl)
    if base == "trades":
        return attacks.trades(forward, x, start, step, e, s.steps)
    if base == "at" and s.attack == "mma":
        return attacks.mma(forward, x, y, start, step, e, s.steps, s.targets)
    return attacks.pgd(forward, x, y, start, step, e, s.steps)


# -------------------------------------------------------------------------------------------------------------- losses


def trades_loss(z: Tensor, z_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """CE(f(x), y) + beta mean KL(softmax f(x) || softmax f(x')); the gradient flows through both. Logits [B, K]."""
    kl = F.kl_div(z_adv.log_softmax(1), z.softmax(1), reduction="sum") / len(z)
    return F.cross_entropy(z, y) + beta * kl


def mart_loss(z: Tensor, z_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """BCE(f(x'), y) + beta mean KL(p || q)(1 - p_y) with p = softmax f(x), q = softmax f(x'), and
    BCE = CE(f(x'), y) - mean log(1.0001 - max_{k != y} q_k + 1e-12). The constants are the released code's."""
    p, q = z.softmax(1), z_adv.softmax(1)
    rival = q.scatter(1, y[:, None], -1.0).argmax(1)
    bce = F.cross_entropy(z_adv, y) - (1.0001 - q.gather(1, rival[:, None])[:, 0] + 1e-12).log().mean()
    kl = (p * (z.log_softmax(1) - (q + 1e-12).log())).sum(1)
    return bce + beta * (kl * (1.0000001 - p.gather(1, y[:, None])[:, 0])).mean()


def loss(s, base: str, forward: attacks.Forward, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(training loss, logits at x_adv); the network is in train mode. AT and FAT see x_adv only; TRADES and MART both,
    natural images first."""
    if WARMUP[base] == "at":
        z = forward(x_adv)
        return F.cross_entropy(z, y), z
    natural = forward(x)
    z = forward(x_adv)
    return (mart_loss if base == "mart" else trades_loss)(natural, z, y, s.beta), z


# ----------------------------------------------------------------------------------------------------------------- AWP


def awp_gamma(base: str) -> float:
    """Relative size of the weights' perturbation: 0.01 for AT and FAT, 0.005 for TRADES (published) and MART (ours)."""
    return 0.01 if WARMUP[base] == "at" else 0.005


def awp_wait(s, base: str) -> int:
    """Epochs before AWP sets in."""
    return (10 if WARMUP[base] == "trades" else 0) if s.awp_warmup == -1 else s.awp_warmup


@contextmanager
def perturbed_weights(
    model: nn.Module,
    gamma: float,
    objective: Callable[[], Tensor],
    average: Callable[[list[Tensor]], list[Tensor]] = list,
) -> Iterator[None]:
    """Adversarial weight perturbation: inside, each weight tensor w of two or more dimensions is moved to
    w + gamma |w| g/|g|, g the gradient of objective() with respect to w; afterwards the same move is taken back,
    whatever the optimiser did in between. Running statistics are not touched by the look that finds g; `average` takes
    the mean of g over processes."""
    weights = [p for n, p in model.named_parameters() if p.ndim > 1 and "weight" in n]
    state = [b.clone() for b in model.buffers()]
    grads = average(torch.autograd.grad(objective(), weights))
    with torch.no_grad():
        for b, old in zip(model.buffers(), state, strict=True):
            b.copy_(old)
        moves = [gamma * g * (w.norm() / (g.norm() + 1e-20)) for w, g in zip(weights, grads, strict=True)]
        torch._foreach_add_(weights, moves)
    yield
    with torch.no_grad():
        torch._foreach_sub_(weights, moves)
