"""Evaluate a trained run again from its checkpointed weights, or score its class-prior estimators.

    python eval.py --run runs/demo/own-gpl-texas
    python eval.py --run runs/demo/own-gpl-texas --estimators --bootstrap 200

The run must be complete; nothing is written.
"""

from pathlib import Path

from lab import checkpoints, runs
from lab.runs import UserError

import torch

import priors
from evaluation import estimate, measure, show
from settings import EvalSettings, Settings
from trainer import Trainer


def load(settings: EvalSettings):
    """Rebuild (trainer, posterior) of a finished run from its settings and weights."""
    folder = Path(settings.run)
    if not (folder / "settings.json").is_file() and (folder.parent / "settings.json").is_file():
        folder = folder.parent  # runs/x/seed0 -> runs/x
    given = {"data_dir": settings.data_dir, "device": settings.device, "download": False}
    s = runs.settings_from(folder / "settings.json", Settings, **given)
    s.check()
    t = Trainer(s, runs.device(settings.device))
    loaded = [runs.read_tensors(folder / f"seed{seed}" / "model.safetensors")[0] for seed in s.seeds]
    try:
        stack = {k: torch.stack([one[k] for one in loaded]).to(t.device) for k in loaded[0]}
        method = {k[7:]: v for k, v in stack.items() if k.startswith("method.")}
        weights = {k: v for k, v in stack.items() if not k.startswith("method.")}
        checkpoints.restore_module(t.model, weights, folder)
        checkpoints.check_tensors(method, t.method.kept(), folder)
        t.method.restore(method)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{folder} holds weights of another model ({error}); train it again") from None
    return t, t.method.posterior(t.model), folder


def main() -> None:
    settings = runs.parse(EvalSettings, __doc__)
    t, posterior, folder = load(settings)
    rows = measure(t, posterior)
    show({"seed": seed, "metrics": row} for seed, row in zip(t.s.seeds, rows, strict=True))
    for seed, row in zip(t.s.seeds, rows, strict=True):
        path = folder / f"seed{seed}" / "record.json"
        if path.is_file():
            key = "f1" if "f1" in row else "lee_liu"  # nothing is scored without the truth about U
            old = runs.read_record(path)["metrics"][key]
            print(f"seed {seed}: record {'agrees' if abs(old - row[key]) < 1e-6 else f'says {key} {old:.2f}'}")
    if settings.estimators:
        for seed, row, guess in zip(t.s.seeds, rows, estimate(t, posterior), strict=True):
            print(f"seed {seed}: " + "  ".join(f"{k} {v:.3f} ({v - row['pi_true']:+.3f})" for k, v in guess.items()))
    if settings.bootstrap:
        host = posterior.double().cpu().numpy()
        sample_p, sample_u = (v.cpu().numpy() for v in (t.method.estimate_p, t.method.estimate_u))
        for k, seed in enumerate(t.s.seeds):
            low, high = priors.bootstrap(priors.bbe, host[k][sample_p[k]], host[k][sample_u[k]], n=settings.bootstrap)
            print(f"seed {seed}: BBE 95 % interval [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    runs.command(main)
