"""Segmenters behind one interface: a picture is encoded once, then prompts of any object decode to low-resolution
logits.

SAM (ViT-B, L, H), HQ-SAM, MobileSAM and a tiny SAM share the classes of segment-anything; GrabCut needs no weights.
All speak of a square of `cells` x `cells` embedding cells (4 x 4 low-resolution logits each) that holds the picture at
its top left, the long side filling it.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

import crstm
from prompts import Prompt, box_of, grow, inside
from runs import UserError

NAMES = ("grabcut", "tiny", "mobile", "vit_b", "vit_l", "vit_h", "hq_vit_b", "hq_vit_l", "hq_vit_h", "hq_tiny")
FILES = {
    "mobile": "mobile_sam.pt (github.com/ChaoningZhang/MobileSAM, weights/)",
    **{"vit_b": "sam_vit_b_01ec64.pth (github.com/facebookresearch/segment-anything)"},
    **{"vit_l": "sam_vit_l_0b3195.pth (github.com/facebookresearch/segment-anything)"},
    **{"vit_h": "sam_vit_h_4b8939.pth (github.com/facebookresearch/segment-anything)"},
    **{f"hq_{k}": f"sam_hq_{k}.pth (github.com/SysCV/sam-hq)" for k in ("vit_b", "vit_l", "vit_h", "tiny")},
    "tiny": "model.safetensors of a run of train.py",
}
VIT = {"vit_b": (768, 12, 12, (2, 5, 8, 11)), "vit_l": (1024, 24, 16, (5, 11, 17, 23))}
VIT["vit_h"] = (1280, 32, 16, (7, 15, 23, 31))
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Geometry:
    """Where a picture of height x width lies on the square of cells."""

    height: int
    width: int
    cells: int

    @property
    def scale(self) -> float:
        """Cells a pixel."""
        return self.cells / max(self.height, self.width)

    @property
    def valid(self) -> tuple[int, int]:
        """Rows and columns of cells that hold some of the picture."""
        return math.ceil(self.height * self.scale - 1e-6), math.ceil(self.width * self.scale - 1e-6)

    def full(self, low: Tensor) -> np.ndarray:
        """Low-resolution logits (4 cells, 4 cells) -> float32 logits (height, width), bilinear."""
        s = 4 * self.scale
        m = np.array([[s, 0, s / 2 - 0.5], [0, s, s / 2 - 0.5]], np.float32)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        image = low.float().cpu().numpy()
        return cv2.warpAffine(image, m, (self.width, self.height), flags=flags, borderMode=cv2.BORDER_REPLICATE)

    def low(self, logits: np.ndarray, outside: float = -8.0) -> Tensor:
        """Logits (height, width) -> (4 cells, 4 cells), averaged; padding gets `outside`."""
        side, s = 4 * self.cells, 4 * self.scale
        h, w = max(1, round(self.height * s)), max(1, round(self.width * s))
        small = cv2.resize(
            logits.astype(np.float32), (w, h), interpolation=cv2.INTER_AREA if s < 1 else cv2.INTER_LINEAR
        )
        out = np.full((side, side), outside, np.float32)
        out[:h, :w] = small[:side, :side]
        return torch.from_numpy(out)


@dataclass
class Embedding:
    """An encoded picture: `key` (C, h, w) with columns of length 1, only cells of the picture; the rest is the
    segmenter's own."""

    geometry: Geometry
    key: Tensor
    data: object


Decoded = tuple[Tensor, float]  # low-resolution logits (4 cells, 4 cells), predicted IoU


# -------------------------------------------------------------------------------------------------------------- GrabCut


