"""Settings of train.py and eval.py, their ranges, and what the paper prints of them."""

from dataclasses import dataclass
from typing import Literal

from lab.runs import Number, UserError, default_out

import aaer
import baselines
import data
import models

VERSIONS = ("standard", "plus", "rand")
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
NOT_PART_OF_A_RUN = ("out", "data_dir", "device", "download", "dry_run", "workers", "checkpoint_steps")  # may change
MethodName = Literal["aaer", "fgsm", "pgd", "free", "zerograd", "multigrad", "gradalign"]


def check_attack(version: str) -> None:
    if version and version not in VERSIONS and not set(version.split(",")) <= set(ATTACKS):
        raise UserError(f"--autoattack {version} is unknown; use {', '.join(VERSIONS)} or any of {', '.join(ATTACKS)}")


@dataclass
class Settings:
    method: MethodName = "aaer"
    """How the training images are perturbed; aaer is the paper's, fgsm the same without the regulariser."""
    start: aaer.Start = "rs"
    """Start noise of aaer, fgsm and pgd: rs U(-eps, eps), n U(-2 eps, 2 eps), v none (paper: rs and n)."""
    dataset: Literal[tuple(data.KINDS)] = "patches"
    """Data set; patches, carriers, digits and mnist5k need no download."""
    model: Literal[("auto", *models.NAMES)] = "auto"
    """Network; auto: preact18 (paper), preact18-act on Tiny-ImageNet, resnet18-cosine on ImageNet-100, else small."""
    eps: Number = 8 / 255
    """Radius of the attack, in pixels of [0, 1] (paper: 8, 12, 16, 32 over 255)."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, one after the other; each gives its own weights, order, augmentation and noise (paper: 3)."""

    lambda1: Number = 1.0
    """Weight of R (paper: 1)."""
    lambda2: Number = -1.0
    """Weight of the loss variation E_A inside R; changes no weights unless --ce-term differentiable. -1: published for
    data set, start and radius (CIFAR-10 at 8, 12, 16, 32/255: rs 2.5, 5, 7, 5.75, n 1.5, 5, 8.5, 2.75)."""
    lambda3: Number = -1.0
    """Weight of the logit variation V_A - V_N inside R; -1: published (CIFAR-10: rs 1.5, 2.75, 3.25, 1.5, n 0.15, 0.55,
    1.5, 0.75)."""
    ce_term: aaer.CeTerm = "constant"
    """E_A as a constant (released code), or with its gradient (a literal reading of the formula)."""
    term: aaer.Term = "full"
    """R with a part left out, as a control: count is |A|/B alone (no gradient), difference V_A - V_N without |A|/B,
    pull |A|/B V_A without - V_N."""
    group: Literal["abnormal", "random"] = "abnormal"
    """Examples that R pulls: the abnormal ones, or as many drawn at random from the batch, as a control."""
    regulariser_warmup: Number = 0.0
    """Epochs over which R grows from 0 (released code, for long schedules: 20, switched off)."""
    radius_warmup: Number = -1.0
    """Epochs over which step and clamp grow from 0; -1: 5 on SVHN (released code), else 0."""
    noise: Number = -1.0
    """Start noise over eps; -1: 1 for rs, 2 for n (3 for N-FGSM on SVHN at 12/255), 0 for v."""
    step: Number = -1.0
    """Step over eps; -1: rs 1.25, n and v 1, zerograd and multigrad 2, pgd 1/2 for 2 steps, else 1/4."""
    attack_steps: int = 10
    """pgd: steps."""
    replays: int = 8
    """free: updates on each batch."""
    samples: int = 3
    """multigrad: start points."""
    zero_share: Number = -1.0
    """zerograd: share of gradient entries set to zero; -1: published (CIFAR-10 0.35, CIFAR-100 0.45, SVHN 0.7)."""
    align: Number = -1.0
    """gradalign: weight; -1: published for the radius (CIFAR-10: 0.2 at 8/255, 0.632 at 12/255, 2 at 16/255)."""

    epochs: int = 0
    """Passes over the data; 0: 30, SVHN 15 (paper); Free-AT 12 with 8 replays."""
    batch: int = 128
    """Images a step over all processes; a smaller last batch is kept (paper: 128)."""
    schedule: Literal["cyclic", "multistep"] = "cyclic"
    """Learning rate: up and down in straight lines with the momentum opposite (paper), or x0.1 at 50 and 75 %."""
    lr: Number = -1.0
    """Highest learning rate; -1: 0.2, SVHN 0.05 (paper); Free-AT 0.04."""
    peak: Number = -1.0
    """cyclic: where the learning rate is highest; -1: 0.5, SVHN 0.4 (paper)."""
    momentum: Number = 0.9
    """SGD momentum; cyclic moves it to 0.8 at the peak and back (paper)."""
    weight_decay: Number = 5e-4
    """L2 on every parameter (paper: 5e-4)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Forward and backward pass; losses stay in fp32 (paper: fp32)."""
    compile: bool = False
    """torch.compile the network."""
    sync_bn: bool = False
    """Batch statistics over all processes (CUDA only); off: each process its own, as in plain data parallelism."""

    jitter: int = 0
    """Multiply the first weights by 1 + 1e-6 N(0, 1), drawn by this number, to see what rounding decides; 0: do not."""
    carrier: Number = 1.0
    """carriers: amplitude of the easy feature over 16/255."""
    train_limit: int = 0
    """Keep a fixed random subset of the training images; 0: all."""
    eval_limit: int = 0
    """Test images of the final evaluation; 0: all (paper)."""
    test_steps: int = 50
    """PGD steps of the final evaluation, each eps/4 (paper: 50)."""
    test_restarts: int = 10
    """PGD restarts of the final evaluation (paper: 10)."""
    autoattack: str = ""
    """AutoAttack in the final evaluation: standard (paper), or its attacks joined by commas; empty: not run."""
    autoattack_limit: int = 0
    """Images of the final evaluation that AutoAttack takes, the first so many; 0: all of them (paper)."""
    test_batch: int = 500
    """Images a batch in evaluation."""
    probe: int = 1000
    """Test images attacked after every epoch, always the same."""
    probe_steps: int = 10
    """PGD steps on the probe."""
    surface: int = 0
    """Probe images whose loss surface is kept in every epoch; 0: none."""
    checkpoint_steps: int = 0
    """Steps between checkpoints inside an epoch; 0: only at its end."""
    workers: int = 8
    """Loader processes of ImageNet-100; the other sets lie on the device."""

    table: str = "own"
    """Table of RESULTS.md the records belong to; own: none of them (plan.yaml names the tables of its runs)."""
    setting: str = ""
    """Label inside the table; default eps=<255 eps>/255."""
    label: str = ""
    """Row of the table; default the method's name (RS-AAER, PGD-10)."""
    scale: Literal["smoke", "demo", "real", "paper"] = "demo"
    """Goes into the record; changes nothing else."""
    out: str = ""
    """Run folder; default runs/<scale>/<table>-<dataset>-<method>-<255 eps>."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    download: bool = False
    """Let torchvision fetch CIFAR, SVHN or MNIST into the data folder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dry_run: bool = False
    """Print the data and what would be trained, then stop."""

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        if not 0 <= self.eps <= 1:
            raise UserError(f"--eps must lie in [0, 1], not {self.eps:g}; write 8/255 for eight grey levels")
        at_least = {"batch": 1, "attack_steps": 1, "replays": 1, "samples": 1, "test_steps": 1, "test_restarts": 1}
        at_least |= {"test_batch": 1, "probe": 1, "probe_steps": 1, "lr": -1, "weight_decay": 0, "epochs": 0}
        more = ("train_limit", "eval_limit", "autoattack_limit", "surface", "checkpoint_steps", "workers", "carrier")
        at_least |= dict.fromkeys((*more, "regulariser_warmup", "lambda1", "jitter"), 0)
        at_least |= {k: -1 for k in ("lambda2", "lambda3", "radius_warmup", "noise", "step", "align")}
        for name, low in at_least.items():
            if getattr(self, name) < low or low == -1 and -1 < getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must be at least {max(low, 0)}, not {getattr(self, name)}")
        for name in ("momentum", "zero_share", "peak"):
            value = getattr(self, name)
            if not (0 <= value < 1 or value == -1 and name != "momentum"):
                raise UserError(f"--{name.replace('_', '-')} must lie in [0, 1), not {value}")
        if self.method == "pgd" and self.start == "n":
            raise UserError("--method pgd stays in the eps-ball and starts at rs or v; --start n is for aaer and fgsm")
        if self.method != "aaer" and (self.term, self.group) != ("full", "abnormal"):
            raise UserError(f"--term and --group change the regulariser, which --method {self.method} does not have")
        check_attack(self.autoattack)

    def resolve(self) -> None:
        """Put the published values where -1, 0, auto or nothing was given."""
        svhn, radius = self.dataset == "svhn", f"{255 * self.eps:g}"
        *published, self.published = aaer.lambdas(self.dataset, self.start, self.eps)
        self.lambda2, self.lambda3 = (
            p if g == -1 else g for g, p in zip((self.lambda2, self.lambda3), published[1:], strict=True)
        )
        self.published = self.published and published == [self.lambda1, self.lambda2, self.lambda3]
        shape = aaer.GEOMETRY[self.start]
        wide = svhn and self.method == "fgsm" and self.start == "n" and radius == "12"
        step = {"aaer": shape.step, "fgsm": shape.step, "zerograd": 2.0, "multigrad": 2.0}.get(self.method, 1.0)
        step = (0.5 if self.attack_steps == 2 else 0.25) if self.method == "pgd" else step
        free = self.method == "free"
        small = self.dataset in data.GENERATED or self.dataset == "mnist"
        big = {"tiny-imagenet": "preact18-act", "imagenet100": "resnet18-cosine"}.get(self.dataset, "preact18")
        defaults = {
            "radius_warmup": 5.0 if svhn else 0.0,
            "noise": 3.0 if wide else shape.noise,
            "step": step,
            "zero_share": baselines.ZERO_SHARE.get(self.dataset, 0.35),
            "align": baselines.align_weight(self.dataset, self.eps),
            "lr": 0.04 if free else 0.05 if svhn else 0.2,
            "peak": 0.4 if svhn else 0.5,
        }
        for name, value in defaults.items():
            if getattr(self, name) == -1:
                setattr(self, name, value)
        self.epochs = self.epochs or (12 if free else 15 if svhn else 30)
        self.model = ("preact-small" if small else big) if self.model == "auto" else self.model
        self.published = self.published and self.model == "preact18"
        changed = [
            x for x, own in ((self.term, "full"), (self.group, "abnormal")) if self.method == "aaer" and x != own
        ]
        self.published = self.published and not changed
        self.label = self.label or " ".join([baselines.label(self.method, self.start, self.attack_steps), *changed])
        self.setting = self.setting or f"eps={radius}/255"
        self.out = self.out or default_out(
            self.scale, f"{self.table}-{self.dataset}-{self.label.lower().replace(' ', '-')}-{radius}"
        )

    published = False  # not a field: whether lambda1..3 are the paper's for this data set, start, radius and network


@dataclass
class EvalSettings:
    run: str
    """Run folder written by train.py, or one seed of it (runs/.../seed0)."""
    eps: Number = 0.0
    """Radius; 0: the run's own."""
    steps: int = 0
    """PGD steps of eps/4; 0: as in the run's record."""
    restarts: int = 0
    """PGD restarts; 0: as in the run's record."""
    autoattack: str = ""
    """AutoAttack: standard, or its attacks joined by commas (apgd-ce,square); empty: not run."""
    limit: int = 0
    """First so many images of a fixed random order of the test set; 0: all."""
    batch: int = 500
    """Images a batch."""
    write: bool = False
    """Write what was measured into a record of its own (record-eval.json) beside record.json."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        check_attack(self.autoattack)
        if min(self.steps, self.restarts, self.limit) < 0 or self.batch < 1 or not 0 <= self.eps <= 1:
            raise UserError("--steps, --restarts and --limit must not be negative, --batch at least 1, --eps in [0, 1]")
