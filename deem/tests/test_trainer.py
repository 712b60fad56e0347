"""A step of the loop against one written out: schedule, accumulation, clipping, AdamW of the dossier, modes, views."""

import copy
import random

import numpy as np
import pytest
import torch
from conftest import WORLD, make
from PIL import Image

import recipe
from documents.readers import Picture
from scenes import pretrain
from scenes.options import SceneSettings
from scenes.world import SceneReader
from streams import torch_seed
from trainer import Feeder, Trainer, accelerator_of, schedule

CPU = torch.device("cpu")


def trainer(stage, variant="deem", preset="digits", **given):
    model, s = make(preset, stage=stage, variant=variant, batch=2, steps=6, warmup=2, scenes=SceneSettings(40), **given)
    feeder = Feeder(s, model, SceneReader(WORLD, 1, stage, n=40), 1, 0)
    return Trainer(s, model, feeder, accelerator_of(CPU), 1)


@pytest.mark.parametrize("stage, betas, eps", [(1, (0.9, 0.995), 1e-6), (2, (0.9, 0.999), 1e-8)])
def test_steps_against_a_loop(stage, betas, eps):
    t = trainer(stage, accum=2, clip=0.02)
    own, s = copy.deepcopy(t.model), t.s
    feeder = Feeder(s, own, SceneReader(WORLD, 1, stage, n=40), 1, 0)
    groups = [dict(g) for g in own.trainable_groups(stage, "deem", rates=s.rates())]
    moments = {}
    t.modes()
    own.train()
    for step in range(3):
        logged = t.update()
        t.step += 1
        sums = {}
        for k in range(2):
            b = feeder.batch(step, k)
            torch.manual_seed(torch_seed(1, "dropout", step, k, 0))
            out = own.losses(b, torch_seed(1, "noise", step, k, 0))
            (out["total"] / 2).backward()
            for key, value in out.items():
                sums[key] = sums.get(key, 0) + float(value.detach()) / 2
        norm = torch.stack([p.grad.norm() for g in groups for p in g["params"] if p.grad is not None]).norm()
        assert float(norm) > 0.02, "so that clipping does something"
        assert float(logged["grad_norm"]) == pytest.approx(float(norm), rel=1e-4)
        assert {k: float(v) for k, v in logged.items() if k != "grad_norm"} == pytest.approx(sums, rel=1e-4)
        for g in groups:
            rate = g["lr"] * schedule(step, 6, 2)
            for p in g["params"]:
                if p.grad is None:
                    continue
                grad = p.grad * (0.02 / (norm + 1e-6))
                m, v, n = moments.get(p, (torch.zeros_like(p), torch.zeros_like(p), 0))
                m, v, n = betas[0] * m + (1 - betas[0]) * grad, betas[1] * v + (1 - betas[1]) * grad**2, n + 1
                moments[p] = m, v, n
                with torch.no_grad():
                    p.mul_(1 - rate * g["weight_decay"])
                    p.sub_(rate * (m / (1 - betas[0] ** n)) / ((v / (1 - betas[1] ** n)).sqrt() + eps))
                p.grad = None
    assert schedule(0, 6, 2) == 0.5 and schedule(2, 6, 2) == 1.0
    for (name, p), q in zip(t.model.named_parameters(), own.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=3e-6), name


def test_a_frozen_trunk_and_the_latents_are_in_evaluation_mode_unless_asked():
    for form, variant, trunk in (
        ("paper", "deem-star", False), ("official", "deem-star", True), ("paper", "deem", True),
        ("official", "deem", True),
    ):  # fmt: skip
        t = trainer(1, variant, form=form)
        assert ("trunk" in recipe.trained(1, variant)) == (variant == "deem")
        t.model.eval()
        t.modes()
        assert t.model.encoder.trunk.training == trunk and t.model.resampler.training
        assert not t.model.denoiser.latents.training


def test_stage_one_crops_and_later_stages_squash():
    left_red = np.zeros((20, 60, 3), np.uint8)
    left_red[:, :20, 0] = 255
    picture = Picture(Image.fromarray(left_red))
    for stage, red in ((1, False), (2, True)):
        t = trainer(stage)
        seen = t.feeder.views(picture, random.Random(0))[0]
        assert bool((seen[0, :, 0] > 0.5).all()) == red


def test_masks_are_read_in_stage_three_alone_and_no_mask_is_the_whole_picture():
    model, s = make("tiny", stage=3, batch=2)
    feeder = Feeder(s, model, None, 0, 0)
    half = np.zeros((10, 10), bool)
    half[:, 5:] = True
    whole, part = Picture(Image.new("RGB", (10, 10))), Picture(Image.new("RGB", (10, 10)), half)
    found = feeder.masks([whole, part])
    side = model.p.resolution
    assert found.shape == (2, side, side) and (found[0] == 1).all()
    assert (found[1, :, side // 2 :] == 1).all() and (found[1, :, : side // 2] == 0).all()
    assert feeder.masks([whole, whole]) is None
    s.stage = 2
    assert feeder.masks([whole, part]) is None


def test_pretraining_falls_to_nothing_and_leaves_no_gradients(monkeypatch):
    w = torch.nn.Parameter(torch.zeros(3))
    rates = []

    class Watched(torch.optim.AdamW):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    pretrain.fit([w], 40, 0.1, lambda k: ((w - 1) ** 2).sum(), "x")
    expected = [0.1 * min(1, (k + 1) / 20) * 0.5 * (1 + np.cos(np.pi * k / 40)) for k in range(40)]
    assert rates == pytest.approx(expected) and w.grad is None
    monkeypatch.undo()
    model, s = make("digits", scenes=SceneSettings(40, 1, 1, 1, 1))
    kept = pretrain.pretrain(model, WORLD, s, 0)
    assert all(p.grad is None for p in model.parameters()) and all(pretrain.learned(model, k) for k in kept)


def test_alignment_trains_what_reads_the_tokens_alone():
    """The parts that the caption loss of stage 1 trains in every variant, on documents that no run reads so far."""
    model, s = make("digits", scenes=SceneSettings(40, 1, 1, 1, 3), batch=2)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    pretrain.align(model, WORLD, s, 0)
    moved = {recipe.part_of(k) for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert moved == pretrain.ALIGNED == {"eyes", "synchroniser", "gate", "offsets", "soi", "new head"}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert moved <= recipe.trained(1, "deem") & recipe.trained(1, "deem-star") & recipe.trained(1, "clean")
