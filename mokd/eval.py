"""Adapt and score: tasks of a domain, several methods on the same tasks, paired differences, records.

    python eval.py --backbone random5x5 --size 28 --domains drawn --tasks 100    # no training, no data, no weights
    python eval.py --weights weights/url/model_best.pth.tar --domains mnist --seen omniglot --data-dir /data
    python eval.py --run runs/demo/own-conv4-drawn --domains digits --methods ncc mokd mokd:gamma=0
    accelerate launch --num_processes 2 eval.py ...                              # processes share the tasks out

Results of finished blocks of tasks are kept: the same command goes on where it was stopped.
"""

from pathlib import Path

from lab import runs
from lab.runs import UserError

from accelerate import PartialState

import backbones
import evaluation
from settings import EvalSettings


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
    s.out = s.out or runs.default_out(s.scale, f"{s.table}-{Path(s.run or s.weights or s.backbone).stem}-{s.law}")
    ignore = ("out", "data_dir", "device", "batch", "workers")
    run = runs.Run(Path(s.out), s, ignore, state.process_index)
    if run.complete:
        if state.is_main_process:
            print(f"{run.out} is complete; delete it to run again")
            evaluation.show(runs.read_record(p) for p in sorted(run.out.glob("seed*/record*.json")))
        return
    for seed in s.seeds:
        model = backbones.build(s.backbone, s.size)
        if trained:
            backbones.load_weights(model, Path(s.run) / f"seed{seed}" / "model.safetensors")
        elif s.weights:
            below = runs.data_dir(s.data_dir) / s.weights
            backbones.load_weights(model, below if below.is_file() else Path(s.weights))
        evaluation.score(s, run, seed, model, s.seen, device)
    if state.is_main_process:
        evaluation.show(run.finish())
        print(f"records in {run.out}")


if __name__ == "__main__":
    runs.command(main)
