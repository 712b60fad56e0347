"""What the user can mend ends with exit code 2 and one line that names cause and mend."""

import gc
import json
import subprocess
import sys

from lab import runs

import pytest
import torch
from test_train import HERE, TINY

import eval
import evaluation
import settings
import train


def told(capsys, monkeypatch, main, args):
    """The one line a command ends with."""
    gc.collect()
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
        (["--eps", "300"], "--eps must lie in [0, 1], not 300; write 8/255"),
        (["--eps", "8/0"], "divides by zero"),
        (["--eps", "-1/255"], "--eps must lie in [0, 1]"),
        (["--eps", "nan"], "eps"),
        (["--eps", "8/x"], "eps"),
        (["--eps-low", "9/255"], "--eps-low (9/255) must not be above --eps (8/255)"),
        (["--eps", "4/255", "--eps-low", "7/255"], "--eps-low (7/255) must not be above --eps (4/255)"),
        (["--eps-low", "-2"], "--eps-low must be at least 0"),
        (["--eps-low", "-0.01"], "--eps-low must be at least 0"),
        (["--method", "prat"], "method"),
        (["--method", "at", "at"], "different arms"),
        (["--dataset", "cifar11"], "dataset"),
        (["--cam", "scorecam"], "cam"),
        (["--cam-layer", "5"], "small has stages 0 to 2"),
        (["--cam", "cam", "--model", "wrn-10-1"], "use --cam gradcam"),
        (["--mask-order", "random"], "mask-order"),
        (["--mask-rule", "jet-rgb", "--dataset", "digits"], "--mask-rule jet-rgb masks three channels; digits has 1"),
        (["--top-fraction", "0"], "--top-fraction must lie in (0, 1]"),
        (["--attack", "mma", "--method", "trades"], "--attack mma is for AT and PART"),
        (["--warmup", "3"], "--warmup 3 leaves no epoch of --epochs 3"),
        (["--eps-ramp", "2"], "--eps-ramp 2 must end within --warmup 1"),
        (["--lr-drops", "0"], "--lr-drops"),
        (["--refresh", "-1"], "--refresh must be at least 0"),
        (["--tau", "-2"], "--tau must be at least 0"),
        (["--gallery", "2", "--gallery-epochs", "1"], "--gallery-epochs are epochs of the arms, 2 to 3"),
        (["--gallery", "2", "--gallery-epochs", "4"], "--gallery-epochs are epochs of the arms, 2 to 3"),
        (["--gallery-epochs", "3"], "with --gallery images"),
        (["--sync-bn"], "--sync-bn needs CUDA"),
        (["--check", "--method", "part"], "--check compares the arms at and part"),
        (["--corruptions"], "--corruptions is for --dataset cifar10"),
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", "1", "1"], "--seeds"),
        (["--batch", "-1"], "--batch must be at least 0"),
        (["--momentum", "1"], "--momentum must lie in [0, 1)"),
        (["--autoattack", "apgd"], "--autoattack apgd is unknown"),
        (["--epsilon", "8/255"], "--epsilon"),
        (["--train-limit", "9999999"], "more than glyphs has"),
        (["--device", "gpu"], "--device gpu is unknown"),
        (["--dataset", "cifar10", "--data-dir", "/nowhere"], "CIFAR-10 is not in /nowhere: expected"),
        (["--dataset", "svhn", "--data-dir", "~nosuch/x"], "home folder"),
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
    text = capsys.readouterr().out
    assert "is complete" in text and "against AT" in text
    line = told(capsys, monkeypatch, train.main, [*TINY, "--out", done, "--lr", "0.3"])
    assert "holds a run with other settings (lr: 0.05, now 0.3)" in line


