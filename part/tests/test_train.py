"""The loop: arms fork from one warm-up, eps_low = eps is AT bit for bit, masks belong to their images."""

import gc
import json
import sys
from pathlib import Path

from lab import runs

import pytest
import torch

import baselines
import data
import evaluation
import pixel_reweighting as pr
import settings
import train
from trainer import Trainer

HERE = Path(train.__file__).parent
CPU = torch.device("cpu")
TINY = ["--epochs", "3", "--warmup", "1", "--train-limit", "90", "--batch", "30", "--steps", "2", "--probe", "20"]
TINY += ["--probe-steps", "1", "--test-steps", "2", "--eval-limit", "40", "--device", "cpu"]


def parsed(*args):
    s = runs.parse(settings.Settings, "", [*TINY, *args])
    s.check_values()
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


def trained(arm, *args):
    """A trainer after warm-up and arm, without a run folder, and the budgets it used."""
    s = parsed("--method", arm, *args)
    t = Trainer(s, CPU)
    t.fresh(0)
    boxes, box = [], t.box

    def spy(*a):
        boxes.append(box(*a))
        return boxes[-1]

    t.box = spy
    for p in train.phases(s):
        while t.epoch < p.last:
            train.train_epoch(t, p, lambda: None)
            t.epoch, t.batch = t.epoch + 1, 0
    return t, boxes


def state(t):
    return torch.cat([v.flatten().float() for v in t.model.state_dict().values()])


PAIRS = [("at", "part"), ("trades", "part-t"), ("mart", "part-m"), ("at", "part-shuffled"), ("at", "at-mean")]


@pytest.mark.parametrize("base,ours", PAIRS)
@pytest.mark.parametrize("model", ["small", "resnet18-w8"])
def test_equal_budgets_give_the_base_method_bit_for_bit(base, ours, model):
    args = ["--model", model, "--eps", "8/255"]
    a, _ = trained(base, *args)
    b, boxes = trained(ours, *args, "--eps-low", "8/255")
    assert torch.equal(state(a), state(b)) and isinstance(boxes[-1], torch.Tensor)
    c, _ = trained(ours, *args, "--eps-low", "2/255")
    assert not torch.equal(state(a), state(c))


def test_mma_inside_and_awp_reduce_to_the_base_as_well():
    for extra in (["--attack", "mma"], ["--awp"], ["--mask-order", "released"], ["--refresh", "0"]):
        a, _ = trained("at", *extra)
        b, _ = trained("part", *extra, "--eps-low", "8/255")
        assert torch.equal(state(a), state(b)), extra
        assert not torch.equal(state(a), state(trained("at")[0])) or extra[0] in ("--mask-order", "--refresh")


def test_controls_spend_the_budget_of_the_masks():
    """On the first batch after the warm-up, where all arms hold the same network."""
    found = {m: trained(m, "--eps-low", "6/255")[1][3] for m in ("part", "part-shuffled", "part-inverted", "at-mean")}
    part = found["part"]
    assert part.shape == (30, 1, 16, 16)
    assert (255 * part).unique().tolist() == pytest.approx([6.0, 8.0])
    assert not torch.equal(found["part-shuffled"], part)
    assert sorted(e.sum().item() for e in found["part-shuffled"]) == sorted(e.sum().item() for e in part)
    torch.testing.assert_close(found["part-inverted"] + part, torch.full_like(part, 14 / 255))
    assert found["at-mean"].shape == (1, 1, 1, 1) and found["at-mean"].item() == pytest.approx(part.mean().item())


def test_the_highest_seed_has_its_batches_too():
    """The seed of a batch's crops and of a shuffle is made of seed, epoch and number: it must stay a 64-bit number."""
    for extra in (["--method", "part-shuffled"], ["--method", "part", "--mask-order", "released"]):
        s = parsed(*extra)
        t = Trainer(s, CPU)
        t.fresh(2**31 - 1)
        t.epoch = s.warmup
        t.begin_epoch(True)
        x, _ = next(t.train.epoch(t.key(0), 0, t.crops))
        t.model.eval()
        assert t.box("shuffled", x, 2).shape == (30, 1, 16, 16)


