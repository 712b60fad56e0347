"""Adapt and score: tasks of a domain, several methods on the same tasks, paired differences, records.

    python eval.py --backbone random5x5 --size 28 --domains drawn --tasks 100    # no training, no data, no weights
    python eval.py --weights weights/url/model_best.pth.tar --domains mnist --seen omniglot --data-dir /data
    python eval.py --backbone lite0 --images pictures --ways 5 --shots 5         # your own, pictures/<class>/
    python eval.py --run runs/demo/conv4-drawn --domains digits --methods ncc mokd mokd:gamma=0
    accelerate launch --num_processes 2 eval.py ...                              # processes share the tasks out

Results of finished blocks of tasks are kept: the same command goes on where it was stopped.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from lab import runs

from accelerate import PartialState

import backbones
import evaluation
import weights
from settings import EvalSettings, Settings

# Settings without effect on the numbers: a run goes on with others of these.
FREE = ("out", "data_dir", "device", "batch", "workers", "dry_run")


def named(s: EvalSettings) -> str:
    """Run folder of these settings: what a reader looks for, and a checksum of everything that decides the numbers."""
    told = {k: v for k, v in asdict(s).items() if k not in FREE}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:6]
    start = [s.table] if s.table != "own" else []
    what = [Path(s.run or s.weights or s.backbone).name.partition(".")[0], *s.domains]
    return runs.default_out(
        s.scale, "-".join([*start, *what, s.law if not s.ways else f"{s.ways}x{s.shots}"])[:90] + f"-{digest}"
    )


def network(s: EvalSettings, seed: int):
    """The backbone of a seed with its weights."""
    model = backbones.build(s.backbone, s.size, s.pretrained)
    if s.run:
        return weights.load(model, Path(s.run) / f"seed{seed}" / "model.safetensors")
    below = runs.data_dir(s.data_dir) / s.weights
    return weights.load(model, below if below.is_file() else Path(s.weights)) if s.weights else model


def main() -> None:
    s = runs.parse(EvalSettings, __doc__)
    s.check()
    device = runs.device(s.device)
    if s.run:
        trained = runs.settings_from(Path(s.run) / "settings.json", Settings)
        s.backbone, s.size, s.seen = trained.backbone, trained.size, trained.train
    state = PartialState()
    s.out = s.out or named(s)
    if not runs.finished(Path(s.out), s.seeds):  # before there is a folder: what is not there leaves none
        for name in s.domains:
            evaluation.opened(s, name)
        network(s, s.seeds[0])
    if s.dry_run:
        print(f"would test {s.backbone} on {device}, seeds {s.seeds}, {s.tasks} tasks a domain, into {s.out}")
        for name in s.domains:
            print(f"  {name}: {len(evaluation.opened(s, name).classes)} classes, {', '.join(s.methods)}")
        return
    run = runs.Run(Path(s.out), s, FREE, state.process_index)
    if run.complete:
        if state.is_main_process:
            print(f"{run.out} is complete; delete it to run again")
            evaluation.show(runs.read_record(p) for p in sorted(run.out.glob("seed*/record*.json")))
        return
    for seed in s.seeds:
        evaluation.score(s, run, seed, network(s, seed), s.seen, device)
    if state.is_main_process:
        evaluation.show(run.finish())
        print(f"records in {run.out}")


if __name__ == "__main__":
    runs.command(main)
