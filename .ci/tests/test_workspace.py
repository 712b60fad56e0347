"""The helper of the Makefile, and what the Makefile refuses."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import workspace
from test_cells import run

ROOT = Path(workspace.__file__).resolve().parents[1]
TEN = "unlearning iptvos part eoe gpl mokd lap deem echoalign aaer".split()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REPRO_DATA", raising=False)
    return tmp_path


def junit(folder: Path, **numbers):
    (folder / "runs").mkdir(parents=True)
    told = " ".join(f'{k}="{v}"' for k, v in numbers.items())
    (folder / "runs" / "junit.xml").write_text(f"<testsuites><testsuite {told}/></testsuites>")


def test_tests_are_summed_and_a_crash_counts_as_a_failure(here, capsys):
    junit(here / "a", tests=10, failures=1, errors=1, skipped=2)
    junit(here / "b", tests=3, failures=0, errors=0, skipped=0)
    assert workspace.count("a=1", "b=0") == "9 passed, 2 failed, 2 skipped"
    assert "a: 6 passed, 2 failed, 2 skipped" in capsys.readouterr().out
    assert workspace.count("b=2") == "3 passed, 1 failed, 0 skipped"  # all passed, and yet not 0
    assert workspace.count("gone=0") == "0 passed, 1 failed, 0 skipped"


def test_lint_names_twins_reaches_imports_and_locks(here):
    for name in ("a", "b"):
        (here / name).mkdir()
        (here / name / "same.py").write_text("x = 1\n")
        (here / name / "requirements.txt").write_text("numpy==1\n")
    assert workspace.lint("a b", "a b", "same.py: a b") == ""
    (here / "b" / "same.py").write_text("x = 2\n")
    (here / "a" / "bad.py").write_text("import b\nfrom b.c import d\nimport a\npath = '../b/x'\n")
    (here / "a" / ".venv").mkdir()
    (here / "a" / ".venv" / "other.py").write_text("import b\n")
    (here / "b" / "requirements.txt").write_text("--index-url https://example.org\n")
    assert workspace.lint("a b", "a b", "same.py gone.py: a b").splitlines() == [
        "b/same.py: differs from its twin a/same.py: make sync FROM=...",
        "a/bad.py:4: reaches outside its folder",
        "a/bad.py:1: imports the folder b/",
        "a/bad.py:2: imports the folder b/",
        "b/requirements.txt: names a package index: make lock-b",
    ]
    (here / "b" / "same.py").unlink()
    assert "b/same.py: missing, its twin a/same.py is there" in workspace.lint("a b", "a b", "same.py: a b")


def test_lint_names_circles_inside_functions_too_and_long_modules(here):
    (here / "a" / "room").mkdir(parents=True)
    (here / "a" / "requirements.txt").write_text("numpy==1\n")
    (here / "a" / "one.py").write_text("import two\n")
    (here / "a" / "two.py").write_text("def f():\n    from room.three import g\n    return g\n")
    (here / "a" / "room" / "three.py").write_text("from room import four\n")
    (here / "a" / "room" / "four.py").write_text("import five\n")
    (here / "a" / "five.py").write_text("import math\n")
    assert workspace.lint("a", "a") == ""
    (here / "a" / "five.py").write_text("def f():\n    import one\n")
    assert workspace.lint("a", "a") == "a: import each other in a circle: five, one, room.four, room.three, two"
    (here / "a" / "five.py").write_text("x = 1\n" * 401)
    assert workspace.lint("a", "a") == "a/five.py: 401 lines, more than 400: split it by what it serves"


def test_twins_are_folders_too_and_sync_copies_them(here):
    for name in ("a", "b"):
        (here / name / "lab").mkdir(parents=True)
        (here / name / "requirements.txt").write_text("numpy==1\n")
    (here / "a" / "lab" / "x.py").write_text("x = 1\n")
    (here / "b" / "lab" / "old.py").write_text("x = 2\n")
    told = workspace.lint("a b", "a b", "lab: a b").splitlines()
    assert told == [
        "a/lab/old.py: missing, its twin b/lab/old.py is there: make sync FROM=b",
        "b/lab/x.py: missing, its twin a/lab/x.py is there: make sync FROM=a",
    ]
    assert workspace.sync("a", "a b", "lab: a b") == "b/lab/x.py"
    assert workspace.lint("a b", "a b", "lab: a b") == "" and not (here / "b" / "lab" / "old.py").exists()


def test_a_lock_that_would_be_compiled_is_named_once_for_all(here):
    (here / "a").mkdir()
    (here / ".tools").mkdir()
    (here / "a" / "requirements.txt").write_text("numpy==1\nconnection-pool==0.0.3\n")
    uv = here / "uv"
    uv.write_text("#!/bin/sh\ncat > asked\necho 'no usable wheels' >&2\nexit 1\n")
    uv.chmod(0o755)
    told = workspace.wheels(str(uv), "a").splitlines()
    assert len(told) == len(workspace.PLATFORMS) and "no usable wheels" in told[0]
    assert (here / "asked").read_text() == "numpy==1"  # what is pure Python is not asked for
    uv.write_text("#!/bin/sh\nexit 0\n")
    assert workspace.wheels(str(uv), "a") == ""
    uv.write_text("#!/bin/sh\nexit 1\n")
    assert workspace.wheels(str(uv), "a") == ""  # the same lock is not asked about again


def test_folders_are_reproduced_side_by_side_the_longest_first(here, capfd):
    """A make that writes what it was asked, fails in b and leaves c without its comparison; x has no committed runs."""
    make = here / "make"
    make.write_text(
        "#!/bin/bash\nf=${2#reproduce-}\necho asked $*\n[ $f != b ] || exit 3\nmkdir -p $f/runs/demo\n"
        """[ $f = c ] && echo no || echo '{"line": "'$f': 3 of 3"}' > $f/runs/demo/comparison.json\n"""
        "[ $f != c ] || echo '{' > $f/runs/demo/comparison.json\n"
    )
    make.chmod(0o755)
    for name, seconds in {"a": [5, 5, 5], "b": [20], "c": [7, 6]}.items():
        (here / name / "results").mkdir(parents=True)
        lines = (json.dumps({"run": "r", "seed": k, "seconds": s}) for k, s in enumerate(seconds) for _ in range(9))
        (here / name / "results" / "demo.jsonl").write_text("\n".join(lines))
    with pytest.raises(SystemExit) as stop:
        workspace.reproduce("1", str(make), "demo", "x", "a", "b", "c")
    said = capfd.readouterr()
    out, begun = said.out.splitlines(), re.findall(r"reproduce: (\w) at scale demo begins", said.err)
    assert stop.value.code == 1 and begun == ["b", "a", "c", "x"]
    assert out[0] == "x: 3 of 3; 0.0 minutes" and out[1] == "a: 3 of 3; 0.0 minutes"
    assert out[2] == "b: FAILED, see b/runs/reproduce-demo.log" and "c: FAILED, its comparison" in out[3]
    assert (here / "a/runs/reproduce-demo.log").read_text() == "asked JOBS=1 reproduce-a\n"
    with pytest.raises(SystemExit) as stop:
        workspace.reproduce("2", str(make), "demo", "a", "x")
    assert stop.value.code == 0


def test_targets_run_side_by_side_with_their_lines_together(here, capfd):
    make = here / "make.sh"
    make.write_text("#!/bin/bash\necho first $1; sleep 0.2; echo second $1; [[ $1 != *-b ]]\n")
    make.chmod(0o755)
    with pytest.raises(SystemExit) as stop:
        workspace.together("2", str(make), "test", "a", "b", "report")
    assert stop.value.code == 1
    out, err = capfd.readouterr()
    assert sorted(out.split()) == [".ci=0", "a=0", "b=1"]
    for name in ("a", "b", "report"):
        assert f"=== test: {name}\nfirst test-{name}\nsecond test-{name}\n=== test: {name} ended with" in err


def test_two_makes_wait_for_each_other(here):
    """The second shell gets the lock when the first one ends, and says that it waits."""
    helper = f"{sys.executable} {ROOT}/.ci/workspace.py wait gpl/.venv"
    script = f'exec 9>>lock; {helper}; echo "$1 begins" >> log; sleep 1; echo "$1 ends" >> log'
    both = [subprocess.Popen(["bash", "-euc", script, "x", n], stderr=subprocess.PIPE, text=True) for n in "ab"]
    said = [p.communicate(timeout=60)[1] for p in both]
    lines = (here / "log").read_text().split("\n")
    assert [line[2:] for line in lines[:4]] == ["begins", "ends"] * 2 and [p.returncode for p in both] == [0, 0]
    assert sorted(said) == ["", "waiting for another make: gpl/.venv\n"]


def test_audit_has_command_cost_missing_data_and_differences(here, monkeypatch):
    needs = [{"path": "d/x", "origin": "o"}, {"path": "d/y", "origin": "o"}]
    runs = {
        "done": run(records=3),
        "left": run(hours=2.5, needs=needs),
        "more": run(hours=0.5),
    }
    findings = [
        {"finding": "F", "switch": "`--s`", "effect": "+1"},
        {"finding": "G", "switch": "none", "effect": ""},
    ]
    (here / "a" / "results").mkdir(parents=True)
    report = {"runs": {"paper": runs}, "differences": findings}
    (here / "a" / "results" / "report.json").write_text(json.dumps(report))
    (here / "a" / "data" / "d").mkdir(parents=True)
    (here / "a" / "data" / "d" / "y").touch()
    (here / "b").mkdir()
    assert workspace.audit("a", "b", "c").splitlines() == [
        "a: 1 of 3 runs have records, 3.0 hours left",
        "  left (table main): 2.5 h; missing d/x",
        "    cd a && .venv/bin/python train.py --out x",
        "  more (table main): 0.5 h",
        "    cd a && .venv/bin/python train.py --out x",
        "  differs: F",
        "    switch: `--s`; effect: +1",
        "  differs: G",
        "    switch: none",
        "b: make record-b first",
        "c: not here yet",
    ]
    monkeypatch.setenv("REPRO_DATA", str(here))
    assert "missing d/x, d/y" in workspace.audit("a")


def make(*words, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "REPRO_DATA", "GPUS")}
    return subprocess.run(
        ["make", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**env, **environment},
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (["smoke-nosuch"], "make smoke-nosuch: no such folder. Here: "),
        (["nosuch"], "make nosuch: no such target; `make help` lists them"),
        (["smoke", "FOLDERS=gpl,lap"], "FOLDERS has no folder gpl,lap: take some of "),
        (["report", "FOLDERS=gpll"], "FOLDERS has no folder gpll"),
        (["reproduce-all", "FOLDERS="], "FOLDERS is empty"),
        (["sync"], "make sync FROM=X: name the folder"),
        (["reproduce-gpl", "SCALE=large"], "SCALE=large is not a scale"),
        (["reproduce-gpl", "SCALE="], "SCALE= is not a scale"),
        (
            ["reproduce-gpl", "PROFILE=nosuch"],
            "PROFILE=nosuch is not in profiles/: use one of slurm",
        ),
        (["reproduce-gpl", "JOBS=0"], "JOBS=0 is not a number of processes"),
        (["reproduce-gpl", "JOBS=two"], "JOBS=two is not a number of processes"),
        (["reproduce-gpl", "PROCESSES=0"], "PROCESSES=0 is not a number of processes"),
        (
            ["reproduce-gpl", "PROCESSES=2", "JOBS=2"],
            "PROCESSES=2 takes the GPUs of this machine from the first on",
        ),
        (
            ["help", "PYTHON=nosuch-python", "python-ok"],
            "PYTHON=nosuch-python is not a Python 3.11 or 3.12",
        ),
    ],
)
def test_make_refuses_before_it_builds_anything(words, said):
    done = make(*words)
    assert done.returncode == 2 and said in done.stderr, done.stderr


def test_a_linked_environment_makes_nothing_dirty(here):
    """`.venv` as a link is no folder: a pattern that ends in a slash would let it stand as untracked."""
    subprocess.run(["git", "init", "-q"], check=True)
    shutil.copy(ROOT / ".gitignore", here)
    (here / "gpl").mkdir()
    (here / "gpl" / ".venv").symlink_to(here)
    said = subprocess.run(
        ["git", "status", "--porcelain", "-uall"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == "?? .gitignore\n"


def test_an_environment_that_cannot_be_built_says_why(here):
    """The reason is the tool's own; nothing is guessed, and no half environment counts as built."""
    for name in (
        "Makefile",
        ".ci/workspace.py",
        "gpl/requirements.in",
        "gpl/requirements.txt",
    ):
        (here / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, here / name)
    fake = here / "bin" / "uv"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\n[ "$1" != pip ] || { echo "error: no compiler named cc" >&2; exit 1; }\n')
    fake.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "FOLDERS")}
    words = ["make", "env-gpl", "FOLDERS=gpl", f"PYTHON={sys.executable}"]
    env["PATH"] = f"{fake.parent}:{env['PATH']}"
    done = subprocess.run(words, cwd=here, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "error: no compiler named cc" in done.stderr, done.stderr
    assert "gpl: the environment could not be built, for the reason above" in done.stderr
    assert "index" not in done.stderr and not (here / "gpl/.venv/.stamp").exists()


def test_no_code_comes_with_weights():
    """Libraries that pick a class by a file's words are told, in each call, not to run code that lies beside it."""
    found = 0
    for path in sorted(
        p for f in TEN for p in (ROOT / f).rglob("*.py") if ".venv" not in p.parts and "tests" not in p.parts
    ):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not ast.unparse(call.func).endswith(".from_pretrained"):
                continue
            if re.match(r"Auto[A-Z]", ast.unparse(call.func)):  # AutoencoderKL is a class of its own
                said = [k for k in call.keywords if k.arg == "trust_remote_code" and ast.unparse(k.value) == "False"]
                given = any(k.arg is None for k in call.keywords) and '"trust_remote_code": False' in path.read_text()
                assert said or given, f"{path.relative_to(ROOT)}:{call.lineno}"
                found += 1
            for k in call.keywords:
                assert k.arg != "trust_remote_code" or ast.unparse(k.value) == "False", path
    assert found >= 5


@pytest.mark.parametrize(
    "given, is_",
    [
        ("/full/path", "/full/path"),
        ("rel", f"{ROOT}/rel"),
        ("~/x", "~/x"),
        ("with a space", f"{ROOT}/with a space"),
    ],
)
def test_the_data_folder_is_made_absolute(given, is_):
    assert f"Now: {is_}\n" in make("help", REPRO_DATA=given).stdout


def workflow(*words, **environment):
    """The command of a folder's workflow, as make would run it."""
    return make("--dry-run", "reproduce-gpl", *words, **environment).stdout


def test_a_machine_with_gpus_runs_as_many_at_once(tmp_path):
    assert "--resources gpu" not in workflow("GPUS=0")
    assert "--resources gpu=3)" in workflow("GPUS=3")
    fake = tmp_path / "nvidia-smi"
    told = [
        "GPU 0: A (UUID: GPU-1)",
        "GPU 1: A (UUID: GPU-2)",
        "  MIG 1g.10gb (UUID: MIG-GPU-3)",
    ]
    fake.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in told))
    fake.chmod(0o755)
    assert "--resources gpu=2)" in workflow(PATH=f"{tmp_path}:{os.environ['PATH']}")


