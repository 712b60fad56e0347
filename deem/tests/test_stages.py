"""Parts of the loop by themselves: schedule, batches, checkpoints that do not fit, two processes, stage 3, labels."""

import json
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

from lab import runs
from lab.runs import UserError

import pytest
import torch
from conftest import HERE, WORLD, documents, make, run
from test_train import FEW, _first, metrics

import build
import train
from scenes.options import SceneSettings
from scenes.world import SceneReader
from settings import Settings
from streams import torch_seed
from trainer import Feeder, Trainer, accelerator_of, schedule

pytestmark = pytest.mark.usefixtures("quick_study")
CPU = torch.device("cpu")


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
    feeders = [Feeder(s, model, build.reader(s, 0, r), 0, r.process_index) for r in ranks]
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


def test_schedule():
    assert [round(schedule(k, 10, 4), 3) for k in (0, 3, 4)] == [0.25, 1.0, 1.0]
    assert schedule(10, 10, 4) == pytest.approx(0) and schedule(7, 10, 4) == pytest.approx(0.5)
    assert all(schedule(k, 10, 0) >= schedule(k + 1, 10, 0) for k in range(10))


def test_batches_depend_on_seed_and_place_alone():
    model, s = make("digits", scenes=SceneSettings(60), batch=4)
    feeder = lambda: Feeder(s, model, SceneReader(WORLD, 3, 1, n=60), 3, 0)  # noqa: E731
    a, b = feeder(), feeder()
    a.batch(0, 0)
    state = a.reader.state()
    later = a.batch(1, 0)
    b.reader.restore(state)
    again = b.batch(1, 0)
    assert torch.equal(later.ids, again.ids) and torch.equal(later.images, again.images)
    assert not torch.equal(later.images[:2], a.batch(2, 0).images[:2])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of two steps of four, and what makes a trainer for it."""

    def trainer(steps=4):
        model, s = make("digits", scenes=SceneSettings(20), batch=2, steps=steps)
        return Trainer(s, model, Feeder(s, model, SceneReader(WORLD, 0, 1, n=20), 0, 0), accelerator_of(CPU), 0)

    path = tmp_path_factory.mktemp("saved") / "seed0.safetensors"
    t = trainer()
    train.fit(t, path, lambda lines: None, until=2, title="")
    return path, trainer


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
        "--scenes.count",
        "20",
        "--data-dir",
        tmp_path,
    ]
    for name, told in (("pope", "pope"), ("nosuch", "--benchmarks nosuch is unknown")):
        done = run("train.py", *words, "--benchmarks", name, "--out", tmp_path / name)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / name / "seed0" / "metrics.jsonl").exists()


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
