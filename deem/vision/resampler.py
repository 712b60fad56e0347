"""The resampler: BLIP-2's Q-Former with layer norms on queries and keys of each head; R_V, and R_D with one layer."""

from functools import partial

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention, output projection, dropout, residual and layer norm behind it (BERT's order)."""

    def __init__(self, width: int, memory_width: int, heads: int, dropout: float, qk_norm: bool):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(memory_width, width), nn.Linear(memory_width, width)
        norm = partial(nn.LayerNorm, width // heads, eps=1e-12) if qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()
        self.out, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def parts(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values (B, heads, n, width / heads)."""
        q, k = self.q_norm(self.split(self.query(x))), self.k_norm(self.split(self.key(memory)))
        v = self.split(self.value(memory))
        return q.to(v.dtype), k.to(v.dtype), v

    def forward(self, x: Tensor, memory: Tensor, keep: Tensor | None = None) -> Tensor:
        drop = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(*self.parts(x, memory), attn_mask=keep, dropout_p=drop)
        y = self.out(y.transpose(1, 2).flatten(2))
        return self.norm(x + F.dropout(y, drop))

    @torch.no_grad()
    def weights(self, x: Tensor, memory: Tensor) -> Tensor:
        """Attention of each query (B, n, m), mean over heads; for pictures."""
        q, k, _ = self.parts(x, memory)
        return (q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)


class Layer(nn.Module):
    def __init__(self, width, memory_width, heads, dropout, qk_norm, cross: bool):
        super().__init__()
        self.attention = Attention(width, width, heads, dropout, qk_norm)
        self.cross = Attention(width, memory_width, heads, dropout, qk_norm) if cross else None
        self.inner, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.dropout = nn.LayerNorm(width, eps=1e-12), dropout

    def forward(self, x: Tensor, memory: Tensor, keep: Tensor | None) -> Tensor:
        x = self.attention(x, x)
        if self.cross is not None:
            x = self.cross(x, memory, keep)
        y = self.out(F.gelu(self.inner(x)))
        return self.norm(x + F.dropout(y, self.dropout, self.training))


class Resampler(nn.Module):
    """Learned queries read a memory: (B, m, memory_width) -> (B, queries, width).

    Cross attention in every `every`-th layer, layer 0 first. Paper: R_V 12 layers, 77 queries, width 768, 12 heads,
    dropout 0.1, every 2nd layer; R_D 1 layer, 77 queries, width 1024, 16 heads, no dropout.
    """

    def __init__(
        self, queries: int, width: int, layers: int, heads: int, memory_width: int, *, every: int = 2,
        dropout: float = 0.1, qk_norm: bool = True, std: float = 0.02,
    ):  # fmt: skip
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, queries, width) * std)
        self.norm, self.dropout = nn.LayerNorm(width, eps=1e-12), dropout
        arguments = (width, memory_width, heads, dropout, qk_norm)
        self.layers = nn.ModuleList(Layer(*arguments, cross=i % every == 0) for i in range(layers))
        self.checkpointing = False
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=std)
                nn.init.zeros_(m.bias)

    def forward(self, memory: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep (B, m) bool: memory that may be read; every row needs at least one."""
        x = self.norm(self.queries).expand(len(memory), -1, -1)
        x = F.dropout(x, self.dropout, self.training)  # behind expand: each sample has a draw of its own
        mask = None if keep is None else keep[:, None, None, :]
        for layer in self.layers:
            if self.checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(layer, x, memory, mask, use_reentrant=False)
            else:
                x = layer(x, memory, mask)
        return x

    @torch.no_grad()
    def attention(self, memory: Tensor) -> Tensor:
        """(B, queries, m): cross attention of the last layer that has one, mean over heads."""
        x, last = self.norm(self.queries).expand(len(memory), -1, -1), None
        for layer in self.layers:
            if layer.cross is not None:
                last = layer.cross.weights(layer.attention(x, x), memory)
            x = layer(x, memory, None)
        return last
