"""Trains the small stand-in dual encoder of the embedded default, as the paper trains nothing; then runs EOE on it.

    python train.py --seeds 0 1 2 3 4          # drawn pictures, one encoder a seed, then far, near, fine-grained
    accelerate launch --num_processes 2 train.py --seeds 0 1 2 3   # processes share the seeds out
    python eval.py --help                      # the paper's method on CLIP and public data

The run lands in runs/<scale>/<name>/ and goes on from its last checkpoint when started again.
"""

from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import torch
from accelerate import PartialState

import evaluation
from settings import Settings
from trainer import Trainer


def train(t: Trainer, run: runs.Run, path: Path) -> None:
    """The loop of one seed; the model is in t afterwards."""
    s, start, keep_to = t.s, 0, 0
    if path.is_file():
        start, run.before = t.load(path)
        keep_to = start
        print(f"resuming {run.out}, seed {t.seed}, at step {start}")
    lines: list[dict] = []
    t.model.train()
    ahead: list[torch.Tensor] = []  # batches up to the next checkpoint, which keeps the state of their generator
    for step in progress(range(start, s.steps), f"seed {t.seed}", s.steps, start):
        if not ahead:
            ahead = [*t.batches(min(s.checkpoint_every - step % s.checkpoint_every, s.steps - step))]
        index = ahead.pop(0)
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
    s.out = s.out or runs.default_out(s.scale, "drawn")
    device = runs.device(s.device)
    # Seeds are independent, so several processes (`accelerate launch`) simply share them out.
    state = PartialState()
    if s.dry_run:
        print(f"would train the stand-in on {device}: {s.steps} steps of {s.batch} pictures, seeds {s.seeds}; then")
        print(f"OOD detection with {s.classes} ID classes and {s.labels} envisioned names; all into {s.out}")
        return
    run = runs.Run(Path(s.out), s, ("out", "device", "dry_run"), state.process_index)
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
