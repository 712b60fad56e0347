"""Zero-shot OOD detection with envisioned names (EOE): scores, metrics and records; trains nothing.

    python eval.py --table table3 --labels released  # a table of the paper on its data, weights and names
    python eval.py --id pet37 --ood texture places  # any ID set against any OOD sets
    python eval.py --images my/pictures --classes "cat,dog" --envision near --backbone conse-lite0  # scores.csv
    python eval.py --study near --backbone conse-lite0  # scale real: what the names are worth beyond their number
    python eval.py --synthetic --seeds 0 1 2  # tier A: no data, no network
    python eval.py --run runs/demo/drawn  # a trained stand-in again

What is measured lands in a run folder under runs/, a record a method.
"""

import tempfile
from pathlib import Path

from lab import checkpoints, runs

from accelerate import PartialState

import evaluation
from settings import EvalSettings, Settings
from standins import standin


def again(s: EvalSettings, device) -> None:
    """Evaluate a finished run of train.py from its weights; says whether its records agree."""
    folder = Path(s.run)
    settings = runs.settings_from(folder / "settings.json", Settings)
    settings.check()
    for seed in settings.seeds:
        model = standin.DualEncoder(settings.width)
        path = folder / f"seed{seed}" / "model.safetensors"
        checkpoints.restore_module(model, runs.read_weights(path)[0], path)
        with tempfile.TemporaryDirectory() as place:
            new = evaluation.drawn_seed(settings, runs.Run(Path(place), settings), seed, model.to(device), device)
        old = [runs.read_record(p) for p in sorted((folder / f"seed{seed}").glob("record*.json"))]
        evaluation.show(new)
        before = {(r["dataset"], r["method"], r["setting"]): r["metrics"].get("AUROC", 1e9) for r in old}
        worst = max(
            abs(before.get((r["dataset"], r["method"], r["setting"]), 1e9) - r["metrics"]["AUROC"]) for r in new
        )
        print(f"seed {seed}: records {'agree' if worst < 1e-6 else f'differ by up to {worst:.4f} points of AUROC'}")


def main() -> None:
    s = runs.parse(EvalSettings, __doc__)
    s.check()
    device = runs.device(s.device, s.bf16)
    if s.run:
        return print(f"would evaluate {s.run} again on {device}") if s.dry_run else again(s, device)
    if s.images:
        import folder

        return print(f"would sort {s.images} on {device}") if s.dry_run else folder.sort(s, device)
    s.table = s.table or ("demo" if s.synthetic else "real" if s.study else "own")
    named = {"own": Path(s.id).name, "real": f"{s.study}-{s.labels}-{s.backbone}"}
    s.out = s.out or runs.default_out(s.scale, "synthetic" if s.synthetic else named.get(s.table, s.table))
    # Several processes (`accelerate launch`) share out the images to encode; what follows takes seconds, on the first.
    state = PartialState()
    if s.dry_run:
        sets = f"{s.id} against {', '.join(s.ood)}" if s.id else f"study {s.study}" if s.study else s.table
        print(f"would evaluate {sets} with {s.backbone} on {device}, seeds {s.seeds}, into {s.out}")
        return
    ignore = ("out", "data_dir", "device", "download", "batch", "workers", "dry_run")
    run = runs.Run(Path(s.out), s, ignore, state.process_index)
    if run.complete:
        if state.is_main_process:
            print(f"{run.out} is complete; delete it to run again")
    else:
        for seed in s.seeds:
            if s.synthetic and state.is_main_process:
                evaluation.synthetic_seed(s, run, seed, device)
            elif s.study:
                from real import study

                study.run_study(s, run, seed, device)
            elif not s.synthetic:
                import papertables  # here: neither a synthetic space nor a stand-in waits for transformers

                papertables.run_table(s, run, seed, device)
    if state.is_main_process:
        evaluation.show(run.finish())


if __name__ == "__main__":
    runs.command(main)
