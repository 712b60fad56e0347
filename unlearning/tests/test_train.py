"""The commands end to end: records, resume, errors, evaluation again, two processes."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

from lab import runs

import pytest
import torch

import control
import data
import eval as command
import evaluation
import models
import originals
import settings
import study
import train
import trainer
from trainer import Trainer

HERE = runs.HERE
TINY = ["--device", "cpu", "--epochs", "1", "--unlearn-epochs", "2", "--forget", "forget-small", "--eval-items", "3"]
TINY += ["--alpha-step", "0.5", "--alpha-tolerance", "0.2", "--tau", "0.9"]
LEARNED = ["16" if TINY[k - 1] == "--epochs" else a for k, a in enumerate(TINY)]  # ES falls when unlearning


def run_main(monkeypatch, *args, main=train.main):
    gc.collect()  # a traceback kept by pytest may hold the run of a call before, and with it the lock of its folder
    monkeypatch.setattr(sys, "argv", ["x", *map(str, args)])
    main()


def told(capsys, monkeypatch, args, main=train.main):
    """The one line a command ends with."""
    gc.collect()
    monkeypatch.setattr(sys, "argv", ["x", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        runs.command(main)
    text = capsys.readouterr().err.split("\r")[-1]
    assert stop.value.code == 2 and "Traceback" not in text
    lines = [x for x in text.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def metrics_of(out, seed=0):
    """Metrics of every record of a seed without the times."""
    found = {}
    for path in sorted((out / f"seed{seed}").glob("record*.json")):
        m = runs.read_record(path)["metrics"]
        found[path.name] = {k: v for k, v in m.items() if "seconds" not in k}
    return found


def same_runs(a, b, seed=0):
    assert metrics_of(a, seed) == metrics_of(b, seed) and metrics_of(a, seed)
    for path in sorted((a / f"seed{seed}").glob("model-*.safetensors")):
        x, y = (runs.read_tensors(p / f"seed{seed}" / path.name)[0] for p in (a, b))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    lines = [(p / f"seed{seed}" / "metrics.jsonl").read_text() for p in (a, b)]
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run with two methods, utility and a retrained model."""
    out = tmp_path_factory.mktemp("done") / "r"
    with pytest.MonkeyPatch.context() as patch:
        attacks = [
            "--attacks",
            "relearning",
            "token noising",
            "embedding probing",
            "--utility",
            "--retrained",
            "--interpolate",
            "--both-searches",
        ]
        run_main(patch, *LEARNED, "--methods", "ga", "npo-kl", "gd", *attacks, "--out", out)
    return out


def test_a_run_gives_every_record(done):
    records = [json.loads(line) for line in (done / "records.jsonl").read_text().splitlines()]
    keys = {(r["method"], r["setting"].partition(",")[0]) for r in records if r["dataset"] == "miniature forget-small"}
    labels = [f"{m} epochs=2" for m in ("GA", "NPO+KL", "GD")]
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
    m = next(r for r in records if r["method"] == labels[0] and "none" in r["setting"])["metrics"]
    assert 0 <= m["forget_quality"] <= 1 and 0 <= m["model_utility"] <= 1
    assert 0 <= m["model_utility_geometric"] <= 1 and m["forget_truth_ratio"] != m["forget_truth_ratio_arithmetic"]
    calibrated = next(r for r in records if r["method"] == labels[0] and "tau" in r["setting"])["metrics"]
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
    args = [*LEARNED, "--methods", "ga", "npo-kl", "gd", "--utility", "--retrained", "--both-searches", "--out", done]
    args += ["--interpolate"]
    args += ["--attacks", "relearning", "token noising", "embedding probing"]
    run_main(monkeypatch, *args)
    assert "is complete" in capsys.readouterr().out
    line = told(capsys, monkeypatch, [*args, "--tau", "0.8"])
    assert "holds a run with other settings (tau: [0.9], now [0.8])" in line


