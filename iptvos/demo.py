"""A page on which a person segments a video: click, propagate, correct a frame, export. No weights needed.

    python demo.py --video clip.mp4                       # opens on http://127.0.0.1:7860
    python demo.py                                        # a procedural video
    python demo.py --video frames/ --segmenter mobile --weights mobile_sam.pt
    python demo.py --video clip.mp4 --interactions given.json --export out   # no page: masks and video to out/

An interaction file is a list of rounds, in pixels of the frame, scribbles as in the DAVIS files:

    [{"frame": 0, "objects": {"1": {"points": [[x, y]], "labels": [1], "box": [x1, y1, x2, y2]}},
      "scribbles": [{"path": [[x, y] in 0..1], "object_id": 1}]}]
"""

import threading
from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import cv2
import numpy as np

import data
import export
import pipeline
import prompts
from prompts import Interaction
from session import Session
from settings import PageSettings

WAYS = ("add", "remove", "box (two corners)")
# Gradio tells of clicks in a picture, not of drags. This writes the two corners of a drag, in pixels of the frame, and
# the time into the hidden text box #drag, shows a dashed frame meanwhile, and keeps the click at its end from counting.
DRAG = """<style>#drag {display: none} #frame img {touch-action: none; -webkit-user-drag: none}</style>
<script>
(() => {
  let start = null, dragged = false, band = null;
  const picture = e => e.target.closest && e.target.closest("#frame") && document.querySelector("#frame img");
  const place = (image, x, y) => {
    const r = image.getBoundingClientRect(), w = image.naturalWidth, h = image.naturalHeight;
    let s = Math.min(r.width / w, r.height / h);
    if (getComputedStyle(image).objectFit === "scale-down") s = Math.min(s, 1);
    const fit = (v, low, size, most) => Math.min(Math.max((v - low - size / 2) / s + most / 2, 0), most - 1);
    return [fit(x, r.left, r.width, w), fit(y, r.top, r.height, h)];
  };
  const clear = () => { if (band) band.remove(); band = start = null; };
  document.addEventListener("dragstart", e => { if (picture(e)) e.preventDefault(); }, true);
  document.addEventListener("pointerdown", e => {
    const image = picture(e);
    dragged = false;
    if (image && e.target === image && e.button === 0) start = {image, x: e.clientX, y: e.clientY};
  }, true);
  document.addEventListener("pointermove", e => {
    if (!start || Math.hypot(e.clientX - start.x, e.clientY - start.y) < 6) return;
    if (!band) {
      band = document.body.appendChild(document.createElement("div"));
      band.style.cssText = "position:fixed;border:2px dashed #fff;outline:1px dashed #000;z-index:999";
      band.style.pointerEvents = "none";
    }
    band.style.left = Math.min(e.clientX, start.x) + "px"; band.style.top = Math.min(e.clientY, start.y) + "px";
    band.style.width = Math.abs(e.clientX - start.x) + "px"; band.style.height = Math.abs(e.clientY - start.y) + "px";
  }, true);
  document.addEventListener("pointerup", e => {
    if (start && band) {
      dragged = true;
      const box = [...place(start.image, start.x, start.y), ...place(start.image, e.clientX, e.clientY)];
      const field = document.querySelector("#drag textarea, #drag input");
      const kind = field.tagName === "TEXTAREA" ? HTMLTextAreaElement : HTMLInputElement;
      const text = [...box.map(v => v.toFixed(1)), Date.now()].join(" ");
      Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(field, text);
      field.dispatchEvent(new Event("input", {bubbles: true}));
    }
    clear();
  }, true);
  document.addEventListener("pointercancel", clear, true);
  document.addEventListener("click", e => {
    if (dragged && picture(e)) { e.stopPropagation(); e.preventDefault(); }
    dragged = false;
  }, true);
})();
</script>"""


class App:
    """The state behind the page: one video, one session, the clicks that wait for the next round."""

    def __init__(self, s: PageSettings, video: data.Video):
        self.s, self.video, self.lock = s, video, threading.Lock()
        method, segmenter, tracker, boxes = pipeline.build(s)
        self.make = lambda ids: Session(video.frames, ids, segmenter, tracker, boxes, method)
        self.ids = tuple(range(1, s.objects + 1))
        self.reset()

    def reset(self) -> None:
        self.session = self.make(self.ids)
        self.waiting: dict[int, dict[int, dict]] = {}  # frame -> object -> points, labels, box
        self.corner: tuple[float, float] | None = None
        self.labels: list[np.ndarray] | None = None

    def mark(self, t: int, o: int, way: str, x: float, y: float) -> None:
        """A click of the user, in pixels of the frame."""
        one = self.waiting.setdefault(t, {}).setdefault(o, {"points": [], "labels": [], "box": None})
        if way == WAYS[2]:
            if self.corner is None:
                self.corner = (x, y)
            else:
                a, b = np.minimum(self.corner, (x, y)), np.maximum(self.corner, (x, y))
                one["box"], self.corner = [*a, *b], None
            return
        one["points"].append([x, y])
        one["labels"].append(int(way == WAYS[0]))

    def drag(self, t: int, o: int, text: str) -> str:
        """A drag on the page, "x y x y time" in pixels of the frame, marks a box; what the status says of it."""
        h, w = self.video.frames[t].shape[:2]
        try:
            x1, y1, x2, y2 = (float(v) for v in text.split()[:4])
        except ValueError:
            return "That was no box."
        xs, ys = (
            sorted((min(max(v, 0.0), w - 1.0)) for v in (x1, x2)),
            sorted(min(max(v, 0.0), h - 1.0) for v in (y1, y2)),
        )
        if not all(a < b for a, b in (xs, ys)):
            return "That box has no area."
        self.corner = None
        self.mark(t, o, WAYS[2], xs[0], ys[0])
        self.mark(t, o, WAYS[2], xs[1], ys[1])
        told = f"box {xs[0]:.0f} {ys[0]:.0f} to {xs[1]:.0f} {ys[1]:.0f}, object {o}"
        return f"Frame {t}: {told}. Propagate when all is marked."

    def ready(self, t: int) -> dict[int, Interaction]:
        out = {}
        for o, one in self.waiting.get(t, {}).items():
            if one["points"] or one["box"]:
                out[o] = interaction(one)
        return out

    def propagate(self, t: int, progress=None) -> str:
        """One round from frame t."""
        with self.lock:
            given = self.ready(t)
            if not given:
                return f"Click on frame {t} first: nothing is marked there."
            self.session.progress = progress
            try:
                seconds = self.session.interact(t, given)
            finally:
                self.session.progress = None
            self.waiting.pop(t, None)
            self.labels = self.session.labels()
        found = [o for o in self.ids if any((g == o).any() for g in self.labels)]
        return f"Round {self.session.round}: {seconds:.1f} s, objects {', '.join(map(str, found)) or 'none'}."

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
        export.png(folder / "masks", self.labels)
        export.rle(folder / "masks.json", self.labels, self.ids, self.video.name)
        export.film(folder / "overlay.mp4", self.video.frames, self.labels, self.s.fps)
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


