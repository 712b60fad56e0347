"""Readers on hand-made miniature archives in the official layouts, each also with a class or a file missing."""

import pickle

from lab.runs import UserError

import numpy as np
import pytest
from PIL import Image

import data


def picture(path, size=(8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (len(path.name) * 9 % 255, 50, 90)).save(path)


def cub(root) -> None:
    base = root / "CUB_200_2011"
    names = [f"{i + 1:03d}.{n.replace(' ', '_')}" for i, n in enumerate(data.id_names("cub200"))]
    rows = {k: [] for k in ("images", "image_class_labels", "train_test_split")}
    for i, n in enumerate(names):
        for train in (0, 1):
            number = 2 * i + train + 1
            rows["images"].append(f"{number} {n}/{number}.jpg")
            rows["image_class_labels"].append(f"{number} {i + 1}")
            rows["train_test_split"].append(f"{number} {train}")
            if not train:
                picture(base / "images" / n / f"{number}.jpg")
    rows["classes"] = [f"{i + 1} {n}" for i, n in enumerate(names)]
    for key, lines in rows.items():
        (base / f"{key}.txt").write_text("\n".join(lines) + "\n")


def cars(root, names=None) -> None:
    from scipy.io import savemat

    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True, exist_ok=True)
    names = names or data.id_names("cars196")
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(names, dtype=object)})
    notes = np.array([(f"{i:05d}.jpg", i % 196 + 1) for i in range(200)], dtype=[("fname", object), ("class", object)])
    savemat(base / "cars_test_annos_withlabels.mat", {"annotations": notes})
    for i in range(200):
        picture(base / "cars_test" / f"{i:05d}.jpg")


def food(root) -> None:
    base = root / "food-101"
    folders = [n.lower().replace(" ", "_") for n in data.id_names("food101")]
    (base / "meta").mkdir(parents=True)
    (base / "meta" / "classes.txt").write_text("\n".join(folders) + "\n")
    (base / "meta" / "test.txt").write_text("\n".join(f"{f}/1" for f in folders) + "\n")
    for f in folders:
        picture(base / "images" / f / "1.jpg")


def pet(root, names=None) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, n in enumerate(names or data.id_names("pet37")):
        stem = n.replace(" ", "_") + "_7"
        lines.append(f"{stem} {i + 1} 1 1")
        picture(base / "images" / f"{stem}.jpg")
    (base / "annotations" / "test.txt").write_text("\n".join(lines) + "\n")


def test_cub_test_images_only(tmp_path):
    cub(tmp_path)
    found = data.load("cub200", tmp_path)
    assert len(found) == 200 and found.labels == list(range(200)) and found.variant == "200 of 5794 images"
    assert found[0].size == (8, 6)
    half, other = data.load("cub100", tmp_path), data.load("cub100-ood", tmp_path)
    assert len(half) == len(other) == 100 and not {*half.items} & {*other.items}
    # The split's order decides the class index: image, folder and prompt name belong together.
    for item, label in zip(half.items, half.labels, strict=True):
        assert item.parent.name.split(".", 1)[1].replace("_", " ").lower() == half.names[label].lower()
    path = tmp_path / "CUB_200_2011" / "classes.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match=r"entry 199: nothing instead of .*199 classes, 200 wanted"):
        data.load("cub200", tmp_path)
    (tmp_path / "CUB_200_2011" / "train_test_split.txt").unlink()
    with pytest.raises(UserError, match="train_test_split.txt is missing"):
        data.load("cub200", tmp_path)


def test_cars(tmp_path):
    cars(tmp_path)
    found = data.load("cars196", tmp_path)
    assert len(found) == 200 and found.labels[:2] == [0, 1] and found.labels[196] == 0
    both = len(data.load("cars98", tmp_path)), len(data.load("cars98-ood", tmp_path))
    assert sum(both) == 200
    cars(tmp_path, data.id_names("cars196")[:-1])
    with pytest.raises(UserError, match="195 classes, 196 wanted"):
        data.load("cars196", tmp_path)


def test_food(tmp_path):
    food(tmp_path)
    found = data.load("food101", tmp_path)
    assert len(found) == 101 and found.labels == list(range(101))
    half = data.load("food50", tmp_path)
    assert len(half) == 50 and len(data.load("food50-ood", tmp_path)) == 51
    for item, label in zip(half.items, half.labels, strict=True):
        assert item.parent.name.replace("_", " ") == half.names[label].lower()
    found.items[5].unlink()
    with pytest.raises(UserError, match="is missing; unpack"):
        data.load("food101", tmp_path)


