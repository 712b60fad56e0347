"""Odd command lines and damaged files, made from the options and files of this folder's own commands: each ends in a
right run, or in one line and exit code 2. The same in every folder; slow: some hundred runs at smoke size, of which
$ODD=0.2 takes a fifth, the same ones each time.

Children are forked from a process that has imported the commands: a start of Python with torch would cost seconds each.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import traceback
import types
import typing
import zlib
from pathlib import Path
from typing import Annotated, Literal

from lab import cli, files, plan, records
from lab.cli import SMALLER

import pytest
import torch

pytestmark = pytest.mark.slow

LIMIT = 120  # seconds of CPU time a child may take; ten times as many by the clock
SHARE = float(os.environ.get("ODD", "1"))
PLAN = plan.load_plan()
SMOKE = plan.jobs(PLAN, "smoke")
SCRIPTS = sorted({job.script for job in SMOKE} & {"train.py", "eval.py"})
AFTER = [shlex.split(line) for line in PLAN.get("after", {}).get("smoke", []) if "--run" in line]
READERS = [words for words in AFTER if words[0].endswith(".py")]  # commands that read a finished run
WRONG = "exit 2 was due"


@dataclasses.dataclass
class Ended:
    """How a child ended: exit code (negative: a signal), what it wrote."""

    code: int
    out: str
    err: str
    seconds: float


def child(words: list[str], folder: Path, before=None) -> Ended:
    """Run a command of this folder in a forked child, from the folder `folder`."""
    module = importlib.import_module(words[0].removesuffix(".py"))
    texts = [folder / "stdout.txt", folder / "stderr.txt"]
    began, pid = time.monotonic(), os.fork()
    if pid == 0:
        code = 1
        try:
            for number, path in enumerate(texts, start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
            os.chdir(folder)
            sys.argv = [str(cli.HERE / words[0]), *words[1:]]
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 5))
            signal.alarm(10 * LIMIT)
            if before:
                before()
            cli.command(module.main)
            code = 0
            (folder / "imported.json").write_text(json.dumps(sorted(sys.modules)))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    out, err = (p.read_text(errors="replace") for p in texts)
    return Ended(os.waitstatus_to_exitcode(status), out, err, time.monotonic() - began)


def fault(ended: Ended, run: Path | None = None, must_fail: bool = False) -> str:
    """What is wrong with the way a child ended; empty: nothing."""
    said = ended.err.strip().splitlines()
    if ended.code in (-signal.SIGALRM, -signal.SIGXCPU):
        return f"no end after {LIMIT} s"
    if "Traceback" in ended.err or ended.code not in (0, 2):
        return f"exit {ended.code}: {said[-1][:200] if said else ''}"
    if ended.code == 2:
        errors = [line for line in said if line.startswith("error: ")]
        return (
            "" if len(errors) == 1 and said[-1] == errors[0] else f"exit 2 with {len(errors)} error lines: {said[-3:]}"
        )
    if must_fail:
        return WRONG
    for path in run.rglob("*.safetensors") if run else ():
        bad = [k for k, v in files.read_tensors(path)[0].items() if v.is_floating_point() and not v.isfinite().all()]
        if bad:
            return f"exit 0, but {bad[0]} in {path.name} is not finite"
    for path in run.rglob("record*.json") if run else ():
        records.read_record(path)  # raises for one that cannot be right
    return ""


def chosen(*label) -> bool:
    """Whether a case belongs to the share of the cases that is run."""
    return zlib.crc32(repr(label).encode()) < SHARE * 2**32


def timeless(text: str) -> str:
    """What a command said without its times."""
    return re.sub(r"[\d.]+ (ms|s|min|h)\b|\d+:\d\d", "#", text)


def report(kind: str, cases: int, found: list[str]) -> None:
    print(f"\n{cli.HERE.name}: {kind}: {cases} cases, {len(found)} faults")
    assert cases and not found, "\n" + "\n".join(found)


COST: dict[str, float] = {}  # seconds of the smoke runs


def smoke(script: str) -> plan.Job:
    """The quickest smoke run of a command."""
    return min((job for job in SMOKE if job.script == script), key=lambda job: COST[job.name])


def command(job: plan.Job, out: Path | str, without: str = "") -> list[str]:
    """The job's words for its first seed into `out`, without the option of one field."""
    args = {k: v for k, v in job.args.items() if k != without}
    script, _, _, _, _, _, *rest = dataclasses.replace(job, args=args, seeds=job.seeds[:1]).command("smoke")
    fixed = {"out": str(out), "scale": "smoke", "seeds": str(job.seeds[0])}
    words = [word for key, value in fixed.items() if key != without for word in ("--" + key, value)]
    return [script, *words, *rest[1:]]


