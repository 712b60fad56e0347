"""The page: marks, rounds, undo, cancel, workspace, masks to begin with; a browser that uses it on a real clip."""

import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from lab import runs
from lab.runs import UserError

import numpy as np
import pytest
import torch
from PIL import Image

import data
import demo
import export
import page
import prompts
import settings
import workspace

BOX = 2  # the place of a box in page.WAYS


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def project(n: int = 6, **given) -> demo.Project:
    video = data.draw("plain", 1, n)
    return demo.Project(settings.PageSettings(objects=2, **given), video)


def boxed(app: demo.App, t: int = 0, o: int = 1) -> None:
    x1, y1, x2, y2 = prompts.box_of(app.video.truth[t] == 1)
    app.mark(t, o, BOX, x2, y2)
    app.mark(t, o, BOX, x1, y1)


def test_marks_become_rounds():
    app = demo.App(project())
    assert "Click on frame 2 first" in app.propagate(2)
    with pytest.raises(UserError, match="nothing is segmented"):
        app.write(runs.HERE)
    box = prompts.box_of(app.video.truth[0] == 1)
    assert "first corner" in app.mark(0, 1, BOX, box[2], box[3]) and app.corner is not None
    app.mark(0, 1, BOX, box[0], box[1])
    app.mark(0, 1, 0, *(box[:2] + box[2:]) / 2)
    assert app.waiting[0][1]["box"] == [*box] and app.picture(0).shape == (96, 160, 3)
    seen = []
    assert app.propagate(0, lambda k, n: seen.append((k, n))).startswith("Round 1") and app.waiting == {}
    assert seen == [(k, 5) for k in range(1, 6)]
    g = app.video.truth[5] == 1
    assert (app.labels[5][g] == 1).mean() > 0.7
    app.reset()
    assert app.labels is None and app.session.round == 0


def test_a_drag_is_a_box():
    app = demo.App(project(2))
    assert app.drag(0, 2, "50.2 60 10 20.4 1790000000000").startswith("Frame 0: box 10 20 to 50 60, object 2")
    assert app.waiting[0][2]["box"] == [10, 20.4, 50.2, 60] and app.corner is None
    assert app.drag(0, 2, "-5 -5 900 900").startswith("Frame 0: box 0 0 to 159 95")
    for text in ("9 9 9 30", "9 9", ""):
        assert "no area" in app.drag(0, 2, text) or "no box" in app.drag(0, 2, text)


def test_marks_are_taken_back_one_by_one():
    app = demo.App(project(2))
    app.mark(0, 1, 0, 10, 10)
    app.mark(0, 2, 1, 20, 20)
    app.drag(0, 2, "5 5 30 30")
    app.mark(0, 2, BOX, 3, 3)
    assert "corner" in app.undo(0) and app.corner is None
    app.undo(0)
    assert app.waiting[0][2]["box"] is None and app.waiting[0][2]["points"] == [[20, 20]]
    app.undo(0)
    assert app.ready(0).keys() == {1}
    app.undo(0)
    assert app.ready(0) == {} and "Nothing is marked" in app.undo(0) and "Nothing is marked" in app.undo(1)


def test_a_round_is_taken_back_and_a_propagation_cancelled():
    app = demo.App(project())
    assert "no round" in app.back()
    boxed(app)
    app.propagate(0)
    first = [g.copy() for g in app.labels]
    app.mark(3, 1, 1, *np.argwhere(first[3] == 1).mean(0)[::-1])
    app.propagate(3)
    assert not np.array_equal(app.labels[3], first[3])
    assert "1 rounds are left" in app.back()
    assert all(np.array_equal(a, b) for a, b in zip(app.labels, first, strict=True))
    app.mark(3, 1, 1, *np.argwhere(first[3] == 1).mean(0)[::-1])
    assert app.propagate(3, lambda k, n: app.cancel()).startswith("Cancelled")
    assert app.session.round == 1 and app.ready(3) and app.cancel() == "Nothing is running."
    assert all(np.array_equal(a, b) for a, b in zip(app.session.labels(), first, strict=True))


def test_a_round_changes_the_chosen_frames_alone():
    app = demo.App(project())
    boxed(app)
    assert "outside" in app.propagate(0, span=(2, 4))
    app.propagate(0, span=(0, 2))
    assert [bool(g.any()) for g in app.labels] == [True] * 3 + [False] * 3
    assert np.isnan(app.confidence()[3:]).all() and app.worst()[0] in (0, 1, 2)  # the others were not answered


