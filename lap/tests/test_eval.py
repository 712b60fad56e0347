"""What is read from the course of training, and the evaluation: it attacks as defined and touches nothing."""

from lab import runs

import pytest
import torch
import torch.nn.functional as F
from test_train import CPU, parsed, weights

import evaluation
import train
from trainer import Trainer


def curve(*rows):
    return [{"epoch": i + 1, "probe_fgsm": f, "probe_pgd": p} for i, (f, p) in enumerate(rows)]


def test_onset_of_overfitting():
    """The first epoch from which the final state persists: PGD accuracy lost, FGSM accuracy 10 points above it."""
    assert evaluation.onset(curve((40, 30), (50, 35), (80, 4), (90, 0))) == 3
    assert evaluation.onset(curve((40, 30), (50, 35), (20, 16))) is None  # fell with FGSM: no overfitting to it
    assert evaluation.onset(curve((40, 30), (42, 28))) is None  # none
    assert evaluation.onset(curve((40, 30), (60, 3), (41, 29))) is None  # it recovered
    assert evaluation.onset(curve((40, 30), (60, 3), (41, 29), (80, 0), (85, 2))) == 4  # and was lost later again
    assert evaluation.onset(curve((35, 4), (60, 1), (80, 0))) == 1  # collapsed in the first epoch
    assert evaluation.onset(curve((20, 12), (35, 7), (50, 6), (60, 8), (70, 0))) == 2  # hovers below chance
    assert evaluation.onset(curve(*[(40, 30)] * 9, (90, 0))) == 10  # in the last epoch
    assert evaluation.onset(curve((9, 8), (10, 9), (12, 8))) is None  # never learnt, and FGSM neither
    assert evaluation.onset(curve((40, 30), (26, 14), (22, 14))) is None  # below half, but FGSM only 8 points above
    assert evaluation.onset(curve((6, 4), (30, 3), (50, 1)), chance=1.0) == 3  # 100 classes: 3 % is no chance level


def test_summary_keeps_the_course_and_the_onset():
    rows = curve((40, 30), (45, 35), (50, 34), (90, 1))
    for k, row in enumerate(rows):
        row |= {"norm": [1.0 + k, 2.0], "train_seconds": 2.0 + 10 * (k == 0), "train_cpu_seconds": 1.0}
    s = evaluation.summary(rows)
    assert (s["co_epoch"], s["collapsed"], s["epochs"], s["probe_pgd_best"]) == (4, 1, 4, 35)
    assert s["curve_norm"][3] == [4.0, 2.0] and s["train_seconds_epoch"] == 2.0 and "curve_distortion" not in s


def test_evaluation_leaves_training_untouched():
    a, b = (Trainer(parsed(), CPU) for _ in range(2))
    for t in (a, b):
        t.fresh(0)
    evaluation.attack_all(a.model, a.test, a.probe, 0.1, 2, 1, 0)
    for t in (a, b):
        train.train_epoch(t, lambda: None)
    assert torch.equal(weights(a), weights(b)) and a.model.training


def test_evaluation_attacks_as_defined(monkeypatch):
    """FGSM of one step eps from the image; PGD of steps eps/4 from U(-eps, eps); a clean error is never robust."""
    t = Trainer(parsed(), CPU)
    t.fresh(0)
    calls, fgsm, strongest = [], evaluation.attacks.fgsm, evaluation.attacks.strongest

    def watch(model, x, y, *args):
        assert not model.training
        calls.append(args)
        return strongest(model, x, y, *args)

    monkeypatch.setattr(evaluation.attacks, "strongest", watch)
    monkeypatch.setattr(
        evaluation.attacks, "fgsm", lambda model, x, y, eps: calls.append(eps) or fgsm(model, x, y, eps)
    )
    found = evaluation.attack_all(t.model, t.test, t.probe, 0.4, 7, 3, 0)
    assert calls[0] == 0.4 and calls[1][:4] == (0.4, 0.1, 7, 3) and found["pgd"] <= found["clean"]
    x, y = next(t.test.in_order(t.probe))
    wrong = t.model.eval()(x).argmax(1) != y
    monkeypatch.setattr(evaluation.attacks, "strongest", lambda *_: (None, torch.ones(len(x), dtype=torch.bool)))
    all_robust = evaluation.attack_all(t.model, t.test, t.probe, 0.4, 7, 3, 0)
    assert wrong.any() and all_robust["pgd"] == all_robust["clean"] == pytest.approx(
        100 * (~wrong).float().mean().item()
    )
    delta = fgsm(t.model, x, y, 0.4)
    x.requires_grad_(True)
    (g,) = torch.autograd.grad(F.cross_entropy(t.model(x), y), x)
    torch.testing.assert_close(x + delta, (x + 0.4 * g.sign()).clamp(0, 1))


def test_a_network_without_finite_outputs_gets_no_accuracy():
    t = Trainer(parsed(), CPU)
    t.fresh(0)
    t.model[1].linear.bias.data[0] = torch.nan
    with pytest.raises(runs.UserError, match="not finite on 20 of 20 test images"):
        evaluation.attack_all(t.model, t.test, t.probe, 0.1, 1, 1, 0)


def test_time_of_an_epoch_leaves_out_the_first_and_those_that_were_cut():
    rows = curve((40, 30), (45, 35), (50, 34), (50, 34))
    for row, seconds in zip(rows, (9.0, None, 2.0, 4.0), strict=True):
        row |= {} if seconds is None else {"train_seconds": seconds, "train_cpu_seconds": 2 * seconds}
    found = evaluation.summary(rows)
    assert (found["train_seconds_epoch"], found["train_cpu_seconds_epoch"]) == (3.0, 6.0)
    assert evaluation.summary(rows[:1])["train_seconds_epoch"] == 9.0
    assert "train_seconds_epoch" not in evaluation.summary(rows[1:2])
