"""Every classifier of the tables as an objective for the one loop in train.py.

A method holds its own state for S seeds: `begin(epoch)` runs before an optimiser step (re-estimates a prior, picks
labels, learns edge weights), `loss(model)` gives one number a seed. Labels of U never enter here, except by the true
class prior where a method is told it (`--prior true`) and by the control `--edges ideal`.
"""

import torch
from torch import Tensor

import baselines
import gpl
from data import GraphBatch
from models import Adjacency, Classifier


class Method:
    """P-versus-U cross-entropy with both sets weighted equally: GCN and MLP, and the warm start of the others."""

    model_class = Classifier

    def __init__(self, settings, batch: GraphBatch, labelled: Tensor, held_p: Tensor, held_u: Tensor, true_pi: Tensor):
        """labelled, held_p, held_u: [S, N] bool; true_pi [S]: share of positives in U."""
        self.s, self.batch, self.held_p = settings, batch, held_p
        self.labelled, self.unlabelled = labelled, ~labelled
        # In the losses: P without its held-out part, U without its held-out part.
        self.fit_p, self.fit_u = labelled & ~held_p, ~labelled & ~held_u
        # The prior is estimated on nodes that no loss has seen, where some are held out.
        self.estimate_p = held_p if bool(held_p.any()) else labelled
        self.estimate_u = held_u if bool(held_u.any()) else self.unlabelled
        self.true_pi = true_pi
        self.pi = torch.full((batch.S,), float("nan"), device=batch.device)
        self.adjacency = None if settings.method.startswith("mlp") else Adjacency(batch)

    @property
    def epochs(self) -> int:
        """Optimiser steps in all; every method gets the same number unless its recipe says otherwise."""
        return self.s.warmup + self.s.epochs

    def begin(self, epoch: int, trainer) -> None:
        pass

    def end(self, trainer) -> None:
        """After the last step."""

    def loss(self, model: Classifier) -> Tensor:
        return gpl.two_set_loss(model(self.adjacency), self.fit_p, self.fit_u) / 2

    @torch.no_grad()
    def posterior(self, model: Classifier) -> Tensor:
        """P(positive) of every node [S, N], dropout off."""
        model.eval()
        return model(self.adjacency).sigmoid()

    def estimate(self, posterior: Tensor) -> Tensor:
        """Class prior [S] as --prior says; estimated on held-out P and U (on all of both when none is held out)."""
        if self.s.prior == "given":
            return torch.full_like(self.pi, self.s.pi)
        if self.s.prior == "true":
            return self.true_pi
        new = gpl.class_prior(posterior, self.estimate_p, self.estimate_u, self.s.prior == "rempe")
        # frozen: the first estimate stays
        return torch.where(self.pi.isnan(), new, self.pi) if self.s.prior == "frozen" else new

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold besides the model; -1 stands for a prior that is not estimated yet."""
        return {"pi": self.pi.nan_to_num(nan=-1.0)}

    def load(self, state: dict[str, Tensor]) -> None:
        self.pi = state["pi"].where(state["pi"] >= 0, float("nan"))

    def like(self, model: Classifier, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the names, shapes and kinds that a state out of a file must have."""
        return self.state()

    def kept(self) -> dict[str, Tensor]:
        """What eval.py needs beside the weights: the prior (and GPL's mask)."""
        return {"pi": self.state()["pi"]}

    def restore(self, kept: dict[str, Tensor]) -> None:
        """Put in what `kept` gave."""
        Method.load(self, kept)

    def extra(self) -> dict[str, Tensor]:
        """Tensors [S] for the log and the record."""
        return {}


class Plain(Method):
    """One mean cross-entropy over all nodes, U negative: what training a GCN or an MLP on the labels at hand means."""

    def loss(self, model: Classifier) -> Tensor:
        return gpl.two_set_loss(model(self.adjacency), self.fit_p, self.fit_u, "all")


