"""Commands end to end, exact resume, several processes, the snippet of the README."""

import json
import signal
import subprocess
import sys
import time

from lab import runs
from lab.runs import UserError

import pytest
import torch
from commands import RANDOM, TINY, call, folder, records, start, weights

import backbones
import eval
import evaluation
import train
import trainer


def test_train_then_eval_gives_the_same_again(monkeypatch, tmp_path, capsys):
    call(train, monkeypatch, *TINY, "--methods", "ncc", "mokd", "--out", tmp_path / "a")
    found = records(tmp_path / "a")
    assert [x[2] for x in found] == ["NCC", "MOKD"] and found[1][3]["gain over NCC"] == pytest.approx(
        found[1][3]["accuracy"] - found[0][3]["accuracy"]
    )
    assert not (tmp_path / "a" / "seed0" / "tasks-digits").exists()
    lines = (tmp_path / "a" / "seed0" / "tasks-digits.jsonl").read_text().splitlines()
    assert [json.loads(x)["task"] for x in lines] == [0, 1, 2]
    curve = [json.loads(x) for x in (tmp_path / "a" / "seed0" / "metrics.jsonl").read_text().splitlines()]
    assert {x["step"] for x in curve if "valid_drawn" in x} == {3, 6} and any("loss" in x for x in curve)
    again = ["--run", tmp_path / "a", "--domains", "digits", "--methods", "ncc", "mokd", "--tasks", "3", "--limit", "6"]
    call(eval, monkeypatch, *again, "--max-support", "50", "--workers", "0", "--out", tmp_path / "b")
    assert [x[3]["accuracy"] for x in records(tmp_path / "b")] == [x[3]["accuracy"] for x in found]
    capsys.readouterr()
    call(eval, monkeypatch, *again, "--max-support", "50", "--workers", "0", "--out", tmp_path / "b")
    assert "complete" in capsys.readouterr().out


@pytest.mark.parametrize("at", [2, 4])
def test_training_resumes_to_the_same_bits(at, monkeypatch, tmp_path):
    call(train, monkeypatch, *TINY, "--methods", "ncc", "--out", tmp_path / "whole")
    save = trainer.Trainer.save

    def stop(self, path, step, seconds):
        save(self, path, step, seconds)
        if step == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        call(train, monkeypatch, *TINY, "--methods", "ncc", "--out", tmp_path / "cut")
    monkeypatch.setattr(trainer.Trainer, "save", save)
    kept = tmp_path / "cut" / "seed0" / ".data.json"
    own = kept.read_text()
    kept.write_text('["another copy"]')
    with pytest.raises(UserError, match="begun with other data"):
        call(train, monkeypatch, *TINY, "--methods", "ncc", "--out", tmp_path / "cut")
    kept.write_text(own)
    call(train, monkeypatch, *TINY, "--methods", "ncc", "--out", tmp_path / "cut")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert records(tmp_path / "whole") == records(tmp_path / "cut")
    curves = [(tmp_path / k / "seed0" / "metrics.jsonl").read_text() for k in ("whole", "cut")]
    assert curves[0] == curves[1]


def test_killed_evaluation_goes_on_with_the_next_block(tmp_path, monkeypatch):
    words = ["eval.py", *RANDOM, "--tasks", "100", "--methods", "ncc", "mokd", "--out"]
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, *words, str(cut)], cwd=runs.HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    kept, deadline = cut / "seed0" / "tasks-digits", time.time() + 120
    while not (kept / "00000.json").is_file() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (kept / "00000.json").is_file() and not (cut / "records.jsonl").exists()
    first = (kept / "00000.json").stat().st_mtime_ns
    seen = []
    block = evaluation.block
    monkeypatch.setattr(evaluation, "block", lambda *a: (seen.append(a[3].start), block(*a))[1])
    call(eval, monkeypatch, *words[1:], cut)
    assert 0 not in seen and first
    call(eval, monkeypatch, *words[1:], tmp_path / "whole")
    assert records(cut) == records(tmp_path / "whole")