def test_confidence_and_the_worst_frame():
    app = demo.App(project())
    assert app.worst()[0] is None and app.strip().shape == (24, 800, 3) and len(set(app.strip().reshape(-1))) == 1
    boxed(app)
    app.propagate(0)
    app.session.states[1].iou[4] = 0.125
    assert app.worst() == (4, "Frame 4: confidence 0.12, the lowest.")
    column = app.strip()[0, 4 * 800 // 6 + 5]
    assert column[0] > column[1] and app.strip()[0, 0].tolist() == [40, 90, 220]  # red; blue where the user was


def test_the_workspace_goes_on_where_it_stopped(tmp_path):
    p = project(workspace=str(tmp_path / "w"))
    app = demo.App(p)
    assert app.begin(None) == ""
    boxed(app)
    app.propagate(0)
    again = demo.App(demo.Project(p.s, p.video))
    assert "after round 1" in again.begin(None)
    assert all(np.array_equal(a, b) for a, b in zip(app.labels, again.labels, strict=True))
    for a in (app, again):  # and the next round is the same on both
        a.mark(4, 1, 1, 20, 20)
        a.propagate(4)
    assert all(np.array_equal(a, b) for a, b in zip(app.labels, again.labels, strict=True))
    assert np.allclose(app.confidence(), again.confidence(), atol=1e-3)


def test_a_second_click_on_a_frame_says_the_same_after_a_stop(tmp_path):
    """It corrects the answer to all clicks of the frame from what stood there before the first one."""
    p = project(workspace=str(tmp_path / "w"))
    app = demo.App(p)
    y, x = np.argwhere(p.video.truth[0] == 1).mean(0)
    app.mark(0, 1, 0, x, y)
    app.propagate(0)
    again = demo.App(demo.Project(p.s, p.video))
    again.begin(None)
    for a in (app, again):
        a.mark(0, 1, 0, x + 4, y)
        a.propagate(0)
        assert a.session.states[1].begun[0] is None
    assert all(np.array_equal(a, b) for a, b in zip(app.labels, again.labels, strict=True))


def test_starting_over_forgets_the_workspace(tmp_path):
    p = project(workspace=str(tmp_path / "w"))
    app = demo.App(p)
    boxed(app)
    app.propagate(0)
    app.restart()
    assert app.labels is None and demo.App(demo.Project(p.s, p.video)).begin(None) == ""


def test_rounds_of_a_file_go_on_in_their_workspace_and_in_no_other(tmp_path, monkeypatch):
    p = project(workspace=str(tmp_path / "w"))
    app = demo.App(p)
    boxed(app)
    app.propagate(0)
    (tmp_path / "given.json").write_text('[{"frame": 3, "objects": {"2": {"points": [[120, 60]], "labels": [1]}}}]')
    s = settings.PageSettings(
        objects=2, workspace=p.s.workspace, interactions=str(tmp_path / "given.json"), export=str(tmp_path / "out")
    )
    demo.export_rounds(s, demo.Project(s, p.video))
    again = demo.App(demo.Project(p.s, p.video))
    assert "after round 2" in again.begin(None) and 0 in again.session.states[1].exact
    kept = (tmp_path / "w" / "rounds.json").read_bytes()
    with pytest.raises(UserError, match="another video"):
        demo.export_rounds(s, demo.Project(s, data.draw("plain", 2, 6)))
    assert (tmp_path / "w" / "rounds.json").read_bytes() == kept


def test_the_first_round_is_taken_back_whole():
    """Also the statistics of the features, which are those of the first interacted frame."""
    app, fresh = demo.App(project()), demo.App(project())
    boxed(app, 5)
    app.propagate(5)
    app.back()
    for a in (app, fresh):
        boxed(a)
        a.propagate(0)
    assert all(np.array_equal(a, b) for a, b in zip(app.labels, fresh.labels, strict=True))
    assert app.session.begun_at == fresh.session.begun_at == 0


def test_a_workspace_of_another_video_or_method_or_a_damaged_one_is_refused(tmp_path):
    p = project(workspace=str(tmp_path / "w"))
    app = demo.App(p)
    boxed(app)
    app.propagate(0)

    def refused(match: str, other: demo.Project) -> None:
        with pytest.raises(UserError, match=match):
            demo.App(other).begin(None)

    refused("another video", demo.Project(p.s, data.draw("plain", 2, 6)))
    refused("--method", project(workspace=str(tmp_path / "w"), method="memory"))
    rounds, state = tmp_path / "w/rounds.json", tmp_path / "w/state.safetensors"
    whole, tensors = rounds.read_text(), state.read_bytes()
    rounds.write_text(whole.replace('"round": 1', '"round": 7'))
    refused("belong together", p)
    for text, says in (("[]", "damaged"), ("{}", "damaged"), ("no json", "not valid JSON")):
        rounds.write_text(text)
        refused(says, p)
    rounds.write_text(whole)
    state.write_bytes(tensors[:200])
    refused("damaged", p)
    state.write_bytes(tensors)
    assert demo.App(p).begin(None)


def test_masks_that_are_there_begin(tmp_path):
    p = project()
    export.png(tmp_path / "m", [p.video.truth[0]])
    masks = demo.read_masks(tmp_path / "m", p.video, (1, 2))
    app = demo.App(p)
    assert list(masks) == [0] and "1 frames" in app.begin(masks)
    assert np.array_equal(app.labels[0], p.video.truth[0]) and app.labels[5].any()


def test_exported_masks_are_those_that_begin(tmp_path):
    """A folder of pictures may count its frames from 1."""
    p = project(3)
    p.video.names = ["00001", "00002", "00003"]
    app = demo.App(p)
    boxed(app)
    app.propagate(0)
    app.write(tmp_path)
    masks = demo.read_masks(tmp_path / "masks", p.video, (1, 2))
    assert all(np.array_equal(masks[k], app.labels[k]) for k in range(3))


def test_masks_that_do_not_fit_are_named(tmp_path):
    video = data.draw("pair", 1, 3)

    def refused(match: str, label: np.ndarray, name: str = "00000") -> None:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        (tmp_path / "m").mkdir()
        Image.fromarray(label.astype(np.uint8), "L").save(tmp_path / "m" / f"{name}.png")
        with pytest.raises(UserError, match=match):
            demo.read_masks(tmp_path / "m", video, (1,))

    refused("the name of a frame", video.truth[0], "other")
    refused("its frame", video.truth[0][:50])
    refused("object 2", video.truth[0])
    with pytest.raises(UserError, match="no folder"):
        demo.read_masks(tmp_path / "nowhere", video, (1,))


def test_a_tab_has_a_session_of_its_own():
    class Request:
        def __init__(self, name):
            self.session_hash = name

    made = []
    tabs = page.Tabs(lambda: made.append(1) or object())
    a, b = tabs.of(Request("a")), tabs.of(Request("b"))
    assert a is not b and tabs.of(Request("a")) is a and len(made) == 2
    for k in range(page.TABS):
        tabs.of(Request(k))
    assert tabs.of(Request("b")) is not b  # idle longest, so gone
    assert page.Tabs(None, shared=a).of(Request("c")) is a


def test_a_video_that_is_cut_says_so(tmp_path):
    export.film(tmp_path / "a.mp4", data.draw("plain", 1, 5).frames, [np.zeros((96, 160), np.uint8)] * 5)
    for limit, told in ((3, True), (5, False), (0, False)):
        p = demo.Project(settings.PageSettings(), data.read_video(tmp_path / "a.mp4", limit=limit))
        assert ("Only the first 3 frames" in p.told()) == told and "EfficientNet" in p.told()


def test_the_page_may_read_its_own_folder_alone(monkeypatch, tmp_path):
    import gradio

    given = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **k: given.update(k))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--workspace", str(tmp_path / "w")])
    demo.main()
    assert given["allowed_paths"] == [str(tmp_path / "w" / "export")]


