"""Commands end to end, exact resume, several processes, published checkpoints, user errors."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

from lab import runs, tables
from lab.runs import UserError

import numpy as np
import pytest
import torch
from waits import Waits

import backbones
import domains
import eval
import evaluation
import features
import methods
import sets
import settings
import train
import trainer
import weights as weights_of

TINY = [
    *("--size", "28", "--limit", "6", "--steps", "6", "--pictures", "8", "--validate", "2", "--validate-every", "3"),
    *("--checkpoint-every", "2", "--tasks", "3", "--max-support", "50", "--workers", "0", "--domains", "digits"),
]
RANDOM = ["--backbone", "random5x5", "--size", "28", "--domains", "digits", "--max-support", "60", "--workers", "0"]


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    monkeypatch.setenv("MOKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def call(module, monkeypatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    module.main()


def start(*words: object, port: int = 0) -> subprocess.CompletedProcess:
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    command = [sys.executable, *(launch if port else []), *map(str, words)]
    done = subprocess.run(command, cwd=runs.HERE, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def records(out) -> list[tuple]:
    """What must be the same: seconds are not."""
    found = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return [
        (r["seed"], r["dataset"], r["method"], {k: v for k, v in r["metrics"].items() if k != "seconds_per_task"})
        for r in found
    ]


def weights(out) -> dict:
    return runs.read_tensors(out / "seed0" / "model.safetensors")[0]


def test_train_then_eval_gives_the_same_again(monkeypatch, tmp_path, capsys):
    call(train, monkeypatch, *TINY, "--methods", "ncc", "mokd", "--out", tmp_path / "a")
    found = records(tmp_path / "a")
    assert [x[2] for x in found] == ["NCC", "MOKD"] and found[1][3]["gain over NCC"] == pytest.approx(
        found[1][3]["accuracy"] - found[0][3]["accuracy"]
    )
    assert not (tmp_path / "a" / "seed0" / "tasks-digits").exists()
    lines = (tmp_path / "a" / "seed0" / "tasks-digits.jsonl").read_text().splitlines()
    assert [json.loads(x)["task"] for x in lines] == [0, 1, 2]
    curve = [json.loads(x) for x in (tmp_path / "a" / "seed0" / "metrics.jsonl").read_text().splitlines()]
    assert {x["step"] for x in curve if "valid_drawn" in x} == {3, 6} and any("loss" in x for x in curve)
    again = ["--run", tmp_path / "a", "--domains", "digits", "--methods", "ncc", "mokd", "--tasks", "3", "--limit", "6"]
    call(eval, monkeypatch, *again, "--max-support", "50", "--workers", "0", "--out", tmp_path / "b")
    assert [x[3]["accuracy"] for x in records(tmp_path / "b")] == [x[3]["accuracy"] for x in found]
    capsys.readouterr()
    call(eval, monkeypatch, *again, "--max-support", "50", "--workers", "0", "--out", tmp_path / "b")
    assert "complete" in capsys.readouterr().out


@pytest.mark.parametrize("at", [2, 4])
def test_training_resumes_to_the_same_bits(at, monkeypatch, tmp_path):
    call(train, monkeypatch, *TINY, "--methods", "ncc", "--out", tmp_path / "whole")
    save = trainer.Trainer.save

    def stop(self, path, step, seconds):
        save(self, path, step, seconds)
        if step == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        call(train, monkeypatch, *TINY, "--methods", "ncc", "--out", tmp_path / "cut")
    monkeypatch.setattr(trainer.Trainer, "save", save)
    kept = tmp_path / "cut" / "seed0" / ".data.json"
    own = kept.read_text()
    kept.write_text('["another copy"]')
    with pytest.raises(UserError, match="begun with other data"):
        call(train, monkeypatch, *TINY, "--methods", "ncc", "--out", tmp_path / "cut")
    kept.write_text(own)
    call(train, monkeypatch, *TINY, "--methods", "ncc", "--out", tmp_path / "cut")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert records(tmp_path / "whole") == records(tmp_path / "cut")
    curves = [(tmp_path / k / "seed0" / "metrics.jsonl").read_text() for k in ("whole", "cut")]
    assert curves[0] == curves[1]


def test_killed_evaluation_goes_on_with_the_next_block(tmp_path, monkeypatch):
    words = ["eval.py", *RANDOM, "--tasks", "100", "--methods", "ncc", "mokd", "--out"]
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, *words, str(cut)], cwd=runs.HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    kept, deadline = cut / "seed0" / "tasks-digits", time.time() + 120
    while not (kept / "00000.json").is_file() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (kept / "00000.json").is_file() and not (cut / "records.jsonl").exists()
    first = (kept / "00000.json").stat().st_mtime_ns
    seen = []
    block = evaluation.block
    monkeypatch.setattr(evaluation, "block", lambda *a: (seen.append(a[3].start), block(*a))[1])
    call(eval, monkeypatch, *words[1:], cut)
    assert 0 not in seen and first
    call(eval, monkeypatch, *words[1:], tmp_path / "whole")
    assert records(cut) == records(tmp_path / "whole")


@pytest.mark.parametrize("killed_at", ["write_text", "rmtree"])
def test_killed_while_the_records_are_written(killed_at, tmp_path, monkeypatch):
    """Every task's line is on disk before the first record, and no piece outlives the next start."""
    words = [*RANDOM, "--tasks", "5", "--methods", "ncc", "url", "--out"]
    place, name = (runs.Run, "record") if killed_at == "write_text" else (evaluation.shutil, "rmtree")
    before, calls = getattr(place, name), []

    def die(*a, **k):
        calls.append(1)
        if name == "rmtree" or len(calls) == 2:
            raise KeyboardInterrupt
        return before(*a, **k)

    monkeypatch.setattr(place, name, die)
    with pytest.raises(KeyboardInterrupt):
        call(eval, monkeypatch, *words, tmp_path / "cut")
    monkeypatch.setattr(place, name, before)
    assert (tmp_path / "cut" / "seed0" / "tasks-digits.jsonl").is_file()
    assert (tmp_path / "cut" / "seed0" / "tasks-digits").is_dir()
    call(eval, monkeypatch, *words, tmp_path / "cut")
    assert not (tmp_path / "cut" / "seed0" / "tasks-digits").exists()
    assert len((tmp_path / "cut" / "seed0" / "tasks-digits.jsonl").read_text().splitlines()) == 5
    call(eval, monkeypatch, *words, tmp_path / "whole")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


