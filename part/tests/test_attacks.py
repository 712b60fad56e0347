"""Attacks against slow references in float64, one image at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import attacks
import models
import pixel_reweighting as pr


def network(classes=5):
    torch.manual_seed(0)
    net = models.build("resnet18-w8", classes, 3)
    for _ in range(3):
        net(torch.rand(8, 3, 8, 8))
    net.linear.weight.data.mul_(3)
    return net.double().eval()


@pytest.fixture(scope="module")
def case():
    g = torch.Generator().manual_seed(5)
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64, generator=g)
    x[0, :, :3] = 0.0
    x[1, :, :3] = 1.0
    y = torch.tensor([0, 1, 2, 3, 4])
    start = 0.1 * (2 * torch.rand(x.shape, dtype=torch.float64, generator=g) - 1)
    e = torch.where(torch.rand(5, 1, 8, 8, generator=g) < 0.4, 0.1, 0.06).double()
    return network(), x, y, start, e


def climb(net, x, start, e, step, steps, objective):
    """Sign ascent of objective(logits) for one image [1, C, H, W] as the released code writes it, with a clip each
    step."""
    x_adv = x + start
    for _ in range(steps):
        at = x_adv.clone().requires_grad_(True)
        objective(net(at)).backward()
        x_adv = x_adv.detach() + step * at.grad.sign()
        delta = torch.min(torch.max(x_adv - x, -e), e)
        x_adv = torch.clamp(x + delta, 0, 1)
    net.zero_grad()
    return x_adv - x


def test_pgd_in_a_pixelwise_box(case):
    net, x, y, start, e = case
    ours = attacks.pgd(net, x, y, start, 0.03, e, 6)
    for i in range(5):
        p = slice(i, i + 1)
        wanted = climb(net, x[p], start[p], e[p], 0.03, 6, lambda z, p=p: F.cross_entropy(z, y[p]))
        torch.testing.assert_close(ours[p], wanted, atol=1e-9, rtol=0)
    assert (ours.abs() <= e + 1e-12).all() and all(q.grad is None for q in net.parameters() if q.grad is None)


def test_pgd_leaves_no_weight_gradient(case):
    net, x, y, start, e = case
    net.zero_grad(set_to_none=True)
    attacks.mma(net, x, y, start, 0.03, e, 2)
    attacks.trades(net, x, start, 0.03, e, 2)
    attacks.fat(net, x, y, start, 0.03, e, 2, 1)
    assert all(p.grad is None for p in net.parameters())


def test_trades_attack(case):
    net, x, _, start, e = case
    ours = attacks.trades(net, x, 0.01 * start, 0.03, e, 5)
    with torch.no_grad():
        p = net(x).softmax(1)

    def kl(z, i):
        q = z.softmax(1)[0]
        return sum(p[i, k] * (p[i, k].log() - q[k].log()) for k in range(5))

    for i in range(5):
        wanted = climb(net, x[i : i + 1], 0.01 * start[i : i + 1], e[i : i + 1], 0.03, 5, lambda z, i=i: kl(z, i))
        torch.testing.assert_close(ours[i : i + 1], wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_mma_pursues_each_target_and_keeps_the_smallest_margin(case, k):
    net, x, y, start, e = case
    ours = attacks.mma(net, x, y, start, 0.03, e, 5, k)
    for i in range(5):
        p = slice(i, i + 1)
        with torch.no_grad():
            z = net(x[p])[0].clone()
        z[y[i]] -= 10000
        targets = z.argsort()[-min(k, 4) :].tolist()
        begin = (x[p] + start[p]).clamp(0, 1) - x[p]
        best, deltas = [], []
        for t in targets:
            d = climb(net, x[p], begin, e[p], 0.03, 5, lambda z, t=t, i=i: -(z[0, y[i]] - z[0, t] + 50).clamp(min=0))
            with torch.no_grad():
                z = net(x[p] + d)[0]
            deltas.append(d)
            best.append((z[t] - z[y[i]]).item())
        torch.testing.assert_close(
            ours[p], deltas[max(range(len(best)), key=lambda j: (best[j], j))], atol=1e-9, rtol=0
        )


def test_the_rivals_of_ties_and_of_two_classes():
    z = torch.tensor([[3.0, 2.0, 1.0], [1.0, 5.0, 0.0]])
    assert attacks.rivals(z, torch.tensor([0, 0]), 2).tolist() == [[2, 1], [2, 1]]
    assert attacks.rivals(torch.tensor([[0.0, 1.0]]), torch.tensor([1]), 3).tolist() == [[0]]


def test_of_tied_targets_the_one_of_largest_logit_counts():
    """Both rivals end on the edge of the image with the same margin; the second had the larger logit at x."""

    def forward(at):
        flat = at.flatten(1)
        return torch.stack([0 * flat[:, 0], flat[:, 0], flat[:, 1]], 1)

    x = torch.tensor([[[[0.9, 0.95]]]])
    delta = attacks.mma(forward, x, torch.tensor([0]), torch.zeros_like(x), 0.2, 0.2, 1, 2)
    torch.testing.assert_close(delta, torch.tensor([[[[0.0, 0.05]]]]))


def friend(net, x, y, start, e, step, steps, tau, kl=False):
    """The friendly attack on one image, with a counter."""
    delta, left = pr.project(x, start, e), tau
    with torch.no_grad():
        p = net(x).softmax(1)

    def loss(z):
        return (p * (p.log() - z.log_softmax(1))).sum() if kl else F.cross_entropy(z, y)

    for _ in range(steps):
        at = (x + delta).requires_grad_(True)
        z = net(at)
        if z.argmax(1) != y:
            if left == 0:
                return delta
            left -= 1
        (g,) = torch.autograd.grad(loss(z), at)
        delta = pr.project(x, delta + step * g.sign(), e)
    return delta


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("tau", [0, 1, 3])
def test_the_friendly_attack_stops_image_by_image(case, tau, kl):
    net, x, _, start, e = case
    with torch.no_grad():
        y = net(x).argmax(1)
    y[3:] = (y[3:] + 1) % 5  # misclassified from the start
    ours = attacks.fat(net, x, y, start, 0.01, e, 8, tau, kl)
    for i in range(5):
        p = slice(i, i + 1)
        torch.testing.assert_close(
            ours[p], friend(net, x[p], y[p], start[p], e[p], 0.01, 8, tau, kl), atol=1e-9, rtol=0
        )
    begin = pr.project(x, start, e)
    full = attacks.trades(net, x, begin, 0.01, e, 8) if kl else attacks.pgd(net, x, y, begin, 0.01, e, 8)
    assert torch.equal(attacks.fat(net, x, y, start, 0.01, e, 8, 8, kl), full)
    assert tau or not torch.equal(ours, full)


def test_a_box_that_follows_the_images(case):
    """An attacker who knows the masks: a new box before each step; a constant one is the plain attack."""
    net, x, y, start, e = case
    seen = []

    def box(at):
        seen.append(at)
        return e if len(at) == 5 else e.repeat(3, 1, 1, 1)

    assert torch.equal(attacks.pgd(net, x, y, start, 0.03, box, 4), attacks.pgd(net, x, y, start, 0.03, e, 4))
    assert torch.equal(attacks.mma(net, x, y, start, 0.03, box, 4), attacks.mma(net, x, y, start, 0.03, e, 4))
    assert len(seen) == 8 and torch.equal(seen[0], x + start) and not torch.equal(seen[1], seen[0])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0, 0.3), st.floats(0, 1), st.sampled_from(["pgd", "mma", "trades", "fat"]))
def test_no_attack_leaves_the_ball_or_the_image(seed, eps, share, name):
    g = torch.Generator().manual_seed(seed)
    net = network().float()
    x = torch.rand(3, 3, 8, 8, generator=g).round(decimals=1)
    y = torch.randint(0, 5, (3,), generator=g)
    e = pr.budget(torch.rand(3, 1, 8, 8, generator=g) < 0.5, eps, share * eps)
    start = attacks.uniform(x, eps, g)
    delta = {
        "pgd": lambda: attacks.pgd(net, x, y, start, 0.1, e, 2),
        "mma": lambda: attacks.mma(net, x, y, start, 0.1, e, 2),
        "trades": lambda: attacks.trades(net, x, start, 0.1, e, 2),
        "fat": lambda: attacks.fat(net, x, y, start, 0.1, e, 2, 0),
    }[name]()
    assert (delta.abs() <= e).all() and (x + delta >= 0).all() and (x + delta <= 1 + 1e-7).all()


def test_autoattack_breaks_what_it_should():
    torch.manual_seed(0)
    net = models.build("small", 4, 3).eval()
    x = torch.rand(6, 3, 8, 8)
    with torch.no_grad():
        y = net(x).argmax(1)
    out = attacks.auto_attack(net, x, y, 0.3, 6, 0, "apgd-t")  # four classes: three targets
    assert (out - x).abs().max() <= 0.3 + 1e-5 and out.min() >= 0 and out.max() <= 1
    with torch.no_grad():
        assert (net(out).argmax(1) != y).sum() >= 4
