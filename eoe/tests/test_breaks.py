"""Broken images and weights, odd options, killed runs: never a wrong number, never a traceback."""

import json
import os
import re
import signal
import subprocess
import sys
import time

from lab import runs
from lab.runs import UserError

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import TINY, call, imagenet, one_thread, options, tiny  # noqa: F401 (fixtures)

import backbones
import data
import eval as evaluate
import papertables
import train
from settings import EvalSettings

CPU = torch.device("cpu")
B16 = "clip-vit-b16"


def table3(monkeypatch, root, out, *more: str) -> None:
    call(evaluate, monkeypatch, *options(table="table3", data_dir=root, workers=0, out=out), *more)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EOE_CACHE", str(tmp_path / "cache"))


# ----------------------------------------------------------------------------------------------------- images, weights


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_one_line_also_from_a_worker(imagenet, workers):  # noqa: F811
    path = next((imagenet / "ImageNet10" / "val" / "n02389026").glob("*.png"))
    whole = path.read_bytes()
    b = backbones.load(B16, CPU, data_dir=imagenet)
    for broken in (b"nothing", whole[:70], whole[:60] + b"\0" * 40 + whole[100:]):
        path.write_bytes(broken)
        with pytest.raises(UserError) as caught:
            backbones.image_features(b, data.load("imagenet10", imagenet), 4, workers)
        assert str(caught.value).startswith(f"{path} is not a readable image") and "\n" not in str(caught.value)
    assert not list(backbones.cache_dir().glob("*"))


