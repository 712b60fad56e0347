"""J and F against an independent implementation with loops and sets; curves by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics


def slow_j(p, g):
    a = {tuple(x) for x in np.argwhere(p)}
    b = {tuple(x) for x in np.argwhere(g)}
    return len(a & b) / len(a | b) if a | b else 1.0


def slow_edges(m):
    h, w = m.shape
    out = []
    for y in range(h):
        for x in range(w):
            right, down = min(x + 1, w - 1), min(y + 1, h - 1)
            if m[y, x] != m[y, right] or m[y, x] != m[down, x] or m[y, x] != m[down, right]:
                out.append((y, x))
    return out


def slow_f(p, g):
    a, b = slow_edges(p), slow_edges(g)
    r = math.ceil(0.008 * math.sqrt(p.shape[0] ** 2 + p.shape[1] ** 2))
    if not a and not b:
        return 1.0

    def near(q, others):
        return any((q[0] - o[0]) ** 2 + (q[1] - o[1]) ** 2 <= r * r for o in others)

    precision = sum(near(q, b) for q in a) / len(a) if a else 1.0
    recall = sum(near(q, a) for q in b) / len(b) if b else 1.0
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 23), st.integers(1, 29), st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]))
def test_j_and_f_equal_an_independent_implementation(seed, h, w, share):
    rng = np.random.default_rng(seed)
    p, g = rng.random((h, w)) < share, rng.random((h, w)) < 0.3
    assert metrics.region(p, g) == pytest.approx(slow_j(p, g))
    assert metrics.boundary(p, g) == pytest.approx(slow_f(p, g))


def test_empty_masks():
    none, some = np.zeros((40, 60), bool), np.zeros((40, 60), bool)
    some[10:20, 10:30] = True
    assert metrics.region(none, none) == metrics.boundary(none, none) == 1
    assert metrics.region(none, some) == metrics.region(some, none) == 0
    assert metrics.boundary(none, some) == metrics.boundary(some, none) == 0


def test_a_shift_within_the_tolerance_keeps_f():
    g = np.zeros((480, 854), bool)
    g[100:300, 200:500] = True
    assert metrics.tolerance(g.shape) == 8
    assert metrics.boundary(np.roll(g, 5, 1), g) == 1 and metrics.boundary(np.roll(g, 30, (1)), g) < 0.8


def test_void_is_another_label_and_frames_without_truth_do_not_count():
    g = np.zeros((8, 8), np.uint8)
    g[:4], g[4:6] = 1, 255
    scores = metrics.score([np.where(g == 1, 1, 0), g], [g, None], (1,))
    assert scores[0, 0, 0] == 1 and np.isnan(scores[1]).all()


def test_curves():
    # (0,0) -> (10, 0.5) -> (30, 0.9) -> held to 60
    area = 10 * 0.25 + 20 * 0.7 + 30 * 0.9
    assert metrics.auc([10, 30], [0.5, 0.9], 60) == pytest.approx(area / 60)
    assert metrics.at([10, 30], [0.5, 0.9], 20, 60) == pytest.approx(0.7)
    assert metrics.at([10, 100], [0.5, 0.9], 60, 240) == pytest.approx(0.5 + 0.4 * 50 / 90)
    assert metrics.auc([10, 300], [0.5, 0.9], 60) == pytest.approx((2.5 + 25) / 60)  # after the timeout: not counted
