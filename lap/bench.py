"""Speed of this folder's training loop against a plain implementation of R-LAP, in one process, as ratios.

    python bench.py                    # small network on the CPU, fp32 and bf16
    python bench.py --device cuda      # PreActResNet-18, fp32 and bf16

The plain loop is the usual one: images through PIL and a DataLoader of two workers, NCHW, the trial step made on a copy
of network and optimiser, layer by layer, and a loss read by .item() in every step. First both make 20 steps in float64
and their weights are compared, then each is timed. R-FGSM is timed twice: as here, with a first pass that computes
gradients of the images alone, and with the full backward that released loops make there and LAP cannot do without.
"""

import copy
import dataclasses
import math
import time
from dataclasses import dataclass

from lab import runs

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import attacks
import data
import lap
import models
import train
from readers import KINDS
from settings import Settings
from trainer import Trainer


@dataclass
class BenchSettings:
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    images: int = 2560
    """Training images of 32x32, random."""
    batch: int = 128
    """Images a step."""
    repeats: int = 5
    """Timed epochs of each, in turn; the fastest counts."""
    compile: bool = False
    """Also time this loop under torch.compile."""
    workers: int = 2
    """Loader processes of the plain loop (2 in the released code)."""
    smoke: bool = False
    """Tiny sizes, to see that everything runs."""


class Pictures(Dataset):
    """The plain loop's data: one PIL image at a time."""

    def __init__(self, part: data.Images):
        self.part = part
        self.transform = transforms.Compose(
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, i: int):
        return self.transform(Image.fromarray(self.part.x[i].numpy())), int(self.part.y[i])


class Plain:
    """R-LAP as a plain program: a copy of network and optimiser makes the trial step and is measured."""

    def __init__(self, model, steps: int, beta: float, gamma: float):
        self.model, self.trial, self.beta, self.gamma = model, copy.deepcopy(model), beta, gamma
        self.optimizer, self.proxy = (
            torch.optim.SGD(m.parameters(), 0.1, 0.9, weight_decay=5e-4) for m in (model, self.trial)
        )
        self.scheduler = torch.optim.lr_scheduler.CyclicLR(self.optimizer, 0.0, 0.2, steps / 2, steps / 2)

    def step(self, x: Tensor, y: Tensor, eta: Tensor, eps: float) -> float:
        delta = eta.clone().requires_grad_(True)
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x + delta), y).backward()
        g = delta.grad.detach()
        self.trial.load_state_dict(self.model.state_dict())
        self.proxy.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        for p, q in zip(self.trial.parameters(), self.model.parameters(), strict=True):
            p.grad = q.grad.clone()
        self.proxy.step()
        old, new = self.model.state_dict(), self.trial.state_dict()
        names = [k for k in old if "weight" in k and old[k].dim() > 1]
        moves = {}
        for i, k in enumerate(names, 1):
            diff = new[k] - old[k]
            level = 1 - (math.log(i) / math.log(len(names))) ** self.gamma if i > 1 else 1.0
            moves[k] = self.beta * level * old[k].norm() / (diff.norm() + 1e-20) * diff
        delta = torch.clamp(delta.detach() + 1.25 * eps * torch.sign(g), -eps, eps)
        delta = torch.max(torch.min(delta, 1 - x), 0 - x)
        with torch.no_grad():
            for k, p in self.model.named_parameters():
                if k in moves:
                    p.add_(moves[k])
        loss = F.cross_entropy(self.model(x + delta), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    def epoch(self, loader: DataLoader, eps: float, device: torch.device) -> None:
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            eta = torch.zeros_like(x).uniform_(-eps, eps)
            self.step(x, y, torch.max(torch.min(eta, 1 - x), 0 - x), eps)


def same_steps(device: torch.device, steps: int = 20, eps: float = 16 / 255) -> tuple[float, float, float]:
    """(largest relative difference of a weight, how far the weights went, rate of the first step) after `steps` steps
    of both in float64."""
    torch.manual_seed(0)
    start = models.build("preact-small", 10, 3, 16, (0.5,) * 3, (0.25,) * 3).double().to(device)
    plain = Plain(copy.deepcopy(start), steps, 0.3, lap.GAMMA)
    model = copy.deepcopy(start).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.0, 0.2, steps / 2, steps / 2)
    first = optimizer.param_groups[0]["lr"]
    weights = list(lap.layers(model).values())
    sizes = 0.3 * torch.tensor(lap.schedule(len(weights), lap.GAMMA), dtype=torch.float64, device=device)
    g = torch.Generator(device).manual_seed(0)
    for _ in range(steps):
        x = torch.rand(32, 3, 16, 16, generator=g, device=device, dtype=torch.float64)
        y = torch.randint(10, (32,), generator=g, device=device)
        eta = attacks.into_image(x, attacks.uniform(x, eps, g))
        plain.step(x, y, eta, eps)
        at = (x + eta).requires_grad_(True)
        optimizer.zero_grad()
        F.cross_entropy(model(at), y, reduction="sum").backward()
        delta = attacks.project(x, eta + 1.25 * eps * at.grad.sign(), eps)
        lap.perturb_(weights, [w.grad for w in weights], optimizer, sizes, scale=1 / len(y))
        optimizer.zero_grad()
        F.cross_entropy(model(x + delta), y).backward()
        optimizer.step()
        scheduler.step()
    pairs = list(zip(model.parameters(), plain.model.parameters(), start.parameters(), strict=True))
    gap = max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b, _ in pairs)
    way = max(((b - c).norm() / c.norm().clamp(min=1e-12)).item() for _, b, c in pairs if c.ndim > 1)
    return gap, way, first


