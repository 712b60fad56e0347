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
from dataclasses import dataclass
from pathlib import Path

from lab import runs
from lab.runs import Number, UserError

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

import domains
import eval as evaluation
import methods
import trainer

# Published recipes (single-domain networks and URL's): pictures a step, lr, steps, period of the cosine.
RECIPES = {
    **{"ilsvrc_2012": (64, 3e-2, 480_000, 48_000), "omniglot": (16, 3e-2, 50_000, 3_000)},
    **{"aircraft": (8, 3e-2, 50_000, 3_000), "cu_birds": (16, 3e-2, 50_000, 3_000)},
    **{"dtd": (32, 3e-2, 50_000, 1_500), "quickdraw": (64, 1e-2, 480_000, 48_000)},
    **{"fungi": (32, 3e-2, 480_000, 15_000), "vgg_flower": (8, 3e-2, 50_000, 1_500)},
    **{"several": (64, 3e-2, 240_000, 48_000), "drawn": (64, 3e-2, 400, 400)},
}


@dataclass
class Settings(evaluation.Harness):
    train: tuple[str, ...] = ("drawn",)
    """Domains to train on, each with a classifier of its own over its training classes."""
    backbone: str = "conv4"
    """resnet18 (the paper's, for 84x84), conv4, conv4-group, or a timm model by name."""
    weights: str = ""
    """Start from these weights instead of new ones."""
    steps: int = 0
    """Optimiser steps; 0: published for the domain (drawn characters: 400, our choice)."""
    pictures: int = 0
    """Pictures of each domain a step; 0: published (64 for several domains)."""
    first: int = 0
    """Pictures of the first domain a step if there are several; 0: 7 times the others', as URL has for ImageNet."""
    rate: Number = -1.0
    """Learning rate of SGD; -1: published (0.03; Quick Draw 0.01)."""
    momentum: Number = 0.9
    """Momentum of SGD (published: 0.9, no Nesterov)."""
    decay: Number = 7e-4
    """Weight decay of SGD (published)."""
    period: int = 0
    """Steps of a cosine, after which the rate starts anew; 0: published."""
    augment: bool = True
    """Random crop out of 8 reflected pixels, brightness, contrast, saturation, hue; no flips (published)."""
    validate: int = 300
    """Validation tasks a domain, by NCC without adaptation; the best weights are kept (published: 300). 0: the last."""
    validate_every: int = 5000
    """Steps between validations."""
    teachers: tuple[str, ...] = ()
    """URL: finished runs of train.py, one for each of --train in the same order; features and logits are distilled."""
    precision: str = "fp32"
    """fp32 or bf16 (autocast in the network; losses and HSIC stay in float32)."""
    compile: bool = False
    """torch.compile the network."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    dry_run: bool = False
    """Print what would be done."""

    def check(self) -> None:
        self.domains = tuple(x for d in self.domains for x in (self.train if d == "seen" else (d,)))
        super().check()
        for name in self.train:
            if name not in (*domains.TRAINING, "drawn"):
                raise UserError(
                    f"--train {name}: one of {', '.join((*domains.TRAINING, 'drawn'))} has training classes"
                )
        if not self.train or len(set(self.train)) != len(self.train):
            raise UserError("--train takes one or more different domains")
        if self.teachers and len(self.teachers) != len(self.train):
            raise UserError(f"--teachers names {len(self.teachers)} runs for {len(self.train)} domains; one for each")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"--precision {self.precision}: use fp32 or bf16")
        if self.backbone == "random5x5":
            raise UserError("--backbone random5x5 has no weights to train; eval.py takes it")
        batch, rate, steps, period = RECIPES["several" if len(self.train) > 1 else self.train[0]]
        self.steps, self.pictures = self.steps or steps, self.pictures or batch
        self.period = self.period or min(period, self.steps)
        self.first = self.first or self.pictures * (7 if len(self.train) > 1 else 1)
        self.rate = rate if self.rate == -1 else self.rate
        for key in ("steps", "pictures", "first", "period", "validate_every", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise UserError(f"--{key.replace('_', '-')} must be at least 1, not {getattr(self, key)}")
        if self.pictures < 2:
            raise UserError("--pictures must be at least 2: batch statistics are of several pictures")
        if self.rate <= 0 or self.decay < 0 or not 0 <= self.momentum < 1 or self.validate < 0:
            raise UserError("--rate is positive, --decay and --validate are not negative, --momentum lies in [0, 1)")
        if self.size < 16:
            raise UserError(f"--size must be at least 16 for a network, not {self.size}")
        self.out = self.out or f"runs/{self.scale}/{self.table}-{self.backbone}-{'-'.join(self.train)[:60]}"


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
    bar = tqdm(t.batches(start), f"seed {t.seed}", s.steps, initial=start, disable=None if t.rank == 0 else True)
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
    run = runs.Run(Path(s.out), s, ignore, state.process_index)
    if run.complete:
        if state.is_main_process:
            print(f"{run.out} is complete; delete it to run again")
            evaluation.show(runs.read_record(p) for p in sorted(run.out.glob("seed*/record*.json")))
        return
    given = trainer.load_training(s)
    for seed in s.seeds:
        t = trainer.Trainer(s, seed, device, given)
        weights = run.folder(seed) / "model.safetensors"
        if weights.is_file():
            t.load_final(weights)
        else:
            checkpoint = run.out / "checkpoint" / f"seed{seed}.safetensors"
            train(t, run, checkpoint)
            if t.rank == 0:
                about = {"step": str(t.best_step), "valid": str(t.best)}
                runs.write_tensors(weights, t.state(), about)
                checkpoint.unlink(missing_ok=True)
            state.wait_for_everyone()
        extra = {"valid_accuracy": t.best, "best_step": t.best_step} if s.validate else {}
        evaluation.score(s, run, seed, t.model, s.train, device, extra)
    if state.is_main_process:
        evaluation.show(run.finish())
        print(f"records in {run.out}")


if __name__ == "__main__":
    runs.command(main)
