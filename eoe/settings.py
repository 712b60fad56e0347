"""Settings of train.py and eval.py, their ranges, and what the paper prints of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab.runs import Number, UserError

import drawn
import scores


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

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        for name in ("steps", "batch", "width", "classes", "per_class", "labels", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.pictures < self.batch or self.batch < 2:
            raise UserError(f"--pictures {self.pictures} must be at least --batch {self.batch}, and that at least 2")
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
    """clip-vit-b16 (paper), -vit-b32, -vit-l14, clip-rn50, -rn101, -rn50x4, -rn50x16, align, groupvit or altclip."""
    weights: str = ""
    """Folder or file of the weights; default <data-dir>/weights/<backbone>."""
    task: Literal["far", "near", "fine"] = "far"
    """Which envisioned names to use with --id/--ood."""
    labels: str = "own"
    """own: the lists of this project; released: the published lists under <data-dir>/eoe; or a name file."""
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
    synthetic: bool = False
    """Tier A of the embedded default: a joint space drawn from a formula."""
    per_class: int = 60
    """--synthetic: images for each class."""
    run: str = ""
    """Evaluate the encoders of this run of train.py again and compare with its records."""
    seeds: tuple[int, ...] = (0,)
    """--synthetic: seeds of the space. Otherwise which run of the language model (paper: 0 1 2; own lists: 0)."""
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

    def check(self) -> None:
        """Raise UserError for options that exclude each other and values outside their range."""
        ways = {"--table": self.table and not self.synthetic, "--id": self.id or self.ood}
        ways |= {"--synthetic": self.synthetic, "--run": self.run}
        if len(given := [k for k, v in ways.items() if v]) > 1:
            raise UserError(f"{given[0]} and {given[1]} exclude each other; see --help")
        if self.table == "own":
            raise UserError("--table own is what --id and --ood make; name those, or a table of the paper")
        if self.synthetic and self.table.startswith(("table", "figure", "own")):
            raise UserError(f"--synthetic has no place in {self.table}, which is made of real images")
        if self.table and not self.synthetic and (self.ensemble or self.max_similarity or self.n):
            raise UserError("--ensemble, --max-similarity and --n go with --id and --ood; a table sets them itself")
        if not self.synthetic and not self.run and self.labels != "released" and self.seeds != (0,):
            raise UserError("only the released lists come from several runs of a model; use --seeds 0")
        if self.beta < 0 or not 0 <= self.max_similarity <= 1:
            raise UserError("--beta must not be negative, --max-similarity lies in [0, 1]")
        for name in ("batch", "per_class"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.clipn and not Path(self.clipn).exists():
            raise UserError(f"no CLIPN text features in {self.clipn}; see --help for what the file holds")
        if self.n < 0 or self.workers < 0:
            raise UserError("--n and --workers must not be negative")
        if not (self.synthetic or self.run or self.table or (self.id and self.ood)):
            raise UserError("say what to evaluate: --table, or --id with --ood, or --synthetic, or --run; see --help")
