"""DIVA, the nearest peer: a CLIP image tower trained on by the denoising loss of a frozen Stable Diffusion alone.

    python diva.py --preset tiny --steps 2                                   # random parts: to see that it runs
    python diva.py --clip ViT-L-14 --dataset files --files shards/*.tar      # 4,600 steps, then MMVP-VLM if it is there

Condition: the embedding of the empty prompt + Linear(tokens), 77 of them: the class token and 76 patch tokens drawn
with replacement, after the last norm and CLIP's projection. Loss: mean |eps - U(z_t, t, condition)|^2 of the picture.
Tower and linear map train, by SGD with momentum; every picture of a batch is used for two steps.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lab import runs
from lab.runs import Number, UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import sources
from diffusion import Latents, load_diffusion
from digits import scenes
from documents import readers
from evaluation import benchmarks, parsers
from evaluation.clip import load_clip, score_vlm
from model import Deem
from presets import PRESETS
from streams import torch_seed
from vision.encoder import MEAN, STD
from vision.grids import resized
from vision.views import to_tensor


@dataclass
class DivaSettings:
    preset: Literal["paper", "tiny"] = "paper"
    """paper: CLIP and Stable Diffusion by name; tiny: small random ones on digit scenes."""
    clip: str = "ViT-L-14"
    """open_clip model whose image tower is trained (DIVA: OpenAI ViT-L/14 at 224 and 336, MetaCLIP, SigLIP, DFN)."""
    clip_weights: str = "openai"
    """open_clip tag or file of its weights."""
    diffusion: str = "stabilityai/stable-diffusion-2-1-base"
    """Folder or hub id of the Stable Diffusion."""
    dataset: Literal["paper", "files"] = "paper"
    """paper: tar shards below <data-dir>/deem/cc3m; files: --files."""
    files: tuple[str, ...] = ()
    """Tar shards of pictures with captions; the captions are not read."""
    steps: int = 4600
    """Optimizer steps (DIVA: 4600)."""
    batch: int = 16
    """Pictures of a micro-batch (DIVA: 16 on each of 8 GPUs)."""
    accum: int = 40
    """Micro-batches a step (DIVA: 5 on each of 8 GPUs)."""
    inner: int = 2
    """Steps on the same pictures (DIVA: 2)."""
    lr: Number = 1e-4
    """SGD rate, momentum 0.9, no weight decay (DIVA)."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; users could not repeat the published gains with 66, 10, 1037, 42."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: autocast (DIVA)."""
    checkpoint_steps: int = 200
    """Steps between checkpoints; 0: none."""
    table: str = "own"
    """Table of RESULTS.md the records belong to."""
    scale: Literal["smoke", "demo", "paper"] = "demo"
    """Goes into the record."""
    out: str = ""
    """Run folder; default runs/<scale>/<table>-diva-<clip>."""
    data_dir: str = ""
    """Folder of data and weights; default $REPRO_DATA, else ./data."""
    download: bool = False
    """Fetch weights from the hub."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def tower_tokens(visual: nn.Module, images: Tensor) -> Tensor:
    """(B, 1 + patches, projection width) of an open_clip ViT: all tokens after its last norm and projection."""
    n = images.shape[-1] // visual.patch_size[0]
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    table = visual.positional_embedding
    places = torch.cat([table[:1], resized(table[1:], n, n)])
    x = visual.ln_pre(torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + places)
    return visual.ln_post(visual.transformer(x)) @ visual.proj