class GrabCut:
    """OpenCV's GrabCut on a crop around the prompts. Points are sure pixels, the box bounds the object, the dense
    prompt and, without one, box or hull of the points say which pixels are probably the object. Predicted IoU stands in
    for SAM's: agreement of the mask with box, dense prompt and points."""

    cells, mask_threshold = 64, 0.0

    def __init__(self, side: int = 144, iterations: int = 2):
        self.side, self.iterations, self.device = side, iterations, torch.device("cpu")

    def encode(self, frame: np.ndarray) -> Embedding:
        g = Geometry(*frame.shape[:2], self.cells)
        h, w = g.valid
        lab = cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        lab = (lab - np.array([50, 0, 0], np.float32)) / np.array([40, 25, 25], np.float32)
        fine = cv2.resize(lab, (w, h), interpolation=cv2.INTER_AREA)
        coarse = cv2.GaussianBlur(fine, (0, 0), 2)
        edges = []
        for layer in (fine[..., 0], coarse[..., 0]):
            gx, gy = cv2.Sobel(layer, cv2.CV_32F, 1, 0), cv2.Sobel(layer, cv2.CV_32F, 0, 1)
            edges.append(np.hypot(gx, gy)[..., None] / 4)
        features = np.concatenate([fine, coarse, *edges], -1)  # 8 channels
        return Embedding(g, crstm.unit(torch.from_numpy(features).permute(2, 0, 1)), frame)

    def guess(self, e: Embedding, positive: np.ndarray) -> Tensor:
        """Low-resolution logits for a user's first clicks, which say nothing of the extent: probably the object near
        the hull of the points, surely not far away. SAM needs no such help and has no such method."""
        h, w = e.geometry.height, e.geometry.width
        seed = np.ones((h, w), np.uint8)
        hull = cv2.convexHull(positive.astype(np.float32)).round().astype(np.int32)
        cv2.fillConvexPoly(seed, hull, 0)
        cv2.polylines(seed, [hull], True, 0)
        away = cv2.distanceTransform(seed, cv2.DIST_L2, 3) / (max(h, w) * (0.09 if len(positive) < 6 else 0.04))
        return e.geometry.low(np.where(away <= 1, 1.0, np.where(away <= 3, -1.0, -6.0)))

    def decode(self, e: Embedding, prompts: list[Prompt]) -> list[Decoded]:
        return [self.one(e, p) for p in prompts]

    def one(self, e: Embedding, p: Prompt) -> Decoded:
        frame, g = e.data, e.geometry
        h, w = g.height, g.width
        dense = None if p.dense is None else g.full(p.dense)
        region = self.region(p, dense, h, w)
        if region is None:
            return torch.full((4 * g.cells,) * 2, -8.0), 0.0
        x1, y1, x2, y2 = region
        shrink = min(1.0, self.side / max(x2 - x1, y2 - y1))
        size = max(2, round((x2 - x1) * shrink)), max(2, round((y2 - y1) * shrink))
        crop = cv2.resize(frame[y1:y2, x1:x2], size, interpolation=cv2.INTER_AREA)
        place = np.array([x1, y1], np.float32)
        points = ((p.points - place + 0.5) * shrink - 0.5) if len(p.points) else p.points
        box = None if p.box is None else (np.asarray(p.box, np.float32) - np.tile(place, 2)) * shrink
        prior = None if dense is None else cv2.resize(dense[y1:y2, x1:x2], size, interpolation=cv2.INTER_AREA)
        trimap = self.trimap(size, points, p.labels, box, prior)
        mask = self.cut(crop, trimap)
        blurred = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.8)
        logits = np.log(np.clip(blurred, 2e-3, 1 - 2e-3) / np.clip(1 - blurred, 2e-3, 1 - 2e-3))
        out = np.full((h, w), -8.0, np.float32)
        out[y1:y2, x1:x2] = cv2.resize(logits, (x2 - x1, y2 - y1), interpolation=cv2.INTER_LINEAR)
        return g.low(out), self.trust(mask, points, p.labels, box, prior)

    @staticmethod
    def region(p: Prompt, dense: np.ndarray | None, h: int, w: int) -> tuple[int, int, int, int] | None:
        """The crop: box, else positive points, and the dense prompt, with room around."""
        parts = []
        if p.box is not None:
            parts.append(grow(np.asarray(p.box, np.float32), 0.15))
        elif (p.labels == 1).any():
            q = p.positive
            span = np.r_[q.min(0), q.max(0)]
            least = 0.08 * max(h, w)
            pad = np.maximum((span[2:] - span[:2]) * 0.4, least)
            parts.append(np.r_[span[:2] - pad, span[2:] + pad])
        if dense is not None:
            found = box_of(dense > 0)
            if found is not None:
                parts.append(grow(found, 0.15))
        if not parts:
            return None
        low, high = np.min([b[:2] for b in parts], 0) - 2, np.max([b[2:] for b in parts], 0) + 3
        x1, y1 = (int(np.clip(np.floor(v), 0, m - 2)) for v, m in zip(low, (w, h), strict=True))
        x2, y2 = (int(np.clip(np.ceil(v), a + 2, m)) for v, a, m in zip(high, (x1, y1), (w, h), strict=True))
        return (x1, y1, x2, y2) if h >= 2 and w >= 2 else None

    @staticmethod
    def trimap(size, points, labels, box, prior) -> np.ndarray:
        w, h = size
        out = np.full((h, w), cv2.GC_PR_BGD, np.uint8)
        y, x = np.mgrid[:h, :w]
        if prior is not None:
            out[prior > 0] = cv2.GC_PR_FGD
            out[prior < -4] = cv2.GC_BGD
            out[prior > 4] = cv2.GC_FGD
        elif box is not None:
            out[(x >= box[0]) & (x <= box[2]) & (y >= box[1]) & (y <= box[3])] = cv2.GC_PR_FGD
        elif (labels == 1).sum() >= 3:
            hull = cv2.convexHull(points[labels == 1].astype(np.float32)).round().astype(np.int32)
            area = np.zeros((h, w), np.uint8)
            cv2.fillConvexPoly(area, hull, 1)
            out[cv2.dilate(area, np.ones((5, 5), np.uint8)) > 0] = cv2.GC_PR_FGD
        if box is not None:  # the box grown by a tenth bounds the object
            b = grow(box, 0.1)
            out[(x < b[0]) | (x > b[2]) | (y < b[1]) | (y > b[3])] = cv2.GC_BGD
        radius = max(1, round(0.015 * max(w, h)))
        for (px, py), label in zip(points, labels, strict=True):
            if -radius <= px < w + radius and -radius <= py < h + radius:
                value = cv2.GC_FGD if label == 1 else cv2.GC_BGD
                cv2.circle(out, (round(float(px)), round(float(py))), radius, int(value), -1)
        return out

    def cut(self, crop: np.ndarray, trimap: np.ndarray) -> np.ndarray:
        """GrabCut, or the trimap's own guess where there is nothing to tell apart."""
        guess = (trimap == cv2.GC_FGD) | (trimap == cv2.GC_PR_FGD)
        if guess.sum() < 8 or (~guess).sum() < 8:  # a colour model of 5 parts needs some pixels
            return guess
        cv2.setRNGSeed(0)  # its k-means draws; the answer must not depend on what ran before
        work, models = trimap.copy(), (np.zeros((1, 65)), np.zeros((1, 65)))
        cv2.grabCut(crop, work, None, *models, self.iterations, cv2.GC_INIT_WITH_MASK)
        return (work == cv2.GC_FGD) | (work == cv2.GC_PR_FGD)

    @staticmethod
    def trust(mask, points, labels, box, prior) -> float:
        parts, found = [], box_of(mask)
        if found is None:
            return 0.0
        if box is not None:
            low, high = np.maximum(found[:2], box[:2]), np.minimum(found[2:], box[2:])
            both = np.maximum(high - low + 1, 0).prod()
            parts.append(both / ((found[2:] - found[:2] + 1).prod() + (box[2:] - box[:2] + 1).prod() - both))
        if prior is not None:
            p = 1 / (1 + np.exp(-prior))
            parts.append(float(np.minimum(p, mask).sum() / max(float(np.maximum(p, mask).sum()), 1e-6)))
        if len(points):
            h, w = mask.shape
            within = inside(points, np.array([0, 0, w - 1, h - 1]))
            x, y = np.clip(points.round().astype(int), 0, [w - 1, h - 1]).T
            parts.append(float(((mask[y, x] & within) == (labels == 1)).mean()))
        return float(np.clip(np.mean(parts), 0, 1)) if parts else 0.0


