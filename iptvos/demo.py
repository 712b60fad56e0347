"""A page on which a person segments a video: click, propagate, correct a frame, export. No weights to fetch.

    python demo.py --video clip.mp4                       # opens on http://127.0.0.1:7860
    python demo.py                                        # a procedural video
    python demo.py --video frames/ --workspace work       # kept in work/ after each round, and taken up again
    python demo.py --video frames/ --masks masks/         # begins with masks that are there: PNGs named as the frames
    python demo.py --video clip.mp4 --segmenter mobile --weights mobile_sam.pt
    python demo.py --video clip.mp4 --interactions given.json --export out   # no page: masks and video to out/

An interaction file is a list of rounds, in pixels of the frame, scribbles as in the DAVIS files:

    [{"frame": 0, "objects": {"1": {"points": [[x, y]], "labels": [1], "box": [x1, y1, x2, y2]}},
      "scribbles": [{"path": [[x, y] in 0..1], "object_id": 1}]}]
"""

import dataclasses
import threading
from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import cv2
import numpy as np

import data
import export
import page
import pipeline
import prompts
import workspace
from prompts import Interaction
from session import Session
from settings import PageSettings, Pipeline

SURE, BAD = (60, 170, 60), (220, 40, 40)  # colours of a confidence of 1 and of 0


class Stopped(Exception):
    """A propagation that the user has cancelled."""


class Project:
    """A video and the parts that all sessions on it share."""

    def __init__(self, s: PageSettings, video: data.Video):
        self.s, self.video, self.lock, self.cache = s, video, threading.Lock(), {}
        self.method, self.segmenter, self.tracker, self.boxes = pipeline.build(s)
        self.sha = workspace.checksum(video.frames) if s.workspace else ""
        own = {f.name for f in dataclasses.fields(Pipeline)} - {"device", "longest"}
        self.settings = {k: getattr(s, k) for k in sorted(own)}

    def session(self, ids: tuple[int, ...]) -> Session:
        parts = self.segmenter, self.tracker, self.boxes, self.method
        return Session(self.video.frames, ids, *parts, cache=self.cache)

    def told(self) -> str:
        """What the page says at its top."""
        s, n = self.s, len(self.video.frames)
        parts = "GrabCut and the features of EfficientNet-Lite0 (in the environment, no weights to fetch)"
        if s.segmenter != "grabcut":
            parts = f"{s.segmenter} with the weights of {s.weights}"
        cut = f" **Only the first {n} frames were read** (`--limit`)." if self.video.variant.startswith("first") else ""
        return (
            f"**{self.video.name}**, {n} frames, {parts}.{cut} Click on the object or drag a box around it; one more "
            "click inside or outside says how large it is. Propagate, go to a frame that is wrong, correct it, again."
        )


