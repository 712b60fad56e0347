"""Mine the RobustVQA questions: pictures of ImageNet-A, -R and -V2 that CLIP takes for another class, and that class.

    python mining.py --data-dir DATA --out data/deem/robustvqa                  # as the released set was mined
    python mining.py --clip ViT-B-32 --weights openai --normalise-text          # another model, unit text features
    python mining.py --check data/deem/robustvqa/robustvqa_test.json            # what an annotation file holds

Looks for `deem/robustvqa/imagenet-a/<wnid>/*.jpg`, `imagenet-r/<wnid>/*.jpg` and `imagenetv2/<0..999>/*.jpeg` below the
data folder. Writes predictions.jsonl (a line a picture; an interrupted start goes on from it), robustvqa_test.json and
report.json.
"""

import fcntl
import json
from dataclasses import dataclass
from pathlib import Path

from lab import runs
from lab.runs import UserError

from torch import Tensor
from tqdm import tqdm

from documents.readers import Picture
from evaluation.clip import Clip, imagenet_classes, load_clip
from evaluation.robustvqa import FILE, SUBSETS, assemble, describe, find_pictures, read_robustvqa, top_two


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
