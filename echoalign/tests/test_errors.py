"""What the user can mend ends with exit code 2 and one line; eval.py on whole and broken runs."""

import ast
import dataclasses
import gc
import json
import re
import shlex
import subprocess
import sys

from lab import plan as plans
from lab import runs

import pytest
import torch
from conftest import HERE, TINY, environment, start, told

import bench
import eval as evaluation
import prepare
import train
from settings import IGNORE, METHODS, PARTS, EvalSettings, Settings, parse

QUICK = [*TINY, "--train-limit", "80", "--epochs", "2", "--finetune", "1"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rate", "1"], "--rate must lie in [0, 1), not 1"),
        (["--rate", "nan"], "rate"),
        (["--methods", "ce", "ce"], "--methods takes one or more different methods"),
        (["--methods", "dividmix"], "methods"),
        (["--label", "x"], "--label names the row of one method"),
        (["--noise", "uniform"], "noise"),
        (["--noise", "asymmetric"], "published mapping for cifar10 and cifar100, not for digits"),
        (["--noise", "worse"], "--noise worse belongs to cifar10, not to digits"),
        (["--dataset", "cifar11"], "dataset"),
        (["--dataset", "cifar10", "--data-dir", "/nowhere"], "CIFAR-10 is not in /nowhere: expected"),
        (["--data-dir", "~nosuchuser/x"], "the home folder it names is not known"),
        (["--strength", "1.5"], "--strength must lie in [0, 1]"),
        (["--strength", "-0.5"], "--strength must lie in [0, 1]"),
        (["--edit.sampler", "unipc"], "unipc"),
        (["--edit.control", "tile"], "belong to --generator sd"),
        (["--generator", "sd", "--edit.control", "ink"], "belong to the small networks"),
        (["--threshold", "high"], "--threshold high is no cosine"),
        (["--threshold", "2"], "--threshold 2 is no cosine"),
        (["--threshold", "nan"], "--threshold nan is no cosine"),
        (["--threshold", "1", "--methods", "selected-only"], "its selection keeps 0 samples"),
        (["--milestones", "5", "3"], "--milestones must be rising"),
        (["--sd.prompt", "a photo"], "--sd.prompt must contain {name}"),
        (["--model", "resnet50"], "resnet50"),
        (["--model", "head"], "--model head reads the features of a network: --features lite0 or clip"),
        (["--edit.batch", "0"], "--edit.batch must be at least 1, not 0"),
        (["--generator", "none", "--methods", "echoalign"], "--generator none edits nothing"),
        (["--features", "lite0", "--methods", "prior-filter"], "needs something that knows no noisy label"),
        (["--batch", "1"], "--batch must be at least 2"),
        (["--lr", "-1"], "--lr must be at least 0"),
        (["--lr", "1e30"], "is not a finite number"),
        (["--train-limit", "9999"], "more than the 800 training images"),
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", "1", "1"], "--seeds"),
        (["--net.widths", "12", "--generator", "concat"], "multiples of 8"),
        (["--judge", "clip"], "--judge clip needs --features clip"),
        (["--device", "gpu"], "--device gpu is unknown"),
        (["--colour", "red"], "--colour"),
        (["--stage", "edit"], "stage"),
        (["--transition.percentile", "101"], "--transition.percentile must lie in [0, 100]"),
    ],
)
def test_wrong_options_and_missing_data(capsys, monkeypatch, tmp_path, cache, args, words):
    assert words in told(capsys, monkeypatch, train.main, [*QUICK, "--out", tmp_path / "r", "--cache", cache, *args])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_cuda(capsys, monkeypatch, tmp_path):
    assert "no CUDA device" in told(capsys, monkeypatch, train.main, [*QUICK, "--out", tmp_path, "--device", "cuda"])


def test_a_read_only_place_is_told(capsys, monkeypatch, cache):
    line = told(capsys, monkeypatch, train.main, [*QUICK, "--cache", cache, "--out", "/proc/nothing/r"])
    assert "choose another --out" in line


@pytest.fixture
def done(tmp_path, monkeypatch, cache):
    start(monkeypatch, *QUICK, "--cache", cache, "--methods", "ce", "echoalign", "--out", tmp_path / "r")
    return tmp_path / "r"


