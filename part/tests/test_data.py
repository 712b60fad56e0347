"""Data sets, batches, crops; readers on miniature archives."""

import sys

from lab import runs

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluation
import generated
import glyphs
import models
import readers
import train

CPU = torch.device("cpu")


def test_glyphs_are_the_same_each_time_and_their_boxes_hold_them():
    one, two = glyphs.make(60, 40), glyphs.make(60, 40)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    x, y, x_test, y_test, box, _ = one
    assert x.shape == (60, 16, 16, 3) and x.dtype == np.uint8 and np.bincount(y).tolist() == [15] * 4
    assert len(x_test) == len(y_test) == 40
    inside = glyphs.inside(box)
    there = box[:, 0] >= 0
    assert (inside.sum((1, 2)) == np.where(there, 49, 0)).all() and 0.1 < 1 - there.mean() < 0.45
    bright = x.mean(3) > 210
    assert (bright.sum((1, 2))[there] >= 10).all() and not (bright & ~inside).any()


def test_the_texture_tells_the_class_when_the_object_is_missing():
    x, y, *_, box, _ = glyphs.make(2000, 4, missing=1.0)
    assert (box == -1).all()
    means = np.stack([x[y == k].mean(0) for k in range(4)])
    fold = means.reshape(4, 4, 4, 4, 4, 3).mean((1, 3))  # period of four pixels
    half = x[:200].reshape(200, 4, 4, 4, 4, 3).mean((1, 3))
    found = ((half[:, None] - fold[None]) ** 2).sum((2, 3, 4)).argmin(1)
    assert (found == y[:200]).mean() > 0.9


@pytest.mark.parametrize("name", data.WHEEL)
def test_what_needs_no_download(name):
    d = data.load(name, runs.HERE / "nowhere", train_limit=50)
    assert len(d.train) == 50 and d.size[0] == d.size[1] and d.about()["sha256"] == data.load(name, runs.HERE).sha256


def test_crops_and_flips_against_a_loop():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (9, 6, 6, 3), dtype=torch.uint8, generator=g)
    ours = data.crop_and_flip(x, 2, True, torch.Generator().manual_seed(4))
    draw = torch.rand(3, 9, generator=torch.Generator().manual_seed(4))
    for i in range(9):
        padded = torch.zeros(10, 10, 3, dtype=torch.uint8)
        padded[2:8, 2:8] = x[i]
        top, left = int(draw[0, i] * 5), int(draw[1, i] * 5)
        wanted = padded[top : top + 6, left : left + 6]
        assert torch.equal(ours[i], wanted.flip(1) if draw[2, i] < 0.5 else wanted)
    assert data.crop_and_flip(x, 0, False, g) is x


def test_every_epoch_is_a_permutation_and_starts_where_asked():
    x = torch.arange(23, dtype=torch.uint8).view(23, 1, 1, 1)
    b = data.Batches(data.Images(x, torch.arange(23)), data.KINDS["glyphs"], 5, CPU)
    g = torch.Generator()
    one = [y for _, y in b.epoch(7, 0, g)]
    assert torch.cat(one).sort().values.tolist() == list(range(23)) and len(one[-1]) == 3
    assert torch.equal(torch.cat([y for _, y in b.epoch(7, 2, g)]), torch.cat(one[2:]))
    assert torch.equal((255 * b.one(7, 1, g)).round().long().flatten(), one[1])
    assert not torch.equal(torch.cat([y for _, y in b.epoch(8, 0, g)]), torch.cat(one))


# ----------------------------------------------------------------------------------------------------- real data sets


def test_missing_data_names_place_and_source(tmp_path):
    for name, words in (
        ("cifar10", "cifar-10-batches-py"),
        ("svhn", "train_32x32.mat"),
        ("tiny-imagenet", "wnids.txt"),
    ):
        with pytest.raises(runs.UserError, match=words) as told:
            data.load(name, tmp_path)
        assert "--data-dir" in str(told.value)


def test_svhn_in_miniature(tmp_path):
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("test", 8)):
        x = rng.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        savemat(tmp_path / f"{split}_32x32.mat", {"X": x, "y": (np.arange(n) % 10 + 1)[:, None]})
    reader = readers._torchvision
    with pytest.MonkeyPatch.context() as patch:  # torchvision compares a checksum of the whole archive
        patch.setattr("torchvision.datasets.SVHN._check_integrity", lambda self: True)
        d = data.load("svhn", tmp_path)
    assert reader and len(d.train) == 12 and sorted(set(d.train.y.tolist())) == list(range(10)) and d.kind.pad == 0


def tiny_imagenet(root, classes=3, per=2):
    names = [f"n{k:08d}" for k in range(classes)]
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(names))
    marks = []
    for k, name in enumerate(names):
        folder = root / "train" / name / "images"
        folder.mkdir(parents=True)
        for i in range(per):
            Image.new("RGB", (64, 64), (10 * k, i, 0)).save(folder / f"{name}_{i}.JPEG")
        Image.new("RGB", (64, 64), (10 * k, 0, 0)).save(root / "val" / "images" / f"val_{k}.JPEG")
        marks.append(f"val_{k}.JPEG\t{name}\t0\t0\t1\t1")
    (root / "val" / "val_annotations.txt").write_text("\n".join(marks))


