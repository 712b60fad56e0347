"""What is measured on held-out scenes: whether image tokens help to denoise their own image, what a linear
probe finds in them, whether the language model reads texts and sees pictures, and its answers to tiny-POPE and
tiny-MMVP.

`score` is called by train.py at the end of a run and by eval.py, which scores a finished run again.
"""

from lab.runs import UserError

import numpy as np
import torch
from torch import Tensor

from documents import prompts
from documents.document import Text
from evaluation import benchmarks, parsers
from model import Deem, Seen
from scenes.pretrain import images_of, views
from scenes.world import CELLS, KINDS, Scenes, World, pictures_only, to_picture
from streams import stream, torch_seed

TIMES = (100, 300, 500, 700, 900)
PROBE = (1500, 500)  # scenes that fit the probe, scenes that test it
RIDGE = 1.0
DENOISED = 256  # scenes that are denoised with their own tokens and another's
DRAWN = (8, 50)  # scenes that are drawn from their tokens for the figures, denoising steps
LOOKS = 1000  # scenes of the checks whether the language model reads and sees


@torch.no_grad()
def denoising(model: Deem, held: Scenes, seed: int, *, maps: bool) -> dict[str, float]:
    """Mean denoising error of held-out scenes with their own tokens, and with those of the next scene; the same noise.

    With `maps` the U-Net reads the scene's own maps in both, so that the ratio tells what the tokens add."""
    index = np.arange(min(len(held), DENOISED))
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
def features(model: Deem, part: Scenes) -> np.ndarray:
    """(n, queries x width): the resampler's tokens."""
    out = [model.tokens(images_of(model, part, i)).flatten(1) for i in np.array_split(np.arange(len(part)), 8)]
    return torch.cat(out).double().cpu().numpy()


def probe(model: Deem, world: World, seed: int) -> dict[str, float]:
    """Ridge regression from the tokens to what stands in each cell (11 kinds), accuracy in per cent: over cells with a
    thing that short captions do not name, over those with the named one, and over all. `probe_shape`: the same to what
    no text tells, how each thing is moved and looks; per cent of its variance over cells with one (R^2)."""
    fit = world.make(PROBE[0], stream(seed, "probe"), world.train)
    held = world.make(PROBE[1], stream(seed, "probe held out"), world.test)
    x, y = features(model, fit), features(model, held)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, y = (np.c_[(a - mean) / std, np.ones(len(a))] for a in (x, y))
    kinds, shapes = np.eye(KINDS + 1)[fit.cells + 1].reshape(len(fit), -1), fit.details.reshape(len(fit), -1)
    w = np.linalg.solve(x.T @ x + RIDGE * len(x) / 100 * np.eye(x.shape[1]), x.T @ np.c_[kinds, shapes])
    said = (y @ w)[:, : kinds.shape[1]].reshape(len(held), CELLS, KINDS + 1).argmax(2) - 1
    right, there = said == held.cells, held.cells >= 0
    drawn = (y @ w)[:, kinds.shape[1] :].reshape(held.details.shape)[there]
    spread = held.details[there] - fit.details[fit.cells >= 0].mean(0)
    shape = 1 - ((held.details[there] - drawn) ** 2).sum() / (spread**2).sum()
    named = there & (held.cells == held.captioned()[:, None])
    parts = {"uncaptioned": there & ~named, "captioned": named, "cells": np.ones_like(there)}
    return {f"probe_{k}": 100 * float(right[m].mean()) for k, m in parts.items()} | {"probe_shape": 100 * float(shape)}


