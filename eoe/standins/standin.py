"""Stand-ins for CLIP that need no download: a small dual encoder for drawn pictures (tier B) and a synthetic
joint space without any network (tier A). Both hand unit features to the same scoring code as the real backbones.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scores import normalise
from standins import drawn

WORDS = ("a", "photo", "of", *drawn.COLOURS, *drawn.TEXTURES, *drawn.SHAPES, *drawn.PATTERNS)
INDEX = {word: i + 1 for i, word in enumerate(WORDS)}  # 0 is every unknown word
LENGTH = 8


def tokenise(texts: list[str]) -> Tensor:
    """Captions -> word indices [N, 8]; padding is -1, unknown words share index 0."""
    out = torch.full((len(texts), LENGTH), -1)
    for row, text in zip(out, texts, strict=True):
        ids = [INDEX.get(word, 0) for word in text.lower().split()[:LENGTH]]
        row[: len(ids)] = torch.tensor(ids)
    return out


class DualEncoder(nn.Module):
    """Four convolutions for pictures, the mean of word embeddings and a small MLP for captions, both into R^d."""

    def __init__(self, width: int = 16, dim: int = 64):
        super().__init__()
        layers, previous = [], 3
        for channels, kernel, stride in ((width, 5, 2), (2 * width, 3, 2), (4 * width, 3, 2), (6 * width, 3, 1)):
            layers += [nn.Conv2d(previous, channels, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(channels)]
            layers += [nn.ReLU(inplace=True)]
            previous = channels
        self.image = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(previous, dim))
        self.words = nn.Embedding(len(WORDS) + 1, dim)
        self.text = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.scale = nn.Parameter(torch.tensor(2.3))  # log of the logit scale, starts at 10
        # A word that no caption of the training set holds must not carry a random meaning.
        nn.init.zeros_(self.words.weight[:1])

    def encode_images(self, pictures: Tensor) -> Tensor:
        """uint8 [N, 3, 32, 32] -> [N, d], not normalised."""
        x = pictures.to(next(self.parameters()).device).float().div_(127.5).sub_(1)
        return self.image(x.contiguous(memory_format=torch.channels_last))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """[N, 8] -> [N, d], not normalised."""
        tokens = tokens.to(self.words.weight.device)
        there = (tokens >= 0).unsqueeze(-1)
        mean = (self.words(tokens.clamp(min=0)) * there).sum(1) / there.sum(1).clamp(min=1)
        return self.text(mean)

    def loss(self, pictures: Tensor, tokens: Tensor) -> Tensor:
        """Symmetric InfoNCE over the batch, in float32."""
        v, t = normalise(self.encode_images(pictures)), normalise(self.encode_tokens(tokens))
        logits = self.scale.exp().clamp(max=100) * v @ t.T
        target = torch.arange(len(v), device=v.device)
        return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


class DrawnBackbone:
    """A trained DualEncoder behind the interface of backbones.Backbone."""

    image_size = drawn.SIZE

    def __init__(self, model: DualEncoder, name: str = "drawn"):
        self.model, self.name = model.eval(), name

    @torch.inference_mode()
    def encode_images(self, pictures: Tensor, batch: int = 1024) -> Tensor:
        return torch.cat([self.model.encode_images(p).float() for p in pictures.split(batch)])

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> Tensor:
        return self.model.encode_tokens(tokenise(texts)).float()


# ------------------------------------------------------------------------------------------- tier A: no network at all


@dataclass(frozen=True)
class Space:
    """Unit features of one synthetic task and the names of its labels."""

    id_images: Tensor
    ood_images: Tensor
    text: dict[str, Tensor]  # id, ood, resemble, irrelevant
    sha256: str


def synthetic(
    seed: int, d: int = 128, groups: int = 12, per_class: int = 60, id_n: int = 4, ood_n: int = 5, out_n: int = 5
) -> Space:
    """A joint space of `groups` visual groups of 14 concepts with a modality gap and images of varying typicality.

    In each group 4 concepts are ID, 5 are OOD and the remaining 5 are the envisioned names: similar to ID, never an OOD
    class. "irrelevant" names are unrelated random directions. An image is its concept plus noise, shrunk by a factor
    from [0.35, 1] that lowers all its similarities together.
    """
    g = torch.Generator().manual_seed(seed)

    def gauss(*shape: int) -> Tensor:
        return torch.randn(*shape, d, generator=g)

    gap, n = normalise(gauss()), id_n + ood_n + out_n
    concept = normalise(0.8 * normalise(gauss(groups, 1)) + 0.75 * normalise(gauss(groups, n)))
    parts = dict(zip(("id", "ood", "resemble"), concept.split([id_n, ood_n, out_n], dim=1), strict=True))
    parts = {k: v.reshape(-1, d) for k, v in parts.items()}
    parts["irrelevant"] = normalise(gauss(groups * out_n))
    text = {k: normalise(p + 0.9 * gap + 0.02 * gauss(len(p))) for k, p in parts.items()}

    def images(p: Tensor) -> Tensor:
        p = p.repeat_interleave(per_class, 0)
        typical = 0.35 + 0.65 * torch.rand(len(p), 1, generator=g)
        core = normalise(p + 0.11 * gauss(len(p))) * typical
        return normalise(core - 0.5 * gap + 0.25 * normalise(gauss(len(p))))

    id_images, ood_images = images(parts["id"]), images(parts["ood"])
    digest = hashlib.sha256(torch.cat([id_images, ood_images, *text.values()]).numpy().tobytes()).hexdigest()
    return Space(id_images, ood_images, text, digest)
