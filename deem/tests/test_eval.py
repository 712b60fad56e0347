"""eval.py as a user runs it: a small digit model on POPE files, resume, logs, exports, errors; scores by hand."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from lab import runs
from lab.runs import UserError

import pytest
import torch
from conftest import WORLD
from PIL import Image

import build
import eval as command
from evaluation import asking, benchmarks, parsers, sets
from evaluation.benchmarks import Question
from model import Deem
from scenes import study
from scenes.options import SceneSettings
from scenes.world import to_picture
from settings import EvalSettings, Settings
from streams import stream

HERE = Path(__file__).resolve().parents[1]
N = 12  # pictures of the small POPE lists


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder as train.py leaves it, with a random model."""
    out = tmp_path_factory.mktemp("runs") / "run"
    s = Settings(preset="digits", out=str(out), seeds=(0, 1), label="DEEM", scenes=SceneSettings(questions=10))
    s.resolve()
    for seed in s.seeds:
        torch.manual_seed(seed)
        model = Deem(s.parts(), loss=s.loss())
        with torch.no_grad():  # else every picture gets the same answer
            model.text_head.weight.normal_()
        runs.write_tensors(out / f"seed{seed}" / "model.safetensors", dict(model.named_parameters()))
    runs.write_json(out / "settings.json", json.loads(json.dumps(asdict(s))))
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """POPE's three lists over scenes of digits, in the official files and folders."""
    folder = tmp_path_factory.mktemp("data")
    made = WORLD.make(40, stream(0, "eval"), WORLD.test)
    some = [k for k, o in enumerate(WORLD.objects(made)) if len(o) >= 2][:N]
    files = [f"COCO_val2014_{k:012d}.jpg" for k in range(N)]
    place = folder / "deem" / "coco" / "val2014"
    place.mkdir(parents=True)
    for file, k in zip(files, some, strict=True):
        to_picture(made.images[k]).load().save(place / file, "PNG")
    for kind in benchmarks.POPE_KINDS:
        questions = benchmarks.build_pope(
            [WORLD.objects(made)[k] for k in some], WORLD.names, kind=kind, per_image=2, images=None
        )
        benchmarks.write_pope(folder / "deem" / "pope" / f"coco_pope_{kind}.json", questions, files)
    return folder


