"""Kernels, HSIC, its variance and power against references written from the definitions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hsic

torch.set_num_threads(1)


def matrices(seed: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(m, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    b = b + a * (seed % 3)
    return torch.exp(-(torch.cdist(a, a) ** 2) / 2), torch.exp(-(torch.cdist(b, b) ** 2) / 3)


def core(K, L, q) -> float:
    """The symmetric kernel of order 4 of the U-statistic."""
    out = 0.0
    for t, u, v, w in itertools.permutations(q):
        out += K[t, u] * (L[t, u] + L[v, w] - 2 * L[t, v])
    return out / 24


def brute(K, L) -> tuple[float, float]:
    """(U-statistic, variance estimate 16/m (R - HSIC^2)) by all tuples."""
    m = len(K)
    value = np.mean([core(K, L, q) for q in itertools.combinations(range(m), 4)])
    each = []
    for i in range(m):
        rest = [j for j in range(m) if j != i]
        each.append(np.mean([core(K, L, (i, *q)) for q in itertools.combinations(rest, 3)]))
    r = np.mean(np.square(each))
    return value, 16 / m * (r - value**2)


@pytest.mark.parametrize("m", [4, 5, 7])
@pytest.mark.parametrize("seed", [0, 1])
def test_unbiased_and_variance_equal_the_definition(seed, m):
    K, L = matrices(seed, m)
    value, variance = brute(K.numpy(), L.numpy())
    ours = hsic.with_variance(K[None], L[None])
    assert hsic.unbiased(K[None], L[None]).item() == pytest.approx(value, rel=1e-10, abs=1e-14)
    assert ours[0].item() == pytest.approx(value, rel=1e-10, abs=1e-14)
    assert ours[1].item() == pytest.approx(variance, rel=1e-9, abs=1e-13)


def test_unbiased_equals_a_library():
    from ignite.metrics import HSIC

    rng = torch.Generator().manual_seed(3)
    a, b = (torch.randn(20, 4, generator=rng) for _ in range(2))
    oracle = HSIC(sigma_x=1.3, sigma_y=0.7)
    oracle.update((a, b + a))
    K, L = (torch.exp(-(torch.cdist(x, x) ** 2) / (2 * s**2)) for x, s in ((a, 1.3), (b + a, 0.7)))
    assert hsic.unbiased(K, L).item() == pytest.approx(oracle.compute(), abs=1e-6)


def test_biased_is_the_centred_trace():
    K, L = matrices(2, 9)
    H = torch.eye(9, dtype=torch.float64) - 1 / 9
    assert hsic.biased(K, L).item() == pytest.approx(((K @ H @ L @ H).trace() / 81).item(), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 9), st.integers(0, 5), st.floats(-3, 3))
def test_padding_constants_and_order_do_not_matter(seed, m, more, constant):
    K, L = matrices(seed, m)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    big = [torch.full((m + more, m + more), 7.0, dtype=torch.float64) for _ in range(2)]
    for target, source in zip(big, (K, L + constant), strict=True):
        target[:m, :m] = source[order][:, order]
    mask = torch.arange(m + more) < m
    one, two = hsic.with_variance(K, L), hsic.with_variance(*big, mask)
    assert torch.allclose(one[0], two[0], atol=1e-10) and torch.allclose(one[1], two[1], atol=1e-9)
    assert torch.allclose(hsic.unbiased(*big, mask), one[0], atol=1e-10)
    assert torch.allclose(hsic.biased(*big, mask), hsic.biased(K, L), atol=1e-10)


def test_variance_is_that_of_simulation():
    """Over many samples of dependent data the mean estimate is near the variance of HSIC_u; the power rises with m."""
    rng = torch.Generator().manual_seed(0)
    m, n = 60, 600
    x = torch.randn(n, m, 1, generator=rng, dtype=torch.float64)
    y = x + torch.randn(n, m, 1, generator=rng, dtype=torch.float64)
    K, L = (torch.exp(-(torch.cdist(a, a) ** 2) / 2) for a in (x, y))
    value, variance = hsic.with_variance(K, L)
    assert variance.mean().item() == pytest.approx(value.var().item(), rel=0.15)
    # Power of the test at threshold 0 by the normal law against the share of samples with HSIC_u > its 5 % quantile
    z = (value.mean() / variance.mean().sqrt()).item()
    below = (value > value.mean() * (1 - 1.0 / z)).double().mean().item()
    assert below == pytest.approx(0.5 * (1 + math.erf(1 / math.sqrt(2))), abs=0.04)
    few, many = (hsic.power(*hsic.with_variance(K[:, :k, :k], L[:, :k, :k])).mean() for k in (20, 60))
    assert many > few


def test_negative_variance_gives_a_number():
    v = torch.tensor([-1.0, -1e-9, 0.0, 1.0])
    assert hsic.power(torch.ones(4), v, 0.25).tolist() == pytest.approx([2, 2, 2, 1 / 1.25**0.5])  # it counts as 0


def unit_rows(seed: int, m: int, d: int = 4) -> torch.Tensor:
    x = torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1)


def reference(kind: str, a: torch.Tensor, s: float) -> torch.Tensor:
    out = torch.zeros(len(a), len(a), dtype=torch.float64)
    d = [[float(((x - y) ** 2).sum()) for y in a] for x in a]
    found = sorted(v for row in d for v in row if v > 1e-6)
    median = found[(len(found) - 1) // 2] if found else 0.0
    norm = float((a**2).sum())
    for i, j in itertools.product(range(len(a)), repeat=2):
        if kind == "rbf":
            out[i, j] = math.exp(-d[i][j] / (2 * max(s * median, 1e-12)))
        elif kind == "imq":
            out[i, j] = s / math.sqrt(s * s + d[i][j])
        else:
            out[i, j] = float(a[i] @ a[j]) / (norm if kind == "linear" else 1)
    return out


@pytest.mark.parametrize("kind", hsic.KERNELS)
@pytest.mark.parametrize("m", [4, 5, 8])
def test_kernels_equal_loops(kind, m):
    a, s = unit_rows(m, m), 0.25
    K = hsic.kernel(kind, (a @ a.T)[None], torch.tensor([s]), torch.ones(1, m, dtype=torch.bool))[0]
    assert torch.allclose(K, reference(kind, a, s), atol=1e-9)


@pytest.mark.parametrize("kind", hsic.KERNELS)
def test_label_kernel_in_closed_form(kind):
    """HSIC with the kernel of one-hot rows is the gain times HSIC with Delta."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    onehot, K = torch.nn.functional.one_hot(labels).double(), matrices(1, 7)[0]
    for s in (0.001, 0.2, 1.0, 10.0):
        gain = hsic.label_gain(kind, torch.tensor(s, dtype=torch.float64), torch.tensor(7.0, dtype=torch.float64))
        whole = hsic.with_variance(K, reference(kind, onehot, s))
        short = hsic.with_variance(K, hsic.same_class(labels).double())
        assert whole[0].item() == pytest.approx((gain * short[0]).item(), rel=1e-9, abs=1e-15)
        assert whole[1].item() == pytest.approx((gain**2 * short[1]).item(), rel=1e-7, abs=1e-15)


