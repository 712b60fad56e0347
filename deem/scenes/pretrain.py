"""What the scenes have instead of downloaded weights and a long stage 1: a language model that has read texts, an
encoder that has seen captions (as CLIP has), a denoiser that has seen complete descriptions, and a resampler whose
tokens the language model already reads. Made once a seed and shared by its runs.
"""

import fcntl
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

from lab import runs
from lab.progress import progress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recipe
from documents import sequences
from model import Deem
from scenes.world import CELLS, KINDS, SHAPES, SceneReader, Scenes, World
from streams import stream, torch_seed
from trainer import Feeder

BATCH = 64
ALIGNED = {"eyes"} | recipe.SIGHT  # what the caption loss of stage 1 trains in every variant


def learned(model: Deem, name: str) -> bool:
    """Whether a parameter is part of the shared base; what only the diffusion losses train is not, nor a language model
    that comes from somewhere."""
    own = {"trunk", "unet", "null"} | (set() if isinstance(model.p.llm, str) else recipe.SPEECH)
    return recipe.part_of(name) in own | ALIGNED


def base(model: Deem, world: World, s, seed: int) -> None:
    """Load the pretrained parts of a seed (--scenes.pretrained, else the run's) into the model; runs that start at once
    share one pretraining: the others wait for it."""
    seed = seed if s.scenes.pretrained < 0 else s.scenes.pretrained
    about = {k: getattr(s.scenes, k) for k in ("text", "encoder", "denoiser", "align", "count")}
    about |= {"preset": s.preset, "seed": seed, "world": world.digest, "shapes": shapes(model)}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:10]
    folder = Path(s.base or Path(s.out).parent / "base") / f"{s.preset}-seed{seed}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the process that pretrains {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob(".*.tmp"):  # of a start that was killed while it wrote: the lock is ours
            left.unlink()
        if not path.is_file():
            runs.write_tensors(path, pretrain(model, world, s, seed), {"about": json.dumps(about)})
    tensors, _ = runs.read_tensors(path)
    own = {k: p.shape for k, p in model.named_parameters() if learned(model, k)}
    wrong = {k for k, v in own.items() if k not in tensors or tensors[k].shape != v or not tensors[k].isfinite().all()}
    if wrong:
        raise runs.UserError(f"{path}: {min(wrong)} is missing, of another shape or not finite; delete the file")
    model.load_state_dict({k: v.to(model.device) for k, v in tensors.items()}, strict=False)


def shapes(model: Deem) -> str:
    text = json.dumps([(k, list(p.shape)) for k, p in model.named_parameters() if learned(model, k)])
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def pretrain(model: Deem, world: World, s, seed: int) -> dict[str, Tensor]:
    """-> weights of the learned parts."""
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(torch_seed(seed, "pretraining"))
        if s.scenes.text:
            text(model, world, s.scenes.text, seed)
        train = world.make(s.scenes.count, stream(seed, "scenes"), world.train)
        if s.scenes.encoder:
            captions(model, s.scenes.encoder, train, seed)
        denoise(model, s.scenes.denoiser, train, seed)
        align(model, world, s, seed)
    model.zero_grad(set_to_none=True)  # of weights that were in a graph and not in the optimizer
    return {k: p.detach() for k, p in model.named_parameters() if learned(model, k)}


