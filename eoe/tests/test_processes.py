"""Two processes of `accelerate launch` give what one gives: seeds shared out in training, images in evaluation."""

import json
import subprocess
import sys
from pathlib import Path

from lab import runs

import pytest
import torch
from test_cli import TINY, imagenet, options  # noqa: F401 (a fixture)

LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"]


def start(*words: str, port: int = 0, cache: Path) -> None:
    launch = [*LAUNCH, str(port)] if port else []
    env = {**runs.os.environ, "EOE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch, *words], cwd=runs.HERE, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def records(out: Path) -> list[tuple]:
    found = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return [(r["seed"], r["dataset"], r["method"], r["setting"], r["metrics"]) for r in found]


def test_seeds_are_shared_out(tmp_path):
    words = ["train.py", *options(**TINY, device="cpu"), "--seeds", "0", "1", "2", "--out"]
    start(*words, str(tmp_path / "two"), port=29531, cache=tmp_path)
    start(*words, str(tmp_path / "one"), cache=tmp_path)
    assert records(tmp_path / "two") == records(tmp_path / "one")
    assert {seed for seed, *_ in records(tmp_path / "two")} == {0, 1, 2}


def test_images_are_shared_out(imagenet, tmp_path):  # noqa: F811
    words = ["eval.py", *options(table="table3", data_dir=imagenet, workers=0, batch=3, scale="paper", device="cpu")]
    for name, port in (("one", 0), ("two", 29532)):
        start(*words, "--out", str(tmp_path / name), port=port, cache=tmp_path / f"cache-{name}")
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
