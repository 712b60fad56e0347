"""Readers on small hand-made folders, splits, features, judge."""

import gzip
import pickle

from lab.runs import UserError, data_dir

import numpy as np
import pytest
import torch
from conftest import settings
from PIL import Image

import features
import prepare
import readers
import tasks
from baselines import selection
from settings import METHODS
from trainer import fit

CPU = torch.device("cpu")


def test_the_wheel_sets_split_by_seed(tmp_path):
    d = readers.load("mnist5k", tmp_path, seed=0)
    assert [len(p) for p in (d.pre, d.train, d.test)] == [2000, 2200, 800] and d.size == 16 and d.channels == 1
    assert torch.bincount(d.train.y).tolist() == [220] * 10
    other = readers.load("mnist5k", tmp_path, seed=1)
    assert d.sha256 == other.sha256 and not torch.equal(d.train.x, other.train.x)
    rows = {bytes(v.numpy().tobytes()) for p in (d.pre, d.test) for v in p.x}
    assert sum(v.numpy().tobytes() in rows for v in d.train.x) < 5  # disjoint but for equal pictures


def test_fewer_clean_images_leave_the_noisy_ones_and_the_test_as_they_are(tmp_path):
    whole, few = readers.load("digits", tmp_path, seed=2), readers.load("digits", tmp_path, seed=2, pretrain=50)
    assert torch.bincount(few.pre.y).tolist() == [5] * 10
    assert torch.equal(whole.train.x, few.train.x) and torch.equal(whole.test.y, few.test.y)
    every = {v.numpy().tobytes() for v in whole.pre.x}
    assert all(v.numpy().tobytes() in every for v in few.pre.x)
    with pytest.raises(UserError, match="less than an image of each"):
        readers.load("digits", tmp_path, pretrain=9)
    with pytest.raises(UserError, match="lower --pretrain"):
        readers.load("digits", tmp_path, pretrain=610)


def test_few_clean_images_are_shown_more_often(tmp_path, monkeypatch):
    """The classifier of the clean images alone takes about the steps of the others."""
    seen = []
    monkeypatch.setattr(prepare, "fit", lambda learner, *args, **more: seen.append(learner.s))
    for n, times in ((600, 1), (100, 8)):
        p = prepare.Prepared(settings("--pretrain", n, "--cache", tmp_path / str(n)), 0, CPU, show=False)
        p.pretrained  # noqa: B018
        assert seen[-1].epochs == 3 * times and seen[-1].milestones == (times, 2 * times)


def test_stratified_parts_are_disjoint_and_complete():
    y = np.repeat(np.arange(3), 10)
    a, b = readers.stratified(y, (4, 6), 0)
    assert sorted([*a, *b]) == list(range(30)) and np.bincount(y[a]).tolist() == [4, 4, 4]
    with pytest.raises(UserError, match="lower --pretrain"):
        readers.stratified(y, (11,), 0)


def cifar(folder, n=20):
    root = folder / "cifar10" / "cifar-10-batches-py"
    root.mkdir(parents=True)
    rng = np.random.RandomState(0)
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        raw = {"data": rng.randint(0, 256, (n, 3072)).astype(np.uint8), "labels": (np.arange(n) % 10).tolist()}
        (root / name).write_bytes(pickle.dumps(raw))
    return root


