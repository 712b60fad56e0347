"""Frozen vision-language encoders by name, and their features on disk.

A backbone has encode_images(pixels) and encode_texts(strings), both without normalisation, and its images' transform.
The paper's code resizes bilinearly; CLIP's own transform is bicubic and gives other numbers.
"""

import hashlib
import json
import os
import pickle
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor

CLIP_STATS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_STATS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Known:
    title: str  # as in the settings of paper.csv
    library: str  # transformers or open_clip
    id: str  # Hugging Face id, or open_clip architecture
    size: int
    stats: tuple
    tokenizer: str = "clip"  # clip: the vocabulary inside open_clip; own: the one beside the weights
    vit: tuple[int, int] | None = None  # patch and width of the vision transformer that `title` names


KNOWN = {
    "clip-vit-b16": Known(
        "CLIP ViT-B/16", "transformers", "openai/clip-vit-base-patch16", 224, CLIP_STATS, vit=(16, 768)
    ),
    "clip-vit-b32": Known(
        "CLIP ViT-B/32", "transformers", "openai/clip-vit-base-patch32", 224, CLIP_STATS, vit=(32, 768)
    ),
    "clip-vit-l14": Known(
        "CLIP ViT-L/14", "transformers", "openai/clip-vit-large-patch14", 224, CLIP_STATS, vit=(14, 1024)
    ),
    # OpenAI's weights need QuickGELU; a plain GELU architecture loads them and silently loses quality.
    "clip-rn50": Known("CLIP RN50", "open_clip", "RN50-quickgelu", 224, CLIP_STATS),
    "clip-rn101": Known("CLIP RN101", "open_clip", "RN101-quickgelu", 224, CLIP_STATS),
    "clip-rn50x4": Known("CLIP RN50x4", "open_clip", "RN50x4-quickgelu", 288, CLIP_STATS),
    "clip-rn50x16": Known("CLIP RN50x16", "open_clip", "RN50x16-quickgelu", 384, CLIP_STATS),
    "groupvit": Known("GroupViT", "transformers", "nvidia/groupvit-gcc-yfcc", 224, IMAGENET_STATS),
    "align": Known("ALIGN", "transformers", "kakaobrain/align-base", 289, HALF_STATS, "own"),
    "altclip": Known("AltCLIP", "transformers", "BAAI/AltCLIP", 224, CLIP_STATS, "own"),
}


