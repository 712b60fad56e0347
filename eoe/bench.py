"""Speed of this folder's scoring against other ways to do it, as ratios measured in one process.

    python bench.py                  # 50,000 images, 1,600 labels, five scores; and the image pipeline
    python bench.py --device cuda

Two opponents. The released evaluation goes through its labels one by one: for each batch of 512 images the cosine with
one label after another, and all of it anew for each score; it is timed on a part of the images, and without the text
encoder, which it also runs anew for each batch. The plain form does the same with one matrix product a batch. Results
are compared first, then timed.
"""

import resource
import time
from dataclasses import dataclass

from lab import runs
from lab.runs import UserError

import torch

import backbones
import scores
from scores import normalise, reduce
from standins import drawn

FIVE = ("MCM", "EOE", "S_MAX", "S_Energy", "S_MaxLogit")


@dataclass
class BenchSettings:
    images: int = 50_000
    """Images (paper: ImageNet-1K validation has 50,000)."""
    ids: int = 1_000
    """ID names."""
    outs: int = 600
    """Envisioned names."""
    dim: int = 512
    """Feature width (ViT-B: 512)."""
    released: int = 1_024
    """Images of the comparison with the released evaluation, whose time grows with their number."""
    repeats: int = 2
    """Timed repetitions; the fastest counts."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def product(v, text):
    """Similarities [B, K + L] of a batch in one piece."""
    return v @ text.T


def one_by_one(v, text):
    """The same, a label at a time."""
    return torch.stack([torch.nn.functional.cosine_similarity(v, w[None]) for w in text], 1)


def plain(images, ids, outs, name: str, similar=product, batch: int = 512):
    """One score, batch by batch, straight from its definition."""
    out, k = [], len(ids)
    for v in images.split(batch):
        s = similar(v, torch.cat([ids, outs]))
        if name == "MCM":
            out.append(s[:, :k].softmax(1).max(1).values)
        elif name == "EOE":
            p = s.softmax(1)
            out.append(p[:, :k].max(1).values - 0.25 * p[:, k:].max(1).values)
        elif name == "S_MAX":
            best = s[:, :k].softmax(1).max(1).values
            out.append(torch.where(s[:, :k].max(1).values < s[:, k:].max(1).values, 1 / k, best))
        elif name == "S_Energy":
            a, b = (x.div(scores.T_ENERGY).logsumexp(1) for x in (s[:, :k], s[:, k:]))
            out.append(scores.T_ENERGY * (a - b))
        else:
            out.append(s[:, :k].max(1).values - s[:, k:].max(1).values)
    return torch.cat(out)


def timed(function, repeats: int, device) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    s = runs.parse(BenchSettings, __doc__)
    for name in ("images", "ids", "outs", "dim", "released", "repeats"):
        if getattr(s, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(s, name)}")
    device = runs.device(s.device)
    g = torch.Generator().manual_seed(0)
    images, ids, outs = (normalise(torch.randn(n, s.dim, generator=g)).to(device) for n in (s.images, s.ids, s.outs))

    def ours(images=images, names=FIVE):
        stats = reduce(images, ids, outs)
        return [scores.SCORES[name][0](stats) for name in names]

    few = images[:2000]
    stats = reduce(few, ids, outs)
    for name in FIVE:
        worst = (scores.SCORES[name][0](stats) - plain(few, ids, outs, name).double()).abs().max().item()
        other = (plain(few[:64], ids, outs, name, one_by_one) - plain(few[:64], ids, outs, name)).abs().max().item()
        print(f"{name:11s} largest difference to the plain form {worst:.1e}, of that to label by label {other:.1e}")
    part = images[: s.released]
    for names in (("EOE",), FIVE):
        fast = timed(lambda names=names: ours(part, names), s.repeats, device)
        slow = timed(lambda names=names: [plain(part, ids, outs, n, one_by_one) for n in names], 1, device)
        what = "one score" if len(names) == 1 else "five scores"
        print(f"{what} of {len(part)} images as released, label by label: {slow:.2f} s, ours {fast:.3f} s, "
              f"ratio {slow / fast:.1f}")  # fmt: skip
    fast = timed(ours, s.repeats, device)
    slow = timed(lambda: [plain(images, ids, outs, name) for name in FIVE], s.repeats, device)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"five scores of {s.images} images x {s.ids + s.outs} labels: {fast:.2f} s, plain {slow:.2f} s, "
        f"ratio {slow / fast:.1f}"
    )
    print(
        f"peak memory of the process {memory:.2f} GiB, of which the features take {images.numel() * 4 / 2**30:.2f} GiB"
    )
    names = drawn.concepts()[:64]
    start = time.perf_counter()
    drawn.draw(names * 8, 0)
    print(f"drawn pictures: {512 / (time.perf_counter() - start):.0f} images/s")
    transform = backbones.Backbone.transform(type("B", (), {"known": backbones.KNOWN["clip-vit-b16"]})())
    from torchvision.transforms.v2.functional import to_pil_image

    picture = to_pil_image(torch.randint(0, 256, (3, 375, 500), dtype=torch.uint8))
    start = time.perf_counter()
    for _ in range(100):
        transform(picture)
    print(f"transform of a 500 x 375 image to 224 x 224: {100 / (time.perf_counter() - start):.0f} images/s a process")


if __name__ == "__main__":
    runs.command(main)
