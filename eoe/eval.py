"""Zero-shot OOD detection with envisioned names (EOE): scores, metrics and records; trains nothing.

python eval.py --table table3 --labels released             # a table of the paper on its data, weights and names
python eval.py --id pet37 --ood texture places              # any ID set against any OOD sets
python eval.py --synthetic --seeds 0 1 2                    # tier A: no data, no network
python eval.py --run runs/demo/drawn                        # a trained stand-in again
"""

import csv
import io
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab import runs
from lab.runs import Number, UserError

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

import drawn
import envision
import metrics
import scores
import standin
from scores import SCORES, Stats, normalise, reduce

TEMPLATE = "a photo of a {}"
ENSEMBLE = (  # Table 19: each feature normalised, summed, normalised
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a photo of many {}.",
    "a photo of the large {}.",
    "a photo of the small {}.",
)
BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def text_features(backbone, names: list[str], templates: tuple[str, ...] = (TEMPLATE,)) -> Tensor:
    """Unit rows [len(names), d]; several templates are averaged as unit vectors."""
    if not names:
        return torch.zeros(0, backbone.encode_texts(["a"]).shape[1])
    return normalise(sum(normalise(backbone.encode_texts([t.format(n) for n in names])) for t in templates))


def drop_similar(names: list[str], out: Tensor, ids: Tensor, most: float = 1.0) -> tuple[list[str], Tensor]:
    """Drop envisioned names whose prompt is closer than `most` to an ID prompt (ImageNet-20: 0.85; else 1, none)."""
    if most >= 1.0 or not names:
        return names, out
    keep = (out @ ids.T).max(1).values <= most
    return [n for n, k in zip(names, keep.tolist(), strict=True) if k], out[keep]


def score(stats: Stats, method: str, beta: float = scores.BETA) -> np.ndarray:
    """A score by its name in scores.SCORES."""
    function = SCORES[method][0]
    value = (function(stats, beta) if function is scores.eoe else function(stats)).cpu().numpy()
    if not np.isfinite(value).all():
        raise UserError(f"a score of {method} is not a finite number; are the weights broken?")
    return value


@dataclass(frozen=True)
class Labels:
    """One set of outlier names with its features and what it is called in the records."""

    method: str  # method name of S_EOE with these names
    names: list[str]
    text: Tensor
    all_scores: bool = False  # also the other scores over K + L names
    betas: tuple[float, ...] = ()  # also these weights


def rows(
    images: Tensor, oods: dict[str, Tensor], ids: Tensor, sets: list[Labels], beta: float, truth: Iterable[str] = ()
) -> list[tuple[str, str, str, dict]]:
    """(OOD set, method, extra setting, metrics) of every method, all in per cent.

    images [N, d], oods {set: [M, d]}, ids [K, d]: unit rows. The baselines use the first set's statistics.
    """
    out, truth = [], {t.lower() for t in truth}
    empty = ids[:0]
    for position, labels in enumerate([Labels("MCM", [], empty), *sets]):
        inside = reduce(images, ids, labels.text)
        about = {"labels": len(labels.names), "hits": len(truth & {n.lower() for n in labels.names})}
        for ood, features in oods.items():
            outside = reduce(features, ids, labels.text)

            def add(method, extra, name, b=beta, pair=(inside, outside), ood=ood, about=about) -> None:
                found = metrics.measure(*(score(x, name, b) for x in pair))
                out.append((ood, method, extra, {**found, **about}))

            if position == 0:
                for name in ("MCM", "MaxLogit", "Energy"):
                    add(name, "", name)
                continue
            if not labels.names:
                continue
            add(labels.method, "", "EOE")
            for b in labels.betas:
                add(labels.method, f"beta={b:g}", "EOE", b)
            if labels.all_scores:
                for name in ("S_MSP", "S_MAX", "S_Energy", "S_MaxLogit"):
                    add(name, "", name)
                share = [scores.neglabel(x, ids, labels.text).cpu().numpy() for x in (images, features)]
                out.append((ood, "NegLabel score", "", {**metrics.measure(*share), **about}))
    return out


def write_scores(
    path: Path, images: list, stats: Stats, id_names: list[str], out_names: list[str], beta: float, cut: float
) -> None:
    """A line an image: score, decision at the 95 % threshold, nearest ID and nearest envisioned name (cf. Fig. 8)."""
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["image", "score", "decision", "nearest_id", "nearest_envisioned"])
    nearest = zip(images, score(stats, "EOE", beta), stats.id_name.tolist(), stats.out_name.tolist(), strict=True)
    for image, v, a, b in nearest:
        found = out_names[b] if b >= 0 else ""
        lines.writerow([image, f"{v:.9g}", "ID" if v >= cut else "OOD", id_names[a], found])
    runs.write_text(path, file.getvalue())


