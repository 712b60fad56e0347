"""A run that was stopped, killed or that broke: it goes on with the same numbers, or says what is wrong."""

import json
import signal
import subprocess
import sys
import time

from lab import runs

import pytest
import torch
from commands import TINY, environment, run_main, same_runs, told

import eval as command
import trainer
from trainer import Trainer

ARGS = [*TINY, "--methods", "ga", "npo-kl", "--checkpoint-steps"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "r"
    with pytest.MonkeyPatch.context() as patch:
        run_main(patch, *ARGS, "2", "--out", out)
    return out


@pytest.mark.parametrize("at", [1, 7])
def test_resume_is_exact(whole, tmp_path, monkeypatch, at):
    """Cut at a checkpoint of the fine-tuning or of a method; records, weights and curves are bitwise the same."""
    args = [*ARGS, "2", "--out", tmp_path / "r"]
    count, save = [0], Trainer.save

    def cut(self, path, seconds):
        save(self, path, seconds)
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, *args)
    monkeypatch.setattr(Trainer, "save", save)
    assert list(tmp_path.rglob("*checkpoint*/*.safetensors")) + list(tmp_path.rglob("checkpoint.*"))
    kept = tmp_path / "r" / "seed0" / ".data.json"
    own = kept.read_text()
    kept.write_text('["another copy"]')
    with pytest.raises(runs.UserError, match="begun with other data"):
        run_main(monkeypatch, *args)
    kept.write_text(own)
    run_main(monkeypatch, *args)
    same_runs(whole, tmp_path / "r")


def test_lines_of_a_fine_tuning_outlive_a_kill(tmp_path, monkeypatch):
    """They are written as it goes on; a new start from before them drops what it will do again."""
    monkeypatch.setattr(trainer, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    update = Trainer.update

    def cut(self, micro):
        if self.step == 5:
            raise KeyboardInterrupt
        return update(self, micro)

    args = [*TINY, "--methods", "ga", "--checkpoint-steps", "3", "--out", tmp_path / "r"]

    def steps():
        (path,) = (tmp_path / "models").glob("*/metrics.jsonl")
        return [json.loads(x)["step"] for x in path.read_text().splitlines()]

    monkeypatch.setattr(Trainer, "update", cut)
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, *args)
    assert steps() == [1, 2, 3, 4, 5]
    monkeypatch.setattr(Trainer, "update", update)
    run_main(monkeypatch, *args)
    assert steps() == list(range(1, steps()[-1] + 1)) and steps()[-1] > 6


def test_kill_and_start_again_gives_the_same(whole, tmp_path, monkeypatch):
    """A real process, killed in the middle of a method."""
    args = [*ARGS, "1", "--out", str(tmp_path / "r")]
    process = subprocess.Popen(
        [sys.executable, "train.py", *args],
        cwd=runs.HERE, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    path = tmp_path / "r" / "checkpoint" / "seed0-forget-small-npo-kl.safetensors"
    start = time.monotonic()
    while not path.exists() and process.poll() is None and time.monotonic() - start < 150:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists() and not (tmp_path / "r" / "records.jsonl").exists()
    run_main(monkeypatch, *args)
    same_runs(whole, tmp_path / "r")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tmp_path, capsys, monkeypatch):
    from methods import Unlearner

    micro = Unlearner.micro

    def poisoned(self, step, k):
        loss, parts = micro(self, step, k)
        return (loss * torch.nan if step >= 3 else loss), parts

    monkeypatch.setattr(Unlearner, "micro", poisoned)
    args = [*TINY, "--methods", "ga", "--checkpoint-steps", "1", "--out", tmp_path / "r"]
    line = told(capsys, monkeypatch, args)
    assert "the loss or its gradient is not a finite number" in line and "lower the learning rate" in line
    tensors, meta = runs.read_tensors(tmp_path / "r" / "checkpoint" / "seed0-forget-small-ga.safetensors")
    assert meta["step"] == "3" and all(v.isfinite().all() for v in tensors.values())
    assert not list((tmp_path / "r" / "seed0").glob("record-forget-small-ga*"))


def test_broken_and_foreign_checkpoints_are_told(tmp_path, capsys, monkeypatch):
    args = [*TINY, "--methods", "ga", "--out", tmp_path / "r"]
    path = tmp_path / "r" / "checkpoint" / "seed0-forget-small-ga.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut off")
    assert "is damaged" in told(capsys, monkeypatch, args)
    runs.write_tensors(path, {"model.x": torch.zeros(1)}, {"step": "1", "seconds": "1"})
    assert "weights of another network" in told(capsys, monkeypatch, args)
    path.unlink()
    run_main(monkeypatch, *args)
    model = tmp_path / "r" / "seed0" / "model-forget-small-ga.safetensors"
    model.write_bytes(model.read_bytes()[:100])
    assert "is damaged" in told(capsys, monkeypatch, ["--run", tmp_path / "r", "--device", "cpu"], command.main)
    model.unlink()
    assert "train the run first" in told(
        capsys, monkeypatch, ["--run", tmp_path / "r", "--device", "cpu"], command.main
    )
