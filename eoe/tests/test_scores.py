"""Scores and metrics against slow references written from the formulas, in float64 and with loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import metrics
import scores
from evaluation import drop_similar, rows
from scores import normalise, reduce


def reference(v, ids, out, beta=0.25, t=1.0, cold=0.01) -> dict[str, float]:
    """All scores of one image by the printed equations; `cold` is the temperature of the two energies."""
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    s_in, s_out = [dot(v, w) for w in ids], [dot(v, w) for w in out]
    k, every = len(s_in), s_in + s_out
    z = sum(math.exp(s / t) for s in every)
    p = [math.exp(s / t) / z for s in every]
    z_in = sum(math.exp(s / t) for s in s_in)
    mcm = max(math.exp(s / t) / z_in for s in s_in)
    free = lambda x: cold * math.log(sum(math.exp((s - max(x)) / cold) for s in x)) + max(x)  # noqa: E731
    found = {
        "MCM": mcm,
        "MaxLogit": max(s_in),
        "Energy": free(s_in),
        "S_MSP": max(p[:k]),
        "EOE": max(p[:k]) - beta * max(p[k:], default=0.0),
    }
    if s_out:
        found["S_MAX"] = 1 / k if max(s_in) < max(s_out) else mcm
        found["S_Energy"] = free(s_in) - free(s_out)
        found["S_MaxLogit"] = max(s_in) - max(s_out)
    return found


def world(seed: int, n: int, k: int, l: int, d: int = 7):
    g = torch.Generator().manual_seed(seed)
    return tuple(normalise(torch.randn(m, d, generator=g)) if m else torch.zeros(0, d) for m in (n, k, l))


@pytest.mark.parametrize(("n", "k", "l"), [(9, 5, 4), (1, 1, 1), (3, 1, 6), (4, 6, 0), (5, 2, 1)])
def test_scores_equal_the_formulas(n, k, l):
    images, ids, out = world(n + k, n, k, l)
    for chunk in (2, 1000):
        stats = reduce(images, ids, out, chunk=chunk)
        for i in range(n):
            for name, value in reference(*(x.double().tolist() for x in (images[i], ids, out))).items():
                got = scores.SCORES[name][0](stats)[i].item()
                assert got == pytest.approx(value, rel=2e-6, abs=1e-7), name


def test_degenerate_input():
    zero = torch.zeros(2, 4)
    stats = reduce(zero, torch.eye(4)[:3], torch.eye(4)[3:])
    assert scores.s_eoe(stats).tolist() == pytest.approx([0.25 - 0.25 * 0.25] * 2)
    assert scores.s_max(stats).tolist() == pytest.approx([1 / 3] * 2)  # equal similarities are not a rejection
    assert len(reduce(zero[:0], torch.eye(4), torch.zeros(0, 4))) == 0
    with pytest.raises(ValueError):
        reduce(zero, zero[:0], zero)


def test_limits_of_beta_and_names():
    images, ids, out = world(3, 20, 6, 5)
    stats, alone = reduce(images, ids, out), reduce(images, ids, out[:0])
    p = (images.double() @ torch.cat([ids, out]).double().T).softmax(1)
    assert torch.allclose(scores.s_eoe(stats, 0.0), p[:, :6].max(1).values, atol=1e-7)
    assert torch.allclose(scores.s_eoe(alone), scores.mcm(stats), atol=1e-12)


def test_float32_similarities_rank_like_float64_with_many_labels():
    images, ids, out = world(0, 400, 1000, 600, d=64)
    p = (images.double() @ torch.cat([ids, out]).double().T).softmax(1)
    exact = p[:, :1000].max(1).values - 0.25 * p[:, 1000:].max(1).values
    ours = scores.s_eoe(reduce(images, ids, out))
    assert (ours.argsort() == exact.argsort()).float().mean() > 0.97
    assert (ours - exact).abs().max() < 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6), st.floats(0, 2))
def test_invariants(seed, k, l, beta):
    images, ids, out = world(seed, 8, k, l)
    stats = reduce(images, ids, out)
    value = scores.s_eoe(stats, beta)
    order = torch.randperm(l, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(value, scores.s_eoe(reduce(images, ids.flip(0), out[order]), beta), atol=1e-7)
    assert torch.allclose(value, scores.s_eoe(reduce(images, ids, out, chunk=3), beta), atol=1e-7)
    assert (value <= scores.s_eoe(stats, 0.0) + 1e-12).all()
    mcm = scores.mcm(stats)
    assert (mcm >= 1 / k - 1e-6).all() and (mcm <= 1 + 1e-12).all()
    assert (scores.s_max(stats) <= mcm + 1e-12).all()


def test_neglabel_and_clipn():
    images, ids, out = world(4, 6, 3, 4)
    share = scores.neglabel(images, ids, out, t=0.1)
    s = images.double() @ torch.cat([ids, out]).double().T / 0.1
    assert torch.allclose(share, s.softmax(1)[:, :3].sum(1), atol=1e-6)
    halves = [scores.neglabel(images, ids, out[i::2], t=0.1) for i in (0, 1)]
    assert torch.allclose(scores.neglabel(images, ids, out, 0.1, groups=2), sum(halves) / 2)
    with pytest.raises(ValueError):
        scores.neglabel(images, ids, out, groups=5)
    yes, no = ids, normalise(ids + 0.3 * torch.randn(3, 7, generator=torch.Generator().manual_seed(1)))
    win, differ = scores.clipn(images, yes, no, tau=0.5)
    for i, v in enumerate(images.double()):
        a, b = (torch.exp(x.double() @ v / 0.5) for x in (yes, no))
        p, q = a / a.sum(), b / (a + b)
        assert win[i].item() == pytest.approx(1 - q[p.argmax()].item())
        assert differ[i].item() == pytest.approx(((1 - q) * p).sum().item())


# ------------------------------------------------------------------------------------------------------------- metrics


def slow_official(a, b) -> float:
    """The rule in words: among distinct thresholds down to full recall, the nearest recall; the lowest of equals."""
    best, answer = None, None
    for th in sorted({*a, *b}):
        recall = sum(x >= th for x in a) / len(a)
        higher = [t for t in {*a, *b} if t > th]
        if recall == 1 and any(all(x >= t for x in a) for t in higher):
            continue  # below the threshold at which recall first reaches 1
        gap = abs(recall - 0.95)
        if best is None or gap < best:
            best, answer = gap, 100 * sum(x >= th for x in b) / len(b)
    return answer


def slow_first(a, b) -> float:
    th = max(t for t in {*a, *b} if sum(x >= t for x in a) >= 0.95 * len(a) - 1e-9)
    return 100 * sum(x >= th for x in b) / len(b)


numbers = st.lists(st.integers(0, 12).map(lambda x: x / 4), min_size=1, max_size=45)


@settings(max_examples=200, deadline=None)
@given(numbers, numbers)
def test_fpr_rules(a, b):
    assert metrics.fpr95_official(a, b) == pytest.approx(slow_official(a, b))
    assert metrics.fpr95_first(a, b) == pytest.approx(slow_first(a, b))
    pairs = sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b))
    assert metrics.auroc(a, b) == pytest.approx(100 * pairs)


def test_fpr_conventions_differ():
    """OOD scores between two ID scores count in the official rule, and its recall may be below 95 %."""
    a = [float(i) for i in range(1, 21)]  # recall 0.95 exactly at threshold 2
    assert metrics.fpr95_official(a, [1.5, 0.5]) == 50.0
    assert metrics.fpr95_first(a, [1.5, 0.5]) == 0.0
    few = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0]  # 12/13 = 0.923 is nearer than 1
    assert metrics.fpr95_official(few, [1.2]) == 100.0 and metrics.fpr95_official(few, [0.5]) == 0.0


def test_ties_at_the_bottom_make_fpr_100():
    """More than 5 % rejected ID images that tie with the OOD ones: the 100.00 entries of Table 22."""
    assert metrics.fpr95_official([1.0] * 85 + [0.0] * 15, [0.0] * 50) == 100.0


def test_metrics_refuse_nonsense():
    for a, b in (([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([math.inf], [1.0])):
        with pytest.raises(ValueError):
            metrics.measure(a, b)
    assert metrics.measure([1, 1, 1], [1, 1])["AUROC"] == 50.0
    assert metrics.aupr([2.0, 3.0], [1.0]) == 100.0


def test_threshold_keeps_95_per_cent():
    value = np.random.default_rng(0).normal(size=200)
    cut = metrics.threshold95(value)
    assert (value >= cut).mean() == 0.95
    assert metrics.threshold95([0.3]) == 0.3


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_rows_agree_with_a_plain_evaluation():
    from evaluation import Labels

    images, ids, out = world(1, 60, 4, 3)
    other = world(2, 50, 4, 3)[0]
    found = {
        (m, x): v
        for _, m, x, v in rows(
            images, {"o": other}, ids, [Labels("EOE", ["a", "B", "c"], out, True, (0.5,))], 0.25, ["b"]
        )
    }
    a, b = (
        [reference(*(x.double().tolist() for x in (v, ids, out)), beta=0.5)["EOE"] for v in w] for w in (images, other)
    )
    truth = roc_auc_score([1] * 60 + [0] * 50, a + b)
    assert found["EOE", "beta=0.5"]["AUROC"] == pytest.approx(100 * truth)
    assert found["EOE", ""]["labels"] == 3 and found["EOE", ""]["hits"] == 1
    assert found["MCM", ""]["labels"] == 0


def test_similarity_filter_tolerates_rounding():
    ids = normalise(torch.tensor([[1.0, 2.0, 3.0]]))
    out = torch.cat([ids * 1.0000001, normalise(torch.tensor([[3.0, -1.0, 0.0]]))])
    assert drop_similar(["same", "other"], out, ids)[0] == [
        "same",
        "other",
    ]  # at 1.0 nothing goes, whatever the rounding
    assert drop_similar(["same", "other"], out, ids, 0.85)[0] == ["other"]


# ---------------------------------------------------------------------------------------------------- streaming metrics


@settings(max_examples=150, deadline=None)
@given(numbers, numbers, st.integers(1, 7))
def test_streamed_metrics_equal_the_library(a, b, chunk):
    stream = metrics.Stream(a)
    for i in range(0, len(b), chunk):
        stream.add(b[i : i + chunk])
    found = stream.result()
    for name, function in (("FPR95", metrics.fpr95_official), ("FPR95_first", metrics.fpr95_first),
                           ("AUROC", metrics.auroc), ("AUPR", metrics.aupr)):  # fmt: skip
        assert found[name] == pytest.approx(function(a, b), rel=1e-12, abs=1e-9), name


def test_streamed_metrics_at_size_and_at_nothing():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 20_000), rng.normal(0, 1, 30_001)
    stream = metrics.Stream(a)
    for part in np.array_split(b, 9):
        stream.add(part)
    assert len(stream.at) == 20_000  # what it keeps does not grow with the OOD scores
    found = stream.result()
    assert found["AUROC"] == pytest.approx(metrics.auroc(a, b), abs=1e-9)
    assert found["FPR95"] == metrics.fpr95_official(a, b) and found["FPR95_first"] == metrics.fpr95_first(a, b)
    with pytest.raises(ValueError):
        metrics.Stream([1.0]).result()
    with pytest.raises(ValueError):
        metrics.Stream([1.0]).add([math.nan])


@pytest.mark.parametrize("t", [1.0, 0.5, 0.01])
def test_every_score_on_ties_and_one_class(t):
    """Equal names, an envisioned name equal to an ID name, one class: the plain loops, image by image, at T."""
    v = normalise(torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]))
    w = normalise(torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 1.0]]))
    for ids, out in ((w[:1], w[:1]), (w[[0, 0, 1]], w[[0, 1, 1]]), (w[:1], w[1:])):
        stats = reduce(v, ids, out, (t, scores.T_ENERGY))
        for i in range(3):
            want = reference(*(x.double().tolist() for x in (v[i], ids, out)), t=t, cold=t)
            for name, function in (("EOE", scores.s_eoe), ("MCM", scores.mcm), ("S_MSP", scores.s_msp),
                                   ("S_MAX", scores.s_max), ("S_Energy", scores.s_energy)):  # fmt: skip
                assert function(stats, t=t)[i].item() == pytest.approx(want[name], rel=1e-4, abs=1e-6), (name, i)
            assert scores.s_maxlogit(stats)[i].item() == pytest.approx(want["S_MaxLogit"], abs=1e-6)