def timed(device: torch.device, function) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - clock


def epoch(t: Trainer, perturbed: bool = True) -> None:
    """One epoch of this folder's loop; perturbed=False leaves LAP's weights where they are, which is its FGSM base with
    a full first backward."""
    made = lap.perturb_
    lap.perturb_ = made if perturbed else lambda *args: []
    try:
        train.train_epoch(t, lambda: None)
    finally:
        lap.perturb_ = made
    t.batch = 0


def by_width(batch: int, device: torch.device, sets: data.Data, names: tuple[str, ...], make) -> None:
    """Print images/s of a training step at each width, and the share of convolutions in it: what is left to win."""
    one = data.Images(sets.train.x[:batch], sets.train.y[:batch])
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    for name in names:
        t = make(name, dataclasses.replace(sets, train=one))
        speed = len(one) / min(timed(device, lambda t=t: epoch(t)) for _ in range(3))
        with torch.profiler.profile(activities=kinds, acc_events=True) as seen:
            timed(device, lambda t=t: epoch(t))
        key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        spent = {row.key: getattr(row, key) for row in seen.key_averages()}
        share = sum(v for k, v in spent.items() if "conv" in k) / max(sum(spent.values()), 1e-12)
        print(f"{name:14s} {t.s.label}, bf16 {speed:9.0f} images/s   convolutions {100 * share:.0f} % of the step")


def main() -> None:
    b = runs.parse(BenchSettings, __doc__)
    if b.images < 2 or b.batch < 2 or b.repeats < 1:
        raise runs.UserError("--images and --batch must be at least 2, --repeats at least 1")
    device = runs.device(b.device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    b = dataclasses.replace(b, images=256, repeats=1) if b.smoke else b
    big = device.type == "cuda" and not b.smoke
    if big and b.images == 2560:
        b = dataclasses.replace(b, images=25600)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (b.images, 32, 32, 3), generator=g, dtype=torch.uint8)
    part = data.Images(x, torch.randint(10, (b.images,), generator=g))
    kind = KINDS["cifar10"]
    sets = data.Data("cifar10", kind, "random", "", part, part, 32, 3)

    def trainer(method: str, precision: str = "fp32", compiled: bool = False, model: str = "", given=sets) -> Trainer:
        s = Settings(method=method, dataset="cifar10", eps=16 / 255, batch=b.batch, epochs=1000)
        s.precision, s.compile, s.model = precision, compiled, model or ("preact18" if big else "preact-small")
        s.resolve()
        t = Trainer(s, device, given)
        t.fresh(0)
        return t

    gap, way, first = same_steps(device)
    print(
        f"20 steps in float64, the first with rate {first:g}: weights differ from the trial step's by at most "
        f"{gap:.1e}, after going {way:.1f} times their norm"
    )

    p = trainer("lap")
    plain = Plain(models.build(p.s.model, 10, 3, 32, kind.mean, kind.std).to(device), 2000, p.s.beta, p.s.gamma)
    loader = DataLoader(
        Pictures(part),
        b.batch,
        shuffle=True,
        num_workers=0 if b.smoke else b.workers,
        persistent_workers=b.workers > 0 and not b.smoke,
    )
    base = "plain R-LAP, fp32"
    rows = {base: lambda: plain.epoch(loader, p.s.eps, device)}
    kinds = [("fp32", False), ("bf16", False)] + [("bf16" if big else "fp32", True)] * b.compile
    for precision, compiled in kinds:
        tail = f", {precision}{', compiled' * compiled}"
        lean, full, ours = (trainer(m, precision, compiled) for m in ("fgsm", "lap", "lap"))
        rows["R-FGSM" + tail] = lambda t=lean: epoch(t)
        rows["R-FGSM, full first backward" + tail] = lambda t=full: epoch(t, perturbed=False)
        rows["R-LAP" + tail] = lambda t=ours: epoch(t)
    times: dict[str, list[float]] = {k: [] for k in rows}
    for k in range(b.repeats + 1):  # in turn, so that a slow moment of the machine meets all of them
        for name, function in rows.items():
            seconds = timed(device, function)
            if k:
                times[name].append(seconds)
    best = {k: min(v) for k, v in times.items()}
    print(f"{b.images} images of 32x32, batch {b.batch}, {p.s.model}, {device}, {torch.get_num_threads()} threads")
    for name, seconds in best.items():
        print(f"{name:36s} {b.images / seconds:9.0f} images/s   {best[base] / seconds:5.2f} x plain")
    widths = tuple(models.WIDTHS)[-1 if b.smoke else 0 :]
    by_width(16 if b.smoke else b.batch, device, sets, widths, lambda n, d: trainer("lap", "bf16", False, n, d))
    ours, lean, full = (best[k + ", fp32"] for k in ("R-LAP", "R-FGSM", "R-FGSM, full first backward"))
    print(
        f"R-LAP takes {ours / full:.3f} of the time of R-FGSM with a full first backward, {ours / lean:.3f} of R-FGSM's"
    )


if __name__ == "__main__":
    runs.command(main)