@pytest.mark.parametrize("text", ["[]", "[1]", '[{"task": 0, "methods": {}}]', "{"])
def test_a_damaged_piece_makes_no_record(text, tmp_path, monkeypatch):
    words = [*RANDOM, "--tasks", "2", "--methods", "ncc", "--out", tmp_path / "r"]
    runs.write_text(tmp_path / "r" / "seed0" / "tasks-digits" / "00000.json", text)
    with pytest.raises(UserError, match="does not hold tasks 0 to 1|not valid JSON"):
        call(eval, monkeypatch, *words)
    assert not list((tmp_path / "r").rglob("record*")) and not list((tmp_path / "r").rglob("*.jsonl"))


def test_two_processes_share_the_tasks(tmp_path, monkeypatch):
    words = ["eval.py", *RANDOM, "--tasks", "45", "--methods", "ncc", "mokd", "--device", "cpu", "--out"]
    start(*words, tmp_path / "two", port=29541)
    monkeypatch.setenv("MOKD_CACHE", str(tmp_path / "other"))
    call(eval, monkeypatch, *words[1:], tmp_path / "one")
    assert records(tmp_path / "two") == records(tmp_path / "one")
    files = [[f.name for f in (tmp_path / k).iterdir()] for k in ("cache", "other")]
    assert files[0] == files[1]  # the same features, no pieces left


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """With GroupNorm, whose statistics are those of one picture, the gradients are those of the whole batch."""
    words = ["train.py", *TINY, "--backbone", "conv4-group", "--methods", "ncc", "--device", "cpu", "--out"]
    start(*words, tmp_path / "two", port=29542)
    call(train, monkeypatch, *words[1:], tmp_path / "one")
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    fresh = backbones.build("conv4-group", 28).state_dict()
    assert any(not torch.allclose(a[k], fresh[k], atol=1e-3) for k in fresh)
    assert records(tmp_path / "two")[0][3]["tasks"] == 3


