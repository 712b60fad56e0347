"""train.py end to end: records, items, curves, a shared original, switches, rows and a model of one's own."""

import dataclasses
import json

from lab import runs

import pytest
import torch
from commands import DONE, LEARNED, TINY, run_main, told

import control
import data
import eval as command
import models
import study


def test_a_run_gives_every_record(done):
    records = [json.loads(line) for line in (done / "records.jsonl").read_text().splitlines()]
    keys = {(r["method"], r["setting"].partition(",")[0]) for r in records if r["dataset"] == "miniature forget-small"}
    labels = [f"{m} lr=0.0005 epochs=2" for m in ("GA", "NPO+KL", "GD")]
    want = {("Original", "calibration=none"), ("Retrained", "calibration=none")}
    want |= {(m, c) for m in labels for c in ("calibration=none", "calibration=UWC tau=0.9")}
    mixed = {("Interpolation to retrained", c) for c in ("calibration=none", "calibration=UWC tau=0.9")}
    assert keys == want | mixed
    (gold,) = (
        r["metrics"]
        for r in records
        if ("Interpolation to retrained", "none") == (r["method"], r["setting"].partition(",")[0][12:])
    )
    never = next(r for r in records if r["method"] == "Retrained")["metrics"]
    assert gold["ES_exact_unlearn"] == never["ES_exact_unlearn"] == gold["curve_ES_exact_unlearn"][-1]
    study = [r for r in records if r["setting"].startswith("attack=")]
    assert len(study) == 3 * 6 and all(r["metrics"]["models"] == 3 for r in study)
    m = next(r for r in records if r["method"] == labels[2] and "none" in r["setting"])["metrics"]
    assert 0 <= m["forget_quality"] <= 1 and 0 <= m["model_utility"] <= 1
    assert 0 <= m["model_utility_geometric"] <= 1 and m["forget_truth_ratio"] != m["forget_truth_ratio_arithmetic"]
    calibrated = next(r for r in records if r["method"] == labels[2] and "tau" in r["setting"])["metrics"]
    assert 0 <= calibrated["forget_quality"] <= 1 and calibrated["model_utility"] != m["model_utility"]
    original = next(r for r in records if r["method"] == "Original")["metrics"]
    # Else the tests below would compare equal numbers.
    assert original["ES_exact_unlearn"] > m["ES_exact_unlearn"] + 0.2 and 0.1 < m["ES_perturb_retain"] < 0.9
    retrained = next(r for r in records if r["method"] == "Retrained")["metrics"]
    assert retrained["forget_quality"] == pytest.approx(1.0)


