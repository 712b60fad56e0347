"""Readers as the data sets really are: frames without masks, objects that come later, scribbles of people, damage."""

import hashlib
import json

from lab.runs import UserError

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval
import evaluation
import export
import pipeline
import settings

torch.set_num_threads(1)


def write(root, name: str, frames, truth, step: int = 1) -> None:
    """A video in the YouTube-VOS layout; a truth of None has no file."""
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / name).mkdir(parents=True, exist_ok=True)
    for t, (frame, mask) in enumerate(zip(frames, truth, strict=True)):
        Image.fromarray(frame).save(root / f"JPEGImages/{name}/{t * step:05d}.jpg", quality=95)
        if mask is not None:
            image = Image.fromarray(mask, "P")
            image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            image.save(root / f"Annotations/{name}/{t * step:05d}.png")


def play(video, **changed):
    s = settings.EvalSettings(**changed)
    return evaluation.play(s, video, 0, pipeline.build(s))


@pytest.fixture
def youtube(tmp_path):
    """Every fifth number, truth on some frames only, object 2 from frame 2 on."""
    video = data.draw("pair", 0, 8)
    truth = list(video.truth)
    for t in (0, 1):
        truth[t] = np.where(truth[t] == 2, 0, truth[t])
    truth[3] = truth[5] = None
    write(tmp_path / "YouTubeVOS/train", "0a1b", video.frames, truth, 5)
    (tmp_path / "YouTubeVOS/train/meta.json").write_text(json.dumps({"videos": {"0a1b": {}}}))
    return tmp_path


def test_youtube_vos_with_frames_without_masks(youtube):
    assert data.names_of("youtube-vos", "train", youtube) == ["0a1b"]
    v = data.load("youtube-vos", "0a1b", "train", youtube)
    assert len(v.frames) == 8 and [t for t, g in enumerate(v.truth) if g is None] == [3, 5]
    assert v.objects == (1, 2) and v.first == {1: 0, 2: 2} and v.scored
    found, labels = play(v, dataset="youtube-vos", split="train", method="copy", rounds=8)
    # Round 1 gives each object its mask where it first appears; frames without truth are never chosen or scored.
    assert found["interacted"][:2] == [0, 2] and sorted(found["interacted"]) == [0, 1, 2, 2, 4, 6, 7]
    assert found["curve_first"][3] == found["curve_last"][5] == -1 and found["j_8"] == 1
    assert np.array_equal(labels[2], v.truth[2]) and labels[3].shape == (96, 160)
    for kind in ("click", "scribble", "box"):
        found, _ = play(v, interaction=kind, method="points+box", rounds=2)
        assert not {3, 5} & set(found["interacted"]) and 0 <= found["jf_2"] <= 1


def test_which_frames_count(monkeypatch):
    """Scores that differ by frame and object: all frames after a round, inner ones for the semi-supervised protocol,
    object 1 behind the occluder; a timeout of 240 s each object."""
    video = data.draw("pair", 0, 6)
    video.hidden = (1, 3)
    j = np.arange(12.0).reshape(6, 2) / 100
    scores = np.stack([j, 2 * j], -1)
    monkeypatch.setattr(evaluation.metrics, "score", lambda *a: scores)
    asked = []
    monkeypatch.setattr(evaluation.metrics, "auc", lambda *a: asked.append(a) or 0.5)
    found, _ = play(video, method="copy", rounds=1)
    assert found["j_1"] == pytest.approx(j.mean()) and found["f_1"] == pytest.approx(2 * j.mean())
    assert found["jf_semi"] == pytest.approx(1.5 * j[1:5].mean())
    assert found["j_after_1"] == pytest.approx(j[4:, 0].mean())
    assert asked[0][2] == 480.0 and len(asked[0][0]) == 1 and asked[0][1] == [pytest.approx(1.5 * j.mean())]


def test_masks_of_round_one_are_given_where_objects_appear(youtube):
    v = data.load("youtube-vos", "0a1b", "train", youtube)
    s = settings.EvalSettings()
    given = evaluation.opening(s, v, np.random.default_rng(0), None)
    assert {t: tuple(one) for t, one in given.items()} == {0: (1, 2), 2: (2,)} and not given[0][2].mask.any()
    assert np.array_equal(given[2][2].mask, v.truth[2] == 2)


def test_a_missing_picture_in_the_middle_is_no_frame(youtube):
    """YouTube-VOS numbers frames in steps; a picture that is not there is simply not part of the video."""
    (youtube / "YouTubeVOS/train/JPEGImages/0a1b/00020.jpg").unlink()
    v = data.load("youtube-vos", "0a1b", "train", youtube)
    assert len(v.frames) == 7 and v.truth[4] is None and np.array_equal(v.truth[6], read(youtube, 35))


