"""Attacks: they stay where they must, reach what a plain implementation reaches, and cost what is documented."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import attacks
import baselines
import models
from settings import Settings

EPS = 16 / 255


def network(seed=0, classes=4):
    torch.manual_seed(seed)
    return models.build("preact-small", classes, 3, 8, (0.5,) * 3, (0.25,) * 3)


def images(n=12, seed=0, classes=4):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=g), torch.randint(classes, (n,), generator=g)


def noise(x, size, generator=None):
    return attacks.uniform(x, size, generator)


def settings_of(method, start="r", **more):
    s = Settings(method=method, start=start, eps=EPS, **more)
    s.resolve()
    return s


@settings(max_examples=60, deadline=None)
@given(eps=st.floats(0, 1), size=st.floats(0, 3), seed=st.integers(0, 10**6))
def test_projection_stays_in_ball_and_image_and_is_idempotent(eps, size, seed):
    g = torch.Generator().manual_seed(seed)
    x, d = torch.rand(3, 2, 4, 4, generator=g), size * torch.randn(3, 2, 4, 4, generator=g)
    p = attacks.project(x, d, eps)
    assert p.abs().max() <= torch.tensor(eps) + 1e-7
    assert (x + p).min() >= 0 and (x + p).max() <= 1
    assert torch.equal(p, attacks.project(x, p, eps))
    inside = (d.abs() <= eps) & (x + d >= 0) & (x + d <= 1)
    torch.testing.assert_close(p[inside], d[inside], atol=1e-7, rtol=0)


CASES = [
    *(("fgsm", s) for s in ("v", "r", "n")),
    *(("pgd", "r"), ("pgd", "v"), ("zerograd", "r"), ("multigrad", "r"), ("gradalign", "r")),
]


@pytest.mark.parametrize(("method", "start"), CASES)
def test_training_perturbations_stay_in_their_ball(method, start):
    x, y = images(64)
    s = settings_of(method, start, attack_steps=2)
    delta = baselines.perturb(s, network(), x, y, noise, 1.0, torch.zeros(0)).delta
    bound = 3 * EPS if start == "n" else EPS  # noise of 2 eps and a step of eps, not clamped
    assert delta.abs().max() <= bound + 1e-6 and (x + delta).min() >= 0 and (x + delta).max() <= 1
    if start == "n":
        assert delta.abs().max() > EPS  # a check against eps would be wrong
    assert not delta.requires_grad


@pytest.mark.parametrize("start", ["v", "r", "n"])
def test_single_step_equals_the_formulas(start):
    """delta = clip(eta + a eps sign(grad)) with the gradient of the mean loss at x + eta, in train mode."""
    x, y = images(16)
    s, net, other = settings_of("fgsm", start), network(), network()
    eta = (
        {"v": 0, "r": 1, "n": 2}[start]
        * EPS
        * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) - 1)
    )
    got = baselines.perturb(s, net, x, y, lambda x, size: eta.clone(), 1.0, torch.zeros(0))
    eta = torch.clamp(x + eta, 0, 1) - x if start != "v" else torch.zeros_like(x)
    at = (x + eta).requires_grad_(True)
    z0 = other(at)
    F.cross_entropy(z0, y).backward()
    delta = eta + {"v": 1, "r": 1.25, "n": 1}[start] * EPS * at.grad.sign()
    delta = delta if start == "n" else delta.clamp(-EPS, EPS)
    delta = torch.clamp(x + delta, 0, 1) - x
    torch.testing.assert_close(got.delta, delta, atol=1e-6, rtol=0)
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(net[1].norm.running_mean, other[1].norm.running_mean)  # the first look updates them too


def test_radius_warm_up_scales_step_and_clamp():
    x, y = images(64)
    delta = baselines.perturb(settings_of("fgsm", "r"), network(), x, y, noise, 0.2, torch.zeros(0)).delta
    assert delta.abs().max() <= 0.2 * EPS + 1e-6
    assert [baselines.radius_warmup(e, 0.5, 5) for e in (0, 2, 4, 9)] == [0.1, 0.5, 0.9, 1.0]
    assert baselines.radius_warmup(0, 0.0, 0) == 1.0


def test_n_fgsm_warms_its_noise_up_with_the_radius():
    x, y = images()
    for start, size in (("r", EPS), ("n", 0.2 * 2 * EPS)):
        sizes = []
        draw = lambda x, size, sizes=sizes: sizes.append(size) or noise(x, size)  # noqa: E731
        baselines.perturb(settings_of("fgsm", start), network(), x, y, draw, 0.2, torch.zeros(0))
        assert sizes == [pytest.approx(size)]


@pytest.mark.parametrize(
    ("method", "start", "steps", "step"),
    [("pgd", "v", 2, 0.5), ("pgd", "r", 2, 0.5), ("pgd", "r", 10, 0.25), ("zerograd", "r", 1, 2.0)],
)
def test_stepwise_baselines_equal_the_formulas(method, start, steps, step):
    """Every step: delta = clip(delta + a eps sign(grad)), in train mode; ZeroGrad zeroes small entries first."""
    x, y = images(16)
    s, net, other = settings_of(method, start, attack_steps=steps), network(), network()
    assert s.step == step
    eta = noise(x, EPS, torch.Generator().manual_seed(5))
    got = baselines.perturb(s, net, x, y, lambda x, size: eta * (size / EPS), 1.0, torch.zeros(0)).delta
    delta = torch.clamp(x + eta, 0, 1) - x if start == "r" else torch.zeros_like(x)
    for _ in range(steps):
        at = (x + delta).requires_grad_(True)
        (g,) = torch.autograd.grad(F.cross_entropy(other(at), y), at)
        if method == "zerograd":
            g = torch.stack([torch.where(v.abs() < v.abs().quantile(0.35), 0.0, v) for v in g])
        delta = torch.clamp(x + (delta + step * EPS * g.sign()).clamp(-EPS, EPS), 0, 1) - x
    torch.testing.assert_close(got, delta, atol=1e-6, rtol=0)


def test_gradalign_looks_at_noise_that_is_not_clamped(monkeypatch):
    """The penalty compares with the gradient at x + U(-eps, eps), which may lie outside [0, 1]."""
    x, y = images(8)
    x, eta, seen = x.round(), noise(images(8)[0], EPS, torch.Generator().manual_seed(2)), []
    monkeypatch.setattr(baselines, "misalignment", lambda f, x, y, g, e: seen.append(e) or torch.zeros(()))
    baselines.perturb(settings_of("gradalign"), network(), x, y, lambda x, size: eta, 1.0, torch.zeros(0))
    assert torch.equal(seen[0], eta) and (x + eta).min() < 0


def test_zerograd_zeroes_the_share_of_each_sample():
    g = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    kept = baselines.keep_large(g, 0.35)
    for a, b in zip(g.flatten(1), kept.flatten(1), strict=True):
        bound = a.abs().sort().values[round(0.35 * (a.numel() - 1))]
        assert ((b == 0) == (a.abs() < bound)).float().mean() > 0.99 and torch.equal(b[b != 0], a[b != 0])


def test_multigrad_moves_agreed_coordinates_from_the_image():
    x, y = images(8)
    x = 0.3 + 0.4 * x
    s, net, starts = settings_of("multigrad"), network().eval(), []
    got = baselines.perturb(s, net, x, y, lambda x, size: starts.append(noise(x, size)) or starts[-1], 1.0, None)
    signs = torch.stack([attacks.input_gradient(net, x + e, y)[0].sign() for e in starts])
    agreed = torch.where((signs == signs[0]).all(0), signs[0], 0.0)
    assert len(starts) == 3
    torch.testing.assert_close(got.delta, (2 * EPS * agreed).clamp(-EPS, EPS))


def test_gradalign_penalty_equals_one_minus_the_mean_cosine_and_reaches_the_weights():
    x, y = images(8)
    net = network().eval()
    eta = noise(x, EPS, torch.Generator().manual_seed(1))
    g, _ = attacks.input_gradient(net, x, y)
    h, _ = attacks.input_gradient(net, x + eta, y)
    g[0] = 0  # a sample with a zero gradient is left out
    value = baselines.misalignment(net, x, y, g, eta)
    want = 1 - F.cosine_similarity(g[1:].flatten(1), h[1:].flatten(1)).mean()
    assert value.item() == pytest.approx(want.item(), abs=1e-5)
    value.backward()
    assert sum(p.grad.abs().sum() for p in net.parameters() if p.grad is not None) > 0
    assert baselines.misalignment(net, x, y, torch.zeros_like(x), eta) == 0


def plain_pgd(net, x, y, eps, step, steps, restarts, noises):
    """Evaluation PGD as it is usually written: only correct samples move, the loss-maximal restart is kept. Also says
    which samples some restart broke."""
    worst, best = torch.full((len(x),), -1.0), torch.zeros_like(x)
    some = torch.zeros(len(x), dtype=torch.bool)
    for r in range(restarts):
        delta = torch.clamp(x + noises[r], 0, 1) - x
        for _ in range(steps):
            delta = delta.detach().requires_grad_(True)
            z = net(x + delta)
            right = z.argmax(1) == y
            (g,) = torch.autograd.grad(F.cross_entropy(z, y), delta)
            new = torch.clamp(x + torch.clamp(delta + step * g.sign(), -eps, eps), 0, 1) - x
            delta = torch.where(right[:, None, None, None], new, delta).detach()
        loss = F.cross_entropy(net(x + delta), y, reduction="none").detach()
        some |= net(x + delta).argmax(1) != y
        best[loss >= worst], worst = delta[loss >= worst], torch.maximum(loss, worst)
    return best, some


@pytest.mark.parametrize("restarts", [1, 3])
def test_pgd_with_restarts_equals_a_plain_implementation(restarts, monkeypatch):
    net = network().eval()
    x, _ = images(60, 3)
    y = net(x).argmax(1)
    y[:10] = (y[:10] + 1) % 4  # some are wrong from the start
    noises = [noise(x, EPS, torch.Generator().manual_seed(r)) for r in range(restarts)]
    queue = list(noises)
    monkeypatch.setattr(attacks, "uniform", lambda *_: queue.pop(0))
    delta, robust = attacks.strongest(net, x, y, EPS, EPS / 8, 6, restarts)
    want, broken = plain_pgd(net, x, y, EPS, EPS / 8, 6, restarts, noises)
    assert 10 < (~robust).sum() < len(x) and torch.equal(~robust, broken)
    assert torch.equal(net(x + delta).argmax(1) != y, broken)
    # The loss-maximal restart of a broken sample may be one that left it correct: ours is never the weaker attack.
    assert not ((net(x + want).argmax(1) != y) & robust).any()
    torch.testing.assert_close(delta[robust], want[robust], atol=1e-6, rtol=0)
    assert delta.abs().max() <= EPS + 1e-6 and (x + delta).min() >= 0 and (x + delta).max() <= 1


def test_more_restarts_never_help_the_network():
    net = network().eval()
    x, _ = images(80, 4)
    y = net(x).argmax(1)
    counts = []
    for restarts in (1, 2, 5):
        g = torch.Generator().manual_seed(0)
        counts.append(int(attacks.strongest(net, x, y, EPS / 4, EPS / 16, 3, restarts, g)[1].sum()))
    assert counts == sorted(counts, reverse=True)


class Backwards(TorchDispatchMode):
    """Counts convolution backwards, and those that computed a weight gradient."""

    def __init__(self):
        super().__init__()
        self.total = self.weights = self.forwards = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.total, self.weights = self.total + 1, self.weights + bool(args[-1][1])
        self.forwards += function is torch.ops.aten.convolution.default
        return function(*args, **(kwargs or {}))


def test_the_first_look_computes_no_weight_gradient():
    x, y = images(4)
    net = network()
    layers = sum(isinstance(m, nn.Conv2d) for m in net.modules())
    with Backwards() as seen:
        attacks.input_gradient(net, x, y)
    assert (seen.forwards, seen.total, seen.weights) == (layers, layers, 0)
    with Backwards() as seen:
        F.cross_entropy(net(x), y).backward()
    assert (seen.total, seen.weights) == (layers, layers)


PASSES = {"fgsm": 2, "pgd": 4, "zerograd": 2, "multigrad": 4, "gradalign": 3, "free": 1}


@pytest.mark.parametrize("method", PASSES)
def test_forward_passes_are_those_documented(method):
    x, y = images(4)
    net, s = network(), settings_of(method, attack_steps=3)
    layers = sum(isinstance(m, nn.Conv2d) for m in net.modules())
    with Backwards() as seen:
        p = baselines.perturb(s, net, x, y, noise, 1.0, torch.zeros_like(x))
        net(x + p.delta)
    assert seen.forwards == PASSES[method] * layers


def test_auto_attack_agrees_with_its_own_images():
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10)).eval()
    x, _ = images(20, 1)
    y = net(x).argmax(1)
    adversarial = attacks.auto_attack(net, x, y, EPS / 8, 20, 0, "apgd-ce")
    robust = net(adversarial).argmax(1) == y
    assert (adversarial - x).abs().max() <= EPS / 8 + 1e-6 and adversarial.min() >= 0 and adversarial.max() <= 1
    # A linear network breaks exactly where eps |w_j - w_y|_1 exceeds the margin; clamping to [0, 1] can only protect.
    w, z = net[1].weight, net(x)
    margin = z.gather(1, y[:, None]) - z
    reach = EPS / 8 * (w[:, None] - w[None]).abs().sum(2)[y]
    certain = (margin > reach).logical_or(F.one_hot(y, 10).bool()).all(1)
    assert robust[certain].all() and 0 < robust.sum() < 20


@pytest.mark.parametrize(
    "x", [torch.randn(2, 3, 8, 8), torch.full((2, 3, 8, 8), 1.1), torch.full((1, 1, 4, 4), float("nan"))]
)
def test_images_outside_the_unit_cube_are_refused(x):
    """Normalised images would be clamped into [0, 1]: moved by many eps, without a word."""
    y, net = torch.zeros(len(x), dtype=torch.long), nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    zero = torch.zeros_like(x)
    calls = (
        lambda: attacks.single_step(net, x, y, zero, EPS, EPS),
        lambda: attacks.pgd(net, x, y, zero, EPS, EPS, 2),
        lambda: attacks.fgsm(net, x, y, EPS),
        lambda: attacks.strongest(net, x, y, EPS, EPS / 4, 2),
        lambda: attacks.auto_attack(net, x, y, EPS, 2, 0),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\].*first layer"):
            call()


def test_auto_attack_of_few_classes_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()
    x, _ = images(6, 1)
    y = net(x).argmax(1)
    for version in ("standard", "plus", "apgd-ce,fab-t"):
        with pytest.raises(ValueError, match="9 other classes and this network has 4: use version='apgd-ce"):
            attacks.auto_attack(net, x, y, EPS, 6, 0, version)
    assert attacks.auto_attack(net, x, y, EPS, 6, 0, "apgd-ce,apgd-dlr").shape == x.shape
