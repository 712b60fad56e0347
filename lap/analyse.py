"""Look into the layers of a trained run: remove weights, draw loss surfaces under weight noise, follow norms.

    python analyse.py --run runs/demo/main-patches-v-fgsm
    python analyse.py --run runs/paper/main-cifar10-r-fgsm-16 --points 21 --steps 50 --restarts 10 --write

The surfaces before and during catastrophic overfitting need weights kept in training (train.py --keep-every 1).
Pictures go to <run>/analysis/.
"""

from dataclasses import dataclass
from pathlib import Path

from lab import runs
from lab.runs import Number, UserError

import torch

import eval as evaluation
import layerwise

SHARE = 0.1  # of a layer's weights is removed in the paper

# (name, which layers, largest entries?); the first removes nothing.
REMOVALS = (
    ("nothing", None, True),
    *(("former, largest", "former", True), ("former, smallest", "former", False)),
    *(("latter, largest", "latter", True), ("latter, smallest", "latter", False)),
)


@dataclass
class AnalyseSettings:
    run: str
    """Run folder written by train.py, or one seed of it (runs/.../seed0)."""
    share: Number = SHARE
    """Share of a layer's weights that is removed (paper: 0.1)."""
    images: int = 100
    """Test images the surfaces are drawn for."""
    points: int = 9
    """Points of a surface along each direction."""
    steps: int = 0
    """PGD steps of eps/4 after a removal; 0: as in the run's record."""
    restarts: int = 0
    """PGD restarts after a removal; 0: as in the run's record."""
    write: bool = False
    """Write what was found into the run's records (table removal and layers), in the place of what train.py found."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def removal(t, steps: int, restarts: int, share: float = SHARE) -> dict[str, dict[str, float]]:
    """{removal: clean, FGSM and PGD accuracy, and how far they fall} of the trainer's network, on the images of the
    final evaluation."""
    index = evaluation.order(len(t.test.part), min(t.s.eval_limit, len(t.test.part)))
    out: dict[str, dict[str, float]] = {}
    for name, which, largest in REMOVALS:
        names = layerwise.part(t.layers, which) if which else []
        with layerwise.without(t.model, t.layers, names, share, largest):
            found = evaluation.attack_all(t.model, t.test, index, t.s.eps, steps, restarts, t.seed)
        base = out.get("nothing", found)
        out[name] = found | {f"{k}_drop": base[k] - found[k] for k in ("clean", "fgsm", "pgd")}
    return out


def moments(curve: list[dict]) -> dict[str, int]:
    """Epochs before (best PGD accuracy), at the onset and after overfitting; without it, at one and two thirds and the
    end of training."""
    last, onset = len(curve), evaluation.onset(curve)
    if onset is None:
        return {"early": max(1, last // 3), "middle": max(1, 2 * last // 3), "end": last}
    earlier = [row["probe_pgd"] for row in curve[: onset - 1]]
    return {"before": 1 + earlier.index(max(earlier)), "during": onset, "after": last}


def shown(names: list[str], n: int = 5) -> list[str]:
    """At most n names spread evenly from the first to the last."""
    picks = sorted({round(i * (len(names) - 1) / max(n - 1, 1)) for i in range(n)})
    return [names[k] for k in picks]


def surfaces(t, out: Path, images: int = 100, points: int = 9) -> dict:
    """{"epochs", "layers", "values" [moment][layer][points][points]}: loss on single-step images under noise in one
    layer, and in all (last column), at the moments whose weights were kept."""
    folder = out / f"seed{t.seed}" / "epochs"
    wanted, picked = moments(t.curve), shown(layerwise.main_path(t.layers))
    final = {k: v.clone() for k, v in t.model.state_dict().items()}
    epochs, values = {}, {}
    for moment, epoch in wanted.items():
        path = folder / f"{epoch:04d}.safetensors"
        if epoch < len(t.curve) and not path.is_file():
            continue
        if epoch < len(t.curve):
            t.load_weights(path)
        x, y = next(t.test.in_order(t.probe[:images]))
        x = layerwise.attacked(t.model, x, y, t.s.eps)
        groups = [[t.layers[k]] for k in picked] + [list(t.layers.values())]
        values[moment] = [layerwise.surface(t.model, g, x, y, points) for g in groups]
        epochs[moment] = epoch
        t.model.load_state_dict(final)
    return {"epochs": epochs, "layers": [*picked, "all layers"], "values": values}


def all_parts(t, out: Path, seed: int, steps: int, restarts: int, share=SHARE, images=100, points=9) -> list[tuple]:
    """[(file suffix, table, setting, method, metrics)]: a record for each removal and one for the layers."""
    label, found = t.s.label, []
    prefix = "" if t.s.table == "main" else f"{t.s.table}-"  # only runs of the main table have a place in RESULTS.md
    other = "" if share == SHARE else f", {100 * share:g} %"  # a row of its own, not the table's
    for name, metrics in removal(t, steps, restarts, share).items():
        suffix = f"removal-{name}{other.removesuffix(' %')}".replace(", ", "-")
        found.append((suffix, f"{prefix}removal", f"{t.s.setting}, {name}{other}", label, metrics))
    number = {"former_layers": len(layerwise.part(t.layers, "former")), "layers": len(t.layers)}
    collapsed = int(evaluation.onset(t.curve) is not None)
    layers = number | {"collapsed": collapsed, "names": list(t.layers), "surfaces": surfaces(t, out, images, points)}
    return [*found, ("layers", f"{prefix}layers", t.s.setting, label, layers)]


def main() -> None:
    import figures
    import train

    a = runs.parse(AnalyseSettings, __doc__)
    if not 0 < a.share <= 1 or min(a.steps, a.restarts) < 0 or a.images < 1 or a.points < 2:
        raise UserError("--share must lie in (0, 1], --points be at least 2, --images 1, --steps and --restarts 0")
    t, folder, seeds = evaluation.open_run(a.run, a.data_dir, a.device)
    if a.write and (a.steps not in (0, t.s.test_steps) or a.restarts not in (0, t.s.test_restarts)):
        raise UserError("--write keeps to the attack of the run's record: leave --steps and --restarts out")
    run = runs.Run(folder, t.s, ignore=train.IGNORE) if a.write else None
    for seed in seeds:
        t.fresh(seed)
        t.load_weights(folder / f"seed{seed}" / "model.safetensors")
        t.curve = train.read_curve(folder / f"seed{seed}" / "metrics.jsonl")
        if not t.curve:
            raise UserError(f"{folder / f'seed{seed}'} has no metrics.jsonl; train the run again")
        steps, restarts = a.steps or t.s.test_steps, a.restarts or t.s.test_restarts
        parts = all_parts(t, folder, seed, steps, restarts, a.share, a.images, a.points)
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
