"""Speed of this folder's code against plain implementations, as ratios measured in one process.

    python bench.py                    # propagation against an edge list and dense; seeds batched against one by one
    python bench.py --device cuda

Each pair is compared for equal results first, then timed.
"""

import gc
import os
import resource
import time
from dataclasses import dataclass

from lab import runs

import numpy as np
import torch
from torch import Tensor

import data
import gpl
import priors
import train


@dataclass
class BenchSettings:
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    repeats: int = 5
    """Timed repetitions; the fastest counts."""
    smoke: bool = False
    """Tiny sizes, to see that every comparison runs."""


def dense_lpl(weight: Tensor, start: Tensor, labelled: Tensor, alpha: float, steps: int) -> Tensor:
    """The plain form: one N x N weight matrix a graph, both belief columns, autograd through every step."""
    belief = torch.stack([1 - start, start], -1)
    step = weight / weight.sum(-1, keepdim=True).clamp(min=1e-30)
    for _ in range(steps):
        belief = alpha * belief + (1 - alpha) * (step @ belief)
    return gpl.lpl(belief[..., 1].unsqueeze(0), labelled.unsqueeze(0)).sum()


def edge_list_lpl(weight: Tensor, edge: Tensor, start: Tensor, labelled: Tensor, alpha: float, steps: int) -> Tensor:
    """The usual message passing: gather and scatter-add over a directed edge list, both belief columns, autograd."""
    source, target = torch.cat([edge, edge.flip(0)], 1)
    both = weight.repeat(2)
    belief = torch.stack([1 - start, start], -1)
    degree = torch.zeros_like(start).index_add(0, target, both)
    share = (both / degree.clamp(min=1e-30)[target]).unsqueeze(-1)
    linked = (degree > 0).unsqueeze(-1)
    for _ in range(steps):
        mixed = torch.zeros_like(belief).index_add(0, target, share * belief[source])
        belief = alpha * belief + (1 - alpha) * torch.where(linked, mixed, belief)
    return gpl.lpl(belief[..., 1].unsqueeze(0), labelled.unsqueeze(0)).sum()