def call(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
    command.main()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def fails(monkeypatch, capsys):
    def check(words: list, *expected: str) -> None:
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            runs.command(command.main)
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1
        for word in expected:
            assert word in lines[0], lines[0]

    return check


# ------------------------------------------------------------------------------------------------------- the command


def test_pope_end_to_end(monkeypatch, trained, data, tmp_path, capsys):
    out = tmp_path / "e"
    words = ["--run", trained, "--benchmark", "pope", "--data-dir", data, "--out", out, "--seeds", "0", "1", "--export"]
    call(monkeypatch, *words, "--fast", "--table", "table1", "--device", "cpu")
    found = [runs.check_record(json.loads(x), "x") for x in (out / "records.jsonl").read_text().splitlines()]
    assert Counter(r["dataset"] for r in found) == {f"POPE-{k.capitalize()}": 2 for k in benchmarks.POPE_KINDS}
    assert {r["method"] for r in found} == {"DEEM"} and {r["setting"] for r in found} == {"plain, fast"}
    for r in found:
        slug = "pope_" + r["dataset"].lower().replace("-", "_")
        log = rows(out / f"seed{r['seed']}" / f"answers-{slug}.jsonl")
        assert len(log) == r["data"]["n"] == 4 * N and {"question", "answer", "parsed", "label", "log_yes"} <= {*log[0]}
        assert r["metrics"]["accuracy"] == pytest.approx(100 * sum(x["parsed"] == x["label"] for x in log) / len(log))
        assert r["metrics"]["score"] == r["metrics"]["accuracy"] and r["data"]["variant"] == "own questions"
        assert {"precision", "recall", "f1", "yes_ratio", "pope_accuracy", "unparsed"} <= {*r["metrics"]}
    samples = rows(out / "seed0" / "samples_pope_random.jsonl")
    assert {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps"} <= {*samples[0]}
    results = json.loads((out / "seed0" / "results.json").read_text())["results"]
    share = sum(x["pope_random_correct"] for x in samples) / len(samples)
    assert results["pope_random"]["accuracy,none"] == pytest.approx(100 * share)
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.jsonl")}
    call(monkeypatch, *words, "--fast", "--table", "table1", "--device", "cpu")
    assert "is complete" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in before if p.name != "records.jsonl"} == {
        p: t for p, t in before.items() if p.name != "records.jsonl"
    }


def test_items_parser_and_beams(monkeypatch, trained, data, tmp_path):
    base = ["--run", trained / "seed0", "--benchmark", "pope", "--data-dir", data, "--items", "6", "--device", "cpu"]
    by_parser = {}
    for parser in parsers.PARSERS:
        out = tmp_path / parser
        call(monkeypatch, *base, "--out", out, "--parser", parser, "--beams", "2", "--scale", "demo")
        record = json.loads((out / "records.jsonl").read_text().splitlines()[0])
        assert record["data"]["n"] == 6 and record["data"]["variant"] == "first 6" and record["scale"] == "demo"
        assert ("parser=" + parser in record["setting"]) == (parser != "deem") and "beams=2" in record["setting"]
        by_parser[parser] = record["metrics"]
    assert by_parser["pope"]["accuracy"] == by_parser["pope"]["pope_accuracy"] == by_parser["deem"]["pope_accuracy"]


def test_kill_and_start_again_gives_the_same_answers(trained, data, tmp_path):
    """kill -9 in the middle, then the same command."""
    words = ["eval.py", "--run", str(trained), "--benchmark", "pope", "--data-dir", str(data), "--batch-size", "1"]
    words += ["--device", "cpu", "--beams", "3", "--seeds", "0", "--items", "24"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "cut" / "seed0" / "answers-pope_pope_random.jsonl"
    process = subprocess.Popen(
        [sys.executable, *words, "--out", str(tmp_path / "cut")],
        cwd=HERE,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if log.is_file() and log.read_text().count("\n") >= 8:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    kept = log.read_text().count("\n")
    assert 8 <= kept < 24
    torch.set_num_threads(1)
    old = sys.argv
    try:
        for name in ("cut", "whole"):
            sys.argv = [*words, "--out", str(tmp_path / name)]
            command.main()
    finally:
        sys.argv = old
    for path in (tmp_path / "whole" / "seed0").glob("answers-*.jsonl"):
        assert (tmp_path / "cut" / "seed0" / path.name).read_text() == path.read_text()
    a, b = (rows(tmp_path / name / "records.jsonl") for name in ("cut", "whole"))
    assert [r["metrics"] for r in a] == [r["metrics"] for r in b] and len(a) == 3


def test_weights_that_are_not_finite_get_no_score(fails, trained, data, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    path = folder / "seed0" / "model.safetensors"
    tensors, _ = runs.read_tensors(path)
    name = next(k for k in tensors if k.startswith("text_head"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    runs.write_tensors(path, tensors)
    words = ["--run", folder, "--device", "cpu"]
    fails(words, "text_head", "not finite")
    fails([*words, "--benchmark", "pope", "--data-dir", data, "--out", tmp_path / "o"], "not finite")
    assert not list((tmp_path / "o").rglob("record*.json"))
    path.write_bytes(path.read_bytes()[:1000])
    fails(words, "model.safetensors is damaged")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_scored_in_the_precision_it_was_trained_in(monkeypatch, trained, data, tmp_path, precision):
    """With --precision bf16 frozen parts are bf16 and trained ones float32: they only fit together under autocast."""
    import recipe

    real, met = build.load_run, []

    def load(*words):
        model, s = real(*words)
        if precision == "bf16":
            for name, p in model.named_parameters():
                if recipe.part_of(name) in ("llm", "llm head", "unet"):
                    p.data = p.data.bfloat16()
        asked = model.yes_no
        model.yes_no = lambda *a: met.append(torch.is_autocast_enabled("cpu")) or asked(*a)
        return model, s

    monkeypatch.setattr(command, "load_run", load)
    words = ["--run", trained, "--benchmark", "pope", "--data-dir", data, "--out", tmp_path / "o", "--fast"]
    call(monkeypatch, *words, "--items", "4", "--device", "cpu")
    assert met and set(met) == {precision == "bf16"} and not torch.is_autocast_enabled("cpu")


def test_robustvqa_and_table_9(monkeypatch, data, tmp_path):
    """The whole path but for the model, which answers by the picture's number."""
    place = data / "deem" / "robustvqa"
    mined: dict[str, list] = {}
    for k, subset in enumerate(benchmarks.ROBUST_SETS):
        mined[subset] = []
        for i in range(3):
            file = place / subset / f"{3 * k + i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, 0, 0)).save(file, "PNG")
            mined[subset].append(
                {"file_name": f"robustvqa/{subset}/{file.name}", "gt_caption": "hen", "error_caption": "cock"}
            )
    runs.write_json(place / "robustvqa_test.json", mined)
    root = data / "deem"
    for one in sets.BENCHMARKS["robustvqa"]:
        asked = sets.questions_of(EvalSettings(), one, root)
        assert len(asked) == 6 and sum(q.answer == "yes" for q in asked) == 3
    wrong, right = (
        sets.questions_of(EvalSettings(), sets.BENCHMARKS[f"robustvqa-{o}-first"][0], root)[0]
        for o in ("wrong", "right")
    )
    assert "[cock, hen]" in wrong.question and "[hen, cock]" in right.question
    s = EvalSettings()
    assert asking.setting_of(s, "robustvqa-wrong-first", "paper") == "choice [wrong, right]"
    (place / "robustvqa_test.json").unlink()
    with pytest.raises(UserError, match="mine it with mining.py"):
        sets.questions_of(s, sets.BENCHMARKS["robustvqa"][0], root)


def test_a_record_says_what_is_not_the_papers(tmp_path):
    s = EvalSettings()
    some = [Question("x.jpg", "q", "yes", "coco_pope_random")]

    def said(name: str, **more) -> str:
        return sets.variant_of(EvalSettings(**more), name, sets.BENCHMARKS[name][0], some, tmp_path)

    assert said("pope") == "own questions" and said("pope", items=1) == "first 1"
    assert said("robustvqa") == "annotation as placed" and said("mmvp") == said("okvqa") == said("coco") == "paper"
    (tmp_path / "robustvqa").mkdir()
    (tmp_path / "robustvqa" / "report.json").write_text("{}")
    assert said("robustvqa") == "mined here" and said("vqav2") == "val2014"
    assert said("coco", tokenize="plain") == "plain tokenizer" and s.items == 0


@pytest.mark.realdata
@pytest.mark.skipif("REPRO_DATA" not in os.environ, reason="no $REPRO_DATA")
def test_published_pope_lists_are_known():
    root = runs.data_dir("") / "deem"
    if not (root / "pope").is_dir():
        pytest.skip("no $REPRO_DATA/deem/pope")
    for stem, known in sets.POPE_DIGESTS.items():
        asked = benchmarks.read_pope(root / "pope" / f"{stem}.json", stem)
        assert sets.digest(asked).startswith(known)
    name = "pope-2910"
    assert sets.variant_of(EvalSettings(), name, sets.BENCHMARKS[name][0], asked, root) == "paper"


def test_user_errors(fails, trained, data, tmp_path):
    base = ["--run", trained, "--benchmark", "pope", "--data-dir", data, "--out", tmp_path / "o", "--device", "cpu"]
    fails(["--benchmark", "pope"], "give --run RUN")
    fails(["--run", tmp_path / "none", "--benchmark", "pope"], "no run in", "train it first")
    fails(["--run", trained, "--benchmark", "poppe"], "poppe")
    fails([*base, "--items", "-1"], "--items")
    fails([*base, "--batch-size", "0"], "--batch-size")
    fails([*base, "--seeds", "7"], "no file", "seed7")
    fails([*base, "--seeds", "-1"], "--seeds")
    fails([*base, "--parser", "own"], "parser")
    fails(
        [*base[:4], "--data-dir", tmp_path, "--out", tmp_path / "o"], "no file", "coco_pope_random.json", "--data-dir"
    )
    fails([*base[:4], "--data-dir", "~nosuchuser/x"], "home folder")
    fails(["--run", trained, "--benchmark", "okvqa", "--data-dir", data], "OpenEnded_mscoco_val2014_questions.json")
    image = data / "deem" / "coco" / "val2014" / f"COCO_val2014_{3:012d}.jpg"
    content = image.read_bytes()
    try:
        image.unlink()
        fails(base, "POPE-Random: 1 pictures are missing", image.name)
        image.write_bytes(b"broken")
        fails([*base, "--fast", "--out", tmp_path / "b"], image.name, "not a readable picture")
    finally:
        image.write_bytes(content)
    fails([*base, "--fast", "--out", tmp_path / "f", "--form", "paper"], "not in the vocabulary")


def test_another_setting_in_the_same_folder_is_refused(monkeypatch, fails, trained, data, tmp_path):
    base = [
        "--run",
        trained,
        "--benchmark",
        "pope",
        "--data-dir",
        data,
        "--out",
        tmp_path / "o",
        "--device",
        "cpu",
        "--fast",
    ]
    call(monkeypatch, *base, "--items", "2")
    fails([*base, "--items", "4"], "other settings (items: 2, now 4)")


def test_a_demo_run_scored_again_gives_its_record(monkeypatch, trained, capsys, quick_study):
    model, s = build.load_run(trained, torch.device("cpu"), 0)
    metrics, _ = study.score(model, WORLD, s, 0)
    record = {
        **{"table": "t", "dataset": "d", "setting": "s", "method": "m", "seed": 0, "metrics": metrics, "settings": {}},
        **{"data": {"name": "d", "variant": "", "sha256": "", "n": 1}, "code": {"commit": "", "dirty": False}},
        **{"host": {"device": "", "torch": "", "python": ""}, "seconds": 1.0, "peak_memory_mb": 1.0, "scale": "demo"},
    }
    runs.write_json(trained / "seed0" / "record.json", record)
    other = {**record, "seed": 1, "metrics": {**metrics, "csr_own": -5.0}}
    runs.write_json(trained / "seed1" / "record.json", other)
    capsys.readouterr()
    call(monkeypatch, "--run", trained, "--device", "cpu")
    said = capsys.readouterr().out
    assert "seed 0: record agrees" in said and "seed 1: record says" in said and "csr_own -5, now" in said


@pytest.fixture(scope="module")
def everything(data) -> Path:
    """The other sets' files in miniature, in words that the digit model knows."""
    root = data / "deem"
    image = (root / "coco" / "val2014" / f"COCO_val2014_{0:012d}.jpg").read_bytes()

    def put(path: str, value) -> None:
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        text = value if isinstance(value, str) else json.dumps(value)
        place.write_bytes(image) if value is None else place.write_text(text)

    asked = {"questions": [{"question_id": k, "image_id": k, "question": f"is there a {k} ?"} for k in (0, 1)]}
    ten = [{"answer": "yes", "answer_id": i} for i in range(10)]
    told = {"annotations": [{"question_id": k, "image_id": k, "answers": ten} for k in (0, 1)]}
    put("okvqa/OpenEnded_mscoco_val2014_questions.json", asked)
    put("okvqa/mscoco_val2014_annotations.json", told)
    put("vqav2/v2_OpenEnded_mscoco_val2014_questions.json", asked)
    put("vqav2/v2_mscoco_val2014_annotations.json", told)
    put("vizwiz/val.json", [{"image": "v.jpg", "question": "is there a 3 ?", "answers": ten}])
    put("vizwiz/val/v.jpg", None)
    put("gqa/testdev_balanced_questions.json", {"5": {"question": "is there a 3 ?", "answer": "no", "imageId": "n1"}})
    put("gqa/images/n1.jpg", None)
    turn = {"question": 0, "answer": 1, "answer_options": [0, 1], "gt_index": 0}
    dialog = {"image_id": 3, "caption": "there is a 3 .", "dialog": [turn, {**turn, "question": 1}]}
    words = {"questions": ["is there a 3", "is there a 4"], "answers": ["yes", "no"], "dialogs": [dialog]}
    put("visdial/visdial_1.0_val.json", {"data": words})
    dense = [{"image_id": 3, "round_id": 2, "gt_relevance": [1.0, 0.0]}]
    put("visdial/visdial_1.0_val_dense_annotations.json", dense)
    put("visdial/VisualDialog_val2018/VisualDialog_val2018_000000000003.jpg", None)
    rows = [
        {
            "split": "test",
            "filepath": "val2014",
            "filename": f"COCO_val2014_{k:012d}.jpg",
            "cocoid": k,
            "sentences": [{"raw": f"there is a {k} ."}],
        }
        for k in (0, 1)
    ]
    put("coco/annotations/dataset_coco.json", {"images": rows})
    put("vg/test_split.json", [5])
    put("vg/paragraphs_v1.json", [{"image_id": 5, "url": "x/VG_100K/5.jpg", "paragraph": "there is a 3 and a 4 ."}])
    put("vg/VG_100K/5.jpg", None)
    mmvp = "Index,Question,Options,Correct Answer\n"
    put(
        "mmvp/Questions.csv",
        mmvp + "1,is the digit on the left ?,(a) yes (b) no,(a)\n2,is the digit on the left ?,(a) yes (b) no,(b)\n",
    )
    for k in (1, 2):
        put(f"mmvp/MMVP Images/{k}.jpg", None)
    return data


def test_every_other_benchmark_end_to_end(monkeypatch, trained, everything, tmp_path):
    names = ["okvqa", "vqav2", "vizwiz", "gqa", "visdial", "coco", "i2p"]
    words = ["--run", trained, "--data-dir", everything, "--out", tmp_path / "o", "--device", "cpu", "--export"]
    call(monkeypatch, *words, "--benchmark", *names, "--tokenize", "plain", "--metrics", "cider", "--beams", "2")
    found = {r["dataset"]: r for r in rows(tmp_path / "o" / "records.jsonl")}
    assert set(found) == {"OKVQA", "VQAv2", "VizWiz", "GQA", "VisDial", "COCO", "Image2Paragraph"}
    for name, r in found.items():
        key = {"VisDial": "ndcg", "COCO": "cider", "Image2Paragraph": "cider"}.get(name, "accuracy")
        assert r["metrics"]["score"] == r["metrics"][key] and r["seconds"] >= 0  # rounded: a set may take 0.00 s
        assert ("plain tokenizer" in r["data"]["variant"]) == (key == "cider")
    (paragraph,) = rows(tmp_path / "o" / "seed0" / "answers-i2p_image2paragraph.jsonl")
    assert len(paragraph["answer"].split()) > 60  # 90 tokens, some of them special
    log = rows(tmp_path / "o" / "seed0" / "answers-visdial_visdial.jsonl")
    assert len(log[0]["scores"]) == 2 and all(x < 0 for x in log[0]["scores"])
