"""What the demo measures on held-out digit scenes: whether image tokens help to denoise their own image, what a linear
probe finds in them, and the answers to tiny-POPE, tiny-RobustVQA and tiny-MMVP.

`score` is called by train.py at the end of a run and by eval.py, which scores a finished run again.
"""

from lab.runs import UserError

import numpy as np
import torch
from torch import Tensor

from digits import scenes
from digits.pretrain import images_of, views
from documents import prompts
from evaluation import benchmarks, parsers
from model import Deem, Seen
from streams import stream, torch_seed

TIMES = (100, 300, 500, 700, 900)
PROBE = (1500, 500)  # scenes that fit the probe, scenes that test it
RIDGE = 1.0
SUBSETS = {"A": "RobustVQA-A", "R": "RobustVQA-R", "V": "RobustVQA-V"}


@torch.no_grad()
def denoising(model: Deem, held: scenes.Scenes, seed: int, *, maps: bool) -> dict[str, float]:
    """Mean denoising error of held-out scenes with their own tokens, and with those of the next scene; the same noise.

    With `maps` the U-Net reads the scene's own maps in both, so that the ratio tells what the tokens add."""
    index = np.arange(min(len(held), 256))
    dev, den = model.device, model.denoiser
    seen = model.encode_images(images_of(model, held, index))
    g = torch.Generator(dev).manual_seed(torch_seed(seed, "denoising"))
    z0 = den.latents.encode(views(model, held, index), g)
    own = other = 0.0
    there = torch.ones(len(index), dtype=torch.bool, device=dev)
    for t in TIMES:
        time = torch.full((len(index),), t, device=dev)
        z, target = den.noised(z0, torch.randn(z0.shape, generator=g, device=dev), time)
        more = {"maps": seen.maps, "seen": there} if maps else {}
        for shift in (0, 1):
            error = ((den(z, time, seen.condition.roll(shift, 0), **more) - target) ** 2).mean().item() / len(TIMES)
            own, other = (own + error, other) if shift == 0 else (own, other + error)
    return {"csr_own": own, "csr_other": other, "csr_ratio": own / other}


@torch.no_grad()
def features(model: Deem, part: scenes.Scenes) -> np.ndarray:
    """(n, queries x width): the resampler's tokens."""
    out = [model.tokens(images_of(model, part, i)).flatten(1) for i in np.array_split(np.arange(len(part)), 8)]
    return torch.cat(out).double().cpu().numpy()


def probe(model: Deem, seed: int) -> dict[str, float]:
    """Ridge regression from the tokens to what stands in each cell (11 kinds): accuracy in per cent over cells with a
    digit that captions do not name, over those with the named one, and over all."""
    fit = scenes.make(PROBE[0], stream(seed, "probe"), scenes.pools()[0])
    held = scenes.make(PROBE[1], stream(seed, "probe held out"), scenes.pools()[1])
    x, y = features(model, fit), features(model, held)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, y = (np.c_[(a - mean) / std, np.ones(len(a))] for a in (x, y))
    targets = np.eye(11)[fit.cells + 1].reshape(len(fit), -1)
    w = np.linalg.solve(x.T @ x + RIDGE * len(x) / 100 * np.eye(x.shape[1]), x.T @ targets)
    said = (y @ w).reshape(len(held), scenes.CELLS, 11).argmax(2) - 1
    right, there = said == held.cells, held.cells >= 0
    named = there & (held.cells == held.captioned()[:, None])
    parts = {"uncaptioned": there & ~named, "captioned": named, "cells": np.ones_like(there)}
    return {f"probe_{k}": 100 * float(right[m].mean()) for k, m in parts.items()}


def questions(seed: int, count: int) -> tuple[list[benchmarks.Question], list[np.ndarray]]:
    """All questions of the demo; `Question.image` is an index into the pictures beside them."""
    images: list[np.ndarray] = []
    out: list[benchmarks.Question] = []
    pool = scenes.make(6 * count, stream(seed, "benchmarks"), scenes.pools()[1])
    many = [i for i, objects in enumerate(pool.objects()) if len(objects) >= 3][:count]
    lists = [pool.objects()[i] for i in many]
    images += [pool.images[i] for i in many]
    for kind in benchmarks.POPE_KINDS:
        for q in benchmarks.build_pope(lists, scenes.NAMES, kind=kind, images=None, seed=seed):
            out.append(named(q, "POPE", kind))
    mined: dict[str, list[dict]] = {}
    for subset, rows in scenes.mined(seed).items():
        mined[subset] = []
        for image, right, wrong in rows:
            mined[subset].append({"file_name": len(images), "gt_caption": right, "error_caption": wrong})
            images.append(image)
    for subset, qs in benchmarks.build_robustvqa(mined).items():
        out += [named(q, "RobustVQA", subset) for q in qs]
    pairs = []
    for pair in scenes.pairs(seed):
        row = []
        for image, asked, answer in pair:
            row.append((len(images), asked, answer))
            images.append(image)
        pairs.append(row)
    return out + [named(q, "MMVP", "pairs") for q in benchmarks.build_mmvp(pairs)], images


