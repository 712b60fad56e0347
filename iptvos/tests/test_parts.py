"""The parts: prompts, trackers, filter, segmenters."""

from lab.runs import UserError

import numpy as np
import pytest
import torch

import data
import prompts
from methods import METHODS
from prompts import Interaction, Prompt
from segmenters import sam as sam_module
from segmenters.grabcut import GrabCut
from segmenters.interface import Geometry
from segmenters.sam import Sam, SamSegmenter
from session import Session
from trackers.boxes import FlowBox, NetworkBox
from trackers.filter import Filter, FilterOptions
from trackers.points import LucasKanade, chained

torch.set_num_threads(1)


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
    parts = SamSegmenter(Sam(name, size), torch.device("cpu")), LucasKanade(), FlowBox
    s = Session(video.frames, video.objects, *parts, METHODS["full"], 0)
    s.interact(0, {o: Interaction(mask=video.truth[0] == o) for o in video.objects})
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