def options(script: str, monkeypatch) -> type:
    """The dataclass of a command's options."""
    found = []

    def look(kind, *_):
        found.append(kind)
        raise KeyboardInterrupt

    module = importlib.import_module(script.removesuffix(".py"))
    own = [m for m in list(sys.modules.values()) if str(getattr(m, "__file__", "")).startswith(str(cli.HERE))]
    own = [m for m in own if ".venv" not in m.__file__]  # a library's lazy module may fail when it is asked
    for owner in {id(o): o for o in (cli, *own) if getattr(o, "parse", None) is cli.parse}.values():
        monkeypatch.setattr(owner, "parse", look)
    with contextlib.suppress(KeyboardInterrupt):
        module.main()
    monkeypatch.undo()
    return found[0]


def plain(kind):
    """Of a type hint: (float | int | bool | str | Literal | tuple, its arguments)."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return plain(inner[0])
    if origin in (typing.Union, types.UnionType):
        return plain(next(k for k in inner if k is not type(None)))
    return origin or kind, inner


def odd_values(name: str, kind) -> list[tuple[list[str], bool]]:
    """(words of a value, whether no command may take it) for an option."""
    kind, inner = plain(kind)
    if kind is bool or dataclasses.is_dataclass(kind):
        return [(["maybe"], True)]
    if kind is Literal:
        return [(["nonsense"], True), ([""], True)]
    if kind is float:
        wrong = ["nan", "inf", "-inf", "x", "", "1/0", "1e-320", "1e-300"]
        return [([w], True) for w in wrong] + [([w], False) for w in ("-1", "0", "1e-30", "1e30")]
    if kind is int:
        huge = [str(2**40)] if any(part in name for part in SMALLER) else []
        wrong = ["x", "1.5", "", str(10**30), str(2**63), str(-(2**63))]
        return [([w], True) for w in wrong] + [([w], False) for w in ("-1", "0", *huge)]
    if kind is tuple:
        if plain(inner[0])[0] is str:
            return [([], False), (["nonsense"], False), (["", ""], False), (["x" * 5000], False)]
        return [([], False), *odd_values(name, inner[0])[:-2], (["1", "1"], False), (["2", "-1"], False)]
    if kind is str:
        return [([w], False) for w in ("nonsense", "x" * 5000, "~nobody/x", "\u00e4 \u2603")]
    return []


@pytest.mark.parametrize("script", SCRIPTS)
def test_odd_options(script, tmp_path, monkeypatch):
    monkeypatch.setenv("REPRO_DATA", str(tmp_path / "nodata"))
    kind, job, found, cases = options(script, monkeypatch), smoke(script), [], 0
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        if field.name == "download":  # nothing is fetched in a test
            continue
        for words, never in odd_values(field.name, hints[field.name]):
            if not chosen(field.name, words):
                continue
            cases += 1
            place = tmp_path / f"{cases}"
            place.mkdir()
            line = command(job, "run", field.name)
            ended = child([*line, "--" + field.name.replace("_", "-"), *words], place)
            problem = fault(ended, place / "run", never)
            if problem.startswith("no end") and words in (["0"], ["-1"]):  # the published value, and so a long run
                problem = ""
            if problem:
                found.append(f"--{field.name} {' '.join(words)[:60]!r}: {problem}")
            shutil.rmtree(place)
    report(f"options of {script}", cases, found)


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory) -> None:
    """Import what a run imports on its way: each child would do it again, for seconds."""
    for job in [job for job in SMOKE if job.script in SCRIPTS]:
        place = tmp_path_factory.mktemp("warm")
        ended = child(command(job, "run"), place)
        assert ended.code == 0, ended.err
        COST[job.name] = ended.seconds
        for name in json.loads((place / "imported.json").read_text()):
            if name not in sys.modules and not name.startswith("__"):
                with contextlib.suppress(Exception):  # a part of a package that cannot be imported by itself
                    importlib.import_module(name)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A folder with the finished smoke runs that the reading commands name, where a command line looks for them."""
    place = tmp_path_factory.mktemp("done")
    for job in SMOKE:
        if job.script == "train.py" or any(job.name in " ".join(words) for words in READERS):
            ended = child(command(job, place / "runs" / "smoke" / job.name), place)
            assert ended.code == 0, ended.err
    return place