def test_evaluation_repeats_the_record_and_can_write_its_own(done, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--run", str(done), "--device", "cpu"])
    eval.main()
    record = runs.read_record(done / "seed0" / "record-part.json")
    text = capsys.readouterr().out
    assert f"{record['metrics']['pgd']:6.2f}" in text and "says otherwise" not in text
    changed = {**record, "metrics": {**record["metrics"], "pgd": 99.0}}
    runs.write_json(done / "seed0" / "record-part.json", changed)
    eval.main()
    assert "the record says otherwise: pgd 99.00 %" in capsys.readouterr().out
    monkeypatch.setattr(evaluation, "LONGER", (2, 3))
    args = ["x", "--run", str(done / "seed0"), "--arm", "part", "--steps", "3", "--autoattack", "apgd-ce", "--write"]
    monkeypatch.setattr(sys, "argv", [*args, "--adaptive", "--limit", "8", "--device", "cpu"])
    eval.main()
    new = runs.read_record(done / "seed0" / "record-part-eval.json")
    assert new["table"] == "own-eval" and "steps=3 n=8" in new["setting"] and "union" in new["metrics"]
    assert not (done / "seed0" / "record-at-eval.json").exists()


def test_evaluation_errors(done, capsys, monkeypatch):
    def says(*args):
        return told(capsys, monkeypatch, eval.main, ["--run", done, "--device", "cpu", *args])

    assert "no file" in told(capsys, monkeypatch, eval.main, ["--run", done.parent / "x" / "y"])
    assert f"no file {done}/nosuch/settings.json" in told(capsys, monkeypatch, eval.main, ["--run", done / "nosuch"])
    assert "has no seed7" in told(capsys, monkeypatch, eval.main, ["--run", done / "seed7", "--device", "cpu"])
    assert "--eps in [0, 1]" in says("--eps", "2")
    assert "has no arm fat; its arms are at, part" in says("--arm", "fat")
    assert "--corruptions is for runs on cifar10" in says("--corruptions")
    weights = done / "seed0" / "model-at.safetensors"
    tensors, _ = runs.read_tensors(weights)
    raw = weights.read_bytes()
    runs.write_tensors(weights, {k: v * torch.nan for k, v in tensors.items()})
    assert "not finite" in says()  # argmax of NaN would give an accuracy
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
    (done / "seed0" / "record-part.json").unlink()
    (done / "checkpoint").mkdir(exist_ok=True)
    path = done / "checkpoint" / "seed0-part.safetensors"
    path.write_bytes(b"cut off")
    assert "is damaged" in told(capsys, monkeypatch, train.main, [*TINY, "--out", done])
    runs.write_tensors(path, {"model.x": torch.zeros(1)}, {"epoch": "1"})
    assert "does not fit this run" in told(capsys, monkeypatch, train.main, [*TINY, "--out", done])


def test_a_lost_record_is_made_again_from_a_new_warm_up(done, capsys, monkeypatch):
    record = runs.read_record(done / "seed0" / "record-part.json")
    (done / "records.jsonl").unlink()
    (done / "seed0" / "record-part.json").unlink()
    monkeypatch.setattr(sys, "argv", ["x", *TINY, "--out", str(done)])
    train.main()
    again = runs.read_record(done / "seed0" / "record-part.json")
    assert all(again["metrics"][k] == record["metrics"][k] for k in ("natural", "pgd", "mma", "budget"))


def test_two_runs_at_once_in_a_folder(tmp_path, capsys, monkeypatch):
    held = runs.Run(tmp_path / "r", settings.Settings())
    assert "another process is writing" in told(capsys, monkeypatch, train.main, [*TINY, "--out", tmp_path / "r"])
    assert held.out.exists()


def test_a_read_only_place_is_told(capsys, monkeypatch):
    assert "choose another --out" in told(capsys, monkeypatch, train.main, [*TINY, "--out", "/proc/nothing/r"])


def test_commands_from_the_shell():
    """Once through real processes: help, a dry run, an error."""

    def shell(*args):
        return subprocess.run([sys.executable, *args], cwd=HERE, capture_output=True, text=True, timeout=120)

    done = shell("train.py", "--help")
    assert done.returncode == 0 and "--eps-low" in done.stdout
    done = shell("train.py", "--dry-run", "--eps", "8/255", "--device", "cpu")
    assert done.returncode == 0 and "budget 8/255 where the gradcam map" in done.stdout
    done = shell("train.py", "--eps", "300")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
