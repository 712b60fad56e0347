"""Every loss against a reference written with loops from its formula, in value and gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import losses

V = 7


def ragged(seed=0, lengths=(3, 1, 5)):
    """Logits [N, V], targets [N], row [N] of sequences of different lengths, float64."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    row = torch.cat([torch.full((k,), i) for i, k in enumerate(lengths)])
    return torch.randn(n, V, generator=g, dtype=torch.float64), torch.randint(V, (n,), generator=g), row, len(lengths)


def loop_nll(z, y, temperature=1.0):
    out = []
    for i in range(len(y)):
        scaled = [z[i, v] / temperature for v in range(V)]
        out.append(torch.logsumexp(torch.stack(scaled), 0) - scaled[int(y[i])])
    return out


def loop_sums(nll, row, size):
    out = [torch.zeros((), dtype=torch.float64) for _ in range(size)]
    for value, r in zip(nll, row.tolist(), strict=True):
        out[r] = out[r] + value
    return out


def log_sigmoid(x):
    return -torch.log(1 + torch.exp(-x))


S_REF = torch.tensor([2.0, 1.5, 7.0], dtype=torch.float64)
OTHER, OTHER_REF = torch.tensor([4.0, 1.0, 3.0]).double(), torch.tensor([3.0, 2.0, 3.5]).double()


def ref_selected(z, y, row, size, share):
    nll, chosen = loop_nll(z, y), []
    for r in range(size):
        mine = [i for i in range(len(y)) if row[i] == r]
        mine.sort(key=lambda i: (float(nll[i]), i))
        chosen += mine[: int(math.floor(share * len(mine) + 1e-9))]
    return -sum((nll[i] for i in chosen), torch.zeros(())) / max(len(chosen), 1)


def ref_capped(z, y, row, size, cap):
    active = [cap - s for s in loop_sums(loop_nll(z, y), row, size) if s < cap]
    return sum(active) / len(active) if active else torch.zeros(()) * z.sum()


def ref_npo(z, y, row, size, beta):
    s = loop_sums(loop_nll(z, y), row, size)
    return -(2 / beta) * sum(log_sigmoid(beta * (a - b)) for a, b in zip(s, S_REF, strict=True)) / size


def ref_simnpo(z, y, row, size, beta, margin):
    s = loop_sums(loop_nll(z, y), row, size)
    n = [int((row == r).sum()) for r in range(size)]
    return -(2 / beta) * sum(log_sigmoid(beta * (a / k - margin)) for a, k in zip(s, n, strict=True)) / size


def ref_dpo(z, y, row, size, beta):
    s, total = loop_sums(loop_nll(z, y), row, size), 0
    for i in range(size):
        gain = (-OTHER[i] + OTHER_REF[i]) - (-s[i] + S_REF[i])
        total = total + log_sigmoid(beta * gain)
    return -(2 / beta) * total / size


def ref_weighted(z, y, weight):
    nll = loop_nll(z, y)
    return -sum(weight(math.exp(-float(v))) * v for v in nll) / len(nll)


CASES = {
    "ga": (lambda l, r, b: losses.ga(l), lambda z, y, r, b: -sum(loop_nll(z, y)) / len(y)),
    "selected": (lambda l, r, b: losses.selected(l, r, b, 0.8), lambda z, y, r, b: ref_selected(z, y, r, b, 0.8)),
    "capped": (lambda l, r, b: losses.capped(l, r, b, 6.0), lambda z, y, r, b: ref_capped(z, y, r, b, 6.0)),
    "capped none": (lambda l, r, b: losses.capped(l, r, b, 0.01), lambda z, y, r, b: ref_capped(z, y, r, b, 0.01)),
    "capped tokens": (
        lambda l, r, b: losses.capped_tokens(l, 2.0),
        lambda z, y, r, b: (lambda a: sum(a) / len(a))([2.0 - v for v in loop_nll(z, y) if v < 2.0]),
    ),
    "npo": (lambda l, r, b: losses.npo(losses.sums(l, r, b), S_REF, 0.5), lambda z, y, r, b: ref_npo(z, y, r, b, 0.5)),
    "simnpo": (
        lambda l, r, b: losses.simnpo(losses.sums(l, r, b), losses.counts(r, b), 4.5, 0.3),
        lambda z, y, r, b: ref_simnpo(z, y, r, b, 4.5, 0.3),
    ),
    "dpo": (
        lambda l, r, b: losses.dpo(OTHER, OTHER_REF, losses.sums(l, r, b), S_REF, 0.1),
        lambda z, y, r, b: ref_dpo(z, y, r, b, 0.1),
    ),
    "wga": (lambda l, r, b: losses.wga(l, 5.0), lambda z, y, r, b: ref_weighted(z, y, lambda p: p**5)),
    "satimp": (
        lambda l, r, b: losses.satimp(l, 5.0, 1.0),
        lambda z, y, r, b: ref_weighted(z, y, lambda p: p**5 * (1 - p)),
    ),
}


