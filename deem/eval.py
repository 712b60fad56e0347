"""Evaluate a trained run on the paper's benchmarks, or score a finished demo run again.

    python eval.py --run runs/demo/NAME                                # once more: must give the record's numbers
    python eval.py --run runs/paper/NAME --benchmark pope robustvqa    # Table 1
    python eval.py --run runs/paper/NAME --benchmark pope --fast       # one pass a question instead of a beam search
    python eval.py --run RUN --benchmark okvqa coco --export           # logs in the manner of lmms-eval as well

Writes below --out a JSON line a question (seed<k>/answers-<set>.jsonl) and a record a set. An interrupted start goes on
from the last whole batch. Which files a benchmark needs stands in the README; a missing one is named.
"""

from pathlib import Path

from lab import runs
from lab.runs import UserError

import torch

from build import load_run, settings_of, world_of
from evaluation.asking import check_data, evaluate, show
from scenes import study
from settings import NOT_PART_OF_AN_EVALUATION, EvalSettings


def load(folder: Path, device, seed: int):
    """(model, settings) of a seed of a run; UserError for weights that are not finite: they would answer all the same,
    and always-no is right half of the time."""
    model, settings = load_run(folder, device, seed)
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise UserError(f"{folder / f'seed{seed}'}: weights {name} are not finite; train the run again")
    return model, settings


def again(folder: Path, device) -> None:
    """Score a finished run on the digit scenes once more and compare with its records."""
    for seed in settings_of(folder).seeds:
        model, s = load(folder, device, seed)
        if not s.on_scenes:
            raise UserError(f"{folder} was not trained on scenes; name a --benchmark to score it on")
        metrics, _ = study.score(model, world_of(s), s, seed)
        path = folder / f"seed{seed}" / "record.json"
        keys = ("csr_ratio", "probe_uncaptioned", "caption_accuracy", "POPE_accuracy", "MMVP_accuracy")
        print(f"seed {seed}: " + ", ".join(f"{k} {metrics[k]:.4g}" for k in keys if k in metrics))
        if path.is_file():
            old = runs.read_record(path)["metrics"]
            both = {k: (old[k], v) for k, v in metrics.items() if k in old}
            off = {k: (a, b) for k, (a, b) in both.items() if isinstance(a, str) or abs(a - b) > 1e-6 * max(1, abs(b))}
            told = ", ".join(f"{k} {a if isinstance(a, str) else f'{a:.6g}'}, now {b:.6g}" for k, (a, b) in off.items())
            print(f"seed {seed}: record " + (f"says {told}" if off else "agrees"))


def main() -> None:
    s = runs.parse(EvalSettings, __doc__)
    s.check()
    device = runs.device(s.device)
    folder = Path(s.run).expanduser()
    if folder.name.startswith("seed") and (folder.parent / "settings.json").is_file():
        folder = folder.parent  # runs/x/seed0 -> runs/x
    if not (folder / "settings.json").is_file():
        raise UserError(f"no run in {folder} (settings.json is missing); train it first")
    if not s.benchmark:
        return again(folder, device)
    root = runs.data_dir(s.data_dir) / "deem"
    check_data(s, root)
    name = "-".join(s.benchmark)
    run = runs.Run(Path(s.out or f"{folder}-eval-{name}"), s, NOT_PART_OF_AN_EVALUATION)
    if run.complete:
        print(f"{run.out} is complete; delete it to evaluate again")
    else:
        for seed in s.seeds:
            model, trained = load(folder, device, seed)
            form, label = s.form or trained.prompt_form, s.label or trained.label
            evaluate(s, run, seed, model, form, label, root, device)
    for record in run.finish():
        show(record)
    print(f"records in {run.out}")


if __name__ == "__main__":
    runs.command(main)
