import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import binom

import priors

ALL = [priors.bbe, priors.dedpul, priors.scott_mpe, priors.elkan_noto, lambda p, u: priors.regroup(priors.bbe, p, u)]
# Coarse values make ties frequent; all are exact in float32.
levels = st.lists(st.integers(0, 16).map(lambda k: k / 16), min_size=1, max_size=40)


def beta_mixture(prior, n_p, n_u, seed, shape=(30, 2)):
    """Scores: positives ~ Beta(a, b), negatives ~ Beta(b, a); a >> b is almost separable."""
    rng, (a, b) = np.random.default_rng(seed), shape
    k = round(prior * n_u)
    return rng.beta(a, b, n_p), np.concatenate((rng.beta(a, b, k), rng.beta(b, a, n_u - k)))


def gaussian_features(prior, n, d, distance, seed):
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(n, d))
    u[round(prior * n) :, 0] += distance
    return rng.normal(size=(n, d)), u


def bbe_by_loops(p, u, delta=0.1, gamma=0.01):
    best_bound, best = float("inf"), 0.0
    for c in sorted(set(u))[1:]:
        k_p = sum(1 for s in p if s >= c)
        k_u = sum(1 for s in u if s >= c) - 1
        if k_p <= 1 or k_u <= 1:
            continue
        q_p, q_u = k_p / len(p), k_u / len(u)
        slack = (np.log(4 / delta) / 2 / len(u)) ** 0.5 + (np.log(4 / delta) / 2 / len(p)) ** 0.5
        bound = q_u / q_p + (1 + gamma) * slack / q_p
        if bound < best_bound:
            best_bound, best = bound, q_u / q_p
    return min(best, 1.0)


# ---- BBE


@given(levels, levels)
def test_bbe_equals_the_loops_with_ties(p, u):
    assert priors.bbe(np.array(p), np.array(u)) == pytest.approx(bbe_by_loops(p, u), abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_bbe_equals_the_loops_without_ties(seed):
    p, u = beta_mixture(0.3, 40, 150, seed, (3, 2))
    for delta, gamma in ((0.1, 0.01), (0.01, 0.5)):
        assert priors.bbe(p, u, delta, gamma) == pytest.approx(bbe_by_loops(p, u, delta, gamma), abs=1e-12)


def test_bbe_by_hand():
    # All 4 P are >= 0.2 and 0.7, with 3 and 2 of the 5 U above: 2/5 is the best; above 0.85 is only one U.
    assert priors.bbe(np.array([0.75, 0.8, 0.9, 1.0]), np.array([0.1, 0.2, 0.7, 0.85, 0.95])) == pytest.approx(0.4)


@pytest.mark.parametrize(
    "p, u",
    [
        ([0.5] * 5, [0.5] * 5),  # all ties: nothing is strictly above
        ([0.9], [0.1, 0.2, 0.3, 0.4]),  # one P
        ([0.9, 0.8], [0.3]),  # one U
        ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]),  # no P above any U score
    ],
)
def test_bbe_without_a_candidate_is_zero(p, u):
    assert priors.bbe(np.array(p), np.array(u)) == 0.0
    scores = torch.tensor([p + u])
    is_p = torch.tensor([[True] * len(p) + [False] * len(u)])
    assert priors.bbe_batch(scores, is_p, ~is_p).item() == 0.0


@settings(max_examples=150)
@given(st.integers(1, 5), st.integers(1, 60), st.integers(0, 10**6), st.sampled_from([4, 16, 0]))
def test_bbe_batch_equals_bbe(rows, n, seed, grid):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, n, generator=generator)
    scores = (scores * grid).round() / grid if grid else scores
    role = torch.randint(0, 3, (rows, n), generator=generator)  # 2: in neither sample
    is_p, is_u = role == 0, role == 1
    got = priors.bbe_batch(scores, is_p, is_u)
    assert got.shape == (rows,) and got.dtype == torch.float32
    for s in range(rows):
        p, u = scores[s][is_p[s]].double().numpy(), scores[s][is_u[s]].double().numpy()
        expected = priors.bbe(p, u) if p.size and u.size else 0.0
        assert got[s].item() == pytest.approx(expected, abs=1e-6)