def double_nll(z, y, temperature=1.0):
    """losses.token_nll is float32 by design; the reference comparison wants the digits."""
    return torch.nn.functional.cross_entropy(z / temperature, y, reduction="none")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lengths", [(3, 1, 5), (1, 1, 1), (2, 6, 4)])
def test_loss_equals_its_loop(name, lengths):
    ours, reference = CASES[name]
    z, y, row, size = ragged(1, lengths)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    x, want = ours(double_nll(a, y), row, size), reference(b, y, row, size)
    assert x.item() == pytest.approx(want.item(), rel=1e-9, abs=1e-12)
    got = torch.autograd.grad(x, a)[0]
    should = torch.autograd.grad(want, b, allow_unused=True)[0] if want.requires_grad else torch.zeros_like(z)
    torch.testing.assert_close(got, should, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_temperature_divides_the_logits_and_nothing_else(temperature):
    z, y, _, _ = ragged()
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    ours, want = losses.token_nll(a, y, temperature), torch.stack(loop_nll(b, y, temperature))
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-6)
    one, two = (torch.autograd.grad(v.sum(), x)[0] for v, x in ((ours, a), (want, b)))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_losses_are_float32_for_bf16_logits():
    z, y, _, _ = ragged()
    assert losses.token_nll(z.bfloat16(), y).dtype == torch.float32


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.floats(0.01, 1.0), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_selection_takes_the_smallest(lengths, share, seed):
    z, y, row, size = ragged(seed, tuple(lengths))
    ours = losses.selected(double_nll(z, y), row, size, share)
    assert float(ours) == pytest.approx(float(ref_selected(z, y, row, size, share)), rel=1e-9, abs=1e-12)


def test_selection_limits():
    z, y, row, size = ragged()
    nll = double_nll(z, y)
    assert float(losses.selected(nll, row, size, 1.0)) == pytest.approx(float(losses.ga(nll)))
    assert float(losses.selected(nll, row, size, 0.1)) == 0.0  # floor leaves no token: 0, not 0 / 0
    tied = torch.ones(5, dtype=torch.float64, requires_grad=True)
    grad = torch.autograd.grad(losses.selected(tied, torch.zeros(5, dtype=torch.long), 1, 0.8), tied)[0]
    assert grad.tolist() == [-0.25] * 4 + [0.0]  # 0.8 * 5 is 4 tokens, the earlier ones win a tie


def test_npo_becomes_ga_for_small_beta():
    """Up to a constant the gradient is that of the summed losses."""
    s = torch.tensor([3.0, 5.0], dtype=torch.float64, requires_grad=True)
    loss = losses.npo(s, torch.tensor([2.0, 9.0]).double(), 1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, s)[0], torch.tensor([-0.5, -0.5]).double(), rtol=1e-4, atol=0)


def test_npo_of_a_collapsed_sequence_is_finite_and_still():
    s = torch.tensor([1e4], requires_grad=True)
    loss = losses.npo(s, torch.tensor([1.0]), 0.5)
    assert loss.isfinite() and torch.autograd.grad(loss, s)[0].abs() < 1e-6