class App:
    """The state behind a tab of the page: one session, the clicks that wait for the next round, what can be undone."""

    def __init__(self, project: Project, ids: tuple[int, ...] = ()):
        self.project, self.video, self.lock = project, project.video, project.lock
        self.ids = ids or tuple(range(1, project.s.objects + 1))
        self.folder = Path(project.s.workspace).expanduser() if project.s.workspace else None
        self.reset()

    def reset(self) -> None:
        self.session = self.project.session(self.ids)
        self.waiting: dict[int, dict[int, dict]] = {}  # frame -> object -> points, labels, box, marks in their order
        self.corner: tuple[float, float] | None = None
        self.labels: list[np.ndarray] | None = None
        self.rounds: list[tuple] = []  # the session before each round
        self.stopping = False

    def restart(self) -> None:
        """Forget all rounds, those that the workspace keeps, too."""
        with self.lock:
            self.reset()
            if self.folder is not None:
                workspace.forget(self.folder)

    # ------------------------------------------------------------------------------------------------------- marks

    def mark(self, t: int, o: int, way: int, x: float, y: float) -> str:
        """A click of the user, in pixels of the frame; `way` is the place of its meaning in page.WAYS."""
        one = self.waiting.setdefault(t, {}).setdefault(o, {"points": [], "labels": [], "box": None, "marks": []})
        if way == 2:
            if self.corner is None:
                self.corner = (x, y)
                return f"Frame {t}: first corner of a box, object {o}. Click on the opposite one."
            a, b = np.minimum(self.corner, (x, y)), np.maximum(self.corner, (x, y))
            one["box"], self.corner = [*a, *b], None
            one["marks"].append("box")
        else:
            one["points"].append([x, y])
            one["labels"].append(int(way == 0))
            one["marks"].append("point")
        self.waiting[t] = {o: one} | self.waiting[t]  # the object marked last comes first
        return f"Frame {t}: {page.WAYS[way]}, object {o}. Propagate when all is marked."

    def drag(self, t: int, o: int, text: str) -> str:
        """A drag on the page, "x y x y time" in pixels of the frame, marks a box; what the status says of it."""
        h, w = self.video.frames[t].shape[:2]
        try:
            x1, y1, x2, y2 = (float(v) for v in text.split()[:4])
        except ValueError:
            return "That was no box."
        xs = sorted(min(max(v, 0.0), w - 1.0) for v in (x1, x2))
        ys = sorted(min(max(v, 0.0), h - 1.0) for v in (y1, y2))
        if not all(a < b for a, b in (xs, ys)):
            return "That box has no area."
        self.corner = None
        self.mark(t, o, 2, xs[0], ys[0])
        self.mark(t, o, 2, xs[1], ys[1])
        told = f"box {xs[0]:.0f} {ys[0]:.0f} to {xs[1]:.0f} {ys[1]:.0f}, object {o}"
        return f"Frame {t}: {told}. Propagate when all is marked."

    def undo(self, t: int) -> str:
        """Take back the last mark of a frame."""
        if self.corner is not None:
            self.corner = None
            return "The first corner is taken back."
        for one in self.waiting.get(t, {}).values():
            if one["marks"]:
                if one["marks"].pop() == "box":
                    one["box"] = None
                else:
                    one["points"].pop()
                    one["labels"].pop()
                return f"The last mark of frame {t} is taken back."
        return f"Nothing is marked on frame {t}."

    def ready(self, t: int) -> dict[int, Interaction]:
        given = self.waiting.get(t, {})
        return {o: interaction(one) for o, one in given.items() if one["points"] or one["box"]}

    # ------------------------------------------------------------------------------------------------------ rounds

    def propagate(self, t: int, progress=None, span: tuple[int, int] | None = None) -> str:
        """One round from frame t, which changes the frames of `span` alone."""
        if span is not None and not span[0] <= t <= span[1]:
            return f"Frame {t} lies outside of frames {span[0]} to {span[1]}."
        self.stopping = False  # before the lock: who waits for another tab's round can cancel, too
        with self.lock:
            given = self.ready(t)
            if not given:
                return f"Click on frame {t} first: nothing is marked there."
            before = self.session.kept()

            def step(k: int, n: int) -> None:
                if self.stopping:
                    raise Stopped
                if progress:
                    progress(k, n)

            self.session.progress, self.session.span = step, span
            try:
                seconds = self.session.interact(t, given)
            except Stopped:
                self.session.restore(before)
                return "Cancelled; the marks are still there."
            finally:
                self.session.progress = self.session.span = None
            self.rounds.append(before)
            self.waiting.pop(t, None)
            self.kept()
        found = [o for o in self.ids if any((g == o).any() for g in self.labels)]
        return f"Round {self.session.round}: {seconds:.1f} s, objects {', '.join(map(str, found)) or 'none'}."

    def kept(self) -> None:
        """Masks of all frames as they are now; the workspace keeps them."""
        self.labels = self.session.labels()
        if self.folder is not None:
            workspace.save(self.folder, self.session, self.project.sha, self.project.settings)

    def cancel(self) -> str:
        self.stopping = True
        return "Cancelling ..." if self.lock.locked() else "Nothing is running."

    def back(self) -> str:
        """Take back the last round."""
        with self.lock:
            if not self.rounds:
                return "There is no round to take back."
            self.session.restore(self.rounds.pop())
            self.kept()
        return f"Taken back: {self.session.round} rounds are left."

    def begin(self, masks: dict[int, np.ndarray] | None) -> str:
        """Take up the workspace; else begin with masks that are there (frame -> label map)."""
        if self.folder is not None and workspace.load(
            self.folder, self.session, self.project.sha, self.project.settings
        ):
            self.labels = self.session.labels()
            return f"The work in {self.folder} goes on after round {self.session.round}."
        if masks:
            for t, label in progress(sorted(masks.items()), "masks"):
                self.session.interact(t, {o: Interaction(mask=label == o) for o in self.ids if (label == o).any()})
            self.kept()
            return f"Began with masks of {len(masks)} frames."
        return ""

    # ----------------------------------------------------------------------------------------------------- answers

    def confidence(self) -> np.ndarray:
        """(frames,) the lowest confidence of an object that was marked; 1 on frames that were touched, NaN where
        nothing was answered."""
        states = [s for s in self.session.states.values() if s.exact]
        if not states:
            return np.full(len(self.video.frames), np.nan)
        out = np.full(len(self.video.frames), np.nan)
        for s in states:  # a round over chosen frames leaves the others without an answer
            answered = [t for t, low in enumerate(s.low) if low is not None or t in s.exact or s.iou[t] > 0]
            out[answered] = np.fmin(out[answered], s.iou[answered])
        for s in states:
            for t in s.exact:
                if all(t in other.exact for other in states):
                    out[t] = 1.0
        return np.clip(out, 0, 1)

    def worst(self) -> tuple[int | None, str]:
        """The frame that needs a correction most."""
        sure = self.confidence()
        if not np.isfinite(sure).any():
            return None, "Nothing is segmented yet."
        t = int(np.nanargmin(sure))
        return t, f"Frame {t}: confidence {sure[t]:.2f}, the lowest."

    def strip(self) -> np.ndarray:
        """A picture of the confidences, a column a frame; grey where there is none, blue where the user was."""
        (h, w), sure = page.STRIP, self.confidence()
        colours = np.where(np.isnan(sure)[:, None], 128, np.nan_to_num(sure)[:, None] * SURE)
        colours = np.where(np.isnan(sure)[:, None], 128, colours + (1 - np.nan_to_num(sure))[:, None] * BAD)
        for s in self.session.states.values():
            for t in s.exact:
                colours[t] = (40, 90, 220)
        columns = np.arange(w) * len(sure) // w
        return np.repeat(colours[columns][None], h, 0).astype(np.uint8)

    def picture(self, t: int) -> np.ndarray:
        """Frame t with masks and waiting clicks."""
        image = self.video.frames[t]
        image = image.copy() if self.labels is None else export.overlay(image, self.labels[t])
        r = max(2, max(image.shape) // 120)
        for o, one in self.waiting.get(t, {}).items():
            colour = tuple(int(c) for c in export.COLOURS[o])
            for (x, y), v in zip(one["points"], one["labels"], strict=True):
                cv2.circle(image, (round(x), round(y)), r + 1, (255, 255, 255), -1)
                cv2.circle(image, (round(x), round(y)), r, colour if v else (0, 0, 0), -1)
            if one["box"]:
                x1, y1, x2, y2 = (round(v) for v in one["box"])
                cv2.rectangle(image, (x1, y1), (x2, y2), colour, max(1, r // 2))
        if self.corner is not None:
            cv2.drawMarker(image, tuple(round(v) for v in self.corner), (255, 255, 255), cv2.MARKER_CROSS, 4 * r)
        return image

    def write(self, folder: Path) -> list[Path]:
        """Masks, overlay and RLE of what was found so far."""
        if self.labels is None:
            raise UserError("nothing is segmented yet; mark an object and propagate first")
        export.png(folder / "masks", self.labels, self.video.names)
        export.rle(folder / "masks.json", self.labels, self.ids, self.video.name)
        export.film(folder / "overlay.mp4", self.video.frames, self.labels, self.project.s.fps)
        return [folder / "overlay.mp4", folder / "masks.json"]


def interaction(one: dict) -> Interaction:
    points = np.array(one.get("points") or [], np.float32).reshape(-1, 2)
    labels = np.array(one.get("labels") or [1] * len(points), int)
    box = None if one.get("box") is None else np.array(one["box"], np.float32)
    return Interaction(points=points, labels=labels, box=box)


def read_rounds(path: Path, video: data.Video, positives: int = 16) -> list[tuple[int, dict[int, Interaction]]]:
    """The rounds of an interaction file; UserError names what is wrong."""
    given = runs.read_json(path)
    out = []
    try:
        for number, one in enumerate(given, 1):
            t = int(one["frame"])
            if not 0 <= t < len(video.frames):
                raise UserError(f"{path}, round {number}: frame {t}, the video has {len(video.frames)}")
            found = {int(o): interaction(v) for o, v in one.get("objects", {}).items()}
            for o, v in found.items():
                if not 1 <= o <= 254 or len(v.points) != len(v.labels) or (v.box is not None and v.box.shape != (4,)):
                    raise ValueError(f"object {o}")
                places = v.points if v.box is None else np.concatenate([v.points, v.box.reshape(2, 2)])
                if not ((places >= 0) & (places < video.frames[t].shape[1::-1])).all():  # also false for NaN
                    raise ValueError(f"object {o}: a point or box outside the picture")
                if not np.isin(v.labels, (0, 1)).all() or (v.box is not None and (v.box[:2] > v.box[2:]).any()):
                    raise ValueError(f"object {o}: labels are 0 or 1, a box is x1, y1, x2, y2")
            if one.get("scribbles"):
                lines = data.scribble_lines(one["scribbles"])
                ids = tuple(sorted({x["object_id"] for x in lines} - {0} | set(found)))
                shape, rng = video.frames[t].shape[:2], np.random.default_rng(number)
                found |= prompts.from_scribbles(lines, shape, ids, positives, rng)
            if not found:
                raise ValueError("no interaction")
            out.append((t, found))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no list of rounds ({type(error).__name__}: {error}); see demo.py --help") from None
    if not out:
        raise UserError(f"{path} holds no round")
    return out


def read_masks(folder: Path, video: data.Video, ids: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Label maps by frame, out of a folder of PNGs named as the frames; UserError where none fits."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    out = {}
    for t, name in enumerate(video.names):
        if (folder / f"{name}.png").is_file():
            out[t] = data.read_mask(folder / f"{name}.png")
            if out[t].shape != video.frames[t].shape[:2]:
                raise UserError(
                    f"{folder / name}.png is {out[t].shape[::-1]}, its frame {video.frames[t].shape[1::-1]} (width, "
                    "height); give masks of the frames' size"
                )
            odd = sorted(set(np.unique(out[t]).tolist()) - {0, data.VOID, *ids})
            if odd:
                raise UserError(
                    f"{folder / name}.png has object {odd[0]}; --objects is {len(ids)}, give at least {odd[0]}"
                )
    if not out:
        raise UserError(f"{folder} has no mask with the name of a frame ({video.names[0]}.png ...)")
    return out


def export_rounds(s: PageSettings, project: Project) -> None:
    """The rounds of a file without a page, after those of the workspace or the masks that are there."""
    rounds = read_rounds(Path(s.interactions), project.video)
    more = range(1, s.objects + 1) if s.workspace or s.masks else ()  # objects that these rounds do not name
    ids = tuple(sorted({o for _, given in rounds for o in given} | set(more)))
    app = App(project, ids)
    told = app.begin(read_masks(Path(s.masks).expanduser(), project.video, ids) if s.masks else None)
    print(told, end="\n" if told else "")
    for t, given in progress(rounds, "rounds"):
        app.session.interact(t, given)
    app.kept()
    for path in app.write(Path(s.export)):
        print(path)


def main() -> None:
    s = runs.parse(PageSettings, __doc__)
    s.check()
    pipeline.find_weights(s, s.data_dir)
    video = data.read_video(Path(s.video).expanduser(), s.longest, s.limit) if s.video else None
    video = video or data.load("drawn", "pair", "", Path(), s.longest)
    project = Project(s, video)
    if s.interactions:
        return export_rounds(s, project)
    ids = tuple(range(1, s.objects + 1))
    masks = read_masks(Path(s.masks).expanduser(), video, ids) if s.masks else None
    shared = App(project) if s.workspace else None
    if shared is not None:
        print(shared.begin(masks) or f"The work is kept in {shared.folder}.")

    def tab() -> App:
        app = App(project)
        app.begin(masks)
        return app

    folder = (shared.folder if shared else runs.HERE / "runs" / "page" / video.name) / "export"
    folder.mkdir(parents=True, exist_ok=True)
    blocks = page.build(page.Tabs(tab, shared), video, ids, folder, project.told())
    try:
        blocks.launch(server_name=s.host, server_port=s.port, allowed_paths=[str(folder)], head=page.DRAG)
    except OSError as error:
        raise UserError(f"the page cannot use port {s.port} ({error}); choose another --port") from None


if __name__ == "__main__":
    runs.command(main)
