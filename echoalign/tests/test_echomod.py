"""Editing: the sampler, the exact denoiser, the trained generators and their training."""

import ast
import sys

from lab import runs
from lab.runs import UserError

import numpy as np
import pytest
import torch
from conftest import HERE, TINY, records, same_runs, start, toy
from torch import nn

import echomod
from generator import nets as generators

CPU = torch.device("cpu")


def net(kind="concat", size=8, channels=1):
    torch.manual_seed(1)
    out = generators.NETS[kind](size, channels, 3, (8, 16), 1)
    for p in out.parameters():  # the control's last layers start at zero
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return out


def generator(kind, strength=0.5, **more):
    if kind == "exact":
        x, y = toy(60, seed=5)
        return echomod.ExactDenoiser(x, y, strength, 5, more.get("sampler", "ddim"))
    return generators.Trained(net(kind), {"generator": kind}, 3, CPU, strength=strength, steps=2, **more)


KINDS = ["exact", "concat", "controlnet"]


@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_returns_the_instance(kind):
    x, y = toy()
    out = generator(kind, 0.0).edit(x, y, list(range(len(x))))
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_depends_on_label_seed_and_image_and_not_on_the_batch(kind):
    g, (x, y) = generator(kind), toy()
    seeds = [echomod.image_seed(0, i) for i in range(len(x))]
    out = g.edit(x, y, seeds)
    assert out.dtype == torch.uint8 and out.shape == x.shape and not torch.equal(out, x)
    single = torch.cat([g.edit(x[i : i + 1], y[i : i + 1], seeds[i : i + 1]) for i in range(6)])
    assert (single.int() - out[:6].int()).abs().max() <= 1  # rounding of another batch size
    assert torch.equal(g.edit(x, y, seeds), out)
    assert not torch.equal(g.edit(x, (y + 1) % 3, seeds), out)
    assert not torch.equal(g.edit(x, y, [s + 1 for s in seeds]), out)


def test_exact_denoiser_against_loops():
    x, y = toy(6)
    bank, labels = toy(12, seed=5)
    g = echomod.ExactDenoiser(bank, labels, 0.3, 4)
    out = g.edit(x, y, list(range(6)))
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    ts = sorted({round(t) for t in np.linspace(0, 299, 4)}, reverse=True)
    for i in range(6):
        b = bank[labels == y[i]].numpy().reshape(-1, 64) / 127.5 - 1
        v = x[i].numpy().ravel() / 127.5 - 1
        n = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(i)).numpy().ravel()
        v = np.sqrt(a[ts[0]]) * v + np.sqrt(1 - a[ts[0]]) * n
        for k, t in enumerate(ts):
            far = -((v - np.sqrt(a[t]) * b) ** 2).sum(1) / (2 * (1 - a[t]))
            w = np.exp(far - far.max())
            clean = (w / w.sum()) @ b
            eps = (v - np.sqrt(a[t]) * clean) / np.sqrt(1 - a[t])
            nxt = a[ts[k + 1]] if k + 1 < len(ts) else 1.0
            v = np.sqrt(nxt) * clean + np.sqrt(1 - nxt) * eps
        expected = np.rint((np.clip(v, -1, 1) + 1) * 127.5)
        assert np.abs(out[i].numpy().ravel() - expected).max() <= 1


