"""Settings of train.py and eval.py, their ranges, and what the paper prints of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lab.runs import Number, UserError

import tyro

import scores
from standins import drawn

LEAST_RATE = 1e-8  # a learning rate, decay or chance below it moves no float32 number of these sizes
LEAST_WEIGHT = 1e-6  # a weight of the outlier term below it is lost in the sum


def least(name: str, value: float, bound: float) -> None:
    """UserError for a float that is neither 0 nor large enough to count."""
    if 0 < abs(value) < bound:
        raise UserError(f"--{name} {value:g} is too small to matter; use 0 or at least {bound:g}")


@dataclass
class Settings:
    seeds: tuple[int, ...] = (0,)
    """Seeds; each draws its own pictures, trains its own encoder and picks its own ID and OOD names."""
    steps: int = 400
    """Optimiser steps (our choice, as everything about the stand-in)."""
    batch: int = 256
    """Picture-caption pairs a step."""
    pictures: int = 8192
    """Pictures drawn for training."""
    width: int = 16
    """Channels of the first convolution."""
    lr: Number = 4e-3
    """Peak learning rate of AdamW under a one-cycle schedule."""
    weight_decay: Number = 1e-3
    """Weight decay of AdamW."""
    drop_word: Number = 0.3
    """Chance that a caption leaves out a colour or texture word."""

    classes: int = 40
    """ID classes of the far and fine-grained tasks."""
    per_class: int = 20
    """Test pictures for each ID class (near: four times as many)."""
    labels: int = 100
    """Names asked of the provider (near: 3 for each ID class)."""
    beta: Number = 0.25
    """Weight of the outlier term (paper: 0.25)."""
    table: str = "demo"
    """Table of RESULTS.md the records belong to."""
    scale: Literal["smoke", "demo", "real", "paper"] = "demo"
    """Goes into the record; changes nothing else."""
    out: str = ""
    """Run folder; default runs/<scale>/drawn."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    dry_run: bool = False
    """Print what would be done."""

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        for name in ("steps", "batch", "width", "classes", "per_class", "labels", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.pictures < self.batch or self.batch < 2:
            raise UserError(f"--pictures {self.pictures} must be at least --batch {self.batch}, and that at least 2")
        for name in ("lr", "weight_decay", "drop_word"):
            least(name.replace("_", "-"), getattr(self, name), LEAST_RATE)
        least("beta", self.beta, LEAST_WEIGHT)
        if not 0 <= self.drop_word <= 1 or not 0 <= self.beta or self.lr <= 0 or self.weight_decay < 0:
            raise UserError("--drop-word lies in [0, 1], --beta and --weight-decay are not negative, --lr is positive")
        if 2 * self.classes > len(drawn.concepts()):
            raise UserError(f"--classes is at most {len(drawn.concepts()) // 2}, not {self.classes}")


@dataclass
class EvalSettings:
    table: str = ""
    """A table of the paper (table1 ... table25, figure1, figure7a-c); default: the sets named by --id and --ood."""
    id: str = ""
    """ID set (see data.py) or an ImageFolder whose sub-folders are the class names."""
    ood: tuple[str, ...] = ()
    """OOD sets or folders of images."""
    backbone: str = "clip-vit-b16"
    """clip-vit-b16 (paper), -vit-b32, -vit-l14, clip-rn50, -rn101, -rn50x4, -rn50x16, align, groupvit, altclip; or
    conse-lite0, conse-lite2, whose weights come with the environment (conse.py)."""
    weights: str = ""
    """Folder or file of the weights; default <data-dir>/weights/<backbone>."""
    task: Literal["far", "near", "fine"] = "far"
    """Which envisioned names to use with --id/--ood."""
    labels: str = "own"
    """own: the lists of this project; released: the published lists under <data-dir>/eoe; or a name file. (--images:
    own asks --model, or without one takes the lists of this project.)"""
    llm: str = "gpt-3.5-turbo-16k"
    """released only: whose lists (paper: gpt-3.5-turbo-16k, three runs = seeds 0 1 2)."""
    n: int = 0
    """Names to use, 0: as the table says (paper: 500; near: 3 for each ID class)."""
    beta: Number = scores.BETA
    """Weight of the outlier term (paper: 0.25)."""
    ensemble: bool = False
    """--id/--ood: the five prompt templates of Table 19 instead of one. A table takes what the paper takes."""
    clipn: str = ""
    """Text features of CLIPN's two encoders: a .safetensors file with `yes` and `no` [K, d], or a folder with
    <id set>.safetensors; adds both CLIPN scores. --weights must then be CLIPN's image encoder."""
    max_similarity: Number = 0.0
    """--id/--ood: drop names whose prompt has a higher cosine with an ID prompt; 1 drops none. 0: as the paper and all
    its tables, 0.85 for the near task with ImageNet-20, else 1."""
    dump: bool = False
    """Also write scores-<id>-<ood>.csv: a line an image of the first OOD set with its decision and nearest names."""
    images: str = ""
    """Folder of pictures to score against --classes: writes scores.csv and a picture grid, no record."""
    classes: str = ""
    """--images: the ID names, with commas between them: "cat,dog,garden chair"."""
    envision: Literal["", "near", "far", "fine"] = ""
    """--images: which prompt the envisioned names come from: those of --model, of the file that
    --labels names, or (near) of this project."""
    known: str = ""
    """--images: folder of pictures that are of the classes; flagged is then what scores below 95 % of them. Without:
    what is nearer to an envisioned name than to any class."""
    model: str = ""
    """--images: the language model to ask: a folder for transformers, or its name at --url. Without: the near names of
    this project, where it has some for each class (ImageNet's, CIFAR's)."""
    url: Annotated[str, tyro.conf.arg(aliases=["--base-url"])] = ""
    """--images: address of an OpenAI-compatible server that is asked in place of a local model; its key is taken from
    $OPENAI_API_KEY."""
    study: Literal["", "near", "fine", "far", "davis"] = ""
    """Scale real: CIFAR-10 classes against others of it (near), animals (fine), digits, letters, textures and faces
    (far), or objects of DAVIS; with controls and bootstrap intervals (real/study.py)."""
    splits: int = 20
    """--study near and fine: random splits of the classes into ID and OOD; fine has 20 in all."""
    bootstrap: int = 200
    """--study: replicates of the bootstrap over classes and images; 0: no intervals."""
    draws: int = 3
    """--study: draws of as many irrelevant names, and nouns, as each list has."""
    limit: int = 0
    """--study: at most so many images of each class, alphabet or sequence; 0: all."""
    synthetic: bool = False
    """Tier A of the embedded default: a joint space drawn from a formula."""
    per_class: int = 60
    """--synthetic: images for each class."""
    run: str = ""
    """Evaluate the encoders of this run of train.py again and compare with its records."""
    seeds: tuple[int, ...] = (0,)
    """--synthetic, --study: seeds of the space or the splits. Otherwise which run of the language model (paper: 0 1 2;
    own lists: 0)."""
    scale: Literal["smoke", "demo", "real", "paper"] = "demo"
    """Goes into the record; changes nothing else."""
    out: str = ""
    """Run folder; default runs/<scale>/<table or id>."""
    data_dir: str = ""
    """Folder of the data sets; default $REPRO_DATA, else ./data."""
    download: bool = False
    """Let torchvision, Hugging Face and open_clip fetch what is missing."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    batch: int = 256
    """Images a forward pass."""
    workers: int = 4
    """Processes that decode images; at most one a core."""
    bf16: bool = False
    """bfloat16 autocast in the image encoder (paper: float32); features become float32 before anything else."""
    dry_run: bool = False
    """Print what would be done, without a look at images and weights."""

    def check(self) -> None:
        """Raise UserError for options that exclude each other and values outside their range."""
        ways = {"--table": self.table and not self.synthetic, "--id": self.id or self.ood}
        ways |= {"--synthetic": self.synthetic, "--run": self.run, "--study": self.study, "--images": self.images}
        if len(given := [k for k, v in ways.items() if v]) > 1:
            raise UserError(f"{given[0]} and {given[1]} exclude each other; see --help")
        if self.table == "own":
            raise UserError("--table own is what --id and --ood make; name those, or a table of the paper")
        if self.synthetic and self.table.startswith(("table", "figure", "own")):
            raise UserError(f"--synthetic has no place in {self.table}, which is made of real images")
        if self.table and not self.synthetic and (self.ensemble or self.max_similarity or self.n):
            raise UserError("--ensemble, --max-similarity and --n go with --id and --ood; a table sets them itself")
        one = not (self.synthetic or self.run or self.study)
        if one and self.labels != "released" and self.seeds != (0,):
            raise UserError("only the released lists come from several runs of a model; use --seeds 0")
        least("beta", self.beta, LEAST_WEIGHT)
        least("max-similarity", self.max_similarity, LEAST_WEIGHT)
        if self.beta < 0 or not 0 <= self.max_similarity <= 1:
            raise UserError("--beta must not be negative, --max-similarity lies in [0, 1]")
        for name in ("batch", "per_class", "splits", "draws"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.clipn and not Path(self.clipn).exists():
            raise UserError(f"no CLIPN text features in {self.clipn}; see --help for what the file holds")
        for name in ("n", "workers", "bootstrap", "limit"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must not be negative")
        if self.study and self.labels not in ("own", "released"):
            raise UserError("--study takes --labels own or --labels released; its lists belong to its splits")
        if bool(self.images) != bool(self.classes and self.envision):
            raise UserError("--images, --classes and --envision go together: the pictures, the ID names, the prompt")
        if self.known and not self.images:
            raise UserError("--known goes with --images")
        if self.labels == "released" and self.images:
            raise UserError("--images takes names of --model, or those of a file: --labels my_names.json")
        if not (self.synthetic or self.run or self.table or self.study or self.images or (self.id and self.ood)):
            raise UserError(
                "say what to evaluate: --table, or --id with --ood, or --images with --classes and --envision, or "
                "--study, --synthetic, --run; see --help"
            )
