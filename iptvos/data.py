"""Videos: procedural ones that need no data, DAVIS 2016 and 2017, YouTube-VOS, MOSE, any folder or video file.

Which have public ground truth on every frame: DAVIS train and val; YouTube-VOS train (every fifth frame); MOSE train.
YouTube-VOS val and MOSE val publish only the first masks of each object: masks can be propagated there, but neither
scored nor corrected by a robot, and asking for that is refused.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from lab.runs import UserError, read_json

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

DRAWN = ("plain", "occluder", "distractor", "pair", "triple")
READERS = ("davis2016", "davis2017", "youtube-vos", "mose")
LAYOUT = {
    "davis2016": "iptvos or DAVIS/{JPEGImages,Annotations}/480p/<video>, ImageSets/2017/val.txt (davischallenge.org)",
    "davis2017": "DAVIS/{JPEGImages,Annotations}/480p/<video>, ImageSets/2017/val.txt (davischallenge.org)",
    "youtube-vos": "YouTubeVOS/<split>/{JPEGImages,Annotations}/<video>, meta.json (youtube-vos.org)",
    "mose": "MOSE/<split>/{JPEGImages,Annotations}/<video> (henghuiding.github.io/MOSE)",
}
VOID = 255


@dataclass
class Video:
    name: str
    frames: list[np.ndarray]
    """(H, W, 3) uint8 RGB each."""
    truth: list[np.ndarray | None]
    """(H, W) uint8 object ids, None where a frame has no public mask."""
    objects: tuple[int, ...]
    first: dict[int, int] = field(default_factory=dict)
    """First frame of each object."""
    hidden: tuple[int, int] | None = None
    """Procedural: first and last frame in which the occluder hides more than half of object 1."""
    variant: str = "paper"
    sha256: str = ""
    """Of the files that were read: of the hex digests of picture and mask, frame by frame; drawn: of the pixels."""
    names: list[str] = field(default_factory=list)
    """Of the frames' files without their ending; else their numbers, five digits."""

    def __post_init__(self):
        self.names = self.names or [f"{t:05d}" for t in range(len(self.frames))]

    @property
    def scored(self) -> bool:
        """Whether every object can be scored and corrected all through: more masks than those of first appearances."""
        return sum(g is not None for g in self.truth) > len(set(self.first.values()))


def read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{path} is no readable picture ({error}); fetch the data set again") from None


