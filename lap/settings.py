"""Settings of train.py, eval.py and analyse.py, their ranges, and what the paper prints of them."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from lab.runs import Number, UserError, default_out

import baselines
import data
import lap
import vit

VERSIONS = ("standard", "plus", "rand")
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
NOT_PART_OF_A_RUN = ("out", "data_dir", "device", "download", "dry_run", "workers", "checkpoint_steps")  # may change
SHARE = 0.1  # of a layer's weights is removed in the paper
MethodName = Literal["lap", "fgsm", "pgd", "free", "zerograd", "multigrad", "gradalign"]


def check_attack(version: str) -> None:
    if version and version not in VERSIONS and not set(version.split(",")) <= set(ATTACKS):
        raise UserError(f"--autoattack {version} is unknown; use {', '.join(VERSIONS)} or any of {', '.join(ATTACKS)}")


@dataclass
class Settings:
    method: MethodName = "lap"
    """How images and weights are perturbed; lap is the paper's, fgsm the same without the weight perturbation."""
    start: lap.Start = "r"
    """Start noise of lap, fgsm and pgd: v none, r U(-eps, eps), n U(-2 eps, 2 eps) (paper: all three)."""
    dataset: Literal[tuple(data.KINDS)] = "patches"
    """Data set; patches, carriers, digits and mnist5k need no download."""
    model: Literal[("auto", *vit.NAMES)] = "auto"
    """Network; auto: preact18 (paper), preact18-act on Tiny-ImageNet, resnet18-cosine on ImageNet-100, else small."""
    eps: Number = 8 / 255
    """Radius of the attack, in pixels of [0, 1] (paper: 8, 12, 16, 32 over 255)."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, one after the other; each gives its own weights, order, augmentation and noise (paper: not known)."""

    beta: Number = -1.0
    """lap: size of the weight perturbation relative to the weight; -1: published for start and radius (at 8, 12, 16,
    32/255: v 0.03, 0.058, 0.07, 0.48, r 0.002, 0.03, 0.05, 0.3, n 0.001, 0.002, 0.005, 0.75)."""
    gamma: Number = lap.GAMMA
    """lap: exponent of the layer schedule (paper: 0.3); small: the first layer alone; large: all but the last."""
    variant: lap.Variant = "lap"
    """lap, or one of the ablation: awp (undone after the step), modified-awp (kept, all layers alike), lap-a (a pass
    of its own), lap-r (random direction), lap-linf (sign instead of direction); or a control: lap-uniform (the
    schedule's mean in every layer), lap-reversed (most in the last layer), lap-undone (undone after the step)."""
    weight_direction: Literal["auto", "official", "ascent", "random"] = "auto"
    """official: downhill, as the released code; ascent: its opposite, as AWP; auto: official, ascent for awp."""
    radius_warmup: Number = -1.0
    """Epochs over which step and clamp grow from 0; -1: 5 on SVHN (customary there), else 0."""
    noise: Number = -1.0
    """Start noise over eps; -1: 1 for r, 2 for n (3 for N-FGSM on SVHN at 12/255), 0 for v."""
    step: Number = -1.0
    """Step over eps; -1: r 1.25, n and v 1 (paper), zerograd and multigrad 2, pgd 1/2 for 2 steps, else 1/4."""
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
    """Passes over the data; 0: 30 (paper), SVHN 15; Free-AT 12 with 8 replays."""
    batch: int = 128
    """Images a step over all processes; a smaller last batch is kept (paper: 128)."""
    schedule: Literal["cyclic", "multistep"] = "cyclic"
    """Learning rate: up and down in straight lines with the momentum opposite (paper), or x0.1 at 50 and 75 %."""
    lr: Number = -1.0
    """Highest learning rate; -1: 0.2 (paper), SVHN 0.05, Free-AT 0.04."""
    peak: Number = -1.0
    """cyclic: where the learning rate is highest; -1: 0.5 (paper), SVHN 0.4."""
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
    distortion: int = 0
    """Probe images on which each layer's sensitivity to weight noise is measured after every epoch; 0: none."""
    keep_every: int = 0
    """Keep the weights of every so many epochs for analyse.py (seed<k>/epochs/); 0: only the last."""
    analyse: bool = False
    """After training, remove weights and draw the layers' loss surfaces, as analyse.py does (a record each)."""
    analyse_images: int = 100
    """analyse: images that the loss surfaces are drawn for."""
    removal_limit: int = 0
    """analyse: test images that are attacked after weights were removed; 0: those of the final evaluation."""
    checkpoint_steps: int = 0
    """Steps between checkpoints inside an epoch; 0: only at its end."""
    workers: int = 8
    """Loader processes of ImageNet-100; the other sets lie on the device."""

    table: str = "own"
    """Table of RESULTS.md the records belong to; own: none of them (plan.yaml names the tables of its runs)."""
    setting: str = ""
    """Label inside the table; default eps=<255 eps>/255."""
    label: str = ""
    """Row of the table; default the method's name (R-LAP, PGD-10)."""
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
        more = ("train_limit", "eval_limit", "autoattack_limit", "checkpoint_steps", "workers", "carrier", "gamma")
        at_least |= dict.fromkeys((*more, "distortion", "keep_every", "removal_limit", "jitter"), 0)
        at_least["analyse_images"] = 1
        at_least |= {k: -1 for k in ("beta", "radius_warmup", "noise", "step", "align")}
        for name, low in at_least.items():
            if getattr(self, name) < low or low == -1 and -1 < getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must be at least {max(low, 0)}, not {getattr(self, name)}")
        for name in ("momentum", "zero_share", "peak"):
            value = getattr(self, name)
            if not (0 <= value < 1 or value == -1 and name != "momentum"):
                raise UserError(f"--{name.replace('_', '-')} must lie in [0, 1), not {value}")
        if self.method == "pgd" and self.start == "n":
            raise UserError("--method pgd stays in the eps-ball and starts at r or v; --start n is for lap and fgsm")
        check_attack(self.autoattack)

    def resolve(self) -> None:
        """Put the published values where -1, 0, auto or nothing was given."""
        svhn, radius = self.dataset == "svhn", f"{255 * self.eps:g}"
        beta, published = lap.published_beta(self.start, self.eps)
        self.beta = beta if self.beta == -1 else self.beta
        published = published and (self.beta, self.gamma, self.variant) == (beta, lap.GAMMA, "lap")
        shape = lap.GEOMETRY[self.start]
        wide = svhn and self.start == "n" and radius == "12"
        step = {"lap": shape.step, "fgsm": shape.step, "zerograd": 2.0, "multigrad": 2.0}.get(self.method, 1.0)
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
        own = self.model == "preact18" and self.dataset == "cifar10" and self.weight_direction in ("auto", "official")
        self.published = published and own
        self.label = self.label or baselines.label(self.method, self.start, self.attack_steps, self.variant)
        self.setting = self.setting or f"eps={radius}/255"
        self.out = self.out or default_out(self.scale, f"{self.table}-{self.dataset}-{self.label.lower()}-{radius}")

    def recipe(self) -> lap.Recipe:
        """The variant's recipe, with the direction asked for."""
        found = lap.RECIPES[self.variant]
        way = self.weight_direction
        return found if way == "auto" else dataclasses.replace(found, direction=way)

    published = False  # not a field: whether beta is the paper's for this data set, start, radius and network


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


@dataclass
class AnalyseSettings:
    run: str
    """Run folder written by train.py, or one seed of it (runs/.../seed0)."""
    share: Number = SHARE
    """Share of a layer's weights that is removed (paper: 0.1)."""
    images: int = 100
    """Test images the surfaces are drawn for."""
    points: int = 9
    """Points of a surface along each direction."""
    steps: int = 0
    """PGD steps of eps/4 after a removal; 0: as in the run's record."""
    restarts: int = 0
    """PGD restarts after a removal; 0: as in the run's record."""
    write: bool = False
    """Write what was found into the run's records (table removal and layers), in the place of what train.py found."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        if not 0 < self.share <= 1 or min(self.steps, self.restarts) < 0 or self.images < 1 or self.points < 2:
            raise UserError("--share must lie in (0, 1], --points be at least 2, --images 1, --steps and --restarts 0")
