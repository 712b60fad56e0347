"""Hints for a ControlNet: what of an upscaled picture the edit is held to. canny, softedge (HED), tile (the picture
itself), shuffle (its colours without its places)."""

import contextlib
import pickle
import warnings
from collections.abc import Iterator

from lab.runs import UserError

import numpy as np
import torch
from PIL import Image

ANNOTATORS = "lllyasviel/Annotators"  # ControlNetHED.pth


def canny(picture: Image.Image, low: float, high: float) -> Image.Image:
    """Edges of the upscaled picture, white on black, RGB."""
    import cv2

    edges = cv2.Canny(np.asarray(picture), low, high)
    return Image.fromarray(np.repeat(edges[..., None], 3, axis=2))


@contextlib.contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """NumPy's global generator, which the library below draws from, seeded and put back."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


def _library():
    with warnings.catch_warnings():  # of detectors that are not used here
        warnings.simplefilter("ignore")
        import controlnet_aux
    return controlnet_aux


class Hint:
    """hint(picture, seed) -> picture of the same size. `annotators`: hub id or folder with ControlNetHED.pth."""

    def __init__(
        self, kind: str, device: torch.device, *, low: float = 100.0, high: float = 200.0, annotators: str = ANNOTATORS,
        download: bool = False,
    ):  # fmt: skip
        self.kind, self.low, self.high, self.detector = kind, low, high, None
        if kind == "shuffle":
            self.detector = _library().ContentShuffleDetector()
        if kind == "softedge":
            try:
                found = _library().HEDdetector.from_pretrained(annotators, local_files_only=not download)
            except (OSError, ValueError, RuntimeError, LookupError, EOFError, pickle.UnpicklingError) as error:
                raise UserError(
                    f"--control softedge: ControlNetHED.pth of {annotators} could not be read ({str(error)[:120]}); "
                    "give its folder by --sd-annotators, or add --download"
                ) from None
            self.detector = found.to(device)

    def about(self) -> dict:
        """What the hint depends on besides the picture and its seed."""
        if self.kind != "softedge":
            return {}
        state = self.detector.netNetwork.state_dict()
        return {"hed": f"{sum(float(v.double().abs().sum()) for v in state.values()):.6e}"}

    def __call__(self, picture: Image.Image, seed: int) -> Image.Image:
        if self.kind == "canny":
            return canny(picture, self.low, self.high)
        if self.detector is None:
            return picture
        side = min(picture.size)
        with numpy_seed(seed):
            found = self.detector(picture, detect_resolution=side, image_resolution=side)
        return found.convert("RGB").resize(picture.size, Image.Resampling.BILINEAR)