class GPL(Method):
    """Algorithm 1: edge weights by the label propagation loss, prior on the re-weighted graph, two-set loss."""

    def __init__(self, *args):
        super().__init__(*args)
        s, b = self.s, self.batch
        self.raw = gpl.mask_start((b.S, b.E), s.mask, b.device)
        self.adam = gpl.adam_start(self.raw)
        self.chosen = torch.zeros_like(self.labelled)
        self.lpl = torch.zeros(b.S, device=b.device)
        self.last = torch.zeros(self.labelled.shape, device=b.device)
        self.adjacency, self.warming = Adjacency(b, self.weight), True

    @property
    def weight(self) -> Tensor:
        return gpl.mask_of(self.raw, self.s.mask)

    def _inner(self, first: bool, steps: int) -> None:
        s, known = self.s, self.fit_p
        chosen = self.chosen & self.fit_u  # held-out nodes stay out of this loss, too
        if first:  # no S yet: positives only (Eq. 6)
            start = gpl.start_belief(known)
        elif s.lpl_labels == "hard":  # Eq. 9, by labels or by posteriors
            start = gpl.start_belief(known | chosen)
        else:
            start = gpl.start_belief(known, self.last)
        clamp = known if s.lpl_clamp else None

        def loss_of(weight: Tensor) -> Tensor:
            belief = gpl.propagate(weight, start, self.batch, s.alpha, s.steps, clamp)
            if first:
                loss = gpl.lpl(belief, known, s.lpl_form)
            else:
                loss = gpl.lpl_joint(belief, known | chosen, self.fit_u & ~chosen, s.lpl_form, s.lambda_neg)
            return -loss if s.edges == "flipped" else loss

        tied = (known if first else known | chosen).sum(-1, keepdim=True)
        self.raw, self.adam, self.lpl = gpl.learn_mask(
            self.raw, self.adam, loss_of, s.mask, steps, s.inner_lr, s.inner_optimizer, tied
        )
        self.adjacency = Adjacency(self.batch, self.weight)

    def begin(self, epoch: int, trainer) -> None:
        s = self.s
        self.warming, first = epoch < s.warmup, epoch == s.warmup
        if self.warming:
            return
        if s.edges not in ("learned", "flipped"):  # a control: the mask is put in where it would be learned
            if first:
                self.raw = gpl.fixed_mask(self.batch, s.edges, s.edge_weight, s.seeds)
                self.adjacency = Adjacency(self.batch, self.weight)
        elif s.inner_steps > 0:
            if first or s.schedule == "alternate":
                self.last = self.posterior(trainer.model)  # the current posterior: Eq. 9 starts from it
            if s.schedule == "alternate":
                self._inner(first, s.inner_steps)
            elif first:  # not bilevel: the mask is learned once, by Eq. 6, and stays
                self._inner(True, s.inner_steps * s.epochs)
        self.last = self.posterior(trainer.model)
        self.pi = self.estimate(self.last)
        self.chosen = gpl.select(self.last, self.unlabelled, self.pi)

    def loss(self, model: Classifier) -> Tensor:
        if self.warming or self.s.selection == "none":
            return super().loss(model)
        logits = model(self.adjacency)
        return gpl.two_set_loss(
            logits, self.fit_p | (self.chosen & self.fit_u), self.fit_u & ~self.chosen, self.s.ce_reduction
        )

    def state(self) -> dict[str, Tensor]:
        m, v, t = self.adam
        return {
            **super().state(),
            **{"raw": self.raw, "m": m, "v": v, "t": t, "chosen": self.chosen, "last": self.last, "lpl": self.lpl},
        }

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.raw, self.adam = state["raw"], (state["m"], state["v"], state["t"])
        self.chosen, self.last, self.lpl = state["chosen"], state["last"], state["lpl"]
        self.adjacency = Adjacency(self.batch, self.weight)

    def kept(self) -> dict[str, Tensor]:
        return {**super().kept(), "raw": self.raw, "chosen": self.chosen, "lpl": self.lpl}

    def restore(self, kept: dict[str, Tensor]) -> None:
        super().restore(kept)
        self.raw, self.chosen, self.lpl = kept["raw"], kept["chosen"], kept["lpl"]
        self.adjacency = Adjacency(self.batch, self.weight)

    def extra(self) -> dict[str, Tensor]:
        truth = self.batch.y == 1
        differ = (truth.gather(1, self.batch.edge_i) != truth.gather(1, self.batch.edge_j)).float()
        w = self.weight
        return {
            "lpl": self.lpl,
            "h_weighted": (w * differ).sum(-1) / w.sum(-1),
            "s_precision": gpl.masked_mean(truth.float(), self.chosen),
        }


