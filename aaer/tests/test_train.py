"""The loop: it reduces to its baseline, resumes exactly, stops at a loss that is no number, runs on two processes."""

import copy
import gc
import json
import os
import sys
from pathlib import Path

from lab import runs

import pytest
import torch
import torch.nn.functional as F

import evaluation
import train
from settings import Settings
from trainer import Trainer

HERE = Path(train.__file__).parent
CPU = torch.device("cpu")
# A radius at which abnormal examples appear within the 14 steps; a test below checks that they do.
TINY = ["--dataset", "digits", "--eps", "0.6", "--epochs", "2", "--train-limit", "100", "--batch", "16"]
TINY += ["--probe", "20", "--probe-steps", "2", "--test-steps", "3", "--test-restarts", "2", "--device", "cpu"]


def parsed(*args):
    s = runs.parse(Settings, "", [*TINY, *args])
    s.check()
    s.resolve()
    return s


def run_main(monkeypatch, *args):
    gc.collect()  # a traceback may still hold the run before, and with it the lock of its folder
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    train.main()


def trained(*args, seed=0):
    """A trainer after all its epochs, without a run folder."""
    s = parsed(*args)
    t = Trainer(s, CPU)
    t.fresh(seed)
    for _ in range(s.epochs):
        train.train_epoch(t, lambda: None)
        t.epoch, t.batch = t.epoch + 1, 0
    return t


TIMES = ("train_seconds", "train_cpu_seconds", "curve_train_seconds")


def lines(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in rows]


def weights(t):
    return torch.cat([v.flatten() for v in t.model.state_dict().values()])


@pytest.mark.parametrize("start", ["rs", "n", "v"])
def test_without_the_regulariser_aaer_is_the_baseline_bit_for_bit(start):
    common = ["--start", start, "--epochs", "3"]
    base = trained("--method", "fgsm", *common)
    for knob in (["--lambda1", "0"], ["--lambda3", "0"]):
        assert torch.equal(weights(base), weights(trained("--method", "aaer", *common, *knob)))
    with_it = trained("--method", "aaer", *common, "--lambda3", "5")
    assert with_it.sums[0] > 0 and not torch.equal(weights(base), weights(with_it))


def test_lambda2_changes_no_weight_unless_differentiable():
    common = ["--method", "aaer", "--lambda3", "1"]
    a, b = (trained(*common, "--lambda2", v) for v in ("0", "9"))
    assert torch.equal(weights(a), weights(b)) and a.sums[6] < b.sums[6]  # the printed regulariser differs
    c = trained(*common, "--lambda2", "9", "--ce-term", "differentiable")
    assert not torch.equal(weights(a), weights(c))


def test_controls_leave_out_what_they_say():
    """The count alone has no gradient: its run is the baseline's, bit for bit. The other parts and groups train."""
    common = ["--start", "rs", "--lambda3", "5", "--epochs", "3"]
    base = trained("--method", "fgsm", *common)
    runs_of = {k: trained("--method", "aaer", *common, "--term", k) for k in ("count", "full", "difference", "pull")}
    runs_of["random"] = trained("--method", "aaer", *common, "--group", "random")
    assert torch.equal(weights(base), weights(runs_of.pop("count")))
    found = [base, *runs_of.values()]
    assert all(not torch.equal(weights(a), weights(b)) for i, a in enumerate(found) for b in found[:i])
    a, b = base, runs_of["random"]
    assert a.sums[0] > 0 and b.sums[0] > 0  # what is counted are the abnormal examples, whichever are pulled


def test_jitter_moves_the_first_weights_by_rounding_alone():
    ends = []
    for k in ("0", "1", "1", "2"):
        t = Trainer(parsed("--jitter", k), CPU)
        t.fresh(0)
        ends.append(torch.cat([p.detach().flatten() for p in t.model.parameters()]))
    own, one, again, two = ends
    assert torch.equal(one, again) and not torch.equal(one, two) and not torch.equal(own, one)
    assert 1e-7 < (one - own).norm() / own.norm() < 1e-5


