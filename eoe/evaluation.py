"""Scores of images against names, their metrics and records: what the commands and the paper's tables need of them."""

import csv
import hashlib
import io
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lab import runs
from lab.runs import UserError

import numpy as np
import torch
from torch import Tensor

import metrics
import scores
from names import asking, reading
from scores import SCORES, Stats, normalise, reduce
from settings import EvalSettings, Settings
from standins import drawn, standin

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
    value = (function(stats, beta) if function is scores.s_eoe else function(stats)).cpu().numpy()
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


def show(records: Iterable[dict]) -> None:
    """Print the mean over seeds of each data set and method."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for r in records:
        groups.setdefault((r["dataset"], r["method"], r["setting"]), []).append(r["metrics"])
    for (dataset, method, setting), found in groups.items():
        f, a = (np.mean([m[k] for m in found]) for k in ("FPR95", "AUROC"))
        print(f"{dataset:28s} {method:24s} {setting:12s} FPR95 {f:6.2f}  AUROC {a:6.2f}  ({len(found)} seeds)")


# ----------------------------------------------------------------------------------------------- tier B: drawn pictures


def drawn_labels(task: drawn.DrawnTask, seed: int, n: int, variant: str) -> list[str]:
    """Names of the rule-based provider, by the same conversations, parser and cleaning as a language model's."""
    provider, count = drawn.RuleProvider(seed), 3 if task.task == "near" else n
    turns = asking.envision(provider, list(task.id_names), task.task, count, variant)
    answers = [t["answer"] for conversation in turns.values() for t in conversation]
    if task.task != "near":
        return reading.clean(reading.read_answers(answers).names, list(task.id_names), task.task, variant).names
    names = [x for a in answers for x in reading.read_answers([a]).names]
    return reading.clean(names, list(task.id_names), task.task, variant).names


@torch.inference_mode()
def drawn_seed(s: Settings, run: runs.Run, seed: int, model: standin.DualEncoder, device) -> list[dict]:
    """Records of one seed: far, near and fine-grained, every method."""
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
    return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in tensors)).hexdigest()


# ------------------------------------------------------------------------------------------ tier A: a synthetic space


def synthetic_seed(s: EvalSettings, run: runs.Run, seed: int, device) -> list[dict]:
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
