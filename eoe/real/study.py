"""Scale real: methods, lists and controls over the splits of a study, with bootstrap intervals, as records.

    python eval.py --study near --backbone conse-lite0

The question is what the envisioned names are worth beyond their number: every list stands beside as many irrelevant
names and as many random nouns, judged on the same images, and the differences have paired intervals.
"""

from collections.abc import Callable

from lab import runs
from lab.progress import progress

import numpy as np
import torch
from scipy import stats

import backbones
import evaluation
from evaluation import BETAS
from real import bootstrap, pictures, tasks
from scores import reduce

TEMPLATES = {"a photo of a": "a photo of a {}", "bare": "{}"}
SIZES = {"own far": (10, 30, 100, 500), "own near": (1, 2, 3)}  # L of the sweep; near: for each ID class
FREE = " without OOD names"
KINDLESS = " without OOD names and kinds"
TRUTH = "Ground Truth"
POOLS = {"irrelevant": "irrelevant names", "nouns": "WordNet nouns", "animals": "animals"}  # controls in the records
HIGHER = {"FPR95": -1, "AUROC": 1}  # the sign of "better"
Values = dict[str, np.ndarray]  # metric -> [splits, replicates], column 0 the data


class Texts:
    """Unit text features by name, encoded once for a template."""

    def __init__(self, backbone, template: str, names: list[str], device):
        self.index = {n: i for i, n in enumerate(dict.fromkeys(names))}
        found = evaluation.text_features(backbones.CachedTexts(backbone), [*self.index], (template,))
        self.rows = found.to(device)

    def __call__(self, names: list[str]) -> torch.Tensor:
        return self.rows[[self.index[n] for n in names]]


def judged(made: tasks.Pool, features: torch.Tensor, weights: np.ndarray, each: Callable, hide: bool) -> dict:
    """{method: Values}: what `each(number of the split, split, features of its images)` scores, measured in every
    split. Several score vectors of one method (runs, draws) count as their mean."""
    out: dict[str, dict[str, list]] = {}
    for number, split in enumerate(progress(made.splits, "splits", len(made.splits), hide=hide)):
        used = split.inside | split.outside
        inside, w = split.inside[used], np.ascontiguousarray(weights[used])
        for method, vectors in each(number, split, features[torch.from_numpy(used)]).items():
            found = [bootstrap.measure(v, inside, w) for v in vectors]
            for metric in HIGHER:
                mean = np.mean([f[metric] for f in found], 0)
                out.setdefault(method, {}).setdefault(metric, []).append(mean)
    return {m: {k: np.array(v) for k, v in values.items()} for m, values in out.items()}


def told(name: str, v: np.ndarray, units: int, apart: bool) -> dict[str, float]:
    """A number with its interval, `_low` and `_high`, where one can be had. v [splits, replicates].

    apart: the splits are sets of their own, so that Student's t over them is an interval, too; the wider one counts.
    """
    value, low, high = bootstrap.interval(bootstrap.mean(v), units)
    if apart:
        half = stats.t.ppf(0.975, len(v) - 1) * v[:, 0].std(ddof=1) / np.sqrt(len(v))
        low, high = min(low, value - half), max(high, value + half)
    return {name: value} | ({f"{name}_low": low, f"{name}_high": high} if np.isfinite(low) else {})


def compared(method: str, found: dict[str, Values], splits: list[int], made: tasks.Pool) -> dict[str, float]:
    """Metrics of a method, and, of one with envisioned names, what it gains over MCM (`gain_`), MaxLogit, itself
    without the outlier term (`beyond_beta0_`), and over as many names that say nothing (`beyond_irrelevant_`,
    `beyond_nouns_`, `beyond_animals_`); positive is better. `left_to_truth_` is what Ground Truth gains over it."""
    out: dict[str, float] = {}
    how = made.units(splits), made.apart(splits)
    mine = {metric: found[method][metric][splits] for metric in HIGHER}
    for metric, v in mine.items():
        out |= told(metric, v, *how)
        out[f"{metric}_std"] = float(np.nanstd(v[:, 0]))
    others = {"gain": ("MCM", 1)} if method != "MCM" else {}
    if method.startswith("EOE("):
        others |= {"beyond_maxlogit": ("MaxLogit", 1), "beyond_beta0": (method.replace("EOE(", "S_MSP("), 1)}
        others |= {"left_to_truth": (TRUTH, -1)}
    others |= {f"beyond_{k}": (f"{pool} for {method}", 1) for k, pool in POOLS.items()}
    for name, (other, way) in others.items():
        for metric, sign in HIGHER.items() if other in found else ():
            gap = way * sign * (mine[metric] - found[other][metric][splits])
            out |= told(f"{name}_{metric}", gap, *how)
    return out


