"""GPL: graph PU learning with the label propagation loss (arXiv 2405.19919).

Everything works on a batch of S seeds at once. Shapes: S seeds, N nodes, E undirected edges. One weight in (0, 1]
a seed and undirected edge is learned, M [S, E]; beliefs are kept as the negative column only, because rows of
D^-1 A sum to one, so that the positive column is 1 minus it.
"""

import math

import torch
from torch import Tensor

from data import GraphBatch
from priors import bbe_batch

FLOOR = 1e-6  # log P(neg) is unbounded below without it, and its gradient infinite
MASK_MIN = 1e-4  # "positive" mask: an edge may fade but never disappear
Adam = tuple[Tensor, Tensor, Tensor]  # first moment [S, E], second moment [S, E], steps taken [S, 1]


class _Propagate(torch.autograd.Function):
    """K steps of E <- alpha E + (1 - alpha) D^-1 A E for the negative column, with the adjoint in closed form.

    Per step, with t_i = (D^-1 A E)_i and g = dL/dE^(k): dL/dM_ij collects u_i (E_j - t_i) + u_j (E_i - t_j),
    where u = (1 - alpha) g / D, and dL/dE^(k-1) = alpha g + A u. All K edge gradients are one gather of 2K+2 numbers a
    node instead of K gathers, and nothing of size N x N is ever formed.
    """

    @staticmethod
    def forward(ctx, weight, start, batch, alpha, steps, clamp):
        values = batch.values(weight)
        degree = batch.degree(values)
        linked = degree > 0
        inverse = torch.where(linked, 1 / degree.clamp(min=1e-30), 0.0)
        belief, before, mixed = start, [], []
        for _ in range(steps):
            before.append(belief)
            # An isolated node keeps its belief (identity row), else it would lose mass.
            t = torch.where(linked, batch.matmul(values, belief.unsqueeze(-1)).squeeze(-1) * inverse, belief)
            mixed.append(t)
            belief = alpha * belief + (1 - alpha) * t
            if clamp is not None:
                belief = belief.masked_fill(clamp, 0.0)
        ctx.save_for_backward(values, inverse, linked, *before, *mixed)
        ctx.batch, ctx.alpha, ctx.steps, ctx.clamp = batch, alpha, steps, clamp
        return belief

    @staticmethod
    def backward(ctx, g):
        batch, alpha, steps = ctx.batch, ctx.alpha, ctx.steps
        values, inverse, linked, *rest = ctx.saved_tensors
        before, mixed = rest[:steps], rest[steps:]
        us, offset = [], torch.zeros_like(g)
        for k in reversed(range(steps)):
            if ctx.clamp is not None:
                g = g.masked_fill(ctx.clamp, 0.0)
            u = (1 - alpha) * g * inverse
            us.append(u)
            offset = offset - u * mixed[k]
            g = (
                alpha * g
                + batch.matmul(values, u.unsqueeze(-1)).squeeze(-1)
                + torch.where(linked, 0.0, (1 - alpha) * g)
            )
        u, e = torch.stack(us, -1), torch.stack(before[::-1], -1)  # [S, N, K]
        one = torch.ones_like(offset).unsqueeze(-1)
        left = torch.cat([u, e, offset.unsqueeze(-1), one], -1)
        right = torch.cat([e, u, one, offset.unsqueeze(-1)], -1)
        # Seed by seed, so that the gathered rows stay in cache.
        grad = torch.stack([(left[s][batch.edge_i[s]] * right[s][batch.edge_j[s]]).sum(-1) for s in range(batch.S)])
        return grad, None, None, None, None, None


def propagate(
    weight: Tensor, start: Tensor, batch: GraphBatch, alpha: float, steps: int, clamp: Tensor | None = None
) -> Tensor:
    """Label propagation (section 3): P(negative) of every node after `steps` steps.

    weight [S, E] > 0, start [S, N] in [0, 1] -> [S, N]. `clamp` [S, N] bool resets those nodes to positive after each
    step. Differentiable with respect to `weight` only.
    """
    if not 0 < alpha < 1 or steps < 1:
        raise ValueError("propagation needs 0 < alpha < 1 and at least one step")
    return _Propagate.apply(weight, start.detach(), batch, alpha, steps, clamp)


