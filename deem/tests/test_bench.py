"""bench.py: the plain implementation computes the same, with twice the calls."""

import json

import pytest
import torch
from conftest import batch_of, documents, make, run

import bench


@pytest.mark.parametrize("preset", ["digits", "tiny"])
def test_plain_gives_the_same_losses_and_gradients(preset):
    model, _ = make(preset)
    model.freeze(1, "deem")
    b = batch_of(model, documents(8))
    model.eval()
    ours, theirs = model.losses(b, 3), bench.plain(model, b, 3)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in ours)
    assert bench.same(model, b) < 1e-4


def test_bench_writes_a_record(tmp_path):
    done = run("bench.py", "--smoke", "--batch", "3", "--out", tmp_path / "b", "--device", "cpu")
    assert done.returncode == 0 and "times one without" in done.stdout, done.stderr
    m = json.loads((tmp_path / "b" / "seed0" / "record.json").read_text())["metrics"]
    assert m["step_ratio"] > 0 and m["plain_ratio"] > 0 and m["gradient_gap"] < 1e-3


@pytest.mark.parametrize("preset", ["digits", "tiny"])
def test_plain_runs_twice_what_ours_runs_once(preset, monkeypatch):
    """Encoder, U-Net and encoding of the targets; the frozen U-Net collects no gradient in either."""
    model, _ = make(preset)
    model.freeze(1, "deem")
    b = batch_of(model, documents(8))
    model.eval()
    count = dict.fromkeys(("encoder", "unet", "latents"), 0)

    def told(name):
        return lambda *_: count.update({name: count[name] + 1})

    model.encoder.register_forward_pre_hook(told("encoder"))
    model.denoiser.unet.register_forward_pre_hook(told("unet"))
    encode = model.denoiser.latents.encode
    monkeypatch.setattr(model.denoiser.latents, "encode", lambda *a: (told("latents")(), encode(*a))[1])
    for function, times in ((model.losses, 1), (lambda x, seed: bench.plain(model, x, seed), 2)):
        count.update(dict.fromkeys(count, 0))
        bench.step(model, b, 0, function)
        assert set(count.values()) == {times}
        assert all(p.grad is None for p in model.denoiser.unet.parameters())
