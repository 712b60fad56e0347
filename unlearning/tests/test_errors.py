"""What the commands refuse, each in one line with exit code 2."""

import ast
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

from lab import runs

import pytest
import torch
from commands import TINY, run_main, told

import bench
import models
import settings
from trainer import Trainer


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--forget", "forget02"], "--forget forget02 is unknown; miniature has forget-small, forget-large"),
        (["--dataset", "tofu", "--forget", "forget-small"], "tofu has forget01, forget05, forget10"),
        (["--forget", "forget-small", "forget-small"], "twice"),
        (["--tau", "0"], "--tau must lie in (0, 1]"),
        (["--tau", "1.2"], "--tau must lie in (0, 1]"),
        (["--tau", "nan"], "tau"),
        (["--methods", "gaa"], "methods"),
        (["--methods", "npo", "--temperature", "2"], "change GA, GD and KL"),
        (["--methods", "ga", "--temperature", "2", "--cap", "2"], "one at a time"),
        (["--methods", "ga", "--select", "0"], "--select must lie in (0, 1]"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--lr", "0"], "--lr must be above 0"),
        (["--lr", "-2"], "--lr must be above 0"),
        (["--retain-weight", "-0.5"], "--retain-weight must not be negative"),
        (["--alpha-step", "2"], "--alpha-step must lie in (0, 1]"),
        (["--alpha-tolerance", "1e-30"], "--alpha-tolerance must be at least 1e-6"),
        (["--early-stop", "1.5"], "--early-stop must lie in [0, 1]"),
        (["--cap", "-1"], "--cap must be at least 0"),
        (["--unlearn-epochs", "0"], "--unlearn-epochs must be at least 1"),
        (["--max-length", "4"], "--max-length must be at least 8"),
        (["--interpolate"], "add --retrained"),
        (["--items", "5"], "--items is for --dataset tofu"),
        (["--authors", "5"], "--authors is for --dataset tofu"),
        (["--dataset", "tofu", "--forget", "forget05", "--items", "5", "--authors", "5"], "choose one"),
        (["--questions", "perturb"], "--questions takes exact"),
        (["--precision", "bf16"], "precision"),
        (["--probe-layers", "0", "1"], "--probe-layers"),
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", "1", "1"], "--seeds"),
        (["--kl", "mean"], "kl"),
        (["--relearn-lr", "0"], "--relearn-lr must be above 0"),
        (["--preset", "gpt"], "preset"),
        (["--device", "gpu"], "--device gpu is unknown"),
        (["--noise", "1"], "--noise"),
        (["--dataset", "tofu", "--forget", "forget05", "--data-dir", "/nowhere"], "no file /nowhere/tofu/full.json"),
        (["--weights", "/nowhere/model", "--preset", "phi"], "no folder /nowhere/model"),
        (["--optimizer", "paged8"], "needs the package bitsandbytes"),
        (["--data-dir", "~nosuchuser/x", "--dataset", "tofu", "--forget", "forget05"], "home folder"),
    ],
)
def test_wrong_options_and_missing_data(capsys, monkeypatch, tmp_path, args, words):
    assert words in told(capsys, monkeypatch, [*TINY, "--out", tmp_path / "r", *args])


@pytest.mark.parametrize("preset", ["phi", "llama2", "llama3"])
def test_a_model_that_is_not_here_offline(capsys, monkeypatch, tmp_path, preset):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = told(capsys, monkeypatch, [*TINY, "--preset", preset, "--data-dir", tmp_path, "--out", tmp_path / "r"])
    assert f"model {models.PRESETS[preset].source} could not be loaded" in line
    assert f"weights/{preset}" in line and "--download" in line


def test_two_runs_at_once_and_a_read_only_place(capsys, monkeypatch, tmp_path):
    held = runs.Run(tmp_path / "r", settings.Settings())
    assert "another process is writing" in told(capsys, monkeypatch, [*TINY, "--out", tmp_path / "r"])
    assert held.out.exists()
    assert "choose another --out" in told(capsys, monkeypatch, [*TINY, "--out", "/proc/nothing/r"])


def test_too_many_processes_for_the_micro_batches(tiny):
    class Three:
        num_processes, process_index, device = 3, 0, torch.device("cpu")

    with pytest.raises(runs.UserError, match="4 micro-batches cannot be shared by 3"):
        Trainer(tiny[0], Three(), lr=1e-3, steps=1, warmup=1, accum=4)


def test_a_single_step_of_rate_zero_is_refused(capsys, monkeypatch, tmp_path):
    line = told(capsys, monkeypatch, [*TINY, "--train-batch", "512", "--out", tmp_path / "r"])
    assert "a single step, whose learning rate is 0" in line
    small = [*TINY, "--batch", "64", "--out", tmp_path / "q"]
    for more in (["--dry-run"], []):
        assert "a single step, whose learning rate is 0" in told(capsys, monkeypatch, [*small, *more])
    run_main(monkeypatch, *TINY, "--methods", "ga", "--out", tmp_path / "q")  # the mended command is not refused


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(capsys, monkeypatch, tmp_path):
    run_main(monkeypatch, *TINY, "--dry-run", "--out", tmp_path / "r")
    assert "parameters, fp32) on miniature" in capsys.readouterr().out and not (tmp_path / "r").exists()


def test_help_and_an_error_from_the_shell(capsys, monkeypatch):
    """A real process ends with one line and exit code 2; help names every option."""
    wrong = subprocess.run(
        [sys.executable, "train.py", "--tau", "2"], cwd=runs.HERE, capture_output=True, text=True, timeout=120
    )
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, "--help")
    shown = capsys.readouterr().out
    assert not stop.value.code and all(f"--{f.name.replace('_', '-')}" in shown for f in fields(settings.Settings))


def test_the_commands_of_the_readme_do_not_stand_in_each_other_s_way():
    """Two runs of other settings in one default folder: the second would be refused."""
    text = (runs.HERE / "README.md").read_text().split("## Commands")[1].split("\n## ")[0].replace("\\\n", " ")
    lines = [shlex.split(x.split("#")[0]) for x in text.splitlines() if x.startswith("python train.py")]
    places: dict[str, dict] = {}
    for words in lines:
        s = runs.parse(settings.Settings, "", words[2:])
        s.check()
        s.resolve()
        told = {k: v for k, v in asdict(s).items() if k not in ("out", "data_dir", "device", "download")}
        assert s.dry_run or places.setdefault(s.out, told) == told, words
    assert len(places) > 5


def test_every_option_that_an_error_or_the_readme_names_is_there():
    """An option that was renamed sends the reader to one that does not exist."""
    here = Path(settings.__file__).parent
    kinds = (settings.Settings, settings.EvalSettings, bench.BenchSettings)
    known = {"--" + f.name.replace("_", "-") for kind in kinds for f in fields(kind)}
    known |= {"--help", "--scale", "--cores", "--config", "--config_file", "--local-dir"}
    calls = [n for p in here.glob("*.py") for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.Call)]
    said = [c.value for n in calls if getattr(n.func, "id", "") == "UserError" for c in ast.walk(n)
            if isinstance(c, ast.Constant) and isinstance(c.value, str)]  # fmt: skip
    said.append((here / "README.md").read_text())
    found = {o for text in said for o in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text)}
    assert len(found) > 40 and not found - known, found - known
