"""Speed of this folder's training loop against a plain implementation of the same loss, in one process, as ratios.

    python bench.py                    # small network on the CPU, fp32 and bf16
    python bench.py --device cuda      # PreActResNet-18, fp32 and bf16

The plain loop is the usual one: images through PIL and a DataLoader of two workers, NCHW, a full backward at the start
point whose weight gradients are thrown away, boolean indexing for the two groups, and counters read by .item() in every
step. Both make the same step from the same batch first (loss and every weight gradient are compared), then each is
timed.
"""

import dataclasses
import time
from dataclasses import dataclass

from lab import runs

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import aaer
import attacks
import data
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


def plain_loss(model, x: Tensor, y: Tensor, eta: Tensor, eps: float, step: float, l1: float, l2: float, l3: float):
    """RS-AAER as a plain program: (loss, number of abnormal examples)."""
    delta = eta.clone().requires_grad_(True)
    z0 = model(x + delta)
    c0 = F.cross_entropy(z0, y, reduction="none")
    c0.mean().backward()
    g = delta.grad.detach()
    delta = torch.clamp(delta.detach() + step * torch.sign(g), -eps, eps)
    delta = torch.max(torch.min(delta, 1 - x), 0 - x)
    z1 = model(x + delta)
    c1 = F.cross_entropy(z1, y, reduction="none")
    z0, c0 = z0.detach(), c0.detach()
    abnormal = c0 > c1.detach()
    n_a, loss = abnormal.sum().item(), c1.mean()
    if 0 < n_a < len(y):
        e_a = (c0[abnormal] - c1.detach()[abnormal]).mean().item()
        v_a = ((z0[abnormal] - z1[abnormal]) ** 2).sum(1).mean()
        v_n = ((z0[~abnormal] - z1[~abnormal]) ** 2).sum(1).mean().item()
        loss = loss + l1 * (n_a / len(y)) * (l2 * e_a + l3 * max(v_a - v_n, 0))
    return loss, n_a


def plain_epoch(t: Trainer, loader: DataLoader, model) -> None:
    s = t.s
    for x, y in loader:
        x, y = x.to(t.device), y.to(t.device)
        eta = torch.zeros_like(x).uniform_(-s.eps, s.eps)
        eta = torch.max(torch.min(eta, 1 - x), 0 - x)
        loss, _ = plain_loss(model, x, y, eta, s.eps, s.step * s.eps, s.lambda1, s.lambda2, s.lambda3)
        t.optimizer.zero_grad()
        loss.backward()
        t.optimizer.step()
        t.scheduler.step()
        loss.item()


def same_step(t: Trainer) -> tuple[float, float, int, float]:
    """(difference of the losses, largest relative difference of a weight gradient, abnormal examples, V_A - V_N) of
    one step. It goes down a loss of wrong labels: most examples are abnormal then, and V_A > V_N, without which the
    regulariser has no gradient to compare."""
    state = {k: v.clone() for k, v in t.model.state_dict().items()}
    for x, y, total in t.train.epoch(0, 0, 0, torch.Generator(t.device).manual_seed(0)):
        found = compare_step(t, x, y.flip(0), total, -t.s.step * t.s.eps, state)
        if found[-1] > 0:
            break
    return found


def compare_step(t: Trainer, x: Tensor, y: Tensor, total: int, step: float, state: dict) -> tuple:
    s = t.s
    t.model.load_state_dict(state)
    eta = attacks.into_image(x, attacks.uniform(x, s.eps, torch.Generator(t.device).manual_seed(1)))
    plain, n_a = plain_loss(t.model, x, y, eta, s.eps, step, s.lambda1, s.lambda2, s.lambda3)
    t.model.zero_grad()
    plain.backward()
    wanted = [p.grad.clone() for p in t.model.parameters()]
    t.model.load_state_dict(state)  # the two looks moved the batch statistics
    t.model.zero_grad()
    delta, z0 = attacks.single_step(t.forward, x, y, eta, step, s.eps)
    z1 = t.forward(x + delta)
    v = aaer.variation(z0, z1, y)
    r = aaer.regulariser(v, s.lambda1, s.lambda2, s.lambda3)
    ours = F.cross_entropy(z1, y, reduction="sum") / total + r
    ours.backward()
    gaps = [(p.grad - w).norm() / w.norm().clamp(min=1e-12) for p, w in zip(t.model.parameters(), wanted, strict=True)]
    return abs(ours.item() - plain.item()), max(g.item() for g in gaps), n_a, (v.v_a - v.v_n).item()


