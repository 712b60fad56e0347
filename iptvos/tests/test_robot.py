"""Prompts and the simulated user against slow references and by hand."""

import cv2
import numpy as np
import pytest

import metrics
import prompts
import robot
import scribbles


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# -------------------------------------------------------------------------------------------------------------- prompts


def test_box_needs_two_pixels_and_grows_by_its_own_sides():
    mask = np.zeros((9, 9), bool)
    mask[3, 4] = True
    assert prompts.box_of(mask) is None
    mask[3, 5] = True
    assert prompts.box_of(mask).tolist() == [4, 3, 5, 3]
    box = np.array([10, 20, 50, 30], np.float32)  # 40 wide, 10 high
    assert prompts.grow(box, 0.1).tolist() == [6, 19, 54, 31] and prompts.grow(box, -0.1).tolist() == [14, 21, 46, 29]
    on = prompts.inside(np.array([[10, 20], [50, 30], [9.9, 25], [30, 30.1]]), box)
    assert on.tolist() == [True, True, False, False]


def test_what_prompts_say_of_cells():
    p = prompts.Prompt(np.array([[20, 12], [3, 3]], np.float32), np.array([1, 0]), np.array([8, 8, 28, 20], np.float32))
    got = prompts.told(p, 4.0, (6, 9))
    want = np.full((6, 9), -1.0)
    want[1:6, 1:8] = 0  # the box grown by a tenth: 6 to 30, 6.8 to 21.2
    want[:2, :2] = -1
    want[2:5, 4:7] = 1
    assert np.array_equal(got, want)
    assert not prompts.told(prompts.Prompt(), 4.0, (6, 9)).any()


def cost(pixels: np.ndarray, chosen: np.ndarray) -> float:
    """Sum of the distances to the nearest chosen pixel, float64."""
    d = np.linalg.norm(pixels[:, None].astype(float) - chosen[None].astype(float), axis=-1)
    return float(d.min(1).sum())


@pytest.mark.parametrize("seed", range(4))
def test_no_exchange_makes_the_medoids_better(seed):
    """FasterPAM ends where no single swap of a medoid for another pixel lowers the objective."""
    drawn = (np.random.default_rng(seed).random((40, 2)) * [90, 50]).astype(np.float32)
    got = prompts.medoids(drawn, 4, rng())
    best = cost(drawn, got)
    assert len({tuple(p) for p in got.tolist()}) == 4 and all((drawn == p).all(1).any() for p in got)
    for i in range(4):
        for other in drawn:
            swapped = got.copy()
            swapped[i] = other
            assert cost(drawn, swapped) >= best - 1e-3


def test_a_mixed_selection_is_a_quarter_medoids_a_third_corners_and_the_rest_random(monkeypatch):
    counts = {}

    def noted(name, function, place):
        def call(*args):
            counts[name] = args[place]
            return function(*args)

        return call

    monkeypatch.setattr(prompts, "medoids", noted("medoids", prompts.medoids, 1))
    monkeypatch.setattr(prompts, "corners", noted("corners", lambda m, n, f, r: np.zeros((n, 2), np.float32), 1))
    assert len(prompts.select(np.ones((20, 20), bool), 17, "mixed", rng())) == 17
    assert counts == {"medoids": 4, "corners": 5}


def test_scribbles_reach_the_last_pixel_and_keep_two_pixels_apart():
    corner = [{"path": [[0, 0], [1, 0]], "object_id": 1}, {"path": [[1.0, 1.0]], "object_id": 2}]
    drawn = prompts.rasterise(corner, (11, 21))
    assert (drawn[0] == 1).all() and drawn[10, 20] == 2 and (drawn == 2).sum() == 1
    half = prompts.rasterise([{"path": [[0.499, 0.999], [0.499, 0.999]], "object_id": 3}], (11, 21))
    assert np.argwhere(half == 3).tolist() == [[9, 9]]  # 0.499 x 20 = 9.98, cut, not rounded
    lines = [{"path": [[0, 0.5], [1, 0.5]], "object_id": 1}, {"path": [[0.5, 0], [0.5, 1]], "object_id": 0}]
    one = prompts.from_scribbles(lines, (41, 41), (1,), 30, rng())[1]
    gap = np.abs(one.points[one.labels == 1, 0] - 20).min()
    assert gap > 2 and (one.labels == 1).sum() == 30
    assert (one.labels == 0).sum() == 8  # at most 8 negatives of another id
    assert (one.points[one.labels == 0, 0] == 20).all() and np.abs(one.points[one.labels == 0, 1] - 20).min() > 2