@pytest.mark.parametrize("killed_at", ["write_text", "rmtree"])
def test_killed_while_the_records_are_written(killed_at, tmp_path, monkeypatch):
    """Every task's line is on disk before the first record, and no piece outlives the next start."""
    words = [*RANDOM, "--tasks", "5", "--methods", "ncc", "url", "--out"]
    place, name = (runs.Run, "record") if killed_at == "write_text" else (evaluation.shutil, "rmtree")
    before, calls = getattr(place, name), []

    def die(*a, **k):
        calls.append(1)
        if name == "rmtree" or len(calls) == 2:
            raise KeyboardInterrupt
        return before(*a, **k)

    monkeypatch.setattr(place, name, die)
    with pytest.raises(KeyboardInterrupt):
        call(eval, monkeypatch, *words, tmp_path / "cut")
    monkeypatch.setattr(place, name, before)
    assert (tmp_path / "cut" / "seed0" / "tasks-digits.jsonl").is_file()
    assert (tmp_path / "cut" / "seed0" / "tasks-digits").is_dir()
    call(eval, monkeypatch, *words, tmp_path / "cut")
    assert not (tmp_path / "cut" / "seed0" / "tasks-digits").exists()
    assert len((tmp_path / "cut" / "seed0" / "tasks-digits.jsonl").read_text().splitlines()) == 5
    call(eval, monkeypatch, *words, tmp_path / "whole")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


@pytest.mark.parametrize("text", ["[]", "[1]", '[{"task": 0, "methods": {}}]', "{"])
def test_a_damaged_piece_makes_no_record(text, tmp_path, monkeypatch):
    words = [*RANDOM, "--tasks", "2", "--methods", "ncc", "--out", tmp_path / "r"]
    runs.write_text(tmp_path / "r" / "seed0" / "tasks-digits" / "00000.json", text)
    with pytest.raises(UserError, match="does not hold tasks 0 to 1|not valid JSON"):
        call(eval, monkeypatch, *words)
    assert not list((tmp_path / "r").rglob("record*")) and not list((tmp_path / "r").rglob("*.jsonl"))


def test_two_processes_share_the_tasks(tmp_path, monkeypatch):
    words = ["eval.py", *RANDOM, "--tasks", "45", "--methods", "ncc", "mokd", "--device", "cpu", "--out"]
    start(*words, tmp_path / "two", port=29541)
    monkeypatch.setenv("MOKD_CACHE", str(tmp_path / "other"))
    call(eval, monkeypatch, *words[1:], tmp_path / "one")
    assert records(tmp_path / "two") == records(tmp_path / "one")
    files = [[f.name for f in (tmp_path / k).iterdir()] for k in ("cache", "other")]
    assert files[0] == files[1]  # the same features, no pieces left


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """With GroupNorm, whose statistics are those of one picture, the gradients are those of the whole batch."""
    words = ["train.py", *TINY, "--backbone", "conv4-group", "--methods", "ncc", "--device", "cpu", "--out"]
    start(*words, tmp_path / "two", port=29542)
    call(train, monkeypatch, *words[1:], tmp_path / "one")
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    fresh = backbones.build("conv4-group", 28).state_dict()
    assert any(not torch.allclose(a[k], fresh[k], atol=1e-3) for k in fresh)
    assert records(tmp_path / "two")[0][3]["tasks"] == 3


def test_the_snippet_of_the_readme_runs(monkeypatch, tmp_path, capsys):
    text = (runs.HERE / "README.md").read_text()
    code = text.partition("## In your own code")[2].partition("```python\n")[2].partition("```")[0]
    assert 5 < len(code.strip().splitlines()) <= 15
    folder(tmp_path / "pictures", each=6)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.strip() == "class0"


def test_dry_run_writes_nothing(monkeypatch, tmp_path, capsys):
    call(train, monkeypatch, *TINY, "--dry-run", "--out", tmp_path / "x")
    assert "would train conv4" in capsys.readouterr().out and not (tmp_path / "x").exists()
    call(eval, monkeypatch, *RANDOM, "--dry-run", "--methods", "ncc", "url", "--out", tmp_path / "x")
    said = capsys.readouterr().out
    assert "would test random5x5" in said and "classes, ncc, url" in said and not (tmp_path / "x").exists()


@pytest.mark.gpu
def test_cpu_and_gpu_agree(tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    words = [*RANDOM, "--tasks", "20", "--methods", "ncc", "url", "mokd"]
    for device in ("cpu", "cuda"):
        call(eval, monkeypatch, *words, "--device", device, "--out", tmp_path / device)
    for a, b in zip(records(tmp_path / "cpu"), records(tmp_path / "cuda"), strict=True):
        assert a[3]["accuracy"] == pytest.approx(b[3]["accuracy"], abs=1.0)
