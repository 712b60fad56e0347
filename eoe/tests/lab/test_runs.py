"""Run folders, settings, records and the plan: the same tests in every folder of the workspace."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from lab import runs
from lab.runs import Number, UserError

import pytest
import torch

HERE = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Settings:
    eps: Number = 8 / 255
    """A radius."""
    seeds: tuple[int, ...] = (0,)
    """Seeds."""
    out: str = ""
    """Folder."""


WHERE = {"table": "t", "dataset": "d", "setting": "s", "method": "m", "scale": "smoke"}


def a_record(run: runs.Run, seed: int, **metrics: float) -> dict:
    return run.record(seed, seconds=1.0, data={"name": "d", "n": 3}, metrics=metrics, where=WHERE, device="cpu")


@pytest.mark.parametrize("text, value", [("8/255", 8 / 255), ("0.5", 0.5), ("1e-3", 1e-3), ("3", 3.0)])
def test_fractions_parse(text, value):
    assert runs.parse(Settings, "", ["--eps", text]).eps == value


@pytest.mark.parametrize("text", ["nan", "inf", "8/0", "x", "1/2/3", "0/0"])
def test_a_number_that_is_none_is_refused_in_one_line(text):
    with pytest.raises((UserError, ZeroDivisionError)) as caught:
        runs.parse(Settings, "", ["--eps", text])
    assert caught.type is UserError
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seeds", [["-1"], ["0", "0"], ["2147483648"], []])
def test_bad_seeds_are_refused(seeds):
    with pytest.raises(UserError):
        runs.parse(Settings, "", ["--seeds", *seeds])


def test_a_home_folder_is_put_in_place_of_its_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert runs.parse(Settings, "", ["--out=~/x"]).out == "/somewhere/x"
    assert runs.parse(Settings, "", ["--out", "a~/x"]).out == "a~/x"
    with pytest.raises(UserError, match="home folder it names is not known"):
        runs.parse(Settings, "", ["--out", "~nosuchuser/x"])


def test_unknown_option_is_named_in_one_line():
    with pytest.raises(UserError, match="--epsilon"):
        runs.parse(Settings, "", ["--epsilon", "1"])


def test_user_and_system_errors_end_with_code_2_and_one_line(capsys):
    def user():
        raise UserError("no such\n  thing")

    def system():
        open("/nonexistent-folder/x", "w")

    for function, words in ((user, "no such thing"), (system, "No such file")):
        with pytest.raises(SystemExit) as stop:
            runs.command(function)
        assert stop.value.code == 2
        text = capsys.readouterr().err
        assert words in text and text.count("\n") == 1 and "Traceback" not in text


def test_write_leaves_the_old_file_and_no_rest_when_it_fails(tmp_path):
    path = tmp_path / "a.json"
    runs.write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        runs.write_json(path, {"x": math.nan})
    with pytest.raises(TypeError):
        runs.write_text(path, 3)
    assert runs.read_json(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "state.safetensors"
    runs.write_tensors(path, {"a": torch.ones(3)}, {"epoch": "1"})
    code = (
        "import resource, torch, pathlib, signal\n"
        "from lab import runs\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"runs.command(lambda: runs.write_tensors(pathlib.Path({str(path)!r}), {{'a': torch.ones(9999)}}, {{}}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "large" in done.stderr
    tensors, meta = runs.read_tensors(path)
    assert meta == {"epoch": "1"} and torch.equal(tensors["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_broken_files_are_named(tmp_path):
    (tmp_path / "a.json").write_text('{"x": ')
    (tmp_path / "b.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00garbage")
    with pytest.raises(UserError, match="a.json"):
        runs.read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="b.safetensors"):
        runs.read_tensors(tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="no file"):
        runs.read_tensors(tmp_path / "c.safetensors")


def test_a_run_is_held_by_one_process_and_one_set_of_settings(tmp_path):
    run = runs.Run(tmp_path / "r", Settings(eps=0.1))
    with pytest.raises(UserError, match="another process"):
        runs.Run(tmp_path / "r", Settings(eps=0.1))
    run.log(0, [{"step": 1, "loss": 1.0}])
    run._lock.close()
    with pytest.raises(UserError, match="eps: 0.1, now 0.2"):
        runs.Run(tmp_path / "r", Settings(eps=0.2))
    assert not runs.Run(tmp_path / "r", Settings(eps=0.1, out="elsewhere")).complete


def test_a_start_that_made_nothing_does_not_block_other_settings(tmp_path):
    runs.Run(tmp_path / "r", Settings(eps=0.1))._lock.close()
    runs.Run(tmp_path / "r", Settings(eps=0.2))._lock.close()
    assert runs.read_json(tmp_path / "r" / "settings.json")["eps"] == 0.2


def test_record_is_complete_and_refuses_nan(tmp_path):
    run = runs.Run(tmp_path / "r", Settings())
    record = a_record(run, 0, f1=1.5)
    assert sorted(runs.RECORD_KEYS) == sorted(record)
    assert runs.read_record(tmp_path / "r" / "seed0" / "record.json") == record
    with pytest.raises(UserError, match="f1 of seed 1"):
        a_record(run, 1, f1=math.nan)
    assert not list((tmp_path / "r" / "seed1").glob("record*"))
    a_record(run, 2, f1=2.0)
    assert [r["seed"] for r in run.finish()] == [0, 2]
    assert run.complete and len((tmp_path / "r" / "records.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("damage", [{"metrics": 3}, {"scale": "huge"}, {"seed": None}])
def test_an_edited_record_is_refused(tmp_path, damage):
    record = a_record(runs.Run(tmp_path / "r", Settings()), 0, f1=1.0)
    key, value = next(iter(damage.items()))
    if value is None:
        del record[key]
    else:
        record[key] = value
    with pytest.raises(UserError, match="not a record"):
        runs.check_record(record, "here")


def test_log_drops_lines_after_the_checkpoint(tmp_path):
    run = runs.Run(tmp_path / "r", Settings())
    run.log(0, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}])
    path = tmp_path / "r" / "seed0" / "metrics.jsonl"
    # Lines that are damaged or without a step, and one that a kill cut off.
    path.write_text(path.read_text() + '{"step": 2, "loss"}\n{"loss": 1.0}\n[2]\n{"step": 4, "lo')
    run.log(0, [{"step": 3, "loss": 9.0}], keep_to=2)
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 0.5, 9.0]
    run.log(0, [{"step": 4, "loss": 8.0}])
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 0.5, 9.0, 8.0]
    assert len(list(path.parent.glob("events.out.tfevents*"))) == 2, "a file of TensorBoard's a start, not a call"


def test_data_dir_order(monkeypatch):
    monkeypatch.setenv("REPRO_DATA", "/some/where")
    assert runs.data_dir("") == Path("/some/where") and runs.data_dir("/else") == Path("/else")
    monkeypatch.delenv("REPRO_DATA")
    assert runs.data_dir("") == HERE / "data"


def test_data_dir_of_nobody_is_told():
    with pytest.raises(UserError, match="home folder it names is not known"):
        runs.data_dir("~nosuchuser/data")


def test_half_files_of_a_killed_start_are_swept(tmp_path):
    old, young, kept = tmp_path / ".a.json.x.tmp", tmp_path / "seed0" / ".b.tmp", tmp_path / "seed0" / ".c.tmp"
    young.parent.mkdir()
    for path in (old, young, kept):
        path.write_text("half")
    for path in (old, young):
        os.utime(path, (1, 1))
    run = runs.Run(tmp_path, Settings(eps=0.1))
    assert not old.exists() and not young.exists() and kept.exists() and not run.complete
    run.finish()
    assert not kept.exists() and run.complete


def test_device_names():
    assert runs.device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA"):
            runs.device("cuda")


def test_runs_on_one_machine_take_different_gpus(tmp_path, monkeypatch):
    """Two devices: the first two runs get one each, a third is told there is none."""
    monkeypatch.setattr(runs.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"gpu{i}"))
    monkeypatch.setattr(runs, "_HELD", [])
    assert [runs._free_gpu() for _ in range(3)] == [0, 1, None]
    runs._HELD.pop(0).close()  # the first run ended
    assert runs._free_gpu() == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: None)
    runs._HELD.pop().close()
    assert runs.device("auto") == torch.device("cuda", 0)
