"""What the compared methods need beyond a classifier: nnPU risk, CVIR, GRAB's belief propagation, PU-GNN, LSDAN.

Shapes as in gpl.py: S seeds, N nodes, everything batched over the seeds. LSDAN and PU-GNN are rebuilt from second-hand
descriptions (constants in capitals below); their rows are labelled "approximate".
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import GraphBatch
from gpl import masked_mean, select
from models import Adjacency, Classifier, glorot

PUGNN_DELTA, PUGNN_NEGATIVES, PUGNN_ALPHA = 3, 50, 0.01
LSDAN_HOPS, LSDAN_NEIGHBOURS = 3, 32
BLOCK = 4096  # rows of an N x N table that are looked at together
GRAB_EDGE, GRAB_SWEEPS, GRAB_TOLERANCE = 0.9, 100, 1e-6
CERTAIN = 20.0  # log-odds that stand for probability one in belief propagation


def nnpu_loss(
    logits: Tensor, is_p: Tensor, is_u: Tensor, prior: Tensor, gamma: float = 1.0, beta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Non-negative PU risk with the sigmoid loss (Kiryo et al. 2017): (what to differentiate [S], risk [S]).

    R+ = prior * mean_P l(z), R- = mean_U l(-z) - prior * mean_P l(-z), l(z) = sigmoid(-z). Where R- < -beta the
    gradient is that of -gamma R- while the reported risk is R+ - beta; elsewhere both are R+ + R-.
    """
    plus, minus = torch.sigmoid(-logits), torch.sigmoid(logits)
    r_plus = prior * masked_mean(plus, is_p)
    r_minus = masked_mean(minus, is_u) - prior * masked_mean(minus, is_p)
    negative = r_minus < -beta
    objective = torch.where(negative, -gamma * r_minus, r_plus + r_minus)
    return objective, torch.where(negative, r_plus - beta, r_plus + r_minus).detach()


def cvir_negatives(posterior: Tensor, unlabelled: Tensor, alpha: Tensor) -> Tensor:
    """CVIR (Garg et al. 2021): U without its int(alpha * |U|) most positive-looking nodes, [S, N] bool."""
    return unlabelled & ~select(posterior, unlabelled, alpha)


# ------------------------------------------------------------------------------------------------------------- GRAB


def belief_propagation(batch: GraphBatch, prior_logit: Tensor, edge: float = GRAB_EDGE) -> Tensor:
    """Loopy belief propagation of GRAB (Yoo et al. 2021): marginal P(positive) of every node, [S, N].

    Node priors [S, N] as log-odds; edge potential edge/2 on the diagonal and (1 - edge)/2 off it. With two classes a
    message is one log-odds number: tanh(mu/2) = (2 edge - 1) tanh(cavity/2). Synchronous sweeps until no message
    changes by 1e-6, at most 100; a seed that has converged no longer moves by more than that.
    """
    coupling = 2 * edge - 1
    incoming = torch.zeros(batch.col.shape, device=prior_logit.device)  # message col -> row at each CSR entry
    for sweep in range(GRAB_SWEEPS):
        belief = (prior_logit + batch.degree(incoming)).reshape(-1)
        # Entry (row i, col j) receives from j: j's belief without what i has told j.
        cavity = belief.index_select(0, batch.col) - incoming.index_select(0, batch.reverse)
        new = 2 * torch.atanh(coupling * torch.tanh(cavity / 2))
        change, incoming = (new - incoming).abs().max() if len(new) else new.sum(), new
        if sweep % 10 == 9 and change < GRAB_TOLERANCE:  # the host waits for the device every tenth sweep only
            break
    return (prior_logit + batch.degree(incoming)).sigmoid()


def grab_loss(logits: Tensor, is_p: Tensor, is_u: Tensor, marginal: Tensor) -> Tensor:
    """Cross-entropy on P plus expected cross-entropy on U under the marginals [S, N] -> [S].

    The mean over U runs over nodes x classes, as in the re-implementation this follows: a factor 1/2 on U.
    """
    plus, minus = F.softplus(-logits), F.softplus(logits)
    return masked_mean(plus, is_p) + masked_mean(marginal * plus + (1 - marginal) * minus, is_u) / 2


# ----------------------------------------------------------------------------------------------------------- PU-GNN


def near_nodes(batch: GraphBatch, is_p: Tensor, delta: int = PUGNN_DELTA) -> Tensor:
    """Nodes within `delta` hops of a labelled positive, [S, N] bool (breadth-first by sparse products)."""
    ones = torch.ones(batch.col.shape, device=is_p.device)
    reached = is_p.float()
    for _ in range(delta):
        reached = ((batch.matmul(ones, reached.unsqueeze(-1)).squeeze(-1) + reached) > 0).float()
    return reached.bool()


