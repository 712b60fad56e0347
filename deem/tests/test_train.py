"""The loop: schedule, streams, exact resume, two processes, stages one after the other."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

from lab import runs
from lab.runs import UserError

import pytest
import torch
from conftest import HERE, documents, make, run

import build
import sources
import train
from digits import pretrain, scenes, study
from settings import DigitSettings, Settings
from streams import torch_seed
from trainer import Feeder, Trainer, accelerator_of, schedule

pytestmark = pytest.mark.usefixtures("quick_study")
CPU = torch.device("cpu")

FEW = ["--batch", "3", "--digits.scenes", "60", "--digits.text", "2", "--digits.encoder", "2", "--digits.denoiser",
       "2", "--digits.questions", "10", "--device", "cpu"]  # fmt: skip


def metrics(out, seed=0, name="record"):
    m = json.loads((out / f"seed{seed}" / f"{name}.json").read_text())["metrics"]
    return {k: v for k, v in m.items() if not k.endswith("seconds")}


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
        found, _ = study.score(model, s, 0)
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


def test_two_processes_train(tmp_path):
    """Two CPU processes share a step: each reads its own part of the documents, and the step is that of the mean of
    their gradients, made here one after the other."""
    out, base = tmp_path / "run", tmp_path / "base"
    words = [*FEW, "--steps", "3", "--out", str(out), "--base", str(base), "--max-steps", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port,
         "train.py", *words],
        cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    tensors, told = runs.read_tensors(out / "checkpoint" / "seed0.safetensors")
    assert [r["at"] for r in json.loads(told["readers"])] == [12, 13]  # 2 steps of 3 documents each, every second one

    s = runs.parse(Settings, "", words)
    s.check()
    s.resolve()
    model = build.build(s, 0, torch.device("cpu"))
    ranks = [SimpleNamespace(process_index=k, num_processes=2) for k in (0, 1)]
    feeders = [Feeder(s, model, sources.reader(s, 0, r), 0, r.process_index) for r in ranks]
    model.freeze(1, "deem")
    groups = model.trainable_groups(1, "deem", rates=s.rates())
    rates = [g["lr"] for g in groups]
    optimizer = torch.optim.AdamW([{k: v for k, v in g.items() if k != "name"} for g in groups], betas=(0.9, 0.995),
                                  eps=1e-6, fused=True)  # fmt: skip
    model.train()
    for step in range(2):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step, 3, s.warmup)
        for rank in (0, 1):
            b = feeders[rank].batch(step, 0)
            torch.manual_seed(torch_seed(0, "dropout", step, 0, rank))
            (model.losses(b, torch_seed(0, "noise", step, 0, rank))["total"] / 2).backward()
        torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], s.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(tensors[f"model.{name}"], p, rtol=1e-3, atol=2e-5), name


def test_base_is_shared_and_named_by_what_it_depends_on(whole, tmp_path):
    base = whole.parent / "base"
    assert len(list(base.glob("digits-seed0-*/model.safetensors"))) == 1
    model, s = make("digits", digits=DigitSettings(60, 2, 2, 2), base=str(base))
    before = (next(base.glob("*")) / "model.safetensors").stat().st_mtime
    pretrain.base(model, s, 0)
    assert (next(base.glob("*")) / "model.safetensors").stat().st_mtime == before
    shared, s = make("digits", digits=DigitSettings(60, 2, 2, 2, pretrained=0), base=str(base))
    pretrain.base(shared, s, 5)  # another run's seed, the same pretrained parts
    assert len(list(base.glob("*"))) == 1
    assert all(torch.equal(p, q) for p, q in zip(shared.parameters(), model.parameters(), strict=True))
    other, s = make("digits", digits=DigitSettings(60, 1, 1, 1), base=str(tmp_path))
    pretrain.base(other, s, 0)
    name = "encoder.trunk.stages.0.0.weight"
    assert not torch.equal(dict(model.named_parameters())[name], dict(other.named_parameters())[name])
    third, _ = make("digits")
    half = next(tmp_path.glob("*/model.safetensors")).with_name(".model.safetensors.1.tmp")
    half.write_text("left over")
    pretrain.base(third, s, 0)
    assert not half.exists()
    assert all(
        torch.equal(p, dict(third.named_parameters())[k]) for k, p in other.named_parameters() if pretrain.learned(k)
    )
    assert not pretrain.learned("llm.model.layers.0.synchroniser.gate")


def test_schedule():
    assert [round(schedule(k, 10, 4), 3) for k in (0, 3, 4)] == [0.25, 1.0, 1.0]
    assert schedule(10, 10, 4) == pytest.approx(0) and schedule(7, 10, 4) == pytest.approx(0.5)
    assert all(schedule(k, 10, 0) >= schedule(k + 1, 10, 0) for k in range(10))


def test_batches_depend_on_seed_and_place_alone():
    model, s = make("digits", digits=DigitSettings(60), batch=4)
    feeder = lambda: Feeder(s, model, scenes.SceneReader(3, 1, n=60), 3, 0)  # noqa: E731
    a, b = feeder(), feeder()
    a.batch(0, 0)
    state = a.reader.state()
    later = a.batch(1, 0)
    b.reader.restore(state)
    again = b.batch(1, 0)
    assert torch.equal(later.ids, again.ids) and torch.equal(later.images, again.images)
    assert not torch.equal(later.images[:2], a.batch(2, 0).images[:2])


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of two steps of four, and what makes a trainer for it."""

    def trainer(steps=4):
        model, s = make("digits", digits=DigitSettings(20), batch=2, steps=steps)
        return Trainer(s, model, Feeder(s, model, scenes.SceneReader(0, 1, n=20), 0, 0), accelerator_of(CPU), 0)

    path = tmp_path_factory.mktemp("saved") / "seed0.safetensors"
    t = trainer()
    train.fit(t, path, lambda lines: None, until=2, title="")
    return path, trainer


