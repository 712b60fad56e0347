"""Maps, masks, budgets and the ball against slow references written from the formulas."""

import math

from lab.cli import HERE

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import attacks
import models
import pixel_reweighting as pr


def network(name="resnet18-w8", classes=5, seed=0):
    """A network in eval mode whose running statistics are not those of a new one."""
    torch.manual_seed(seed)
    net = models.build(name, classes, 3)
    net.train()
    for _ in range(3):
        net(torch.rand(8, 3, 16, 16))
    return net.eval()


def reference(net, x, method, layer):
    """Map of one image [1, C, H, W] by hooks and a full backward pass, in loops; float64."""
    kept = {}
    stage = net.stages[layer]
    a = stage.register_forward_hook(lambda m, i, o: kept.update(a=o))
    b = stage.register_full_backward_hook(lambda m, i, o: kept.update(g=o[0]))
    z = net(x.requires_grad_(True))
    z[0, z[0].argmax()].backward()
    a.remove()
    b.remove()
    act, grad = kept["a"][0].detach().double().numpy(), kept["g"][0].double().numpy()
    channels, h, w = act.shape
    out = np.zeros((h, w))
    for k in range(channels):
        if method == "layercam":
            out += np.maximum(grad[k], 0) * act[k]
        elif method == "xgradcam":
            out += ((grad[k] * act[k]).sum() / act[k].sum() if act[k].sum() != 0 else 0.0) * act[k]
        else:
            out += grad[k].mean() * act[k]
    out = np.maximum(out, 0)
    return (out - out.min()) / (out.max() - out.min()) if out.max() > out.min() else out * np.nan


@pytest.mark.parametrize("layer", [-1, 2])
@pytest.mark.parametrize("method", ["gradcam", "xgradcam", "layercam"])
@pytest.mark.parametrize("name", ["resnet18-w8", "wrn-10-1", "small"])
def test_maps_of_a_batch_equal_hooks_on_single_images(name, method, layer):
    if name == "small" and layer == 2:
        layer = 1
    net = network(name).double()
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a = net.features(x, layer % len(net.stages))
    assert a.shape[2] >= 2
    # the module works in float32 by design: compare at that precision
    ours = pr.activation_map(net.float(), x.float(), method, layer)
    net = net.double()
    for i in range(4):
        wanted = reference(net, x[i : i + 1].clone(), method, layer)
        np.testing.assert_allclose(ours[i].numpy(), wanted, atol=2e-4, equal_nan=True)
    assert ours.isfinite().any()


def test_the_gradient_agrees_with_finite_differences():
    """dz_c/dA of the stage before the last, one entry after the other."""
    net = network("wrn-10-1").double()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    layer = len(net.stages) - 1
    with torch.no_grad():
        a = net.features(x, layer)
        c = net.rest(a, layer).argmax(1).item()
    found_a = a.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(net.rest(found_a, layer)[0, c], found_a)
    net32 = network("wrn-10-1")
    _, ours, chosen = pr.gradient(net32, x.float(), layer, closed=False)
    assert chosen.item() == c
    torch.testing.assert_close(ours.double(), g, atol=1e-5, rtol=1e-3)
    for k in range(0, a.shape[1], 7):
        step = torch.zeros_like(a)
        step[0, k, 0, 1] = 1e-6
        with torch.no_grad():
            slope = (net.rest(a + step, layer)[0, c] - net.rest(a - step, layer)[0, c]) / 2e-6
        assert ours[0, k, 0, 1].item() == pytest.approx(slope.item(), abs=1e-4)


def test_gradcam_xgradcam_and_the_closed_form_are_one_on_resnet18():
    """The gradient is the same at every position there, so the weights of the channels agree."""
    net = network("resnet18-w8")
    x = torch.rand(6, 3, 32, 32)
    layer = len(net.stages) - 1
    a, g, c = pr.gradient(net, x, layer, closed=False)
    _, closed, c2 = pr.gradient(net, x, layer, closed=True)
    assert torch.equal(c, c2)
    torch.testing.assert_close(g, closed.expand_as(g), atol=1e-7, rtol=1e-5)
    maps = [pr.scale(pr.combine(a, g, m)) for m in ("gradcam", "xgradcam")] + [pr.activation_map(net, x, "cam", -1)]
    for m in maps[1:]:
        torch.testing.assert_close(m, maps[0], atol=1e-4, rtol=1e-4, equal_nan=True)
    wide = network("wrn-10-1")
    one, two = (pr.activation_map(wide, x, m) for m in ("gradcam", "xgradcam"))
    assert (one - two).abs().nan_to_num().max() > 1e-3  # BN and ReLU lie between: they differ


