"""Readers of the training sets on small files: what a document holds, seeds, exact resume, and what broken files do."""

import io
import json
import tarfile

from lab.runs import UserError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from documents import readers
from documents.readers import Document, Picture, Text


def jpg(color, size=(8, 6)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def tar(path, samples: dict[str, dict[str, bytes]]):
    with tarfile.open(path, "w") as file:
        for key, parts in samples.items():
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return path


def shard(path, first: int, n: int):
    return tar(
        path,
        {f"{k:05d}": {"png": jpg((k, 0, 0)), "txt": f"A caption number {k}".encode()} for k in range(first, first + n)},
    )


def take(reader, n: int) -> list:
    return [next(reader) for _ in range(n)]


def texts(documents) -> list[str]:
    return [d.text for d in documents]


# ------------------------------------------------------------------------------------------------------------- pictures


def test_a_picture_loads_from_a_path_bytes_or_an_image(tmp_path):
    (tmp_path / "x.png").write_bytes(jpg((9, 8, 7)))
    made = Image.new("L", (8, 6), 9)
    for source in (tmp_path / "x.png", str(tmp_path / "x.png"), jpg((9, 8, 7)), made):
        image = Picture(source).load()
        assert image.mode == "RGB" and image.size == (8, 6) and image.getpixel((0, 0))[0] == 9
    with pytest.raises(UserError, match="no picture .*gone.png"):
        Picture(tmp_path / "gone.png").load()
    for broken in (b"", b"no picture", jpg((1, 1, 1))[:40]):
        with pytest.raises(UserError, match="shard:7 is not a readable picture"):
            Picture(broken, name="shard:7").load()


# ------------------------------------------------------------------------------------------------------- pairs in tars


def test_a_tar_of_pairs_becomes_lower_cased_documents(tmp_path):
    path = tar(
        tmp_path / "0.tar",
        {
            "a": {"jpg": jpg((1, 0, 0)), "json": b'{"caption": "A Long Caption"}'},
            "b": {"png": jpg((2, 0, 0)), "txt": b"too short"},
            "c": {"webp": jpg((3, 0, 0)), "txt": b" Another Caption ", "json": b"{}"},
        },
    )
    reader = readers.captions_webdataset([path], regroup=0, image_first=1.0, shuffle=False)
    first, second, again = take(reader, 3)
    assert first.parts[1] == Text("a long caption") and second.text == "another caption" and again.text == first.text
    assert first.pictures[0].load().getpixel((0, 0)) == (1, 0, 0) and isinstance(first.parts[0], Picture)
    last = next(readers.captions_webdataset([path], regroup=0, image_first=0.0))
    assert isinstance(last.parts[0], Text) and isinstance(last.parts[1], Picture)
    kept = readers.captions_webdataset([path], shortest=3, lower=False, regroup=0, shuffle=False)
    assert texts(take(kept, 3)) == ["A Long Caption", "too short", "Another Caption"]


def test_half_of_the_pictures_stand_behind_their_caption(tmp_path):
    paths = [shard(tmp_path / f"{k}.tar", 100 * k, 60) for k in range(4)]
    made = take(readers.captions_webdataset(paths, regroup=0), 240)
    share = np.mean([isinstance(d.parts[0], Picture) for d in made])
    assert 0.4 < share < 0.6


def test_an_epoch_holds_every_item_once_and_the_next_one_another_order(tmp_path):
    paths = [shard(tmp_path / f"{k}.tar", 100 * k, 7) for k in range(3)]
    reader = readers.captions_webdataset(paths, regroup=0, window=4)
    first, second = texts(take(reader, 21)), texts(take(reader, 21))
    everything = sorted(f"a caption number {100 * k + i}" for k in range(3) for i in range(7))
    assert sorted(first) == sorted(second) == everything and first != second and first != everything
    assert texts(take(readers.captions_webdataset(paths, regroup=0, window=4), 21)) == first
    assert texts(take(readers.captions_webdataset(paths, regroup=0, window=4, seed=1), 21)) != first


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_a_restored_reader_goes_on_with_the_very_next_document(cut, window, seed):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        paths = [shard(Path(folder) / f"{k}.tar", 100 * k, 5 + k) for k in range(3)]
        more = {"window": window, "seed": seed, "regroup": 0.25}
        whole = take(readers.captions_webdataset(paths, **more), cut + 12)
        reader = readers.captions_webdataset(paths, **more)
        take(reader, cut)
        state = json.loads(json.dumps(reader.state()))
        fresh = readers.captions_webdataset(paths, **more)
        fresh.restore(state)
        rest = take(fresh, 12)
        assert [d.name for d in rest] == [d.name for d in whole[cut:]] and texts(rest) == texts(whole[cut:])
        assert [d.parts[0] == e.parts[0] for d, e in zip(rest, whole[cut:], strict=True)] == [True] * 12


def test_regrouping_joins_runs_of_two_to_eight(tmp_path):
    path = shard(tmp_path / "0.tar", 0, 200)
    made = []
    reader = readers.captions_webdataset([path], regroup=0.25, seed=2)
    while sum(len(d.pictures) for d in made) < 200:
        made.append(next(reader))
    sizes = [len(d.pictures) for d in made]
    assert sum(sizes) == 200 and max(sizes) <= 8 and 0.1 < np.mean([s > 1 for s in sizes]) < 0.4
    assert "more" in next(d for d in made if len(d.pictures) > 1).name


@pytest.mark.parametrize(("shards", "world"), [(5, 2), (1, 3)])
def test_processes_share_the_items_without_overlap(tmp_path, shards, world):
    paths = [shard(tmp_path / f"{k}.tar", 100 * k, 12) for k in range(shards)]
    count = {2: [36, 24], 3: [4, 4, 4]}[world]
    seen = [
        texts(take(readers.captions_webdataset(paths, regroup=0, rank=r, world=world), n)) for r, n in enumerate(count)
    ]
    flat = [t for part in seen for t in part]
    assert len(flat) == len(set(flat)) == 12 * shards


# --------------------------------------------------------------------------------------------------------- broken files


def test_a_cut_or_damaged_tar_is_named_with_its_member(tmp_path):
    good = shard(tmp_path / "good.tar", 0, 5).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(good[: 1024 * 5])
    with pytest.raises(UserError, match=r"cut\.tar is damaged at or after member \d+ .*fetch it again"):
        take(readers.captions_webdataset([cut], window=1), 5)
    header = bytearray(good)
    at = good.index(b"00003.png")  # tarfile alone ends quietly at this header
    header[at : at + 300] = b"\x7f" * 300
    (tmp_path / "header.tar").write_bytes(bytes(header))
    reader = readers.captions_webdataset([tmp_path / "header.tar"], window=1, regroup=0)
    assert len(take(reader, 2)) == 2
    with pytest.raises(UserError, match=r"damaged at or after member 6 \(no end mark"):
        take(reader, 3)
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(UserError, match="text.tar is damaged"):
        next(readers.captions_webdataset([tmp_path / "text.tar"]))


def test_a_broken_picture_stops_or_is_left_out_and_never_replaced(tmp_path, capsys):
    samples = {f"{k}": {"png": jpg((k, 0, 0)), "txt": f"caption number {k}".encode()} for k in range(6)}
    samples["3"]["png"] = b"\xff\xd8 broken"
    path = tar(tmp_path / "0.tar", samples)
    stop = readers.captions_webdataset([path], regroup=0, shuffle=False)
    with pytest.raises(UserError, match=r"0\.tar:7 \(3\) is not a readable picture"):
        [d.pictures[0].load() for d in take(stop, 6)]
    skip = readers.captions_webdataset([path], regroup=0, shuffle=False, broken="skip")
    made = take(skip, 10)
    assert texts(made) == [f"caption number {k}" for k in (0, 1, 2, 4, 5, 0, 1, 2, 4, 5)]  # five an epoch, none twice
    assert all(isinstance(d.pictures[0].source, Image.Image) for d in made)
    assert skip.skipped == 2 and capsys.readouterr().err.count("left out: ") == 2


def test_left_out_items_are_counted_once_over_a_restart(tmp_path):
    good = shard(tmp_path / "a.tar", 0, 6).read_bytes()
    (tmp_path / "a.tar").write_bytes(good[:11000])
    shard(tmp_path / "b.tar", 50, 6)
    paths = [tmp_path / "a.tar", tmp_path / "b.tar"]
    make = lambda: readers.captions_webdataset(paths, regroup=0, window=2, broken="skip", shuffle=False)  # noqa: E731
    whole = make()
    expected = take(whole, 30)
    for cut in range(1, 20):
        reader = make()
        take(reader, cut)
        fresh = make()
        fresh.restore(reader.state())
        assert texts(take(fresh, 30 - cut)) == texts(expected[cut:])
        assert fresh.skipped == whole.skipped > 0


def test_missing_parts_of_a_sample_are_told(tmp_path):
    for parts, words in (
        ({"txt": b"a long enough caption"}, "has no picture"),
        ({"png": jpg((1, 1, 1))}, "has no caption text"),
        ({"png": jpg((1, 1, 1)), "json": b"{broken"}, "is not valid JSON"),
        ({"png": jpg((1, 1, 1)), "txt": b"\xff\xfe\xff"}, "has a caption that is not UTF-8"),
        ({"png": jpg((1, 1, 1)), "json": b"[1]"}, "has no caption text"),
    ):
        path = tar(tmp_path / "x.tar", {"k": parts})
        with pytest.raises(UserError, match=rf"x\.tar:1 \(k\) {words}"):
            next(readers.captions_webdataset([path]))
    with pytest.raises(UserError, match="no document of .* passes the filters"):
        next(readers.captions_webdataset([tar(tmp_path / "y.tar", {"k": {"png": jpg((1, 1, 1)), "txt": b"short"}})]))
    twice = tmp_path / "twice.tar"
    with tarfile.open(twice, "w") as file:
        for _ in range(2):
            info = tarfile.TarInfo("k.txt")
            info.size = 1
            file.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(UserError, match="two members of one name"):
        next(readers.captions_webdataset([twice]))


def test_shards_are_found_by_folder_braces_and_glob(tmp_path):
    paths = [shard(tmp_path / f"{k:03d}.tar", k, 1) for k in range(3)]
    for pattern in (tmp_path, tmp_path / "{000..002}.tar", tmp_path / "*.tar"):
        assert readers.find_shards(pattern) == paths
    with pytest.raises(UserError, match="no file .*003.tar"):
        readers.find_shards(tmp_path / "{002..003}.tar")
    with pytest.raises(UserError, match="no file .*x.*.tar"):
        readers.find_shards(tmp_path / "x*.tar")
    with pytest.raises(UserError, match="no file to read"):
        readers.captions_webdataset([])
    with pytest.raises(UserError, match="'stop' or 'skip'"):
        readers.captions_webdataset(paths, broken="ignore")


# -------------------------------------------------------------------------------------------------------------- parquet


def test_parquet_captions(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "p.png").write_bytes(jpg((5, 0, 0)))
    rows = [{"bytes": jpg((k, 0, 0)), "path": None} for k in range(4)] + [
        {"bytes": None, "path": str(tmp_path / "p.png")}
    ]
    table = pa.table({"image": rows, "caption": [f"Caption number {k}" for k in range(5)]})
    parquet.write_table(table, tmp_path / "a.parquet")
    reader = readers.captions_parquet([tmp_path / "a.parquet"], regroup=0, shuffle=False, image_first=1.0)
    made = take(reader, 5)
    assert texts(made) == [f"caption number {k}" for k in range(5)]
    assert [d.pictures[0].load().getpixel((0, 0))[0] for d in made] == [0, 1, 2, 3, 5]
    with pytest.raises(UserError, match="has no column text; it has image, caption"):
        next(readers.captions_parquet([tmp_path / "a.parquet"], caption="text"))
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match="b.parquet is damaged"):
        next(readers.captions_parquet([tmp_path / "b.parquet"]))
    parquet.write_table(pa.table({"image": [None], "caption": ["a long caption"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet:1 has no picture"):
        next(readers.captions_parquet([tmp_path / "c.parquet"]))


# ----------------------------------------------------------------------------------------------- questions and regions


# -------------------------------------------------------------------------------------------------------------- mixture


class Count:
    """A reader that numbers its documents."""

    def __init__(self, name):
        self.name, self.at, self.skipped = name, 0, 0

    def __next__(self):
        self.at += 1
        return Document((Text(f"{self.name}{self.at}"),), self.name)

    def state(self):
        return {"at": self.at}

    def restore(self, state):
        self.at = state["at"]


@given(st.integers(0, 40), st.integers(0, 3))
@settings(deadline=None)
def test_a_mixture_resumes_exactly(cut, seed):
    make = lambda: readers.Mixture([Count("a"), Count("b")], [2, 1], seed)  # noqa: E731
    whole = texts(take(make(), cut + 10))
    first = make()
    take(first, cut)
    second = make()
    second.restore(json.loads(json.dumps(first.state())))
    assert texts(take(second, 10)) == whole[cut:]


def test_a_mixture_keeps_its_odds():
    mix = readers.Mixture([Count("a"), Count("b"), Count("c")], [2, 1, 0])
    names = [d.name for d in take(mix, 3000)]
    assert 0.63 < names.count("a") / 3000 < 0.70 and "c" not in names
    for weights in ([1], [0, 0, 0], [1, -1, 1]):
        with pytest.raises(UserError, match="needs a weight"):
            readers.Mixture([Count("a"), Count("b"), Count("c")], weights)
    with pytest.raises(UserError, match="the checkpoint has 3 readers, the settings 1"):
        readers.Mixture([Count("a")], [1]).restore(mix.state())
