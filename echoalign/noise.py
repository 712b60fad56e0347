"""Label noise: the published generators, human labels, and the file that keeps what was drawn.

All generators use NumPy's legacy `RandomState(seed)`, so labels agree with other code that follows the same order of
draws. `make` stores labels under data/noise/ with their SHA-256 and reads them back from there.
"""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lab import runs
from lab.runs import UserError

import numpy as np
from scipy.stats import truncnorm

from readers import JPEG, next_in_superclass

SYNTHETIC = ("instance", "symmetric", "pair", "asymmetric")
# --noise -> (file, key) of the human labels (Wei et al. 2022).
HUMAN = {
    "aggre": ("CIFAR-10_human.npz", "aggre_label"),
    "random1": ("CIFAR-10_human.npz", "random_label1"),
    "random2": ("CIFAR-10_human.npz", "random_label2"),
    "random3": ("CIFAR-10_human.npz", "random_label3"),
    "worse": ("CIFAR-10_human.npz", "worse_label"),
    "noisy-fine": ("CIFAR-100_human.npz", "noisy_label"),
}
# CIFAR-10: truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog (the community's mapping).
ASYMMETRIC10 = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}


def transition(kind: str, rho: float, classes: int, dataset: str = "") -> np.ndarray:
    """T [C, C] of class-conditional noise, T_ij = P(noisy = j | true = i).

    symmetric: rho/(C-1) off the diagonal, so the rate is rho itself; pair: rho to class i+1; asymmetric: rho to the
    class that the published mapping names (none: the class stays clean).
    """
    t = np.eye(classes)
    if kind == "symmetric":
        t = np.full((classes, classes), rho / max(classes - 1, 1))
        np.fill_diagonal(t, 1 - rho)
    elif kind == "pair":
        t = (1 - rho) * np.eye(classes) + rho * np.roll(np.eye(classes), 1, axis=1)
    elif kind == "asymmetric":
        if dataset not in ("cifar10", "cifar100"):
            raise UserError(f"--noise asymmetric has a published mapping for cifar10 and cifar100, not for {dataset}")
        target = ASYMMETRIC10 if dataset == "cifar10" else dict(enumerate(next_in_superclass()))
        for i, j in target.items():
            t[i, i], t[i, j] = 1 - rho, rho
    else:
        raise UserError(f"--noise {kind} is no class-conditional noise; use symmetric, pair or asymmetric")
    return t


def class_conditional(y: np.ndarray, t: np.ndarray, seed: int) -> np.ndarray:
    """One multinomial draw a sample, in order: y int [N], t [C, C] -> noisy int64 [N]."""
    rng = np.random.RandomState(seed)
    return np.array([int(rng.multinomial(1, t[k]).argmax()) for k in y], dtype=np.int64)


def instance_dependent(
    x: np.ndarray, y: np.ndarray, rho: float, classes: int, seed: int, norm_std: float = 0.1, scale: str = "unit"
) -> np.ndarray:
    """Part-dependent label noise of Xia et al. (2020) as the released code draws it.

    x: uint8 [N, H, W, C]; y: int [N]. q_i ~ TruncNormal(rho, norm_std, [0, 1]), then W ~ N(0, 1) of [C, D, C], then one
    uniform a sample. a_i = x_i^T W[y_i] with a_i[y_i] = -inf; p_i = q_i softmax(a_i), p_i[y_i] += 1 - q_i; the label is
    drawn from p_i. x is flattened in C, H, W order, in [0, 1] for `scale` "unit" (released code), in [0, 255] for "raw"
    (Xia et al.), and not normalised.
    """
    if len(x) == 0 or classes < 2:
        raise UserError("instance-dependent noise needs images of two or more classes")
    rng = np.random.RandomState(seed)
    n, width = len(y), int(np.prod(x.shape[1:]))
    spread = (0 - rho) / norm_std, (1 - rho) / norm_std
    q = truncnorm(*spread, loc=rho, scale=norm_std).rvs(n, random_state=rng)
    p = np.zeros((n, classes))
    # W is drawn class by class: the same numbers as one draw of [C, D, C], at a C-th of its memory.
    for k in range(classes):
        w = rng.randn(width, classes).astype(np.float32)
        mine = np.flatnonzero(y == k)
        if not len(mine):
            continue
        flat = x[mine].transpose(0, 3, 1, 2).reshape(len(mine), width).astype(np.float32)
        a = (flat / np.float32(255) if scale == "unit" else flat) @ w
        a[:, k] = -np.inf
        e = np.exp(a - a.max(1, keepdims=True))
        soft = e / e.sum(1, keepdims=True)
        p[mine] = q[mine, None] * soft
        p[mine, k] += 1 - q[mine]
    return draw(p, rng)