def test_the_closed_form_is_refused_where_it_is_not_exact():
    with pytest.raises(ValueError, match="averaged"):
        pr.activation_map(network("wrn-10-1"), torch.rand(1, 3, 16, 16), "cam")
    with pytest.raises(ValueError, match="averaged"):
        pr.activation_map(network("small"), torch.rand(1, 3, 16, 16), "cam", 0)


def test_dead_channels_and_constant_maps():
    a = torch.tensor([[[[0.0, 0.0]], [[1.0, 3.0]]]])
    g = torch.tensor([[[[5.0, 5.0]], [[1.0, 1.0]]]])
    assert pr.combine(a, g, "xgradcam").tolist() == [[[1.0, 3.0]]]  # the first channel is 0/0
    dead = pr.scale(pr.combine(a, -g, "gradcam"))
    assert dead.isnan().all()
    for rule in ("zscore", "jet-rgb", "topfrac"):
        assert not pr.mask(dead, (4, 4), rule).any()


def test_the_map_leaves_no_trace_on_the_network():
    net = network("wrn-10-1")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    pr.activation_map(net, torch.rand(3, 3, 16, 16), "layercam", 1)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and not any(m._forward_hooks for m in net.modules())


def test_batches_of_any_size_give_the_same_map():
    net, x = network("wrn-10-1"), torch.rand(7, 3, 16, 16)
    every = pr.activation_map(net, x, "layercam")
    for i in range(7):
        torch.testing.assert_close(pr.activation_map(net, x[i : i + 1], "layercam")[0], every[i], atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------- the mask


def pillow(l, size):
    return np.asarray(Image.fromarray(l.numpy(), "F").resize(size[::-1], Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (64, 64)])
def test_the_resize_is_pillows(size):
    l = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = pr.resize(l, size)
    for i in range(5):
        np.testing.assert_allclose(ours[i].numpy(), pillow(l[i], size), atol=1e-5)
    assert ours.max() > 1 or ours.min() < 0  # overshoots stay


def released(l, size):
    """The six steps of the released code on one map, by Pillow, numpy and matplotlib."""
    from matplotlib import colormaps

    overlay = colormaps["jet"](pillow(l, size) ** 2)[:, :, :3]
    with np.errstate(invalid="ignore"):
        z = (overlay - overlay.mean()) / overlay.std()
    return (np.maximum(z, 1.0) > 1).transpose(2, 0, 1)


def test_the_colour_rule_is_the_released_codes():
    g = torch.Generator().manual_seed(3)
    l = pr.scale(torch.rand(40, 4, 4, generator=g))
    ours = pr.mask(l, (32, 32), "jet-rgb").numpy()
    wanted = np.stack([released(m, (32, 32)) for m in l])
    assert (ours != wanted).mean() < 2e-4  # a value on the edge of two colours
    assert 0.2 < ours.mean() < 0.33  # the specification measured 26.7 % on such maps


def test_at_the_peak_of_the_map_the_colour_rule_keeps_no_channel():
    """Trap 2: jet ends in dark red, which lies below the threshold."""
    row, col = np.mgrid[:4, :4]
    l = torch.tensor(np.exp(-((row - 1.2) ** 2 + (col - 1.7) ** 2) / 1.5), dtype=torch.float32)[None]
    l = pr.scale(l)
    big = pr.resize(l, (32, 32))[0]
    peak = np.unravel_index(int(big.argmax()), (32, 32))
    assert not pr.mask(l, (32, 32), "jet-rgb")[0, :, peak[0], peak[1]].any()
    assert pr.mask(l, (32, 32), "zscore")[0, 0, peak[0], peak[1]]


def test_the_score_rule_by_hand():
    l = pr.scale(torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(2)))
    m = pr.mask(l, (16, 16), "zscore")
    assert m.shape == (6, 1, 16, 16)
    for i in range(6):
        values = pr.resize(l, (16, 16))[i].double().numpy().ravel().tolist()
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        assert m[i].flatten().tolist() == [(v - mean) / std > 1 for v in values]