def test_weights_that_are_cut_incomplete_or_of_another_model(tmp_path):
    tiny("clip", tmp_path / "w")
    path = tmp_path / "w" / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cannot be loaded"):
            backbones.load(B16, CPU, str(tmp_path / "w"))
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != "visual_projection.weight"}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"incomplete: visual_projection\.weight"):
        backbones.load(B16, CPU, str(tmp_path / "w"))
    save_file({k: v for k, v in tensors.items() if k != "logit_scale"}, path, {"format": "pt"})
    backbones.load(B16, CPU, str(tmp_path / "w"))  # no score uses it
    path.write_bytes(whole)
    with pytest.raises(UserError, match="needs weights of groupvit, these are of clip"):
        backbones.load("groupvit", CPU, str(tmp_path / "w"))
    config = runs.read_json(tmp_path / "w" / "config.json")
    config["vision_config"]["image_size"] = 448
    (tmp_path / "w" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        backbones.load(B16, CPU, str(tmp_path / "w"))


@pytest.mark.parametrize("name", ["text_projection.weight", "visual_projection.weight"])
def test_nan_in_the_weights_gives_no_number(name, imagenet, monkeypatch, tmp_path):  # noqa: F811
    path = imagenet / "weights" / B16 / "model.safetensors"
    tensors = load_file(path)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        table3(monkeypatch, imagenet, tmp_path / "r")
    assert not list((tmp_path / "r").rglob("record*"))


def test_nan_in_a_trained_stand_in_gives_no_number(monkeypatch, tmp_path):
    call(train, monkeypatch, *options(**TINY, out=tmp_path / "a"))
    path = tmp_path / "a" / "seed0" / "model.safetensors"
    tensors = load_file(path)
    tensors["image.0.weight"][0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(UserError, match="not finite"):
        call(evaluate, monkeypatch, "--run", str(tmp_path / "a"))


def test_other_weights_meet_no_printed_cell(imagenet, monkeypatch, tmp_path):  # noqa: F811
    table3(monkeypatch, imagenet, tmp_path / "r")
    found = [json.loads(x) for x in (tmp_path / "r" / "records.jsonl").read_text().splitlines()]
    assert all(
        "CLIP ViT-B/16 (hidden_size 16, intermediate_size 32, num_attention_heads 2, " in r["setting"] for r in found
    )


@pytest.mark.parametrize("name", ["clip-vit-b16", "clip-vit-b32", "clip-vit-l14", "groupvit", "altclip", "align"])
def test_what_a_tower_computes_decides_its_title(name):
    """The configuration that a title names keeps it; anything else that a tower says otherwise does not: its layers,
    its activation (a plain gelu in place of CLIP's), its epsilon, its vocabulary, the joint space."""
    import transformers as t

    known = backbones.KNOWN[name]
    kind = {"clip": t.CLIPConfig, "groupvit": t.GroupViTConfig, "altclip": t.AltCLIPConfig, "align": t.AlignConfig}
    width = {"projection_dim": known.width} if known.width else {}

    def config(vision=None, text=None, **more):
        return kind[name.split("-")[0]](
            vision_config={**known.vision, **(vision or {})}, text_config={**known.text, **(text or {})}, **width | more
        )

    assert backbones._checked(name, known, config()).title == known.title
    trained = config({"attention_dropout": 0.3, "initializer_range": 1.0}, {"eos_token_id": 7})
    assert backbones._checked(name, known, trained).title == known.title  # says nothing of the features
    for change, word in (
        (config({"hidden_act": "relu"}), "hidden_act relu"),
        (config({"num_hidden_layers": 3}), "num_hidden_layers 3"),
        (config(text={"hidden_act": "relu"}), "text hidden_act relu"),
        (config(text={"layer_norm_eps": 0.1}), "text layer_norm_eps 0.1"),
        (config(text={"vocab_size": 99}), "text vocab_size 99"),
        (config(projection_dim=5), "projection_dim 5"),
    ):
        assert backbones._checked(name, known, change).title == f"{known.title} ({word})"


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--table", "table3", "--id", "pet37", "--ood", "sun"], "exclude each other"),
        (["--synthetic", "--run", "x"], "exclude each other"),
        (["--synthetic", "--table", "table3"], "no place in table3"),
        (["--table", "own"], "--table own"),
        (["--table", "table20", "--ensemble"], "a table sets them itself"),
        (["--table", "table3", "--n", "3"], "a table sets them itself"),
        (["--table", "table3", "--max-similarity", "0.5"], "a table sets them itself"),
        (["--table", "table3", "--seeds", "0", "1"], "use --seeds 0"),
        (["--synthetic", "--per-class", "0"], "--per-class must be at least 1"),
        (["--synthetic", "--batch", "0"], "--batch must be at least 1"),
        (["--table", "table3", "--workers", "-1"], "must not be negative"),
        (["--table", "table3", "--beta", "-1"], "--beta must not be negative"),
        (["--id", "pet37", "--ood", "sun", "--max-similarity", "2"], r"\[0, 1\]"),
        (["--id", "pet37", "--ood", "sun", "--clipn", "/nowhere"], "no CLIPN text features"),
        (["--table", "table3", "--data-dir", "~nosuch/x"], "home folder"),
        (["--table", "table3", "--device", "gpu"], "--device gpu is unknown"),
        (["--table", "table24", "--labels", "released", "--llm", "llama-2"], "no row for --llm llama-2"),
        (["--table", "table3", "--labels", "/nowhere.json"], "no envisioned names in /nowhere.json"),
        (["--id", "/nowhere", "--ood", "sun"], "no image set or folder /nowhere"),
    ],
)
def test_odd_options_of_eval(args, word, imagenet, monkeypatch, tmp_path):  # noqa: F811
    more = [] if "--data-dir" in args else ["--data-dir", str(imagenet)]
    with pytest.raises(UserError, match=word):
        call(evaluate, monkeypatch, *args, *more, "--out", str(tmp_path / "r"))
    assert not list(tmp_path.glob("r/**/record*"))


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--pictures", "8", "--batch", "16"], "--pictures 8"),
        (["--batch", "1"], "at least 2"),
        (["--classes", "385"], "--classes is at most 384"),
        (["--drop-word", "1.1"], "--drop-word"),
        (["--lr", "0"], "--lr is positive"),
        (["--lr", "nan"], "finite"),
        (["--beta", "-0.1"], "--beta"),
        (["--weight-decay", "-1"], "--weight-decay"),
        *(([f"--{n}", "0"], f"--{n} must be") for n in ("width", "per-class", "labels", "checkpoint-every")),
    ],
)
def test_odd_options_of_train(args, word, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=word):
        call(train, monkeypatch, *args, "--out", str(tmp_path / "r"))


