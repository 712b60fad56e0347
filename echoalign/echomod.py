"""EchoMod: change the instance until it fits its noisy label, x'_i = G(x_i, y~_i), and keep what else it shows.

A generator has `edit(images, labels, seeds) -> images` (uint8 [n, H, W, C] in, uint8 [n, h, w, C] out; h, w may be
larger) and `about()`, a dict that names everything its output depends on. Here: SDEdit over any noise predictor, the
exact denoiser of a finite set of images, and the edit by a pipeline of diffusers. The file stands alone.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

STEPS = 1000  # of the forward process


class NoClass(ValueError):
    """There is no clean image of a class that is edited towards."""


class Generator(Protocol):
    def edit(self, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor: ...

    def about(self) -> dict: ...


def alphas() -> Tensor:
    """Cumulative products of 1 - beta_t [1000] for betas that rise linearly from 1e-4 to 0.02, float64."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64), 0)


def image_seed(seed: int, index: int) -> int:
    """A 63-bit seed of one image: depends on the run's seed and the image's index alone, so neither batch size nor a
    resume changes its noise."""
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def noise_of(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """N(0, 1) [n, *shape], each row from a generator of its own, drawn on the CPU on every device."""
    generator = torch.Generator()
    return torch.stack([torch.randn(tuple(shape), generator=generator.manual_seed(s)) for s in seeds])


def to_signal(images: Tensor) -> Tensor:
    """uint8 [n, H, W, C] -> float [n, C, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(signal: Tensor) -> Tensor:
    """float [n, C, H, W] in [-1, 1], clipped -> uint8 [n, H, W, C]."""
    return ((signal.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def timesteps(strength: float, steps: int) -> list[int]:
    """At most `steps` descending steps from round(strength T) - 1 to 0 (one step: the first); none for strength 0."""
    start = round(strength * STEPS) - 1
    if start < 0:
        return []
    if steps == 1:
        return [start]
    return sorted({round(t) for t in np.linspace(0, start, min(steps, start + 1))}, reverse=True)


def sdedit(
    predict: Callable[[Tensor, int, float], Tensor],
    x0: Tensor,
    noise: Tensor,
    strength: float,
    steps: int,
    sampler: str = "ddim",
    clip: bool = True,
) -> Tensor:
    """Noise x0 (in [-1, 1]) to step round(strength T) and denoise it again, deterministically from there.

    predict(x_t, t, done) -> eps, with `done` the share of steps already made. sampler: ddim (eta 0) or dpm
    (DPM-Solver++ 2M of diffusers). clip: keep the predicted x0 in [-1, 1], which a trained network needs.
    """
    ts = timesteps(strength, steps)
    if not ts:
        return x0
    a = alphas().to(x0.device)
    x = a[ts[0]].sqrt().float() * x0 + (1 - a[ts[0]]).sqrt().float() * noise
    if sampler == "dpm":
        from diffusers import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler(STEPS, 1e-4, 0.02, "linear", lower_order_final=True)
        scheduler.set_timesteps(timesteps=ts, device=x0.device)
        for k, t in enumerate(ts):
            e = predict(x, t, k / len(ts))
            if clip:  # the solver takes eps; a clipped x0 is told to it as the eps that belongs to it
                e = _eps(x, _x0(x, e, a[t]).clamp(-1, 1), a[t])
            x = scheduler.step(e, torch.tensor(t), x).prev_sample
        return x
    for k, t in enumerate(ts):
        e = predict(x, t, k / len(ts))
        clean = _x0(x, e, a[t])
        if clip:
            clean = clean.clamp(-1, 1)
            e = _eps(x, clean, a[t])
        nxt = a[ts[k + 1]] if k + 1 < len(ts) else torch.ones((), dtype=a.dtype, device=a.device)
        x = nxt.sqrt().float() * clean + (1 - nxt).sqrt().float() * e
    return x


def _x0(x: Tensor, e: Tensor, a: Tensor) -> Tensor:
    return (x - (1 - a).sqrt().float() * e) / a.sqrt().float()


def _eps(x: Tensor, x0: Tensor, a: Tensor) -> Tensor:
    return (x - a.sqrt().float() * x0) / (1 - a).sqrt().float()


class ExactDenoiser:
    """SDEdit with the optimal denoiser of the images of the wanted class: nothing is trained.

    D(x_t, t, y) = sum_j w_j b_j, w = softmax_j(-|x_t - sqrt(abar_t) b_j|^2 / (2 (1 - abar_t))), over the clean images
    b_j of class y in [-1, 1]. Control is the identity: structure is kept through the start of the walk alone.
    """

    def __init__(self, images: Tensor, labels: Tensor, strength: float, steps: int, sampler: str = "ddim"):
        if not len(images):
            raise NoClass("the exact denoiser needs clean images")
        self.bank = {int(k): to_signal(images[labels == k]).flatten(1) for k in labels.unique()}
        self.strength, self.steps, self.sampler = strength, steps, sampler
        digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        self._about = {"generator": "exact", "strength": strength, "steps": steps, "sampler": sampler, "bank": digest}

    def about(self) -> dict:
        return dict(self._about)

    @torch.no_grad()
    def edit(self, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        lacking = sorted({int(k) for k in labels.unique()} - self.bank.keys())
        if lacking:
            raise NoClass(f"no clean image of class {lacking[0]} to edit towards")
        if not timesteps(self.strength, self.steps):
            return images.clone()
        x0 = to_signal(images)
        noise, a = noise_of(seeds, x0.shape[1:]).to(x0.device), alphas().tolist()
        groups = [(torch.nonzero(labels == k)[:, 0], self.bank[int(k)].to(x0.device)) for k in labels.unique()]

        def predict(x: Tensor, t: int, done: float) -> Tensor:
            clean, root, var = torch.empty_like(x), a[t] ** 0.5, 1 - a[t]
            for mine, bank in groups:
                flat = x[mine].flatten(1)
                # |x - root b|^2 without x^2, which the softmax takes out again
                far = root**2 * (bank**2).sum(1) - 2 * root * flat @ bank.T
                clean[mine] = (torch.softmax(-far / (2 * var), 1) @ bank).view(len(mine), *x.shape[1:])
            return (x - root * clean) / var**0.5

        return to_images(sdedit(predict, x0, noise, self.strength, self.steps, self.sampler, clip=False))


def edit(
    pipe,
    images: Tensor,
    labels: Tensor,
    *,
    names: Sequence[str],
    prompt: str = "a photo of a {name}",
    control: Callable[[Image.Image], Image.Image] | None = None,
    seed: int = 0,
    batch: int = 16,
    **knobs,
) -> Tensor:
    """x'_i = G(x_i, y~_i) with an image-to-image pipeline of diffusers, yours: images uint8 [n, H, W, C] in the size
    the pipeline takes, labels int [n] -> uint8 [n, h, w, 3].

    names: a word a class for the prompt; control: picture -> what its ControlNet is held to, where the pipeline has
    one; knobs go to the pipeline as they are (`strength`, `guidance_scale`, `num_inference_steps`). Each image has a
    generator of its own from (seed, its index), so the batch changes nothing but rounding. ValueError where the parts
    do not fit.
    """
    held = getattr(pipe, "controlnet", None) is not None
    if held != (control is not None):
        raise ValueError("edit takes control for a pipeline with a ControlNet, and for no other")
    if images.dtype != torch.uint8 or images.dim() != 4 or labels.shape != images.shape[:1]:
        raise ValueError("edit takes images uint8 [n, H, W, C] and labels [n]")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        raise ValueError(f"labels must lie in 0..{len(names) - 1}, a name each")
    out = []
    for part in chunks(range(len(images)), batch):
        found = [_picture(v).convert("RGB") for v in images[part.start : part.stop].numpy()]
        told = {"image": found, **({"control_image": [control(p) for p in found]} if held else {})}
        words = [prompt.format(name=names[k]) for k in labels[part.start : part.stop].tolist()]
        draws = [torch.Generator().manual_seed(image_seed(seed, i)) for i in part]
        made = pipe(prompt=words, generator=draws, output_type="np", **told, **knobs).images
        out.append(torch.from_numpy(np.rint(np.nan_to_num(made) * 255).astype(np.uint8)))
    return torch.cat(out)


def chunks(part: range, n: int) -> list[range]:
    return [part[i : i + n] for i in range(0, len(part), n)]


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 [n, h, w, C] -> [n, size, size, C] with PIL's bicubic filter, its default for these images."""
    if images.shape[1] == images.shape[2] == size:
        return images
    out = []
    for image in images.numpy():
        picture = _picture(image)
        small = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
        out.append(small[..., None] if image.shape[-1] == 1 else small)
    return torch.from_numpy(np.stack(out))
