"""The layer tools: they measure what they say, on the layers they say, and leave the network as it was."""

import sys

from lab import runs

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import analyse
import analysis
import evaluation
import figures
import lap
import layerwise
import train
import vit
from settings import Settings
from trainer import Trainer, open_run

CPU = torch.device("cpu")


def network(name="preact-small", size=8):
    torch.manual_seed(0)
    net = vit.build(name, 4, 3, size, (0.5,) * 3, (0.25,) * 3)
    return net, lap.layers(net)


def images(n=12, size=8):
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, size, size, generator=g), torch.randint(4, (n,), generator=g)


def state(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_former_and_latter_layers_of_the_paper():
    with torch.device("meta"):
        layers = lap.layers(vit.build("preact18", 10, 3, 32, (0.5,) * 3, (0.25,) * 3))
    path = layerwise.main_path(layers)
    assert len(path) == 17 and path[0] == "1.stem.weight" and not any("shortcut" in k or "linear" in k for k in path)
    assert layerwise.part(layers, "former") == path[:5] and layerwise.part(layers, "latter") == path[13:]
    _, small = network()
    assert [len(layerwise.part(small, k)) for k in ("former", "latter", "all")] == [2, 2, 7]


def test_statistics_equal_numpy():
    _, layers = network()
    found = layerwise.statistics(layers)
    for k, w in enumerate(layers.values()):
        m = w.detach().double().numpy().reshape(len(w), -1)
        squares = np.sort(m.ravel() ** 2)[::-1]
        assert found["norm"][k] == pytest.approx(np.linalg.norm(m), rel=1e-5)
        assert found["singular"][k] == pytest.approx(np.linalg.svd(m)[1][0], rel=1e-5)
        for key, share in (("top1", 0.01), ("top10", 0.1)):
            n = max(1, int(share * squares.size))
            assert found[key][k] == pytest.approx(squares[:n].sum() / squares.sum(), rel=1e-5)


@pytest.mark.parametrize("largest", [True, False])
def test_removal_zeroes_exactly_the_extreme_entries_of_the_named_layers(largest):
    net, layers = network()
    before, names = state(net), layerwise.part(layers, "former")
    with layerwise.without(net, layers, names, 0.1, largest):
        assert not net.training
        for k, w in layers.items():
            old, new = before[k].flatten().abs(), w.detach().flatten()
            n = int(0.1 * len(new)) if k in names else 0
            assert (new == 0).sum() == n and torch.equal(new[new != 0], before[k].flatten()[new != 0])
            if n:
                gone, kept = old[new == 0], old[new != 0]
                assert (gone.min() >= kept.max()) if largest else (gone.max() <= kept.min())
    assert same(before, state(net)) and net.training


def test_filter_noise_has_the_norm_of_every_filter():
    for w in (torch.randn(6, 3, 3, 3), torch.randn(4, 8), torch.zeros(2, 3)):
        d = layerwise.filter_noise(w, torch.Generator().manual_seed(0))
        torch.testing.assert_close(d.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1))
        assert not torch.equal(d, w) or not w.any()


