"""The pass over a data set in shards, and the check of what a generator did there."""

from lab import runs
from lab.runs import UserError

import pytest
import torch
from conftest import TINY, settings, start, told, toy

import echomod
import prepare
import train
from generator import shards

CPU = torch.device("cpu")


def exact():
    return echomod.ExactDenoiser(*toy(60, seed=5), 0.5, 5)


def test_a_class_without_a_clean_image_is_told(tmp_path):
    x, y = toy(60, seed=5)
    g = echomod.ExactDenoiser(x[y != 1], y[y != 1], 0.5, 5)
    with pytest.raises(echomod.NoClass, match="no clean image of class 1"):
        g.edit(x[:3], y[:3], [0, 1, 2])
    with pytest.raises(UserError, match="no clean image of class 1 to edit towards; give more clean images by --pret"):
        run_pass(tmp_path, g)
    with pytest.raises(ValueError, match="needs clean images"):
        echomod.ExactDenoiser(x[:0], y[:0], 0.5, 5)


def run_pass(folder, g=None, told=None, **more):
    x, y = toy(23)
    return shards.modify(g or exact(), x, y, 0, folder, told or {"a": 1}, shard=7, batch=3, show=False, **more)


def test_the_pass_goes_on_after_the_last_whole_shard(tmp_path):
    whole = run_pass(tmp_path / "a")
    count = [0]

    class Stopped:
        def edit(self, *args):
            count[0] += 1
            if count[0] > 4:  # inside the second shard
                raise KeyboardInterrupt
            return exact().edit(*args)

    with pytest.raises(KeyboardInterrupt):
        run_pass(tmp_path / "b", Stopped())
    assert [p.name for p in sorted((tmp_path / "b").glob("shard*"))] == ["shard-00000.safetensors"]
    stamp = (tmp_path / "b" / "shard-00000.safetensors").stat().st_mtime_ns
    again = run_pass(tmp_path / "b")
    assert torch.equal(again.full, whole.full) and len(again.full) == 23
    assert (tmp_path / "b" / "shard-00000.safetensors").stat().st_mtime_ns == stamp
    for a, b in zip(sorted((tmp_path / "a").glob("shard*")), sorted((tmp_path / "b").glob("shard*")), strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_processes_share_the_shards(tmp_path):
    assert run_pass(tmp_path / "a", rank=1, world=2) is None
    assert len(list((tmp_path / "a").glob("shard*"))) == 2
    both = run_pass(tmp_path / "a", rank=0, world=2)
    assert torch.equal(both.full, run_pass(tmp_path / "b").full)


def test_foreign_and_broken_shards_are_told(tmp_path):
    run_pass(tmp_path)
    with pytest.raises(UserError, match="another generator or other labels"):
        run_pass(tmp_path, told={"a": 2})
    path = tmp_path / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="is damaged"):
        run_pass(tmp_path)
    runs.write_tensors(path, {"x": torch.zeros(1)})
    with pytest.raises(UserError, match="not of this pass"):
        run_pass(tmp_path)


def test_black_images_are_made_again_then_marked(tmp_path):
    class Black:
        def edit(self, images, labels, seeds):
            out = images.clone()
            for k, s in enumerate(seeds):
                if s == echomod.image_seed(0, 3) or labels[k] == 2:
                    out[k] = 0
            return out

    m = run_pass(tmp_path, Black())
    _, y = toy(23)
    assert torch.equal(m.ok, y != 2) and m.full[3].any()


def test_large_edits_are_also_kept_at_the_data_sets_size(tmp_path):
    class Large:
        def edit(self, images, labels, seeds):
            return images.repeat_interleave(2, 1).repeat_interleave(2, 2)

    m = run_pass(tmp_path, Large())
    assert m.full.shape[1:] == (16, 16, 1) and m.small.shape[1:] == (8, 8, 1)


# ---------------------------------------------------------------------------------------------------------- the check


class Ignores:
    """A generator whose result has nothing to do with the label."""

    def about(self):
        return {"generator": "ignores"}

    def edit(self, images, labels, seeds):
        return torch.roll(images, 3, 0)


class Returns(Ignores):
    def edit(self, images, labels, seeds):
        return images.clone()


@pytest.mark.parametrize(("kind", "words"), [(Ignores, "ignores the label"), (Returns, "returns the instance")])
def test_a_generator_that_does_not_do_its_work_fails_its_check(tmp_path, monkeypatch, capsys, kind, words):
    monkeypatch.setattr(prepare.Prepared, "generator", property(lambda self: kind()))
    args = [*TINY, "--stage", "modify", "--check", "0.5", "--out", tmp_path / "r", "--cache", tmp_path / "c"]
    assert words in told(capsys, monkeypatch, train.main, args)


def test_the_exact_generator_passes_its_check(tmp_path, monkeypatch, cache):
    start(monkeypatch, *TINY, "--stage", "modify", "--check", "0.5", "--out", tmp_path / "r", "--cache", cache)
    p = prepare.Prepared(settings("--cache", cache), 0, CPU, show=False)
    wrong = ~p.right
    fits = (p.judge(p.modified.small, False) == p.y)[wrong].double().mean()
    before = (p.judge(p.data.train.x, True) == p.y)[wrong].double().mean()
    assert fits > 0.6 and before < 0.05
    with pytest.raises(UserError, match="ignores the label"):
        shards.check(0.3, 0.5, 0.5)
    shards.check(float("nan"), 0.5, 0.5)  # no wrong label: nothing to say
