"""Where paper and released code differ, and what each difference is worth. The same file in every folder.

plan.yaml lists the findings under `differences`: what differs, the switch that chooses, and, if records tell the
effect, the metric and the two selections of records; `of` or `against` may name another metric, where every record has
both. It is computed from records, as is all of RESULTS.md.
"""

from lab.claims import interval
from lab.runs import UserError

import pandas as pd

KEYS = ["table", "dataset", "setting", "method"]
FIELDS = {"finding", "switch", "effect"}
EFFECT = {"metric", "scale", "unit", "of", "against"}


def entries(plan: dict) -> list[dict]:
    """The findings of plan.yaml; UserError for one that is not {finding, switch, effect?}."""
    out = plan.get("differences", [])
    for number, entry in enumerate(out, 1):
        if not isinstance(entry, dict) or {*entry} - FIELDS or not {"finding", "switch"} <= {*entry}:
            raise UserError(f"plan.yaml, difference {number}: give finding, switch and, if measured, effect")
        e = entry.get("effect")
        if e is not None:
            wrong = (
                {*e} - EFFECT
                or {"metric", "of", "against"} - {*e}
                or ({*e["of"]} | {*e["against"]}) - {*KEYS, "metric"}
            )
            if wrong:
                raise UserError(f"plan.yaml, difference {number}: effect has a wrong or missing key {sorted(wrong)[0]}")
    return out


def effect(given: dict, frames: dict[str, pd.DataFrame]) -> dict | None:
    """Mean over seeds of `of` minus `against` and half of its 95 % interval, paired by seed and by every key that the
    selections leave open; None without a pair."""
    frame = frames.get(given.get("scale", "paper"))
    if frame is None or not len(frame):
        return None
    sides = []
    for side in ("of", "against"):
        rows = frame
        for key, value in {"metric": given["metric"], **given[side]}.items():
            rows = rows[rows[key] == value]
        sides.append(rows)
    free = [k for k in KEYS if k not in given["of"] and k not in given["against"]] + ["seed"]
    for rows in sides:
        if rows.duplicated(free).any():
            raise UserError(
                f"plan.yaml: the effect on {given['metric']} selects more than one record a seed; name more keys"
            )
    pairs = sides[0].merge(sides[1], on=free, suffixes=("", "_against"))
    if not len(pairs):
        return None
    by_seed = (pairs["value"] - pairs["value_against"]).groupby(pairs["seed"]).mean()
    return {
        **{"mean": float(by_seed.mean()), "half": interval(by_seed)[1], "seeds": len(by_seed)},
        **{"datasets": sorted({*pairs["dataset"]}) if "dataset" in free else []},
    }


def described(plan: dict, frames: dict[str, pd.DataFrame]) -> list[dict]:
    """The findings as data, each with its measured effect as text."""
    out = []
    for entry in entries(plan):
        given, text = entry.get("effect"), "" if entry["switch"].startswith("none") else "not measured"
        found = effect(given, frames) if given else None
        if found:
            unit = f" {given['unit']}" if given.get("unit") else ""
            seeds = f"{found['seeds']} seed{'s' * (found['seeds'] != 1)}"
            sets = f", mean of {len(found['datasets'])} data sets" if len(found["datasets"]) > 1 else ""
            spread = f" ± {found['half']:.2f}" if found["seeds"] > 1 else ""
            place = f"{given['metric']}, scale {given.get('scale', 'paper')}, {seeds}{sets}"
            text = f"{found['mean']:+.2f}{spread}{unit} ({place})"
        out.append(
            {"finding": " ".join(entry["finding"].split()), "switch": " ".join(entry["switch"].split()), "effect": text}
        )
    return out


def markdown(found: list[dict]) -> list[str]:
    """The table of RESULTS.md."""
    if not found:
        return []
    rows = [f"| {d['finding']} | {d['switch']} | {d['effect']} |" for d in found]
    head = ["| finding | switch | effect of the switch: mean ± 95 % interval |", "|---|---|---|"]
    return ["## Where paper, released code and this code differ", "", *head, *rows, ""]
