"""Accuracy under attack, the loss surface, and what a record says of the course of training: what training and
evaluation both need."""

from collections.abc import Callable, Iterable

from lab.runs import UserError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import attacks
from data import Batches


def order(n: int, limit: int) -> Tensor:
    """The first `limit` (0: all) of a fixed random order of n images."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[: limit or n]


@torch.no_grad()
def attack_all(
    model: torch.nn.Module,
    batches: Batches,
    index: Tensor,
    eps: float,
    steps: int,
    restarts: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Clean, FGSM and PGD accuracy in per cent over the test images `index`. PGD steps are eps/4 from U(-eps, eps).

    The model is put in eval mode and back; nothing of a training run (weights, statistics, generators) is touched.
    """
    training, device = model.training, batches.device
    model.eval()
    generator = torch.Generator(device).manual_seed(1_000_000_007 + seed * 1009 + rank)
    count = torch.zeros(5, dtype=torch.float64, device=device)
    for x, y in batches.in_order(index[rank::world]):
        logits = model(x)
        clean = logits.argmax(1) == y
        quick = model(x + attacks.fgsm(model, x, y, eps)).argmax(1) == y
        strong = attacks.strongest(model, x, y, eps, eps / 4, steps, restarts, generator)[1] & clean
        odd = ~torch.isfinite(logits).all(1)
        sums = [clean.sum(), quick.sum(), strong.sum(), odd.sum(), torch.tensor(len(y), device=device)]
        count += torch.stack(sums).double()
    model.train(training)
    clean, quick, strong, odd, n = (count if reduce is None else reduce(count)).tolist()
    if odd:  # argmax of NaN is a class like any other: such a network would get an accuracy
        raise UserError(f"the network's outputs are not finite on {odd:.0f} of {n:.0f} test images; train it again")
    return {"clean": 100 * clean / n, "fgsm": 100 * quick / n, "pgd": 100 * strong / n}


def auto_attack(model: torch.nn.Module, batches: Batches, index: Tensor, eps: float, version: str, seed: int) -> dict:
    """AutoAttack accuracy in per cent."""
    model.eval()
    robust = n = 0
    for x, y in batches.in_order(index):
        adversarial = attacks.auto_attack(model, x, y, eps, batches.batch, seed, version)
        with torch.no_grad():
            robust += int((model(adversarial).argmax(1) == y).sum())
        n += len(y)
    return {"autoattack": 100 * robust / n}


@torch.no_grad()
def surface(model: torch.nn.Module, x: Tensor, y: Tensor, eps: float, points: int = 13) -> list[list[float]]:
    """Mean cross-entropy of images x [B, C, H, W] on a grid [points, points] around them, from -eps/2 to 1.5 eps along
    the sign of the gradient (rows) and along a random sign image (columns)."""
    training = model.training
    model.eval()
    g, _ = attacks.input_gradient(model, x, y)
    other = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).sub(0.5).sign().to(x.device)
    scale = torch.linspace(-0.5 * eps, 1.5 * eps, points).tolist()
    rows = []
    for a in scale:
        line = torch.cat([(x + a * g.sign() + b * other).clamp(0, 1) for b in scale])
        loss = F.cross_entropy(model(line).float(), y.repeat(points), reduction="none")
        rows.append(loss.view(points, -1).mean(1))
    model.train(training)
    return [[round(v, 4) for v in row] for row in torch.stack(rows).tolist()]


def onset(curve: list[dict], chance: float = 10.0) -> int | None:
    """Epoch in which catastrophic overfitting began, None if it did not. Our definition, on the fixed probe: the first
    epoch from which to the last PGD accuracy is lost (below half of the best of all epochs, or below `chance`, what
    guessing would give in per cent) and FGSM accuracy lies more than 10 points above it."""
    bar = max(max(row["probe_pgd"] for row in curve) / 2, chance)
    found = None
    for row in reversed(curve):
        if row["probe_pgd"] >= bar or row["probe_fgsm"] <= row["probe_pgd"] + 10:
            break
        found = int(row["epoch"])
    return found


def summary(curve: list[dict], chance: float = 10.0) -> dict:
    """What a record says of the course of training: onset, abnormal examples there and at the end, time an epoch."""
    out: dict = {f"curve_{k}": [row.get(k) for row in curve] for k in CURVES if k in curve[-1]}
    out |= {"epochs": len(curve), "probe_pgd_best": max(row["probe_pgd"] for row in curve)}
    co = onset(curve, chance)
    out["collapsed"] = int(co is not None)
    if co is not None:
        out["co_epoch"] = co
    if "abnormal" in curve[-1]:
        share = [row["abnormal"] for row in curve]
        out |= {"abnormal_final": share[-1], "abnormal_max": max(share), "gap_final": curve[-1]["gap"]}
        if co is not None:
            out["abnormal_at_co"] = share[co - 1]
        if co is not None and co >= 2:  # the first epoch has none before it
            out["abnormal_previous_co"] = share[co - 2]
        if co is not None and co >= 3:
            out["abnormal_before_co"] = share[co - 3]
    if "surface" in curve[-1]:  # after a fifth of training, and at the end
        early = max(len(curve) // 5, 1)
        out |= {"surface_before": curve[early - 1]["surface"], "surface_after": curve[-1]["surface"]}
        out |= {"surface_epoch": early}
    for key in ("train_seconds", "train_cpu_seconds"):  # not of an epoch that was cut and resumed
        times = {row["epoch"]: row[key] for row in curve if key in row}
        if len(times) > 1:
            times.pop(1, None)  # the first epoch also warms caches up
        out |= {f"{key}_epoch": float(np.median(list(times.values())))} if times else {}
    return out


CURVES = (
    *("abnormal", "e_a", "v_a", "v_n", "gap", "loss", "train_accuracy", "probe_clean", "probe_fgsm", "probe_pgd"),
    *("train_seconds",),
)


def show(records: Iterable[dict]) -> None:
    """Print a line a seed and the mean."""
    rows = list(records)
    for r in rows:
        m = r["metrics"]
        extra = f"  AutoAttack {m['autoattack']:.2f} %" if "autoattack" in m else ""
        if "collapsed" in m:
            extra += f"  CO in epoch {m['co_epoch']}" if "co_epoch" in m else "  no CO"
        print(f"seed {r['seed']}: clean {m['clean']:.2f} %  FGSM {m['fgsm']:.2f} %  PGD {m['pgd']:.2f} %{extra}")
    if len(rows) > 1:
        means = {k: np.array([r["metrics"][k] for r in rows]) for k in ("clean", "fgsm", "pgd")}
        print("mean: " + "  ".join(f"{k} {v.mean():.2f} +- {v.std():.2f} %" for k, v in means.items()))
