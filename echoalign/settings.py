"""What train.py can be told: every option with its default, the published values behind it, and the checks.

`--help` lists what concerns every run. The options of one part stand under it and in a help of their own: `--sd.help`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from lab import runs
from lab.runs import Number, UserError, default_out

import tyro

import features
import methods
import models
import noise as label_noise
import readers
from baselines import promix, semi, single
from generator import stable
from parts import Clip, Cores, Divide, Edit, Net, Pair, Promix, Sd, Transition
from trainer import Learner

# --methods -> (row of the tables, class of the loop)
METHODS: dict[str, tuple[str, type[Learner]]] = {
    "echoalign": ("EchoAlign", methods.Echo),
    "ce": ("CE", Learner),
    "ce-clean": ("CE-clean", Learner),
    "modified-only": ("Modified-only", Learner),
    "selected-only": ("Selected-only", Learner),
    "small-loss": ("small-loss", Learner),
    "gmm": ("GMM on loss", Learner),
    "knn": ("kNN agreement", Learner),
    "cleanlab": ("cleanlab", Learner),
    "clipcleaner": ("CLIPCleaner", Learner),
    "prior-filter": ("filtered by the prior", Learner),
    "pretrain": ("CE on the clean pretraining images", Learner),
    "forward": ("Forward", single.Forward),
    "reweight": ("Reweight", single.Reweight),
    "t-revision": ("T-Revision", single.Revision),
    "ptd": ("PTD", single.Parts),
    "co-teaching": ("Co-teaching", single.CoTeaching),
    "jocor": ("JoCoR", single.JoCoR),
    "elr": ("ELR", single.Elr),
    "cores": ("CORES", single.Cores),
    "dividemix": ("DivideMix", semi.DivideMix),
    "promix": ("ProMix", promix.ProMix),
}
# Released code: threshold of the CLIP similarity by (data set, noise); it belongs to the authors' generator.
PUBLISHED_TAU = {("cifar10", "instance"): "0.52", ("cifar100", "instance"): "0.52", ("cifar10", "random1"): "0.43"}


@dataclass
class Settings:
    methods: tuple[Literal[tuple(METHODS)], ...] = ("ce", "modified-only", "selected-only", "echoalign")
    """Classifiers to train, one after the other; echoalign is the paper's, the others are its baselines."""
    stage: Literal["all", "generator", "modify", "select"] = "all"
    """Stop after training the generator, after modifying the images, after the selection's records; all: go on to the
    classifiers."""
    dataset: Literal[tuple(readers.KINDS)] = "mnist5k"
    """Data set; mnist5k and digits lie inside wheels."""
    noise: Literal[("none", *label_noise.SYNTHETIC, *label_noise.HUMAN, "worst")] = "instance"
    """Label noise: part-dependent (instance), symmetric, pair, asymmetric, or the human labels of CIFAR-10N/100N; worst
    is another word for worse."""
    rate: Number = 0.5
    """Noise rate of the synthetic kinds (paper: 0.3 and 0.5 are known); human labels: the rate given to selectors."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, one after the other; each gives its own split, noise, edits, weights and order (released code: 1)."""
    noise_scale: Literal["unit", "raw"] = "unit"
    """instance: pixels in [0, 1] (released code) or in [0, 255] (Xia et al. 2020)."""
    pretrain: int = 0
    """Clean images taken out of the training part for generator and features; of the wheel sets' own share so many, 0:
    all of it."""
    train_limit: int = 0
    """Keep so many training images at random; 0: all."""
    val_fraction: Number = -1.0
    """Share held out for validation, noisy too and used for nothing; -1: 0.1 (released code), wheel sets 0."""

    generator: Literal["exact", "concat", "controlnet", "sd", "none"] = "exact"
    """EchoMod's generator: closed form on clean images (not of photographs: it would give back the nearest one), small
    diffusion networks trained on them, Stable Diffusion with ControlNet (the paper's kind), or none."""
    strength: Number = -1.0
    """How far an image is noised before it is denoised towards its label, in [0, 1]; 0 returns it. -1: exact 0.1, small
    networks 0.5, sd 0.75 (the paper's: not known)."""
    check: Number = 0.0
    """Stop with exit code 2 if the generator returns the instance, or if fewer than this share of the wrong-labelled
    samples' edited images fit their label; 0: no check."""

    features: Literal["pca", "cnn", "lite0", "clip"] = "pca"
    """Features of the similarity: of clean images (pca, cnn), EfficientNet-Lite0, or CLIP (released code)."""
    pca_width: int = 40
    """pca: components."""
    similarity_size: Literal["full", "small"] = "full"
    """Compare with the modified image at the generator's resolution (released code) or at the data set's."""
    threshold: str = "auto"
    """tau: a number, gmm or otsu (from the similarities alone); auto: the released code's number for sd and clip, else
    gmm."""
    select: Literal["auto", "similarity", "small-loss"] = "auto"
    """Rule; auto: small-loss for symmetric noise, else similarity (released code)."""
    small_loss_epochs: int = 0
    """Warm-up of the small-loss rule; 0: 70 (released code), wheel sets 15."""
    small_loss_ratio: Number = -1.0
    """Share of each class the rule keeps; -1: min(1 - 1.2 rate, 0.9 (1 - rate)) (released code)."""
    judge: Literal["auto", "nearest", "lite0", "clip"] = "auto"
    """Who says what a modified image shows; auto: clip with --features clip, lite0 (a regression on its features of the
    test images) for photographs, else the nearest truly labelled image, pixel by pixel."""

    model: Literal[("auto", *models.NAMES)] = "auto"
    """Classifier; auto: resnet18 (CIFAR-10), resnet34 (CIFAR-100), cnn (wheel sets, MNIST); resnet18-w16: a
    quarter of the width; head: two layers on the fixed features of --features lite0 or clip."""
    epochs: int = 0
    """Epochs; 0: 200 (released code), wheel sets 30."""
    finetune: int = -1
    """Epochs on the selected originals after that; -1: 40 (released code), wheel sets 6."""
    milestones: tuple[int, ...] = ()
    """Epochs at which the rate falls; default: half and three quarters (released code: 100, 150)."""
    lr: Number = 0.1
    """Learning rate of SGD with momentum 0.9 (released code: 0.1); a tenth of it from each milestone on."""
    weight_decay: Number = 1e-4
    """L2 on every parameter (released code: 1e-4)."""
    batch: int = 128
    """Images a step (released code: 128)."""
    modified_set: Literal["all", "unselected"] = "all"
    """Modified images in the training set: all (released code), or those whose original was not kept."""
    weighting: Literal["cross", "equal", "swapped"] = "cross"
    """Loss weights: each group the share of the other one (released code), 1, or its own share."""
    normalise: bool = False
    """Divide the loss by the sum of weights instead of the batch size; not what the released code does."""
    official_eval: bool = False
    """Also measure on cropped and flipped test images, the released code's protocol."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Forward and backward pass; losses stay in fp32 (released code: fp16)."""
    compile: bool = False
    """torch.compile the networks."""

    edit: Edit = field(default_factory=Edit)
    net: Net = field(default_factory=Net)
    sd: Sd = field(default_factory=Sd)
    clip: Clip = field(default_factory=Clip)
    transition: Transition = field(default_factory=Transition)
    pair: Pair = field(default_factory=Pair)
    cores: Cores = field(default_factory=Cores)
    divide: Divide = field(default_factory=Divide)
    promix: Promix = field(default_factory=Promix)

    eval_every: int = 0
    """Epochs between evaluations; 0: 5, wheel sets 10; the last ones are always measured."""
    eval_last: int = 10
    """So many last epochs are measured each."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    table: str = "own"
    """Table of RESULTS.md the records belong to; own: none of them (plan.yaml names the tables of its runs)."""
    setting: str = ""
    """Label inside the table; default the noise and its rate."""
    label: str = ""
    """Row of the table, for a run of a single method; default the method's name."""
    scale: Literal["smoke", "demo", "real", "paper"] = "demo"
    """Goes into the record; changes nothing else."""
    out: str = ""
    """Run folder; default runs/<scale>/<table>-<dataset>-<noise>-<rate>."""
    cache: str = ""
    """Noise files, generators, modified images and features; default ./data/cache."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    download: bool = False
    """Let torchvision, diffusers and open_clip fetch what is missing."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dry_run: bool = False
    """Print the data and what would be done, then stop."""

    def check_values(self) -> None:
        """Raise UserError for a value outside its range."""
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise UserError("--methods takes one or more different methods")
        if self.label and len(self.methods) > 1:
            raise UserError("--label names the row of one method; give one --methods")
        if not 0 <= self.rate < 1:
            raise UserError(f"--rate must lie in [0, 1), not {self.rate:g}")
        for name, low in AT_LEAST.items():
            if self.value(name) < low:
                raise UserError(f"{option(name)} must be at least {max(low, 0)}, not {self.value(name)}")
        for name in (*SHARES, *OR_DEFAULT):
            v = self.value(name)
            if not (0 <= v <= 1 or v == -1 and name in OR_DEFAULT):
                raise UserError(f"{option(name)} must lie in [0, 1], not {v:g}")
        control = self.edit.control
        if self.generator in ("concat", "controlnet", "exact") and control in stable.CONTROLNETS:
            raise UserError(f"--edit.control {', '.join(stable.CONTROLNETS)} belong to --generator sd")
        if self.generator == "sd" and control in ("ink", "box"):
            raise UserError(
                f"--edit.control ink and box belong to the small networks; use {', '.join(stable.CONTROLNETS)} or none"
            )
        if self.model == "head" and self.features not in features.READY:
            raise UserError(f"--model head reads the features of a network: --features {' or '.join(features.READY)}")
        if self.threshold not in ("auto", "gmm", "otsu"):
            try:
                ok = -1 <= float(self.threshold) <= 1
            except ValueError:
                ok = False
            if not ok:
                raise UserError(
                    f"--threshold {self.threshold} is no cosine in [-1, 1]; give a number, auto, gmm or otsu"
                )
        if not 0 <= self.transition.percentile <= 100:
            raise UserError(f"--transition.percentile must lie in [0, 100], not {self.transition.percentile:g}")
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            raise UserError("--milestones must be rising epoch numbers from 1 on")
        if "{name}" not in self.sd.prompt:
            raise UserError("--sd.prompt must contain {name}, the class")

    def value(self, name: str):
        """Of `lr` or `pair.lr`."""
        part, _, last = name.rpartition(".")
        return getattr(getattr(self, part) if part else self, last)

    def resolve(self) -> None:
        """Put the published values where -1, 0, auto or nothing was given."""
        sd, small = self.generator == "sd", self.dataset in readers.WHEEL
        wide = readers.KINDS[self.dataset].classes > 10
        self.noise = "worse" if self.noise == "worst" else self.noise
        edit = self.edit
        for part, name, value in (
            (self, "strength", 0.75 if sd else 0.1 if self.generator == "exact" else 0.5),
            (self, "val_fraction", 0.0 if small else 0.1),
            (self, "finetune", 6 if small else 40),
            (edit, "guidance", 9.0 if sd else 2.0),
            (edit, "control_scale", 1.0 if sd else 0.5),
            (edit, "control_end", 1.0 if sd else 0.5),
        ):
            if getattr(part, name) == -1:
                setattr(part, name, value)
        edit.steps = edit.steps or (20 if sd else 10)
        edit.control = ("canny" if sd else "ink") if edit.control == "auto" else edit.control
        self.epochs = self.epochs or (30 if small else 200)
        self.milestones = self.milestones or (self.epochs // 2, self.epochs * 3 // 4)
        self.small_loss_epochs = self.small_loss_epochs or (15 if small else 70)
        for part in (self.cores, self.divide, self.promix):
            part.warmup = part.warmup or (5 if small else 30 if wide else 10)
        self.eval_every = self.eval_every or (10 if small else 5)
        self.transition.estimate_epochs = self.transition.estimate_epochs or max(1, self.epochs // 10)
        self.transition.revise_epochs = self.transition.revise_epochs or max(1, self.epochs // 4)
        by_data = {"cifar100": "resnet34", "mnist": "cnn"}
        auto = "cnn" if small else by_data.get(self.dataset, "resnet18")
        self.model = auto if self.model == "auto" else self.model
        if self.judge == "auto":
            photographs = self.dataset in readers.PHOTOGRAPHS
            self.judge = "clip" if self.features == "clip" else "lite0" if photographs else "nearest"
        if self.threshold == "auto":
            published = PUBLISHED_TAU.get((self.dataset, self.noise), "gmm")
            self.threshold = published if sd and self.features == "clip" else "gmm"
        place = f"{self.noise} {self.rate:g}" if self.noise in label_noise.SYNTHETIC else self.noise
        self.setting = self.setting or place
        name = place.replace(" ", "-")
        self.out = self.out or default_out(self.scale, f"{self.table}-{self.dataset}-{name}")


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


# Lowest values of the whole and rational numbers, by the option's name.
AT_LEAST: dict[str, float] = {
    **dict.fromkeys(("edit.batch", "edit.shard", "net.steps", "net.batch", "net.layers", "net.checkpoint"), 1),
    **dict.fromkeys(("sd.resolution", "pca_width", "checkpoint_every", "eval_last", "pair.ramp"), 1),
    **dict.fromkeys(("transition.parts", "transition.parts_steps"), 1),
    **dict.fromkeys(("batch", "divide.batch", "promix.batch"), 2),
    **dict.fromkeys(("epochs", "edit.steps", "pretrain", "train_limit", "small_loss_epochs", "eval_every"), 0),
    **dict.fromkeys(("transition.estimate_epochs", "transition.revise_epochs", "promix.ramp", "promix.expand"), 0),
    **dict.fromkeys(("cores.warmup", "divide.warmup", "promix.warmup", "lr", "weight_decay"), 0),
    "finetune": -1,
}
SHARES = ("sd.control_start", "net.control_dropout", "check", "divide.threshold", "promix.rho", "pair.jocor_lambda")
# Shares for which -1 stands for the published value.
OR_DEFAULT = ("strength", "edit.control_end", "val_fraction", "pair.forget_rate", "small_loss_ratio")
OR_DEFAULT += ("promix.tau", "promix.debias")
PARTS = {f.name: f.default_factory for f in dataclasses.fields(Settings) if dataclasses.is_dataclass(f.default_factory)}


def parse(text: str, args: list[str]) -> Settings:
    """Settings of a command line. --help lists the options of all runs, --sd.help those of a part."""
    shown: type = Settings
    for name, kind in PARTS.items():
        if f"--{name}.help" in args:
            shown = dataclasses.make_dataclass("Part", [(name, kind, field(default_factory=kind))])
            text, args = f"Options of train.py under --{name}", ["--help"]
    if shown is Settings and {"-h", "--help"} & set(args):
        hidden = [(n, tyro.conf.Suppress[k], field(default_factory=k)) for n, k in PARTS.items()]
        shown = dataclasses.make_dataclass("Brief", hidden, bases=(Settings,))
        text += "\nOptions of parts:\n\n" + "\n".join(
            f"    --{n + '.help':16s} {first_line(k)}" for n, k in PARTS.items()
        )
    return runs.parse(shown, text, args)


def first_line(kind: type) -> str:
    return (kind.__doc__ or "").splitlines()[0].rstrip(".")


# A run may be started again with other values of these.
IGNORE = ("out", "data_dir", "device", "download", "dry_run", "checkpoint_every", "cache", "check", "methods", "stage")


@dataclass
class EvalSettings:
    run: str = ""
    """Run folder written by train.py, or one seed of it (runs/.../seed0)."""
    images: str = ""
    """In a run's place: a folder of pictures, a folder a class, to be ranked by how well label and picture fit."""
    worst: int = 50
    """--images: pictures on the page."""
    out: str = ""
    """--images: where labels.csv and labels.html go; default runs/images/<name>."""
    taus: tuple[Number, ...] = ()
    """Thresholds to try on the similarities: samples kept, precision, recall."""
    check: Number = 0.0
    """Run the generator's check with this share, as train.py does; 0: no check."""
    official: bool = False
    """Also measure on cropped and flipped test images, the released code's protocol."""
    write: bool = False
    """Write what was measured into records of their own (record-eval-<method>.json, table <table>-eval)."""
    cache: str = ""
    """Noise files, generators and modified images; default the run's."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