def test_median_leaves_duplicates_and_padding_out():
    a = unit_rows(0, 6)
    a = torch.cat([a, a[:2], torch.zeros(3, 4, dtype=torch.float64)])
    mask = torch.arange(11) < 8
    d = hsic.squared_distances(a @ a.T)
    found = sorted(float(((x - y) ** 2).sum()) for x, y in itertools.permutations(a[:8], 2))
    found = [v for v in found if v > 1e-6]
    assert hsic.median_distance(d[None], mask[None]).item() == pytest.approx(found[(len(found) - 1) // 2], rel=1e-9)
    same = hsic.squared_distances(torch.ones(1, 5, 5))
    assert hsic.median_distance(same, torch.ones(1, 5, dtype=torch.bool)).item() == 1  # one point: any width
    assert hsic.median_distance(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool)).tolist() == [1, 1]
    close = unit_rows(0, 1).float().repeat(6, 1)
    close[1:] += 1e-5 * unit_rows(1, 5).float()
    d = hsic.squared_distances(close @ close.T)
    assert d.max() <= hsic.SAME and (d >= 0).all()  # rounding is no distance
    assert hsic.median_distance(d[None], torch.ones(1, 6, dtype=torch.bool)).item() == 1
    noise = torch.tensor([[[1.0, 1.0000001], [1.0000001, 1.0]]])
    assert (hsic.squared_distances(noise) == 0).all()


def test_padding_does_not_change_a_kernel():
    a = unit_rows(2, 5)
    padded = torch.cat([a, torch.zeros(4, 4, dtype=torch.float64)])
    mask = torch.arange(9) < 5
    for kind in hsic.KERNELS:
        K = hsic.kernel(kind, (padded @ padded.T)[None], torch.tensor([0.25]), mask[None])[0, :5, :5]
        assert torch.allclose(K, reference(kind, a, 0.25), atol=1e-9), kind


def test_gradients_by_finite_differences():
    m = 6
    mask, scale = torch.ones(1, m, dtype=torch.bool), torch.tensor([0.5], dtype=torch.float64)
    delta = hsic.same_class(torch.tensor([[0, 0, 1, 1, 2, 2]])).double()
    a = unit_rows(5, m)[None].requires_grad_()
    for measure in (hsic.unbiased, hsic.biased):
        for kind in ("imq", "cosine", "linear"):
            assert torch.autograd.gradcheck(
                lambda x, f=measure, k=kind: f(hsic.kernel(k, x @ x.transpose(1, 2), scale, mask), delta, mask), a
            )


@pytest.mark.parametrize("m", [4, 5, 6])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_power_without_a_spread_is_none(m, eps):
    """Few images and eps 0: the variance is 0 or below. No infinity, no NaN, and its gradient is finite too."""
    for seed in range(20):
        x = torch.rand(1, m, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
        K = hsic.kernel("rbf", hsic.gram(x), torch.ones(1), torch.ones(1, m, dtype=torch.bool))
        L = hsic.same_class(torch.arange(m)[None] % 2).double()
        found = hsic.power(*hsic.with_variance(K, L), eps)
        found.sum().backward()
        assert torch.isfinite(found).all() and torch.isfinite(x.grad).all()
    assert hsic.power(torch.tensor([3.0, -3.0]), torch.tensor([0.0, -1.0]), 0.0).tolist() == [0, 0]
