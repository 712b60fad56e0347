"""The contribution against a reference written sample by sample from the formulas, in float64."""

import csv
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import aaer

TERMS = ("constant", "differentiable")


def cross_entropy(z: list[float], y: int) -> float:
    top = max(z)
    return math.log(sum(math.exp(v - top) for v in z)) + top - z[y]


def softmax(z: list[float]) -> list[float]:
    top = max(z)
    e = [math.exp(v - top) for v in z]
    return [v / sum(e) for v in e]


def reference(z0, z1, y, l1, l2, l3, term):
    """(R, dR/dz1, n_a, n_n, E_A, V_A, V_N) by loops over samples and classes."""
    b, k = len(z0), len(z0[0])
    a = [i for i in range(b) if cross_entropy(z0[i], y[i]) > cross_entropy(z1[i], y[i])]
    n = [i for i in range(b) if i not in a]
    grad = [[0.0] * k for _ in range(b)]
    e_a = sum(cross_entropy(z0[i], y[i]) - cross_entropy(z1[i], y[i]) for i in a) / len(a) if a else 0.0
    distance = [sum((p - q) ** 2 for p, q in zip(z0[i], z1[i], strict=True)) for i in range(b)]
    v_a = sum(distance[i] for i in a) / len(a) if a else 0.0
    v_n = sum(distance[i] for i in n) / len(n) if n else 0.0
    if not a or not n:
        return 0.0, grad, len(a), len(n), e_a, v_a, v_n
    for i in a:
        p = softmax(z1[i])
        for c in range(k):
            if v_a > v_n:
                grad[i][c] += l1 * len(a) / b * l3 * 2 * (z1[i][c] - z0[i][c]) / len(a)
            if term == "differentiable":
                grad[i][c] -= l1 * len(a) / b * l2 * (p[c] - (c == y[i])) / len(a)
    return l1 * len(a) / b * (l2 * e_a + l3 * max(v_a - v_n, 0.0)), grad, len(a), len(n), e_a, v_a, v_n


def batch(b, k, seed, gap=1.0):
    g = torch.Generator().manual_seed(seed)
    z0 = 2 * torch.randn(b, k, generator=g, dtype=torch.float64)
    z1 = z0 + gap * torch.randn(b, k, generator=g, dtype=torch.float64)
    return z0, z1, torch.randint(k, (b,), generator=g)


def of_group(kind, b, k, seed):
    """A batch in which no, every, or a mixed set of examples is abnormal, or all are ties."""
    z0, z1, y = batch(b, k, seed)
    c0, c1 = (F.cross_entropy(z, y, reduction="none") for z in (z0, z1))
    swap = {"none": c0 > c1, "all": c0 < c1}.get(kind)
    if swap is not None:
        z0, z1 = torch.where(swap[:, None], z1, z0), torch.where(swap[:, None], z0, z1)
    return z0, (z0.clone() if kind == "ties" else z1), y


