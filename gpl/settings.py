"""Settings of train.py and eval.py, their ranges, and what the paper prints of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab.runs import Number, UserError, default_out

from data import DATASETS, GENERATED

MethodName = Literal[
    *("gpl", "gcn", "gcn-plain", "mlp", "mlp-plain", "gcn-ted", "mlp-ted", "gcn-nnpu", "mlp-nnpu"),
    *("lsdan", "grab", "pugnn"),
]
NOT_PART_OF_A_RUN = ("out", "data_dir", "device", "download", "dry_run")  # may change between starts of one run


# Learning rate, weight decay and features of each method, from the same small search (README, "Equal care"). Under the
# sigmoid loss of nnPU a saturated logit has next to no gradient, so that any decay wins and every node ends negative.
RECIPE: tuple[float, float, str] = (0.01, 5e-4, "row")
RECIPES: dict[str, tuple[float, float, str]] = {
    "gcn-nnpu": (0.003, 0.0, "binary"),
    "mlp-nnpu": (0.01, 0.0, "binary"),
    "lsdan": (0.003, 0.0, "binary"),
    "grab": (0.001, 5e-4, "binary"),
    "pugnn": (0.01, 0.0, "row"),
}


@dataclass
class Settings:
    method: MethodName = "gpl"
    """Classifier. gpl is the paper's; gcn and mlp weigh P and U equally, their -plain forms take one mean over all
    nodes; lsdan and pugnn are approximate (see README)."""
    dataset: Literal[DATASETS] = "synthetic"
    """One of the paper's ten graphs, a sensitivity variant, or a generated graph."""
    graph: str = ""
    """A graph of your own in place of --dataset: .pt with a torch_geometric Data or a dict of tensors, or .npz, with x
    [N, F], edge_index [2, E], and y or labelled."""
    positive: int | None = None
    """--graph: the class of y that is positive. Without it nothing is scored."""
    labelled: str = ""
    """--graph: the array of the labelled positives, a mask or node ids. Default: `labelled` if there is one, else they
    are drawn from the positives."""
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
    lr: Number | None = None
    """Adam learning rate of the classifier (paper: 0.01). Default: the method's, see RECIPES in settings.py."""
    weight_decay: Number | None = None
    """L2 added to the gradient by Adam (our choice). Default: the method's."""
    features: Literal["row", "binary"] | None = None
    """Bags of words: rows that sum to one, or 1 where a word occurs. Default: the method's; generated features stay."""
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
    """Learning rate of the mask (our choice): of sgd a tied positive, not of the mean over them. 0.3 solves the
    inner problem to its end. Default: 0.003 for sgd (README, "Equal care"), 0.01 for adam."""
    edges: Literal["learned", "constant", "flipped", "random", "ideal"] = "learned"
    """Controls of gpl: one constant weight, the loss with its sign flipped, four fifths of the edges cut at random, and
    edges between the classes cut by the true labels (no method may know them)."""
    edge_weight: Number = 0.03
    """The weight of --edges constant."""
    mask: Literal["clamp", "sigmoid", "exp"] = "clamp"
    """How the positive edge mask is parametrised (our choice)."""
    lpl_form: Literal["log", "ce"] = "log"
    """log P(negative) as printed in Eq. 6, or the bounded -log(1 - P(negative))."""
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

    prior: Literal["bbe", "rempe", "frozen", "given", "true"] | None = None
    """Class prior of U: BBE's estimate, every epoch anew (as in the paper); the same after regrouping (ReMPE); BBE's
    first estimate after the warm-up, for good; --pi; the true one. nnPU and LSDAN estimate it once. Default: true for
    nnPU and LSDAN, frozen for the others (README, "Equal care")."""
    pi: Number | None = None
    """The prior of --prior given: share of positives among the unlabelled."""
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
    """Row name in the table; default the method, or the control of --edges."""
    scale: Literal["smoke", "demo", "real", "paper"] = "demo"
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

    @property
    def about(self) -> str:
        """What the run is about: the data set, or the name of the graph's file."""
        return Path(self.graph).stem if self.graph else self.dataset

    def check(self) -> None:
        """Fill in what depends on other settings; raise UserError for a value outside its range."""
        nnpu = self.method in ("gcn-nnpu", "mlp-nnpu", "lsdan")
        self.prior = self.prior or ("true" if nnpu else "frozen")
        lr, decay, features = RECIPES.get(self.method, RECIPE)
        if not self.graph and (self.positive is not None or self.labelled):
            raise UserError("--positive and --labelled describe --graph, which is not given")
        generated = self.dataset in GENERATED and not self.graph
        if self.features == "binary" and generated:
            raise UserError(f"--features binary is for bags of words, which {self.dataset} has not; pass row")
        self.features = self.features or ("row" if generated or self.graph else features)
        self.lr = lr if self.lr is None else self.lr
        self.weight_decay = decay if self.weight_decay is None else self.weight_decay
        if (self.prior == "given") != (self.pi is not None):
            raise UserError("--prior given and --pi go together: give both or neither")
        if self.edges != "learned" and (self.method != "gpl" or self.mask != "clamp"):
            raise UserError(
                f"--edges {self.edges} is a control of --method gpl with --mask clamp; pass those or leave it out"
            )
        if self.cpe_holdout is None:
            asks = self.method == "gpl" or self.method.endswith("-ted") or nnpu
            self.cpe_holdout = 0.2 if self.estimators or asks and self.prior not in ("true", "given") else 0.0
        if self.cpe_holdout_u is None:
            self.cpe_holdout_u = self.cpe_holdout
        if self.inner_lr is None:
            self.inner_lr = 0.003 if self.inner_optimizer == "sgd" else 0.01
        self.setting = self.setting or f"r_p={self.r_p:g}"
        self.label = self.label or (self.method if self.edges == "learned" else self.edges)
        self.out = self.out or default_out(self.scale, f"{self.table}-{self.label}-{self.about}")
        for name in ("r_p", "h", "pi", "edge_weight", "dropout", "cpe_holdout", "cpe_holdout_u"):
            top = 1.0 if name in ("r_p", "h", "pi", "edge_weight") else 0.99
            if not 0 <= (getattr(self, name) or 0) <= top:
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
        if self.weight_decay > 1:  # its square, in Adam's state, must stay a number
            raise UserError(f"--weight-decay must lie in [0, 1], not {self.weight_decay:g}")
        for name in ("warmup", "inner_steps", "lr", "inner_lr", "weight_decay", "lambda_neg"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must not be negative, not {getattr(self, name)}")


@dataclass
class EvalSettings:
    run: str
    """Run folder written by train.py."""
    estimators: bool = False
    """Also estimate the class prior by every estimator and print the errors."""
    bootstrap: int = 0
    """Resamples for a 95 % interval of BBE's estimate (0: none)."""
    data_dir: str = ""
    """Folder with graphs/; default $REPRO_DATA, else ./data."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
