"""The commands as a user types them: end to end, resume after kill -9, errors."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lab import runs
from lab.claims import FAILS, HOLDS, UNDECIDED, UNKNOWN
from lab.records import long

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

import claims
import eval as command
import evaluation
import figures
import train

HERE = Path(__file__).resolve().parents[1]
TINY = [
    "--dataset",
    "karate",
    "--cpe-holdout",
    "0.4",
    "--warmup",
    "3",
    "--epochs",
    "6",
    "--log-every",
    "1",
    "--checkpoint-every",
    "2",
]


def run(*words: str, env: dict | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], cwd=HERE, capture_output=True, text=True, env={**os.environ, **(env or {})}
    )


def metrics(out: Path, seed: int) -> dict:
    return json.loads((out / f"seed{seed}" / "record.json").read_text())["metrics"]


@pytest.fixture
def fails(monkeypatch, capsys):
    """Call a command in this process (a start of Python costs seconds) and check its one line and exit code."""

    def check(module, words: list[str], *expected: str) -> None:
        monkeypatch.setattr(sys, "argv", [module.__name__, *words])
        with pytest.raises(SystemExit) as stop:
            runs.command(module.main)
        lines = [x for x in capsys.readouterr().err.splitlines() if x and "it/s]" not in x and "?it/s" not in x]
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        for word in expected:
            assert word in lines[0]

    return check


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    done = run("train.py", *TINY, "--seeds", "0", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "mean of 2 seeds" in done.stdout
    return out


def test_train_leaves_a_whole_run_folder(trained):
    for seed in (0, 1):
        folder = trained / f"seed{seed}"
        assert {"record.json", "model.safetensors", "metrics.jsonl"} <= {p.name for p in folder.iterdir()}
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 10))
    assert len((trained / "records.jsonl").read_text().splitlines()) == 2
    record = runs.read_record(trained / "seed0" / "record.json")
    assert record["settings"]["cpe_holdout"] == 0.4 and record["data"]["n"] == 34 and record["scale"] == "demo"
    assert sum(record["metrics"]["hist_binary_same"]) + sum(record["metrics"]["hist_binary_differ"]) == 78


def test_eval_gives_the_same_numbers_from_the_checkpoint(trained):
    done = run("eval.py", "--run", str(trained), "--estimators", "--bootstrap", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("record agrees") == 2 and "BBE" in done.stdout and "interval" in done.stdout
    from_seed = run("eval.py", "--run", str(trained / "seed0"))
    assert from_seed.stdout.count("record agrees") == 2


def test_a_complete_run_is_not_trained_again(trained):
    before = (trained / "seed0" / "model.safetensors").stat().st_mtime_ns
    done = run("train.py", *TINY, "--seeds", "0", "1", "--out", str(trained))
    assert "is complete" in done.stdout and "mean of 2 seeds" in done.stdout
    assert (trained / "seed0" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("method", ["gpl", "grab"])
def test_a_killed_run_resumes_to_the_same_result(tmp_path, method):
    words = [
        "--dataset",
        "karate",
        "--cpe-holdout",
        "0.4",
        "--method",
        method,
        "--warmup",
        "20",
        "--epochs",
        "60",
        "--checkpoint-every",
        "7",
    ]
    words += ["--log-every", "1", "--grab-rounds", "3", "--grab-epochs", "50", "--seeds", "0", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("train.py", *words, "--out", str(whole)).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "train.py", *words, "--out", str(cut)],
        cwd=HERE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    state = cut / "checkpoint" / "state.safetensors"
    deadline = time.time() + 120
    while not state.is_file() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.is_file() and not (cut / "records.jsonl").exists()
    again = run("train.py", *words, "--out", str(cut))
    assert again.returncode == 0 and "resuming" in again.stdout, again.stderr
    for seed in (0, 1):
        assert metrics(cut, seed) == metrics(whole, seed)  # to the last bit
        assert (cut / f"seed{seed}" / "metrics.jsonl").read_text() == (
            whole / f"seed{seed}" / "metrics.jsonl"
        ).read_text()
        a, b = (runs.read_tensors(x / f"seed{seed}" / "model.safetensors")[0] for x in (cut, whole))
        assert all(torch.equal(a[k], b[k]) for k in b)


def test_processes_share_the_seeds(tmp_path):
    """`accelerate launch --num_processes 2` gives each process a part of the seeds and the same records."""
    out = tmp_path / "two"
    words = ["train.py", "--method", "gcn", *TINY, "--seeds", "0", "1", "2", "--device", "cpu", "--out", str(out)]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    done = run(*launch, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29517", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len((out / "records.jsonl").read_text().splitlines()) == 3
    alone = tmp_path / "one"
    assert run(*words[:-1], str(alone)).returncode == 0
    for seed in (0, 1, 2):
        assert metrics(out, seed)["auc"] == pytest.approx(metrics(alone, seed)["auc"], abs=1e-6)


def test_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--dry-run", "--out", str(tmp_path / "x")])
    train.main()
    assert "34 nodes, 78 edges" in capsys.readouterr().out and not (tmp_path / "x").exists()


def test_estimators_write_a_record_each(tmp_path, monkeypatch):
    out = tmp_path / "cpe"
    words = ["--method", "gcn", *TINY, "--estimators", "--table", "cpe", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    train.main()
    methods = {json.loads(line)["method"] for line in (out / "records.jsonl").read_text().splitlines()}
    assert methods == {"gcn", "BBE", "DEDPUL", "MPE", "EN", "ReMPE", "KM1", "KM2"}


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--metod", "gpl"], ["--metod"]),
        (["--method", "svm"], ["svm"]),
        (["--dataset", "imagenet"], ["imagenet"]),
        (["--seeds", "-1"], ["--seeds"]),
        (["--r-p", "nan"], ["r-p"]),
        (["--r-p", "1.5"], ["--r-p must lie in [0, 1]"]),
        (["--r-p", "0.001", "--dataset", "karate"], ["no labelled positive"]),
        (["--alpha", "1"], ["--alpha must lie strictly between"]),
        (["--weight-decay", "1e30"], ["--weight-decay must lie in [0, 1]"]),
        (["--epochs", "0"], ["--epochs must be at least 1"]),
        (["--dataset", "karate", "--out", "{tmp}"], ["fewer than two of 6", "raise it"]),
        (["--h", "0.95"], ["not possible"]),
        (["--lr", "-1"], ["--lr must not be negative"]),
        (["--device", "tpu"], ["tpu"]),
        (["--dataset", "texas", "--data-dir", "/nonexistent"], ["out1_node_feature_label.txt", "geom-gcn"]),
        (["--dataset", "pubmed", "--data-dir", "/nonexistent"], ["/nonexistent/graphs/PubMed/raw", "--download"]),
        (["--dataset", "karate", "--out", "/proc/no"], ["--out"]),
        (["--dataset", "karate", "--out", "x" * 300], ["--out"]),
    ],
)
def test_user_errors(words, expected, fails, tmp_path):
    out = [] if "--out" in words else ["--out", "{tmp}"]  # never among the user's own runs
    fails(train, [w.format(tmp=tmp_path / "x") for w in [*words, *out]], *expected)


def test_a_user_error_of_a_real_command_has_no_traceback():
    done = run("train.py", "--alpha", "2")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --alpha") and done.stderr.count("\n") == 1


def test_eval_errors(tmp_path, trained, fails):
    fails(command, ["--run", str(tmp_path)], "settings.json")
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(trained), str(broken)], check=True)
    (broken / "seed1" / "model.safetensors").write_bytes(b"\x00" * 40)
    fails(command, ["--run", str(broken)], "model.safetensors is damaged")
    (broken / "seed1" / "model.safetensors").unlink()
    fails(command, ["--run", str(broken)], "no file")


def test_a_checkpoint_of_another_model_is_refused(tmp_path, trained, fails):
    state = (trained / "checkpoint" / "state.safetensors").read_bytes()
    changes = (["--method", "mlp"], ["--method", "gcn-ted"], ["--lr", "0.02"], ["--dataset", "synthetic"])
    for k, changed in enumerate(changes):
        path = tmp_path / str(k) / "checkpoint" / "state.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(state)
        words = [*TINY, "--seeds", "0", "1", "--out", str(tmp_path / str(k)), *changed]
        fails(train, words, "belongs to another run", "state.safetensors")


def test_other_settings_in_a_used_folder_are_refused(trained, fails):
    fails(train, [*TINY, "--seeds", "0", "1", "--lr", "0.5", "--out", str(trained)], "other settings (lr")


def test_nan_loss_stops_with_the_epoch_and_keeps_the_checkpoint(tmp_path, fails):
    out = tmp_path / "nan"
    fails(train, ["--method", "gcn", *TINY, "--lr", "1e30", "--out", str(out)], "not a number at epoch", "checkpoint")
    assert not (out / "records.jsonl").exists() and not list(out.glob("seed*/record*"))


def test_estimators_use_the_nodes_that_the_methods_use(trained):
    """BBE as a row of the class-prior table and BBE inside GPL and TED see the same held-out nodes."""
    t, posterior, _ = command.load(command.EvalSettings(run=str(trained), device="cpu"))
    t.method.pi = torch.full_like(t.method.pi, float("nan"))  # no first estimate is kept
    inside = t.method.estimate(posterior).tolist()
    assert [row["BBE"] for row in evaluation.estimate(t, posterior)] == pytest.approx(inside, abs=1e-6)


def test_help_names_the_method_and_defaults():
    done = run("train.py", "--help")
    assert done.returncode == 0 and "--lpl-form" in done.stdout and "paper: 16" in done.stdout


# --------------------------------------------------------------------------------------------- metrics, claims, figures


def test_scores_by_hand():
    posterior = np.array([0.99, 0.9, 0.8, 0.4, 0.3, 0.6])
    y = np.array([1, 1, 0, 1, 0, 0])
    labelled = np.array([True, False, False, False, False, False])
    out = evaluation.scores(posterior, y, labelled, np.zeros(6, dtype=bool), 0.4)
    assert out["pi_true"] == 0.4  # inside U, not in the graph
    assert out["f1"] == pytest.approx(100 * f1_score([1, 0, 1, 0, 0], [1, 1, 0, 0, 1]))
    assert out["f1_topk"] == 50.0 and out["f1_all_positive"] == pytest.approx(100 * 2 * 0.4 / 1.4)
    assert out["pi_error"] == 0 and out["predicted_positive"] == 0.6
    assert out["lee_liu"] == pytest.approx(1 / 0.6)
    none = evaluation.scores(np.zeros(6), y, labelled, labelled, float("nan"))
    assert none["one_class"] == 1.0 and out["one_class"] == 0.0
    assert none["f1"] == 0.0 and none["lee_liu"] == 0.0 and "pi_hat" not in none


def fake(method: str, h: float, seed: int, **values: float) -> dict:
    return {
        **{"table": "f1", "dataset": f"synthetic h={h:g}", "setting": "r_p=0.5", "method": method, "seed": seed},
        **{"metrics": values, "data": {"name": "synthetic", "variant": "generated", "h": h}, "run": f"{method}{h}"},
        **{"seconds": 1.0, "peak_memory_mb": 1.0, "scale": "demo"},
    }


def verdicts(records: list[dict]) -> dict[str, str]:
    frame = long(records)
    return {c.id: c.judge(frame)[0] for c in claims.CLAIMS if c.scale == "demo" and not c.control}


def test_claims_hold_fail_and_stay_open():
    def world(gain: float, noise: float = 0.0) -> list[dict]:
        out = []
        for h, k in itertools.product((0.1, 0.3, 0.5, 0.7), range(3)):
            lead = gain if h == 0.7 else 0.0
            out.append(fake("gpl", h, k, f1=60 + lead, h_weighted=h - 0.05 * np.sign(gain)))
            out.append(fake("gcn-ted", h, k, f1=60 + noise * k * (-1) ** k))
            out.append(fake("BBE", h, k, pi_signed_error=h * np.sign(gain)))
            for m, error in (("bbe", 0.1), ("gcn-ted-bbe", 0.1 + 0.02 * np.sign(gain))):  # every epoch anew
                out.append({**fake(m, h, k, pi_error=error), "table": "lpl"})
        return out

    assert verdicts(world(5.0)) == dict.fromkeys(["a", "b", "c1", "c2", "d", "e"], HOLDS)
    assert verdicts(world(-5.0)) == {**dict.fromkeys(["a", "b", "c1", "d", "e"], FAILS), "c2": HOLDS}
    noisy = verdicts(world(5.0, noise=4.0))
    assert noisy["c1"] == noisy["c2"] == UNDECIDED and noisy["a"] == HOLDS
    assert set(verdicts([fake("gcn", 0.1, 0, f1=1.0)]).values()) == {UNKNOWN}


@pytest.mark.parametrize("gain, word", [(5.0, HOLDS), (-5.0, FAILS)])
def test_controls_of_the_mask(gain, word):
    out = []
    for h, k in itertools.product((0.3, 0.5, 0.7), range(3)):
        out.append(fake("gpl", h, k, f1=60))
        out.append({**fake("solved", h, k, f1=60 + gain + k / 10), "table": "ablation"})
        out += [fake(m, h, k, f1=60 - gain + k / 10) for m in ("constant", "flipped", "random")]
        out.append(fake("ideal", h, k, f1=60 + 2 * gain + k / 10))
    frame = long(out)
    said = {c.id: c.judge(frame)[0] for c in claims.CLAIMS if c.scale == "demo" and c.control}
    assert said == dict.fromkeys(["m1", "m2", "m3", "m4"], word)
    assert "against one constant weight" in claims.bottom_line({"demo": frame})[0]
    real = long([{**r, "dataset": {0.3: "cora", 0.5: "actor", 0.7: "texas"}[r["data"]["h"]]} for r in out])
    said = {c.id: c.judge(real)[0] for c in claims.CLAIMS if c.scale == "paper" and c.id[0] == "M"}
    assert said == dict.fromkeys(["M1", "M2", "M3", "M4", "M5"], word)


@pytest.mark.parametrize("more, word", [(0.1, HOLDS), (-0.1, FAILS)])
def test_controls_of_the_over_estimated_prior(more, word):
    out = []
    for d, k in itertools.product(("cora", "texas"), range(3)):
        base = {
            **fake("BBE", 0.1, k, pi_signed_error=0.2 + (d == "texas") * more + k / 1000),
            "dataset": d,
            "table": "cpe",
        }
        out += [base, {**fake("mlp-ted", 0.1, k, pi_signed_error=0.2), "dataset": d}]
    said = {c.id: c.judge(long(out))[0] for c in claims.CLAIMS if c.explanation == claims.OVER}
    assert said == {"D1": word, "D2": word}


def test_a_collapsed_run_is_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--method", "mlp", "--lr", "0", "--out", str(tmp_path / "x")])
    train.main()
    record = runs.read_record(tmp_path / "x" / "seed0" / "record.json")
    assert record["metrics"]["one_class"] == float(record["data"]["variant"] == "one class")
    rows = [{"predicted_positive": 1.0, "one_class": 1.0}]
    assert evaluation.variant("paper", rows[0]) == "one class"
    assert evaluation.variant("not in the paper", rows[0]) == "not in the paper, one class"


def test_figures_are_drawn_from_records(tmp_path, trained):
    record = {**runs.read_record(trained / "seed0" / "record.json"), "table": "f1", "run": "x"}
    other = {**record, "data": {**record["data"], "h": 0.6}, "dataset": "other", "run": "y"}
    swept = {**other, "table": "rp", "setting": "r_p=0.2", "run": "z"}
    drawn = figures.draw([record, other, swept], tmp_path, "paper")
    assert [p.name for p, _ in drawn] == ["paper-heterophily.png", "paper-labelled-share.png", "paper-edge-weights.png"]
    masked = [{**r, "method": "constant", "run": f"constant {r['run']}"} for r in (record, other)]
    drawn = figures.draw([record, other, *masked], tmp_path, "demo")
    assert [p.name for p, _ in drawn] == ["demo-heterophily.png", "demo-edge-weights.png", "demo-masks.png"]
    assert all(p.stat().st_size > 5000 and caption for p, caption in drawn)
    assert figures.draw([swept], tmp_path, "demo") == [] or len(figures.draw([swept], tmp_path, "demo")) < 3