# ---------------------------------------------------------------------------------------------------------------- robot


def test_click_takes_the_larger_of_missing_and_too_much():
    truth, answer = np.zeros((30, 60), bool), np.zeros((30, 60), bool)
    truth[2:7, 2:7] = True
    answer[10:25, 30:45] = True
    p, label, _ = robot.click(truth, answer)
    assert p.tolist() == [37, 17] and label == 0
    p, label, _ = robot.click(answer, truth)
    assert p.tolist() == [37, 17] and label == 1


def test_boxes_and_masks_are_the_truth():
    truth = np.zeros((20, 30), np.uint8)
    truth[3:9, 4:15] = 2
    given = robot.give("box", truth, None, (1, 2), rng())
    assert given[2].box.tolist() == [4, 3, 14, 8] and given[2].mask is None
    assert given[1].box is None and not given[1].mask.any()  # absent: an empty mask says so
    given = robot.give("mask", truth, None, (1, 2), rng())
    assert np.array_equal(given[2].mask, truth == 2) and not given[1].mask.any()


def test_first_frame_is_where_the_smallest_share_is_largest():
    truth = []
    for a, b in ((5, 1), (4, 4), (1, 5), (3, 3)):
        g = np.zeros((10, 20), np.uint8)
        g[:a, :5], g[:b, 10:15] = 1, 2
        truth.append(g)
    assert robot.first_frame(truth, (1, 2)) == 1
    assert robot.first_frame([None, *truth], (1, 2)) == 2 and robot.first_frame(truth, (2,)) == 2


def test_scribble_of_a_cross_is_its_long_bar():
    """Opening with a disk of a fifth of half the root of the area; the path is the longest of the skeleton."""
    cross = np.zeros((80, 160), bool)
    cross[35:46, 10:150] = cross[15:66, 75:86] = True
    (path,) = scribbles.curves(cross)
    assert np.ptp(path[:, 0]) > 110 and np.abs(path[:, 1] - 40).max() < 4
    thin = np.zeros((60, 90), bool)
    thin[20:40, 20:70] = thin[29:31, 70:90] = True  # a hair of 2 pixels: opened away (radius 3)
    (path,) = scribbles.curves(thin)
    assert path[:, 0].max() < 72
    small = np.zeros((60, 90), bool)
    small[10:13, 10:40] = True  # area 90: radius 0.9, no opening
    (path,) = scribbles.curves(small)
    assert np.ptp(path[:, 0]) > 20 and np.abs(path[:, 1] - 11).max() <= 1
    assert scribbles.curves(np.zeros((9, 9), bool)) == [] and scribbles.curves(np.eye(3, dtype=bool)) == []


def test_a_ring_is_cut_at_a_heavy_edge():
    """A cycle loses its heaviest edge (a diagonal one), so the path is as short as the ring allows."""
    import networkx as nx

    graph = nx.Graph()
    ring = [(0, 0), (0, 1), (0, 2), (1, 3), (2, 2), (2, 1), (2, 0), (1, -1)]
    for a, b in zip(ring, ring[1:] + ring[:1], strict=True):
        graph.add_edge(a, b, weight=float(np.hypot(a[0] - b[0], a[1] - b[1])))
    image = np.zeros((7, 9), np.uint8)
    for y, x in ring:
        image[y + 2, x + 3] = 1
    path = scribbles.skeleton_path(nx.relabel_nodes(graph, {p: (p[0] + 2, p[1] + 3) for p in ring}))
    length = sum(float(np.hypot(*(np.subtract(a, b)))) for a, b in zip(path[1:], path[:-1], strict=True))
    assert len(path) == 8 and length == pytest.approx(4 + 3 * np.sqrt(2)) and image[tuple(np.array(path).T)].all()


