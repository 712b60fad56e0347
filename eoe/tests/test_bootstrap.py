"""The paired bootstrap against slow references: metrics of repeated images, and what the weights are drawn of."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import metrics
from real import bootstrap, coverage


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 50), st.sampled_from([1, 6]))
def test_weighted_metrics_are_those_of_repeated_images(seed, n, digits):
    """With ties (1 digit) and without: the official FPR95 rule and AUROC, a replicate at a time."""
    rng = np.random.default_rng(seed)
    score, inside = np.round(rng.normal(size=n), digits), rng.random(n) < 0.5
    inside[0], inside[1] = True, False
    w = np.vstack([np.ones(n), rng.integers(0, 4, (6, n))]).astype(np.float32)
    found = bootstrap.measure(score, inside, np.ascontiguousarray(w.T))
    for r, times in enumerate(w.astype(int)):
        own, other = (np.repeat(score[m], times[m]) for m in (inside, ~inside))
        if not len(own) or not len(other):
            assert np.isnan(found["FPR95"][r]) and np.isnan(found["AUROC"][r])
            continue
        want = metrics.measure(own, other)
        assert found["FPR95"][r] == pytest.approx(want["FPR95"], abs=1e-4)
        assert found["AUROC"][r] == pytest.approx(want["AUROC"], abs=1e-4)


def test_weights_draw_groups_within_their_stratum_and_images_within_their_group():
    groups, strata = np.repeat([0, 1, 2, 3], [5, 7, 2, 4]), np.repeat([0, 0, 0, 1], [5, 7, 2, 4])
    w = bootstrap.weights(groups, strata, 400, 0)
    assert w.shape == (401, 18) and (w[0] == 1).all()
    sums = np.stack([w[1:, groups == g].sum(1) for g in range(4)], 1)
    assert (sums % [5, 7, 2, 4] == 0).all()  # a group drawn k times brings k times its images
    assert (sums[:, :3] / [5, 7, 2]).sum(1).tolist() == [3.0] * 400  # three draws of the first stratum
    assert (sums[:, 3] == 4).all()  # alone in its stratum, it is always there once
    assert (sums[:, :3] == 0).any() and (w[1:, 14:] > 1).any()
    assert np.array_equal(w, bootstrap.weights(groups, strata, 400, 0))
    assert not np.array_equal(w, bootstrap.weights(groups, strata, 400, 1))


def test_intervals_know_that_images_of_a_class_are_alike():
    """Scores that only the class decides: the interval is wide although the images are many."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(10), 100)
    inside = groups < 5
    alike = rng.normal(size=10)[groups] + 0.5 * inside + 1e-3 * rng.normal(size=1000)
    apart = rng.normal(size=1000) + 0.5 * inside
    strata = np.where(inside, 0, 1)
    w = np.ascontiguousarray(bootstrap.weights(groups, strata, 300, 0).T)
    wide, narrow = (bootstrap.interval(bootstrap.measure(s, inside, w)["AUROC"], 5) for s in (alike, apart))
    assert wide[2] - wide[1] > 3 * (narrow[2] - narrow[1])
    assert narrow[1] < narrow[0] < narrow[2]


def test_interval_leaves_undefined_replicates_out():
    value, low, high = bootstrap.interval(np.array([2.0, 1.0, np.nan, 3.0]), 2)
    half = 12.7062 * np.sqrt(2) * np.sqrt(2)  # t of one degree, deviation of 1 and 3, G / (G - 1)
    assert value == 2.0 and (low, high) == pytest.approx((2 - half, 2 + half), rel=1e-5)
    assert np.isnan(bootstrap.interval(np.array([2.0]), 5)[1])
    assert np.isnan(bootstrap.interval(np.array([2.0, 1.0, 3.0]), 1)[1])


def test_interval_of_a_plain_mean_is_students():
    """The bootstrap of a mean of G values has the variance (G - 1) / G s^2 / G: with the correction it is Student's."""
    x = np.random.default_rng(1).normal(size=6)
    rng = np.random.default_rng(2)
    means = rng.choice(x, (40_000, 6)).mean(1)
    value, low, high = bootstrap.interval(np.r_[x.mean(), means], 6)
    want = stats.t.interval(0.95, 5, x.mean(), stats.sem(x))
    assert value == x.mean() and (low, high) == pytest.approx(want, rel=0.03)


def test_coverage_of_six_classes():
    """Known truth: the interval in use holds it about as often as it says, quantiles of replicates do not."""
    for each in coverage.coverage(60, 60, 200, 7).values():
        assert each["t"] >= 85
        assert max(each[k] for k in ("percentile", "basic", "BCa")) <= each["t"] - 5