def read_mask(path: Path) -> np.ndarray:
    """(H, W) uint8 of object ids: palette index, or grey values where the file has no palette (255 alone: object 1)."""
    try:
        with Image.open(path) as image:
            palette = image.mode == "P"
            mask = np.asarray(image if palette else image.convert("L"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{path} is no readable mask ({error}); fetch the data set again") from None
    if not palette and set(np.unique(mask)) <= {0, VOID}:
        return (mask > 127).astype(np.uint8)
    return mask.astype(np.uint8)


def read_folder(name: str, images: Path, masks: Path | None, longest: int = 0, limit: int = 0) -> Video:
    """One video out of a folder of pictures, masks by the same names where they are there."""
    paths = (
        sorted(p for p in images.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png")) if images.is_dir() else []
    )
    if not paths:
        raise UserError(f"{images} holds no pictures (.jpg, .png)")
    frames, truth, digests = [], [], []
    for path in paths[: limit or None]:
        frame = read_image(path)
        digests.append(file_digest(path))
        mask = None
        if masks is not None and (masks / f"{path.stem}.png").is_file():
            mask = read_mask(masks / f"{path.stem}.png")
            digests.append(file_digest(masks / f"{path.stem}.png"))
            if mask.shape != frame.shape[:2]:
                raise UserError(f"{masks / path.stem}.png is {mask.shape[::-1]}, its picture {frame.shape[1::-1]}")
        frames.append(shrunk(frame, longest))
        truth.append(None if mask is None else shrunk(mask, longest))
    odd = [p for p, f in zip(paths, frames, strict=False) if f.shape != frames[0].shape]
    if odd:
        raise UserError(f"{odd[0]} has another size than the first frame of {name}")
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    names = [path.stem for path in paths[: limit or None]]
    what = variant(longest, frames, len(paths))
    return finished(Video(name, frames, truth, (), variant=what, sha256=digest, names=names))


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def variant(longest: int, frames: list[np.ndarray], whole: int, name: str = "paper") -> str:
    """What of a video was used, for the record: `name`, unless it was cut or made smaller."""
    parts = [f"first {len(frames)} frames"] if len(frames) < whole else []
    if longest and max(frames[0].shape[:2]) == longest:
        parts.append(f"long side {longest}")
    return ", ".join(parts) or name


def shrunk(image: np.ndarray, longest: int) -> np.ndarray:
    """Long side at most `longest`; pictures are averaged, masks take the nearest pixel."""
    h, w = image.shape[:2]
    if not longest or max(h, w) <= longest:
        return image
    size = max(1, round(w * longest / max(h, w))), max(1, round(h * longest / max(h, w)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if image.ndim == 3 else cv2.INTER_NEAREST)


def finished(video: Video) -> Video:
    """Object ids and their first frames out of the masks."""
    for t, g in enumerate(video.truth):
        for o in np.unique(g) if g is not None else ():
            if o not in (0, VOID):
                video.first.setdefault(int(o), t)
    video.objects = tuple(sorted(video.first))
    return video


def root_of(dataset: str, split: str, folder: Path) -> Path:
    names = {"davis2016": ("iptvos", "DAVIS"), "davis2017": ("DAVIS", "iptvos")}
    names |= {"youtube-vos": (f"YouTubeVOS/{split}",), "mose": (f"MOSE/{split}",)}
    for name in names[dataset]:
        if (folder / name / "JPEGImages").is_dir():
            return folder / name
    raise UserError(f"--dataset {dataset}: nothing in {folder}; expected {LAYOUT[dataset]}, or give --data-dir")


def names_of(dataset: str, split: str, folder: Path) -> list[str]:
    """Videos of a split, in its own order."""
    root = root_of(dataset, split, folder)
    if dataset.startswith("davis"):
        for year in ("2017", "2016"):
            path = root / "ImageSets" / year / f"{split}.txt"
            if path.is_file():
                found = path.read_text().split()
                if not found:
                    raise UserError(f"{path} names no video; fetch the data set again")
                return found
        raise UserError(f"no {root}/ImageSets/2017/{split}.txt; splits of DAVIS are train and val")
    if (root / "meta.json").is_file():
        try:
            found = sorted(json.loads((root / "meta.json").read_text())["videos"].keys())
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(f"{root / 'meta.json'} is damaged; fetch the data set again") from None
    else:
        found = sorted(p.name for p in (root / "JPEGImages").iterdir() if p.is_dir())
    if not found:
        raise UserError(f"{root} holds no video; fetch the data set again")
    return found


def load(dataset: str, name: str, split: str, folder: Path, longest: int = 0, limit: int = 0, seed: int = 0) -> Video:
    """One video of a data set; `name` is its sequence, for procedural ones its kind."""
    if dataset == "drawn":
        video = draw(name, seed, length=limit or 40)
        if longest:
            video.frames, video.truth = ([shrunk(x, longest) for x in many] for many in (video.frames, video.truth))
            video.first, video.variant = {}, variant(longest, video.frames, 0, "generated")
            finished(video)
        digest = hashlib.sha256()
        for frame, mask in zip(video.frames, video.truth, strict=True):
            digest.update(frame.tobytes() + mask.tobytes())
        video.sha256 = digest.hexdigest()
        return video
    root = root_of(dataset, split, folder)
    sub = Path("480p") / name if dataset.startswith("davis") else Path(name)
    if not (root / "JPEGImages" / sub).is_dir():
        known = ", ".join(names_of(dataset, split, folder)[:12])
        raise UserError(f"no video {name} in {root / 'JPEGImages'}; there are {known} ...")
    video = read_folder(name, root / "JPEGImages" / sub, root / "Annotations" / sub, longest, limit)
    bare = [t for t, g in enumerate(video.truth) if g is None]
    if bare and dataset.startswith("davis") and split in ("train", "val"):  # there every frame has its mask
        raise UserError(
            f"{root / 'Annotations' / sub} lacks the mask of frame {bare[0]} (of {len(video.frames)}, {len(bare)} are "
            "missing); fetch the data set again"
        )
    if dataset == "davis2016":  # all objects of a frame are one
        video.truth = [None if g is None else ((g > 0) & (g != VOID)).astype(np.uint8) for g in video.truth]
        video.first, video.objects = {}, ()
        finished(video)
    if not video.objects:
        raise UserError(f"{root / 'Annotations' / sub} has no mask of any object")
    return video


def first_scribbles(dataset: str, name: str, split: str, folder: Path, number: int) -> tuple[int, list[dict]]:
    """Frame and scribbles of a person, Scribbles/<video>/<number, three digits>.json: one list a frame, of which one is
    not empty."""
    path = root_of(dataset, split, folder) / "Scribbles" / name / f"{number:03d}.json"
    if not path.is_file():
        raise UserError(
            f"no file {path}: set {number} of the first scribbles (DAVIS-2017-scribbles-trainval.zip, "
            "davischallenge.org); --seeds says which sets, 1 to 3"
        )
    found = read_json(path)
    try:
        given = {t: lines for t, lines in enumerate(found["scribbles"]) if lines}
        t = min(given)
        lines = scribble_lines(given[t])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no scribbles as DAVIS writes them ({type(error).__name__}: {error})") from None
    return t, lines


def scribble_lines(given: list) -> list[dict]:
    """Scribbles of one frame as they stand in a file, checked: [{"path": [(x, y) in 0..1], "object_id"}]; KeyError,
    TypeError or ValueError for anything else."""
    out = []
    for s in given:
        path, o = [(float(x), float(y)) for x, y in s["path"]], int(s["object_id"])
        if not path or not np.isfinite(path).all() or not 0 <= o < VOID:
            raise ValueError("a scribble without a path, not finite, or of an object that is not 0 to 254")
        out.append({"path": path, "object_id": o})
    return out


def read_video(path: Path, longest: int = 0, limit: int = 0) -> Video:
    """A video file, or a folder of pictures, without masks."""
    if path.is_dir():
        return read_folder(path.name, path, None, longest, limit)
    if not path.is_file():
        raise UserError(f"no video {path}")
    reader, frames = cv2.VideoCapture(str(path)), []
    while not limit or len(frames) < limit:
        ok, frame = reader.read()
        if not ok:
            break
        frames.append(shrunk(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), longest))
    more = bool(limit) and len(frames) == limit and reader.read()[0]
    reader.release()
    if not frames:
        raise UserError(f"{path} holds no frames that OpenCV can read; convert it to H.264 mp4")
    what = variant(longest, frames, len(frames) + more)
    return Video(path.stem, frames, [None] * len(frames), (), variant=what)


# ------------------------------------------------------------------------------------------------ procedural videos


def texture(rng: np.random.Generator, h: int, w: int, colour: np.ndarray, contrast: float) -> np.ndarray:
    """Smooth noise of two scales around a colour; (h, w, 3) float in 0..255."""
    out = np.empty((h, w, 3), np.float32)
    fine, coarse = (cv2.GaussianBlur(rng.normal(size=(h, w)).astype(np.float32), (0, 0), s) for s in (1.0, 3.5))
    grain = fine / fine.std() * 0.6 + coarse / coarse.std()
    for c in range(3):
        out[..., c] = colour[c] + contrast * grain * (0.8 + 0.4 * rng.random())
    return np.clip(out, 0, 255)


def outline(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Corners (n, 2) of a random star-shaped polygon around the origin."""
    n = int(rng.integers(6, 11))
    angle = np.sort(rng.random(n) * 2 * np.pi / n + np.arange(n) * 2 * np.pi / n)
    r = radius * (0.65 + 0.5 * rng.random(n))
    return np.stack([r * np.cos(angle), r * np.sin(angle)], 1)


@dataclass
class Sprite:
    """A textured polygon on a smooth path: it moves, turns and changes its size."""

    corners: np.ndarray
    skin: np.ndarray
    path: np.ndarray  # (frames, 2)
    turn: np.ndarray
    scale: np.ndarray

    def matrix(self, t: int) -> np.ndarray:
        c, s = np.cos(self.turn[t]) * self.scale[t], np.sin(self.turn[t]) * self.scale[t]
        half = self.skin.shape[0] / 2
        x, y = self.path[t]
        return np.array([[c, -s, x - c * half + s * half], [s, c, y - s * half - c * half]], np.float32)

    def paint(self, image: np.ndarray, t: int) -> np.ndarray:
        """Draw on the image in place; the mask (H, W) boolean."""
        h, w = image.shape[:2]
        m, half = self.matrix(t), self.skin.shape[0] / 2
        skin = cv2.warpAffine(self.skin, m, (w, h), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        mask = np.zeros((h, w), np.uint8)
        corners = (self.corners + half) @ m[:, :2].T + m[:, 2]
        cv2.fillPoly(mask, [np.round(corners * 16).astype(np.int32)], 1, lineType=cv2.LINE_8, shift=4)
        image[mask > 0] = skin[mask > 0]
        return mask > 0


def sprite(rng, length: int, size: tuple[int, int], colour: np.ndarray, radius: float, start, end) -> Sprite:
    half = int(radius * 1.6)
    s = np.linspace(0, 1, length)
    path = np.stack(
        [start[i] + (end[i] - start[i]) * s + 4 * np.sin(2 * np.pi * (s * 1.5 + rng.random())) for i in (0, 1)], 1
    )
    turn = rng.uniform(-1.2, 1.2) * s
    scale = 1 + rng.uniform(-0.25, 0.25) * np.sin(np.pi * s)
    return Sprite(outline(rng, radius), texture(rng, 2 * half, 2 * half, colour, 22), path, turn, scale)


def draw(kind: str, seed: int, length: int = 40, size: tuple[int, int] = (96, 160)) -> Video:
    """A procedural video: textured polygons over a textured background that drifts. Kinds: plain; occluder (a static
    pillar hides object 1 for some frames); distractor (an unlabelled polygon of nearly the same colour crosses); pair
    and triple (two and three objects, with pillar and distractor)."""
    if kind not in DRAWN:
        raise UserError(f"no procedural video {kind}; use one of {', '.join(DRAWN)}")
    rng = np.random.default_rng([seed, DRAWN.index(kind)])
    h, w = size
    ground = texture(rng, h + 40, w + 40, rng.uniform(60, 190, 3), 16)
    drift = rng.uniform(-12, 12, 2)
    count = {"pair": 2, "triple": 3}.get(kind, 1)
    colours, radius = [], 0.16 * h
    for _ in range(count):
        while True:
            colour = rng.uniform(30, 225, 3)
            if all(np.linalg.norm(colour - c) > 70 for c in (ground.mean((0, 1)), *colours)):
                break
        colours.append(colour)
    rows = np.linspace(0.3, 0.7, count) * h if count > 1 else [h * rng.uniform(0.35, 0.65)]
    things = []
    for i, colour in enumerate(colours):
        ends = (0.15 * w, rows[i]), (0.85 * w, rows[i] + rng.uniform(-0.1, 0.1) * h)
        things.append(sprite(rng, length, size, colour, radius, *(ends if i % 2 == 0 else ends[::-1])))
    other = None
    if kind in ("distractor", "pair", "triple"):
        colour = np.clip(colours[0] + rng.uniform(-18, 18, 3), 0, 255)
        y = h - rows[0]
        other = sprite(rng, length, size, colour, radius * 0.9, (0.85 * w, y), (0.15 * w, y + rng.uniform(-8, 8)))
    pillar = None
    if kind in ("occluder", "pair", "triple"):
        pillar = int(0.5 * w - radius * 1.35), int(0.5 * w + radius * 1.35)
        post = texture(rng, h, pillar[1] - pillar[0], rng.uniform(40, 215, 3), 14)
    frames, truth, hidden = [], [], []
    for t in range(length):
        shift = 20 + drift * t / max(length - 1, 1)
        m = np.array([[1, 0, -shift[0]], [0, 1, -shift[1]]], np.float32)
        image = cv2.warpAffine(ground, m, (w, h), flags=cv2.INTER_LINEAR)
        labels = np.zeros((h, w), np.uint8)
        if other is not None:
            other.paint(image, t)
        for i, thing in enumerate(things):
            labels[thing.paint(image, t)] = i + 1
        before = np.count_nonzero(labels == 1)
        if pillar is not None:
            image[:, pillar[0] : pillar[1]] = post
            labels[:, pillar[0] : pillar[1]] = 0
        hidden.append(before > 0 and np.count_nonzero(labels == 1) < 0.5 * before)
        noise = rng.normal(scale=2.0, size=image.shape)
        frames.append(np.clip(image + noise, 0, 255).astype(np.uint8))
        truth.append(labels)
    video = finished(Video(kind, frames, truth, (), variant="generated"))
    if any(hidden):
        video.hidden = int(np.argmax(hidden)), int(len(hidden) - 1 - np.argmax(hidden[::-1]))
    return video
