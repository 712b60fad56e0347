"""Networks on images in [0, 1], without normalisation as in the released code, cut into stages.

A network has `stages`; `features(x, k)` are the activations after stage k, `rest(A, k)` the logits out of them, so a
class activation map can be taken at any stage. `pooled`: the last stage is averaged over the picture and followed by
the linear layer `linear` directly, which is what the closed form of the map needs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class Staged(nn.Module):
    """[B, C, H, W] -> logits [B, K] through `stages` and `tail`."""

    pooled = True
    stages: nn.ModuleList
    linear: nn.Linear

    def tail(self, a: Tensor) -> Tensor:
        return self.linear(a.mean((2, 3)))

    def features(self, x: Tensor, layer: int) -> Tensor:
        """Activations [B, C, h, w] after stage `layer`."""
        for stage in self.stages[: layer + 1]:
            x = stage(x)
        return x

    def rest(self, a: Tensor, layer: int) -> Tensor:
        """Logits [B, K] out of the activations after stage `layer`."""
        for stage in self.stages[layer + 1 :]:
            a = stage(a)
        return self.tail(a)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(x, -1)


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


class ResNet18(Staged):
    """ResNet-18 with a 3x3 stem of stride 1. Global average pool, which on 32x32 is the released code's 4x4 pool."""

    def __init__(self, classes: int, channels: int = 3, widths: tuple[int, ...] = (64, 128, 256, 512)):
        super().__init__()
        stem = nn.Sequential(conv3(channels, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU())
        layers, inputs = [stem], widths[0]
        for stage, width in enumerate(widths):
            layers.append(nn.Sequential(BasicBlock(inputs, width, 2 if stage else 1), BasicBlock(width, width, 1)))
            inputs = width
        self.stages, self.linear = nn.ModuleList(layers), nn.Linear(inputs, classes)


class WideBlock(nn.Module):
    """Pre-activation block: where the shape changes, shortcut and branch both take the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv3(inputs, outputs, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), conv3(outputs, outputs)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.norm2(self.conv1(out)))) + skip


class WideResNet(Staged):
    """WideResNet-<depth>-<widen>, dropout 0. The last stage's output comes before the last BN and ReLU (not pooled), so
    its activations may be negative and the three gradient maps differ there."""

    pooled = False

    def __init__(self, classes: int, channels: int = 3, depth: int = 34, widen: int = 10):
        super().__init__()
        n, layers, inputs = (depth - 4) // 6, [conv3(channels, 16)], 16
        for stage, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
            blocks = []
            for i in range(n):
                blocks.append(WideBlock(inputs, width, 2 if stage and i == 0 else 1))
                inputs = width
            layers.append(nn.Sequential(*blocks))
        self.stages, self.norm, self.linear = nn.ModuleList(layers), nn.BatchNorm2d(inputs), nn.Linear(inputs, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def tail(self, a: Tensor) -> Tensor:
        return self.linear(F.relu(self.norm(a)).mean((2, 3)))


class Centre(nn.Module):
    """x - 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5


class Small(Staged):
    """Three 3x3 convolutions with group norm and ReLU, the second and third of stride 2: 16x16 -> 4x4. Group norm,
    because on the weak images of the embedded default the attack moves the batch statistics more than the images do: a
    network attacked in eval mode and trained in train mode is then two networks. Grey is subtracted first: group norm,
    unlike batch norm, would spend itself on that offset."""

    def __init__(self, classes: int, channels: int = 3, widths: tuple[int, ...] = (16, 32, 64)):
        super().__init__()
        layers, inputs = [], channels
        for k, width in enumerate(widths):
            first = [] if k else [Centre()]
            layers.append(nn.Sequential(*first, conv3(inputs, width, 2 if k else 1), nn.GroupNorm(4, width), nn.ReLU()))
            inputs = width
        self.stages, self.linear = nn.ModuleList(layers), nn.Linear(inputs, classes)


# ResNet-18 with stages of w, 2w, 4w, 8w channels; the paper's has w = 64. Nothing else differs. Not fewer than 8: with
# 4, channels last, torch's kernel for strided 1x1 convolutions crashes on CPUs without AVX-512.
WIDTHS = {"resnet18": 64, "resnet18-w32": 32, "resnet18-w16": 16, "resnet18-w8": 8}
NAMES = (*WIDTHS, "wrn-34-10", "small", "wrn-10-1")


def build(name: str, classes: int, channels: int) -> Staged:
    """The network `name`; resnet18-w8 and wrn-10-1 are the same architectures at the smallest size."""
    shape = {"classes": classes, "channels": channels}
    widths = tuple(WIDTHS.get(name, 64) * k for k in (1, 2, 4, 8))
    return {
        **dict.fromkeys(WIDTHS, lambda: ResNet18(**shape, widths=widths)),
        "wrn-34-10": lambda: WideResNet(**shape),
        "small": lambda: Small(**shape),
        "wrn-10-1": lambda: WideResNet(**shape, depth=10, widen=1),
    }[name]()


def load_state(net: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """load_state_dict with the reason of a misfit in one line (ValueError)."""
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
