"""The whole: session, simulated user, readers; degenerate videos; the pipeline in a stranger's own code."""

from lab import runs
from lab.runs import UserError

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import data
import pipeline
import robot
import scribbles
import settings
from methods import METHODS
from prompts import Interaction
from segmenters.grabcut import GrabCut
from segmenters.interface import share
from session import Session, merge
from trackers.boxes import FlowBox
from trackers.points import LucasKanade

torch.set_num_threads(1)


def session(video, method="full", seed=0):
    parts = GrabCut(), LucasKanade(), FlowBox
    return Session(video.frames, video.objects, *parts, METHODS[method], seed)


def masks(video, t):
    return {o: Interaction(mask=video.truth[t] == o) for o in video.objects}


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
    """28 pixels a frame, radius 15: here its masks become worse, but stay on it (not always: README.md)."""
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
