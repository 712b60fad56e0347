"""What a user can get wrong: one line, exit code 2."""

import ast
import dataclasses
import re
import shlex
import sys
from pathlib import Path

from lab import runs
from lab.plan import jobs, load_plan

import pytest

import bench
import evaluation.benchmarks
import mining
import train
from settings import EvalSettings, Settings


@pytest.fixture
def fails(monkeypatch, capsys):
    """Call a command in this process (a start of Python costs seconds) and check its one line and exit code."""

    def check(module, words, *expected):
        monkeypatch.delenv("REPRO_DATA", raising=False)
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            runs.command(module.main)
        lines = [x for x in capsys.readouterr().err.splitlines() if x and "it/s" not in x]
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        for word in expected:
            assert word in lines[0], lines[0]

    return check


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--stage", "4"], "--stage 4"), (["--variant", "nosuch"], "nosuch"), (["--preset", "nosuch"], "nosuch"),
        (["--lr", "nan"], "finite"), (["--lr", "-2"], "--lr"), (["--lambda-csr", "-1"], "--lambda-csr"),
        (["--batch", "-1"], "--batch"), (["--seeds", "-1"], "--seeds"), (["--seeds", "1", "1"], "--seeds"),
        (["--null-share", "1.5"], "--null-share"), (["--squeeze", "2"], "--squeeze"),
        (["--images-share", "0"], "--images-share"),
        (["--clip", "0"], "--clip"), (["--then", "1"], "--then"), (["--then", "3", "2"], "--then"),
        (["--stage", "3"], "stage 3 needs"), (["--dataset", "files"], "--files"),
        (["--preset", "deem"], "--dataset paper"),
        (["--preset", "llava", "--dataset", "paper"], "--variant llava"), (["--variant", "llava"], "--preset llava"),
        (["--preset", "digits", "--dataset", "paper"], "words of its scenes"), (["--label", "{x}"], "no setting"),
        (["--encoder.name", "conv:16"], "too few stages"), (["--sd.resolution", "7"], "a multiple of 4"),
        (["--preset", "tiny", "--sd.resolution", "32"], "a multiple of 64"),
        (["--preset", "tiny", "--encoder.resolution", "8"], "--encoder.resolution 8"),
        (["--label", "{steps.x}"], "cannot be filled in"), (["--label", "{steps:zz}"], "cannot be filled in"),
        (["--device", "cuda"], "CUDA"), (["--init", "/nosuch"], "no weights of seed 0"),
        (["--scenes.count", "1"], "--scenes.count"),
        (["--encoder.weights", "/nosuch"], "conv:WIDTHS is random"), (["--max-tokens", "5"], "at least 11"),
    ],
)  # fmt: skip
def test_wrong_settings(fails, tmp_path, words, expected):
    import torch

    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    fails(train, [*words, "--out", tmp_path / "x"], expected)
    assert not (tmp_path / "x" / "seed0").exists()


@pytest.mark.parametrize(
    "preset, word",
    [
        ("deem", "convnext_base_w_320"),
        ("deem-large", "convnext_large_d_320"),
        ("deem-vit", "ViT-L-14"),
        ("llava", "ViT-L-14-336"),
    ],
)
def test_missing_weights_are_named(fails, tmp_path, preset, word):
    variant = ["--variant", "llava"] if preset == "llava" else []
    words = ["--preset", preset, *variant, "--dataset", "paper", "--data-dir", tmp_path, "--out", tmp_path / "x"]
    fails(train, [*words, "--device", "cpu"], word, "--download")


def test_missing_data_is_named(fails, tmp_path):
    words = ["--preset", "tiny", "--dataset", "paper", "--data-dir", tmp_path, "--device", "cpu"]
    fails(train, [*words, "--out", tmp_path / "a"], "mmc4")
    fails(train, [*words, "--stage", "2", "--out", tmp_path / "b"], "LLaVA")
    fails(train, [*words, "--stage", "3", "--out", tmp_path / "c"], "Osprey")
    fails(
        train,
        ["--preset", "tiny", "--dataset", "files", "--files", "nosuch.tar", "--out", tmp_path / "d"],
        "nosuch.tar",
    )