def test_a_missing_mask_in_the_middle_of_a_davis_sequence_is_named(davis):
    path = sorted((davis / "Annotations/480p/a").glob("*.png"))[2]
    path.unlink()
    for dataset in ("davis2016", "davis2017"):
        with pytest.raises(UserError, match="lacks the mask of frame 2"):
            data.load(dataset, "a", "val", davis.parent)


def read(root, number: int) -> np.ndarray:
    return np.asarray(Image.open(root / f"YouTubeVOS/train/Annotations/0a1b/{number:05d}.png"))


def test_sha256_is_of_the_files_that_were_read(youtube):
    root = youtube / "YouTubeVOS/train"
    digests = ""
    for t in range(0, 40, 5):
        for path in (root / f"JPEGImages/0a1b/{t:05d}.jpg", root / f"Annotations/0a1b/{t:05d}.png"):
            digests += hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    v = data.load("youtube-vos", "0a1b", "train", youtube)
    assert v.sha256 == hashlib.sha256(digests.encode()).hexdigest() and v.variant == "paper"
    cut = data.load("youtube-vos", "0a1b", "train", youtube, longest=80, limit=3)
    assert cut.sha256 != v.sha256 and cut.variant == "first 3 frames, long side 80"
    a, b, c = data.load("drawn", "plain", "", youtube, 0, 2, 1), data.draw("plain", 1, 2), data.draw("plain", 2, 2)
    assert a.sha256 and np.array_equal(a.frames[1], b.frames[1]) and a.variant == "generated"
    assert a.sha256 != data.load("drawn", "plain", "", youtube, 0, 2, 2).sha256 and len(c.frames) == 2


def test_drawn_videos_can_be_made_smaller(tmp_path):
    v = data.load("drawn", "triple", "", tmp_path, 80, 3, 0)
    assert v.frames[0].shape == (48, 80, 3) and v.truth[2].shape == (48, 80) and v.objects == (1, 2, 3)
    assert v.variant == "long side 80"


@pytest.mark.realdata
def test_sha256_of_a_real_sequence():
    from lab.runs import data_dir

    try:
        v = data.load("davis2016", "car-shadow", "val", data_dir(""))
    except UserError as error:
        pytest.skip(str(error))
    assert v.sha256.startswith("08a9059bad7093ee")


# ------------------------------------------------------------------------------------------------- scribbles of people


@pytest.fixture
def davis(tmp_path):
    video = data.draw("pair", 0, 6)
    root = tmp_path / "DAVIS"
    write(root / "x", "a", video.frames, video.truth)
    for kind in ("JPEGImages", "Annotations"):
        (root / kind).mkdir()
        (root / "x" / kind).rename(root / kind / "480p")
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("a\n")
    (root / "Scribbles/a").mkdir(parents=True)
    return root


def lines(video) -> list[dict]:
    out = []
    for o in video.objects:
        y, x = (int(v.mean()) for v in np.nonzero(video.truth[3] == o))
        path = [[(x + d) / 159, y / 95] for d in range(-4, 5)]
        out.append({"path": path, "object_id": o, "start_time": 0, "end_time": 1})
    return out


def test_human_scribbles_begin_and_their_frame_may_come_back(davis):
    v = data.load("davis2017", "a", "val", davis.parent)
    per_frame = [[], [], [], lines(v), [], []]
    (davis / "Scribbles/a/002.json").write_text(json.dumps({"scribbles": per_frame, "sequence": "a"}))
    t, found = data.first_scribbles("davis2017", "a", "val", davis.parent, 2)
    assert t == 3 and [s["object_id"] for s in found] == [1, 2]
    s = settings.EvalSettings(
        dataset="davis2017", interaction="scribble", human_scribbles=True, rounds=7, method="copy"
    )
    s.check()
    given = evaluation.opening(s, v, np.random.default_rng(0), (t, found))
    assert given.keys() == {3} and (given[3][1].labels == 1).sum() > 3
    m, _ = evaluation.play(s, v, 2, pipeline.build(s), lines=(t, found))
    assert m["interacted"][0] == 3 and sorted(m["interacted"][1:]) == [0, 1, 2, 3, 4, 5]  # 3 comes back
    own, _ = play(v, interaction="scribble", method="copy", rounds=7)
    assert sorted(own["interacted"]) == [0, 1, 2, 3, 4, 5]