def test_a_training_step_waits_for_nothing(tmp_path):
    s = runs.parse(settings.Settings, "", [*map(str, TINY), "--out", str(tmp_path)])
    s.check()
    t = trainer.Trainer(s, 0, torch.device("cpu"), trainer.load_training(s))
    batches = t.batches(0)
    for step in range(2):  # constants are made in the first
        with Waits() as found:
            t.loss(next(batches), step)[0].backward()
            t.optimizer.step()
    assert not found.places


def test_distillation_from_single_domain_teachers(monkeypatch, tmp_path):
    """URL: teachers trained by this command; the loss has cross-entropy, CKA and KL parts and lowers the CKA part."""
    call(train, monkeypatch, *TINY, "--methods", "ncc", "--out", tmp_path / "t")
    words = [*TINY, "--methods", "ncc", "--teachers", tmp_path / "t", "--out", tmp_path / "u"]
    call(train, monkeypatch, *words)
    s = runs.parse(settings.Settings, "", [*map(str, words)])
    s.check()
    t = trainer.Trainer(s, 0, torch.device("cpu"), trainer.load_training(s))
    sgd, adam = t.optimizer.parts
    assert {(g["lr"], g["weight_decay"]) for g in adam.param_groups} == {(0.1, 5e-4)} and isinstance(
        adam, torch.optim.Adam
    )
    assert {(g["lr"], g["weight_decay"], g["momentum"], g["nesterov"]) for g in sgd.param_groups} == {
        (3e-2, 7e-4, 0.9, False)
    }
    assert t.net.adaptors[0].weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.1)  # Xavier, normal
    assert sum(p.numel() for g in adam.param_groups for p in g["params"]) == 64 * 64
    batch = next(iter(t.batches(0)))
    with_teacher, _ = t.loss(batch, 0)
    faded, _ = t.loss(batch, 48_000)
    t.teachers = []
    torch.manual_seed(0)
    alone, _ = t.loss(batch, 0)
    assert with_teacher > faded and faded.item() == pytest.approx(alone.item(), rel=0.05)
    # The parts, from the features and logits of the same pass: CE + w (1 - CKA + 16 KL at temperature 4).
    t = trainer.Trainer(s, 0, torch.device("cpu"), trainer.load_training(s))
    t.s.augment, (x, y) = False, batch[0]
    t.net.train()
    (a,), (z,) = copy.deepcopy(t.net)(x, [len(y)])
    with torch.no_grad():
        (b,), (said,) = t.teachers[0](x, [len(y)])
    assert torch.allclose(b, t.teachers[0].backbone(x)) and not t.teachers[0].training
    p, q = (said / 4).softmax(1), (z / 4).softmax(1)
    kl = (p * (p / q).log()).sum(1).mean() * 16
    expected = torch.nn.functional.cross_entropy(z, y) + 0.75 * (trainer.cka_loss(a, b) + kl)
    assert t.loss(batch, 12_000)[0].item() == pytest.approx(expected.item(), rel=1e-4)  # "drawn" fades over 48,000
    x = torch.rand(10, 4)
    assert trainer.cka_loss(x, x).item() == pytest.approx(0, abs=1e-5)
    assert trainer.cka_loss(x, torch.rand(10, 3)) > 0.05
    assert trainer.fading(0, "ilsvrc_2012") == 4 and trainer.fading(24_000, "aircraft") == 0.5
    assert trainer.fading(24_000, "fungi") == trainer.fading(24_000, "quickdraw") == 0.75
    assert trainer.fading(96_000, "omniglot") == 0 and trainer.fading(120_000, "ilsvrc_2012") == 2