def test_the_score_divides_by_the_standard_deviation_of_all_pixels():
    """Not by that of a sample: with four pixels the two tell the first apart (1.05 and 0.91)."""
    assert pr.mask(torch.tensor([[[1.0, 0.95], [0.0, 0.0]]]), (2, 2)).flatten().tolist() == [True, False, False, False]


@pytest.mark.parametrize("share", [0.01, 0.2, 1.0])
def test_a_fixed_share_is_exact_even_with_ties(share):
    l = torch.zeros(3, 4, 4)
    l[0, 0, 0] = l[1] = 1.0
    m = pr.mask(l, (8, 8), "topfrac", share)
    assert m.flatten(1).sum(1).tolist() == [round(share * 64)] * 3


def test_budget_and_quadrants():
    m = torch.tensor([[[[True, False]]]])
    assert pr.budget(m, 0.5, 0.25).tolist() == [[[[0.5, 0.25]]]]
    q = pr.quadrant("lower-right", (4, 6), torch.device("cpu"))[0, 0]
    assert q.sum() == 18 and not q[2:, 3:].any() and q[:2].all() and q[:, :3].all()
    parts = sum(~pr.quadrant(f"{v}-{h}", (4, 6), q.device) for v in ("upper", "lower") for h in ("left", "right"))
    assert parts.eq(1).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_the_projection_stays_in_ball_and_image_and_is_idempotent(seed, a, b, spatial):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, 5, 5, generator=g).round(decimals=1)  # zeros and ones among them
    m = torch.rand(2, 1 if spatial else 3, 5, 5, generator=g) < 0.4
    e = pr.budget(m, max(a, b), min(a, b))
    delta = 3 * torch.randn(x.shape, generator=g)
    out = pr.project(x, delta, e)
    assert (out.abs() <= e).all() and (x + out >= 0).all() and (x + out <= 1 + 1e-7).all()
    assert torch.equal(pr.project(x, out, e), out)
    assert torch.equal(pr.project(x, delta, torch.full_like(x, 0.1)), pr.project(x, delta, 0.1))
    free = (delta.abs() <= e) & (x + delta >= 0) & (x + delta <= 1)
    assert torch.equal(out[free], delta[free])


def test_the_features_and_the_rest_make_the_network():
    for name in models.NAMES:
        if name == "wrn-34-10":
            continue
        net = models.build(name, 4, 3).eval()
        x = torch.rand(2, 3, 16, 16)
        with torch.no_grad():
            for k in range(len(net.stages)):
                torch.testing.assert_close(net.rest(net.features(x, k), k), net(x))
            last = net.features(x, len(net.stages) - 1)
            closed = torch.allclose(F.linear(last.mean((2, 3)), net.linear.weight, net.linear.bias), net(x), atol=1e-6)
        assert closed == net.pooled


@pytest.mark.parametrize(("name", "count"), [("resnet18", 11_173_962), ("wrn-34-10", 46_160_474)])
def test_the_papers_networks_have_their_size(name, count):
    """Shortcuts, batch norms and widths: the public counts of these two on ten classes."""
    with torch.device("meta"):
        net = models.build(name, 10, 3)
    assert sum(p.numel() for p in net.parameters()) == count


# ------------------------------------------------------------------------------------------------- in a stranger's loop


@pytest.mark.filterwarnings("ignore:all 4")  # some of them are
@pytest.mark.parametrize("name", ["resnet18-w8", "wrn-10-1"])
@pytest.mark.parametrize("method", ["gradcam", "xgradcam", "layercam"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_a_module_of_any_network_gives_the_map_of_the_stage(name, method, layer):
    net, x = network(name), torch.rand(4, 3, 32, 32)
    ours = pr.activation_map(net, x, method, layer)
    theirs = pr.activation_map(net, x, method, net.stages[layer])
    assert torch.allclose(ours, theirs, atol=1e-4, equal_nan=True)
    assert all(p.grad is None for p in net.parameters()) and not net.stages[layer]._forward_hooks


def test_a_network_in_train_mode_keeps_its_statistics_and_its_mode():
    net, x = network(), torch.rand(4, 3, 32, 32)
    expected = pr.activation_map(net, x)
    net.train()
    net.stages[1].eval()  # frozen by its user
    before = {k: v.clone() for k, v in net.named_buffers()}
    for layer in (-1, net.stages[-1]):
        assert torch.allclose(pr.activation_map(net, x, layer=layer), expected, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())
    assert net.training and net.stages[2].training and not net.stages[1].training


class Tokens(torch.nn.Module):
    """A small transformer's way of working: tokens [B, 1 + 16, C], the class token read at the end."""

    def __init__(self):
        super().__init__()
        self.patch, self.mix = torch.nn.Conv2d(3, 8, 8, 8), torch.nn.Identity()
        self.token, self.head = torch.nn.Parameter(torch.randn(1, 1, 8)), torch.nn.Linear(8, 5)

    def forward(self, x):
        t = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x).flatten(2).transpose(1, 2)], 1)
        t = self.mix(t)
        return self.head(t[:, 0] + (t[:, 1:] ** 2).mean(1))


