"""Trains the small stand-in dual encoder of the embedded default, as the paper trains nothing; then runs EOE on it.

    python train.py --seeds 0 1 2 3 4          # drawn pictures, one encoder a seed, then far, near, fine-grained
    accelerate launch --num_processes 2 train.py --seeds 0 1 2 3   # processes share the seeds out
    python eval.py --help                      # the paper's method on CLIP and public data

The run lands in runs/<scale>/<name>/ and goes on from its last checkpoint when started again.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab import runs
from lab.runs import Number, UserError

import torch
from accelerate import PartialState
from tqdm import tqdm

import drawn
import eval as evaluation
import standin


@dataclass
class Settings:
    seeds: tuple[int, ...] = (0,)
    """Seeds; each draws its own pictures, trains its own encoder and picks its own ID and OOD names."""
    steps: int = 400
    """Optimiser steps (our choice, as everything about the stand-in)."""
    batch: int = 256
    """Picture-caption pairs a step."""
    pictures: int = 8192
    """Pictures drawn for training."""
    width: int = 16
    """Channels of the first convolution."""
    lr: Number = 4e-3
    """Peak learning rate of AdamW under a one-cycle schedule."""
    weight_decay: Number = 1e-3
    """Weight decay of AdamW."""
    drop_word: Number = 0.3
    """Chance that a caption leaves out a colour or texture word."""

    classes: int = 40
    """ID classes of the far and fine-grained tasks."""
    per_class: int = 20
    """Test pictures for each ID class (near: four times as many)."""
    labels: int = 100
    """Names asked of the provider (near: 3 for each ID class)."""
    beta: Number = 0.25
    """Weight of the outlier term (paper: 0.25)."""
    table: str = "demo"
    """Table of RESULTS.md the records belong to."""
    scale: Literal["smoke", "demo", "paper"] = "demo"
    """Goes into the record; changes nothing else."""
    out: str = ""
    """Run folder; default runs/<scale>/drawn."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""

    def check(self) -> None:
        for name in ("steps", "batch", "width", "classes", "per_class", "labels", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.pictures < self.batch or self.batch < 2:
            raise UserError(f"--pictures {self.pictures} must be at least --batch {self.batch}, and that at least 2")
        if not 0 <= self.drop_word <= 1 or not 0 <= self.beta or self.lr <= 0 or self.weight_decay < 0:
            raise UserError("--drop-word lies in [0, 1], --beta and --weight-decay are not negative, --lr is positive")
        if 2 * self.classes > len(drawn.concepts()):
            raise UserError(f"--classes is at most {len(drawn.concepts()) // 2}, not {self.classes}")


def captions(names: list[str], drop: float, rng: random.Random) -> list[str]:
    """ "a photo of a red striped circle", each word before the last left out with probability `drop`."""
    kept = ([w for w in n.split()[:-1] if rng.random() >= drop] + n.split()[-1:] for n in names)
    return ["a photo of a " + " ".join(words) for words in kept]


class Trainer:
    """Model, optimiser, data and random state of one seed: everything a checkpoint needs."""

    def __init__(self, s: Settings, seed: int, device: torch.device):
        rng = random.Random(f"pictures {seed}")
        world = [*drawn.concepts(), *drawn.patterns()]
        names = [rng.choice(world) for _ in range(s.pictures)]
        self.pictures = drawn.draw(names, seed).to(device)
        self.tokens = standin.tokenise(captions(names, s.drop_word, rng)).to(device)
        torch.manual_seed(seed)
        self.model = standin.DualEncoder(s.width).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=s.lr, weight_decay=s.weight_decay, fused=True)
        self.generator = torch.Generator().manual_seed(seed)
        self.s, self.seed, self.device = s, seed, device

    def rate(self, step: int) -> float:
        """One cycle: linear warm-up over 15 % of the steps, then a cosine to zero."""
        warm = max(1, round(0.15 * self.s.steps))
        if step < warm:
            return self.s.lr * (step + 1) / warm
        return (
            self.s.lr
            * 0.5
            * (1 + torch.cos(torch.tensor(3.14159265 * (step - warm) / max(1, self.s.steps - warm))).item())
        )

    def save(self, path: Path, step: int, seconds: float) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for i, p in enumerate(self.model.parameters()):
            tensors |= {f"adam.{i}.{k}": v for k, v in self.optimizer.state.get(p, {}).items()}
        tensors["rng"] = self.generator.get_state()
        runs.write_tensors(path, tensors, {"step": str(step), "seconds": str(seconds)})

    def load(self, path: Path) -> tuple[int, float]:
        """-> (steps done, seconds spent)."""
        tensors, meta = runs.read_tensors(path)
        try:
            self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
            for i, p in enumerate(self.model.parameters()):
                found = {k: tensors[f"adam.{i}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
                # The fused step walks memory: the moments need the layout (channels_last) of their parameter.
                self.optimizer.state[p] = {
                    k: v if k == "step" else torch.empty_like(p).copy_(v) for k, v in found.items()
                }
            self.generator.set_state(tensors["rng"])
            return int(meta["step"]), float(meta["seconds"])
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{path} belongs to another model ({error}); delete it to start the run again") from None


def train(t: Trainer, run: runs.Run, path: Path) -> None:
    """The loop of one seed; the model is in t afterwards."""
    s, start, keep_to = t.s, 0, 0
    if path.is_file():
        start, run.before = t.load(path)
        keep_to = start
        print(f"resuming {run.out}, seed {t.seed}, at step {start}")
    lines: list[dict] = []
    t.model.train()
    for step in tqdm(range(start, s.steps), initial=start, total=s.steps, desc=f"seed {t.seed}", disable=None):
        index = torch.randint(len(t.pictures), (s.batch,), generator=t.generator).to(t.device)
        for group in t.optimizer.param_groups:
            group["lr"] = t.rate(step)
        loss = t.model.loss(t.pictures[index], t.tokens[index])
        t.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        t.optimizer.step()
        done = step + 1
        if done % 20 == 0 or done == s.steps:
            lines.append({"step": done, "loss": loss.detach(), "logit_scale": t.model.scale.detach().exp()})
        if done % s.checkpoint_every == 0 or done == s.steps:
            rows = [{k: v if k == "step" else v.item() for k, v in line.items()} for line in lines]
            for row in rows:
                if row["loss"] != row["loss"]:
                    raise UserError(
                        f"the loss of seed {t.seed} is not a number at step {row['step']}; the checkpoint before it is "
                        f"kept in {path.parent}; lower --lr"
                    )
            run.log(t.seed, rows, keep_to)
            keep_to, lines = None, []
            t.save(path, done, run.seconds())


def main() -> None:
    s = runs.parse(Settings, __doc__)
    s.check()
    s.out = s.out or f"runs/{s.scale}/drawn"
    device = runs.device(s.device)
    # Seeds are independent, so several processes (`accelerate launch`) simply share them out.
    state = PartialState()
    run = runs.Run(Path(s.out), s, part=state.process_index)
    if run.complete:
        if state.is_main_process:
            print(f"{run.out} is complete; delete it to run again")
            evaluation.show(run.finish())
        return
    for seed in s.seeds[state.process_index :: state.num_processes]:
        model_path = run.folder(seed) / "model.safetensors"
        if (
            list(run.folder(seed).glob("record*.json"))
            and model_path.is_file()
            and (run.folder(seed) / "done").is_file()
        ):
            continue
        t = Trainer(s, seed, device)
        train(t, run, run.out / "checkpoint" / f"seed{seed}.safetensors")
        runs.write_tensors(model_path, t.model.state_dict(), {"seed": str(seed)})
        evaluation.drawn_seed(s, run, seed, t.model, device)
        runs.write_text(run.folder(seed) / "done", "")
    state.wait_for_everyone()
    if state.is_main_process:
        evaluation.show(run.finish())


if __name__ == "__main__":
    runs.command(main)
