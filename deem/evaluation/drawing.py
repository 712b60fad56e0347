"""Pictures drawn from captions and their Frechet distance to the real ones."""

from collections.abc import Sequence
from pathlib import Path

from lab.progress import progress

import torch

from documents import prompts
from documents.document import Picture
from evaluation import scores
from evaluation.clip import load_clip
from evaluation.sets import Set


def draw(
    model,
    s,
    one: Set,
    questions: Sequence,
    root: Path,
    folder: Path,
    seed: int,
    form: str,
    device,
) -> dict:
    """FID of pictures drawn from captions against the real ones. The best of `samples` by CLIP is kept as PNG below
    `folder`; an interrupted start draws only what is missing."""
    from PIL import Image
    from torchvision.transforms import functional as F

    samples = s.samples or (8 if one.label.startswith("MS-COCO") else 1)
    fid = scores.Fid(device=device, download=s.download)
    clip = load_clip(s.clip, s.clip_weights, device, s.download) if samples > 1 else None
    folder.mkdir(parents=True, exist_ok=True)
    size, count = 0, 0
    for start in progress(range(0, len(questions), s.batch_size), one.label, unit="batch"):
        part = questions[start : start + s.batch_size]
        paths = [folder / f"{start + k:06d}.png" for k in range(len(part))]
        if not all(p.is_file() for p in paths):
            documents = [prompts.drawing(q.answer, form) for q in part]
            drawn = torch.stack(
                [
                    model.draw(documents, steps=s.draw_steps, guidance=s.guidance, seed=(seed * 8191 + start) * 64 + k)
                    for k in range(samples)
                ],
                1,
            )  # [n, samples, 3, H, W]
            pixels = (drawn.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
            best = torch.zeros(len(part), dtype=torch.long)
            if clip is not None:
                texts = clip.text_features([q.answer for q in part])
                views = [F.to_pil_image(x) for row in pixels for x in row]
                best = scores.best_of(clip.image_features(views, crop=True).view(len(part), samples, -1), texts).cpu()
            for path, row, k in zip(paths, pixels, best.tolist(), strict=True):
                _save(F.to_pil_image(row[k]), path)
        for q, path in zip(part, paths, strict=True):
            with Image.open(path) as image:
                made = F.pil_to_tensor(image.convert("RGB"))
            size = made.shape[-1]
            real = F.center_crop(F.resize(Picture(root / one.images / str(q.image)).load(), size), [size, size])
            fid.add(made[None], real=False)
            fid.add(F.pil_to_tensor(real)[None], real=True)
            count += 1
    return {"fid": fid.score(), "n": count, "samples": samples}


def _save(image, path: Path) -> None:
    """A PNG, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, format="PNG")
    temporary.replace(path)
