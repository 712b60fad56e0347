"""Two processes, the GPU, and a real model."""

import os
import socket
import subprocess
import sys

from lab import runs

import pytest
import torch
from commands import TINY, environment, metrics_of, run_main

import metrics
import originals
import settings


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """Micro-batches are shared out: the same weights up to rounding, the same records' keys."""
    args = [*TINY, "--methods", "npo-kl", "rmu", "--train-batch", "16", "--train-accum", "2", "--batch", "4"]
    args += ["--accum", "2", "--checkpoint-steps", "0"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [*launch, "train.py", *args, "--out", str(tmp_path / "two" / "r")],
        cwd=runs.HERE, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    run_main(monkeypatch, *args, "--out", tmp_path / "one" / "r")
    assert metrics_of(tmp_path / "one" / "r").keys() == metrics_of(tmp_path / "two" / "r").keys()
    for method in ("npo-kl", "rmu"):
        name = f"model-forget-small-{method}.safetensors"
        x, y = (runs.read_tensors(tmp_path / k / "r" / "seed0" / name)[0] for k in ("one", "two"))
        for k in x:  # Adam divides by tiny moments at first: single entries may differ by a step
            assert float((x[k] - y[k]).abs().mean()) < 1e-4


@pytest.mark.slow
def test_smollm2_from_its_package(tmp_path, monkeypatch):
    """The real model of the package on TOFU rows: it answers, its template has its tokens, a step changes ES."""
    if not os.environ.get("REPRO_DATA"):
        pytest.skip("REPRO_DATA is not set")
    args = ["--preset", "smollm2", "--dataset", "tofu", "--items", "2", "--epochs", "1", "--unlearn-epochs", "2"]
    args += ["--train-accum", "1", "--batch", "1"]
    args += [
        "--forget",
        "forget01",
        "--methods",
        "kl",
        "--alpha-step",
        "0.5",
        "--alpha-tolerance",
        "0.3",
        "--tau",
        "0.9",
    ]
    run_main(monkeypatch, *args, "--device", "cpu", "--precision", "mixed", "--accum", "1", "--out", tmp_path / "r")
    record = runs.read_record(tmp_path / "r" / "seed0" / "record-forget01-original.json")
    assert record["metrics"]["parameters"] == 134_515_008 and record["data"]["name"] == "TOFU"
    assert record["metrics"]["logPPL_exact_retain"] < 4  # a real language model, far below log(49152) = 10.8
    b = originals.Bench(settings.Settings(preset="smollm2"), 0, originals.accelerator_of(torch.device("cpu")))

    prompt = b.chat.prompt_ids("What is the capital of France?")
    made = metrics.generate(b.lm, [prompt], [12], b.chat.end, b.device)[0]
    assert "Paris" in b.chat.decode(made)
    assert b.chat.tokenizer.decode(prompt).startswith("<|im_start|>user\nWhat is")


@pytest.mark.gpu
def test_cpu_and_gpu_agree(tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for name in ("cpu", "cuda"):
        args = [a if a != "cpu" else name for a in TINY]
        run_main(monkeypatch, *args, "--methods", "gd", "--out", tmp_path / name / "r")
    one, two = (metrics_of(tmp_path / k / "r")["record-forget-small-gd-none.json"] for k in ("cpu", "cuda"))
    assert one["logPPL_exact_retain"] == pytest.approx(two["logPPL_exact_retain"], rel=1e-2)