HEADERS = {
    "--start rs --eps 8/255": (
        "start noise U(-eps, eps), one step of 1.25 eps",
        "; clamped to",
        "1 |A|/B (2.5 E_A + 1.5 max(V_A",
    ),
    "--start n": ("U(-2 eps, 2 eps), one step of 1 eps", "not clamped", "E_A a constant"),
    "--start v --term pull --ce-term differentiable": ("no start noise", "1.5 V_A)", "E_A with its gradient"),
    "--start v --term difference": ("cross-entropy + 1 (", "max(V_A - V_N, 0)"),
    "--start v --group random": ("as many at random",),
    "--method fgsm --start n": ("U(-2 eps, 2 eps)", "not clamped"),
    "--method pgd --start v --attack-steps 2": ("no start noise, 2 steps of 0.5 eps; clamped",),
    "--method free": ("each of 8 replays",),
    "--method zerograd --start n": ("smallest 35 % entries; clamped",),
    "--method multigrad": ("where 3 starts U(-eps, eps) agree",),
    "--method gradalign": ("penalty 2 (1 - cosine",),
}


def test_the_header_says_in_words_what_is_trained():
    said = {}
    for words in HEADERS:
        t = Trainer(parsed(*words.split()), CPU)
        said[words] = train.describe(t)
    for words, parts in HEADERS.items():
        assert all(part in said[words] for part in parts), said[words]
    assert not any(odd in text for text in said.values() for odd in ("Recipe(", "None", "True", "False"))
    assert len(set(said.values())) == len(HEADERS)


def triangle(k, total, peak, top):
    """(learning rate, momentum) of step k of the cyclic schedule."""
    up = peak * total
    part = k / up if k <= up else (total - k) / (total - up)
    return top * part, 0.9 - 0.1 * part


PLAIN = {
    "aaer": ["--start", "rs", "--lambda1", "0.7", "--lambda3", "3"],
    "free": ["--replays", "3", "--lr", "0.05", "--eps", "0.2"],
}


