"""The filter test by test, points that are lost, the box while its object disappears, hub trackers."""

from lab.runs import UserError

import numpy as np
import pytest
import torch

import data
import prompts
from trackers.boxes import FlowBox, box_tracker
from trackers.filter import Filter, FilterOptions, patches
from trackers.points import Hub, LucasKanade, chained, load_strict

FRAME = np.zeros((480, 854, 3), np.uint8)
OFF = {"back": 0, "box": -1, "motion": 0, "border": 0.0}


def keep(f: Filter, now, before=None, error=None, box=None, frame=FRAME, visible=None):
    now = np.asarray(now, np.float32)
    n = len(now)
    before = now if before is None else np.asarray(before, np.float32)
    visible = np.ones(n, bool) if visible is None else np.array(visible)
    error = np.zeros(n) if error is None else np.array(error)
    return f.keep(now, before, visible, error, None if box is None else np.array(box, np.float32), frame).tolist()


def test_border_and_visibility():
    f = Filter(FilterOptions(**{**OFF, "border": 0.01}), np.ones(5, int))
    # 1 % of 854 x 480 is 8.54 x 4.8; the last pixel is 853, 479
    assert keep(f, [[8, 9], [9, 9], [844.4, 474.1], [844.6, 474], [400, 4.7]]) == [False, True, True, False, False]
    assert keep(f, [[9, 9]] * 5, visible=[1, 0, 1, 1, 1]) == [True, False, True, True, True]  # nothing is final here


@pytest.mark.parametrize("shape,bar", [((480, 854), 1.0), ((240, 427), 0.5), ((960, 1708), 2.0)])
def test_the_backward_error_is_measured_at_480p_and_final_after_three_frames(shape, bar):
    f = Filter(FilterOptions(**{**OFF, "back": 1.0}), np.array([1, 1, 0]))
    frame = np.zeros((*shape, 3), np.uint8)
    places = [[50, 50], [60, 60], [70, 70]]
    drifting = [bar - 0.01, bar + 0.01, bar + 0.01]
    for _ in range(2):
        assert keep(f, places, error=drifting, frame=frame) == [True, False, False]
    assert keep(f, places, frame=frame) == [True, True, True]  # back in time: counting begins anew
    for _ in range(3):
        keep(f, places, error=drifting, frame=frame)
    assert keep(f, places, frame=frame) == [True, False, False]


def test_outside_the_box_three_times_in_a_row_is_final():
    f = Filter(FilterOptions(**{**OFF, "box": 0.05}), np.ones(2, int))
    box = [100, 100, 200, 200]  # grown by 5: 95 to 205
    inside, outside = [[95, 150], [150, 205]], [[94.9, 150], [150, 150]]
    assert keep(f, inside, box=box) == [True, True]
    for _ in range(2):
        assert keep(f, outside, box=box) == [False, True]
    assert keep(f, inside, box=box) == [True, True]  # back in time: counting begins anew
    for _ in range(2):
        keep(f, outside, box=box)
    assert keep(f, inside, box=None) == [True, True]  # the box is lost: not tested, the count stays
    assert keep(f, outside, box=box) == [False, True]
    assert keep(f, inside, box=box) == [False, True]


def test_negatives_are_kept_outside_the_shrunk_box():
    f = Filter(FilterOptions(**{**OFF, "box": 0.05}), np.array([0, 0, 0]))
    box = [100, 100, 200, 200]  # shrunk by 10: 110 to 190
    for _ in range(4):  # and never die of it
        assert keep(f, [[109, 150], [111, 150], [300, 300]], box=box) == [True, False, True]
    assert keep(f, [[150, 150]] * 3) == [True, True, True]


def test_motion_leaves_the_median_by_three_deviations_and_a_pixel():
    f = Filter(FilterOptions(**{**OFF, "motion": 3.0}), np.array([1, 1, 1, 1, 1, 0]))
    before = np.array([[100, 100]] * 6, np.float32) + np.arange(6)[:, None] * 20
    step = np.array([[2, 0], [3, 0], [4, 0], [2, 0], [0, 0], [90, 90]], np.float32)
    # median 2 in x, deviations 0 1 2 0 2: MAD 1, so 4 pixels of freedom; in y MAD 0, so 1
    assert keep(f, before + step, before) == [True] * 6
    step[2], step[3] = [6.1, 0], [2, 1.1]
    assert keep(f, before + step, before) == [True, True, False, False, True, True]
    step[2], step[3] = [5.9, 0], [2, 0.9]
    assert keep(f, before + step, before) == [True] * 6
    two = Filter(FilterOptions(**{**OFF, "motion": 3.0}), np.array([1, 1, 0]))
    assert keep(two, [[10, 10], [99, 99], [5, 5]], [[10, 10], [20, 20], [5, 5]]) == [True] * 3  # two say nothing