def pugnn_loss(posterior: Tensor, is_p: Tensor, near: Tensor, far: Tensor, pi_near: Tensor, pi_far: Tensor) -> Tensor:
    """Distance-aware PU loss of PU-GNN, [S]: the *average* prediction of each part is matched to its prior.

    An empty part contributes nothing (|0 - prior| would be a constant without gradient).
    """

    def part(mask: Tensor, target: Tensor | float) -> Tensor:
        return torch.where(mask.any(-1), (masked_mean(posterior, mask) - target).abs(), 0.0)

    return 2 * (pi_near + pi_far) * part(is_p, 1.0) + part(near, pi_near) + part(far, pi_far)


class NegativeSamples:
    """K uniform non-neighbours k of i for every directed edge (i, j), drawn once a run by a seeded generator.

    Kept as a CSR pattern of distinct pairs and how often each was drawn, or, when they fill more than a tenth of all
    N x N cells, as an N x N table of counts: then blocks of a dense product are faster.
    """

    def __init__(self, batch: GraphBatch, seeds: list[int], per_edge: int = PUGNN_NEGATIVES, dense: bool | None = None):
        n, per_seed = batch.N, 2 * batch.E
        self.batch, self.dense = batch, per_seed * per_edge > n * n / 10 if dense is None else dense
        self.pairs, self.total = [], []
        row, col = batch.row.cpu(), batch.col.cpu().long()
        for s in range(batch.S):
            generator = torch.Generator().manual_seed(seeds[s] + 7_919)
            i, j = (t[s * per_seed : (s + 1) * per_seed] - s * n for t in (row, col))  # sorted by i
            keys = torch.cat([_draw(i, j, n, start, per_edge, generator) for start in range(0, n, BLOCK)])
            self.total.append(max(len(keys), 1))
            if self.dense:
                table = torch.bincount(keys, minlength=n * n).view(n, n)
                # The product z_i . z_k does not know its order: the upper triangle holds both.
                pairs = (table + table.t()).triu_().to(torch.int16).to(batch.device)
            else:
                pairs = _Pairs(keys, n, batch.device)
            self.pairs.append(pairs)

    def loss(self, z: Tensor) -> Tensor:
        """mean over edges and draws of sigmoid(z_i . z_k)^2, z [S, N, C] -> [S]."""
        form = _CountedPairs if self.dense else _SparsePairs
        return torch.stack([form.apply(z[s], self.pairs[s]) / self.total[s] for s in range(self.batch.S)])


def _draw(i: Tensor, j: Tensor, n: int, start: int, per_edge: int, generator: torch.Generator) -> Tensor:
    """Negative pairs of the edges (i, j) that leave the nodes start .. start + BLOCK, as keys i * n + k."""
    here = (i >= start) & (i < start + BLOCK)
    i, j = i[here], j[here]
    taken = torch.zeros(min(BLOCK, n - start), n, dtype=torch.bool)
    taken[i - start, j] = True
    taken[torch.arange(len(taken)), torch.arange(len(taken)) + start] = True
    full = taken.all(1)  # a node joined to all others: nothing to draw from
    ends = i[~full[i - start]].repeat_interleave(per_edge)
    other = torch.randint(n, ends.shape, generator=generator)
    bad = taken[ends - start, other].nonzero().squeeze(1)
    while len(bad):
        other[bad] = torch.randint(n, bad.shape, generator=generator)
        bad = bad[taken[ends[bad] - start, other[bad]]]
    return ends * n + other


class _Pairs:
    """Distinct pairs as a CSR pattern with their counts, and the way to its transpose."""

    def __init__(self, keys: Tensor, n: int, device: torch.device):
        keys, counts = keys.unique(return_counts=True)
        i, k = keys // n, keys % n
        self.order = k.argsort(stable=True).to(device)
        self.counts = counts.float().to(device)
        self.crow, self.crow_t = (
            F.pad(torch.bincount(t, minlength=n).cumsum(0), (1, 0)).int().to(device) for t in (i, k)
        )
        self.col, self.col_t = k.int().to(device), i.to(device)[self.order].int()
        self.size = (n, n)


