"""The loop: schedule, streams, exact resume, two processes, stages one after the other."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

from lab import runs
from lab.runs import UserError

import pytest
import torch
from conftest import HERE, WORLD, make, run

import build
import train
from scenes import pretrain, study
from scenes.options import SceneSettings

pytestmark = pytest.mark.usefixtures("quick_study")

FEW = ["--batch", "3", "--scenes.count", "60", "--scenes.text", "2", "--scenes.encoder", "2", "--scenes.denoiser",
       "2", "--scenes.align", "2", "--scenes.questions", "10", "--device", "cpu"]  # fmt: skip


def metrics(out, seed=0, name="record"):
    m = json.loads((out / f"seed{seed}" / f"{name}.json").read_text())["metrics"]
    return {k: v for k, v in m.items() if not k.endswith("seconds")}


def _first(tensors, start):
    return next(k for k in tensors if k.startswith(start) and tensors[k].ndim == 2)


def weights(out, seed=0):
    return runs.read_tensors(out / f"seed{seed}" / "model.safetensors")[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quick_study):
    """A run of two stages that nothing disturbed, and the base that the others share."""
    folder = tmp_path_factory.mktemp("whole")
    out = folder / "run"
    done = run(
        "train.py", *FEW, "--steps", "6", "--then", "2", "--then-steps", "3", "--out", out, "--base", folder / "base"
    )
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_leaves_its_files(whole):
    seed, files = whole / "seed0", {"model.safetensors", "metrics.jsonl", "pictures.safetensors"}
    assert files | {"record.json", "record-stage2.json"} <= {p.name for p in seed.iterdir()}
    assert files | {"record.json", "answers.jsonl"} <= {p.name for p in (whole / "stage2" / "seed0").iterdir()}
    records = [json.loads(line) for line in (whole / "records.jsonl").read_text().splitlines()]
    assert sorted(r["setting"] for r in records) == ["stage 1", "stage 2"]
    assert not list(whole.rglob("checkpoint/*.safetensors"))
    m, later = metrics(whole), metrics(whole, name="record-stage2")
    assert m["steps"] == 6 and later["POPE_random_always_yes"] == 50.0 and m["trained_parameters"] < m["parameters"]
    assert not any("POPE" in k or "MMVP" in k for k in m)  # stage 1 is asked nothing
    assert all("caption_accuracy" in x and "text_accuracy" in x for x in (m, later))
    rows = [json.loads(x) for x in (whole / "stage2" / "seed0" / "answers.jsonl").read_text().splitlines()]
    assert {r["benchmark"] for r in rows} == {"POPE", "MMVP"}
    assert not torch.equal(weights(whole)["llm.model.norm.weight"], weights(whole / "stage2")["llm.model.norm.weight"])
    first, later = weights(whole), weights(whole / "stage2")
    assert torch.equal(first["encoder.trunk.norm.weight"], later["encoder.trunk.norm.weight"])  # frozen in stage 2


def test_evaluating_again_gives_the_records_numbers(whole):
    for folder, name in ((whole, "record"), (whole / "stage2", "record")):
        model, s = build.load_run(folder, "cpu")
        found, _ = study.score(model, WORLD, s, 0)
        stored = metrics(folder, name=name)
        assert all(stored[k] == v for k, v in found.items())
    assert metrics(whole, name="record-stage2") == metrics(whole / "stage2")


def test_stops_and_goes_on_bitwise(whole, tmp_path):
    """--max-steps, then the same command: the same weights and records as the run that nothing disturbed."""
    out, words = (
        tmp_path / "run",
        [*FEW, "--steps", "6", "--then", "2", "--then-steps", "3", "--base", whole.parent / "base"],
    )
    first = run("train.py", *words, "--out", out, "--max-steps", "4")
    assert first.returncode == 0 and "stopped after step 4 of 6" in first.stdout, first.stderr
    assert not (out / "records.jsonl").exists() and not (out / "seed0" / "record.json").exists()
    second = run("train.py", *words, "--out", out)
    assert second.returncode == 0, second.stderr
    for a, b in ((whole, out), (whole / "stage2", out / "stage2")):
        assert metrics(a) == metrics(b)
        x, y = weights(a), weights(b)
        assert x.keys() == y.keys() and all(torch.equal(v, y[k]) for k, v in x.items())
    again = run("train.py", *words, "--out", out)
    assert again.returncode == 0 and "is complete" in again.stdout


def test_killed_run_goes_on_bitwise(whole, tmp_path):
    """kill -9 in the middle, then the same command."""
    out = tmp_path / "run"
    words = [*FEW, "--steps", "6", "--then", "2", "--then-steps", "3", "--base", whole.parent / "base", "--out", out]
    words += ["--checkpoint-steps", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "train.py", *map(str, words)], cwd=HERE, env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    path = out / "checkpoint" / "seed0.safetensors"
    until = time.time() + 200
    while not path.exists() and process.poll() is None and time.time() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists() and not (out / "records.jsonl").exists()
    (out / "seed0").mkdir(exist_ok=True)
    (out / "seed0" / ".half.tmp").write_text("left over")
    os.utime(out / "seed0" / ".half.tmp", (0, 0))
    done = run("train.py", *words)
    assert done.returncode == 0, done.stderr
    assert metrics(whole) == metrics(out) and metrics(whole / "stage2") == metrics(out / "stage2")
    assert all(torch.equal(v, weights(out)[k]) for k, v in weights(whole).items())
    assert not (out / "seed0" / ".half.tmp").exists()


def test_base_is_shared_and_named_by_what_it_depends_on(whole, tmp_path):
    base = whole.parent / "base"
    assert len(list(base.glob("digits-seed0-*/model.safetensors"))) == 1
    model, s = make("digits", scenes=SceneSettings(60, 2, 2, 2, 2), base=str(base))
    before = (next(base.glob("*")) / "model.safetensors").stat().st_mtime
    pretrain.base(model, WORLD, s, 0)
    assert (next(base.glob("*")) / "model.safetensors").stat().st_mtime == before
    shared, s = make("digits", scenes=SceneSettings(60, 2, 2, 2, 2, pretrained=0), base=str(base))
    pretrain.base(shared, WORLD, s, 5)  # another run's seed, the same pretrained parts
    assert len(list(base.glob("*"))) == 1
    assert all(torch.equal(p, q) for p, q in zip(shared.parameters(), model.parameters(), strict=True))
    other, s = make("digits", scenes=SceneSettings(60, 1, 1, 1, 1), base=str(tmp_path))
    pretrain.base(other, WORLD, s, 0)
    name = "encoder.trunk.stages.0.0.weight"
    assert not torch.equal(dict(model.named_parameters())[name], dict(other.named_parameters())[name])
    third, _ = make("digits")
    half = next(tmp_path.glob("*/model.safetensors")).with_name(".model.safetensors.1.tmp")
    half.write_text("left over")
    pretrain.base(third, WORLD, s, 0)
    assert not half.exists()
    assert all(
        torch.equal(p, dict(third.named_parameters())[k])
        for k, p in other.named_parameters()
        if pretrain.learned(other, k)
    )
    rest = ("condition_head.weight", "denoiser.net.mid.conv.bias", "context_proj.weight")
    assert not any(pretrain.learned(other, k) for k in rest)


def test_nan_ends_the_run_with_the_step(tmp_path, whole):
    done = run(
        "train.py", *FEW, "--steps", "4", "--lr", "1e30", "--out", tmp_path / "x", "--base", whole.parent / "base"
    )
    assert done.returncode == 2 and "not a finite number" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x" / "seed0" / "record.json").exists()


def test_a_moved_run_is_finished(whole, tmp_path):
    """Killed between the last record and the end, and moved: nothing is trained again, the stage's folder is finished
    and its checkpoint swept."""
    out = tmp_path / "moved"
    shutil.copytree(whole, out)
    for name in ("records.jsonl", "stage2/records.jsonl", "seed0/record-stage2.json"):
        (out / name).unlink()
    (out / "checkpoint").mkdir(exist_ok=True)
    (out / "checkpoint" / "seed0.safetensors").write_text("left over")
    words = [*FEW, "--steps", "6", "--then", "2", "--then-steps", "3", "--base", whole.parent / "base", "--out", out]
    for gone in ("records.jsonl", "stage2/records.jsonl"):  # the second time with the record that the run keeps
        done = run("train.py", *words)
        assert done.returncode == 0, done.stderr
        for name in ("records.jsonl", "stage2/records.jsonl", "seed0/record-stage2.json"):
            assert (out / name).read_text() == (whole / name).read_text()
        assert not list((out / "checkpoint").iterdir())
        (out / "records.jsonl").unlink()
        (out / gone).unlink(missing_ok=True)


@pytest.mark.parametrize("change", ["nan", "shape", "lost"])
def test_base_that_does_not_fit(whole, tmp_path, change):
    shutil.copytree(whole.parent / "base", tmp_path / "base")
    path = next((tmp_path / "base").glob("*/model.safetensors"))
    tensors, meta = runs.read_tensors(path)
    name = _first(tensors, "llm.")
    value = {"nan": tensors[name] * float("nan"), "shape": tensors[name][:1].clone()}.get(change)
    tensors = {k: v for k, v in tensors.items() if k != name} | ({} if value is None else {name: value})
    runs.write_tensors(path, tensors, meta)
    model, s = make("digits", scenes=SceneSettings(60, 2, 2, 2, 2),
                    base=str(tmp_path / "base"))  # fmt: skip
    with pytest.raises(UserError, match=f"{name} is missing, of another shape or not finite"):
        pretrain.base(model, WORLD, s, 0)


def test_run_that_was_edited(whole, tmp_path):
    out = tmp_path / "x"
    shutil.copytree(whole, out)
    path = out / "seed0" / "model.safetensors"
    tensors, meta = runs.read_tensors(path)
    name = max(tensors)
    runs.write_tensors(path, {k: v for k, v in tensors.items() if k != name}, meta)
    with pytest.raises(UserError, match=f"lacks {name}"):
        build.load_run(out, "cpu")
    told = json.loads((out / "settings.json").read_text())
    for change in ({"preset": "nosuch"}, {"seeds": 3}):
        (out / "settings.json").write_text(json.dumps(told | change))
        with pytest.raises(UserError, match="another version"):
            build.settings_of(out)
    (out / "seed0" / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe')
    assert train.last_line(out / "seed0") == {"step": 1}


def test_init_checks_the_model(whole):
    model, s = make("tiny")
    with pytest.raises(UserError, match="another model"):
        build.read_weights(model, whole / "seed0" / "model.safetensors", s)


def test_load_run_errors(tmp_path, whole):
    with pytest.raises(UserError, match="no file"):
        build.load_run(tmp_path, "cpu")
    (tmp_path / "settings.json").write_text('{"nosuch": 1}')
    with pytest.raises(UserError, match="another version"):
        build.load_run(tmp_path, "cpu")
    with pytest.raises(UserError, match="train the run first"):
        build.load_run(whole, "cpu", seed=9)
