"""CLIP by name, and the names of ImageNet's classes for it."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from lab import runs
from lab.runs import UserError

import torch
from PIL import Image
from torch import Tensor

from vision.encoder import MEAN, STD


class Clip:
    """Image and text features of an open_clip model. `image_features` [N, d] and `text_features` [K, d] are as the
    model gives them, not normalised."""

    def __init__(self, model, tokenizer: Callable, size: int, device: str | torch.device = "cpu"):
        self.model, self.tokenizer, self.size, self.device = model.eval().to(device), tokenizer, size, device
        self._mean, self._std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))

    def pixels(self, images: Sequence[Image.Image], crop: bool = False) -> Tensor:
        """[N, 3, size, size], CLIP's mean and deviation taken out. Squashed to the square (RobustVQA), or short side to
        `size` and the centre cut out (CLIP's own way); both bicubic."""
        from torchvision.transforms import functional as F

        out = []
        for image in images:
            if crop:
                mode = F.InterpolationMode.BICUBIC
                image = F.center_crop(F.resize(image, self.size, mode), [self.size, self.size])
            else:
                image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
            out.append(F.pil_to_tensor(image))
        return (torch.stack(out).to(self.device).float() / 255 - self._mean) / self._std

    @torch.inference_mode()
    def image_features(self, images: Sequence[Image.Image], crop: bool = False) -> Tensor:
        return self.model.encode_image(self.pixels(images, crop)).float()

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        parts = [texts[k : k + batch] for k in range(0, len(texts), batch)]
        return torch.cat([self.model.encode_text(self.tokenizer(list(p)).to(self.device)).float() for p in parts])


def load_clip(name: str, weights: str, device: str | torch.device, download: bool = False) -> Clip:
    """An open_clip model by name or configuration file, with the weights of a tag or a file."""
    if not download and not Path(weights).is_file():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported
    import open_clip

    if name.endswith(".json"):
        if not Path(name).is_file():
            raise UserError(f"no model configuration {name}")
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    if name not in open_clip.list_models():
        raise UserError(f"open_clip knows no model {name}; open_clip.list_models() names them")
    try:  # OpenAI's weights were trained with the quick GELU
        model = open_clip.create_model(name, weights, force_quick_gelu=weights == "openai", require_pretrained=True)
    except Exception as error:  # open_clip, huggingface_hub and torch raise their own kinds
        raise UserError(
            f"CLIP weights {weights} for {name} cannot be loaded ({str(error)[:200]}); give --weights FILE, or "
            "--download"
        ) from None
    size = model.visual.image_size
    return Clip(model, open_clip.get_tokenizer(name), size[0] if isinstance(size, tuple) else size, device)


def imagenet_classes(path: Path | None = None) -> tuple[list[str], list[str]]:
    """(wnids, Keras-style names) of the 1000 classes in order: from `imagenet_class_index.json` if it is there, else
    WordNet's first word for the class with blanks as underscores (timm carries both lists)."""
    if path is not None and path.is_file():
        table = runs.read_json(path)
        try:
            return [table[str(k)][0] for k in range(1000)], [table[str(k)][1] for k in range(1000)]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{path} is not Keras' class index {{number: [wnid, name]}}; replace it") from None
    import timm

    folder = Path(timm.__file__).parent / "data" / "_info"
    wnids = (folder / "imagenet_synsets.txt").read_text().split()
    lines = (folder / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    lemma = dict(line.split("\t", 1) for line in lines)
    return wnids, [lemma[w].split(", ")[0].replace(" ", "_") for w in wnids]
