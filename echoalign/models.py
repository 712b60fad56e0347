"""Classifiers. They take images in [0, 1], normalise them inside, and give logits; `features` gives what the last layer
reads."""

from lab.runs import UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("cnn", "resnet18", "resnet18-w16", "resnet34", "head")


class Classifier(nn.Module):
    def __init__(self, body: nn.Module, width: int, classes: int, mean: tuple, std: tuple):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, classes)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def features(self, x: Tensor) -> Tensor:
        """[n, C, H, W] in [0, 1] -> [n, width], not negative."""
        return self.body((x - self.mean) / self.std)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def cnn(channels: int) -> nn.Sequential:
    """Four 3x3 convolutions with batch statistics, 98,000 weights; strides 1, 2, 2, 2."""
    layers, last = [], channels
    for width, stride in ((16, 1), (32, 2), (64, 2), (128, 2)):
        layers += [nn.Conv2d(last, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        last = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Head(Classifier):
    """Two layers on the features [n, width] of a network that stays as it is; inputs are standardised by the batch."""

    def __init__(self, width: int, classes: int, hidden: int = 512):
        body = nn.Sequential(
            nn.BatchNorm1d(width, affine=False), nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU()
        )
        super().__init__(body, hidden, classes, (0.0,), (1.0,))

    def features(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, hidden], not negative."""
        return self.body(x)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.c2, self.b2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        same = stride == 1 and i == o
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.b1(self.c1(x)))
        return F.relu(self.b2(self.c2(out)) + self.short(x))


def resnet(channels: int, blocks: tuple[int, ...], width: int = 64) -> nn.Sequential:
    """CIFAR form: 3x3 stem of stride 1, no max-pool, stages of width x 1, 2, 4, 8 channels."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    last = width
    for stage, n in enumerate(blocks):
        for k in range(n):
            layers.append(Block(last, width * 2**stage, 2 if stage and k == 0 else 1))
            last = width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build(name: str, classes: int, channels: int, mean: tuple, std: tuple) -> Classifier:
    """A network of NAMES, random weights, for images of so many channels (head: features so wide). resnet18-w16: a
    quarter of its width."""
    if name == "head":
        return Head(channels, classes)
    if name == "cnn":
        return Classifier(cnn(channels), 128, classes, mean, std)
    if name not in NAMES:
        raise UserError(f"--model {name} is unknown; use one of {', '.join(NAMES)}")
    width = 16 if name.endswith("-w16") else 64
    blocks = (3, 4, 6, 3) if name == "resnet34" else (2, 2, 2, 2)
    return Classifier(resnet(channels, blocks, width), 8 * width, classes, mean, std)