@pytest.mark.parametrize("name", ["images", "ids", "outs", "dim", "repeats"])
def test_odd_options_of_bench(name, monkeypatch):
    import bench

    with pytest.raises(UserError, match=f"--{name} must be at least 1"):
        call(bench, monkeypatch, f"--{name}", "0")


def test_bench_compares_the_same_results(monkeypatch, capsys):
    import bench

    call(bench, monkeypatch, *options(images=300, ids=7, outs=5, dim=16, repeats=1, device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    differences = [float(x) for line in lines if "difference" in line for x in re.findall(r"\d\.\de[-+]\d+", line)]
    assert len(differences) == 10 and max(differences) < 1e-5
    assert sum("ratio" in x for x in lines) == 3


def test_a_finished_run_says_so_and_is_not_another_weights_run(imagenet, monkeypatch, tmp_path, capsys):  # noqa: F811
    table3(monkeypatch, imagenet, tmp_path / "r")
    before = (tmp_path / "r" / "records.jsonl").read_text()
    capsys.readouterr()
    table3(monkeypatch, imagenet, tmp_path / "r")
    assert "is complete; delete it to run again" in capsys.readouterr().out
    tiny("clip", tmp_path / "other")
    with pytest.raises(UserError, match="other settings .weights"):
        table3(monkeypatch, imagenet, tmp_path / "r", "--weights", str(tmp_path / "other"))
    assert (tmp_path / "r" / "records.jsonl").read_text() == before


# ----------------------------------------------------------------------------------------------------- one's own folder


@pytest.fixture
def own(tmp_path):
    for c in ("red_fox", "owl"):
        for i in range(3):
            (tmp_path / "id" / c).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 20), (i * 60, 90, 20)).save(tmp_path / "id" / c / f"{i}.png")
    (tmp_path / "ood").mkdir()
    for i in range(3):
        Image.new("RGB", (30, 20), (9, i * 80, 200)).save(tmp_path / "ood" / f"a,b {i}.png")
    (tmp_path / "names.json").write_text(json.dumps({"names": ["Red Fox", "OWL", 'a "quoted", one', "bat"]}))
    tiny("clip", tmp_path / "w")
    return tmp_path


def test_own_folders_with_own_names(own, monkeypatch):
    import csv

    args = ["--id", own / "id", "--ood", own / "ood", "--labels", own / "names.json", "--weights", own / "w", "--dump"]
    args += ["--workers", "0", "--ensemble", "--out", own / "r"]
    call(evaluate, monkeypatch, *map(str, args))
    found = [json.loads(x) for x in (own / "r" / "records.jsonl").read_text().splitlines()]
    assert {r["method"]: r["metrics"]["labels"] for r in found}["EOE"] == 2  # the two ID names are no outliers
    rows = list(csv.DictReader(open(own / "r" / "seed0" / "scores-id-ood.csv")))
    assert [r["image"] for r in rows] == [str(own / "ood" / f"a,b {i}.png") for i in range(3)]
    assert {r["nearest_id"] for r in rows} <= {"red fox", "owl"}
    assert {r["nearest_envisioned"] for r in rows} <= {'a "quoted", one', "bat"}
    assert {r["decision"] for r in rows} <= {"ID", "OOD"}
    (own / "names.json").write_text(json.dumps({"names": ["OWL"]}))
    with pytest.raises(UserError, match="leaves no envisioned name"):
        call(evaluate, monkeypatch, *map(str, args[:-1]), str(own / "r2"))
    assert not list((own / "r2").rglob("record*"))