@pytest.mark.parametrize("method", PLAIN)
def test_an_epoch_equals_a_plain_loop_in_float64(method, monkeypatch):
    """Attack, loss, SGD with momentum and weight decay, and schedule written out, on the same images and noise."""
    s = parsed("--method", method, *PLAIN[method], "--epochs", "1", "--batch", "30", "--peak", "0.4")
    t = Trainer(s, CPU)
    t.fresh(0)
    net = copy.deepcopy(t.model).double().train()
    batches, noises, epoch, noise = [], [], t.train.epoch, t.noise
    monkeypatch.setattr(t.train, "epoch", lambda *a: (batches.append(b) or b for b in epoch(*a)))
    monkeypatch.setattr(t, "noise", lambda n: lambda x, size: noises.append(noise(n)(x, size)) or noises[-1])
    train.train_epoch(t, lambda: None)

    velocity = [torch.zeros_like(p) for p in net.parameters()]
    step, steps, n_abnormal, losses = 0, len(batches) * t.replays, 0, 0.0

    def update(loss):
        nonlocal step, losses
        net.zero_grad()
        loss.backward()
        rate, momentum = triangle(step, steps, 0.4, s.lr)
        with torch.no_grad():
            for p, v in zip(net.parameters(), velocity, strict=True):
                v.mul_(momentum if step else 0).add_(p.grad + 5e-4 * p)
                p -= rate * v
        step, losses = step + 1, losses + loss.item()

    memory = torch.zeros(30, 1, 8, 8, dtype=torch.float64)
    for i, (x, y, _) in enumerate(batches):
        x, b = x.double(), len(y)
        for _ in range(t.replays if method == "free" else 0):
            at = (x + memory[:b]).requires_grad_(True)
            update(F.cross_entropy(net(at), y))
            memory[:b] = (x + (memory[:b] + s.eps * at.grad.sign()).clamp(-s.eps, s.eps)).clamp(0, 1) - x
        if method == "aaer":
            at = (x + noises[i].double()).clamp(0, 1).requires_grad_(True)
            z0 = net(at)
            c0 = F.cross_entropy(z0, y, reduction="none")
            (g,) = torch.autograd.grad(c0.mean(), at)
            delta = (at.detach() - x + 1.25 * s.eps * g.sign()).clamp(-s.eps, s.eps)
            z1 = net((x + delta).clamp(0, 1))
            c1 = F.cross_entropy(z1, y, reduction="none")
            abnormal = [j for j in range(b) if c0[j] > c1[j]]
            normal = [j for j in range(b) if c0[j] <= c1[j]]
            loss, n_abnormal = c1.mean(), n_abnormal + len(abnormal)
            if abnormal and normal:
                e_a = sum((c0[j] - c1[j]).item() for j in abnormal) / len(abnormal)
                v_a = sum((z0[j].detach() - z1[j]).square().sum() for j in abnormal) / len(abnormal)
                v_n = sum((z0[j] - z1[j]).square().sum().item() for j in normal) / len(normal)
                loss = loss + 0.7 * len(abnormal) / b * (s.lambda2 * e_a + 3 * max(v_a - v_n, 0))
            update(loss)
    assert step == t.scheduler.last_epoch and t.sums[0].item() == n_abnormal and (n_abnormal > 5 or method == "free")
    assert t.sums[5].item() == pytest.approx(losses, rel=1e-4)
    for a, b in zip(t.model.state_dict().values(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=2e-4, rtol=2e-3)


def test_noise_is_not_the_stream_that_made_the_weights():
    t = Trainer(parsed(), CPU)
    t.fresh(5)
    stem = t.model[1].stem.weight.detach().contiguous().flatten()
    draw = t.noise(16)(torch.zeros(16, 1, 8, 8), 1.0).permute(0, 2, 3, 1).flatten()[: len(stem)]
    assert torch.corrcoef(torch.stack([stem, draw]))[0, 1].abs() < 0.5


def test_statistics_are_taken_in_train_mode_and_updated_twice_a_step():
    s = parsed("--method", "aaer", "--start", "v", "--batch", "100")
    t = Trainer(s, CPU)
    t.fresh(0)
    train.train_epoch(t, lambda: None)
    assert t.model.training and int(t.model[1].norm.num_batches_tracked) == 2


def test_cyclic_schedule_moves_the_momentum_against_the_rate():
    s = parsed("--epochs", "4", "--batch", "10")
    t = Trainer(s, CPU)
    t.fresh(0)
    seen = []
    for _ in range(40):
        group = t.optimizer.param_groups[0]
        seen.append((group["lr"], group["momentum"]))
        t.optimizer.step()
        t.scheduler.step()
    assert seen[0] == (0.0, 0.9) and seen[20] == (pytest.approx(0.2), pytest.approx(0.8))
    assert seen[10] == (pytest.approx(0.1), pytest.approx(0.85)) and seen[30][0] == pytest.approx(0.1)
    assert t.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_multistep_schedule():
    t = Trainer(parsed("--epochs", "4", "--batch", "10", "--schedule", "multistep"), CPU)
    t.fresh(0)
    seen = []
    for _ in range(40):
        seen.append(t.optimizer.param_groups[0]["lr"])
        t.optimizer.step()
        t.scheduler.step()
    assert seen == [pytest.approx(0.2)] * 20 + [pytest.approx(0.02)] * 10 + [pytest.approx(0.002)] * 10


def test_published_settings_of_every_data_set():
    def resolved(**k):
        s = Settings(**k)
        s.check()
        s.resolve()
        return s

    s = resolved(dataset="svhn", start="n")
    assert (s.epochs, s.lr, s.peak, s.radius_warmup, s.noise, s.model) == (15, 0.05, 0.4, 5.0, 2.0, "preact18")
    assert resolved(dataset="svhn", method="fgsm", start="n", eps=12 / 255).noise == 3.0
    s = resolved(dataset="cifar10", eps=16 / 255)
    assert (s.epochs, s.lr, s.peak, s.step, s.lambda3, s.batch, s.weight_decay) == (30, 0.2, 0.5, 1.25, 3.25, 128, 5e-4)
    assert s.published and not resolved(dataset="svhn").published and s.label == "RS-AAER"
    assert not resolved(dataset="cifar10", eps=16 / 255, lambda3=1.0).published
    assert not resolved(dataset="cifar10", eps=16 / 255, model="wrn-34-10").published
    assert resolved(dataset="tiny-imagenet").model == "preact18-act"
    assert resolved(dataset="imagenet100").model == "resnet18-cosine"
    assert resolved(dataset="cifar10", method="pgd", attack_steps=2).step == 0.5
    assert resolved(dataset="cifar100", method="zerograd").zero_share == 0.45


def test_free_training_keeps_its_perturbation_and_updates_at_every_replay():
    t = trained("--method", "free", "--replays", "3", "--epochs", "1")
    assert t.sums[9] == 3 * len(t.train) and 0 < t.memory.abs().max() <= 0.6 + 1e-6


def test_bf16_and_channels_last_train_about_the_same():
    a, b = (trained("--method", "aaer", "--precision", p) for p in ("fp32", "bf16"))
    assert weights(b).isfinite().all() and weights(b).dtype == torch.float32
    gap = (a.sums - b.sums).abs() / a.sums.abs().clamp(min=1)
    assert gap[5] < 0.1 and not torch.equal(weights(a), weights(b))
    assert a.model[1].stem.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_compiled_network_trains_about_the_same():
    a, b = trained("--method", "aaer", "--epochs", "1"), trained("--method", "aaer", "--epochs", "1", "--compile")
    assert (a.sums[5] - b.sums[5]).abs() / a.sums[5] < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_trains_like_the_cpu(tmp_path, monkeypatch):
    for device in ("cpu", "cuda"):
        run_main(monkeypatch, *TINY, "--device", device, "--out", str(tmp_path / device))
    a, b = (lines(tmp_path / d / "seed0" / "metrics.jsonl")[0] for d in ("cpu", "cuda"))
    assert a["loss"] == pytest.approx(b["loss"], rel=0.1)  # other noise, same course


@pytest.mark.realdata
def test_cifar_trains_for_a_few_steps(tmp_path, monkeypatch):
    folder = Path(os.environ.get("REPRO_DATA", "data"))
    if not (folder / "cifar10").exists() and not (folder / "cifar-10-batches-py").exists():
        pytest.skip("no CIFAR-10 under $REPRO_DATA")
    args = [
        "--dataset",
        "cifar10",
        "--model",
        "preact-small",
        "--epochs",
        "2",
        "--train-limit",
        "1000",
        "--probe",
        "50",
    ]
    args += ["--eval-limit", "50", "--test-steps", "2", "--test-restarts", "1"]
    run_main(monkeypatch, *args, "--out", str(tmp_path / "r"))
    record = runs.read_record(tmp_path / "r" / "seed0" / "record.json")
    assert record["data"]["n"] == 1000 and record["metrics"]["published_lambdas"] == 0  # of another network
    assert record["metrics"]["curve_loss"][1] < record["metrics"]["curve_loss"][0]


# ---------------------------------------------------------------------------------------------- course of training


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


def test_summary_says_what_was_there_before_the_collapse():
    rows = curve((40, 30), (45, 35), (50, 34), (90, 1))
    for row, share in zip(rows, (0.01, 0.02, 0.05, 0.4), strict=True):
        row |= {"abnormal": share, "gap": 10 * share, "train_seconds": 2.0, "train_cpu_seconds": 1.0}
    s = evaluation.summary(rows)
    assert (s["co_epoch"], s["collapsed"], s["abnormal_at_co"], s["abnormal_before_co"]) == (4, 1, 0.4, 0.02)
    assert s["abnormal_previous_co"] == 0.05
    first = evaluation.summary([{**row, "probe_pgd": 1, "probe_fgsm": 60} for row in rows])
    assert first["co_epoch"] == 1 and not {"abnormal_previous_co", "abnormal_before_co"} & set(first)
    assert (
        s["abnormal_final"] == 0.4
        and s["gap_final"] == 4.0
        and s["train_seconds_epoch"] == 2.0
        and s["probe_pgd_best"] == 35
    )


def test_evaluation_leaves_training_untouched():
    a, b = (Trainer(parsed(), CPU) for _ in range(2))
    for t in (a, b):
        t.fresh(0)
    evaluation.attack_all(a.model, a.test, a.probe, 0.1, 2, 1, 0)
    evaluation.surface(a.model, *next(a.test.in_order(a.probe[:2])), 0.1, points=3)
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