def test_evaluation_again_agrees_with_the_records(done, capsys, monkeypatch):
    run_main(monkeypatch, "--run", done, "--device", "cpu", "--literal", "2", main=command.main)
    text = capsys.readouterr().out
    assert "says otherwise" not in text and text.count("0 of 2 items differ") == 3 * 4
    record = runs.read_record(done / "seed0" / "record-forget-small-ga-tau0.9.json")["metrics"]
    assert f"exact retain {record['ES_exact_retain']:.3f}" in text
    run_main(monkeypatch, "--run", done, "--device", "cpu", "--methods", "ga", "--alpha", "0", main=command.main)
    original = runs.read_record(done / "seed0" / "record-forget-small-original.json")["metrics"]
    want = f"exact retain {original['ES_exact_retain']:.3f}, exact unlearn {original['ES_exact_unlearn']:.3f}"
    assert want in capsys.readouterr().out
    args = ["--run", done, "--device", "cpu", "--methods", "gd", "--tau", "0.5", "--alpha-search", "bisect", "--write"]
    run_main(monkeypatch, *args, "--utility", main=command.main)
    assert "model utility at alpha 1" in capsys.readouterr().out
    new = runs.read_record(done / "seed0" / "record-eval-forget-small-gd-tau0.5.json")
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


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("at", [1, 5, 7])
def test_resume_is_exact(tmp_path, monkeypatch, at):
    """Cut at a checkpoint of the fine-tuning or of a method; records, weights and curves are bitwise the same."""
    args = [*TINY, "--methods", "ga", "npo-kl", "--checkpoint-steps", "2", "--seeds", "0"]
    run_main(monkeypatch, *args, "--out", tmp_path / "a" / "r")
    count, save = [0], Trainer.save

    def cut(self, path, seconds):
        save(self, path, seconds)
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, *args, "--out", tmp_path / "b" / "r")
    monkeypatch.setattr(Trainer, "save", save)
    assert list((tmp_path / "b").rglob("*checkpoint*/*.safetensors")) + list((tmp_path / "b").rglob("checkpoint.*"))
    kept = tmp_path / "b" / "r" / "seed0" / ".data.json"
    own = kept.read_text()
    kept.write_text('["another copy"]')
    with pytest.raises(runs.UserError, match="begun with other data"):
        run_main(monkeypatch, *args, "--out", tmp_path / "b" / "r")
    kept.write_text(own)
    run_main(monkeypatch, *args, "--out", tmp_path / "b" / "r")
    same_runs(tmp_path / "a" / "r", tmp_path / "b" / "r")


def test_lines_of_a_fine_tuning_outlive_a_kill(tmp_path, monkeypatch):
    """They are written as it goes on; a new start from before them drops what it will do again."""
    monkeypatch.setattr(trainer, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    update = Trainer.update

    def cut(self, micro):
        if self.step == 5:
            raise KeyboardInterrupt
        return update(self, micro)

    args = [*TINY, "--methods", "ga", "--checkpoint-steps", "3", "--out", tmp_path / "r"]

    def steps():
        (path,) = (tmp_path / "models").glob("*/metrics.jsonl")
        return [json.loads(x)["step"] for x in path.read_text().splitlines()]

    monkeypatch.setattr(Trainer, "update", cut)
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, *args)
    assert steps() == [1, 2, 3, 4, 5]
    monkeypatch.setattr(Trainer, "update", update)
    run_main(monkeypatch, *args)
    assert steps() == list(range(1, steps()[-1] + 1)) and steps()[-1] > 6


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_kill_and_start_again_gives_the_same(tmp_path, monkeypatch):
    """A real process, killed in the middle of a method."""
    args = [*TINY, "--methods", "ga", "gd", "--checkpoint-steps", "1", "--unlearn-epochs", "6"]
    command = [sys.executable, "train.py", *args, "--out", str(tmp_path / "b" / "r")]
    process = subprocess.Popen(
        command, cwd=HERE, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    path = tmp_path / "b" / "r" / "checkpoint" / "seed0-forget-small-gd.safetensors"
    start = time.monotonic()
    while not path.exists() and process.poll() is None and time.monotonic() - start < 150:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists() and not (tmp_path / "b" / "r" / "records.jsonl").exists()
    run_main(monkeypatch, *args, "--out", tmp_path / "b" / "r")
    run_main(monkeypatch, *args, "--out", tmp_path / "a" / "r")
    same_runs(tmp_path / "a" / "r", tmp_path / "b" / "r")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tmp_path, capsys, monkeypatch):
    from methods import Unlearner

    micro = Unlearner.micro

    def poisoned(self, step, k):
        loss, parts = micro(self, step, k)
        return (loss * torch.nan if step >= 3 else loss), parts

    monkeypatch.setattr(Unlearner, "micro", poisoned)
    args = [*TINY, "--methods", "ga", "--checkpoint-steps", "1", "--out", tmp_path / "r"]
    line = told(capsys, monkeypatch, args)
    assert "the loss or its gradient is not a finite number" in line and "lower the learning rate" in line
    tensors, meta = runs.read_tensors(tmp_path / "r" / "checkpoint" / "seed0-forget-small-ga.safetensors")
    assert meta["step"] == "3" and all(v.isfinite().all() for v in tensors.values())
    assert not list((tmp_path / "r" / "seed0").glob("record-forget-small-ga*"))