def fewer(names: list[str], split: tasks.Split, end: str) -> list[str]:
    """What is left of a list where a row leaves out real OOD names (FREE), or their kinds, too (KINDLESS)."""
    if end:
        names = [n for n in names if n not in split.truth]
    return [n for n in names if not tasks.is_kind(n, split.truth)] if end == KINDLESS else names


class Study:
    """A study under one backbone: its images, their features, its lists and controls."""

    def __init__(self, s, seed: int, device):
        self.s, self.seed, self.device, root = s, seed, device, runs.data_dir(s.data_dir)
        self.made = tasks.pool(s.study, root, seed, s.splits, s.limit)
        self.lists = tasks.lists(self.made, s.study, s.labels, root, s.llm)
        self.controls = tasks.controls(self.made, root, seed, s.study)
        # Lists that hold a real OOD name, or a kind of one, in some split: they are judged without those, too.
        self.shorter: dict[str, list[str]] = {}
        for label, by_run in self.lists.items():
            pairs = [(x, split) for v in by_run for x, split in zip(v, self.made.splits, strict=True)]
            numbers = [sum(len(fewer(x, split, end)) for x, split in pairs) for end in ("", FREE, KINDLESS)]
            self.shorter[label] = [e for e, a, b in zip((FREE, KINDLESS), numbers, numbers[1:], strict=False) if b < a]
        self.backbone = backbones.load(s.backbone, device, s.weights, root, s.download, s.bf16)
        found = [backbones.image_features(self.backbone, p, s.batch, s.workers) for p in self.made.parts]
        self.features = torch.cat(found).to(device)
        drawn = bootstrap.weights(self.made.groups, self.made.strata, s.bootstrap, seed)
        self.weights = np.ascontiguousarray(drawn.T)

    def matched(self, label: str, run: int, split: int, n: int) -> dict[str, list[list[str]]]:
        """Draws of n names from each pool of controls, for a list in a split."""
        key = (self.seed, label, run, split)
        return {
            name: [tasks.drawn(names, n, *key, name, d) for d in range(self.s.draws)]
            for name, names in self.controls.items()
            if name != "animals" or label != "own far"  # that list has no animals' prompt, and more names than they
        }

    def texts(self, template: str) -> Texts:
        wanted = [n for s in self.made.splits for n in (*s.id_names, *s.truth)]
        wanted += [n for runs_ in self.lists.values() for splits in runs_ for names in splits for n in names]
        wanted += [n for names in self.controls.values() for n in names]
        return Texts(self.backbone, template, wanted, self.device)

    def methods(self, texts: Texts, number: int, split: tasks.Split, images: torch.Tensor) -> dict[str, list]:
        """{method: score vectors} of one split."""
        ids, beta, out = texts(split.id_names), self.s.beta, {}

        def add(name: str, method: str, names: list[str]) -> None:
            out.setdefault(method, []).append(evaluation.score(reduce(images, ids, texts(names)), name, beta))

        add("MCM", "MCM", [])
        add("MaxLogit", "MaxLogit", [])
        add("EOE", TRUTH, split.truth)
        if self.s.labels == "own":
            add("Energy", "Energy", [])
        for label, by_run in self.lists.items():
            method = f"EOE({label})"
            for run, splits in enumerate(by_run):
                names = splits[number]
                add("EOE", method, names)
                add("S_MSP", f"S_MSP({label})", names)
                rest = {"": names} | {end: fewer(names, split, end) for end in self.shorter[label]}
                for end in self.shorter[label]:
                    add("EOE", f"{method}{end}", rest[end])
                for control, drawn in self.matched(label, run, number, len(names)).items():
                    for one in drawn:
                        for end, left in rest.items():
                            add("EOE", f"{control} for {method}{end}", one[: len(left)])
        return out

    def counts(self, method: str, splits: list[int]) -> dict[str, float]:
        """Names after cleaning and those that are a real OOD name, mean over splits and runs."""
        made = self.made.splits
        label = next((k for k in self.lists if f"({k})" in method), "")
        if label:
            end = next((e for e in (KINDLESS, FREE) if method.endswith(e)), "")
            found = [(fewer(names[i], made[i], end), made[i].truth) for names in self.lists[label] for i in splits]
        else:
            found = [(made[i].truth if method == TRUTH else [], made[i].truth) for i in splits]
        # Of a control only the number is the list's: its names are none of the classes.
        hits = [0] if " for " in method else [len({*names} & {*truth}) for names, truth in found]
        return {"labels": float(np.mean([len(names) for names, _ in found])), "hits": float(np.mean(hits))}

    def sweep(self, texts: Texts) -> list[tuple[str, int, float, dict]]:
        """(list, L, beta, Values) of S_EOE over betas and list lengths, without intervals."""
        one = np.ones((len(self.features), 1), np.float32)

        def each(number: int, split: tasks.Split, images: torch.Tensor) -> dict:
            ids, out = texts(split.id_names), {}
            for label, sizes in SIZES.items():
                for n in sizes:
                    stats = reduce(images, ids, texts(tasks.own(label, split, n)))
                    for b in BETAS:
                        out[label, n, b] = [evaluation.score(stats, "EOE", b)]
            return out

        found = judged(self.made, self.features, one, each, True)
        return [(*key, values) for key, values in found.items()]