# ------------------------------------------------------------------------------------------------------------------ SAM


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
        self.prompt_encoder = PromptEncoder(dim, grid, (size, size), mask_in_chans=16)
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

    def pixels(self, frame: np.ndarray, device) -> Tensor:
        """uint8 RGB (H, W, 3) -> (1, 3, size, size): long side resized, normalised, padded with zeros."""
        h, w = frame.shape[:2]
        s = self.size / max(h, w)
        new = int(h * s + 0.5), int(w * s + 0.5)
        x = torch.from_numpy(np.ascontiguousarray(frame)).to(device).permute(2, 0, 1)[None].float()
        x = F.interpolate(x, (max(new[0], 1), max(new[1], 1)), mode="bilinear", antialias=True, align_corners=False)
        x = (x - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(STD)[:, None, None]
        return F.pad(x, (0, self.size - x.shape[-1], 0, self.size - x.shape[-2]))

    def predict(
        self, features: Tensor, early: Tensor | None, prompts: list[Prompt], scale: float, several: bool = False
    ):
        """Masks (n, k, 4 cells, 4 cells) and predicted IoU (n, k) of prompts of one kind: as many points, with or
        without box and dense prompt alike. `scale`: input pixels a pixel of the frame."""
        dev, first = features.device, prompts[0]
        points = None
        if len(first.points):
            xy = torch.from_numpy(np.stack([p.points for p in prompts])).to(dev) * scale
            points = xy.float(), torch.from_numpy(np.stack([p.labels for p in prompts])).to(dev)
        box = (
            None if first.box is None else torch.from_numpy(np.stack([p.box for p in prompts])).to(dev).float() * scale
        )
        dense = None if first.dense is None else torch.stack([p.dense for p in prompts])[:, None].to(dev).float()
        sparse, where = self.prompt_encoder(points=points, boxes=box, masks=dense)
        given = {"image_embeddings": features, "image_pe": self.prompt_encoder.get_dense_pe()}
        given |= {"sparse_prompt_embeddings": sparse, "dense_prompt_embeddings": where}
        if isinstance(self.mask_decoder, HQDecoder):
            return self.mask_decoder(**given, early=early)
        return self.mask_decoder(**given, multimask_output=several)


class SamSegmenter:
    """Any Sam as a segmenter; float32, on CUDA the encoder under bf16 autocast."""

    mask_threshold = 0.0

    def __init__(self, sam: Sam, device: torch.device):
        self.sam, self.device, self.cells = sam.to(device).eval(), device, sam.cells

    @torch.inference_mode()
    def encode(self, frame: np.ndarray) -> Embedding:
        g = Geometry(*frame.shape[:2], self.cells)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            features = self.sam.image_encoder(self.sam.pixels(frame, self.device))
        kept = torch.float16 if self.device.type == "cuda" else torch.float32
        early, self.sam.early = self.sam.early, None
        h, w = g.valid
        data = features.to(kept), None if early is None else early.to(kept)
        return Embedding(g, crstm.unit(features[0, :, :h, :w]), data)

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


def build(name: str, weights: str, device: torch.device, size: int = 0, side: int = 144) -> GrabCut | SamSegmenter:
    """The segmenter of a name. `weights`: file of the published checkpoint, or of a run of train.py for `tiny`;
    `random` leaves the initial weights (tests)."""
    if name not in NAMES:
        raise UserError(f"--segmenter {name}: use one of {', '.join(NAMES)}")
    if name == "grabcut":
        if weights:
            raise UserError("--segmenter grabcut takes no --weights")
        return GrabCut(side)
    if not weights:
        raise UserError(f"--segmenter {name} needs --weights: {FILES[name]}; without weights use --segmenter grabcut")
    sam = Sam(name, size)
    if weights != "random":
        load(sam, name, Path(weights).expanduser())
    return SamSegmenter(sam, device)


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
        raise UserError(f"{path} is no readable checkpoint of tensors ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state dict")
    if name in ("mobile", "hq_tiny"):
        state = mobile_keys(state)
    try:
        sam.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit --segmenter {name}: {' '.join(str(error).split())[:240]}") from None
    sam.eval()  # again, after loading: attention caches its biases when it is switched to eval