def test_bezier_begins_and_ends_at_its_ends_and_halves_a_parabola():
    curve = scribbles.bezier(np.array([[0, 0], [10, 20], [20, 0]], float), 101)
    assert curve[0].tolist() == [0, 0] and np.allclose(curve[-1], [20, 0]) and np.allclose(curve[50], [10, 10])


def test_bezier_of_a_long_path_is_that_of_all_its_points():
    """Against de Casteljau's construction, which never forms a binomial; the path bends where thinning would cut it."""
    angle = np.linspace(0, 9, 800)
    path = np.stack([200 + 90 * np.cos(angle), 150 + 60 * np.sin(3 * angle)], 1)
    got = scribbles.bezier(path, 11)
    for t, place in zip(np.linspace(0, 1, 11), got, strict=True):
        points = path.copy()
        while len(points) > 1:
            points = (1 - t) * points[:-1] + t * points[1:]
        assert np.allclose(place, points[0], atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- curves


def test_summary_pools_one_curve():
    """Two objects of the first sample weigh twice; time is the mean over samples, the timeout by the mean number."""
    a = {"jf_1": 0.4, "jf_2": 0.6, "seconds_1": 10.0, "seconds_2": 30.0, "objects": 2}
    b = {"jf_1": 0.7, "jf_2": 0.9, "seconds_1": 20.0, "seconds_2": 10.0, "objects": 1}
    area, sixty = metrics.summary([a, b], 2, 40.0)
    # (0, 0) (15, 0.5) (35, 0.7) (60, 0.7); timeout 40 x 1.5
    assert area == pytest.approx((15 * 0.25 + 20 * 0.6 + 25 * 0.7) / 60) and sixty == pytest.approx(0.7)
    assert metrics.summary([a], 2, 240.0)[1] == pytest.approx(0.6 + 0)


def test_a_round_that_ends_at_the_timeout_counts():
    assert metrics.auc([30, 60], [0.5, 1.0], 60) == pytest.approx((30 * 0.25 + 30 * 0.75) / 60)
    # The same time twice: the later value at that moment, no area in between.
    assert metrics.auc([30, 30], [0.5, 1.0], 60) == pytest.approx((30 * 0.25 + 30 * 1.0) / 60)


def test_a_round_past_the_timeout_of_its_own_sample_does_not_count():
    """The slow sample holds its first value at no cost: its second round is not seen by the pooled curve."""
    slow = {"jf_1": 0.4, "jf_2": 1.0, "seconds_1": 10.0, "seconds_2": 40.0, "objects": 1}
    quick = {"jf_1": 0.6, "jf_2": 0.8, "seconds_1": 2.0, "seconds_2": 4.0, "objects": 1}
    assert metrics.in_time(slow, 2, 40.0) == ([0.4, 0.4], [10.0, 0.0])
    area, sixty = metrics.summary([slow, quick], 2, 40.0)
    # (0, 0) (6, 0.5) (8, 0.6) held to 40
    assert area == pytest.approx((6 * 0.25 + 2 * 0.55 + 32 * 0.6) / 40) and sixty == pytest.approx(0.6)
    assert metrics.in_time({**slow, "seconds_1": 50.0}, 2, 40.0) == ([0.0, 0.0], [0.0, 0.0])


def test_a_disk_that_is_too_large_shrinks_by_tenths():
    """Three bars 5 high, area 2445: radius 4.9 is too much and so are the next tenths less; 2.1 fits, and the opening
    takes away what is 1 pixel thin. Without an opening the path would end at 214."""
    bars = np.zeros((60, 220), bool)
    for y in (5, 20, 35):
        bars[y : y + 5, 10:170] = True
    bars[7, 170:215] = True  # a hair of 1 pixel, which only an opening takes away
    paths = scribbles.curves(bars)
    assert len(paths) == 3 and max(p[:, 0].max() for p in paths) < 172


def test_opening_radius_has_a_ceiling():
    big = np.zeros((480, 854), np.uint8)
    cv2.rectangle(big, (100, 60), (700, 420), 1, -1)  # 0.2 sqrt(area) / 2 = 46, held to 16
    cv2.rectangle(big, (700, 220), (800, 260), 1, -1)  # 41 high: survives a disk of radius 16, not of 46
    paths = scribbles.curves(big > 0)
    assert max(p[:, 0].max() for p in paths) > 740
