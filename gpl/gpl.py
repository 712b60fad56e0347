"""GPL: graph PU learning with the label propagation loss (arXiv 2405.19919).

The equations stand first; `fit`, at the end, is Algorithm 1 on one page for a graph of your own.

Everything works on a batch of S seeds at once. Shapes: S seeds, N nodes, E undirected edges. One weight in (0, 1]
a seed and undirected edge is learned, M [S, E]; beliefs are kept as the negative column only, because rows of
D^-1 A sum to one, so that the positive column is 1 minus it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Data

from data import Graph, GraphBatch, pu_split
from models import Adjacency, Classifier
from own import from_pyg
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


def start_belief(positive: Tensor, posterior: Tensor | None = None) -> Tensor:
    """E^(0), negative column [S, N]: 0 on `positive` [S, N] bool, elsewhere 1 (Eq. 6), or 1 - posterior [S, N] of the
    classifier (Eq. 9).

    Any other constant c for the unlabelled gives the same mask: E is linear in its start, so that log E moves by log c.
    Zero is not offered: the negative column would stay zero, and the loss could not see the mask.
    """
    rest = torch.ones_like(positive, dtype=torch.float32) if posterior is None else (1 - posterior).float()
    return rest.masked_fill(positive, 0.0)


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
    raw: Tensor,
    state: Adam,
    loss_of,
    kind: str,
    steps: int,
    lr: float,
    optimizer: str = "sgd",
    tied: Tensor | float = 1.0,
    tolerance: float = 1e-5,
):
    """Inner problem: at most `steps` steps on the raw edge parameter [S, E], each followed by the projection.

    sgd: plain gradient steps on `tied` times the loss. The loss is a mean over nodes, so that an edge's gradient falls
    as one over their number; with `tied` [S, 1], the number of nodes that ought to stay positive, the step of an edge
    depends on its neighbourhood alone and not on the size of the graph. adam: steps of about `lr` for every edge with
    any gradient, whatever the scale of the loss.

    `loss_of(weight [S, E]) -> [S]`. A seed stops when its loss changes by no more than `tolerance` of itself; stopped
    seeds are frozen by a mask, and every tenth step the host asks whether all have stopped, then it leaves.
    Returns (raw, state, last loss [S]).
    """
    m, v, t = state
    previous = torch.full((len(raw),), math.inf, device=raw.device)
    active = torch.ones(len(raw), 1, dtype=torch.bool, device=raw.device)
    loss = previous
    for k in range(steps):
        leaf = raw.detach().requires_grad_(True)
        loss = loss_of(mask_of(leaf, kind))
        (g,) = torch.autograd.grad(loss.sum(), leaf)
        loss = loss.detach()
        if k:
            active = active & ((previous - loss).abs() > tolerance * previous.abs()).unsqueeze(-1)
        if k % 10 == 9 and not active.any():
            break
        previous = loss
        t = torch.where(active, t + 1, t)
        m, v = torch.where(active, m.lerp(g, 0.1), m), torch.where(active, v.lerp(g * g, 0.001), v)
        step = lr * tied * g
        if optimizer == "adam":
            step = lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        raw = torch.where(active, project(raw.detach() - step, kind), raw.detach())
    return raw, (m, v, t), loss


def fixed_mask(batch: GraphBatch, kind: str, constant: float, seeds: Sequence[int]) -> Tensor:
    """Edge weights [S, E] that nothing is learned for: the controls of the mask.

    constant: one weight on every edge. random: four fifths of the edges cut, drawn by seed. ideal: edges between the
    two classes cut, by the true labels of all nodes: no method may know them. A cut edge has weight 1e-4.
    """
    if kind == "constant":
        return torch.full((batch.S, batch.E), constant, device=batch.device)
    if kind == "random":
        draws = [torch.rand(batch.E, generator=torch.Generator().manual_seed(s + 32_452_843)) for s in seeds]
        return torch.where(torch.stack(draws) < 0.2, 1.0, MASK_MIN).to(batch.device)
    same = batch.y.gather(1, batch.edge_i) == batch.y.gather(1, batch.edge_j)
    return torch.where(same, 1.0, MASK_MIN)


def class_prior(posterior: Tensor, is_p: Tensor, is_u: Tensor, regroup: bool = False) -> Tensor:
    """pi_hat = min_c Q_u(c) / Q_p(c) (Eq. 7), [S], with the threshold chosen by the BBE confidence bound.

    `regroup`: a tenth of U, the most positive-looking, is copied into P first (ReMPE, priors.regroup).
    """
    if regroup:
        is_p = is_p | select(posterior, is_u, torch.full_like(posterior[:, 0], 0.1))
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


@dataclass(frozen=True)
class Fitted:
    """What `fit` found: posterior [N] = P(positive); positive [N] bool, the labelled nodes and those above 0.5; prior,
    the share of positives among the unlabelled; edge [2, E] with i < j and weight [E] in (0, 1]."""

    posterior: Tensor
    positive: Tensor
    labelled: Tensor
    prior: float
    edge: Tensor
    weight: Tensor


def fit(
    data: Data | Graph,
    positive: int | None = None,
    labelled: str | Tensor | Sequence[int] | None = None,
    *,
    prior: str | float = "frozen",
    seed: int = 0,
    warmup: int = 100,
    epochs: int = 100,
    inner_steps: int = 5,
    inner_lr: float = 0.003,
    alpha: float = 0.5,
    steps: int = 5,
    hidden: int = 16,
    lr: float = 0.01,
    weight_decay: float = 5e-4,
    dropout: float = 0.5,
    held_out: float = 0.2,
    device: str | torch.device = "cpu",
) -> Fitted:
    """Algorithm 1 on one graph: edge weights (Eq. 6 and 9), class prior (Eq. 7) and GCN (Eq. 8) in turn.

    data: torch_geometric's Data with x [N, F] and edge_index [2, E']; `labelled`: its known positives, a mask [N], node
    ids or an attribute's name; `positive`: the class of data.y they belong to, needed only if `labelled` is None: then
    half of that class is labelled, by seed. prior: "bbe" estimates it every epoch, "rempe" does so after regrouping,
    "frozen" once after the warm-up; a number is the share of positives among the unlabelled where it is known.
    `held_out`: share of both sets that no loss sees, for the prior. Does what train.py's gpl does.
    """
    told = not isinstance(prior, str)
    if (not 0 <= prior <= 1) if told else prior not in ("bbe", "rempe", "frozen"):
        raise ValueError(f"prior must be 'bbe', 'rempe', 'frozen' or a share in [0, 1], not {prior!r}")
    graph = data if isinstance(data, Graph) else from_pyg(data, positive, labelled)
    split = pu_split(graph.y, 0.5, held_out, held_out, seed, graph.labelled)
    batch = GraphBatch([graph], 1, device)
    known, held_p, held_u = (m.to(device).unsqueeze(0) for m in (split.labelled, split.held_p, split.held_u))
    p, u = known & ~held_p, ~known & ~held_u  # what the losses see
    for_p, for_u = (held if held.any() else rest for held, rest in ((held_p, known), (held_u, ~known)))
    model = Classifier(batch, hidden, dropout, [seed])
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    weight = torch.ones(1, batch.E, device=device)
    chosen, adjacency = torch.zeros_like(known), Adjacency(batch)

    @torch.no_grad()
    def posterior() -> Tensor:
        model.eval()
        return model(adjacency).sigmoid()

    for epoch in range(warmup + epochs):
        if epoch >= warmup:
            first, up = epoch == warmup, chosen & u
            start = start_belief(p) if first else start_belief(p, posterior())

            def lpl_of(w: Tensor, start=start, first=first, up=up) -> Tensor:
                belief = propagate(w, start, batch, alpha, steps)
                return lpl(belief, p) if first else lpl_joint(belief, p | up, u & ~up)

            tied = (p if first else p | up).sum(-1, keepdim=True)
            weight, _, _ = learn_mask(weight, adam_start(weight), lpl_of, "clamp", inner_steps, inner_lr, tied=tied)
            adjacency = Adjacency(batch, weight)
            scores = posterior()
            if first and told:
                pi = scores.new_tensor([prior])
            elif not told and (first or prior != "frozen"):
                pi = class_prior(scores, for_p, for_u, prior == "rempe")
            chosen = select(scores, ~known, pi)
        model.train()
        logits = model(adjacency)
        if epoch < warmup:
            loss = two_set_loss(logits, p, u) / 2
        else:
            loss = two_set_loss(logits, p | (chosen & u), u & ~chosen)
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        optimizer.step()

    scores = posterior()[0].cpu()
    said = (scores > 0.5) | split.labelled
    return Fitted(scores, said, split.labelled, float(pi[0]), graph.edge, weight[0].detach().cpu())
