"""ProMix: a batch against its formulas with linear networks, selection, mixing, strong views."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import settings

import readers
import trainer
from baselines import promix
from readers import Part
from trainer import Task

CPU = torch.device("cpu")


def learner(*args, n=40):
    """Two linear networks with two heads each; views are the images scaled by 0.9 (weak) and 0.6 (strong)."""
    d = readers.load("digits", trainer.Path("."), seed=0)
    task = Task(d.train.x[:n], d.train.y[:n], Part(d.test.x[:30], d.test.y[:30]), d.kind, noise="instance", rho=0.4)
    own = promix.ProMix(settings("--methods", "promix", "--epochs", "600", *args), task, 0, CPU)
    g = torch.Generator().manual_seed(3)
    w = 0.2 * torch.randn(2, 2, 64, 10, generator=g)  # network, head

    class Two:
        def __init__(self, k):
            self.k = k

        def both(self, x):
            return x.flatten(1) @ w[self.k, 0], x.flatten(1) @ w[self.k, 1]

    own.plain = [Two(0), Two(1)]
    own.stronger = lambda x, seed: -x.float()
    own.augment = lambda x, crops: (x.float() * 0.9 if x.dtype == torch.uint8 else x * -0.6).permute(0, 3, 1, 2) / 16
    bias = torch.softmax(torch.randn(2, 2, 10, generator=g), 2)
    own.buffers["bias"] = bias.clone()
    return own, w, bias


def soft_ce(z, t):
    z = z.double()
    return sum(
        -float(t[a, c]) * float(z[a, c] - torch.logsumexp(z[a], 0)) for a in range(len(z)) for c in range(10)
    ) / len(z)


@pytest.mark.parametrize("at", [10, 75, 300, 551])
@pytest.mark.parametrize("debias", ["0.8", "0"])
def test_a_batch_against_the_formulas(at, debias):
    own, w, bias = learner("--promix.debias", debias, "--promix.tau", "0.2")
    i = torch.arange(3, 15)
    base = [torch.arange(12) % 3 == 0, torch.arange(12) % 4 == 0]
    found = float(own.promix_step(i, base, at, None, np.random.RandomState(7)))

    draw, a = np.random.RandomState(7), float(debias)
    draw.randint(2**31)
    x = own.x[i].float().permute(0, 3, 1, 2) / 16
    weak, strong, y = 0.9 * x, 0.6 * x, own.y[i]
    logits = lambda k, head, v: v.flatten(1) @ w[k, head]  # noqa: E731
    p = [torch.softmax(logits(k, 0, weak), 1) for k in (0, 1)]
    chosen, labels = [], []
    for k in (0, 1):
        mine = [bool(base[k][j]) or float(p[k][j, y[j]]) > 0.2 for j in range(12)]
        said = (logits(k, 0, weak) - a * bias[k, 0].log()).argmax(1)
        labels.append(F.one_hot(torch.tensor([int(y[j]) if mine[j] else int(said[j]) for j in range(12)]), 10).double())
        chosen.append(mine)
    if at > 350:
        for k in (0, 1):
            room = int(12 * 0.9) - sum(chosen[k])
            fit = [j for j in range(12) if not chosen[k][j] and min(float(q[j].max()) for q in p) > 0.2]
            fit = [j for j in fit if int(p[0][j].argmax()) == int(p[1][j].argmax())]
            fit.sort(key=lambda j: -float(p[0][j].max() + p[1][j].max()))
            added = fit[: max(0, room)]
            chosen[k] = [c or j in added for j, c in enumerate(chosen[k])]
    ramp, expected = min(1, at / 50), 0.0
    rest_weight = 1.0 if not a else 0.1 * at / 100 if at < 100 else 0.0
    for k in (0, 1):
        c, u = [[j for j in range(12) if chosen[k][j] == flag] for flag in (True, False)]
        assert len(c) > 1 and u
        margin = a * bias[k].log()
        for head in (0, 1):
            t = labels[k][c]
            expected += soft_ce(logits(k, head, weak[c]) + margin[0], t)
            more = soft_ce(logits(k, head, strong[c]) + margin[0], t)
            lam = draw.beta(4, 4)
            lam, order = max(lam, 1 - lam), draw.permutation(len(c))
            mixed = lam * weak[c] + (1 - lam) * weak[c][order]
            more += soft_ce(logits(k, head, mixed.float()) + margin[0], lam * t + (1 - lam) * t[order])
            lam = draw.beta(1, 1)
            mask = torch.from_numpy(promix.fmix_mask(8, 8, lam, draw))
            order = draw.permutation(len(c))
            z = logits(k, head, mask * weak[c] + (1 - mask) * weak[c][order]) + margin[0]
            more += lam * soft_ce(z, t) + (1 - lam) * soft_ce(z, t[order])
            expected += ramp * more
        q = torch.softmax(logits(k, 0, weak[u]) - a * bias[k, 1].log(), 1) ** 2
        q = q / q.sum(1, keepdim=True)
        expected += rest_weight * soft_ce(logits(k, 1, weak[u]) + margin[1], q)
        expected += rest_weight * ramp * soft_ce(logits(k, 1, strong[u]) + margin[1], q)
        for kind, rows in enumerate((c, u)):
            new = 0.9999 * bias[k, kind] + 0.0001 * p[k][rows].mean(0)
            assert torch.allclose(own.buffers["bias"][k, kind], new, atol=1e-7)
            assert not torch.equal(own.buffers["bias"][k, kind], bias[k, kind])
    assert found == pytest.approx(expected, rel=1e-4)


def test_base_selection_takes_the_smallest_losses_of_each_class():
    losses, y = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    # ceil(0.5 * 6 / 2) = 2 of each class
    assert promix.base_selection(losses, y, 0.5, 2).tolist() == [False, True, True, True, True, False]
    assert promix.base_selection(losses, y, 0.5, 3).tolist() == [False, True, False, False, True, False]
    assert promix.base_selection(losses, y, 0.0, 2).tolist() == [False, True, False, False, True, False], "at least one"
    assert promix.base_selection(losses, y, 1.0, 1).all()


@pytest.mark.parametrize("lam, size", [(0.0, (8, 8)), (0.3, (32, 32)), (0.5, (7, 9)), (1.0, (8, 8))])
def test_fmix_masks_have_their_share_and_are_low_in_frequency(lam, size):
    shares, edges = [], []
    for seed in range(20):
        m = promix.fmix_mask(*size, lam, np.random.RandomState(seed))
        assert m.shape == size and set(np.unique(m)) <= {0.0, 1.0}
        shares.append(m.sum() - lam * m.size)
        edges.append((m[1:] != m[:-1]).mean())
    assert max(map(abs, shares)) < 1
    if 0 < lam < 1:
        assert len({s > 0 for s in shares}) == 2 or lam * m.size == int(lam * m.size), "up and down"
        assert np.mean(edges) < lam * (1 - lam), "neighbours mostly agree: half of what white noise has"


def test_label_guessing_adds_the_surest_on_which_both_agree_until_nine_tenths():
    p = torch.full((10, 3), 0.05)
    for j, top in enumerate([0.9] * 10):
        p[j, j % 3] = top
    other = p.clone()
    other[4] = p[4].roll(1)  # not agreed
    other[5, 2] = 0.5  # not sure enough
    p[7, 1], other[8, 2] = 0.99, 0.95
    chosen = torch.tensor([True] * 4 + [False] * 6)
    assert promix.guessed(chosen, [p, other], 0.8).tolist() == [False] * 6 + [True] * 4
    chosen[9] = chosen[6] = chosen[4] = True  # seven taken: room for two
    assert torch.nonzero(promix.guessed(chosen, [p, other], 0.8))[:, 0].tolist() == [7, 8]
    chosen[5] = True  # eight: room for one, the surest
    assert torch.nonzero(promix.guessed(chosen, [p, other], 0.8))[:, 0].tolist() == [7]
    chosen[7] = True
    assert not promix.guessed(chosen, [p, other], 0.8).any()


def test_strong_views_are_drawn_for_each_image_and_repeat_with_the_seed():
    d = readers.load("digits", trainer.Path("."), seed=0)
    task = Task(d.train.x[:40], d.train.y[:40], Part(d.test.x[:3], d.test.y[:3]), d.kind)
    own = promix.ProMix(settings("--methods", "promix"), task, 0, CPU)
    x = own.x[:1].expand(64, -1, -1, -1)
    before = torch.random.get_rng_state()
    a, b, c = own.stronger(x, 5), own.stronger(x, 5), own.stronger(x, 6)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert a.dtype == torch.uint8 and a.shape == x.shape
    assert torch.equal(a, b) and not torch.equal(a, c)
    kinds = len({v.numpy().tobytes() for v in a})
    same = sum(torch.equal(v, x[0]) for v in a)
    assert kinds > 20 and 5 < same < 40, "an eighth is left as it is, and some operations change nothing"


def test_rates_and_defaults():
    d = readers.load("digits", trainer.Path("."), seed=0)
    task = Task(d.train.x[:40], d.train.y[:40], Part(d.test.x[:3], d.test.y[:3]), d.kind)
    own = promix.ProMix(settings("--methods", "promix", "--epochs", "100", "--promix.lr", "0.05"), task, 0, CPU)
    assert (own.tau, own.debias) == (0.99, 0.8)
    assert own.learning_rate("warmup", 0) == pytest.approx(0.05)
    warm = own.phases()[0].epochs
    assert own.learning_rate("main", 50 - warm) == pytest.approx(0.05 * 0.5005)
    assert own.learning_rate("main", 100 - warm) == pytest.approx(5e-5)
    task.kind = readers.Kind(**{**vars(d.kind), "classes": 100})
    wide = promix.ProMix(settings("--methods", "promix"), task, 0, CPU)
    assert (wide.tau, wide.debias) == (0.95, 0.5)
    assert math.isclose(own.rest_weight(25), 0.025) and own.rest_weight(100) == 0


def test_an_epoch_selects_with_each_network_and_leaves_out_a_batch_that_is_not_full():
    own, _, _ = learner("--promix.batch", "16")
    d = promix.ProMix(own.s, own.task, 0, CPU)
    d.select = lambda k: torch.arange(40) % (2 + k) == 0
    seen = []

    def step(i, base, at, crops, draw):
        seen.append(i)
        assert torch.equal(base[0], i % 2 == 0) and torch.equal(base[1], i % 3 == 0)
        return sum(p.sum() for k in (0, 1) for p in d.plain[k].parameters()) * 0

    d.promix_step = step
    d.epoch("main", 3, 13)
    assert [len(i) for i in seen] == [16, 16] and len(set(torch.cat(seen).tolist())) == 32
    first = torch.cat(seen)
    seen.clear()
    d.epoch("main", 3, 13)
    assert torch.equal(torch.cat(seen), first)
    seen.clear()
    d.epoch("main", 4, 14)
    assert not torch.equal(torch.cat(seen), first)