@torch.no_grad()
def looks(model: Deem, world: World, seed: int, batch: int = 250) -> dict[str, float]:
    """Whether the language model sees and reads, in per cent. `caption_accuracy`: the thing that it finds most probable
    behind a picture and "there is a" is the caption's; `caption_guess`: what the most frequent thing would get;
    `caption_gain`: their difference, 0 for a model that does not look. `text_accuracy`: answers to "Is there a d?" with
    the listing as text in place of the picture, half of them yes."""
    held = world.make(LOOKS, stream(seed, "looks"), world.test)
    rng, named = stream(seed, "reading"), held.captioned()
    right = read = 0
    for index in np.array_split(np.arange(len(held)), max(1, len(held) // batch)):
        seen = model.encode_images(images_of(model, held, index))
        begun = [[to_picture(held.images[i]), Text("there is a", learn=False)] for i in index]
        said = model.word_scores(begun, world.names, seen).argmax(1).cpu().numpy()
        right += int((said == named[index]).sum())
        asked, answers_ = zip(*(world.question(rng, held.cells[i], "there") for i in index), strict=True)
        told = [world.listing(held.cells[i]) for i in index]
        texts = [[Text(f"{t} {q}", learn=False)] for t, q in zip(told, asked, strict=True)]
        yes, no = model.yes_no(texts).cpu().numpy().T
        read += int(((yes > no) == (np.array(answers_) == "yes")).sum())
    guess = 100 * float(np.bincount(named).max()) / len(held)
    found = {"caption_accuracy": 100 * right / len(held), "caption_guess": guess}
    return {**found, "caption_gain": 100 * right / len(held) - guess, "text_accuracy": 100 * read / len(held)}


def questions(world: World, seed: int, count: int) -> tuple[list[benchmarks.Question], list[np.ndarray]]:
    """All questions about a world, 6 `count` in each tiny-POPE list and in tiny-MMVP; `Question.image` is an index into
    the pictures beside them."""
    images: list[np.ndarray] = []
    out: list[benchmarks.Question] = []
    pool = world.make(6 * count, stream(seed, "benchmarks"), world.test)
    objects = world.objects(pool)
    many = [i for i, objects in enumerate(objects) if len(objects) >= 3][:count]
    lists = [objects[i] for i in many]
    images += [pool.images[i] for i in many]
    for kind in benchmarks.POPE_KINDS:
        for q in benchmarks.build_pope(lists, world.names, kind=kind, images=None, seed=seed):
            out.append(named(q, "POPE", kind))
    pairs = []
    for pair in world.pairs(seed, 3 * count):
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
    stack = pictures_only(np.stack(images))
    parts = np.array_split(np.arange(len(images)), max(1, len(images) // batch))
    seen = Seen.cat([model.encode_images(images_of(model, stack, i)) for i in parts])
    pictures, out = [to_picture(x) for x in images], []
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


def answer_scores(rows: list[dict], noun: str) -> dict[str, float]:
    """Accuracy, F1, precision, recall and yes ratio of each list, means over lists, and what always-yes would get."""
    out: dict[str, float] = {}
    keys = ("accuracy", "f1", "precision", "recall", "yes_ratio", "unparsed", "pope_accuracy")
    for group in benchmarks.POPE_KINDS:
        some = [r for r in rows if (r["benchmark"], r["group"]) == ("POPE", group)]
        found = parsers.score_yes_no(some)
        out |= {f"POPE_{group}_{k}": found[k] for k in keys}
        out[f"POPE_{group}_n"] = len(some)
        out[f"POPE_{group}_always_yes"] = parsers.score_yes_no([{**r, "answer": "yes"} for r in some])["accuracy"]
    for key in ("accuracy", "yes_ratio"):
        out[f"POPE_{key}"] = float(np.mean([out[f"POPE_{g}_{key}"] for g in benchmarks.POPE_KINDS]))
    pairs = [{**r, "right": r["answer"] == r["label"]} for r in rows if r["benchmark"] == "MMVP"]
    found, words = parsers.score_pairs(pairs), {"left": "left", "count": noun}
    out |= {"MMVP_accuracy": found["accuracy"], "MMVP_single_accuracy": found["single_accuracy"], "MMVP_n": len(pairs)}
    for kind, word in words.items():
        if some := [r for r in pairs if word in r["question"]]:
            out[f"MMVP_{kind}_accuracy"] = parsers.score_pairs(some)["accuracy"]
    return out


@torch.no_grad()
def score(model: Deem, world: World, s, seed: int) -> tuple[dict[str, float], list[dict]]:
    """(metrics of the record, a dict a question) of a run on scenes. Stage 1, which shows captions alone, is
    asked nothing: what a model would say there is about the form of the question."""
    model.eval()
    out = probe(model, world, seed) | looks(model, world, seed)
    if model.denoiser is not None:
        held = world.make(DENOISED, stream(seed, "denoising scenes"), world.test)
        out |= denoising(model, held, seed, maps=s.csr_use_mmfs == "on")
    rows = answers(model, *questions(world, seed, s.scenes.questions)) if s.stage > 1 else []
    return out | (answer_scores(rows, world.noun) if rows else {}), rows


@torch.no_grad()
def pictures(model: Deem, world: World, seed: int) -> dict[str, Tensor]:
    """For the figures: held-out scenes (n, H, W) or (n, H, W, 3), what is drawn from their tokens alone, and the
    queries' attention over the token grid (n, queries, h, w)."""
    n, steps = DRAWN
    held = world.make(n, stream(seed, "pictures"), world.test)
    x = images_of(model, held, np.arange(n))
    q = model.encoder(x).tokens
    out = {"scenes": torch.from_numpy(held.images)}
    if model.denoiser is not None:
        drawn = model.reconstruct(x, steps=steps, seed=seed).cpu()
        out["drawn"] = drawn[:, 0] if held.images.ndim == 3 else drawn.permute(0, 2, 3, 1).contiguous()
    if model.resampler is not None:
        side = int((q.shape[1] - 1) ** 0.5)
        out["attention"] = model.resampler.attention(q)[:, :, 1:].unflatten(2, (side, side)).cpu()
    return out
