"""Speed: a training step with and without the feedback (CSR), and against a plain implementation, in one process.

    python bench.py                    # the digit model on the CPU
    python bench.py --preset tiny      # the real classes at tiny size: AutoencoderKL, ConvNeXt, checkpointed Llama
    python bench.py --preset deem --device cuda --download

The plain implementation is the usual one: the encoder runs once for the language model and once for CSR, the target is
encoded once for CSR and once for NIP, and the U-Net is called once for each; what is frozen collects no gradients in
either. First both compute the same losses and gradients from the same draws, then each is timed in turn and the fastest
of each counts.
The first ratio is the paper's 9.25 / 8.11 seconds.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lab import runs
from lab.runs import UserError

import torch
from torch import Tensor, nn

from build import world_of
from documents.sequences import Batch
from model import Deem
from presets import PRESETS
from scenes.options import SceneSettings
from scenes.world import SceneReader
from settings import Settings
from streams import torch_seed
from trainer import Feeder


@dataclass
class BenchSettings:
    preset: Literal[tuple(PRESETS)] = "digits"
    """Parts, as in train.py; weights are random or the preset's own."""
    batch: int = 0
    """Rows a step; 0: the preset's."""
    repeats: int = 10
    """Timed steps of each, in turn."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of weights, scenes and draws, one after the other; a record each."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of both."""
    smoke: bool = False
    """One repeat, to see that everything runs."""
    out: str = ""
    """Write a record there; default: only print."""
    table: str = "own"
    """Table of the record."""
    scale: Literal["smoke", "demo", "real", "paper"] = "demo"
    """Goes into the record."""
    data_dir: str = ""
    """Folder of data and weights; default $REPRO_DATA, else ./data."""
    download: bool = False
    """Fetch weights from the hub."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def plain(m: Deem, b: Batch, seed: int) -> dict[str, Tensor]:
    """The losses of Deem.losses, term by term: two encodings of the images, two of the targets, two U-Net calls."""
    w, out = m.loss, {}
    seen = m.encode_images(b.images, b.masks)
    h = m.hidden(b, seen)
    logits = m.llm.lm_head(h).float()
    labels = b.labels[:, 1:].flatten().to(logits.device)
    out["ntp"] = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=-100)
    m.loss = replace(w, ntp=0.0, nip=0.0)
    again = m.encode_images(b.images, b.masks)
    out |= m.denoising(b, again, None, seed) if w.csr > 0 else {}
    m.loss = replace(w, ntp=0.0, csr=0.0)
    out |= m.denoising(b, seen, h, seed)
    m.loss = w
    out["total"] = sum(getattr(w, k) * v for k, v in out.items())
    return out


def timed(device: torch.device, function) -> float:
    """Seconds: by the clock on a GPU; on a CPU those of this process, which other work on the machine changes less."""
    if device.type != "cuda":
        clock = time.process_time()
        function()
        return time.process_time() - clock
    torch.cuda.synchronize(device)
    clock = time.perf_counter()
    function()
    torch.cuda.synchronize(device)
    return time.perf_counter() - clock


def step(m: Deem, b: Batch, seed: int, function, optimizer=None, precision: str = "fp32") -> dict[str, Tensor]:
    torch.manual_seed(seed)
    with torch.autocast(b.ids.device.type, torch.bfloat16, enabled=precision == "bf16"):
        out = function(b, seed)
    out["total"].backward()
    if optimizer:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return out


def same(m: Deem, b: Batch) -> float:
    """Largest relative difference of a trained weight's gradient between the two, in evaluation mode (no dropout)."""
    m.eval()
    found = []
    for function in (m.losses, lambda x, seed: plain(m, x, seed)):
        m.zero_grad(set_to_none=True)
        step(m, b, 0, function)
        found.append({k: p.grad.double() for k, p in m.named_parameters() if p.grad is not None and p.requires_grad})
    m.zero_grad(set_to_none=True)
    if {*found[0]} != {*found[1]}:
        raise UserError("the two implementations give gradients to different weights; no timing is printed")
    whole = torch.stack([g.norm() for g in found[1].values()]).norm()
    return float(max((found[0][k] - g).norm() / whole for k, g in found[1].items()))


