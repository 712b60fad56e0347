"""Losses and AWP against references in loops, float64; the arms' table."""

import math

import pytest
import torch
import torch.nn.functional as F

import attacks
import baselines
import models
import settings


def softmax(row):
    top = max(row)
    e = [math.exp(v - top) for v in row]
    return [v / sum(e) for v in e]


@pytest.fixture
def logits():
    g = torch.Generator().manual_seed(0)
    z, z_adv = 3 * torch.randn(2, 6, 4, dtype=torch.float64, generator=g)
    return z.requires_grad_(True), z_adv.requires_grad_(True), torch.tensor([0, 1, 2, 3, 0, 1])


def test_trades_loss(logits):
    z, z_adv, y = logits
    wanted = 0.0
    for a, b, t in zip(z.tolist(), z_adv.tolist(), y.tolist(), strict=True):
        p, q = softmax(a), softmax(b)
        wanted += -math.log(p[t]) + 6.0 * sum(u * math.log(u / v) for u, v in zip(p, q, strict=True))
    found = baselines.trades_loss(z, z_adv, y, 6.0)
    assert found.item() == pytest.approx(wanted / 6, rel=1e-9)
    assert torch.autograd.gradcheck(lambda a, b: baselines.trades_loss(a, b, y, 6.0), (z, z_adv))
    # not detached: the second term reaches the natural logits too
    (with_kl,) = torch.autograd.grad(found, z)
    (without,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    assert (with_kl - without).abs().max() > 1e-3


def test_mart_loss(logits):
    z, z_adv, y = logits
    wanted = 0.0
    for a, b, t in zip(z.tolist(), z_adv.tolist(), y.tolist(), strict=True):
        p, q = softmax(a), softmax(b)
        rival = max(v for k, v in enumerate(q) if k != t)
        wanted += -math.log(q[t]) - math.log(1.0001 - rival + 1e-12)
        wanted += (
            5.0 * sum(u * (math.log(u) - math.log(v + 1e-12)) for u, v in zip(p, q, strict=True)) * (1.0000001 - p[t])
        )
    assert baselines.mart_loss(z, z_adv, y, 5.0).item() == pytest.approx(wanted / 6, rel=1e-9)
    assert torch.autograd.gradcheck(lambda a, b: baselines.mart_loss(a, b, y, 5.0), (z, z_adv))
    extreme = torch.tensor([[200.0, -200.0, 0.0, 0.0]])
    assert baselines.mart_loss(extreme, -extreme, torch.tensor([0]), 6.0).isfinite()


def test_awp_moves_each_weight_by_gamma_and_takes_the_move_back():
    torch.manual_seed(0)
    net = models.build("resnet18-w8", 4, 3).double().train()
    x, y = torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])

    def loss():
        return F.cross_entropy(net(x), y)

    before = {k: v.clone() for k, v in net.state_dict().items()}
    first = loss().item()
    net.load_state_dict(before)
    names = [n for n, p in net.named_parameters() if p.ndim > 1 and "weight" in n]
    grads = torch.autograd.grad(loss(), [dict(net.named_parameters())[n] for n in names])
    net.load_state_dict(before)
    with baselines.perturbed_weights(net, 0.01, loss):
        inside = net.state_dict()
        for k, v in before.items():
            if k in names:
                g = grads[names.index(k)]
                moved = v + 0.01 * v.norm() * g / (g.norm() + 1e-20)
                torch.testing.assert_close(inside[k], moved, atol=1e-12, rtol=1e-9)
            else:
                assert torch.equal(inside[k], v), k  # biases, scales and running statistics stay
        assert loss().item() > first
        net.load_state_dict({**net.state_dict(), **{k: v for k, v in before.items() if k not in names}})
        with torch.no_grad():
            net.linear.weight.add_(1.0)  # a step of the optimiser
    for k, v in before.items():
        wanted = v + 1.0 if k == "linear.weight" else v
        torch.testing.assert_close(net.state_dict()[k], wanted, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("base", baselines.WARMUP)
def test_every_base_has_its_own_attack_and_loss(base):
    torch.manual_seed(0)
    net = models.build("resnet18-w8", 4, 3).eval()
    x, y = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    s = settings.Settings(step=0.03, steps=3, beta=2.0, tau=1)
    start, e = 0.05 * torch.randn_like(x), torch.full((6, 1, 8, 8), 0.05)
    attack = {
        "at": lambda: attacks.pgd(net, x, y, start, 0.03, e, 3),
        "mart": lambda: attacks.pgd(net, x, y, start, 0.03, e, 3),
        "trades": lambda: attacks.trades(net, x, start, 0.03, e, 3),
        "fat": lambda: attacks.fat(net, x, y, start, 0.03, e, 3, 1),
        "fat-trades": lambda: attacks.fat(net, x, y, start, 0.03, e, 3, 1, kl=True),
    }
    found = {b: attack[b]() for b in attack}
    assert torch.equal(baselines.perturb(s, base, net, x, y, e, start), found[base])
    assert not any(torch.equal(found[base], found[b]) for b in found if {b, base} != {"at", "mart"} and b != base)
    s.attack = "mma"
    wanted = attacks.mma(net, x, y, start, 0.03, e, 3) if base == "at" else found[base]
    assert torch.equal(baselines.perturb(s, base, net, x, y, e, start), wanted)
    x_adv, seen = x + found[base], []
    loss, z = baselines.loss(s, base, lambda v: seen.append(v) or net(v), x, x_adv, y)
    natural, adversarial = net(x), net(x_adv)
    assert torch.equal(z, adversarial) and torch.equal(seen[-1], x_adv) and torch.equal(seen[0], x) == (len(seen) == 2)
    both = {"mart": baselines.mart_loss, "trades": baselines.trades_loss, "fat-trades": baselines.trades_loss}
    wanted = both[base](natural, adversarial, y, 2.0) if base in both else F.cross_entropy(adversarial, y)
    assert torch.equal(loss, wanted)


@pytest.mark.parametrize("base", baselines.WARMUP)
def test_the_start_is_uniform_at_eps_or_a_tiny_normal(base):
    s = settings.Settings()
    v = baselines.start(s, base, torch.zeros(50, 3, 16, 16), torch.Generator().manual_seed(0), 0.5)
    if base in ("at", "fat"):
        assert 0.999 < v.abs().max() / (0.5 * s.eps) <= 1 and v.std() / (0.5 * s.eps) == pytest.approx(
            3**-0.5, rel=0.02
        )
    else:
        assert v.std() == pytest.approx(0.001, rel=0.02) and v.abs().max() > 0.0035


def test_every_arm_has_its_own_label_and_a_warm_up():
    labels = [a.label for a in baselines.ARMS.values()]
    assert len(set(labels)) == len(labels) and {"AT", "PART", "TRADES", "PART-T", "MART", "PART-M", "FAT"} <= set(
        labels
    )
    assert all(a.base in baselines.WARMUP for a in baselines.ARMS.values())
    bases = ("at", "fat", "trades", "mart", "fat-trades")
    assert [baselines.awp_gamma(b) for b in bases] == [0.01, 0.01, 0.005, 0.005, 0.005]
    s = settings.Settings()
    assert [baselines.awp_wait(s, b) for b in bases] == [0, 0, 10, 0, 10]
    s.awp_warmup = 3
    assert {baselines.awp_wait(s, b) for b in bases} == {3}