def test_cifar10_in_its_own_order(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    cifar(tmp_path)
    d = readers.load("cifar10", tmp_path, seed=0, pretrain=20)
    assert (len(d.pre), len(d.train), len(d.test), d.variant) == (20, 80, 20, "paper")
    d = readers.load("cifar10", tmp_path, seed=0, train_limit=7)
    assert len(d.train) == 7 and d.train.x.shape[1:] == (32, 32, 3)
    whole, part = (
        readers.load("cifar10", tmp_path),
        readers.load("cifar10", tmp_path, seed=3, pretrain=20, train_limit=9),
    )
    for own in (part.pre, part.train):  # every image knows its place in the whole
        assert torch.equal(whole.train.x[own.index], own.x) and torch.equal(whole.train.y[own.index], own.y)
    with pytest.raises(UserError, match="--train-limit 101"):
        readers.load("cifar10", tmp_path, seed=0, train_limit=101)


def test_the_copy_of_cifar10_that_is_here_is_not_fetched_again(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    (tmp_path / "cifar10" / "train").mkdir(parents=True)
    parts = tuple(torch.from_numpy(v) for v in (np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 10) * 2)
    monkeypatch.setattr(readers, "_cifar_jpeg", lambda folder: parts)
    monkeypatch.setattr(CIFAR10, "download", lambda self: pytest.fail("what is here was fetched again"))
    assert readers.load("cifar10", tmp_path, download=True).variant == readers.JPEG


def test_a_download_that_fails_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    def unreachable(self):
        self.root = readers.Path(self.root)
        self.root.mkdir(parents=True)
        raise OSError("no network")

    monkeypatch.setattr(CIFAR100, "download", unreachable)
    with pytest.raises(UserError, match="could not be fetched or read"):
        readers.load("cifar100", tmp_path, download=True)
    assert not (tmp_path / "cifar100").exists()


def test_mnist_idx_files(tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    for stem, n in (("train", 60000), ("t10k", 10000)):
        x, y = bytes(16) + bytes(n * 784), bytes(8) + bytes(k % 10 for k in range(n))
        (tmp_path / "mnist" / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(x, 1))
        (tmp_path / "mnist" / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(y, 1))
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "download", lambda self: pytest.fail("what is here was fetched again"))
    d = readers.load("mnist", tmp_path, seed=0, pretrain=100, download=True)
    assert (len(d.pre), len(d.train), len(d.test)) == (100, 59900, 10000)
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        readers.load("mnist", tmp_path, seed=0)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist"])
def test_missing_data_names_the_place(name, tmp_path):
    with pytest.raises(UserError, match=f"is not in {tmp_path}: expected"):
        readers.load(name, tmp_path, seed=0)


@pytest.mark.realdata
def test_real_cifar10_jpeg_copy():
    if not (data_dir("") / "cifar10").exists():
        pytest.skip("no cifar10 in the data folder")
    d = readers.load("cifar10", data_dir(""), seed=0, pretrain=1000)
    assert len(d.pre) == 1000 and len(d.train) == 49000 and d.variant in ("paper", "cifar10-jpeg75")
    assert torch.bincount(d.pre.y).tolist() == [100] * 10


def test_class_names():
    assert len(readers.CIFAR100) == 100 and len(set(readers.names("cifar100"))) == 100
    assert "stingray fish" in readers.names("cifar100") and readers.names("mnist5k")[3] == "handwritten digit three"


# -------------------------------------------------------------------------------------------------- features and judge


def test_pca_is_the_librarys_and_shrinks_large_images():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (30, 8, 8, 1), generator=g, dtype=torch.uint8)
    pca = features.Pca(x, 5, 0)
    flat = x.flatten(1).numpy() / 255
    centred = flat - flat.mean(0)
    _, _, v = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(np.abs(pca(x).numpy()), np.abs(centred @ v[:5].T), atol=1e-8)
    big = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert pca(big).shape == (30, 5)


def test_nearest_against_loops_and_without_itself():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 256, (20, 4, 4, 1), generator=g, dtype=torch.uint8), torch.arange(20)
    assert features.nearest(x, y, x).tolist() == list(range(20))
    found = features.nearest(x, y, x, torch.arange(20), chunk=7)
    f = x.flatten(1).double()
    for i in range(20):
        far = ((f - f[i]) ** 2).sum(1)
        far[i] = float("inf")
        assert int(found[i]) == int(far.argmin())


def test_edge_ssim():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (3, 16, 16, 1), generator=g, dtype=torch.uint8)
    assert features.edge_ssim(x, x) == pytest.approx(1) and features.edge_ssim(x, 255 - x) == pytest.approx(1, abs=1e-6)
    assert features.edge_ssim(x, x.flip(1)) < 0.9


@pytest.fixture(scope="module")
def clip():
    import open_clip

    name = "tiny-test"
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    open_clip.factory._MODEL_CONFIGS[name] = config
    torch.manual_seed(0)
    return features.Clip(name, "", CPU, batch=4)


def test_clip_features_do_not_depend_on_the_batch_and_zero_shot(clip):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (6, 40, 32, 3), generator=g, dtype=torch.uint8)
    f = clip(x)
    assert f.shape == (6, 8) and torch.allclose(f[5:], clip(x[5:]), atol=1e-5)
    p = clip.zero_shot(f, ["cat", "dog", "ship"])
    assert p.shape == (6, 3) and torch.allclose(p.sum(1), torch.ones(6), atol=1e-5)
    grey = clip(x[..., :1])
    assert torch.allclose(grey, clip(x[..., :1].expand(-1, -1, -1, 3)), atol=1e-5)


