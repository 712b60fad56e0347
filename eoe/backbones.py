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
from dataclasses import dataclass, field, replace
from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor

import conse
import data
from scores import normalise

CLIP_STATS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_STATS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Known:
    title: str  # as in the settings of paper.csv
    library: str  # transformers, open_clip or conse
    id: str  # Hugging Face id, open_clip architecture, or what decides the features beside the weights
    size: int
    stats: tuple
    tokenizer: str = "clip"  # clip: the vocabulary inside open_clip; own: the one beside the weights
    # What the configuration of the towers that `title` names says otherwise than the library's default for the family.
    vision: dict = field(default_factory=dict)
    text: dict = field(default_factory=dict)
    width: int = 0  # of the joint space; 0: the default's


LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
LARGE_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
LITE_STATS = ((0.498, 0.498, 0.498), (0.502, 0.502, 0.502))  # of the wheels' networks
KNOWN = {
    "clip-vit-b16": Known(
        "CLIP ViT-B/16", "transformers", "openai/clip-vit-base-patch16", 224, CLIP_STATS, vision={"patch_size": 16}
    ),
    "clip-vit-b32": Known("CLIP ViT-B/32", "transformers", "openai/clip-vit-base-patch32", 224, CLIP_STATS),
    "clip-vit-l14": Known(
        *("CLIP ViT-L/14", "transformers", "openai/clip-vit-large-patch14", 224, CLIP_STATS),
        vision={**LARGE, "patch_size": 14},
        text=LARGE_TEXT,
        width=768,
    ),
    # OpenAI's weights need QuickGELU; a plain GELU architecture loads them and silently loses quality.
    "clip-rn50": Known("CLIP RN50", "open_clip", "RN50-quickgelu", 224, CLIP_STATS),
    "clip-rn101": Known("CLIP RN101", "open_clip", "RN101-quickgelu", 224, CLIP_STATS),
    "clip-rn50x4": Known("CLIP RN50x4", "open_clip", "RN50x4-quickgelu", 288, CLIP_STATS),
    "clip-rn50x16": Known("CLIP RN50x16", "open_clip", "RN50x16-quickgelu", 384, CLIP_STATS),
    "groupvit": Known("GroupViT", "transformers", "nvidia/groupvit-gcc-yfcc", 224, IMAGENET_STATS),
    "align": Known("ALIGN", "transformers", "kakaobrain/align-base", 289, HALF_STATS, "own"),
    "altclip": Known(
        *("AltCLIP", "transformers", "BAAI/AltCLIP", 224, CLIP_STATS, "own"),
        vision={**LARGE, "patch_size": 14},
        width=768,
    ),
    # No backbone of the paper: an ImageNet network and a sentence encoder out of packages (conse.py).
    "conse-lite0": Known("ConSE EfficientNet-Lite0", "conse", f"tau {conse.TAU:g}", 160, LITE_STATS, "own"),
    "conse-lite2": Known("ConSE EfficientNet-Lite2", "conse", f"tau {conse.TAU:g}", 160, LITE_STATS, "own"),
}
# What a tower's configuration says that is not of the network in use: training, generation, names, bookkeeping. The
# width of the joint space is that of the whole model, whatever a tower says.
NO_PART = re.compile(
    r"^_|dropout|drop_|initializer|token_id|dtype|version|output_|return_dict|architectures|name_or_path|label|"
    r"use_cache|chunk_size|attn_implementation|projection_dim|is_encoder_decoder|add_cross|is_decoder|tie_word|problem_type"
)


def _code() -> str:
    """Of the library and of the files that make features: what other code made is not taken from the disk."""
    files = [Path(runs.HERE, f"{m}.py").read_bytes() for m in ("backbones", "conse", "data")]
    return hashlib.sha256(b"".join([torch.__version__.encode(), *files])).hexdigest()


class Backbone:
    """A loaded model; `fingerprint` changes with the weights and with anything that changes features."""

    def __init__(self, name: str, known: Known, model, tokenizer, device, bf16: bool = False):
        self.name, self.known, self.device, self.bf16 = name, known, device, bf16
        self.model, self.tokenizer = model.eval().requires_grad_(False).to(device), tokenizer
        digest = hashlib.sha256(f"{name} {known} {bf16} bilinear {_code()}".encode())
        for key, value in sorted(self.model.state_dict().items()):
            if value.is_floating_point() and not value.isfinite().all():
                raise UserError(f"the weights of {name} hold values that are not finite ({key}); get them again")
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
    if known.library == "conse":
        if weights:
            raise UserError(f"--backbone {name} has its weights in packages of the environment; leave --weights out")
        return Backbone(name, known, *conse.load(name, data.id_names("imagenet1k")), device, bf16)
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


def _other(found, wanted: dict, default) -> list[str]:
    """What a tower's configuration says otherwise than `wanted`, and than `default` where that says nothing."""
    have, usual = found.to_dict(), {**default.to_dict(), **wanted}
    keys = sorted(k for k in {*have, *usual} if not NO_PART.search(k))
    return [f"{k} {have.get(k)}" for k in keys if have.get(k) != usual.get(k)]


def _checked(name: str, known: Known, config) -> Known:
    """The weights must be of the family that was asked for; towers that are not those `title` names, in size or in what
    they compute (CLIP's quick_gelu), get a title that says so, and their records meet no printed cell."""
    family = name.split("-")[0]
    if config.model_type != family:
        raise UserError(f"--backbone {name} needs weights of {family}, these are of {config.model_type}")
    vision, default = config.vision_config, type(config)()
    if family == "align":  # a convolutional network takes images of any size
        default.vision_config.image_size = vision.image_size
    elif vision.image_size != known.size:
        raise UserError(f"{name} takes images of {known.size} pixels, these weights take {vision.image_size}")
    other = _other(vision, known.vision, default.vision_config)
    if config.projection_dim != (known.width or default.projection_dim):
        other.append(f"projection_dim {config.projection_dim}")
    other += [f"text {x}" for x in _other(config.text_config, known.text, default.text_config)]
    if not other:
        return known
    more = f", {len(other) - 3} more" if len(other) > 3 else ""
    return replace(known, title=f"{known.title} ({', '.join(other[:3])}{more})")


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
    numbers = range(rank, -(-len(images) // batch), world)
    loader = torch.utils.data.DataLoader(
        data.Transformed(images, backbone.transform()),
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
