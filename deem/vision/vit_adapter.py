"""ViT-Adapter: a plain CLIP ViT gets maps of strides 4, 8, 16, 32 from a convolutional side branch that exchanges
features with it four times. Everything but the ViT lies below `adapter` and trains with the adapters (recipe.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.grids import resized
from vision.mmfs import sample


class Deformable(nn.Module):
    """Multi-scale deformable attention: P offsets a head and level, in cells of that level; one softmax over levels and
    points. query (B, Q, C), references (Q, 2) in [0, 1], maps: L tensors (B, C, H, W) -> (B, Q, C)."""

    def __init__(self, width: int, levels: int, heads: int = 16, points: int = 4, ratio: float = 0.5):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        inner = int(width * ratio)
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value, self.out = nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.offsets.weight)
        nn.init.uniform_(self.offsets.bias, -1.0, 1.0)

    def forward(self, query: Tensor, reference: Tensor, maps: list[Tensor]) -> Tensor:
        b, nq, _ = query.shape
        h, p, levels = self.heads, self.points, self.levels
        moved = self.offsets(query).view(b, nq, h, levels, p, 2).float()
        shares = self.weights(query).float().view(b, nq, h, levels * p).softmax(-1).view(b, nq, h, levels, p)
        total = 0
        for level, m in enumerate(maps):
            side = torch.tensor([m.shape[-1], m.shape[-2]], device=m.device)
            places = reference.view(1, nq, 1, 1, 2) + moved[:, :, :, level] / side
            v = self.value(m.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(b * h, -1, *m.shape[-2:])
            at = places.transpose(1, 2).reshape(b * h, nq, p, 2)
            total = total + sample(v, at, shares[:, :, :, level].transpose(1, 2).reshape(b * h, nq, p))
        return self.out(total.view(b, -1, nq).transpose(1, 2).to(query.dtype))


def centres(sizes: list[tuple[int, int]], device) -> Tensor:
    """Pixel centres of maps, one map behind the other: (sum h w, 2), x first, in [0, 1]."""
    out = []
    for h, w in sizes:
        y, x = torch.meshgrid(
            (torch.arange(h, device=device) + 0.5) / h, (torch.arange(w, device=device) + 0.5) / w, indexing="ij"
        )
        out.append(torch.stack([x, y], -1).view(-1, 2))
    return torch.cat(out)


class Prior(nn.Module):
    """Convolutions that give maps of strides 4, 8, 16, 32, all of one width."""

    def __init__(self, width: int, inner: int):
        super().__init__()

        def conv(a: int, b: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.GroupNorm(8, b), nn.ReLU()]

        self.stem = nn.Sequential(
            *conv(3, inner, 2), *conv(inner, inner, 1), *conv(inner, inner, 1), nn.MaxPool2d(3, 2, 1)
        )
        widths = (inner, 2 * inner, 4 * inner, 4 * inner)
        self.down = nn.ModuleList(nn.Sequential(*conv(a, b, 2)) for a, b in zip(widths, widths[1:], strict=False))
        self.out = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x)]
        for stage in self.down:
            maps.append(stage(maps[-1]))
        return [out(m) for out, m in zip(self.out, maps, strict=True)]


class Injector(nn.Module):
    """ViT tokens read the maps: x + gamma A(LN(x), LN(maps)), gamma starts at 0."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm, self.map_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention, self.gamma = Deformable(width, 3, heads), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, at: Tensor, maps: list[Tensor]) -> Tensor:
        maps = [self.map_norm(m.movedim(1, -1)).movedim(-1, 1) for m in maps]
        return x + self.gamma * self.attention(self.norm(x), at, maps)


