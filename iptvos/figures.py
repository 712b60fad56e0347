"""Pictures of RESULTS.md, drawn from records: <scale>-<name>.png."""

from pathlib import Path

from lab import runs

import cv2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

import data
import export

COLOURS = {"copy": "#aaaaaa", "points": "#0072b2", "box": "#56b4e9", "points+box": "#009e73", "newest": "#e69f00"}
COLOURS["full"] = "#c1272d"
NAMES = {"points+box": "points + box", "newest": "+ CRSTM, newest only", "full": "full (CRSTM, all rounds)"}
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})


def draw(records: list[dict], folder: Path, scale: str) -> list[tuple[Path, str]]:
    """-> [(path, caption)] of the figures the records allow."""
    out = []
    for name, function in (("rounds", rounds), ("frames", frames), ("seconds", seconds)):
        found = function(records)
        if found:
            figure, caption = found
            path = folder / f"{scale}-{name}.png"
            figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            out.append((path, caption))
    return out + pictures(records, folder, scale)


def main_rows(records: list[dict]) -> list[dict]:
    return [r for r in records if r["table"] in ("drawn", "real-mask") and r["method"] in COLOURS]


def rounds(records: list[dict]):
    """J&F after each round, one panel a video."""
    rows = main_rows(records)
    sets = list(dict.fromkeys(r["dataset"] for r in rows))
    if not sets:
        return None
    columns = min(4, len(sets))
    height = -(-len(sets) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(3.1 * columns, 2.7 * height), squeeze=False, sharey=True)
    for axis, d in zip(axes.flat, sets, strict=False):
        for m, colour in COLOURS.items():
            mine = [r["metrics"] for r in rows if r["dataset"] == d and r["method"] == m]
            if mine:
                n = sum(k.startswith("jf_") and k[3:].isdigit() for k in mine[0])
                curve = np.array([[x[f"jf_{k}"] for k in range(1, n + 1)] for x in mine])
                bars = curve.std(0) if len(curve) > 1 else None
                axis.errorbar(
                    range(1, n + 1),
                    curve.mean(0),
                    bars,
                    marker="o",
                    ms=3,
                    capsize=2,
                    color=colour,
                    label=NAMES.get(m, m),
                )
        axis.set(title=d, xlabel="round", ylim=(0, 1.02))
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in list(axes.flat)[len(sets) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("J&F")
    figure.tight_layout()
    legend(figure, axes, 3)
    return figure, "J&F after each round; bars are one std over seeds where there are several."


def legend(figure, axes, columns: int) -> None:
    """Below the panels, every method that stands in any of them, in the order of the ladder."""
    found = {}
    for axis in axes.flat:
        found |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = [NAMES.get(m, m) for m in COLOURS]
    labels = sorted(found, key=order.index)
    where = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "ncol": columns, "frameon": False}
    figure.legend([found[k] for k in labels], labels, **where)


def frames(records: list[dict]):
    """J of each frame after the first round, for the videos with the largest gap between points and full."""
    rows = [r for r in main_rows(records) if r["seed"] == min(x["seed"] for x in main_rows(records))]
    by = {(r["dataset"], r["method"]): r["metrics"] for r in rows}
    sets = [d for d in dict.fromkeys(d for d, _ in by) if {(d, "points"), (d, "full")} <= by.keys()]
    if not sets:
        return None
    sets = sorted(sets, key=lambda d: by[d, "points"]["jf_1"] - by[d, "full"]["jf_1"])[:4]
    figure, axes = plt.subplots(1, len(sets), figsize=(3.4 * len(sets), 2.8), squeeze=False, sharey=True)
    for axis, d in zip(axes[0], sets, strict=True):
        for m in ("points", "points+box", "full"):
            if (d, m) in by:
                curve = np.array(by[d, m]["curve_first"], float)  # -1: a frame without truth
                axis.plot(np.where(curve < 0, np.nan, curve), color=COLOURS[m], label=NAMES.get(m, m), lw=1.5)
        axis.set(title=d, xlabel="frame", ylim=(0, 1.02))
    axes[0, 0].set_ylabel("J, round 1")
    figure.tight_layout()
    legend(figure, axes, 3)
    return figure, "J of each frame after the first round (first seed), where full gains most over points only."


