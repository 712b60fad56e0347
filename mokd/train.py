"""Train a backbone on the training classes of one or more domains, then adapt and score it on test domains.

    python train.py --size 28 --tasks 60 --validate-every 100         # drawn characters, a minute or two on a CPU
    python train.py --train omniglot --domains omniglot mnist --size 28 --data-dir /data
    python train.py --train ilsvrc_2012 --backbone resnet18 --size 84 --domains paper
    python train.py --train ilsvrc_2012 omniglot ... --teachers runs/paper/a runs/paper/b ...    # URL: distil into one
    accelerate launch --num_processes 8 train.py ...

The few-shot method itself trains nothing beforehand: the backbone is what it starts from. A run goes on from its last
checkpoint when started again, to the same bits.
"""

import math
from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import numpy as np
import torch
from accelerate import PartialState

import backbones
import domains
import evaluation
import methods
import trainer
import weights
from settings import Settings


def rate(s: Settings, step: int) -> float:
    """Cosine with warm restarts: the rate of step 0, 1, ..."""
    return s.rate * 0.5 * (1 + math.cos(math.pi * (step % s.period) / s.period))


def train(t: trainer.Trainer, run: runs.Run, path: Path) -> None:
    """The loop of one seed; the best weights are in t.model afterwards."""
    s, state = t.s, PartialState()
    start = 0
    if path.is_file():
        start, run.before = t.load(path)
        print(f"resuming {run.out}, seed {t.seed}, at step {start}") if state.is_main_process else None
    keep_to, lines = start, []
    bar = progress(t.batches(start), f"seed {t.seed}", s.steps, start, hide=t.rank > 0)
    for step, batch in enumerate(bar, start):
        for group in t.optimizer.param_groups:
            group["lr"] = rate(s, step) * group["scale"]
        loss, right = t.loss(batch, step)
        t.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        t.optimizer.step()

        done = step + 1
        if done % max(1, min(50, s.steps // 10)) == 0 or done == s.steps:
            lines.append({"step": done, "loss": loss.detach(), "train_accuracy": right, "lr": rate(s, step)})
        last = done == s.steps
        checked = s.validate and (done % s.validate_every == 0 or last)
        if not checked and done % s.checkpoint_every and not last:
            continue
        rows = [{k: v.item() if isinstance(v, torch.Tensor) else v for k, v in line.items()} for line in lines]
        bad = [row for row in rows if not math.isfinite(row["loss"])]
        if bad or not torch.isfinite(loss):
            raise UserError(
                f"the loss of seed {t.seed} is not a number at step {bad[0]['step'] if bad else done}; the checkpoint "
                f"before it is kept in {path.parent}; lower --rate"
            )
        if checked:
            found = t.validate()
            rows.append({"step": done, **{f"valid_{k}": v for k, v in found.items()}})
            t.keep(done, float(np.mean(list(found.values()))))
        if t.rank == 0:
            run.log(t.seed, rows, keep_to)
            t.save(path, done, run.seconds())
        keep_to, lines = None, []
    t.use_best()


def main() -> None:
    s = runs.parse(Settings, __doc__)
    s.check()
    device = runs.device(s.device)
    if s.dry_run:
        classes = {
            n: len(domains.load(n, "train", runs.data_dir(s.data_dir), s.size, s.limit).classes) for n in s.train
        }
        print(
            f"would train {s.backbone} on {classes} classes: {s.steps} steps on {device}, seeds {s.seeds}, into {s.out}"
        )
        print(f"then {s.tasks} tasks each on {', '.join(s.domains)}: {', '.join(s.methods)}")
        for name in s.domains:
            print(f"  {name}: {methods.published(name, s.law)}")
        return
    state = PartialState()
    ignore = ("out", "data_dir", "device", "dry_run", "workers", "batch", "checkpoint_every")
    given = None
    if not runs.finished(Path(s.out), s.seeds):  # before there is a folder: what is not there leaves none
        given = trainer.load_training(s)
        for name in s.domains:
            evaluation.opened(s, name)
        for folder in s.teachers:
            runs.read_json(Path(folder) / "settings.json")
        model = backbones.build(s.backbone, s.size)
        if s.weights:
            weights.load(model, Path(s.weights))
    run = runs.Run(Path(s.out), s, ignore, state.process_index)
    if run.complete:
        if state.is_main_process:
            print(f"{run.out} is complete; delete it to run again")
            evaluation.show(runs.read_record(p) for p in sorted(run.out.glob("seed*/record*.json")))
        return
    for seed in s.seeds:
        if state.is_main_process:
            run.same_data(seed, [d.sha256 for d in (*(x.domain for x in given[0]), *given[1].values())])
        t = trainer.Trainer(s, seed, device, given)
        kept = run.folder(seed) / "model.safetensors"
        if kept.is_file():
            t.load_final(kept)
        else:
            checkpoint = run.out / "checkpoint" / f"seed{seed}.safetensors"
            train(t, run, checkpoint)
            if t.rank == 0:
                about = {"step": str(t.best_step), "valid": str(t.best)}
                runs.write_tensors(kept, t.state(), about)
                checkpoint.unlink(missing_ok=True)
            state.wait_for_everyone()
        extra = {"valid_accuracy": t.best, "best_step": t.best_step} if s.validate else {}
        evaluation.score(s, run, seed, t.model, s.train, device, extra)
    if state.is_main_process:
        evaluation.show(run.finish())
        print(f"records in {run.out}")


if __name__ == "__main__":
    runs.command(main)