def test_one_step_of_the_exact_denoiser_is_the_weighted_mean_of_its_class():
    """A bank of like images at a high noise level: every weight counts."""
    x, y = toy(6)
    base, labels = toy(12, seed=5)
    bank = (base[:1].float() * 0.5 + 0.02 * base.float() + 40).to(torch.uint8)
    out = echomod.ExactDenoiser(bank, labels, 0.6, 1).edit(x, y, list(range(6)))
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[599]
    soft = 0
    for i in range(6):
        b = bank[labels == y[i]].numpy().reshape(-1, 64) / 127.5 - 1
        n = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(i)).numpy().ravel()
        v = np.sqrt(a) * (x[i].numpy().ravel() / 127.5 - 1) + np.sqrt(1 - a) * n
        w = np.exp(-((v - np.sqrt(a) * b) ** 2).sum(1) / (2 * (1 - a)))
        w /= w.sum()
        soft += 0.05 < w.min()
        expected = np.rint((w @ b + 1) * 127.5)
        assert np.abs(out[i].numpy().ravel() - expected).max() <= 1
    assert soft >= 3  # else the nearest image alone would do
    # The denoiser itself, at values where halving or doubling the variance tells.
    bank = torch.stack([torch.zeros(8, 8, 1), torch.full((8, 8, 1), 255.0)]).to(torch.uint8)
    g = echomod.ExactDenoiser(bank, torch.zeros(2).long(), 0.95, 1)
    images = torch.full((40, 8, 8, 1), 128, dtype=torch.uint8)
    found = g.edit(images, torch.zeros(40).long(), list(range(40))).float().mean((1, 2, 3))
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[949]
    for i in range(40):
        n = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(i)).double().numpy()
        v = np.sqrt(a) * (128 / 127.5 - 1) + np.sqrt(1 - a) * n
        w = 1 / (1 + np.exp(-2 * np.sqrt(a) * v.sum() / (1 - a)))
        assert abs(float(found[i]) - 255 * w) <= 1


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_against_loops(clip):
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 1, 4, 4, generator=g) for _ in range(2))
    seen = []

    def predict(x, t, done):
        seen.append((t, done))
        return 0.3 * x + t / 1000 - 0.1

    out = echomod.sdedit(predict, x0, noise, 0.5, 4, clip=clip)
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    ts = [499, 333, 166, 0]
    assert seen == [(t, k / 4) for k, t in enumerate(ts)]
    v = np.sqrt(a[499]) * x0.double().numpy() + np.sqrt(1 - a[499]) * noise.double().numpy()
    for k, t in enumerate(ts):
        e = 0.3 * v + t / 1000 - 0.1
        clean = (v - np.sqrt(1 - a[t]) * e) / np.sqrt(a[t])
        if clip:
            clean = np.clip(clean, -1, 1)
            e = (v - np.sqrt(a[t]) * clean) / np.sqrt(1 - a[t])
        nxt = a[ts[k + 1]] if k < 3 else 1.0
        v = np.sqrt(nxt) * clean + np.sqrt(1 - nxt) * e
    assert np.abs(out.numpy() - v).max() < 1e-4
    one = echomod.sdedit(lambda x, t, done: x / 2, x0, noise, 0.5, 1, clip=clip)  # one step begins at the top
    v = np.sqrt(a[499]) * x0.double().numpy() + np.sqrt(1 - a[499]) * noise.double().numpy()
    want = (v - np.sqrt(1 - a[499]) * v / 2) / np.sqrt(a[499])
    assert np.abs(one.numpy() - (np.clip(want, -1, 1) if clip else want)).max() < 1e-4


def test_pixels_are_rounded_to_the_nearest_value():
    values = torch.tensor([0.0, 0.4, 0.6, 127.4, 127.6, 254.6, 255.0, 300.0, -9.0])
    found = echomod.to_images((values / 127.5 - 1).view(1, 1, 3, 3)).flatten()
    assert found.tolist() == [0, 0, 1, 127, 128, 255, 255, 255, 0]
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    assert torch.equal(echomod.to_images(echomod.to_signal(pixels)), pixels)


def test_timesteps():
    assert echomod.timesteps(0.5, 1) == [499]
    assert echomod.timesteps(0.0, 10) == [] and echomod.timesteps(0.0004, 10) == []
    assert echomod.timesteps(0.001, 10) == [0] and echomod.timesteps(1.0, 2) == [999, 0]
    assert echomod.timesteps(0.1, 10)[0] == 99 and len(echomod.timesteps(0.1, 10)) == 10
    assert echomod.timesteps(0.005, 50) == [4, 3, 2, 1, 0]