def test_bbe_batch_large_rows_overlapping_masks_and_gradients():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 3000, generator=generator).requires_grad_()
    is_p = torch.rand(3, 3000, generator=generator) < 0.2
    got = priors.bbe_batch(scores, is_p, torch.ones_like(is_p))
    assert not got.requires_grad
    for s in range(3):
        row = scores[s].detach().double().numpy()
        assert got[s].item() == pytest.approx(priors.bbe(row[is_p[s].numpy()], row), abs=1e-6)


def test_bbe_batch_nan_spoils_its_row_only():
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.7, 0.85, 0.95]] * 3)
    is_p = torch.tensor([[True, True, False, False, False, False]] * 3)
    is_u = ~is_p
    is_u[2, 5] = False
    scores[1, 3] = scores[2, 5] = torch.nan  # row 2: NaN outside both samples
    got = priors.bbe_batch(scores, is_p, is_u)
    assert got.isnan().tolist() == [False, True, False]
    assert got[0].item() == 0.5  # both P and two of the four U above 0.7, which itself is left out


# ---- recovery


@pytest.mark.parametrize("prior", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("n_p, n_u", [(100, 800), (1000, 4000)])
def test_separated_scores_recover_the_prior(prior, n_p, n_u):
    p, u = beta_mixture(prior, n_p, n_u, seed=1)
    assert priors.bbe(p, u) == pytest.approx(prior, abs=0.02 + 0.5 / n_p**0.5)  # q_p alone has sd up to 0.5 / sqrt(n_p)
    assert priors.dedpul(p, u) == pytest.approx(prior, abs=0.05)
    assert priors.scott_mpe(p, u) == pytest.approx(prior, abs=0.08)
    # Elkan-Noto's expectation here: (pi m + (1 - pi)(1 - m)) / m with m = 30/32, the mean of Beta(30, 2).
    assert priors.elkan_noto(p, u) == pytest.approx((prior * 30 + (1 - prior) * 2) / 30, abs=0.02)


@pytest.mark.parametrize("prior", [0.1, 0.3])
def test_inseparable_scores_are_overestimated(prior):
    """Negatives hide among the positives: no ratio of shares falls below kappa > pi, so neither can the estimates."""
    kappa = prior + (1 - prior) * 0.5  # half of the negatives look exactly like positives
    estimates = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        p, u = rng.beta(8, 2, 500), rng.beta(2, 8, 2000)
        u[: round(kappa * 2000)] = rng.beta(8, 2, round(kappa * 2000))
        estimates.append((priors.bbe(p, u), priors.scott_mpe(p, u), priors.elkan_noto(p, u)))
    assert np.all(np.array(estimates) > prior + 0.2)
    assert np.mean(estimates, axis=0)[:2] == pytest.approx([kappa, kappa], abs=0.05)


def test_overlapping_scores_are_not_underestimated():
    for seed in range(5):
        p, u = beta_mixture(0.2, 200, 2000, seed, (3, 2))
        assert priors.bbe(p, u) > 0.2 and priors.scott_mpe(p, u) > 0.2


def test_mpe_tightens_with_more_data():
    small, large = (np.mean([priors.scott_mpe(*beta_mixture(0.3, n, 4 * n, s)) for s in range(5)]) for n in (30, 3000))
    assert small - 0.3 > 2 * abs(large - 0.3)


def test_elkan_noto_by_hand():
    assert priors.elkan_noto(np.array([0.8, 0.4]), np.array([0.3, 0.1, 0.2])) == pytest.approx(1 / 3)
    assert priors.elkan_noto(np.array([0.2]), np.array([0.9])) == 1.0
    assert priors.elkan_noto(np.array([0.0]), np.array([0.9])) == 1.0


# ---- binomial bounds


def test_clopper_pearson_by_hand():
    # k = 0: (1 - x)^n = delta; k = n: x^n = delta; the other sides are trivial.
    lower, upper = priors.clopper_pearson(np.array([0, 10]), 10, 0.1)
    assert lower == pytest.approx([0.0, 0.1**0.1])
    assert upper == pytest.approx([1 - 0.1**0.1, 1.0])
    # k = 1 of 2: P(Bin(2, x) <= 1) = 1 - x^2 = 0.1 and P(Bin(2, x) >= 1) = 1 - (1 - x)^2 = 0.1
    lower, upper = priors.clopper_pearson(np.array([1]), 2, 0.1)
    assert (lower[0], upper[0]) == pytest.approx((1 - 0.9**0.5, 0.9**0.5))


def test_clopper_pearson_inverts_the_binomial_tails():
    k = np.arange(1, 50)
    lower, upper = priors.clopper_pearson(k, 50, 0.05)
    assert binom.cdf(k, 50, upper) == pytest.approx(np.full(49, 0.05))
    assert binom.sf(k - 1, 50, lower) == pytest.approx(np.full(49, 0.05))
    assert np.all(lower < k / 50) and np.all(k / 50 < upper)


def test_mpe_equals_a_search_over_a_fine_grid_of_thresholds():
    p, u = (np.round(x, 2) for x in beta_mixture(0.4, 60, 150, 3, (5, 2)))
    ratios = []
    for c in np.linspace(0, 1, 2001):
        k_p, k_u = np.sum(p >= c - 1e-9), np.sum(u >= c - 1e-9)
        lower, upper = priors.clopper_pearson(k_p, 60, 0.1)[0], priors.clopper_pearson(k_u, 150, 0.1)[1]
        ratios.append(upper / lower if lower > 0 else np.inf)
    assert priors.scott_mpe(p, u) == pytest.approx(min(min(ratios), 1.0), abs=1e-12)


# ---- kernel mean embedding


def slsqp(kernel, target):
    n = len(target)
    return minimize(
        lambda v: (target - v) @ kernel @ (target - v),
        np.full(n, 1 / n),
        jac=lambda v: 2 * kernel @ (v - target),
        bounds=[(0, None)] * n,
        constraints={"type": "eq", "fun": lambda v: v.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    ).fun


@pytest.mark.parametrize("seed", range(4))
def test_simplex_qp_against_slsqp(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(14, 3))
    kernel = np.exp(-np.square(x[:, None] - x).sum(-1) / 2)
    target = rng.normal(size=14)
    target += (1 - target.sum()) / 14
    start = np.full(14, 1 / 14)
    w, squared = priors.nearest_in_simplex(kernel, target, start, tol=1e-10)
    assert squared == pytest.approx(slsqp(kernel, target), abs=1e-7)
    assert w.min() >= 0 and w.sum() == pytest.approx(1.0) and squared > 0
    # Optimality: the gradient is smallest, and equal, where there is weight.
    gradient = 2 * kernel @ (w - target)
    assert gradient[w > 0].max() - gradient.min() <= 1e-9


def test_simplex_qp_leaves_a_feasible_target_and_its_start_alone():
    start, kernel = np.array([0.25, 0.75, 0.0]), np.eye(3)
    before = start.copy()
    w, squared = priors.nearest_in_simplex(kernel, np.array([0.5, 0.2, 0.3]), start, tol=1e-12)
    assert w == pytest.approx([0.5, 0.2, 0.3]) and squared == pytest.approx(0.0, abs=1e-12)
    assert np.array_equal(start, before)
    # With K = I the answer is the Euclidean projection: shift by a constant and cut at zero.
    w, squared = priors.nearest_in_simplex(kernel, np.array([1.5, 0.5, -1.0]), start, tol=1e-12)
    assert w == pytest.approx([1.0, 0.0, 0.0]) and squared == pytest.approx(1.5)


@pytest.mark.parametrize("prior", [0.2, 0.5])
def test_km_recovers_a_separated_mixture(prior):
    result = priors.km_both(*gaussian_features(prior, 400, 5, 6.0, seed=0))
    assert result["KM1"] == pytest.approx(prior, abs=0.07)
    assert result["KM2"] == pytest.approx(prior, abs=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_km_equals_a_scan_of_the_slope(seed):
    """On a few points: distances by SLSQP, and instead of bisection the first lambda of a grid that is too steep."""
    p, u = gaussian_features(0.4, 10, 2, 2.5, seed)
    x = np.concatenate((u, p))
    squared = np.square(x[:, None] - x).sum(-1)
    mean_u, mean_p = np.repeat([0.1, 0], 10), np.repeat([0, 0.1], 10)
    kernels = [np.exp(-squared / (2 * f * f * np.median(squared))) for f in 10.0 ** np.array([-1, -0.5, 0, 0.5, 1])]
    kernel = max(kernels, key=lambda k: (mean_u - mean_p) @ k @ (mean_u - mean_p))
    between = ((mean_u - mean_p) @ kernel @ (mean_u - mean_p)) ** 0.5

    def distance(lam):
        return max(slsqp(kernel, lam * mean_u + (1 - lam) * mean_p), 0) ** 0.5

    threshold_1 = 0.8 * distance(1.05) / 0.05 + 0.2 * between
    threshold_2 = 10**-0.5 if 10**-0.5 <= 0.9 * between else threshold_1
    result = priors.km_both(p, u)
    for variant, threshold in (("KM1", threshold_1), ("KM2", threshold_2)):
        grid = np.arange(1, 8, 0.05)
        crossing = next((lam for lam in grid if (distance(lam + 0.02) - distance(lam)) / 0.02 > threshold), 8.0)
        assert 1 / (1 - result[variant]) == pytest.approx(crossing, abs=0.08)  # in lambda: both grids are that coarse


def test_km_reduces_wide_features_and_draws_by_seed():
    p, u = gaussian_features(0.4, 300, 120, 12.0, seed=0)
    result = priors.km_both(p, u, max_points=200, seed=3)
    assert result == priors.km_both(p, u, max_points=200, seed=3)
    assert result["KM1"] == pytest.approx(0.4, abs=0.12)
    assert priors.km(p, u, "KM1", 200, 3) == result["KM1"] and priors.km(p, u, "KM2", 200, 3) == result["KM2"]


def test_km_ignores_shift_scale_and_rotation():
    p, u = gaussian_features(0.3, 100, 4, 5.0, seed=1)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    moved = priors.km_both(7 * p @ rotation + 100, 7 * u @ rotation + 100)
    assert moved == pytest.approx(priors.km_both(p, u), abs=0.03)  # at most about one bisection step


def test_km_on_constant_features_stays_in_range():
    result = priors.km_both(np.ones((5, 3)), np.ones((6, 3)))
    assert all(0 <= value <= 1 for value in result.values())


# ---- regrouping, bootstrap, all of them


def test_regroup_hands_the_copied_points_to_the_base():
    p, u = np.array([0.9]), np.array([0.1, 0.8, 0.3, 0.7])
    seen = []
    priors.regroup(lambda a, b: seen.append((a, b)) or 0.5, p, u, share=0.5)
    assert seen[0][0].tolist() == [0.9, 0.8, 0.7] and seen[0][1] is not p and seen[0][1].tolist() == u.tolist()
    features_p, features_u = np.array([[10.0]]), np.array([[0.0], [1.0], [2.0], [3.0]])
    priors.regroup(lambda a, b: seen.append((a, b)) or 0.5, p, u, features_p, features_u, share=0.5)
    assert seen[1][0].tolist() == [[10.0], [1.0], [3.0]] and seen[1][1].tolist() == features_u.tolist()
    assert priors.regroup(priors.bbe, *beta_mixture(0.3, 50, 100, 0), share=0) == priors.bbe(
        *beta_mixture(0.3, 50, 100, 0)
    )


def test_regrouping_lowers_an_overestimate():
    for seed in range(5):
        p, u = beta_mixture(0.2, 1000, 1000, seed, (3, 2))
        assert priors.regroup(priors.bbe, p, u, share=0.05) < priors.bbe(p, u)


def test_bootstrap_holds_the_estimate_and_is_reproducible():
    for seed in range(3):
        p, u = beta_mixture(0.3, 200, 600, seed, (8, 2))
        low, high = priors.bootstrap(priors.elkan_noto, p, u, n=100)
        assert low < priors.elkan_noto(p, u) < high
        assert (low, high) == priors.bootstrap(priors.elkan_noto, p, u, n=100)
        narrow = priors.bootstrap(priors.elkan_noto, p, u, n=100, level=0.5)
        assert low < narrow[0] < narrow[1] < high
    low, high = priors.bootstrap(priors.bbe, p, u, n=200)
    assert 0 <= low <= priors.bbe(p, u) + 0.02 and priors.bbe(p, u) - 0.02 <= high <= 1


def test_bootstrap_of_the_mean_has_the_textbook_width():
    u = np.random.default_rng(0).random(400)
    for level, quantile in ((0.95, 1.96), (0.5, 0.6745)):
        low, high = priors.bootstrap(lambda p, v: v.mean(), u, u, n=2000, level=level)
        assert (high - low) / 2 == pytest.approx(quantile * u.std() / 20, rel=0.1)


def test_estimate_all():
    p, u = beta_mixture(0.3, 200, 800, 0)
    assert set(priors.estimate_all(p, u)) == {"BBE", "DEDPUL", "MPE", "EN", "ReMPE"}
    result = priors.estimate_all(p, u, *gaussian_features(0.3, 100, 3, 5.0, 0))
    assert set(result) == {"BBE", "DEDPUL", "MPE", "EN", "ReMPE", "KM1", "KM2"}
    assert all(type(value) is not np.ndarray and 0 <= value <= 1 for value in result.values())


@settings(max_examples=60, deadline=None)
@given(levels, levels, st.randoms(use_true_random=False))
def test_every_score_estimator_stays_in_range_and_ignores_order(p, u, random):
    shuffled_p, shuffled_u = random.sample(p, len(p)), random.sample(u, len(u))
    for estimator in ALL:
        value = estimator(np.array(p), np.array(u))
        assert 0 <= value <= 1
        assert estimator(np.array(shuffled_p), np.array(shuffled_u)) == pytest.approx(value, abs=1e-9)


# ---- errors


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("wrong", [[], [np.nan, 0.5], [1.5], [-0.1], [[0.5]], [np.inf]])
def test_wrong_scores(estimator, wrong):
    good = np.array([0.2, 0.5, 0.7])
    with pytest.raises(ValueError, match=r"^p must"):
        estimator(np.array(wrong), good)
    with pytest.raises(ValueError, match=r"^u must"):
        estimator(good, np.array(wrong))


def test_wrong_settings():
    p, u, x = np.array([0.5, 0.9]), np.array([0.1, 0.2, 0.8]), np.zeros((3, 2))
    scores, mask = torch.rand(2, 5), torch.ones(2, 5, dtype=torch.bool)
    wrong = [
        ("delta", lambda: priors.bbe(p, u, delta=0)),
        ("gamma", lambda: priors.bbe(p, u, gamma=-1)),
        ("delta", lambda: priors.scott_mpe(p, u, delta=1)),
        ("delta", lambda: priors.bbe_batch(scores, mask, mask, delta=2)),
        ("is_p", lambda: priors.bbe_batch(scores, mask[:1], mask)),
        ("is_u", lambda: priors.bbe_batch(scores, mask, mask.int())),
        ("scores", lambda: priors.bbe_batch(scores[0], mask[0], mask[0])),
        ("share", lambda: priors.regroup(priors.bbe, p, u, share=1.1)),
        ("features", lambda: priors.regroup(priors.bbe, p, u, features_u=x)),
        ("features", lambda: priors.regroup(priors.bbe, p, u, features_p=x, features_u=x)),
        ("bootstrap", lambda: priors.bootstrap(priors.bbe, p, u, n=0)),
        ("bootstrap", lambda: priors.bootstrap(priors.bbe, p, u, level=1)),
        ("both", lambda: priors.estimate_all(p, u, features_p=x)),
        ("KM3", lambda: priors.km(x, x, "KM3")),
        ("max_points", lambda: priors.km(x, x, max_points=0)),
        ("width", lambda: priors.km(x, np.zeros((3, 4)))),
        ("features_u", lambda: priors.km(x, np.full((3, 2), np.nan))),
        ("features_p", lambda: priors.km(np.zeros(3), x)),
    ]
    for word, call in wrong:
        with pytest.raises(ValueError, match=word) as error:
            call()
        assert "\n" not in str(error.value)