class Diva(nn.Module):
    """CLIP image tower, the linear map, and the frozen diffusion model."""

    def __init__(self, visual, unet, latents, scheduler, empty: Tensor):
        super().__init__()
        if not hasattr(visual, "transformer"):
            raise UserError("DIVA trains a plain ViT of open_clip; name one by --clip, e.g. ViT-L-14")
        self.visual, self.unet, self.latents = visual, unet.requires_grad_(False), latents
        self.latents.requires_grad_(False)
        self.linear = nn.Linear(visual.proj.shape[1], empty.shape[2])
        self.register_buffer("empty", empty)
        self.register_buffer("abar", scheduler.alphas_cumprod.float())
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def condition(self, images: Tensor, g: torch.Generator) -> Tensor:
        """(B, n, width): the class token and n - 1 patch tokens drawn with replacement, over the empty prompt."""
        tokens = tower_tokens(self.visual, (images - self.mean) / self.std)
        n = self.empty.shape[1]
        drawn = torch.randint(tokens.shape[1] - 1, (len(images), n - 1), generator=g, device=images.device) + 1
        index = F.pad(drawn, (1, 0))[..., None].expand(-1, -1, tokens.shape[2])
        return self.empty + self.linear(tokens.gather(1, index))

    def forward(self, images: Tensor, targets: Tensor, seed: int) -> Tensor:
        """The denoising loss; images and targets are two sizes of the same pictures, in [0, 1]."""
        g = torch.Generator(images.device).manual_seed(seed)
        c = self.condition(images, g)
        z0 = self.latents.encode(targets, g)
        t = torch.randint(len(self.abar), (len(z0),), generator=g, device=z0.device)
        noise = torch.randn(z0.shape, generator=g, device=z0.device)
        a = self.abar[t].view(-1, 1, 1, 1)
        dtype = next(self.unet.parameters()).dtype
        z = a.sqrt() * z0 + (1 - a).sqrt() * noise
        return F.mse_loss(self.unet(z.to(dtype), t, encoder_hidden_states=c.to(dtype)).sample.float(), noise)


def build(s: DivaSettings, seed: int, device) -> tuple[Diva, nn.Module | None, int, int]:
    """(model, whole CLIP or None, side of the tower's view, side of the decoder's)."""
    torch.manual_seed(torch_seed(seed, "weights"))
    if s.preset == "tiny":
        from open_clip.transformer import VisionTransformer

        den = Deem(PRESETS["tiny"]).denoiser
        visual = VisionTransformer(56, 14, 32, 2, 2, 2.0, output_dim=16)
        return Diva(visual, den.unet, den.latents, den.scheduler, torch.zeros(1, 8, 32)).to(device), None, 56, 64
    folder = runs.data_dir(s.data_dir) / "weights"
    dtype = torch.bfloat16 if s.precision == "bf16" else torch.float32
    unet, vae, scheduler, empty = load_diffusion(s.diffusion, folder, s.download, dtype)
    clip = load_clip(s.clip, s.clip_weights, device, s.download)
    return Diva(clip.model.visual.float(), unet, Latents(vae), scheduler, empty).to(device), clip, clip.size, 512


def documents(s: DivaSettings, seed: int):
    if s.preset == "tiny":
        return scenes.SceneReader(seed, 2, n=50)
    if s.dataset == "files":
        if not s.files:
            raise UserError("--dataset files needs --files")
        shards = [Path(f).expanduser() for f in s.files]
    else:
        place = runs.data_dir(s.data_dir) / "deem" / "cc3m"
        shards = sources.shards(place, "*.tar", "tar shards of CC3M by img2dataset")
    return readers.captions_webdataset(shards, seed=seed, regroup=0.0)