def test_both_samplers_find_the_only_image():
    """With one clean image of a class every sampler ends there, from any start."""
    bank, y = toy(3, seed=5)
    x, _ = toy(3)
    for sampler in ("ddim", "dpm"):
        out = echomod.ExactDenoiser(bank, y, 1.0, 20, sampler).edit(x, y, [1, 2, 3])
        assert (out.int() - bank.int()).abs().max() <= 2, sampler


def test_the_seed_of_an_image_depends_on_run_and_index():
    found = {echomod.image_seed(s, i) for s in range(20) for i in range(50)}
    assert len(found) == 1000 and all(0 <= v < 2**63 for v in found)


def test_control_maps():
    x = torch.zeros(1, 8, 8, 1, dtype=torch.uint8)
    x[0, 2:5, 3:7] = 200
    box = generators.control_map(x, "box")[0, 0]
    assert box[2:5, 3:7].all() and box.sum() == 12
    x[0, 0, 0] = 45  # darker than a quarter of the brightest: outside
    assert torch.equal(generators.control_map(x, "box")[0, 0], box)
    x[0, 0, 0] = 0
    ink = generators.control_map(x, "ink")
    assert (
        ink.shape == (1, 1, 8, 8) and len(ink.unique()) < 17 and ink.mean().item() == pytest.approx(12 * 200 / 255 / 64)
    )
    assert not generators.control_map(x, "none").any()


def test_control_reaches_the_network_and_can_end_early():
    x, y = toy(4)
    seeds = [1, 2, 3, 4]
    for kind in ("concat", "controlnet"):
        on, off = (generator(kind, control_scale=s, control_end=1.0).edit(x, y, seeds) for s in (1.0, 0.0))
        none = generator(kind, control_scale=1.0, control_end=0.0).edit(x, y, seeds)
        assert not torch.equal(on, off) and torch.equal(off, none)
        assert torch.equal(generator(kind, control="none").edit(x, y, seeds), off) or kind == "controlnet"


def test_guidance_goes_on_from_the_unconditional_prediction():
    """eps = free + w (wanted - free): at 0 the label does not matter, at 1 one pass is enough."""
    x, y = toy(4)
    seeds = [1, 2, 3, 4]
    at = lambda w, labels: generator("concat", guidance=w).edit(x, labels, seeds)  # noqa: E731
    assert torch.equal(at(0.0, y), at(0.0, (y + 1) % 3)) and not torch.equal(at(1.0, y), at(1.0, (y + 1) % 3))
    assert (at(1.0, y).int() - at(1.0 + 1e-9, y).int()).abs().max() <= 1  # one pass, and two that are added


# ------------------------------------------------------------------------------------------------- training a generator


def trained(folder, kind="concat", steps=6, every=2, **more):
    x, y = toy()
    told = {"seed": 0, "steps": steps, "batch": 8, "lr": 1e-3, "widths": (8, 16), "layers": 1, "control": "ink"}
    return generators.train(kind, x, y, 3, folder, CPU, **{**told, "every": every, "show": False, **more})