def test_tau_grows_as_published():
    s = parsed("--method", "fat", "fat-trades", "--dataset", "digits")
    assert [baselines.tau(s, "fat", e) for e in (0, 49, 50, 89, 90)] == [0, 0, 1, 1, 2]
    assert [baselines.tau(s, "fat-trades", e) for e in (0, 29, 30, 50, 70)] == [0, 0, 1, 2, 3]
    s.tau = 4
    assert baselines.tau(s, "fat", 0) == 4
    a, _ = trained("fat", "--tau", "2")  # as many as there are steps: no image ever stops
    b, _ = trained("fat", "--tau", "9")
    c, _ = trained("fat")
    assert torch.equal(state(a), state(b)) and not torch.equal(state(a), state(c))
    seen, fat = [], baselines.attacks.fat
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "TAU_EPOCHS", {"fat": (1, 2)})
        patch.setattr(baselines.attacks, "fat", lambda *a: seen.append(a[7]) or fat(*a))
        trained("fat")
    assert seen == [0] * 0 + [1] * 3 + [2] * 3  # of three epochs the first is warm-up by AT


def test_masks_belong_to_their_images():
    """aligned: the mask of the very tensor that is attacked; released: of other images, though as many."""
    for order in ("aligned", "released"):
        s = parsed("--mask-order", order)
        t = Trainer(s, CPU)
        t.fresh(0)
        t.epoch = s.warmup
        t.begin_epoch(True)
        x, _ = next(t.train.epoch(t.key(0), 0, t.crops))
        t.model.eval()
        own = pr.budget(pr.mask(pr.activation_map(t.viewer, x), (16, 16)), s.eps, s.eps_low)
        e = t.box("cam", x, 0)
        assert torch.equal(e, own) == (order == "aligned")
        assert torch.equal(e, t.box("cam", x, 0))  # and the same each time


