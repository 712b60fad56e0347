"""envision.py against a real server process that streams, refuses, is busy, cuts the line, or names nothing."""

import json
import subprocess
import sys
from pathlib import Path

from lab import runs

import pytest

from settings import EvalSettings

NAMES = {"owl": ["kite", "paper dart", "leaf"]}


@pytest.fixture
def serve():
    started = []

    def start(way: str) -> str:
        command = [sys.executable, str(Path(__file__).with_name("serving.py")), way]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return f"http://127.0.0.1:{started[-1].stdout.readline().strip()}/v1"

    yield start
    for process in started:
        process.kill()
        process.communicate()


def envision(url: str, folder: Path, monkeypatch, key: str = "secret-123", option: str = "--url") -> int:
    """Exit code of the command, run in this process: starting Python with its libraries takes seconds."""
    import envision as command

    (folder / "ids.txt").write_text("owl\n")
    argv = ["envision.py", "--id", folder / "ids.txt", "--task", "near", "--n", "3", option, url, "--model", "m"]
    monkeypatch.setattr("sys.argv", [str(a) for a in [*argv, "--out", folder / "made.json", "--timeout", "5"]])
    monkeypatch.setenv("OPENAI_API_KEY", key)
    try:
        runs.command(command.main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize("way", ["plain", "stream", "refuse", "busy", "cut"])
def test_a_real_server_is_read_whatever_it_does(way, serve, tmp_path, monkeypatch):
    """`busy` and `cut` fail twice and pass then; `refuse` knows this key. Half a list never passes for a whole one."""
    assert envision(serve(way), tmp_path, monkeypatch) == 0
    assert json.loads((tmp_path / "made.json").read_text())["names"] == NAMES


def test_the_address_has_two_names(serve, tmp_path, monkeypatch):
    assert envision(serve("plain"), tmp_path, monkeypatch, option="--base-url") == 0
    assert json.loads((tmp_path / "made.json").read_text())["names"] == NAMES
    asked = runs.parse(EvalSettings, "", ["--base-url", "http://here/v1"])
    assert asked.url == "http://here/v1"


def test_a_refused_key_is_one_line(serve, tmp_path, monkeypatch, capsys):
    code = envision(serve("refuse"), tmp_path, monkeypatch, key="another")
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "refused the key (HTTP 401); set $OPENAI_API_KEY" in error
    assert "another" not in error and not (tmp_path / "made.json").exists()


def test_a_server_that_names_nothing_is_one_line_and_its_answers_are_kept(serve, tmp_path, monkeypatch, capsys):
    code = envision(serve("silent"), tmp_path, monkeypatch)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "gave no name for owl" in error
    kept = json.loads((tmp_path / "made.answers.json").read_text())["answers"]["owl"]
    assert kept[0]["answer"] == kept[0]["refused"][0] == "I cannot say."
