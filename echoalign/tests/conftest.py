"""What several test files need: tiny settings, a run of train.py in this process, the line an error ends with."""

import gc
import json
import os
import sys
from pathlib import Path

from lab import runs

import pytest
import torch

import train
from settings import parse

HERE = Path(train.__file__).parent
TINY = ["--dataset", "digits", "--epochs", "3", "--finetune", "2", "--small-loss-epochs", "2", "--eval-last", "1"]
TINY += ["--device", "cpu", "--eval-every", "2"]
torch.set_num_threads(1)  # sums are compared bit by bit with those of other processes


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def toy(n=24, size=8, channels=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, size, size, channels), generator=g, dtype=torch.uint8)
    return x, torch.arange(n) % 3


def start(monkeypatch, *args, main=train.main):
    gc.collect()  # a traceback may still hold the run before, and with it the lock of its folder
    monkeypatch.setattr(sys, "argv", ["x", *map(str, args)])
    main()


def settings(*args):
    s = parse("", [*TINY, *map(str, args)])
    s.check_values()
    s.resolve()
    return s


def told(capsys, monkeypatch, main, args):
    """The one line a command ends with."""
    gc.collect()
    monkeypatch.setattr(sys, "argv", ["x", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        runs.command(main)
    text = capsys.readouterr().err.replace("\r", "\n")
    assert stop.value.code == 2 and "Traceback" not in text
    line = [x for x in text.splitlines() if x.startswith("error: ")]
    assert len(line) == 1
    return line[0]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def records(folder):
    """{file: metrics} of a run, without what only tells of time."""
    out = {}
    for path in sorted(Path(folder).glob("seed*/record*.json")):
        m = json.loads(path.read_text())["metrics"]
        out[str(path.relative_to(folder))] = {k: v for k, v in m.items() if "seconds" not in k}
    assert out
    return out


def same_runs(a, b, seeds=(0,)):
    """Bitwise the same metrics, curves and weights."""
    assert records(a) == records(b)
    for k in seeds:
        for path in Path(a, f"seed{k}").glob("model-*.safetensors"):
            one, two = (runs.read_tensors(Path(f, f"seed{k}", path.name))[0] for f in (a, b))
            assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
        lines = [Path(f, f"seed{k}", "metrics.jsonl").read_text() for f in (a, b)]
        assert lines[0] == lines[1]
