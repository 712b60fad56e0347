"""MMFS, the multi-image multi-scale feature synchroniser: deformable attention over the maps of several images, in
plain PyTorch (grid_sample); its gated form inside Llama layers and its form beside the U-Net."""

import math

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from vision.grids import resized, sincos_2d

MASKED = -1e4
LARGEST = 2**27  # sampled values kept at once; more are made in pieces and made again in the backward pass


def sample(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Weighted bilinear samples of one map, zero outside.

    value (G, D, H, W); places (G, Q, P, 2) in [0, 1], x first; weights (G, Q, P) -> (G, D, Q).
    """

    def part(v: Tensor, at: Tensor, w: Tensor) -> Tensor:
        found = F.grid_sample(v, 2 * at.to(v.dtype) - 1, mode="bilinear", padding_mode="zeros", align_corners=False)
        return (found * w.to(v.dtype)[:, None]).sum(-1)

    pieces = math.ceil(places.shape[0] * places.shape[1] * places.shape[2] * value.shape[1] / LARGEST)
    if pieces <= 1:
        return part(value, places, weights)
    size = math.ceil(places.shape[1] / pieces)
    out = []
    for at, w in zip(places.split(size, 1), weights.split(size, 1), strict=True):
        out.append(torch.utils.checkpoint.checkpoint(part, value, at, w, use_reentrant=False))
    return torch.cat(out, 2)


def distances(mask: Tensor) -> Tensor:
    """Images in order, (..., N) bool -> 1 for the last unmasked one, 2 for the one before it, ...; 0 for masked."""
    m = mask.long()
    return (m.sum(-1, keepdim=True) + 1 - m.cumsum(-1)) * m


class MMFS(nn.Module):
    """q <- W_m q + relpos[j]; P offsets a head, shared by the L levels; (P + 1) weights a head and level; one softmax
    over images, levels and slots. The last slot of each level is fixed at -log(N L) and has value zero.

    An offset is counted in cells of a grid of `base` cells a side: the official ratio size_level / base, divided by
    size_level, is 1 / base for every level.
    """

    def __init__(
        self, query_width: int, value_width: int, *, levels: int, base: float, width: int = 1024, heads: int = 16,
        points: int = 8, spread: float = 3.0, max_images: int = 50,
    ):  # fmt: skip
        super().__init__()
        self.levels, self.heads, self.points, self.base, self.max_images = levels, heads, points, base, max_images
        self.spread = spread
        self.mix = nn.Linear(query_width, query_width)
        self.relpos = nn.Embedding(max_images, query_width)
        self.offsets = nn.Linear(query_width, heads * points * 2)
        self.weights = nn.Linear(query_width, heads * levels * (points + 1))
        self.value, self.out = nn.Linear(value_width, width), nn.Linear(width, query_width)
        self.reset()

    def reset(self) -> None:
        nn.init.trunc_normal_(self.relpos.weight, std=0.02)
        nn.init.zeros_(self.offsets.weight)
        nn.init.uniform_(self.offsets.bias, -self.spread, self.spread)
        for layer in (self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.value, self.out, self.mix, self.weights):
            nn.init.zeros_(layer.bias)

    def values(self, maps: list[Tensor], norm: nn.Module | None = None) -> list[Tensor]:
        """W_v norm(F): L tensors (B, N, C_v, H, W) -> (B N heads, width / heads, H, W); all levels in one product."""
        flat = torch.cat([m.flatten(0, 1).flatten(2) for m in maps], 2).transpose(1, 2)
        v = self.value(norm(flat) if norm else flat).transpose(1, 2).unflatten(1, (self.heads, -1)).flatten(0, 1)
        parts = v.split([math.prod(m.shape[-2:]) for m in maps], 2)
        return [part.unflatten(2, m.shape[-2:]) for part, m in zip(parts, maps, strict=True)]

    def forward(self, query: Tensor, reference: Tensor, values: list[Tensor], mask: Tensor) -> Tensor:
        """query (B, Q, C); reference (Q or 1, 2) in [0, 1]; values: `values` of L maps; mask (B, N) or (B, Q, N) bool
        -> (B, Q, C)."""
        b, nq, _ = query.shape
        n, h, p, levels = mask.shape[-1], self.heads, self.points, self.levels
        mask = mask[:, None].expand(b, nq, n) if mask.ndim == 2 else mask
        order = distances(mask).clamp(max=self.max_images - 1)
        # W(W_m q + relpos) = W W_m q + W relpos: the large product is formed once, not once an image.
        mixed = self.mix(query)
        table = self.relpos.weight
        moved = self.offsets(mixed)[:, :, None] + F.linear(table, self.offsets.weight)[order]
        moved = moved.view(b, nq, n, h, p, 2).permute(0, 2, 3, 1, 4, 5).reshape(b * n * h, nq, p, 2).float()
        places = reference.view(1, -1, 1, 2).float() + moved / self.base
        logits = self.weights(mixed)[:, :, None] + F.linear(table, self.weights.weight)[order]
        logits = logits.view(b, nq, n, h, levels, p + 1).float()
        logits = logits + MASKED * (~mask)[:, :, :, None, None, None].float()
        ignore = torch.full_like(logits[..., :1], -math.log(n * levels))
        logits = torch.cat([logits[..., :-1], ignore], -1).permute(0, 2, 3, 1, 4, 5)  # b n h q l p+1
        shares = logits.permute(0, 2, 3, 1, 4, 5).flatten(3).softmax(-1).view(b, h, nq, n, levels, p + 1)
        shares = shares[..., :-1].permute(0, 3, 1, 2, 4, 5).reshape(b * n * h, nq, levels, p)
        total = 0
        for level, v in enumerate(values):
            total = total + sample(v, places, shares[:, :, level])
        total = total.view(b, n, -1, nq).sum(1).transpose(1, 2)
        return self.out(total.to(query.dtype))


# -------------------------------------------------------------------------------------------- inside the language model


class ImageContext:
    """What the synchronising layers of a language model read in one forward pass; empty without images.

    maps: levels of (S, N, C, H, W); visible (S, K, N) bool: image n may be read at position k. Steps of generation
    read the last position's row; beams are copies of a row that lie next to each other: more queries to its maps."""

    def __init__(self):
        self.set(None, None)

    def set(self, maps: list[Tensor] | None, visible: Tensor | None) -> None:
        self.maps, self.visible = maps, visible
        self.values: dict[nn.Module, list[Tensor]] = {}  # of each layer, kept over the steps of a generation

    def rows(self, batch: int, length: int) -> Tensor:
        """Visible images of each query, (S, beams x length, N)."""
        return self.visible[:, -length:].repeat(1, batch // len(self.visible), 1)


class GatedMMFS(nn.Module):
    """h + tanh(g) MMFS(RMSNorm(h), RMSNorm(F)), g a scalar that starts at 0; the reference is the image's centre."""

    def __init__(self, query_width: int, value_width: int, *, levels: int, base: float, eps: float, **more):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.query_norm, self.value_norm = LlamaRMSNorm(query_width, eps), LlamaRMSNorm(value_width, eps)
        self.mmfs = MMFS(query_width, value_width, levels=levels, base=base, spread=3.0, **more)
        self.register_buffer("centre", torch.full((1, 2), 0.5), persistent=False)

    def forward(self, h: Tensor, context: ImageContext) -> Tensor:
        if context.maps is None:  # nothing to read: all weight is on the ignore tokens, the output's bias is left
            return h + (self.gate.tanh() * self.mmfs.out.bias).to(h.dtype)
        visible, values = context.rows(*h.shape[:2]), context.values.get(self)
        if values is None:
            values = self.mmfs.values(context.maps, self.value_norm)
            if not torch.is_grad_enabled():
                context.values[self] = values
        q = self.query_norm(h).view(*visible.shape[:2], -1)
        y = self.mmfs(q, self.centre, values, visible).view_as(h)
        return h + (self.gate.tanh() * y).to(h.dtype)


class SynchronisedLayer(LlamaDecoderLayer):
    """A Llama layer with a gated MMFS between self attention and MLP."""

    def attach(self, synchroniser: GatedMMFS, context: ImageContext) -> None:
        self.synchroniser, self.context = synchroniser, context

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
                position_embeddings=None, **kwargs):  # fmt: skip
        found, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask,
            position_ids=position_ids, past_key_values=past_key_values, use_cache=use_cache,
            position_embeddings=position_embeddings, **kwargs,
        )  # fmt: skip
        h = self.synchroniser(hidden_states + found, self.context)
        return h + self.mlp(self.post_attention_layernorm(h))