def test_a_finished_run_is_shown_and_other_settings_are_refused(done, capsys, monkeypatch, cache):
    args = [*QUICK, "--cache", cache, "--methods", "ce", "echoalign", "--out", done]
    start(monkeypatch, *args)
    assert "is complete" in capsys.readouterr().out
    assert "other settings (lr: 0.1, now 0.2)" in told(capsys, monkeypatch, train.main, [*args, "--lr", "0.2"])
    gc.collect()
    held = runs.Run(done, Settings(), ignore=tuple(vars(Settings())))
    assert "another process is writing" in told(capsys, monkeypatch, train.main, args)
    assert held.out.exists()


def test_evaluation_repeats_the_records(done, capsys, monkeypatch):
    record = runs.read_record(done / "seed0" / "record-echoalign.json")
    more = ["--taus", "0.5", "-1", "--official", "--write", "--device", "cpu"]
    start(monkeypatch, "--run", done / "seed0", *more, main=evaluation.main)
    text = capsys.readouterr().out
    assert f"accuracy {record['metrics']['accuracy']:.2f} %" in text and "says otherwise" not in text
    assert "tau -1.000: selected 80" in text
    new = runs.read_record(done / "seed0" / "record-eval-echoalign.json")
    assert new["table"] == "own-eval" and "accuracy_official" in new["metrics"]
    start(monkeypatch, "--run", done, "--device", "cpu", main=evaluation.main)  # its own records do not disturb it


def test_evaluation_survives_lost_pictures_and_metrics(done, monkeypatch, capsys):
    (done / "seed0" / "metrics.jsonl").unlink()
    (done / "seed0" / "edits.png").write_bytes(b"broken")
    (done / "seed0" / "selection.csv").unlink()
    start(monkeypatch, "--run", done, "--device", "cpu", main=evaluation.main)
    assert "EchoAlign" in capsys.readouterr().out


def test_damaged_runs(done, capsys, monkeypatch, cache):
    def says(*args):
        return told(capsys, monkeypatch, evaluation.main, ["--run", done, "--device", "cpu", *args])

    assert "no file" in told(capsys, monkeypatch, evaluation.main, ["--run", done.parent / "x" / "y"])
    assert "has no seed7" in told(capsys, monkeypatch, evaluation.main, ["--run", done / "seed7", "--device", "cpu"])
    weights = done / "seed0" / "model-echoalign.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[: len(raw) // 2])
    assert "is damaged" in says()
    runs.write_tensors(weights, {"a": torch.zeros(1)})
    assert "another network" in says()
    tensors = runs.read_tensors(done / "seed0" / "model-ce.safetensors")[0]
    runs.write_tensors(weights, {k: v * float("nan") if v.is_floating_point() else v for k, v in tensors.items()})
    assert "not finite" in says()
    for path in (done / "seed0").glob("model-*"):
        path.unlink()
    assert "train the run to its end first" in says()
    stored = json.loads((done / "settings.json").read_text())
    (done / "settings.json").write_text(json.dumps({**stored, "colour": 1}))
    assert "another version" in says()


def test_a_broken_or_foreign_checkpoint_is_told(done, capsys, monkeypatch, cache):
    (done / "records.jsonl").unlink()
    (done / "seed0" / "record-ce.json").unlink()
    path = done / "seed0" / "checkpoint" / "ce.safetensors"
    args = [*QUICK, "--cache", cache, "--methods", "ce", "echoalign", "--out", done]
    path.write_bytes(b"cut off")
    assert "is damaged" in told(capsys, monkeypatch, train.main, args)
    runs.write_tensors(path, {"net0.x": torch.zeros(1)}, {"epoch": "1", "seconds": "0", "curve": "[]", "phase": "main"})
    assert "does not fit this run" in told(capsys, monkeypatch, train.main, args)


def test_a_set_of_a_single_class(capsys, monkeypatch, tmp_path):
    import numpy as np

    import readers

    x = np.zeros((20, 8, 8, 1), np.uint8)
    x[:, 2:5, 2:5] = np.arange(20)[:, None, None, None]
    one = (x, np.zeros(20, np.int64), x, np.zeros(20, np.int64)), "one class"
    monkeypatch.setitem(readers.READERS, "mnist", lambda folder, download: one)
    args = ["--dataset", "mnist", "--device", "cpu", "--epochs", "2", "--cache", tmp_path / "c"]
    args += ["--methods", "ce", "small-loss"]
    start(monkeypatch, *args, "--small-loss-epochs", "1", "--out", tmp_path / "r")  # a single class trains
    assert (tmp_path / "r" / "records.jsonl").is_file()
    line = told(capsys, monkeypatch, train.main, [*args, "--methods", "echoalign", "--out", tmp_path / "q"])
    assert "give --pretrain" in line


