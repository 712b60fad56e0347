"""What the user can mend ends with exit code 2 and one line that names cause and mend."""

import gc
import json
import subprocess
import sys
from pathlib import Path

from lab import runs

import pytest
import torch

import eval as evaluate
import train
from settings import Settings

HERE = Path(train.__file__).parent
TINY = ["--dataset", "digits", "--epochs", "1", "--train-limit", "64", "--probe", "10", "--probe-steps", "1"]
TINY += ["--test-steps", "1", "--test-restarts", "1", "--eval-limit", "10", "--device", "cpu"]


def told(capsys, monkeypatch, main, args):
    """The one line a command ends with."""
    gc.collect()  # the traceback of a call before may hold its run, and with it the lock of the folder
    monkeypatch.setattr(sys, "argv", ["x", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        runs.command(main)
    text = capsys.readouterr().err.split("\r")[-1]
    assert stop.value.code == 2 and "Traceback" not in text
    line = [x for x in text.splitlines() if x.startswith("error: ")]
    assert len(line) == 1
    return line[0]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--eps", "8"], "--eps must lie in [0, 1], not 8; write 8/255"),
        (["--eps", "-1/255"], "--eps must lie in [0, 1]"),
        (["--eps", "nan"], "eps"),
        (["--eps", "8/x"], "eps"),
        (["--method", "fgms"], "method"),
        (["--dataset", "cifar11"], "dataset"),
        (["--start", "random"], "start"),
        (["--method", "pgd", "--start", "n"], "--start n is for lap and fgsm"),
        (["--seeds", "-1"], "--seeds"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--beta", "-2"], "--beta must be at least 0"),
        (["--beta", "-0.5"], "--beta must be at least 0"),
        (["--gamma", "-1"], "--gamma must be at least 0"),
        (["--gamma", "inf"], "gamma"),
        (["--weight-direction", "down"], "weight-direction"),
        (["--variant", "lap-b"], "variant"),
        (["--keep-every", "-1"], "--keep-every must be at least 0"),
        (["--lr", "-0.1"], "--lr must be at least 0"),
        (["--peak", "1.5"], "--peak must lie in [0, 1)"),
        (["--autoattack", "apgd"], "--autoattack apgd is unknown"),
        (["--epsilon", "8/255"], "--epsilon"),
        (["--train-limit", "9999999"], "more than digits has"),
        (["--model", "preact18"], "images of 8 pixels are 1 wide before the 4x4 pool"),
        (["--dataset", "mnist5k", "--model", "preact18"], "images of 14 pixels"),
        (["--eps", "1e-40"], "--eps 1e-40 is too small, in float32 it is nothing"),
        (["--step", "1e-320"], "--step 1e-320 is too small"),
        (["--jitter", "-1"], "--jitter must be at least 0"),
        (["--analyse-images", "0"], "--analyse-images must be at least 1"),
        (["--removal-limit", "-1"], "--removal-limit must be at least 0"),
        (["--autoattack-limit", "-1"], "--autoattack-limit must be at least 0"),
        (["--device", "gpu"], "--device gpu is unknown"),
        (["--dataset", "cifar10", "--data-dir", "/nowhere"], "CIFAR-10 is not in /nowhere: expected"),
    ],
)
def test_wrong_options_and_missing_data(capsys, monkeypatch, tmp_path, args, words):
    assert words in told(capsys, monkeypatch, train.main, [*TINY, "--out", tmp_path / "r", *args])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_cuda(capsys, monkeypatch, tmp_path):
    assert "no CUDA device" in told(capsys, monkeypatch, train.main, [*TINY, "--out", tmp_path, "--device", "cuda"])


@pytest.fixture
def done(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", *TINY, "--out", str(tmp_path / "r")])
    train.main()
    return tmp_path / "r"


def test_a_finished_run_is_shown_and_other_settings_are_refused(done, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", *TINY, "--out", str(done)])
    train.main()
    assert "is complete" in capsys.readouterr().out
    line = told(capsys, monkeypatch, train.main, [*TINY, "--out", done, "--lr", "0.1"])
    assert "holds a run with other settings (lr: 0.2, now 0.1)" in line


def test_evaluation_repeats_the_record_and_can_write_its_own(done, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--run", str(done), "--device", "cpu"])
    evaluate.main()
    record = runs.read_record(done / "seed0" / "record.json")
    text = capsys.readouterr().out
    assert f"PGD {record['metrics']['pgd']:.2f} %" in text and "says otherwise" not in text
    args = ["x", "--run", str(done / "seed0"), "--steps", "3", "--restarts", "2", "--autoattack", "apgd-ce", "--write"]
    monkeypatch.setattr(sys, "argv", [*args, "--limit", "8", "--device", "cpu"])
    evaluate.main()
    new = runs.read_record(done / "seed0" / "record-eval.json")
    assert new["table"] == "own-eval" and "PGD-3-2 n=8" in new["setting"] and "autoattack" in new["metrics"]


def test_damaged_runs(done, capsys, monkeypatch):
    def says(*args):
        return told(capsys, monkeypatch, evaluate.main, ["--run", done, "--device", "cpu", *args])

    assert "no file" in told(capsys, monkeypatch, evaluate.main, ["--run", done.parent / "x" / "y"])
    assert "has no seed7" in told(capsys, monkeypatch, evaluate.main, ["--run", done / "seed7", "--device", "cpu"])
    assert "--eps in [0, 1]" in says("--eps", "2")
    weights = done / "seed0" / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[: len(raw) // 2])
    assert "is damaged" in says()
    runs.write_tensors(weights, {"a": torch.zeros(1)})
    assert "does not fit" in says()
    weights.unlink()
    assert "train the run first" in says()
    settings = json.loads((done / "settings.json").read_text())
    (done / "settings.json").write_text(json.dumps({**settings, "colour": 1}))
    assert "another version" in says()
    (done / "settings.json").write_text("{")
    assert "not valid JSON" in says()


def test_a_broken_or_foreign_checkpoint_is_told(done, capsys, monkeypatch):
    (done / "records.jsonl").unlink()
    (done / "seed0" / "record.json").unlink()
    (done / "checkpoint").mkdir(exist_ok=True)
    path = done / "checkpoint" / "seed0.safetensors"
    path.write_bytes(b"cut off")
    assert "is damaged" in told(capsys, monkeypatch, train.main, [*TINY, "--out", done])
    runs.write_tensors(path, {"model.x": torch.zeros(1)}, {"epoch": "1"})
    assert "belongs to another run" in told(capsys, monkeypatch, train.main, [*TINY, "--out", done])


def test_two_runs_at_once_in_a_folder(tmp_path, capsys, monkeypatch):
    s = Settings()
    held = runs.Run(tmp_path / "r", s)
    assert "another process is writing" in told(capsys, monkeypatch, train.main, [*TINY, "--out", tmp_path / "r"])
    assert held.out.exists()


def test_a_read_only_place_is_told(capsys, monkeypatch):
    line = told(capsys, monkeypatch, train.main, [*TINY, "--out", "/proc/nothing/r"])
    assert "choose another --out" in line


def test_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 0 and "--eps" in capsys.readouterr().out


def test_commands_from_the_shell(tmp_path):
    """Once through real processes: a dry run, an error."""

    def shell(*args):
        return subprocess.run([sys.executable, *args], cwd=HERE, capture_output=True, text=True, timeout=120)

    done = shell("train.py", "--dry-run", "--dataset", "digits", "--eps", "8/255", "--device", "cpu")
    assert done.returncode == 0 and "beta 0.002 (not published" in done.stdout and "L = 10" in done.stdout
    done = shell("train.py", "--eps", "9")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
