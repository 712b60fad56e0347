"""Interactive rounds with a simulated user, scored: J, F, area under the curve, J&F at 60 s, seconds a round.

    python eval.py --videos occluder pair --seeds 0 1               # procedural videos, GrabCut, no data or weights
    python eval.py --dataset davis2016 --method full --data-dir /data
    python eval.py --dataset davis2016 --segmenter vit_h --weights sam_vit_h_4b8939.pth --interaction scribble
    --rounds 8
    python eval.py --dataset mose --split train --method points     # for comparison: points alone

Nothing is trained. A video that is done is kept: the same command goes on where it was stopped.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from lab import runs
from lab.runs import UserError

import cv2
import numpy as np
import torch
from tqdm import tqdm

import data
import export
import metrics
import prompts
import robot
import segmenters
import trackers
from session import METHODS, Session


@dataclass
class Pipeline:
    """Settings of the pipeline, shared with demo.py."""

    method: str = "full"
    """full (points, box, filter, memory), points+box, box, points, newest (memory of the newest interaction only),
    copy, points+filter, points+memory, reinit, blend, all, sam-pt, sam-pt-reinit."""
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
    tau: runs.Number = 0.07
    """Memory: temperature."""
    sigma: runs.Number = 8.0
    """Memory: spread of the displacement in cells; 0: none."""
    decay: runs.Number = 1.0
    """Memory: cost of the whole length of the video (lambda)."""
    top: int = 32
    """Memory: scores kept for a cell."""
    longest: int = 0
    """Longest side of the frames in pixels; 0: as they are (480p for DAVIS)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def check_pipeline(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"--method {self.method}: use one of {', '.join(METHODS)}")
        if self.segmenter not in segmenters.NAMES:
            raise UserError(f"--segmenter {self.segmenter}: use one of {', '.join(segmenters.NAMES)}")
        if self.selection and self.selection not in prompts.SELECTIONS:
            raise UserError(f"--selection {self.selection}: use one of {', '.join(prompts.SELECTIONS)}")
        for key, least in {"positives": -1, "negatives": -1, "refine": -1, "longest": 0, "side": 16, "top": 1}.items():
            if getattr(self, key) < least:
                raise UserError(f"--{key} must be at least {least}, not {getattr(self, key)}")
        if self.positives == 0 and METHODS[self.method].points:
            raise UserError("--positives 0 leaves nothing to track; use --method box")
        if self.tau <= 0 or self.sigma < 0 or self.decay < 0:
            raise UserError("--tau must be above 0, --sigma and --decay must not be negative")

    def find_weights(self, folder: str) -> None:
        """Weights are looked for as given, then below the data folder."""
        for key in ("weights", "tracker_weights"):
            given = getattr(self, key)
            if given and not Path(given).expanduser().is_file():
                below = runs.data_dir(folder) / given
                if below.is_file():
                    setattr(self, key, str(below))

    def build(self):
        """(method, segmenter, point tracker, maker of box trackers)."""
        m = METHODS[self.method]
        changed = {k: getattr(self, k) for k in ("positives", "negatives", "refine") if getattr(self, k) >= 0}
        if self.selection:
            changed["selection"] = self.selection
        if m.memory is not None:
            memory = replace(m.memory, tau=self.tau, decay=self.decay, top=self.top)
            spread = (
                {"sigma": self.sigma, "window": 2 * self.sigma} if self.sigma else {"sigma": np.inf, "window": np.inf}
            )
            changed["memory"] = replace(memory, **spread)
        device = runs.device(self.device)
        torch.backends.cuda.matmul.allow_tf32 = True
        segmenter = segmenters.build(self.segmenter, self.weights, device, side=self.side)
        tracker = trackers.point_tracker(self.tracker, self.tracker_weights, self.tracker_repo, device)
        return replace(m, **changed), segmenter, tracker, lambda: trackers.box_tracker(self.box_tracker)


