"""Options, settings files and errors of a command: the same tests in every folder of the workspace."""

import dataclasses
import json
import os
from typing import Literal

from lab import cli
from lab.cli import HERE, Number, UserError, settings_from

import pytest
import torch


@dataclasses.dataclass
class Inner:
    steps: int = 3
    """Steps."""


@dataclasses.dataclass
class Settings:
    method: Literal["a", "b"] = "a"
    """Method."""
    eps: Number = 8 / 255
    """A radius."""
    batch: int = 128
    """Images a step."""
    seeds: tuple[int, ...] = (0,)
    """Seeds."""
    ratio: Number | None = None
    """A share, or none."""
    flag: bool = False
    """A switch."""
    inner: Inner = dataclasses.field(default_factory=Inner)
    """Settings of a part."""
    table: dict = dataclasses.field(default_factory=dict)
    """Anything."""
    device: str = "auto"
    """Where."""


WHOLE = json.loads(json.dumps(dataclasses.asdict(Settings(seeds=(3, 4), ratio=0.5, inner=Inner(7)))))


def stored(tmp_path, value) -> Settings:
    (tmp_path / "settings.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return settings_from(tmp_path / "settings.json", Settings, device="cpu")


def test_a_settings_file_is_read_back_as_it_was(tmp_path):
    assert stored(tmp_path, WHOLE) == Settings(seeds=(3, 4), ratio=0.5, inner=Inner(7), device="cpu")
    assert stored(tmp_path, {**WHOLE, "ratio": None, "eps": 1}) == Settings(
        seeds=(3, 4), eps=1.0, inner=Inner(7), device="cpu"
    )


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "{}", "", "{", "\xff"])
def test_a_file_that_holds_no_settings_is_told_in_one_line(tmp_path, text):
    with pytest.raises(UserError, match="settings.json (was edited|is not valid JSON)") as caught:
        stored(tmp_path, text)
    assert "make the run again" in str(caught.value)


@pytest.mark.parametrize(
    "key, value",
    [
        *[("method", v) for v in ("c", 1, None, [])],
        *[("eps", v) for v in ("0.1", None, {}, True, [0.1])],
        *[("batch", v) for v in (1.5, "2", None, True)],
        *[("seeds", v) for v in ("0", 0, [0, "1"], None, {})],
        *[("ratio", v) for v in ("x", [], {})],
        *[("flag", v) for v in (0, "yes", None)],
        *[("inner", v) for v in (None, [], {}, {"steps": "3"}, {"steps": 3, "more": 1})],
        *[("table", v) for v in (None, [], 3)],
    ],
)
def test_every_field_is_of_its_type(tmp_path, key, value):
    with pytest.raises(UserError, match=f"was edited or is of another version .*{key}"):
        stored(tmp_path, {**WHOLE, key: value})


def test_a_field_too_many_or_too_few_is_named(tmp_path):
    with pytest.raises(UserError, match="more is no setting"):
        stored(tmp_path, {**WHOLE, "more": 1})
    with pytest.raises(UserError, match="batch is missing"):
        stored(tmp_path, {k: v for k, v in WHOLE.items() if k != "batch"})
    with pytest.raises(UserError, match="no file"):
        settings_from(tmp_path / "nowhere" / "settings.json", Settings)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--batch", str(2**63)], "--batch 9223372036854775808 is too large"),
        (["--batch", str(-(2**63))], "--batch -9223372036854775808 is too large"),
        (["--eps", "1e-320"], "--eps 1e-320 is too small"),
        (["--eps", "1e-300"], "--eps 1e-300 is too small"),
        (["--seeds", str(10**30)], "--seeds"),
    ],
)
def test_numbers_that_no_machine_counts_with_are_refused(words, said):
    with pytest.raises(UserError, match=said):
        cli.parse(Settings, "", words)
    assert cli.parse(Settings, "", ["--batch", str(2**63 - 1), "--eps", "0"]).eps == 0.0


@dataclasses.dataclass
class Group:
    rate: float = 0.1
    width: int = 8
    weights: str = ""


@dataclasses.dataclass
class Grouped:
    lm: Group = dataclasses.field(default_factory=Group)


def test_numbers_and_homes_of_option_groups_are_looked_at_too(monkeypatch):
    for words in (["--lm.rate", "nan"], ["--lm.rate", "1e-300"], ["--lm.width", str(2**63)]):
        with pytest.raises(UserError, match=words[0]):
            cli.parse(Grouped, "", words)
    monkeypatch.setenv("HOME", "/somewhere")
    assert cli.parse(Grouped, "", ["--lm.weights=~/x", "--lm.rate", "0.5"]) == Grouped(Group(0.5, 8, "/somewhere/x"))


def test_what_is_wrong_is_said_once():
    with pytest.raises(UserError) as told:
        cli.parse(Settings, "", ["--nosuch", "1"])
    assert str(told.value).lower().count("unrecognized") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 3 TiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_no_memory_left_is_one_line_with_the_options_that_help(capsys, error):
    def main():
        cli.parse(Settings, "", [])
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.command(main)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text == "error: no memory left; make it smaller by --batch, --seeds\n"


def test_other_errors_of_the_code_are_not_hidden():
    def main():
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError, match="a fault"):
        cli.command(main)


def test_what_no_option_names_lies_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    assert cli.default_out("demo", "x") == os.path.join("runs", "demo", "x")
    monkeypatch.chdir(tmp_path)
    assert os.path.abspath(cli.default_out("demo", "x")) == str(HERE / "runs" / "demo" / "x")


def test_a_radius_is_shown_as_it_is_written(capsys):
    @dataclasses.dataclass
    class Some:
        eps: Number = 8 / 255
        """A radius."""
        lr: Number = 0.2
        """A rate: 51/255, but nobody writes it so."""

    with pytest.raises(SystemExit):
        cli.parse(Some, "text", ["--help"])
    said = capsys.readouterr().out
    assert "(default: 8/255)" in said and "(default: 0.2)" in said
    assert cli.parse(Some, "text", []).eps == 8 / 255
