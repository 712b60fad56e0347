"""Classifiers for a batch of seeds: two-layer GCN (16 hidden units, the paper's encoder) and MLP.

Each seed has its own weights, initialised and dropped out by its own generator, so a seed's numbers do not depend on
which other seeds share the batch (up to the order of floating-point sums).
"""

import torch
from torch import Tensor, nn

from data import GraphBatch


class _SparseX(torch.autograd.Function):
    """X @ W for a CSR X [N, F] with its transpose at hand (autograd would rebuild it every step)."""

    @staticmethod
    def forward(ctx, w, x, x_t):
        ctx.x_t = x_t
        return x @ w

    @staticmethod
    def backward(ctx, g):
        return ctx.x_t @ g.contiguous(), None, None


class _Convolve(torch.autograd.Function):
    """D~^-1/2 (A_hat + I) D~^-1/2 h; the matrix is symmetric, so its adjoint is itself. Edge weights get no gradient:
    A_hat is a constant in the outer step."""

    @staticmethod
    def forward(ctx, h, adjacency):
        ctx.adjacency = adjacency
        return adjacency.apply(h)

    @staticmethod
    def backward(ctx, g):
        return ctx.adjacency.apply(g.contiguous()), None


class Adjacency:
    """Symmetrically normalised weighted adjacency with self loops of weight 1, for S graphs."""

    def __init__(self, batch: GraphBatch, weight: Tensor | None = None):
        """weight [S, E] > 0 (default 1)."""
        weight = torch.ones(batch.S, batch.E, device=batch.device) if weight is None else weight.detach()
        values = batch.values(weight)
        scale = (batch.degree(values) + 1).rsqrt()  # [S, N]
        flat = scale.reshape(-1)
        self.batch, self.values = batch, values * flat[batch.row] * flat[batch.col.long()]
        self.loop = (scale * scale).unsqueeze(-1)

    def apply(self, h: Tensor) -> Tensor:
        return self.batch.matmul(self.values, h) + self.loop * h

    def __call__(self, h: Tensor) -> Tensor:
        """h [S, N, C] -> [S, N, C], differentiable in h."""
        return _Convolve.apply(h, self)


def glorot(shape: tuple[int, int], generators: list[torch.Generator], device) -> nn.Parameter:
    bound = (6 / sum(shape)) ** 0.5
    draws = [torch.rand(shape, generator=g) * 2 * bound - bound for g in generators]
    return nn.Parameter(torch.stack(draws).to(device))


class Classifier(nn.Module):
    """Two layers, one logit a node. With an adjacency a GCN, without one an MLP of the same widths.

    All parameters have a leading axis of S seeds.
    """

    def __init__(self, batch: GraphBatch, hidden: int, dropout: float, seeds: list[int]):
        super().__init__()
        # Initialisation on the CPU: the same weights on every device.
        init = [torch.Generator().manual_seed(s) for s in seeds]
        self.w1, self.w2 = glorot((batch.F, hidden), init, batch.device), glorot((hidden, 1), init, batch.device)
        self.b1 = nn.Parameter(torch.zeros(batch.S, 1, hidden, device=batch.device))
        self.b2 = nn.Parameter(torch.zeros(batch.S, 1, 1, device=batch.device))
        self.batch, self.dropout = batch, dropout
        # A stream of its own: with the seed of the initial weights, dropout would repeat their draws.
        self.generators = [torch.Generator(batch.device).manual_seed(s + 15_485_867) for s in seeds]

    def first(self) -> Tensor:
        """X W1 for all seeds: [S, N, hidden]. Projecting first means 16 columns are propagated, never F."""
        b = self.batch
        if b.x_t is None:
            return b.x @ self.w1
        wide = self.w1.permute(1, 0, 2).reshape(b.F, -1)
        return _SparseX.apply(wide, b.x, b.x_t).view(b.N, b.S, -1).transpose(0, 1).contiguous()

    def drop(self, h: Tensor) -> Tensor:
        if not self.training or self.dropout == 0:
            return h
        keep = torch.stack([torch.rand(h.shape[1:], generator=g, device=h.device) for g in self.generators])
        return h * (keep >= self.dropout) / (1 - self.dropout)

    def forward(self, adjacency: Adjacency | None) -> Tensor:
        """-> logits [S, N]; posterior of the positive class = sigmoid(logits)."""
        h = self.first()
        h = self.drop(((h if adjacency is None else adjacency(h)) + self.b1).relu())
        z = h @ self.w2
        return ((z if adjacency is None else adjacency(z)) + self.b2).squeeze(-1)