def finished_run(place: Path, words: list[str]) -> Path:
    return place / words[words.index("--run") + 1]


def edits(value) -> list:
    """A JSON value, damaged."""
    return [v for v in (None, [], {}, "x", -1, True, 10**30) if v != value]


def whole_files(path: Path) -> list[bytes]:
    text = path.read_bytes()
    return [b"", b"[]", b"null", b"{}", b"3", b"\xff\xfe", text[: len(text) // 2]]


def attempt(place: Path, words: list[str], path: Path, content: bytes | None, label: str, must_fail=False) -> list[str]:
    """Run a reading command with one file of its run changed (None: gone); the file is put back."""
    kept = path.read_bytes()
    try:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        problem = fault(child(words, place), None, must_fail)
    finally:
        path.write_bytes(kept)
    return [f"{words[0]} with {label}: {problem}"] if problem else []


@pytest.mark.parametrize("words", READERS, ids=[w[0] for w in READERS])
def test_edited_settings_of_a_finished_run(done, words):
    path, found, cases = finished_run(done, words) / "settings.json", [], 0
    stored = json.loads(path.read_text())
    for content in whole_files(path):
        cases += 1
        found += attempt(done, words, path, content, f"settings.json {content[:20]}", True)
    for key, value in stored.items():
        some = [v for v in edits(value) if v is None or type(v) is not type(value)][:4]
        for other in (..., *some):
            if not chosen(words[0], key, other):
                continue
            changed = {k: (other if k == key else v) for k, v in stored.items() if not (other is ... and k == key)}
            cases += 1
            label = f"{key} {'dropped' if other is ... else repr(other)}"
            found += attempt(done, words, path, json.dumps(changed).encode(), label)
    report("settings.json", cases, found)


def test_edited_records_of_a_finished_run(done):
    job, found, cases = next(job for job in SMOKE if job.script == "train.py"), [], 0
    run = done / "runs" / "smoke" / job.name
    words = command(job, run)
    path = sorted(run.glob("seed*/record*.json"))[0]
    for content in (None, *whole_files(path)):
        cases += 1
        found += attempt(done, words, path, content, f"record {content and content[:20]}", content is not None)
    stored = json.loads(path.read_text())
    for key in stored:
        for other in (..., *edits(stored[key])):
            if not chosen(key, other):
                continue
            changed = {k: (other if k == key else v) for k, v in stored.items() if not (other is ... and k == key)}
            cases += 1
            found += attempt(done, words, path, json.dumps(changed).encode(), f"record's {key} {other!r}")
    for other in (math.inf, math.nan, [math.inf], {"a": math.nan}):
        metrics = {**stored["metrics"], next(iter(stored["metrics"])): other}
        cases += 1
        found += attempt(
            done, words, path, json.dumps({**stored, "metrics": metrics}).encode(), f"metric {other}", True
        )
    report("records", cases, found)


def broken(path: Path) -> list[tuple[str, bytes]]:
    """(what was done, content) of a safetensors file, damaged in its tensors and metadata."""
    from safetensors.torch import save

    tensors, meta = files.read_tensors(path)
    out = [(f"{len(c)} bytes", c) for c in (b"", b"x", path.read_bytes()[:-1], path.read_bytes()[:100])]

    def made(label: str, changed: dict, other_meta: dict | None = None) -> None:
        out.append((label, save(changed, metadata=meta if other_meta is None else other_meta)))

    names = sorted(tensors)
    for name in dict.fromkeys([names[0], names[len(names) // 2], names[-1]] if names else []):
        value = tensors[name]
        if value.is_floating_point():
            made(f"{name} NaN", {**tensors, name: torch.full_like(value, math.nan)})
        if value.dtype != torch.int64:
            made(f"{name} int64", {**tensors, name: torch.zeros(value.shape, dtype=torch.int64)})
        made(f"{name} of another shape", {**tensors, name: torch.zeros([3, 1, *value.shape[1:]], dtype=value.dtype)})
        made(f"{name} missing", {k: v for k, v in tensors.items() if k != name})
    made("one tensor more", {**tensors, "more": torch.zeros(1)})
    for key in meta:
        made(f"metadata without {key}", tensors, {k: v for k, v in meta.items() if k != key})
        for text in ("-5", "999999999", "nan", "x", ""):
            made(f"metadata {key}={text!r}", tensors, {**meta, key: text})
    return out


@pytest.mark.parametrize("words", READERS, ids=[w[0] for w in READERS])
def test_damaged_weights_of_a_finished_run(done, words):
    found, cases = [], 0
    run = finished_run(done, words)
    for path in [p for p in sorted(run.rglob("*.safetensors")) if "checkpoint" not in p.parts][:3]:
        quiet = child(words, done).out
        for label, content in [("no file", None), *broken(path)]:
            if not chosen(path.name, label):
                continue
            cases += 1
            told = "metadata" not in label  # what the metadata says beside the weights need not be looked at
            problem = attempt(done, words, path, content, f"{path.name}: {label}", told)
            if problem and WRONG in problem[0]:  # not read by this command? then nothing can come out differently
                kept = path.read_bytes()
                path.unlink()
                problem = problem if timeless(child(words, done).out) != timeless(quiet) else []
                path.write_bytes(kept)
            found += problem
    report("weights", cases, found)


def stop_at_checkpoint(number: int):
    """In a child: end like a kill right after the `number`-th file of a checkpoint folder stands."""
    replace, count = os.replace, [0]

    def stopping(source, target, **more):
        replace(source, target, **more)
        if "checkpoint" in Path(target).parts and str(target).endswith(".safetensors"):
            count[0] += 1
            if count[0] == number:
                os._exit(9)

    os.replace = stopping


def outcome(run: Path) -> list:
    """What the records of a run say, times left out."""
    out = []
    for path in sorted(run.glob("seed*/record*.json")):
        found = records.read_record(path)["metrics"].items()
        out.append((path.name, {k: v for k, v in found if not any(t in k for t in ("second", "memory", "_per_"))}))
    return out


@pytest.mark.parametrize("job", [j for j in SMOKE if j.script == "train.py"], ids=lambda j: j.name)
def test_damaged_checkpoints(job, tmp_path):
    found, cases = [], 0
    whole, cut, run = (tmp_path / name / "run" for name in ("whole", "cut", "now"))
    for place in (whole, cut, run):
        place.parent.mkdir()
    words = command(job, "run")
    assert child(words, whole.parent).code == 0
    ended = child(words, cut.parent, lambda: stop_at_checkpoint(1))
    if ended.code == 0:
        pytest.skip("this run writes no checkpoint")
    assert ended.code == 9, ended.err
    paths = [p.relative_to(cut) for p in sorted(cut.rglob("*.safetensors")) if "checkpoint" in p.parts]
    assert paths

    def resumed() -> Ended:
        ended = child(words, run.parent)
        return ended

    shutil.copytree(cut, run)
    assert resumed().code == 0 and outcome(run) == outcome(whole), "a cut run does not end like an uncut one"
    for path in paths:
        for label, content in broken(cut / path):
            if not chosen(path.name, label):
                continue
            shutil.rmtree(run)
            shutil.copytree(cut, run)
            (run / path).write_bytes(content)
            ended = resumed()
            cases += 1
            problem = fault(ended, run)
            if not problem and ended.code == 0 and outcome(run) != outcome(whole):
                problem = "exit 0, and another result"
            if problem:
                found.append(f"{path}: {label}: {problem}")
    for name in ("metrics.jsonl",):  # curves of an earlier start that cannot be read
        shutil.rmtree(run)
        shutil.copytree(cut, run)
        for path in run.glob(f"seed*/{name}"):
            path.write_bytes(b"\xff\xfe" + path.read_bytes())
        ended, cases = resumed(), cases + 1
        if fault(ended, run) or (ended.code == 0 and outcome(run) != outcome(whole)):
            found.append(f"{name} that is not UTF-8: exit {ended.code}, {fault(ended, run)}")
    report("checkpoints", cases, found)
