"""What is measured on a trained network: accuracy under attacks and corruptions, and where its masks lie."""

from collections.abc import Callable, Iterable
from pathlib import Path

from lab.runs import UserError

import numpy as np
import torch
from torch import Tensor

import attacks
import data
import pixel_reweighting as pr
from data import Batches

LONGER = (20, 40, 60, 80, 100)  # steps of the adaptive evaluation


def order(n: int, limit: int) -> Tensor:
    """The first `limit` (0: all) of a fixed random order of n images."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[: limit or n]


@torch.no_grad()
def attack_all(
    model: torch.nn.Module,
    batches: Batches,
    index: Tensor,
    eps: float,
    step: float,
    steps: int,
    seed: int,
    names: tuple[str, ...] = ("pgd", "mma"),
    box: attacks.Box | None = None,
    world=None,
) -> dict[str, Tensor]:
    """For `natural` and each attack of `names`: which of the test images `index` are classified correctly, bool [n].

    One uniform start in the image, the same for every network of a seed; `box` replaces eps. float32; the network is
    put in eval mode and back, and no generator of a training run is touched. Several processes (`world`: the Trainer)
    share each batch out, with the same answer. UserError when an output is not finite: argmax of NaN is a class like
    any other, and such a network would get an accuracy.
    """
    training = model.training
    model.eval()
    generator = torch.Generator(batches.device).manual_seed(1_000_000_007 + seed * 1009)
    keys = ("natural", *names)
    right = torch.zeros(len(keys) + 1, len(index), dtype=torch.int32, device=batches.device)  # the last: not finite
    e, done = eps if box is None else box, 0
    for x, y in batches.in_order(index):
        start = pr.project(x, attacks.uniform(x, eps, generator), eps)
        rows = slice(None) if world is None else world.rows(len(x))
        here, done = torch.arange(done, done + len(x), device=batches.device)[rows], done + len(x)
        x, y, start = x[rows], y[rows], start[rows]
        if not len(x):
            continue
        z = model(x)
        right[-1, here] = (~torch.isfinite(z).all(1)).int()
        right[0, here] = (z.argmax(1) == y).int()
        for k, name in enumerate(names, 1):
            attack = {"pgd": attacks.pgd, "mma": attacks.mma}[name]
            delta = attack(model, x, y, start, step, e, steps)
            right[k, here] = (model((x + delta).clamp(0, 1)).argmax(1) == y).int()
    model.train(training)
    right = (right if world is None else world.reduce(right)).cpu()
    odd = int(right[-1].sum())
    if odd:
        raise UserError(f"the network's outputs are not finite on {odd} of {len(index)} test images; train it again")
    return {k: v.bool() for k, v in zip(keys, right[:-1], strict=True)}


def auto_attack(
    model: torch.nn.Module, batches: Batches, index: Tensor, eps: float, version: str, seed: int, world=None
) -> Tensor:
    """Which images withstand AutoAttack, bool [n]. Several processes share each batch out; the random parts of the
    attack then differ from those of one process."""
    model.eval()
    right, done = torch.zeros(len(index), dtype=torch.int32, device=batches.device), 0
    for x, y in batches.in_order(index):
        rows = slice(None) if world is None else world.rows(len(x))
        here, done = torch.arange(done, done + len(x), device=batches.device)[rows], done + len(x)
        if len(here):
            adversarial = attacks.auto_attack(model, x[rows], y[rows], eps, batches.batch, seed, version)
            with torch.no_grad():
                right[here] = (model(adversarial).argmax(1) == y[rows]).int()
    return (right if world is None else world.reduce(right)).bool().cpu()


def adaptive(
    model: torch.nn.Module,
    batches: Batches,
    index: Tensor,
    eps: float,
    step: float,
    seed: int,
    budget: Callable[[Tensor], Tensor],
    steps: Iterable[int] = (),
    world=None,
) -> dict[str, Tensor]:
    """Attacks on a network that was trained with masks (our protocol; the paper's is not known): PGD and MMA at uniform
    eps with more and more steps, both in the box `budget(images)` of the victim's own maps made anew at every step, and
    `union`, the images that withstand all of them. The box alone has less room than eps and proves little."""
    out: dict[str, Tensor] = {}
    steps = tuple(steps) or LONGER
    for n in steps:
        found = attack_all(model, batches, index, eps, step, n, seed, world=world)
        out |= {f"{k}{n}": v for k, v in found.items() if k != "natural"}
    found = attack_all(model, batches, index, eps, step, min(steps), seed, box=budget, world=world)
    out |= {f"aware_{k}": v for k, v in found.items() if k != "natural"}
    return out | {"union": torch.stack(list(out.values())).all(0)}


@torch.no_grad()
def corruption_accuracy(model: torch.nn.Module, folder: Path, batch: int, device: torch.device) -> dict[str, float]:
    """Accuracy in per cent on CIFAR-10-C: a number a corruption (mean of 5 severities) and their mean `corruption`."""
    model.eval()
    out = {}
    for name in data.CORRUPTIONS:
        share = []
        for severity in range(1, 6):
            x, y = data.corrupted(folder, name, severity)
            b = Batches(data.Images(x, y), data.KINDS["cifar10"], batch, device)
            right = sum((model(x).argmax(1) == y).sum() for x, y in b.in_order())
            share.append(100 * int(right) / len(y))
        out[f"corruption_{name}"] = float(np.mean(share))
    return {"corruption": float(np.mean(list(out.values()))), **out}


@torch.no_grad()
def masks_on_objects(t, index: Tensor) -> dict[str, float]:
    """Where the box of the object is known: share of the mask's pixels inside it, over images with an object; the same
    with the masks of other images; share of the picture the box covers. Of the trained network's own maps."""
    if not len(t.test.part.inside):
        return {}
    hit = other = size = room = images = 0.0
    t.model.eval()
    where = t.test.part.inside
    for p in index.to(t.device).split(t.test.batch):
        inside = where[p]
        there = inside.flatten(1).any(1)
        x = data.to_input(t.test.part.x[p])[there]
        inside = inside[there]
        if not len(x):
            continue
        m = pr.mask(pr.activation_map(t.model, x, t.s.cam, t.s.cam_layer), x.shape[2:], t.s.mask_rule, t.s.top_fraction)
        m = m.float().mean(1)
        hit += float((m * inside).sum())
        other += float((m.roll(1, 0) * inside).sum())
        size += float(m.sum())
        room += float(inside.float().mean((1, 2)).sum())
        images += len(x)
    if not size:
        return {}
    return {
        "mask_inside": 100 * hit / size,
        "mask_inside_shuffled": 100 * other / size,
        "box_share": 100 * room / images,
    }


def percent(found: dict[str, Tensor]) -> dict[str, float]:
    return {k: 100 * float(v.double().mean()) for k, v in found.items()}


SHOWN = {"natural": "natural", "pgd": "PGD", "mma": "MMA", "autoattack": "AutoAttack"}


def show(records: Iterable[dict]) -> None:
    """A line an arm: means over seeds, and the difference to the first arm of the list without masks."""
    rows = list(records)
    arms = list(dict.fromkeys(r["method"] for r in rows))
    keys = [k for k in SHOWN if all(k in r["metrics"] for r in rows)]
    means = {a: {k: np.mean([r["metrics"][k] for r in rows if r["method"] == a]) for k in keys} for a in arms}
    seeds = sorted({r["seed"] for r in rows})
    print(f"accuracy in per cent, mean over seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
    for a in arms:
        line = f"  {a:{max(22, *map(len, arms)) + 1}s}" + "  ".join(f"{SHOWN[k]} {means[a][k]:6.2f}" for k in keys)
        if a != arms[0]:
            line += f"   against {arms[0]}: " + "  ".join(f"{means[a][k] - means[arms[0]][k]:+.2f}" for k in keys)
        print(line)