class Extractor(nn.Module):
    """The maps, as one row of tokens, read the ViT tokens; then an MLP with a depth-wise convolution a map."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm, self.map_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = Deformable(width, 1, heads)
        inner = width // 4
        self.mlp_norm, self.inner, self.out = (
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, inner),
            nn.Linear(inner, width),
        )
        self.conv = nn.Conv2d(inner, inner, 3, 1, 1, groups=inner)

    def forward(self, c: Tensor, at: Tensor, sizes: list[tuple[int, int]], grid: Tensor) -> Tensor:
        c = c + self.attention(self.norm(c), at, [self.map_norm(grid.movedim(1, -1)).movedim(-1, 1)])
        y = self.inner(self.mlp_norm(c))
        parts = []
        for (h, w), part in zip(sizes, y.split([h * w for h, w in sizes], 1), strict=True):
            parts.append(self.conv(part.transpose(1, 2).unflatten(2, (h, w))).flatten(2).transpose(1, 2))
        return c + self.out(F.gelu(torch.cat(parts, 1)))


class ViTAdapter(nn.Module):
    """open_clip's VisionTransformer with maps of four scales. The picture is resized so that the ViT's grid has stride
    16: patch size 14 sees 224 for a picture of 256."""

    def __init__(self, vit: nn.Module, times: int = 4):
        super().__init__()
        self.vit, self.times = vit, times
        blocks, width = vit.transformer.resblocks, vit.conv1.out_channels
        heads = max(1, width // 64)
        self.widths, self.strides, self.pooled = (width,) * 4, (4, 8, 16, 32), width
        self.cut = [len(blocks) * (i + 1) // times for i in range(times)]
        self.adapter = nn.ModuleDict(
            {
                "prior": Prior(width, max(8, min(64, width // 16) // 8 * 8)),
                "injectors": nn.ModuleList(Injector(width, heads) for _ in range(times)),
                "extractors": nn.ModuleList(Extractor(width, heads) for _ in range(times)),
                "up": nn.ConvTranspose2d(width, width, 2, 2),
                "norms": nn.ModuleList(nn.GroupNorm(1, width, eps=1e-6) for _ in range(4)),
            }
        )
        self.scales = nn.Parameter(torch.randn(3, width) * 0.02)  # which map a token is of
        vit.proj = None  # the projection into CLIP's joint space is not used
        self.recompute = False

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        b, _, height, width = x.shape
        c1, *maps = self.adapter["prior"](x)
        sizes = [m.shape[-2:] for m in maps]
        h, w = sizes[1]  # stride 16
        patch = self.vit.patch_size
        tokens = self.vit.conv1(F.interpolate(x, (h * patch[0], w * patch[1]), mode="bicubic", align_corners=False))
        tokens = tokens.flatten(2).transpose(1, 2)
        places = self.vit.positional_embedding
        places = torch.cat([places[:1], resized(places[1:], h, w)])
        first = self.vit.class_embedding.expand(b, 1, -1)
        tokens = self.vit.ln_pre(torch.cat([first, tokens], 1) + places)
        c = torch.cat([m.flatten(2).transpose(1, 2) + s for m, s in zip(maps, self.scales, strict=True)], 1)
        grid_at, at = centres([(h, w)], x.device), centres(sizes, x.device)
        start = 0
        for i, end in enumerate(self.cut):
            split = [p.transpose(1, 2).unflatten(2, s) for p, s in
                     zip(c.split([a * b_ for a, b_ in sizes], 1), sizes, strict=True)]  # fmt: skip
            grid = self.adapter["injectors"][i](tokens[:, 1:], grid_at, split)
            tokens = torch.cat([tokens[:, :1], grid], 1)
            for block in self.vit.transformer.resblocks[start:end]:
                if self.recompute and self.training:
                    tokens = torch.utils.checkpoint.checkpoint(block, tokens, use_reentrant=False)
                else:
                    tokens = block(tokens)
            start = end
            grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (h, w))
            c = self.adapter["extractors"][i](c, at, sizes, grid)
        maps = [p.transpose(1, 2).unflatten(2, s) for p, s in
                zip(c.split([a * b_ for a, b_ in sizes], 1), sizes, strict=True)]  # fmt: skip
        maps = [self.adapter["up"](maps[0]) + c1, *maps]
        maps = [m + F.interpolate(grid, m.shape[-2:], mode="bilinear", align_corners=False) for m in maps]
        maps = [norm(m) for norm, m in zip(self.adapter["norms"], maps, strict=True)]
        return maps, self.vit.ln_post(tokens[:, 0])

    def checkpointing(self) -> None:
        self.recompute = True