def test_a_changed_snakefile_is_read_again(tmp_path):
    """Snakemake reads its copy of the Snakefile, and never renews one: each start needs a place of its own."""
    lines = workflow().splitlines()
    assert any('workspace.py" wait' in line for line in lines)  # one workflow of a folder at a time
    place = next(line for line in lines if line.startswith("sources="))
    script = f'mkdir -p .snakemake; {place}; echo "$sources"'
    told = [subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True) for _ in range(2)]
    assert told[0].stdout.startswith(".snakemake/") and told[0].stdout != told[1].stdout
    assert '--runtime-source-cache-path "$sources"' in "\n".join(lines)


def test_a_home_that_cannot_be_written_to_is_not_needed(tmp_path):
    told = [line for line in workflow().splitlines() if "XDG_CACHE_HOME" in line]
    script = "\n".join([*told, 'echo "${XDG_CACHE_HOME:-}"'])
    for home, is_ in (
        (str(tmp_path), ""),
        ("/proc/nosuch", f"{tmp_path}/.snakemake/cache"),
    ):
        env = {"PATH": os.environ["PATH"], "HOME": home}
        done = subprocess.run(
            ["bash", "-euc", script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=env,
        )
        assert (done.returncode, done.stdout.strip()) == (0, is_), done.stderr


def limits(*words, **environment):
    """What the workflow is told of cores, jobs and GPUs: the lines of the recipe that say it, run by a shell."""
    lines = workflow(*words, **environment).splitlines()
    told = [line for line in lines if line.startswith(("threads=", "limits"))]
    script = "\n".join([*told, 'printf "%s\\n" "${limits[@]}"'])
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | environment
    return subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True, env=env).stdout.split()