def _first(tensors, start):
    return next(k for k in tensors if k.startswith(start) and tensors[k].ndim == 2)


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda t, m: m.pop("step"), "step is missing"),
        (lambda t, m: m.update(step="many"), "no whole number"),
        (lambda t, m: m.update(step="4"), "step is 4, outside 0 to 3"),
        (lambda t, m: m.update(step="0"), "no step was made"),
        (lambda t, m: m.update(readers="[{"), "another run"),
        (lambda t, m: m.update(readers='[{"x": 1}]'), "'at'"),
        (lambda t, m: m.update(readers='[{"at": 4}, {"at": 5}]'), "by 2 processes, this start has 1"),
        (lambda t, m: t.pop(_first(t, "model.")), "is missing"),
        (lambda t, m: t.update({_first(t, "model."): t[_first(t, "model.")][:1].clone()}), "has shape (1"),
        (lambda t, m: t.update({_first(t, "adam."): t[_first(t, "adam.")][:1].clone()}), "has shape (1"),
        (lambda t, m: t[_first(t, "model.")].fill_(float("nan")), "not finite"),
    ],
)
def test_checkpoint_that_does_not_fit(saved, tmp_path, change, told):
    path, trainer = saved
    t = trainer()
    assert t.load(path) and t.step == 2 and t.feeder.reader.at == 4
    tensors, meta = runs.read_tensors(path)
    change(tensors, meta)
    runs.write_tensors(tmp_path / "x.safetensors", tensors, meta)
    with pytest.raises(UserError, match=re.escape(told)):
        trainer().load(tmp_path / "x.safetensors")
    assert not trainer().load(tmp_path / "nosuch.safetensors")


@pytest.mark.parametrize("change", ["nan", "shape", "lost"])
def test_base_that_does_not_fit(whole, tmp_path, change):
    shutil.copytree(whole.parent / "base", tmp_path / "base")
    path = next((tmp_path / "base").glob("*/model.safetensors"))
    tensors, meta = runs.read_tensors(path)
    name = _first(tensors, "llm.")
    value = {"nan": tensors[name] * float("nan"), "shape": tensors[name][:1].clone()}.get(change)
    tensors = {k: v for k, v in tensors.items() if k != name} | ({} if value is None else {name: value})
    runs.write_tensors(path, tensors, meta)
    model, s = make("digits", digits=DigitSettings(60, 2, 2, 2),
                    base=str(tmp_path / "base"))  # fmt: skip
    with pytest.raises(UserError, match=f"{name} is missing, of another shape or not finite"):
        pretrain.base(model, s, 0)


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


