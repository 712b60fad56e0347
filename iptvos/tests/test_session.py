"""A session with a segmenter and trackers that say what the test wants: what is asked, kept, stored and mixed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import evaluation
import pipeline
from methods import METHODS
from prompts import Interaction, box_of
from segmenters.interface import Embedding, Geometry
from session import NOTHING, Session
from settings import EvalSettings
from trackers.points import Tracks

H, W, CELLS = 48, 64, 16
POINTS = replace(METHODS["points"], positives=3, negatives=1)


def disk(x: float, y: float, r: float) -> np.ndarray:
    v, u = np.mgrid[:H, :W]
    return (u - x) ** 2 + (v - y) ** 2 <= r * r


class Told:
    """A segmenter that answers `answers[frame]` (mask, quality) and notes what it is asked."""

    cells, mask_threshold, device, memory_is_mask = CELLS, 0.0, torch.device("cpu"), False

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def encode(self, frame):
        return Embedding(Geometry(H, W, CELLS), int(frame[0, 0, 0]))

    def features(self, e):
        """The same on every frame."""
        e.features, e.cell = torch.randn(64, 12, 16, generator=torch.Generator().manual_seed(0)), 4.0
        return e.features

    def decode(self, e, prompts):
        out = []
        for p in prompts:
            self.asked.append((e.data, p))
            mask, quality = self.answer(e.data, p)
            out.append((e.geometry.low(np.where(mask, -NOTHING, NOTHING)), quality))
        return out


class Fixed:
    """Points that stay, all seen."""

    def track(self, frames, order, points):
        shape = len(order), len(points)
        return Tracks(np.repeat(points[None], len(order), 0), np.ones(shape, bool), np.zeros(shape))


class Box:
    """A box that stays; None from step `lost` on."""

    lost = 99

    def start(self, frame, box, mask):
        self.box, self.steps = box, 0

    def step(self, frame):
        self.steps += 1
        return (self.box.copy(), 1.0) if self.steps < self.lost else (None, 0.0)

    def correct(self, mask):
        pass


def make(answer, method=POINTS, n=9, objects=(1,), box=Box, seed=0):
    frames = [np.full((H, W, 3), t, np.uint8) for t in range(n)]
    told = Told(answer)
    return Session(frames, objects, told, Fixed(), box, method, seed), told


A, B = disk(20, 24, 8), disk(44, 24, 8)


def mask(s, t: int, o: int = 1):
    low = s.states[o].low[t]
    return None if low is None else Geometry(H, W, CELLS).full(low) > 0


def same(a, b) -> bool:
    return a is not None and (a & b).sum() / (a | b).sum() > 0.85


def test_an_earlier_mask_is_kept_where_the_new_one_is_trusted_less():
    quality = {"now": 0.8}
    s, _ = make(lambda t, p: (A, quality["now"]))
    s.interact(0, {1: Interaction(mask=A)})
    s.segmenter.answer = lambda t, p: (B, {5: 0.69, 6: 0.71, 7: 0.95}.get(t, 0.8))
    s.interact(8, {1: Interaction(mask=B)})
    assert same(mask(s, 5), A) and same(mask(s, 6), B) and same(mask(s, 7), B)
    assert s.states[1].iou[5] == 0.8 and s.states[1].iou[6] == 0.71
    assert same(mask(s, 4), B) and same(mask(s, 3), A)  # the pass ends in the middle, ties to the later round


@pytest.mark.parametrize("horizon", [0, 3])
def test_blend_mixes_by_nearness(horizon):
    """Also after points were sampled anew."""
    s, _ = make(lambda t, p: (A, 0.9), replace(POINTS, limits="blend", horizon=horizon))
    s.interact(0, {1: Interaction(mask=A)})
    s.segmenter.answer = lambda t, p: (B, 0.5)
    s.interact(8, {1: Interaction(mask=B)})
    y, x = 24 * 4 * CELLS // W, 44 * 4 * CELLS // W  # a place inside B: the new answer there is 1, the old one 0
    for t, share in ((2, 0.25), (6, 0.75)):
        p = float(s.states[1].low[t].float().sigmoid()[y, x])
        assert p == pytest.approx(share, abs=0.01) and s.states[1].iou[t] == pytest.approx(
            share * 0.5 + (1 - share) * 0.9
        )


def test_a_gate_empties_masks_of_low_predicted_iou():
    s, _ = make(lambda t, p: (A, 0.69 if t == 2 else 0.7), replace(POINTS, gate=0.7, refine=0))
    s.interact(0, {1: Interaction(mask=A)})
    assert mask(s, 2) is None and same(mask(s, 3), A)


def test_points_of_other_objects_are_negatives():
    s, told = make(lambda t, p: (A, 0.9), objects=(1, 2))
    s.interact(0, {1: Interaction(mask=A), 2: Interaction(mask=B)})
    t, p = told.asked[0]
    assert t == 1 and p.labels.tolist() == [1, 1, 1, 0, 0, 0, 0]  # own, own negative, the three of object 2
    x, y = p.points[4:].astype(int).T
    assert B[y, x].all() and A[tuple(p.positive.astype(int).T[::-1])].all()


def test_without_points_and_box_the_object_is_out_of_sight():
    class Lost(Box):
        lost = 3

    s, told = make(lambda t, p: (A, 0.9), METHODS["box"], box=Lost)
    s.interact(0, {1: Interaction(mask=A)})
    assert [t for t, _ in told.asked] == [1, 2] and mask(s, 3) is None and s.decoded == 2
    assert told.asked[0][1].box.tolist() == box_of(A).tolist()


def test_refinement_asks_with_box_and_logits_until_the_box_stays():
    sizes = iter([6, 8, 8, 8, 8])
    s, told = make(lambda t, p: (disk(20, 24, next(sizes)), 0.9), replace(POINTS, refine=4), n=2)
    s.interact(0, {1: Interaction(mask=A)})
    boxes = [None if p.box is None else p.box.tolist() for _, p in told.asked]
    assert boxes == [None, box_of(disk(20, 24, 6)).tolist(), box_of(disk(20, 24, 8)).tolist()]  # then nothing changes
    assert told.asked[0][1].dense is None and told.asked[1][1].dense is not None


def test_clicks_add_up_and_start_from_the_earlier_mask():
    s, told = make(lambda t, p: (A, 0.9))
    click = lambda x, y, v: Interaction(points=np.array([[x, y]], np.float32), labels=np.array([v]))  # noqa: E731
    s.interact(0, {1: click(20, 24, 1)})
    first, full = told.asked[0][1], told.asked[1][1]
    assert first.dense is None and first.box is None and full.dense is not None  # positives alone, then all
    told.asked.clear()
    s.interact(0, {1: click(44, 24, 0)})
    p = told.asked[0][1]
    assert p.points.tolist() == [[20, 24], [44, 24]] and p.labels.tolist() == [1, 0] and p.dense is not None
    told.asked.clear()
    s.interact(0, {1: Interaction(mask=B)})  # a mask is final and forgets the clicks
    assert all(t != 0 for t, _ in told.asked) and 0 not in s.states[1].clicks
    s.interact(0, {1: click(44, 24, 1)})
    assert [p for t, p in told.asked if t == 0][0].points.tolist() == [[44, 24]]


def test_clicks_are_tracked_with_the_sampled_points():
    s, told = make(lambda t, p: (A, 0.9))
    s.interact(0, {1: Interaction(points=np.array([[20, 24], [50, 40]], np.float32), labels=np.array([1, 0]))})
    p = next(p for t, p in told.asked if t == 1)
    assert (
        p.positive[-1].tolist() == [20, 24]
        and p.points[-1].tolist() == [50, 40]
        and p.labels.tolist() == [1] * 4 + [0] * 2
    )


def test_renewed_points_come_from_the_median_area_and_small_ones_do_not_count():
    """Horizon 8 on 10 frames: places 3 to 8 of the pass count, the first quarter does not."""
    radius = {1: 15, 2: 14, 3: 5, 4: 9, 5: 8, 6: 7, 7: 6, 8: 2, 9: 9}
    begun = []

    class Noting(Fixed):
        def track(self, frames, order, points):
            begun.append(order[0])
            return super().track(frames, order, points)

    for variant, want in (("A", 7), ("B", 6), ("C", 5)):  # frame 8 has 13 pixels; areas of 3 to 7 sorted: 5 6 7 8 9
        begun.clear()
        s, _ = make(lambda t, p: (disk(20, 24, radius[t]), 0.9), replace(POINTS, horizon=8, variant=variant), n=10)
        s.tracker = Noting()
        s.interact(0, {1: Interaction(mask=A)})  # radius 8, as on frame 5
        assert begun == [0, want], variant
    s, told = make(lambda t, p: (disk(20, 24, 2), 0.9), replace(POINTS, horizon=4), n=10)
    s.interact(0, {1: Interaction(mask=A)})
    assert max(t for t, _ in told.asked) == 4 and mask(s, 7) is None  # nothing fit: given up until touched again


def test_variant_d_takes_one_frame_for_all_objects():
    begun = []

    class Noting(Fixed):
        def track(self, frames, order, points):
            begun.append(order[0])
            return super().track(frames, order, points)

    def answer(t, p):
        first = p.positive[0][0] < 32
        r = {5: 8.0, 6: 7.7}.get(t, 4) if first else {5: 7.7, 6: 8.0}.get(t, 4)
        return disk(20 if first else 44, 24, r), 0.9

    for variant, want in (("C", [5, 6]), ("D", [5, 5])):
        begun.clear()
        s, _ = make(answer, replace(POINTS, horizon=8, variant=variant), n=10, objects=(1, 2))
        s.tracker = Noting()
        s.interact(0, {1: Interaction(mask=A), 2: Interaction(mask=B)})
        assert begun == [0, 0, *want], variant


def test_memory_holds_what_was_interacted_and_prompts():
    s, told = make(lambda t, p: (A, 0.9), METHODS["full"])
    s.interact(0, {1: Interaction(mask=A)})
    m = s.states[1].memory
    assert list(m.interacted) == [0] and [e.frame for e in m.passing] == [6, 7, 8]
    e = m.interacted[0]
    assert e.value.shape == (12, 16) and float(e.value[6, 5]) > 0.99 and float(e.value[0, 15]) < 0.01
    assert [t for t, _ in told.asked] == list(range(1, 9))
    for _, p in told.asked:
        dense = Geometry(H, W, CELLS).full(p.dense)
        # The same features on every frame: read out, the mask stays where it was; far from it surely nothing.
        assert same(dense > 0, A) and dense[2, 60] < -4 and dense[47, 2] < -4
    s.interact(0, {1: Interaction(mask=np.zeros((H, W), bool))})  # the object is not there after all
    assert not s.states[1].memory.interacted


def test_a_segmenter_may_take_the_memory_as_the_mask():
    s, told = make(lambda t, p: (B, 0.9), METHODS["full"])
    told.memory_is_mask = True
    s.interact(0, {1: Interaction(mask=A)})
    assert not told.asked and all(same(mask(s, t), A) for t in range(1, 9)) and s.decoded == 8
    assert 0.5 < s.states[1].iou[8] <= 1  # the memory's own confidence


def test_the_memory_is_read_when_neither_point_nor_box_is_left():
    class Lost(Box):
        lost = 3

        def start(self, frame, box, mask):
            if not hasattr(self, "box"):
                super().start(frame, box, mask)

    s, told = make(lambda t, p: (A, 0.9), replace(METHODS["full"], points=False, few=0), box=Lost)
    s.interact(0, {1: Interaction(mask=A)})
    assert [t for t, p in told.asked if p.box is None and not len(p.points)] == list(range(3, 9))
    assert same(mask(s, 8), A)


def test_a_lost_box_and_lost_points_come_back_from_the_mask():
    begun = []

    class Lost(Box):
        lost = 3

        def start(self, frame, box, mask):
            begun.append(int(frame[0, 0, 0]))
            super().start(frame, box, mask)

    class Gone(Fixed):
        """Points that are seen for two frames, with a drift that the filter does not forgive."""

        def track(self, frames, order, points):
            tracks = super().track(frames, order, points)
            tracks.error[1:] = 99
            return tracks

    s, told = make(lambda t, p: (A, 0.9), METHODS["full"], box=Lost)
    s.tracker = Gone()
    s.interact(0, {1: Interaction(mask=A)})
    assert begun == [0, 3, 6]  # lost on the third step, begun anew there
    begun.clear()
    alone, _ = make(lambda t, p: (A, 0.9), METHODS["points+box"], box=Lost)
    alone.interact(0, {1: Interaction(mask=A)})
    assert begun == [0]  # without a memory the mask would be the box's own: it searches on by itself
    told_points = [len(p.points) for _, p in told.asked]
    assert told_points == [0] * 8  # no point passes the test
    tracked = []

    class Counting(Fixed):
        def track(self, frames, order, points):
            tracked.append(order[0])
            tracks = super().track(frames, order, points)
            tracks.error[1:4] = 99
            return tracks

    s, told = make(lambda t, p: (A, 0.9), METHODS["full"])
    s.tracker = Counting()
    s.interact(0, {1: Interaction(mask=A)})
    assert tracked == [0, 4]  # three strikes, then new points as soon as their patience is over


def test_the_shuffled_memory_is_stored_under_other_frames():
    s, _ = make(lambda t, p: (A, 0.9), METHODS["shuffled"])

    def features(e):
        e.features = torch.randn(64, 12, 16, generator=torch.Generator().manual_seed(e.data))
        e.cell = 4.0
        return e.features

    s.segmenter.features = features
    s.interact(0, {1: Interaction(mask=A)})
    stored, other = s.states[1].memory.interacted[0], int(s.other[0])
    assert other != 0 and torch.equal(stored.key, s.keyed(other)[0]) and not torch.equal(stored.key, s.keyed(0)[0])


def test_the_same_interaction_twice_changes_nothing():
    method = replace(METHODS["full"], selection="random", positives=3)
    s, told = make(lambda t, p: (A, 0.9), method, n=5)
    click = Interaction(points=np.array([[20, 24], [50, 40]], np.float32), labels=np.array([1, 0]))
    for given in (Interaction(mask=A), click, Interaction(box=box_of(B))):
        s.interact(2, {1: given})
        before = s.labels()
        told.asked.clear()
        s.interact(2, {1: given})
        assert not told.asked and all(np.array_equal(a, b) for a, b in zip(before, s.labels(), strict=True))


def test_seeds_draw_other_points():
    def points(seed):
        s, told = make(lambda t, p: (A, 0.9), replace(POINTS, selection="random"), n=2, seed=seed)
        s.interact(0, {1: Interaction(mask=A)})
        return told.asked[0][1].points.tolist()

    assert points(0) == points(0) != points(1)


def test_nothing_given_changes_nothing():
    s, told = make(lambda t, p: (A, 0.9))
    s.interact(0, {1: Interaction(mask=A)})
    before = list(s.states[1].low)
    told.asked.clear()
    s.interact(4, {})
    assert not told.asked and before == s.states[1].low and s.reach(1, 0, 1)[1] is None


def test_trimap_of_grabcut():
    from segmenters.grabcut import GrabCut

    prior = np.zeros((40, 60), np.float32)
    prior[:, :10], prior[:, 20:40], prior[:, 40:] = -5, 2, 5
    points, labels = np.array([[30, 20], [50, 20]], np.float32), np.array([1, 0])
    t = GrabCut.trimap((60, 40), points, labels, None, prior)
    sure_back, sure_fore, maybe_back, maybe_fore = 0, 1, 2, 3
    assert [t[5, x] for x in (5, 15, 25, 50)] == [sure_back, maybe_back, maybe_fore, sure_fore]
    assert t[20, 30] == sure_fore and t[20, 50] == sure_back
    t = GrabCut.trimap((60, 40), points[:0], labels[:0], np.array([20, 10, 40, 30], np.float32), None)
    assert t[20, 30] == maybe_fore and t[20, 19] == maybe_back and t[20, 17] == sure_back  # the box grown by a tenth


def test_sam_is_asked_in_pixels_of_its_own_input(monkeypatch):
    from prompts import Prompt
    from segmenters.sam import Sam, SamSegmenter

    s = SamSegmenter(Sam("tiny"), torch.device("cpu"))
    seen = {}
    forward = s.sam.prompt_encoder.forward
    monkeypatch.setattr(s.sam.prompt_encoder, "forward", lambda **k: seen.update(k) or forward(**k))
    e = s.encode(np.zeros((96, 128, 3), np.uint8))  # 256 / 128: twice as large
    s.decode(e, [Prompt(np.array([[10, 20]], np.float32), np.array([1]), np.array([5, 6, 50, 60], np.float32))])
    assert seen["points"][0].tolist() == [[[20, 40]]] and seen["boxes"].tolist() == [[10, 12, 100, 120]]


def test_the_memory_finds_the_object_again_behind_an_occluder():
    """Its part that comes out first stands where the frames before had background."""
    settings = EvalSettings(rounds=1, interaction="mask", method="full")
    out, _ = evaluation.play(settings, data.draw("occluder", 100), 100, pipeline.build(settings))
    assert out["j_after_1"] > 0.6