def test_the_plan_names_real_options_and_every_table_can_be_made():
    plan = plans.load_plan()
    for scale in plan["scales"]:
        for job in plans.jobs(plan, scale):
            s = parse("", job.command(scale)[1:])
            s.check_values()
            s.resolve()
    seen = {m for job in plans.jobs(plan, "paper") for m in job.args["methods"]}
    assert seen == set(METHODS)  # no baseline is left out
    shown = {r for view in plan["tables"] for r in view.get("order", {}).get("rows", [])}
    assert {name for name, _ in METHODS.values()} <= shown


def test_dry_run_and_published_thresholds(capsys, monkeypatch, tmp_path, cache):
    start(monkeypatch, *QUICK, "--cache", cache, "--dry-run", "--out", tmp_path / "r")
    assert "wrong labels, seed 0" in capsys.readouterr().out and not (tmp_path / "r").exists()
    for dataset, noise, tau in (
        ("cifar10", "instance", "0.52"),
        ("cifar10", "random1", "0.43"),
        ("cifar10", "pair", "gmm"),
    ):
        s = Settings(dataset=dataset, noise=noise, generator="sd", features="clip")
        s.resolve()
        assert (s.threshold, s.model, s.epochs, s.finetune, s.milestones) == (tau, "resnet18", 200, 40, (100, 150))


def shell(*args, **more):
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=HERE, capture_output=True, text=True, timeout=120,
        env={**environment(), **more},
    )  # fmt: skip


def test_commands_from_the_shell():
    done = shell("train.py", "--help")
    assert done.returncode == 0 and "--stage" in done.stdout and "--sd.resolution" not in done.stdout
    done = shell("train.py", "--rate", "9")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_help_lists_what_concerns_every_run_and_parts_have_their_own(capsys):
    def options(*args):
        with pytest.raises(SystemExit) as stop:
            parse("", list(args))
        assert stop.value.code == 0
        return set(re.findall(r"^\W (--[a-z][a-z0-9.-]+)", capsys.readouterr().out, re.M))

    brief = options("--help")
    assert len(brief) <= 52 and {"--methods", "--generator", "--device"} <= brief
    assert not any("." in o for o in brief)
    every = set(brief)
    for name in PARTS:
        mine = options(f"--{name}.help")
        assert mine and all(o.startswith(f"--{name}.") for o in mine)
        every |= mine
    fields = {f"--{k}" for k in vars(Settings()) if k not in PARTS}
    fields |= {f"--{k}.{v}" for k, kind in PARTS.items() for v in vars(kind())}
    assert every == {o.replace("_", "-") for o in fields}  # none is lost


def test_tqdm_disabled_by_the_environment(tmp_path):
    args = [*QUICK, "--generator", "concat", "--net.steps", "2", "--net.checkpoint", "1", "--stage", "generator"]
    done = shell("train.py", *args, "--out", tmp_path / "r", "--cache", tmp_path / "c", TQDM_DISABLE="1")
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_the_closed_form_is_refused_on_photographs(capsys, monkeypatch, tmp_path):
    import readers

    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (120, 8, 8, 3), generator=g, dtype=torch.uint8)
    photographs = (x, torch.arange(120) % 10, x, torch.arange(120) % 10), "made"
    monkeypatch.setattr(prepare.features.Lite0, "__init__", lambda self, device: None)
    monkeypatch.setattr(prepare.features.Lite0, "about", lambda self: {"features": "made"})
    monkeypatch.setattr(prepare.features.Lite0, "__call__", lambda self, images: images.flatten(1).float())
    monkeypatch.setitem(readers.READERS, "cifar10", lambda folder, download: photographs)
    args = [
        "--dataset",
        "cifar10",
        "--model",
        "cnn",
        "--device",
        "cpu",
        "--epochs",
        "2",
        "--finetune",
        "1",
        "--pretrain",
        "40",
    ]
    args += ["--cache", tmp_path / "c", "--small-loss-epochs", "1", "--eval-last", "1", "--batch", "16"]
    line = told(capsys, monkeypatch, train.main, [*args, "--out", tmp_path / "r"])
    assert "--generator exact is refused on photographs" in line
    assert told(capsys, monkeypatch, train.main, [*args, "--dry-run"]) == line
    # A small network trained on the held-out images is not: the rehearsal of the run on CIFAR-10.
    net = [
        "--generator",
        "concat",
        "--net.steps",
        "2",
        "--net.widths",
        "8",
        "16",
        "--edit.steps",
        "2",
        "--features",
        "cnn",
    ]
    rows = ["echoalign", "ce", "modified-only", "selected-only", "pretrain", "prior-filter"]
    start(monkeypatch, *args, *net, "--methods", *rows, "--threshold", "-1", "--out", tmp_path / "s")
    assert {p.stem for p in (tmp_path / "s" / "seed0").glob("record-*.json")} >= {f"record-{m}" for m in rows}
    line = told(
        capsys, monkeypatch, train.main, [*args, *net, "--stage", "modify", "--check", "1", "--out", tmp_path / "t"]
    )
    assert "the generator ignores the label" in line