def test_broken_and_foreign_checkpoints_are_told(done, tmp_path, capsys, monkeypatch):
    args = [*TINY, "--methods", "ga", "--models", done.parent / "models", "--out", tmp_path / "r"]
    path = tmp_path / "r" / "checkpoint" / "seed0-forget-small-ga.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut off")
    assert "is damaged" in told(capsys, monkeypatch, args)
    runs.write_tensors(path, {"model.x": torch.zeros(1)}, {"step": "1", "seconds": "1"})
    assert "weights of another network" in told(capsys, monkeypatch, args)
    path.unlink()
    run_main(monkeypatch, *args)
    model = tmp_path / "r" / "seed0" / "model-forget-small-ga.safetensors"
    model.write_bytes(model.read_bytes()[:100])
    assert "is damaged" in told(capsys, monkeypatch, ["--run", tmp_path / "r", "--device", "cpu"], command.main)
    model.unlink()
    assert "train the run first" in told(
        capsys, monkeypatch, ["--run", tmp_path / "r", "--device", "cpu"], command.main
    )


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--forget", "forget02"], "--forget forget02 is unknown; miniature has forget-small, forget-large"),
        (["--dataset", "tofu", "--forget", "forget-small"], "tofu has forget01, forget05, forget10"),
        (["--forget", "forget-small", "forget-small"], "twice"),
        (["--tau", "0"], "--tau must lie in (0, 1]"),
        (["--tau", "1.2"], "--tau must lie in (0, 1]"),
        (["--tau", "nan"], "tau"),
        (["--methods", "gaa"], "methods"),
        (["--methods", "npo", "--temperature", "2"], "change GA, GD and KL"),
        (["--methods", "ga", "--temperature", "2", "--cap", "2"], "one at a time"),
        (["--methods", "ga", "--select", "0"], "--select must lie in (0, 1]"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--lr", "0"], "--lr must be above 0"),
        (["--lr", "-2"], "--lr must be above 0"),
        (["--retain-weight", "-0.5"], "--retain-weight must not be negative"),
        (["--alpha-step", "2"], "--alpha-step must lie in (0, 1]"),
        (["--alpha-tolerance", "1e-30"], "--alpha-tolerance must be at least 1e-6"),
        (["--early-stop", "1.5"], "--early-stop must lie in [0, 1]"),
        (["--cap", "-1"], "--cap must be at least 0"),
        (["--unlearn-epochs", "0"], "--unlearn-epochs must be at least 1"),
        (["--max-length", "4"], "--max-length must be at least 8"),
        (["--interpolate"], "add --retrained"),
        (["--items", "5"], "--items is for --dataset tofu"),
        (["--authors", "5"], "--authors is for --dataset tofu"),
        (["--dataset", "tofu", "--forget", "forget05", "--items", "5", "--authors", "5"], "choose one"),
        (["--questions", "perturb"], "--questions takes exact"),
        (["--precision", "bf16"], "precision"),
        (["--probe-layers", "0", "1"], "--probe-layers"),
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", "1", "1"], "--seeds"),
        (["--kl", "mean"], "kl"),
        (["--preset", "gpt"], "preset"),
        (["--device", "gpu"], "--device gpu is unknown"),
        (["--noise", "1"], "--noise"),
        (["--dataset", "tofu", "--forget", "forget05", "--data-dir", "/nowhere"], "no file /nowhere/tofu/full.json"),
        (["--weights", "/nowhere/model", "--preset", "phi"], "no folder /nowhere/model"),
        (["--optimizer", "paged8"], "needs the package bitsandbytes"),
        (["--data-dir", "~nosuchuser/x", "--dataset", "tofu", "--forget", "forget05"], "home folder"),
    ],
)
def test_wrong_options_and_missing_data(capsys, monkeypatch, tmp_path, args, words):
    assert words in told(capsys, monkeypatch, [*TINY, "--out", tmp_path / "r", *args])


@pytest.mark.parametrize("preset", ["phi", "llama2", "llama3"])
def test_a_model_that_is_not_here_offline(capsys, monkeypatch, tmp_path, preset):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = told(capsys, monkeypatch, [*TINY, "--preset", preset, "--data-dir", tmp_path, "--out", tmp_path / "r"])
    assert f"model {models.PRESETS[preset].source} could not be loaded" in line
    assert f"weights/{preset}" in line and "--download" in line