def test_tiny_imagenet_in_miniature(tmp_path, monkeypatch):
    tiny_imagenet(tmp_path / "tiny-imagenet-200")
    monkeypatch.setattr(readers, "HERE", tmp_path)  # where the decoded pictures are kept
    d = data.load("tiny-imagenet", tmp_path)
    assert len(d.train) == 6 and d.size == (64, 64) and d.test.y.tolist() == [0, 1, 2] and d.variant == "6 + 3 pictures"
    net = models.build("wrn-10-1", 200, 3).eval()
    x, _ = next(data.Batches(d.test, d.kind, 3, CPU).in_order())
    assert net(x).shape == (3, 200)


def test_a_single_class_is_told(monkeypatch):
    monkeypatch.setattr(generated, "make", lambda *a: (np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4), *digits_test()))
    with pytest.raises(runs.UserError, match="single class"):
        data.load("digits", runs.HERE)


def digits_test():
    return np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2)


def cifar_c(folder, n=4, classes=10):
    root = folder / "CIFAR-10-C"
    root.mkdir()
    rng = np.random.default_rng(0)
    for name in data.CORRUPTIONS:
        np.save(root / f"{name}.npy", rng.integers(0, 256, (5 * n, 32, 32, 3), dtype=np.uint8))
    np.save(root / "labels.npy", np.tile(np.arange(n) % classes, 5).astype(np.uint8))
    return root


def test_corruption_accuracy_is_a_mean_over_blocks(tmp_path):
    root = cifar_c(tmp_path)

    class Bright(torch.nn.Module):
        """Says class 0 on dark images and class 1 on bright ones."""

        def forward(self, x):
            bright = x.mean((1, 2, 3)) > 0.5
            return torch.nn.functional.one_hot(bright.long(), 10).float()

    x = np.zeros((20, 32, 32, 3), np.uint8)
    x[4:8] = 255  # severity 2: all bright, class 1 is right once of four; elsewhere class 0 is right once of four
    x[8:12][1] = 255  # severity 3: images 0 and 1 both right
    np.save(root / "fog.npy", x)
    found = evaluation.corruption_accuracy(Bright(), tmp_path, 3, CPU)
    assert found["corruption_fog"] == pytest.approx((25 * 4 + 50) / 5)
    rest = [found[f"corruption_{c}"] for c in data.CORRUPTIONS]
    assert len(rest) == 15 and found["corruption"] == pytest.approx(np.mean(rest))
    x3, y3 = data.corrupted(tmp_path, "fog", 3)
    assert x3[1].min() == 255 and x3[0].max() == 0 and y3.tolist() == [0, 1, 2, 3]


def test_an_incomplete_or_damaged_cifar_c_is_told(tmp_path):
    with pytest.raises(runs.UserError, match="Zenodo"):
        data.corrupted(tmp_path, "fog", 1)
    root = cifar_c(tmp_path)
    (root / "fog.npy").write_bytes((root / "fog.npy").read_bytes()[:300])
    with pytest.raises(runs.UserError, match="damaged"):
        data.corrupted(tmp_path, "fog", 1)
    np.save(root / "snow.npy", np.zeros((7, 32, 32, 3), np.uint8))
    with pytest.raises(runs.UserError, match="damaged"):
        data.corrupted(tmp_path, "snow", 1)


def there(name):
    folder = runs.data_dir("")
    if not (folder / name).exists():
        pytest.skip(f"no {name} in {folder}")
    return folder


@pytest.mark.realdata
def test_the_jpeg_copy_of_cifar10_and_an_arm_on_it(tmp_path, monkeypatch):
    folder = there("cifar10")
    d = data.load("cifar10", folder)
    assert len(d.train) == 50_000 and d.train.y.bincount().tolist() == [5000] * 10 and d.kind.pad == 4
    assert len(d.test) == 10_000 and d.test.y.bincount().tolist() == [1000] * 10 and d.size == (32, 32)
    assert 0.46 < d.train.x[::25].float().mean() / 255 < 0.49  # published mean 0.473
    args = [
        "--dataset",
        "cifar10",
        "--model",
        "resnet18-w8",
        "--epochs",
        "3",
        "--warmup",
        "1",
        "--train-limit",
        "256",
    ]
    args += ["--steps", "2", "--eval-limit", "20", "--test-steps", "2", "--probe", "20", "--probe-steps", "1"]
    args += ["--method", "part", "part-m", "--mask-rule", "jet-rgb", "--mask-order", "released", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", *args, "--out", str(tmp_path / "r")])
    train.main()
    r = runs.read_record(tmp_path / "r" / "seed0" / "record-part.json")
    assert r["data"]["variant"] == d.variant and r["data"]["sha256"] == d.sha256 and 7 < r["metrics"]["budget"] < 8


@pytest.mark.realdata
def test_mnist():
    d = data.load("mnist", there("mnist"))
    assert len(d.train) == 60_000 and len(d.test) == 10_000 and d.size == (28, 28) and d.channels == 1
    assert d.test.y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
