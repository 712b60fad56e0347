"""Masks out of a session: palette PNG as the DAVIS scorers read them, COCO run-length JSON, an overlay video."""

import json
import os
from pathlib import Path

from lab.runs import write_text

import imageio.v2 as imageio
import numpy as np
from PIL import Image
from pycocotools import mask as coco


def palette() -> list[int]:
    """The 256 colours of the VOC and DAVIS palette: bits of the id spread over the three channels."""
    out = []
    for i in range(256):
        colour = [0, 0, 0]
        for bit in range(8):
            for c in range(3):
                colour[c] |= ((i >> (3 * bit + c)) & 1) << (7 - bit)
        out += colour
    return out


COLOURS = np.array(palette(), np.uint8).reshape(256, 3)


def png(folder: Path, labels: list[np.ndarray], names: list[str] | None = None) -> None:
    """<folder>/<name of the frame>.png (00000.png ...): palette index is the object id. Each file is there whole or not
    at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for t, label in zip(names or [f"{t:05d}" for t in range(len(labels))], labels, strict=True):
        image = Image.fromarray(label.astype(np.uint8), "P")
        image.putpalette(palette())
        temporary = folder / f".{t}.{os.getpid()}.tmp"
        image.save(temporary, "PNG")
        os.replace(temporary, folder / f"{t}.png")


def rle(path: Path, labels: list[np.ndarray], objects: tuple[int, ...], name: str = "video") -> None:
    """JSON {"video", "height", "width", "objects": {id: [RLE or null a frame]}} with COCO's compressed counts."""
    tracks = {}
    for o in objects:
        tracks[str(o)] = []
        for label in labels:
            mask = label == o
            code = coco.encode(np.asfortranarray(mask.astype(np.uint8))) if mask.any() else None
            tracks[str(o)].append(code and {"size": code["size"], "counts": code["counts"].decode()})
    h, w = labels[0].shape
    write_text(path, json.dumps({"video": name, "height": h, "width": w, "objects": tracks}) + "\n")


def overlay(frame: np.ndarray, label: np.ndarray, strength: float = 0.5) -> np.ndarray:
    """Frame with each object tinted in its colour and outlined."""
    tint = COLOURS[label]
    inside = label > 0
    out = frame.astype(np.float32)
    out[inside] = (1 - strength) * out[inside] + strength * tint[inside]
    edge = np.zeros_like(inside)
    edge[:-1] |= label[:-1] != label[1:]
    edge[:, :-1] |= label[:, :-1] != label[:, 1:]
    out[edge] = 255
    return out.astype(np.uint8)


def film(path: Path, frames: list[np.ndarray], labels: list[np.ndarray], fps: float = 24) -> None:
    """H.264 mp4 of the overlay; odd sides lose their last pixel, as the codec asks for even ones."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.mp4")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with imageio.get_writer(
            temporary, fps=fps, codec="libx264", macro_block_size=1, ffmpeg_log_level="error"
        ) as out:
            for frame, label in zip(frames, labels, strict=True):
                h, w = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
                picture = overlay(frame, label)
                out.append_data(picture[:h, :w] if h and w else np.repeat(np.repeat(picture, 2, 0), 2, 1))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