def test_clip_preprocessing_is_the_librarys(clip):
    import open_clip

    _, _, pre = open_clip.create_model_and_transforms("tiny-test")
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (1, 48, 40, 3), generator=g, dtype=torch.uint8)
    with torch.no_grad():
        expected = clip.net.encode_image(pre(Image.fromarray(x[0].numpy()))[None])
    assert torch.allclose(clip(x), expected, atol=0.02 * float(expected.abs().max()))  # PIL rounds between two passes


def test_a_whole_selection_with_clip(tmp_path, clip, monkeypatch):
    monkeypatch.setattr(prepare.features, "Clip", lambda *args, **more: clip)
    s = settings("--features", "clip", "--train-limit", "60", "--cache", tmp_path)
    p = prepare.Prepared(s, 0, CPU, show=False)
    found = {name: (score, kept) for name, score, kept in p.scores()}
    assert {"EchoSelect", "CLIP zero-shot", "CLIPCleaner"} <= set(found)
    assert all(len(score) == 60 for score, _ in found.values())
    assert "agreement_wrong" in p.edits()
    assert len(list((tmp_path / "features").iterdir())) == 2
    again = prepare.Prepared(s, 0, CPU, show=False)
    monkeypatch.setattr(type(clip), "__call__", lambda self, x: pytest.fail("features were computed again"))
    assert torch.equal(again.similarity, p.similarity)


class Extractor:
    """In EfficientNet-Lite0's place: a random projection of 8x8 images."""

    project = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))

    def __init__(self, device):
        self.seen = []

    def about(self):
        return {"features": "made"}

    def __call__(self, images):
        self.seen.append(len(images))
        return images.flatten(1).float() / 255 @ self.project


def test_the_judge_of_photographs_is_a_regression_on_the_test_images(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.features, "Lite0", Extractor)
    p = prepare.Prepared(settings("--judge", "lite0", "--train-limit", "200", "--cache", tmp_path), 0, CPU, show=False)
    x, y = p.data.train.x, p.data.train.y
    f = Extractor(CPU)
    own = selection.fitted(f(p.data.test.x), p.data.test.y, f(x), 10).argmax(1)
    assert torch.equal(p.judge(x, True), own) and (own == y).double().mean() > 0.8
    wrong = ~p.right
    told = p.edits()
    assert told["agreement_wrong"] == pytest.approx(100 * float((p.shown == p.y)[wrong].double().mean()))
    p.shown[wrong] = -1
    with pytest.raises(UserError, match="ignores the label: 0.0 %"):
        p.s.check = 0.5
        p.check()
    assert p.lite0.seen == [300, 200, 200, 200]  # the test images once, the originals twice, the edited ones once
    auto = settings("--dataset", "cifar10", "--generator", "concat", "--pretrain", "100")
    assert auto.judge == "lite0" and settings().judge == "nearest"


def test_a_head_on_features_of_a_network(tmp_path, monkeypatch):
    """Every method reads features in the images' place, those of the edited images too; the noise is that of pixels."""
    monkeypatch.setattr(prepare.features, "Lite0", Extractor)
    more = ["--model", "head", "--features", "lite0", "--train-limit", "60", "--cache", tmp_path, "--batch", "16"]
    more += ["--rate", "0.1", "--epochs", "8", "--divide.warmup", "4", "--pair.lr", "0.01"]
    p = prepare.Prepared(settings(*more), 0, CPU, show=False)
    plain = prepare.Prepared(settings("--train-limit", "60", "--cache", tmp_path, "--rate", "0.1"), 0, CPU, show=False)
    assert torch.equal(p.y, plain.y)
    f = Extractor(CPU)
    for method, x in (("ce", p.data.train.x), ("pretrain", p.data.pre.x), ("modified-only", p.modified.small)):
        task = tasks.task_of(p, method)
        assert torch.allclose(task.x, f(x)) and torch.allclose(task.test.x, f(p.data.test.x))
    assert tasks.task_of(p, "echoalign").x.shape == (60 + int(p.selected.sum()), 24)
    for name in ("forward", "dividemix", "elr", "co-teaching"):
        learner = METHODS[name][1](p.s, tasks.task_of(p, name), 0, CPU)
        fit(learner, tmp_path / f"{name}.safetensors", show=False)
        assert learner.accuracy(p.test) > 30 and learner.nets[0].features(f(p.data.test.x)).min() >= 0
