"""The settings of train.py: every field with its unit, the paper's value and its source; ranges and defaults."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab.runs import Number, UserError, default_out

import control
import corpora
import losses
import metrics
import models
import study
from methods import METHODS
from trainer import Optimizer, Precision


@dataclass
class Settings:
    preset: Literal[tuple(models.PRESETS)] = "mini"
    """Model: mini (0.6 M, from scratch), scratch-medium (52 M), smollm2 (in a package), phi, llama2 (paper); own: that
    of --weights with its tokenizer's chat template."""
    weights: str = ""
    """Folder or hub id of other weights for the preset's template, e.g. locuslab/tofu_ft_phi-1.5 with --epochs 0."""
    dataset: Literal["miniature", "tofu"] = "miniature"
    """miniature is generated; tofu is read from <data-dir>/tofu."""
    items: int = 0
    """tofu: keep so many rows of each evaluation part and twice as many other training rows; 0: all (paper)."""
    authors: int = 0
    """tofu: keep so many whole authors in TOFU's proportions (40: 2 forgotten in forget05); 0: all 200 (paper)."""
    methods: tuple[Literal[tuple(METHODS)], ...] = ("ga", "gd", "kl", "po", "npo", "rmu")
    """Unlearning methods, one after the other (the default are those of the paper's tables)."""
    forget: tuple[str, ...] = ()
    """Forget splits: forget01, forget05, forget10 (tofu); forget-small, forget-large (miniature). Default: all. With
    --retain: a file of JSON lines with question and answer, what is to be forgotten."""
    retain: str = ""
    """A file of JSON lines with question and answer, what is to be kept; --forget then names a file too."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, one after the other; each gives its own order and draws, and a world of its own on miniature (paper:
    5)."""
    origin_seed: int = -1
    """Seed of the fine-tuning; -1: the run's seed from scratch, 42 (paper) for a pretrained model."""

    lr: Number = -1.0
    """Fine-tuning: AdamW rate; -1: phi 2e-5, llama2 1e-5 (paper), mini 2e-3, scratch-medium 1e-3, smollm2 1e-4."""
    epochs: int = -1
    """Fine-tuning: epochs; 0: none, the weights know the data already; -1: 5 (paper), mini 24, scratch-medium 60."""
    train_batch: int = 0
    """Fine-tuning: sequences a micro-batch; 0: 4 (paper), from scratch 32."""
    train_accum: int = 0
    """Fine-tuning: micro-batches a step over all processes; 0: 8 (paper: 4 on each of 2 GPUs), from scratch 1."""

    unlearn_lr: Number = -1.0
    """Unlearning: AdamW rate; -1: phi 2e-5, llama2 1e-5 (paper), mini 2.5e-4, scratch-medium 1e-4, smollm2 5e-5."""
    unlearn_epochs: int = -1
    """Unlearning: epochs over the forget set; -1: 5 (paper), mini 10."""
    batch: int = 0
    """Unlearning: forget items a micro-batch, with as many retain items; 0: 4 (paper), mini 8."""
    accum: int = 0
    """Unlearning: micro-batches a step over all processes; 0: 4 (paper), mini 1."""
    weight_decay: Number = 0.0
    """AdamW weight decay of both stages (released code: 0)."""
    clip: Number = 1.0
    """Largest norm of the gradient (paper: 1)."""
    optimizer: Optimizer = "adamw"
    """adamw, or bitsandbytes' paged32 (paper) and paged8."""
    precision: Precision = "fp32"
    """fp32; mixed: float32 weights, bf16 in every forward pass of training and evaluation (paper: bf16). Losses are
    float32 in both. Weights are never stored in bf16: mixing such neighbours is a switch at alpha = 0.5."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Kernel of the attention in training: torch's fused one, or plain matrix products, which one CPU core trained 1.36
    times faster with on sequences of 60 tokens."""
    checkpointing: bool = False
    """Recompute activations in the backward pass (paper: for llama2)."""
    compile: bool = False
    """torch.compile the model."""
    max_length: int = 500
    """Most tokens of question, answer and end token together (paper: 500)."""
    pad_to: int = 0
    """Pad batches of unlearning to so many tokens; 0: to the longest (released code: 500)."""

    retain_weight: Number = -1.0
    """lambda of the retain term; -1: 1, NPO+KL 20, SatImp 0.1, RMU-origin 100."""
    beta: Number = -1.0
    """beta of NPO, SimNPO, DPO, WGA, SatImp (its first); -1: 0.5, 4.5, 0.1, 5, 5."""
    beta2: Number = 1.0
    """SatImp: second exponent."""
    margin: Number = 0.0
    """SimNPO: delta."""
    kl: Literal[losses.KL_REDUCTIONS] = "tokens"
    """KL divided by its real tokens, by B * kl_length (padded), or over padding positions too (positions)."""
    kl_length: int = 500
    """Length that the divisor of --kl padded stands for."""
    rmu_layer: Number = 21 / 32
    """RMU: steered layer as a share of the depth (released code: layers 10, 21 or 32 of 32)."""
    rmu_scale: Number = 2.0
    """RMU: c, length of the target in units of u (released code: 2)."""
    temperature: Number = 1.0
    """Temperature scaling of GA, GD, KL: logits / T (released code: 2)."""
    select: Number = 1.0
    """Loss selection of GA, GD, KL: share of the tokens of each sequence, those with the smallest loss (0.8)."""
    cap: Number = 0.0
    """Likelihood capping of GA, GD, KL: delta; 0: off (released code: 2)."""
    cap_unit: Literal["sequence", "token"] = "sequence"
    """Capping of the summed loss of a sequence (first version of the paper) or of each token."""
    cap_weight: Number = 0.1
    """Capping with a retain term: weight of the forget side, one minus it for the retain side (released code: 0.1)."""

    tau: tuple[Number, ...] = (0.4, 0.6, 0.9, 0.95)
    """Bars: shares of the original retention that calibration keeps, each in (0, 1] (paper: 0.4, 0.6, 0.9)."""
    alpha_search: control.Search = "scan+bisect"
    """How alpha* is found: scan down and halve the last interval, or halve [0, 1] as the paper names its algorithm."""
    both_searches: bool = False
    """Also note the alpha* of the other search."""
    alpha_step: Number = 0.05
    """Grid of the scan and of the alpha curves."""
    alpha_tolerance: Number = 1e-3
    """Width at which halving ends."""
    early_stop: Number = 0.0
    """Control by stopping: end unlearning before ES on the retain set falls below this share of the original; 0:
    off."""
    stop_every: int = 5
    """Steps between its looks."""
    eval_every: int = 0
    """Steps between lines of metrics.jsonl with ES of both parts (exact questions) while unlearning; 0: none."""

    questions: tuple[Literal[metrics.KINDS], ...] = metrics.KINDS
    """Kinds of evaluation questions: exact and perturb (paraphrased); exact alone takes half the time."""
    answers: int = 0
    """Keep the generated answers to the first so many forgotten questions in the records."""
    eval_items: int = 0
    """Random items of each evaluation set; 0: all (released evaluation: 50)."""
    eval_seed: int = 42
    """Seed of that choice (released evaluation: 42)."""
    attacks: tuple[study.Attack, ...] = ()
    """Attacks of the metric study on every unlearned model, e.g. jail-breaking; correlations over the run's models."""
    noise_rate: Number = 0.05
    """token noising: share of prompt tokens replaced (not known of the paper)."""
    relearn_lr: Number = -1.0
    """relearning: AdamW rate of its one epoch; -1: that of the fine-tuning (paper)."""
    probe_layers: tuple[Number, ...] = (1 / 3, 2 / 3, 1.0)
    """embedding probing: layers as shares of the depth (not known of the paper)."""
    gcg_steps: int = 20
    """GCG: steps."""
    utility: bool = False
    """Also TOFU's model utility of every unlearned model and of the original."""
    retrained: bool = False
    """Also train a model without each forget split: forget quality of every unlearned model, raw and calibrated."""
    interpolate: bool = False
    """Also mix the original with the retrained model (--retrained), as if that had been unlearned: a control."""
    only_methods: bool = False
    """No records of the original and the retrained model: those of another run of the same table and seed stand."""
    export: bool = False
    """Write every model calibrated to the largest tau as a folder that transformers loads, into seed<k>/."""

    table: str = "own"
    """Table of RESULTS.md the records belong to; own: none of them (plan.yaml names the tables of its runs)."""
    label: str = ""
    """Goes behind the method's name in the table; default: what differs from the preset (T=2); none: nothing."""
    scale: Literal["smoke", "demo", "real", "paper"] = "demo"
    """Goes into the record; changes nothing else."""
    out: str = ""
    """Run folder; default runs/<scale>/<table>-<preset>-<dataset>."""
    models: str = ""
    """Folder of the fine-tuned originals; default models/ beside the run folder."""
    drop_models: bool = False
    """Delete the unlearned weights once they are evaluated (eval.py then has nothing to read)."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    download: bool = False
    """Fetch TOFU and weights from the hub."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    checkpoint_steps: int = 200
    """Steps between checkpoints inside a stage; 0: none."""
    dry_run: bool = False
    """Print what would be done, then stop."""

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        whole = {"items": 0, "epochs": -1, "train_batch": 0, "train_accum": 0, "unlearn_epochs": -1, "batch": 0}
        whole |= {"accum": 0, "max_length": 8, "pad_to": 0, "kl_length": 1, "stop_every": 1, "eval_items": 0}
        whole |= {"gcg_steps": 1, "checkpoint_steps": 0, "weight_decay": 0, "cap": 0, "rmu_scale": 0, "margin": 0}
        whole |= {"beta2": 0, "eval_seed": 0, "origin_seed": -1, "authors": 0, "eval_every": 0, "answers": 0}
        for name, low in whole.items():
            if getattr(self, name) < low:
                raise UserError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(self, name)}")
        if self.unlearn_epochs == 0:
            raise UserError("--unlearn-epochs must be at least 1")
        for name in ("clip", "temperature", "lr", "unlearn_lr", "relearn_lr", "beta"):
            value = getattr(self, name)
            if value <= 0 and not (value == -1 and name in ("lr", "unlearn_lr", "relearn_lr", "beta")):
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value:g}")
        if self.retain_weight < 0 and self.retain_weight != -1:
            raise UserError(f"--retain-weight must not be negative, not {self.retain_weight:g}")
        for name in ("select", "rmu_layer", "alpha_step", "alpha_tolerance", "noise_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must lie in (0, 1], not {getattr(self, name):g}")
        if self.alpha_tolerance < 1e-6:  # the search halves an interval until it is so short
            raise UserError(f"--alpha-tolerance must be at least 1e-6, not {self.alpha_tolerance:g}")
        for name in ("cap_weight", "early_stop"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must lie in [0, 1], not {getattr(self, name):g}")
        if not self.probe_layers or any(not 0 < x <= 1 for x in self.probe_layers):
            raise UserError("--probe-layers are shares of the depth in (0, 1]")
        for tau in self.tau:
            check_tau(tau)
        self.check_own()
        known = self.forget if self.retain else corpora.splits(self.dataset)
        for name, given in (("forget", self.forget), ("methods", self.methods), ("tau", self.tau)):
            if len(set(given)) != len(given):
                raise UserError(f"--{name} names one of its values twice")
        for split in self.forget:
            if split not in known:
                raise UserError(f"--forget {split} is unknown; {self.dataset} has {', '.join(known)}")
        if not self.methods:
            raise UserError(f"--methods needs one or more of {', '.join(METHODS)}")
        tricks = sum((self.temperature != 1, self.select < 1, self.cap > 0))
        if tricks and (tricks > 1 or any(METHODS[m].forget != "ga" for m in self.methods)):
            raise UserError(
                "--temperature, --select and --cap change GA, GD and KL (--methods ga gd kl), one at a time"
            )
        for name in ("items", "authors"):
            if self.dataset == "miniature" and getattr(self, name):
                raise UserError(f"--{name} is for --dataset tofu; miniature is small as it is")
        if self.items and self.authors:
            raise UserError("--items and --authors are two ways to make TOFU smaller; choose one")
        if "exact" not in self.questions or len(set(self.questions)) != len(self.questions):
            raise UserError("--questions takes exact, or exact and perturb")

        if self.interpolate and not self.retrained:
            raise UserError("--interpolate mixes the original with the retrained model: add --retrained")

    def check_own(self) -> None:
        """A user's own rows have none of what TOFU's summaries and the metric study need."""
        if self.preset == "own" and not self.weights:
            raise UserError("--preset own needs --weights: a folder as `save_pretrained` writes it, or a hub id")
        if not self.retain:
            return
        if len(self.forget) != 1:
            raise UserError("--retain names what is to be kept; --forget must name one file, what is to be forgotten")
        for name in ("attacks", "utility", "retrained", "items", "authors"):
            if getattr(self, name):
                raise UserError(f"--{name} needs TOFU or the generated authors, not rows of your own (--retain)")

    def resolve(self) -> None:
        """Put the defaults of preset and data set where none was given."""
        p = models.PRESETS[self.preset]
        mini, scratch = self.preset == "mini", not p.source
        defaults = {"lr": p.lr, "epochs": p.epochs, "unlearn_lr": p.unlearn_lr, "unlearn_epochs": p.unlearn_epochs}
        for name, value in defaults.items():
            setattr(self, name, value if getattr(self, name) == -1 else getattr(self, name))
        self.relearn_lr = self.lr if self.relearn_lr == -1 else self.relearn_lr
        self.train_batch = self.train_batch or (32 if scratch else 4)
        self.train_accum = self.train_accum or (1 if scratch else 8)
        self.batch, self.accum = self.batch or (8 if mini else 4), self.accum or (1 if mini else 4)
        self.forget = self.forget or corpora.splits(self.dataset)
        self.out = self.out or default_out(self.scale, f"{self.table}-{self.preset}-{self.source}")
        self.models = self.models or str(Path(self.out).parent / "models")

    @property
    def source(self) -> str:
        """The data set's name in names of folders."""
        return "own" if self.retain else self.dataset

    @property
    def splits(self) -> tuple[str, ...]:
        """The forget splits by name: of a file its stem."""
        return tuple(Path(f).stem for f in self.forget) if self.retain else self.forget


def check_tau(tau: float) -> None:
    if not 0 < tau <= 1:
        raise UserError(f"--tau must lie in (0, 1], not {tau:g}: it is a share of the original model's retention")


@dataclass
class EvalSettings:
    run: str
    """Run folder written by train.py."""
    methods: tuple[str, ...] = ()
    """Only these methods; default all of the run."""
    forget: tuple[str, ...] = ()
    """Only these forget splits; default all of the run."""
    tau: tuple[Number, ...] = ()
    """Calibrate to these shares of the original retention, each in (0, 1]; default the run's."""
    alpha: Number = -1.0
    """Score the mixture at this alpha instead of searching (0: original, 1: unlearned)."""
    alpha_search: control.Search = "scan+bisect"
    """How alpha* is found."""
    literal: int = 0
    """Also compute ES by generating for the first so many items of each set, and compare."""
    utility: bool = False
    """Also model utility of the mixture that is scored (needs generation)."""
    export: str = ""
    """Folder for every mixture that is scored, each as a folder that transformers loads: original, unlearned, mixed."""
    write: bool = False
    """Write the calibrated scores into records of their own (record-eval-...json); they stand in no table."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