class Backbone:
    """A loaded model; `fingerprint` changes with the weights and with anything that changes features."""

    def __init__(self, name: str, known: Known, model, tokenizer, device, bf16: bool = False):
        self.name, self.known, self.device, self.bf16 = name, known, device, bf16
        self.model, self.tokenizer = model.eval().requires_grad_(False).to(device), tokenizer
        digest = hashlib.sha256(f"{name} {known} {bf16} bilinear".encode())
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def transform(self):
        """Resize the short side bilinearly, centre crop, normalise."""
        from torchvision.transforms import v2

        return v2.Compose(
            [
                v2.PILToTensor(),
                v2.Resize(self.known.size, v2.InterpolationMode.BILINEAR, antialias=True),
                v2.CenterCrop(self.known.size),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(*self.known.stats),
            ]
        )

    @torch.inference_mode()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """[B, 3, size, size] -> float32 [B, d]."""
        pixels = pixels.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if self.known.library == "open_clip":
                out = self.model.encode_image(pixels)
            else:
                out = self.model.get_image_features(pixel_values=pixels)
        return getattr(out, "pooler_output", out).float()

    @torch.inference_mode()
    def encode_texts(self, texts: list[str], batch: int = 256) -> Tensor:
        """Strings -> float32 [N, d] on the CPU; always float32 arithmetic."""
        out = []
        for i in range(0, len(texts), batch):
            part = texts[i : i + batch]
            if self.known.tokenizer == "clip":
                ids = self.tokenizer(part, context_length=self._length()).to(self.device)
                given = {"input_ids": ids}
            else:
                given = dict(self.tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt"))
                given = {k: v.to(self.device) for k, v in given.items() if k in ("input_ids", "attention_mask")}
            if self.known.library == "open_clip":
                found = self.model.encode_text(given["input_ids"])
            else:
                found = self.model.get_text_features(**given)
            out.append(getattr(found, "pooler_output", found).float().cpu())
        return torch.cat(out)

    def _length(self) -> int:
        if self.known.library == "open_clip":
            return self.model.context_length
        return self.model.config.text_config.max_position_embeddings


def load(name: str, device, weights: str = "", data_dir: Path | None = None, download=False, bf16=False) -> Backbone:
    """A backbone by name; weights from `weights`, <data-dir>/weights/<name>, or (with download) from their origin."""
    if name not in KNOWN:
        raise UserError(f"no backbone {name}; use one of {', '.join(KNOWN)}")
    known = KNOWN[name]
    folder = Path(weights) if weights else (data_dir or runs.data_dir("")) / "weights" / name
    if not folder.exists() and not download:
        what = (
            "a Hugging Face model folder" if known.library == "transformers" else "an open_clip safetensors file in it"
        )
        raise UserError(
            f"no weights in {folder}; place {known.id} there ({what}), name them by --weights, or use --download"
        )
    try:
        if known.library == "open_clip":
            model, tokenizer = _open_clip(known, folder, download)
        else:
            model, tokenizer = _transformers(known, folder, download)
            known = _checked(name, known, model.config)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"the weights of {name} in {folder} cannot be loaded: {str(error)[:300]}") from None
    return Backbone(name, known, model, tokenizer, device, bf16)


def _clip_tokenizer():
    """CLIP's byte-pair vocabulary comes inside open_clip; GroupViT uses the same one."""
    import open_clip

    return open_clip.tokenizer.SimpleTokenizer()


def _open_clip(known: Known, folder: Path, download: bool):
    import open_clip

    if folder.exists():
        files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder} holds no .safetensors file for {known.id}")
        model = open_clip.create_model(known.id, pretrained=str(files[0]), weights_only=True)
    else:
        model = open_clip.create_model(known.id, pretrained="openai")
    return model, _clip_tokenizer()


def _transformers(known: Known, folder: Path, download: bool):
    from transformers import AutoModel, AutoTokenizer

    where = str(folder) if folder.exists() else known.id
    model, found = AutoModel.from_pretrained(
        where,
        local_files_only=not download,
        trust_remote_code=False,
        dtype=torch.float32,
        output_loading_info=True,
    )
    # The library fills what a file lacks with random numbers. The poolers and the logit scale take no part in features.
    lost = sorted(k for k in found["missing_keys"] if not re.search(r"pooler\.|position_ids|logit_scale", k))
    if lost:
        raise UserError(f"the weights in {where} are incomplete: {lost[0]} and {len(lost) - 1} others are missing")
    if not hasattr(model, "get_image_features"):
        raise UserError(f"{where} holds a {type(model).__name__}, which has no image and text encoder")
    own = known.tokenizer == "own"
    return model, AutoTokenizer.from_pretrained(
        where, local_files_only=not download, trust_remote_code=False
    ) if own else _clip_tokenizer()


def _checked(name: str, known: Known, config) -> Known:
    """The weights must be of the family that was asked for; another size is named, so that it meets no printed cell."""
    family = name.split("-")[0]
    if config.model_type != family:
        raise UserError(f"--backbone {name} needs weights of {family}, these are of {config.model_type}")
    if known.vit is None:
        return known
    vision = config.vision_config
    if vision.image_size != known.size:
        raise UserError(f"{name} takes images of {known.size} pixels, these weights take {vision.image_size}")
    if (vision.patch_size, vision.hidden_size) == known.vit:
        return known
    return replace(known, title=f"{known.title} (patch {vision.patch_size}, width {vision.hidden_size})")


