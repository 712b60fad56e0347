"""RobustVQA: the pictures it is mined from, what is kept of CLIP's predictions, and the annotation file (mining.py)."""

from collections.abc import Sequence
from pathlib import Path

from lab import runs
from lab.runs import UserError

import torch
from torch import Tensor

SUBSETS = {  # official key -> (folder, pattern of the pictures)
    "imagenet_a": ("imagenet-a", "*.jpg"),
    "imagenet_r": ("imagenet-r", "*.jpg"),
    "imagenet_v2": ("imagenetv2", "*.jpeg"),
}
FILE = "robustvqa_test.json"
RELEASED_BATCH = 512


def find_pictures(root: Path, wnids: Sequence[str]) -> list[dict]:
    """Rows {subset, file_name (relative to root), label} of the three sets, in the released script's order."""
    place, out = {w: k for k, w in enumerate(wnids)}, []
    for subset, (folder, pattern) in SUBSETS.items():
        files = sorted(str(p.relative_to(root)) for p in (root / "robustvqa" / folder).glob(f"*/{pattern}"))
        if not files:
            raise UserError(
                f"no pictures {root / 'robustvqa' / folder}/<class>/{pattern}; unpack the set there (see the README) "
                "or give another --data-dir"
            )
        for file in files:
            name = Path(file).parent.name
            label = place.get(name) if folder != "imagenetv2" else int(name) if name.isdigit() else None
            if label is None or not 0 <= label < len(wnids):
                raise UserError(f"{root / file}: {name} is no ImageNet class; look at the folder")
            out.append({"subset": subset, "file_name": file, "label": label})
    return out


def top_two(images: Tensor, texts: Tensor, normalise_text: bool) -> Tensor:
    """Best and second best class [N, 2] of image features [N, d] against text features [K, d].

    Image features are made unit vectors; text features only if asked: left as they are, classes with long text features
    win more often, and the order is no longer that of the cosine.
    """
    images = torch.nn.functional.normalize(images, dim=-1)
    if normalise_text:
        texts = torch.nn.functional.normalize(texts, dim=-1)
    logits = 100 * images @ texts.T
    if not torch.isfinite(logits).all():
        raise UserError("CLIP gives scores that are not finite; are the weights whole?")
    return logits.topk(2).indices


def assemble(
    rows: Sequence[dict], names: Sequence[str], keep: str = "wrong", pairing: str = "right", batch: int = RELEASED_BATCH
) -> dict[str, list[dict]]:
    """The annotation {subset: [{file_name, gt_caption, error_caption}]} from predictions.

    keep = "wrong": pictures whose best class is wrong, error = that class; "all": error = the best wrong class.
    pairing = "released" repeats a slip of the released script: labels and predictions are filtered, file names and
    subsets are not, so that within each batch the kept classes go to the batch's first pictures.
    """
    if keep not in ("wrong", "all") or pairing not in ("right", "released"):
        raise UserError(f"--keep is wrong or all, --pairing right or released, not {keep}, {pairing}")
    out: dict[str, list[dict]] = {subset: [] for subset in SUBSETS}
    size = batch if pairing == "released" else 1
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        kept = [r for r in block if keep == "all" or r["top1"] != r["label"]]
        for place, r in zip(block if pairing == "released" else kept, kept, strict=False):
            error = r["top1"] if r["top1"] != r["label"] else r["top2"]
            item = {"gt_caption": names[r["label"]], "error_caption": names[error]}
            out[place["subset"]].append({"file_name": place["file_name"], **item})
    return out


def read_robustvqa(path: Path) -> dict[str, list[dict]]:
    """The official annotation file; a leading `datasets/` of its file names is dropped."""
    found = runs.read_json(path)
    if not isinstance(found, dict) or not {*SUBSETS} & {*found}:
        raise UserError(f"{path} has none of the keys {', '.join(SUBSETS)}; fetch or mine it again")
    out = {}
    for subset in SUBSETS:
        rows = found.get(subset, [])
        for k, row in enumerate(rows):
            if not isinstance(row, dict) or not {"file_name", "gt_caption", "error_caption"} <= {*row}:
                raise UserError(f"{path}: item {k} of {subset} needs file_name, gt_caption and error_caption")
        if rows:
            out[subset] = [{**r, "file_name": r["file_name"].removeprefix("datasets/")} for r in rows]
    return out


def describe(mined: dict[str, list[dict]], wnids: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Per subset: items, mislabelled (the folder's class is not gt_caption), same_name (both names are the same word:
    crane and maillot are two classes each, so the yes and the no question read alike)."""
    by_wnid, out = dict(zip(wnids, names, strict=True)), {}
    for subset, rows in mined.items():
        folders = [Path(r["file_name"]).parent.name for r in rows]
        truth = [by_wnid.get(f) or (names[int(f)] if f.isdigit() and int(f) < len(names) else None) for f in folders]
        out[subset] = {
            "items": len(rows),
            "mislabelled": sum(t != r["gt_caption"] for t, r in zip(truth, rows, strict=True)),
            "same_name": sum(r["gt_caption"] == r["error_caption"] for r in rows),
        }
    return out
