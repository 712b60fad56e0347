"""A command started by a Python without the requirements: the same tests in every folder of the workspace."""

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import lab
from lab.cli import HERE

import pytest


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python with nothing installed, and a folder with the commands."""
    root = tmp_path_factory.mktemp("bare")
    venv.create(root / "python", with_pip=False, symlinks=True)
    folder = root / "folder"
    (folder / "lab").mkdir(parents=True)
    for name in ("train.py", "eval.py", "bench.py", "requirements.in"):
        shutil.copy(HERE / name, folder / name)
    for path in (HERE / "lab").glob("*.py"):
        shutil.copy(path, folder / "lab" / path.name)
    return root / "python" / "bin" / "python", folder


COMMANDS = [["train.py"], ["eval.py"], ["bench.py"], ["-m", "lab.plan"], ["-m", "lab.tables"], ["-m", "lab.compare"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_an_environment_one_line_says_how_to_make_one(bare, command):
    python, folder = bare
    done = subprocess.run([python, *command, "--help"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert "make env-folder" in done.stderr and "pip install --no-deps -r requirements.txt" in done.stderr


def test_with_an_environment_it_goes_over_and_keeps_the_arguments(bare):
    python, folder = bare
    other = folder / ".venv" / "bin" / "python"
    other.parent.mkdir(parents=True)
    other.write_text('#!/bin/sh\necho "over: $*"\n')
    other.chmod(0o755)
    for words in (["train.py", "--eps", "8/255"], ["-m", "lab.plan", "--scale", "demo"]):
        done = subprocess.run([python, *words], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout == f"over: {' '.join(words)}\n"
        assert done.stderr.count("\n") == 1 and "going on with .venv/bin/python" in done.stderr


def test_missing_names_are_found(tmp_path):
    path = tmp_path / "requirements.in"
    path.write_text("# a comment\ntorch==2.11.0  # tensors\nno_such-thing>=1\nelsewhere ; sys_platform == 'win32'\n")
    assert lab.missing(path) == ["no_such-thing"]
    assert lab.missing(HERE / "requirements.in") == []


def test_imports_of_other_programs_are_left_alone(bare):
    python, folder = bare
    words = [python, "-c", "import sys; sys.path.insert(0, '.'); import lab; print(lab.HERE)"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and Path(done.stdout.strip()) == folder.resolve()
    assert os.path.samefile(lab.HERE, HERE) and sys.prefix


def test_examples_of_a_command_stand_on_lines_of_their_own():
    """--help joins lines that are not indented."""
    for path in sorted(HERE.glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""
        joined = [line for line in text.splitlines() if re.match(r"(python|accelerate|snakemake|pytest) ", line)]
        assert not joined, f"{path.name}: indent {joined[0]}"