@dataclass
class Settings(Pipeline):
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
    timeout: runs.Number = 240.0
    """Seconds for each object, to which the area under the curve goes (DAVIS: 30 s x 8 interactions)."""
    save_masks: bool = False
    """Also write the masks after the last round as palette PNG to seed<k>/masks/<video>/."""
    table: str = "own"
    """Table of RESULTS.md the records belong to; runs started by hand stand in none."""
    scale: str = "demo"
    """smoke, demo or paper; goes into the record and the run folder, changes nothing else."""
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
            **{"dataset": ("drawn", *data.READERS), "interaction": robot.KINDS, "scale": runs.SCALES},
            "split": ("train", "val", "valid", "test"),
        }.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"--{key} {getattr(self, key)}: use one of {', '.join(allowed)}")
        if self.rounds < 1 or self.clicks < 1 or self.frames < 0 or self.timeout <= 0:
            raise UserError("--rounds and --clicks must be at least 1, --frames not negative, --timeout above 0")
        if self.human_scribbles and (self.interaction != "scribble" or not self.dataset.startswith("davis")):
            raise UserError("--human-scribbles goes with --interaction scribble and a DAVIS data set")
        if len(set(self.videos)) != len(self.videos):
            raise UserError("--videos names a video twice")
        if self.dataset == "drawn":
            odd = [v for v in self.videos if v not in data.DRAWN]
            if odd:
                raise UserError(f"no procedural video {odd[0]}; use one of {', '.join(data.DRAWN)}")


def opening(s: Settings, video: data.Video, rng, lines: tuple[int, list[dict]] | None) -> dict[int, dict]:
    """Round 1, interactions by frame: a person's scribbles; masks, each object's on the frame on which it first appears
    (semi-supervised protocol; those that come later are absent there); else the robot's on the frame where the objects
    are largest."""
    if lines is not None:
        t, drawn = lines
        if t >= len(video.frames):
            raise UserError(f"{video.name}: the scribbles are on frame {t}, only {len(video.frames)} frames are used")
        return {t: prompts.from_scribbles(drawn, video.frames[t].shape[:2], video.objects, 16, rng)}
    if s.interaction == "mask":
        return {
            t: robot.give("mask", video.truth[t], None, tuple(o for o in video.objects if video.first[o] >= t), rng)
            for t in sorted(set(video.first.values()))
        }
    t = robot.first_frame(video.truth, video.objects)
    return {t: robot.give(s.interaction, video.truth[t], None, video.objects, rng, s.clicks)}


def play(
    s: Settings, video: data.Video, seed: int, parts, progress=None, lines: tuple[int, list[dict]] | None = None
) -> tuple[dict, list[np.ndarray]]:
    """All rounds on one video: metrics and the last label maps. `lines`: frame and scribbles of a person to begin
    with; that frame may come back, as in the DAVIS protocol."""
    method, segmenter, tracker, box_tracker = parts
    if not video.scored and len(video.frames) > 1:
        raise UserError(
            f"{video.name}: the masks of this split are not public beyond the first of each object, so no robot can "
            "correct it and nothing can be scored; use a split with full masks (--split train)"
        )
    session = Session(video.frames, video.objects, segmenter, tracker, box_tracker, method, seed)
    used: set[int] = set()
    labels, worst, out = None, None, {}
    curve: list[float] = []
    seconds: list[float] = []
    chosen: list[int] = []
    decodes: list[int] = []
    for r in range(1, s.rounds + 1):
        rng = np.random.default_rng([seed, r, 2**31])
        if labels is None:
            given = opening(s, video, rng, lines)
        else:
            given = {worst: robot.give(s.interaction, video.truth[worst], labels[worst], video.objects, rng, s.clicks)}
        chosen += given
        if r > 1 or lines is None:
            used.add(min(given))  # of later first appearances in round 1 only the new objects were given
        began = time.perf_counter()
        for t, one in given.items():
            session.interact(t, one)
        labels = session.labels()
        seconds.append(time.perf_counter() - began)
        scores = metrics.score(labels, video.truth, video.objects)
        j, f = np.nanmean(scores, (0, 1))
        curve.append(float((j + f) / 2))
        decodes.append(session.decoded)
        out |= {f"j_{r}": float(j), f"f_{r}": float(f), f"jf_{r}": curve[-1], f"seconds_{r}": seconds[-1]}
        if r == 1:
            inner = scores[1:-1] if len(scores) > 2 else scores
            out["jf_semi"] = float(np.nanmean(inner)) if np.isfinite(inner).any() else curve[-1]
            first = scores
        if video.hidden and len(scores) > video.hidden[1] + 1:
            out[f"j_after_{r}"] = float(np.nanmean(scores[video.hidden[1] + 1 :, 0, 0]))
        worst = robot.worst_frame(scores, used)
        if progress:
            progress(r, curve[-1])
        if worst is None and r < s.rounds:  # every frame was touched: the answer stays
            for k in range(r + 1, s.rounds + 1):
                out |= {f"{m}_{k}": out[f"{m}_{r}"] for m in ("j", "f", "jf")} | {f"seconds_{k}": 0.0}
                curve.append(curve[-1])
            break
    total = np.cumsum(seconds + [0.0] * (len(curve) - len(seconds))).tolist()
    timeout = s.timeout * len(video.objects)
    out |= {"auc": metrics.auc(total, curve, timeout), "jf_60s": metrics.at(total, curve, 60.0, timeout)}
    out |= {"frames": len(video.frames), "objects": len(video.objects), "decodes": decodes[-1]}
    out["seconds_frame"] = float(sum(seconds) / max(decodes[-1], 1)) if decodes[-1] else 0.0
    out["seconds_encoding"] = session.encoding
    out["interacted"] = chosen
    out["curve_first"] = [round(float(x), 4) for x in np.nan_to_num(first[:, :, 0].mean(1), nan=-1)]
    out["curve_last"] = [round(float(x), 4) for x in np.nan_to_num(scores[:, :, 0].mean(1), nan=-1)]
    return out, labels