def test_human_scribbles_from_the_command_line(davis, monkeypatch, tmp_path):
    import sys

    v = data.load("davis2017", "a", "val", davis.parent)
    for k in (1, 2):
        (davis / f"Scribbles/a/00{k}.json").write_text(json.dumps({"scribbles": [[]] * 3 + [lines(v)[:k]]}))
    words = ["eval.py", "--dataset", "davis2017", "--data-dir", str(davis.parent), "--interaction", "scribble"]
    words += ["--human-scribbles", "--seeds", "1", "2", "--rounds", "1", "--method", "copy"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "o")])
    eval.main()
    found = [json.loads(x) for x in (tmp_path / "o/records.jsonl").read_text().splitlines()]
    assert [r["seed"] for r in found] == [1, 2] and all(r["metrics"]["interacted"] == [3] for r in found)
    assert found[0]["metrics"]["jf_1"] < found[1]["metrics"]["jf_1"]  # the second person marked both objects


@pytest.mark.parametrize(
    "text,says",
    [
        ("{}", "holds no scribbles"),
        ("[]", "holds no scribbles"),
        ('{"scribbles": [[], []]}', "holds no scribbles"),
        ('{"scribbles": [[{"path": [[0.1]], "object_id": 1}]]}', "holds no scribbles"),
        ('{"scribbles": [[{"path": [], "object_id": 1}]]}', "without a path"),
        ('{"scribbles": [[{"path": [[NaN, 0.1]], "object_id": 1}]]}', "not finite"),
        ("{", "not valid JSON"),
    ],
)
def test_broken_scribbles_are_named(text, says, davis):
    (davis / "Scribbles/a/001.json").write_text(text)
    with pytest.raises(UserError, match=says):
        data.first_scribbles("davis2017", "a", "val", davis.parent, 1)


def test_missing_scribbles_and_wrong_switches(davis):
    with pytest.raises(UserError, match="no file .*003.json"):
        data.first_scribbles("davis2017", "a", "val", davis.parent, 3)
    with pytest.raises(UserError, match="--human-scribbles goes with"):
        settings.EvalSettings(human_scribbles=True).check()
    v = data.load("davis2017", "a", "val", davis.parent, limit=2)
    s = settings.EvalSettings(dataset="davis2017", interaction="scribble", human_scribbles=True)
    with pytest.raises(UserError, match="only 2 frames"):
        evaluation.opening(s, v, np.random.default_rng(0), (3, []))


# --------------------------------------------------------------------------------------------------------------- damage


def test_a_truncated_mask_and_a_mask_of_another_size_are_named(youtube):
    path = youtube / "YouTubeVOS/train/Annotations/0a1b/00010.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="00010.png is no readable mask"):
        data.load("youtube-vos", "0a1b", "train", youtube)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(path)
    with pytest.raises(UserError, match="00010.png is \\(9, 9\\)"):
        data.load("youtube-vos", "0a1b", "train", youtube)


def test_grey_masks_and_void(tmp_path):
    Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).save(tmp_path / "binary.png")
    assert data.read_mask(tmp_path / "binary.png").tolist() == [[0, 1], [1, 0]]
    Image.fromarray(np.array([[0, 2], [255, 1]], np.uint8)).save(tmp_path / "grey.png")
    assert data.read_mask(tmp_path / "grey.png").tolist() == [[0, 2], [255, 1]]
    video = data.finished(data.Video("v", [], [np.array([[0, 2], [255, 1]], np.uint8)], ()))
    assert video.objects == (1, 2)  # void is no object


def test_void_is_not_the_object_of_davis2016(davis):
    path = davis / "Annotations/480p/a/00000.png"
    with Image.open(path) as image:
        mask = np.asarray(image).copy()
    mask[:5] = 255
    image = Image.fromarray(mask, "P")
    image.putpalette(export.palette())
    image.save(path)
    v = data.load("davis2016", "a", "val", davis.parent)
    assert v.objects == (1,) and not v.truth[0][:5].any()


def test_one_mask_alone_cannot_be_scored(youtube):
    for t in (10, 20, 30, 35, 5):
        (youtube / f"YouTubeVOS/train/Annotations/0a1b/{t:05d}.png").unlink()
    v = data.load("youtube-vos", "0a1b", "train", youtube)
    assert not v.scored
    with pytest.raises(UserError, match="not public"):
        play(v)


def test_a_split_without_videos_is_refused(davis, youtube):
    """Else a run of no video would look complete."""
    (davis / "ImageSets/2017/val.txt").write_text("\n")
    with pytest.raises(UserError, match="val.txt names no video"):
        data.names_of("davis2017", "val", davis.parent)
    meta = youtube / "YouTubeVOS/train/meta.json"
    for text, says in (('{"videos": {}}', "holds no video"), ('{"videos": "a"}', "damaged"), ("[", "damaged")):
        meta.write_text(text)
        with pytest.raises(UserError, match=says):
            data.names_of("youtube-vos", "train", youtube)