# ----------------------------------------------------------------------------------------------- tier B: drawn pictures


def drawn_labels(task: drawn.DrawnTask, seed: int, n: int, variant: str) -> list[str]:
    """Names of the rule-based provider, by the same conversations, parser and cleaning as a language model's."""
    provider, count = drawn.RuleProvider(seed), 3 if task.task == "near" else n
    turns = envision.envision(provider, list(task.id_names), task.task, count, variant)
    answers = [t["answer"] for conversation in turns.values() for t in conversation]
    if task.task != "near":
        return envision.clean(envision.read_answers(answers).names, list(task.id_names), task.task, variant).names
    names = [x for a in answers for x in envision.read_answers([a]).names]
    return envision.clean(names, list(task.id_names), task.task, variant).names


@torch.inference_mode()
def drawn_seed(s, run: runs.Run, seed: int, model: standin.DualEncoder, device) -> list[dict]:
    """Records of one seed: far, near and fine-grained, every method; `s` is train.Settings."""
    backbone = standin.DrawnBackbone(model)
    records, began = [], run.seconds()
    for kind, task in drawn.tasks(seed, s.classes).items():
        rng = random.Random(f"test {seed} {kind}")
        per_id = s.per_class * (4 if kind == "near" else 1)
        id_pictures, classes = task.pictures("id", per_id, rng)
        ood_pictures, _ = task.pictures("ood", max(1, len(id_pictures) // len(task.ood_names)), rng)
        images, outside = (
            normalise(backbone.encode_images(drawn.draw(p, seed + add)))
            for p, add in ((id_pictures, 1_000_000), (ood_pictures, 2_000_000))
        )
        ids, truth = list(task.id_names), list(task.ood_names)
        id_text = text_features(backbone, ids).to(device)
        sets = []
        for variant in ("resemble", "dissimilar", "irrelevant"):
            names = drawn_labels(task, seed, s.labels, variant)
            main = variant == "resemble"
            label = "EOE" if main else f"EOE(prompt={variant})"
            sets.append(Labels(label, names, text_features(backbone, names), main, BETAS if main else ()))
        free = [n for n in sets[0].names if n not in truth]
        sets.append(Labels("EOE(no OOD name)", free, text_features(backbone, free)))
        sets.append(Labels("Ground Truth", truth, text_features(backbone, truth)))
        right = ((images @ id_text.T).argmax(1).cpu() == torch.tensor(classes)).float().mean().item()
        data = {"name": f"drawn {kind}", "variant": "generated", "sha256": _digest(images, outside), "n": len(images)}
        data |= {"k": len(ids), "n_ood": len(outside)}
        for number, (_, method, extra, m) in enumerate(rows(images, {kind: outside}, id_text, sets, s.beta, truth)):
            where = {
                "table": s.table,
                "dataset": kind,
                "setting": extra or "tier B",
                "method": method,
                "scale": s.scale,
            }
            m["accuracy"] = 100 * right
            records.append(
                run.record(
                    seed,
                    seconds=0.0 if records else began,
                    data=data,
                    metrics=m,
                    where=where,
                    device=device,
                    suffix=f"-{kind}-{number:02d}",
                )
            )
        stats = [reduce(x, id_text, sets[0].text) for x in (images, outside)]
        save = {
            f"{w}.{n}": torch.as_tensor(score(st, n))
            for st, w in zip(stats, ("id", "ood"), strict=True)
            for n in ("MCM", "EOE")
        }
        if seed == s.seeds[0]:
            few = {"text.id": id_text, "text.envisioned": sets[0].text, "text.ood": sets[-1].text}
            runs.write_tensors(run.folder(seed) / f"scores-{kind}.safetensors", {**save, **few})
            cut = metrics.threshold95(save["id.EOE"])
            place = run.folder(seed) / f"scores-{kind}.csv"
            write_scores(place, ood_pictures, stats[1], ids, sets[0].names, s.beta, cut)
    return records


def _digest(*tensors: Tensor) -> str:
    import hashlib

    return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in tensors)).hexdigest()


# ------------------------------------------------------------------------------------------ tier A: a synthetic space


