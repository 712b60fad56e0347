"""Clicks and boxes to masks without SAM: what agrees with them, what a correction may change."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch

import data
from prompts import Interaction, box_of
from segmenters import colours, first

H, W, CELL = 96, 160, 4.0
GRID = (24, 40)
GROUND = (60, 120, 60.0)


def scene(seed: int = 0, moves: float = 0.0, red: int = 190) -> tuple[first.Scene, np.ndarray]:
    """A disk on green ground, with features that know the two apart, and its mask; it moves by `moves` pixels. Its
    colour is red; with `red` 60 that of the ground."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((H, W), np.uint8)
    cv2.circle(mask, (70, 50), 22, 1, -1)
    skins = GROUND, GROUND if red == 60 else (red, 60, 50.0)
    ground, disk = (data.texture(rng, H, W, np.array(c), 12) for c in skins)
    frame, other = ground.copy(), ground.copy()
    frame[mask > 0] = disk[mask > 0]
    there = np.roll(mask, int(moves), 1) > 0
    other[there] = np.roll(disk, int(moves), 1)[there]
    known = torch.from_numpy(cv2.resize(mask.astype(np.float32), GRID[::-1], interpolation=cv2.INTER_AREA))
    g = torch.Generator().manual_seed(seed)
    features, deep = (
        torch.randn(6, 1, 1, generator=g) * known + 0.3 * torch.randn(6, *GRID, generator=g) for _ in "ab"
    )
    return first.Scene.of(frame.astype(np.uint8), features, deep, CELL, other.astype(np.uint8)), mask > 0


def clicks(*points, labels=None) -> Interaction:
    return Interaction(points=np.array(points, np.float32), labels=np.array(labels or [1] * len(points)))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def test_a_box_becomes_the_object_in_it():
    picture, mask = scene()
    box = box_of(mask) + np.array([-3, -2, 4, 3], np.float32)
    ((found, sure),) = first.masks(picture, Interaction(box=box))
    x1, y1, x2, y2 = box.astype(int)
    outside = np.ones_like(mask)
    outside[y1 : y2 + 1, x1 : x2 + 1] = False
    assert iou(found, mask) > 0.9 and not (found & outside).any() and 0 < sure <= 1


def test_one_click_gives_three_sizes_and_the_next_one_chooses(monkeypatch):
    picture, mask = scene()
    monkeypatch.setattr(colours, "APART", 0.0)
    sizes = [m.sum() for m, _ in first.masks(picture, clicks((70, 50)))]
    assert len(sizes) == 3 and sizes == sorted(sizes)
    one = first.answer(picture, clicks((70, 50)), None)[0]
    assert one.sum() == sizes[first.FEW[0]] and one[50, 70]
    refused = first.answer(picture, clicks((70, 50), (110, 50), labels=[1, 0]), None)[0]
    assert refused[50, 70] and not refused[50, 110] and iou(refused, mask) > 0.8


def test_clicks_are_on_their_side_of_the_border():
    picture, mask = scene()
    given = clicks((70, 50), (60, 45), (75, 40), (20, 20), labels=[1, 1, 0, 0])
    found = first.answer(picture, given, None)[0]
    assert found[50, 70] and found[45, 60] and not found[40, 75] and not found[20, 20]


@pytest.mark.parametrize("label", [1, 0])
def test_a_correction_changes_only_what_is_connected_to_a_click(label):
    """Two errors of the same kind; one is clicked, the other stays."""
    picture, mask = scene()
    before = mask.copy()
    errors = (slice(44, 56), slice(82, 95)), (slice(44, 56), slice(45, 58))  # at the right and left rim of the disk
    if label:
        for e in errors:
            before[e] = False
    else:
        errors = (slice(44, 56), slice(96, 110)), (slice(10, 22), slice(10, 24))
        for e in errors:
            before[e] = True
    middle = (float(errors[0][1].start + 6), 50.0)
    after, _ = first.corrected(picture, clicks(middle, labels=[label]), before)
    assert (after[errors[0]] == mask[errors[0]]).mean() > 0.9
    assert np.array_equal(after[errors[1]], before[errors[1]]) and iou(after, mask) > iou(before, mask)


