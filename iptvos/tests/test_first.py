"""Clicks and boxes to masks without SAM: what agrees with them, what a correction may change."""

import cv2
import numpy as np
import pytest
import torch

import data
from prompts import Interaction, box_of
from segmenters import first

H, W, CELL = 96, 160, 4.0
GRID = (24, 40)


def scene(seed: int = 0) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """A red disk on green ground, with features that know the two apart, and its mask."""
    rng = np.random.default_rng(seed)
    frame = data.texture(rng, H, W, np.array([60, 120, 60.0]), 12)
    mask = np.zeros((H, W), np.uint8)
    cv2.circle(mask, (70, 50), 22, 1, -1)
    frame[mask > 0] = data.texture(rng, H, W, np.array([190, 60, 50.0]), 12)[mask > 0]
    known = torch.from_numpy(cv2.resize(mask.astype(np.float32), GRID[::-1], interpolation=cv2.INTER_AREA))
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(6, 1, 1, generator=g) * known + 0.3 * torch.randn(6, *GRID, generator=g)
    return frame.astype(np.uint8), features, mask > 0


def clicks(*points, labels=None) -> Interaction:
    return Interaction(points=np.array(points, np.float32), labels=np.array(labels or [1] * len(points)))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def test_a_box_becomes_the_object_in_it():
    frame, features, mask = scene()
    box = box_of(mask) + np.array([-3, -2, 4, 3], np.float32)
    ((found, sure),) = first.masks(frame, features, CELL, Interaction(box=box))
    x1, y1, x2, y2 = box.astype(int)
    outside = np.ones_like(mask)
    outside[y1 : y2 + 1, x1 : x2 + 1] = False
    assert iou(found, mask) > 0.9 and not (found & outside).any() and 0 < sure <= 1


def test_one_click_gives_three_sizes_and_the_next_one_chooses():
    frame, features, mask = scene()
    sizes = [m.sum() for m, _ in first.masks(frame, features, CELL, clicks((70, 50)))]
    assert len(sizes) == 3 and sizes == sorted(sizes)
    one = first.answer(frame, features, CELL, clicks((70, 50)), None)[0]
    assert one.sum() == sizes[first.FEW[0]] and one[50, 70]
    refused = first.answer(frame, features, CELL, clicks((70, 50), (110, 50), labels=[1, 0]), None)[0]
    assert refused[50, 70] and not refused[50, 110] and iou(refused, mask) > 0.8


def test_clicks_are_on_their_side_of_the_border():
    frame, features, mask = scene()
    given = clicks((70, 50), (60, 45), (75, 40), (20, 20), labels=[1, 1, 0, 0])
    found = first.answer(frame, features, CELL, given, None)[0]
    assert found[50, 70] and found[45, 60] and not found[40, 75] and not found[20, 20]


@pytest.mark.parametrize("label", [1, 0])
def test_a_correction_changes_only_what_is_connected_to_a_click(label):
    """Two errors of the same kind; one is clicked, the other stays."""
    frame, features, mask = scene()
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
    after, _ = first.corrected(frame, features, CELL, clicks(middle, labels=[label]), before)
    assert (after[errors[0]] == mask[errors[0]]).mean() > 0.9
    assert np.array_equal(after[errors[1]], before[errors[1]]) and iou(after, mask) > iou(before, mask)


def test_a_scribble_changes_only_what_is_close():
    frame, features, mask = scene()
    before = np.zeros_like(mask)
    line = clicks(*[(60 + 2 * k, 50) for k in range(8)])
    after, _ = first.corrected(frame, features, CELL, line, before)
    reach = first.CLOSE * W + 1
    y, x = np.nonzero(after)
    assert after[50, 60:75].all() and np.abs(y - 50).max() <= reach and x.min() >= 60 - reach and x.max() <= 74 + reach


def test_nothing_but_refusals_is_no_object():
    frame, features, _ = scene()
    assert first.answer(frame, features, CELL, clicks((20, 20), labels=[0]), None)[0].sum() < 0.02 * H * W


def test_the_same_again():
    frame, features, mask = scene()
    a, b = (first.answer(frame, features, CELL, clicks((70, 50)), None)[0] for _ in range(2))
    assert np.array_equal(a, b)
