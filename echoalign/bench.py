"""Modified images a second against editing one by one and against full-step sampling; EchoSelect in batches.

    python bench.py                    # small networks on the CPU
    python bench.py --device cuda      # larger networks, bf16 beside fp32

Each pair is first shown to give the same: batched and single edits differ by at most a grey level, few steps and many
give edits of equal similarity to the original (printed). Then each is timed in turn; the fastest turn counts.
"""

import dataclasses
import time
from dataclasses import dataclass

from lab import runs

import torch
from torch import Tensor

import echomod
import features
import readers
from generator import nets as generators


@dataclass
class BenchSettings:
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    images: int = 256
    """Images edited by the fast side; the slow one edits an eighth of them."""
    steps: int = 10
    """Denoising steps of the fast side; the full-step one takes every step, 1000 x strength."""
    strength: float = 0.1
    """How far images are noised."""
    train_steps: int = 150
    """Steps the small network is trained first, so that its edits mean something."""
    repeats: int = 3
    """Timed turns; the fastest counts."""
    smoke: bool = False
    """Tiny sizes, to see that everything runs."""


def timed(device: torch.device, function) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - clock


def similarity(extract, x: Tensor, y: Tensor) -> float:
    from echoselect import similarity

    return float(similarity(extract(x), extract(y)).mean())


def main() -> None:
    b = runs.parse(BenchSettings, __doc__)
    if b.images < 8 or b.steps < 1 or b.repeats < 1 or b.train_steps < 1 or not 0 < b.strength <= 1:
        raise runs.UserError("--images must be at least 8, --steps, --repeats, --train-steps 1, --strength in (0, 1]")
    device = runs.device(b.device)
    b = dataclasses.replace(b, images=16, repeats=1, train_steps=4) if b.smoke else b
    d = readers.load("digits" if b.smoke else "mnist5k", runs.data_dir(""), seed=0)
    x, y = d.train.x[: b.images], (d.train.y[: b.images] + 1) % 10
    seeds = [echomod.image_seed(0, i) for i in range(len(x))]
    extract = features.Pca(d.pre.x, 40, 0)
    widths = (64, 128) if device.type == "cuda" and not b.smoke else (16, 32)
    knobs = {"strength": b.strength, "guidance": 2.0}

    def exact(steps: int, sampler: str = "ddim"):
        return echomod.ExactDenoiser(d.pre.x, d.pre.y, b.strength, steps, sampler)

    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        told = {"seed": 0, "steps": b.train_steps, "batch": 64, "lr": 2e-3, "widths": widths, "layers": 1}
        more = {"control": "ink", "show": not b.smoke}
        net, about = generators.train("concat", d.pre.x, d.pre.y, 10, Path(folder), device, **told, **more)

    def concat(steps: int, sampler: str = "ddim", bf16: bool = False):
        return generators.Trained(net, about, 10, device, steps=steps, sampler=sampler, bf16=bf16, **knobs)

    full = max(1, round(1000 * b.strength))
    few = len(x) // 8
    print(f"{len(x)} images of {d.size}x{d.size}, strength {b.strength:g}, {device}, {torch.get_num_threads()} threads")
    for name, make in (("exact", exact), ("concat", concat)):
        fast, slow = make(b.steps), make(full)
        out = fast.edit(x, y, seeds)
        single = torch.cat([fast.edit(x[i : i + 1], y[i : i + 1], seeds[i : i + 1]) for i in range(few)])
        gap = int((single.int() - out[:few].int()).abs().max())
        print(f"{name}: batched and single edits differ by at most {gap} of 255")
        solver, half = make(b.steps // 2 or 1, "dpm"), make(b.steps, bf16=True) if name == "concat" else None
        rows = {
            f"{b.steps} steps, one by one": (few, lambda g=fast: [g.edit(x[i : i + 1], y[i : i + 1], seeds[i : i + 1])
                                             for i in range(few)]),
            f"all {full} steps, batched": (few, lambda g=slow: g.edit(x[:few], y[:few], seeds[:few])),
            f"{b.steps} steps, batched": (len(x), lambda g=fast: g.edit(x, y, seeds)),
            f"{b.steps // 2 or 1} steps of DPM-Solver++, batched":
                (len(x), lambda g=solver: g.edit(x, y, seeds)),
        }  # fmt: skip
        if name == "concat":
            rows[f"{b.steps} steps, batched, bf16"] = (len(x), lambda g=half: g.edit(x, y, seeds))
        alike = {k: f() for k, (_, f) in rows.items()}
        best = dict.fromkeys(rows, float("inf"))
        for _ in range(b.repeats):
            for k, (_, f) in rows.items():
                best[k] = min(best[k], timed(device, f))
        base = few / best[f"{b.steps} steps, one by one"]
        for k, (n, _) in rows.items():
            v = alike[k] if torch.is_tensor(alike[k]) else torch.cat(alike[k])
            speed, close = n / best[k], similarity(extract, x[:few], v[:few])
            print(f"  {k:36s} {speed:9.1f} images/s  {speed / base:7.2f} x one by one   similarity {close:.3f}")
    net50 = features.Penultimate(_classifier(d, device), d.size, device)
    one = timed(device, lambda: [net50(x[i : i + 1]) for i in range(few)]) / few
    many = min(timed(device, lambda: net50(x)) for _ in range(b.repeats)) / len(x)
    print(f"EchoSelect, features: {1 / many:.0f} images/s batched, {1 / one:.0f} one by one: {one / many:.1f} x")


def _classifier(d: readers.Data, device: torch.device) -> torch.nn.Module:
    import models

    return models.build("cnn", 10, d.channels, d.kind.mean, d.kind.std).to(device, memory_format=torch.channels_last)


if __name__ == "__main__":
    runs.command(main)
