"""eval.py on a finished run: the same numbers again, records that were changed, errors."""

import json
import shutil

from lab import runs

import pytest
import torch
from commands import run_main, told

import eval as command
import evaluation
import models
import originals
import settings
import study


def test_evaluation_again_agrees_with_the_records(done, tmp_path, capsys, monkeypatch):
    run_main(monkeypatch, "--run", done, "--device", "cpu", "--literal", "2", main=command.main)
    text = capsys.readouterr().out
    assert "says otherwise" not in text and text.count("0 of 2 items differ") == 3 * 4
    record = runs.read_record(done / "seed0" / "record-forget-small-ga-tau0.9.json")["metrics"]
    assert f"exact retain {record['ES_exact_retain']:.3f}" in text
    run_main(monkeypatch, "--run", done, "--device", "cpu", "--methods", "ga", "--alpha", "0", main=command.main)
    original = runs.read_record(done / "seed0" / "record-forget-small-original.json")["metrics"]
    want = f"exact retain {original['ES_exact_retain']:.3f}, exact unlearn {original['ES_exact_unlearn']:.3f}"
    assert want in capsys.readouterr().out
    mine = shutil.copytree(done, tmp_path / "r")
    args = ["--run", mine, "--device", "cpu", "--methods", "gd", "--tau", "0.5", "--alpha-search", "bisect", "--write"]
    run_main(monkeypatch, *args, "--utility", main=command.main)
    assert "model utility at alpha 1" in capsys.readouterr().out
    new = runs.read_record(mine / "seed0" / "record-eval-forget-small-gd-tau0.5.json")
    assert new["table"] == "own-eval" and "tau=0.5" in new["setting"]


def test_an_attack_begins_with_the_unlearned_weights(done):
    """Relearning, which comes first here, moves them."""
    stored = runs.read_json(done / "settings.json")
    s = settings.Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    bench = originals.Bench(s, 0, originals.accelerator_of(torch.device("cpu")))
    bench.set_original()
    tensors, _ = runs.read_tensors(evaluation.unlearned_path(done / "seed0", "forget-small", "ga"))
    models.set_weights(bench.lm, tensors, "ga")
    found = study.attack("token noising", bench.lm, bench.chat, bench.sets("forget-small"), s, 0, [])
    record = runs.read_record(done / "seed0" / "record-forget-small-ga-none.json")["metrics"]
    assert found == pytest.approx({k: record[f"study.{k}@token noising"] for k in found}, rel=1e-6)
    assert record["study.logPPL_unlearn@relearning"] != record["study.logPPL_unlearn"]


def test_evaluation_again_names_a_record_that_was_changed(done, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "r"
    shutil.copytree(done, copy)
    shutil.copytree(done.parent / "models", tmp_path / "models")
    path = copy / "seed0" / "record-forget-small-ga-tau0.9.json"
    record = json.loads(path.read_text())
    record["metrics"]["ES_exact_unlearn"] += 0.125
    path.write_text(json.dumps(record))
    run_main(monkeypatch, "--run", copy, "--device", "cpu", "--methods", "ga", main=command.main)
    assert "the record says otherwise, by up to 0.1250" in capsys.readouterr().out


def test_evaluation_tells_what_is_wrong(done, tmp_path, capsys, monkeypatch):
    def says(*args):
        return told(capsys, monkeypatch, ["--run", done, "--device", "cpu", *args], command.main)

    assert "--tau must lie in (0, 1]" in says("--tau", "1.5")
    assert "--alpha must lie in [0, 1]" in says("--alpha", "2")
    assert "has no rmu; its methods: ga, npo-kl, gd" in says("--methods", "rmu")
    assert "has no forget01" in says("--forget", "forget01")
    line = told(capsys, monkeypatch, ["--run", tmp_path / "none"], command.main)
    assert "no file" in line


def test_what_was_not_measured_is_a_dash_and_an_empty_control_is_told(capsys):
    row = {"ES_exact_retain": 0.0, "ES_exact_unlearn": 0.25, "alpha_exact": 1.0, "vacuous_exact": 1}
    place = {"dataset": "own x", "setting": "calibration=UWC tau=0.9"}
    evaluation.show([{**place, "method": "GD", "metrics": row}])
    told = capsys.readouterr().out
    assert "nan" not in told and told.splitlines()[3].split() == ["GD", "1.000", "0.000", "0.250", "-", "-"]
    assert "nothing was controlled" in told
    evaluation.show([{**place, "method": "GD", "metrics": {**row, "ES_exact_retain": 0.5, "vacuous_exact": 0}}])
    assert "controlled" not in capsys.readouterr().out
