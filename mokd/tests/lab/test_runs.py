"""Run folders, settings, records and the plan: the same tests in every folder of the workspace."""

import dataclasses
import json
import math
import os
import shutil
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


DAMAGE = [
    ("metrics", 3),
    ("metrics", {}),
    ("metrics", None),
    ("metrics", [1.0]),
    ("metrics", {"f1": "text"}),
    ("metrics", {"f1": math.inf}),
    ("metrics", {"f1": 1.0, "curve": [1.0, math.nan]}),
    ("code", None),
    ("code", {}),
    ("code", {"commit": "x", "dirty": "no"}),
    ("host", {}),
    ("host", "cpu"),
    ("data", {}),
    ("data", None),
    ("data", {"name": 3}),
    ("settings", []),
    ("method", None),
    ("table", 1),
    ("seed", None),
    ("seed", -1),
    ("seed", True),
    ("seconds", "long"),
    ("seconds", math.nan),
    ("peak_memory_mb", -1.0),
    ("scale", "huge"),
    ("scale", None),
]


@pytest.mark.parametrize("key, value", DAMAGE)
def test_an_edited_record_is_refused(tmp_path, key, value):
    record = a_record(runs.Run(tmp_path / "r", Settings()), 0, f1=1.0)
    assert runs.check_record(record, "here") is record
    with pytest.raises(UserError, match=f"here is not a record .*{key}"):
        runs.check_record({**record, key: value}, "here")
    with pytest.raises(UserError, match=f"{key} is missing"):
        runs.check_record({k: v for k, v in record.items() if k != key}, "here")


def test_what_is_no_object_is_no_record():
    for value in (None, [], "text", 3):
        with pytest.raises(UserError, match="it is no object"):
            runs.check_record(value, "here")


def test_a_run_without_one_of_its_seeds_is_not_complete(tmp_path):
    run = runs.Run(tmp_path / "r", Settings(seeds=(0, 1)))
    for seed in (0, 1):
        a_record(run, seed, f1=1.0)
    run.finish()
    assert run.complete
    shutil.rmtree(tmp_path / "r" / "seed1")
    assert not run.complete


def test_checkpoints_go_at_the_end_with_those_that_a_kill_left(tmp_path):
    run = runs.Run(tmp_path / "r", Settings())
    runs.write_tensors(tmp_path / "r" / "checkpoint" / "seed0.safetensors", {"a": torch.ones(1)})
    a_record(run, 0, f1=1.0)
    run.finish()
    assert (tmp_path / "r" / "checkpoint").is_dir()
    run.finish(keep_checkpoint=False)
    assert not (tmp_path / "r" / "checkpoint").exists() and run.complete


def test_a_finished_run_of_somebody_else_is_read(tmp_path, monkeypatch):
    run = runs.Run(tmp_path / "r", Settings())
    a_record(run, 0, f1=1.0)
    run.finish()
    run._lock.close()
    mine = open

    def refused(path, mode="r", *more, **named):
        if "w" in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return mine(path, mode, *more, **named)

    monkeypatch.setattr(runs, "open", refused, raising=False)
    assert runs.Run(tmp_path / "r", Settings()).complete
    with pytest.raises(UserError, match="other settings"):
        runs.Run(tmp_path / "r", Settings(eps=0.5))
    (tmp_path / "r" / "records.jsonl").unlink()
    with pytest.raises(PermissionError):
        runs.Run(tmp_path / "r", Settings())


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    runs.write_tensors(tmp_path / "a.safetensors", {"w": torch.tensor([1.0, math.nan]), "n": torch.tensor([3])})
    assert "w" in runs.read_tensors(tmp_path / "a.safetensors")[0]
    with pytest.raises(UserError, match="w holds values that are not finite"):
        runs.read_weights(tmp_path / "a.safetensors")


def test_log_drops_lines_after_the_checkpoint(tmp_path):
    run = runs.Run(tmp_path / "r", Settings())
    run.log(0, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}])
    path = tmp_path / "r" / "seed0" / "metrics.jsonl"
    # Lines that are damaged or without a step, and one that a kill cut off.
    path.write_text(path.read_text() + '{"step": 2, "loss"}\n{"loss": 1.0}\n[2]\n{"step": 4, "lo')
    path.write_bytes(path.read_bytes() + b"\n\xff\xfe no text")
    run.log(0, [{"step": 3, "loss": 9.0}], keep_to=2)
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 0.5, 9.0]
    run.log(0, [{"step": 4, "loss": 8.0}])
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 0.5, 9.0, 8.0]
    assert len(list(path.parent.glob("events.out.tfevents*"))) == 2, "a file of TensorBoard's a start, not a call"


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    run = runs.Run(tmp_path / "r", Settings(eps=0.1))
    run.same_data(0, ["a", "b"])
    run.same_data(1, ["c"])  # what is drawn for a seed is its own
    run._lock.close()
    runs.Run(tmp_path / "r", Settings(eps=0.2))._lock.close()  # nothing was made yet
    run = runs.Run(tmp_path / "r", Settings(eps=0.2))
    run.same_data(0, ["a", "b"])
    with pytest.raises(UserError, match="begun with other data .*seed 1"):
        run.same_data(1, ["d"])
    (tmp_path / "r" / "seed0" / ".data.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        run.same_data(0, ["a", "b"])


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
    a_record(run, 0, f1=1.0)
    run.finish()
    assert not kept.exists() and run.complete


def test_device_names(monkeypatch):
    assert runs.device("cpu") == torch.device("cpu")
    for name in ("meta", "mps", "cuda:", "cuda:x", "cuda:-1", "CPU", "", "cpu:0", "cuda:99999"):
        with pytest.raises(UserError, match=f"--device {name} is unknown"):
            runs.device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA"):
        runs.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="has 2 of them"):
        runs.device("cuda:2")


def test_a_run_in_bf16_is_told_that_its_cpu_emulates_it(monkeypatch, capsys):
    for has, told in ((False, True), (True, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"amx_bf16": has, "avx2": True})
        runs.device("cpu", bf16=True)
        assert ("no bf16 instructions" in capsys.readouterr().err) == told
        runs.device("cpu")
        assert not capsys.readouterr().err
    assert runs.bf16_is_fast(torch.device("cuda"))


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


def test_what_a_gpu_is_sent_lies_in_pinned_memory():
    said = []

    class Held:
        device = SimpleNamespace(type="cpu")

        def pin_memory(self):
            said.append("pinned")
            return self

        def to(self, device, non_blocking):
            said.append((device.type, non_blocking))

    for place in ("cuda", "cpu"):
        runs.sent(Held(), SimpleNamespace(type=place))
    assert said == ["pinned", ("cuda", True), ("cpu", True)]
    assert torch.equal(runs.sent(torch.arange(3), torch.device("cpu")), torch.arange(3))
