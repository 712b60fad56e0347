"""Hilbert-Schmidt independence criterion (HSIC): kernels, estimators, variance and test power (Sec. 3 of the paper).

Everything works on a batch of tasks at once. Shapes: m samples padded to M, K and L [..., M, M], mask [..., M] (True: a
sample is there), results [...]. Without a mask all samples count. Sums cancel here (HSIC is 1e-4..1e-2 out of sums of
order m^2): keep the arithmetic in float32 without TF32, or in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = ("rbf", "imq", "linear", "cosine")
SCALED = ("rbf", "imq")  # kernels with a bandwidth
SIGMA2_MIN = 1e-12  # lower clamp of the squared bandwidth, as in the released code
SAME = 1e-6  # squared distances of unit rows up to this are rounding: the same point twice


def everyone(K: Tensor) -> Tensor:
    """The mask of a batch without padding."""
    return torch.ones(K.shape[:-1], dtype=torch.bool, device=K.device)


def count(mask: Tensor, like: Tensor) -> Tensor:
    """Number of samples, [...], as a float of the arithmetic in use."""
    return mask.sum(-1).to(like.dtype)


def pairs(mask: Tensor) -> Tensor:
    """[..., M, M]: two different samples that are there."""
    off = ~torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return mask.unsqueeze(-1) & mask.unsqueeze(-2) & off


def same_class(labels: Tensor) -> Tensor:
    """Delta [..., M, M]: 1 where two samples have the same label, of labels [..., M]."""
    return (labels.unsqueeze(-1) == labels.unsqueeze(-2)).float()


# ------------------------------------------------------------------------------------------------------------- kernels


def unit(z: Tensor) -> Tensor:
    """Rows of length 1, [..., M, d]; rows of padding stay 0."""
    return F.normalize(z, dim=-1, eps=1e-12)


def gram(z: Tensor) -> Tensor:
    """Cosines of the rows, [..., M, d] -> [..., M, M]."""
    z = unit(z)
    return z @ z.transpose(-1, -2)


def squared_distances(g: Tensor) -> Tensor:
    """|a_i - a_j|^2 [..., M, M] from the Gram matrix; rounding below 0 is cut off."""
    square = g.diagonal(dim1=-2, dim2=-1)
    return (square.unsqueeze(-1) + square.unsqueeze(-2) - 2 * g).clamp(min=0)


def median_distance(distances: Tensor, mask: Tensor) -> Tensor:
    """Lower median of the squared distances that are not 0, [...], detached. 1 where there are none.

    Over all ordered pairs, as in the released code; each distance occurs twice, so the lower median is that of the
    unordered pairs, half as many. Distances of duplicates are left out by the threshold SAME and not only where they
    are exactly 0. Where all samples are one point any width says so; a tiny one, as the released code has there, turns
    the rounding into an infinite gradient.
    """
    m = distances.shape[-1]
    if m < 2:
        return torch.ones_like(distances[..., 0, 0])
    rows, columns = torch.triu_indices(m, m, 1, device=distances.device)
    d = distances.detach()[..., rows, columns]
    padding = ~(mask[..., rows] & mask[..., columns])
    d = d.masked_fill_(padding | (d <= SAME), float("nan"))  # indexing made a copy
    return d.nanmedian(-1).values.nan_to_num(1.0)


def kernel(kind: str, g: Tensor, scale: Tensor, mask: Tensor, median: Tensor | None = None) -> Tensor:
    """Kernel matrix [..., M, M] of unit rows with this Gram matrix; median [...]: of the distances, if it is known.

    rbf     exp(-|a-b|^2 / (2 sigma^2)), sigma^2 = scale * median of the squared distances; no gradient through sigma
    imq     scale / sqrt(scale^2 + |a-b|^2)
    linear  <a, b> / |A|_F^2 over all rows, which are m unit rows
    cosine  <a, b>
    scale [...] is ignored by the last two.
    """
    if kind == "cosine":
        return g
    if kind == "linear":
        return g / count(mask, g)[..., None, None]
    d, scale = squared_distances(g), scale.to(g.dtype)
    if kind == "rbf":
        sigma2 = (scale * (median_distance(d, mask) if median is None else median)).clamp(min=SIGMA2_MIN)
        return torch.exp(-d / (2 * sigma2[..., None, None]))
    if kind == "imq":
        scale = scale[..., None, None]
        return scale / (scale * scale + d).sqrt()
    raise ValueError(f"no kernel {kind}")


def label_gain(kind: str, scale: Tensor, m: Tensor) -> Tensor:
    """c [...] with L = c Delta + constant off the diagonal, for the same kernel on one-hot labels.

    Two one-hot rows have squared distance 0 or 2, so their median is 2 and the Gaussian label kernel is 1 or
    exp(-1/(2 scale)). HSIC and its variance estimate do not see the constant.
    """
    if kind == "rbf":
        return 1 - torch.exp(-1 / (2 * scale))
    if kind == "imq":
        return 1 - scale / (scale * scale + 2).sqrt()
    return 1 / m if kind == "linear" else torch.ones_like(m)


# ---------------------------------------------------------------------------------------------------------- estimators


def _parts(K: Tensor, L: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """K~, L~ (zero diagonal, zero padding), their row sums and m. K and L may be the same tensor."""
    there = pairs(mask)
    same = K is L
    K = K.masked_fill(~there, 0)
    L = K if same else L.masked_fill(~there, 0)
    k = K.sum(-1)
    return K, L, k, k if same else L.sum(-1), count(mask, K)


def unbiased(K: Tensor, L: Tensor, mask: Tensor | None = None) -> Tensor:
    """HSIC_u [...], the order-4 U-statistic (Song et al. 2012); needs 4 samples.

    1/(m(m-3)) [ sum(K~ o L~) + 1'K~1 1'L~1 / ((m-1)(m-2)) - 2/(m-2) 1'K~L~1 ], where 1'K~L~1 = (K~1)'(L~1).
    """
    K, L, k, l, m = _parts(K, L, everyone(K) if mask is None else mask)
    total = (K * L).sum((-2, -1)) + k.sum(-1) * l.sum(-1) / ((m - 1) * (m - 2)) - 2 / (m - 2) * (k * l).sum(-1)
    return total / (m * (m - 3))


def biased(K: Tensor, L: Tensor, mask: Tensor | None = None) -> Tensor:
    """HSIC_b [...] = tr(KHLH) / m^2, H the centring matrix (Gretton et al. 2005); never below 0 but for rounding."""
    mask = everyone(K) if mask is None else mask
    there = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    K, L, m = K * there, L * there, count(mask, K)
    k, l = K.sum(-1), L.sum(-1)
    total = (K * L).sum((-2, -1)) - 2 / m * (k * l).sum(-1) + k.sum(-1) * l.sum(-1) / m**2
    return total / m**2


def with_variance(K: Tensor, L: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(HSIC_u, v), both [...]: v = 16/m (R - HSIC_u^2) estimates the variance of HSIC_u. It can be below 0.

    R = h'h / (4m [(m-1)(m-2)(m-3)]^2), with h [..., M] the sums over the 4-tuples that hold a sample.
    """
    mask = everyone(K) if mask is None else mask
    K, L, k, l, m = _parts(K, L, mask)
    both, one = K * L, lambda x: x.unsqueeze(-1)
    total, cross = both.sum((-2, -1)), (k * l).sum(-1)
    middle = one(total) - (K @ l.unsqueeze(-1)).squeeze(-1) - (L @ k.unsqueeze(-1)).squeeze(-1)
    h = one((m - 2) ** 2) * both.sum(-1) + one(m - 2) * middle - one(m) * k * l
    h = (h + one(l.sum(-1)) * k + one(k.sum(-1)) * l - one(cross)) * mask
    r = (h * h).sum(-1) / (4 * m * ((m - 1) * (m - 2) * (m - 3)) ** 2)
    value = total + k.sum(-1) * l.sum(-1) / ((m - 1) * (m - 2)) - 2 / (m - 2) * cross
    value = value / (m * (m - 3))
    return value, 16 / m * (r - value * value)


def power(value: Tensor, variance: Tensor, eps: float = 1e-5) -> Tensor:
    """J = HSIC_u / sqrt(v + eps) [...], the leading term of the power of the HSIC test. A variance below 0 counts as 0:
    v + eps < 0 would be no number. Where v + eps is 0 there is no estimate of the power: J is 0, so that no search
    chooses such a scale."""
    spread = variance.clamp(min=0) + eps
    return torch.where(spread > 0, value / torch.where(spread > 0, spread, 1).sqrt(), 0)
