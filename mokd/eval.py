"""Adapt and score: tasks of a domain, several methods on the same tasks, paired differences, records.

    python eval.py --backbone random5x5 --size 28 --domains drawn --tasks 100    # no training, no data, no weights
    python eval.py --weights weights/url/model_best.pth.tar --domains mnist --seen omniglot --data-dir /data
    python eval.py --run runs/demo/own-conv4-drawn --domains digits --methods ncc mokd mokd:gamma=0
    accelerate launch --num_processes 2 eval.py ...                              # processes share the tasks out

Results of finished blocks of tasks are kept: the same command goes on where it was stopped.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lab import runs
from lab.runs import Number, UserError

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

import backbones
import domains
import episodes
import heads
import methods
import mokd
import tuning

BLOCK = 20  # tasks that are kept together
PAIRS = {"cpu": 2**19, "cuda": 2**25}  # entries of the kernel matrices of a batch
LAW_NAMES = {"varied": "varied-way varied-shot", "5shot": "varied-way 5-shot", "1shot": "5-way 1-shot"}


@dataclass
class Harness:
    """Settings of evaluation that train.py has too."""

    domains: tuple[str, ...] = ("drawn",)
    """Domains that are tested on; `paper` stands for all 13 of the paper, in train.py `seen` for those of --train."""
    methods: tuple[str, ...] = ("ncc", "url", "mokd")
    """ncc, url, mokd, ssl-hsic, protonet, fp-maml, linear, cosine, tsa, finetune; settings of one after a colon:
    mokd:gamma=0, mokd:search=none (no test power maximisation), mokd:kernel=imq, mokd:zz=searched, url:lr=0.5."""
    law: str = "varied"
    """How tasks are drawn: varied (way and shot), 5shot (varied way), 1shot (5-way)."""
    tasks: int = 600
    """Tasks a domain and seed (paper: 600)."""
    max_support: int = 500
    """Most support images of a task (paper: 500); 5shot and 1shot have what they have, at most 250."""
    gamma: Number = -1.0
    """Weight of HSIC(Z,Z); -1: published for the domain and law (0, 1 or 3)."""
    lr: Number = -1.0
    """Adadelta's learning rate of MOKD; -1: published for the domain (0.25, or 1 for Traffic Sign and MNIST)."""
    weight_decay: Number = -1.0
    """MOKD's weight decay; -1: published (0.25 for the 8 training sets of Meta-Dataset, by name; else 0)."""
    kernel: str = "rbf"
    """MOKD's kernel: rbf (paper's tables), imq, linear, cosine."""
    search: str = "grid"
    """Bandwidth: grid (paper), gradient (ascent of the test power from the best of the grid), none (median)."""
    zz_bandwidth: str = "shared"
    """shared: HSIC(Z,Z) takes the bandwidth found for HSIC(Z,Y), as released; searched: its own, as printed."""
    size: int = 84
    """Side of the pictures in pixels (paper: 84)."""
    limit: int = 0
    """Images of a class that are read (0: all; 2000 for Quick Draw and MSCOCO)."""
    batch: int = 256
    """Pictures encoded at once."""
    workers: int = 4
    """Processes that decode pictures, at most one a core."""
    table: str = "own"
    """Table of RESULTS.md the records belong to; runs started by hand stand in none."""
    setting: str = ""
    """Setting in the records; default: how tasks are drawn."""
    scale: str = "demo"
    """smoke, demo or paper; goes into the record and the run folder, changes nothing else."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the tasks (paper: 41 42 43 44 45), in train.py also of the weights."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: str = ""
    """Run folder."""

    def check(self) -> None:
        self.domains = tuple(x for d in self.domains for x in (domains.PAPER if d == "paper" else (d,)))
        known = (*domains.SMALL, *domains.PAPER)
        for name in self.domains:
            if name not in known:
                raise UserError(f"no domain {name}; use one of {', '.join(known)}, or paper for all 13 of the paper")
        if not self.domains or len(set(self.domains)) != len(self.domains):
            raise UserError("--domains takes one or more different domains")
        for key, allowed in {
            **{"law": episodes.LAWS, "scale": runs.SCALES, "kernel": methods.CHOICES["kernel"]},
            **{"search": methods.CHOICES["search"], "zz_bandwidth": methods.CHOICES["zz"]},
        }.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"--{key.replace('_', '-')} {getattr(self, key)}: use one of {', '.join(allowed)}")
        for key in ("tasks", "size", "batch"):
            if getattr(self, key) < 1:
                raise UserError(f"--{key} must be at least 1, not {getattr(self, key)}")
        for key in ("gamma", "lr", "weight_decay"):
            if getattr(self, key) < 0 and getattr(self, key) != -1:
                raise UserError(f"--{key.replace('_', '-')} must not be negative (-1: published)")
        if self.workers < 0 or self.limit < 0:
            raise UserError("--workers and --limit must not be negative")
        self.workers = min(self.workers, os.cpu_count() or 1)  # more only wait for each other
        if self.max_support < 50:
            raise UserError(f"--max-support must be at least 50, the most classes of a task, not {self.max_support}")
        labels = [methods.parse(m).label for m in self.methods]
        if not labels or len(set(labels)) != len(labels):
            raise UserError("--methods takes one or more different methods")
        self.setting = self.setting or LAW_NAMES[self.law]

    @property
    def sampling(self) -> episodes.Law:
        return replace(episodes.LAWS[self.law], max_support=self.max_support)

    def common(self) -> dict:
        """What was given for every MOKD row."""
        out = {"kernel": self.kernel, "search": self.search, "zz": self.zz_bandwidth}
        return out | {k: getattr(self, k) for k in ("gamma", "lr", "weight_decay") if getattr(self, k) != -1}


@dataclass
class EvalSettings(Harness):
    backbone: str = "resnet18"
    """resnet18 (the paper's), conv4, conv4-group, random5x5 (needs no weights), or a timm model by name."""
    weights: str = ""
    """Weights of the backbone: .safetensors, or a checkpoint of URL; a path from here or below --data-dir."""
    seen: tuple[str, ...] = ()
    """Domains the backbone was trained on: URL and TSA use smaller learning rates there."""
    run: str = ""
    """A finished run of train.py: its backbone, picture size and training domains; its seed for each of --seeds."""

    def check(self) -> None:
        super().check()
        if not self.run and not self.weights and self.backbone != "random5x5":
            raise UserError("give trained weights by --weights or --run, or use --backbone random5x5, which needs none")
        if self.run and (self.weights or self.seen):
            raise UserError("--run brings its own weights and training domains; leave out --weights and --seen")
        odd = [d for d in self.seen if d not in (*domains.TRAINING, "drawn")]
        if odd:
            raise UserError(f"--seen {odd[0]}: one of {', '.join((*domains.TRAINING, 'drawn'))} has training classes")


# ---------------------------------------------------------------------------------------------------- tasks to tensors


def padded(rows: list[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def batch(domain: domains.Domain, found: Tensor, tasks: list[episodes.Task], device) -> heads.Tasks:
    """Features of several tasks, padded to the largest."""
    parts = []
    for rows in ([t.support for t in tasks], [t.query for t in tasks]):
        parts.append(padded([found[torch.from_numpy(domain.number(r[:, 1], r[:, 2]))] for r in rows], 0.0).to(device))
        parts.append(padded([torch.from_numpy(r[:, 0]) for r in rows], -1).to(device))
    return heads.Tasks(*parts)


def grouped(sizes: list[int], most: int) -> list[list[int]]:
    """Positions by falling size, in batches of at most `most` pairs of padded images: little padding, bounded
    memory."""
    out: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        largest = sizes[out[-1][0]] if out else 0
        if out and (len(out[-1]) + 1) * largest**2 <= most and sizes[i] >= 0.75 * largest:
            out[-1].append(i)
        else:
            out.append([i])
    return out


def checked(logits: Tensor, label: str, title: str) -> Tensor:
    """The same logits; UserError where one is no number, which argmax would take for an answer."""
    if torch.isnan(logits).any():
        raise UserError(f"{label} on {title} ends in scores that are no numbers; nothing is written, lower its lr")
    return logits


def block(s: Harness, domain, found: Tensor, numbers: range, seed: int, model, seen: bool, device) -> list[dict]:
    """Results of some tasks: one dict a task, {label: numbers} under `methods`."""
    tasks = [episodes.sample(domain.pool, s.sampling, seed, k) for k in numbers]
    out = [
        {"task": k, "ways": len(t.classes), "support": len(t.support), "query": len(t.query), "methods": {}}
        for k, t in zip(numbers, tasks, strict=True)
    ]
    chosen = [methods.parse(m) for m in s.methods]
    for part in grouped([len(t.support) for t in tasks], PAIRS[device.type]):
        t = batch(domain, found, [tasks[i] for i in part], device)
        for m in chosen:
            if m.kind in methods.THROUGH:
                continue
            o = methods.settings(m, domain.name, s.law, seen, s.common())
            said, seconds = methods.timed(m, t, o, device)
            right = heads.accuracy(checked(said.logits, m.label, domain.title), t.targets)
            numbers_of = {"accuracy": right, **said.numbers}
            if said.theta is not None or m.kind == "ncc":
                numbers_of["cross_cosine"] = heads.cross_cosine(t, said.theta)
            bad = [k for k, v in numbers_of.items() if not torch.isfinite(v).all()]
            if bad:
                raise UserError(f"{bad[0]} of {m.label} on {domain.title} is no finite number; nothing is written")
            host = {k: v.double().tolist() for k, v in numbers_of.items()}
            for j, i in enumerate(part):
                out[i]["methods"][m.label] = {**{k: v[j] for k, v in host.items()}, "seconds": seconds}
    for m in (m for m in chosen if m.kind in methods.THROUGH):
        o = methods.settings(m, domain.name, s.law, seen, s.common())
        for i, task in enumerate(tasks):
            out[i]["methods"][m.label] = through(m, o, s, domain, task, model, seen, device)
    return out


def through(m: methods.Method, o: dict, s: Harness, domain, task: episodes.Task, model, seen: bool, device) -> dict:
    """A method that adapts the backbone, on the pictures of one task."""

    def pictures(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        x = [domains.prepare(domain.image(k), s.size) for k in domain.number(rows[:, 1], rows[:, 2])]
        return torch.stack(x).to(device), torch.from_numpy(rows[:, 0]).to(device)

    given = *pictures(task.support), *pictures(task.query)
    began = time.perf_counter()
    logits = tuning.tsa(model, *given, seen, **o) if m.kind == "tsa" else tuning.finetune(model, *given, **o)
    right = heads.accuracy(checked(logits, m.label, domain.title), given[3][None]).item()
    return {"accuracy": right, "seconds": time.perf_counter() - began}


# ------------------------------------------------------------------------------------------------------------- records


def interval(values: np.ndarray) -> float:
    """Half width of the 95 % interval of a mean, as the paper has it: 1.96 std / sqrt(n), ddof 0."""
    return float(1.96 * values.std() / np.sqrt(len(values)))


def summary(lines: list[dict], label: str) -> dict[str, float]:
    """Metrics of one method over the tasks, and its differences to the other methods on the same tasks."""
    own = [line["methods"][label] for line in lines]
    right = np.array([x["accuracy"] for x in own])
    out = {"accuracy": float(right.mean()), "ci95": interval(right), "tasks": len(lines)}
    out |= {f"mean_{k}": float(np.mean([line[k] for line in lines])) for k in ("ways", "support")}
    out["seconds_per_task"] = float(np.mean([x["seconds"] for x in own]))
    for key in ("cross_cosine", "power"):
        if key in own[0]:
            out[key] = float(np.mean([x[key] for x in own]))
    if "scale" in own[0]:
        out |= {k: float(np.median([x[k] for x in own])) for k in ("scale", "scale_zz")}
        out["negative_variance"] = float(np.sum([x["negative"] for x in own]))
        out["degenerate"] = float(np.mean([x["degenerate"] for x in own]))
    for other in lines[0]["methods"]:
        if other != label:
            gain = right - np.array([line["methods"][other]["accuracy"] for line in lines])
            out[f"gain over {other}"], out[f"gain over {other} ci95"] = float(gain.mean()), interval(gain)
    if "gain over MOKD(no TPM)" in out and label == "MOKD":
        out["accuracy_difference"] = out["gain over MOKD(no TPM)"]
    return out


def example(s: Harness, domain, found: Tensor, seed: int, label: str, seen: bool, device) -> dict | None:
    """One task as a picture: cosines of the support set and a t-SNE of all its images, after the method's head."""
    m = next(m for m in map(methods.parse, s.methods) if m.label == label)
    if m.kind not in ("ncc", "url", "mokd") or m.given:
        return None
    tasks = (episodes.sample(domain.pool, s.sampling, seed, k) for k in range(s.tasks))
    task = next((t for t in tasks if 20 <= len(t.support) <= 80 and len(t.classes) <= 12), None)
    if task is None:
        return None
    from sklearn.manifold import TSNE

    t = batch(domain, found, [task], device)
    theta = methods.answer(m, t, methods.settings(m, domain.name, s.law, seen, s.common())).theta
    z = [x[0] if theta is None else x[0] @ theta[0].T for x in (t.support, t.query)]
    everything = mokd.unit(torch.cat(z)).cpu().numpy()
    flat = TSNE(perplexity=min(15, len(everything) // 4), init="pca", random_state=0).fit_transform(everything)
    cosine = mokd.gram(z[0]).cpu().numpy()
    return {
        **{"labels": t.labels[0].tolist(), "targets": t.targets[0].tolist()},
        **{"cosine": np.round(cosine, 2).astype(float).tolist(), "tsne": np.round(flat, 1).astype(float).tolist()},
    }


def score(
    s: Harness, run: runs.Run, seed: int, model, seen: tuple[str, ...], device, extra: dict | None = None
) -> None:
    """Records of one seed on every domain; skips what is done. All processes take part, the first writes records."""
    state = PartialState()
    model = model.to(device).eval()
    for name in s.domains:
        labels = [methods.parse(m).label for m in s.methods]
        paths = [run.folder(seed) / f"record-{name}-{i:02d}.json" for i in range(len(labels))]
        kept = run.folder(seed) / f"tasks-{name}"
        if all(p.is_file() for p in paths):
            if state.is_main_process:
                shutil.rmtree(kept, ignore_errors=True)  # killed while the pieces were removed
            continue
        began = run.seconds()
        domain = domains.load(name, "test", runs.data_dir(s.data_dir), s.size, s.limit)
        found = backbones.features(model, domain, s.size, device, s.batch, s.workers)
        starts = range(0, s.tasks, BLOCK)
        bar = tqdm(starts[state.process_index :: state.num_processes], f"{domain.title}, seed {seed}", disable=None)
        for start in bar:
            path = kept / f"{start:05d}.json"
            if not path.is_file():
                numbers = range(start, min(start + BLOCK, s.tasks))
                runs.write_json(path, block(s, domain, found, numbers, seed, model, name in seen, device))
        state.wait_for_everyone()
        if not state.is_main_process:
            state.wait_for_everyone()  # until the first has read and removed the parts
            continue
        lines = [line for start in starts for line in runs.read_json(kept / f"{start:05d}.json")]
        whole = all(isinstance(x, dict) and set(labels) == set(x.get("methods", ())) for x in lines)
        if not whole or [x.get("task") for x in lines] != list(range(s.tasks)):
            raise UserError(f"{kept} does not hold tasks 0 to {s.tasks - 1}; delete that folder and start again")
        runs.write_text(run.folder(seed) / f"tasks-{name}.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
        for i, label in enumerate(labels):
            m = {**summary(lines, label), **(extra or {})}
            o = methods.settings(methods.parse(s.methods[i]), name, s.law, name in seen, s.common())
            m["method_settings"] = {**o, "seen": name in seen}
            if seed == s.seeds[0]:
                m["example"] = example(s, domain, found, seed, label, name in seen, device)
            where = {"table": s.table, "dataset": domain.title, "setting": s.setting, "method": label, "scale": s.scale}
            more = {"data": domain.about(), "metrics": m, "where": where, "device": device}
            run.record(seed, seconds=0.0 if i else run.seconds() - began, suffix=f"-{name}-{i:02d}", **more)
        shutil.rmtree(kept)
        state.wait_for_everyone()


def show(records: Iterable[dict]) -> None:
    """A line for each domain and method: mean over seeds, the difference to NCC, notes that must not be missed."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for r in records:
        groups.setdefault((r["dataset"], r["method"]), []).append(r["metrics"])
    for (dataset, label), found in groups.items():
        mean = {k: np.mean([m[k] for m in found]) for k in ("accuracy", "ci95")}
        line = f"{dataset:18s} {label:24s} {mean['accuracy']:6.2f} ± {mean['ci95']:4.2f} %"
        if "gain over NCC" in found[0]:
            gain, width = (np.mean([m[k] for m in found]) for k in ("gain over NCC", "gain over NCC ci95"))
            line += f"   over NCC {gain:+6.2f} ± {width:4.2f}"
        if found[0].get("degenerate"):
            share = 100 * np.mean([m["degenerate"] for m in found])
            line += f"   {share:.0f} % of tasks have one image a class: HSIC(Z,Y) is 0 there, labels teach nothing"
        print(f"{line}   ({len(found)} seeds, {found[0]['tasks']} tasks)")


def main() -> None:
    s = runs.parse(EvalSettings, __doc__)
    s.check()
    device = runs.device(s.device)
    trained = None
    if s.run:
        trained = runs.read_json(Path(s.run) / "settings.json")
        try:
            s.backbone, s.size, s.seen = trained["backbone"], trained["size"], tuple(trained["train"])
        except (KeyError, TypeError):
            raise UserError(f"{s.run} is no run of train.py") from None
    state = PartialState()
    s.out = s.out or f"runs/{s.scale}/{s.table}-{Path(s.run or s.weights or s.backbone).stem}-{s.law}"
    ignore = ("out", "data_dir", "device", "batch", "workers")
    run = runs.Run(Path(s.out), s, ignore, state.process_index)
    if run.complete:
        if state.is_main_process:
            print(f"{run.out} is complete; delete it to run again")
            show(runs.read_record(p) for p in sorted(run.out.glob("seed*/record*.json")))
        return
    for seed in s.seeds:
        model = backbones.build(s.backbone, s.size)
        if trained:
            backbones.load_weights(model, Path(s.run) / f"seed{seed}" / "model.safetensors")
        elif s.weights:
            below = runs.data_dir(s.data_dir) / s.weights
            backbones.load_weights(model, below if below.is_file() else Path(s.weights))
        score(s, run, seed, model, s.seen, device)
    if state.is_main_process:
        show(run.finish())
        print(f"records in {run.out}")


if __name__ == "__main__":
    runs.command(main)