def test_rmu_and_stay_equal_their_loops():
    g = torch.Generator().manual_seed(3)
    h = torch.randn(4, 6, generator=g, requires_grad=True)
    u = losses.rmu_direction(6, torch.Generator().manual_seed(1), False)
    want = sum(sum((h[t, j] - 2 * u[j]) ** 2 for j in range(6)) / 6 for t in range(4)) / 4
    ours = losses.rmu(h, u, 2.0)
    assert float(ours) == pytest.approx(float(want), rel=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(x, h)[0] for x in (ours, want)))
    assert 0 <= u.min() and u.max() < 1 and float(u.norm()) != pytest.approx(1.0)  # not normalised
    unit = losses.rmu_direction(6, torch.Generator().manual_seed(1), True)
    assert float(unit.norm()) == pytest.approx(1.0, rel=1e-6)
    other = torch.randn(4, 6, generator=g)
    assert float(losses.stay(h, other)) == pytest.approx(float(((h - other) ** 2).mean()), rel=1e-5)


# --------------------------------------------------------------------------------------------------------------- KL


def padded_logits(extra, seed=0):
    """Logits [2, 4 + extra, V] of sequences with 4 and 2 real tokens; the real part does not depend on `extra`."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(2, 4, V, generator=g, dtype=torch.float64)
    z = torch.cat([z, torch.randn(2, extra, V, generator=g, dtype=torch.float64)], 1)
    mask = torch.zeros(2, 4 + extra, dtype=torch.long)
    mask[0, :4], mask[1, :2] = 1, 1
    return z, mask


def loop_kl(z, ref, where):
    total = 0
    for b, t in where:
        q, p = torch.softmax(ref[b, t], 0), torch.softmax(z[b, t], 0)
        total = total + sum(q[v] * (torch.log(q[v]) - torch.log(p[v])) for v in range(V))
    return total


def our_kl(z, ref, mask, how, padded=500):
    z, ref = (z, ref) if how == "positions" else (z[mask.bool()], ref[mask.bool()])
    return losses.kl(z, ref, mask, how, padded)


@pytest.mark.parametrize("how", losses.KL_REDUCTIONS)
def test_kl_equals_its_loop_in_value_and_gradient(how):
    z, mask = padded_logits(2)
    ref, _ = padded_logits(2, 9)
    real = [(b, t) for b in range(2) for t in range(6) if mask[b, t]]
    every = [(b, t) for b in range(2) for t in range(6)]
    where, divisor = {"tokens": (real, 6), "padded": (real, 2 * 500), "positions": (every, 12)}[how]
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    ours, want = our_kl(a, ref, mask, how), loop_kl(b, ref, where) / divisor
    assert float(ours) == pytest.approx(float(want), rel=1e-4)
    torch.testing.assert_close(*(torch.autograd.grad(x, y)[0] for x, y in ((ours, a), (want, b))), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("how", ["tokens", "padded"])
def test_kl_does_not_change_with_padding(how):
    values = []
    for extra in (0, 3, 40):
        z, mask = padded_logits(extra)
        ref = torch.cat([padded_logits(0, 9)[0], torch.randn(2, extra, V).double()], 1)
        values.append(float(our_kl(z, ref, mask, how)))
    assert values[1] == pytest.approx(values[0], rel=1e-6) and values[2] == pytest.approx(values[0], rel=1e-6)


def test_factor_between_the_divisors():
    """padded = tokens * (real tokens) / (B * padded length); positions depends on the padding."""
    z, mask = padded_logits(3)
    ref, _ = padded_logits(3, 9)
    tokens, padded = (float(our_kl(z, ref, mask, how, 50)) for how in ("tokens", "padded"))
    assert padded == pytest.approx(tokens * 6 / (2 * 50), rel=1e-6)
    short = float(our_kl(*(x[:, :4] for x in (z, ref)), mask[:, :4], "positions"))
    assert short != pytest.approx(float(our_kl(z, ref, mask, "positions")), rel=1e-3)


def test_kl_of_equal_models_is_zero_and_reversed_roles_differ():
    z, mask = padded_logits(1)
    ref, _ = padded_logits(1, 9)
    assert float(our_kl(z, z, mask, "tokens")) == pytest.approx(0, abs=1e-7)
    assert float(our_kl(z, ref, mask, "tokens")) != pytest.approx(float(our_kl(ref, z, mask, "tokens")), rel=1e-3)