def test_released_masks_are_those_of_the_refresh_epoch():
    s = parsed("--mask-order", "released", "--refresh", "2", "--epochs", "6")
    t = Trainer(s, CPU)
    t.fresh(0)
    seen = []
    for t.epoch in range(1, 5):
        t.begin_epoch(True)
        x, _ = next(t.train.epoch(t.key(0), 0, t.crops))
        t.model.eval()
        seen.append(t.box("cam", x, 0))
        with torch.no_grad():  # a step of training
            for p in t.model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    same = [torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    assert same == [False, True, False]  # refreshed in the first, second and fourth epoch after the warm-up


@pytest.mark.parametrize("refresh", [0, 1, 2])
def test_the_looking_network_is_refreshed_when_it_should(refresh):
    s = parsed("--refresh", str(refresh), "--epochs", "6")
    t = Trainer(s, CPU)
    t.fresh(0)
    ids = []
    for t.epoch in range(1, 6):
        t.begin_epoch(True)
        ids.append(id(t.viewer))
        ids[-1] = None if t.viewer is None else t.looked
    assert ids == {0: [None] * 5, 1: [1, 2, 3, 4, 5], 2: [1, 2, 2, 4, 4]}[refresh]


def test_learning_rates_at_the_drops():
    def rates(counter):
        s = parsed("--lr-counter", counter, "--lr-drops", "2", "4", "--epochs", "6", "--warmup", "2", "--lr", "1")
        t = Trainer(s, CPU)
        t.fresh(0)
        out = []
        for t.epoch in range(6):
            t.begin_epoch(False)
            out.append(round(t.optimizer.param_groups[0]["lr"], 6))
        return out

    assert rates("released") == [1, 1, 1, 0.1, 0.1, 0.01]
    assert rates("total") == [1, 0.1, 0.1, 0.01, 0.01, 0.01]
    s = runs.parse(settings.Settings, "", ["--dataset", "cifar10"])
    s.resolve()
    assert (s.epochs, s.warmup, s.lr, s.steps, s.batch, s.model) == (80, 20, 0.01, 10, 128, "resnet18")
    assert s.eps_low == pytest.approx(7 / 255) and s.step == pytest.approx(2 / 255) and s.eps_ramp == 0
    s = runs.parse(settings.Settings, "", ["--dataset", "svhn"])
    s.resolve()
    assert s.step == s.test_step == pytest.approx(1 / 255) and s.weight_decay == 3.5e-3


def test_attack_and_maps_leave_running_statistics_alone():
    s = parsed("--model", "resnet18-w8", "--lr", "0", "--weight-decay", "0")
    t = Trainer(s, CPU)
    t.fresh(0)
    t.epoch = 1
    before = {k: v.clone() for k, v in t.model.named_buffers()}
    t.begin_epoch(True)
    x, y = next(t.train.epoch(t.key(0), 0, t.crops))
    t.model.eval()
    e = t.box("cam", x, 0)
    delta = baselines.perturb(s, "at", t.forward, x, y, e, baselines.start(s, "at", x, t.noise))
    assert all(torch.equal(v, before[k]) for k, v in t.model.named_buffers())
    assert (delta.abs() <= e).all()


@pytest.mark.parametrize("arm", ["part", "part-m"])
def test_the_loop_looks_and_attacks_in_eval_mode_and_learns_in_train_mode(monkeypatch, arm):
    """Mode of the network at each call, the images and the weights that the loss sees."""
    s = parsed("--method", arm, "--model", "resnet18-w8", "--awp", "--awp-warmup", "2")
    t = Trainer(s, CPU)
    t.fresh(0)
    calls, last = [], {}
    perturb, loss, box = baselines.perturb, baselines.loss, t.box

    def spy(name, f):
        def inner(*a):
            calls.append((name, t.model.training))
            out = f(*a)
            last[name] = a, out
            return out

        return inner

    monkeypatch.setattr(baselines, "perturb", spy("perturb", perturb))
    monkeypatch.setattr(baselines, "loss", spy("loss", loss))
    t.box = spy("box", box)
    for p in train.phases(s):
        while t.epoch < p.last:
            train.train_epoch(t, p, lambda: None)
            t.epoch, t.batch = t.epoch + 1, 0
            if t.epoch == 2:
                assert set(calls) == {("box", False), ("perturb", False), ("loss", True)} and len(calls) == 6 * 3
                calls.clear()
    assert [c for c in calls if c[0] == "loss"] == [("loss", True)] * 2 * 3  # AWP looks once more
    (_, _, forward, x, x_adv, _), _ = last["loss"]
    delta = last["perturb"][1]
    assert torch.equal(x_adv, (x + delta).clamp(0, 1)) and delta.abs().max() > 0 and forward == t.learn


def test_the_box_of_an_attacker_who_knows_the_masks():
    """Of the trained network's own maps of these images, around the radius of the evaluation."""
    s = parsed("--eps-low", "2/255", "--test-eps", "16/255")
    t = Trainer(s, CPU)
    t.fresh(0)
    t.model.eval()
    x, _ = next(t.test.in_order(torch.arange(6)))
    m = pr.mask(pr.activation_map(t.model, x), (16, 16))
    e = 255 * t.own_budget(x)
    torch.testing.assert_close(e, torch.where(m, 16.0, 4.0))
    assert m.any() and not m.all() and not torch.equal(m, m.flip(0))


def test_the_evaluation_against_a_loop_over_batches():
    """One start of its own stream for both attacks, clamped into the image; all images, in the order of the index."""
    s = parsed("--model", "resnet18-w8", "--test-batch", "4")
    t = Trainer(s, CPU)
    t.fresh(0)
    index = torch.tensor([5, 0, 9, 2, 7, 1])
    found = evaluation.attack_all(t.model, t.test, index, 0.2, 0.05, 3, 3)
    t.model.eval()
    g, wanted = torch.Generator().manual_seed(1_000_000_007 + 3 * 1009), {"natural": [], "pgd": [], "mma": []}
    for p in index.split(4):
        x, y = data.to_input(t.data.test.x[p]), t.data.test.y[p]
        start = (x + baselines.attacks.uniform(x, 0.2, g)).clamp(0, 1) - x
        for name in wanted:
            attack = {"pgd": baselines.attacks.pgd, "mma": baselines.attacks.mma}.get(name)
            delta = attack(t.model, x, y, start, 0.05, 0.2, 3) if attack else torch.zeros_like(x)
            with torch.no_grad():
                wanted[name] += (t.model((x + delta).clamp(0, 1)).argmax(1) == y).tolist()
    assert {k: v.tolist() for k, v in found.items()} == wanted


def test_the_start_of_the_evaluation_is_drawn(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation.attacks, "pgd", lambda f, x, y, start, *a: seen.append(start) or start)
    t = Trainer(parsed(), CPU)
    t.fresh(0)
    evaluation.attack_all(t.model, t.test, torch.arange(20), 0.2, 0.05, 1, 0, ("pgd",))
    assert 0.19 < seen[0].abs().max() <= 0.2 + 1e-6 and seen[0].unique().numel() > 1000


def test_the_share_of_masks_on_objects_by_hand():
    t = Trainer(parsed("--test-batch", "50"), CPU)
    t.fresh(0)
    t.model.eval()
    index = torch.arange(50)
    found = evaluation.masks_on_objects(t, index)
    hit, other, size = 0, 0, 0
    there = [i for i in range(50) if t.data.test.inside[i].any()]
    m = [pr.mask(pr.activation_map(t.model, data.to_input(t.data.test.x[i : i + 1])), (16, 16))[0, 0] for i in there]
    for k, i in enumerate(there):
        hit += int((m[k] & t.data.test.inside[i]).sum())
        other += int((m[k - 1] & t.data.test.inside[i]).sum())
        size += int(m[k].sum())
    assert found["mask_inside"] == pytest.approx(100 * hit / size, abs=0.2)
    assert found["mask_inside_shuffled"] == pytest.approx(100 * other / size, abs=0.2)
    assert abs(hit - other) > 0.01 * size and found["box_share"] == pytest.approx(100 * 49 / 256)


def test_the_ramp_grows_inside_the_warm_up_only():
    t, boxes = trained("at", "--warmup", "2", "--eps-ramp", "2")
    assert [round(255 * e, 3) for e in boxes] == [4.0] * 3 + [8.0] * 6


def test_all_arms_fork_from_one_warm_up_and_two_runs_are_equal(tmp_path, monkeypatch, capsys):
    """Order of --method and the presence of other arms change no arm."""
    run_main(monkeypatch, *TINY, "--method", "at", "part", "fat", "--out", str(tmp_path / "a"))
    run_main(monkeypatch, *TINY, "--method", "part", "--out", str(tmp_path / "b"))
    a, b = (runs.read_tensors(tmp_path / k / "seed0" / "model-part.safetensors")[0] for k in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    rows = lines(tmp_path / "a" / "seed0" / "metrics.jsonl")
    assert [(r["phase"], r["epoch"]) for r in rows] == [("warmup-at", 1)] + [
        (m, e) for m in ("at", "part", "fat") for e in (2, 3)
    ]
    assert [r["step"] for r in rows] == list(range(1, 8))
    text = capsys.readouterr().out
    assert "PART" in text and "against AT" in text
    assert not list((tmp_path / "a" / "checkpoint").iterdir())
    record = runs.read_record(tmp_path / "a" / "seed0" / "record-part.json")
    assert record["method"] == "PART" and 6 < record["metrics"]["budget"] < 8
    images = runs.read_tensors(tmp_path / "a" / "seed0" / "images-part.safetensors")[0]
    assert 100 * images["pgd"].double().mean().item() == pytest.approx(record["metrics"]["pgd"])


EVERY = ["at", "part", "trades", "part-t", "mart", "part-m", "fat", "fat-trades"]
EVERY += ["at-lower-right", "part-m-inverted", "trades-mean"]


@pytest.mark.parametrize("awp", [False, True])
def test_every_method_trains_on_real_architectures_at_tiny_size(tmp_path, monkeypatch, awp):
    args = ["--model", "wrn-10-1", "--cam", "layercam", "--mask-rule", "jet-rgb", "--awp-warmup", "1", "--lr", "0.01"]
    args += ["--awp"] if awp else []
    run_main(monkeypatch, *TINY, "--method", *EVERY, *args, "--out", str(tmp_path / "r"))
    for m in EVERY:
        r = runs.read_record(tmp_path / "r" / "seed0" / f"record-{m}.json")
        assert (
            r["method"] == baselines.ARMS[m].label + "-AWP" * awp
            and 0 <= r["metrics"]["mma"] <= r["metrics"]["natural"]
        )


def test_bf16_and_other_options_run(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "LONGER", (2, 3))
    args = ["--precision", "bf16", "--mask-rule", "topfrac", "--cam", "xgradcam", "--cam-layer", "1", "--gallery", "2"]
    args += ["--gallery-epochs", "2", "3", "--adaptive", "--autoattack", "apgd-ce", "--model", "resnet18-w8"]
    run_main(monkeypatch, *TINY, *args, "--eval-limit", "8", "--out", str(tmp_path / "r"))
    m = runs.read_record(tmp_path / "r" / "seed0" / "record-part.json")["metrics"]
    assert m["gallery"]["epochs"] == [2, 3] and m["gallery"]["shape"] == [2, 16, 16, 3]
    assert m["union"] <= min(m[k] for k in ("pgd", "mma", "autoattack", "pgd3", "mma3", "aware_mma"))


def test_check_fails_when_part_gains_nothing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, *TINY, "--eps-low", "8/255", "--check", "--out", str(tmp_path / "r"))
    assert stop.value.code == 1
    base = {"natural": 50.0, "pgd": 30.0}
    rows = [{"method": "AT", "metrics": base}, {"method": "PART", "metrics": {"natural": 51.0, "pgd": 28.0}}]
    assert train.verdict(rows)
    rows.append({"method": "PART shuffled", "metrics": {"natural": 0.0, "pgd": 0.0}})  # no part of it
    assert train.verdict(rows)
    rows[1]["metrics"]["pgd"] = 27.9
    assert not train.verdict(rows)


def test_without_mma_the_rest_of_the_record_is_the_same(monkeypatch, tmp_path):
    found = []
    for name, more in (("a", []), ("b", ["--skip-mma"])):
        run_main(monkeypatch, *TINY, "--method", "at", "--out", str(tmp_path / name), *more)
        found.append(json.loads((tmp_path / name / "seed0" / "record-at.json").read_text())["metrics"])
    assert "mma" in found[0] and found[1].keys() == found[0].keys() - {"mma"}
    assert all(found[0][k] == found[1][k] for k in ("natural", "pgd", "budget", "curve_loss"))


def test_evaluation_does_not_touch_training(monkeypatch):
    a, _ = trained("part")
    s = parsed("--method", "part")
    t = Trainer(s, CPU)
    t.fresh(0)
    for p in train.phases(s):
        while t.epoch < p.last:
            train.train_epoch(t, p, lambda: None)
            evaluation.attack_all(t.model, t.test, t.probe, 0.1, 0.01, 2, 0)
            t.epoch, t.batch = t.epoch + 1, 0
    assert torch.equal(state(a), state(t))