def run_study(s, run: runs.Run, seed: int, device) -> None:
    """Records of one study, backbone and seed of the splits."""
    study = Study(s, seed, device)
    made, number = study.made, 0

    def record(table: str, dataset: str, setting: str, method: str, metrics: dict, splits: list[int]) -> None:
        nonlocal number
        used = np.any([made.splits[i].inside for i in splits], 0), np.any([made.splits[i].outside for i in splits], 0)
        about = {"name": " + ".join(p.name for p in made.parts), "variant": made.parts[0].variant}
        about |= {"sha256": "+".join(p.sha256[:12] for p in made.parts), "n": int(used[0].sum())}
        about |= {"n_ood": int(used[1].sum()), "splits": [made.splits[i].id_names for i in splits]}
        where = {"table": table, "dataset": dataset, "setting": setting, "method": method, "scale": s.scale}
        seconds = 0.0 if number else run.seconds()
        run.record(
            seed, seconds=seconds, data=about, metrics=metrics, where=where, device=device, suffix=f"-{number:03d}"
        )
        number += 1

    short = study.backbone.name.removeprefix("conse-")
    for template, text in TEMPLATES.items():
        texts = study.texts(text)
        found = judged(made, study.features, study.weights, lambda *a, t=texts: study.methods(t, *a), False)
        nearest = [
            (study.features[torch.from_numpy(x.inside)] @ texts(x.id_names).T).argmax(1).cpu().numpy()
            for x in made.splits
        ]
        accuracy = [tasks.right(made, x, best) for x, best in zip(made.splits, nearest, strict=True)]
        for dataset, splits in made.shown.items():
            for method in found:
                if method in ("MCM", "MaxLogit", TRUTH) and s.labels != "own":
                    continue  # they stand in the records of the own lists
                metrics = compared(method, found, splits, made) | study.counts(method, splits)
                if method == "MCM":
                    metrics["accuracy"] = float(np.mean([accuracy[i] for i in splits]))
                record("real", dataset, f"{short}, {template}", method, metrics, splits)
        if s.labels == "own" and template == "a photo of a":
            for label, n, b, values in study.sweep(texts):
                for dataset, splits in made.shown.items():
                    metrics = {k: float(np.nanmean(v[splits, 0])) for k, v in values.items()}
                    setting = f"{short}, {'l' if label == 'own near' else 'L'}={n}, beta={b:g}"
                    record("real-sweep", dataset, setting, f"EOE({label})", metrics, splits)
            pictures.keep(study, texts, run.folder(seed) / f"pictures-{s.study}.safetensors")