def test_tokens_of_a_transformer_are_its_grid():
    torch.manual_seed(0)
    net, x = Tokens().eval(), torch.rand(3, 3, 32, 32)
    net.head.weight.data.abs_()  # so that no map is dead
    found = pr.activation_map(net, x, "gradcam", net.mix)
    t = net.patch(x).detach().requires_grad_(True)  # [3, 8, 4, 4], by hand
    z = net.head(net.token[:, 0] + (t**2).mean((2, 3)))
    (g,) = torch.autograd.grad(z.max(1).values.sum(), t)
    assert torch.allclose(found, pr.scale(pr.combine(t.detach(), g, "gradcam")), atol=1e-5, equal_nan=True)
    assert found.shape == (3, 4, 4) and not found.isnan().any()


def test_a_layer_whose_maps_are_all_dead_is_told():
    net, x = network(), torch.rand(4, 3, 32, 32)
    flat = torch.nn.Sequential(net, torch.nn.Unflatten(1, (5, 1, 1)), torch.nn.Identity(), torch.nn.Flatten())
    with pytest.warns(UserWarning, match="all 4 gradcam maps are dead"):
        pr.activation_map(flat, x, "gradcam", flat[2])


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_networks_of_other_precision(kind):
    net, x = network(), torch.rand(4, 3, 32, 32)
    expected = pr.activation_map(net, x)
    net = net.to(kind)
    for layer in (-1, net.stages[-1]):
        found = pr.activation_map(net, x.to(kind), layer=layer)
        assert torch.allclose(found.float(), expected, atol=1e-5 if kind == torch.float64 else 0.2)


def test_data_parallel_is_looked_through():
    net, x = network(), torch.rand(2, 3, 32, 32)
    assert torch.equal(pr.activation_map(torch.nn.DataParallel(net), x), pr.activation_map(net, x))


def test_what_is_not_known_is_refused():
    net, x = network(), torch.rand(2, 3, 32, 32)
    with pytest.raises(ValueError, match="no map 'gradcam\\+\\+'"):
        pr.activation_map(net, x, "gradcam++")
    with pytest.raises(ValueError, match="no rule 'zscor'"):
        pr.mask(torch.rand(2, 4, 4), (32, 32), "zscor")
    with pytest.raises(ValueError, match="has no stages; give the module"):
        pr.activation_map(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 5)), x)
    with pytest.raises(TypeError, match="activations"):
        pr.activation_map(net, x, layer=net.linear)
    with pytest.raises(ValueError, match="ran 0 times"):
        pr.activation_map(net, x, layer=torch.nn.Identity())


def test_images_outside_the_unit_interval_are_refused():
    net, y = network(), torch.zeros(2, dtype=torch.long)
    x = torch.randn(2, 3, 32, 32)  # normalised
    e = torch.full((2, 1, 32, 32), 8 / 255)
    for attack in (
        lambda: attacks.pgd(net, x, y, x * 0, 2 / 255, e, 1),
        lambda: attacks.trades(net, x, x * 0, 2 / 255, e, 1),
        lambda: attacks.mma(net, x, y, x * 0, 2 / 255, e, 1),
        lambda: attacks.fat(net, x, y, x * 0, 2 / 255, e, 1, 0),
    ):
        with pytest.raises(ValueError, match="Normalize"):
            attack()


def test_the_readmes_snippet():
    text = (HERE / "README.md").read_text().split("## In your own code")[1]
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 15
    torch.manual_seed(0)
    images = torch.rand(4, 3, 64, 64)
    space = {"torchvision": torchvision, "torch": torch, "F": F, "pr": pr, "attacks": attacks}
    exec(code.replace("steps=10", "steps=1"), {**space, "loader": [(images, torch.tensor([0, 1, 2, 3]))] * 2})
