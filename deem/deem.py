"""DEEM in one file: image tokens have to guide a frozen diffusion model to their own image (CSR, section 3, Eq. 5).

    z_t  = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps,        t' = round(s (t - 500) + 500)
    L_CSR = mean |target - U(z_t', t', W_i e)|^2 M (h w / sum M),  target eps or v = sqrt(abar) eps - sqrt(1 - abar) z_0

e are the tokens that the language model reads of an image x, W_i one linear map to the width of the denoiser's text
condition, z_0 the latents of the same x, M a region (all of the image as a rule). The error flows through the frozen
denoiser into e, so into resampler and encoder: what the tokens do not tell cannot be denoised. At inference nothing is
added. The total is L_NTP + 5 L_NIP + 5 L_CSR in stage 1, L_NTP + 5 L_CSR in stage 2, L_NTP in stage 3; NTP: the next
token, NIP: the next image from the text before it.

Who trains (T; rates in recipe.py), DEEM | its baseline DEEM* | the same training without CSR, and the later stages:

    part                                      | stage 1          | stage 2 | stage 3
                                              | DEEM DEEM* clean |         |
    image encoder (trunk)                     |  T    -     T    |    -    |   -
    adapters, resampler, W_t                  |  T    T     T    |    T    |   T
    W_i, the map of CSR                       |  T    -     -    |    T    |   -
    language model, but its output head       |  -    -     -    |    T    |   T
    image attention in it, gates, new tokens  |  T    T     T    |    T    |   T
    U-Net                                     |  -    T     -    |    -    | not loaded
    attention beside the U-Net, NIP's reader  |  T    T     T    |    -    | not loaded

On a model of one's own (here a denoiser of four channels that is told by one token):

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> abar = torch.linspace(0.9999, 0.0047, 1000)           # a DDPM scheduler's alphas_cumprod
    >>> encoder, w_i = torch.nn.Linear(12, 6), torch.nn.Linear(6, 8)
    >>> unet = torch.nn.Conv2d(4 + 8, 4, 3, padding=1).requires_grad_(False)        # frozen, and not under no_grad
    >>> def denoiser(z, t, condition):
    ...     return unet(torch.cat([z, condition.mean(1)[:, :, None, None].expand(-1, -1, *z.shape[2:])], 1))
    >>> latents, features = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 12)
    >>> loss = csr_loss(denoiser, w_i(encoder(features)), latents, abar)
    >>> loss.backward()
    >>> bool(encoder.weight.grad.abs().sum() > 0), unet.weight.grad
    (True, None)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def squeezed_steps(t: Tensor, factor: float, middle: float = 500.0) -> Tensor:
    """t' = round(factor (t - 500) + 500): with 0.6 (released code), t in 0..999 becomes t' in 200..799; 1 (paper)
    leaves t as it is."""
    return t if factor == 1 else (factor * (t - middle) + middle).round().long()


def noised(latents: Tensor, noise: Tensor, t: Tensor, abar: Tensor, prediction: str = "epsilon"):
    """(z_t, target), both like `latents` (B, C, h, w): t (B,) are indices into abar (steps,); the target is the noise,
    or with `v_prediction` v = sqrt(abar_t) noise - sqrt(1 - abar_t) z_0. ValueError for another prediction."""
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction {prediction} is unknown; use epsilon or v_prediction")
    a = abar[t].view(-1, 1, 1, 1)
    target = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
    return a.sqrt() * latents + (1 - a).sqrt() * noise, target


def csr_error(found: Tensor, target: Tensor, masks: Tensor | None = None) -> Tensor:
    """L_CSR of predictions (B, C, h, w), in float32: mean over images, channels and places of |target - found|^2 M (h w
    / (sum M + 1e-8)). masks (B, H, W): M is a mask resized bilinearly, then > 0; without masks it is 1."""
    error = (found.float() - target.float()) ** 2
    if masks is not None:
        m = F.interpolate(masks[:, None].float(), error.shape[-2:], mode="bilinear", align_corners=False) > 0
        error = error * m * (m[0].numel() / (m.sum((1, 2, 3), keepdim=True) + 1e-8))
    return error.mean()


def csr_loss(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
    condition: Tensor,
    latents: Tensor,
    abar: Tensor,
    *,
    prediction: str = "epsilon",
    masks: Tensor | None = None,
    squeeze: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """L_CSR, a scalar, of images whose tokens are told to a denoiser.

    denoiser: (z_t (B, C, h, w), t (B,) int64, condition) -> prediction like z_t; with diffusers `lambda z, t, c:
    unet(z, t, encoder_hidden_states=c).sample`. condition (B, n, width): W_i e, with a gradient; latents (B, C, h, w):
    z_0 of the same images, scaled as the denoiser knows them; abar (steps,): alphas_cumprod of its schedule;
    prediction: what it predicts; masks (B, H, W): regions; squeeze in (0, 1], 1 is the paper's; generator: of the
    draws of t and noise, on the latents' device. ValueError where shapes do not belong together."""
    if len(condition) != len(latents) or latents.ndim != 4:
        raise ValueError(f"condition {tuple(condition.shape)} does not go with latents {tuple(latents.shape)}")
    where = {"generator": generator, "device": latents.device}
    t = squeezed_steps(torch.randint(len(abar), (len(latents),), **where), squeeze)
    z, target = noised(latents, torch.randn(latents.shape, **where), t, abar, prediction)
    found = denoiser(z, t, condition)
    if found.shape != latents.shape:
        raise ValueError(f"the denoiser gives {tuple(found.shape)} for latents {tuple(latents.shape)}")
    return csr_error(found, target, masks)
