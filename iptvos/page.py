"""The page of demo.py: Gradio's components around an App, and the little JavaScript that Gradio lacks."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from lab.runs import UserError

WAYS = ("add", "remove", "box (two corners)")
STRIP = 24, 800  # height and width of the strip of confidences
TABS = 8  # open at once with a session of their own; the one that was idle longest goes first
# Gradio tells of clicks in a picture, not of drags. This writes the two corners of a drag, in pixels of the frame, and
# the time into the hidden text box #drag, shows a dashed frame meanwhile, and keeps the click at its end from counting.
# The keys 1 to 9 choose the object.
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
  document.addEventListener("keydown", e => {
    if (e.ctrlKey || e.altKey || e.metaKey || !/^[1-9]$/.test(e.key)) return;
    const at = document.activeElement;
    if (at && (at.tagName === "TEXTAREA" || at.tagName === "INPUT" && !/^(radio|range)$/.test(at.type))) return;
    const inputs = document.querySelectorAll("#object input[type=radio]");
    if (inputs.length >= +e.key) inputs[+e.key - 1].click();
  });
})();
</script>"""


class Tabs:
    """An App for each tab of a browser; one for all where `shared` says so."""

    def __init__(self, make: Callable, shared=None):
        self.make, self.shared, self.apps = make, shared, OrderedDict()

    def of(self, request):
        if self.shared is not None:
            return self.shared
        key = getattr(request, "session_hash", None)
        if key not in self.apps:
            self.apps[key] = self.make()
            while len(self.apps) > TABS:
                self.apps.popitem(last=False)
        self.apps.move_to_end(key)
        return self.apps[key]


def build(tabs: Tabs, video, ids: tuple[int, ...], folder: Path, told: str):
    """The page of a video; `told` stands at its top."""
    import gradio as gr

    last = len(video.frames) - 1

    def shown(app, t) -> tuple:
        return app.picture(int(min(t, last))), app.strip()

    def click(t, o, way, request: gr.Request, event: gr.SelectData):
        app = tabs.of(request)
        said = app.mark(int(t), int(o), WAYS.index(way), *(float(v) for v in event.index))
        return *shown(app, t), said

    def drag(text, t, o, request: gr.Request):
        app = tabs.of(request)
        said = app.drag(int(t), int(o), text)
        return *shown(app, t), said

    def opened(t, request: gr.Request):
        return shown(tabs.of(request), t)

    def look(t, request: gr.Request):
        app = tabs.of(request)
        app.corner = None  # it was meant for the frame and the object that were shown
        return app.picture(int(min(t, last)))

    def go(t, first, end, request: gr.Request, progress=gr.Progress()):  # noqa: B008 (Gradio finds its bar by this)
        app = tabs.of(request)
        said = app.propagate(int(t), lambda k, n: progress((k, n), desc="frames"), (int(first), int(end)))
        return *shown(app, t), said

    def stop(request: gr.Request):
        return tabs.of(request).cancel()

    def undo(t, request: gr.Request):
        app = tabs.of(request)
        said = app.undo(int(t))
        return *shown(app, t), said

    def back(t, request: gr.Request):
        app = tabs.of(request)
        said = app.back()
        return *shown(app, t), said

    def again(t, request: gr.Request):
        app = tabs.of(request)
        app.restart()
        return *shown(app, t), "Everything is cleared."

    def jump(t, request: gr.Request):
        worst, said = tabs.of(request).worst()
        return int(t) if worst is None else worst, said

    def point(event: gr.SelectData):
        return min(int(event.index[0]) * (last + 1) // STRIP[1], last)

    def save(request: gr.Request):
        app = tabs.of(request)
        try:
            film, masks = app.write(folder)
        except UserError as error:
            return None, None, f"{error}"
        return str(film), str(masks), f"Masks (PNG), masks.json and overlay.mp4 are in {folder}."

    with gr.Blocks(title="I-PT") as blocks:
        gr.Markdown(told)
        with gr.Row():
            with gr.Column(scale=3):
                image = gr.Image(video.frames[0], interactive=False, show_label=False, elem_id="frame", format="png")
                frame = gr.Slider(0, max(last, 1), 0, step=1, label="Frame", elem_id="slider")
                gr.Markdown("Confidence of each frame, red is low, blue was yours; a click goes there:")
                strip = gr.Image(None, interactive=False, show_label=False, elem_id="strip", format="png", buttons=[])
                box = gr.Textbox(elem_id="drag", show_label=False)
                said = gr.Textbox(label="Status", value="Mark an object.", interactive=False, elem_id="status")
            with gr.Column(scale=1):
                way = gr.Radio(list(WAYS), value=WAYS[0], label="A click means")
                which = gr.Radio(list(ids), value=1, label="Object (keys 1 to 9)", elem_id="object")
                with gr.Row():
                    run = gr.Button("Propagate", variant="primary", elem_id="propagate")
                    halt = gr.Button("Cancel", elem_id="cancel")
                with gr.Row():
                    first = gr.Number(0, label="from frame", precision=0, minimum=0, maximum=last)
                    end = gr.Number(last, label="to frame", precision=0, minimum=0, maximum=last)
                worst = gr.Button("Go to the frame that needs a correction most", elem_id="worst")
                clear = gr.Button("Take back the last mark of this frame", elem_id="undo")
                before, reset = gr.Button("Take back the last round", elem_id="back"), gr.Button("Start over")
                out = gr.Button("Export", elem_id="export")
                film, masks = gr.Video(label="Overlay", elem_id="film"), gr.File(label="COCO RLE")
        shows = [image, strip, said]
        frame.change(look, frame, image, show_progress="hidden")
        which.change(look, frame, image, show_progress="hidden")
        image.select(click, [frame, which, way], shows, show_progress="hidden")
        strip.select(point, None, frame, show_progress="hidden")
        box.change(drag, [box, frame, which], shows, show_progress="hidden")
        run.click(go, [frame, first, end], shows)
        halt.click(stop, None, said, show_progress="hidden")
        worst.click(jump, frame, [frame, said])
        clear.click(undo, frame, shows)
        before.click(back, frame, shows)
        reset.click(again, frame, shows)
        out.click(save, None, [film, masks, said])
        blocks.load(opened, frame, [image, strip])
    return blocks
