"""Batch, method, model and optimiser of a run's seeds, and its checkpoints."""

import dataclasses
from pathlib import Path

from lab import checkpoints, runs
from lab.runs import UserError

import torch
from torch import Tensor

import data
import own
from evaluation import true_prior
from methods import CLASSES, Method
from settings import NOT_PART_OF_A_RUN, Settings


class Trainer:
    """Batch, method, model and optimiser of all seeds, and everything a checkpoint needs."""

    def __init__(self, s: Settings, device: torch.device, graphs: list[data.Graph] | None = None):
        """graphs: those of the settings unless given, one for all seeds or one a seed."""
        folder, cache = runs.data_dir(s.data_dir), runs.HERE / "data" / "cache"
        if graphs:
            self.graphs = graphs
        elif s.graph:
            self.graphs = [own.read(s.graph, s.positive, s.labelled)]
        elif s.dataset == "synthetic":
            self.graphs = [data.synthetic(seed, s.h) for seed in s.seeds]
        else:
            self.graphs = [data.load_graph(s.dataset, folder, cache, s.download)]
        if not self.graphs[0].known and (s.prior == "true" or s.pugnn_priors == "scaled"):
            raise UserError("the true prior of this graph is not known; pass --prior bbe, rempe, frozen or given")
        if s.features == "binary":
            if any((g.x < 0).any() for g in self.graphs):
                raise UserError("--features binary is for bags of words, these hold negative numbers; pass row")
            self.graphs = [dataclasses.replace(g, x=(g.x != 0).float()) for g in self.graphs]
        pick = [self.graphs[k % len(self.graphs)] for k in range(len(s.seeds))]
        splits = [
            data.pu_split(g.y, s.r_p, s.cpe_holdout, s.cpe_holdout_u, k, g.labelled)
            for g, k in zip(pick, s.seeds, strict=True)
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
        self.true_pi = true_prior(self.batch.y, self.labelled)
        self.method: Method = CLASSES[s.method](s, self.batch, self.labelled, held_p, held_u, self.true_pi)
        self.rounds = -1
        self.fresh_model()

    def fresh_model(self) -> None:
        """New weights and optimiser; every call draws other weights from the run's seeds."""
        self.rounds += 1
        seeds = [seed + 1_000_003 * self.rounds for seed in self.s.seeds]
        self.model = self.method.model_class(self.batch, self.s.hidden, self.s.dropout, seeds)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=self.s.lr, weight_decay=self.s.weight_decay, fused=True
        )

    def step(self, epoch: int) -> Tensor | None:
        """One optimiser step of every seed -> losses [S]; None when the method is done before its last epoch."""
        self.method.begin(epoch, self)
        if getattr(self.method, "done", False):
            return None
        self.model.train()
        loss = self.method.loss(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        self.optimizer.step()
        return loss.detach()

    def fit(self) -> Tensor:
        """All steps, without a run folder -> P(positive) of every node [S, N]."""
        for epoch in range(self.method.epochs):
            if self.step(epoch) is None:
                break
        self.method.end(self)
        return self.method.posterior(self.model)

    # ------------------------------------------------------------------ checkpoint: every tensor the next step reads

    def save(self, path: Path, epoch: int, seconds: float) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"method.{k}": v for k, v in self.method.state().items()}
        tensors |= {f"adam.{k}": v for k, v in checkpoints.pack_optimizer(self.optimizer).items()}
        tensors |= {f"rng.{i}": g.get_state() for i, g in enumerate(self.model.generators)}
        meta = {"epoch": str(epoch), "rounds": str(self.rounds), "seconds": str(seconds), "run": self.fingerprint()}
        runs.write_tensors(path, tensors, meta)

    def fingerprint(self) -> str:
        """Of the settings that matter and the data: a checkpoint of anything else is refused."""
        own = {k: v for k, v in dataclasses.asdict(self.s).items() if k not in NOT_PART_OF_A_RUN}
        return checkpoints.fingerprint(own, [g.sha256 for g in self.graphs])

    def load(self, path: Path) -> tuple[int, float]:
        """-> (epochs done, seconds spent)."""
        tensors, meta = runs.read_tensors(path)
        if meta.get("run") != self.fingerprint():
            raise UserError(f"{path} belongs to another run (method, seeds, settings or data); delete it to start over")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "method": {}, "adam": {}, "rng": {}}
        for key, value in tensors.items():
            group, _, name = key.partition(".")
            parts.setdefault(group, {})[name] = value if group == "rng" else value.to(self.device)
        epoch, seconds = checkpoints.position(meta, "epoch", self.method.epochs, path), checkpoints.seconds(meta, path)
        self.rounds = checkpoints.position(meta, "rounds", self.method.epochs, path) - 1
        self.fresh_model()
        checkpoints.restore_module(self.model, parts["model"], path)
        checkpoints.restore_optimizer(self.optimizer, parts["adam"], path)
        # GRAB's lowest losses are infinite before the first round
        like = self.method.like(self.model, parts["method"])
        checkpoints.check_tensors(parts["method"], like, path, unbounded=("low", "lowest"))
        try:
            self.method.load(parts["method"])
            for i, g in enumerate(self.model.generators):
                g.set_state(parts["rng"][str(i)])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise checkpoints.misfit(path, str(error)) from None
        return epoch, seconds