def best_of(repeats: int, function, device: torch.device) -> float:
    """Seconds of the fastest of `repeats` calls after one warm-up call."""
    out = []
    for k in range(repeats + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if k:
            out.append(time.perf_counter() - started)
    return min(out)


def peak_mb(function, device: torch.device) -> float:
    """Highest extra memory of one call: allocated on the GPU, else of a forked child (its own high-water mark)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    gc.collect()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # the child's own peak, so that one measurement cannot hide behind another
        torch.set_num_threads(1)
        with open("/proc/self/statm") as statm:
            before = int(statm.read().split()[1]) * resource.getpagesize() / 2**20
        function()
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
        os.write(write, f"{used}".encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return float(answer) if answer else float("nan")


def propagation(n: int, degree: float, s: BenchSettings, device: torch.device, dense: bool) -> None:
    graph = data.synthetic(0, 0.5, n=n, degree=degree)
    split = data.pu_split(graph.y, 0.5, 0.0, 0.0, 0)
    batch = data.GraphBatch([graph], 1, device)
    labelled = split.labelled.to(device).unsqueeze(0)
    start = gpl.start_belief(labelled)
    torch.manual_seed(0)
    weight = torch.rand(1, batch.E, device=device) * 0.9 + 0.1

    def sparse() -> Tensor:
        leaf = weight.clone().requires_grad_(True)
        loss = gpl.lpl(gpl.propagate(leaf, start, batch, 0.5, 5), labelled).sum()
        return torch.autograd.grad(loss, leaf)[0]

    def full() -> Tensor:
        leaf = weight.clone().requires_grad_(True)
        i, j = batch.edge_i[0], batch.edge_j[0]
        matrix = torch.zeros(n, n, device=device).index_put((i, j), leaf[0])
        loss = dense_lpl(matrix + matrix.t(), start[0], labelled[0], 0.5, 5)
        return torch.autograd.grad(loss, leaf)[0]

    def edge_list() -> Tensor:
        leaf = weight.clone().requires_grad_(True)
        loss = edge_list_lpl(leaf[0], torch.stack([batch.edge_i[0], batch.edge_j[0]]), start[0], labelled[0], 0.5, 5)
        return torch.autograd.grad(loss, leaf)[0]

    ours = sparse()
    own = best_of(s.repeats, sparse, device)
    print(
        f"LPL loss and gradient, N = {n}, {batch.E} edges: closed-form adjoint {1e3 * own:.1f} ms, "
        f"{peak_mb(sparse, device):.0f} MiB"
    )
    for name, function in (("edge list with autograd", edge_list), *([("dense N x N", full)] if dense else [])):
        started = time.perf_counter()
        theirs = function()
        plain = time.perf_counter() - started
        gap = (ours - theirs).abs().max().item() / theirs.abs().max().item()
        if function is edge_list or n < 10_000:  # a large dense matrix takes a minute a call: the first one counts
            plain = best_of(s.repeats, function, device)
        print(
            f"  against {name}: equal to {gap:.1e} relative; {1e3 * plain:.1f} ms, "
            f"{peak_mb(function, device):.0f} MiB; ratio {plain / own:.1f}x"
        )
    if not dense:
        print(f"  dense N x N not run: its weights, their gradient and two copies take {16 * n * n / 2**20:.0f} MiB")


def batched(seeds: int, epochs: int, s: BenchSettings, device: torch.device) -> None:
    """GPL epochs with all seeds in one batch against one seed after the other; synthetic graphs."""

    def go(which: list[int]) -> list[Tensor]:
        settings = train.Settings(seeds=tuple(which), warmup=2, epochs=epochs)
        settings.check()
        t = train.Trainer(settings, device)
        for epoch in range(t.method.epochs):
            t.method.begin(epoch, t)
            t.model.train()
            t.optimizer.zero_grad(set_to_none=True)
            t.method.loss(t.model).sum().backward()
            t.optimizer.step()
        return list(t.method.posterior(t.model))

    together, single = go(list(range(seeds))), [go([k])[0] for k in range(seeds)]
    gap = max((a - b).abs().max().item() for a, b in zip(together, single, strict=True))
    repeats = max(1, s.repeats // 3)
    one = best_of(repeats, lambda: [go([k]) for k in range(seeds)], device)
    all_at_once = best_of(repeats, lambda: go(list(range(seeds))), device)
    print(
        f"GPL, {epochs} epochs of {seeds} seeds: posteriors agree to {gap:.1e}; batched {all_at_once:.2f} s, "
        f"one by one {one:.2f} s; ratio {one / all_at_once:.1f}x"
    )


def estimator(n: int, s: BenchSettings, device: torch.device) -> None:
    """BBE by sorting against the plain loop over thresholds."""
    rng = np.random.default_rng(0)
    p, u = rng.beta(4, 2, n // 10), np.concatenate([rng.beta(4, 2, n // 4), rng.beta(2, 4, n - n // 4)])

    def loop() -> float:
        best, answer = float("inf"), 0.0
        for c in sorted(set(u))[1:]:
            k_p, k_u = sum(x >= c for x in p), sum(x >= c for x in u) - 1
            if k_p > 1 and k_u > 1:
                q_p = k_p / len(p)
                slack = (np.log(40) / (2 * len(u))) ** 0.5 + (np.log(40) / (2 * len(p))) ** 0.5
                bound = k_u / len(u) / q_p + 1.01 * slack / q_p
                if bound < best:
                    best, answer = bound, k_u / len(u) / q_p
        return min(answer, 1.0)

    scores = torch.tensor(np.concatenate([p, u]), device=device).unsqueeze(0)
    is_p = (torch.arange(len(p) + len(u), device=device) < len(p)).unsqueeze(0)
    fast = best_of(s.repeats, lambda: priors.bbe_batch(scores, is_p, ~is_p), device)
    started = time.perf_counter()
    slow_answer = loop()
    slow = time.perf_counter() - started
    gap = abs(slow_answer - priors.bbe_batch(scores, is_p, ~is_p).item())
    print(
        f"BBE, |U| = {len(u)}: equal to {gap:.1e}; sorted {1e3 * fast:.2f} ms, loop {1e3 * slow:.0f} ms; "
        f"ratio {slow / fast:.0f}x"
    )


def main() -> None:
    s = runs.parse(BenchSettings, __doc__)
    device = runs.device(s.device)
    print(f"{runs.host(device)['device']}, torch {torch.__version__}")
    if s.smoke:
        s.repeats = 1
        propagation(200, 8, s, device, dense=True)
        batched(2, 2, s, device)
        estimator(200, s, device)
        return
    propagation(3000, 8, s, device, dense=True)
    propagation(20000, 9, s, device, dense=True)
    propagation(169_343, 13.67, s, device, dense=False)  # the size of ogbn-arxiv
    batched(10, 30, s, device)
    estimator(2000, s, device)


if __name__ == "__main__":
    runs.command(main)