def test_pet(tmp_path):
    pet(tmp_path)
    assert data.load("pet37", tmp_path).labels == list(range(37))
    assert len(data.load("pet18", tmp_path)) == 18 and len(data.load("pet18-ood", tmp_path)) == 19
    pet(tmp_path, data.id_names("pet37")[:-1])
    with pytest.raises(UserError, match="36 classes, 37 wanted"):
        data.load("pet37", tmp_path)


@pytest.mark.parametrize(("name", "top"), [("imagenet1k", "ImageNet/val"), ("sketch", "ImageNet-Sketch"),
                                           ("imagenet-c-snow", "ImageNet-C/snow/1")])  # fmt: skip
def test_wnid_folders(name, top, tmp_path):
    wnids = [c["wnid"] for c in data.split("imagenet1k_class_names")["classes"]]
    for w in wnids:
        folder = tmp_path / top / w
        folder.mkdir(parents=True)
        (folder / "x.JPEG").write_bytes(b"")
    found = data.load(name, tmp_path)
    assert len(found) == 1000 and found.labels == list(range(1000)) and len(found.names) == 1000
    (tmp_path / top / wnids[7] / "x.JPEG").unlink()
    with pytest.raises(UserError, match="holds no images"):
        data.load(name, tmp_path)
    (tmp_path / top / wnids[7]).rmdir()
    with pytest.raises(UserError, match=f"lacks the class folder {wnids[7]}"):
        data.load(name, tmp_path)


@pytest.mark.parametrize("name", ["inaturalist", "sun", "ssb_hard", "ninco", "lsun"])
def test_folders_of_images(name, tmp_path):
    top = tmp_path / data.PLACES[name].path
    with pytest.raises(UserError, match="is missing; place"):
        data.load(name, tmp_path)
    top.mkdir(parents=True)
    with pytest.raises(UserError, match="holds no images"):
        data.load(name, tmp_path)
    for i in (2, 0, 1):
        picture(top / "images" / f"{i}.jpg")
    found = data.load(name, tmp_path)
    assert [p.stem for p in found.items] == ["0", "1", "2"] and found.labels == [-1] * 3 and found.names == []


def test_ground_truth_names_of_texture_and_places(tmp_path):
    texture = tmp_path / data.PLACES["texture"].path
    for c in ("polka-dotted", "banded"):
        picture(texture / c / f"{c}_0001.jpg")
    found = data.load("texture", tmp_path)
    assert found.names == ["banded", "polka dotted"] and found.labels == [0, 1]
    places = tmp_path / data.PLACES["places"].path / "images"
    picture(places / "b_badlands_00000192.jpg")
    picture(places / "f_forest_path_00000001.jpg")
    assert data.load("places", tmp_path).names == ["badlands", "forest path"]
    picture(places / "other.jpg")  # one file without a class: no list is better than a wrong one
    assert data.load("places", tmp_path).names == []


def test_cifar_and_svhn(tmp_path):
    rng = np.random.default_rng(0)
    for name, folder, key, meta in (("cifar10", "cifar-10-batches-py", "labels", "batches.meta"),
                                    ("cifar100", "cifar-100-python", "fine_labels", "meta")):  # fmt: skip
        import hashlib

        import torchvision.datasets as tv

        base = tmp_path / folder
        base.mkdir()
        k = 10 if name == "cifar10" else 100
        batch = pickle.dumps({"data": rng.integers(0, 255, (k, 3072), dtype=np.uint8), key: list(range(k))})
        names = data.id_names(name)
        kind = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[name]
        with pytest.raises(UserError, match="missing or damaged"):
            data.load(name, tmp_path)
        for wanted in (names, names[:-1]):
            about = pickle.dumps({"label_names" if k == 10 else "fine_label_names": wanted})
            (base / ("test_batch" if k == 10 else "test")).write_bytes(batch)
            (base / meta).write_bytes(about)
            digest = lambda b: hashlib.md5(b).hexdigest()  # noqa: E731
            with pytest.MonkeyPatch.context() as patch:  # the archive is ours, so are its checksums
                patch.setattr(kind, "train_list", [])
                patch.setattr(kind, "test_list", [("test_batch" if k == 10 else "test", digest(batch))])
                patch.setattr(kind, "meta", {**kind.meta, "md5": digest(about)})
                if wanted is names:
                    found = data.load(name, tmp_path)
                    assert len(found) == k and found.labels == list(range(k)) and found[0].size == (32, 32)
                else:
                    with pytest.raises(UserError, match="differs from splits"):
                        data.load(name, tmp_path)
