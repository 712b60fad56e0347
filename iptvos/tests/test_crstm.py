"""The memory: its formula against loops, its limit, windows, what is kept."""

import math

import numpy as np
import pytest
import torch

import crstm
from bench import plain_read
from crstm import Entry, Memory, Options

H, W, C = 7, 9, 5


def entries(n: int, seed: int = 0, weight: float = 0.9) -> list[Entry]:
    g = torch.Generator().manual_seed(seed)
    return [
        Entry(t, crstm.unit(torch.randn(C, H, W, generator=g)), torch.rand(H, W, generator=g), weight, (3.0 + t, 2.5))
        for t in range(n)
    ]


def query(seed: int = 9) -> torch.Tensor:
    return crstm.unit(torch.randn(C, H, W, generator=torch.Generator().manual_seed(seed)))


def by_loops(key, frame, length, centre, stored, o: Options) -> np.ndarray:
    """Equations (1) to (3) in float64, a cell at a time."""
    out = np.zeros((H, W))
    k = key.double().numpy()
    for y in range(H):
        for x in range(W):
            found = []
            for e in stored:
                dx, dy = centre[0] - e.centre[0], centre[1] - e.centre[1]
                for v in range(H):
                    for u in range(W):
                        gx, gy = x - u - dx, y - v - dy
                        if abs(gx) > o.window or abs(gy) > o.window:
                            continue
                        s = float(k[:, y, x] @ e.key[:, v, u].double().numpy()) / o.tau + math.log(e.weight)
                        s -= (gx * gx + gy * gy) / (2 * o.sigma**2) + o.decay * abs(frame - e.frame) / length
                        found.append((s, float(e.value[v, u])))
            found = sorted(found, key=lambda p: -p[0])[: o.top]
            if found:
                a = np.exp(np.array([s for s, _ in found]) - found[0][0])
                out[y, x] = float(a @ np.array([v for _, v in found]) / a.sum())
    return out


@pytest.mark.parametrize("window", [math.inf, 3.0, 0.5])
@pytest.mark.parametrize("top", [1, 6, 1000])
def test_formula_equals_loops(window, top):
    o = Options(sigma=2.0, window=window, top=top, decay=0.7)
    stored = entries(3)
    stored[1].weight = 0.3
    got = crstm.read(query(), 5, 10, (4.2, 3.1), stored, o)
    assert np.allclose(got.numpy(), by_loops(query(), 5, 10, (4.2, 3.1), stored, o), atol=2e-5)


def test_limit_is_plain_top_k_memory_reading():
    """lambda 0, sigma infinite, w 1: softmax over the top k of K_m^T K_q / tau over all cells, nothing else."""
    o = Options(tau=0.2, sigma=math.inf, window=math.inf, decay=0.0, top=12)
    stored = entries(4, weight=1.0)
    got = crstm.read(query(), 7, 20, (1.0, 1.0), stored, o)
    affinity = torch.cat([e.key.reshape(C, -1) for e in stored], 1).T @ query().reshape(C, -1) / 0.2
    values = torch.cat([e.value.reshape(-1) for e in stored])
    s, i = affinity.topk(12, 0)
    assert torch.allclose(got.reshape(-1), (s.softmax(0) * values[i]).sum(0), atol=1e-6)
    away = crstm.read(query(), 0, 20, (50.0, -9.0), stored, o)  # place and age do not count in the limit
    assert torch.allclose(got, away, atol=1e-6)
    assert not torch.allclose(got, crstm.read(query(), 7, 20, (1.0, 1.0), stored, Options(top=12)), atol=1e-2)


def test_region_windows_and_one_piece_agree():
    o = Options(sigma=2.0, window=4.0, top=8)
    region = (2, 1, 8, 6)
    got = crstm.read(query(), 3, 9, (4.0, 3.0), entries(5), o, region)
    whole = crstm.read(query(), 3, 9, (4.0, 3.0), entries(5), o)
    assert torch.allclose(got[1:6, 2:8], whole[1:6, 2:8], atol=1e-6)
    assert not got[0].any() and not got[:, :2].any() and not got[:, 8:].any()
    assert torch.allclose(got, plain_read(query(), 3, 9, (4.0, 3.0), entries(5), o, region), atol=1e-6)