@pytest.mark.parametrize("kind", ["concat", "controlnet"])
def test_a_generators_training_resumes_exactly(tmp_path, monkeypatch, kind):
    whole, about = trained(tmp_path / "a", kind)
    save = generators._save

    def cut(path, step, *rest):
        save(path, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(generators, "_save", cut)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", kind)
    monkeypatch.setattr(generators, "_save", save)
    assert not list((tmp_path / "b").glob("*.safetensors"))
    again, _ = trained(tmp_path / "b", kind)
    for (k, v), w in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(v, w), k
    third, _ = trained(tmp_path / "b", kind)  # read from the finished file
    assert all(torch.equal(v, w) for v, w in zip(again.parameters(), third.parameters(), strict=True))
    assert about["generator"] == kind and not list((tmp_path / "b").glob("*.checkpoint"))


def test_what_the_training_of_a_generator_shows_to_it(tmp_path, monkeypatch):
    """Label and control are blanked in their shares, each by itself, and a mirrored image has a mirrored control."""
    seen = []

    class Recorder(nn.Module):
        def __init__(self, *args):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x, t, y, hint):
            seen.append((x, y, hint))
            return self.w * x

    monkeypatch.setitem(generators.NETS, "concat", Recorder)
    monkeypatch.setattr(generators, "alphas", lambda: torch.ones(echomod.STEPS))  # nothing is noised
    x = torch.zeros(30, 8, 8, 1, dtype=torch.uint8)
    x[:, :, :4] = 250
    told = {"seed": 0, "steps": 20, "batch": 100, "lr": 0.0, "widths": (8,), "layers": 1, "control": "ink"}
    y = torch.arange(30) % 3
    generators.train("concat", x, y, 3, tmp_path, CPU, **told, flip=True, show=False, control_dropout=0.3)
    images, labels, hints = (torch.cat(v) for v in zip(*seen, strict=True))
    blank = hints.flatten(1).amax(1) == 0
    assert (labels == 3).double().mean() == pytest.approx(0.1, abs=0.02)
    assert blank.double().mean() == pytest.approx(0.3, abs=0.04)
    assert (blank & (labels == 3)).double().mean() == pytest.approx(0.03, abs=0.015)
    left = [v[:, 0, :, 0].mean(1) > v[:, 0, :, -1].mean(1) for v in (images, hints)]
    assert torch.equal(left[0][~blank], left[1][~blank]) and 0.4 < left[0].double().mean() < 0.6


def test_generator_training_learns_and_tells_of_what_it_cannot(tmp_path):
    x, y = toy()
    with pytest.raises(UserError, match="give --pretrain"):
        generators.train("concat", x[:0], y[:0], 3, tmp_path, CPU, seed=0, steps=1, batch=2, lr=1e-3, widths=(8,),
                         layers=1, control="ink")  # fmt: skip
    with pytest.raises(UserError, match="multiples of 8"):
        trained(tmp_path, widths=(6, 12))
    with pytest.raises(UserError, match="not finite"):
        trained(tmp_path, lr=1e30)
    final = tmp_path / "f"
    trained(final)
    path = next(final.glob("*.safetensors"))
    runs.write_tensors(path, {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="another network"):
        trained(final)


def test_shrinking_smooths():
    """Stripes of one pixel become grey, which taking every other pixel would not give."""
    stripes = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 200
    small = echomod.resize(stripes, 8)
    assert small.shape == (2, 8, 8, 3) and 60 < small[:, :, 2:6].float().mean() < 140 and small.max() < 200
    assert torch.equal(echomod.resize(stripes, 16), stripes)
    assert torch.equal(echomod.resize(stripes[..., :1], 8)[..., 0], small[..., 0])


@pytest.mark.parametrize("name", ["echomod.py", "echoselect.py"])
def test_the_contribution_stands_alone(name):
    """Inside functions too it imports libraries, and nothing of this folder."""
    nodes = list(ast.walk(ast.parse((HERE / name).read_text())))
    found = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    found |= {"." * n.level + (n.module or "").split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    own = {p.stem for p in HERE.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert {"torch", "numpy"} < found and not found & own and not any(v.startswith(".") for v in found)
    assert found <= {*sys.stdlib_module_names, "torch", "numpy", "PIL", "sklearn", "scipy", "skimage", "diffusers"}


def test_a_run_with_a_trained_generator_end_to_end(tmp_path, monkeypatch, cache):
    for kind in ("concat", "controlnet"):
        args = [*TINY, "--generator", kind, "--net.steps", "2", "--edit.steps", "2", "--net.widths", "8", "16"]
        args += ["--methods", "echoalign", "--train-limit", "60", "--cache", cache]
        start(monkeypatch, *args, "--out", tmp_path / kind)
        assert "seed0/record-echoalign.json" in records(tmp_path / kind)
    start(monkeypatch, *args, "--out", tmp_path / "again")
    same_runs(tmp_path / "controlnet", tmp_path / "again")
