"""Pixel-reweighted adversarial training (PART), Zhang, Liu, Zhou, Zhang, Liu, ICML 2024, arXiv 2406.00685.

Adversarial training gives every pixel the same budget eps. PART asks the current network where it looks (a class
activation map) and lowers the budget to eps_low where it does not:

    A, z                    activations [B, C, h, w] of the CAM layer and logits [B, K], network in eval mode
    c = argmax z            the network's own prediction, not the label
    G = dz_c/dA             gradient of the pre-softmax logit
    L                       map [B, h, w] made of A and G, below; scaled to [0, 1] image by image
    M = rule(resize(L))     mask, 1 = important, [B, 1, H, W] (one for all channels) or [B, 3, H, W] (`jet-rgb`)
    E = eps M + eps_low (1 - M)
    |delta| <= E and 0 <= x + delta <= 1

    gradcam     L = relu(sum_k a_k A^k),  a_k = mean_ij G^k_ij
    xgradcam    L = relu(sum_k a_k A^k),  a_k = sum_ij G^k_ij A^k_ij / sum_ij A^k_ij  (a channel with 0/0 is left out)
    layercam    L = relu(sum_k relu(G^k) A^k), elementwise
    cam         gradcam in closed form where A is averaged over h x w and followed by one linear layer W: G^k = W[c,
    k]/(h w)

Where the closed form applies G is the same at every position, hence xgradcam = gradcam, and no backward pass is made
for any of them. Samples do not meet in a network in eval mode, so a batch is treated in one pass.
"""

import functools
import math
import warnings
import weakref
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cam = Literal["gradcam", "xgradcam", "layercam", "cam"]
Rule = Literal["zscore", "jet-rgb", "topfrac"]


# ------------------------------------------------------------------------------------------------------------ the map


def wide(t: Tensor) -> Tensor:
    """t in float32, or in float64 if it is that already."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def gradient(net, x: Tensor, layer: int, closed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(A [B, C, h, w], G of the same shape or [B, C, 1, 1], predicted class [B]) of the activations after stage
    `layer`.

    `net` has `features(x, layer) -> A`, `rest(A, layer) -> logits` and `linear`; `closed` uses G = W[c]/(h w), which is
    exact when rest(A) is linear(mean of A). At least float32, nothing of the network's gradients is touched.
    """
    with torch.no_grad():
        a = net.features(x, layer)
        if closed:
            a, w, b = (wide(t) for t in (a, net.linear.weight, net.linear.bias))
            with torch.autocast(x.device.type, enabled=False):  # the features may be bf16, the argmax is of float32
                c = F.linear(a.mean((2, 3)).to(w.dtype), w, b).argmax(1)
            return a, (w[c] / (a.shape[2] * a.shape[3]))[:, :, None, None], c
    with torch.enable_grad():
        a = a.detach().requires_grad_(True)
        z = wide(net.rest(a, layer))
        c = z.argmax(1)
        (g,) = torch.autograd.grad(z.gather(1, c[:, None]).sum(), a)
    return wide(a.detach()), wide(g), c


