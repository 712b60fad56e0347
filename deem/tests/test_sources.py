"""Views of a picture and where documents come from."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_pages import lines, page
from test_readers import shard

import build
from settings import Settings
from vision.views import two_views

# 8 x 4, bright on the left: a mirrored view is bright on the right.
HALF = Image.fromarray(np.repeat(np.where(np.arange(8) < 4, 255, 0)[None, :, None], 4, 0).repeat(3, 2).astype(np.uint8))


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize(("flip", "apart"), [("none", 0), ("shared", 0), ("independent", 0.5)])
def test_mirroring(flip, apart, crop):
    rng, n, turned = random.Random(0), 2000, []
    for _ in range(n):
        views = two_views(HALF, (4, 2), crop=crop, flip=flip, rng=rng)
        assert [v.shape[-1] for v in views] == [4, 2]
        turned.append([bool(v[0, 0, 0] < v[0, 0, -1]) for v in views])
    first, second = np.array(turned).T
    for side in (first, second):
        assert side.mean() == pytest.approx(0 if flip == "none" else 0.5, abs=0.04)
    assert (first != second).mean() == pytest.approx(apart, abs=0.04)


def test_stage_one_reads_two_pages_for_a_pair(tmp_path):
    """Odds of MMC4 to pairs, and draws that differ between processes."""
    pages, pairs = tmp_path / "deem" / "mmc4", tmp_path / "deem" / "blip-lcs"
    pages.mkdir(parents=True)
    pairs.mkdir()
    for k in range(2):
        lines(pages / f"{k}.jsonl", [page(2)] * 5)
        shard(pairs / f"{k}.tar", 10 * k, 5)
    s = Settings(preset="tiny", dataset="paper", data_dir=str(tmp_path))
    order = []
    for rank in (0, 1):
        reader = build.reader(s, 0, SimpleNamespace(process_index=rank, num_processes=2))
        order.append(["mmc4" in next(reader).name for _ in range(900)])
        assert np.mean(order[-1]) == pytest.approx(2 / 3, abs=0.05)
    assert order[0] != order[1]


def test_several_files_of_regions_are_mixed(tmp_path):
    """In stage 3 of the paper's sets, and with --files."""
    folder = tmp_path / "deem" / "regions"
    folder.mkdir(parents=True)
    square = [[1, 1, 5, 1, 5, 4, 1, 4]]
    for k in range(2):
        image = {"id": 3, "file_name": "i.jpg", "height": 6, "width": 8}
        data = {"images": [image], "annotations": [{"image_id": 3, "segmentation": square, "caption": "a dog"}]}
        (folder / f"{k}.json").write_text(json.dumps(data))
    one = SimpleNamespace(process_index=0, num_processes=1)
    given = {"files": tuple(map(str, sorted(folder.glob("*.json")))), "files_kind": "regions"}
    for more in ({"dataset": "paper", "data_dir": str(tmp_path)}, {"dataset": "files", **given}):
        reader = build.reader(Settings(preset="tiny", stage=3, **more), 0, one)
        assert {next(reader).name.split("/")[-1] for _ in range(40)} == {f"{k}.json annotation 0" for k in (0, 1)}


def test_files_find_their_pictures(tmp_path):
    """--files of parquet, MMC4 and LLaVA look below --image-root, else beside the first file."""
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "root").mkdir()
    for folder in (tmp_path, tmp_path / "root"):
        HALF.save(folder / "0.png")
        HALF.save(folder / "1.png")
    parquet.write_table(pa.table({"image": ["0.png"], "caption": ["a long caption"]}), tmp_path / "parquet")
    lines(tmp_path / "mmc4", [page(2)])
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "llava").write_text(json.dumps([{"image": "0.png", "conversations": turns}]))
    one = SimpleNamespace(process_index=0, num_processes=1)
    for kind in ("parquet", "mmc4", "llava"):
        for root, place in (("", tmp_path), (str(tmp_path / "root"), tmp_path / "root")):
            given = {"files": (str(tmp_path / kind),), "files_kind": kind, "image_root": root}
            reader = build.reader(Settings(preset="tiny", dataset="files", **given), 0, one)
            assert next(reader).pictures[0].source.parent == place
