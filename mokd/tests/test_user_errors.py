"""One line for what cannot be done; tasks out of a folder of one's own."""

import dataclasses
import json
import shutil
import sys

from lab import runs
from lab.runs import UserError

import pytest
import torch
from commands import IMAGES, RANDOM, TINY, call, folder

import backbones
import domains
import eval
import evaluation
import methods
import settings
import train


def test_no_weights_no_numbers(monkeypatch, tmp_path):
    """Weights that are no numbers end the run; no accuracy is written."""
    model = backbones.build("conv4", 28)
    state = {k: torch.full_like(v, float("nan")) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    runs.write_tensors(tmp_path / "w.safetensors", state)
    words = ["--backbone", "conv4", "--weights", tmp_path / "w.safetensors", *RANDOM[2:], "--tasks", "2"]
    with pytest.raises(UserError, match="not finite"):
        call(eval, monkeypatch, *words, "--out", tmp_path / "r")
    assert not list((tmp_path / "r").rglob("record*"))


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="not a number at step"):
        call(train, monkeypatch, *TINY, "--rate", "1e30", "--methods", "ncc", "--out", tmp_path / "r")
    assert not list((tmp_path / "r").rglob("record*"))


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("train", ["--methods", "svm"], "no method svm"),
        ("train", ["--methods", "mokd:beta=1"], "not beta"),
        ("train", ["--methods", "mokd:kernel=sigmoid"], "one of rbf"),
        ("train", ["--methods", "mokd:gamma=-1"], "not negative"),
        ("train", ["--methods", "mokd:steps=1.5"], "whole number"),
        ("train", ["--methods", "mokd", "mokd"], "different methods"),
        ("train", ["--domains", "moon"], "no domain moon"),
        ("train", ["--domains"], "one or more different domains"),
        ("train", ["--domains", "digits", "drawn", "digits"], "one or more different domains"),
        ("train", ["--kernel", "sigmoid"], "--kernel sigmoid"),
        ("train", ["--bandwidth", "random"], "--bandwidth random"),
        ("train", ["--zz-bandwidth", "own"], "--zz-bandwidth own"),
        ("train", ["--scale", "huge"], "--scale huge"),
        ("train", ["--workers", "-1"], "--workers"),
        ("train", ["--limit", "-1"], "--limit"),
        ("train", ["--lr", "-2"], "--lr must not be"),
        ("train", ["--weight-decay", "inf"], "weight-decay"),
        ("train", ["--momentum", "1"], "--momentum"),
        ("train", ["--size", "8"], "--size must be at least 16"),
        ("train", ["--train", "drawn", "drawn"], "different domains"),
        ("train", ["--checkpoint-every", "0"], "--checkpoint-every"),
        ("train", ["--validate-every", "0"], "--validate-every"),
        ("train", ["--pictures", "1"], "--pictures must be at least 2"),
        ("train", ["--seeds"], "--seeds"),
        ("train", ["--seeds", "3", "3"], "--seeds"),
        ("train", ["--device", "tpu"], "--device tpu"),
        ("train", ["--train", "mnist"], "--train mnist"),
        ("train", ["--train", "omniglot"], "Omniglot is not in"),
        ("train", ["--law", "2shot"], "--law 2shot"),
        ("train", ["--gamma", "nan"], "gamma"),
        ("train", ["--gamma", "-2"], "must not be negative"),
        ("train", ["--tasks", "0"], "--tasks"),
        ("train", ["--steps", "-1"], "--steps"),
        ("train", ["--max-support", "10"], "--max-support"),
        ("train", ["--rate", "0"], "--rate"),
        ("train", ["--teachers", "a", "b"], "2 runs for 1 domains"),
        ("train", ["--teachers", "nowhere"], "no file nowhere"),
        ("train", ["--backbone", "nothing"], "no backbone nothing"),
        ("train", ["--backbone", "random5x5"], "no weights to train"),
        ("train", ["--precision", "int4"], "--precision"),
        ("train", ["--seeds", "-1"], "--seeds"),
        ("train", ["--data-dir", "~nosuch", "--train", "omniglot"], "home folder"),
        ("eval", ["--domains", "digits"], "--weights, --run or --pretrained"),
        ("eval", ["--backbone", "lite0", "--weights", "x"], "brings its own weights"),
        ("eval", ["--backbone", "test_resnet", "--pretrained", "--weights", "x"], "brings its own weights"),
        ("eval", ["--backbone", "conv4", "--pretrained"], "networks of timm"),
        ("eval", [*RANDOM, "--ways", "5"], "go together"),
        ("eval", [*RANDOM, "--ways", "3", "--shots", "1"], "HSIC needs 4"),
        ("eval", [*RANDOM, "--ways", "5", "--shots", "1", "--law", "1shot"], "in place of --law"),
        ("eval", [*RANDOM, "--images", "nowhere"], "in place of --domains"),
        ("eval", ["--backbone", "lite0", "--images", "nowhere"], "is no folder"),
        ("eval", ["--run", "nowhere"], "no file nowhere"),
        ("eval", ["--run", "nowhere", "--weights", "x"], "leave out --weights"),
        ("eval", ["--backbone", "random5x5", "--size", "28", "--seen", "omniglott"], "--seen omniglott"),
        ("eval", [*RANDOM, "--tasks", "1", "--methods", "ssl-hsic:scale=0"], "no numbers"),
        ("eval", [*RANDOM, "--tasks", "1", "--methods", "linear:lr=1e999"], "no numbers"),
        ("eval", ["--backbone", "random5x5"], "made for --size 28"),
        ("eval", ["--backbone", "conv4", "--weights", "nowhere.safetensors"], "no weights in"),
        ("eval", ["--backbone", "random5x5", "--size", "28", "--domains", "mnist"], "MNIST is not in"),
    ],
)
def test_user_errors_are_one_line(script, words, expected, monkeypatch, tmp_path, capsys):
    module = {"train": train, "eval": eval}[script]
    monkeypatch.setenv("REPRO_DATA", str(tmp_path / "empty"))
    more = ["--size", "28", "--workers", "0"] if script == "train" and "--size" not in words else []
    monkeypatch.setattr(sys, "argv", ["x.py", *more, *words, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        runs.command(module.main)
    told = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and expected in told[-1] and told[-1].startswith("error: ")
    assert not list((tmp_path / "out").rglob("record*"))
    if "no numbers" not in expected:
        assert not (tmp_path / "out").exists()  # a start that failed leaves no folder


def test_tasks_out_of_ones_own_folder(monkeypatch, tmp_path):
    place = folder(tmp_path / "pictures")
    call(eval, monkeypatch, *IMAGES, "--images", place, "--methods", "ncc", "mokd", "--out", tmp_path / "run")
    found = [json.loads(x) for x in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert [r["method"] for r in found] == ["NCC", "MOKD"] and {r["setting"] for r in found} == {"3-way 2-shot"}
    assert found[0]["metrics"]["accuracy"] > 90 and found[0]["data"]["n"] == 12
    assert found[0]["metrics"]["mean_support"] == 6 and found[1]["metrics"]["method_settings"]["gamma"] == 1


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda p: [shutil.rmtree(p / f"class{c}") for c in (1, 2)], "holds 1 classes"),
        (lambda p: [x.unlink() for x in (p / "class1").iterdir()], "no picture in"),
        (lambda p: [x.unlink() for x in list((p / "class1").iterdir())[1:]], "too few for a task"),
        (lambda p: shutil.rmtree(p / "class1"), "has 2 classes, a task needs 3"),
        (lambda p: (p / "class1" / "1.png").write_bytes(b"no picture"), "cannot be read"),
    ],
)
def test_what_is_no_folder_of_tasks_is_one_line(spoil, word, monkeypatch, tmp_path, capsys):
    spoil(folder(tmp_path / "pictures"))
    words = [*IMAGES, "--images", str(tmp_path / "pictures"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["eval.py", *words])
    with pytest.raises(SystemExit) as stop:
        runs.command(eval.main)
    told = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and word in told[-1] and told[-1].startswith("error: ")
    assert not list((tmp_path / "out").rglob("record*"))


def test_runs_of_other_settings_have_folders_of_their_own(monkeypatch, tmp_path):
    """Whatever decides the numbers is in the default --out; what does not, is not."""

    def out(*words: str) -> str:
        s = runs.parse(settings.EvalSettings, "", [*RANDOM, *words])
        s.check()
        return eval.named(s)

    first = out()
    assert first == out("--data-dir", "x", "--device", "cpu", "--batch", "3") and "own" not in first
    changed = [
        *(["--methods", "ncc"], ["--tasks", "5"], ["--seeds", "1"], ["--gamma", "2"], ["--limit", "9"]),
        *(["--law", "5shot"], ["--ways", "5", "--shots", "2"], ["--domains", "digits", "mnist5k"], ["--table", "t"]),
    ]
    assert len({first, *(out(*w) for w in changed)}) == 1 + len(changed)
    assert "digits-varied" in first and "5x2" in out("--ways", "5", "--shots", "2")


def test_a_head_that_makes_one_point_of_all_is_one_line(monkeypatch, tmp_path):
    """A picture of it would be none: neither a t-SNE of NaN nor one of a single point."""
    for value in (0.0, float("nan")):
        answer = methods.answer
        spoiled = lambda m, t, o, v=value, a=answer: dataclasses.replace(a(m, t, o), theta=torch.full((1, 288, 288), v))  # noqa: E731
        monkeypatch.setattr(methods, "answer", spoiled)
        s = runs.parse(settings.EvalSettings, "", [*RANDOM, "--methods", "ncc", "url", "--tasks", "20"])
        s.check()
        domain = domains.load("digits", "test", tmp_path, 28)
        found = torch.rand(len(domain), 288)
        with pytest.raises(UserError, match="one point of all pictures"):
            evaluation.example(s, domain, found, 0, "URL", False, torch.device("cpu"))
        monkeypatch.setattr(methods, "answer", answer)