def synchronise(llama, every: int, value_width: int, *, levels: int, base: float, **more) -> ImageContext:
    """Put a gated MMFS into every `every`-th layer of a LlamaModel, layer 0 first; returns what those layers read."""
    context = ImageContext()
    for i in range(0, len(llama.layers), every):
        old = llama.layers[i]
        new = SynchronisedLayer(llama.config, i)
        new.load_state_dict(old.state_dict())
        new.to(next(old.parameters()).dtype)
        eps = llama.config.rms_norm_eps
        gated = GatedMMFS(llama.config.hidden_size, value_width, levels=levels, base=base, eps=eps, **more)
        new.attach(gated, context)
        llama.layers[i] = new
    return context


# ----------------------------------------------------------------------------------------------------- beside the U-Net


class MMFSBlock(nn.Module):
    """Conv1x1_zero(MMFS(LN(feature) + pos, LN(F))) for one feature of the U-Net; references are its pixel centres."""

    def __init__(self, query_width: int, value_width: int, *, levels: int, size: float, table: int, **more):
        super().__init__()
        self.query_norm, self.value_norm = nn.LayerNorm(query_width, eps=1e-6), nn.LayerNorm(value_width, eps=1e-6)
        self.mmfs = MMFS(query_width, value_width, levels=levels, base=size, spread=1.0, **more)
        self.conv = nn.Conv2d(query_width, query_width, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        self.register_buffer("positions", sincos_2d(query_width, table), persistent=False)

    def forward(self, feature: Tensor, maps: list[Tensor], mask: Tensor) -> Tensor:
        """feature (B, C, H, W), maps as in MMFS, mask (B, N)."""
        h, w = feature.shape[-2:]
        y, x = torch.meshgrid(
            (torch.arange(h, device=feature.device) + 0.5) / h,
            (torch.arange(w, device=feature.device) + 0.5) / w,
            indexing="ij",
        )
        centres = torch.stack([x, y], -1).view(-1, 2)
        q = self.query_norm(feature.flatten(2).transpose(1, 2)) + resized(self.positions, h, w)
        found = self.mmfs(q, centres, self.mmfs.values(maps, self.value_norm), mask)
        return self.conv(found.transpose(1, 2).unflatten(2, (h, w)))


class MMFSNet(nn.Module):
    """A block for each skip feature of a UNet2DConditionModel and one for its middle."""

    def __init__(self, unet, value_width: int, *, levels: int, **more):
        super().__init__()
        c = unet.config
        size, widths = c.sample_size, [(c.block_out_channels[0], c.sample_size)]
        for i, width in enumerate(c.block_out_channels):
            widths += [(width, size)] * c.layers_per_block
            if i < len(c.block_out_channels) - 1:
                size = size / 2
                widths.append((width, size))
        common = {"levels": levels, "table": c.sample_size, "max_images": 10, **more}
        self.down = nn.ModuleList(MMFSBlock(w, value_width, size=s, **common) for w, s in widths)
        self.mid = MMFSBlock(c.block_out_channels[-1], value_width, size=size, **common)
        self.checkpointing = False

    def block(self, block: MMFSBlock, feature: Tensor, maps: list[Tensor], mask: Tensor) -> Tensor:
        if self.checkpointing and self.training:
            return torch.utils.checkpoint.checkpoint(block, feature, maps, mask, use_reentrant=False)
        return block(feature, maps, mask)
