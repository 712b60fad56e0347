"""The pass over a whole data set, shard by shard, and the check of what a generator did there."""

import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import torch
from torch import Tensor

from echomod import Generator, NoClass, chunks, image_seed, resize


@dataclass
class Modified:
    """Every modified image: `full` at the generator's resolution, `small` at the data set's, `ok` False where the
    generator returned an all-black image three times (left out of training, never selected)."""

    full: Tensor
    small: Tensor
    ok: Tensor
    folder: Path
    seconds: float


def fingerprint(generator: Generator, data_sha: str, labels_sha: str, seed: int) -> dict:
    return {**generator.about(), "data": data_sha, "labels": labels_sha, "seed": seed}


def modify(
    generator: Generator,
    images: Tensor,
    labels: Tensor,
    seed: int,
    folder: Path,
    told: dict,
    *,
    shard: int = 512,
    batch: int = 64,
    rank: int = 0,
    world: int = 1,
    show: bool = True,
) -> Modified | None:
    """Edit all images towards their labels into folder/shard-*.safetensors; shards that are there are kept.

    told: the fingerprint, written to manifest.json and compared. Process `rank` of `world` makes every world-th shard;
    None while shards of other processes are missing.
    """
    manifest = folder / "manifest.json"
    told = {**told, "shard": shard, "n": len(images)}
    if manifest.is_file():
        if runs.read_json(manifest) != json.loads(json.dumps(told)):
            raise UserError(f"{folder} holds images of another generator or other labels; delete it or change --cache")
    else:
        runs.write_json(manifest, told)
    started, size = perf_counter(), images.shape[1]
    parts = [range(i, min(i + shard, len(images))) for i in range(0, len(images), shard)]
    paths = [folder / f"shard-{k:05d}.safetensors" for k in range(len(parts))]
    todo = [k for k in range(rank, len(parts), world) if not paths[k].is_file()]
    for k in progress(todo, "modifying", len(todo), hide=not show or not todo, unit="shard"):
        try:
            found = [edit_safely(generator, images, labels, seed, part) for part in chunks(parts[k], batch)]
        except NoClass as error:
            raise UserError(f"{error}; give more clean images by --pretrain") from None
        full, ok = torch.cat([f for f, _ in found]), torch.cat([o for _, o in found])
        tensors = {"full": full, "ok": ok, "label": labels[parts[k].start : parts[k].stop].clone()}
        if full.shape[1] != size:  # the form the classifier takes, once
            tensors["small"] = resize(full, size)
        runs.write_tensors(paths[k], tensors)
    if any(not p.is_file() for p in paths):
        return None
    tensors = [runs.read_tensors(p)[0] for p in paths]
    try:
        full, ok, used = (torch.cat([t[key] for t in tensors]) for key in ("full", "ok", "label"))
        small = torch.cat([t.get("small", t["full"]) for t in tensors])
    except (KeyError, RuntimeError):
        raise UserError(f"{folder}: a shard is not of this pass; delete the folder") from None
    if not torch.equal(used, labels):
        raise UserError(f"{folder}: a shard was made for other labels; delete the folder")
    return Modified(full, small, ok, folder, perf_counter() - started)


def edit_safely(generator: Generator, images: Tensor, labels: Tensor, seed: int, part: range) -> tuple[Tensor, Tensor]:
    """(edited images, ok): all-black results are made again with two further seeds, then marked."""
    x, y = images[part.start : part.stop], labels[part.start : part.stop]
    out = generator.edit(x, y, [image_seed(seed, i) for i in part])
    for attempt in (1, 2):
        black = (out.flatten(1).amax(1) == 0) & (x.flatten(1).amax(1) > 0)
        if not black.any():
            break
        again = torch.nonzero(black)[:, 0]
        out[again] = generator.edit(x[again], y[again], [image_seed(seed + attempt, part[i]) for i in again.tolist()])
    return out, out.flatten(1).amax(1) > 0


def check(agreement: float, similarity: float, least: float) -> None:
    """UserError for a generator that does not do its work on truly wrong-labelled samples: `agreement` of the modified
    image with the label there (share), `similarity` of original and modified image there (cosine)."""
    if similarity != similarity or agreement != agreement:
        return  # no wrong label in the data: nothing to check
    if similarity > 1 - 1e-6:
        raise UserError(
            "the generator returns the instance: modified images of wrong-labelled samples equal the "
            "originals; raise --strength"
        )
    if agreement < least:
        raise UserError(
            f"the generator ignores the label: {100 * agreement:.1f} % of the modified images of wrong-labelled "
            f"samples fit their label, --check asks for {100 * least:.0f} %; weaken the control "
            "(--edit.control-scale, --edit.control-end), raise --strength or train longer"
        )