class TED(Method):
    """TED^n (Garg et al. 2021): BBE on held-out nodes, CVIR drops the estimated share of U, the rest is negative."""

    def begin(self, epoch: int, trainer) -> None:
        self.dropped = epoch >= self.s.warmup
        if self.dropped:
            posterior = self.posterior(trainer.model)
            self.pi = self.estimate(posterior)
            self.negatives = baselines.cvir_negatives(posterior, self.fit_u, self.pi)

    def loss(self, model: Classifier) -> Tensor:
        if not self.dropped:
            return super().loss(model)
        return gpl.two_set_loss(model(self.adjacency), self.fit_p, self.negatives) / 2


class NNPU(Method):
    """nnPU with the prior it is told, or with one estimated after a P-versus-U warm start (the model then starts
    afresh)."""

    def __init__(self, *args):
        super().__init__(*args)
        self.told = self.s.prior in ("true", "given")
        if self.told:
            self.pi = self.estimate(torch.empty(0))

    def begin(self, epoch: int, trainer) -> None:
        self.warming = not self.told and epoch < self.s.warmup
        if not self.told and epoch == self.s.warmup:
            self.pi = self.estimate(self.posterior(trainer.model))
            trainer.fresh_model()

    def loss(self, model: Classifier) -> Tensor:
        if self.warming:
            return super().loss(model)
        return baselines.nnpu_loss(model(self.adjacency), self.fit_p, self.fit_u, self.pi)[0]


class LSDANMethod(NNPU):
    """LSDAN trained with the nnPU risk (approximate)."""

    model_class = baselines.LSDAN


class PUGNN(Method):
    """PU-GNN: distance-aware PU loss and structure regulariser (approximate). No weight decay, 100 steps."""

    model_class = baselines.EmbeddingClassifier

    def __init__(self, *args):
        super().__init__(*args)
        near = baselines.near_nodes(self.batch, self.fit_p)
        self.near, self.far = self.fit_u & near, self.fit_u & ~near
        ones = torch.ones_like(self.true_pi)
        scaled = self.s.pugnn_priors == "scaled"
        self.pi_near = (1.2 * self.true_pi).clamp(max=0.99) if scaled else 0.6 * ones
        self.pi_far = 0.8 * self.true_pi if scaled else 0.3 * ones
        self.negatives = baselines.NegativeSamples(self.batch, list(self.s.seeds))

    @property
    def epochs(self) -> int:
        return self.s.pugnn_epochs

    def loss(self, model: baselines.EmbeddingClassifier) -> Tensor:
        z = model.embed(self.adjacency)
        p = model.readout(z).sigmoid()
        pu = baselines.pugnn_loss(p, self.fit_p, self.near, self.far, self.pi_near, self.pi_far)
        return pu + baselines.PUGNN_ALPHA * baselines.structure_loss(z, self.batch, self.negatives)


