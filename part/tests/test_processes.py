"""Several processes share the batches of one run out and train as one."""

import os
import socket
import subprocess
import sys

from lab import runs

import pytest
import torch
from test_train import HERE, TINY, lines, run_main

import data


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launch(*args, script="train.py", processes=2):
    """The command line of a launch of several processes, run to its end."""
    head = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*head, "--master_port", free_port(), script, *map(str, args)],
        cwd=HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("total", [1, 7, 25])
def test_the_parts_make_the_batch(total):
    for world in (1, 2, 3):
        rows = [i for k in range(world) for i in range(total)[data.share(total, k, world)]]
        assert rows == list(range(total))


# The controls among them: a mask of another process's image, a budget that is the mean of all processes.
METHODS = ["at", "part", "part-shuffled", "at-mean", "part-m-inverted", "part-t"]


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """The same images, crops, noise and masks; a network without batch statistics, batches that part unevenly."""
    args = [
        *TINY,
        "--batch",
        "31",
        "--epochs",
        "2",
        "--method",
        *METHODS,
        "--awp",
        "--awp-warmup",
        "1",
        "--eps-low",
        "1/255",
    ]
    args += ["--autoattack", "apgd-ce", "--eval-limit", "21", "--test-batch", "9", "--probe", "5", "--gallery", "1"]
    done = launch(*args, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("accuracy in per cent") == 1  # the first process speaks
    run_main(monkeypatch, *args, "--out", str(tmp_path / "one"))
    one, two = (lines(tmp_path / k / "seed0" / "metrics.jsonl") for k in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert (a["phase"], a["epoch"]) == (b["phase"], b["epoch"])
        if "-t" not in a["phase"]:
            for k in ("loss", "budget", "train_accuracy", "probe_natural", "probe_pgd"):
                assert a[k] == pytest.approx(b[k], rel=1e-4), (a["phase"], k)
        else:  # the gradient at its start is almost zero: its signs follow the rounding of the sums
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)
    for m in METHODS[:-1]:
        x, y = (runs.read_tensors(tmp_path / k / "seed0" / f"model-{m}.safetensors")[0] for k in ("one", "two"))
        for k in x:
            torch.testing.assert_close(x[k], y[k], atol=1e-4, rtol=1e-3)
        x, y = (runs.read_tensors(tmp_path / k / "seed0" / f"images-{m}.safetensors")[0] for k in ("one", "two"))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in ("index", "natural", "pgd", "mma"))
    a, b = (runs.read_record(tmp_path / k / "seed0" / "record-part.json")["metrics"] for k in ("one", "two"))
    assert a["mask_inside"] == pytest.approx(b["mask_inside"], abs=2)
    again = launch(*args, "--out", tmp_path / "two")
    assert again.returncode == 0 and again.stdout.count("is complete") == 1
    script = tmp_path / "show.py"  # torchrun takes --run for an option of its own
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import eval\nfrom lab import runs\n"
        f"sys.argv += ['--run', {str(tmp_path / 'two')!r}]\nruns.command(eval.main)\n"
    )
    shown = launch("--arm", "part", "--device", "cpu", "--batch", "9", script=script)
    assert shown.returncode == 0 and shown.stdout.count("accuracy in per cent") == 1, shown.stderr[-2000:]
    assert f"{b['natural']:6.2f}" in shown.stdout


@pytest.mark.slow
def test_a_run_of_two_processes_is_taken_up_by_one_and_by_two(tmp_path, monkeypatch):
    """Cut in the middle of an epoch (by a loss that is no number), then gone on with."""
    args = [*TINY, "--model", "resnet18-w8", "--checkpoint-steps", "1", "--method", "at", "part"]
    whole = launch(*args, "--out", tmp_path / "a")
    assert whole.returncode == 0, whole.stderr[-2000:]
    script = tmp_path / "cut.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import os, train\nfrom lab import runs\nfrom trainer import Trainer\nsave, count = Trainer.save, [0]\n"
        "def cut(self, path, seconds):\n    save(self, path, seconds); count[0] += 1\n"
        "    if count[0] == 5: os._exit(9)\nTrainer.save = cut\nruns.command(train.main)\n"
    )
    for name in ("b", "c"):
        assert launch(*args, "--out", tmp_path / name, script=script).returncode
        (tmp_path / name / "checkpoint" / "seed0-at.safetensors").stat()
    assert launch(*args, "--out", tmp_path / "b").returncode == 0
    run_main(monkeypatch, *args, "--out", str(tmp_path / "c"))
    a, b, c = (runs.read_tensors(tmp_path / k / "seed0" / "model-at.safetensors")[0] for k in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert lines(tmp_path / "a" / "seed0" / "metrics.jsonl") == lines(tmp_path / "b" / "seed0" / "metrics.jsonl")
    assert all(v.isfinite().all() for v in c.values())


def test_batches_too_small_for_the_processes_are_told(tmp_path):
    done = launch(*TINY, "--batch", "89", "--out", tmp_path / "r")  # 90 images: a last batch of one
    assert done.returncode and "the last batch has 1 images for 2 processes; choose another --batch" in done.stderr
