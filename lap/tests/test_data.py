"""Batches, augmentation, generated data, and what is said when raw data are missing or broken."""

import gzip
import os
import tarfile
from pathlib import Path

from lab.runs import UserError

import numpy as np
import pytest
import torch
from PIL import Image

import data
import generated
import readers

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(n=10, pad=0, flip=False, side=4):
    x = torch.arange(n * side * side * 3).remainder(251).to(torch.uint8).view(n, side, side, 3)
    kind = readers.Kind("tiny", 10, (0.5,) * 3, (0.5,) * 3, pad, flip)
    part = data.Images(x, torch.arange(n))
    return data.Data("tiny", kind, "", "", part, part, side, 3)


def test_crop_and_flip_equals_one_image_at_a_time():
    x = torch.randint(0, 256, (40, 6, 6, 3), generator=generator(), dtype=torch.uint8)
    got = data.crop_and_flip(x, 2, True, generator(1))(slice(0, 40))
    padded = np.pad(x.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)))
    kinds = set()
    for k in range(40):
        found = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if np.array_equal(padded[k, top : top + 6, left : left + 6][:, :: -1 if flip else 1], got[k].numpy())
        ]
        assert found
        kinds |= set(found)
    assert {f[2] for f in kinds} == {True, False} and {f[0] for f in kinds} == set(range(5))


def test_augmentation_of_a_share_is_the_share_of_the_augmentation():
    x = torch.randint(0, 256, (10, 6, 6, 3), generator=generator(), dtype=torch.uint8)
    whole = data.crop_and_flip(x, 2, True, generator(1))(slice(0, 10))
    parts = [data.crop_and_flip(x, 2, True, generator(1))(s) for s in (slice(0, 4), slice(4, 10))]
    assert torch.equal(whole, torch.cat(parts))


def test_an_epoch_shows_every_image_once_and_keeps_the_last_partial_batch():
    batches = data.Batches(tiny(10), tiny(10).train, 4, CPU)
    found = list(batches.epoch(0, 0, 0, generator()))
    assert [t for *_, t in found] == [4, 4, 2] and len(batches) == 3
    assert sorted(torch.cat([y for _, y, _ in found]).tolist()) == list(range(10))
    again = list(batches.epoch(0, 1, 0, generator()))
    assert [y.tolist() for _, y, _ in again] != [y.tolist() for _, y, _ in found]
    assert all(x.is_contiguous(memory_format=torch.channels_last) and 0 <= x.min() and x.max() <= 1 for x, *_ in found)