def test_teachers_must_fit(monkeypatch, tmp_path):
    call(train, monkeypatch, *TINY, "--methods", "ncc", "--out", tmp_path / "t")
    told = tmp_path / "t" / "settings.json"
    words = [*TINY, "--methods", "ncc", "--teachers", tmp_path / "t", "--out", tmp_path / "u"]
    for change, word in (({"train": ["omniglot"]}, "on drawn alone"), ({"size": 84}, "size 84"), (None, "no run of")):
        kept = told.read_text()
        told.write_text(json.dumps(change and {**json.loads(kept), **change}))
        with pytest.raises(UserError, match=word):
            call(train, monkeypatch, *words)
        told.write_text(kept)
    state, meta = runs.read_tensors(tmp_path / "t" / "seed0" / "model.safetensors")
    state |= {k: v[:3] for k, v in state.items() if k.startswith("cls.")}
    runs.write_tensors(tmp_path / "t" / "seed0" / "model.safetensors", state, meta)
    with pytest.raises(UserError, match="3 classes apart"):
        call(train, monkeypatch, *words)


def test_cka_equals_the_definition():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.rand(9, 4, generator=rng), torch.rand(9, 3, generator=rng)

    def gram(x):
        x = torch.nn.functional.normalize(x.double(), dim=1)
        d = ((x[:, None] - x[None]) ** 2).sum(-1)
        found = d[d > 1e-6].sort().values
        return torch.exp(-d / (2 * found[(len(found) - 1) // 2]))

    H = torch.eye(9).double() - 1 / 9
    (K, L), dot = (H @ gram(x) @ H for x in (a, b)), lambda p, q: (p * q).sum()
    expected = 1 - dot(K, L) / (dot(K, K) * dot(L, L)).sqrt()
    assert trainer.cka_loss(a, b).item() == pytest.approx(expected.item(), abs=1e-5)
    assert trainer.cka_loss(a[:1], b[:1]).item() == 1  # one picture: nothing to compare


def test_augmentation_one_step_after_the_other():
    """The middle of each range changes nothing; each number moves what it is for, as far as published."""
    x = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.6

    def made(**given):
        u = torch.full((1, 6), 0.5)
        for k, v in given.items():
            u[0, ["left", "top", "brightness", "contrast", "saturation", "hue"].index(k)] = v
        return trainer.augment(x, u)[0]

    top = 1 - 1e-7
    assert torch.allclose(made(), x[0], atol=1e-5)
    assert torch.allclose(made(left=top)[:, :, :12], x[0, :, :, 8:], atol=1e-5)
    assert torch.allclose(made(left=0.0)[:, :, 8:], x[0, :, :, :12], atol=1e-5)
    assert torch.allclose(made(left=0.0)[:, :, 7], x[0, :, :, 1], atol=1e-5)  # reflected, the edge is not repeated
    assert torch.allclose(made(top=top)[:, :12], x[0, :, 8:], atol=1e-5)
    assert torch.allclose(made(brightness=0.0), x[0] - 0.25, atol=1e-5)  # 0.125 of the range 0 to 1
    mean = x[0].mean((1, 2), keepdim=True)
    assert torch.allclose(made(contrast=top), (x[0] - mean) * 1.2 + mean, atol=1e-5)
    gray = torch.einsum("c,chw->hw", torch.tensor([0.299, 0.587, 0.114]), x[0])
    assert torch.allclose(made(saturation=0.0), gray + 0.8 * (x[0] - gray), atol=2e-3)
    turned, flat = made(hue=top), torch.einsum("ij,jhw->ihw", trainer.YIQ, (made(hue=top) - x[0]) / 2)
    assert flat[0].abs().max() < 1e-3 and (turned - x[0]).abs().max() > 0.02  # luma stays
    i, q = torch.einsum("ij,jhw->ihw", trainer.YIQ, (x[0] + 1) / 2)[1:]
    j, r = torch.einsum("ij,jhw->ihw", trainer.YIQ, (turned + 1) / 2)[1:]
    angle = torch.remainder(torch.atan2(r, j) - torch.atan2(q, i) + np.pi, 2 * np.pi) - np.pi
    assert angle.median().item() == pytest.approx(2 * np.pi * 0.03, abs=1e-3)


def test_rate_has_warm_restarts():
    s = runs.parse(settings.Settings, "", ["--steps", "100", "--period", "50", "--rate", "0.4"])
    s.check()
    found = [train.rate(s, k) for k in (0, 25, 49, 50, 75)]
    assert found == pytest.approx([0.4, 0.2, 0.4 * 0.5 * (1 + np.cos(np.pi * 49 / 50)), 0.4, 0.2])


def test_pictures_read_on_demand_are_those_held_in_memory(monkeypatch):
    s = runs.parse(settings.Settings, "", [*TINY])
    s.check()
    found = []
    for limit in (trainer.RESIDENT, 0):
        monkeypatch.setattr(trainer, "RESIDENT", limit)
        source = trainer.Source("drawn", s, torch.device("cpu"))
        assert (source.held is None) == (limit == 0)
        found.append(list(source.batches(trainer.Indices(len(source.domain), 5, 3, 0, 0, 2))))
    for (x, y), (z, w) in zip(*found, strict=True):
        assert torch.allclose(x, z, atol=1e-6) and torch.equal(y, w)
    whole = list(trainer.Indices(100, 8, 1, 0, 4, 6))
    parts = [list(trainer.Indices(100, 8, 1, 0, 4, 6, rank, 2)) for rank in (0, 1)]
    assert all(sorted([*a, *b]) == sorted(w) for a, b, w in zip(*parts, whole, strict=True))


def test_a_checkpoint_of_url_loads(tmp_path):
    model = backbones.build("resnet18", 84)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(11.2e6, rel=0.01) and model.width == 512
    state = {**model.state_dict(), "cls_fn.weight": torch.zeros(3, 512)}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "model_best.pth.tar")
    other = backbones.build("resnet18", 84)
    weights_of.load(other, tmp_path / "model_best.pth.tar")
    x = torch.rand(2, 3, 84, 84)
    assert torch.equal(model.eval()(x), other.eval()(x)) and (model(x) >= 0).all()
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, tmp_path / "odd.pth.tar")
    (tmp_path / "broken.pth.tar").write_bytes(b"nothing")
    for name, word in (("odd", "another network"), ("broken", "cannot be read"), ("absent", "no weights")):
        with pytest.raises(UserError, match=word):
            weights_of.load(other, tmp_path / f"{name}.pth.tar")


@pytest.mark.parametrize(("name", "size"), [("conv4", 28), ("conv4-group", 28), ("random5x5", 28), ("resnet18", 84)])
def test_backbones_have_their_width(name, size):
    model = backbones.build(name, size).eval()
    out = model(torch.rand(2, 3, size, size) * 2 - 1)
    assert out.shape == (2, model.width) and (out >= 0).all() and out.std() > 0


def test_timm_backbones_by_name():
    model = backbones.build("test_resnet", 64).eval()
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, model.width)
    with pytest.raises(UserError, match="no backbone nothing"):
        backbones.build("nothing", 64)