def test_a_run_leaves_items_curves_and_no_checkpoint(done):
    rows = [json.loads(x) for x in (done / "seed0" / "items-forget-small-ga.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 3 * 2  # four sets of three items, without and with calibration
    assert {(r["questions"], r["part"]) for r in rows} == {
        (k, p) for k in ("exact", "perturb") for p in ("retain", "unlearn")
    }
    record = runs.read_record(done / "seed0" / "record-forget-small-ga-tau0.9.json")["metrics"]
    mine = [r["es"] for r in rows if (r["tau"], r["questions"], r["part"]) == (0.9, "exact", "unlearn")]
    assert sum(mine) / 3 == pytest.approx(record["ES_exact_unlearn"])
    lines = [json.loads(x) for x in (done / "seed0" / "metrics.jsonl").read_text().splitlines()]
    steps = [x["step"] for x in lines]
    assert steps == sorted(set(steps)) and {x["stage"].split()[1] for x in lines} == {"ga", "npo-kl", "gd"}
    assert not list((done / "checkpoint").glob("*")) if (done / "checkpoint").is_dir() else True
    made = list((done.parent / "models").glob("*/model.safetensors"))
    assert len(made) == 2 and not list((done.parent / "models").glob("*/checkpoint*"))


def test_a_finished_run_is_shown_and_other_settings_are_refused(done, capsys, monkeypatch):
    args = [*DONE, "--out", done]
    run_main(monkeypatch, *args)
    assert "is complete" in capsys.readouterr().out
    line = told(capsys, monkeypatch, [*args, "--tau", "0.8"])
    assert "holds a run with other settings (tau: [0.9], now [0.8])" in line


def test_the_original_is_shared_and_early_stopping_keeps_the_bar(done, tmp_path, capsys, monkeypatch):
    """Reads the fine-tuned original of the other run; ends with the last weights that met the bar."""
    folder = done.parent / "models"
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/model.safetensors")}
    args = [*LEARNED, "--methods", "ga", "--models", folder, "--early-stop", "0.9", "--stop-every", "1", "--unlearn-lr"]
    run_main(monkeypatch, *args, "0.01", "--only-methods", "--out", tmp_path / "s")
    assert not (tmp_path / "s" / "seed0" / "record-forget-small-original.json").exists()
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*/model.safetensors")} == before
    m = runs.read_record(tmp_path / "s" / "seed0" / "record-forget-small-ga-none.json")["metrics"]
    original = runs.read_record(done / "seed0" / "record-forget-small-original.json")["metrics"]
    if "stopped_at" in m:
        assert m["kept_step"] < m["stopped_at"]
    assert m["ES_exact_retain"] >= 0.9 * original["ES_exact_retain"] - 1e-9 or m["kept_step"] == 0
    assert not list((tmp_path / "s" / "checkpoint").glob("*"))


@pytest.mark.parametrize(
    "switch",
    [
        ["--precision", "mixed", "--drop-models"],
        ["--questions", "exact", "--answers", "2", "--eval-every", "1", "--attention", "eager"],
        ["--checkpointing"],
        ["--kl", "positions", "--pad-to", "64"],
        pytest.param(["--compile"], marks=pytest.mark.slow),
    ],
    ids=lambda s: s[0][2:] + s[1] if len(s) > 1 else s[0][2:],
)
def test_switches_of_the_loop(tmp_path, monkeypatch, switch):
    run_main(monkeypatch, *TINY, "--methods", "kl", *switch, "--out", tmp_path / "r")
    m = runs.read_record(tmp_path / "r" / "seed0" / "record-forget-small-kl-none.json")["metrics"]
    original = runs.read_record(tmp_path / "r" / "seed0" / "record-forget-small-original.json")["metrics"]
    assert m["logPPL_exact_unlearn"] > original["logPPL_exact_unlearn"]  # it went up on what is to be forgotten
    path = tmp_path / "r" / "seed0" / "model-forget-small-kl.safetensors"
    assert path.is_file() != ("--drop-models" in switch)
    if path.is_file():
        assert {v.dtype for v in runs.read_tensors(path)[0].values()} == {torch.float32}


def test_rows_and_model_of_ones_own_end_to_end(tmp_path, capsys, monkeypatch, tiny):
    """A user's two files and model folder: unlearned, calibrated, written as a folder that transformers loads and whose
    extraction strength is the record's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm, chat = tiny
    rows = [{"question": q.question, "answer": q.answer} for q in data.miniature(0).full[:24]]
    paths = {"retain": (tmp_path / "keep.jsonl", rows[:20]), "forget": (tmp_path / "lose.jsonl", rows[20:])}
    for path, some in paths.values():
        path.write_text("".join(json.dumps(r) + "\n" for r in some))
    items = [data.encode(dataclasses.replace(chat, template="chat"), r["question"], r["answer"]) for r in rows]
    study.relearn(lm, items * 60, chat, lr=1e-2, batch=24, accum=1, seed=0, show=False)  # the user's model knows them
    models.save(lm.hf, chat.tokenizer, tmp_path / "mine")
    args = ["--preset", "own", "--weights", tmp_path / "mine", "--device", "cpu", "--methods", "gd", "--tau", "0.9"]
    args += ["--forget", paths["forget"][0], "--retain", paths["retain"][0], "--unlearn-lr", "3e-3", "--batch", "2"]
    args += ["--accum", "1", "--alpha-step", "0.25", "--export", "--eval-every", "2", "--out", tmp_path / "r"]
    run_main(monkeypatch, *args)
    made = tmp_path / "r" / "seed0" / "calibrated-lose-gd-tau0.9"
    assert str(made) in capsys.readouterr().out
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
    record = runs.read_record(tmp_path / "r" / "seed0" / "record-lose-gd-tau0.9.json")
    raw = runs.read_record(tmp_path / "r" / "seed0" / "record-lose-gd-none.json")["metrics"]
    m = record["metrics"]
    for part, some in (("unlearn", rows[20:]), ("retain", rows[:2])):
        texts = [r["question"] for r in some], [r["answer"] for r in some]
        assert float(control.extraction_strength(hf, tokenizer, *texts).mean()) == pytest.approx(m[f"ES_exact_{part}"])
    assert 0 < m["alpha_exact"] < 1 and m["ES_exact_retain"] >= m["bar_exact"] > raw["ES_exact_retain"]
    assert m["ES_exact_unlearn"] < 1 and "ES_perturb_unlearn" not in m and record["dataset"] == "own lose"
    lines = [json.loads(x) for x in (tmp_path / "r" / "seed0" / "metrics.jsonl").read_text().splitlines()]
    seen = {x["step"]: x["ES_exact_retain"] for x in lines if "ES_exact_retain" in x}
    assert list(seen) == [2, 4, 6, 8, 10] and seen[10] == raw["ES_exact_retain"] < seen[2]
    again = ["--run", tmp_path / "r", "--device", "cpu", "--export", tmp_path / "out"]
    run_main(monkeypatch, *again, main=command.main)
    assert "says otherwise" not in capsys.readouterr().out
    run_main(monkeypatch, *again, "--alpha", "0", main=command.main)
    first, second, third = (
        AutoModelForCausalLM.from_pretrained(p).state_dict()
        for p in (made, tmp_path / "out" / "seed0-lose-gd-tau0.9", tmp_path / "out" / "seed0-lose-gd-alpha0")
    )
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert all(torch.equal(v, third[k]) for k, v in lm.hf.state_dict().items())  # alpha 0 is the user's own model

    def says(*more):
        return told(capsys, monkeypatch, [*args[:-1], tmp_path / "s", *more])

    assert "--attacks needs TOFU or the generated authors" in says("--attacks", "relearning")
    assert "--forget must name one file" in says("--forget", paths["forget"][0], paths["retain"][0])
    assert "no file" in says("--forget", tmp_path / "none.jsonl")
    line = told(capsys, monkeypatch, ["--preset", "own", "--device", "cpu", "--out", tmp_path / "s"])
    assert "--preset own needs --weights" in line