def test_stage_three_from_files(tmp_path):
    """Region instructions in COCO form, the real classes, masks and five region tokens; weights of stage 2 below."""
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (60 * i, 90, 120)).save(tmp_path / "images" / f"{i}.png")
    box = [[5, 5, 25, 5, 25, 20, 5, 20]]
    data = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 30, "width": 40} for i in range(3)],
        "annotations": [{"id": i, "image_id": i, "segmentation": box, "caption": "there is a 3"} for i in range(3)],
    }
    (tmp_path / "regions.json").write_text(json.dumps(data))
    words = ["--preset", "tiny", "--batch", "2", "--device", "cpu"]
    before, _ = make("tiny", stage=2)
    runs.write_tensors(tmp_path / "two" / "seed0" / "model.safetensors", dict(before.named_parameters()))
    words += [
        "--stage",
        "3",
        "--steps",
        "2",
        "--dataset",
        "files",
        "--files-kind",
        "regions",
        "--files",
        tmp_path / "regions.json",
    ]
    words += [
        "--image-root",
        tmp_path / "images",
        "--prompt-form",
        "plain",
        "--init",
        tmp_path / "two",
        "--out",
        tmp_path / "three",
    ]
    done = run("train.py", *words)
    assert done.returncode == 0, done.stderr
    m = metrics(tmp_path / "three")
    assert m["steps"] == 2 and "csr" not in m and "nip" not in m and m["ntp"] > 0
    model, s = build.load_run(tmp_path / "three", "cpu")
    assert model.denoiser is None and s.stage == 3 and model.encoder.region_proj is not None
    trunk = dict(before.encoder.trunk.named_parameters())  # frozen in stage 3: still those of stage 2
    assert all(torch.equal(p, trunk[k]) for k, p in model.encoder.trunk.named_parameters())
    assert m["skipped"] == 0
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    words[words.index(tmp_path / "three")] = tmp_path / "broken"
    done = run("train.py", *words)
    assert done.returncode == 2 and "1.png" in done.stderr and "Traceback" not in done.stderr
    done = run("train.py", *words, "--broken", "skip")
    assert done.returncode == 2 and "other settings (broken" in done.stderr  # never a mixture of both in one folder
    (tmp_path / "regions.json").write_text(json.dumps(data) + "\n")
    done = run("train.py", *words)
    assert done.returncode == 2 and "begun with other data" in done.stderr
    words[words.index(tmp_path / "broken")] = tmp_path / "skipped"
    done = run("train.py", *words, "--broken", "skip")
    assert done.returncode == 0 and "1.png" in done.stderr, done.stderr
    assert metrics(tmp_path / "skipped")["skipped"] >= 1


def test_what_a_benchmark_lacks_is_told_before_training(tmp_path):
    words = [
        "--preset",
        "tiny",
        "--steps",
        "2",
        "--batch",
        "2",
        "--device",
        "cpu",
        "--digits.scenes",
        "20",
        "--data-dir",
        tmp_path,
    ]
    for name, told in (("pope", "pope"), ("nosuch", "--benchmarks nosuch is unknown")):
        done = run("train.py", *words, "--benchmarks", name, "--out", tmp_path / name)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / name / "seed0" / "metrics.jsonl").exists()


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


def test_documents_hold_one_or_two_scenes():
    found = [sum(not hasattr(p, "text") for p in d) for d in documents(80)]
    assert {*found} == {1, 2} and 0.05 < found.count(2) / 80 < 0.5


def test_label_may_name_settings():
    s = Settings(label="lambda={lambda_csr:g}")
    s.resolve()
    assert s.label == "lambda=5"
    s = Settings(label="{nosuch}")
    with pytest.raises(UserError, match="nosuch"):
        s.resolve()
