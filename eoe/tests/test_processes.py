"""Two processes of `accelerate launch` give what one gives: seeds shared out in training, images in evaluation."""

import json
import socket
import subprocess
import sys
from pathlib import Path

from lab import runs

import pytest
import torch
from test_cli import TINY, call, imagenet, one_thread, options  # noqa: F401 (fixtures)

import eval as evaluate
import train

LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"]


def start(*words: str, cache: Path) -> None:
    """A command in two processes, on a port that is free."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        launch = [*LAUNCH, str(s.getsockname()[1])]
    env = {**runs.os.environ, "EOE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch, *words], cwd=runs.HERE, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def records(out: Path) -> list[tuple]:
    found = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return [(r["seed"], r["dataset"], r["method"], r["setting"], r["metrics"]) for r in found]


def test_seeds_are_shared_out(monkeypatch, tmp_path):
    words = [*options(**TINY, device="cpu"), "--seeds", "0", "1", "2", "--out"]
    start("train.py", *words, str(tmp_path / "two"), cache=tmp_path)
    call(train, monkeypatch, *words, str(tmp_path / "one"))
    assert records(tmp_path / "two") == records(tmp_path / "one")
    assert {seed for seed, *_ in records(tmp_path / "two")} == {0, 1, 2}


def test_images_are_shared_out(imagenet, monkeypatch, tmp_path):  # noqa: F811
    words = options(table="table3", data_dir=imagenet, workers=0, batch=3, scale="paper", device="cpu")
    start("eval.py", *words, "--out", str(tmp_path / "two"), cache=tmp_path / "cache-two")
    monkeypatch.setenv("EOE_CACHE", str(tmp_path / "cache-one"))
    call(evaluate, monkeypatch, *words, "--out", str(tmp_path / "one"))
    assert records(tmp_path / "two") == records(tmp_path / "one")
    files = [sorted((tmp_path / f"cache-{name}").iterdir()) for name in ("one", "two")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]  # no pieces left
    for a, b in zip(*files, strict=True):
        one, two = (runs.read_tensors(f)[0]["features"] for f in (a, b))
        assert torch.equal(one, two)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_every_batch_is_encoded_once(n):
    """The batches of three processes together are those of one."""
    import backbones

    class Double:
        known, device, name = None, torch.device("cpu"), "double"

        def transform(self):
            return lambda x: x

        def encode_images(self, x):
            return 2 * x

    class Numbers(list):
        name = "numbers"

    images = Numbers(torch.tensor([float(i)]) for i in range(n))
    parts = [backbones._encode(Double(), images, 2, 0, rank, 3) for rank in range(3)]
    assert sum(map(len, parts)) == -(-n // 2)
    whole = {k: v for part in parts for k, v in part.items()}
    assert torch.cat([whole[i] for i in sorted(whole)]).flatten().tolist() == [2.0 * i for i in range(n)]