def synthetic_seed(s: "EvalSettings", run: runs.Run, seed: int, device) -> list[dict]:
    """Records of one synthetic joint space; envisioned names never equal an OOD name there."""
    space = standin.synthetic(seed, per_class=s.per_class)
    sets = [
        Labels("EOE", [f"e{i}" for i in range(60)], space.text["resemble"], True, BETAS),
        Labels("EOE(prompt=irrelevant)", [f"u{i}" for i in range(60)], space.text["irrelevant"]),
        Labels("Ground Truth", [f"o{i}" for i in range(60)], space.text["ood"]),
    ]
    data = {"name": "synthetic space", "variant": "generated", "sha256": space.sha256, "n": len(space.id_images)}
    out = []
    truth = sets[-1].names
    found = rows(space.id_images, {"synthetic": space.ood_images}, space.text["id"], sets, s.beta, truth)
    for number, (_, method, extra, m) in enumerate(found):
        where = {
            "table": s.table,
            "dataset": "synthetic",
            "setting": extra or "tier A",
            "method": method,
            "scale": s.scale,
        }
        out.append(
            run.record(
                seed, seconds=0.0, data=data, metrics=m, where=where, device=device, suffix=f"-synthetic-{number:02d}"
            )
        )
    return out


# --------------------------------------------------------------------------------------------------------- the command


@dataclass
class EvalSettings:
    table: str = ""
    """A table of the paper (table1 ... table25, figure1, figure7a-c); default: the sets named by --id and --ood."""
    id: str = ""
    """ID set (see data.py) or an ImageFolder whose sub-folders are the class names."""
    ood: tuple[str, ...] = ()
    """OOD sets or folders of images."""
    backbone: str = "clip-vit-b16"
    """clip-vit-b16 (paper), -vit-b32, -vit-l14, clip-rn50, -rn101, -rn50x4, -rn50x16, align, groupvit or altclip."""
    weights: str = ""
    """Folder or file of the weights; default <data-dir>/weights/<backbone>."""
    task: Literal["far", "near", "fine"] = "far"
    """Which envisioned names to use with --id/--ood."""
    labels: str = "own"
    """own: the lists of this project; released: the published lists under <data-dir>/eoe; or a name file."""
    llm: str = "gpt-3.5-turbo-16k"
    """released only: whose lists (paper: gpt-3.5-turbo-16k, three runs = seeds 0 1 2)."""
    n: int = 0
    """Names to use, 0: as the table says (paper: 500; near: 3 for each ID class)."""
    beta: Number = scores.BETA
    """Weight of the outlier term (paper: 0.25)."""
    ensemble: bool = False
    """--id/--ood: the five prompt templates of Table 19 instead of one. A table takes what the paper takes."""
    clipn: str = ""
    """Text features of CLIPN's two encoders: a .safetensors file with `yes` and `no` [K, d], or a folder with
    <id set>.safetensors; adds both CLIPN scores. --weights must then be CLIPN's image encoder."""
    max_similarity: Number = 0.0
    """--id/--ood: drop names whose prompt has a higher cosine with an ID prompt; 1 drops none. 0: as the paper and all
    its tables, 0.85 for the near task with ImageNet-20, else 1."""
    dump: bool = False
    """Also write scores-<id>-<ood>.csv: a line an image of the first OOD set with its decision and nearest names."""
    synthetic: bool = False
    """Tier A of the embedded default: a joint space drawn from a formula."""
    per_class: int = 60
    """--synthetic: images for each class."""
    run: str = ""
    """Evaluate the encoders of this run of train.py again and compare with its records."""
    seeds: tuple[int, ...] = (0,)
    """--synthetic: seeds of the space. Otherwise which run of the language model (paper: 0 1 2; own lists: 0)."""
    scale: Literal["smoke", "demo", "paper"] = "demo"
    """Goes into the record; changes nothing else."""
    out: str = ""
    """Run folder; default runs/<scale>/<table or id>."""
    data_dir: str = ""
    """Folder of the data sets; default $REPRO_DATA, else ./data."""
    download: bool = False
    """Let torchvision, Hugging Face and open_clip fetch what is missing."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    batch: int = 256
    """Images a forward pass."""
    workers: int = 4
    """Processes that decode images; at most one a core."""
    bf16: bool = False
    """bfloat16 autocast in the image encoder (paper: float32); features become float32 before anything else."""

    def check(self) -> None:
        ways = {"--table": self.table and not self.synthetic, "--id": self.id or self.ood}
        ways |= {"--synthetic": self.synthetic, "--run": self.run}
        if len(given := [k for k, v in ways.items() if v]) > 1:
            raise UserError(f"{given[0]} and {given[1]} exclude each other; see --help")
        if self.table == "own":
            raise UserError("--table own is what --id and --ood make; name those, or a table of the paper")
        if self.synthetic and self.table.startswith(("table", "figure", "own")):
            raise UserError(f"--synthetic has no place in {self.table}, which is made of real images")
        if self.table and not self.synthetic and (self.ensemble or self.max_similarity or self.n):
            raise UserError("--ensemble, --max-similarity and --n go with --id and --ood; a table sets them itself")
        if not self.synthetic and not self.run and self.labels != "released" and self.seeds != (0,):
            raise UserError("only the released lists come from several runs of a model; use --seeds 0")
        if self.beta < 0 or not 0 <= self.max_similarity <= 1:
            raise UserError("--beta must not be negative, --max-similarity lies in [0, 1]")
        for name in ("batch", "per_class"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.clipn and not Path(self.clipn).exists():
            raise UserError(f"no CLIPN text features in {self.clipn}; see --help for what the file holds")
        if self.n < 0 or self.workers < 0:
            raise UserError("--n and --workers must not be negative")
        if not (self.synthetic or self.run or self.table or (self.id and self.ood)):
            raise UserError("say what to evaluate: --table, or --id with --ood, or --synthetic, or --run; see --help")


def show(records: Iterable[dict]) -> None:
    """Print the mean over seeds of each data set and method."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for r in records:
        groups.setdefault((r["dataset"], r["method"], r["setting"]), []).append(r["metrics"])
    for (dataset, method, setting), found in groups.items():
        f, a = (np.mean([m[k] for m in found]) for k in ("FPR95", "AUROC"))
        print(f"{dataset:28s} {method:24s} {setting:12s} FPR95 {f:6.2f}  AUROC {a:6.2f}  ({len(found)} seeds)")


