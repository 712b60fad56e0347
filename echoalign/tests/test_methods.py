"""Losses of the baselines against loops; methods that reduce to others at the limit of a knob."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import settings
from waits import Waits

import methods
import models
import readers
import trainer
from baselines import promix, selection, semi, single
from generator import nets
from readers import Part
from settings import METHODS
from trainer import Learner, Task, fit

CPU = torch.device("cpu")


def case(b=6, c=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(b, c, generator=g, dtype=torch.float64)
    t = torch.softmax(torch.randn(c, c, generator=g, dtype=torch.float64) + 2 * torch.eye(c), 1)
    return z, torch.randint(c, (b,), generator=g), t


def soft(z):
    return [[math.exp(v) / sum(math.exp(w) for w in row) for v in row] for row in z.tolist()]


def test_forward_loss():
    z, y, t = case()
    p, total = soft(z), 0.0
    for b in range(6):
        total -= math.log(sum(p[b][i] * float(t[i, y[b]]) for i in range(4)))
    assert float(single.forward_loss(z, y, t)) == pytest.approx(total / 6)
    assert float(single.forward_loss(z, y, t.expand(6, 4, 4))) == pytest.approx(total / 6)
    plain = single.forward_loss(z, y, torch.eye(4, dtype=torch.float64))
    assert float(plain) == pytest.approx(float(F.cross_entropy(z, y)))


def test_reweight_loss():
    z, y, t = case()
    p, total = soft(z), 0.0
    for b in range(6):
        k = int(y[b])
        w = p[b][k] / sum(p[b][i] * float(t[i, k]) for i in range(4))
        total -= w * math.log(p[b][k])
    assert float(single.reweight_loss(z, y, t)) == pytest.approx(total / 6)
    z.requires_grad_(True)
    plain = single.reweight_loss(z.detach(), y, torch.eye(4, dtype=torch.float64))
    assert float(plain) == pytest.approx(float(F.cross_entropy(z.detach(), y)))
    one = torch.autograd.grad(single.reweight_loss(z, y, t), z)[0]
    two = torch.autograd.grad(single.reweight_loss(z, y, t, detach=False), z)[0]
    assert not torch.allclose(one, two)


def test_anchor_matrix():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]])
    assert torch.allclose(single.anchor_matrix(p, 100), torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    assert torch.allclose(single.anchor_matrix(p, 50), torch.tensor([[0.5, 0.5], [0.6, 0.4]]))


def test_part_matrices_explain_the_anchors():
    h = torch.eye(2).repeat(10, 1)
    p = torch.where(h[:, :1] > 0, torch.tensor([[0.7, 0.3]]), torch.tensor([[0.1, 0.9]]))
    parts = single.part_matrices(h, p, 20, 1500, 0)
    assert torch.allclose(parts.sum(2), torch.ones(2, 2))
    assert torch.allclose(parts[0], torch.tensor([[0.7, 0.3]]).expand(2, 2), atol=0.03)
    # Only the surest samples of a class are anchors: others, told to be different, do not count.
    sure = torch.tensor([[0.95, 0.05]] * 5 + [[0.05, 0.95]] * 5 + [[0.5, 0.5]] * 30)
    parts = single.part_matrices(torch.ones(40, 1), sure, 5, 1500, 0)
    assert torch.allclose(parts[0], torch.tensor([[0.95, 0.05], [0.05, 0.95]]), atol=0.03)


def test_elr_loss_and_its_limit():
    z, y, _ = case()
    target = torch.softmax(case(seed=1)[0], 1)
    p, total = soft(z), 0.0
    for b in range(6):
        total += -math.log(p[b][y[b]]) + 3.0 * math.log(
            1 - sum(a * float(t) for a, t in zip(p[b], target[b], strict=True))
        )
    assert float(single.elr_loss(z, y, target, 3.0)) == pytest.approx(total / 6, rel=1e-3)
    assert float(single.elr_loss(z, y, target, 0.0)) == pytest.approx(float(F.cross_entropy(z, y)))


def test_cores_values_and_sieve():
    z, y, _ = case()
    prior = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    found, score = single.cores_values(z, y, prior, 2.0), single.cores_score(z, y)
    for b, row in enumerate(soft(z)):
        ce = [-math.log(v + 1e-8) for v in row]
        assert float(found[b]) == pytest.approx(
            ce[y[b]] - 2 * sum(float(q) * v for q, v in zip(prior, ce, strict=True))
        )
        assert float(score[b]) == pytest.approx(ce[y[b]] - sum(ce) / 4)
    sure = torch.tensor([[9.0, 0, 0, 0]])
    assert single.cores_score(sure, torch.tensor([0])) < 0 < single.cores_score(sure, torch.tensor([1]))


def test_coteaching_exchanges_the_small_losses():
    z1 = torch.tensor([[5.0, 0], [0, 5.0], [0, 0], [3.0, 0]])
    z2 = torch.tensor([[0, 5.0], [5.0, 0], [0, 9.0], [0, 0]])
    y = torch.tensor([0, 0, 1, 0])
    a, b = (F.cross_entropy(z, y, reduction="none") for z in (z1, z2))
    one, two = single.coteaching_losses(z1, z2, y, 0.5)  # net 1 finds 0, 3 easy; net 2 finds 2, 1
    assert float(one) == pytest.approx(float(a[[1, 2]].mean())) and float(two) == pytest.approx(float(b[[0, 3]].mean()))
    assert len(single.small_loss(a, 0.0)) == 1


def test_jocor_values():
    z1, y, _ = case()
    z2 = case(seed=2)[0]
    found = single.jocor_values(z1, z2, y, 0.3)
    for b, (p, q) in enumerate(zip(soft(z1), soft(z2), strict=True)):
        ce = -math.log(p[y[b]]) - math.log(q[y[b]])
        kl = sum(u * math.log(u / v) + v * math.log(v / u) for u, v in zip(p, q, strict=True))
        assert float(found[b]) == pytest.approx(0.7 * ce + 0.3 * kl)


def test_dividemix_parts():
    losses = torch.cat([torch.rand(60) * 0.2, 2 + torch.rand(30)])
    p = semi.clean_probability(semi.scaled(losses))
    assert semi.scaled(losses).min() == 0 and semi.scaled(losses).max() == 1 and not semi.scaled(torch.ones(5)).any()
    assert (p[:60] > 0.5).all() and (p[60:] < 0.5).all()
    assert semi.clean_probability(torch.ones(5)).tolist() == [0.5] * 5
    assert semi.sharpen(torch.tensor([[0.8, 0.2]]))[0].tolist() == pytest.approx([0.64 / 0.68, 0.04 / 0.68])
    x, y = semi.mix(torch.tensor([[1.0], [3.0]]), torch.eye(2), 0.75, torch.tensor([1, 0]))
    assert x[:, 0].tolist() == [1.5, 2.5] and y[0].tolist() == [0.75, 0.25]
    s = settings()
    assert [semi.unlabelled_weight(s, r, n) for r, n in ((0.2, "symmetric"), (0.4, "asymmetric"), (0.5, "instance"),
            (0.8, "symmetric"))] == [0, 0, 25, 150]  # fmt: skip
    assert semi.unlabelled_weight(settings("--divide.lambda-u", "3"), 0.2, "symmetric") == 3


# -------------------------------------------------------------------------------------------------------- the selectors


def test_knn_agreement_against_loops():
    g = torch.Generator().manual_seed(0)
    f, y = torch.randn(40, 5, generator=g), torch.randint(3, (40,), generator=g)
    found = selection.knn_agreement(f, y, 5, chunk=7)
    u = F.normalize(f, dim=1)
    for i in range(40):
        order = sorted((j for j in range(40) if j != i), key=lambda j: -float(u[i] @ u[j]))[:5]
        assert float(found[i]) == pytest.approx(sum(int(y[j]) == int(y[i]) for j in order) / 5, abs=2e-3)


def test_clipcleaner_and_cleanlab_find_planted_errors():
    g = torch.Generator().manual_seed(0)
    true = torch.arange(90) % 3
    y = true.clone()
    y[:12] = (y[:12] + 1) % 3
    p = 0.9 * F.one_hot(true, 3) + 0.1 * torch.rand(90, 3, generator=g)
    p = p / p.sum(1, keepdim=True)
    for score, kept in (selection.clipcleaner(p, p, y), selection.cleanlab(p, y)):
        assert not kept[:12].any() and kept[12:].float().mean() > 0.9
        assert float(score[:12].max()) < float(score[12:].min())
    # Either posterior can refuse a sample, and so can the ratio of a label that the mixture would keep.
    doubt = p.clone()
    doubt[20] = F.one_hot((y[20] + 1) % 3, 3) * 0.98 + 0.01
    both, one = selection.clipcleaner(p, doubt, y)[1], selection.clipcleaner(p, p, y)[1]
    assert one[20] and not both[20] and torch.equal(both[21:], one[21:])
    flat = torch.full((90, 3), 0.2) + 0.3 * F.one_hot((y + 1) % 3, 3) + 0.1 * F.one_hot(y, 3)  # p_y / max p = 0.6
    assert not selection.clipcleaner(flat, flat, y)[1].any()
    alone = torch.zeros(4).long()
    assert selection.cleanlab(torch.ones(4, 3) / 3, alone)[1].all()
    assert selection.logistic(torch.randn(4, 2), alone)[:, 0].tolist() == [1, 1, 1, 1]


# ------------------------------------------------------------------------------------------------------------- the loop


def task(n=40, **more):
    d = readers.load("digits", trainer.Path("."), seed=0)
    return Task(d.train.x[:n], d.train.y[:n], Part(d.test.x[:30], d.test.y[:30]), d.kind, **more)


def run(cls, path, s, t):
    learner = cls(s, t, 0, CPU)
    curve, _ = fit(learner, path / "c.safetensors", show=False)
    return learner, curve


def test_echo_without_modified_images_is_cross_entropy(tmp_path):
    s, t = settings("--finetune", "0"), task()
    other = task(c=torch.zeros(40).long(), tune=Part(t.x[:0], t.y[:0]))
    one, a = run(Learner, tmp_path / "a", s, t)
    two, b = run(methods.Echo, tmp_path / "b", s, other)
    assert all(torch.equal(v, w) for v, w in zip(one.plain[0].parameters(), two.plain[0].parameters(), strict=True))
    assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], rel=1e-6)


def test_echo_switches_change_the_training_and_fine_tuning_keeps_rate_and_momentum(tmp_path):
    t = task()
    mixed = task(c=(torch.arange(40) >= 10).long(), tune=Part(t.x[:10], t.y[:10]))
    found = {}
    for name, args in {"cross": [], "equal": ["--weighting", "equal"], "swapped": ["--weighting", "swapped"],
                       "sum": ["--normalise"]}.items():  # fmt: skip
        learner, curve = run(methods.Echo, tmp_path / name, settings(*args), mixed)
        found[name] = round(curve[-1]["loss"], 6)
        assert [r["main"] for r in curve] == [1, 1, 1, 0, 0]
        assert curve[-1]["lr"] == pytest.approx(0.1 * 0.1**2)  # as the schedule left it
    assert len(set(found.values())) == 4
    assert len(learner.optimizers) == 1 and learner.optimizers[0].state


def test_pair_methods_forget_nothing_at_rate_zero(tmp_path):
    learner = single.CoTeaching(settings(), task(rho=0.4), 0, CPU)
    assert [round(learner.keep(e), 3) for e in (0, 4, 9, 50)] == [0.96, 0.8, 0.6, 0.6]
    learner = single.CoTeaching(settings(), task(rho=0.4, noise="asymmetric"), 0, CPU)
    assert learner.keep(50) == pytest.approx(0.8)
    learner = single.CoTeaching(settings("--pair.forget-rate", "0"), task(rho=0.4), 0, CPU)
    assert learner.keep(50) == 1
    a, b = (next(iter(n.parameters())) for n in learner.plain)
    assert not torch.equal(a, b)


def test_crop_and_flip_against_loops():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(1, 256, (5, 6, 7, 3), generator=g, dtype=torch.uint8)
    draw = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    out = trainer.crop_and_flip(x, 2, True, torch.Generator().manual_seed(1))
    padded = F.pad(x, (0, 0, 2, 2, 2, 2))
    for i in range(5):
        top, left = int(draw[0, i] * 5), int(draw[1, i] * 5)
        piece = padded[i, top : top + 6, left : left + 7]
        assert torch.equal(out[i], piece.flip(1) if draw[2, i] < 0.5 else piece)
    assert torch.equal(trainer.crop_and_flip(x, 0, False, g), x)


SIZES = [("cnn", 16, 0.09e6, 0.11e6), ("resnet18", 32, 11.1e6, 11.3e6)]
SIZES += [("resnet34", 32, 21.2e6, 21.4e6), ("resnet18-w16", 32, 0.69e6, 0.71e6)]


@pytest.mark.parametrize(("name", "size", "low", "high"), SIZES)
def test_networks_have_the_sizes_of_the_specification(name, size, low, high):
    net = models.build(name, 10, 3, (0.5,) * 3, (0.25,) * 3)
    assert low < sum(p.numel() for p in net.parameters()) < high
    net.eval()
    assert (
        net(torch.rand(2, 3, size, size)).shape == (2, 10) and (net.features(torch.rand(2, 3, size, size)) >= 0).all()
    )


# ------------------------------------------------------------------------------------------ a GPU is not waited for


@pytest.mark.parametrize("method", ["ce", "echoalign", "forward", "t-revision", "elr", "cores", "co-teaching", "jocor"])
def test_no_training_step_makes_the_host_wait(method, monkeypatch):
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)  # its counter of steps lies on the host
    t = task(c=(torch.arange(40) >= 10).long(), rho=0.4, noise="instance")
    t.tune = Part(t.x[:10], t.y[:10])
    learner = METHODS[method][1](settings("--batch", "8"), t, 0, CPU)
    for phase in [p.name for p in learner.phases()]:
        learner.phase = phase
        learner.begin(phase)
        with Waits() as found:
            learner.epoch(phase, 1, 3)
        assert not found.places


def test_the_waits_of_dividemix_promix_and_the_generator_are_once_an_epoch_or_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(
        F, "one_hot", lambda y, c: torch.eye(c)[y].long()
    )  # the library's reads its input on a CPU only
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    divide = semi.DivideMix(settings("--divide.batch", "8"), task(rho=0.4, noise="instance"), 0, CPU)
    crops, draw = divide.draws(3, 0)
    with Waits() as found:
        divide.mixmatch(0, torch.arange(8), torch.arange(8, 16), torch.ones(8), crops, draw, 0.5)
    assert not found.places
    own = promix.ProMix(settings("--promix.batch", "8"), task(rho=0.4, noise="instance"), 0, CPU)
    monkeypatch.setattr(own, "stronger", lambda x, seed: x)  # draws on the host
    crops, draw = own.draws(3, 0)
    with Waits() as found:
        own.promix_step(torch.arange(8), [torch.arange(8) < 4] * 2, 600, crops, draw)
    assert len(found.places) == 2 and all(p.endswith(" nonzero") for p in found.places)  # the size of what is mixed
    d = readers.load("digits", tmp_path, seed=0)
    told = {"seed": 0, "steps": 6, "batch": 4, "lr": 1e-3, "widths": (8,), "layers": 1, "control": "ink"}
    monkeypatch.setattr(nets, "_save", lambda *args: None)
    with Waits() as found:
        nets.train("concat", d.pre.x, d.pre.y, 10, tmp_path, CPU, **told, every=3, show=False)
    assert len([p for p in found.places if p.startswith("generator/nets.py")]) == 2  # the loss at each checkpoint
