"""Speed of this folder against a plain implementation of the same things, in one process, as ratios.

    python bench.py                    # CPU
    python bench.py --device cuda

Maps: one image at a time with hooks, a full backward pass, Pillow and matplotlib, as the released code makes them,
against one batch. Attack: PGD with loss.backward(), which also fills weight gradients, against input gradients alone.
Epochs: PART against AT. Both sides are compared in value first, then timed.
"""

import dataclasses
import time
from dataclasses import dataclass

from lab import runs

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

import attacks
import data
import models
import pixel_reweighting as pr
import train
from trainer import Trainer


@dataclass
class BenchSettings:
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    model: str = "auto"
    """Network of the epochs and the attack; auto: resnet18 on CUDA, else small."""
    maps_model: str = "resnet18-w8"
    """Network of the maps: with a large one on a CPU the forward pass outweighs what is compared."""
    images: int = 500
    """Images of 16x16 (CUDA: 32x32) an epoch; half as many for the maps."""
    repeats: int = 3
    """Timed rounds, in turn; the fastest counts."""
    smoke: bool = False
    """Tiny sizes, to see that everything runs."""


def plain_masks(net, x: Tensor) -> Tensor:
    """Masks [B, 3, H, W] of the released code's rule, one image at a time."""
    out = []
    for image in x:
        kept = {}
        one = net.stages[-1].register_forward_hook(lambda m, i, o, kept=kept: kept.update(a=o))
        two = net.stages[-1].register_full_backward_hook(lambda m, i, o, kept=kept: kept.update(g=o[0]))
        z = net(image[None])
        net.zero_grad()
        z[0, z[0].argmax()].backward()
        one.remove()
        two.remove()
        weight = kept["g"][0].mean((1, 2))
        l = torch.relu((weight[:, None, None] * kept["a"][0].detach()).sum(0))
        l = ((l - l.min()) / (l.max() - l.min())).cpu().numpy()
        big = np.asarray(Image.fromarray(l, "F").resize(tuple(image.shape[:0:-1]), Image.Resampling.BICUBIC))
        colours = colormaps["jet"](big**2)[:, :, :3]
        with np.errstate(invalid="ignore"):
            z = (colours - colours.mean()) / colours.std()
        out.append(torch.from_numpy(np.maximum(z, 1.0) > 1).permute(2, 0, 1))
    return torch.stack(out).to(x.device)


def plain_pgd(net, x: Tensor, y: Tensor, start: Tensor, step: float, eps: float, steps: int) -> Tensor:
    """x + delta by loss.backward()."""
    x_adv = x + start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_(True)
        F.cross_entropy(net(x_adv), y).backward()
        delta = torch.clamp(x_adv.detach() + step * x_adv.grad.sign() - x, -eps, eps)
        x_adv = torch.clamp(x + delta, 0, 1)
    return x_adv.detach()


def main() -> None:
    b = runs.parse(BenchSettings, __doc__)
    if b.images < 20 or b.repeats < 1 or {b.model, b.maps_model} - {"auto", *models.NAMES}:
        raise runs.UserError(f"--images at least 20, --repeats at least 1, --model one of {', '.join(models.NAMES)}")
    device = runs.device(b.device)
    cuda = device.type == "cuda"
    b = dataclasses.replace(b, images=40, repeats=1) if b.smoke else b
    side = 32 if cuda else 16
    name = b.model if b.model != "auto" else "resnet18" if cuda and not b.smoke else "small"
    g = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (b.images, side, side, 3), generator=g, dtype=torch.uint8)
    part = data.Images(pictures, torch.randint(10, (b.images,), generator=g))
    kind = dataclasses.replace(data.KINDS["patches"])
    sets = data.Data("patches", kind, "random", "", part, part)

    def seconds(function) -> float:
        torch.cuda.synchronize(device) if cuda else None
        clock = time.perf_counter()
        function()
        torch.cuda.synchronize(device) if cuda else None
        return time.perf_counter() - clock

    def race(*functions) -> list[float]:
        """The fastest time of each; in turn, so that a slow moment of the machine meets all."""
        times = [[seconds(f) for f in functions] for _ in range(b.repeats + 1)][1:]
        return [min(t) for t in zip(*times, strict=True)]

    print(f"{device}, {torch.get_num_threads()} threads, images {side}x{side}")
    for maps_model in dict.fromkeys((b.maps_model, name)):
        for size in dict.fromkeys((8, side)):  # one at a time pays for calls, a batch for arithmetic
            torch.manual_seed(0)
            net = models.build(maps_model, 10, 3).to(device, memory_format=torch.channels_last).eval()
            x = data.to_input(pictures[: b.images // 2, :size, :size].contiguous()).to(device)

            def batch(net=net, x=x, size=size) -> Tensor:
                return pr.mask(pr.activation_map(net, x), (size, size), "jet-rgb")

            differ = 100 * float((plain_masks(net, x) != batch()).float().mean())
            slow, quick = race(lambda net=net, x=x: plain_masks(net, x), batch)
            n = len(x)
            print(f"masks, {maps_model}, {n} images {size}x{size}: {differ:.3f} % of the masks' entries differ")
            print(f"  one at a time {n / slow:9.0f} images/s, batch {n / quick:9.0f} images/s: {slow / quick:.0f} x")

    net = models.build(name, 10, 3).to(device, memory_format=torch.channels_last).eval()
    x, y = data.to_input(pictures[:100]).to(device), part.y[:100].to(device)
    start = attacks.uniform(x, 8 / 255, torch.Generator(device).manual_seed(0))
    box = (x, y, start, 2 / 255, 8 / 255, 10)
    gap = (plain_pgd(net, *box) - (x + attacks.pgd(net, *box))).abs().max()
    slow, quick = race(lambda: plain_pgd(net, *box), lambda: attacks.pgd(net, *box))
    print(f"PGD-10, {name}: largest difference of a pixel {float(gap):.1e}")
    print(f"  backward to the weights {slow:.3f} s, to the images {quick:.3f} s: {slow / quick:.2f} x")

    def epoch(method: str, precision: str):
        s = train.Settings(method=(method,), dataset="patches", model=name, batch=100, precision=precision)
        s.steps, s.warmup, s.epochs, s.eps_ramp = 10, 0, 1000, 0
        s.resolve()
        t = Trainer(s, device, sets)
        t.fresh(0)
        phase = next(p for p in train.phases(s) if p.name == method)

        def run() -> None:
            train.train_epoch(t, phase, lambda: None)
            t.epoch, t.batch = t.epoch + 1, 0

        return run

    for precision in ("fp32", "bf16"):
        at, ours = race(epoch("at", precision), epoch("part", precision))
        print(
            f"an epoch, {name}, {precision}, PGD-10: AT {b.images / at:.0f} images/s, PART {b.images / ours:.0f}: "
            f"PART takes {ours / at:.3f} x AT"
        )


if __name__ == "__main__":
    runs.command(main)