class _SparsePairs(torch.autograd.Function):
    """sum_ik counts_ik sigmoid(z_i . z_k)^2 over a sparse pattern: one sampled product for the value, and for the
    gradient one sparse product each way."""

    @staticmethod
    def forward(ctx, z, pairs):
        nothing = torch.zeros_like(pairs.counts, dtype=z.dtype)
        pattern = torch.sparse_csr_tensor(pairs.crow, pairs.col, nothing, pairs.size, check_invariants=False)
        p = torch.sparse.sampled_addmm(pattern, z, z.t(), beta=0.0).values().sigmoid()
        weighted = p.square() * pairs.counts
        d = 2 * weighted * (1 - p)
        there = torch.sparse_csr_tensor(pairs.crow, pairs.col, d, pairs.size, check_invariants=False)
        back = torch.sparse_csr_tensor(pairs.crow_t, pairs.col_t, d[pairs.order], pairs.size, check_invariants=False)
        ctx.save_for_backward(there @ z + back @ z)
        return weighted.sum()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None


class _CountedPairs(torch.autograd.Function):
    """The same from an upper triangular table of counts; value and gradient in one pass over row blocks."""

    @staticmethod
    def forward(ctx, z, counts):
        grad, total = torch.zeros_like(z), z.new_zeros(())
        for start in range(0, len(z), 512):
            rows = slice(start, start + 512)
            p = (z[rows] @ z[start:].t()).sigmoid_()
            weighted = p.square().mul_(counts[rows, start:])
            total += weighted.sum()
            d = weighted.mul_(2).mul_(p.neg_().add_(1))
            grad[rows] += d @ z[start:]
            grad[start:] += d.t() @ z[rows]
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None


def structure_loss(z: Tensor, batch: GraphBatch, negatives: NegativeSamples) -> Tensor:
    """PU-GNN's structure regulariser, [S]: joined nodes alike, non-neighbours not."""
    joined = [
        ((z[s][batch.edge_i[s]] * z[s][batch.edge_j[s]]).sum(-1).sigmoid() - 1).square().mean() for s in range(batch.S)
    ]
    return torch.stack(joined) + negatives.loss(z)


class EmbeddingClassifier(Classifier):
    """PU-GNN's backbone: two convolutions of 16 units, ReLU after the first, then a linear read-out to one logit."""

    def __init__(self, batch: GraphBatch, hidden: int, dropout: float, seeds: list[int]):
        super().__init__(batch, hidden, dropout, seeds)
        init = [torch.Generator().manual_seed(s + 104_729) for s in seeds]
        self.w_out = glorot((hidden, 1), init, batch.device)
        self.w2 = glorot((hidden, hidden), init, batch.device)
        self.b2 = nn.Parameter(torch.zeros(batch.S, 1, hidden, device=batch.device))
        self.b_out = nn.Parameter(torch.zeros(batch.S, 1, 1, device=batch.device))

    def embed(self, adjacency: Adjacency) -> Tensor:
        """-> [S, N, hidden]."""
        h = self.drop((adjacency(self.first()) + self.b1).relu())
        return adjacency(h @ self.w2) + self.b2

    def readout(self, z: Tensor) -> Tensor:
        return (z @ self.w_out + self.b_out).squeeze(-1)

    def forward(self, adjacency: Adjacency) -> Tensor:
        return self.readout(self.embed(adjacency))


# ------------------------------------------------------------------------------------------------------------ LSDAN


def hop_neighbours(batch: GraphBatch, hops: int, limit: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """For each k = 1..hops: (neighbours [S*N, limit] as row ids of the stacked graphs, mask of the filled places).

    j is a k-hop neighbour of i when a walk of k steps joins them (the pattern of A^k). At most `limit` of them are
    kept, drawn at random: A^3 of Squirrel is all but full.
    """
    same = bool((batch.edge_i == batch.edge_i[:1]).all() and (batch.edge_j == batch.edge_j[:1]).all())
    n, copies = batch.N, 1 if same else batch.S
    generator = torch.Generator(batch.device).manual_seed(seed)
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(hops)]
    for s in range(copies):
        entries = slice(s * 2 * batch.E, (s + 1) * 2 * batch.E)
        crow, col = batch.crow[s * n : (s + 1) * n + 1] - s * 2 * batch.E, batch.col[entries] - s * n
        ones = torch.ones(col.shape, device=batch.device)
        adjacency = torch.sparse_csr_tensor(crow, col, ones, (n, n), check_invariants=False)
        for start in range(0, n, 1024):
            width = torch.arange(min(1024, n - start), device=batch.device)
            walk = torch.zeros(n, len(width), device=batch.device)
            walk[start + width, width] = 1  # column b: where a walk from node start + b ends
            for k in range(hops):
                walk = ((adjacency @ walk) > 0).float()
                chance = torch.rand((len(width), n), generator=generator, device=batch.device)
                key, place = (walk.t() * (chance + 0.01)).topk(min(limit, n), dim=1)
                found[k].append((place + s * n, key > 0))
    lists = []
    for per_hop in found:
        place, filled = (torch.cat(t) for t in zip(*per_hop, strict=True))
        if same:
            shift = torch.arange(batch.S, device=batch.device).repeat_interleave(n).unsqueeze(1) * n
            place, filled = place.repeat(batch.S, 1) + shift, filled.repeat(batch.S, 1)
        lists.append((place, filled))
    return lists