def test_the_patch_test_is_final_and_needs_the_query():
    frame = FRAME.copy()
    frame[100:200, 100:200] = (250, 30, 30)
    query = patches(frame, np.array([[150, 150], [150, 150]], np.float32))
    assert query.shape == (2, 27)
    f = Filter(FilterOptions(**OFF, patch=0.01), np.ones(2, int), query)
    assert keep(f, [[150, 150], [150, 150]], frame=frame) == [True, True]
    assert keep(f, [[150, 150], [400, 400]], frame=frame) == [True, False]
    assert keep(f, [[150, 150], [150, 150]], frame=frame) == [True, False]
    # x is the column: a patch at the edge of the red square sees black on one side only
    side = patches(frame, np.array([[199, 150]], np.float32)).reshape(3, 3, 3)
    assert side[1, 1, 0] > 20 and (side[:, 2] == 0).all() and (side[:, 0, 0] > 20).all()


def test_a_point_that_leaves_or_is_lost_does_not_come_back():
    ground = data.texture(np.random.default_rng(1), 120, 200, np.array([120, 90, 60.0]), 30).astype(np.uint8)
    places = [0, 4, 8, 12, 8, 4, 0]  # the camera moves right and back
    frames = [np.ascontiguousarray(ground[10:110, 20 + x : 160 + x]) for x in places]
    tr = LucasKanade().track(frames, list(range(7)), np.array([[60, 50], [6, 50]], np.float32))
    assert tr.visible[:, 0].all() and np.allclose(tr.places[-1, 0], [60, 50], atol=0.5)
    assert tr.visible[1, 1] and not tr.visible[2:, 1].any()  # at -2 in frame 2, again at 2 in frame 5


def test_a_box_keeps_its_size_while_the_object_disappears():
    video = data.draw("occluder", 101)
    g = [x == 1 for x in video.truth]
    box = FlowBox()
    box.start(video.frames[0], prompts.box_of(g[0]), g[0])
    start = box.size.copy()
    for t in range(1, len(g)):
        got, _ = box.step(video.frames[t])
        if got is None:
            break
        box.correct(g[t])
    assert box.lost == 1 and (box.size > 0.7 * start).all()  # corrected to the last slivers it would be far smaller
    before, box.area, box.largest = box.box.copy(), float(g[0].sum()), float(g[0].sum())
    box.correct(g[0])  # while lost no mask pulls
    assert np.array_equal(box.box, before)


class Still(torch.nn.Module):
    """A hub tracker that leaves points where they are and is unsure of the second one."""

    def forward(self, video, queries):
        t = video.shape[1]
        places = queries[:, None, :, 1:].expand(-1, t, -1, -1)
        return places, torch.tensor([0.95, 0.6]).expand(1, t, 2)


@pytest.mark.parametrize("name,seen", [("cotracker", [True, False]), ("pips", [True, True]), ("tapir", [True, True])])
def test_hub_trackers_have_their_own_bar_of_visibility(name, seen):
    class One(Still):
        def forward(self, video, queries):
            places, sight = super().forward(video, queries)
            first = float(queries[0, 0, 1]) == 3  # PIPS is asked point by point
            return places, sight[..., : queries.shape[1]] if first else sight[..., -queries.shape[1] :]

    hub = Hub(name, "", "", torch.device("cpu"), One())
    frames = [np.zeros((10, 12, 3), np.uint8)] * 9
    tr = hub.track(frames, range(9), np.array([[3, 4], [5, 6]], np.float32))
    assert tr.places.shape == (9, 2, 2) and (tr.places[8] == [[3, 4], [5, 6]]).all()
    assert tr.visible[8].tolist() == seen and not tr.error.any()


def test_a_box_tracker_without_its_two_methods_is_refused():
    with pytest.raises(UserError, match="no initialize"):
        box_tracker("os:getcwd")
    with pytest.raises(UserError, match="cannot be imported"):
        box_tracker("nosuchmodule:tracker")


def test_weights_of_another_tracker_say_what_differs(tmp_path):
    model = torch.nn.Linear(2, 3)
    torch.save({"model": {"module.weight": torch.zeros(3, 2), "module.other": torch.zeros(1)}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"1 keys missing \(first bias\), 1 keys unknown \(first other\)"):
        load_strict(model, str(tmp_path / "a.pt"))
    torch.save([1, 2], tmp_path / "b.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        load_strict(model, str(tmp_path / "b.pt"))
    (tmp_path / "c.pt").write_text("# a text")
    with pytest.raises(UserError, match=r"no readable checkpoint of tensors \(UnpicklingError\)"):
        load_strict(model, str(tmp_path / "c.pt"))


def test_the_bar_of_a_chained_window_sinks_in_small_steps():
    def window(video, points):
        asked.append(int(video[0, 0, 0, 0, 0]))
        sure = torch.tensor([1, 0.5, 0.89, 0.5, 0.5, 0.87, 0.5, 0.5])
        return points[None].expand(8, -1, -1), sure[:, None]

    asked: list[int] = []
    video = torch.arange(12.0)[None, :, None, None, None].expand(1, 12, 3, 2, 2)
    chained(window, video, torch.zeros(1, 2))
    assert asked == [0, 2, 4]  # 0.89 passes the bar of 0.88; 0.87, five frames later, does not
