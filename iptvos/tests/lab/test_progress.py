"""Progress without a terminal: the same tests in every folder of the workspace."""

import sys

from lab import progress as module
from lab.progress import progress

import pytest


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(module, "EVERY", 1e-9)


@pytest.mark.parametrize("disable", ["1", None])
def test_log_lines_take_the_place_of_a_bar(monkeypatch, capsys, disable):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: disable is not None, raising=False)
    monkeypatch.setenv("TQDM_DISABLE", disable) if disable else monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert list(progress(range(3, 5), "AT", total=5, initial=3)) == [3, 4]
    bar = progress(desc="by hand", total=2)
    bar.update(2)
    bar.set_postfix(loss=1)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("AT: 5 of 5, ") for line in lines)
    assert any(line.startswith("by hand: 2 of 2, ") for line in lines) and not any("\r" in line for line in lines)


def test_short_work_says_nothing_and_hidden_work_neither(monkeypatch, capsys):
    assert list(progress(range(3), "x", hide=True)) == [0, 1, 2]
    monkeypatch.setattr(module, "EVERY", 60.0)
    assert list(progress(range(3), "x")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with progress(range(3), "x") as bar:
        assert not isinstance(bar, module.Lines) and not bar.disable