def test_selectors_that_need_no_generator(monkeypatch, tmp_path):
    args = [*QUICK, "--noise", "symmetric", "--rate", "0.4", "--generator", "none", "--stage", "select"]
    start(monkeypatch, *args, "--out", tmp_path / "r", "--cache", tmp_path / "c")
    found = [runs.read_record(p) for p in sorted((tmp_path / "r" / "seed0").glob("record*.json"))]
    rows = {r["method"] for r in found}
    assert rows == {"small-loss", "GMM on loss", "kNN agreement", "cleanlab", "pretrained classifier", "CLIPCleaner"}
    assert all(r["table"] == "own-selection" and 0 <= r["metrics"]["auc"] <= 1 for r in found)
    assert not (tmp_path / "c" / "modified").exists()


def options(kind, before="--"):
    for f in dataclasses.fields(kind):
        part = f.default_factory if dataclasses.is_dataclass(f.default_factory) else None
        yield from options(part, f"{before}{f.name}.") if part else [before + f.name.replace("_", "-")]


def test_every_option_that_an_error_or_the_readme_names_is_there():
    """An option that was renamed sends the reader to one that does not exist."""
    known = {o for kind in (Settings, EvalSettings, bench.BenchSettings) for o in options(kind)}
    known |= {"--help", *(f"--{part}.help" for part in PARTS), "--no-deps", "--scale", "--cores", "--config"}
    modules = [p for folder in (".", "generator", "baselines") for p in (HERE / folder).glob("*.py")]
    calls = [n for p in modules for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.Call)]
    said = [c.value for n in calls if getattr(n.func, "id", "") == "UserError" for c in ast.walk(n)
            if isinstance(c, ast.Constant) and isinstance(c.value, str)]  # fmt: skip
    said.append((HERE / "README.md").read_text())
    found = {o for text in said for o in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text)}
    assert len(found) > 40 and not found - known, found - known


def test_the_commands_of_the_readme_do_not_stand_in_each_other_s_way():
    """Two runs of other settings in one default folder: the second would be refused."""
    text = (HERE / "README.md").read_text().split("## Commands")[1].split("\n## ")[0].replace("\\\n", " ")
    lines = [shlex.split(x.split("#")[0]) for x in text.splitlines() if x.startswith("python train.py")]
    places: dict[str, dict] = {}
    for words in lines:
        s = parse("", words[2:])
        s.check_values()
        s.resolve()
        told = {k: v for k, v in dataclasses.asdict(s).items() if k not in IGNORE}
        assert s.dry_run or places.setdefault(s.out, told) == told, words
    assert len(places) > 5


def test_worst_is_another_word_for_worse():
    s = parse("", ["--dataset", "cifar10", "--noise", "worst"])
    s.resolve()
    assert s.noise == "worse" and s.setting == "worse"


def test_bench_runs(monkeypatch, capsys):
    start(monkeypatch, "--smoke", "--device", "cpu", main=bench.main)
    text = capsys.readouterr().out
    assert "one by one" in text and "similarity" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu(tmp_path, monkeypatch):
    args = ["--dataset", "digits", "--epochs", "2", "--finetune", "1", "--device", "cuda", "--precision", "bf16"]
    start(monkeypatch, *args, "--generator", "controlnet", "--net.steps", "4", "--cache", tmp_path / "c",
          "--methods", "echoalign", "dividemix", "--out", tmp_path / "r")  # fmt: skip
    assert (tmp_path / "r" / "records.jsonl").is_file()
