"""A folder of one's own pictures against one's own class names: scores.csv, the names that were used, a grid."""

import csv
import io
import textwrap
from pathlib import Path

from lab import runs
from lab.runs import UserError

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import backbones
import data
import evaluation
import metrics
from names import asking, providers, reading
from scores import reduce

SHOWN, WIDE = 24, 8  # pictures of the grid, in a row
KEY = "OPENAI_API_KEY"
NAMES = {"near": 3, "far": 50, "fine": 50}  # names asked for without --n; near: for each class


def shipped(name: str, task: str) -> list[str]:
    """The names of this project for one class: near lists are written class by class."""
    lists = sorted((runs.HERE / "envisioned").glob("*-near.json")) if task == "near" else []
    found = [g for path in lists for k, g in reading.read_names(path).groups.items() if k.lower() == name.lower()]
    if not found:
        raise UserError(
            f"this project has no {task} names for {name}; ask a language model (--model, --url) or name a file of "
            "names by --labels"
        )
    return found[0]


def envisioned(s, classes: list[str], out: Path) -> list[str]:
    """Cleaned names out of --labels, of this project, of an earlier start in the same folder, or of --model."""
    n, kept = s.n or NAMES[s.envision], out / "names.json"
    if s.labels != "own":
        return reading.clean(reading.read_names(Path(s.labels)).take(s.envision, n), classes, s.envision).names
    if not s.model:
        return reading.clean([x for c in classes for x in shipped(c, s.envision)[:n]], classes, s.envision).names
    about = {"id": ", ".join(classes), "task": s.envision, "n": n, "made_by": s.model}
    if kept.is_file() and {k: v for k, v in runs.read_json(kept).items() if k in about} == about:
        names = reading.read_names(kept).take(s.envision, n)
    else:
        provider = providers.Endpoint(s.url, s.model, KEY) if s.url else providers.LocalModel(s.model)
        answers = asking.envision(provider, classes, s.envision, n)
        read = {k: reading.read_answers([t["answer"] for t in turns]).names for k, turns in answers.items()}
        names = [x for group in read.values() for x in group[:n]]
        if not names:
            raise UserError(f"{s.model} answered without a single name, asked twice; take another --model")
        runs.write_text(kept, reading.layout({**about, "names": read if s.envision == "near" else names}))
    left = reading.clean(names, classes, s.envision).names
    if not left:
        raise UserError(f"cleaning leaves none of the {len(names)} names in {kept}; take another --model or --labels")
    return left


def grid(path: Path, pictures: data.ImageSet, rows: list[dict]) -> None:
    """The pictures with the lowest scores, lowest first; flagged ones in red."""
    high = -(-len(rows) // WIDE)
    figure, axes = plt.subplots(high, WIDE, figsize=(1.6 * WIDE, 2.2 * high), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows, strict=False):
        axis.imshow(pictures[row["index"]].resize((128, 128)))
        text = "\n".join(textwrap.wrap(f"{row['class']} / {row['envisioned']}", 22))
        axis.set_title(text, fontsize=7, color="#c1272d" if row["flagged"] else "black")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def sort(s, device) -> None:
    """Score the pictures of --images; a line each in scores.csv, the least ID-like first."""
    classes = list(dict.fromkeys(" ".join(c.split()) for c in s.classes.split(",") if c.strip()))
    if not classes:
        raise UserError('--classes holds no name; give them with commas: "cat,dog"')
    for option, folder in (("images", s.images), ("known", s.known)):
        if folder and not Path(folder).is_dir():
            raise UserError(f"--{option} {folder} is no folder")
    out = Path(s.out or runs.default_out(s.scale, f"images-{Path(s.images).resolve().name}"))
    out.mkdir(parents=True, exist_ok=True)
    root = runs.data_dir(s.data_dir)
    pictures = data.pictures(s.images)
    names = envisioned(s, classes, out)
    backbone = backbones.load(s.backbone, device, s.weights, root, s.download, s.bf16)
    text = [evaluation.text_features(backbone, x).to(device) for x in (classes, names)]

    def judged(found: data.ImageSet):
        return reduce(backbones.image_features(backbone, found, s.batch, s.workers).to(device), *text)

    stats = judged(pictures)
    score = torch.as_tensor(evaluation.score(stats, "EOE", s.beta))
    flagged, rule = (stats.top_out > stats.top_id).cpu(), "nearer to an envisioned name than to any class"
    if s.known:
        cut = metrics.threshold95(evaluation.score(judged(data.pictures(s.known)), "EOE", s.beta))
        flagged, rule = score < cut, f"below {cut:.9g}, which 95 % of the pictures in {s.known} reach"
    rows = [
        {
            **{"index": i, "name": str(Path(pictures.items[i]).relative_to(s.images)), "flagged": bool(flagged[i])},
            **{"class": classes[int(stats.id_name[i])], "envisioned": names[int(stats.out_name[i])]},
            "score": f"{score[i]:.9g}",
        }
        for i in score.argsort().tolist()
    ]
    file = io.StringIO()
    table = csv.DictWriter(file, ["name", "class", "score", "flagged", "envisioned"], lineterminator="\n")
    table.writeheader()
    table.writerows([{k: v for k, v in r.items() if k != "index"} for r in rows])
    runs.write_text(out / "scores.csv", file.getvalue())
    grid(out / "lowest.png", pictures, rows[:SHOWN])
    print(f"{out}: {len(rows)} pictures, {int(flagged.sum())} flagged ({rule}); {len(names)} envisioned names")
    print("scores.csv has a line each, lowest.png the lowest scores")