def timed(device: torch.device, function) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - clock


def epoch(t: Trainer) -> None:
    train.train_epoch(t, lambda: None)
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
    sets = data.Data("cifar10", KINDS["cifar10"], "random", "", part, part, 32, 3)

    def trainer(method: str, precision: str = "fp32", compiled: bool = False, model: str = "", given=sets) -> Trainer:
        s = Settings(method=method, dataset="cifar10", eps=16 / 255, batch=b.batch, epochs=1000)
        s.precision, s.compile, s.model = precision, compiled, model or ("preact18" if big else "preact-small")
        s.resolve()
        t = Trainer(s, device, given)
        t.fresh(0)
        return t

    s = Settings(dataset="patches", start="rs", eps=48 / 255, batch=b.batch, epochs=4)
    s.resolve()
    t = Trainer(s, device)
    t.fresh(0)
    for _ in range(2):  # so long that some examples are abnormal
        train.train_epoch(t, lambda: None)
        t.epoch, t.batch = t.epoch + 1, 0
    loss, gradient, n_a, gap = same_step(t)
    print(
        f"same step: {n_a} of {b.batch} abnormal, V_A - V_N = {gap:+.2f}; "
        f"loss differs by {loss:.1e}, gradients by at most {gradient:.1e}"
    )

    p = trainer("aaer")
    kind = KINDS["cifar10"]
    plain = models.build(p.s.model, 10, 3, 32, kind.mean, kind.std).to(device)
    p.optimizer = torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=5e-4)
    p.scheduler = torch.optim.lr_scheduler.CyclicLR(p.optimizer, 0.0, 0.2, 1000, 1000)
    loader = DataLoader(
        Pictures(part),
        b.batch,
        shuffle=True,
        num_workers=0 if b.smoke else b.workers,
        persistent_workers=b.workers > 0 and not b.smoke,
    )

    rows = {"plain RS-AAER, fp32": lambda: plain_epoch(p, loader, plain)}
    kinds = [("fp32", False), ("bf16", False)] + [("bf16" if big else "fp32", True)] * b.compile
    for precision, compiled in kinds:
        for method in ("fgsm", "aaer"):
            each = trainer(method, precision, compiled)
            rows[f"{each.s.label}, {precision}{', compiled' * compiled}"] = lambda each=each: epoch(each)
    times: dict[str, list[float]] = {k: [] for k in rows}
    for k in range(b.repeats + 1):  # in turn, so that a slow moment of the machine meets all of them
        for name, function in rows.items():
            seconds = timed(device, function)
            if k:
                times[name].append(seconds)
    best = {k: min(v) for k, v in times.items()}
    base = best["plain RS-AAER, fp32"]
    print(f"{b.images} images of 32x32, batch {b.batch}, {p.s.model}, {device}, {torch.get_num_threads()} threads")
    for name, seconds in best.items():
        print(f"{name:28s} {b.images / seconds:9.0f} images/s   {base / seconds:5.2f} x plain")
    widths = tuple(models.WIDTHS)[-1 if b.smoke else 0 :]
    by_width(16 if b.smoke else b.batch, device, sets, widths, lambda n, d: trainer("aaer", "bf16", False, n, d))
    print(f"RS-AAER / RS-FGSM: {best['RS-AAER, fp32'] / best['RS-FGSM, fp32']:.3f} of the time of an epoch")


if __name__ == "__main__":
    runs.command(main)