def test_features_are_those_of_the_model_and_kept(tmp_path, monkeypatch):
    domain, model = domains.load("digits", "test", tmp_path, 28, limit=3), backbones.build("conv4", 28)
    model.train()
    found = features.features(model, "conv4", domain, 28, torch.device("cpu"), 7)
    assert model.training
    model.eval()
    x = torch.stack([domains.prepare(domain.image(k), 28) for k in range(len(domain))])
    assert torch.allclose(found, model(x), atol=1e-5) and len(found) == 30
    model.train()
    monkeypatch.setattr(features, "encode", None)
    assert torch.equal(features.features(model, "conv4", domain, 28, torch.device("cpu"), 7), found)


def test_grouping_covers_all_tasks_within_its_bounds():
    sizes = [5, 100, 80, 99, 6, 500, 7, 90]
    parts = evaluation.grouped(sizes, 30_000)
    assert sorted(sum(parts, [])) == list(range(8))
    for part in parts:
        largest = max(sizes[i] for i in part)
        assert len(part) == 1 or len(part) * largest**2 <= 30_000
        assert min(sizes[i] for i in part) >= 0.75 * largest


def test_summary_pairs_tasks():
    def line(a, b):
        return {
            "ways": 5,
            "support": 20,
            "methods": {"A": {"accuracy": a, "seconds": 1}, "B": {"accuracy": b, "seconds": 2}},
        }

    m = evaluation.summary([line(50, 40), line(70, 70), line(90, 60)], "A")
    assert m["accuracy"] == 70 and m["gain over B"] == pytest.approx(40 / 3)
    assert m["ci95"] == pytest.approx(1.96 * np.std([50, 70, 90]) / 3**0.5)
    assert m["gain over B ci95"] == pytest.approx(1.96 * np.std([10, 0, 30]) / 3**0.5)


