"""Prompts, trackers, filter, session, segmenters, robot and readers; degenerate videos."""

from lab import runs
from lab.runs import UserError

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import data
import pipeline
import prompts
import robot
import scribbles
import settings
from methods import METHODS
from prompts import Interaction, Prompt
from segmenters import sam as sam_module
from segmenters.grabcut import GrabCut
from segmenters.interface import Geometry, share
from segmenters.sam import Sam, SamSegmenter
from session import Session, merge
from trackers.boxes import FlowBox, NetworkBox
from trackers.filter import Filter, FilterOptions
from trackers.points import LucasKanade, chained

torch.set_num_threads(1)


def session(video, method="full", segmenter=None, seed=0):
    parts = segmenter or GrabCut(), LucasKanade(), FlowBox
    return Session(video.frames, video.objects, *parts, METHODS[method], seed)


def masks(video, t):
    return {o: Interaction(mask=video.truth[t] == o) for o in video.objects}


# -------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("how", prompts.SELECTIONS)
@pytest.mark.parametrize("n", [1, 5, 16])
def test_points_lie_in_the_mask(how, n):
    video = data.draw("plain", 3, 2)
    mask = video.truth[0] == 1
    p = prompts.select(mask, n, how, np.random.default_rng(0), video.frames[0])
    assert p.shape == (n, 2) and p.dtype == np.float32
    x, y = p.round().astype(int).T
    assert mask[y, x].all()
    again = prompts.select(mask, n, how, np.random.default_rng(0), video.frames[0])
    assert np.array_equal(p, again)


def test_tiny_and_empty_masks():
    mask = np.zeros((10, 12), bool)
    for how in prompts.SELECTIONS:
        assert prompts.select(mask, 4, how, np.random.default_rng(0)).shape == (0, 2)  # never points at the corner
    assert prompts.box_of(mask) is None
    mask[4, 5] = mask[4, 6] = True
    p = prompts.select(mask, 5, "kmedoids", np.random.default_rng(0))
    assert p.tolist() == [[5, 4], [6, 4], [5, 4], [6, 4], [5, 4]]
    assert prompts.box_of(mask).tolist() == [5, 4, 6, 4]


def test_medoids_split_two_heaps():
    heap = np.argwhere(np.ones((5, 5))).astype(np.float32)
    found = prompts.medoids(np.concatenate([heap, heap + 100]), 2, np.random.default_rng(0))
    assert sorted(found[:, 0].tolist()) == [2, 102]


def test_scribbles_to_clicks():
    lines = [
        {"path": [[0.1, 0.5], [0.9, 0.5]], "object_id": 1},
        {"path": [[0.1, 0.9], [0.9, 0.9]], "object_id": 0},
        {"path": [[0.5, 0.1], [0.5, 0.8]], "object_id": 2},
    ]
    drawn = prompts.rasterise(lines, (41, 81))
    assert drawn[20, 8] == 1 and drawn[36, 72] == 0 and drawn[0, 0] == -1
    got = prompts.from_scribbles(lines, (41, 81), (1, 2, 3), 6, np.random.default_rng(0))
    one = got[1]
    assert (one.labels == 1).sum() == 6 and (one.labels == 0).sum() == 12 and (one.points[:6, 1] == 20).all()
    assert (np.abs(one.points[:6, 0] - 40) > 2).all()  # nothing within 2 pixels of object 2's line
    assert not (got[3].labels == 1).any()


def test_parts_with_a_click_or_of_the_corrected_mask_are_kept():
    mask = np.zeros((20, 60), bool)
    mask[5:10, 5:20] = mask[5:10, 25:30] = mask[12:16, 40:50] = True
    click = np.array([[27, 7]], np.float32)
    assert np.array_equal(prompts.with_positives(mask, click), mask & (np.arange(60) >= 25) & (np.arange(60) < 30))
    old = np.zeros_like(mask)
    old[4:9, 3:12] = True
    assert np.array_equal(prompts.with_positives(mask, click, old), mask & (np.arange(60) < 30))
    assert np.array_equal(prompts.with_positives(mask, np.array([[0, 0]], np.float32), old), mask)
    assert np.array_equal(prompts.with_positives(mask, prompts.NONE), mask)


# ------------------------------------------------------------------------------------------------------------- tracking


