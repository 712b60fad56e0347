"""The loop: it reduces to its baseline, resumes exactly, stops at a loss that is no number, runs on two processes."""

import copy
import gc
import json
import math
import os
import sys
from pathlib import Path

from lab import runs

import pytest
import torch
import torch.nn.functional as F

import lap
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


TIMES = ("train_seconds", "train_cpu_seconds", "curve_train_seconds")


def lines(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in rows]


def trained(*args, seed=0):
    """A trainer after all its epochs, without a run folder."""
    s = parsed(*args)
    t = Trainer(s, CPU)
    t.fresh(seed)
    for _ in range(s.epochs):
        train.train_epoch(t, lambda: None)
        t.epoch, t.batch = t.epoch + 1, 0
    return t


def weights(t):
    return torch.cat([v.flatten() for v in t.model.state_dict().values()])


@pytest.mark.parametrize("start", ["r", "n", "v"])
def test_with_beta_zero_lap_is_the_baseline_bit_for_bit(start):
    base = trained("--method", "fgsm", "--start", start)
    for variant in ("lap", "modified-awp"):
        zero = trained("--method", "lap", "--start", start, "--beta", "0", "--variant", variant)
        assert torch.equal(weights(base), weights(zero))
        assert all(torch.equal(a, b) for a, b in zip(momenta(base), momenta(zero), strict=True))
    assert not torch.equal(weights(base), weights(trained("--method", "lap", "--start", start, "--beta", "0.01")))


def momenta(t):
    return [t.optimizer.state[p]["momentum_buffer"] for p in t.model.parameters()]


def test_variants_and_directions_are_different_methods():
    ends = {v: weights(trained("--method", "lap", "--variant", v, "--beta", "0.1")) for v in lap.RECIPES}
    ends |= {
        d: weights(trained("--method", "lap", "--beta", "0.1", "--weight-direction", d)) for d in ("ascent", "random")
    }
    names = [k for k in ends if k != "random"]
    assert torch.equal(ends["random"], ends["lap-r"])
    assert not any(torch.equal(ends[a], ends[b]) for a in names for b in names if a < b)


def test_gamma_near_zero_moves_the_first_layer_alone():
    """Against a run whose sizes are set by hand."""
    s = parsed("--method", "lap", "--gamma", "0", "--beta", "0.1")
    t = Trainer(s, CPU)
    t.fresh(0)
    assert t.sizes[0] == pytest.approx(0.1) and t.sizes[1:].abs().max() == 0 and len(t.sizes) == 10
    t = trained("--method", "lap", "--variant", "modified-awp", "--beta", "0.1")
    assert torch.equal(t.sizes, torch.full((10,), 0.1))


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
    "--start r --eps 8/255": (
        "U(-eps, eps), one step of 1.25 eps",
        "; clamped to",
        "along the next SGD step at x + eta",
        "beta 0.002",
    ),
    "--start n": ("U(-2 eps, 2 eps), one step of 1 eps", "not clamped", "kept; beta"),
    "--start v --variant awp": (
        "against the gradient at x + delta (a pass",
        "taken back after the step",
        "lambda_i = 1,",
    ),
    "--start v --variant lap-uniform": ("lambda_i = the mean of 1 - (ln i / ln L)^gamma, gamma 0.3, L = 10",),
    "--start v --variant lap-reversed": ("the last layer first",),
    "--start v --variant lap-undone": ("along the next SGD step", "taken back after the step"),
    "--start v --variant lap-r": ("at random, not along",),
    "--start v --variant lap-linf": ("in l_inf",),
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


PLAIN = [
    ("v", "lap"),
    ("r", "lap"),
    ("n", "lap"),
    ("r", "awp"),
    ("r", "modified-awp"),
    ("r", "lap-a"),
    ("v", "lap-linf"),
    ("r", "lap-r"),
]