def main() -> None:
    s = runs.parse(Settings, __doc__)
    s.check()
    folder = runs.data_dir(s.data_dir)
    names = list(s.videos) or (list(data.DRAWN) if s.dataset == "drawn" else data.names_of(s.dataset, s.split, folder))
    setting = f"{s.interaction}, {s.rounds} rounds" if s.rounds > 1 else f"{s.interaction}, 1 round"
    s.out = s.out or f"runs/{s.scale}/{s.table}-{s.dataset}-{s.interaction}-{s.segmenter}-{s.method}"
    if s.dry_run:
        print(f"{len(names)} videos ({', '.join(names)}), {setting}, method {s.method}, seeds {s.seeds}: {s.out}")
        return
    cv2.setNumThreads(torch.get_num_threads())
    run = runs.Run(Path(s.out), s, ("out", "data_dir", "device", "dry_run"))
    if run.complete:
        print(f"{run.out} is complete; delete it to run again")
        show([runs.read_record(p) for p in sorted(run.out.glob("seed*/record*.json"))], s)
        return
    s.find_weights(s.data_dir)  # after the run has stored the settings as they were given
    parts = s.build()
    device = parts[1].device
    todo = [(seed, name) for seed in s.seeds for name in names]
    bar = tqdm(todo, s.method, disable=None)
    for seed, name in bar:
        path = run.folder(seed) / f"record-{name}.json"
        if path.is_file():
            continue
        bar.set_postfix_str(f"{name}, seed {seed}")
        began = run.seconds()
        video = data.load(s.dataset, name, s.split, folder, s.longest, s.frames, seed)
        lines = data.first_scribbles(s.dataset, name, s.split, folder, seed) if s.human_scribbles else None
        found, labels = play(s, video, seed, parts, lines=lines)
        if s.save_masks:
            export.png(run.folder(seed) / "masks" / name, labels)
        info = {"name": name, "variant": video.variant, "n": len(video.frames), "sha256": video.sha256}
        where = {"table": s.table, "dataset": name, "setting": setting, "method": s.method, "scale": s.scale}
        run.record(
            seed, seconds=run.seconds() - began, data=info, metrics=found, where=where, device=device, suffix=f"-{name}"
        )
    show(run.finish(), s)
    print(f"records in {run.out}")


def show(found: list[dict], s: Settings) -> None:
    """A line a video and their mean, over seeds, and the summary of the DAVIS protocol."""
    need = [f"{k}_{r}" for k in ("jf", "seconds") for r in range(1, s.rounds + 1)] + ["seconds_frame", "objects"]
    for r in found:
        lost = [k for k in need if not isinstance(r["metrics"].get(k), int | float)]
        if lost:
            raise UserError(
                f"the record of {r['dataset']}, seed {r['seed']} lacks {lost[0]}; delete {s.out} and run again"
            )
    names = list(dict.fromkeys(r["dataset"] for r in found))
    for name in [*names, "mean"]:
        mine = [r["metrics"] for r in found if name in (r["dataset"], "mean")]
        if mine:
            jf = "  ".join(f"{np.mean([m[f'jf_{k}'] for m in mine]):.3f}" for k in range(1, s.rounds + 1))
            slow = np.mean([m["seconds_frame"] for m in mine])
            print(f"{name:16s} J&F after each round  {jf}   {slow:.3f} s a frame and object")
    area, sixty = metrics.summary([r["metrics"] for r in found], s.rounds, s.timeout)
    print(f"all together, as DAVIS sums up: AUC-J&F {area:.3f}, J&F@60s {sixty:.3f}")


if __name__ == "__main__":
    runs.command(main)
