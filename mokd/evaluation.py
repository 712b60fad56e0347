"""Tasks to records: every method on the same tasks, paired differences, a record each."""

import functools
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

import domains
import episodes
import features
import heads
import hsic
import methods
import sets
import tuning
from settings import Harness

BLOCK = 20  # tasks that are kept together
PAIRS = {"cpu": 2**19, "cuda": 2**25}  # entries of the kernel matrices of a batch


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
            o = methods.settings(m, domain.name, s.rule, seen, s.common())
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
        o = methods.settings(m, domain.name, s.rule, seen, s.common())
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
            out[f"effect over {other}"] = float(gain.mean() / gain.std()) if gain.std() else 0.0
            out[f"won over {other}"] = float(100 * ((gain > 0) + 0.5 * (gain == 0)).mean())
    if label != "NCC" and "cross_cosine" in own[0] and "NCC" in lines[0]["methods"]:
        less = np.array(
            [line["methods"][label]["cross_cosine"] - line["methods"]["NCC"]["cross_cosine"] for line in lines]
        )
        out["cross_cosine over NCC"], out["cross_cosine over NCC ci95"] = float(less.mean()), interval(less)
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
    theta = methods.answer(m, t, methods.settings(m, domain.name, s.rule, seen, s.common())).theta
    z = [x[0] if theta is None else x[0] @ theta[0].T for x in (t.support, t.query)]
    everything = hsic.unit(torch.cat(z)).cpu().numpy()
    if not np.isfinite(everything).all() or np.ptp(everything, 0).max() < 1e-6:
        raise UserError(f"{label} on {domain.title} makes one point of all pictures of a task; lower its lr")
    flat = TSNE(perplexity=min(15, len(everything) // 4), init="pca", random_state=0).fit_transform(everything)
    cosine = hsic.gram(z[0]).cpu().numpy()
    return {
        **{"labels": t.labels[0].tolist(), "targets": t.targets[0].tolist()},
        **{"cosine": np.round(cosine, 2).astype(float).tolist(), "tsne": np.round(flat, 1).astype(float).tolist()},
    }


@functools.lru_cache(maxsize=len(sets.TITLES))
def _opened(name: str, images: str, folder: Path, size: int, limit: int) -> domains.Domain:
    return domains.folder(Path(images), limit) if name == "images" else domains.load(name, "test", folder, size, limit)


def opened(s: Harness, name: str) -> domains.Domain:
    """A domain of the settings by its name; read once, whatever the seed."""
    return _opened(name, getattr(s, "images", ""), runs.data_dir(s.data_dir), s.size, s.limit)


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
        domain = opened(s, name)
        found = features.features(model, s.backbone, domain, s.size, device, s.batch, s.workers)
        starts = range(0, s.tasks, BLOCK)
        bar = progress(starts[state.process_index :: state.num_processes], f"{domain.title}, seed {seed}", unit="batch")
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
            o = methods.settings(methods.parse(s.methods[i]), name, s.rule, name in seen, s.common())
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
