"""Image encoders by name behind one multi-scale interface, and what turns their maps into tokens.

A trunk maps images, normalised, to maps of growing stride and one pooled vector. `Encoder` makes of them the paper's
F (maps of one width) and Q (masked tokens with positions), see its docstring.
"""

import math
import pickle
from dataclasses import dataclass
from pathlib import Path

from lab.runs import UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packages
from vision.grids import binary_mask, resized, sincos_2d
from vision.vit_adapter import ViTAdapter

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
# What reading a damaged file of weights may raise, unpickling included.
BROKEN = (RuntimeError, OSError, ValueError, LookupError, EOFError, pickle.UnpicklingError)


# -------------------------------------------------------------------------------------------------------------- trunks


class ConvTrunk(nn.Module):
    """A small convolutional trunk for the digit scenes: a stage of two 3x3 convolutions each, the first with stride 2.

    `conv:16,32,64` gives maps of strides 2, 4, 8."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.widths, self.strides, self.pooled = widths, tuple(2 ** (i + 1) for i in range(len(widths))), widths[-1]
        stages, last = [], 3
        for w in widths:
            groups = math.gcd(8, w)
            layers = [nn.Conv2d(last, w, 3, 2, 1), nn.GroupNorm(groups, w), nn.SiLU()]
            layers += [nn.Conv2d(w, w, 3, 1, 1), nn.GroupNorm(groups, w), nn.SiLU()]
            stages.append(nn.Sequential(*layers))
            last = w
        self.stages, self.norm = nn.ModuleList(stages), nn.LayerNorm(last, eps=1e-6)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps, self.norm(x.mean((2, 3)))


class TimmTrunk(nn.Module):
    """A timm network with several scales: maps of its stages and its head before the classifier (pool, norm)."""

    def __init__(self, network: nn.Module, stats: tuple = (MEAN, STD)):
        """stats: mean and deviation of a channel that the network was trained with."""
        super().__init__()
        self.network, (self.mean, self.std) = network, stats
        info = network.feature_info
        channels = info.channels() if hasattr(info, "channels") else [i["num_chs"] for i in info]
        strides = info.reduction() if hasattr(info, "reduction") else [i["reduction"] for i in info]
        keep = [i for i, s in enumerate(strides) if s >= 4]
        if not hasattr(network, "forward_intermediates") or len({strides[i] for i in keep}) < 4:
            raise UserError(
                f"encoder {type(network).__name__} has no four scales; use a hierarchical network of timm (convnext_*, "
                "resnet*), or open_clip:ViT-*, which gets a ViT-Adapter"
            )
        keep = keep[-4:]
        self.indices = keep
        self.widths, self.strides = tuple(channels[i] for i in keep), tuple(strides[i] for i in keep)
        self.pooled = network.num_features

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        last, maps = self.network.forward_intermediates(x, indices=self.indices)
        return maps, self.network.forward_head(last, pre_logits=True).flatten(1)

    def checkpointing(self) -> None:
        self.network.set_grad_checkpointing(True)


class PlainViT(nn.Module):
    """open_clip's VisionTransformer as LLaVA reads it: patch tokens of the last but one block, and the class token."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit, width = vit, vit.conv1.out_channels
        self.widths, self.strides, self.pooled = (width,), (vit.patch_size[0],), width
        vit.proj = None  # the projection into CLIP's joint space is not used

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        v = self.vit
        h, w = (n // p for n, p in zip(x.shape[-2:], v.patch_size, strict=True))
        patches = v.conv1(x).flatten(2).transpose(1, 2)
        table = v.positional_embedding
        places = torch.cat([table[:1], resized(table[1:], h, w)])
        x = v.ln_pre(torch.cat([v.class_embedding.expand(len(x), 1, -1), patches], 1) + places)
        for block in v.transformer.resblocks[:-1]:
            x = block(x)
        grid = x[:, 1:].transpose(1, 2).unflatten(2, (h, w))
        return [grid], v.ln_post(v.transformer.resblocks[-1](x)[:, 0])


def weights_of(given: str, folder: Path | None, name: str) -> str:
    """A file of weights: `given` (a path or open_clip's tag), else <folder>/<name>/ with one file inside; '' random."""
    if given == "random":
        return ""
    if given and Path(given).expanduser().is_file():
        return str(Path(given).expanduser())
    place = folder / name.replace("/", "-") if folder else None
    if place is not None and place.is_dir():
        files = sorted([*place.glob("*.safetensors"), *place.glob("*.bin"), *place.glob("*.pt"), *place.glob("*.pth")])
        if files:
            return str(files[0])
    return given


def make_trunk(name: str, weights: str = "random", folder: Path | None = None, *, drop_path=0.0, download=False):
    """A trunk by name: `conv:16,32,64`, `open_clip:NAME` (ConvNeXt of timm, or ViT with a ViT-Adapter), `timm:NAME`,
    `plain:NAME` (an open_clip ViT's patches alone, one scale, for LLaVA).

    weights: `random`, a file, `package` (EfficientNet-Lite0 alone) or open_clip's tag; tags are looked up
    in `folder` first and fetched with `download`.
    """
    kind, _, rest = name.partition(":")
    if kind == "conv":
        try:
            widths = tuple(int(w) for w in rest.split(","))
        except ValueError:
            widths = ()
        if not widths or min(widths) < 1:
            raise UserError(f"--encoder.name {name}: give widths of stages, as in conv:16,32,64")
        return ConvTrunk(widths)
    if kind == "timm":
        network = _timm(rest, weights, folder, drop_path, download)
        return TimmTrunk(network, tuple(network.pretrained_cfg[k] for k in ("mean", "std")))
    if kind in ("open_clip", "plain"):
        visual = _open_clip(rest, weights, folder, drop_path, download)
        if kind == "plain" and not hasattr(visual, "transformer"):
            raise UserError(f"--encoder.name plain:{rest} is no ViT; use open_clip:{rest}")
        if kind == "plain":
            return PlainViT(visual)
        if hasattr(visual, "trunk"):
            return TimmTrunk(visual.trunk)
        return ViTAdapter(visual)
    raise UserError(f"--encoder.name {name} is unknown; use conv:WIDTHS, open_clip:NAME, timm:NAME or plain:NAME")


def _timm(name: str, weights: str, folder: Path | None, drop_path: float, download: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise UserError(
            f"--encoder.name timm:{name}: timm knows no such model; python -c 'import timm; timm.list_models()'"
        )
    if weights == "package":
        return _packaged(name)
    path = weights_of(weights, folder, name)
    more = {"drop_path_rate": drop_path} if drop_path else {}
    if path and not Path(path).is_file():
        if not download:
            raise UserError(_absent(f"timm:{name}", folder, name))
        return timm.create_model(name, pretrained=True, num_classes=0, **more)
    network = timm.create_model(name, pretrained=False, num_classes=0, **more)
    if path:
        _load(network, path)
    return network


def _packaged(name: str) -> nn.Module:
    """EfficientNet-Lite0 of ImageNet. Its batch norms keep their statistics, scale and shift: a run keeps parameters
    alone, and batches of a few scenes have other statistics than ImageNet."""
    import timm
    from timm.layers import freeze_batch_norm_2d

    if name != "tf_efficientnet_lite0":
        raise UserError(f"--encoder.weights package goes with timm:tf_efficientnet_lite0, not timm:{name}")
    network = timm.create_model(name, pretrained=False, num_classes=0)
    packages.lite0(network)
    return freeze_batch_norm_2d(network)


def _open_clip(name: str, weights: str, folder: Path | None, drop_path: float, download: bool) -> nn.Module:
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise UserError(f"--encoder.name open_clip:{name}: open_clip knows no such model, see open_clip.list_models()")
    path = weights_of(weights, folder, name)
    more = {}
    if drop_path and config["vision_cfg"].get("timm_model_name"):
        more["vision_cfg"] = {**config["vision_cfg"], "timm_drop_path": drop_path, "timm_model_pretrained": False}
    if path and not Path(path).is_file() and not download:
        raise UserError(_absent(f"open_clip:{name}", folder, name))
    if path and not Path(path).is_file() and path not in open_clip.list_pretrained_tags_by_model(name):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"open_clip has no weights {path} for {name}; it has {tags}")
    try:
        # OpenAI's weights were trained with the quick GELU.
        quick = weights == "openai"
        model = open_clip.create_model(name, pretrained=path or None, precision="fp32", force_quick_gelu=quick, **more)
    except BROKEN as error:
        raise UserError(f"weights of open_clip:{name} could not be loaded ({error})") from None
    return model.visual


def _load(network: nn.Module, path: str) -> None:
    from timm.models import load_checkpoint

    try:
        load_checkpoint(network, path, strict=False)
    except BROKEN as error:
        raise UserError(f"{path} does not hold weights of {type(network).__name__} ({error})") from None


def _absent(name: str, folder: Path | None, place: str) -> str:
    where = f"{folder}/{place.replace('/', '-')}/" if folder else "a folder of weights"
    return f"weights of {name} are missing: put its file into {where}, name it by --encoder.weights, or add --download"


# ------------------------------------------------------------------------------------------------------------- encoder


@dataclass
class Features:
    """maps: list of (B, width, H_s, W_s) with positions, finest first; tokens: (B, n, width), the resampler's Q."""

    maps: list[Tensor]
    tokens: Tensor


class Encoder(nn.Module):
    """E_V, positions and the mask-aware extractor E_M.

    F: a linear map a pixel and scale to `width`, plus positions. T = [Linear(pooled) ; flatten(f_token_level)],
    Q = LN(M * (LN(Linear(T)) + pos)), pos a fixed 2-D sin-cos table of grid x grid with a zero row for the pooled
    token; M, the region mask on the token grid, spares that token. `regions`: five more tokens in front (stage III),
    the mean of each map of F under the mask through one linear map, and an MLP of the 112 x 112 mask.
    """

    def __init__(self, trunk: nn.Module, width: int, *, token_level: int, grid: int, regions: bool = False):
        super().__init__()
        self.trunk, self.token_level = trunk, token_level
        self.adapters = nn.ModuleList(nn.Linear(w, width) for w in trunk.widths)
        self.global_proj = nn.Linear(trunk.pooled, width)
        self.pos_proj, self.pos_norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6)
        self.post_norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("positions", sincos_2d(width, grid), persistent=False)
        self.register_buffer("mean", torch.tensor(getattr(trunk, "mean", MEAN)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(getattr(trunk, "std", STD)).view(1, 3, 1, 1), persistent=False)
        self.region_proj = self.mask_mlp = None
        if regions:
            self.region_proj = nn.Linear(width, width)
            steps = (112 * 112, width, width, width)
            layers = [m for a, b in zip(steps, steps[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
            self.mask_mlp = nn.Sequential(*layers[:-1])

    @property
    def strides(self) -> tuple[int, ...]:
        return self.trunk.strides

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Features:
        """images (B, 3, R, R) in [0, 1]; masks (B, H, W), None: all ones."""
        raw, pooled = self.trunk((images - self.mean) / self.std)
        flat = [adapter(m.permute(0, 2, 3, 1)) for adapter, m in zip(self.adapters, raw, strict=True)]
        maps = []
        for f in flat:
            h, w = f.shape[1:3]
            maps.append((f + resized(self.positions, h, w).view(h, w, -1)).permute(0, 3, 1, 2))
        at = flat[self.token_level]
        h, w = at.shape[1:3]
        tokens = torch.cat([self.global_proj(pooled)[:, None], at.flatten(1, 2)], 1)
        places = F.pad(resized(self.positions, h, w), (0, 0, 1, 0))
        q = self.pos_norm(self.pos_proj(tokens)) + places
        if masks is not None:
            keep = binary_mask(masks, (h, w)).flatten(2).transpose(1, 2)
            q = q * F.pad(keep, (0, 0, 1, 0), value=1.0).to(q.dtype)
        q = self.post_norm(q)
        if self.region_proj is not None:
            q = torch.cat([self.region_tokens(maps, masks, images), q], 1)
        return Features(maps, q)

    def region_tokens(self, maps: list[Tensor], masks: Tensor | None, images: Tensor) -> Tensor:
        """(B, scales + 1, width): means under the mask, one token a scale, and one of the mask itself."""
        if masks is None:
            masks = torch.ones(len(images), *images.shape[2:], device=images.device)
        out = []
        for m in maps:
            keep = binary_mask(masks, m.shape[-2:]).to(m.dtype)
            out.append(self.region_proj((m * keep).sum((2, 3)) / (keep.sum((2, 3)) + 1e-8)))
        shape = F.interpolate(masks[:, None].float(), (112, 112), mode="bilinear", align_corners=False)
        out.append(self.mask_mlp(shape.flatten(1).to(maps[0].dtype)))
        return torch.stack(out, 1)
