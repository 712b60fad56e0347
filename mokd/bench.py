"""Speed of this folder against a plain implementation, as ratios measured in one process; equal results come first.

    python bench.py                  # tasks a second: batched against one task at a time, MOKD and URL
    python bench.py --device cuda --dim 512

The plain form solves a task at a time as the released code does: in each of the 40 steps it computes the squared
distances for each of its kernel matrices anew, builds the label matrix anew, multiplies the full m x m matrices of
the estimator, and asks the device for numbers.
"""

import time
from dataclasses import dataclass

from lab import runs

import numpy as np
import torch

import episodes
import heads
import hsic
import mokd
from evaluation import PAIRS, grouped


@dataclass
class BenchSettings:
    tasks: int = 60
    """Tasks of the bilevel law over alphabets like Omniglot's."""
    dim: int = 64
    """Width of the features (paper: 512)."""
    repeats: int = 2
    """Timed repetitions; the fastest counts."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    smoke: bool = False
    """Tiny: shows that it runs."""


# --------------------------------------------------------------------------------------------- the plain implementation


def plain_rbf(a: torch.Tensor, scale: float) -> torch.Tensor:
    gram = a @ a.T
    square = gram.diag()
    d = square[:, None] + square[None, :] - 2 * gram
    found = d[d.detach() > hsic.SAME]
    median = found.detach().median().item() if len(found) else 0.0
    return torch.exp(-d / (2 * max(scale * median, hsic.SIGMA2_MIN)))


def plain_hsic(K: torch.Tensor, L: torch.Tensor) -> torch.Tensor:
    m = len(K)
    K, L = K - K.diag().diag(), L - L.diag().diag()
    one = torch.ones(m, 1, dtype=K.dtype, device=K.device)
    total = (K @ L).trace() + (one.T @ K @ one) * (one.T @ L @ one) / ((m - 1) * (m - 2))
    return (total - 2 / (m - 2) * (one.T @ K @ L @ one)).squeeze() / (m * (m - 3))


def plain_mokd(x: torch.Tensor, y: torch.Tensor, scale: float, o: mokd.Options) -> torch.Tensor:
    """Theta of one task; the bandwidth search is the folder's."""
    theta = torch.eye(x.shape[1], device=x.device).requires_grad_()
    optimizer = torch.optim.Adadelta([theta], lr=o.lr, weight_decay=o.weight_decay)
    onehot = torch.nn.functional.one_hot(y).float()
    for _ in range(o.steps):
        z = torch.nn.functional.normalize(x @ theta.T, dim=1)
        zy = plain_hsic(plain_rbf(z, scale), plain_rbf(onehot, scale))
        zz = plain_hsic(plain_rbf(z, scale), plain_rbf(z, scale))
        loss = len(x) * (o.gamma * zz - zy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return theta.detach()


# ----------------------------------------------------------------------------------------------------------- comparison


def made_up(s: BenchSettings, device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Support sets of the law of Omniglot on clustered, non-negative features."""
    pool = episodes.Pool("bench", (20,) * 400, groups=tuple(tuple(range(k, k + 20)) for k in range(0, 400, 20)))
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(400, s.dim, generator=rng)
    out = []
    for k in range(s.tasks):
        rows = episodes.sample(pool, episodes.LAWS["varied"], 0, k).support
        x = centres[rows[:, 1]] + 0.8 * torch.randn(len(rows), s.dim, generator=rng)
        out.append((x.relu().to(device), torch.from_numpy(rows[:, 0]).to(device)))
    return out


def fastest(function, repeats: int, device) -> tuple[float, object]:
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        found = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best, found


def main() -> None:
    s = runs.parse(BenchSettings, __doc__)
    if s.tasks < 1 or s.dim < 1 or s.repeats < 1:
        raise runs.UserError("--tasks, --dim and --repeats must be at least 1")
    if s.smoke:
        s.tasks, s.dim, s.repeats = 3, 8, 1
    device = runs.device(s.device)
    tasks = made_up(s, device)
    sizes, o = [len(y) for _, y in tasks], mokd.Options()
    span = f"{np.mean(sizes):.0f} support images on average ({min(sizes)} to {max(sizes)})"
    print(f"{s.tasks} tasks, {span}, {s.dim} features")

    def batches():
        for part in grouped(sizes, PAIRS[device.type]):
            pad = torch.nn.utils.rnn.pad_sequence
            x, y = (pad([tasks[i][k] for i in part], batch_first=True, padding_value=-k) for k in (0, 1))
            yield part, x, y

    def batched_mokd() -> list[torch.Tensor]:
        out: list = [None] * s.tasks
        for part, x, y in batches():
            for i, theta in zip(part, mokd.solve(x, y, o).theta, strict=True):
                out[i] = theta
        return out

    def one_at_a_time() -> list[torch.Tensor]:
        out = []
        for x, y in tasks:
            scale = mokd.best_scale(x[None], hsic.same_class(y[None]), y[None] >= 0, o)[0].item()
            out.append(plain_mokd(x, y, scale, o))
        return out

    plain, reference = fastest(one_at_a_time, s.repeats, device)
    ours, found = fastest(batched_mokd, s.repeats, device)
    apart = max((a - b).norm().item() / b.norm().item() for a, b in zip(found, reference, strict=True))
    print(f"MOKD, heads differ by at most {apart:.1e} of their norm")
    print(f"MOKD  plain {s.tasks / plain:8.1f} tasks/s   here {s.tasks / ours:8.1f} tasks/s   ratio {plain / ours:.1f}")

    def urls(together: bool) -> None:
        for part, x, y in batches():
            if together:
                heads.url(heads.Tasks(x, y, x[:, :1], y[:, :1]), 1.0)
            else:
                for i in part:
                    a, b = tasks[i][0][None], tasks[i][1][None]
                    heads.url(heads.Tasks(a, b, a[:, :1], b[:, :1]), 1.0)

    single, _ = fastest(lambda: urls(False), s.repeats, device)
    joint, _ = fastest(lambda: urls(True), s.repeats, device)
    a, b = s.tasks / single, s.tasks / joint
    print(f"URL   alone {a:8.1f} tasks/s   here {b:8.1f} tasks/s   ratio {single / joint:.1f}")


if __name__ == "__main__":
    runs.command(main)
