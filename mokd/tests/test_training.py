"""Parts of training and evaluation: distillation, augmentation, schedule, backbones, features."""

import copy
import json

from lab import runs, tables
from lab.runs import UserError

import numpy as np
import pytest
import torch
from commands import TINY, call
from waits import Waits

import backbones
import domains
import evaluation
import features
import sets
import settings
import train
import trainer
import weights as weights_of


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