def ours(z0, z1, y, l1, l2, l3, term):
    z1 = z1.clone().requires_grad_(True)
    v = aaer.variation(z0, z1, y, term)
    r = aaer.regulariser(v, l1, l2, l3)
    r.backward() if r.requires_grad else None
    return r.item(), torch.zeros_like(z1) if z1.grad is None else z1.grad, v


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("kind", ["mixed", "none", "all", "ties"])
@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(1, 9),
    k=st.integers(2, 6),
    seed=st.integers(0, 10**6),
    weights=st.tuples(*[st.floats(0, 10)] * 3),
)
def test_value_and_gradient_equal_the_reference(kind, term, b, k, seed, weights):
    z0, z1, y = of_group(kind, b, k, seed)
    r, grad, v = ours(z0, z1, y, *weights, term)
    want, want_grad, n_a, n_n, e_a, v_a, v_n = reference(z0.tolist(), z1.tolist(), y.tolist(), *weights, term)
    assert (int(v.n_a), int(v.n_n)) == (n_a, n_n)
    assert [v.e_a.item(), v.v_a.item(), v.v_n.item()] == pytest.approx([e_a, v_a, v_n], rel=1e-9, abs=1e-12)
    assert r == pytest.approx(want, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(grad, torch.tensor(want_grad, dtype=torch.float64), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("term", ["full", "count", "difference", "pull"])
@pytest.mark.parametrize("kind", ["mixed", "none", "all"])
def test_terms_leave_out_one_part_each(term, kind):
    """Against the formula with that part left out, by loops; the gradient by finite differences of it."""
    for seed in range(8):
        z0, z1, y = of_group(kind, 7, 4, seed)
        *_, n_a, n_n, e_a, v_a, v_n = reference(z0.tolist(), z1.tolist(), y.tolist(), 1.0, 0.0, 0.0, "constant")
        share = 1.0 if term == "difference" else n_a / 7
        inner = {"full": max(v_a - v_n, 0), "difference": max(v_a - v_n, 0), "pull": v_a, "count": 1.0}[term]
        want = 0.7 * share * (0.3 * e_a + 2.0 * inner) if n_a and n_n else 0.0
        z1.requires_grad_(True)
        r = aaer.regulariser(aaer.variation(z0, z1, y), 0.7, 0.3, 2.0, term)
        assert r.item() == pytest.approx(want, rel=1e-9, abs=1e-12)
        (grad,) = torch.autograd.grad(r, z1) if r.requires_grad else (torch.zeros_like(z1),)
        pulls = bool(n_a and n_n) and term != "count" and (term == "pull" or v_a > v_n)
        scale = 0.7 * share * 2.0 / max(n_a, 1) if pulls else 0.0
        gone = aaer.fell(z0, z1, y)[:, None]
        torch.testing.assert_close(grad, torch.where(gone, scale * 2 * (z1 - z0), 0.0).detach(), rtol=1e-8, atol=1e-12)


def test_another_group_takes_the_place_of_the_abnormal():
    z0, z1, y = batch(9, 4, 3)
    others = torch.arange(9) % 3 == 0
    v = aaer.variation(z0, z1, y, group=others)
    distance = (z0 - z1).square().sum(1)
    assert v.n_a == 3 and v.v_a.item() == pytest.approx(distance[others].mean().item())
    assert v.v_n.item() == pytest.approx(distance[~others].mean().item())
    own = aaer.variation(z0, z1, y, group=aaer.fell(z0, z1, y))
    assert torch.equal(own.v_a, aaer.variation(z0, z1, y).v_a)


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5), (3,)), ((3, 4), (3, 4), (2,)), ((12,), (12,), (3,))])
def test_logits_that_do_not_fit_are_refused(shapes):
    z0, z1, y = (torch.zeros(s) for s in shapes)
    with pytest.raises(ValueError, match=r"logits \[B, K\] of the two looks"):
        aaer.variation(z0, z1, y.long())


def test_the_reference_sees_every_branch():
    """Otherwise the test above could pass without having tried the branch with V_A > V_N."""
    cases = [reference(*(t.tolist() for t in batch(8, 4, s)), 1.0, 2.0, 3.0, "constant") for s in range(30)]
    assert {c[5] > c[6] for c in cases if c[2] and c[3]} == {True, False}


@pytest.mark.parametrize("term", TERMS)
def test_gradient_by_finite_differences(term):
    """Of the function whose held-constant parts are held: E_A only under `differentiable`, V_N never."""
    z0, z1, y = next(b for s in range(50) if (v := aaer.variation(*(b := batch(10, 5, s)))).v_a > v.v_n > 0)
    held = aaer.variation(z0, z1, y)

    def free(z):
        v = aaer.variation(z0, z, y, term)
        v.v_n = held.v_n
        if term == "constant":
            v.e_a = held.e_a
        return aaer.regulariser(v, 1.0, 2.5, 1.5)

    assert torch.autograd.gradcheck(free, (z1.requires_grad_(True),), eps=1e-7, atol=1e-6)


def test_lambda2_moves_the_loss_and_not_the_gradient():
    z0, z1, y = batch(12, 10, 3)
    (r0, g0, _), (r1, g1, _) = (ours(z0, z1, y, 1.0, l2, 1.5, "constant") for l2 in (0.0, 7.0))
    assert r1 > r0 and torch.equal(g0, g1)
    assert not torch.equal(g0, ours(z0, z1, y, 1.0, 7.0, 1.5, "differentiable")[1])


def test_normal_logits_and_the_first_look_are_never_pulled():
    z0, z1, y = batch(16, 10, 0)
    z0, z1 = z0.requires_grad_(True), z1.requires_grad_(True)
    v = aaer.variation(z0, z1, y)
    (v.v_a + 0 * v.v_n).backward()
    normal = F.cross_entropy(z0, y, reduction="none") <= F.cross_entropy(z1, y, reduction="none")
    assert z0.grad is None and not v.v_n.requires_grad and not v.e_a.requires_grad
    assert z1.grad[normal].abs().max() == 0 and z1.grad[~normal].abs().min() > 0