def again(s: EvalSettings, device) -> None:
    """Evaluate a finished run of train.py from its weights; says whether its records agree."""
    import tempfile

    import train

    folder = Path(s.run)
    stored = runs.read_json(folder / "settings.json")
    try:
        settings = train.Settings(**{**stored, "seeds": tuple(stored["seeds"])})
        settings.check()
    except (TypeError, KeyError) as error:
        raise UserError(f"{folder / 'settings.json'} is of another version of train.py ({error})") from None
    for seed in settings.seeds:
        model = standin.DualEncoder(settings.width)
        tensors, _ = runs.read_tensors(folder / f"seed{seed}" / "model.safetensors")
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise UserError(f"{folder} holds weights of another model ({error}); train it again") from None
        with tempfile.TemporaryDirectory() as place:
            new = drawn_seed(settings, runs.Run(Path(place), settings), seed, model.to(device), device)
        old = [runs.read_record(p) for p in sorted((folder / f"seed{seed}").glob("record*.json"))]
        show(new)
        before = {(r["dataset"], r["method"], r["setting"]): r["metrics"].get("AUROC", 1e9) for r in old}
        worst = max(
            abs(before.get((r["dataset"], r["method"], r["setting"]), 1e9) - r["metrics"]["AUROC"]) for r in new
        )
        print(f"seed {seed}: records {'agree' if worst < 1e-6 else f'differ by up to {worst:.4f} points of AUROC'}")


def main() -> None:
    s = runs.parse(EvalSettings, __doc__)
    s.check()
    device = runs.device(s.device)
    if s.run:
        return again(s, device)
    s.table = s.table or ("demo" if s.synthetic else "own")
    s.out = (
        s.out or f"runs/{s.scale}/{'synthetic' if s.synthetic else s.table if s.table != 'own' else Path(s.id).name}"
    )
    # Several processes (`accelerate launch`) share out the images to encode; what follows takes seconds, on the first.
    state = PartialState()
    ignore = ("out", "data_dir", "device", "download", "batch", "workers")
    run = runs.Run(Path(s.out), s, ignore, state.process_index)
    if run.complete:
        if state.is_main_process:
            print(f"{run.out} is complete; delete it to run again")
    else:
        for seed in s.seeds:
            if s.synthetic and state.is_main_process:
                synthetic_seed(s, run, seed, device)
            elif not s.synthetic:
                import papertables

                papertables.run_table(s, run, seed, device)
    if state.is_main_process:
        show(run.finish())


if __name__ == "__main__":
    runs.command(main)
