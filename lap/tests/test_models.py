"""Networks: sizes as published, normalisation inside, and the two shortcut forms."""

from lab.runs import UserError

import pytest
import torch
from torch import nn

import models


def build(name, classes=10, channels=3, size=32):
    return models.build(name, classes, channels, size, (0.5,) * channels, (0.25,) * channels)


@pytest.mark.parametrize(
    ("name", "classes", "size", "parameters"),
    [
        ("preact18", 10, 32, 11_172_170),
        ("preact18", 100, 32, 11_218_340),
        ("preact18-w32", 10, 32, 2_796_714),
        ("preact18-w16", 10, 32, 701_018),
        ("preact18-w8", 10, 32, 176_178),
        ("preact18-act", 200, 64, 11_576_840),
        ("wrn-34-10", 10, 32, 46_160_474),
        ("resnet18", 10, 32, 11_173_962),
        ("resnet18-cosine", 100, 224, 11_220_032),
    ],
)
def test_number_of_parameters(name, classes, size, parameters):
    with torch.device("meta"):
        net = build(name, classes, size=size)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(
    "name", [n if n != "wrn-34-10" else pytest.param(n, marks=pytest.mark.slow) for n in models.NAMES]
)
def test_every_network_gives_logits_and_gradients(name):
    size = 32 if name in ("preact18-act", *models.WIDTHS) else 16
    x = torch.rand(2, 3, size, size, requires_grad=True)
    net = build(name, 7, size=size)
    z = net.train()(x)
    z.square().sum().backward()
    assert z.shape == (2, 7) and z.isfinite().all() and x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("activated", [False, True])
def test_projection_takes_the_raw_or_the_activated_input(activated):
    block = models.PreActBlock(4, 8, 2, activated)
    nn.init.zeros_(block.conv2.weight)  # only the shortcut is left
    x = torch.randn(2, 4, 8, 8)
    skip = block.shortcut(torch.relu(block.norm1(x)) if activated else x)
    torch.testing.assert_close(block(x), skip)


def test_a_narrow_network_is_the_papers_with_other_widths():
    paper, narrow = (build(n) for n in ("preact18", "preact18-w16"))
    assert [*paper.state_dict()] == [*narrow.state_dict()]
    for (name, a), b in zip(paper.named_parameters(), narrow.parameters(), strict=True):
        same = [n if n in (3, 10) and k in (0, 1) else n // 4 for k, n in enumerate(a.shape[:2])]  # images, classes
        assert [*b.shape[:2]] == same and a.shape[2:] == b.shape[2:], name


def test_images_too_small_for_the_pool_are_refused():
    for name in ("preact18", "preact18-w16", "preact18-act"):
        for size in (14, 16, 24):
            with pytest.raises(UserError, match=f"images of {size} pixels .* takes 25 and more"):
                build(name, size=size)
        assert build(name, size=25)(torch.rand(2, 3, 25, 25)).shape == (2, 10)


def test_the_imagenet_head_has_unit_features_and_no_bias():
    net = build("resnet18-cosine", 5)
    assert net[1].linear.bias is None
    seen = []
    net[1].linear.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    net(torch.rand(3, 3, 32, 32))
    torch.testing.assert_close(seen[0].norm(dim=1), torch.ones(3))


def test_normalisation_is_the_first_layer():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    net = models.build("preact-small", 3, 3, 8, mean, std)
    x = torch.rand(2, 3, 8, 8)
    want = (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(net[0](x), want)
    assert not [k for k in net.state_dict() if k.startswith("0.")]  # constants are no weights


def test_group_norm_network_treats_samples_alone():
    net = build("preact-small-gn", size=8).train()
    x = torch.rand(6, 3, 8, 8)
    torch.testing.assert_close(net(x)[:2], net(x[:2]), atol=1e-5, rtol=1e-5)


def test_a_batch_of_one_trains():
    assert build("preact-small", size=8).train()(torch.rand(1, 3, 8, 8)).isfinite().all()