class GRAB(Method):
    """GRAB: rounds of (belief propagation -> marginals of U) and (fresh GCN on them); no prior is given.

    A seed's answer is the round of the lowest training loss; it stops after two rounds in a row without a lower one.
    All seeds train on until the last has stopped, stopped ones without effect.
    """

    def __init__(self, *args):
        super().__init__(*args)
        shape = self.labelled.shape
        self.marginal = torch.zeros(shape, device=self.batch.device)  # first round: U counts as negative
        self.low = torch.full((self.batch.S,), float("inf"), device=self.batch.device)  # lowest loss of this round
        self.lowest = self.low.clone()  # and of all rounds
        self.bad = torch.zeros_like(self.low)  # rounds in a row without a lower loss
        self.best: dict[str, Tensor] = {}  # weights of the lowest loss of this round
        self.answer: dict[str, Tensor] = {}  # and of all rounds
        self.done = False

    @property
    def epochs(self) -> int:
        return self.s.grab_rounds * self.s.grab_epochs

    def begin(self, epoch: int, trainer) -> None:
        if epoch == 0 or epoch % self.s.grab_epochs:
            return
        trainer.model.load_state_dict(self.best)
        running = self.bad < 2
        with torch.no_grad():
            predicted = (self.posterior(trainer.model) > 0.5) | self.labelled
            share = gpl.masked_mean(predicted.float(), self.unlabelled)
            self.pi = torch.where(running, share, self.pi)
            # A node's prior odds are those of the class share, for or against according to its predicted label.
            against = self.pi.clamp(1e-3, 1 - 1e-3).logit().unsqueeze(-1)
            logit = torch.where(predicted, -against, against)
            self.marginal = baselines.belief_propagation(
                self.batch, torch.where(self.labelled, baselines.CERTAIN, logit)
            )
        self.end(trainer)
        if not self.done:
            trainer.fresh_model()

    def end(self, trainer) -> None:
        """Compare the round's lowest loss with the earlier ones, keep the better weights, decide which seeds stop; at
        the end the answers are put into the model."""
        if self.best:
            running, better = self.bad < 2, self.low < self.lowest
            take = running & better
            self.answer = {
                k: torch.where(_wide(take, v), v, self.answer[k]) if self.answer else v for k, v in self.best.items()
            }
            self.lowest = torch.where(take, self.low, self.lowest)
            self.bad = torch.where(running, torch.where(better, 0.0, self.bad + 1), self.bad)
            self.best, self.low = {}, torch.full_like(self.low, float("inf"))
            self.done = bool((self.bad >= 2).all())
        trainer.model.load_state_dict(self.answer)

    def loss(self, model: Classifier) -> Tensor:
        loss = baselines.grab_loss(model(self.adjacency), self.fit_p, self.fit_u, self.marginal)
        now = loss.detach()
        better, state = now < self.low, model.state_dict()
        self.best = {
            k: torch.where(_wide(better, v), v, self.best[k]) if self.best else v.clone() for k, v in state.items()
        }
        self.low = torch.where(better, now, self.low)
        return loss

    def state(self) -> dict[str, Tensor]:
        named = {"marginal": self.marginal, "low": self.low, "lowest": self.lowest, "bad": self.bad}
        best = {f"best.{k}": v for k, v in self.best.items()}
        return {**super().state(), **named, **best, **{f"answer.{k}": v for k, v in self.answer.items()}}

    def like(self, model: Classifier, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Between two rounds one of `best` and `answer` is empty."""
        parts = {name.split(".")[0] for name in found} & {"best", "answer"}
        own = {k: v for k, v in self.state().items() if "." not in k}
        return {**own, **{f"{part}.{k}": v for part in parts for k, v in model.state_dict().items()}}

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.marginal, self.low = state["marginal"], state["low"]
        self.lowest, self.bad = state["lowest"], state["bad"]
        self.best = {k[5:]: v for k, v in state.items() if k.startswith("best.")}
        self.answer = {k[7:]: v for k, v in state.items() if k.startswith("answer.")}


def _wide(flag: Tensor, like: Tensor) -> Tensor:
    """[S] bool -> [S, 1, ...] for `like`."""
    return flag.view(-1, *[1] * (like.dim() - 1))


CLASSES: dict[str, type[Method]] = {
    "gpl": GPL,
    "gcn": Method,
    "gcn-plain": Plain,
    "mlp": Method,
    "mlp-plain": Plain,
    "gcn-ted": TED,
    "mlp-ted": TED,
    "gcn-nnpu": NNPU,
    "mlp-nnpu": NNPU,
    "lsdan": LSDANMethod,
    "grab": GRAB,
    "pugnn": PUGNN,
}
