"""What a network's single layers do: norms and large entries, sensitivity to noise, removal of weights, loss surfaces.

Layers are the weights of `lap.layers`, by name. The figures of the paper number the main path alone (17 convolutions of
PreActResNet-18; no projections, no classifier) and call 1-5 former and 14-17 latter: `former` and `latter` are these
shares of any network. A function leaves weights and statistics as it found them.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attacks

FORMER, LATTER = 5 / 17, 4 / 17


def main_path(layers: dict[str, nn.Parameter]) -> list[str]:
    """Names of the layers on the main path."""
    names = list(layers)
    return [k for k in names[:-1] if "shortcut" not in k] or names


def part(layers: dict[str, nn.Parameter], which: str) -> list[str]:
    """Names of the former or latter layers of the main path; the whole network for "all"."""
    path = main_path(layers)
    if which == "all":
        return path
    n = max(1, round(len(path) * (FORMER if which == "former" else LATTER)))
    return path[:n] if which == "former" else path[-n:]


def matrix(w: Tensor) -> Tensor:
    """A kernel [out, in, ...] as the matrix [out, in * ...]."""
    return w.detach().flatten(1).float()


def top_singular_value(w: Tensor) -> Tensor:
    """Largest singular value of the matrix of w, from the smaller Gram matrix."""
    m = matrix(w).double()
    gram = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
    return torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()


def share_of_largest(w: Tensor, share: float) -> Tensor:
    """Share of |w|^2 held by the largest `share` of its entries (at least one)."""
    size = w.detach().flatten().double().square()
    return size.topk(max(1, int(share * len(size)))).values.sum() / size.sum().clamp(min=1e-300)


def statistics(layers: dict[str, nn.Parameter]) -> dict[str, list[float]]:
    """Per layer: Frobenius norm, top singular value, share of the squared norm in the largest 1 and 10 per cent."""
    rows = [
        torch.stack([w.detach().double().norm(), top_singular_value(w), *(share_of_largest(w, s) for s in (0.01, 0.1))])
        for w in layers.values()
    ]
    keys = ("norm", "singular", "top1", "top10")
    columns = torch.stack(rows).T.tolist()
    return {k: [float(f"{v:.6g}") for v in c] for k, c in zip(keys, columns, strict=True)}


@contextlib.contextmanager
def restored(model: nn.Module, weights: list[Tensor]):
    """Eval mode inside; afterwards the mode and these weights are as before, bit for bit."""
    training, kept = model.training, [w.detach().clone() for w in weights]
    model.eval()
    try:
        with torch.no_grad():
            yield kept
    finally:
        with torch.no_grad():
            for w, own in zip(weights, kept, strict=True):
                w.copy_(own)
        model.train(training)


def filter_noise(w: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian direction in which every filter w[k] has the norm of that filter (Li et al. 2018)."""
    d = torch.randn(w.shape, generator=generator).to(w)
    norms = [t.flatten(1).norm(dim=1) for t in (w, d)]
    return d * (norms[0] / norms[1].clamp(min=1e-12)).view(-1, *[1] * (w.ndim - 1))


def attacked(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """The images x [B, C, H, W] after a single step of size eps, in eval mode."""
    training = model.training
    model.eval()
    x = x + attacks.fgsm(model, x, y, eps)
    model.train(training)
    return x


def distortion(
    model: nn.Module, layers: dict[str, nn.Parameter], x: Tensor, y: Tensor, eps: float, size=0.5, draws=2
) -> list[float]:
    """Per layer: how much the mean loss on single-step images rises when filter-normalised noise of relative size
    `size` is added to that layer alone; mean over the draws, always the same. The images are attacked before it."""
    x = attacked(model, x, y, eps)
    rises = []
    with restored(model, list(layers.values())) as kept:
        base = F.cross_entropy(model(x).float(), y)
        for k, (w, own) in enumerate(zip(layers.values(), kept, strict=True)):
            g = torch.Generator().manual_seed(k)
            losses = []
            for _ in range(draws):
                w.copy_(own + size * filter_noise(own, g))
                losses.append(F.cross_entropy(model(x).float(), y))
            w.copy_(own)
            rises.append(torch.stack(losses).mean() - base)
    return [float(f"{v:.6g}") for v in torch.stack(rises).nan_to_num(1e30, 1e30).tolist()]


def surface(
    model: nn.Module, layers: list[Tensor], x: Tensor, y: Tensor, points: int = 9, reach: float = 1.0
) -> list[list[float]]:
    """Mean loss of images x on a grid [points, points]: weights w + p d1 + q d2 with p, q in [-reach, reach] and two
    filter-normalised noise directions for each of the `layers`; the others stay."""
    g = torch.Generator().manual_seed(0)
    steps = torch.linspace(-reach, reach, points).tolist()
    rows = []
    with restored(model, layers) as kept:
        one, two = ([filter_noise(w, g) for w in kept] for _ in range(2))
        for p in steps:
            for q in steps:
                for w, own, a, b in zip(layers, kept, one, two, strict=True):
                    w.copy_(own + p * a + q * b)
                rows.append(F.cross_entropy(model(x).float(), y))
    values = torch.stack(rows).nan_to_num(1e30, 1e30).view(points, points).tolist()
    return [[round(v, 4) for v in row] for row in values]


@contextlib.contextmanager
def without(model: nn.Module, layers: dict[str, nn.Parameter], names: list[str], share: float, largest: bool):
    """Inside, the `share` of the entries of each named layer that are largest (or smallest) in absolute value are 0."""
    with restored(model, [layers[k] for k in names]):
        for k in names:
            w = layers[k]
            flat = w.detach().flatten().abs()
            gone = flat.topk(int(share * len(flat)), largest=largest).indices
            keep = torch.ones_like(flat).index_fill_(0, gone, 0.0).view_as(w)
            w.mul_(keep)
        yield
