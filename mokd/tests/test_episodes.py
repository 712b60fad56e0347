"""The sampling law against cases worked out by hand, and its invariants."""

from lab.runs import UserError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import episodes
import sets
from episodes import LAWS, Law, Pool


class Fixed:
    """A generator that gives what it is told."""

    def __init__(self, beta: float, alphas: list[float]):
        self.beta, self.alphas = beta, alphas

    def random(self) -> float:
        return self.beta

    def uniform(self, low, high, n) -> np.ndarray:
        assert (low, high, n) == (-np.log(2), np.log(2), len(self.alphas))
        return np.array(self.alphas)


def test_support_sizes_by_hand():
    """Counts 20, 40, 200 with 10 queries; beta 0.5: floor(5+1) + floor(15+1) + floor(50+1) = 73 in all.

    Weights 1, 1, 1/2: shares 20/160, 40/160, 100/160 of 73 - 3 = 70: 8, 17, 43, each + 1.
    """
    counts = np.array([20, 40, 200])
    found = episodes.support_sizes(counts, 10, Law(), Fixed(0.5, [0.0, 0.0, -np.log(2)]))
    assert found.tolist() == [9, 18, 44]


def test_support_is_cut_at_500_and_at_what_a_class_has():
    """Ten classes of 1,000, beta near 1: 1,000 is cut to 500, 49 + 1 each; of 12 images 6 are left after 6 queries."""
    found = episodes.support_sizes(np.full(10, 1000), 10, Law(), Fixed(0.9999, [0.0] * 10))
    assert found.tolist() == [50] * 10
    found = episodes.support_sizes(np.array([20, 20, 20, 20, 12]), 6, Law(), Fixed(0.99, [0.0] * 4 + [np.log(2)]))
    assert found[-1] == 6


def test_queries_by_hand():
    assert episodes.query_size(np.array([20, 30]), Law()) == 10
    assert episodes.query_size(np.array([7, 30]), Law()) == 3
    assert episodes.query_size(np.array([7, 30]), LAWS["5shot"]) == 2
    assert episodes.query_size(np.array([20, 30]), LAWS["5shot"]) == 10


def test_one_shot_and_five_shot():
    pool = Pool("p", (30,) * 12)
    for k in range(20):
        one, five = (episodes.sample(pool, LAWS[n], 1, k) for n in ("1shot", "5shot"))
        assert len(one.classes) == 5 and np.bincount(one.support[:, 0]).tolist() == [1] * 5
        assert np.bincount(one.query[:, 0]).tolist() == [10] * 5
        assert 5 <= len(five.classes) <= 12 and set(np.bincount(five.support[:, 0])) == {5}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 300), min_size=5, max_size=70), st.integers(0, 2**31 - 1), st.integers(0, 10**6))