def test_two_runs_at_once_and_a_read_only_place(capsys, monkeypatch, tmp_path):
    held = runs.Run(tmp_path / "r", settings.Settings())
    assert "another process is writing" in told(capsys, monkeypatch, [*TINY, "--out", tmp_path / "r"])
    assert held.out.exists()
    assert "choose another --out" in told(capsys, monkeypatch, [*TINY, "--out", "/proc/nothing/r"])


def test_too_many_processes_for_the_micro_batches(tiny):
    class Three:
        num_processes, process_index, device = 3, 0, torch.device("cpu")

    with pytest.raises(runs.UserError, match="4 micro-batches cannot be shared by 3"):
        Trainer(tiny[0], Three(), lr=1e-3, steps=1, warmup=1, accum=4)


def test_a_single_step_of_rate_zero_is_refused(capsys, monkeypatch, tmp_path):
    line = told(capsys, monkeypatch, [*TINY, "--train-batch", "512", "--out", tmp_path / "r"])
    assert "a single step, whose learning rate is 0" in line


def test_commands_from_the_shell():
    """Once through real processes: help, a dry run, an error."""

    def shell(*args):
        return subprocess.run([sys.executable, *args], cwd=HERE, capture_output=True, text=True, timeout=120)

    assert "--tau" in shell("train.py", "--help").stdout
    dry = shell("train.py", "--dry-run", "--device", "cpu")
    assert dry.returncode == 0 and "parameters, fp32) on miniature" in dry.stdout
    wrong = shell("train.py", "--tau", "2")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1


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


# ----------------------------------------------------------------------------------------------- processes, real models


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """Micro-batches are shared out: the same weights up to rounding, the same records' keys."""
    args = [*TINY, "--methods", "npo-kl", "rmu", "--train-batch", "16", "--train-accum", "2", "--batch", "4"]
    args += ["--accum", "2", "--checkpoint-steps", "0"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [*launch, "train.py", *args, "--out", str(tmp_path / "two" / "r")],
        cwd=HERE, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    run_main(monkeypatch, *args, "--out", tmp_path / "one" / "r")
    assert metrics_of(tmp_path / "one" / "r").keys() == metrics_of(tmp_path / "two" / "r").keys()
    for method in ("npo-kl", "rmu"):
        name = f"model-forget-small-{method}.safetensors"
        x, y = (runs.read_tensors(tmp_path / k / "r" / "seed0" / name)[0] for k in ("one", "two"))
        for k in x:  # Adam divides by tiny moments at first: single entries may differ by a step
            assert float((x[k] - y[k]).abs().mean()) < 1e-4


@pytest.mark.slow
def test_smollm2_from_its_package(tmp_path, monkeypatch):
    """The real model of the package on TOFU rows: it answers, its template has its tokens, a step changes ES."""
    if not os.environ.get("REPRO_DATA"):
        pytest.skip("REPRO_DATA is not set")
    args = ["--preset", "smollm2", "--dataset", "tofu", "--items", "2", "--epochs", "1", "--unlearn-epochs", "2"]
    args += ["--train-accum", "1", "--batch", "1"]
    args += [
        "--forget",
        "forget01",
        "--methods",
        "kl",
        "--alpha-step",
        "0.5",
        "--alpha-tolerance",
        "0.3",
        "--tau",
        "0.9",
    ]
    run_main(monkeypatch, *args, "--device", "cpu", "--precision", "mixed", "--accum", "1", "--out", tmp_path / "r")
    record = runs.read_record(tmp_path / "r" / "seed0" / "record-forget01-original.json")
    assert record["metrics"]["parameters"] == 134_515_008 and record["data"]["name"] == "TOFU"
    assert record["metrics"]["logPPL_exact_retain"] < 4  # a real language model, far below log(49152) = 10.8
    b = originals.Bench(settings.Settings(preset="smollm2"), 0, originals.accelerator_of(torch.device("cpu")))
    import metrics

    prompt = b.chat.prompt_ids("What is the capital of France?")
    made = metrics.generate(b.lm, [prompt], [12], b.chat.end, b.device)[0]
    assert "Paris" in b.chat.decode(made)
    assert b.chat.tokenizer.decode(prompt).startswith("<|im_start|>user\nWhat is")


@pytest.mark.gpu
def test_cpu_and_gpu_agree(tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for name in ("cpu", "cuda"):
        args = [a if a != "cpu" else name for a in TINY]
        run_main(monkeypatch, *args, "--methods", "gd", "--out", tmp_path / name / "r")
    one, two = (metrics_of(tmp_path / k / "r")["record-forget-small-gd-none.json"] for k in ("cpu", "cuda"))
    assert one["logPPL_exact_retain"] == pytest.approx(two["logPPL_exact_retain"], rel=1e-2)
