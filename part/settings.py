"""The settings of train.py and eval.py: what each means, what the paper or its released code has, and which values are
refused."""

from dataclasses import dataclass
from typing import Literal

from lab.runs import SCALES, Number, UserError, default_out

import torch

import data
import models
import pixel_reweighting as pr
from baselines import ARMS

VERSIONS = ("standard", "plus", "rand")
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")


def check_attack(version: str) -> None:
    if version and version not in VERSIONS and not set(version.split(",")) <= set(ATTACKS):
        raise UserError(f"--autoattack {version} is unknown; use {', '.join(VERSIONS)} or any of {', '.join(ATTACKS)}")


@dataclass
class Settings:
    method: tuple[Literal[tuple(ARMS)], ...] = ("at", "part")
    """Arms: a method, or a control of it. *-shuffled, *-inverted: masks permuted in the batch, turned round; *-mean:
    one budget everywhere, the mean of the mask's; *-low: eps_low everywhere; at-<quadrant>: eps_low in that quadrant
    (figure 1)."""
    dataset: Literal[tuple(data.KINDS)] = "glyphs"
    """Data set; glyphs, patches and digits need no download."""
    model: Literal[("auto", *models.NAMES)] = "auto"
    """Network; auto: resnet18 (paper), wrn-34-10 on Tiny-ImageNet (paper), else small."""
    eps: Number = 8 / 255
    """Budget of important pixels, in pixels of [0, 1] (paper: 8/255)."""
    eps_low: Number = -1.0
    """Budget of the others; -1: 7/8 of eps (paper: 7/255), on glyphs, patches and digits 6/8 of it."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, one after the other; each gives its own weights, order, augmentation and noise."""

    cam: pr.Cam = "gradcam"
    """Class activation map; cam is gradcam in closed form, which is used by itself wherever it is exact (paper:
    gradcam)."""
    cam_layer: int = -1
    """Stage of the network whose activations make the map; -1: the last (paper)."""
    mask_rule: pr.Rule = "zscore"
    """Map to mask: zscore, our reading of the paper; jet-rgb, the released code's colours; topfrac, a fixed share."""
    top_fraction: Number = 0.2
    """topfrac: share of the pixels that keep eps."""
    mask_order: Literal["aligned", "released"] = "aligned"
    """aligned: each image has its own mask, made of the image as cropped; released: as in the released code a mask
    belongs to some other image of a shuffled pass."""
    refresh: int = 1
    """Epochs between refreshes of the network whose maps are used (paper: s = 1 and 10); 0: the network in training."""

    attack: Literal["pgd", "mma"] = "pgd"
    """Inner attack of AT and PART (paper: pgd)."""
    steps: int = 0
    """Steps of the inner attack; 0: 10 (paper), on the small sets 5."""
    step: Number = -1.0
    """Step of the inner attack; -1: 2/255, SVHN 1/255 (paper), scaled with eps above 8/255."""
    targets: int = 3
    """mma: wrong classes pursued (paper: 3)."""
    tau: int = -1
    """fat, fat-trades: misclassified points passed before an image stops; -1: grows by one after epochs 50 and 90, for
    fat-trades 30, 50 and 70 (published code)."""
    beta: Number = 6.0
    """Weight of the second term of TRADES and MART (released code: 6)."""
    awp: bool = False
    """Adversarial weight perturbation around the loss of every arm."""
    awp_gamma: Number = -1.0
    """Relative size of the weights' move; -1: 0.01 for AT and FAT, 0.005 for TRADES (published) and the others."""
    awp_warmup: int = -1
    """Epochs without awp; -1: 0, for TRADES and FAT for TRADES 10 (published)."""

    epochs: int = 0
    """Passes over the data, warm-up included; 0: 80 (released code), on the small sets 11."""
    warmup: int = -1
    """Epochs of the plain base method at eps before the arms part; -1: 20 (released code), on the small sets 5."""
    eps_ramp: int = -1
    """Epochs of the warm-up over which eps and step grow from 0; -1: 0 (released code), on the small sets 4."""
    batch: int = 0
    """Images a step over all processes; a smaller last batch is kept; 0: 128 (released code), on the small sets 25."""
    lr: Number = -1.0
    """Learning rate; -1: 0.01 (released code), on the small sets 0.05."""
    lr_drops: tuple[int, ...] = ()
    """Epochs at which the learning rate falls to a tenth; empty: 60 and 90 (released code), on the small sets 5."""
    lr_counter: Literal["released", "total"] = "released"
    """Whether --lr-drops counts from the end of the warm-up (released code: one epoch of 80 is at the lower rate)."""
    momentum: Number = 0.9
    """SGD momentum."""
    weight_decay: Number = -1.0
    """L2 on every parameter; -1: 2e-4, SVHN 3.5e-3 (released code)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Forward and backward pass of training; losses, masks and evaluation stay in fp32."""
    compile: bool = False
    """torch.compile the network."""
    sync_bn: bool = False
    """Batch statistics over all processes (CUDA only); off: each process its own (as in the released code)."""

    train_limit: int = 0
    """Keep a fixed, class-balanced subset of the training images; 0: all."""
    eval_limit: int = 0
    """Test images of the final evaluation; 0: all (paper)."""
    test_eps: Number = 0.0
    """Radius of the final evaluation, the same at every pixel; 0: --eps (the released code has 8/255 always)."""
    test_step: Number = -1.0
    """Step of the final evaluation; -1: that of training (released code)."""
    test_steps: int = 20
    """Steps of PGD and MMA in the final evaluation (paper: 20)."""
    skip_mma: bool = False
    """Leave MMA, three times the cost of PGD, out of the final evaluation (paper: in)."""
    autoattack: str = ""
    """AutoAttack in the final evaluation: standard (paper), or its attacks joined by commas; empty: not run."""
    adaptive: bool = False
    """Attacks that know of the masks in the final evaluation."""
    corruptions: bool = False
    """CIFAR-10-C in the final evaluation."""
    test_batch: int = 500
    """Images a batch in evaluation."""
    probe: int = 200
    """Test images attacked after every epoch, always the same."""
    probe_steps: int = 10
    """PGD steps on the probe."""
    gallery: int = 0
    """Test images kept in the record with their maps and masks, for the pictures."""
    gallery_epochs: tuple[int, ...] = ()
    """Epochs after the warm-up (which counts) whose maps are kept; empty: the last."""
    checkpoint_steps: int = 0
    """Steps between checkpoints inside an epoch; 0: only at its end."""

    check: bool = False
    """Exit with code 1 unless PART gains 1 point of natural accuracy on AT and loses at most 2 of PGD accuracy."""
    table: str = "own"
    """Table of RESULTS.md the records belong to; own: none of them (plan.yaml names the tables of its runs)."""
    setting: str = ""
    """Label inside the table; default eps=<255 eps>/255."""
    tag: str = ""
    """Added to the name of the arms with masks in the tables, e.g. " (s=10)"."""
    scale: Literal[SCALES] = "demo"
    """Goes into the record; changes nothing else."""
    out: str = ""
    """Run folder; default runs/<scale>/<table>-<dataset>-<arms>-<255 eps>."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    download: bool = False
    """Let torchvision fetch CIFAR-10, SVHN or MNIST into the data folder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dry_run: bool = False
    """Print the data and what would be trained, then stop."""

    @property
    def final_attacks(self) -> tuple[str, ...]:
        """The attacks at uniform eps of the final evaluation."""
        return ("pgd",) if self.skip_mma else ("pgd", "mma")

    def check_values(self) -> None:
        """Raise UserError for a value outside its range."""
        for name in ("eps", "test_eps"):
            if not 0 <= getattr(self, name) <= 1:
                text = f"--{name.replace('_', '-')} must lie in [0, 1], not {getattr(self, name):g}"
                raise UserError(f"{text}; write 8/255 for eight grey levels")
        at_least = {
            "steps": 0,
            "targets": 1,
            "tau": -1,
            "beta": 0,
            "epochs": 0,
            "batch": 0,
            "weight_decay": -1,
            "lr": -1,
        }
        at_least |= {"train_limit": 0, "eval_limit": 0, "test_steps": 1, "test_batch": 1, "probe": 1, "probe_steps": 1}
        at_least |= {"gallery": 0, "checkpoint_steps": 0, "refresh": 0, "warmup": -1, "awp_warmup": -1, "eps_ramp": -1}
        at_least |= {k: -1 for k in ("eps_low", "step", "test_step", "awp_gamma")}
        for name, low in at_least.items():
            if getattr(self, name) < low or low == -1 and -1 < getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must be at least {max(low, 0)}, not {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"--momentum must lie in [0, 1), not {self.momentum}")
        if not 0 < self.top_fraction <= 1:
            raise UserError(f"--top-fraction must lie in (0, 1], not {self.top_fraction}")
        if self.eps_low > self.eps:
            low, high = 255 * self.eps_low, 255 * self.eps
            raise UserError(f"--eps-low ({low:g}/255) must not be above --eps ({high:g}/255): it is the smaller budget")
        if not self.method or len(set(self.method)) < len(self.method):
            raise UserError("--method takes one or more different arms")
        if self.attack == "mma" and any(ARMS[m].base != "at" for m in self.method):
            raise UserError("--attack mma is for AT and PART; TRADES, MART and FAT have attacks of their own")
        if any(d < 1 for d in self.lr_drops):
            raise UserError("--lr-drops are epochs from 1 on")
        if self.check and not {"at", "part"} <= set(self.method):
            raise UserError("--check compares the arms at and part; name both in --method")
        if self.corruptions and self.dataset != "cifar10":
            raise UserError(f"--corruptions is for --dataset cifar10, not {self.dataset}")
        check_attack(self.autoattack)

    def resolve(self) -> None:
        """Put the published values where -1, 0, auto or nothing was given."""
        small, svhn = self.dataset in data.WHEEL or self.dataset == "mnist", self.dataset == "svhn"
        grow = max(self.eps * 255 / 8, 1.0)  # the published steps go with 8/255
        defaults = {
            "eps_low": self.eps * (6 / 8 if small else 7 / 8),
            "step": (1 if svhn else 2) / 255 * grow,
            "lr": 0.05 if small else 0.01,
            "weight_decay": 3.5e-3 if svhn else 2e-4,
            "warmup": 5 if small else 20,
        }
        for name, value in defaults.items():
            if getattr(self, name) == -1:
                setattr(self, name, value)
        self.test_step = self.step if self.test_step == -1 else self.test_step
        self.test_eps = self.test_eps or self.eps
        self.lr_drops = self.lr_drops or ((5,) if small else (60, 90))
        self.steps = self.steps or (5 if small else 10)
        self.epochs = self.epochs or (11 if small else 80)
        self.batch = self.batch or (25 if small else 128)
        self.eps_ramp = min(4 if small else 0, self.warmup) if self.eps_ramp == -1 else self.eps_ramp
        if self.eps_ramp > self.warmup:
            raise UserError(
                f"--eps-ramp {self.eps_ramp} must end within --warmup {self.warmup}: all arms train at full eps"
            )
        outside = [e for e in self.gallery_epochs if not self.warmup < e <= self.epochs]
        if outside or self.gallery_epochs and not self.gallery:
            raise UserError(
                f"--gallery-epochs are epochs of the arms, {self.warmup + 1} to {self.epochs}, with --gallery images"
            )
        if self.warmup >= self.epochs:
            raise UserError(f"--warmup {self.warmup} leaves no epoch of --epochs {self.epochs} to the arms")
        if self.model == "auto":
            self.model = "small" if small else "wrn-34-10" if self.dataset == "tiny-imagenet" else "resnet18"
        with torch.device("meta"):  # only to be counted: no weights are drawn
            stages = len(models.build(self.model, 2, 3).stages)
        if not -stages <= self.cam_layer < stages:
            raise UserError(f"--cam-layer {self.cam_layer}: {self.model} has stages 0 to {stages - 1}, -1 is the last")
        if self.cam == "cam" and (self.cam_layer % stages != stages - 1 or self.model.startswith("wrn")):
            raise UserError("--cam cam needs a last stage that is averaged and classified; use --cam gradcam")
        radius = f"{255 * self.eps:g}"
        self.setting = self.setting or f"eps={radius}/255"
        arms = "-".join(self.method) + "-awp" * self.awp
        self.out = self.out or default_out(self.scale, f"{self.table}-{self.dataset}-{arms}-{radius}")

    def label(self, arm: str) -> str:
        return ARMS[arm].label + "-AWP" * self.awp + (self.tag if ARMS[arm].region != "everywhere" else "")


