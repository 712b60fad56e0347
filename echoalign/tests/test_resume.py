"""A run that is cut goes on exactly: every method, a killed process in each stage."""

import signal
import subprocess
import sys
import time

from lab import runs

import pytest
import torch
from conftest import HERE, TINY, environment, same_runs, settings, start

import readers
import trainer
from settings import METHODS

CHECKED = ["echoalign", "t-revision", "ptd", "jocor", "elr", "dividemix", "promix"]
MORE = ["--rate", "0.4", "--train-limit", "120", "--batch", "32", "--transition.parts-steps", "20"]
MORE += ["--transition.parts", "3", "--divide.warmup", "1", "--divide.batch", "16"]
MORE += ["--promix.warmup", "1", "--promix.batch", "16"]


@pytest.mark.parametrize("method", CHECKED)
def test_resume_is_exact(tmp_path, monkeypatch, cache, method):
    """Cut after every single checkpoint in turn."""
    args = [*TINY, *MORE, "--methods", method, "--cache", cache]
    start(monkeypatch, *args, "--out", tmp_path / "a")
    write = runs.write_tensors
    for _ in range(20):
        cut = [False]

        def once(path, tensors, meta=None, cut=cut):
            write(path, tensors, meta)
            if "checkpoint" in str(path) and meta and "phase" in meta and not cut[0]:
                cut[0] = True
                raise KeyboardInterrupt

        monkeypatch.setattr(trainer.runs, "write_tensors", once)
        try:
            start(monkeypatch, *args, "--out", tmp_path / "b")
            break
        except KeyboardInterrupt:
            continue
    monkeypatch.setattr(trainer.runs, "write_tensors", write)
    (tmp_path / "b" / "records.jsonl").rename(tmp_path / "b" / "left.jsonl")
    kept = tmp_path / "b" / "seed0" / ".data.json"
    own = kept.read_text()
    kept.write_text('["another copy"]')
    with pytest.raises(runs.UserError, match="begun with other data"):
        start(monkeypatch, *args, "--out", tmp_path / "b")
    kept.write_text(own)
    (tmp_path / "b" / "left.jsonl").rename(tmp_path / "b" / "records.jsonl")
    assert (tmp_path / "b" / "records.jsonl").is_file()
    same_runs(tmp_path / "a", tmp_path / "b")


def killed(args, wanted, tries=1):
    """Start a process, kill it the moment `wanted()` is true."""
    command = [sys.executable, "train.py", *map(str, args)]
    process = subprocess.Popen(
        command, cwd=HERE, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    end = time.time() + 120
    while not wanted() and process.poll() is None and time.time() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert wanted()


LONG = [*TINY, "--train-limit", "200", "--epochs", "25", "--methods", "echoalign", "--generator", "concat"]
LONG += ["--net.steps", "45", "--net.checkpoint", "3", "--edit.steps", "6", "--edit.shard", "8"]
LONG += ["--edit.batch", "8", "--net.widths", "8", "16"]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """The run that was not cut."""
    folder = tmp_path_factory.mktemp("uncut")
    with pytest.MonkeyPatch.context() as patch:
        start(patch, *LONG, "--out", folder / "a", "--cache", folder / "c")
    return folder


@pytest.mark.parametrize("stage", ["generator", "modify", "classifier"])
def test_kill_and_start_again_gives_the_same(tmp_path, monkeypatch, uncut, stage):
    """A real process, killed in the middle of each stage."""
    args = LONG
    b, found = tmp_path / "b", tmp_path / "cb"
    wanted = {
        "generator": lambda: any(found.glob("generators/*/*.checkpoint")),
        "modify": lambda: len(list(found.glob("modified/*/shard*"))) > 3,
        "classifier": lambda: any(b.glob("seed0/checkpoint/*.safetensors")),
    }
    killed([*args, "--out", b, "--cache", found], wanted[stage])
    assert not (b / "records.jsonl").exists()
    if stage == "modify":
        assert len(list(found.glob("modified/*/shard*"))) < 25
    start(monkeypatch, *args, "--out", b, "--cache", found)
    same_runs(uncut / "a", b)
    assert not list(found.rglob(".*.tmp"))
    names = [sorted(p.name for p in c.glob("modified/*/*")) for c in (uncut / "c", found)]
    assert names[0] == names[1]


def test_more_methods_join_a_finished_run(tmp_path, monkeypatch, cache):
    args = [*TINY, *MORE, "--cache", cache, "--out", tmp_path / "r"]
    start(monkeypatch, *args, "--methods", "ce")
    stamp = (tmp_path / "r" / "seed0" / "record-ce.json").stat().st_mtime_ns
    start(monkeypatch, *args, "--methods", "ce", "ce-clean")
    assert (tmp_path / "r" / "seed0" / "record-ce.json").stat().st_mtime_ns == stamp
    lines = (tmp_path / "r" / "records.jsonl").read_text().splitlines()
    assert len(lines) == 2


def test_random_streams_are_separate():
    seeds = {trainer.stream_seed(s, k, e) for s in range(4) for k in trainer.STREAMS for e in range(600)}
    assert len(seeds) == 4 * len(trainer.STREAMS) * 600


def test_order_and_crops_come_from_their_own_streams():
    s = settings()
    d = trainer.Task(
        torch.randint(0, 256, (30, 8, 8, 1), dtype=torch.uint8), torch.arange(30) % 10, None, readers.KINDS["digits"]
    )
    learner = trainer.Learner(s, d, 0, torch.device("cpu"))
    seen, crops = [], []
    learner.augment = lambda x, g: (crops.append(g.initial_seed()), trainer.to_input(x))[1]
    for epoch in (0, 1):
        seen.append(torch.cat([i for i, _ in learner.batches(epoch)]).tolist())
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(30)) and seen[0] != seen[1]
    want = torch.Generator().manual_seed(trainer.stream_seed(0, "order", 1))
    assert seen[1] == torch.randperm(30, generator=want).tolist()
    assert set(crops) == {trainer.stream_seed(0, "crop", e) for e in (0, 1)}


def test_every_method_has_a_row_and_settings_are_stored(tmp_path):
    assert len({name for name, _ in METHODS.values()}) == len(METHODS)
    s = settings()
    assert (s.val_fraction, s.model, s.epochs, s.milestones) == (0.0, "cnn", 3, (1, 2))