def named(q: benchmarks.Question, benchmark: str, group: str) -> benchmarks.Question:
    return benchmarks.Question(q.image, q.question, q.answer, group, q.pair, {**q.meta, "benchmark": benchmark})


@torch.no_grad()
def answers(model: Deem, asked: list[benchmarks.Question], images: list[np.ndarray], batch: int = 256) -> list[dict]:
    """A dict a question: the more probable of yes and no as the first answer token. Each picture is encoded once."""
    stack = scenes.pictures_only(np.stack(images))
    parts = np.array_split(np.arange(len(images)), max(1, len(images) // batch))
    seen = Seen.cat([model.encode_images(images_of(model, stack, i)) for i in parts])
    pictures, out = [scenes.to_picture(x) for x in images], []
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].question))
    scores: dict[int, Tensor] = {}
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        given = [prompts.pope(asked[i].question, pictures[asked[i].image], form="plain") for i in some]
        found = model.yes_no(given, seen.select([asked[i].image for i in some])).cpu()
        scores |= dict(zip(some, found, strict=True))
    if not all(bool(torch.isfinite(v).all()) for v in scores.values()):
        raise UserError("the model's scores are not finite; train it again with a lower --lr")
    for i, q in enumerate(asked):
        yes, no = scores[i].tolist()
        row = {"benchmark": q.meta["benchmark"], "group": q.group, "pair": q.pair, "question": q.question}
        out.append(row | {"label": q.answer, "answer": "yes" if yes > no else "no", "yes": yes, "no": no})
    return out


def answer_scores(rows: list[dict]) -> dict[str, float]:
    """Accuracy, F1, precision, recall and yes ratio of each list, means over lists, and what always-yes would get."""
    out: dict[str, float] = {}
    for name, groups in (("POPE", benchmarks.POPE_KINDS), ("RobustVQA", SUBSETS)):
        for group in groups:
            some = [r for r in rows if (r["benchmark"], r["group"]) == (name, group)]
            found = parsers.score_yes_no(some)
            keys = ("accuracy", "f1", "precision", "recall", "yes_ratio", "unparsed", "pope_accuracy")
            out |= {f"{name}_{group}_{k}": found[k] for k in keys}
            out[f"{name}_{group}_n"] = len(some)
            always = parsers.score_yes_no([{**r, "answer": "yes"} for r in some])["accuracy"]
            out[f"{name}_{group}_always_yes"] = always
        out[f"{name}_accuracy"] = float(np.mean([out[f"{name}_{g}_accuracy"] for g in groups]))
        out[f"{name}_yes_ratio"] = float(np.mean([out[f"{name}_{g}_yes_ratio"] for g in groups]))
    pairs = [{**r, "right": r["answer"] == r["label"]} for r in rows if r["benchmark"] == "MMVP"]
    found = parsers.score_pairs(pairs)
    return out | {"MMVP_accuracy": found["accuracy"], "MMVP_single_accuracy": found["single_accuracy"]}


@torch.no_grad()
def score(model: Deem, s, seed: int) -> tuple[dict[str, float], list[dict]]:
    """(metrics of the record, a dict a question) of a run on the digit scenes."""
    model.eval()
    out = probe(model, seed)
    if model.denoiser is not None:
        held = scenes.make(256, stream(seed, "denoising scenes"), scenes.pools()[1])
        out |= denoising(model, held, seed, maps=s.csr_use_mmfs == "on")
    rows = answers(model, *questions(seed, s.questions))
    return out | answer_scores(rows), rows


@torch.no_grad()
def pictures(model: Deem, seed: int, n: int = 8) -> dict[str, Tensor]:
    """For the figures: held-out scenes (n, 16, 16), what is drawn from their tokens alone, and the queries' attention
    over the token grid (n, queries, 4, 4)."""
    held = scenes.make(n, stream(seed, "pictures"), scenes.pools()[1])
    x = images_of(model, held, np.arange(n))
    q = model.encoder(x).tokens
    out = {"scenes": torch.from_numpy(held.images)}
    if model.denoiser is not None:
        out["drawn"] = model.reconstruct(x, steps=50, seed=seed)[:, 0].cpu()
    if model.resampler is not None:
        side = int((q.shape[1] - 1) ** 0.5)
        out["attention"] = model.resampler.attention(q)[:, :, 1:].unflatten(2, (side, side)).cpu()
    return out