def test_every_record_of_the_plan_has_its_place_in_paper_csv():
    printed = tables.read_printed(runs.HERE / "paper.csv")
    titles = set(sets.TITLES.values()) | {"Average Seen", "Average Unseen", "Average All", "all"}
    assert set(printed["dataset"]) <= titles
    assert set(printed["setting"]) <= set(settings.LAW_NAMES.values())
    ours = {"URL", "MOKD", "SSL-HSIC", "TSA", *(f"MOKD(gamma={g})" for g in ("0", "0.5", "1", "2", "3", "4", "5"))}
    assert ours <= set(printed["method"])


def test_no_weights_no_numbers(monkeypatch, tmp_path):
    """Weights that are no numbers end the run; no accuracy is written."""
    model = backbones.build("conv4", 28)
    state = {k: torch.full_like(v, float("nan")) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    runs.write_tensors(tmp_path / "w.safetensors", state)
    words = ["--backbone", "conv4", "--weights", tmp_path / "w.safetensors", *RANDOM[2:], "--tasks", "2"]
    with pytest.raises(UserError, match="not finite"):
        call(eval, monkeypatch, *words, "--out", tmp_path / "r")
    assert not list((tmp_path / "r").rglob("record*"))


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="not a number at step"):
        call(train, monkeypatch, *TINY, "--rate", "1e30", "--methods", "ncc", "--out", tmp_path / "r")
    assert not list((tmp_path / "r").rglob("record*"))


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("train", ["--methods", "svm"], "no method svm"),
        ("train", ["--methods", "mokd:beta=1"], "not beta"),
        ("train", ["--methods", "mokd:kernel=sigmoid"], "one of rbf"),
        ("train", ["--methods", "mokd:gamma=-1"], "not negative"),
        ("train", ["--methods", "mokd:steps=1.5"], "whole number"),
        ("train", ["--methods", "mokd", "mokd"], "different methods"),
        ("train", ["--domains", "moon"], "no domain moon"),
        ("train", ["--domains"], "one or more different domains"),
        ("train", ["--domains", "digits", "drawn", "digits"], "one or more different domains"),
        ("train", ["--kernel", "sigmoid"], "--kernel sigmoid"),
        ("train", ["--bandwidth", "random"], "--bandwidth random"),
        ("train", ["--zz-bandwidth", "own"], "--zz-bandwidth own"),
        ("train", ["--scale", "huge"], "--scale huge"),
        ("train", ["--workers", "-1"], "--workers"),
        ("train", ["--limit", "-1"], "--limit"),
        ("train", ["--lr", "-2"], "--lr must not be"),
        ("train", ["--weight-decay", "inf"], "weight-decay"),
        ("train", ["--momentum", "1"], "--momentum"),
        ("train", ["--size", "8"], "--size must be at least 16"),
        ("train", ["--train", "drawn", "drawn"], "different domains"),
        ("train", ["--checkpoint-every", "0"], "--checkpoint-every"),
        ("train", ["--validate-every", "0"], "--validate-every"),
        ("train", ["--pictures", "1"], "--pictures must be at least 2"),
        ("train", ["--seeds"], "--seeds"),
        ("train", ["--seeds", "3", "3"], "--seeds"),
        ("train", ["--device", "tpu"], "--device tpu"),
        ("train", ["--train", "mnist"], "--train mnist"),
        ("train", ["--train", "omniglot"], "Omniglot is not in"),
        ("train", ["--law", "2shot"], "--law 2shot"),
        ("train", ["--gamma", "nan"], "gamma"),
        ("train", ["--gamma", "-2"], "must not be negative"),
        ("train", ["--tasks", "0"], "--tasks"),
        ("train", ["--steps", "-1"], "--steps"),
        ("train", ["--max-support", "10"], "--max-support"),
        ("train", ["--rate", "0"], "--rate"),
        ("train", ["--teachers", "a", "b"], "2 runs for 1 domains"),
        ("train", ["--teachers", "nowhere"], "no file nowhere"),
        ("train", ["--backbone", "nothing"], "no backbone nothing"),
        ("train", ["--backbone", "random5x5"], "no weights to train"),
        ("train", ["--precision", "int4"], "--precision"),
        ("train", ["--seeds", "-1"], "--seeds"),
        ("train", ["--data-dir", "~nosuch", "--train", "omniglot"], "home folder"),
        ("eval", ["--domains", "digits"], "--weights, --run or --pretrained"),
        ("eval", ["--backbone", "lite0", "--weights", "x"], "brings its own weights"),
        ("eval", ["--backbone", "test_resnet", "--pretrained", "--weights", "x"], "brings its own weights"),
        ("eval", ["--backbone", "conv4", "--pretrained"], "networks of timm"),
        ("eval", [*RANDOM, "--ways", "5"], "go together"),
        ("eval", [*RANDOM, "--ways", "3", "--shots", "1"], "HSIC needs 4"),
        ("eval", [*RANDOM, "--ways", "5", "--shots", "1", "--law", "1shot"], "in place of --law"),
        ("eval", [*RANDOM, "--images", "nowhere"], "in place of --domains"),
        ("eval", ["--backbone", "lite0", "--images", "nowhere"], "is no folder"),
        ("eval", ["--run", "nowhere"], "no file nowhere"),
        ("eval", ["--run", "nowhere", "--weights", "x"], "leave out --weights"),
        ("eval", ["--backbone", "random5x5", "--size", "28", "--seen", "omniglott"], "--seen omniglott"),
        ("eval", [*RANDOM, "--tasks", "1", "--methods", "ssl-hsic:scale=0"], "no numbers"),
        ("eval", [*RANDOM, "--tasks", "1", "--methods", "linear:lr=1e999"], "no numbers"),
        ("eval", ["--backbone", "random5x5"], "made for --size 28"),
        ("eval", ["--backbone", "conv4", "--weights", "nowhere.safetensors"], "no weights in"),
        ("eval", ["--backbone", "random5x5", "--size", "28", "--domains", "mnist"], "MNIST is not in"),
    ],
)
def test_user_errors_are_one_line(script, words, expected, monkeypatch, tmp_path, capsys):
    module = {"train": train, "eval": eval}[script]
    monkeypatch.setenv("REPRO_DATA", str(tmp_path / "empty"))
    more = ["--size", "28", "--workers", "0"] if script == "train" and "--size" not in words else []
    monkeypatch.setattr(sys, "argv", ["x.py", *more, *words, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        runs.command(module.main)
    told = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and expected in told[-1] and told[-1].startswith("error: ")
    assert not list((tmp_path / "out").rglob("record*"))
    if "no numbers" not in expected:
        assert not (tmp_path / "out").exists()  # a start that failed leaves no folder


def folder(place, classes: int = 3, each: int = 4):
    """Pictures of one colour a class."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for c in range(classes):
        (place / f"class{c}").mkdir(parents=True)
        for i in range(each):
            x = rng.integers(0, 60, (30, 40, 3), dtype=np.uint8)
            x[..., c % 3] += 150
            Image.fromarray(x).save(place / f"class{c}" / f"{i}.png")
    return place


IMAGES = ["--backbone", "lite0", "--size", "32", "--workers", "0", "--tasks", "3", "--ways", "3", "--shots", "2"]


def test_tasks_out_of_ones_own_folder(monkeypatch, tmp_path):
    place = folder(tmp_path / "pictures")
    call(eval, monkeypatch, *IMAGES, "--images", place, "--methods", "ncc", "mokd", "--out", tmp_path / "run")
    found = [json.loads(x) for x in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert [r["method"] for r in found] == ["NCC", "MOKD"] and {r["setting"] for r in found} == {"3-way 2-shot"}
    assert found[0]["metrics"]["accuracy"] > 90 and found[0]["data"]["n"] == 12
    assert found[0]["metrics"]["mean_support"] == 6 and found[1]["metrics"]["method_settings"]["gamma"] == 1


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda p: [shutil.rmtree(p / f"class{c}") for c in (1, 2)], "holds 1 classes"),
        (lambda p: [x.unlink() for x in (p / "class1").iterdir()], "no picture in"),
        (lambda p: [x.unlink() for x in list((p / "class1").iterdir())[1:]], "too few for a task"),
        (lambda p: shutil.rmtree(p / "class1"), "has 2 classes, a task needs 3"),
        (lambda p: (p / "class1" / "1.png").write_bytes(b"no picture"), "cannot be read"),
    ],
)
def test_what_is_no_folder_of_tasks_is_one_line(spoil, word, monkeypatch, tmp_path, capsys):
    spoil(folder(tmp_path / "pictures"))
    words = [*IMAGES, "--images", str(tmp_path / "pictures"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["eval.py", *words])
    with pytest.raises(SystemExit) as stop:
        runs.command(eval.main)
    told = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and word in told[-1] and told[-1].startswith("error: ")
    assert not list((tmp_path / "out").rglob("record*"))


def test_runs_of_other_settings_have_folders_of_their_own(monkeypatch, tmp_path):
    """Whatever decides the numbers is in the default --out; what does not, is not."""

    def out(*words: str) -> str:
        s = runs.parse(settings.EvalSettings, "", [*RANDOM, *words])
        s.check()
        return eval.named(s)

    first = out()
    assert first == out("--data-dir", "x", "--device", "cpu", "--batch", "3") and "own" not in first
    changed = [
        *(["--methods", "ncc"], ["--tasks", "5"], ["--seeds", "1"], ["--gamma", "2"], ["--limit", "9"]),
        *(["--law", "5shot"], ["--ways", "5", "--shots", "2"], ["--domains", "digits", "mnist5k"], ["--table", "t"]),
    ]
    assert len({first, *(out(*w) for w in changed)}) == 1 + len(changed)
    assert "digits-varied" in first and "5x2" in out("--ways", "5", "--shots", "2")


def test_a_head_that_makes_one_point_of_all_is_one_line(monkeypatch, tmp_path):
    """A picture of it would be none: neither a t-SNE of NaN nor one of a single point."""
    for value in (0.0, float("nan")):
        answer = methods.answer
        spoiled = lambda m, t, o, v=value, a=answer: dataclasses.replace(a(m, t, o), theta=torch.full((1, 288, 288), v))  # noqa: E731
        monkeypatch.setattr(methods, "answer", spoiled)
        s = runs.parse(settings.EvalSettings, "", [*RANDOM, "--methods", "ncc", "url", "--tasks", "20"])
        s.check()
        domain = domains.load("digits", "test", tmp_path, 28)
        found = torch.rand(len(domain), 288)
        with pytest.raises(UserError, match="one point of all pictures"):
            evaluation.example(s, domain, found, 0, "URL", False, torch.device("cpu"))
        monkeypatch.setattr(methods, "answer", answer)


def test_the_snippet_of_the_readme_runs(monkeypatch, tmp_path, capsys):
    text = (runs.HERE / "README.md").read_text()
    code = text.partition("## In your own code")[2].partition("```python\n")[2].partition("```")[0]
    assert 5 < len(code.strip().splitlines()) <= 15
    folder(tmp_path / "pictures", each=6)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.strip() == "class0"


def test_dry_run_writes_nothing(monkeypatch, tmp_path, capsys):
    call(train, monkeypatch, *TINY, "--dry-run", "--out", tmp_path / "x")
    assert "would train conv4" in capsys.readouterr().out and not (tmp_path / "x").exists()
    call(eval, monkeypatch, *RANDOM, "--dry-run", "--methods", "ncc", "url", "--out", tmp_path / "x")
    said = capsys.readouterr().out
    assert "would test random5x5" in said and "classes, ncc, url" in said and not (tmp_path / "x").exists()


@pytest.mark.gpu
def test_cpu_and_gpu_agree(tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    words = [*RANDOM, "--tasks", "20", "--methods", "ncc", "url", "mokd"]
    for device in ("cpu", "cuda"):
        call(eval, monkeypatch, *words, "--device", device, "--out", tmp_path / device)
    for a, b in zip(records(tmp_path / "cpu"), records(tmp_path / "cuda"), strict=True):
        assert a[3]["accuracy"] == pytest.approx(b[3]["accuracy"], abs=1.0)
