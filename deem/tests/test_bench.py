"""bench.py and diva.py: the plain implementation computes the same; the peer learns by diffusion alone."""

import json

from lab.runs import UserError

import pytest
import torch
from conftest import batch_of, documents, make, run

import bench
import diva


@pytest.mark.parametrize("preset", ["digits", "tiny"])
def test_plain_gives_the_same_losses_and_gradients(preset):
    model, _ = make(preset)
    model.freeze(1, "deem")
    b = batch_of(model, documents(5))
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


def tower():
    s = diva.DivaSettings(preset="tiny")
    return diva.build(s, 0, torch.device("cpu"))[0]


def test_diva_trains_tower_and_map_alone():
    m = tower()
    x = torch.rand(2, 3, 56, 56)
    m(x, torch.rand(2, 3, 64, 64), 0).backward()
    g = {k for k, p in m.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "linear.weight" in g and any(k.startswith("visual.") for k in g)
    assert not any(k.startswith(("unet.", "latents.")) for k in g)


def test_diva_condition():
    """The class token first, then drawn patches, over the empty prompt."""
    m = tower().eval()
    m.empty.normal_()
    x = torch.rand(2, 3, 56, 56)
    c = m.condition(x, torch.Generator().manual_seed(0))
    tokens = m.linear(diva.tower_tokens(m.visual, (x - m.mean) / m.std))
    c = c - m.empty  # the empty prompt's own place by place
    assert c.shape == (2, 8, 32) and torch.allclose(c[:, 0], tokens[:, 0], atol=1e-5)
    near = (c[0, 1:, None] - tokens[0, 1:]).norm(dim=-1).min(1).values
    assert near.max() < 1e-4
    assert not torch.allclose(c, m.condition(x, torch.Generator().manual_seed(1)) - m.empty, atol=1e-4)


def test_diva_tower_is_open_clips():
    m = tower().eval()
    x = torch.rand(2, 3, 56, 56)
    assert torch.allclose(diva.tower_tokens(m.visual, x)[:, 0], m.visual(x), atol=1e-5)


def test_diva_resumes(tmp_path):
    words = ["diva.py", "--preset", "tiny", "--steps", "6", "--inner", "2", "--device", "cpu"]
    a = run(*words, "--out", tmp_path / "a")
    assert a.returncode == 0, a.stderr
    with pytest.raises(UserError, match="plain ViT"):
        diva.Diva(torch.nn.Linear(1, 1), *[None] * 3, torch.zeros(1, 8, 32))
    bad = run("diva.py", "--preset", "tiny", "--steps", "0")
    assert bad.returncode == 2 and "--steps" in bad.stderr


@pytest.mark.parametrize("preset", ["digits", "tiny"])
def test_plain_runs_twice_what_ours_runs_once(preset, monkeypatch):
    """Encoder, U-Net and encoding of the targets; the frozen U-Net collects no gradient in either."""
    model, _ = make(preset)
    model.freeze(1, "deem")
    b = batch_of(model, documents(5))
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