def measured(b_: BenchSettings, seed: int, device: torch.device) -> tuple[dict[str, float], int]:
    """(ratios and milliseconds, images of the batch); UserError where the two differ in what they compute."""
    on = "photos" if b_.preset == "photos" else "digits"
    s = Settings(preset=b_.preset, batch=b_.batch, seeds=b_.seeds, dataset=on, scenes=SceneSettings(200))
    s.data_dir = b_.data_dir
    s.resolve()
    s.prompt_form = "plain"
    torch.manual_seed(torch_seed(seed, "weights"))
    m = Deem(s.parts(), folder=runs.data_dir(b_.data_dir) / "weights", download=b_.download, loss=s.loss()).to(device)
    m.freeze(1, "deem")
    s.max_tokens = 0
    b = Feeder(s, m, SceneReader(world_of(s), seed, 1, n=200), seed, 0).batch(0, 0).to(device)
    gap = same(m, b)
    print(f"same losses and gradients: largest difference of a gradient {gap:.1e} of all gradients' length")
    if gap > 1e-3:
        raise UserError("the plain implementation computes something else; no timing is printed")
    with_, without = m.loss, replace(m.loss, csr=0.0)
    chosen = [p for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, 1e-9, fused=True)

    def ours(loss) -> None:
        m.loss = loss
        step(m, b, 0, m.losses, optimizer, b_.precision)

    def theirs(loss) -> None:
        m.loss = loss
        step(m, b, 0, lambda x, seed: plain(m, x, seed), optimizer, b_.precision)

    rows = {"with CSR": lambda: ours(with_), "without CSR": lambda: ours(without)}
    rows |= {"plain, with CSR": lambda: theirs(with_)}
    m.train()
    times: dict[str, list[float]] = {k: [] for k in rows}
    for k in range((1 if b_.smoke else b_.repeats) + 1):  # in turn, so that a slow moment meets all of them
        for name, function in rows.items():
            seconds = timed(device, function)
            if k:
                times[name].append(seconds)
    best = {k: min(v) for k, v in times.items()}
    print(f"{b_.preset}, {s.batch} rows with {len(b.row)} images, {device}, {torch.get_num_threads()} threads")
    for name, seconds in best.items():
        print(f"{name:18s} {1000 * seconds:8.1f} ms a step")
    ratio, against = best["with CSR"] / best["without CSR"], best["plain, with CSR"] / best["with CSR"]
    print(f"a step with CSR takes {ratio:.2f} times one without; the plain one takes {against:.2f} times ours")
    metrics = {"step_ratio": ratio, "plain_ratio": against, "gradient_gap": gap}
    return metrics | {f"ms {k}": 1000 * v for k, v in best.items()}, len(b.row)


def main() -> None:
    b_ = runs.parse(BenchSettings, __doc__)
    if b_.repeats < 1 or b_.batch < 0:
        raise UserError("--repeats must be at least 1, --batch at least 0")
    device = runs.device(b_.device)
    run = runs.Run(Path(b_.out), b_) if b_.out else None
    if run and run.complete:
        return print(f"{run.out} is complete; delete it to time again")
    photos = b_.preset == "photos"
    on = {"name": "photo scenes" if photos else "digit scenes", "variant": "cifar10" if photos else "wheel"}
    where = {"table": b_.table, "dataset": on["name"], "setting": "stage 1", "method": "DEEM", "scale": b_.scale}
    for seed in b_.seeds:
        clock = time.perf_counter()
        metrics, n = measured(b_, seed, device)
        if run:
            data = {**on, "sha256": "", "n": n}
            spent = time.perf_counter() - clock
            run.record(seed, seconds=spent, data=data, metrics=metrics, where=where, device=device)
    if run:
        run.finish()


if __name__ == "__main__":
    runs.command(main)