@pytest.mark.parametrize(("start", "variant"), PLAIN)
def test_an_epoch_equals_a_plain_loop_in_float64(start, variant, monkeypatch):
    """Attack, trial step on a copy of network and optimiser, SGD with momentum and weight decay, and schedule written
    out, on the same images and noise; a last batch that is smaller, and a first step with rate 0."""
    s = parsed(
        "--start", start, "--variant", variant, "--epochs", "1", "--batch", "30", "--peak", "0.4", "--beta", "0.2"
    )
    t = Trainer(s, CPU)
    t.fresh(0)
    t.model.double()
    levels = [1.0] * 10 if "awp" in variant else lap.schedule(10, 0.3)
    torch.testing.assert_close(t.sizes, 0.2 * torch.tensor(levels))
    t.sizes = 0.2 * torch.tensor(levels, dtype=torch.float64)  # float32 would be seen at the tolerance below
    net = copy.deepcopy(t.model).train()
    batches, noises, epoch, noise = [], [], t.train.epoch, t.noise
    doubled = lambda *a: (batches.append((x.double(), y)) or (x.double(), y, n) for x, y, n in epoch(*a))  # noqa: E731
    monkeypatch.setattr(t.train, "epoch", doubled)
    draw = lambda n: lambda x, size: noises.append(noise(n)(x, size).double()) or noises[-1]  # noqa: E731
    monkeypatch.setattr(t, "noise", draw)
    wide = lambda z: z if z.is_floating_point() else z.to(torch.float32)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "float", wide)  # losses are taken in float32 otherwise
    drawn, normal = [], torch.Tensor.normal_
    monkeypatch.setattr(torch.Tensor, "normal_", lambda w, **k: drawn.append(normal(w, **k).clone()) or w)
    train.train_epoch(t, lambda: None)

    names = [k for k, p in net.named_parameters() if "weight" in k and p.dim() > 1]
    velocity = {k: torch.zeros_like(p) for k, p in net.named_parameters()}
    a, k_noise, ball = {"v": (1, 0, True), "r": (1.25, 1, True), "n": (1, 2, False)}[start]

    def step_of(net, velocity, rate, momentum, first, decay=5e-4):
        """SGD in place on the gradients that are there."""
        with torch.no_grad():
            for k, p in net.named_parameters():
                velocity[k] = (0 if first else momentum) * velocity[k] + p.grad + decay * p
                p -= rate * velocity[k]

    def backward(net, x, y, sign=1):
        net.zero_grad()
        x = x.clone().requires_grad_(True)
        (sign * F.cross_entropy(net(x), y)).backward()
        return x.grad

    for i, (x, y) in enumerate(batches):
        rate, momentum = triangle(i, len(batches), 0.4, s.lr)
        eta = (x + noises[i]).clamp(0, 1) - x if k_noise else torch.zeros_like(x)
        delta = eta + a * s.eps * backward(net, x + eta, y).sign()
        delta = delta.clamp(-s.eps, s.eps) if ball else delta
        delta = (x + delta).clamp(0, 1) - x
        if variant in ("awp", "lap-a"):
            backward(net, x + delta, y)
        trial = copy.deepcopy(net)
        for p, q in zip(trial.parameters(), net.parameters(), strict=True):
            p.grad = -q.grad if variant == "awp" else q.grad.clone()
        if variant == "awp":
            step_of(trial, copy.deepcopy(velocity), rate, 0.0, True, 0.0)
        else:
            step_of(trial, copy.deepcopy(velocity), rate, momentum, i == 0)
        moves = {}
        for j, k in enumerate(names, 1):
            w = net.get_parameter(k).detach()
            moved = trial.get_parameter(k).detach() - w
            moved = -rate * drawn[10 * i + j - 1] if variant == "lap-r" else moved
            level = 1 - (math.log(j) / math.log(len(names))) ** 0.3 if j > 1 else 1
            level = 1 if "awp" in variant else level
            if variant == "lap-linf":
                moves[k] = s.beta * level * w.abs().mean() * moved.sign()
            else:
                moves[k] = s.beta * level * w.norm() / (moved.norm() + 1e-20) * moved
        with torch.no_grad():
            for k in names:
                net.get_parameter(k).add_(moves[k])
        backward(net, x + delta, y)
        step_of(net, velocity, rate, momentum, i == 0)
        with torch.no_grad():
            for k in names if variant == "awp" else ():
                net.get_parameter(k).sub_(moves[k])
    assert len(batches) == 4 and len(batches[-1][1]) == 10 and t.scheduler.last_epoch == 4
    for (k, v), w in zip(t.model.state_dict().items(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(v, w, atol=1e-9, rtol=1e-7, msg=lambda m, k=k: f"{k}: {m}")
    for (k, _), v in zip(net.named_parameters(), momenta(t), strict=True):
        torch.testing.assert_close(v, velocity[k], atol=1e-9, rtol=1e-7, msg=lambda m, k=k: f"{k}: {m}")


def test_free_training_equals_a_plain_loop(monkeypatch):
    s = parsed("--method", "free", "--replays", "3", "--lr", "0.05", "--eps", "0.2", "--epochs", "1", "--batch", "30")
    t = Trainer(s, CPU)
    t.fresh(0)
    net, epoch, batches = copy.deepcopy(t.model).double().train(), t.train.epoch, []
    monkeypatch.setattr(t.train, "epoch", lambda *a: (batches.append(b) or b for b in epoch(*a)))
    train.train_epoch(t, lambda: None)
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    memory, step = torch.zeros(30, 1, 8, 8, dtype=torch.float64), 0
    for x, y, _ in batches:
        x, b = x.double(), len(y)
        for _ in range(3):
            at = (x + memory[:b]).requires_grad_(True)
            net.zero_grad()
            F.cross_entropy(net(at), y).backward()
            rate, momentum = triangle(step, 3 * len(batches), 0.5, 0.05)
            with torch.no_grad():
                for p, v in zip(net.parameters(), velocity, strict=True):
                    v.mul_(momentum if step else 0).add_(p.grad + 5e-4 * p)
                    p -= rate * v
            memory[:b] = (x + (memory[:b] + s.eps * at.grad.sign()).clamp(-s.eps, s.eps)).clamp(0, 1) - x
            step += 1
    for a, b in zip(t.model.state_dict().values(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=2e-4, rtol=2e-3)


def test_statistics_are_taken_in_train_mode_and_updated_twice_a_step():
    s = parsed("--method", "lap", "--start", "v", "--batch", "100")
    t = Trainer(s, CPU)
    t.fresh(0)
    train.train_epoch(t, lambda: None)
    assert t.model.training and int(t.model[1].norm.num_batches_tracked) == 2


def test_the_loss_at_the_start_point_is_a_mean_like_the_other():
    """Without radius and weight perturbation the two looks are the same."""
    t = trained("--method", "lap", "--start", "v", "--eps", "0", "--beta", "0", "--epochs", "1")
    assert t.sums[1] == pytest.approx(t.sums[0].item(), rel=1e-5) and t.sums[0] > 1


def test_the_probe_is_attacked_at_the_radius_of_training(monkeypatch):
    t = trained("--epochs", "1")
    seen, attack = [], train.evaluation.attack_all
    monkeypatch.setattr(train.evaluation, "attack_all", lambda *a: seen.append(a) or attack(*a))
    row = train.close_epoch(t, 0.0, 0.0)
    (_, batches, index, eps, steps, restarts, *_) = seen[0]
    assert batches is t.test and len(index) == 20 and (eps, steps, restarts) == (0.6, 2, 1)
    assert row["probe_pgd"] <= row["probe_clean"] and len(seen) == 1


def test_the_radius_warm_up_scales_step_and_ball_of_lap():
    """Of V-LAP the step alone is seen, of R-LAP at 1.25 times the radius the ball."""
    for start, noise in (("v", 0.0), ("n", 2.0)):
        t = Trainer(parsed("--start", start, "--eps", "0.1"), CPU)
        t.fresh(0)
        x, y = 0.3 + 0.4 * torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8)
        eta = t.noise(8)(x, 1.0) if noise else torch.zeros_like(x)
        t.generator.manual_seed(3_000_000_019)
        delta, *_ = train.perturb_both(t, x, y, 8, 0.5)
        size = noise * 0.05 * eta  # N's noise is warmed up, and its step of half the radius is not clamped
        torch.testing.assert_close((delta - size).abs(), torch.full_like(x, 0.05))
    t = Trainer(parsed("--start", "r", "--eps", "0.1"), CPU)
    t.fresh(0)
    assert train.perturb_both(t, x, y, 8, 0.5)[0].abs().max() == pytest.approx(0.05)


def test_a_weight_that_is_no_number_ends_the_run():
    t = trained("--epochs", "1")
    with torch.no_grad():
        t.weights[0][0] = torch.inf
    with pytest.raises(runs.UserError, match="a weight of seed 0 was not a finite number"):
        train.close_epoch(t, 0.0, 0.0)


def test_noise_is_not_the_stream_the_weights_were_drawn_from():
    """With one seed for both, the first noise would be the first layer's weights again."""
    t = Trainer(parsed("--batch", "30"), CPU)
    t.fresh(5)
    noise = t.noise(30)(torch.zeros(30, 1, 8, 8), 1.0).flatten()
    weights_of = torch.empty(30 * 64).uniform_(-1, 1, generator=torch.Generator().manual_seed(5))
    assert t.generator.initial_seed() != 5 and not torch.isin(noise, weights_of).any()


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

    s = resolved(dataset="svhn", start="n", method="fgsm")
    assert (s.epochs, s.lr, s.peak, s.radius_warmup, s.noise, s.model) == (15, 0.05, 0.4, 5.0, 2.0, "preact18")
    assert resolved(dataset="svhn", method="fgsm", start="n", eps=12 / 255).noise == 3.0
    s = resolved(dataset="cifar10", eps=16 / 255)
    assert (s.epochs, s.lr, s.peak, s.step, s.beta, s.batch, s.weight_decay) == (30, 0.2, 0.5, 1.25, 0.05, 128, 5e-4)
    assert s.published and not resolved(dataset="svhn").published and s.gamma == 0.3 and s.label == "R-LAP"
    assert not resolved(dataset="cifar10", eps=16 / 255, beta=1.0).published
    assert not resolved(dataset="cifar10", eps=16 / 255, model="wrn-34-10").published
    assert resolved(dataset="tiny-imagenet").model == "preact18-act"
    assert resolved(dataset="imagenet100").model == "resnet18-cosine"
    assert resolved(dataset="cifar10", method="pgd", attack_steps=2).step == 0.5
    assert resolved(dataset="cifar100", method="zerograd").zero_share == 0.45


def test_free_training_keeps_its_perturbation_and_updates_at_every_replay():
    t = trained("--method", "free", "--replays", "3", "--epochs", "1")
    assert t.sums[4] == 3 * len(t.train) and 0 < t.memory.abs().max() <= 0.6 + 1e-6


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    out = tmp_path / "r"
    calls, perturb = [0], train.perturb_both

    def poisoned(*args):
        delta, *rest = perturb(*args)
        calls[0] += 1
        return delta * torch.nan if calls[0] == 9 else delta, *rest  # in the second epoch

    monkeypatch.setattr(train, "perturb_both", poisoned)
    with pytest.raises(runs.UserError, match=r"not a finite number in 6 steps before step 14 \(epoch 2\)"):
        run_main(monkeypatch, *TINY, "--out", str(out))
    tensors, meta = runs.read_tensors(out / "checkpoint" / "seed0.safetensors")
    assert meta["epoch"] == "1" and all(v.isfinite().all() for k, v in tensors.items() if k.startswith("model."))
    assert not (out / "seed0" / "record.json").exists()


def test_bf16_and_channels_last_train_about_the_same():
    a, b = (trained("--method", "lap", "--precision", p) for p in ("fp32", "bf16"))
    assert weights(b).isfinite().all() and weights(b).dtype == torch.float32
    gap = (a.sums - b.sums).abs() / a.sums.abs().clamp(min=1)
    assert gap[0] < 0.1 and not torch.equal(weights(a), weights(b))
    assert a.model[1].stem.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_compiled_network_trains_about_the_same():
    a, b = trained("--method", "lap", "--epochs", "1"), trained("--method", "lap", "--epochs", "1", "--compile")
    assert (a.sums[0] - b.sums[0]).abs() / a.sums[0] < 0.02


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
    assert record["data"]["n"] == 1000 and record["metrics"]["published_beta"] == 0  # of another network
    assert record["metrics"]["curve_loss"][1] < record["metrics"]["curve_loss"][0]
