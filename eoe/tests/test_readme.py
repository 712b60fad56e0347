"""The README's snippet runs as it stands, and is short; its commands name options that exist."""

import dataclasses
import re
import shlex

from lab import runs

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import envision
from settings import EvalSettings, Settings

TEXT = (runs.HERE / "README.md").read_text(encoding="utf-8")
OPTIONS = {"eval.py": EvalSettings, "train.py": Settings, "envision.py": envision.EnvisionSettings}


class Tiny(torch.nn.Module):
    """Stands in for the weights: what open_clip's models offer, tiny and random."""

    def encode_image(self, x):
        return x.flatten(1)[:, :8] + 1

    def encode_text(self, ids):
        return torch.nn.functional.one_hot(ids.sum(1) % 8, 8).float()


def test_the_snippet_runs_as_it_stands(monkeypatch, tmp_path):
    snippet = TEXT.split("## In your own code")[1].split("```python\n")[1].split("```")[0]
    assert len(snippet.strip().splitlines()) <= 15
    transform = lambda image: torch.from_numpy(np.asarray(image.resize((4, 4)), np.float32)).flatten()  # noqa: E731
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *a, **k: (Tiny(), None, transform))
    for name in ("one.png", "two.png"):
        Image.new("RGB", (9, 9), (200, len(name), 30)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    made: dict = {}
    exec(snippet, made)
    assert made["score"].shape == (2,) and made["score"].dtype == torch.float64


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    lines = [line for b in blocks for line in b.splitlines() if line.strip() and not line.startswith("#")]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_of_the_readme_have_options_that_exist(words):
    script = next((w for w in words if w in OPTIONS), None)
    known = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(OPTIONS[script])} if script else set()
    known |= {"--base-url"} if "--url" in known else set()  # its other name
    after = words[words.index(script) :] if script else []
    assert {w for w in after if w.startswith("--")} <= known
