"""A folder of pictures, one folder a class, ranked by how well label and picture fit: nothing is trained but logistic
regressions on the features of EfficientNet-Lite0, and no generator is needed."""

import base64
import csv
import html
import io
from dataclasses import dataclass
from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from baselines import selection

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
THUMBNAIL = 96  # pixels of the page's pictures


@dataclass
class Ranked:
    """Pictures and what was found of them; rows [n] in the order of `files`."""

    files: list[Path]
    """Below the folder."""
    classes: list[str]
    y: Tensor
    """Class [n] by the folder a picture lies in."""
    likeliest: Tensor
    """Class [n] that regressions fitted to the other pictures give the most to."""
    p_label: Tensor
    """What they give to the picture's own label [n], in [0, 1]."""
    agreeing: Tensor
    """Share [n] of the ten nearest other pictures with the same label."""
    fit: Tensor
    """The two multiplied [n], neighbours counted with one more that agrees: a label that either doubts fits badly."""

    def worst(self) -> list[int]:
        return torch.argsort(self.fit, stable=True).tolist()


def find(folder: Path) -> tuple[list[Path], list[str], Tensor]:
    """(pictures below the folder, classes, class of each [n]); a class is a folder, its pictures may lie deeper."""
    if not folder.is_dir():
        raise UserError(f"--images {folder} is no folder; give one that holds a folder a class")
    kinds = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    found = {k: sorted(p for p in (folder / k).rglob("*") if p.suffix.lower() in SUFFIXES) for k in kinds}
    kinds = [k for k in kinds if found[k]]
    if len(kinds) < 2:
        raise UserError(
            f"--images {folder} has pictures in {len(kinds)} folders; two classes, a folder each, are needed"
        )
    few = next((k for k in kinds if len(found[k]) < 5), None)
    if few is not None:
        raise UserError(
            f"--images {folder}: class {few} has {len(found[few])} pictures, too few to judge it by; add some"
        )
    return [p for k in kinds for p in found[k]], kinds, torch.tensor([c for c, k in enumerate(kinds) for _ in found[k]])


def read(path: Path, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: the middle square, upright, in colour."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture ({str(error)[:120]}); mend or remove it") from None
    return np.asarray(ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC))


def rank(folder: Path, extract, seed: int = 0) -> Ranked:
    """Features of every picture by `extract` (uint8 [n, side, side, 3] -> [n, D]; it has `size` and `batch`), then two
    selectors that know no generator: the label's probability by regressions fitted to other pictures (five parts), and
    the agreement of its nearest neighbours."""
    files, classes, y = find(folder)
    chunks = [files[i : i + extract.batch] for i in range(0, len(files), extract.batch)]
    parts = [
        extract(torch.from_numpy(np.stack([read(p, extract.size) for p in chunk])))
        for chunk in progress(chunks, "features", len(chunks))
    ]
    f = torch.cat(parts)
    p = selection.out_of_sample(f, y, len(classes), seed, c=10.0)
    p_label, agreeing = selection.label_probability(p, y), selection.knn_agreement(f, y).clamp(max=1)
    relative = [q.relative_to(folder) for q in files]
    return Ranked(relative, classes, y, p.argmax(1), p_label, agreeing, p_label * (10 * agreeing + 1) / 11)


def table(r: Ranked) -> str:
    """CSV, the worst first."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["rank", "file", "label", "likeliest", "probability_of_label", "agreeing_neighbours", "fit"])
    for k, i in enumerate(r.worst()):
        names = r.files[i].as_posix(), r.classes[r.y[i]], r.classes[r.likeliest[i]]
        out.writerow([k + 1, *names, *(f"{float(v[i]):.4f}" for v in (r.p_label, r.agreeing, r.fit))])
    return text.getvalue()


def page(r: Ranked, folder: Path, worst: int) -> str:
    """HTML that needs no other file: the worst pictures with their label and their likeliest class."""
    cells = []
    for k, i in enumerate(r.worst()[:worst]):
        raw = io.BytesIO()
        Image.fromarray(read(folder / r.files[i], THUMBNAIL)).save(raw, "PNG")
        said, other = html.escape(r.classes[r.y[i]]), html.escape(r.classes[r.likeliest[i]])
        more = f"<s>{said}</s> {other}?" if said != other else f"{said}, unsure"
        name, shown = html.escape(r.files[i].as_posix()), base64.b64encode(raw.getvalue()).decode()
        cells.append(
            f'<figure><img src="data:image/png;base64,{shown}" alt="{name}" title="{name}"><figcaption>{k + 1}. {more}'
            f"<br>{100 * float(r.p_label[i]):.0f} % its label, {10 * float(r.agreeing[i]):.0f} of 10 neighbours"
            "</figcaption></figure>"
        )
    style = "body{font-family:sans-serif;margin:1.5em}main{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0;"
    style += f"width:{THUMBNAIL + 60}px;font-size:.8em}}s{{color:#c1272d}}"
    title = f"{len(cells)} of {len(r.y)} pictures whose label fits them least"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1><p>Label struck out: another class is likelier. Nothing was changed.</p>"
        f"<main>{''.join(cells)}</main></html>\n"
    )


def report(folder: Path, extract, out: Path, worst: int) -> Ranked:
    """Write out/labels.csv and out/labels.html."""
    r = rank(folder, extract)
    out.mkdir(parents=True, exist_ok=True)
    runs.write_text(out / "labels.csv", table(r))
    runs.write_text(out / "labels.html", page(r, folder, worst))
    return r