# ------------------------------------------------------------------------------------------------- features on disk


def cache_dir() -> Path:
    """$EOE_CACHE, else data/cache beside the code; a file is named by the hash of all that its content depends on."""
    return Path(os.environ.get("EOE_CACHE") or runs.HERE / "data" / "cache")


def _file(*parts) -> Path:
    return cache_dir() / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.safetensors"


def image_features(backbone: Backbone, images, batch: int = 256, workers: int = 4) -> Tensor:
    """Unit features [N, d] float32 of an image set, in its order; computed once for each backbone and file list.

    Several processes of one launch take every so-many-th batch; each batch is the one a single process would make, so
    the features are the same to the last bit. All processes return all features.
    """
    from scores import normalise

    path, state = _file("images", backbone.fingerprint, images.sha256, len(images)), PartialState()
    # One answer for all, as the file may come to be between two looks; the number keeps two launches apart.
    there, launch = broadcast_object_list([path.is_file(), os.getpid()])
    if not there:
        pieces = [path.with_name(f".{path.stem}.{launch}.{i}.piece") for i in range(state.num_processes)]
        for old in path.parent.glob(".*.piece") if state.is_main_process else ():  # of a launch that was killed
            if time.time() - old.stat().st_mtime > 86_400:
                old.unlink(missing_ok=True)
        mine = _encode(backbone, images, batch, workers, state.process_index, state.num_processes)
        if state.num_processes == 1:
            found = mine
        else:
            runs.write_tensors(pieces[state.process_index], {str(i): x for i, x in mine.items()})
            state.wait_for_everyone()
            found = (
                {int(i): x for p in pieces for i, x in runs.read_tensors(p)[0].items()} if state.is_main_process else {}
            )
        if state.is_main_process:
            features = normalise(torch.cat([found[i] for i in sorted(found)])).cpu()
            if not torch.isfinite(features).all():
                raise UserError(
                    f"features of {images.name} by {backbone.name} are not finite; broken weights or bf16 overflow?"
                )
            runs.write_tensors(path, {"features": features}, {"backbone": backbone.name, "images": images.name})
            for piece in pieces:
                piece.unlink(missing_ok=True)
        state.wait_for_everyone()
    return runs.read_tensors(path)[0]["features"]


def _encode(backbone: Backbone, images, batch: int, workers: int, rank: int, world: int) -> dict[int, Tensor]:
    """{number of the batch: its features} of the batches rank, rank + world, ..."""
    from data import Transformed

    numbers = range(rank, -(-len(images) // batch), world)
    loader = torch.utils.data.DataLoader(
        Transformed(images, backbone.transform()),
        batch_sampler=[range(i * batch, min((i + 1) * batch, len(images))) for i in numbers],
        num_workers=min(workers, os.cpu_count() or 1),
        pin_memory=backbone.device.type == "cuda",
    )
    bar = progress(loader, f"{backbone.name} {images.name}", hide=bool(rank), unit="batch")
    try:
        return {i: backbone.encode_images(x) for i, x in zip(numbers, bar, strict=True)}
    except UserError as error:  # torch wraps what a worker raises into that worker's traceback
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]) from None
    except torch.OutOfMemoryError:
        raise UserError(f"the device has no memory for {batch} images at once; lower --batch") from None


class CachedTexts:
    """A backbone whose text features are kept on disk by the content of the prompts."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    def encode_texts(self, texts: list[str]) -> Tensor:
        path = _file("texts", self.backbone.fingerprint, texts)
        if not path.is_file():
            features = self.backbone.encode_texts(texts)
            if not torch.isfinite(features).all():
                raise UserError(f"text features by {self.backbone.name} are not finite; broken weights?")
            runs.write_tensors(path, {"features": features}, {"backbone": self.backbone.name})
        return runs.read_tensors(path)[0]["features"]
