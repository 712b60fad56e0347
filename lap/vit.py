"""The vision transformer of the paper beside the networks of models.py: `build` knows them all."""

from torch import nn

import models

VITS = {
    "vit-small": {"patch_size": 4, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit-tiny": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},  # for tests
}
NAMES = (*models.NAMES, *VITS)


def build(name: str, classes: int, channels: int, size: int, mean: tuple, std: tuple) -> nn.Sequential:
    """Normalisation followed by the network `name` for images [channels, size, size]."""
    if name not in VITS:
        return models.build(name, classes, channels, size, mean, std)
    from timm.models.vision_transformer import VisionTransformer  # here: a second that no other network should wait for

    net = VisionTransformer(img_size=size, in_chans=channels, num_classes=classes, **VITS[name])
    for block in net.blocks:
        block.attn.fused_attn = False  # GradAlign differentiates twice, which the fused kernels cannot
    return nn.Sequential(models.Normalize(mean, std), net)