def start_belief(positive: Tensor, init: str, pi: Tensor | None = None, posterior: Tensor | None = None) -> Tensor:
    """E^(0), negative column [S, N]: 0 on `positive` [S, N] bool, elsewhere by `init`.

    neg: 1; uniform: 0.5; prior: 1 - pi with pi [S]; posterior: 1 - posterior [S, N] of the classifier (Eq. 9).
    """
    if init == "posterior":
        rest = 1 - posterior
    else:
        level = {"neg": 1.0, "uniform": 0.5, "prior": None}[init]
        rest = (
            (1 - pi).unsqueeze(-1).expand(positive.shape)
            if level is None
            else torch.full_like(positive, level, dtype=torch.float32)
        )
    return rest.float().masked_fill(positive, 0.0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True entries of the last axis, 0 where there is none: [S, N] -> [S]."""
    return torch.where(mask, x, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def lpl(negative: Tensor, positives: Tensor, form: str = "log") -> Tensor:
    """Positive-only label propagation loss (Eq. 6), [S]; `negative` [S, N] = P(negative) after K steps.

    log: mean over P of log P(negative), floored at 1e-6. ce: mean of -log(1 - P(negative)), same minimiser, bounded
    below, and it weighs the badly placed positives most.
    """
    if form == "log":
        return masked_mean(negative.clamp(min=FLOOR).log(), positives)
    return masked_mean(-(1 - negative).clamp(min=FLOOR).log(), positives)


def lpl_joint(negative: Tensor, positives: Tensor, negatives: Tensor, form: str = "log", weight: float = 1.0) -> Tensor:
    """Label propagation loss with the classifier's labels (Eq. 9), [S]: P u S should not become negative, U \\ S not
    positive."""
    return lpl(negative, positives, form) + weight * lpl(1 - negative, negatives, form)


def mask_start(shape: tuple[int, int], kind: str, device: torch.device) -> Tensor:
    """Raw edge parameter [S, E] whose mask is 1 (sigmoid: 0.98, it cannot reach 1)."""
    return torch.full(shape, {"clamp": 1.0, "sigmoid": 4.0, "exp": 0.0}[kind], device=device)


def mask_of(raw: Tensor, kind: str) -> Tensor:
    """Raw parameter -> edge weight in (0, 1]. Only relative weights matter to the propagation, but the convolution sees
    the absolute scale against its self loop, hence the bound 1."""
    if kind == "clamp":
        return raw
    return raw.sigmoid() if kind == "sigmoid" else raw.exp()


def project(raw: Tensor, kind: str) -> Tensor:
    """Back to the allowed range after an optimiser step."""
    if kind == "clamp":
        return raw.clamp(MASK_MIN, 1.0)
    return raw if kind == "sigmoid" else raw.clamp(math.log(MASK_MIN), 0.0)


def adam_start(raw: Tensor) -> Adam:
    return torch.zeros_like(raw), torch.zeros_like(raw), torch.zeros(len(raw), 1, device=raw.device)


def learn_mask(
    raw: Tensor, state: Adam, loss_of, kind: str, steps: int, lr: float, optimizer: str = "sgd", tolerance: float = 1e-5
):
    """Inner problem: at most `steps` steps on the raw edge parameter [S, E], each followed by the projection.

    sgd: plain gradient steps, which move an edge as far as the loss depends on it. adam: steps of about `lr` for every
    edge with any gradient, which soon drives most weights to a bound.

    `loss_of(weight [S, E]) -> [S]`. A seed stops when its loss changes by less than `tolerance`; stopped seeds are
    frozen by a mask rather than by leaving the loop, so that the host never waits for the device.
    Returns (raw, state, last loss [S]).
    """
    m, v, t = state
    previous = torch.full((len(raw),), math.inf, device=raw.device)
    active = torch.ones(len(raw), 1, dtype=torch.bool, device=raw.device)
    loss = previous
    for _ in range(steps):
        leaf = raw.detach().requires_grad_(True)
        loss = loss_of(mask_of(leaf, kind))
        (g,) = torch.autograd.grad(loss.sum(), leaf)
        loss = loss.detach()
        active = active & ((previous - loss).abs() >= tolerance).unsqueeze(-1)
        previous = loss
        t = torch.where(active, t + 1, t)
        m, v = torch.where(active, m.lerp(g, 0.1), m), torch.where(active, v.lerp(g * g, 0.001), v)
        step = lr * g
        if optimizer == "adam":
            step = lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        raw = torch.where(active, project(raw.detach() - step, kind), raw.detach())
    return raw, (m, v, t), loss


def class_prior(posterior: Tensor, is_p: Tensor, is_u: Tensor) -> Tensor:
    """pi_hat = min_c Q_u(c) / Q_p(c) (Eq. 7), [S], with the threshold chosen by the BBE confidence bound."""
    return bbe_batch(posterior, is_p, is_u)


def select(posterior: Tensor, unlabelled: Tensor, pi: Tensor) -> Tensor:
    """S = the floor(pi * |U|) most positive-looking nodes of U, [S, N] bool; ties go to the smaller node id."""
    # pi is a float32 quotient of counts: without the slack, pi * |U| = k falls one short of k half of the time.
    count = (pi.double() * unlabelled.sum(-1) * (1 + 2e-7)).floor()
    order = posterior.masked_fill(~unlabelled, -1.0).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < count.unsqueeze(-1)) & unlabelled


def two_set_loss(logits: Tensor, positives: Tensor, negatives: Tensor, reduction: str = "set") -> Tensor:
    """Cross-entropy with target + on `positives` and - on `negatives` (Eq. 8), [S]; logits [S, N].

    set: mean over either set, added. all: one mean over both sets together.
    """
    plus, minus = torch.nn.functional.softplus(-logits), torch.nn.functional.softplus(logits)
    if reduction == "set":
        return masked_mean(plus, positives) + masked_mean(minus, negatives)
    return masked_mean(torch.where(positives, plus, minus), positives | negatives)
