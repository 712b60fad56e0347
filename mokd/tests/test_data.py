"""Readers on miniature archives in every layout, picture preparation, generated characters, augmentation."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile

from lab.runs import UserError

import numpy as np
import pytest
import torch
from PIL import Image

import domains
import drawn
import episodes
import readers
import sets
import trainer


def png(value: int = 0, size=(6, 5), mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, value if mode != "RGB" else (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


def put(path, value: int = 0, size=(6, 5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value, size))


def folders(root, name: str, split: str, classes: list[str], n: int = 2) -> None:
    for k, c in enumerate(classes):
        for i in range(n):
            put(root / c / f"{i}.png", k % 256)


def check(d: domains.Domain, classes: int, n: int, firsts: bool = True) -> None:
    assert len(d.classes) == len(d.items) == classes and len(d) == n
    image = d.image(n - 1)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    if firsts:  # the red channel tells the class
        assert [int(d.image(d.offsets[k])[0, 0, 0]) for k in range(classes)] == [k % 256 for k in range(classes)]


@pytest.mark.parametrize(
    ("name", "place"), [("dtd", "dtd/images"), ("cu_birds", "CUB_200_2011/images"), ("ilsvrc_2012", "ILSVRC2012/train")]
)
def test_class_folders(name, place, tmp_path):
    names = sets.class_names(name, "test")
    folders(tmp_path / place, name, "test", names)
    d = domains.load(name, "test", tmp_path, 28)
    check(d, len(names), 2 * len(names))
    assert d.variant == f"{2 * len(names)} of {sum(sets.spec_counts(name, 'test'))} images" and bool(d.nodes) == (
        name == "ilsvrc_2012"
    )


def test_own_folders_come_before_the_publishers_layout(tmp_path):
    names = sets.class_names("dtd", "valid")
    folders(tmp_path / "dtd", "dtd", "valid", names, n=3)
    folders(tmp_path / "dtd" / "images", "dtd", "valid", names)
    assert len(domains.load("dtd", "valid", tmp_path, 28)) == 3 * len(names)
    (tmp_path / "dtd" / names[0] / "0.png").unlink()
    for p in (tmp_path / "dtd" / names[0]).iterdir():
        p.unlink()
    with pytest.raises(UserError, match=f"no image of class {names[0]}"):
        domains.load("dtd", "valid", tmp_path, 28)


def record(payload: bytes) -> bytes:
    return struct.pack("<Q", len(payload)) + b"cccc" + payload + b"cccc"


def test_tfrecords(tmp_path):
    from tfrecord import example_pb2

    first = sets.first_id("dtd", "test")
    root = tmp_path / readers.RECORDS / "dtd"
    root.mkdir(parents=True)
    for k in range(7):
        body = b""
        for _ in range(3):
            e = example_pb2.Example()
            e.features.feature["image"].bytes_list.value.append(png(k))
            e.features.feature["label"].int64_list.value.append(k)
            body += record(e.SerializeToString())
        (root / f"{first + k}.tfrecords").write_bytes(body)
    check(domains.load("dtd", "test", tmp_path, 28), 7, 21)
    path = root / f"{first}.tfrecords"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="cut off"):
        domains.load("dtd", "test", tmp_path, 28)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        domains.load("dtd", "test", tmp_path, 28)


def test_h5(tmp_path):
    import h5py

    first = sets.first_id("aircraft", "test")
    root = tmp_path / readers.H5 / "aircraft"
    root.mkdir(parents=True)
    for k in range(15):
        with h5py.File(root / f"{first + k}.h5", "w") as file:
            for i in range(2):
                file.create_group(str(i)).create_dataset("image", data=np.full((4, 4, 3), k, np.uint8))
    check(domains.load("aircraft", "test", tmp_path, 28), 15, 30)
    (root / f"{first}.h5").write_bytes(b"no")
    with pytest.raises(UserError, match="damaged"):
        domains.load("aircraft", "test", tmp_path, 28)


def omniglot_entries() -> list[tuple[str, bytes]]:
    out = []
    for part, split in (("images_background", "train"), ("images_background", "valid"), ("images_evaluation", "test")):
        for name in sets.class_names("omniglot", split):
            alphabet, _, character = name.rpartition("-")
            out += [(f"{part}/{alphabet}/{character}/0001_{i:02d}.png", png(1, (5, 5), "1")) for i in (1, 2)]
    return out


@pytest.mark.parametrize("zipped", [True, False])
def test_omniglot_is_inverted_and_split_by_alphabet(zipped, tmp_path):
    (tmp_path / "omniglot").mkdir()
    for part in ("images_background", "images_evaluation"):
        entries = [e for e in omniglot_entries() if e[0].startswith(part)]
        if zipped:
            with zipfile.ZipFile(tmp_path / "omniglot" / f"{part}.zip", "w") as file:
                for name, content in entries:
                    file.writestr(name, content)
        elif "evaluation" in part:  # the unpacked layout once more, for one split
            for name, content in entries:
                (tmp_path / "omniglot" / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "omniglot" / name).write_bytes(content)
    for split, n, groups in (("train", 883, 25), ("valid", 81, 5), ("test", 659, 20)):
        if zipped or split == "test":
            d = domains.load("omniglot", split, tmp_path, 28)
            check(d, n, 2 * n, firsts=False)
            assert len(d.groups) == groups and int(d.image(0).max()) == 0  # white paper becomes black
    if zipped:
        (tmp_path / "omniglot" / "images_evaluation.zip").write_bytes(b"PK no")
        with pytest.raises(UserError, match="damaged"):
            domains.load("omniglot", "test", tmp_path, 28)


def test_aircraft_is_cropped_and_joins_its_splits(tmp_path):
    root = tmp_path / "fgvc-aircraft-2013b" / "data"
    names = sets.class_names("aircraft", "test")
    lines, boxes = {"train": [], "val": [], "test": []}, []
    for k, n in enumerate(names):
        for split in lines:
            image = f"{len(boxes):07d}"
            put(root / "images" / f"{image}.jpg", k, (20, 10))
            lines[split].append(f"{image} {n}")
            boxes.append(f"{image} 2 3 12 9")
    (root / "images_box.txt").write_text("\n".join(boxes))
    for split, found in lines.items():
        (root / f"images_variant_{split}.txt").write_text("\n".join([*found, "9999999 Not a class"]))
    d = domains.load("aircraft", "test", tmp_path, 28)
    check(d, 15, 45, firsts=False)
    assert d.image(0).shape == (6, 10, 3)
    (root / "images_box.txt").unlink()
    with pytest.raises(UserError, match="damaged"):
        domains.load("aircraft", "test", tmp_path, 28)


def test_quickdraw_is_cut_but_counted_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(sets.CAP, "quickdraw", 3)
    (tmp_path / "quickdraw").mkdir()
    for k, n in enumerate(sets.class_names("quickdraw", "test")):
        np.save(tmp_path / "quickdraw" / f"{n}.npy", np.full((5, 784), k, np.uint8))
    d = domains.load("quickdraw", "test", tmp_path, 28)
    check(d, 52, 156)
    assert d.counts == tuple(sets.spec_counts("quickdraw", "test")) and d.pool.available == (3,) * 52
    assert "at most 3" in d.variant
    assert domains.load("quickdraw", "test", tmp_path, 28, limit=2).counts == (2,) * 52
    (tmp_path / "quickdraw" / f"{n}.npy").unlink()
    with pytest.raises(UserError, match="a file for each class"):
        domains.load("quickdraw", "test", tmp_path, 28)


def test_fungi(tmp_path):
    names = sets.class_names("fungi", "test")
    categories = [{"id": int(n.split(".")[0]), "name": n.split(".", 1)[1]} for n in names]
    (tmp_path / "fungi").mkdir()
    for split in ("train", "val"):
        images = [{"id": k, "file_name": f"images/{split}{k}.png"} for k in range(len(names))]
        marks = [{"image_id": k, "category_id": c["id"]} for k, c in enumerate(categories)]
        for k, image in enumerate(images):
            put(tmp_path / "fungi" / image["file_name"], k)
        content = {"images": images, "categories": categories, "annotations": marks}
        (tmp_path / "fungi" / f"{split}.json").write_text(json.dumps(content))
    check(domains.load("fungi", "test", tmp_path, 28), 200, 400)


def test_flowers(tmp_path):
    import scipy.io

    names = sets.class_names("vgg_flower", "test")
    labels = [int(n.split(".")[0]) for n in names for _ in range(2)] + [999]
    (tmp_path / "flowers-102").mkdir()
    scipy.io.savemat(tmp_path / "flowers-102" / "imagelabels.mat", {"labels": np.array([labels])})
    for i in range(len(labels)):
        put(tmp_path / "flowers-102" / "jpg" / f"image_{i + 1:05d}.jpg", min(i // 2, 255))
    check(domains.load("vgg_flower", "test", tmp_path, 28), 16, 32)


def test_traffic_signs(tmp_path):
    for k in range(43):
        for i in range(2):
            path = tmp_path / "gtsrb" / "GTSRB" / "Training" / f"{k:05d}" / f"{i}.ppm"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (k, 0, 0)).save(path)
    check(domains.load("traffic_sign", "test", tmp_path, 28), 43, 86)


def test_coco_boxes(tmp_path):
    names = sets.class_names("mscoco", "test")
    root = tmp_path / "coco"
    put(root / "train2017" / "a.jpg", 9, (50, 40))
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 50, "height": 40}],
        "categories": [{"id": 10 + k, "name": n} for k, n in enumerate(names)],
        "annotations": [
            {"id": k, "image_id": 1, "category_id": 10 + k % 40, "bbox": [10, 10, 20, 10]} for k in range(80)
        ],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    d = domains.load("mscoco", "test", tmp_path, 28)
    check(d, 40, 80, firsts=False)
    assert d.image(0).shape == (12, 24, 3)
    # 20 x 10 around (20, 15), times 1.2: 8 to 32, 9 to 21; at the border cut; never empty
    assert readers.enlarged([10, 10, 20, 10], 50, 40) == [8, 9, 32, 21]
    assert readers.enlarged([40, 30, 20, 20], 50, 40) == [38, 28, 50, 40]
    assert readers.enlarged([49.9, 39.9, 0.01, 0.01], 50, 40) == [49, 39, 50, 40]


def write_mnist(root, n: int = 20) -> None:
    root.mkdir(parents=True, exist_ok=True)
    pixels = np.repeat(np.arange(n, dtype=np.uint8) % 10, 784)
    with gzip.open(root / "t10k-images-idx3-ubyte.gz", "wb") as file:
        file.write(b"\0" * 16 + pixels.tobytes())
    with gzip.open(root / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"\0" * 8 + (np.arange(n) % 10).astype(np.uint8).tobytes())


def test_mnist_test_images_only(tmp_path):
    write_mnist(tmp_path / "mnist")
    d = domains.load("mnist", "test", tmp_path, 28)
    check(d, 10, 20)
    assert d.variant == "20 images" and domains.load("mnist", "test", tmp_path, 84).image(0).shape == (84, 84, 3)
    with pytest.raises(UserError, match="no train classes"):
        domains.load("mnist", "train", tmp_path, 28)
    (tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="damaged"):
        domains.load("mnist", "test", tmp_path, 28)


@pytest.mark.parametrize(("name", "n"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar(name, n, tmp_path):
    inner = {"cifar10": "cifar-10-batches-py/test_batch", "cifar100": "cifar-100-python/test"}[name]
    path = tmp_path / name / inner
    path.parent.mkdir(parents=True)
    data = np.zeros((2 * n, 3072), np.uint8)
    data[:, :1024] = (np.arange(2 * n) % n)[:, None]
    key = b"labels" if name == "cifar10" else b"fine_labels"
    path.write_bytes(pickle.dumps({b"data": data, key: [k % n for k in range(2 * n)]}, protocol=2))
    check(domains.load(name, "test", tmp_path, 32), n, 2 * n)
    path.write_bytes(pickle.dumps({b"data": print}))
    with pytest.raises(UserError, match="does not belong"):
        domains.load(name, "test", tmp_path, 32)


def test_incomplete_jpeg_copy_is_refused(tmp_path):
    (tmp_path / "cifar10").mkdir()
    with tarfile.open(tmp_path / "cifar10" / "cifar10-jpeg.tar.xz", "w:xz") as tar:
        content = png()
        info = tarfile.TarInfo("x/test/cat/1.jpg")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match="1 test images of 1 classes"):
        domains.load("cifar10", "test", tmp_path, 32)


@pytest.mark.parametrize("name", sets.PAPER)
def test_what_is_missing_is_told_with_its_layout(name, tmp_path):
    with pytest.raises(UserError) as error:
        domains.load(name, "test", tmp_path, 28)
    assert readers.PLACES[name][0] in str(error.value) and "--data-dir" in str(error.value)


def test_broken_picture_is_named(tmp_path):
    names = sets.class_names("dtd", "test")
    folders(tmp_path / "dtd", "dtd", "test", names)
    (tmp_path / "dtd" / names[0] / "1.png").write_bytes(b"no picture")
    d = domains.load("dtd", "test", tmp_path, 28)
    with pytest.raises(UserError, match="1.png cannot be read"):
        d.image(1)


def test_preparation_is_bilinear_with_aligned_corners():
    x = np.zeros((2, 2, 3), np.uint8)
    x[0, 1], x[1, 0] = 255, 51
    out = domains.prepare(x, 3)
    rows = (out[0] + 1) * 127.5
    expected = torch.tensor([[0, 127.5, 255], [25.5, 76.5, 127.5], [51, 25.5, 0]])
    assert torch.allclose(rows, expected, atol=1e-3) and out.shape == (3, 3, 3)
    assert domains.prepare(np.full((5, 5, 3), 255, np.uint8), 5).max() == 1


def test_drawn_characters():
    a, b = drawn.draw(0, 0, 28), drawn.draw(0, 1, 28)
    assert a.shape == (20, 28, 28) and a.dtype == np.uint8 and np.array_equal(a, drawn.draw(0, 0, 28))
    assert not np.array_equal(a, b) and not np.array_equal(a[0], a[1])
    assert 0.02 < (a > 127).mean() < 0.6
    splits = [set(drawn.SPLITS[s]) for s in sets.SPLITS]
    assert not splits[0] & splits[1] and not (splits[0] | splits[1]) & splits[2]
    d = domains.load("drawn", "valid", None, 28)
    assert len(d.groups) == 5 and len(d) == 5 * 20 * 20
    task = episodes.sample(d.pool, episodes.LAWS["varied"], 0, 0)
    k = int(d.number(task.query[:1, 1], task.query[:1, 2])[0])
    assert np.array_equal(d.image(k)[..., 0], d.items[task.query[0, 1]][task.query[0, 2]])


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_digits_inside_packages(name):
    d = domains.load(name, "test", None, 28)
    assert d.variant == "wheel" and len(d.classes) == 10 and len(d) == {"digits": 1797, "mnist5k": 5000}[name]


def test_checksum_changes_with_the_data(tmp_path):
    names = sets.class_names("dtd", "test")
    folders(tmp_path / "dtd", "dtd", "test", names)
    first = domains.load("dtd", "test", tmp_path, 28).sha256
    put(tmp_path / "dtd" / names[0] / "0.png", 3, (60, 50))
    assert domains.load("dtd", "test", tmp_path, 28).sha256 != first


def test_augmentation_stays_in_range_and_does_nothing_at_its_middle():
    x = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    middle = torch.tensor([[8.5 / 17, 8.5 / 17, 0.5, 0.5, 0.5, 0.5]]).repeat(4, 1)
    assert torch.allclose(trainer.augment(x, middle), x, atol=1e-3)
    out = trainer.augment(x, torch.rand(4, 6, generator=torch.Generator().manual_seed(1)))
    assert out.min() >= -1 and out.max() <= 1 and not torch.allclose(out, x, atol=0.05)
    corner = middle.clone()
    corner[:, :2] = 0  # the crop that begins 8 pixels up and left: reflected pixels
    assert torch.allclose(trainer.augment(x, corner)[:, :, 8:, 8:], x[:, :, :4, :4], atol=1e-3)
    bright = middle.clone()
    bright[:, 2] = 1
    dark = torch.full_like(x, -1.0)
    assert torch.allclose(trainer.augment(dark, bright), torch.full_like(x, -0.75), atol=1e-3)  # 0 + 0.125 of 1


@pytest.mark.realdata
def test_omniglot_and_mnist_are_whole(realdata):
    assert domains.load("omniglot", "test", realdata, 28).variant == "paper"
    assert domains.load("mnist", "test", realdata, 28).variant == "paper"


def test_pictures_are_interpolated_with_aligned_corners():
    """Pixel i of n lies at i (old - 1) / (n - 1) of the old grid; corners stay; 0 to 255 becomes -1 to 1."""
    x = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    found = domains.prepare(x, 4)
    for i in range(4):
        for j in range(4):
            r, c = i * 4 / 3, j * 6 / 3
            a, b = min(int(r), 3), min(int(c), 5)
            u, v = r - a, c - b
            at = x[a : a + 2, b : b + 2].astype(float)
            value = (at[0, 0] * (1 - v) + at[0, 1] * v) * (1 - u) + (at[1, 0] * (1 - v) + at[1, 1] * v) * u
            assert found[:, i, j].tolist() == pytest.approx((value / 127.5 - 1).tolist(), abs=1e-4)
    assert domains.prepare(x[:, :5], 5)[:, 0, 0].tolist() == pytest.approx((x[0, 0] / 127.5 - 1).tolist(), abs=1e-6)


def test_digits_are_resampled_by_lanczos():
    """An edge rings above and below its levels, as it does with Lanczos alone (and no size, no change)."""
    x = np.full((1, 10, 10), 60, np.uint8)
    x[:, :, 5:] = 180
    found = readers.lanczos(x, 30)
    assert found.shape == (1, 30, 30) and found.min() < 60 and found.max() > 180
    expected = Image.fromarray(x[0]).resize((30, 30), Image.Resampling.LANCZOS)
    assert np.array_equal(found[0], np.asarray(expected)) and readers.lanczos(x, 10) is x
    assert not np.array_equal(found[0], np.asarray(Image.fromarray(x[0]).resize((30, 30), Image.Resampling.BICUBIC)))