def test_out_of_reach_and_empty_memory_read_nothing():
    far = [Entry(0, query(), torch.ones(H, W), 1.0, (500.0, 3.0))]
    assert not crstm.read(query(), 1, 9, (4.0, 3.0), far, Options(window=4.0)).any()
    assert not crstm.read(query(), 1, 9, (4.0, 3.0), [], Options()).any()


def test_constant_memory_reads_its_constant():
    stored = [Entry(0, query(1), torch.full((H, W), 0.8), 1.0, (4.0, 3.0))]
    assert torch.allclose(crstm.read(query(), 1, 9, (4.0, 3.0), stored, Options()), torch.tensor(0.8), atol=1e-6)


def test_dense_prompt():
    r = torch.full((H, W), 0.1)
    assert crstm.dense_prompt(r, Options()) == (None, 0.0)
    r[2, 2], r[2, 3] = 0.9, 1.0
    d, c = crstm.dense_prompt(r, Options())
    assert c == pytest.approx(0.9) and d[2, 2] == pytest.approx(0.9 * math.log(9), rel=1e-4)
    assert float(d.max()) == pytest.approx(0.9 * math.log(999), rel=1e-3) and float(d.abs().max()) <= 8
    weak = torch.full((H, W), 0.55)
    assert crstm.dense_prompt(weak, Options())[0] is None


def test_memory_keeps_what_it_should():
    m = Memory(Options(rounds=2, recent=2, every=3, spaced=1, trust=0.7))
    e = entries(12)
    for k in (0, 4, 8):
        m.interact(e[k])
    assert set(m.interacted) == {4, 8}  # the oldest went
    for k in range(1, 8):
        e[k].weight = 0.5 if k == 5 else 0.8
        m.add(e[k])
    assert [x.frame for x in m.passing] == [6, 7] and [x.frame for x in m.spaced] == [6]
    assert sorted(x.frame for x in m.entries()) == [4, 6, 7, 8]
    m.interact(e[4])
    assert not m.passing and list(m.interacted) == [8, 4]
    m.forget(8)
    assert list(m.interacted) == [4]


def test_pooled_values_leave_out_padding():
    low = torch.full((16, 16), -20.0)
    low[:8, :4] = 20.0
    v = crstm.pooled(low, (3, 4))
    assert v.shape == (3, 4) and v[0, 0] == pytest.approx(1) and v[2, 0] == pytest.approx(0, abs=1e-6)


def test_the_last_cell_of_a_window_is_in_it():
    """Whole numbers as centres: cells exactly `window` away in x or y count."""
    o = Options(sigma=2.0, window=2.0, top=1000)
    stored = entries(2)
    for e in stored:
        e.centre = (3.0, 3.0)
    got = crstm.read(query(), 1, 9, (4.0, 2.0), stored, o)
    assert np.allclose(got.numpy(), by_loops(query(), 1, 9, (4.0, 2.0), stored, o), atol=2e-5)
    one = crstm.read(query(), 1, 9, (4.0, 2.0), stored, o, (3, 3, 4, 4))
    assert np.allclose(one[3, 3], by_loops(query(), 1, 9, (4.0, 2.0), stored, o)[3, 3], atol=2e-5)


def test_bars_themselves_are_passed():
    r = torch.full((H, W), 0.1)
    r[2, 2] = 0.875  # c = 0.75, exact in floating point
    assert crstm.dense_prompt(r, Options(least=0.75))[0] is not None
    assert crstm.dense_prompt(r, Options(least=0.7501))[0] is None
    m = Memory(Options(trust=0.5))
    for k, weight in enumerate((0.5, 0.499)):
        e = entries(3)[k]
        e.weight = weight
        m.add(e)
    assert [e.frame for e in m.passing] == [0]


def test_an_interacted_frame_wins_over_its_propagated_copy_and_a_pass_counts_anew():
    m, (a, b, c) = Memory(Options(every=3, recent=1)), entries(3)
    m.interact(a)
    copy = Entry(0, b.key, b.value, 0.9, b.centre)
    m.add(copy)
    assert m.entries() == [a]
    m.add(c)
    m.start()
    for _ in range(2):
        m.add(c)
    assert not m.spaced  # the third of this pass, not of the last one and this
    m.add(c)
    assert m.spaced == [c]


def test_pooling_is_of_probabilities_not_of_logits():
    low = torch.full((4, 4), -8.0)
    low[:, :2] = 30.0
    assert float(crstm.pooled(low, (1, 1))[0, 0]) == pytest.approx(0.5, abs=1e-3)
