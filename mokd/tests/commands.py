"""What the tests of the commands share: small settings, a call, what must be the same of two runs."""

import json
import os
import subprocess
import sys

from lab import runs

import numpy as np

TINY = [
    *("--size", "28", "--limit", "6", "--steps", "6", "--pictures", "8", "--validate", "2", "--validate-every", "3"),
    *("--checkpoint-every", "2", "--tasks", "3", "--max-support", "50", "--workers", "0", "--domains", "digits"),
]
RANDOM = ["--backbone", "random5x5", "--size", "28", "--domains", "digits", "--max-support", "60", "--workers", "0"]
IMAGES = ["--backbone", "lite0", "--size", "32", "--workers", "0", "--tasks", "3", "--ways", "3", "--shots", "2"]


def call(module, monkeypatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    module.main()


def start(*words: object, port: int = 0) -> subprocess.CompletedProcess:
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    command = [sys.executable, *(launch if port else []), *map(str, words)]
    done = subprocess.run(command, cwd=runs.HERE, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def records(out) -> list[tuple]:
    """What must be the same: seconds are not."""
    found = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return [
        (r["seed"], r["dataset"], r["method"], {k: v for k, v in r["metrics"].items() if k != "seconds_per_task"})
        for r in found
    ]


def weights(out) -> dict:
    return runs.read_tensors(out / "seed0" / "model.safetensors")[0]


def folder(place, classes: int = 3, each: int = 4):
    """Pictures of one colour a class."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for c in range(classes):
        (place / f"class{c}").mkdir(parents=True)
        for i in range(each):
            x = rng.integers(0, 60, (30, 40, 3), dtype=np.uint8)
            x[..., c % 3] += 150
            Image.fromarray(x).save(place / f"class{c}" / f"{i}.png")
    return place