def test_starting_in_the_middle_gives_the_rest():
    batches = data.Batches(tiny(10), tiny(10).train, 4, CPU)
    whole, rest = list(batches.epoch(3, 2, 0, generator())), list(batches.epoch(3, 2, 1, generator()))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(whole[1:], rest, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_a_batch_without_gap_or_overlap(world):
    for n in (3, 7, 8):
        rows = [list(range(n))[data.share(range(n), r, world)] for r in range(world)]
        assert sum(rows, []) == list(range(n)) and all(rows)


@pytest.mark.parametrize(
    ("name", "shape"), [("patches", (16, 16, 3)), ("carriers", (16, 16, 3)), ("digits", (8, 8, 1))]
)
def test_generated_data_are_the_same_every_time_and_balanced(name, shape):
    a, b = data.load(name, Path(".")), data.load(name, Path("."))
    assert a.sha256 == b.sha256 and tuple(a.train.x.shape[1:]) == shape and a.train.x.dtype == torch.uint8
    counts = a.train.y.bincount()
    assert len(counts) == 10 and counts.max() - counts.min() <= 6 and a.train.x.float().std() > 20


def test_test_patches_share_no_pixel_with_training_patches(monkeypatch):
    """Photographs whose pixels name their own place."""

    def numbered(package, name, height):
        row, column = np.mgrid[0:height, 0:192]
        return np.stack([row, column, 0 * row], 2).astype(np.uint8)

    monkeypatch.setattr(generated, "photo", numbered)
    x, _, test, _ = generated.patches(n_train=200, n_test=200)
    pixels = [set(map(tuple, part.reshape(-1, 3)[:, :2])) for part in (x, test)]
    assert not pixels[0] & pixels[1] and len(pixels[1]) > 2000


def test_limits_keep_a_fixed_subset_and_too_much_is_told():
    a = data.load("digits", Path("."), train_limit=50, test_limit=20)
    b = data.load("digits", Path("."), train_limit=50)
    assert len(a.train) == 50 and len(a.test) == 20 and torch.equal(a.train.x, b.train.x)
    with pytest.raises(UserError, match="more than digits has"):
        data.load("digits", Path("."), train_limit=10**6)


def test_a_subset_is_balanced_over_the_classes():
    y = torch.tensor([0] * 700 + [1] * 200 + [2] * 100)[torch.randperm(1000)]
    assert y[data.balanced(y, 300)].bincount().tolist() == [100, 100, 100]
    assert sorted(y[data.balanced(y, 200)].bincount().tolist()) == [66, 67, 67]
    assert y[data.balanced(y, 600)].bincount().tolist() == [300, 200, 100]  # the third has no more
    keep = data.balanced(y, 300)
    assert len(keep.unique()) == 300 and torch.equal(keep, data.balanced(y, 300))
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    for k in range(3):  # of a fixed random order the first of each class
        assert keep[y[keep] == k].tolist() == [i for i in order if y[i] == k][:100]


CIFAR100 = (0.5070751592, 0.4865488733, 0.4409178434), (0.2673342859, 0.2564384629, 0.2761504713)
RELEASED = {  # classes, mean, std, padding of the crop, mirrored in training
    "cifar10": (10, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616), 4, True),
    "cifar100": (100, *CIFAR100, 4, True),
    "svhn": (10, (0.4380, 0.4440, 0.4730), (0.1751, 0.1771, 0.1744), 4, True),
    "tiny-imagenet": (200, *CIFAR100, 8, True),
    "imagenet100": (100, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0, True),
}


def test_constants_are_those_of_the_released_code():
    for name, want in RELEASED.items():
        k = readers.KINDS[name]
        assert (k.classes, k.mean, k.std, k.pad, k.flip) == want


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "mnist", "tiny-imagenet", "imagenet100"])
def test_missing_data_are_named_with_place_and_source(name, tmp_path):
    with pytest.raises(UserError) as error:
        data.load(name, tmp_path)
    text = str(error.value)
    assert str(tmp_path) in text and "--data-dir" in text and ("(" in text) and "\n" not in text


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "HERE", tmp_path / "here")
    return tmp_path


def test_broken_archives_are_told(here):
    (here / "cifar10").mkdir()
    (here / "cifar10" / "cifar10-jpeg.tar.xz").write_bytes(b"\xfd7zXZ\x00 cut off")
    (here / "cifar-100-python").mkdir()
    (here / "mnist").mkdir()
    (here / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"x" * 1000)[:40])
    for name in ("cifar10", "cifar100", "mnist"):
        with pytest.raises(UserError, match="damaged"):
            data.load(name, here)
    assert not list((here / "here").rglob("*.safetensors")) if (here / "here").exists() else True


def test_a_jpeg_copy_with_a_class_missing_is_told(here):
    for split, n in (("train", 3), ("test", 2)):
        for c in ("airplane", "cat"):
            folder = here / "cifar10" / split / c
            folder.mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (32, 32)).save(folder / f"{i}.jpg")
    with pytest.raises(UserError, match="6 . 4 pictures of 2 classes"):
        data.load("cifar10", here)


def test_mnist_is_read_from_idx_files(here):
    (here / "mnist").mkdir()
    for split, n in (("train-", 60000), ("t10k-", 10000)):
        x, y = np.zeros((n, 28, 28), np.uint8), (np.arange(n) % 10).astype(np.uint8)
        x[:, 0, 0] = y
        for name, head, raw in (("images-idx3-ubyte", 16, x), ("labels-idx1-ubyte", 8, y)):
            packed = gzip.compress(bytes(head) + raw.tobytes(), 1)
            (here / "mnist" / f"{split}{name}.gz").write_bytes(packed)
    d = data.load("mnist", here)
    assert d.train.x.shape == (60000, 28, 28, 1) and torch.equal(d.test.x[:, 0, 0, 0].long(), d.test.y)