def test_several_processes_of_a_run_need_one_run_at_a_time_or_a_cluster():
    assert "processes=4 " in workflow("PROCESSES=4", "JOBS=1")
    assert "processes=4 " in workflow("PROCESSES=4", "PROFILE=slurm")
    assert "processes=1 " in workflow()


def test_runs_share_the_cores_of_this_machine():
    assert limits("CORES=8", "JOBS=4") == [
        "--cores",
        "4",
        "--set-threads",
        "run=1",
    ]  # demo: one thread, whose sums repeat
    real = "SCALE=real"
    assert limits(real, "CORES=8", "JOBS=4") == [
        "--cores",
        "8",
        "--set-threads",
        "run=2",
    ]
    assert limits(real, "CORES=8", "JOBS=16") == [
        "--cores",
        "16",
        "--set-threads",
        "run=1",
    ]
    assert limits(real, "CORES=8", "JOBS=4", OMP_NUM_THREADS="3") == [
        "--cores",
        "12",
        "--set-threads",
        "run=3",
    ]


def test_a_cluster_is_not_limited_by_the_machine_that_submits():
    profile = ["--profile", f"{ROOT}/profiles/slurm"]
    assert limits("PROFILE=slurm", "GPUS=1", "CORES=2") == profile
    assert limits("PROFILE=slurm", "JOBS=7") == limits("PROFILE=slurm", JOBS="7") == [*profile, "--jobs", "7"]
    assert limits("PROFILE=slurm", OMP_NUM_THREADS="3") == [
        *profile,
        "--set-threads",
        "run=3",
    ]


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("script", ["run", "test-slurm"])
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / script]).returncode == 0