def test_lucas_kanade_follows_a_shift_and_the_box_too():
    rng = np.random.default_rng(0)
    ground = data.texture(rng, 140, 200, np.array([120, 90, 60.0]), 30).astype(np.uint8)
    frames = [np.ascontiguousarray(ground[10:110, 10 + 2 * t : 150 + 2 * t]) for t in range(6)]
    points = np.array([[60, 50], [80, 40]], np.float32)
    tr = LucasKanade().track(frames, list(range(6)), points)
    assert np.allclose(tr.places[5], points - [10, 0], atol=0.2) and tr.visible.all() and tr.error.max() < 0.3
    back = LucasKanade().track(frames, [5, 4, 3], points)
    assert np.allclose(back.places[2], points + [4, 0], atol=0.2)
    box = FlowBox()
    box.start(frames[0], np.array([50, 30, 90, 70], np.float32), None)
    for t in range(1, 6):
        got, sure = box.step(frames[t])
    assert np.allclose(got, [40, 30, 80, 70], atol=1.5) and sure > 0.6


def test_box_is_lost_behind_the_occluder_and_found_again():
    video = data.draw("occluder", 101)
    g = [x == 1 for x in video.truth]
    box, found = FlowBox(), []
    box.start(video.frames[0], prompts.box_of(g[0]), g[0])
    for t in range(1, len(g)):
        got, _ = box.step(video.frames[t])
        found.append(got)
        if got is not None:
            box.correct(g[t])
    assert any(b is None for b in found) and np.abs(found[-1] - prompts.box_of(g[-1])).max() < 6


def test_chained_windows_go_on_from_the_latest_sure_frame():
    starts = []

    def window(video, points):
        first = int(video[0, 0, 0, 0, 0])
        starts.append(first)
        t = torch.arange(8.0)
        sure = torch.tensor([1, 0.99, 0.99, 0.95, 0.85, 0.5, 0.5, 0.5])
        return points[None] + t[:, None, None], sure[:, None]

    video = torch.arange(13.0)[None, :, None, None, None].expand(1, 13, 3, 2, 2)
    places, seen = chained(window, video, torch.zeros(1, 2))
    assert starts == [0, 3, 6]  # frame 3 of each window is the last above 0.9
    assert places[:, 0, 0].tolist() == list(range(13)) and seen[3, 0] == 1


def test_filter():
    f = Filter(FilterOptions(), np.array([1, 1, 1, 1, 1, 0, 0]))
    frame = np.zeros((480, 854, 3), np.uint8)
    before = np.array([[100, 100], [110, 100], [120, 100], [130, 100], [300, 100], [115, 100], [400, 400]], np.float32)
    step = np.array([[1, 0], [1, 0], [1, 0], [40, 0], [1, 0], [1, 0], [0, 0]], np.float32)
    box = np.array([90, 80, 180, 120], np.float32)
    seen, error = np.ones(7, bool), np.zeros(7)
    error[2] = 1.5
    ok = f.keep(before + step, before, seen, error, box, frame)
    #  good, good, backward error, jumped, outside the box, negative inside the box, negative outside
    assert ok.tolist() == [True, True, False, False, False, False, True]
    for _ in range(2):
        f.keep(before, before, seen, np.zeros(7), box, frame)
    assert f.dead.tolist() == [False, False, False, False, True, False, False]  # outside three times in a row
    border = f.keep(np.full((7, 2), 2.0), before, seen, np.zeros(7), None, frame)
    assert not border.any()


def test_network_box_speaks_xywh():
    class Net:
        def initialize(self, image, info):
            self.given = info["init_bbox"]

        def track(self, image):
            return {"target_bbox": [10, 20, 30, 40], "best_score": self.score}

    net = Net()
    box = NetworkBox(tracker=net)
    box.start(None, np.array([5, 6, 14, 25]), None)
    assert net.given == [5, 6, 10, 20]
    net.score = 0.9
    assert box.step(None)[0].tolist() == [10, 20, 39, 59]
    net.score = 0.1
    assert box.step(None)[0] is None


