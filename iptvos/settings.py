"""Settings of the commands and their ranges."""

from dataclasses import dataclass

from lab.runs import SCALES, Number, UserError

import data
import prompts
import robot
from methods import METHODS
from segmenters.interface import NAMES


@dataclass
class Pipeline:
    """Settings of the pipeline, shared by eval.py and demo.py."""

    method: str = "full"
    """full (points, box, filter, memory), points+box, box, points, newest (memory of the newest interaction only),
    memory (no points, no box), readout (no appearance), shuffled (control), copy, points+filter, points+memory, reinit,
    blend, all, sam-pt, sam-pt-reinit."""
    segmenter: str = "grabcut"
    """grabcut (no weights), tiny (train.py), mobile, vit_b, vit_l, vit_h, hq_vit_b, hq_vit_l, hq_vit_h, hq_tiny."""
    weights: str = ""
    """Weights of the segmenter: the published file, or model.safetensors of train.py for tiny."""
    side: int = 144
    """GrabCut: longest side of its crop in pixels."""
    tracker: str = "lk"
    """Points: lk (Lucas-Kanade, no weights), cotracker, pips, tapir (torch.hub)."""
    tracker_weights: str = ""
    """Weights of the point tracker; default: what its hub entry loads."""
    tracker_repo: str = ""
    """Folder with the point tracker's code and hubconf.py; default: its GitHub repository."""
    box_tracker: str = "flow"
    """Box: flow (optical flow and templates, no weights), or module:callable of an OSTrack-like tracker."""
    selection: str = ""
    """Query points: kmedoids, shi-tomasi, random, mixed; default: the method's (kmedoids)."""
    positives: int = -1
    """Positive query points; -1: the method's (16; 8 is usual with PIPS)."""
    negatives: int = -1
    """Negative query points; -1: the method's (1)."""
    refine: int = -1
    """Decoder passes that refine a mask; -1: the method's (0, sam-pt 12)."""
    tau: Number = 0.05
    """Memory: temperature of the similarity."""
    near: Number = 8.0
    """Memory: cells around a tile that are read on the last propagated frames."""
    far: Number = 16.0
    """Memory: cells around a tile that are read on interacted frames."""
    top: int = 0
    """Memory: scores kept for a cell; 0: all."""
    alpha: Number = 0.5
    """Memory: weight of the appearance of object and background; 0: none."""
    beta: Number = 0.3
    """Memory: weight of the tracked points and box; 0: none."""
    longest: int = 0
    """Longest side of the frames in pixels; 0: as they are (480p for DAVIS)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def check_pipeline(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"--method {self.method}: use one of {', '.join(METHODS)}")
        if self.segmenter not in NAMES:
            raise UserError(f"--segmenter {self.segmenter}: use one of {', '.join(NAMES)}")
        if self.selection and self.selection not in prompts.SELECTIONS:
            raise UserError(f"--selection {self.selection}: use one of {', '.join(prompts.SELECTIONS)}")
        for key, least in {"positives": -1, "negatives": -1, "refine": -1, "longest": 0, "side": 16, "top": 0}.items():
            if getattr(self, key) < least:
                raise UserError(f"--{key} must be at least {least}, not {getattr(self, key)}")
        if self.positives == 0 and METHODS[self.method].points:
            raise UserError("--positives 0 leaves nothing to track; use --method box")
        if self.tau < 1e-4 or self.near < 0 or self.far < 0 or min(self.alpha, self.beta) < 0:
            raise UserError("--tau must be at least 1e-4, --near, --far, --alpha and --beta must not be negative")


@dataclass
class EvalSettings(Pipeline):
    dataset: str = "drawn"
    """drawn (procedural), davis2016, davis2017, youtube-vos, mose."""
    split: str = "val"
    """Split of the data set; YouTube-VOS and MOSE can be scored on train only (their val masks are not public)."""
    videos: tuple[str, ...] = ()
    """Sequences; default: all of the split, or every kind of procedural video."""
    frames: int = 0
    """Frames of a video that are used, from the first; 0: all. Procedural: its length, 0: 40."""
    interaction: str = "mask"
    """What the user gives: mask, scribble, click, box."""
    human_scribbles: bool = False
    """DAVIS: the first scribbles are a person's, out of Scribbles/<video>/; set 1 to 3 by --seeds 1 2 3."""
    clicks: int = 1
    """Clicks for each object and round."""
    rounds: int = 3
    """Interactions (DAVIS robot: 8)."""
    timeout: Number = 240.0
    """Seconds for each object, to which the area under the curve goes (DAVIS: 30 s x 8 interactions)."""
    save_masks: bool = False
    """Also write the masks after the last round as palette PNG to seed<k>/masks/<video>/."""
    table: str = "own"
    """Table of RESULTS.md the records belong to; runs started by hand stand in none."""
    scale: str = "demo"
    """smoke, demo, real or paper; goes into the record and the run folder, changes nothing else."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the query points, in procedural videos also of the video."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    out: str = ""
    """Run folder."""
    dry_run: bool = False
    """Print what would be done."""

    def check(self) -> None:
        self.check_pipeline()
        for key, allowed in {
            **{"dataset": ("drawn", *data.READERS), "interaction": robot.KINDS, "scale": SCALES},
            "split": ("train", "val", "valid", "test"),
        }.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"--{key} {getattr(self, key)}: use one of {', '.join(allowed)}")
        if self.rounds < 1 or self.clicks < 1 or self.frames < 0 or self.timeout < 1:
            raise UserError("--rounds, --clicks and --timeout must be at least 1, --frames not negative")
        if self.human_scribbles and (self.interaction != "scribble" or not self.dataset.startswith("davis")):
            raise UserError("--human-scribbles goes with --interaction scribble and a DAVIS data set")
        if len(set(self.videos)) != len(self.videos):
            raise UserError("--videos names a video twice")
        if self.dataset == "drawn":
            odd = [v for v in self.videos if v not in data.DRAWN]
            if odd:
                raise UserError(f"no procedural video {odd[0]}; use one of {', '.join(data.DRAWN)}")


@dataclass
class TrainSettings:
    steps: int = 2000
    """Optimiser steps."""
    batch: int = 8
    """Pictures a step."""
    lr: Number = 1e-3
    """Peak learning rate of AdamW; linear warm-up over a twentieth of the steps, then a cosine to 0."""
    weight_decay: Number = 0.01
    """Of AdamW."""
    clip: Number = 1.0
    """Largest gradient norm."""
    test: int = 100
    """Held-out pictures of the final measurement."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights and of the pictures (streams of their own)."""
    table: str = "own"
    """Table of RESULTS.md the records belong to; runs started by hand stand in none."""
    scale: str = "demo"
    """smoke, demo, real or paper; goes into the record and the run folder, changes nothing else."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: str = ""
    """Run folder."""
    dry_run: bool = False
    """Print what would be done."""

    def check(self) -> None:
        for key in ("steps", "batch", "test", "checkpoint_every", "log_every"):
            if getattr(self, key) < 1:
                raise UserError(f"--{key.replace('_', '-')} must be at least 1, not {getattr(self, key)}")
        if self.lr < 1e-12 or self.weight_decay < 0 or self.clip < 1e-12:  # less moves no float32 weight
            raise UserError("--lr and --clip must be at least 1e-12, --weight-decay must not be negative")
        if self.scale not in SCALES:
            raise UserError(f"--scale {self.scale}: use one of {', '.join(SCALES)}")


@dataclass
class PageSettings(Pipeline):
    video: str = ""
    """Video file or folder of pictures; default: a procedural video with two objects."""
    limit: int = 300
    """Frames that are read; 0: all. Frames and embeddings of the whole video are kept in memory."""
    objects: int = 3
    """Objects that can be marked, 1 to 9."""
    masks: str = ""
    """Folder of PNG masks to begin with, each named as its frame (00000.png ... of a video file)."""
    workspace: str = ""
    """Folder in which the work is kept after each round, and taken up again."""
    fps: float = 24.0
    """Frames a second of the exported video."""
    interactions: str = ""
    """JSON file of rounds; with --export no page is opened."""
    export: str = ""
    """Folder for masks (PNG), overlay.mp4 and masks.json (COCO RLE)."""
    host: str = "127.0.0.1"
    """Address of the page."""
    port: int = 7860
    """Port of the page."""
    data_dir: str = ""
    """Folder in which weights are looked for too; default $REPRO_DATA, else ./data."""

    def check(self) -> None:
        self.check_pipeline()
        if not 1 <= self.objects <= 9 or not 1 <= self.port <= 65535 or self.fps < 0.1 or self.limit < 0:
            raise UserError("--objects is 1 to 9, --port 1 to 65535, --fps at least 0.1, --limit not negative")
        if bool(self.interactions) != bool(self.export):
            raise UserError("--interactions and --export belong together: without them a page is opened")