def train(s: DivaSettings, seed: int, run: runs.Run, device) -> None:
    clock = time.perf_counter()
    model, clip, side, decoder = build(s, seed, device)
    before = vlm(s, clip) if clip is not None else {}
    source = documents(s, seed)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), s.lr, momentum=0.9)
    path, step = Path(s.out) / "checkpoint" / f"seed{seed}.safetensors", 0
    if path.is_file():
        tensors, meta = runs.read_tensors(path)
        step = int(meta["step"])
        source.restore(json.loads(meta["reader"]))
        with torch.no_grad():
            for k, p in trained.items():
                p.copy_(tensors[f"model.{k}"])
                optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(tensors[f"momentum.{k}"])
    run.log(seed, [], keep_to=step)
    on = s.precision == "bf16" and s.preset == "paper"
    model.train()
    for at in tqdm(range(step, s.steps, s.inner), f"DIVA seed {seed}", disable=None):
        views = []
        for _ in range(s.accum):
            found = [next(p for p in next(source).parts if hasattr(p, "load")).load() for _ in range(s.batch)]
            views.append([torch.stack([to_tensor(p, n) for p in found]).to(device) for n in (side, decoder)])
        for inner in range(min(s.inner, s.steps - at)):
            total = 0.0
            for k, (images, targets) in enumerate(views):
                with torch.autocast(device.type, torch.bfloat16, enabled=on):
                    loss = model(images, targets, torch_seed(seed, "noise", at + inner, k)) / s.accum
                loss.backward()
                total = total + loss.detach()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if not torch.isfinite(total):
            raise UserError(f"DIVA seed {seed}: the loss is not a finite number in step {at}; lower --lr")
        done = min(at + s.inner, s.steps)
        run.log(seed, [{"step": done, "loss": float(total)}])
        if s.checkpoint_steps and done % s.checkpoint_steps < s.inner and done < s.steps:
            tensors = {f"model.{k}": p for k, p in trained.items()}
            tensors |= {f"momentum.{k}": optimizer.state[p]["momentum_buffer"] for k, p in trained.items()}
            runs.write_tensors(path, tensors, {"step": str(done), "reader": json.dumps(source.state())})
    runs.write_tensors(Path(s.out) / f"seed{seed}" / "model.safetensors", trained)
    metrics = {"loss": float(total), "steps": s.steps}
    model.eval()
    if clip is not None:
        after = vlm(s, clip)
        metrics |= {**after, **({"gain": after["accuracy"] - before["accuracy"]} if after else {})}
    pixels = 336 if "336" in s.clip else 224
    label = "tiny + DIVA" if s.preset == "tiny" else f"OpenAI {s.clip.removesuffix('-336')} + DIVA, {pixels} px"
    where = {"table": s.table, "dataset": "MMVP-VLM", "setting": "encoder only", "method": label, "scale": s.scale}
    data = {"name": "CC3M" if s.preset == "paper" else "digit scenes", "variant": "own files", "sha256": "", "n": 0}
    run.record(seed, seconds=time.perf_counter() - clock, data=data, metrics=metrics, where=where, device=device)
    path.unlink(missing_ok=True)


def vlm(s: DivaSettings, clip) -> dict[str, float]:
    """MMVP-VLM of the CLIP whose tower is trained, if the benchmark is there."""
    root = runs.data_dir(s.data_dir) / "deem"
    if not (root / "mmvp_vlm").is_dir():
        print(f"no {root / 'mmvp_vlm'}: MMVP-VLM is not measured")
        return {}
    found = score_vlm(clip, benchmarks.read_mmvp_vlm(root / "mmvp_vlm"), root)
    return parsers.score_pairs(found)


def main() -> None:
    s = runs.parse(DivaSettings, __doc__)
    for name in ("steps", "batch", "accum", "inner"):
        if getattr(s, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(s, name)}")
    if s.lr <= 0:
        raise UserError(f"--lr must be above 0, not {s.lr:g}")
    if s.preset == "tiny":
        s = replace(s, batch=2, accum=1)
    s.out = s.out or f"runs/{s.scale}/{s.table}-diva-{'tiny' if s.preset == 'tiny' else s.clip}"
    device = runs.device(s.device)
    run = runs.Run(Path(s.out), s, ("out", "data_dir", "device", "download", "checkpoint_steps"))
    if run.complete:
        print(f"{s.out} is complete; delete it to run again")
        return
    for seed in s.seeds:
        if not (run.folder(seed) / "record.json").is_file():
            train(s, seed, run, device)
    for r in run.finish():
        print(f"{r['method']}, seed {r['seed']}: loss {r['metrics']['loss']:.4g} ({r['seconds']:.0f} s)")


if __name__ == "__main__":
    runs.command(main)
