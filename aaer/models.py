"""Networks on images in [0, 1]. Normalisation is their first layer, so every attack works in pixel units."""

from lab.runs import UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalisation without batch statistics: the network then treats every sample alone."""
    return nn.GroupNorm(min(4, channels), channels)


class PreActBlock(nn.Module):
    """Pre-activation basic block. The 1x1 projection shortcut takes the raw input, or the activated one."""

    def __init__(self, inputs: int, outputs: int, stride: int, activated: bool, norm=nn.BatchNorm2d):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), conv3(inputs, outputs, stride)
        self.norm2, self.conv2 = norm(outputs), conv3(outputs, outputs)
        self.activated = activated
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(out if self.activated else x)
        return self.conv2(F.relu(self.norm2(self.conv1(out)))) + skip


class PreActResNet(nn.Module):
    """[B, C, H, W] -> logits [B, K]. `pool` is the side of the average pool before the linear layer; 0: global."""

    def __init__(self, classes, channels=3, size=32, widths=(64, 128, 256, 512), depth=2, pool=4, **block):
        super().__init__()
        norm = block.get("norm", nn.BatchNorm2d)
        self.stem = conv3(channels, widths[0])
        layers, inputs, given = [], widths[0], size
        for stage, width in enumerate(widths):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                layers.append(PreActBlock(inputs, width, stride, **block))
                inputs, size = width, (size + stride - 1) // stride
        if size < pool:
            raise UserError(
                f"images of {given} pixels are {size} wide before the {pool}x{pool} pool of this network; it takes "
                f"{(pool - 1) * 2 ** (len(widths) - 1) + 1} and more: use --model preact-small"
            )
        self.blocks, self.norm, self.pool = nn.Sequential(*layers), norm(inputs), pool
        self.linear = nn.Linear(inputs * ((size // pool) ** 2 if pool else 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        x = F.avg_pool2d(x, self.pool) if self.pool else x.mean((2, 3))
        return self.linear(x.flatten(1))


class WideBlock(nn.Module):
    """Wide ResNet block: where the shape changes, shortcut and branch both take the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv3(inputs, outputs, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), conv3(outputs, outputs)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.norm2(self.conv1(out)))) + skip


class WideResNet(nn.Module):
    """WideResNet-<depth>-<widen>, dropout 0."""

    def __init__(self, classes: int, channels: int = 3, depth: int = 34, widen: int = 10):
        super().__init__()
        n, layers, inputs = (depth - 4) // 6, [], 16
        self.stem = conv3(channels, 16)
        for stage, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
            for i in range(n):
                layers.append(WideBlock(inputs, width, 2 if stage > 0 and i == 0 else 1))
                inputs = width
        self.blocks, self.norm, self.linear = nn.Sequential(*layers), nn.BatchNorm2d(inputs), nn.Linear(inputs, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


class BasicBlock(nn.Module):
    """Post-activation block of ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = conv3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = conv3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class ResNet18(nn.Module):
    """ResNet-18 with a 3x3 stem of stride 1. `cosine`: the form for ImageNet-100 (max-pool after the stem, features
    of unit length, linear layer without bias, no temperature)."""

    def __init__(self, classes: int, channels: int = 3, cosine: bool = False):
        super().__init__()
        self.conv, self.norm, self.cosine = conv3(channels, 64), nn.BatchNorm2d(64), cosine
        layers, inputs = [], 64
        for stage, width in enumerate((64, 128, 256, 512)):
            for i in range(2):
                layers.append(BasicBlock(inputs, width, 2 if stage > 0 and i == 0 else 1))
                inputs = width
        self.blocks, self.linear = nn.Sequential(*layers), nn.Linear(512, classes, bias=not cosine)
        if cosine:
            for m in self.modules():
                if isinstance(m, nn.Conv2d):
                    nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        if self.cosine:
            x = F.max_pool2d(x, 3, 2, 1)
        x = self.blocks(x).mean((2, 3))
        return self.linear(F.normalize(x) if self.cosine else x)


# PreActResNet-18 with stages of w, 2w, 4w, 8w channels; the paper's has w = 64. Nothing else differs.
WIDTHS = {"preact18": 64, "preact18-w32": 32, "preact18-w16": 16, "preact18-w8": 8}
NAMES = (*WIDTHS, "preact18-act", "wrn-34-10", "resnet18", "resnet18-cosine", "preact-small", "preact-small-gn")
SMALL = {"widths": (8, 16, 32), "depth": 1, "pool": 0, "activated": False}


def build(name: str, classes: int, channels: int, size: int, mean: tuple, std: tuple) -> nn.Sequential:
    """Normalisation followed by the network `name` for images [channels, size, size]."""
    shape = {"classes": classes, "channels": channels}
    stages = tuple(WIDTHS.get(name, 64) * k for k in (1, 2, 4, 8))
    preact = {**shape, "size": size, "widths": stages, "activated": False}
    net = {
        **dict.fromkeys(WIDTHS, lambda: PreActResNet(**preact)),
        "preact18-act": lambda: PreActResNet(**shape, size=size, activated=True),
        "wrn-34-10": lambda: WideResNet(**shape),
        "resnet18": lambda: ResNet18(**shape),
        "resnet18-cosine": lambda: ResNet18(**shape, cosine=True),
        "preact-small": lambda: PreActResNet(**shape, size=size, **SMALL),
        "preact-small-gn": lambda: PreActResNet(**shape, size=size, **SMALL, norm=group_norm),
    }[name]()
    return nn.Sequential(Normalize(mean, std), net)
