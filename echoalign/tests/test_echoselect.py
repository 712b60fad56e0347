"""Selection, the mixed set and its loss against hand-made cases and loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import echoselect as es


def test_selection_equals_a_hand_made_case():
    f = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [0.0, 0.0], [1.0, 1.0]])
    g = torch.tensor([[5.0, 0.0], [4.0, 3.0], [2.0, 0.0], [1.0, 0.0], [float("nan"), 1.0]])
    s = es.similarity(f, g)
    assert s[:3].tolist() == pytest.approx([1.0, 0.96, 0.0]) and s[3:].isnan().all()
    assert es.by_threshold(s, 0.95).tolist() == [True, True, False, False, False]
    half = torch.tensor([0.5, 0.75], dtype=torch.float64)
    assert es.by_threshold(half, 0.5).tolist() == [False, True]  # strictly above


def test_small_loss_ratio_and_the_numbers_of_the_authors_logs():
    assert es.small_loss_ratio(0.5) == pytest.approx(0.4) and es.small_loss_ratio(0.3) == pytest.approx(0.63)
    assert es.small_loss_ratio(0.0) == pytest.approx(0.9) and es.small_loss_ratio(0.9) == 0.0
    y = torch.arange(45000) % 10
    keep = es.by_small_loss(torch.rand(45000), y, 0.4)
    assert abs(int(keep.sum()) - 17996) <= 10  # 4,500 a class here; the logs' classes are of slightly unequal size


def test_by_small_loss_per_class_with_ties():
    loss = torch.tensor([1.0, 1.0, 1.0, 0.5, 9.0, 0.1, 0.2])
    y = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    assert es.by_small_loss(loss, y, 0.5).tolist() == [True, False, False, True, False, True, False]
    assert not es.by_small_loss(loss, y, 0.0).any() and es.by_small_loss(loss, y, 1.0).all()


def test_mixture_keeps_all_modified_or_the_others():
    x, m = torch.arange(4)[:, None], 10 + torch.arange(4)[:, None]
    y = torch.tensor([3, 2, 1, 0])
    selected, fine = torch.tensor([True, False, True, False]), torch.tensor([True, True, True, False])
    images, labels, c = es.mixture(x, m, y, selected, fine)
    assert images[:, 0].tolist() == [0, 2, 10, 11, 12] and labels.tolist() == [3, 1, 3, 2, 1]
    assert c.tolist() == [0, 0, 1, 1, 1]
    images, _, c = es.mixture(x, m, y, selected, fine, "unselected")
    assert images[:, 0].tolist() == [0, 2, 11] and c.tolist() == [0, 0, 1]


def test_weights_go_crosswise_as_in_the_logs():
    c = torch.cat([torch.zeros(5181), torch.ones(45000)]).long()
    w = es.loss_weights(c)
    assert [round(float(v), 6) for v in w] == [0.896754, 0.103246]
    c = torch.cat([torch.zeros(28345), torch.ones(45000)]).long()
    assert [round(float(v), 6) for v in es.loss_weights(c)] == [0.613539, 0.386461]
    assert es.loss_weights(torch.ones(3).long()).tolist() == [1, 1]  # no originals: plain loss


@pytest.mark.parametrize("normalise", [False, True])
def test_weighted_loss_against_a_loop(normalise):
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(7, 4, generator=g, dtype=torch.float64), torch.randint(4, (7,), generator=g)
    c, w = torch.tensor([0, 1, 1, 0, 1, 1, 1]), torch.tensor([0.7, 0.3], dtype=torch.float64)
    total = weight = 0.0
    for b in range(7):
        p = math.exp(z[b, y[b]]) / sum(math.exp(v) for v in z[b])
        total += float(w[c[b]]) * -math.log(p)
        weight += float(w[c[b]])
    expected = total / (weight if normalise else 7)
    assert float(es.weighted_loss(z, y, c, w, normalise)) == pytest.approx(expected, rel=1e-9)
    equal = es.weighted_loss(z, y, c, torch.ones(2, dtype=torch.float64))
    assert float(equal) == pytest.approx(float(F.cross_entropy(z, y)))


def brute(score, right, p):
    best = 0
    for t in sorted(set(score)):
        kept = [r for s, r in zip(score, right, strict=True) if s >= t]
        if 100 * sum(kept) / len(kept) >= p - 1e-9:
            best = max(best, len(kept))
    return best


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30), st.sampled_from([50, 90, 99]))
def test_sweep_against_every_threshold(rows, p):
    score, right = [float(s) for s, _ in rows], [r for _, r in rows]
    found = es.sweep(torch.tensor(score), torch.tensor(right), (p,))
    assert found[f"retained_{p}"] == brute(score, right, p)
    if any(right) and not all(right):
        pairs = [(a > b) + 0.5 * (a == b) for a, r in rows for b, q in rows if r and not q]
        assert found["auc"] == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_the_kept_over_the_right_ones_can_pass_100_by_the_wrong_ones_among_the_kept(wrong):
    right = torch.cat([torch.ones(100), torch.zeros(wrong)]).bool()
    found = es.sweep(-torch.arange(100.0 + wrong), right)
    assert found["retained_99"] == 100 + min(wrong, 1) and found["retained_99_share"] == 100 + min(wrong, 1)
    assert found["retained_90_share"] == 100 + wrong


def test_sweep_leaves_nan_out_and_quality():
    score, right = torch.tensor([3.0, float("nan"), 1.0]), torch.tensor([True, True, False])
    found = es.sweep(score, right)
    assert found["retained_99"] == 1 and max(found["curve_kept"]) == 2
    q = es.quality(torch.tensor([True, False, True]), right)
    assert q == {"selected": 2, "recall": 50.0, "precision": 50.0}
    q = es.quality(torch.tensor([True, False, False]), right)
    assert q == {"selected": 1, "recall": 50.0, "precision": 100.0}
    assert "precision" not in es.quality(torch.zeros(3).bool(), right)


def test_automatic_thresholds_lie_between_two_groups():
    g = torch.Generator().manual_seed(0)
    s = torch.cat([0.3 + 0.05 * torch.randn(300, generator=g), 0.8 + 0.05 * torch.randn(200, generator=g)]).double()
    for rule in ("gmm", "otsu"):
        tau = es.automatic_threshold(torch.cat([s, torch.tensor([torch.nan])]), rule)
        assert 0.4 < tau < 0.7 and int(es.by_threshold(s, tau).sum()) == 200
    with pytest.raises(ValueError, match="all similarities are equal"):
        es.automatic_threshold(torch.ones(5, dtype=torch.float64), "gmm")


def test_frechet():
    rng = np.random.RandomState(0)
    f = rng.randn(4000, 3)
    assert es.frechet(f, f) == pytest.approx(0, abs=1e-9)
    assert es.frechet(f, f + [1, 0, 0]) == pytest.approx(1, abs=1e-6)
    assert es.frechet(f, 2 * f) == pytest.approx(3.0, rel=0.1)  # (2 - 1)^2 a dimension, and means near 0
    from scipy.linalg import sqrtm

    g = rng.randn(50, 3) @ rng.randn(3, 3)
    a, b = np.cov(f.T), np.cov(g.T)
    expected = ((f.mean(0) - g.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert es.frechet(f, g) == pytest.approx(expected, rel=1e-6)


def test_select_on_a_strangers_tensors():
    g = torch.Generator().manual_seed(0)
    f = torch.randn(60, 8, generator=g)
    edited = f + 0.1 * torch.randn(60, 8, generator=g)
    edited[:20] = -f[:20] + 0.5 * torch.randn(20, 8, generator=g)  # these were changed much
    labels = torch.cat([torch.zeros(20), torch.arange(40) % 3 + 1]).long()
    for threshold in ("gmm", "otsu", 0.9):
        found = es.select(f, edited, labels, threshold)
        assert not found.keep[:20].any() and found.keep[20:].all() and found.empty == [0]
        assert torch.equal(found.keep, found.similarity > found.threshold)
    with pytest.raises(ValueError, match="not \\(60, 8\\), \\(59, 8\\), \\(60,\\)"):
        es.select(f, edited[1:], labels)
    with pytest.raises(ValueError, match="not median"):
        es.select(f, edited, labels, "median")
