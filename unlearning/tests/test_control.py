"""Mixing and the search for alpha*: exact ends, exact sums, and what calibration promises for any curve."""

from lab.runs import UserError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import control
import data
import evaluation
import metrics
import models

CPU = torch.device("cpu")


def ends(lm):
    a = {k: v.clone() for k, v in models.weights(lm).items()}
    g = torch.Generator().manual_seed(5)
    return a, {k: v + torch.randn(v.shape, generator=g) for k, v in a.items()}


def test_ends_are_the_two_models_bit_for_bit(tiny):
    lm, _ = tiny
    a, b = ends(lm)
    mixer = control.Mixer(lm, a, b)
    for alpha, want in ((0.3, None), (1.0, b), (0.7, None), (0.0, a), (1, b), (0, a)):
        mixer.set(alpha)
        assert want is None or all(torch.equal(v, want[k]) for k, v in models.weights(lm).items())


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_mixture_is_elementwise_and_alpha_weighs_the_unlearned(tiny, alpha):
    lm, _ = tiny
    a, b = ends(lm)
    control.Mixer(lm, a, b).set(alpha)
    for k, v in models.weights(lm).items():
        torch.testing.assert_close(
            v.double(), (1 - alpha) * a[k].double() + alpha * b[k].double(), rtol=1e-5, atol=1e-6
        )


def test_bf16_models_are_mixed_in_float32(tiny):
    """A small step away from the original survives alpha < 1 as well as rounding at the end allows."""
    lm, _ = tiny
    lm = lm.bfloat16()
    a = {k: v.clone() for k, v in models.weights(lm).items()}
    b = {k: (v.float() * 1.01).bfloat16() for k, v in a.items()}
    control.Mixer(lm, a, b).set(0.5)
    for k, v in models.weights(lm).items():
        assert torch.equal(v, torch.lerp(a[k].float(), b[k].float(), 0.5).bfloat16())


def test_float32_unlearned_weights_move_a_bf16_model_only_by_rounded_sums(tiny):
    lm, _ = tiny
    lm = lm.bfloat16()
    a, b = ({k: v.float() for k, v in x.items()} for x in ends(lm))
    control.Mixer(lm, a, b).set(0.25)
    assert all(torch.equal(v, torch.lerp(a[k], b[k], 0.25).bfloat16()) for k, v in models.weights(lm).items())


def test_float32_unlearned_weights_are_not_rounded_before_they_are_mixed(tiny):
    """1 + 0.55 steps of bf16 rounds up by itself; six tenths of it do not."""
    lm, _ = tiny
    lm = lm.bfloat16()
    a = {k: torch.ones_like(v) for k, v in models.weights(lm).items()}
    b = {k: v.float() + 0.55 * 2**-7 for k, v in a.items()}
    control.Mixer(lm, a, b).set(0.6)
    assert all(torch.equal(v, a[k]) for k, v in models.weights(lm).items())
    control.Mixer(lm, a, b).set(1.0)
    assert all((v == 1 + 2**-7).all() for v in models.weights(lm).values())


def test_other_architectures_and_alphas_are_refused(tiny):
    lm, _ = tiny
    a, b = ends(lm)
    with pytest.raises(UserError, match="one architecture"):
        control.Mixer(lm, a, dict(list(b.items())[1:]))
    with pytest.raises(UserError, match="alpha must lie"):
        control.Mixer(lm, a, b).set(1.2)


# ------------------------------------------------------------------------------------------------------------- search


def falling(center, width=0.1):
    return lambda alpha: 1 / (1 + np.exp((alpha - center) / width))


@pytest.mark.parametrize("how", ["scan+bisect", "bisect"])
@pytest.mark.parametrize("tau", [0.4, 0.9, 0.95])
def test_both_searches_find_the_crossing_of_a_falling_curve(how, tau):
    g = falling(0.5)
    found = control.calibrate(g, tau, how)
    grid = np.linspace(0, 1, 100001)
    want = grid[g(grid) >= tau * g(0.0)].max()
    assert found.alpha <= want + 1e-9 and want - found.alpha <= 1e-3 + 1e-9
    assert found.score >= found.bar and not found.vacuous


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=12), st.floats(0.01, 1.0), st.sampled_from(["scan+bisect", "bisect"])
)
@settings(max_examples=200, deadline=None)
def test_alpha_star_always_passes(values, tau, how):
    """Any curve, monotone or not: the mixture that is reported keeps the bar."""
    places = np.linspace(0, 1, len(values))
    found = control.calibrate(lambda a: float(np.interp(a, places, values)), tau, how)
    assert 0 <= found.alpha <= 1 and found.score >= tau * values[0] - 1e-12
    if values[-1] >= tau * values[0]:
        assert found.alpha == 1


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
@settings(max_examples=50, deadline=None)
def test_a_smaller_bar_never_lowers_alpha(one, two):
    g = falling(0.4, 0.2)
    low, high = sorted((one, two))
    assert control.calibrate(g, low).alpha >= control.calibrate(g, high).alpha - 1e-3


