"""A simulated user plays all rounds on a video; metrics, and the printed lines of a run."""

import time

from lab.runs import UserError

import numpy as np

import data
import metrics
import prompts
import robot
from session import Session
from settings import EvalSettings


def opening(s: EvalSettings, video: data.Video, rng, lines: tuple[int, list[dict]] | None) -> dict[int, dict]:
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
    s: EvalSettings, video: data.Video, seed: int, parts, progress=None, lines: tuple[int, list[dict]] | None = None
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
    labels, scores, worst, out = None, None, None, {}
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
        before = None if labels is None else (labels, scores)
        labels = session.labels()
        seconds.append(time.perf_counter() - began)
        scores = metrics.score(labels, video.truth, video.objects, before)
        j, f = np.nanmean(scores, (0, 1))
        curve.append(float((j + f) / 2))
        decodes.append(session.decoded)
        out |= {f"j_{r}": float(j), f"f_{r}": float(f), f"jf_{r}": curve[-1], f"seconds_{r}": seconds[-1]}
        seen = np.array([g is not None and (g > 0).any() for g in video.truth])
        out[f"lost_{r}"] = int((seen & (np.nan_to_num(scores[:, :, 0], nan=1).max(1) == 0)).sum())
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
                out |= {f"{m}_{k}": out[f"{m}_{r}"] for m in ("j", "f", "jf", "lost")} | {f"seconds_{k}": 0.0}
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


def show(found: list[dict], s: EvalSettings) -> None:
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
