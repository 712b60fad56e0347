"""Evaluate the models of a run again: other tau, one alpha, all metrics, or ES by its literal definition.

    python eval.py --run runs/demo/world0 --tau 0.8  # calibrate every unlearned model to another bar
    python eval.py --run runs/demo/world0 --methods ga kl --alpha 0.5  # the scores half-way to the unlearned model
    python eval.py --run runs/demo/world0 --literal 5  # the definition by generation beside one pass

A run is a folder that train.py wrote.
"""

import time
from pathlib import Path

from lab import runs
from lab.runs import UserError

import numpy as np

import control
import metrics
import models
from evaluation import Along, unlearned_path
from methods import METHODS
from models import set_weights
from originals import Bench, accelerator_of
from settings import EvalSettings, Settings, check_tau


def literal(lm, sets: metrics.Sets, n: int) -> None:
    """Print whether both ways to ES agree on the first items of each set."""
    for (kind, part), items in sets.items.items():
        some = items[:n]
        clock = time.perf_counter()
        slow = metrics.extraction_strength_literal(lm, some, sets.chat.end, sets.device)
        middle = time.perf_counter()
        quick = metrics.score_items(lm, some, sets.chat.pad, sets.device).es
        end = time.perf_counter()
        differ = int((np.abs(slow - quick) > 1e-9).sum())
        print(
            f"    literal ES, {kind} {part}: {differ} of {len(some)} items differ "
            f"({middle - clock:.2f} s by generation, {end - middle:.3f} s in one pass)"
        )


def main() -> None:
    e = runs.parse(EvalSettings, __doc__)
    for tau in e.tau:
        check_tau(tau)
    if e.alpha != -1 and not 0 <= e.alpha <= 1 or e.literal < 0:
        raise UserError("--alpha must lie in [0, 1] and --literal must not be negative")
    folder = Path(e.run)
    s = runs.settings_from(folder / "settings.json", Settings, data_dir=e.data_dir, device=e.device)
    s.check()
    s.resolve()
    for name, there in (("methods", s.methods), ("forget", s.splits)):
        unknown = [x for x in getattr(e, name) if x not in there]
        if unknown:
            raise UserError(f"{folder} has no {unknown[0]}; its {name}: {', '.join(there)}")
    device = runs.device(e.device, s.precision == "mixed")
    for seed in s.seeds:
        bench = Bench(s, seed, accelerator_of(device))
        bench.set_original()
        for split in e.forget or s.splits:
            sets = bench.sets(split)
            for method in e.methods or s.methods:
                path = unlearned_path(folder / f"seed{seed}", split, method)
                tensors, _ = runs.read_weights(path)
                set_weights(bench.lm, tensors, path)
                mixer = control.Mixer(bench.lm, bench.original, tensors)
                known = Along(mixer, bench.lm, sets, bench.start(split))
                print(f"seed {seed}, {split}, {METHODS[method].label}:")
                if e.alpha >= 0:
                    found = metrics.four(known.at(dict.fromkeys(sets.kinds, e.alpha)))
                    line(f"alpha {e.alpha:g}", found)
                    export(e, bench, mixer, e.alpha, f"seed{seed}-{split}-{method}-alpha{e.alpha:g}")
                    extra(e, bench, sets, mixer, e.alpha)
                    continue
                for tau in e.tau or s.tau:
                    found, _ = known.calibrate(tau, e.alpha_search, s.alpha_step, s.alpha_tolerance)
                    alphas = " / ".join(f"{found[f'alpha_{k}']:.3f}" for k in sets.kinds)
                    line(f"tau {tau:g}, alpha {alphas}", found)
                    export(e, bench, mixer, found["alpha_exact"], f"seed{seed}-{split}-{method}-tau{tau:g}")
                    compare(folder, seed, split, method, tau, found, s, e)
                extra(e, bench, sets, mixer, 1.0)


def line(what: str, found: dict[str, float]) -> None:
    keys = [(k, p) for k in metrics.KINDS for p in metrics.PARTS if f"ES_{k}_{p}" in found]
    parts = [f"{k} {p} {found[f'ES_{k}_{p}']:.3f}" for k, p in keys]
    print(f"  {what}: ES " + ", ".join(parts))


def export(e: EvalSettings, bench: Bench, mixer: control.Mixer, alpha: float, name: str) -> None:
    if e.export:
        mixer.set(alpha)
        models.save(bench.lm.hf, bench.chat.tokenizer, runs.home(e.export) / name)
        print(f"    written to {runs.home(e.export) / name}")


def extra(e: EvalSettings, bench, sets: metrics.Sets, mixer: control.Mixer, alpha: float) -> None:
    mixer.set(alpha)
    if e.literal:
        literal(bench.lm, sets, e.literal)
    if e.utility:
        found = metrics.utility_of(bench.lm, bench.chat, bench.corpus, bench.device, bench.s.max_length)
        nine = ", ".join(f"{k.removeprefix('utility.')} {v:.3f}" for k, v in found.items() if k != "model_utility")
        print(f"    model utility at alpha {alpha:g}: {found['model_utility']:.3f} ({nine})")


def compare(folder: Path, seed: int, split: str, method: str, tau: float, found: dict, s, e: EvalSettings) -> None:
    """Say where the record disagrees; with --write add a record of this evaluation."""
    path = folder / f"seed{seed}" / f"record-{split}-{method}-tau{tau:g}.json"
    if path.is_file() and e.alpha_search == s.alpha_search:
        old = runs.read_record(path)["metrics"]
        gap = max(abs(old[k] - found[k]) for k in found if k.startswith("ES_") and k in old)
        if gap > 1e-6:
            print(f"    the record says otherwise, by up to {gap:.4f}")
    if e.write:
        model = folder / f"seed{seed}" / f"record-{split}-{method}-none.json"
        old = runs.read_record(model)
        setting = f"{old['setting'].replace('calibration=none', f'calibration=UWC tau={tau:g}')}, {e.alpha_search}"
        runs.write_json(
            model.with_name(f"record-eval-{split}-{method}-tau{tau:g}.json"),
            {**old, "metrics": found, "table": old["table"] + "-eval", "setting": setting},
        )


if __name__ == "__main__":
    runs.command(main)