def test_scan_finds_a_second_rise_that_bisection_misses():
    """Feasible again near 1 after a dip: the largest such alpha counts."""

    def g(alpha):
        return 0.0 if 0.3 < alpha < 0.8 or alpha > 0.91 else 1.0

    assert control.calibrate(g, 0.9).alpha == pytest.approx(0.91, abs=1.1e-3)
    assert control.calibrate(g, 0.9, "bisect").alpha == pytest.approx(0.3, abs=1.1e-3)


@pytest.mark.parametrize("how", ["scan+bisect", "bisect"])
def test_a_score_exactly_at_the_bar_passes(how):
    """ES is a mean of few values: plateaus at the bar are common."""
    g = lambda alpha: 1.0 if alpha <= 0.2 else 0.5 if alpha <= edge else 0.0  # noqa: E731
    for edge in (0.63, 0.8):  # between two points of the grid, and on one
        assert control.calibrate(g, 0.5, how).alpha == pytest.approx(edge, abs=1.1e-3)


def test_the_scan_halves_only_the_interval_it_found():
    """0.85 is the first point of the grid that passes; five halvings of (0.85, 0.9) reach the tolerance."""
    found = control.calibrate(lambda a: float(a <= 0.87), 0.5, step=0.05, tolerance=2e-3)
    assert 0.868 <= found.alpha <= 0.87
    assert found.evaluations == len([0.0, 1.0, 0.95, 0.9, 0.85]) + 5
    # With steps that do not divide 1 every point counts: 0.65, then 0.3, where alone the bar is kept.
    alone = control.calibrate(lambda a: float(a == 0 or 0.28 <= a <= 0.32), 0.5, step=0.35, tolerance=1e-3)
    assert alone.alpha == pytest.approx(0.32, abs=1.1e-3)


def test_the_original_is_the_answer_when_nothing_else_passes():
    found = control.calibrate(lambda a: 1.0 if a == 0 else 0.0, 0.5, tolerance=0.01)
    assert found.alpha <= 0.01 and control.calibrate(lambda a: 1 - a, 1.0).alpha == 0


def test_an_original_that_knows_nothing_is_told_apart():
    found = control.calibrate(lambda a: 0.0, 0.9)
    assert found.alpha == 1 and found.vacuous


@pytest.mark.parametrize("tau", [0, -0.1, 1.01, float("nan")])
def test_tau_outside_its_range(tau):
    with pytest.raises(UserError, match=r"--tau must lie in \(0, 1\]"):
        control.calibrate(lambda a: 1.0, tau)


def test_a_shared_curve_is_evaluated_once_a_point():
    calls = []

    def g(alpha):
        calls.append(alpha)
        return 1 - alpha

    curve = control.Curve(g)
    first = control.calibrate(curve, 0.9)
    before = len(calls)
    second = control.calibrate(curve, 0.9)
    assert len(calls) == before == len(set(calls)) and second.evaluations == 0 and first.alpha == second.alpha


def test_exact_and_perturb_are_calibrated_apart_and_the_curve_meets_both_ends(tiny, corpus):
    lm, chat = tiny
    a, b = ends(lm)
    items = [data.encode(chat, q.question, q.answer) for q in corpus.full]
    batch = data.collate(items, chat.pad, CPU)
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-2)
    for _ in range(60):  # so that ES is not 0 everywhere
        loss = torch.nn.functional.cross_entropy(lm(batch.ids, batch.mask, batch.places), batch.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    a = {k: v.clone() for k, v in models.weights(lm).items()}
    g = torch.Generator().manual_seed(0)
    b = {k: v + 0.3 * v.std() * torch.randn(v.shape, generator=g) for k, v in a.items()}
    sets, mixer = metrics.Sets(corpus, "forget-small", chat, CPU), control.Mixer(lm, a, b)
    curve = control.alpha_curve(mixer, lm, sets, 0.25)
    assert curve["alpha"] == [0, 0.25, 0.5, 0.75, 1]
    for alpha, place in ((0.0, 0), (1.0, -1)):
        mixer.set(alpha)
        for kind, part in sets.items:
            assert curve[f"ES_{kind}_{part}"][place] == sets.es(lm, kind, part)
    search = evaluation.Calibrator(mixer, lm, sets)
    search.know(curve)
    found, scores = search(0.9, "scan+bisect")
    for kind in control.KINDS:
        assert found[f"ES_{kind}_retain"] >= 0.9 * curve[f"ES_{kind}_retain"][0] > 0
        mixer.set(found[f"alpha_{kind}"])
        assert sets.es(lm, kind, "unlearn") == found[f"ES_{kind}_unlearn"] == scores[kind, "unlearn"].es.mean()
    assert found["alpha_exact"] != found["alpha_perturb"]