def gradient_at(net: nn.Module, x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The same for any network and one of its modules: activations [B, C, h, w], or tokens [B, n, C] of a transformer.
    Of n tokens the last h w = floor(sqrt(n))^2 are the picture's grid; those before them (class token, registers) have
    no place in it and are left out."""
    kept: list[Tensor] = []

    def keep(module, given, out):
        if not isinstance(out, Tensor) or out.ndim not in (3, 4):
            raise TypeError(
                "the layer of a map gives activations [B, C, h, w] or tokens [B, n, C], not "
                f"{list(out.shape) if isinstance(out, Tensor) else type(out).__name__}; choose another layer"
            )
        kept.append(out.detach().requires_grad_(True))
        return kept[-1]

    handle = layer.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            z = wide(net(x))
            if len(kept) != 1:
                raise ValueError(f"the layer of a map ran {len(kept)} times in the network; choose one that runs once")
            c = z.argmax(1)
            (g,) = torch.autograd.grad(z.gather(1, c[:, None]).sum(), kept[0])
    finally:
        handle.remove()
    a, g = wide(kept[0].detach()), wide(g)
    if a.ndim == 3:
        side = math.isqrt(a.shape[1])
        a, g = (t[:, -side * side :].transpose(1, 2).unflatten(2, (side, side)) for t in (a, g))
    return a, g, c


def combine(a: Tensor, g: Tensor, method: Cam) -> Tensor:
    """The map [B, h, w] before scaling out of A [B, C, h, w] and G [B, C, h, w] or [B, C, 1, 1]."""
    if method == "layercam":
        return (g.clamp(min=0) * a).sum(1).clamp(min=0)
    if method == "xgradcam":
        weight = (g * a).sum((2, 3)) / a.sum((2, 3))
        # 0/0, a dead channel: nothing to add. Where the sum of A is 0 but A is not, +-inf is kept out as well.
        weight = torch.where(torch.isfinite(weight), weight, torch.zeros_like(weight))
    else:
        weight = g.mean((2, 3))
    return (weight[:, :, None, None] * a).sum(1).clamp(min=0)


def scale(l: Tensor) -> Tensor:
    """(L - min)/(max - min) image by image, [B, h, w]; a constant map gives NaN, which no rule calls important."""
    low, high = l.amin((1, 2), keepdim=True), l.amax((1, 2), keepdim=True)
    return (l - low) / (high - low)


_looked: weakref.WeakSet = weakref.WeakSet()  # networks whose maps were seen to be alive


def activation_map(net, x: Tensor, method: Cam = "gradcam", layer: int | nn.Module = -1) -> Tensor:
    """Class activation maps [B, h, w] in [0, 1] of images x [B, C, H, W] for the predicted class.

    `layer`: the number of a stage, -1 the last, of a network that has `stages`, `features`, `rest` and `linear`; or, of
    any network, one of its modules. The network is looked at in eval mode and put back, so its batch statistics stay.
    Raises ValueError for a map or layer that is not known and for `cam` at a layer without closed form, TypeError for a
    layer without a place for each activation. Warns if the first maps of a network are all dead (not one positive
    value): PART would be training at eps_low.
    """
    if method not in get_args(Cam):
        raise ValueError(f"no map {method!r}; use one of {', '.join(get_args(Cam))}")
    if isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel):
        net = net.module
    modes = [(m, m.training) for m in net.modules() if m.training]
    net.eval()
    try:
        if isinstance(layer, nn.Module):
            if method == "cam":
                raise ValueError("cam is known in closed form for networks with stages; use gradcam, which is the same")
            a, g, _ = gradient_at(net, x, layer)
        else:
            if not hasattr(net, "stages"):
                raise ValueError(f"{type(net).__name__} has no stages; give the module to look at, e.g. net.layer4")
            layer = layer % len(net.stages)
            closed = net.pooled and layer == len(net.stages) - 1
            if method == "cam" and not closed:
                raise ValueError("cam needs the layer that is averaged and followed by the linear layer; use gradcam")
            a, g, _ = gradient(net, x, layer, closed)
            if closed and method == "xgradcam":
                method = "gradcam"  # equal as derived above, without the division
    finally:
        for m, was in modes:
            m.training = was
    found = scale(combine(a, g, method))
    if net not in _looked:  # reads the device once in a network's life
        if bool(found.isnan().all()):
            warnings.warn(
                f"all {len(found)} {method} maps are dead: nothing positive at this layer. PART would train at eps_low "
                "everywhere; choose another layer or layercam, and for a transformer tokens before its last block",
                stacklevel=2,
            )
        else:
            _looked.add(net)
    return found


# ----------------------------------------------------------------------------------------------------------- the mask


def resize(l: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, h, w] -> [B, H, W] by bicubic interpolation with a = -0.5, as Pillow does it (antialias=True is what
    selects -0.5 in PyTorch); overshoots stay."""
    return F.interpolate(l[:, None], size=size, mode="bicubic", antialias=True)[:, 0]


@functools.cache
def jet(device: torch.device) -> Tensor:
    """The 256 colours [256, 3] of matplotlib's jet."""
    from matplotlib import colormaps

    return torch.tensor(colormaps["jet"](range(256))[:, :3], dtype=torch.float32, device=device)


def mask(l: Tensor, size: tuple[int, int], rule: Rule = "zscore", fraction: float = 0.2) -> Tensor:
    """Mask, bool [B, 1, H, W] or for jet-rgb [B, 3, H, W], out of scaled maps l [B, h, w].

    zscore    standard score over the pixels of the resized map above 1 (our reading of the paper's figure 2)
    jet-rgb   the released code: the squared map coloured by jet, standard score over pixels and channels above 1
    topfrac   the `fraction` of the pixels with the highest values, exactly so many
    """
    if rule not in get_args(Rule):
        raise ValueError(f"no rule {rule!r}; use one of {', '.join(get_args(Rule))}")
    big = resize(l.float(), size)
    if rule == "zscore":
        mean, std = big.mean((1, 2), keepdim=True), big.std((1, 2), unbiased=False, keepdim=True)
        return ((big - mean) / std > 1)[:, None]
    if rule == "topfrac":
        flat = big.flatten(1)
        kept = flat.topk(round(fraction * flat.shape[1]), dim=1).indices
        return (torch.zeros_like(flat, dtype=torch.bool).scatter_(1, kept, True) & ~flat.isnan()).view(
            big[:, None].shape
        )
    v = big.square()
    colours = jet(v.device)[(256 * v.nan_to_num()).long().clamp(0, 255)].permute(0, 3, 1, 2)
    colours = torch.where(v[:, None].isnan(), 0.0, colours)  # NaN is drawn black, and a black picture has no mask
    centred = colours - colours.mean((1, 2, 3), keepdim=True)
    return centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt() > 1  # torch.std is slow over three axes


def budget(m: Tensor, eps: float, eps_low: float) -> Tensor:
    """E = eps where the mask is set, eps_low elsewhere; float32 of the mask's shape."""
    e = torch.full(m.shape, eps_low, dtype=torch.float32, device=m.device)
    return e.masked_fill_(m, eps)


def quadrant(which: str, size: tuple[int, int], device: torch.device) -> Tensor:
    """Figure 1: mask [1, 1, H, W] that is set outside the quadrant `upper-left`, `upper-right`, `lower-left`,
    `lower-right`."""
    h, w = size
    m = torch.ones(1, 1, h, w, dtype=torch.bool, device=device)
    rows = slice(0, h // 2) if which.startswith("upper") else slice(h // 2, h)
    cols = slice(0, w // 2) if which.endswith("left") else slice(w // 2, w)
    m[:, :, rows, cols] = False
    return m


# ----------------------------------------------------------------------------------------------------------- the ball


OUTSIDE = (
    "images must lie in [0, 1], where eps is measured: leave the normalisation out of the loader and make it the "
    "network's first layer, nn.Sequential(transforms.Normalize(mean, std), network)"
)


def check_images(x: Tensor) -> None:
    """ValueError for images outside [0, 1]: normalised ones would be clamped into it, a move of many eps. On a GPU the
    check does not wait for the device: it stops the program there, with the same sentence."""
    inside = ((x >= -1e-3) & (x <= 1 + 1e-3)).all()  # resizing may overshoot by rounding; NaN is not inside
    if x.device.type == "cuda":
        torch._assert_async(inside, OUTSIDE)
    elif not inside:
        raise ValueError(OUTSIDE)


def project(x: Tensor, delta: Tensor, e: Tensor | float) -> Tensor:
    """Clamp delta [B, C, H, W] to |delta| <= e (a number, or a budget that broadcasts), then to 0 <= x + delta <= 1."""
    delta = torch.clamp(delta, min=-e, max=e)
    return torch.maximum(torch.minimum(delta, 1.0 - x), -x)