@dataclass
class EvalSettings:
    run: str
    """Run folder written by train.py, or one seed of it (runs/.../seed0)."""
    arm: str = ""
    """Only this arm (part, at, ...); empty: all of the run."""
    eps: Number = 0.0
    """Radius of the attacks, the same at every pixel; 0: the run's --test-eps."""
    steps: int = 0
    """Steps of PGD and MMA; 0: as in the run's record."""
    autoattack: str = ""
    """AutoAttack: standard, or its attacks joined by commas (apgd-ce,square); empty: not run."""
    adaptive: bool = False
    """PGD and MMA with 20 to 100 steps, both with budgets from the victim's own maps, and the worst of all."""
    corruptions: bool = False
    """Mean accuracy on CIFAR-10-C, 15 corruptions of 5 severities (runs on CIFAR-10)."""
    limit: int = 0
    """First so many images of a fixed random order of the test set; 0: all."""
    batch: int = 500
    """Images a batch."""
    write: bool = False
    """Write what was measured into a record of its own (record-<arm>-eval.json) and every image's outcome beside it."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def check_values(self) -> None:
        """Raise UserError for a value outside its range."""
        check_attack(self.autoattack)
        if min(self.steps, self.limit) < 0 or self.batch < 1 or not 0 <= self.eps <= 1:
            raise UserError("--steps and --limit must not be negative, --batch at least 1, --eps in [0, 1]")