def draw(p: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """One label a row of p [N, C]: what np.random.choice(C, p=p_i) gives row after row, from one vector of uniforms."""
    edges = np.cumsum(p, axis=1, dtype=np.float64)
    edges /= edges[:, -1:]
    u = rng.random_sample(len(p))
    return (edges <= u[:, None]).sum(1).astype(np.int64)  # right-sided search


def human(kind: str, dataset: str, variant: str, y: np.ndarray, index: np.ndarray, folder: Path) -> np.ndarray:
    """CIFAR-10N / CIFAR-100N labels of the images at `index` [N] of the whole training part, whose true labels are y
    [N] -> int64 [N].

    The files follow CIFAR's own order. The JPEG copy is ordered by class and keeps that order within a class: its k-th
    image of class c is the k-th place whose `clean_label` is c. The true labels are compared either way.
    """
    name, key = HUMAN[kind]
    wanted = "cifar100" if "100" in name else "cifar10"
    if dataset != wanted:
        raise UserError(f"--noise {kind} belongs to {wanted}, not to {dataset}")
    path = folder / "cifar-n" / name
    if not path.is_file():
        raise UserError(f"human labels are missing: expected {path} (github.com/UCSC-REAL/cifar-10-100n)")
    try:
        with np.load(path, allow_pickle=False) as found:
            clean, noisy = found["clean_label"].astype(np.int64), found[key].astype(np.int64)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again") from None
    if variant == JPEG:
        order = np.argsort(clean, kind="stable")
        clean, noisy = clean[order], noisy[order]
    if len(y) and (index.max() >= len(clean) or (clean[index] != y).any()):
        raise UserError(
            f"--noise {kind}: clean labels in {path} are not those of the {len(y)} images ({variant}); the human "
            "labels follow the order of cifar-10-batches-py or cifar-100-python: use those files, or the JPEG copy"
        )
    return noisy[index]


@dataclass
class Labels:
    """Noisy labels int64 [N] with their file."""

    y: np.ndarray
    sha256: str
    rate: float
    path: Path


def make(
    *,
    kind: str,
    rho: float,
    seed: int,
    dataset: str,
    variant: str,
    x: np.ndarray,
    y: np.ndarray,
    classes: int,
    folder: Path,
    cache: Path,
    index: np.ndarray | None = None,
    scale: str = "unit",
) -> Labels:
    """The noisy labels of a setting, drawn or read, kept as cache/noise/<name>.npz with the images' fingerprint; index:
    places [N] of the images in the training part, for human labels."""
    if kind not in HUMAN and kind not in ("none", *SYNTHETIC):
        raise UserError(f"--noise {kind} is unknown; use none, {', '.join(SYNTHETIC)} or {', '.join(HUMAN)}")
    if not 0 <= rho < 1:
        raise UserError(f"--rate must lie in [0, 1), not {rho:g}")
    digest = hashlib.sha256(np.ascontiguousarray(y).tobytes())
    digest.update(np.ascontiguousarray(x).tobytes() if kind == "instance" else b"")
    digest.update(variant.encode() + index.tobytes() if kind in HUMAN and index is not None else b"")
    source = digest.hexdigest()
    more = f"-{scale}" if kind == "instance" else ""
    name = f"{dataset}-{kind}-{rho:g}{more}-seed{seed}-{source[:10]}"
    path = cache / "noise" / f"{name}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as found:
                noisy, sha = found["noisy"], str(found["sha256"])
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); delete it, it is drawn again") from None
        if sha != hashlib.sha256(noisy.tobytes()).hexdigest() or len(noisy) != len(y):
            raise UserError(f"{path} does not match its own hash; delete it, it is drawn again")
    else:
        if kind == "none":
            noisy = y.copy()
        elif kind == "instance":
            noisy = instance_dependent(x, y, rho, classes, seed, scale=scale)
        elif kind in HUMAN:
            where = np.arange(len(y)) if index is None else index
            noisy = human(kind, dataset, variant, y, where, folder)
        else:
            noisy = class_conditional(y, transition(kind, rho, classes, dataset), seed)
        noisy = noisy.astype(np.int64)
        sha = hashlib.sha256(noisy.tobytes()).hexdigest()
        _save(path, noisy=noisy, clean=y, sha256=np.array(sha), rate=np.array((noisy != y).mean()))
    return Labels(noisy, sha, float((noisy != y).mean()), path)


def _save(path: Path, **arrays) -> None:
    """npz, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.stem[:60]}.{runs.os.getpid()}.tmp")
    try:
        with open(half, "wb") as file:
            np.savez_compressed(file, **arrays)
        runs.os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