def test_imagenet_pictures_are_streamed_and_their_crops_depend_on_nothing_else(here):
    rng = np.random.default_rng(0)
    for split, n in (("train", 2), ("val", 1)):
        for c in range(100):
            folder = here / "Imagenet-100" / split / f"n{c:03d}"
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / f"{i}.png")
    d = data.load("imagenet100", here)
    assert (len(d.train), len(d.test), d.size) == (200, 100, 224)
    one, two = (data.Batches(d, d.train, 64, CPU, workers=w) for w in (0, 2))
    torch.manual_seed(1)
    a = next(iter(one.epoch(0, 0, 1, generator())))
    torch.manual_seed(2)
    b = next(iter(two.epoch(0, 0, 1, generator())))
    assert a[0].shape == (64, 3, 224, 224) and torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    x, y = next(iter(data.Batches(d, d.test, 8, CPU).in_order()))
    assert x.shape == (8, 3, 224, 224) and y.tolist() == list(range(8))
    (here / "Imagenet-100" / "val" / "n003" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"^\S*n003/0.png cannot be read"):  # from a loader process, in one line
        list(data.Batches(d, d.test, 8, CPU, workers=1).in_order())
    (here / "Imagenet-100" / "train" / "n000" / "0.png").unlink()
    (here / "Imagenet-100" / "train" / "n000" / "1.png").unlink()
    (here / "Imagenet-100" / "train" / "n000").rmdir()
    with pytest.raises(UserError, match="99 class folders"):
        data.load("imagenet100", here)


def test_tiny_imagenet_layout(here):
    root = here / "tiny-imagenet-200"
    wnids = [f"n{c:03d}" for c in range(200)]
    root.mkdir()
    (root / "wnids.txt").write_text("\n".join(reversed(wnids)))
    for k, w in enumerate(wnids):
        folder = root / "train" / w / "images"
        folder.mkdir(parents=True)
        Image.new("RGB" if k % 2 else "L", (64, 64), k if k % 2 == 0 else (k, 0, 0)).save(folder / f"{w}_0.png")
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for k in (5, 150):
        Image.new("RGB", (64, 64)).save(root / "val" / "images" / f"val_{k}.png")
        lines.append(f"val_{k}.png\t{wnids[k]}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    d = data.load("tiny-imagenet", here)
    assert d.train.y.tolist() == list(range(200)) and d.test.y.tolist() == [5, 150] and d.size == 64
    assert d.variant == "200 + 2 pictures"  # not the whole data set
    (root / "val" / "val_annotations.txt").write_text("val_5.png\tn999\t0\t0\t62\t62\n")
    with pytest.raises(UserError, match="not complete .*'n999'"):
        data.load("tiny-imagenet", here)
    (root / "val" / "val_annotations.txt").unlink()
    with pytest.raises(UserError, match="not complete"):
        data.load("tiny-imagenet", here)


@pytest.mark.realdata
def test_the_jpeg_copy_of_cifar_has_its_measured_statistics():
    folder = Path(os.environ.get("REPRO_DATA", "data"))
    if not readers._tar(folder).is_file() and not (folder / "cifar10" / "train").is_dir():
        pytest.skip("no JPEG copy of CIFAR-10 under $REPRO_DATA/cifar10")
    d = data.load("cifar10", folder)
    if d.variant != "cifar10-jpeg75":
        pytest.skip("$REPRO_DATA has the original CIFAR-10")
    x = d.test.x.float() / 255
    assert len(d.train) == 50000 and d.train.y.bincount().tolist() == [5000] * 10
    torch.testing.assert_close(x.mean((0, 1, 2)), torch.tensor([0.4941, 0.4851, 0.4504]), atol=2e-3, rtol=0)


def test_tar_is_read_without_unpacking(here, monkeypatch):
    """A whole archive of the right layout, with the counts asked of it made small."""
    (here / "cifar10").mkdir()
    source = here / "p.jpg"
    Image.new("RGB", (32, 32), (9, 9, 9)).save(source)
    with tarfile.open(here / "cifar10" / "cifar10-jpeg.tar.xz", "w:xz") as tar:
        for c in range(10):
            tar.add(source, f"train/c{c}/0.jpg")
    with pytest.raises(UserError, match="10 . 0 pictures of 10 classes instead of 50000"):
        data.load("cifar10", here)
    assert not list(here.rglob("c0"))
