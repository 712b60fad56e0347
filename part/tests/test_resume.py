"""A run that is cut goes on exactly and tells of what is damaged."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

from lab import runs

import pytest
import torch
from test_train import HERE, TINY, lines, run_main

import data
import settings
import train
from trainer import CROPS, Trainer

ARGS = ["--method", "at", "part", "--model", "resnet18-w8", "--checkpoint-steps", "1", "--refresh", "2"]
ARGS += ["--lr-drops", "2", "--skip-mma", "--eval-limit", "10"]  # the last epoch has another rate


def same_runs(a, b, seeds=(0,), arms=("at", "part")):
    for seed in seeds:
        for arm in arms:
            x, y = (runs.read_tensors(p / f"seed{seed}" / f"model-{arm}.safetensors")[0] for p in (a, b))
            assert all(torch.equal(x[k], y[k]) for k in x) and x.keys() == y.keys()
            one, two = (runs.read_json(p / f"seed{seed}" / f"record-{arm}.json")["metrics"] for p in (a, b))
            assert {k: v for k, v in one.items() if "seconds" not in k} == {
                k: v for k, v in two.items() if "seconds" not in k
            }
        one, two = (lines(p / f"seed{seed}" / "metrics.jsonl") for p in (a, b))
        assert one == two


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that was not cut."""
    out = tmp_path_factory.mktemp("whole") / "a"
    with pytest.MonkeyPatch.context() as patch:
        run_main(patch, *TINY, *ARGS, "--seeds", "0", "1", "--out", str(out))
    return out


@pytest.mark.parametrize("at", [1, 3, 5, 8, 10, 13, 16, 20])
def test_resume_is_exact(tmp_path, monkeypatch, whole, at):
    """Cut after the at-th checkpoint: inside or at the end of the warm-up or an arm, of either seed."""
    count, save = [0], Trainer.save

    def cut(self, path, seconds):
        save(self, path, seconds)
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", cut)
    args = [*TINY, *ARGS, "--seeds", "0", "1", "--out", str(tmp_path / "b")]
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, *args)
    kept = tmp_path / "b" / "seed0" / ".data.json"
    own = kept.read_text()
    kept.write_text('["another copy"]')
    with pytest.raises(runs.UserError, match="begun with other data"):
        run_main(monkeypatch, *args)
    kept.write_text(own)
    run_main(monkeypatch, *args)
    same_runs(whole, tmp_path / "b", (0, 1))


def test_crops_go_on_where_they_were_cut(tmp_path):
    """The glyphs are not augmented, so the runs above do not tell."""
    s = runs.parse(settings.Settings, "", TINY)
    s.resolve()
    kind = dataclasses.replace(data.KINDS["glyphs"], pad=2, flip=True)
    sets = dataclasses.replace(data.load("glyphs", tmp_path, train_limit=90), kind=kind)
    one, two = (Trainer(s, torch.device("cpu"), sets) for _ in range(2))
    for t in (one, two):
        t.fresh(0)
        t.begin_epoch(False)
    batches = one.train.epoch(one.key(0), 0, one.crops)
    x, y = next(batches)
    torch.nn.functional.cross_entropy(one.model(x), y).backward()  # a checkpoint behind a step holds its momentum
    one.optimizer.step()
    one.batch = 1
    one.save(tmp_path / "c", 0.0)
    wanted, _ = next(batches)
    two.fresh(0)
    two.load(tmp_path / "c")
    two.begin_epoch(False)
    found, _ = next(two.train.epoch(two.key(0), two.batch, two.crops))
    assert torch.equal(found, wanted)
    fresh = torch.Generator().manual_seed(one.key(CROPS))
    assert not torch.equal(next(two.train.epoch(two.key(0), 1, fresh))[0], wanted)


def test_cut_between_two_arms_and_in_the_evaluation(tmp_path, monkeypatch, whole):
    record = runs.Run.record

    def cut(self, *args, **kwargs):
        if kwargs["suffix"] == "-part" and not (tmp_path / "cut").exists():
            (tmp_path / "cut").touch()
            raise KeyboardInterrupt
        return record(self, *args, **kwargs)

    monkeypatch.setattr(runs.Run, "record", cut)
    args = [*TINY, *ARGS, "--seeds", "0", "1", "--out", str(tmp_path / "b")]
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, *args)
    assert (tmp_path / "b" / "seed0" / "record-at.json").is_file()
    run_main(monkeypatch, *args)
    same_runs(whole, tmp_path / "b", (0, 1))


def test_kill_and_start_again_gives_the_same(tmp_path, monkeypatch):
    """A real process, killed the moment the first checkpoint of an arm is there."""
    args = [*TINY, *ARGS, "--epochs", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "train.py", *args, "--out", str(tmp_path / "b")]
    process = subprocess.Popen(command, cwd=HERE, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    path, end = tmp_path / "b" / "checkpoint" / "seed0-part.safetensors", time.time() + 120
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
    same_runs(tmp_path / "a", tmp_path / "b")


def test_a_lost_curve_is_told(tmp_path, monkeypatch):
    out, save = tmp_path / "r", Trainer.save

    def cut(self, path, seconds):
        save(self, path, seconds)
        if self.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, *TINY, "--out", str(out))
    monkeypatch.setattr(Trainer, "save", save)
    checkpoint = out / "checkpoint" / "seed0-warmup-at.safetensors"
    assert runs.read_tensors(checkpoint)[1]["epoch"] == "1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save", cut_in_arm(save))
        with pytest.raises(KeyboardInterrupt):
            run_main(patch, *TINY, "--out", str(out))
    (out / "seed0" / "metrics.jsonl").unlink()
    with pytest.raises(runs.UserError, match="has 0 of the 1 epochs of warmup-at"):
        run_main(monkeypatch, *TINY, "--out", str(out))


def cut_in_arm(save):
    def cut(self, path, seconds):
        save(self, path, seconds)
        if self.epoch == 2:
            raise KeyboardInterrupt

    return cut


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    out, calls, perturb = tmp_path / "r", [0], train.baselines.perturb

    def poisoned(*args):
        calls[0] += 1
        return perturb(*args) * (torch.nan if calls[0] == 5 else 1.0)  # in the second epoch

    monkeypatch.setattr(train.baselines, "perturb", poisoned)
    with pytest.raises(runs.UserError, match=r"not a finite number in 2 steps before step 6 \(epoch 2\)"):
        run_main(monkeypatch, *TINY, "--out", str(out))
    tensors, meta = runs.read_tensors(out / "checkpoint" / "seed0-warmup-at.safetensors")
    assert meta["epoch"] == "1" and all(v.isfinite().all() for k, v in tensors.items() if k.startswith("model."))
    assert not (out / "seed0" / "record-at.json").exists()