def fit(parameters: list, steps: int, lr: float, loss: Callable[[int], Tensor], title: str) -> None:
    """AdamW with a warm-up of 20 steps and a cosine; `loss(step)` draws its own batch."""
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    bad = torch.zeros((), device=parameters[0].device)
    for step in progress(range(steps), title, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        value = loss(step)
        bad += 0 * value.detach()
        if ((step + 1) % 20 == 0 or step + 1 == steps) and not torch.isfinite(bad):  # the host waits here alone
            raise runs.UserError(f"{title}: the loss is not a finite number in a step up to {step}")
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def text(model: Deem, world: World, steps: int, seed: int) -> None:
    """The language model on descriptions and questions without pictures."""
    own = [p for k, p in model.named_parameters() if recipe.part_of(k) in recipe.SPEECH]

    def loss(step: int) -> Tensor:
        rng = stream(seed, "text", step)
        rows = [sequences.encode(world.speech(rng), model.tok, 0) for _ in range(BATCH)]
        b, _ = sequences.collate(rows, model.tok)
        b = b.to(model.device)
        return model.ntp(model.hidden(b, None), b.labels)

    fit(own, steps, 2e-3, loss, f"text, seed {seed}")


def seen_at(part: Scenes, index, side: int, device) -> Tensor:
    """(n, 3, side, side) in [0, 1] on the device."""
    x = runs.sent(torch.from_numpy(part.images[index]), device)
    x = x[:, None].expand(-1, 3, -1, -1) if x.dim() == 3 else x.permute(0, 3, 1, 2)
    return x if x.shape[-1] == side else F.interpolate(x, (side, side), mode="bicubic").clamp(0, 1)


def images_of(model: Deem, part: Scenes, index) -> Tensor:
    """What the encoder sees of scenes."""
    return seen_at(part, index, model.p.resolution, model.device)


def views(model: Deem, part: Scenes, index) -> Tensor:
    """What the denoiser draws of scenes."""
    return seen_at(part, index, model.p.decoder_resolution, model.device)


def captions(model: Deem, steps: int, train: Scenes, seed: int) -> None:
    """The encoder against captions that name one thing: with ten texts, CLIP's image-to-text loss is cross-entropy over
    them. What the captions leave out is of no use to it."""
    trunk = model.encoder.trunk
    texts = nn.Linear(trunk.pooled, KINDS).to(model.device)
    named = torch.from_numpy(train.captioned()).to(model.device)

    def loss(step: int) -> Tensor:
        index = stream(seed, "captions", step).integers(len(train), size=BATCH)
        pooled = trunk((images_of(model, train, index) - model.encoder.mean) / model.encoder.std)[1]
        return F.cross_entropy(texts(pooled), named[runs.sent(torch.from_numpy(index), named.device)])

    fit([*trunk.parameters(), *texts.parameters()], steps, 2e-3, loss, f"encoder, seed {seed}")


class Descriptions(nn.Module):
    """The denoiser's text encoder: for each cell a token that tells the kind of thing or nothing and one that tells
    where it stands and how it looks; `empty` stands for no description. (B, 4), (B, 4, d) -> (B, n, width)"""

    def __init__(self, n: int, width: int):
        super().__init__()
        self.cells, self.rest = nn.Embedding(CELLS * (KINDS + 1), width), nn.Parameter(torch.randn(1, n, width) * 0.5)
        self.details = nn.Linear(2 + SHAPES, width)
        self.places = nn.Parameter(torch.randn(CELLS, width) * 0.5)

    def forward(self, cells: Tensor, details: Tensor) -> Tensor:
        at = torch.arange(CELLS, device=cells.device) * (KINDS + 1) + cells + 1
        told = torch.cat([self.cells(at), self.details(details) + self.places], 1)
        rest = self.rest.expand(len(cells), -1, -1)
        return torch.cat([told[:, : rest.shape[1]], rest[:, told.shape[1] :]], 1)

    def empty(self) -> Tensor:
        return self.rest


def denoise(model: Deem, steps: int, train: Scenes, seed: int) -> None:
    """U-Net and null condition on complete descriptions, a tenth of them dropped."""
    den = model.denoiser
    texts = Descriptions(den.null.shape[1], den.null.shape[2]).to(model.device)
    cells, details = (torch.from_numpy(a).to(model.device) for a in (train.cells, train.details))

    def loss(step: int) -> Tensor:
        index = stream(seed, "denoiser", step).integers(len(train), size=BATCH)
        z0 = den.latents.encode(views(model, train, index))
        t = torch.randint(den.steps, (BATCH,), device=z0.device)
        z, target = den.noised(z0, torch.randn_like(z0), t)
        at = runs.sent(torch.from_numpy(index), z0.device)
        dropped = torch.rand(BATCH, 1, 1, device=z0.device) < 0.1
        c = torch.where(dropped, texts.empty(), texts(cells[at], details[at]))
        return F.mse_loss(den(z, t, c), target)

    fit([*den.unet.parameters(), *texts.parameters()], steps, 2e-3, loss, f"denoiser, seed {seed}")
    with torch.no_grad():
        den.null.copy_(texts.empty())


def align(model: Deem, world: World, s, seed: int) -> None:
    """Resampler, W_t and the language model's image attention by L_NTP on stage 1's captions; all else is frozen. The
    tokens are read by the language model when a run begins, which would take most of a short stage 1."""
    reader = SceneReader(world, seed, 1, n=s.scenes.count)
    reader.at = 10**6  # no run reads so far
    feeder = Feeder(s, model, reader, seed, 0)
    model.requires_grad_(False)
    own = [p for k, p in model.named_parameters() if recipe.part_of(k) in ALIGNED]

    def loss(step: int) -> Tensor:
        b = feeder.batch(step, 0).to(model.device)
        return model.ntp(model.hidden(b, model.encode_images(b.images)), b.labels)

    fit(own, s.scenes.align, 1e-3, loss, f"alignment, seed {seed}")
    model.requires_grad_(True)