def test_the_first_corner_is_forgotten_when_frame_or_object_changes(tmp_path):
    p = project(2)
    app = demo.App(p)
    blocks = page.build(page.Tabs(None, shared=app), p.video, (1, 2), tmp_path, "")
    named = {getattr(b, "label", None): i for i, b in blocks.blocks.items()}
    for label in ("Frame", "Object (keys 1 to 9)"):
        called = [f.fn for f in blocks.fns.values() if (named[label], "change") in f.targets]
        assert len(called) == 1
        app.mark(0, 1, BOX, 3, 3)
        assert app.corner is not None
        called[0](1, None)
        assert app.corner is None


def expect(field, start: str, seconds: int = 240) -> str:
    for _ in range(seconds):
        if field.get_attribute("value").startswith(start):
            return field.get_attribute("value")
        time.sleep(1)
    raise AssertionError(f"{field.get_attribute('value')!r} does not begin with {start!r}")


def clip() -> list[str]:
    """A real clip where it is there: dog of DAVIS, 25 frames; else the procedural video."""
    path = runs.data_dir("") / "iptvos/JPEGImages/480p/dog"
    return ["--video", str(path), "--limit", "25"] if path.is_dir() else []


@pytest.mark.slow
def test_page_in_a_browser(tmp_path):
    """Needs Chromium and its driver: clicks, drags a box, chooses an object by key, propagates, jumps, takes back."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.by import By

    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("no chromium and chromedriver on this machine")
    words = [sys.executable, "demo.py", "--port", "7917", "--workspace", str(tmp_path / "w"), *clip()]
    server = subprocess.Popen(words, cwd=runs.HERE)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen("http://127.0.0.1:7917")
                break
            except OSError:
                time.sleep(1)
        options = webdriver.ChromeOptions()
        for a in ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1250"):
            options.add_argument(a)
        options.binary_location = shutil.which("chromium")
        browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            drive(browser, By, ActionChains, ActionBuilder, tmp_path)
        finally:
            browser.quit()
    finally:
        server.terminate()
        server.wait()
    assert (tmp_path / "w" / "rounds.json").is_file()


def drive(browser, By, ActionChains, ActionBuilder, folder: Path) -> None:
    browser.implicitly_wait(60)
    browser.get("http://127.0.0.1:7917")
    browser.find_element(By.CSS_SELECTOR, "#strip img")  # drawn when the page is alive
    time.sleep(5)
    image = browser.find_element(By.CSS_SELECTOR, "#frame img")
    ActionChains(browser).move_to_element_with_offset(image, -40, -10).click().perform()
    status = browser.find_element(By.CSS_SELECTOR, "#status textarea")
    expect(status, "Frame 0: add")
    browser.find_element(By.ID, "undo").click()
    expect(status, "The last mark of frame 0")
    ActionChains(browser).send_keys("2").perform()
    time.sleep(2)
    chosen = browser.execute_script("return document.querySelector('#object input:checked').value")
    ActionChains(browser).send_keys("1").perform()
    time.sleep(2)
    assert chosen == "2"
    # A drag over the dog, in shares of the picture, is a box, and its last click is none.
    corners = browser.execute_script(
        """const i = document.querySelector("#frame img"), r = i.getBoundingClientRect();
        let s = Math.min(r.width / i.naturalWidth, r.height / i.naturalHeight);
        if (getComputedStyle(i).objectFit === "scale-down") s = Math.min(s, 1);
        const w = i.naturalWidth, h = i.naturalHeight;
        return [[w, h]].concat([[0.17, 0.01], [0.6, 0.64]].map(([x, y]) =>
            [r.left + r.width / 2 + (x - 0.5) * w * s, r.top + r.height / 2 + (y - 0.5) * h * s]));"""
    )
    (w, h), (x1, y1), (x2, y2) = corners
    x1, y1, x2, y2 = (round(v) for v in (x1, y1, x2, y2))
    actions = ActionBuilder(browser)
    actions.pointer_action.move_to_location(x1, y1).pointer_down().move_to_location(x2, y2).pointer_up()
    actions.perform()
    told = expect(status, "Frame 0: box")
    found = [int(v) for v in told.split("box ")[1].split(",")[0].replace("to ", "").split()]
    assert np.abs(np.subtract(found, [0.17 * w, 0.01 * h, 0.6 * w, 0.64 * h])).max() <= 2, told
    browser.find_element(By.ID, "propagate").click()
    expect(status, "Round 1")
    time.sleep(3)
    browser.save_screenshot(str(folder / "page.png"))
    browser.find_element(By.ID, "worst").click()
    expect(status, "Frame ")
    browser.find_element(By.ID, "export").click()
    expect(status, "Masks (PNG)")
    browser.find_element(By.ID, "back").click()
    expect(status, "Taken back: 0")


def test_the_checksum_of_a_video_is_of_its_pixels():
    frames = data.draw("plain", 1, 2).frames
    other = [f.copy() for f in frames]
    assert workspace.checksum(frames) == workspace.checksum(other)
    other[1][3, 4, 0] ^= 1
    assert workspace.checksum(frames) != workspace.checksum(other)