def test_invariants(counts, seed, number):
    pool = Pool("p", tuple(counts))
    t = episodes.sample(pool, LAWS["varied"], seed, number)
    assert 5 <= len(t.classes) <= min(50, len(counts)) and len(set(t.classes.tolist())) == len(t.classes)
    assert len(t.support) <= 500 and set(t.support[:, 0]) == set(range(len(t.classes)))
    queries = np.bincount(t.query[:, 0])
    assert len(set(queries.tolist())) == 1 and queries[0] == min(10, min(counts[c] for c in t.classes) // 2)
    both = [tuple(r[1:]) for r in np.concatenate([t.support, t.query])]
    assert len(set(both)) == len(both)  # support and query images are different ones
    assert all(0 <= i < counts[c] for c, i in both)
    assert all(t.classes[r[0]] == r[1] for r in t.support)
    again = episodes.sample(pool, LAWS["varied"], seed, number)
    assert np.array_equal(again.support, t.support) and np.array_equal(again.query, t.query)


def test_tasks_differ_by_seed_number_and_domain():
    pools = [Pool(n, (30,) * 60) for n in "ab"]
    found = [episodes.sample(p, LAWS["varied"], s, k).support.tobytes() for p in pools for s in (0, 1) for k in (0, 1)]
    assert len(set(found)) == 8


def test_alphabets_stay_together():
    groups = tuple(tuple(range(k * 10, k * 10 + 10)) for k in range(4))
    pool, seen = Pool("p", (20,) * 40, groups=groups), set()
    for k in range(60):
        t = episodes.sample(pool, LAWS["varied"], 0, k)
        assert len({c // 10 for c in t.classes}) == 1
        seen.add(t.classes[0] // 10)
    assert seen == {0, 1, 2, 3}


def test_wordnet_nodes():
    """A node with 5 to 392 classes, all of them; more than 50 are cut to 50."""
    pool = Pool("p", (40,) * 80, nodes=(tuple(range(4)), tuple(range(5)), tuple(range(10, 17)), tuple(range(80))))
    sizes = set()
    for k in range(60):
        t = episodes.sample(pool, LAWS["varied"], 0, k)
        sizes.add(len(t.classes))
        if len(t.classes) == 5:
            assert t.classes.tolist() == [0, 1, 2, 3, 4]
    assert sizes == {5, 7, 50}
    assert len(episodes.sample(pool, LAWS["1shot"], 0, 0).classes) == 5
    wide = Pool("p", (40,) * 393, nodes=(tuple(range(6)), tuple(range(393))))
    assert {len(episodes.sample(wide, LAWS["varied"], 0, k).classes) for k in range(20)} == {6}
    just = Pool("p", (40,) * 392, nodes=(tuple(range(392)),))
    drawn = [episodes.sample(just, LAWS["varied"], 0, k).classes for k in range(40)]
    assert {len(c) for c in drawn} == {50} and max(c.max() for c in drawn) > 380  # cut at random, not the first 50


def test_ways_are_uniform():
    pool = Pool("p", (30,) * 9)
    ways = np.bincount([len(episodes.sample(pool, LAWS["varied"], 0, k).classes) for k in range(1500)], minlength=10)[
        5:
    ]
    assert ways.min() > 240 and ways.max() < 360  # 300 each


def test_images_are_drawn_from_the_whole_class():
    """No first-records bias: every image of a class comes up as support and as query."""
    pool = Pool("p", (30,) * 5)
    tasks = [episodes.sample(pool, LAWS["varied"], 0, k) for k in range(300)]
    for part in ("support", "query"):
        found = np.bincount(np.concatenate([getattr(t, part)[:, 2] for t in tasks]), minlength=30)
        assert found.min() > 0.6 * found.mean()


def test_what_cannot_be_drawn_is_told():
    with pytest.raises(UserError, match="4 classes, a task needs 5"):
        episodes.sample(Pool("p", (20,) * 4), Law(), 0, 0)
    with pytest.raises(UserError, match="has 1 images"):
        episodes.sample(Pool("p", (1,) * 6), Law(), 0, 0)
    with pytest.raises(UserError, match="at hand"):
        episodes.sample(Pool("p", (500,) * 6, available=(10,) * 6), LAWS["varied"], 0, 3)
    with pytest.raises(UserError, match="no node"):
        episodes.sample(Pool("p", (20,) * 4, nodes=((0, 1),)), Law(), 0, 0)


def test_published_splits():
    """Class counts of Meta-Dataset's specification; alphabets and WordNet nodes cover the classes."""
    sizes = {
        **{"ilsvrc_2012": (712, 158, 130), "omniglot": (883, 81, 659), "aircraft": (70, 15, 15)},
        **{"cu_birds": (140, 30, 30), "dtd": (33, 7, 7), "quickdraw": (241, 52, 52), "fungi": (994, 200, 200)},
        **{"vgg_flower": (71, 15, 16), "traffic_sign": (0, 0, 43), "mscoco": (0, 40, 40)},
    }
    for name, expected in sizes.items():
        lists = [sets.class_names(name, s) for s in sets.SPLITS]
        assert tuple(map(len, lists)) == expected
        assert len(set(sum(lists, []))) == sum(expected)
        assert [sets.first_id(name, s) for s in sets.SPLITS] == [0, expected[0], sum(expected[:2])]
    assert [len(sets.alphabets("omniglot", s)) for s in sets.SPLITS] == [25, 5, 20]
    assert sum(map(len, sets.alphabets("omniglot", "test"))) == 659
    nodes = sets.spanning("ilsvrc_2012", "test")
    assert len(nodes) == 50 and max(nodes, key=len) == tuple(range(130))
    assert sum(5 <= len(n) for n in nodes) < 50
