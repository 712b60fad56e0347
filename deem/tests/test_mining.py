"""RobustVQA mining with a random open_clip model of a few thousand weights."""

import json
import random

from lab import runs
from lab.runs import UserError

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mining
from evaluation import benchmarks, robustvqa
from evaluation.clip import MEAN, STD, imagenet_classes, load_clip

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory):
    """(configuration, weights) of a small random CLIP, as a user would place them."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    model = open_clip.CLIP(**{k: v for k, v in CONFIG.items()})
    runs.write_tensors(folder / "tiny.safetensors", model.state_dict())
    return folder / "tiny-clip.json", folder / "tiny.safetensors"


def picture(path, seed: int, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")


@pytest.fixture
def data(tmp_path):
    wnids, _ = imagenet_classes()
    root = tmp_path / "data" / "deem" / "robustvqa"
    for k in range(5):
        picture(root / "imagenet-a" / wnids[6 + k] / f"{k}.jpg", k)
        picture(root / "imagenet-r" / wnids[100] / f"{k}.jpg", 10 + k)
        picture(root / "imagenetv2" / str(7 * k) / f"{k}.jpeg", 20 + k)
    return tmp_path / "data"


def mine(monkeypatch, data, clip_files, out, *words) -> dict:
    config, weights = clip_files
    base = ["mining.py", "--data-dir", str(data), "--out", str(out), "--clip", str(config), "--weights", str(weights)]
    monkeypatch.setattr("sys.argv", [*base, "--device", "cpu", "--batch-size", "4", *words])
    mining.main()
    return robustvqa.read_robustvqa(out / robustvqa.FILE)


# -------------------------------------------------------------------------------------------------------------- classes


def test_the_thousand_names_are_keras_style():
    wnids, names = imagenet_classes()
    assert len(wnids) == len(set(wnids)) == len(names) == 1000 and wnids[:2] == ["n01440764", "n01443537"]
    assert names[:5] == ["tench", "goldfish", "great_white_shark", "tiger_shark", "hammerhead"]
    assert (names[151], names[207], names[281], names[999]) == (
        "Chihuahua",
        "golden_retriever",
        "tabby",
        "toilet_tissue",
    )
    twice = {n for n in names if names.count(n) > 1}
    assert twice == {"crane", "maillot"} and not any(" " in n for n in names)


def test_a_class_index_of_keras_goes_first(tmp_path):
    path = tmp_path / "imagenet_class_index.json"
    path.write_text(json.dumps({str(k): [f"n{k:08d}", f"name_{k}"] for k in range(1000)}))
    assert imagenet_classes(path)[1][3] == "name_3"
    path.write_text('{"0": ["n", "x"]}')
    with pytest.raises(UserError, match="not Keras' class index"):
        imagenet_classes(path)


# ------------------------------------------------------------------------------------------------------------- features


def test_pictures_are_squashed_not_cropped(clip_files):
    clip = load_clip(str(clip_files[0]), str(clip_files[1]), "cpu")
    assert clip.size == 32
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 64, 3), dtype=np.uint8))
    got = clip.pixels([image])
    plain = np.asarray(image.resize((32, 32), Image.BICUBIC), np.float64) / 255
    expected = (plain - np.array(MEAN)) / np.array(STD)
    assert got.shape == (1, 3, 32, 32) and np.abs(got[0].permute(1, 2, 0).numpy() - expected).max() < 1e-5
    cropped = clip.pixels([image], crop=True)  # short side to 32, the middle of the long one
    middle = np.asarray(image.resize((102, 32), Image.BICUBIC).crop((35, 0, 67, 32)), np.float64) / 255
    expected = (middle - np.array(MEAN)) / np.array(STD)
    assert np.abs(cropped[0].permute(1, 2, 0).numpy() - expected).max() < 1e-5


@given(st.integers(2, 6), st.integers(2, 5), st.integers(0, 99), st.booleans())
@settings(max_examples=40, deadline=None)
def test_top_two_equals_loops(n, k, seed, normalise):
    g = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(n, 4, generator=g) * 5, torch.randn(k, 4, generator=g)
    got = robustvqa.top_two(images, texts, normalise)
    for i in range(n):
        score = []
        for t in texts.double():
            cosine = float(images[i].double() @ t / images[i].double().norm())
            score.append(cosine / float(t.norm()) if normalise else cosine)
        assert got[i].tolist() == sorted(range(k), key=lambda j: -score[j])[:2]


def test_text_length_decides_only_without_normalisation():
    images, texts = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 3.0], [0.0, 1.0]])
    assert robustvqa.top_two(images, texts, normalise_text=False)[0, 0] == 1  # the long one, further off in angle
    assert robustvqa.top_two(images, texts, normalise_text=True)[0, 0] == 0
    assert torch.equal(robustvqa.top_two(9 * images, texts, False), robustvqa.top_two(images, texts, False))
    with pytest.raises(UserError, match="not finite"):
        robustvqa.top_two(images, texts * float("nan"), True)


# ------------------------------------------------------------------------------------------------------------ the rules


ROWS = [
    {"subset": "imagenet_a", "file_name": "a0", "label": 1, "top1": 1, "top2": 2},
    {"subset": "imagenet_a", "file_name": "a1", "label": 2, "top1": 3, "top2": 2},
    {"subset": "imagenet_r", "file_name": "r0", "label": 4, "top1": 0, "top2": 4},
    {"subset": "imagenet_v2", "file_name": "v0", "label": 5, "top1": 5, "top2": 0},
    {"subset": "imagenet_v2", "file_name": "v1", "label": 6, "top1": 7, "top2": 1},
]
NAMES = [f"c{k}" for k in range(8)]


def test_only_wrong_pictures_are_kept_with_their_best_class():
    got = robustvqa.assemble(ROWS, NAMES)
    assert got == {
        "imagenet_a": [{"file_name": "a1", "gt_caption": "c2", "error_caption": "c3"}],
        "imagenet_r": [{"file_name": "r0", "gt_caption": "c4", "error_caption": "c0"}],
        "imagenet_v2": [{"file_name": "v1", "gt_caption": "c6", "error_caption": "c7"}],
    }
    everything = robustvqa.assemble(ROWS, NAMES, keep="all")
    assert [len(v) for v in everything.values()] == [2, 1, 2]
    assert everything["imagenet_a"][0] == {"file_name": "a0", "gt_caption": "c1", "error_caption": "c2"}
    assert all(r["gt_caption"] != r["error_caption"] for v in everything.values() for r in v)


def released(rows, names, batch):
    """The released script's loop, in its own terms: labels and predictions are filtered, types and paths are not."""
    out = {"imagenet_a": [], "imagenet_r": [], "imagenet_v2": []}
    for start in range(0, len(rows), batch):
        block = rows[start : start + batch]
        types, paths = [r["subset"] for r in block], [r["file_name"] for r in block]
        flag = [r["top1"] == r["label"] for r in block]
        labels = [r["label"] for r, f in zip(block, flag, strict=True) if not f]
        res = [r["top1"] for r, f in zip(block, flag, strict=True) if not f]
        for kind, label, wrong, path in zip(types, labels, res, paths, strict=False):
            out[kind].append({"file_name": path, "gt_caption": names[label], "error_caption": names[wrong]})
    return out


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=30), st.integers(1, 9))
def test_the_released_pairing_is_the_scripts(found, batch):
    subsets = sorted(robustvqa.SUBSETS)
    rows = [
        {"subset": subsets[3 * k // len(found)], "file_name": f"f{k}", "label": a, "top1": b, "top2": (b + 1) % 8}
        for k, (a, b) in enumerate(found)
    ]
    assert robustvqa.assemble(rows, NAMES, pairing="released", batch=batch) == released(rows, NAMES, batch)
    if all(r["top1"] != r["label"] for r in rows):  # without a right picture the slip has no effect
        assert robustvqa.assemble(rows, NAMES) == released(rows, NAMES, batch)


def test_rules_are_checked():
    for more in ({"keep": "most"}, {"pairing": "odd"}):
        with pytest.raises(UserError, match="--keep is wrong or all"):
            robustvqa.assemble(ROWS, NAMES, **more)


# ----------------------------------------------------------------------------------------------------------- end to end


def test_mining_writes_the_official_format(monkeypatch, data, clip_files, tmp_path, capsys):
    out = tmp_path / "out"
    mined = mine(monkeypatch, data, clip_files, out)
    wnids, names = imagenet_classes()
    predictions = [json.loads(x) for x in (out / "predictions.jsonl").read_text().splitlines()][1:]
    assert len(predictions) == 15 and predictions[0]["file_name"].startswith("robustvqa/imagenet-a/n")
    # The same by one call on each picture, without batches.
    clip = load_clip(str(clip_files[0]), str(clip_files[1]), "cpu")
    texts = clip.text_features([f"A photo of a {n}" for n in names])
    for row in predictions[::4]:
        with Image.open(data / "deem" / row["file_name"]) as image:
            features = clip.image_features([image.convert("RGB")])[0]
        scores = (features / features.norm()) @ texts.T
        assert int(scores.argmax()) == row["top1"]
    kept = [r for r in predictions if r["top1"] != r["label"]]
    assert sum(map(len, mined.values())) == len(kept) > 0
    assert {r["gt_caption"] for r in mined["imagenet_v2"]} <= {names[7 * k] for k in range(5)}
    about = json.loads((out / "report.json").read_text())
    assert about["imagenet_a"]["mislabelled"] == 0 and about["imagenet_r"]["pictures"] == 5
    assert "kept" in capsys.readouterr().out
    questions = benchmarks.build_robustvqa(mined)
    assert sum(map(len, questions.values())) == 2 * len(kept)
    monkeypatch.setattr("sys.argv", ["mining.py", "--data-dir", str(data), "--check", str(out / robustvqa.FILE)])
    mining.main()
    assert "0 mislabelled" in capsys.readouterr().out


def test_mining_goes_on_where_it_was_cut(monkeypatch, data, clip_files, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    mine(monkeypatch, data, clip_files, whole)
    lines = (whole / "predictions.jsonl").read_text().splitlines(keepends=True)
    cut.mkdir()
    (cut / "predictions.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    loads = []
    real = mining.Picture.load
    monkeypatch.setattr(mining.Picture, "load", lambda self: loads.append(1) or real(self))
    mine(monkeypatch, data, clip_files, cut)
    assert len(loads) == 9  # 15 pictures, 6 of them known
    for name in ("predictions.jsonl", robustvqa.FILE, "report.json"):
        assert (cut / name).read_text() == (whole / name).read_text()
    with pytest.raises(UserError, match="made with other settings"):
        mine(monkeypatch, data, clip_files, cut, "--normalise-text")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "predictions.jsonl").write_text("".join(lines[:4]) + "{not json}\n" + "".join(lines[5:]))
    mine(monkeypatch, data, clip_files, damaged)
    assert (damaged / robustvqa.FILE).read_text() == (whole / robustvqa.FILE).read_text()


def test_two_miners_do_not_share_a_folder(monkeypatch, data, clip_files, tmp_path):
    import fcntl

    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is mining"):
            mine(monkeypatch, data, clip_files, tmp_path)


def test_switches_change_what_is_mined(monkeypatch, data, clip_files, tmp_path):
    base = mine(monkeypatch, data, clip_files, tmp_path / "0")
    unit = mine(monkeypatch, data, clip_files, tmp_path / "1", "--normalise-text")
    blanks = mine(monkeypatch, data, clip_files, tmp_path / "2", "--blanks")
    everything = mine(monkeypatch, data, clip_files, tmp_path / "3", "--keep", "all")
    assert base != unit and base != blanks and sum(map(len, everything.values())) == 15


def test_mining_errors(monkeypatch, data, clip_files, tmp_path):
    with pytest.raises(UserError, match=r"no pictures .*imagenet-a/<class>/\*\.jpg; unpack the set there"):
        mine(monkeypatch, tmp_path / "nowhere", clip_files, tmp_path / "o")
    picture(data / "deem" / "robustvqa" / "imagenet-r" / "n99999999" / "0.jpg", 0)
    with pytest.raises(UserError, match="n99999999 is no ImageNet class"):
        mine(monkeypatch, data, clip_files, tmp_path / "o")
    with pytest.raises(UserError, match="--batch-size must be 1"):
        mine(monkeypatch, data, clip_files, tmp_path / "o", "--batch-size", "0")
    with pytest.raises(UserError, match="open_clip knows no model ViT-none"):
        load_clip("ViT-none", "openai", "cpu")
    with pytest.raises(UserError, match="no model configuration"):
        load_clip(str(tmp_path / "none.json"), "openai", "cpu")
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(UserError, match="CLIP weights .*broken.pt for tiny-clip cannot be loaded"):
        load_clip(str(clip_files[0]), str(tmp_path / "broken.pt"), "cpu")


def test_a_broken_picture_is_named(monkeypatch, data, clip_files, tmp_path):
    bad = next((data / "deem" / "robustvqa" / "imagenetv2").glob("*/*.jpeg"))
    bad.write_bytes(b"\xff\xd8 broken")
    with pytest.raises(UserError, match=f"{bad.name} is not a readable picture"):
        mine(monkeypatch, data, clip_files, tmp_path / "o")


def test_official_annotations_are_read_and_described(tmp_path):
    wnids, names = imagenet_classes()
    rows = [
        {
            "file_name": f"datasets/robustvqa/imagenet-a/{wnids[6]}/x.jpg",
            "gt_caption": names[6],
            "error_caption": names[7],
        },
        {
            "file_name": f"datasets/robustvqa/imagenet-a/{wnids[6]}/y.jpg",
            "gt_caption": names[9],
            "error_caption": names[7],
        },
        {
            "file_name": f"datasets/robustvqa/imagenet-a/{wnids[134]}/z.jpg",
            "gt_caption": "crane",
            "error_caption": "crane",
        },
    ]
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"imagenet_a": rows, "imagenet_d": []}))
    mined = robustvqa.read_robustvqa(path)
    assert list(mined) == ["imagenet_a"] and mined["imagenet_a"][0]["file_name"].startswith("robustvqa/imagenet-a/")
    assert robustvqa.describe(mined, wnids, names) == {"imagenet_a": {"items": 3, "mislabelled": 1, "same_name": 1}}
    path.write_text('{"imagenet_a": [{"file_name": "x"}]}')
    with pytest.raises(UserError, match="item 0 of imagenet_a needs file_name"):
        robustvqa.read_robustvqa(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="none of the keys"):
        robustvqa.read_robustvqa(path)


def test_shuffling_is_not_disturbed_by_the_global_generator():
    rows = [{"file_name": str(k), "gt_caption": "a", "error_caption": "b"} for k in range(5)]
    random.seed(1)
    first = benchmarks.build_robustvqa({"s": rows})
    random.seed(2)
    assert benchmarks.build_robustvqa({"s": rows}) == first
