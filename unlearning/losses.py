"""The unlearning objectives, to be minimised, as functions of token losses; see the table in README.md.

Notation: nll [N] are the losses -log p(y_i | x, y_<i) of the N supervised tokens of a batch of B sequences, row [N]
names the sequence of each token; the end token counts. s [B] are their sums over a sequence, n [B] the numbers of
tokens. Everything is float32, whatever the model's precision.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_nll(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """[N, V], [N] -> [N]; with `temperature` T of the logits Z / T, without a factor T^2 (temperature scaling)."""
    return F.cross_entropy(logits.float() / temperature, target, reduction="none")


def sums(nll: Tensor, row: Tensor, size: int) -> Tensor:
    """Sum over each sequence, [B]."""
    return nll.new_zeros(size).index_add(0, row, nll)


def counts(row: Tensor, size: int) -> Tensor:
    """Supervised tokens of each sequence, [B]. Not bincount: it makes the host wait for the device."""
    return torch.zeros(size, device=row.device).index_add(0, row, torch.ones(len(row), device=row.device))


def ga(nll: Tensor) -> Tensor:
    """Gradient ascent: minus the mean over all supervised tokens of the micro-batch."""
    return -nll.mean()


def selected(nll: Tensor, row: Tensor, size: int, share: float) -> Tensor:
    """Loss selection: gradient ascent on the floor(share * n) tokens of each sequence with the smallest loss (the
    earlier token wins a tie); 0 when no sequence has any. The choice carries no gradient."""
    with torch.no_grad():
        order = torch.argsort(nll.detach(), stable=True)
        order = order[torch.argsort(row[order], stable=True)]  # by sequence, then by loss
        n = counts(row, size).long()
        first = torch.cumsum(n, 0) - n
        rank = torch.arange(len(nll), device=nll.device) - first[row[order]]
        # In float64 and a hair up: 0.8 * 5 must be 4, not 3.999...
        limit = torch.floor(n.double() * share + 1e-9).long()
        chosen = torch.zeros_like(nll)
        chosen[order] = (rank < limit[row[order]]).to(nll.dtype)
    return -(nll * chosen).sum() / chosen.sum().clamp(min=1)


def capped(nll: Tensor, row: Tensor, size: int, cap: float) -> Tensor:
    """Likelihood capping of the first version: mean of (cap - s_i) over the sequences with s_i < cap, 0 if there is
    none."""
    s = sums(nll, row, size)
    active = (s < cap).detach().to(s.dtype)
    return ((cap - s) * active).sum() / active.sum().clamp(min=1)


def capped_tokens(nll: Tensor, cap: float) -> Tensor:
    """The other reading: gradient ascent only on tokens whose likelihood is above exp(-cap)."""
    active = (nll < cap).detach().to(nll.dtype)
    return ((cap - nll) * active).sum() / active.sum().clamp(min=1)


def npo(s: Tensor, s_ref: Tensor, beta: float) -> Tensor:
    """Negative preference: -(2 / beta) mean log sigmoid(beta (s - s_ref))."""
    return -(2 / beta) * F.logsigmoid(beta * (s - s_ref)).mean()


def simnpo(s: Tensor, n: Tensor, beta: float, margin: float) -> Tensor:
    """NPO without a reference, normalised by length: -(2 / beta) mean log sigmoid(beta (s / n - margin))."""
    return -(2 / beta) * F.logsigmoid(beta * (s / n - margin)).mean()


def dpo(s_idk: Tensor, s_idk_ref: Tensor, s: Tensor, s_ref: Tensor, beta: float) -> Tensor:
    """Preference for a refusal over the answer; log likelihoods are -s."""
    return -(2 / beta) * F.logsigmoid(beta * ((s_idk_ref - s_idk) - (s_ref - s))).mean()


def wga(nll: Tensor, beta: float) -> Tensor:
    """Weighted gradient ascent: tokens weigh p^beta, p = exp(-nll), without gradient."""
    return -(torch.exp(-beta * nll).detach() * nll).mean()


def satimp(nll: Tensor, beta1: float, beta2: float) -> Tensor:
    """Saturation and importance: tokens weigh p^beta1 (1 - p)^beta2, without gradient."""
    p = torch.exp(-nll).detach()
    return -(p.pow(beta1) * (1 - p).clamp(min=0).pow(beta2) * nll).mean()


def rmu(hidden: Tensor, direction: Tensor, scale: float) -> Tensor:
    """Steer hidden states [N, d] to scale * direction [d]: mean over positions of (1 / d) ||h - c u||^2."""
    return (hidden.float() - scale * direction).pow(2).mean(1).mean()


def rmu_direction(width: int, generator: torch.Generator, unit: bool) -> Tensor:
    """u ~ U[0, 1)^d. The released code of this paper does not normalise it; RMU's origin does (`unit`)."""
    u = torch.rand(width, generator=generator)
    return u / u.norm() if unit else u


def stay(hidden: Tensor, reference: Tensor) -> Tensor:
    """RMU's own retain term: mean squared distance of hidden states [M, d] from the reference's."""
    return (hidden.float() - reference.float()).pow(2).mean()


KL_REDUCTIONS = ("tokens", "padded", "positions")


def kl(logits: Tensor, reference: Tensor, mask: Tensor, how: str = "tokens", padded: int = 500) -> Tensor:
    """KL(p_ref || p) summed over all positions given, logits [M, V] of the tokens that are no padding (questions count
    too), for `positions` [B, L, V] with the padding, and divided as `how` says:

    tokens: by their number M, so that padding changes nothing.
    padded: by B * `padded`, which is `tokens` * M / (B * padded): the divisor of the released code without the terms
    of its padding positions; does not change with padding either.
    positions: by B * L; with sequences padded to 500 this is the released code's sum and divisor, but for the end
    token: there it has attention 0 like the padding, here it is attended to, which changes the terms behind it."""
    p, q = F.log_softmax(logits.float(), -1), F.log_softmax(reference.float(), -1)
    total = F.kl_div(p, q, reduction="sum", log_target=True)
    return total / {"tokens": len(logits), "padded": len(mask) * padded, "positions": mask.numel()}[how]