# ----------------------------------------------------------------------------------------------------------- segmenters


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (37, 61), (5, 7), (480, 854)])
def test_geometry_there_and_back(shape):
    g = Geometry(*shape, 64)
    mask = np.zeros(shape, bool)
    mask[shape[0] // 4 : shape[0] // 2 + 1, shape[1] // 3 : shape[1] // 2 + 1] = True
    back = g.full(g.low(np.where(mask, 8.0, -8.0))) > 0
    assert (back & mask).sum() / (back | mask).sum() > 0.85 and g.low(mask).shape == (256, 256)


def test_grabcut_finds_a_drawn_object_by_box_and_points():
    video = data.draw("plain", 1, 2)
    g = video.truth[0] == 1
    cut = GrabCut()
    e = cut.encode(video.frames[0])
    assert e.features is None  # made when the memory asks for them
    f = cut.features(e)
    assert f.shape == (112, 36, 60) and e.cell == pytest.approx(8 * 160 / 480) and cut.features(e) is f
    ask = Prompt(prompts.select(g, 8, "kmedoids", np.random.default_rng(0)), np.ones(8, int), prompts.box_of(g))
    low, quality = cut.decode(e, [ask])[0]
    found = e.geometry.full(low) > 0
    assert (found & g).sum() / (found | g).sum() > 0.85 and 0.7 < quality <= 1
    assert cut.decode(e, [Prompt()])[0][1] == 0  # nothing asked, nothing found


def test_mobile_sam_mapping_is_strict_and_complete():
    """A checkpoint with the published names, made by the inverse mapping: 439 keys, all of ours are covered."""
    torch.manual_seed(0)
    sam = Sam("mobile")
    ours = sam.state_dict()
    theirs = {}
    for key, value in ours.items():
        k = key
        if k.startswith("image_encoder.body."):
            rest = k.removeprefix("image_encoder.body.")
            rest = rest.replace("head.norm.", "norm_head.").replace(".conv.weight", ".c.weight")
            rest = rest.replace("patch_embed.conv1.", "patch_embed.seq.0.").replace(
                "patch_embed.conv2.", "patch_embed.seq.2."
            )
            words = rest.split(".")
            if words[0] == "stages":
                i = int(words[1]) - (words[2] == "downsample")
                words = ["layers", str(i), *words[2:]]
            k = "image_encoder." + ".".join(words)
        theirs[k] = value
    theirs |= {"image_encoder.head.weight": torch.zeros(1000, 320), "image_encoder.head.bias": torch.zeros(1000)}
    assert len(theirs) == 439
    count = {p: sum(k.startswith(p) for k in theirs) for p in ("image_encoder", "prompt_encoder", "mask_decoder")}
    assert count == {"image_encoder": 302, "prompt_encoder": 17, "mask_decoder": 120}
    back = sam_module.mobile_keys(theirs)
    assert back.keys() == ours.keys() and all(back[k] is ours[k] for k in ours)


def test_loading_is_strict_and_refuses_other_weights(tmp_path):
    torch.manual_seed(0)
    sam = Sam("tiny")
    state = sam.state_dict()
    torch.save(state, tmp_path / "a.pt")
    other = Sam("tiny")
    sam_module.load(other, "tiny", tmp_path / "a.pt")
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    state.pop("mask_decoder.iou_token.weight")
    torch.save(state, tmp_path / "b.pt")
    with pytest.raises(UserError, match="does not fit"):
        sam_module.load(other, "tiny", tmp_path / "b.pt")
    for value in (float("nan"), float("inf")):
        bad = {k: v.clone() for k, v in other.state_dict().items()}
        bad["mask_decoder.mask_tokens.weight"][0, 0] = value
        torch.save(bad, tmp_path / "n.pt")
        with pytest.raises(UserError, match="not finite.*mask_tokens"):
            sam_module.load(other, "tiny", tmp_path / "n.pt")
    (tmp_path / "c.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="readable"):
        sam_module.load(other, "tiny", tmp_path / "c.pt")


@pytest.mark.parametrize("name,size", [("tiny", 256), ("mobile", 256), ("hq_tiny", 256)])
def test_random_weights_run_end_to_end(name, size):
    torch.manual_seed(0)
    video = data.draw("pair", 0, 3)
    s = session(video, segmenter=SamSegmenter(Sam(name, size), torch.device("cpu")))
    s.interact(0, masks(video, 0))
    s.interact(2, {1: Interaction(points=np.array([[40, 40]], np.float32), labels=np.array([1]))})
    assert all(g.shape == (96, 160) and g.max() <= 2 for g in s.labels()) and len(s.cache) == 3


def test_sam_decodes_objects_together_as_one_by_one():
    torch.manual_seed(0)
    sam = SamSegmenter(Sam("tiny"), torch.device("cpu"))
    e = sam.encode(data.draw("pair", 0, 1).frames[0])
    a = Prompt(np.array([[30, 40]], np.float32), np.array([1]))
    b = Prompt(np.array([[90, 50]], np.float32), np.array([1]), np.array([70, 30, 110, 70], np.float32))
    c = Prompt(np.array([[60, 20]], np.float32), np.array([1]))
    together = sam.decode(e, [a, b, c])
    for p, (low, quality) in zip((a, b, c), together, strict=True):
        alone = sam.decode(e, [p])[0]
        assert torch.allclose(low, alone[0], atol=1e-4) and quality == pytest.approx(alone[1], abs=1e-5)


def test_choices_that_do_not_wait_are_those_of_the_library():
    """The prompt encoder by `where` and the table of relative positions on the device, against segment-anything's."""
    from segment_anything.modeling import PromptEncoder

    torch.manual_seed(0)
    sam = Sam("tiny")
    own, theirs = sam.prompt_encoder, PromptEncoder(64, (16, 16), (256, 256), mask_in_chans=16)
    theirs.load_state_dict(own.state_dict())
    points, labels = torch.rand(3, 5, 2) * 256, torch.tensor([[1, 0, -1, 1, 0]] * 3)
    box = torch.tensor([[10.0, 20, 90, 80]] * 3)
    for given in ({"points": (points, labels), "boxes": None}, {"points": (points, labels), "boxes": box}):
        a, b = (encoder(**given, masks=None)[0] for encoder in (own, theirs))
        assert torch.equal(a, b)
    table = torch.randn(27, 8)
    assert torch.equal(sam_module.relative_positions(14, 14, table), sam_module.library_positions(14, 14, table))
    assert sam_module.relative_positions(14, 7, table).shape == (14, 7, 8)


def test_hq_decoder_is_sam_plus_its_token():
    torch.manual_seed(0)
    sam = Sam("hq_vit_b", 64).eval()  # the published architecture on a small picture
    assert {k.split(".")[1] for k in sam.state_dict() if "hf_" in k} == {"hf_token", "hf_mlp"}
    seg = SamSegmenter(sam, torch.device("cpu"))
    low, _ = seg.decode(
        seg.encode(np.zeros((40, 64, 3), np.uint8)), [Prompt(box=np.array([5, 5, 30, 30], np.float32))]
    )[0]
    assert low.shape == (16, 16) and torch.isfinite(low).all()


# -------------------------------------------------------------------------------------------------------------- session


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_keeps_interacted_frames_and_propagates_both_ways(method):
    video = data.draw("plain", 1, 8)
    s = session(video, method)
    s.interact(3, masks(video, 3))
    s.interact(6, masks(video, 6))
    labels = s.labels()
    assert all(np.array_equal(labels[t], video.truth[t]) for t in (3, 6))
    if METHODS[method].box and METHODS[method].propagate and not METHODS[method].shuffled:
        j = [(labels[t] & video.truth[t]).sum() / (labels[t] | video.truth[t]).sum() for t in (0, 2, 4, 7)]
        assert min(j) > 0.4


def test_limits_of_propagation():
    video = data.draw("plain", 1, 10)
    s = session(video)
    s.states[1].exact = dict.fromkeys((2, 8), video.truth[0] == 1)
    assert s.reach(1, 8, -1) == ([8, 7, 6, 5], 2) and s.reach(1, 8, 1) == ([8, 9], None)  # ties: the later round
    assert s.reach(1, 2, 1)[0] == [2, 3, 4, 5]
    s.method = METHODS["blend"]
    assert s.reach(1, 8, -1)[0] == [8, 7, 6, 5, 4, 3]
    s.method = METHODS["all"]
    assert s.reach(1, 8, -1)[0] == list(range(8, -1, -1))


@pytest.mark.parametrize("method", ["full", "copy", "blend", "reinit"])
def test_a_correction_of_one_object_does_not_limit_another(method):
    """Frame 6 is corrected for object 2 alone: object 1 still passes through it."""
    video = data.draw("pair", 2, 10)
    s = session(video, method)
    s.interact(0, masks(video, 0))
    s.interact(6, {2: Interaction(mask=video.truth[6] == 2)})
    before = [s.states[2].low[t] for t in range(10)]
    assert s.reach(1, 3, 1)[0] == [3, 4, 5, 6, 7, 8, 9] and s.reach(2, 3, 1)[1] == 6
    s.interact(3, {1: Interaction(mask=video.truth[3] == 1)})
    assert all(a is b for a, b in zip(before, s.states[2].low, strict=True))  # object 2 was not asked about
    s.interact(3, masks(video, 3))
    changed = [t for t in range(10) if s.states[2].low[t] is not before[t] and t != 3]
    assert set(changed) <= {1, 2, 4, 5} and s.states[1].exact.keys() == {0, 3}


def test_same_seed_same_masks_and_embeddings_once():
    video = data.draw("pair", 2, 6)
    runs_ = []
    for _ in range(2):
        s = session(video, seed=4)
        encoded = []
        s.segmenter.encode, old = (lambda f, n=encoded, e=s.segmenter.encode: (n.append(1), e(f))[1]), None
        s.interact(0, masks(video, 0))
        s.interact(4, masks(video, 4))
        runs_.append(s.labels())
        assert len(encoded) == 6 and old is None
    assert all(np.array_equal(a, b) for a, b in zip(*runs_, strict=True))


def test_one_frame_odd_sizes_three_objects():
    one = data.draw("plain", 1, 1)
    s = session(one)
    s.interact(0, masks(one, 0))
    assert np.array_equal(s.labels()[0], one.truth[0])
    odd = data.draw("triple", 1, 40, (97, 161))
    odd.frames, odd.truth = odd.frames[:4], odd.truth[:4]
    s = session(odd)
    s.interact(0, masks(odd, 0))
    labels = s.labels()
    assert odd.objects == (1, 2, 3) and labels[3].shape == (97, 161) and set(np.unique(labels[1])) == {0, 1, 2, 3}


def test_empty_mask_and_object_that_leaves():
    video = data.draw("plain", 1, 12)
    s = session(video)
    s.interact(0, {1: Interaction(mask=np.zeros((96, 160), bool))})
    assert not any(g.any() for g in s.labels())
    ground = data.texture(np.random.default_rng(0), 60, 90, np.array([90, 90, 90.0]), 10)
    frames, truth = [], []
    for t in range(12):  # a bright disk runs out of the picture on the right
        image, g = ground.copy(), np.zeros((60, 90), np.uint8)
        cv2.circle(g, (60 + 5 * t, 30), 9, 1, -1)
        image[g > 0] = (230, 60, 40)
        frames.append(image.astype(np.uint8))
        truth.append(g)
    gone = session(data.finished(data.Video("leaving", frames, truth, ())))
    gone.interact(0, {1: Interaction(mask=truth[0] == 1)})
    labels = gone.labels()
    assert labels[2].any() and not truth[11].any() and labels[11].sum() < 30


def test_merge_takes_the_largest_and_ties_go_to_the_background():
    p = np.array([[[0.9, 0.5, 0.2]], [[0.95, 0.5, 0.3]]], np.float32)
    assert merge(p, (3, 7)).tolist() == [[7, 3, 0]]
    assert merge(np.full((1, 1, 1), 0.5, np.float32), (1,)).tolist() == [[0]]


# ---------------------------------------------------------------------------------------------------------------- robot


def test_click_is_the_middle_of_the_largest_error():
    truth, answer = np.zeros((30, 40), bool), np.zeros((30, 40), bool)
    truth[5:16, 5:16] = True
    answer[20:23, 20:23] = True
    p, label, region = robot.click(truth, answer)
    assert p.tolist() == [10, 10] and label == 1 and np.array_equal(region, truth)
    p, label, region = robot.click(truth, truth | answer)
    assert p.tolist() == [21, 21] and label == 0 and np.array_equal(region, answer)
    assert robot.click(truth, truth) is None
    p, label, _ = robot.click(truth, np.roll(truth, 11, 0))  # as much missing as too much: missing first
    assert p.tolist() == [10, 10] and label == 1
    edge = np.zeros((30, 40), bool)
    edge[:7] = True  # the border of the picture is an edge too
    assert robot.click(edge, ~edge & False)[0].tolist()[1] == 3


def test_further_clicks_stay_inside_the_region_of_the_first():
    """A shifted answer: what is missing touches what is too much, and no click may land there with the wrong label."""
    truth = np.zeros((40, 60), np.uint8)
    truth[10:30, 10:30] = 1
    answer = np.roll(truth, 8, 1)
    one = robot.give("click", truth, answer, (1,), np.random.default_rng(0), clicks=5)[1]
    x, y = one.points.astype(int).T
    assert len(one.points) == 5 and (one.labels == 1).all() and (truth[y, x] == 1).all() and (answer[y, x] == 0).all()
    assert len(robot.give("click", truth, answer, (1,), np.random.default_rng(0))[1].points) == 1
    assert robot.give("click", truth, truth, (1,), np.random.default_rng(0)) == {}


def test_scribbles_lie_in_the_error_and_tell_the_worst_frame():
    truth = np.zeros((60, 100), np.uint8)
    truth[20:40, 10:90] = 1
    found = scribbles.scribbles(truth, np.zeros_like(truth), (1,))
    path = np.array(found[0]["path"]) * [100, 60]
    assert len(found) == 1 and len(path) == 1000 and np.ptp(path[:, 0]) > 50
    assert (truth[path[:, 1].round().astype(int), path[:, 0].round().astype(int)] == 1).all()
    assert [x["object_id"] for x in scribbles.scribbles(np.zeros_like(truth), truth, (1,))] == [0]
    scores = np.array([0.5, 0.2, 0.2, np.nan])[:, None, None] * np.ones((4, 1, 2))
    assert robot.worst_frame(scores, set()) == 1 and robot.worst_frame(scores, {1}) == 2
    assert robot.worst_frame(scores, {0, 1, 2}) is None


# -------------------------------------------------------------------------------------------------------------- readers


def davis(root, name="a", n=3, objects=2):
    for t in range(n):
        (root / "JPEGImages/480p" / name).mkdir(parents=True, exist_ok=True)
        (root / "Annotations/480p" / name).mkdir(parents=True, exist_ok=True)
        video = data.draw("pair", 0, n)
        Image.fromarray(video.frames[t]).save(root / f"JPEGImages/480p/{name}/{t:05d}.jpg")
        mask = Image.fromarray(np.minimum(video.truth[t], objects), "P")
        mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        mask.save(root / f"Annotations/480p/{name}/{t:05d}.png")
    (root / "ImageSets/2017").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/2017/val.txt").write_text(name + "\n")


def test_davis_readers(tmp_path):
    davis(tmp_path / "DAVIS")
    assert data.names_of("davis2017", "val", tmp_path) == ["a"]
    v = data.load("davis2017", "a", "val", tmp_path)
    assert v.objects == (1, 2) and v.scored and v.frames[0].shape == (96, 160, 3)
    assert data.load("davis2016", "a", "val", tmp_path).objects == (1,)  # all objects are one there
    assert data.load("davis2017", "a", "val", tmp_path, longest=80).truth[0].shape == (48, 80)


@pytest.mark.parametrize("dataset,folder", [("youtube-vos", "YouTubeVOS"), ("mose", "MOSE")])
def test_masks_of_val_are_not_public_and_the_robot_says_so(dataset, folder, tmp_path):
    import evaluation

    root = tmp_path / folder / "valid"
    davis(root)
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / "480p" / "a").rename(root / kind / "a")
    for t in (1, 2):
        (root / "Annotations" / "a" / f"{t:05d}.png").unlink()
    v = data.load(dataset, "a", "valid", tmp_path)
    assert not v.scored and v.truth[1] is None
    s = settings.EvalSettings(dataset=dataset, split="valid")
    with pytest.raises(UserError, match="not public"):
        evaluation.play(s, v, 0, pipeline.build(s))


def test_damaged_files_are_named(tmp_path):
    davis(tmp_path / "DAVIS")
    frame = tmp_path / "DAVIS/JPEGImages/480p/a/00001.jpg"
    frame.write_bytes(frame.read_bytes()[:200])
    with pytest.raises(UserError, match="00001.jpg is no readable picture"):
        data.load("davis2017", "a", "val", tmp_path)
    with pytest.raises(UserError, match="no video b"):
        data.load("davis2017", "b", "val", tmp_path)
    with pytest.raises(UserError, match="nothing in"):
        data.load("mose", "b", "train", tmp_path)


def test_procedural_videos_are_exact_and_repeat():
    a, b = data.draw("pair", 5), data.draw("pair", 5)
    assert all(np.array_equal(x, y) for x, y in zip(a.frames, b.frames, strict=True)) and a.hidden == b.hidden
    assert not np.array_equal(a.frames[0], data.draw("pair", 6).frames[0])
    first, last = a.hidden
    assert 5 < first < last < 35 and any(not (g == 1).any() for g in a.truth[first : last + 1])


@pytest.mark.realdata
def test_copy_of_the_first_mask_on_a_real_sequence():
    """Known numbers of this sanity row: car-shadow J 0.4040, F 0.2525 over frames 1 to T-1."""
    from lab.runs import data_dir

    import metrics

    try:
        v = data.load("davis2016", "car-shadow", "val", data_dir(""))
    except UserError as error:
        pytest.skip(str(error))
    copies = [v.truth[0]] * len(v.truth)  # method `copy` goes through low-resolution logits, this does not
    j, f = metrics.score(copies, v.truth, (1,))[1:, 0].mean(0)
    assert (round(j, 4), round(f, 4)) == (0.4040, 0.2525)


# -------------------------------------------------------------------------------------------------- in your own code


def test_segment_gives_label_maps_of_all_frames():
    video = data.draw("pair", 2)
    frames = video.frames[:5]
    got = pipeline.segment(frames, video.truth[0])
    assert len(got) == 5 and np.array_equal(got[0], video.truth[0])
    for o in (1, 2):
        both = (got[4] == o) & (video.truth[4] == o)
        assert both.sum() > 0.5 * ((got[4] == o) | (video.truth[4] == o)).sum()
    one = pipeline.segment(frames[:2], video.truth[0] == 1, method="memory")
    assert set(np.unique(one[1])) == {0, 1}
    for pictures, mask in (
        (frames, np.zeros((96, 160), bool)),
        (frames, video.truth[0][:50]),
        ([frames[0], frames[1][:50]], video.truth[0]),
    ):
        with pytest.raises(ValueError, match="are asked for"):
            pipeline.segment(pictures, mask)
    with pytest.raises(UserError, match="--method"):
        pipeline.segment(frames, video.truth[0], method="magic")


@pytest.mark.parametrize("seed", [1, 3, 5])
def test_an_object_that_moves_by_its_own_size_each_frame_is_not_lost(seed):
    """28 pixels a frame, an object of radius 15: its masks become worse, but they stay on it."""
    video = data.draw("plain", seed, 5)
    got = pipeline.segment(video.frames, video.truth[0])
    j = [(a & b).sum() / (a | b).sum() for a, b in zip(got, video.truth, strict=True)]
    assert min(j) > 0.1, np.round(j, 2)


def test_the_snippet_of_the_readme_runs_as_it_stands():
    """Its first part segments a video; its second reads the memory over features of any network: here torchvision's."""
    import torchvision

    readme = (runs.HERE / "README.md").read_text().split("## In your own code")[1]
    code = readme.split("```python")[1].split("```")[0].strip()
    assert len(code.splitlines()) <= 15
    torch.manual_seed(0)
    net = torch.nn.Sequential(*list(torchvision.models.resnet18().children())[:6]).eval()  # 128 channels, stride 8
    video = data.draw("plain", 1)
    video.frames, video.truth = video.frames[:4], video.truth[:4]

    def network(frame):
        with torch.inference_mode():
            x = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255
            return net(torch.nn.functional.interpolate(x, scale_factor=3))[0]

    value = share(video.truth[0] == 1, 8 / 3, (36, 60))
    names = {"frames": video.frames, "mask": video.truth[0], "network": network, "value": value}
    exec(code, names)
    assert len(names["masks"]) == 4 and names["masks"][3].any()
    there, truth = names["logits"] > 0, share(video.truth[3] == 1, 8 / 3, (36, 60)) > 0.5
    assert (there & truth).sum() > 0.4 * (there | truth).sum()
