"""Records: what one is, where they lie, and their long form. The same in every folder.

Runs write records to runs/<scale>/<run>/seed<k>/; `make record-X` takes those of finished planned runs over into
results/: demo.jsonl and real.jsonl, a line a record, and paper/<run>.jsonl. Only results/ is committed.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.cli import SCALES, UserError
from lab.files import read_json, write_text

if TYPE_CHECKING:
    import pandas as pd

RECORD_KEYS = (
    *("table", "dataset", "setting", "method", "seed", "metrics", "settings", "data", "code", "host", "seconds"),
    *("peak_memory_mb", "scale"),
)
KEYS = ["table", "dataset", "setting", "method"]  # what names a cell of a table, with the metric
COMMITTED = ("real", "demo", "paper")  # scales whose records are committed, in the order of RESULTS.md


def _finite(value: Any) -> bool:
    """No NaN and no infinity in a value out of JSON."""
    if isinstance(value, dict | list):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _wrong(r: Any) -> str:
    """What makes a value no record; empty for one."""
    if not isinstance(r, dict):
        return "it is no object"
    gone = [k for k in RECORD_KEYS if k not in r]
    if gone:
        return f"{gone[0]} is missing"
    for key in KEYS:
        if not isinstance(r[key], str):
            return f"{key} is no text"
    for key in ("metrics", "settings", "data", "code", "host"):
        if not isinstance(r[key], dict):
            return f"{key} is no object"
    if not any(isinstance(v, int | float) and not isinstance(v, bool) for v in r["metrics"].values()):
        return "metrics has no number"
    if not _finite(r["metrics"]):
        return "metrics holds a number that is not finite"
    texts = [("data", "name"), ("code", "commit"), ("host", "device"), ("host", "torch"), ("host", "python")]
    for key, inner in texts:
        if not isinstance(r[key].get(inner), str):
            return f"{key}.{inner} is no text"
    if not isinstance(r["code"].get("dirty"), bool | None):
        return "code.dirty is neither true, false nor null"
    if isinstance(r["seed"], bool) or not isinstance(r["seed"], int) or r["seed"] < 0:
        return "seed is no whole number"
    for key in ("seconds", "peak_memory_mb"):
        if isinstance(r[key], bool) or not isinstance(r[key], int | float) or not (_finite(r[key]) and r[key] >= 0):
            return f"{key} is no number"
    return "" if r["scale"] in SCALES else f"scale is none of {', '.join(SCALES)}"


def check_record(record: Any, place: str) -> dict:
    """The record itself; UserError when it is none: tables and claims rely on every part of it."""
    wrong = _wrong(record)
    if wrong:
        raise UserError(f"{place} is not a record ({wrong}); delete it and run again")
    return record


def read_record(path: Path) -> dict:
    return check_record(read_json(path), str(path))


def _parsed(line: str, place: str, mend: str) -> dict:
    """The record of a line."""
    try:
        return check_record(json.loads(line), place)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error}); {mend}") from None


def of_scale(found: list[dict], scale: str) -> list[dict]:
    """The records themselves; UserError for one of another scale."""
    wrong = [r for r in found if r["scale"] != scale]
    if wrong:
        raise UserError(f"run {wrong[0]['run']}: a record of scale {wrong[0]['scale']} among those of scale {scale}")
    return found


def local(root: Path, scale: str, planned: set[str] | None) -> list[dict]:
    """Records of runs/<scale>, each with its `run`; of planned runs only: those started by hand lie beside them, and
    no table shows them. None lets every run through."""
    paths = sorted((root / "runs" / scale).glob("*/seed*/record*.json"))
    wanted = [p for p in paths if planned is None or p.parents[1].name in planned]
    return of_scale([{**read_record(p), "run": p.parents[1].name} for p in wanted], scale)


def files_of(root: Path, scale: str) -> list[Path]:
    """The committed files of a scale that are there."""
    results = root / "results"
    return sorted((results / "paper").glob("*.jsonl")) if scale == "paper" else [*results.glob(f"{scale}.jsonl")]


def committed(root: Path, scale: str) -> list[dict]:
    """Committed records of a scale, each with its `run`; UserError names a line that is none."""
    out = []
    for path in files_of(root, scale):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            out.append({"run": path.stem, **_parsed(line, f"{path}:{number}", "take it back from git")})
    return of_scale(out, scale)


def take_over(root: Path, scale: str, planned: set[str] | None) -> list[str]:
    """Records of finished planned runs go from runs/<scale> to results/, in place of those of the same run that were
    there; runs that are not here keep theirs, and runs that are no longer planned lose them. -> names of the runs."""
    found: dict[str, list[dict]] = {}
    for path in sorted((root / "runs" / scale).glob("*/records.jsonl")):
        name = path.parent.name
        if planned is None or name in planned:
            lines = path.read_text(encoding="utf-8").splitlines()
            found[name] = [_parsed(line, f"{path}:{n}", "make the run again") for n, line in enumerate(lines, 1)]
            of_scale([{**r, "run": name} for r in found[name]], scale)
    if not found:
        return []
    here: dict[str, list[dict]] = {}
    for r in committed(root, scale):
        if planned is None or r["run"] in planned:
            here.setdefault(r.pop("run"), []).append(r)
    here |= found

    def text(name: str) -> str:
        return "".join(json.dumps({**r, "run": name}, sort_keys=True, allow_nan=False) + "\n" for r in here[name])

    if scale != "paper":
        write_text(root / "results" / f"{scale}.jsonl", "".join(text(name) for name in sorted(here)))
        return sorted(found)
    for name in here:
        path = root / "results" / "paper" / f"{name}.jsonl"
        if name in found or not path.exists():
            write_text(path, text(name))
    for path in files_of(root, scale):
        if path.stem not in here:
            path.unlink()
    return sorted(found)


def long(found: list[dict]) -> "pd.DataFrame":
    """One row a record and metric. Numbers of the record's `data` part become metrics named data.<key>."""
    import pandas as pd  # here: a training run needs none

    rows = []
    for r in found:
        numbers = {k: v for k, v in r["metrics"].items() if isinstance(v, int | float)}
        numbers |= {f"data.{k}": v for k, v in r["data"].items() if isinstance(v, int | float)}
        numbers |= {"seconds": r["seconds"], "peak_memory_mb": r["peak_memory_mb"]}
        base = {**{k: r[k] for k in KEYS}, "seed": r["seed"], "run": r["run"], "variant": r["data"].get("variant", "")}
        rows += [{**base, "metric": k, "value": float(v)} for k, v in numbers.items()]
    return pd.DataFrame(rows, columns=[*KEYS, "seed", "run", "variant", "metric", "value"])
