"""A run that is cut goes on exactly, tells of what is damaged, and two processes train as one."""

import os
import signal
import socket
import subprocess
import sys
import time

from lab import runs

import pytest
import torch
from test_train import HERE, TINY, lines, run_main

import train
from trainer import Trainer

METHODS = [["aaer", "--start", "n"], ["aaer", "--start", "v", "--term", "pull", "--group", "random"]]
METHODS += [["free", "--replays", "2"], ["gradalign"]]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m[-1])
@pytest.mark.parametrize("at", [1, 4])
def test_resume_is_exact(tmp_path, monkeypatch, method, at):
    """Cut at a checkpoint inside the first or the second epoch; weights, curves and metrics are bitwise the same."""
    args = [*TINY, "--method", *method, "--checkpoint-steps", "1", "--seeds", "0", "1"]
    run_main(monkeypatch, *args, "--out", str(tmp_path / "a"))
    count, save = [0], Trainer.save

    def cut(self, path, seconds):
        save(self, path, seconds)
        count[0] += 1
        if count[0] == at + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, *args, "--out", str(tmp_path / "b"))
    run_main(monkeypatch, *args, "--out", str(tmp_path / "b"))
    same_runs(tmp_path / "a", tmp_path / "b", (0, 1))


def test_a_run_cut_in_its_only_epoch_still_gives_a_record(tmp_path, monkeypatch):
    """It has no time of a whole epoch; the rest of the record is that of the run which was not cut."""
    args, save = [*TINY, "--epochs", "1", "--checkpoint-steps", "3"], Trainer.save
    run_main(monkeypatch, *args, "--out", str(tmp_path / "a"))

    def cut(self, path, seconds):
        save(self, path, seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, *args, "--out", str(tmp_path / "b"))
    monkeypatch.setattr(Trainer, "save", save)
    run_main(monkeypatch, *args, "--out", str(tmp_path / "b"))
    same_runs(tmp_path / "a", tmp_path / "b", (0,))
    assert "train_seconds_epoch" not in runs.read_json(tmp_path / "b" / "seed0" / "record.json")["metrics"]


def test_a_lost_curve_is_told(tmp_path, monkeypatch):
    """The onset of overfitting is read from it: going on without would give a record that looks whole."""
    out, save = tmp_path / "r", Trainer.save

    def cut(self, path, seconds):
        save(self, path, seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, *TINY, "--out", str(out))
    (out / "seed0" / "metrics.jsonl").unlink()
    with pytest.raises(runs.UserError, match="has 0 of the 1 epochs behind the checkpoint"):
        run_main(monkeypatch, *TINY, "--out", str(out))
    (out / "seed0" / "metrics.jsonl").write_text('{"epoch": 1, "loss"')
    with pytest.raises(runs.UserError, match="metrics.jsonl is damaged"):
        run_main(monkeypatch, *TINY, "--out", str(out))


def same_runs(a, b, seeds):
    for seed in seeds:
        x, y = (runs.read_tensors(p / f"seed{seed}" / "model.safetensors")[0] for p in (a, b))
        assert all(torch.equal(x[k], y[k]) for k in x) and x.keys() == y.keys()
        one, two = (runs.read_json(p / f"seed{seed}" / "record.json")["metrics"] for p in (a, b))
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in two.items() if "seconds" not in k
        }
        one, two = (lines(p / f"seed{seed}" / "metrics.jsonl") for p in (a, b))
        assert one == two


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_kill_and_start_again_gives_the_same(tmp_path, monkeypatch):
    """A real process, killed the moment its first checkpoint inside an epoch is there."""
    args = [*TINY, "--epochs", "10", "--checkpoint-steps", "2", "--method", "aaer"]
    command = [sys.executable, "train.py", *args, "--out", str(tmp_path / "b")]
    process = subprocess.Popen(
        command, cwd=HERE, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    path, end = tmp_path / "b" / "checkpoint" / "seed0.safetensors", time.time() + 300
    while not path.exists() and process.poll() is None and time.time() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists() and not (tmp_path / "b" / "records.jsonl").exists()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run_main(monkeypatch, *args, "--out", str(tmp_path / "b"))
    run_main(monkeypatch, *args, "--out", str(tmp_path / "a"))
    torch.set_num_threads(before)
    same_runs(tmp_path / "a", tmp_path / "b", (0,))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    out = tmp_path / "r"
    calls, perturb = [0], train.baselines.perturb

    def poisoned(*args):
        p = perturb(*args)
        calls[0] += 1
        return train.baselines.Perturbed(p.delta * torch.nan, p.z0) if calls[0] == 9 else p  # in the second epoch

    monkeypatch.setattr(train.baselines, "perturb", poisoned)
    with pytest.raises(runs.UserError, match=r"not a finite number in 6 steps before step 14 \(epoch 2\)"):
        run_main(monkeypatch, *TINY, "--out", str(out))
    tensors, meta = runs.read_tensors(out / "checkpoint" / "seed0.safetensors")
    assert meta["epoch"] == "1" and all(v.isfinite().all() for k, v in tensors.items() if k.startswith("model."))
    assert not (out / "seed0" / "record.json").exists()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """The same images, crops and noise, the regulariser over the whole batch; a network without batch statistics."""
    args = ["--dataset", "digits", "--model", "preact-small-gn", "--method", "aaer", "--eps", "0.6", "--epochs", "2"]
    args += ["--train-limit", "130", "--batch", "32", "--lr", "0.05", "--lambda3", "1", "--probe", "60"]
    args += ["--probe-steps", "2", "--test-steps", "2", "--test-restarts", "1", "--device", "cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [*launch, "train.py", *args, "--out", str(tmp_path / "two")],
        cwd=HERE,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run_main(monkeypatch, *args, "--out", str(tmp_path / "one"))
    one, two = (lines(tmp_path / k / "seed0" / "metrics.jsonl") for k in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["n_abnormal"] == b["n_abnormal"] and a["train_accuracy"] == pytest.approx(b["train_accuracy"])
        for k in ("loss", "regulariser", "e_a", "v_a", "v_n"):
            assert a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-6)
        assert a["probe_clean"] == b["probe_clean"]
    x, y = (runs.read_tensors(tmp_path / k / "seed0" / "model.safetensors")[0] for k in ("one", "two"))
    for k in x:
        torch.testing.assert_close(x[k], y[k], atol=1e-4, rtol=1e-3)
    assert one[-1]["n_abnormal"] > 0 and one[-1]["regulariser"] > 0  # otherwise nothing of AAER was compared


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradalign", "free", "multigrad"])
def test_every_kind_of_method_runs_on_two_processes(tmp_path, method):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [*launch, "train.py", *TINY, "--method", method, "--replays", "2", "--out", str(tmp_path / "r")],
        cwd=HERE,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert runs.read_record(tmp_path / "r" / "seed0" / "record.json")["metrics"]["epochs"] == 2