def test_one_click_of_a_correction_speaks_for_what_looks_the_same_a_little_further_on(monkeypatch):
    """Half of the disk is missing; without the likeness the click would restore what is within CLOSE of it."""
    picture, mask = scene()
    before = mask & (np.arange(W) < 70)
    gained = [(first.corrected(picture, clicks((82, 50)), before)[0] & mask & ~before).sum()]
    monkeypatch.setattr(first, "alike", lambda columns, near: torch.full(GRID, -1.0))
    gained.append((first.corrected(picture, clicks((82, 50)), before)[0] & mask & ~before).sum())
    assert gained[0] > 0.9 * (mask & ~before).sum() > gained[1]


def test_a_scribble_changes_only_what_is_close():
    picture, mask = scene()
    before = np.zeros_like(mask)
    line = clicks(*[(60 + 2 * k, 50) for k in range(8)])
    after, _ = first.corrected(picture, line, before)
    reach = first.CLOSE * W + 1
    y, x = np.nonzero(after)
    assert after[50, 60:75].all() and np.abs(y - 50).max() <= reach and x.min() >= 60 - reach and x.max() <= 74 + reach


def test_nothing_but_refusals_is_no_object():
    picture, _ = scene()
    assert first.answer(picture, clicks((20, 20), labels=[0]), None)[0].sum() < 0.02 * H * W


def test_the_same_again():
    picture, mask = scene()
    a, b = (first.answer(picture, clicks((70, 50)), None)[0] for _ in range(2))
    assert np.array_equal(a, b)


def test_motion_is_measured_against_the_background():
    """The camera pans by 3 pixels, a disk moves by 6 more: it is told from its ground, also where nothing else does."""
    rng = np.random.default_rng(0)
    ground = data.texture(rng, 120, 200, np.array([110, 110, 110.0]), 25)
    disk = data.texture(rng, 120, 200, np.array([110, 110, 110.0]), 25)
    inside = cv2.circle(np.zeros((120, 200), np.uint8), (90, 60), 24, 1, -1) > 0
    a, b = ground.copy(), np.roll(ground, 3, 1)
    a[inside], there = disk[inside], np.roll(inside, 9, 1)
    b[there] = np.roll(disk, 9, 1)[there]
    moves = first.motion(a.astype(np.uint8), b.astype(np.uint8), 4.0, (30, 50))
    share = cv2.resize(inside.astype(np.float32), (50, 30), interpolation=cv2.INTER_AREA)
    assert moves[share > 0.99].median() > 2 and moves[share == 0].median() < 0.75
    assert first.moving(moves[share > 0.99].median()) == 1 and first.moving(moves[share == 0].median()) == 0


@pytest.mark.parametrize("moves", [0, 6])
def test_only_what_moves_is_judged_by_its_motion(moves):
    """A click: where nothing moves the answer is as without another frame; a moving object is held against its own
    motion, so that a place of its kind that stands still is less likely than without."""
    picture, mask = scene(moves=moves)
    still = dataclasses.replace(picture, moves=torch.zeros(GRID))
    point = np.array([[70, 50]], np.float32)
    with_, without = first.clicked(picture, point), first.clicked(still, point)
    outside = torch.from_numpy(cv2.resize(mask.astype(np.float32), GRID[::-1])) == 0
    if moves:
        assert (with_ - without)[outside].median() < -2 and (with_ - without)[~outside].median() > 0
    else:
        assert torch.allclose(with_, without)


def test_a_box_takes_the_mask_that_stood_there_into_account(monkeypatch):
    """Where the box itself is undecided, the earlier mask says what is the object."""
    picture, mask = scene()
    real = first.boxed
    monkeypatch.setattr(first, "boxed", lambda s, box: (torch.zeros(GRID), real(s, box)[1]))
    monkeypatch.setattr(first, "bordered", lambda frame, p, o: p > 0.5)
    blind = dataclasses.replace(picture, vectors=0 * picture.vectors)
    given = Interaction(box=np.array([40, 20, 120, 90], np.float32))
    assert iou(first.answer(blind, given, mask)[0], mask) > 0.85 > iou(first.answer(blind, given, None)[0], mask)


def test_a_box_around_everything_still_gives_an_answer():
    picture, mask = scene()
    ((found, _),) = first.masks(picture, Interaction(box=np.array([0, 0, W - 1, H - 1], np.float32)))
    assert found.any() and not found.all()


def blind(picture: first.Scene) -> first.Scene:
    """The same without anything that the network or motion knows."""
    zeros = torch.zeros_like(picture.vectors)
    zeros[-first.COLOURS :] = picture.vectors[-first.COLOURS :]
    return dataclasses.replace(picture, vectors=zeros, look=0 * picture.look, kind=0 * picture.kind)