def test_dry_run_prints_parts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--dry-run", "--variant", "deem-star", "--device", "cpu"])
    train.main()
    said = capsys.readouterr().out
    assert "trunk" in said and "frozen" in said and "1 NTP + 5 NIP + 0 CSR" in said


def test_nothing_to_learn_is_told(fails, tmp_path):
    words = "--variant clean --lambda-nip 0 --lambda-ntp 0 --steps 2 --batch 2 --scenes.count 20 --device cpu".split()
    words += "--scenes.text 1 --scenes.encoder 1 --scenes.denoiser 1 --scenes.align 1".split()
    fails(train, [*words, "--out", tmp_path / "x"], "nothing to learn")
    assert not list(tmp_path.rglob("record*"))


def test_bench_errors(fails):
    fails(bench, ["--repeats", "0"], "--repeats")


def test_every_planned_run_parses():
    """Names, options and values of plan.yaml are those of the commands."""
    import dataclasses

    classes = {
        "train.py": Settings,
        "bench.py": bench.BenchSettings,
        "eval.py": EvalSettings,
    }
    plan = load_plan()
    for scale in plan["scales"]:
        for job in jobs(plan, scale):
            words = job.command(scale)[1:]
            s = runs.parse(classes[job.script], "", list(words))
            assert dataclasses.is_dataclass(s)
            if job.script == "train.py":
                s.check()
                s.resolve()
                assert "{" not in s.label
            if scale == "paper":
                assert job.needs, job.name


def test_help_explains_every_setting():
    import re

    text = (runs.HERE / "settings.py").read_text()
    body = text[text.index("class EncoderSettings") : text.index("    @property")]
    body += (runs.HERE / "scenes" / "options.py").read_text()
    fields = re.findall(r"^    (\w+): ", body, re.M)
    groups = (Settings, *(type(getattr(Settings(), k)) for k in ("encoder", "lm", "sd", "scenes")))
    assert len(fields) == sum(len(g.__dataclass_fields__) for g in groups)
    for name in fields:
        assert re.search(rf'    {name}: [^\n]*\n    """', body), name


def test_the_commands_of_the_readme_do_not_stand_in_each_other_s_way():
    """Two runs of other settings in one default folder: the second would be refused."""
    text = (runs.HERE / "README.md").read_text().split("## Commands")[1].split("\n## ")[0].replace("\\\n", " ")
    lines = [shlex.split(x.split("#")[0]) for x in text.splitlines() if x.startswith("python train.py")]
    places: dict[str, dict] = {}
    for words in lines:
        s = runs.parse(Settings, "", words[2:])
        s.check()
        s.resolve()
        told = {k: v for k, v in dataclasses.asdict(s).items() if k not in ("out", "data_dir", "device", "download")}
        assert s.dry_run or places.setdefault(s.out, told) == told, words
    assert len(places) > 5


def options(kind, before="--"):
    for f in dataclasses.fields(kind):
        part = f.default_factory if dataclasses.is_dataclass(f.default_factory) else None
        yield from options(part, f"{before}{f.name}.") if part else [before + f.name.replace("_", "-")]


def test_every_option_that_an_error_or_the_readme_names_is_there():
    """An option that was renamed sends the reader to one that does not exist."""
    here = Path(train.__file__).parent
    kinds = (Settings, EvalSettings, bench.BenchSettings, mining.Settings, evaluation.benchmarks.BuildSettings)
    known = {o for kind in kinds for o in options(kind)}
    known |= {"--help", "--scale", "--cores", "--config", "--config_file", "--no-deps", "--scenes"}
    modules = [p for d in (".", "vision", "documents", "evaluation", "scenes") for p in (here / d).glob("*.py")]
    calls = [n for p in modules for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.Call)]
    said = [c.value for n in calls if getattr(n.func, "id", "") == "UserError" for c in ast.walk(n)
            if isinstance(c, ast.Constant) and isinstance(c.value, str)]  # fmt: skip
    said.append((here / "README.md").read_text())
    found = {o for text in said for o in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text)}
    assert len(found) > 40 and not found - known, found - known