def test_the_readmes_table_of_findings_is_that_of_the_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "one" / "results"
    results.mkdir(parents=True)
    told = [("demo", "holds", False), ("demo", "holds", False), ("demo", "undecided", True)]
    told += [("real", "not measured", True), ("paper", "does not hold", False)]
    claims = [{"scale": scale, "verdict": verdict, "control": control} for scale, verdict, control in told]
    (results / "report.json").write_text(json.dumps({"claims": claims, "finding": ["A | B.", "More."]}))
    (tmp_path / "README.md").write_text(f"a\n{workspace.BEGIN}\nold\n{workspace.END}\nb\n")
    assert "is not that of the committed records" in workspace.findings("check", "README.md", "one", "two")
    assert "old" in (tmp_path / "README.md").read_text()
    assert workspace.findings("write", "README.md", "one", "two")
    text = (tmp_path / "README.md").read_text()
    line = "| [`one`](one/RESULTS.md) | A \\| B. | paper: 1 does not hold<br>demo: 2 hold; controls: 1 undecided |"
    assert (
        line in text
        and "| `two` | no committed records | |" in text
        and text.startswith("a\n")
        and text.endswith("b\n")
    )
    assert workspace.findings("check", "README.md", "one", "two") == ""
    assert workspace.findings("write", "README.md", "one", "two") == ""
    (tmp_path / "README.md").write_text("no marks")
    assert "not there once each" in workspace.findings("check", "README.md", "one")
