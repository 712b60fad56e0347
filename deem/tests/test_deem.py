"""The contribution, deem.py: against a slow reference from the formula, by finite differences, by its own examples, and
what Deem.denoising makes of it."""

import doctest
import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import HERE, batch_of, documents, make
from hypothesis import given, settings
from hypothesis import strategies as st

import deem
import recipe
from deem import csr_error, csr_loss, squeezed_steps


def test_squeezed_steps():
    t = squeezed_steps(torch.arange(1000), 0.6)
    assert (t.min(), t.max()) == (200, 799) and t.dtype == torch.long
    assert torch.equal(squeezed_steps(torch.arange(1000), 1.0), torch.arange(1000))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.floats(0.05, 1.0))
def test_squeezing_keeps_order_and_range(t, factor):
    a, b = squeezed_steps(torch.tensor([t, min(t + 1, 999)]), factor).tolist()
    assert 0 <= a <= b <= 999 and abs(a - 500) <= factor * abs(t - 500) + 1


def test_csr_error_by_hand():
    found, target = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    assert torch.allclose(csr_error(found, target), ((found - target) ** 2).mean())
    mask = torch.zeros(2, 6, 6)
    mask[:, :3] = 1
    total = 0.0
    for b in range(2):
        for c in range(4):
            for y in range(6):
                for x in range(6):
                    total += (found - target)[b, c, y, x] ** 2 * mask[b, y, x] * 36 / mask[b].sum()
    assert torch.allclose(csr_error(found, target, mask), total / (2 * 4 * 36), atol=1e-5)
    assert csr_error(found, target, torch.zeros(2, 6, 6)) == 0


ABAR = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)


def told(z, t, condition):
    """A denoiser that reads its condition and its time."""
    level = condition.mean((1, 2)) * (1 + t / 1000)
    return torch.tanh(z * level[:, None, None, None])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("squeeze", [1.0, 0.6])
@pytest.mark.parametrize("masked", [False, True])
def test_csr_loss_against_a_slow_reference(prediction, squeeze, masked):
    """Eq. 5 written out in loops over images, channels and places, in double precision."""
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 2, 4, 4, generator=g)
    condition = torch.randn(3, 5, 6, generator=g)
    masks = (torch.rand(3, 4, 4, generator=g) < 0.5).float() if masked else None
    more = {"prediction": prediction, "squeeze": squeeze, "masks": masks}
    found = csr_loss(told, condition, latents, ABAR.float(), **more, generator=torch.Generator().manual_seed(7))

    g = torch.Generator().manual_seed(7)
    steps = torch.randint(1000, (3,), generator=g).tolist()
    noise = torch.randn(3, 2, 4, 4, generator=g).double()
    total = 0.0
    for b in range(3):
        t = steps[b] if squeeze == 1 else int(torch.tensor(squeeze * (steps[b] - 500.0) + 500.0).round())
        signal, dirt = math.sqrt(float(ABAR[t])), math.sqrt(1 - float(ABAR[t]))
        level = float(condition[b].double().mean()) * (1 + t / 1000)
        kept = float(masks[b].sum()) if masked else 16.0
        for c in range(2):
            for y in range(4):
                for x in range(4):
                    z0, eps = float(latents[b, c, y, x]), float(noise[b, c, y, x])
                    z = signal * z0 + dirt * eps
                    want = eps if prediction == "epsilon" else signal * eps - dirt * z0
                    keep = float(masks[b, y, x]) if masked else 1.0
                    total += keep * (want - math.tanh(z * level)) ** 2 * 16 / (kept + 1e-8)
    assert float(found) == pytest.approx(total / (3 * 2 * 16), rel=1e-4)


