"""The memory: its formulas against loops, its limit, windows, the appearance, what is kept."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import crstm
from crstm import Basis, Entry, Memory, Options

H, W, C = 7, 9, 5
ALL = torch.ones(H, W, dtype=torch.bool)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(random(seed, C, H, W), dim=0)


def entries(n: int) -> list[Entry]:
    return [Entry(t, unit(t), random(50 + t, H, W).sigmoid(), random(90 + t, C + 1, H, W)) for t in range(n)]


def by_loops(key, stored, o: Options) -> np.ndarray:
    """Equations (1) and (2) in float64, a cell at a time."""
    out, k = np.zeros((H, W)), key.double().numpy()
    for y in range(H):
        for x in range(W):
            top, left = y // o.tile * o.tile, x // o.tile * o.tile
            found = []
            for e, around in stored:
                for v in range(H):
                    for u in range(W):
                        if not top - around <= v < top + o.tile + around:
                            continue
                        if not left - around <= u < left + o.tile + around:
                            continue
                        s = float(k[:, y, x] @ e.key[:, v, u].double().numpy()) / o.tau
                        found.append((s, float(e.value[v, u])))
            found = sorted(found, key=lambda p: -p[0])[: o.top or None]
            a = np.exp(np.array([s for s, _ in found]) - found[0][0])
            out[y, x] = float(a @ np.array([v for _, v in found]) / a.sum())
    return out


@pytest.mark.parametrize("around", [(math.inf, math.inf), (2, 1), (0, 3)])
@pytest.mark.parametrize("top,tile", [(0, 3), (6, 4), (1000, 8), (1, 1)])
def test_the_read_out_equals_loops(around, top, tile):
    o = Options(tau=0.2, top=top, tile=tile)
    stored = list(zip(entries(3), (*around, 1), strict=True))
    assert np.allclose(crstm.read(unit(9), stored, ALL, o).numpy(), by_loops(unit(9), stored, o), atol=2e-5)


def test_its_limit_is_the_read_out_of_space_time_memories():
    """All cells of all frames, the largest of K_m^T K_q / tau, nothing else: written with one matrix of all scores."""
    o, stored = Options(tau=0.2, top=12, tile=4), entries(4)
    s = unit(9).reshape(C, -1).T @ torch.cat([e.key.reshape(C, -1) for e in stored], 1) / 0.2
    s, i = s.topk(12, 1)
    plain = (s.softmax(1) * torch.cat([e.value.flatten() for e in stored])[i]).sum(1).view(H, W)
    got = crstm.read(unit(9), [(e, math.inf) for e in stored], ALL, o)
    assert torch.allclose(got, plain, atol=1e-6)
    m = Memory(replace(o, near=math.inf, far=math.inf, alpha=0.0, reach=99, nearest=4))
    for e in stored:
        m.interact(e)
    m.start(0)
    assert torch.allclose(m.answer(unit(9), None, 7).sigmoid(), plain, atol=1e-5)


def test_only_tiles_that_are_wanted_are_read():
    where = torch.zeros(H, W, dtype=torch.bool)
    where[5, 2] = True
    o = Options(tile=4)
    got, whole = (crstm.read(unit(9), [(entries(1)[0], 2)], w, o) for w in (where, ALL))
    assert torch.equal(got[4:, :4], whole[4:, :4]) and not got[:4].any() and not got[4:, 4:].any()
    assert not crstm.read(unit(9), [], ALL, o).any()


def test_the_appearance_is_a_weighted_ridge_regression():
    """Against least squares on rows scaled by the root of their weight, with the ridge as further rows."""
    stored = entries(2)
    x = np.concatenate([e.vector.flatten(1).T.double().numpy() for e in stored])
    y = np.concatenate([e.value.flatten().double().numpy() for e in stored])
    weight = np.sqrt(0.5 * y / y.sum() + 0.5 * (1 - y) / (1 - y).sum())
    rows = np.concatenate([x * weight[:, None], np.sqrt(0.3) * np.eye(C + 1)])
    want = np.linalg.lstsq(rows, np.r_[(2 * y - 1) * weight, np.zeros(C + 1)], rcond=None)[0]
    assert np.allclose(crstm.fit(stored, 0.3).numpy(), want, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_without_object_or_background_there_is_no_appearance(value):
    e = entries(1)[0]
    e.value = torch.full((H, W), value)
    assert crstm.fit([e], 0.1) is None and crstm.fit([], 0.1) is None


def test_the_appearance_is_added_to_the_log_odds():
    m = Memory(Options(tile=4, alpha=0.7, reach=99))
    m.interact(entries(1)[0])
    m.start(0)
    vector = random(3, C + 1, H, W)
    read = crstm.read(unit(9), m.entries(5), ALL, m.options).clamp(1e-3, 1 - 1e-3)
    want = torch.log(read / (1 - read)) + 0.7 * (m.weights[:, None, None] * vector).sum(0)
    assert torch.allclose(m.answer(unit(9), vector, 5), want, atol=1e-5)


def test_the_prompts_are_added_too():
    m = Memory(Options(alpha=0, beta=0.4, reach=99))
    m.interact(entries(1)[0])
    m.start(0)
    told = random(3, H, W)
    plain, with_prompts = m.answer(unit(9), None, 5), m.answer(unit(9), None, 5, told)
    assert torch.allclose(with_prompts - plain, 0.4 * told, atol=1e-5)


def test_a_basis_centres_turns_and_scales():
    features = 3 * random(1, 6, 20, 30) + torch.arange(6.0)[:, None, None]
    features[0] *= 5  # after centring the first channel says most
    b = Basis.of(features, 3)
    key, vector = b.key(features), b.vector(features)
    assert key.shape == (3, 20, 30) and torch.allclose(key.norm(dim=0), torch.ones(20, 30), atol=1e-5)
    assert torch.allclose(b.axes @ b.axes.T, torch.eye(3), atol=1e-5) and float(b.axes[0, 0].abs()) > 0.95
    assert vector.shape == (7, 20, 30) and torch.equal(vector[-1], torch.ones(20, 30))
    assert torch.allclose(vector[:-1].square().mean(0), torch.ones(20, 30), atol=1e-4)
    u = torch.nn.functional.normalize(features - features.mean((1, 2), keepdim=True), dim=0).flatten(1)
    values = torch.linalg.svdvals(u)[:3]  # what the best three directions keep
    assert (b.axes @ u).norm() == pytest.approx(float(values.norm()), rel=1e-4)


def test_what_is_kept_and_what_is_read():
    m = Memory(Options(rounds=3, nearest=2, recent=2, near=1, far=5))
    for e in entries(5):
        m.interact(e)
    assert list(m.interacted) == [2, 3, 4]  # the oldest went first
    m.interact(entries(5)[2])
    assert list(m.interacted) == [3, 4, 2]  # a frame that is touched again is the newest
    m.start(4)
    for t in (5, 6, 7):
        m.add(Entry(t, unit(t), torch.full((H, W), 0.9)))
    assert [(e.frame, a) for e, a in m.entries(8)] == [(4, 5), (3, 5), (6, 1), (7, 1)]
    m.start(3)
    assert [e.frame for e, _ in m.entries(2)] == [2, 3]
    m.forget(2)
    assert [e.frame for e, _ in m.entries(2)] == [3, 4]


def test_the_appearance_is_fitted_anew_after_an_interaction():
    m = Memory(Options())
    m.interact(entries(2)[0])
    m.start(0)
    first = m.weights
    m.start(0)
    assert m.weights is first
    m.interact(entries(2)[1])
    m.start(1)
    assert torch.allclose(m.weights, crstm.fit(entries(2), 0.01), atol=1e-6) and not torch.allclose(m.weights, first)


def test_where_the_object_is_looked_for():
    m = Memory(Options(reach=1))
    value = torch.zeros(H, W)
    value[3, 4] = 0.5
    m.interact(Entry(0, unit(0), value, random(0, C + 1, H, W)))
    m.start(0)
    assert m.region().nonzero().tolist() == [[y, x] for y in (2, 3, 4) for x in (3, 4, 5)]
    told = torch.full((H, W), -1.0)
    told[0, 0] = 1
    assert m.region(told).sum() == 10 and bool(m.region(told)[0, 0])
    m.add(Entry(1, unit(1), torch.full((H, W), 0.4)))  # nothing: it is looked for where it was last seen
    assert m.region().sum() == 9 and m.seen is None
    m.add(Entry(2, unit(2), 1.2 * value.roll(2, 0)))
    assert m.region().nonzero()[0].tolist() == [4, 3] and m.seen.frame == 2


def test_frames_without_the_object_teach_nothing_and_after_a_loss_it_is_read_everywhere_until_it_is_back():
    """What hid it was background where it comes back: such frames would say so of the object, too."""
    value = torch.zeros(H, W)
    value[1:3, 1:5] = 1
    m = Memory(Options(alpha=0))
    m.interact(Entry(0, unit(0), value))
    m.start(0)
    m.add(Entry(1, unit(1), value))
    m.add(Entry(2, unit(2), 0.3 * value))
    assert m.lost and [e.frame for e in m.passing] == [1] and m.last is value
    assert [(e.frame, around) for e, around in m.entries(3)] == [(0, math.inf), (1, math.inf)]
    part = torch.zeros(H, W)
    part[4, :3] = 1  # three of eight cells: it comes back
    m.add(Entry(3, unit(3), part))
    assert m.lost and m.last is part and m.seen.frame == 1
    assert [(e.frame, around) for e, around in m.entries(4)] == [(0, math.inf), (1, math.inf)]
    part = part.clone()
    part[5, 0] = 1
    m.add(Entry(4, unit(4), part))
    assert not m.lost and m.seen.frame == 4
    assert [e.frame for e, _ in m.entries(5)] == [0, 1, 3, 4]
    m.add(Entry(5, unit(5), 0 * value))
    m.start(0)  # a new pass
    assert not m.lost and m.seen is None and [e.frame for e, _ in m.entries(1)] == [0]


def test_what_is_not_near_is_found_anywhere():
    """Two kinds of keys; the object jumps out of reach, hides for a frame, and comes back elsewhere."""
    value = torch.zeros(H, W)
    value[1:3, 1:3] = 1

    def keys(mask: torch.Tensor) -> torch.Tensor:
        return torch.stack([mask, 1 - mask])

    m = Memory(Options(alpha=0, near=1, far=1, reach=1, tile=2))
    m.interact(Entry(0, keys(value), value, None))
    m.start(0)
    for t, now in ((1, value.roll((4, 5), (0, 1))), (2, 0 * value), (3, value.roll(6, 1))):
        found = m.answer(keys(now), None, t)
        m.add(Entry(t, keys(now), found.sigmoid()))
        assert torch.equal(found > 0, now > 0)
    assert m.seen.frame == 3


def test_outside_of_it_there_is_surely_nothing():
    m = Memory(Options(reach=0, tile=1, alpha=0.0))
    value = torch.zeros(H, W)
    value[3, 4] = 1.0
    m.interact(Entry(0, unit(0), value, random(0, C + 1, H, W)))
    m.start(0)
    answer = m.answer(unit(0), None, 1)
    rest = answer[answer != answer[3, 4]]
    assert len(rest) == H * W - 1 and torch.allclose(rest, torch.tensor(math.log(1e-3 / 0.999)), atol=1e-4)


def test_confidence():
    assert crstm.confidence(torch.tensor([[-1.0, 0.0], [2.0, 4.0]])) == pytest.approx(
        np.mean([2 / (1 + np.exp(-v)) - 1 for v in (2, 4)]), abs=1e-6
    )
    assert crstm.confidence(torch.full((2, 2), -0.1)) == 0


def test_it_follows_what_moves():
    """Every cell has a key of its own; all of them move two cells to the right."""
    key = unit(4)
    value = torch.zeros(H, W)
    value[2:5, 2:4] = 1
    m = Memory(Options(alpha=0, near=3, far=3, reach=3, tile=2, tau=0.01))
    m.interact(Entry(0, key, value, None))
    m.start(0)
    found = m.answer(key.roll(2, 2), None, 1) > 0
    assert torch.equal(found[:, 2:], (value.roll(2, 1) > 0)[:, 2:])  # what came in on the left has no counterpart
