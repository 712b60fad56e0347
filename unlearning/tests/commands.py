"""Commands of the folder run in this process, and what is compared of two runs; shared by the tests."""

import gc
import os
import sys

from lab import runs

import pytest
import torch

import train

TINY = ["--device", "cpu", "--epochs", "1", "--unlearn-epochs", "2", "--forget", "forget-small", "--eval-items", "3"]
TINY += ["--alpha-step", "0.5", "--alpha-tolerance", "0.2", "--tau", "0.9"]
LEARNED = ["5" if TINY[k - 1] == "--epochs" else a for k, a in enumerate(TINY)]
LEARNED += ["--lr", "4e-3", "--train-batch", "12", "--unlearn-lr", "5e-4"]  # ES falls when unlearning
DONE = [*LEARNED, "--methods", "ga", "npo-kl", "gd", "--attacks", "relearning", "token noising", "embedding probing"]
DONE += ["--utility", "--retrained", "--interpolate", "--both-searches"]


def run_main(monkeypatch, *args, main=train.main):
    gc.collect()  # a traceback kept by pytest may hold the run of a call before, and with it the lock of its folder
    monkeypatch.setattr(sys, "argv", ["x", *map(str, args)])
    main()


def told(capsys, monkeypatch, args, main=train.main):
    """The one line a command ends with."""
    gc.collect()
    monkeypatch.setattr(sys, "argv", ["x", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        runs.command(main)
    text = capsys.readouterr().err.split("\r")[-1]
    assert stop.value.code == 2 and "Traceback" not in text
    lines = [x for x in text.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def metrics_of(out, seed=0):
    """Metrics of every record of a seed without the times."""
    found = {}
    for path in sorted((out / f"seed{seed}").glob("record*.json")):
        m = runs.read_record(path)["metrics"]
        found[path.name] = {k: v for k, v in m.items() if "seconds" not in k}
    return found


def same_runs(a, b, seed=0):
    assert metrics_of(a, seed) == metrics_of(b, seed) and metrics_of(a, seed)
    for path in sorted((a / f"seed{seed}").glob("model-*.safetensors")):
        x, y = (runs.read_tensors(p / f"seed{seed}" / path.name)[0] for p in (a, b))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    lines = [(p / f"seed{seed}" / "metrics.jsonl").read_text() for p in (a, b)]
    assert lines[0] == lines[1]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