@pytest.mark.parametrize("points", [[(70, 50)], [(54 + 8 * k, 50) for k in range(5)] + [(70, 34), (70, 66)]])
def test_colour_decides_where_it_tells_the_object_from_its_surroundings(points):
    """Nothing but colour is known: a disk of its own colour is found, one of the ground's is not guessed at by it."""
    picture, mask = scene()
    assert iou(first.answer(blind(picture), clicks(*points), None)[0], mask) > 0.95
    assert first.coloured(blind(scene(red=60)[0]), clicks(*points)) is None


def test_a_mask_by_colour_agrees_with_every_click():
    picture, _ = scene()
    assert first.coloured(picture, clicks((70, 50), (75, 55), labels=[1, 0])) is None


def half(t: int) -> tuple[np.ndarray, np.ndarray]:
    """A drawn frame and the object's mask on it; on frame 16 the object is a sliver beside the occluder."""
    video = data.draw("occluder", 101)
    return video.frames[t], video.truth[t] == 1


def drawn(t: int) -> first.Scene:
    g = torch.Generator().manual_seed(0)
    frame, (other, _) = half(t)[0], half(t + 1)
    return first.Scene.of(frame, torch.randn(6, *GRID, generator=g), torch.randn(6, *GRID, generator=g), CELL, other)


def test_where_the_object_is_nearly_hidden_its_colours_elsewhere_say_what_a_click_means():
    """Nothing stood there: without the other frame a click on the sliver takes much of the pillar with it."""
    sliver, seen = half(16)[1], [half(5)]
    assert 10 < sliver.sum() < 40
    y, x = np.nonzero(sliver)
    one = clicks((x[0], y[0]))
    found, without = (first.answer(drawn(16), one, None, s)[0] for s in (seen, ()))
    assert iou(found, sliver) > 0.5 and without.sum() > 10 * sliver.sum()


def test_a_mask_unlike_the_object_elsewhere_is_no_more_than_its_clicks(monkeypatch):
    """Colours are not its own, so they do not say what it is; they still say what it is not."""
    monkeypatch.setattr(colours, "APART", 0.0)
    picture, mask = scene()
    other, known = scene(seed=1)
    point = clicks((20, 20))  # on the ground
    assert first.answer(picture, point, None)[0].sum() > 100
    assert first.answer(picture, point, None, [(other.frame, known)])[0].sum() <= 9
    taken = first.answer(picture, clicks((70, 50)), None, [(other.frame, known)])[0]
    assert iou(taken, mask) > 0.8


def test_a_correction_by_known_colours_takes_the_whole_error_that_is_clicked():
    """Also by a scribble, which else changes only what is close."""
    picture, mask = scene()
    other, known = scene(seed=1)
    before = mask & (np.arange(W) < 60)
    line = clicks(*[(80, 44 + 2 * k) for k in range(7)])
    after, _ = first.answer(picture, line, before, [(other.frame, known)])
    assert iou(after, mask) > 0.9 > iou(first.answer(picture, line, before)[0], mask)


def test_colours_of_a_mask_and_of_its_surroundings():
    picture, mask = scene()
    same, _ = scene(red=60)
    assert colours.common([(picture.frame, mask)]) < 0.05 and colours.common([(same.frame, mask)]) > 0.6
    assert colours.common([(picture.frame, np.zeros_like(mask))]) == 1 == colours.common([(picture.frame, ~(mask & 0))])
    assert colours.told(same.frame, [(same.frame, mask)]) is None
    other, _ = scene(seed=1)
    assert iou(colours.told(other.frame, [(picture.frame, mask)]), mask) > 0.9
    assert colours.like(other.frame, mask, [(picture.frame, mask)]) > 0.6
    assert colours.like(other.frame, ~mask, [(picture.frame, mask)]) < 0.05


def test_a_scribble_says_how_large_the_object_is():
    """Far from a short scribble the object is less likely than as far from a long one; a click says nothing of it."""
    picture, _ = scene()
    odds = {n: first.clicked(picture, np.array([(40 + n * k, 50) for k in range(8)], np.float32)) for n in (1, 8)}
    far = (18, 20)  # cells: 24 pixels below both
    assert odds[1][far] < odds[8][far] - 5