def seconds(records: list[dict]):
    """Mean J&F of real sequences after each round against the mean cumulative seconds of their rounds."""
    rows = [r for r in main_rows(records) if r["table"] == "real-mask" and r["method"] != "copy"]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(6.2, 3.6))
    for m, colour in COLOURS.items():
        mine = [r["metrics"] for r in rows if r["method"] == m]
        if mine:
            n = sum(k.startswith("jf_") and k[3:].isdigit() for k in mine[0])
            y, x = (np.mean([[v[f"{k}_{i}"] for i in range(1, n + 1)] for v in mine], 0) for k in ("jf", "seconds"))
            axis.plot(np.cumsum(x), y, marker="o", ms=4, color=colour, label=NAMES.get(m, m))
    axis.set(xlabel="seconds of the rounds so far, mean over sequences", ylabel="J&F", ylim=(0, 1.02), xlim=(0, None))
    figure.tight_layout()
    legend(figure, np.array([[axis]]), 3)
    return figure, "J&F after each round against the seconds that the rounds took on one busy core, features included."


# ------------------------------------------------------------------------- frames with masks, where the run's masks are

STRIP = ("points", "points+box", "full")
WIDE, COLUMNS = 200, 5  # pixels of a frame, frames of a sequence


def saved(records: list[dict], scale: str) -> dict[str, dict[str, tuple[Path, list[int]]]]:
    """Folders of saved masks and the frames that were touched, {sequence: {method: ...}}, of sequences that have all of
    STRIP."""
    found: dict[str, dict[str, tuple[Path, list[int]]]] = {}
    for r in records:
        folder = runs.HERE / "runs" / scale / r.get("run", "") / f"seed{r['seed']}" / "masks" / r["dataset"]
        if r["table"] == "real-mask" and folder.is_dir():
            found.setdefault(r["dataset"], {})[r["method"]] = folder, r["metrics"]["interacted"]
    return {d: by for d, by in sorted(found.items()) if all(m in by for m in STRIP)}


def tinted(video: data.Video, folder: Path, t: int) -> np.ndarray:
    """Frame t with the mask of a folder, WIDE pixels wide."""
    image = export.overlay(video.frames[t], data.read_mask(folder / f"{t:05d}.png"))
    return cv2.resize(image, (WIDE, round(WIDE * image.shape[0] / image.shape[1])), interpolation=cv2.INTER_AREA)


def pictures(records: list[dict], folder: Path, scale: str) -> list[tuple[Path, str]]:
    """A strip a sequence with three methods, and a film of all sequences with the whole method: only on a machine that
    has the runs' masks and the data."""
    found = saved(records, scale)
    try:
        videos = {d: data.load("davis2016", d, "val", runs.data_dir("")) for d in found}
    except runs.UserError:
        return []
    if not videos:
        return []
    rows = []
    for d, video in videos.items():
        free = sorted(set(range(len(video.frames))) - {t for m in STRIP for t in found[d][m][1]})
        frames = [free[i] for i in np.linspace(0, len(free) - 1, COLUMNS).round().astype(int)]  # touched by no method
        for m in STRIP:
            row = np.hstack([tinted(video, found[d][m][0], t) for t in frames])
            text = f"{d}, {NAMES.get(m, m)}, frames {', '.join(map(str, frames))}" if m == STRIP[0] else NAMES.get(m, m)
            picture = Image.fromarray(row)
            ImageDraw.Draw(picture).text((6, 3), text, fill="white", stroke_fill="black", stroke_width=2)
            row = np.asarray(picture)
            rows.append(row)
        rows.append(np.full((6, rows[-1].shape[1], 3), 255, np.uint8))
    strips = folder / f"{scale}-strips.jpg"
    Image.fromarray(np.vstack(rows)).save(strips, quality=72)
    film, moments = folder / f"{scale}-film.webp", 24
    order = list(videos)
    shots = []
    for k in range(moments):
        tiles = [
            tinted(videos[d], found[d]["full"][0], round(k * (len(videos[d].frames) - 1) / (moments - 1)))
            for d in order
        ]
        tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % 4)
        shots.append(Image.fromarray(np.vstack([np.hstack(tiles[i : i + 4]) for i in range(0, len(tiles), 4)])))
    shots[0].save(film, save_all=True, append_images=shots[1:], duration=160, loop=0, quality=45)
    given = "After the last round, frames that no method was given"
    return [
        (strips, f"{given}: points alone, points + box with the filter, and the whole method."),
        (film, f"After the last round, the whole method: {', '.join(order)}."),
    ]
