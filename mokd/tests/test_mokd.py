"""The method: bandwidth search, objective, closed gradient, adaptation; degenerate tasks; batches equal one task."""

import itertools

import pytest
import torch

import bench
import heads
import hsic
import mokd
from gradient import Gradient

torch.set_num_threads(1)


def tasks(seed: int, sizes=(12, 9, 20), d: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded non-negative features and labels."""
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.zeros(len(sizes), max(sizes), d), torch.full((len(sizes), max(sizes)), -1)
    for i, m in enumerate(sizes):
        y[i, :m] = torch.arange(m) % 3
        centres = torch.randn(3, d, generator=rng)
        x[i, :m] = (centres[y[i, :m]] + 0.7 * torch.randn(m, d, generator=rng)).relu() + 0.01
    return x, y


def literal(x: torch.Tensor, y: torch.Tensor, o: mokd.Options) -> tuple[torch.Tensor, float, float]:
    """The algorithm for one task, step by step, in float64."""
    x, onehot = x.double(), torch.nn.functional.one_hot(y).double()

    def gram(a, s):
        a = a / a.norm(dim=1, keepdim=True).clamp(min=1e-12)
        d = ((a[:, None] - a[None]) ** 2).sum(-1)
        if o.kernel == "imq":
            return s / (s * s + d).sqrt()
        found = d.detach().flatten()
        found = found[found > 1e-6].sort().values
        return torch.exp(-d / (2 * max(s * found[(len(found) - 1) // 2].item(), 1e-12)))

    def power(K, L):
        value, variance = hsic.with_variance(K, L)
        return (value / (variance.clamp(min=0) + o.eps).sqrt()).item()

    best, highest = 1.0, 0.0
    if o.bandwidth == "grid":
        for s in mokd.GRID:
            j = power(gram(x, s), gram(onehot, s))
            if j > highest:
                best, highest = s, j
    other, highest_zz = best, 0.0
    if o.zz == "searched":
        other = 1.0
        for s in mokd.GRID:
            j = power(gram(x, s), gram(x, s))
            if j > highest_zz:
                other, highest_zz = s, j
    theta = torch.eye(x.shape[1], dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adadelta([theta], lr=o.lr, weight_decay=o.weight_decay)
    measure = hsic.unbiased if o.estimator == "unbiased" else hsic.biased
    for _ in range(o.steps):
        z = x @ theta.T
        loss = -measure(gram(z, best), gram(onehot, best)) + o.gamma * measure(gram(z, other), gram(z, other))
        optimizer.zero_grad()
        (len(x) * loss).backward()
        optimizer.step()
    return theta.detach(), best, other


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gamma": 3.0, "lr": 1.0, "weight_decay": 0.25},
        {"gamma": 0.0},
        {"bandwidth": "none"},
        {"kernel": "imq"},
        {"zz": "searched"},
        {"estimator": "biased"},
    ],
)
def test_adaptation_equals_the_algorithm(more):
    x, y = tasks(0)
    o = mokd.Options(steps=8, **more)
    found = mokd.solve(x, y, o)
    for i, m in enumerate((12, 9, 20)):
        theta, best, other = literal(x[i, :m], y[i, :m], o)
        assert found.scale[i].item() == pytest.approx(best, rel=1e-6)
        assert found.scale_zz[i].item() == pytest.approx(other, rel=1e-6)
        assert (found.theta[i].double() - theta).norm() < 2e-4 * theta.norm(), i


def test_batched_equals_single():
    x, y = tasks(1)
    together = mokd.solve(x, y, mokd.Options(steps=20))
    for i, m in enumerate((12, 9, 20)):
        alone = mokd.solve(x[i : i + 1, :m], y[i : i + 1, :m], mokd.Options(steps=20))
        assert torch.allclose(alone.theta[0], together.theta[i], atol=2e-5)
        assert alone.scale[0] == together.scale[i]


@pytest.mark.parametrize("gamma", [0.0, 1.0, 3.0])
def test_closed_gradient_is_that_of_autograd(gamma):
    x, y = tasks(2)
    x[:, 1:5] = x[:, :1]  # the same picture several times
    mask, delta = y >= 0, hsic.same_class(y).double()
    scale, o = torch.tensor([0.01, 0.5, 2.0], dtype=torch.float64), mokd.Options(gamma=gamma)
    z = hsic.unit(x.double()).requires_grad_()
    mokd.objective(z, delta, mask, scale, scale, o).sum().backward()
    ours, row = Gradient(delta, mask, scale, gamma)(z.detach()), z.detach()
    ours = ours - (ours * row).sum(-1, keepdim=True) * row  # the objective makes unit rows of z itself
    assert torch.allclose(ours, z.grad, atol=1e-12) and z.grad.abs().max() > 1e-4


def test_closed_gradient_is_finite_where_rounding_lifts_a_cosine_above_one():
    y = torch.arange(8)[None] % 2
    above = 0
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        z = hsic.unit(torch.rand(1, 1, 5, generator=rng) + 2e-3 * torch.rand(1, 8, 5, generator=rng))
        z[0, 1] = z[0, 0]
        g = z @ z.transpose(1, 2)
        above += int((g.masked_fill(torch.eye(8, dtype=torch.bool), 0) > 1).any())
        found = Gradient(hsic.same_class(y), y >= 0, torch.tensor([0.001]), 1.0)(z)
        assert torch.isfinite(found).all() and found.abs().max() > 0
    assert above > 3


def test_objective_is_m_times_the_difference():
    x, y = tasks(3, sizes=(8,))
    mask, delta, one = y >= 0, hsic.same_class(y), torch.ones(1)
    z = hsic.unit(x)
    K = hsic.kernel("rbf", z @ z.transpose(1, 2), one, mask)
    L = torch.where(delta > 0, 1.0, torch.exp(torch.tensor(-0.5)))
    expected = 8 * (2.0 * hsic.unbiased(K, K) - hsic.unbiased(K, L))
    found = mokd.objective(x, delta, mask, one, one, mokd.Options(gamma=2.0))
    assert torch.allclose(found, expected, atol=1e-6)


def test_one_image_a_class_is_degenerate():
    """5-way 1-shot: HSIC(Z,Y) is 0, so with gamma 0 nothing moves but by weight decay, and NCC says the same."""
    x = torch.rand(2, 5, 6) + 0.1
    y = torch.arange(5).repeat(2, 1)
    found = mokd.solve(x, y, mokd.Options(gamma=0.0, weight_decay=0.25))
    assert found.degenerate.all()
    t = heads.Tasks(x, y, torch.rand(2, 30, 6), torch.zeros(2, 30, dtype=torch.long))
    assert torch.equal(heads.ncc(t).argmax(-1), heads.ncc(t, found.theta).argmax(-1))
    still = mokd.solve(x, y, mokd.Options(gamma=0.0)).theta
    assert torch.allclose(still, torch.eye(6).expand(2, 6, 6), atol=1e-3)
    assert not mokd.solve(*tasks(4), mokd.Options(steps=1)).degenerate.any()


def test_search_takes_the_first_best_and_one_where_nothing_is_positive():
    x, y = tasks(5)
    delta, mask, o = hsic.same_class(y), y >= 0, mokd.Options()
    best, highest, _ = mokd.best_scale(x, delta, mask, o)
    g = hsic.gram(x.double())
    table = torch.stack(
        [mokd.powers(g, delta.double(), mask, torch.full((3,), s).double(), o, False)[0] for s in mokd.GRID]
    )
    assert best.tolist() == [mokd.GRID[int(table[:, i].argmax())] for i in range(3)]
    assert torch.allclose(highest, table.max(0).values)
    rng = torch.Generator().manual_seed(0)
    negative = 0
    for _ in range(60):  # labels without relation to the features: at times no scale has positive power
        x, y = torch.rand(1, 6, 4, generator=rng), torch.randint(0, 3, (1, 6), generator=rng)
        best, highest, _ = mokd.best_scale(x, hsic.same_class(y), y >= 0, o)
        if highest.item() == 0:
            negative += 1
            assert best.item() == 1.0
    assert negative


def test_gradient_search_is_at_least_as_good_as_the_grid():
    x, y = tasks(6)
    delta, mask = hsic.same_class(y), y >= 0
    grid, climbed = (mokd.best_scale(x, delta, mask, mokd.Options(bandwidth=k)) for k in ("grid", "gradient"))
    assert (climbed[1] >= grid[1]).all() and (climbed[1] > grid[1]).any()
    again = mokd.powers(hsic.gram(x.double()), delta.double(), mask, climbed[0], mokd.Options(), False)[0]
    assert torch.allclose(again, climbed[1])


def test_identical_and_negative_variance_tasks_give_numbers():
    x, y = torch.ones(1, 8, 4), torch.arange(8)[None] % 2
    for kernel, gamma in itertools.product(hsic.KERNELS, (0.0, 1.0)):
        found = mokd.solve(x, y, mokd.Options(kernel=kernel, gamma=gamma, steps=3))
        assert torch.isfinite(found.theta).all() and torch.isfinite(found.power).all()
    for apart in (0, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2):  # all images alike, up to rounding and a little more
        near = torch.rand(4, generator=torch.Generator().manual_seed(3)) + apart * torch.rand(
            1, 8, 4, generator=torch.Generator().manual_seed(4)
        )
        for zz, kernel in itertools.product(("shared", "searched"), ("rbf", "imq")):
            found = mokd.solve(near, y, mokd.Options(lr=1.0, weight_decay=0.25, zz=zz, kernel=kernel))
            assert torch.isfinite(found.theta).all(), (apart, zz, kernel)
            still = mokd.solve(near, y, mokd.Options(lr=1.0, zz=zz, kernel=kernel)).theta[0]
            assert apart > 1e-5 or kernel == "imq" or (still - torch.eye(4)).norm() < 1e-3  # rounding teaches nothing
    rng, count = torch.Generator().manual_seed(1), 0
    for _ in range(40):
        x, y = torch.rand(1, 5, 3, generator=rng), torch.randint(0, 2, (1, 5), generator=rng)
        _, power, negative = mokd.best_scale(x, hsic.same_class(y), y >= 0, mokd.Options())
        count += int(negative)
        assert torch.isfinite(power).all()
    assert count > 0


def test_images_without_features_are_as_far_as_the_estimator_says():
    """A blank picture has features 0 and no direction: distance 1 to unit rows, 0 to another blank one."""
    x, y = tasks(8)
    x[0, 3] = x[0, 7] = x[2, 0] = 0
    found = mokd.solve(x, y, mokd.Options(steps=8))
    for i, m in enumerate((12, 9, 20)):
        theta, best, _ = literal(x[i, :m], y[i, :m], mokd.Options(steps=8))
        assert found.scale[i].item() == pytest.approx(best, rel=1e-6)
        assert (found.theta[i].double() - theta).norm() < 2e-4 * theta.norm(), i


def test_the_bandwidth_is_searched_once_and_on_the_features_as_they_come(monkeypatch):
    x, y = tasks(9)
    seen, search = [], mokd.best_scale
    monkeypatch.setattr(mokd, "best_scale", lambda *a, **k: (seen.append(a[0].clone()), search(*a, **k))[1])
    mokd.solve(x, y, mokd.Options(steps=5))
    assert len(seen) == 1 and torch.equal(seen[0], x)
    mokd.solve(x, y, mokd.Options(steps=5, zz="searched"))
    assert len(seen) == 3


def test_the_search_does_not_suffer_from_float32():
    """Powers in the search are those of float64 features, whatever the type of what comes in."""
    x, y = tasks(10)
    delta, mask, o = hsic.same_class(y), y >= 0, mokd.Options()
    single, double = (mokd.best_scale(v, delta, mask, o)[1] for v in (x, x.double()))
    assert single.dtype == torch.float64 and torch.equal(single, double)


def test_defaults_are_the_published_ones():
    o = mokd.Options()
    assert (o.steps, o.kernel, o.estimator, o.bandwidth, o.zz, o.eps) == (40, "rbf", "unbiased", "grid", "shared", 1e-5)
    grid = "0.001, 0.01, 0.1, 0.2, 0.25, 0.5, 0.75, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 5.0, 10.0"
    assert mokd.GRID == tuple(map(float, grid.split(", ")))


def test_ties_in_the_search_keep_the_smaller_scale(monkeypatch):
    x, y = tasks(11)
    monkeypatch.setattr(mokd, "powers", lambda g, *a: (torch.full((len(g),), 2.0), torch.full((len(g),), -1.0)))
    best, highest, negative = mokd.best_scale(x, hsic.same_class(y), y >= 0, mokd.Options())
    assert best.tolist() == [0.001] * 3 and highest.tolist() == [2.0] * 3 and negative.tolist() == [15] * 3


def test_too_small_a_task_is_refused():
    with pytest.raises(ValueError, match="at least 4"):
        mokd.solve(torch.rand(1, 3, 2), torch.tensor([[0, 1, 2]]), mokd.Options())


def test_the_plain_implementation_of_the_bench_is_the_same():
    x, y = tasks(7, sizes=(14,))
    o = mokd.Options(steps=10)
    found = mokd.solve(x, y, o)
    plain = bench.plain_mokd(x[0], y[0], found.scale[0].item(), o)
    assert torch.allclose(found.theta[0], plain, atol=1e-4)


@pytest.mark.parametrize("sizes", [(5,), (6,)])
def test_few_images_and_no_eps_end_in_numbers(sizes):
    """Where no power is defined no scale is chosen: it stays 1."""
    x, y = tasks(9, sizes=sizes)
    found = mokd.solve(x, y, mokd.Options(eps=0.0, steps=3))
    assert torch.isfinite(found.power).all() and torch.isfinite(found.theta).all()
    same = torch.ones(1, sizes[0], 3)
    scale, power, _ = mokd.best_scale(same, hsic.same_class(y), y >= 0, mokd.Options(eps=0.0))
    assert scale.tolist() == [1] and power.tolist() == [0]


def support(ways: int = 3, shots: int = 6, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(ways).repeat(shots) * 7 + 2  # any whole numbers
    return torch.randn(ways, width, generator=rng)[(labels - 2) // 7] + 0.5 * torch.randn(
        len(labels), width, generator=rng
    ), labels


def test_a_head_for_ones_own_features():
    """`adapt` is `solve` for one task and the nearest centroid after it; it works where gradients are off."""
    x, y = support()
    with torch.no_grad():
        head = mokd.adapt(x, y, mokd.Options(steps=10))
    theta = mokd.solve(x[None], ((y - 2) // 7)[None], mokd.Options(steps=10)).theta[0]
    assert torch.equal(head.theta, theta) and head.classes.tolist() == [2, 9, 16]
    z = x @ theta.T
    means = torch.stack([z[y == c].mean(0) for c in head.classes])
    cosines = torch.nn.functional.cosine_similarity(z[:, None], means[None], dim=-1)
    assert torch.allclose(head(x), cosines, atol=1e-5)
    assert (head.predict(x) == y).float().mean() > 0.8 and set(head.predict(x).tolist()) <= {2, 9, 16}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda x, y: (x, y * 0), "at least 2 classes"),
        (lambda x, y: (x[:3], y[:3]), "at least 4"),
        (lambda x, y: (x[:1], y[:1]), "at least 2 classes"),
        (lambda x, y: (x, y[:-1]), "labels"),
        (lambda x, y: (x, y.float()), "labels"),
        (lambda x, y: (x[None], y), "features"),
        (lambda x, y: (x.index_fill(0, torch.tensor(0), float("nan")), y), "not finite"),
    ],
)
def test_what_is_no_support_set_is_refused(change, word):
    with pytest.raises(ValueError, match=word):
        mokd.adapt(*change(*support()))


def test_one_picture_a_class_is_said():
    x, _ = support()
    with pytest.warns(UserWarning, match="teach nothing"):
        mokd.adapt(x[:5], torch.arange(5))
