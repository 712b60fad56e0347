"""The SAM family on the classes of segment-anything: SAM (ViT-B, L, H), HQ-SAM, MobileSAM, a tiny SAM (train.py).

Imported only where one of them is asked for: segment-anything brings torchvision, which takes seconds to load.
"""

from pathlib import Path

from lab.runs import UserError, sent

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer, image_encoder
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

from prompts import Prompt
from segmenters.interface import FILES, Decoded, Embedding, Geometry
from trackers.points import mismatch

VIT = {"vit_b": (768, 12, 12, (2, 5, 8, 11)), "vit_l": (1024, 24, 16, (5, 11, 17, 23))}
VIT["vit_h"] = (1280, 32, 16, (7, 15, 23, 31))
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device, without waiting for what the device is still doing."""
    return sent(torch.from_numpy(np.ascontiguousarray(array)), device)


def relative_positions(q: int, k: int, table: Tensor) -> Tensor:
    """The library's table of relative positions (q, k, C), looked up where the table lies: its own indices are made on
    the CPU, and each look-up would wait for the device."""
    if q != k or len(table) != 2 * q - 1:
        return library_positions(q, k, table)
    i = torch.arange(q, device=table.device)
    return table[i[:, None] - i[None, :] + q - 1]


library_positions, image_encoder.get_rel_pos = image_encoder.get_rel_pos, relative_positions


class Prompts(PromptEncoder):
    """SAM's prompt encoder with choices by `where`: indexing with booleans would wait for the device."""

    def _embed_points(self, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
        points = points + 0.5  # middles of pixels
        if pad:  # where there is no box, a point that is none
            points = torch.cat([points, points.new_zeros(len(points), 1, 2)], 1)
            labels = torch.cat([labels, labels.new_full((len(labels), 1), -1)], 1)
        out, kind = self.pe_layer.forward_with_coords(points, self.input_image_size), labels[..., None]
        out = torch.where(kind == -1, self.not_a_point_embed.weight, out)
        for value in (0, 1):
            out = torch.where(kind == value, out + self.point_embeddings[value].weight, out)
        return out


class HQDecoder(MaskDecoder):
    """Mask decoder of HQ-SAM: one more output token whose mask is read from features that join the image embedding and
    an early layer of the encoder; its logits are added to SAM's first mask."""

    def __init__(self, early: int, transformer_dim: int = 256, **rest):
        super().__init__(transformer_dim=transformer_dim, **rest)
        d = transformer_dim
        self.hf_token = nn.Embedding(1, d)
        self.hf_mlp = MLP(d, d, d // 8, 3)

        def up(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(
                nn.ConvTranspose2d(a, b, 2, 2), LayerNorm2d(b), nn.GELU(), nn.ConvTranspose2d(b, d // 8, 2, 2)
            )

        self.compress_vit_feat, self.embedding_encoder = up(early, d), up(d, d // 4)
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(d // 8, d // 4, 3, 1, 1), LayerNorm2d(d // 4), nn.GELU(), nn.Conv2d(d // 4, d // 8, 3, 1, 1)
        )

    def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, early):
        n = len(sparse_prompt_embeddings)
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight, self.hf_token.weight])
        tokens = torch.cat([own.expand(n, -1, -1), sparse_prompt_embeddings], 1)
        src = image_embeddings.expand(n, -1, -1, -1) + dense_prompt_embeddings
        hs, src2 = self.transformer(src, image_pe.expand(n, -1, -1, -1), tokens)
        up = self.output_upscaling(src2.transpose(1, 2).reshape(src.shape))
        fine = self.embedding_maskfeature(up) + self.embedding_encoder(image_embeddings) + self.compress_vit_feat(early)
        weights = self.output_hypernetworks_mlps[0](hs[:, 1]), self.hf_mlp(hs[:, 1 + self.num_mask_tokens])
        masks = sum(torch.einsum("nc,nchw->nhw", w, f) for w, f in zip(weights, (up, fine), strict=True))
        return masks[:, None], self.iou_prediction_head(hs[:, 0])[:, :1]


class TinyViT(nn.Module):
    """MobileSAM's image encoder out of timm's TinyViT: the last merge keeps its stride at 1, a neck follows."""

    def __init__(self, size: int = 1024):
        super().__init__()
        import timm

        self.img_size = size
        self.body = timm.create_model("tiny_vit_5m_224", pretrained=False, num_classes=0)
        self.body.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.neck = nn.Sequential(
            *(nn.Conv2d(320, 256, 1, bias=False), LayerNorm2d(256)),
            *(nn.Conv2d(256, 256, 3, padding=1, bias=False), LayerNorm2d(256)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(self.body.forward_features(x))


def mobile_keys(state: dict) -> dict:
    """Keys of `mobile_sam.pt` (439) -> keys of Sam below (437): the classifier of the encoder is dropped."""
    out = {}
    for key, value in state.items():
        if not key.startswith("image_encoder."):
            out[key] = value
            continue
        rest = key.removeprefix("image_encoder.")
        if rest in ("head.weight", "head.bias"):
            continue
        if rest.startswith("neck."):
            out[key] = value
            continue
        words = rest.split(".")
        if words[:2] == ["patch_embed", "seq"]:
            words = ["patch_embed", {"0": "conv1", "2": "conv2"}.get(words[2], words[2]), *words[3:]]
        elif words[0] == "layers" and words[2] == "downsample":
            words = ["stages", str(int(words[1]) + 1), *words[2:]]
        elif words[0] == "layers":
            words = ["stages", *words[1:]]
        elif words[0] == "norm_head":
            words = ["head", "norm", *words[1:]]
        words = ["conv" if w == "c" else w for w in words]
        out["image_encoder.body." + ".".join(words)] = value
    return out


class Sam(nn.Module):
    """Image encoder, prompt encoder and mask decoder of one name; `size` is the side of the padded input in pixels."""

    def __init__(self, name: str, size: int = 0):
        super().__init__()
        hq = name.startswith("hq_")
        base = name.removeprefix("hq_") if hq else name
        small = name == "tiny"
        self.size = size = size or (256 if small else 1024)
        dim, heads, mlp = (64, 4, 128) if small else (256, 8, 2048)
        if base == "mobile" or name == "hq_tiny":
            self.image_encoder, width = TinyViT(size), 160
        else:
            width, depth, count, everywhere = (96, 4, 4, (1, 3)) if small else VIT[base]
            self.image_encoder = ImageEncoderViT(
                **{"img_size": size, "patch_size": 16, "embed_dim": width, "depth": depth, "num_heads": count},
                **{"mlp_ratio": 4 if not small else 2, "out_chans": dim, "qkv_bias": True, "use_rel_pos": True},
                **{"norm_layer": lambda n: nn.LayerNorm(n, eps=1e-6), "window_size": 14 if not small else 8},
                global_attn_indexes=everywhere,
            )
        self.cells = size // 16
        grid = (self.cells, self.cells)
        self.prompt_encoder = Prompts(dim, grid, (size, size), mask_in_chans=16)
        for name_, value in (("mean", MEAN), ("spread", STD)):
            self.register_buffer(name_, torch.tensor(value)[:, None, None], persistent=False)
        more = {"transformer_dim": dim, "num_multimask_outputs": 3, "iou_head_depth": 3, "iou_head_hidden_dim": dim}
        transformer = TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=mlp, num_heads=heads)
        self.mask_decoder = (
            HQDecoder(width, transformer=transformer, **more) if hq else MaskDecoder(transformer=transformer, **more)
        )
        self.early: Tensor | None = None
        if hq:  # the first block with global attention; for TinyViT what enters its third stage
            e = self.image_encoder
            block = e.body.stages[2].downsample if isinstance(e, TinyViT) else e.blocks[VIT[base][3][0]]
            block.register_forward_hook(self.keep)

    def keep(self, module, given, out) -> None:
        self.early = out if isinstance(self.image_encoder, TinyViT) else out.permute(0, 3, 1, 2)

    def pixels(self, frames: np.ndarray) -> Tensor:
        """uint8 RGB (n, H, W, 3) -> (n, 3, size, size): long side resized, normalised, padded with zeros."""
        h, w = frames.shape[1:3]
        s = self.size / max(h, w)
        new = int(h * s + 0.5), int(w * s + 0.5)
        x = send(frames, self.mean.device).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, (max(new[0], 1), max(new[1], 1)), mode="bilinear", antialias=True, align_corners=False)
        x = (x - self.mean) / self.spread
        return F.pad(x, (0, self.size - x.shape[-1], 0, self.size - x.shape[-2]))

    def predict(
        self, features: Tensor, early: Tensor | None, prompts: list[Prompt], scale: float, several: bool = False
    ):
        """Masks (n, k, 4 cells, 4 cells) and predicted IoU (n, k) of prompts of one kind: as many points, with or
        without box and dense prompt alike. `scale`: input pixels a pixel of the frame."""
        dev, first = features.device, prompts[0]
        points = None
        if len(first.points):
            xy = send(np.stack([p.points for p in prompts]), dev) * scale
            points = xy.float(), send(np.stack([p.labels for p in prompts]), dev)
        box = None if first.box is None else send(np.stack([p.box for p in prompts]), dev).float() * scale
        dense = None if first.dense is None else torch.stack([p.dense for p in prompts])[:, None].to(dev).float()
        sparse, where = self.prompt_encoder(points=points, boxes=box, masks=dense)
        given = {"image_embeddings": features, "image_pe": self.prompt_encoder.get_dense_pe()}
        given |= {"sparse_prompt_embeddings": sparse, "dense_prompt_embeddings": where}
        if isinstance(self.mask_decoder, HQDecoder):
            return self.mask_decoder(**given, early=early)
        return self.mask_decoder(**given, multimask_output=several)


class SamSegmenter:
    """Any Sam as a segmenter; float32, on CUDA the encoder under bf16 autocast."""

    mask_threshold, memory_is_mask = 0.0, False

    def __init__(self, sam: Sam, device: torch.device):
        self.sam, self.device, self.cells = sam.to(device).eval(), device, sam.cells

    @torch.inference_mode()
    def encode(self, frame: np.ndarray) -> Embedding:
        g = Geometry(*frame.shape[:2], self.cells)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            features = self.sam.image_encoder(self.sam.pixels(frame[None]))
        kept = torch.float16 if self.device.type == "cuda" else torch.float32
        early, self.sam.early = self.sam.early, None
        h, w = g.valid
        data = features.to(kept), None if early is None else early.to(kept)
        return Embedding(g, data, data[0][0, :, :h, :w], 1 / g.scale)

    def features(self, e: Embedding) -> Tensor:
        return e.features

    @torch.inference_mode()
    def decode(self, e: Embedding, prompts: list[Prompt]) -> list[Decoded]:
        out: list[Decoded | None] = [None] * len(prompts)
        kinds: dict[tuple, list[int]] = {}
        for i, p in enumerate(prompts):
            if p.empty and p.dense is None:
                out[i] = torch.full((4 * self.cells,) * 2, -8.0), 0.0
            else:
                kinds.setdefault((len(p.points), p.box is None, p.dense is None), []).append(i)
        features, early = (None if x is None else x.float() for x in e.data)
        scale = self.sam.size / max(e.geometry.height, e.geometry.width)
        for members in kinds.values():
            masks, quality = self.sam.predict(features, early, [prompts[i] for i in members], scale)
            for k, i in enumerate(members):
                out[i] = masks[k, 0].float().cpu(), float(quality[k, 0].clamp(0, 1))
        return out


def load(sam: Sam, name: str, path: Path) -> None:
    """A checkpoint into a Sam, every key (strict)."""
    if not path.is_file():
        raise UserError(f"no weights {path}; place there {FILES[name]}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, header: the file is no plain checkpoint
        raise UserError(
            f"{path} is no readable checkpoint of tensors ({type(error).__name__}); place there {FILES[name]}"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state dict")
    if name in ("mobile", "hq_tiny"):
        state = mobile_keys(state)
    wrong = mismatch(sam, state)
    if wrong:
        raise UserError(f"{path} does not fit --segmenter {name}: {wrong}; place there {FILES[name]}")
    sam.load_state_dict(state, strict=True)
    sam.eval()  # again, after loading: attention caches its biases when it is switched to eval
