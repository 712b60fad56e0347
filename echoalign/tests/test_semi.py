"""DivideMix: a step against its formulas with networks that are looked up; who divides whom; parts of others."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import settings

import readers
import trainer
from baselines import semi, single
from readers import Part
from trainer import Task

CPU = torch.device("cpu")


def task(n=40, **more):
    d = readers.load("digits", trainer.Path("."), seed=0)
    return Task(d.train.x[:n], d.train.y[:n], Part(d.test.x[:30], d.test.y[:30]), d.kind, **more)


def learner(cls, *args, **more):
    """With linear networks, and augmentations that scale an image by 1, 0.9, 0.8, ... in the order they are drawn."""
    out = cls(settings(*args), task(**more), 0, CPU)
    g = torch.Generator().manual_seed(3)
    w = 0.1 * torch.randn(2, 64, 10, generator=g)
    drawn = []

    def augment(x, generator):
        drawn.append(len(drawn))
        return x.float() / 16 * (1 - 0.1 * drawn[-1])

    out.forward = lambda k, x: x.flatten(1) @ w[k]
    out.augment, out.matrices, out.drawn = augment, w, drawn
    return out


def sharp(p):
    return [v**2 / sum(u**2 for u in p) for v in p]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("rest", [True, False])
def test_mixmatch_against_the_formulas(k, seed, rest):
    own = learner(semi.DivideMix, noise="instance", rho=0.4)
    i, u = torch.tensor([3, 8, 21]), torch.tensor([1, 30]) if rest else None
    chance = torch.tensor([0.9, 0.6, 0.75])
    loss = own.mixmatch(k, i, u, chance, None, np.random.RandomState(seed), 0.5)

    x = own.x.float().flatten(1) / 16
    soft = lambda v, net: torch.softmax(v @ own.matrices[net], 1)  # noqa: E731
    rows, targets = [], []
    first = [x[i] * f for f in (1.0, 0.9)]
    for n, item in enumerate(i.tolist()):
        mean = sum(soft(v, k)[n] for v in first) / 2
        one = F.one_hot(own.y[item], 10)
        targets.append(sharp((chance[n] * one + (1 - chance[n]) * mean).tolist()))
    rows, targets = [*first[0], *first[1]], targets * 2
    if rest:
        others = [x[u] * f for f in (0.8, 0.7)]
        guesses = [sharp((sum(soft(v, m)[n] for v in others for m in (0, 1)) / 4).tolist()) for n in range(len(u))]
        rows, targets = [*rows, *others[0], *others[1]], targets + guesses * 2
    draw = np.random.RandomState(seed)
    lam = draw.beta(4, 4)
    lam, order = max(lam, 1 - lam), draw.permutation(len(rows))
    mixed = [lam * rows[a] + (1 - lam) * rows[b] for a, b in enumerate(order)]
    wanted = [
        [lam * p + (1 - lam) * q for p, q in zip(targets[a], targets[b], strict=True)] for a, b in enumerate(order)
    ]
    p = torch.softmax(torch.stack(mixed) @ own.matrices[k], 1).tolist()
    expected = -sum(t * math.log(q) for a in range(6) for t, q in zip(wanted[a], p[a], strict=True)) / 6
    if rest:  # lambda_u 25, half way up its ramp
        gaps = [(q - t) ** 2 for a in range(6, 10) for t, q in zip(wanted[a], p[a], strict=True)]
        expected += 25 * 0.5 * sum(gaps) / len(gaps)
    expected += sum(0.1 * math.log(0.1 / (sum(row[c] for row in p) / len(p))) for c in range(10))
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_each_network_is_divided_by_the_other_and_the_ramp_takes_sixteen_epochs(monkeypatch):
    own = learner(semi.DivideMix, "--divide.batch", "8", noise="instance", rho=0.4)
    clean = [set(range(0, 16)), set(range(20, 36))]  # what each network's losses call clean
    own.losses = lambda k: torch.tensor([0.0 if j in clean[k] else 1.0 for j in range(40)])
    monkeypatch.setattr(semi, "clean_probability", lambda losses: 1 - 0.9 * losses)
    seen = {0: [], 1: []}

    def mixmatch(k, i, u, chance, crops, draw, ramp):
        seen[k].append((set(i.tolist()), set(u.tolist()), chance.tolist(), ramp))
        return own.plain[k].head.weight.sum() * 0

    own.mixmatch = mixmatch
    own.epoch("main", 4, 9)
    for k in (0, 1):
        assert set().union(*(a for a, *_ in seen[k])) == clean[1 - k]
        assert all(not u & clean[1 - k] and set(c) == {1.0} for _, u, c, _ in seen[k])
        assert [r for *_, r in seen[k]] == [(4 + j / 2) / 16 for j in range(2)]
    seen[0].clear()
    own.epoch("main", 40, 45)
    assert {r for *_, r in seen[0]} == {1.0}


@pytest.mark.parametrize("clean", [17, 33])
def test_a_last_batch_of_one_is_left_out(monkeypatch, clean):
    """On 8x8 pictures one image has a single value a channel at the top, which has no batch statistics."""
    own = semi.DivideMix(settings("--divide.batch", "16"), task(noise="instance", rho=0.4), 0, CPU)
    own.losses = lambda k: (torch.arange(40) >= clean).float()
    monkeypatch.setattr(semi, "clean_probability", lambda losses: 1 - 0.9 * losses)
    assert math.isfinite(float(own.epoch("main", 0, 5)))
    sizes = [len(b) for b in own.shuffled(torch.arange(clean), 5, 0, 0, clean // 16)]
    assert sizes == [16] * (clean // 16)
    assert [len(b) for b in own.shuffled(torch.arange(18), 5, 0, 0, 3)] == [16, 2, 16]


def test_at_ninety_per_cent_the_division_is_made_from_five_epochs(monkeypatch):
    monkeypatch.setattr(semi, "clean_probability", lambda v: v)
    g = torch.Generator().manual_seed(1)
    given = [3 * torch.rand(40, generator=g) for _ in range(7)]
    for rho, span in ((0.9, 5), (0.8, 1)):
        own = learner(semi.DivideMix, noise="symmetric", rho=rho)
        for epoch, losses in enumerate(given):
            own.losses = lambda k, losses=losses: losses * (1 + k)
            found = own.division(0)
            past = [(v - v.min()) / (v.max() - v.min()) for v in given[max(0, epoch + 1 - span) : epoch + 1]]
            assert torch.allclose(found, sum(past) / len(past), atol=1e-6)
        assert ("history" in own.buffers) == (span > 1)


def test_warm_up_subtracts_the_entropy_under_noise_that_depends_on_the_class():
    """Before the first step: cross-entropy, less the mean entropy of the predictions."""
    found = {}
    for noise in ("symmetric", "instance"):
        own = semi.DivideMix(settings("--batch", "40", "--divide.lr", "0"), task(noise=noise), 0, CPU)
        own.augment = lambda x, g: trainer.to_input(x)
        p = [torch.softmax(own.forward(k, trainer.to_input(own.x)), 1) for k in (0, 1)]
        entropy = sum(float(-(q * q.log()).sum(1).mean().detach()) for q in p) / 2
        found[noise] = float(own.warm(0))
    assert found["symmetric"] - found["instance"] == pytest.approx(entropy, rel=1e-3) and entropy > 1


def test_elr_targets_are_running_means():
    own = learner(single.Elr)
    i, x = torch.tensor([2, 5]), None
    z = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    own.forward = lambda k, x: z
    p = torch.softmax(z, 1)
    for _ in range(2):
        own.loss(i, x, own.y[i], 0)
    assert torch.allclose(own.buffers["targets"][i], 0.7 * 0.3 * p + 0.3 * p, atol=1e-4)
    assert not own.buffers["targets"][0].any()


def test_the_sieve_of_cores_drops_the_least_likely_labels_after_the_warm_up():
    own = learner(single.Cores, "--cores.warmup", "2", "--cores.beta", "0")
    z = torch.zeros(2, 10)
    z[:, 4] = 3.0
    own.forward = lambda k, x: z
    y = torch.tensor([4, 7])
    low, high = (float(F.cross_entropy(z[:1], torch.tensor([c]))) for c in (4, 7))
    assert float(own.loss(torch.tensor([0, 1]), None, y, 2)) == pytest.approx((low + high) / 2, rel=1e-4)
    assert float(own.loss(torch.tensor([0, 1]), None, y, 3)) == pytest.approx(low, rel=1e-4)


def test_the_rate_falls_at_the_milestone_itself():
    own = trainer.Learner(settings("--milestones", "2", "3"), task(), 0, CPU)
    assert [own.learning_rate("main", e) for e in range(4)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
