"""Train one positive-unlabelled classifier on one graph, all seeds in one batch, then evaluate it.

    python train.py --dataset texas --method gpl --seeds 0 1 2
    python train.py --h 0.7 --method gcn-ted            # generated graph, needs no data

The run lands in runs/<scale>/<name>/ and goes on from its last checkpoint when started again.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

import data
import eval as evaluation
import runs
from methods import CLASSES, GRAB, Method
from runs import Number, UserError

MethodName = Literal["gpl", "gcn", "mlp", "gcn-ted", "mlp-ted", "gcn-nnpu", "mlp-nnpu", "lsdan", "grab", "pugnn"]


@dataclass
class Settings:
    method: MethodName = "gpl"
    """Classifier. gpl is the paper's; lsdan and pugnn are approximate (see README)."""
    dataset: Literal[data.DATASETS] = "synthetic"
    """One of the paper's ten graphs, a sensitivity variant, or a generated graph."""
    h: Number = 0.7
    """Synthetic only: share of edges that join a positive and a negative."""
    r_p: Number = 0.5
    """Share of the positives that is labelled (paper: 0.5, sweep down to 0.2)."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each gives its own split and weights, all train as one batch."""

    warmup: int = 100
    """Epochs of plain P-versus-U training before anything is estimated (our choice; TED's scripts use 100)."""
    epochs: int = 100
    """Epochs after the warm-up (our choice)."""
    hidden: int = 16
    """Hidden units of the two-layer encoder (paper: 16)."""
    lr: Number = 0.01
    """Adam learning rate of the classifier (paper: 0.01)."""
    weight_decay: Number = 5e-4
    """L2 added to the gradient by Adam (our choice; nnPU, LSDAN and PU-GNN use 0)."""
    dropout: Number = 0.5
    """Dropout on the hidden layer (our choice)."""

    alpha: Number = 0.5
    """Share of its own belief that a node keeps in a propagation step (our choice)."""
    steps: int = 5
    """Propagation steps K (our choice)."""
    inner_steps: int = 5
    """Mask updates an epoch; 0 switches the label propagation loss off (our choice)."""
    inner_optimizer: Literal["sgd", "adam"] = "sgd"
    """Steps on the mask: plain gradient steps or Adam (our choice; neither is printed)."""
    inner_lr: Number | None = None
    """Learning rate of the mask (our choice). Default: 0.3 for sgd, 0.01 for adam."""
    mask: Literal["clamp", "sigmoid", "exp"] = "clamp"
    """How the positive edge mask is parametrised (our choice)."""
    lpl_form: Literal["log", "ce"] = "log"
    """log P(negative) as printed in Eq. 6, or the bounded -log(1 - P(negative))."""
    lpl_init: Literal["neg", "prior", "uniform"] = "neg"
    """What unlabelled nodes start from in Eq. 6 (our choice)."""
    lpl_labels: Literal["soft", "hard"] = "soft"
    """Eq. 9 starts U from the classifier's posterior, or from the labels S."""
    lpl_clamp: bool = False
    """Reset labelled positives after each propagation step."""
    lambda_neg: Number = 1.0
    """Weight of the U \\ S part of Eq. 9 (our choice)."""
    cpe_holdout: Number | None = None
    """Share of P kept out of every loss, for the prior estimate only (our choice). Default: 0.2 for methods that
    estimate the prior from scores (gpl, TED, nnPU with --prior bbe, --estimators), 0 for the others."""
    cpe_holdout_u: Number | None = None
    """Share of U kept out of every loss in the same way. Default: as cpe_holdout, which is what TED does."""
    ce_reduction: Literal["set", "all"] = "set"
    """Eq. 8: one mean over each set, or one mean over all nodes."""
    schedule: Literal["alternate", "once"] = "alternate"
    """Ablation: `once` learns the mask before training and leaves it (no bilevel scheme)."""
    selection: Literal["ranked", "none"] = "ranked"
    """Ablation: `none` trains on P against all of U (no pseudo labels)."""

    prior: Literal["true", "bbe"] = "true"
    """nnPU and LSDAN: the true prior of U, or BBE's estimate after the warm-up."""
    pugnn_priors: Literal["fixed", "scaled"] = "fixed"
    """PU-GNN: near 0.6 and far 0.3, or 1.2 and 0.8 times the true prior."""
    pugnn_epochs: int = 100
    """PU-GNN: optimiser steps."""
    grab_rounds: int = 10
    """GRAB: most rounds."""
    grab_epochs: int = 500
    """GRAB: optimiser steps a round."""

    estimators: bool = False
    """Also write a record for each class-prior estimator, made from this run's scores."""
    table: str = "own"
    """Table of RESULTS.md the records belong to; own: none of them (plan.yaml names the tables of its runs)."""
    setting: str = ""
    """Setting inside the table; default r_p=<r_p>."""
    label: str = ""
    """Row name in the table; default the method."""
    scale: Literal["smoke", "demo", "paper"] = "demo"
    """Goes into the record; changes nothing else."""
    out: str = ""
    """Run folder; default runs/<scale>/<table>-<label>-<dataset>."""
    data_dir: str = ""
    """Folder with graphs/; default $REPRO_DATA, else ./data."""
    download: bool = False
    """Let torch_geometric fetch missing raw files into the data folder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    checkpoint_every: int = 50
    """Epochs between checkpoints."""
    log_every: int = 10
    """Epochs between lines of metrics.jsonl."""
    dry_run: bool = False
    """Print the data and what would be trained, then stop."""

    def check(self) -> None:
        """Fill in what depends on other settings; raise UserError for a value outside its range."""
        if self.cpe_holdout is None:
            estimates = self.method == "gpl" or self.method.endswith("-ted") or self.estimators
            nnpu = self.method in ("gcn-nnpu", "mlp-nnpu", "lsdan") and self.prior == "bbe"
            self.cpe_holdout = 0.2 if estimates or nnpu else 0.0
        if self.cpe_holdout_u is None:
            self.cpe_holdout_u = self.cpe_holdout
        if self.inner_lr is None:
            self.inner_lr = 0.3 if self.inner_optimizer == "sgd" else 0.01
        self.setting = self.setting or f"r_p={self.r_p:g}"
        self.label = self.label or self.method
        self.out = self.out or f"runs/{self.scale}/{self.table}-{self.label}-{self.dataset}"
        for name in ("r_p", "h", "dropout", "cpe_holdout", "cpe_holdout_u"):
            top = 1.0 if name in ("r_p", "h") else 0.99
            if not 0 <= getattr(self, name) <= top:
                raise UserError(f"--{name.replace('_', '-')} must lie in [0, {top:g}], not {getattr(self, name)}")
        if not 0 < self.alpha < 1:
            raise UserError(f"--alpha must lie strictly between 0 and 1, not {self.alpha}")
        for name in (
            "epochs",
            "hidden",
            "steps",
            "checkpoint_every",
            "log_every",
            "grab_rounds",
            "grab_epochs",
            "pugnn_epochs",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup", "inner_steps", "lr", "inner_lr", "weight_decay", "lambda_neg"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must not be negative, not {getattr(self, name)}")


NOT_PART_OF_A_RUN = ("out", "data_dir", "device", "download", "dry_run")  # may change between starts of one run


class Trainer:
    """Batch, method, model and optimiser of all seeds, and everything a checkpoint needs."""

    def __init__(self, s: Settings, device: torch.device):
        folder, cache = runs.data_dir(s.data_dir), runs.HERE / "data" / "cache"
        if s.dataset == "synthetic":
            self.graphs = [data.synthetic(seed, s.h) for seed in s.seeds]
        else:
            self.graphs = [data.load_graph(s.dataset, folder, cache, s.download)]
        pick = [self.graphs[k % len(self.graphs)] for k in range(len(s.seeds))]
        splits = [
            data.pu_split(g.y, s.r_p, s.cpe_holdout, s.cpe_holdout_u, k) for g, k in zip(pick, s.seeds, strict=True)
        ]
        self.s, self.device = s, device
        self.batch = data.GraphBatch(self.graphs, len(s.seeds), device)
        self.labelled, held_p, held_u = (
            torch.stack([getattr(x, name) for x in splits]).to(device) for name in ("labelled", "held_p", "held_u")
        )
        if s.cpe_holdout > 0 and int(held_p.sum(-1).min()) < 2:
            raise UserError(
                f"--cpe-holdout {s.cpe_holdout:g} keeps fewer than two of {int(self.labelled[0].sum())} labelled nodes "
                "for the prior, which needs two; raise it, raise --r-p, or pass 0"
            )
        self.true_pi = evaluation.true_prior(self.batch.y, self.labelled)
        self.method: Method = CLASSES[s.method](s, self.batch, self.labelled, held_p, held_u, self.true_pi)
        self.rounds = -1
        self.fresh_model()

    def fresh_model(self) -> None:
        """New weights and optimiser; every call draws other weights from the run's seeds."""
        self.rounds += 1
        seeds = [seed + 1_000_003 * self.rounds for seed in self.s.seeds]
        self.model = self.method.model_class(self.batch, self.s.hidden, self.s.dropout, seeds)
        # Under the sigmoid loss a saturated logit has next to no gradient, so that any decay wins and every node ends
        # negative: nnPU, and LSDAN with it, train without. PU-GNN's recipe has none either.
        plain = self.s.method in ("pugnn", "lsdan") or self.s.method.endswith("nnpu")
        decay = 0.0 if plain else self.s.weight_decay
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.s.lr, weight_decay=decay, fused=True)

    # ------------------------------------------------------------------ checkpoint: every tensor the next step reads

    def save(self, path: Path, epoch: int, seconds: float) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"method.{k}": v for k, v in self.method.state().items()}
        for i, p in enumerate(self.model.parameters()):
            tensors |= {f"adam.{i}.{k}": v for k, v in self.optimizer.state.get(p, {}).items()}
        tensors |= {f"rng.{i}": g.get_state() for i, g in enumerate(self.model.generators)}
        meta = {"epoch": str(epoch), "rounds": str(self.rounds), "seconds": str(seconds), "run": self.fingerprint()}
        runs.write_tensors(path, tensors, meta)

    def fingerprint(self) -> str:
        """Of the settings that matter and the data: a checkpoint of anything else is refused."""
        own = {k: v for k, v in dataclasses.asdict(self.s).items() if k not in NOT_PART_OF_A_RUN}
        text = json.dumps([own, [g.sha256 for g in self.graphs]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def load(self, path: Path) -> tuple[int, float]:
        """-> (epochs done, seconds spent)."""
        tensors, meta = runs.read_tensors(path)
        if meta.get("run") != self.fingerprint():
            raise UserError(f"{path} belongs to another run (method, seeds, settings or data); delete it to start over")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "method": {}, "adam": {}, "rng": {}}
        for key, value in tensors.items():
            group, _, name = key.partition(".")
            parts[group][name] = value if group == "rng" else value.to(self.device)
        try:
            self.rounds = int(meta["rounds"]) - 1
            self.fresh_model()
            self.model.load_state_dict(parts["model"])
            self.method.load(parts["method"])
            for i, p in enumerate(self.model.parameters()):
                found = {k: parts["adam"][f"{i}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq") if parts["adam"]}
                self.optimizer.state[p] = found
            for i, g in enumerate(self.model.generators):
                g.set_state(parts["rng"][str(i)])
            return int(meta["epoch"]), float(meta["seconds"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{path} belongs to another model ({error}); delete it to start the run again") from None


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
    bar = tqdm(range(start, method.epochs), initial=start, total=method.epochs, desc=f"{s.method} {s.dataset}")
    for epoch in bar:
        method.begin(epoch, t)
        if isinstance(method, GRAB) and method.done:
            break
        t.model.train()
        loss = method.loss(t.model)
        t.optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        t.optimizer.step()

        done = epoch + 1
        if done % s.log_every == 0 or done == method.epochs:
            lines.append(observe(t, loss.detach(), done))
        if done % s.checkpoint_every == 0 or done == method.epochs:
            flush(t, run, lines, keep_to)
            keep_to, lines = None, []
            stop_if_not_finite(t, run, loss, done)
            t.save(path, done, run.seconds())
    if lines:  # GRAB may end between two checkpoints
        flush(t, run, lines, keep_to)
    if isinstance(method, GRAB):
        method.finish_round(t)
    return method.posterior(t.model)


def observe(t: Trainer, loss: Tensor, done: int) -> dict[str, Tensor]:
    """Curves of one epoch, left on the device. F1 looks at the labels of U: it is drawn, never acted upon."""
    posterior = t.method.posterior(t.model)
    truth, said = (t.batch.y == 1) & ~t.labelled, (posterior > 0.5) & ~t.labelled
    f1 = 200 * (truth & said).sum(-1) / (truth.sum(-1) + said.sum(-1)).clamp(min=1)
    pi = t.method.pi
    return {"step": torch.tensor(done), "loss": loss, "f1": f1, "pi_hat": pi, "pi_true": t.true_pi, **t.method.extra()}


def stop_if_not_finite(t: Trainer, run: runs.Run, loss: Tensor, done: int) -> None:
    """Before anything is written: a loss that is not finite ends the run, and the last good checkpoint stays."""
    bad = (~loss.detach().isfinite()).nonzero().flatten().tolist()
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