def test_distortion_is_the_rise_of_the_loss_and_touches_nothing():
    net, layers = network()
    x, y = images()
    before = state(net)
    found = layerwise.distortion(net, layers, x, y, 0.05, size=0.5, draws=2)
    assert same(before, state(net)) and net.training and len(found) == 10
    assert all(v == 0 for v in layerwise.distortion(net, layers, x, y, 0.05, size=0.0))
    net.eval()
    attacked = layerwise.attacked(net, x, y, 0.05)
    with torch.no_grad():
        base = F.cross_entropy(net(attacked), y)
        g, w, losses = torch.Generator().manual_seed(3), list(layers.values())[3], []
        own = w.clone()
        for _ in range(2):
            d = torch.randn(w.shape, generator=g)
            d *= (own.flatten(1).norm(dim=1) / d.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
            w.copy_(own + 0.5 * d)
            losses.append(F.cross_entropy(net(attacked), y))
    assert found[3] == pytest.approx((sum(losses) / 2 - base).item(), abs=1e-5)


def test_surface_has_the_unchanged_network_in_the_middle():
    net, layers = network()
    x, y = images()
    before = state(net)
    grid = layerwise.surface(net, [layers["1.stem.weight"]], x, y, points=5)
    base = F.cross_entropy(net.eval()(x), y).item()
    assert same(before, state(net)) and np.array(grid).shape == (5, 5)
    assert grid[2][2] == pytest.approx(base, abs=1e-4) and np.std(grid) > 0
    every = layerwise.surface(net, list(layers.values()), x, y, points=3)
    assert every[1][1] == pytest.approx(base, abs=1e-4) and every != [row[1:4] for row in grid[1:4]]


def test_a_surface_runs_along_two_directions_the_first_from_row_to_row():
    net, layers = network()
    x, y = images()
    names, steps = ["1.stem.weight", "1.linear.weight"], (-0.5, 0.0, 0.5)
    grid = layerwise.surface(net, [layers[k] for k in names], x, y, points=3, reach=0.5)
    g, own = torch.Generator().manual_seed(0), {k: layers[k].detach().clone() for k in names}
    one, two = ({k: layerwise.filter_noise(own[k], g) for k in names} for _ in range(2))
    net.eval()
    for row, p in zip(grid, steps, strict=True):
        for value, q in zip(row, steps, strict=True):
            with torch.no_grad():
                for k in names:
                    layers[k].copy_(own[k] + p * one[k] + q * two[k])
                assert value == pytest.approx(F.cross_entropy(net(x), y).item(), abs=2e-4)
    assert abs(grid[0][2] - grid[2][0]) > 1e-3  # or the order of the two could not be told


def test_a_loss_beyond_all_numbers_is_written_as_a_large_one():
    """A record takes finite numbers only, and a network after an outburst must not cost the analysis."""
    net, layers = network()
    x, y = images()
    with torch.no_grad():
        layers["1.linear.weight"].fill_(torch.inf)
    assert layerwise.distortion(net, layers, x, y, 0.05) == pytest.approx([1e30] * 10)
    grid = layerwise.surface(net, [layers["1.stem.weight"]], x, y, points=2)
    assert [v for row in grid for v in row] == pytest.approx([1e30] * 4)


def curve(*pairs):
    return [{"epoch": i + 1, "probe_fgsm": f, "probe_pgd": p} for i, (f, p) in enumerate(pairs)]


def test_moments_of_the_surfaces():
    assert analysis.moments(curve((40, 30), (42, 35), (50, 33), (90, 1), (95, 0))) == {
        "before": 2,
        "during": 4,
        "after": 5,
    }
    assert analysis.moments(curve(*[(40, 30)] * 9)) == {"early": 3, "middle": 6, "end": 9}
    assert analysis.shown(list("abcdefghijklmnopq")) == list("aeimq") and analysis.shown(["a", "b"]) == ["a", "b"]


TINY = ["--dataset", "digits", "--eps", "0.3", "--epochs", "3", "--train-limit", "64", "--batch", "32", "--probe", "20"]
TINY += ["--probe-steps", "1", "--test-steps", "2", "--test-restarts", "1", "--eval-limit", "30", "--device", "cpu"]
TINY += ["--table", "main"]


def run_main(monkeypatch, main, *args):
    monkeypatch.setattr(sys, "argv", ["x", *map(str, args)])
    main()


@pytest.fixture
def done(tmp_path, monkeypatch):
    out = tmp_path / "r"
    more = ["--keep-every", "1", "--distortion", "8", "--analyse", "--out", out]
    run_main(monkeypatch, train.main, *TINY, "--method", "fgsm", "--start", "v", *more)
    return out


def test_a_run_records_removals_and_layers(done):
    rows = [runs.json.loads(line) for line in (done / "records.jsonl").read_text().splitlines()]
    tables = [r["table"] for r in rows]
    assert sorted(tables) == ["layers", "main", *["removal"] * 5]
    main = next(r for r in rows if r["table"] == "main")["metrics"]
    removed = {r["setting"].split(", ", 1)[1]: r["metrics"] for r in rows if r["table"] == "removal"}
    assert set(removed) == {name for name, *_ in analysis.REMOVALS}
    assert all(removed["nothing"][k] == main[k] for k in ("clean", "fgsm", "pgd"))
    for m in removed.values():
        assert m["fgsm_drop"] == pytest.approx(removed["nothing"]["fgsm"] - m["fgsm"])
    layers = next(r for r in rows if r["table"] == "layers")["metrics"]
    values = layers["surfaces"]["values"]
    assert len(values) == 3 and all(np.array(v).shape == (6, 9, 9) for v in values.values())
    assert len(main["curve_distortion"]) == 3 and len(main["curve_norm"][0]) == layers["layers"] == 10


def test_a_surface_is_that_of_the_weights_of_its_epoch_on_images_attacked_there(done):
    found = runs.read_record(done / "seed0" / "record-layers.json")["metrics"]["surfaces"]
    t, *_ = open_run(str(done), "", "cpu")
    t.fresh(0)
    x, y = next(t.test.in_order(t.probe[:100]))
    for moment, epoch in found["epochs"].items():
        t.load_weights(done / "seed0" / "epochs" / f"{epoch:04d}.safetensors")
        g = torch.autograd.grad(F.cross_entropy(t.model(x.requires_grad_()), y), x)[0]
        with torch.no_grad():
            want = F.cross_entropy(t.model((x + 0.3 * g.sign()).clamp(0, 1)), y).item()
        assert all(grid[4][4] == pytest.approx(want, abs=2e-4) for grid in found["values"][moment])
    last, kept = (runs.read_tensors(done / "seed0" / k)[0] for k in ("model.safetensors", "epochs/0003.safetensors"))
    assert sorted(found["epochs"].values())[-1] == 3 and same(last, kept)


def test_analysis_of_a_finished_run(done, monkeypatch, capsys):
    before = runs.read_record(done / "seed0" / "record-removal-former-largest.json")["metrics"]
    run_main(monkeypatch, analyse.main, "--run", done, "--points", "3", "--images", "5", "--device", "cpu")
    text = capsys.readouterr().out
    assert "former layers: 1.stem.weight" in text and f"FGSM {before['fgsm']:6.2f} %" in text
    assert all((done / "analysis" / f"{k}-seed0.png").stat().st_size > 5000 for k in ("surfaces", "layers"))
    args = ["--run", done / "seed0", "--points", "3", "--write", "--device", "cpu"]
    for share, expected in ((0.1, 7), (1, 12)):  # the share of the table in its place, another in rows of its own
        run_main(monkeypatch, analyse.main, *args, "--share", share)
        rows = [runs.json.loads(line) for line in (done / "records.jsonl").read_text().splitlines()]
        assert len(rows) == expected
    found = {r["setting"]: r["metrics"] for r in rows if r["table"] == "removal"}
    assert found["eps=76.5/255, former, largest"] == before
    assert found["eps=76.5/255, former, largest, 100 %"]["clean"] <= 30  # without two layers: chance


def test_surfaces_without_kept_weights_show_the_end_alone(done, monkeypatch, capsys):
    for path in (done / "seed0" / "epochs").iterdir():
        path.unlink()
    run_main(monkeypatch, analyse.main, "--run", done, "--points", "3", "--images", "5", "--device", "cpu")
    assert "--keep-every 1" in capsys.readouterr().out


def test_wrong_options_of_the_analysis(done, monkeypatch, capsys):
    def told(*args):
        monkeypatch.setattr(sys, "argv", ["x", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            runs.command(analyse.main)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1
        return lines[0]

    assert "--share must lie in (0, 1]" in told("--run", done, "--share", "0")
    assert "leave --steps and --restarts out" in told("--run", done, "--write", "--steps", "7", "--device", "cpu")
    assert "no file" in told("--run", done / "x" / "y")
    (done / "seed0" / "metrics.jsonl").unlink()
    assert "no metrics.jsonl" in told("--run", done, "--device", "cpu")


def test_figures_need_no_more_than_records(tmp_path, done):
    found = [{**runs.json.loads(line), "run": "r"} for line in (done / "records.jsonl").read_text().splitlines()]
    drawn = figures.draw(found, tmp_path, "demo")
    assert {p.name.split("-")[1] for p, _ in drawn} == {"course", "removal", "surfaces", "layers"}
    assert all(p.stat().st_size > 5000 and caption for p, caption in drawn)
    assert [
        p.name.split("-")[1] for p, _ in figures.draw([r for r in found if r["table"] == "main"], tmp_path, "demo")
    ] == ["course"]


def test_vision_transformer_trains_with_lap_and_gradalign(tmp_path):
    for method in ("lap", "gradalign"):
        s = runs.parse(Settings, "", [*TINY, "--model", "vit-tiny", "--method", method, "--lr", "0.05"])
        s.check()
        s.resolve()
        t = Trainer(s, CPU)
        t.fresh(0)
        before = [w.detach().clone() for w in t.weights]
        train.train_epoch(t, lambda: None)
        assert len(t.weights) == 10 and all(w.isfinite().all() for w in t.weights)
        assert any(not torch.equal(a, b) for a, b in zip(before, t.weights, strict=True))
        found = evaluation.attack_all(t.model, t.test, t.probe, 0.1, 1, 1, 0)
        assert 0 <= found["pgd"] <= found["clean"] <= 100


def test_surfaces_stand_in_the_order_of_the_epochs_and_noise_1_runs_to_the_right():
    """Records are written with sorted keys, so that the order of the moments is lost in them."""
    grid = [[10.0 * p + q + 1 for q in range(3)] for p in range(3)]
    values = {m: [grid, grid] for m in ("after", "before", "during")}
    found = {"epochs": {"after": 9, "before": 2, "during": 5}, "layers": ["1.stem.weight", "all"], "values": values}
    figure, _ = figures.surfaces(found, "here")
    left = [a for a in figure.axes if "epoch" in a.get_ylabel()]
    assert [a.get_ylabel().split(":")[0] for a in left] == ["before", "during", "after"]
    picture = left[0].images[0].get_array()
    assert picture[0].tolist() == [1, 11, 21] and left[0].images[0].origin == "lower"  # p, the first direction
    scales = {(a.images[0].norm.vmin, a.images[0].norm.vmax) for a in figure.axes if a.images}
    assert len(scales) == 1  # the one colour bar is true of every panel


def test_the_surfaces_shown_are_of_a_run_with_overfitting(tmp_path, monkeypatch):
    grid = {"epochs": {"end": 1}, "layers": ["a"], "values": {"end": [[[1.0, 2.0], [3.0, 4.0]]]}}
    base = {"table": "layers", "dataset": "d", "method": "V-FGSM", "setting": "s"}
    rows = [
        {**base, "seed": k, "metrics": {"collapsed": c, "names": ["a"], "surfaces": grid}}
        for k, c in enumerate((0, 1, 1, 0))
    ]
    places = []
    monkeypatch.setattr(figures, "surfaces", lambda found, place: places.append(place))
    figures.draw(rows, tmp_path, "demo")
    assert places == ["V-FGSM, d, s, seed 1"]


@pytest.mark.parametrize("low", [0.3, 40.0])
def test_ticks_of_logarithmic_axes_are_plain_numbers(low):
    figure, axis = figures.plt.subplots()
    axis.plot([low, 2 * low])
    figures.log_axis(axis)
    figure.canvas.draw()
    labels = [x.get_text() for x in axis.get_yticklabels(which="both") if x.get_text()]
    figures.plt.close(figure)
    assert labels and all(float(x) for x in labels)
