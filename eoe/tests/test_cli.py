"""Commands end to end, exact resume, user errors, and a table of the paper on tiny images with a tiny random CLIP."""

import dataclasses
import importlib
import json
import subprocess
import sys

from lab import runs
from lab.cells import read_printed
from lab.runs import UserError

import numpy as np
import pytest
import torch
from PIL import Image

import backbones
import data
import papertables
import train
from settings import Settings
from standins import drawn
from trainer import Trainer

TINY = dict(steps=6, pictures=64, batch=16, width=4, classes=4, per_class=3, labels=50, checkpoint_every=3)


def call(module, monkeypatch, *args: str) -> None:
    monkeypatch.setattr("sys.argv", [module.__name__, *args])
    module.main()


def options(**values) -> list[str]:
    return [w for k, v in values.items() for w in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_dry_runs_write_nothing(monkeypatch, tmp_path, capsys):
    import eval as evaluate

    out = ["--out", str(tmp_path / "x"), "--dry-run"]
    call(train, monkeypatch, *options(**TINY), *out)
    assert "would train the stand-in on" in capsys.readouterr().out
    for words, told in (
        (["--study", "near"], "study near"),
        (["--table", "table2"], "table2"),
        (["--id", "a", "--ood", "b", "c"], "a against b, c"),
        (["--run", "runs/demo/x"], "runs/demo/x again"),
    ):
        call(evaluate, monkeypatch, *words, *out)
        assert f"would evaluate {told}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_train_resumes_exactly_and_evaluates_again(monkeypatch, tmp_path, capsys):
    import eval as evaluate

    call(train, monkeypatch, *options(**TINY, out=tmp_path / "a"))
    save = Trainer.save

    def stop(self, path, step, seconds):
        save(self, path, step, seconds)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        call(train, monkeypatch, *options(**TINY, out=tmp_path / "b"))
    monkeypatch.setattr(Trainer, "save", save)
    call(train, monkeypatch, *options(**TINY, out=tmp_path / "b"))
    one, two = (runs.read_tensors(tmp_path / x / "seed0" / "model.safetensors")[0] for x in "ab")
    assert all(torch.equal(one[k], two[k]) for k in one)
    lines = [[json.loads(x) for x in (tmp_path / x / "records.jsonl").read_text().splitlines()] for x in "ab"]
    assert [r["metrics"] for r in lines[0]] == [r["metrics"] for r in lines[1]]
    assert {r["dataset"] for r in lines[0]} == {"far", "near", "fine-grained"}
    assert (tmp_path / "a" / "seed0" / "scores-far.csv").read_text().startswith("image,score,decision")
    capsys.readouterr()
    call(evaluate, monkeypatch, "--run", str(tmp_path / "a"))
    assert "records agree" in capsys.readouterr().out
    with pytest.raises(UserError, match="other settings"):
        call(train, monkeypatch, *options(**{**TINY, "steps": 7}, out=tmp_path / "a"))


def test_a_checkpoint_belongs_to_its_pictures_seed_and_settings(tmp_path):
    s = Settings(**TINY)
    one = Trainer(s, 0, torch.device("cpu"))
    path = tmp_path / "c.safetensors"
    one.save(path, 0, 1.0)
    assert Trainer(dataclasses.replace(s, seeds=(0, 1), out="x"), 0, torch.device("cpu")).load(path) == (0, 1.0)
    for other, seed in ((s, 1), (dataclasses.replace(s, lr=1e-3), 0), (dataclasses.replace(s, pictures=65), 0)):
        with pytest.raises(UserError, match="does not fit this run .it is of other settings"):
            Trainer(other, seed, torch.device("cpu")).load(path)
    draw = drawn.draw
    try:  # another version of the code draws other pictures under the same settings
        drawn.draw = lambda names, seed: draw(names, seed + 1)
        with pytest.raises(UserError, match="other pictures"):
            Trainer(s, 0, torch.device("cpu")).load(path)
    finally:
        drawn.draw = draw


def test_batches_drawn_ahead_are_those_of_single_draws():
    one, two = (Trainer(Settings(**TINY), 0, torch.device("cpu")) for _ in range(2))
    ahead = one.batches(5)
    each = [torch.randint(len(two.pictures), (two.s.batch,), generator=two.generator) for _ in range(5)]
    assert torch.equal(ahead, torch.stack(each)) and torch.equal(one.generator.get_state(), two.generator.get_state())


@pytest.mark.parametrize(
    ("script", "args", "word"),
    [
        ("train", ["--lr", "1e-30"], "--lr 1e-30 is too small to matter"),
        ("train", ["--beta", "1e-9"], "--beta 1e-09 is too small to matter"),
        ("train", ["--weight-decay", "1e-200"], "is too small"),
        ("eval", ["--synthetic", "--beta", "1e-300"], "is too small"),
        ("eval", ["--id", "pet37", "--ood", "sun", "--max-similarity", "1e-9"], "too small to matter"),
        ("eval", ["--study", "near", "--labels", "x.json"], "--study takes --labels own or"),
        ("eval", ["--study", "near", "--bootstrap", "-1"], "--bootstrap must not be negative"),
        ("eval", ["--study", "near", "--draws", "0"], "--draws must be at least 1"),
        ("eval", ["--study", "near", "--id", "pet37", "--ood", "sun"], "exclude each other"),
        ("eval", ["--images", "x", "--classes", "a"], "go together"),
        ("eval", ["--known", "x", "--synthetic"], "--known goes with --images"),
        ("eval", ["--study", "near", "--backbone", "conse-lite0", "--data-dir", "/nowhere"], "cifar10 is not in"),
        ("eval", [], "say what to evaluate"),
        ("eval", ["--table", "table99"], "no table table99"),
        ("eval", ["--table", "table3", "--data-dir", "/nowhere"], "ImageNet10/val"),
        ("eval", ["--id", "pet37", "--ood", "sun", "--beta", "nan"], "finite"),
        ("eval", ["--run", "/nowhere"], "no file"),
        ("train", ["--steps", "0"], "--steps must be at least 1"),
        ("train", ["--seeds", "-1"], "--seeds"),
        ("envision", ["--id", "nothing"], "no ID set nothing"),
        ("envision", ["--provider", "local", "--model", "/nowhere"], "no chat model"),
    ],
)
def test_user_errors_end_in_one_line(script, args, word, monkeypatch, tmp_path, capfd):
    where = [] if script == "envision" else ["--out", str(tmp_path / "r")]
    monkeypatch.setattr("sys.argv", [script, *args, *where])
    with pytest.raises(SystemExit) as stop:
        runs.command(importlib.import_module(script).main)
    told = capfd.readouterr().err
    assert stop.value.code == 2 and word in told and told.count("\n") == 1 and "Traceback" not in told, told


def test_a_user_error_of_a_real_process(tmp_path):
    words = [sys.executable, "train.py", "--steps", "0", "--out", str(tmp_path / "r")]
    done = subprocess.run(words, cwd=runs.HERE, capture_output=True, text=True)
    assert done.returncode == 2 and "--steps must be at least 1" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------- backbones, tiny and random


def tiny(name: str, folder) -> None:
    """Random weights of the architecture that `name` has, tiny, saved as its publishers save theirs."""
    import transformers as t

    text = dict(vocab_size=49408, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    image = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=112
    )
    torch.manual_seed(0)
    if name.startswith("clip"):
        model = t.CLIPModel(
            t.CLIPConfig(text_config={**text, "eos_token_id": 49407}, vision_config=image, projection_dim=8)
        )
    elif name == "groupvit":
        image |= dict(
            depths=[1, 1, 1],
            num_group_tokens=[4, 2, 0],
            num_output_groups=[4, 2, 2],
            patch_size=56,
            num_hidden_layers=3,
        )
        model = t.GroupViTModel(
            t.GroupViTConfig(
                text_config={**text, "eos_token_id": 49407},
                vision_config=image,
                projection_dim=8,
                projection_intermediate_dim=8,
            )
        )
    else:
        raise AssertionError(name)
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", ["clip-vit-b16", "groupvit"])
def test_transformers_backbones(name, tmp_path):
    tiny(name, tmp_path / "w")
    b = backbones.load(name, torch.device("cpu"), str(tmp_path / "w"))
    texts = b.encode_texts(["a photo of a cat", "a photo of a CAT", "a photo of a much longer name"])
    assert texts.shape == (3, 8) and texts.dtype == torch.float32
    assert torch.allclose(texts[0], texts[1]) and not torch.allclose(
        texts[0], texts[2]
    )  # CLIP's tokenizer ignores case
    pixels = b.transform()(Image.new("RGB", (300, 260), (200, 10, 10)))
    assert pixels.shape == (3, 224, 224)
    assert b.encode_images(pixels[None]).shape == (1, 8)


def test_text_features_equal_the_plain_call(tmp_path):
    """Padding and the end-of-text position: our tokens give what the model gives for the bare prompt."""
    tiny("clip", tmp_path / "w")
    b = backbones.load("clip-vit-b16", torch.device("cpu"), str(tmp_path / "w"))
    ids = [49406, *b.tokenizer.encode("a photo of a cat"), 49407]
    out = b.model.get_text_features(input_ids=torch.tensor([ids]))
    assert torch.allclose(getattr(out, "pooler_output", out), b.encode_texts(["a photo of a cat"]), atol=1e-5)


def test_missing_and_wrong_weights(tmp_path):
    for given, word in ((dict(name="nothing"), "no backbone"), (dict(name="clip-rn50"), "no weights")):
        with pytest.raises(UserError, match=word):
            backbones.load(device=torch.device("cpu"), data_dir=tmp_path, **given)
    (tmp_path / "weights" / "clip-vit-b16").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be loaded"):
        backbones.load("clip-vit-b16", torch.device("cpu"), data_dir=tmp_path)


@pytest.fixture
def imagenet(tmp_path):
    """ImageNet-10 and ImageNet-20 with two tiny images a class."""
    rng = np.random.default_rng(0)
    for name in ("imagenet10", "imagenet20"):
        for c in data.split("imagenet10_imagenet20")[name]:
            folder = tmp_path / data.PLACES[name].path / c["wnid"]
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    tiny("clip", tmp_path / "weights" / "clip-vit-b16")
    return tmp_path


def test_a_table_of_the_paper_end_to_end(imagenet, monkeypatch, tmp_path):
    import eval as evaluate

    monkeypatch.setenv("EOE_CACHE", str(tmp_path / "cache"))
    # The tiny weights pass for the printed size; test_other_weights_meet_no_printed_cell says what happens else.
    monkeypatch.setattr(backbones, "_checked", lambda name, known, config: known)
    args = options(table="table3", data_dir=imagenet, workers=0, scale="paper")
    call(evaluate, monkeypatch, *args, "--out", str(tmp_path / "own"))
    found = [json.loads(x) for x in (tmp_path / "own" / "records.jsonl").read_text().splitlines()]
    assert {r["table"] for r in found} == {"own-table3"}
    assert {r["method"] for r in found} == {"MCM", "MaxLogit", "Energy", "EOE", "Ground Truth"}
    assert {r["data"]["variant"] for r in found} == {"20 of 500 images"} | {"40 of 1000 images"}
    # The same names in the published layout count for the paper's own table, under exactly its row names.
    lists = imagenet / "eoe" / "envisioned_classes" / "near_3"
    lists.mkdir(parents=True)
    for n in (10, 20):
        names = runs.read_json(runs.HERE / "envisioned" / f"imagenet{n}-near.json")["names"]
        names = {k: v[:3] for k, v in names.items()}  # a published list is used whole
        (lists / f"ImageNet{n}_gpt-3.5-turbo-16k_0.json").write_text(json.dumps(names))
    monkeypatch.setattr(backbones.Backbone, "encode_images", None)  # everything comes out of the cache
    call(evaluate, monkeypatch, *args, "--labels", "released", "--out", str(tmp_path / "released"))
    again = [json.loads(x) for x in (tmp_path / "released" / "records.jsonl").read_text().splitlines()]
    printed = read_printed(runs.HERE / "paper.csv")
    known = {tuple(r) for r in printed[["table", "dataset", "setting", "method"]].to_numpy()}
    assert {(r["table"], r["dataset"], r["setting"], r["method"]) for r in again} <= known
    same = {(r["dataset"], r["method"]): r["metrics"] for r in found}
    assert all(same[r["dataset"], r["method"]] == r["metrics"] for r in again)


def test_class_lists_are_verified(imagenet, tmp_path):
    gone = imagenet / "ImageNet10" / "val" / "n02389026"
    gone.rename(imagenet / "elsewhere")
    with pytest.raises(UserError, match="lacks the class folder n02389026"):
        data.load("imagenet10", imagenet)
    (imagenet / "food-101" / "meta").mkdir(parents=True)
    (imagenet / "food-101" / "meta" / "classes.txt").write_text("apple_pie\nbaklava\n")
    with pytest.raises(UserError, match="differs from splits/ at entry 1"):
        data.load("food101", imagenet)


def test_broken_image_is_named(imagenet):
    path = next((imagenet / "ImageNet10" / "val" / "n02389026").glob("*.png"))
    path.write_bytes(b"nothing")
    found = data.load("imagenet10", imagenet)
    with pytest.raises(UserError, match="not a readable image"):
        found[found.items.index(path)]


def test_halves_are_complements_and_lists_have_their_size():
    sizes = {"cub200": 200, "cars196": 196, "food101": 101, "pet37": 37, "imagenet1k": 1000, "cifar100": 100}
    assert all(len(data.id_names(k)) == v for k, v in sizes.items())
    assert len(set(data.id_names("imagenet1k"))) == 998  # missile and sunglasses are there twice; K stays 1000
    for half in data.HALVES:
        a, b = data.id_names(half), data.id_names(f"{half}-ood")
        assert not {*a} & {*b}
    assert len(data.id_names("pet18")) == 18 and len(data.id_names("pet18-ood")) == 19


def test_every_paper_setting_is_in_paper_csv():
    """Row names made by papertables equal those of paper.csv, so that measured cells meet printed ones."""
    printed = read_printed(runs.HERE / "paper.csv")
    for table, cases in papertables.TABLES.items():
        rows = printed[printed["table"] == table]
        for c in cases:
            for ood in c.oods:
                if not c.mean_only:
                    assert papertables.title(c.id, ood) in set(rows["dataset"]), (table, c.id, ood)
            if table not in ("table19", "table20", "table21"):
                last = c.betas[-1] if c.betas else 0.25
                beta = f"{last:.2f}" if c.betas else f"{last:g}"
                made = c.setting.format(model="CLIP ViT-B/16", n=c.n[-1], beta=beta, x="xK" if c.task == "near" else "")
                assert made in set(rows["setting"]), (table, made)
            if c.average:
                assert any(d.startswith(c.average) for d in rows["dataset"]), (table, c.average)