def test_squared_distance_is_summed_over_classes():
    z0, z1, y = batch(32, 10, 1)
    a = F.cross_entropy(z0, y, reduction="none") > F.cross_entropy(z1, y, reduction="none")
    assert aaer.variation(z0, z1, y).v_a.item() == pytest.approx(10 * F.mse_loss(z0[a], z1[a]).item())


def test_low_precision_logits_are_compared_in_float32():
    z0, z1, y = (t.bfloat16() if t.is_floating_point() else t for t in batch(64, 10, 2))
    v = aaer.variation(z0, z1, y)
    w = aaer.variation(z0.float(), z1.float(), y)
    assert v.v_a.dtype == torch.float32 and v.n_a == w.n_a and v.v_a == w.v_a


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_two_processes_give_value_and_gradient_of_one(cut):
    """`reduce` is played by hand: each part sees the sums of both, and gradients are averaged."""
    z0, z1, y = batch(12, 5, 8)
    whole = z1.clone().requires_grad_(True)
    one = aaer.variation(z0, whole, y, "differentiable")
    aaer.regulariser(one, 1.0, 2.0, 3.0).backward()
    halves, parts = (slice(0, cut), slice(cut, 12)), []
    for s in halves:  # first round: what every process would send
        aaer.variation(z0[s], z1[s], y[s], "differentiable", lambda v: parts.append(v) or v, 2)
    leaf = z1.clone().requires_grad_(True)
    total = 0
    for s in halves:
        v = aaer.variation(z0[s], leaf[s], y[s], "differentiable", lambda v: sum(parts), 2)
        r = aaer.regulariser(v, 1.0, 2.0, 3.0)
        assert r.item() == pytest.approx(aaer.regulariser(one, 1.0, 2.0, 3.0).item())
        total = total + r / 2
    total.backward()
    torch.testing.assert_close(leaf.grad, whole.grad)


@settings(max_examples=50, deadline=None)
@given(b=st.integers(2, 12), seed=st.integers(0, 10**6))
def test_order_of_samples_does_not_matter_and_r_is_never_negative(b, seed):
    z0, z1, y = batch(b, 5, seed)
    p = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    r = aaer.regulariser(aaer.variation(z0, z1, y), 1.0, 2.0, 3.0)
    q = aaer.regulariser(aaer.variation(z0[p], z1[p], y[p]), 1.0, 2.0, 3.0)
    assert r >= 0 and r.item() == pytest.approx(q.item())


def test_published_lambdas_and_the_fallback():
    assert aaer.lambdas("cifar10", "rs", 8 / 255) == (1.0, 2.5, 1.5, True)
    assert aaer.lambdas("cifar100", "n", 16 / 255) == (1.0, 6.0, 0.5, True)
    assert aaer.lambdas("cifar10", "rs", 10 / 255) == (1.0, 2.5, 1.5, False)  # nearest, the smaller of a tie
    assert aaer.lambdas("svhn", "n", 12 / 255) == (1.0, 5.0, 0.55, False)
    assert aaer.lambdas("cifar10", "v", 16 / 255) == (1.0, 7.0, 3.25, False)
    assert len(aaer.PUBLISHED) == 4 and all(sorted(t) == [8, 12, 16, 32] for t in aaer.PUBLISHED.values())


def test_published_lambdas_are_those_of_the_printed_table():
    with open(Path(aaer.__file__).with_name("paper.csv"), newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["table"] == "released-settings"]
    found = {}
    for r in rows:
        key = (
            r["dataset"].lower().replace("-", ""),
            r["method"].split("-")[0].lower(),
            int(r["setting"][4:].split("/")[0]),
        )
        found.setdefault(key, {})[r["metric"]] = float(r["value"])
    assert len(found) == 16
    for (dataset, start, radius), want in found.items():
        lambdas = (want["lambda1"], want["lambda2"], want["lambda3"], True)
        assert aaer.lambdas(dataset, start, radius / 255) == lambdas
        assert aaer.GEOMETRY[start].step == want["alpha"]


def test_geometry_of_the_starts():
    rs, n = aaer.GEOMETRY["rs"], aaer.GEOMETRY["n"]
    assert (rs.noise, rs.step, rs.clamp) == (1.0, 1.25, True) and (n.noise, n.step, n.clamp) == (2.0, 1.0, False)


def test_warm_ups():
    assert [aaer.radius_warmup(e, 0.5, 5) for e in (0, 2, 4, 9)] == [0.1, 0.5, 0.9, 1.0]
    assert aaer.radius_warmup(0, 0.0, 0) == 1.0 and aaer.regulariser_warmup(0, 0) == 1.0
    assert [aaer.regulariser_warmup(e, 20) for e in (0, 5, 40)] == [0.0, 0.25, 1.0]