def test_one_class_and_one_image(own, monkeypatch):
    args = ["--id", own / "id", "--ood", own / "ood", "--labels", own / "names.json", "--weights", own / "w"]
    for path in [*(own / "id" / "owl").iterdir(), own / "id" / "owl", *list((own / "ood").iterdir())[1:]]:
        path.rmdir() if path.is_dir() else path.unlink()
    call(evaluate, monkeypatch, *map(str, [*args, "--workers", "0", "--batch", "1", "--out", own / "r"]))
    found = {json.loads(x)["method"]: json.loads(x) for x in (own / "r" / "records.jsonl").read_text().splitlines()}
    assert found["MCM"]["metrics"]["AUROC"] == 50.0  # one class: every softmax over it is 1
    assert {"EOE", "MaxLogit", "Energy"} <= {*found}


def test_which_names_are_dropped_as_too_similar():
    s = EvalSettings()
    near = {c.id: c for c in papertables.TABLES["table3"]}
    assert papertables.threshold(s, near["imagenet20"]) == 0.85 and papertables.threshold(s, near["imagenet10"]) == 1
    far = [c for c in papertables.TABLES["table25"] if c.id == "imagenet20"][0]
    assert papertables.threshold(s, far) == 1  # the far prompt's names
    s.max_similarity = 0.5
    assert papertables.threshold(s, near["imagenet20"]) == 0.5


# -------------------------------------------------------------------------------------------------------------- killed


def killed(words: list[str], when, env=None) -> None:
    """Start a command and kill it with SIGKILL as soon as `when()` holds."""
    process = subprocess.Popen([sys.executable, *words], cwd=runs.HERE, env=env, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not when():
        assert process.poll() is None and time.monotonic() < until, process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def numbers(out) -> list:
    found = [json.loads(x) for x in (out / "records.jsonl").read_text().splitlines()]
    return [(r["seed"], r["dataset"], r["method"], r["setting"], r["metrics"]) for r in found]


def test_train_killed_anywhere_ends_with_the_same_numbers(monkeypatch, tmp_path):
    """In training, between weights and records, and among the records; bitwise."""
    args = options(**{**TINY, "steps": 200, "checkpoint_every": 20}, device="cpu")
    out = tmp_path / "killed"
    words = ["train.py", *args, "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same threads everywhere: sums of floats depend on them
    killed(words, lambda: (out / "checkpoint" / "seed0.safetensors").is_file(), env)
    assert not (out / "seed0" / "model.safetensors").exists() and not (out / "records.jsonl").exists()
    killed(words, lambda: list(out.glob("seed0/record*.json")), env)
    assert not (out / "records.jsonl").exists()
    for name in ("killed", "whole"):
        call(train, monkeypatch, *args, "--out", str(tmp_path / name))
    assert numbers(out) == numbers(tmp_path / "whole")
    one, two = (runs.read_tensors(p / "seed0" / "model.safetensors")[0] for p in (out, tmp_path / "whole"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert (out / "seed0" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "seed0" / "metrics.jsonl").read_text()


def test_two_launches_share_a_cache(imagenet, monkeypatch, tmp_path):  # noqa: F811
    """Pieces of a launch that was killed, and of one that still runs, are neither used nor, while young, removed."""
    b, images = backbones.load(B16, CPU, data_dir=imagenet), data.load("imagenet10", imagenet)
    want = backbones.image_features(b, images, 4, 0)
    cache = backbones.cache_dir()
    (path,) = cache.iterdir()
    path.unlink()
    young, old = cache / f".{path.stem}.1.0.piece", cache / f".{path.stem}.2.0.piece"
    for p in (young, old):
        p.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert torch.equal(backbones.image_features(b, images, 4, 0), want)
    assert young.exists() and not old.exists()