class _Gather(torch.autograd.Function):
    """x [M] -> x[place] [M, L]; the adjoint is a CSR product over the transposed pattern."""

    @staticmethod
    def forward(ctx, x, hop):
        ctx.hop = hop
        return x[hop.place]

    @staticmethod
    def backward(ctx, g):
        return ctx.hop.transposed(g, g.new_ones(len(g), 1)).squeeze(1), None


class _WeightedSum(torch.autograd.Function):
    """sum_l weight[i, l] h[place[i, l]]: weight [M, L], h [M, C] -> [M, C], by CSR products."""

    @staticmethod
    def forward(ctx, weight, h, hop):
        ctx.save_for_backward(weight, h)
        ctx.hop = hop
        return torch.sparse_csr_tensor(hop.crow, hop.col, weight.reshape(-1), (len(h), len(h))) @ h

    @staticmethod
    def backward(ctx, g):
        weight, h = ctx.saved_tensors
        g = g.contiguous()
        size = (len(h), len(h))
        pattern = torch.sparse_csr_tensor(ctx.hop.crow, ctx.hop.col, torch.zeros_like(weight).reshape(-1), size)
        d_weight = torch.sparse.sampled_addmm(pattern, g, h.t(), beta=0.0).values().view_as(weight)
        return d_weight, ctx.hop.transposed(weight, g), None


class Hop:
    """Neighbour lists of one hop as a CSR pattern with L entries a row, and its transpose."""

    def __init__(self, place: Tensor, filled: Tensor):
        self.place, self.filled = place, filled
        m, width = place.shape
        self.crow = (torch.arange(m + 1, device=place.device) * width).int()
        self.col = place.reshape(-1).int()
        self.order = torch.argsort(place.reshape(-1), stable=True)
        counts = torch.bincount(place.reshape(-1), minlength=m).cumsum(0)
        self.crow_t = torch.cat([counts.new_zeros(1), counts]).int()
        self.col_t = (self.order // width).int()

    def transposed(self, weight: Tensor, g: Tensor) -> Tensor:
        values = weight.reshape(-1).index_select(0, self.order)
        return torch.sparse_csr_tensor(self.crow_t, self.col_t, values, (len(g), len(g))) @ g


class LSDAN(nn.Module):
    """Long-short distance attention (Wu et al. 2019), rebuilt: graph attention inside each hop graph, then attention
    over the hops, ReLU, linear read-out; one head, hidden 16."""

    def __init__(self, batch: GraphBatch, hidden: int, dropout: float, seeds: list[int]):
        super().__init__()
        self.base = Classifier(batch, hidden, dropout, seeds)  # first projection, dropout and read-out weights
        init = [torch.Generator().manual_seed(s + 15_485_863) for s in seeds]
        self.source, self.target = (
            nn.ParameterList(glorot((hidden, 1), init, batch.device) for _ in range(LSDAN_HOPS)) for _ in range(2)
        )
        self.hop = glorot((hidden, 1), init, batch.device)
        self.batch = batch
        self.lists = [Hop(*pair) for pair in hop_neighbours(batch, LSDAN_HOPS, LSDAN_NEIGHBOURS)]

    @property
    def generators(self) -> list[torch.Generator]:
        return self.base.generators

    def forward(self, adjacency: Adjacency | None = None) -> Tensor:
        """-> logits [S, N]; hop graphs are fixed, so an adjacency is accepted and not used."""
        b = self.batch
        h = self.base.first() + self.base.b1
        flat = h.reshape(b.S * b.N, -1)
        per_hop = []
        for hop, a_source, a_target in zip(self.lists, self.source, self.target, strict=True):
            to, frm = (h @ a_target).reshape(-1, 1), (h @ a_source).reshape(-1)
            score = F.leaky_relu(to + _Gather.apply(frm, hop), 0.2)
            score = (
                score.masked_fill(~hop.filled, -1e9).softmax(-1) * hop.filled
            )  # nodes without k-hop neighbours get zeros
            per_hop.append(_WeightedSum.apply(score, flat, hop).view_as(h))
        z = torch.stack([h, *per_hop], 2)  # [S, N, 1 + hops, hidden]; hop 0 keeps the node itself
        weight = F.leaky_relu((z * self.hop[:, None].transpose(-1, -2)).sum(-1), 0.2).softmax(-1)
        z = (weight.unsqueeze(-1) * z).sum(2).relu()
        return (self.base.drop(z) @ self.base.w2 + self.base.b2).squeeze(-1)
