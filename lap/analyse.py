"""Look into the layers of a trained run: remove weights, draw loss surfaces under weight noise, follow norms.

    python analyse.py --run runs/demo/main-patches-v-fgsm
    python analyse.py --run runs/paper/main-cifar10-r-fgsm-16 --points 21 --steps 50 --restarts 10 --write

The surfaces before and during catastrophic overfitting need weights kept in training (train.py --keep-every 1).
Pictures go to <run>/analysis/.
"""

from lab import runs
from lab.runs import UserError

import torch

import analysis
import evaluation
import figures
import layerwise
from settings import NOT_PART_OF_A_RUN, AnalyseSettings
from trainer import open_run, read_curve


def main() -> None:
    a = runs.parse(AnalyseSettings, __doc__)
    a.check()
    t, folder, seeds = open_run(a.run, a.data_dir, a.device)
    if a.write and (a.steps not in (0, t.s.test_steps) or a.restarts not in (0, t.s.test_restarts)):
        raise UserError("--write keeps to the attack of the run's record: leave --steps and --restarts out")
    run = runs.Run(folder, t.s, ignore=NOT_PART_OF_A_RUN) if a.write else None
    for seed in seeds:
        t.fresh(seed)
        t.load_weights(folder / f"seed{seed}" / "model.safetensors")
        t.curve = read_curve(folder / f"seed{seed}" / "metrics.jsonl")
        if not t.curve:
            raise UserError(f"{folder / f'seed{seed}'} has no metrics.jsonl; train the run again")
        steps, restarts = a.steps or t.s.test_steps, a.restarts or t.s.test_restarts
        parts = analysis.all_parts(t, folder, seed, steps, restarts, a.share, a.images, a.points)
        print(f"{folder}, seed {seed}: {100 * a.share:g} % of the weights of a layer removed, PGD-{steps}-{restarts}")
        former, latter = (", ".join(layerwise.part(t.layers, k)) for k in ("former", "latter"))
        print(f"former layers: {former}\nlatter layers: {latter}")
        for _, table, setting, _, m in parts:
            if table.endswith("removal"):
                print(f"{setting:32s} clean {m['clean']:6.2f} %  FGSM {m['fgsm']:6.2f} %  PGD {m['pgd']:6.2f} %")
        layers = parts[-1][-1]
        place = f"{t.s.label}, {t.data.kind.title}, {t.s.setting}, seed {seed}"
        for name, (figure, _) in {
            "surfaces": figures.surfaces(layers["surfaces"], place),
            "layers": figures.layer_curves([evaluation.summary(t.curve)], list(t.layers), place),
        }.items():
            path = folder / "analysis" / f"{name}-seed{seed}.png"
            figures.save(figure, path)
            print(f"wrote {path}")
        if len(layers["surfaces"]["epochs"]) < 3:
            print("surfaces of earlier epochs need kept weights: train.py --keep-every 1")
        if run:
            for suffix, table, setting, method, metrics in parts:
                where = {"table": table, "dataset": t.data.kind.title, "setting": setting, "method": method}
                more = {"data": t.data.about(), "where": {**where, "scale": t.s.scale}, "device": t.device}
                run.record(seed, seconds=run.seconds(), metrics=metrics, suffix=f"-{suffix}", **more)
    if run and run.complete:
        run.finish()


if __name__ == "__main__":
    with torch.no_grad():
        runs.command(main)