def test_its_gradient_reaches_the_condition_by_finite_differences():
    condition = torch.randn(2, 3, 4, requires_grad=True)
    latents = torch.randn(2, 2, 4, 4)

    def loss(c):
        return csr_loss(told, c, latents, ABAR.float(), generator=torch.Generator().manual_seed(3))

    (grad,) = torch.autograd.grad(loss(condition), condition)
    step = torch.zeros_like(condition)
    step[1, 2, 3] = 1e-2
    with torch.no_grad():
        numeric = (loss(condition + step) - loss(condition - step)) / 2e-2
    assert float(grad[1, 2, 3]) == pytest.approx(float(numeric), rel=1e-2) and abs(float(numeric)) > 1e-5


def test_what_does_not_belong_together_is_refused():
    latents, condition = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 4)
    for given_, latents_, more, word in (
        (condition[:1], latents, {}, "does not go with"), (condition, latents[0], {}, "does not go with"),
        (condition, latents, {"prediction": "sample"}, "use epsilon or v_prediction"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            csr_loss(told, given_, latents_, ABAR.float(), **more)
    with pytest.raises(ValueError, match="the denoiser gives"):
        csr_loss(lambda z, t, c: z[:, :1], condition, latents, ABAR.float())


def test_the_example_of_the_file_runs():
    found = doctest.testmod(deem)
    assert found.attempted >= 9 and not found.failed


def test_the_example_of_the_readme_runs():
    text = (HERE / "README.md").read_text()
    code = re.search(r"## In your own code.*?```python\n(.*?)```", text, re.S)[1]
    assert len(code.splitlines()) <= 15
    found = {}
    exec(compile(code, "README.md", "exec"), found)
    assert found["loss"].requires_grad
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in found["encoder"].parameters())
    assert all(p.grad is None for p in found["unet"].parameters())


@pytest.mark.parametrize("csr_maps", [False, True])
def test_the_model_computes_csr_as_the_file_says(csr_maps):
    """Deem.denoising takes NIP's samples along in the same call of the U-Net; CSR comes out as by itself."""
    model, _ = make("digits")
    model.eval()
    b = batch_of(model, documents(6))
    with torch.no_grad():
        model.condition_head.weight.normal_()
        for p in model.denoiser.net.parameters():
            p.add_(0.05)
        model.loss = replace(model.loss, csr_maps=csr_maps)
        seen = model.encode_images(b.images)
        found = model.denoising(b, seen, model.hidden(b, seen), 11)
        g, den = torch.Generator().manual_seed(11 * 4 + 1), model.denoiser
        more = {"maps": seen.maps, "seen": torch.ones(len(b.images), dtype=torch.bool)} if csr_maps else {}
        z0 = den.latents.encode(b.targets)
        alone = csr_loss(
            lambda z, t, c: den(z, t, c, **more), seen.condition, z0, den.abar, prediction=den.kind, generator=g
        )
    assert float(found["csr"]) == pytest.approx(float(alone), rel=1e-5) and "nip" in found


def test_the_table_of_who_trains_is_what_trains():
    parts = {
        "image encoder (trunk)": {"trunk"}, "adapters, resampler, W_t": {"eyes"}, "W_i, the map of CSR": {"condition"},
        "language model, but its output head": {"llm"}, "U-Net": {"unet"},
        "image attention in it, gates, new tokens": {"synchroniser", "gate", "offsets", "soi", "new head"},
        "attention beside the U-Net, NIP's reader": {"net", "net offsets", "context", "null"},
    }  # fmt: skip
    columns = [(1, "deem"), (1, "deem-star"), (1, "clean"), (2, "deem"), (3, "deem")]
    said = {}
    for line in deem.__doc__.splitlines():
        name, *marks = (x.strip() for x in line.split("|"))
        if name in parts:
            said[name] = [mark == "T" for mark in " ".join(marks).replace("not loaded", "-").split()]
    assert {*said} == {*parts} and all(len(marks) == len(columns) for marks in said.values())
    for k, (stage, variant) in enumerate(columns):
        model, _ = make("tiny", stage=stage, variant=variant)
        model.freeze(stage, variant)
        training = {recipe.part_of(n) for n, p in model.named_parameters() if p.requires_grad} - {"regions"}
        assert training == set().union(*(parts[name] for name, marks in said.items() if marks[k])), (stage, variant)