def page(app: App):
    """The Gradio page."""
    import gradio as gr

    last = len(app.video.frames) - 1

    def click(t, o, way, event: gr.SelectData):
        app.mark(int(t), int(o), way, *(float(v) for v in event.index))
        return app.picture(int(t)), f"Frame {int(t)}: {way}, object {int(o)}. Propagate when all is marked."

    def drag(text, t, o):
        told = app.drag(int(t), int(o), text)
        return app.picture(int(t)), told

    def go(t, progress=gr.Progress()):  # noqa: B008 (Gradio finds its progress bar by the default)
        said = app.propagate(int(t), lambda k, n: progress((k, n), desc="frames"))
        return app.picture(int(t)), said

    def again(t):
        app.reset()
        return app.picture(int(t)), "Everything is cleared."

    def undo(t):
        app.waiting.pop(int(t), None)
        app.corner = None
        return app.picture(int(t)), f"Marks of frame {int(t)} are removed."

    def save():
        folder = runs.HERE / "runs" / "page" / app.video.name
        try:
            film, masks = app.write(folder)
        except UserError as error:
            return None, None, f"{error}"
        return str(film), str(masks), f"Masks (PNG), masks.json and overlay.mp4 are in {folder}."

    with gr.Blocks(title="I-PT") as blocks:
        gr.Markdown(
            f"**{app.video.name}**: click on the object or drag a box around it, propagate, go to a frame that is "
            "wrong, correct it, again."
        )
        with gr.Row():
            with gr.Column(scale=3):
                image = gr.Image(app.picture(0), interactive=False, show_label=False, elem_id="frame", format="png")
                frame = gr.Slider(0, max(last, 1), 0, step=1, label="Frame", elem_id="slider")
                box = gr.Textbox(elem_id="drag", show_label=False)
                said = gr.Textbox(label="Status", value="Mark an object.", interactive=False, elem_id="status")
            with gr.Column(scale=1):
                way = gr.Radio(list(WAYS), value=WAYS[0], label="A click means")
                which = gr.Radio(list(app.ids), value=1, label="Object")
                run = gr.Button("Propagate", variant="primary", elem_id="propagate")
                clear, reset = gr.Button("Remove marks of this frame"), gr.Button("Start over")
                out = gr.Button("Export", elem_id="export")
                film, masks = gr.Video(label="Overlay", elem_id="film"), gr.File(label="COCO RLE")
        frame.change(lambda t: app.picture(int(min(t, last))), frame, image, show_progress="hidden")
        image.select(click, [frame, which, way], [image, said], show_progress="hidden")
        box.change(drag, [box, frame, which], [image, said], show_progress="hidden")
        run.click(go, frame, [image, said])
        clear.click(undo, frame, [image, said])
        reset.click(again, frame, [image, said])
        out.click(save, None, [film, masks, said])
    return blocks


def main() -> None:
    s = runs.parse(PageSettings, __doc__)
    s.check()
    pipeline.find_weights(s, s.data_dir)
    video = data.read_video(Path(s.video).expanduser(), s.longest, s.limit) if s.video else None
    video = video or data.load("drawn", "pair", "", Path(), s.longest)
    if s.interactions:
        rounds = read_rounds(Path(s.interactions), video)
        app = App(s, video)
        app.ids = tuple(sorted({o for _, given in rounds for o in given}))
        app.reset()
        for t, given in progress(rounds, "rounds"):
            app.session.interact(t, given)
        app.labels = app.session.labels()
        for path in app.write(Path(s.export)):
            print(path)
        return
    try:
        files = [str(runs.HERE / "runs")]
        page(App(s, video)).launch(server_name=s.host, server_port=s.port, allowed_paths=files, head=DRAG)
    except OSError as error:
        raise UserError(f"the page cannot use port {s.port} ({error}); choose another --port") from None


if __name__ == "__main__":
    runs.command(main)
