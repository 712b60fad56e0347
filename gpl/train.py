"""Train one positive-unlabelled classifier on one graph, all seeds in one batch, then evaluate it.

    python train.py --dataset texas --method gpl --seeds 0 1 2
    python train.py --h 0.7 --method gcn-ted            # generated graph, needs no data
    python train.py --graph my.pt --positive 2          # a graph of your own (README, "In your own code")

The run lands in runs/<scale>/<name>/ and goes on from its last checkpoint when started again.
"""

import dataclasses
from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import torch
from accelerate import PartialState
from torch import Tensor

import evaluation
from settings import NOT_PART_OF_A_RUN, Settings
from trainer import Trainer


def train(t: Trainer, run: runs.Run) -> Tensor:
    """The loop; returns P(positive) of every node, [S, N]."""
    part = PartialState().process_index
    s, method, path = t.s, t.method, run.out / "checkpoint" / f"state{part or ''}.safetensors"
    start = 0
    if path.is_file():
        start, run.before = t.load(path)
        print(f"resuming {run.out} at epoch {start}")
    lines: list[dict[str, Tensor]] = []
    keep_to: int | None = start
    bar = progress(range(start, method.epochs), f"{s.method} {s.about}", method.epochs, start)
    for epoch in bar:
        loss = t.step(epoch)
        if loss is None:
            break
        done = epoch + 1
        if done % s.log_every == 0 or done == method.epochs:
            lines.append(observe(t, loss, done))
        if done % s.checkpoint_every == 0 or done == method.epochs:
            flush(t, run, lines, keep_to)
            keep_to, lines = None, []
            stop_if_not_finite(t, run, loss, done)
            t.save(path, done, run.seconds())
    if lines:  # GRAB may end between two checkpoints
        flush(t, run, lines, keep_to)
    method.end(t)
    return method.posterior(t.model)


def observe(t: Trainer, loss: Tensor, done: int) -> dict[str, Tensor]:
    """Curves of one epoch, left on the device. F1 looks at the labels of U: it is drawn, never acted upon."""
    posterior = t.method.posterior(t.model)
    truth, said = (t.batch.y == 1) & ~t.labelled, (posterior > 0.5) & ~t.labelled
    f1 = 200 * (truth & said).sum(-1) / (truth.sum(-1) + said.sum(-1)).clamp(min=1)
    line = {"step": torch.tensor(done), "loss": loss, "pi_hat": t.method.pi, **t.method.extra()}
    if not t.graphs[0].known:
        return {k: v for k, v in line.items() if k not in ("h_weighted", "s_precision")}
    return {**line, "f1": f1, "pi_true": t.true_pi}


def stop_if_not_finite(t: Trainer, run: runs.Run, loss: Tensor, done: int) -> None:
    """Before anything is written: a loss that is not finite ends the run, and the last good checkpoint stays."""
    bad = (~loss.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"the loss of seed {t.s.seeds[bad[0]]} is not a number at epoch {done}; the checkpoint before it is kept "
            f"in {run.out / 'checkpoint'}; lower --lr or --inner-lr"
        )


def flush(t: Trainer, run: runs.Run, lines: list[dict[str, Tensor]], keep_to: int | None) -> None:
    """One wait for the device: write the collected curves."""
    host = [{k: v.tolist() for k, v in line.items()} for line in lines]
    for line in lines:
        stop_if_not_finite(t, run, line["loss"], int(line["step"]))
    for k, seed in enumerate(t.s.seeds):
        rows = [{key: v if key == "step" else v[k] for key, v in line.items()} for line in host]
        # No prior before the first estimate: leave the key out, JSON has no NaN.
        run.log(seed, [{key: v for key, v in row.items() if v == v} for row in rows], keep_to)


def main() -> None:
    s = runs.parse(Settings, __doc__)
    s.check()
    device = runs.device(s.device)
    torch.set_float32_matmul_precision("high")
    if s.dry_run:
        t = Trainer(s, device)
        for g in t.graphs:
            print(f"{g.name}: {len(g.y)} nodes, {g.edge.shape[1]} edges, {int(g.y.sum())} positives, h = {g.h:.4f}")
        print(f"would train {s.method} for {t.method.epochs} steps on {device}, seeds {s.seeds}, into {s.out}")
        return
    # Seeds are independent, so several processes (`accelerate launch`) simply share them out.
    state = PartialState()
    run = runs.Run(Path(s.out), s, NOT_PART_OF_A_RUN, state.process_index)
    if run.complete:
        print(f"{run.out} is complete; delete it to run again")
        evaluation.show(runs.read_record(p) for p in sorted(run.out.glob("seed*/record.json")))
        return
    mine = s.seeds[state.process_index :: state.num_processes]
    if mine:
        t = Trainer(dataclasses.replace(s, seeds=mine), device)
        evaluation.record(t, run, train(t, run))
    state.wait_for_everyone()
    if state.is_main_process:
        run.finish()
        evaluation.show(runs.read_record(p) for p in sorted(run.out.glob("seed*/record.json")))
        print(f"records in {run.out}")


if __name__ == "__main__":
    runs.command(main)
