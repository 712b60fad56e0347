"""Mine the RobustVQA questions: pictures of ImageNet-A, -R and -V2 that CLIP takes for another class, and that class.

    python -m evaluation.mining --data-dir DATA --out data/deem/robustvqa           # as the released set was mined
    python -m evaluation.mining --clip ViT-B-32 --weights openai --normalise-text   # another model, unit text features
    python -m evaluation.mining --check data/deem/robustvqa/robustvqa_test.json     # what an annotation file holds

Looks for `deem/robustvqa/imagenet-a/<wnid>/*.jpg`, `imagenet-r/<wnid>/*.jpg` and `imagenetv2/<0..999>/*.jpeg` below the
data folder. Writes predictions.jsonl (a line a picture; an interrupted start goes on from it), robustvqa_test.json and
report.json.
"""

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import runs
from lab.runs import UserError

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from documents.readers import Picture

SUBSETS = {  # official key -> (folder, pattern of the pictures)
    "imagenet_a": ("imagenet-a", "*.jpg"),
    "imagenet_r": ("imagenet-r", "*.jpg"),
    "imagenet_v2": ("imagenetv2", "*.jpeg"),
}
FILE = "robustvqa_test.json"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RELEASED_BATCH = 512


@dataclass
class Settings:
    """Mine RobustVQA out of three ImageNet variants with a zero-shot CLIP."""

    data_dir: str = ""
    """Folder with deem/robustvqa/; default $REPRO_DATA, else ./data."""
    out: str = ""
    """Folder for the annotation file; default data/deem/robustvqa of this folder."""
    clip: str = "ViT-L-14-336"
    """open_clip model name, or a JSON file with a model configuration. Paper: CLIP ViT-L/14 at 336 pixels."""
    weights: str = "openai"
    """open_clip tag, or a file of weights."""
    normalise_text: bool = False
    """Divide text features by their length too. The released script normalises image features only (default)."""
    blanks: bool = False
    """Write class names with blanks in CLIP's prompts. Released: Keras names with underscores (default)."""
    keep: str = "wrong"
    """wrong: only pictures whose best class is wrong (released script). all: every picture with its best wrong class
    (the paper's text)."""
    pairing: str = "right"
    """right: each picture with its own classes. released: within a batch of 512 the classes of the kept pictures are
    given to the batch's first pictures, as the released script does."""
    batch_size: int = 64
    """Pictures a step; changes the speed only."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    download: bool = False
    """Let open_clip fetch the weights."""
    check: str = ""
    """Only read this annotation file and tell what it holds."""


# ---------------------------------------------------------------------------------------------------------------- CLIP


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


# -------------------------------------------------------------------------------------------------------------- mining


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


def predict(clip: Clip, rows: list[dict], root: Path, texts: Tensor, s: Settings, log: Path) -> list[dict]:
    """Rows with top1 and top2 added; each batch is appended to `log`, and what stands there is not computed again."""
    head = {k: getattr(s, k) for k in ("clip", "weights", "normalise_text", "blanks")} | {"pictures": len(rows)}
    done: list[dict] = []
    if log.is_file():
        kept = []
        for line in log.read_text(errors="replace").splitlines(keepends=True):
            try:
                kept.append(json.loads(line))
            except json.JSONDecodeError:
                break  # half written, or damaged: this picture and what follows are looked at again
        if not kept or kept[0] != head:
            raise UserError(f"{log} was made with other settings or pictures; choose another --out or delete it")
        done = kept[1:]
        if [r["file_name"] for r in done] != [r["file_name"] for r in rows[: len(done)]]:
            raise UserError(f"{log} names other pictures than the data folder; choose another --out or delete it")
    runs.write_text(log, "".join(json.dumps(r) + "\n" for r in [head, *done]))
    with open(log, "a") as file, tqdm(total=len(rows), initial=len(done), unit="picture") as bar:
        for start in range(len(done), len(rows), s.batch_size):
            batch = rows[start : start + s.batch_size]
            images = [Picture(root / r["file_name"]).load() for r in batch]
            best = top_two(clip.image_features(images), texts, s.normalise_text).tolist()
            fresh = [{**r, "top1": a, "top2": b} for r, (a, b) in zip(batch, best, strict=True)]
            file.write("".join(json.dumps(r) + "\n" for r in fresh))
            file.flush()
            done += fresh
            bar.update(len(batch))
    return done


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


# ------------------------------------------------------------------------------------------------------------ MMVP-VLM


def score_vlm(clip: Clip, questions: Sequence, root: Path, crop: bool = True) -> list[dict]:
    """A record a pair of MMVP-VLM: both statements must be closest to their own picture. Texts are "a photo of ..." and
    a statement is given to the first picture only where that is strictly closer, as officially."""
    out = []
    for first, second in zip(questions[::2], questions[1::2], strict=True):
        images = clip.image_features([Picture(root / q.image).load() for q in (first, second)], crop)
        texts = clip.text_features([f"a photo of {q.question}" for q in (first, second)])
        images, texts = (torch.nn.functional.normalize(x, dim=-1) for x in (images, texts))
        chosen = [0 if row[0] > row[1] else 1 for row in (texts @ images.T).tolist()]
        for slot, q in enumerate((first, second)):
            out.append({"pair": q.pair, "group": q.group, "chosen": chosen[slot], "right": chosen[slot] == slot})
    return out


def main() -> None:
    s = runs.parse(Settings, __doc__)
    root = runs.data_dir(s.data_dir) / "deem"
    wnids, names = imagenet_classes(root / "robustvqa" / "imagenet_class_index.json")
    if s.check:
        for subset, about in describe(read_robustvqa(Path(s.check)), wnids, names).items():
            print(f"{subset}: " + ", ".join(f"{v} {k}" for k, v in about.items()))
        return
    if s.batch_size < 1:
        raise UserError("--batch-size must be 1 or more")
    assemble([], names, s.keep, s.pairing)  # wrong words are told before the work
    device, out = runs.device(s.device), Path(s.out or runs.HERE / "data" / "deem" / "robustvqa")
    rows = find_pictures(root, wnids)
    clip = load_clip(s.clip, s.weights, device, s.download)
    prompts = [f"A photo of a {n.replace('_', ' ') if s.blanks else n}" for n in names]
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")  # noqa: SIM115 (held until the process ends)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is mining into {out}; wait for it or choose another --out") from None
    done = predict(clip, rows, root, clip.text_features(prompts), s, out / "predictions.jsonl")
    mined = assemble(done, names, s.keep, s.pairing)
    runs.write_json(out / FILE, mined)
    report = describe(mined, wnids, names)
    for subset in SUBSETS:
        mine = [r for r in done if r["subset"] == subset]
        right = sum(r["top1"] == r["label"] for r in mine)
        report[subset] |= {"pictures": len(mine), "zero_shot_accuracy": 100 * right / len(mine)}
    runs.write_json(out / "report.json", report)
    for subset, about in report.items():
        print(f"{subset}: zero-shot {about['zero_shot_accuracy']:.2f} % of {about['pictures']}, {about['items']} kept")
    print(f"wrote {out / FILE}")


if __name__ == "__main__":
    runs.command(main)
