"""Records and printed numbers made by hand, for the tests beside it: the same in every folder of the workspace."""

import copy

from lab import records

import pandas as pd

BASE = {
    "table": "main",
    "dataset": "d1",
    "setting": "s",
    "method": "m1",
    "seed": 0,
    "metrics": {"f1": 50.0, "text": "no number"},
    "settings": {},
    "data": {"name": "d1", "variant": "paper", "n": 7},
    "code": {"commit": "0123456789abcdef", "dirty": False},
    "host": {"device": "cpu", "torch": "2", "python": "3"},
    "seconds": 3600.0,
    "peak_memory_mb": 1.0,
    "scale": "paper",
}
HEADER = "table,dataset,setting,method,metric,value,std,unit,source\n"
PAPER = HEADER + "main,d1,s,m1,f1,48,1,%,Table 1\nmain,d2,s,m1,f1,,,%,unknown\nmain,d1,s,m2,f1,40,,%,Table 1\n"
VIEW = {
    "id": "main",
    "title": "Main",
    "where": {"table": "main"},
    "rows": "method",
    "columns": "dataset",
    "metric": "f1",
}


def record(**changes) -> dict:
    out = copy.deepcopy(BASE)
    for key, value in changes.items():
        out[key] = {**out[key], **value} if isinstance(out[key], dict) else value
    return out


def frame(*found: dict) -> pd.DataFrame:
    return records.long([{**r, "run": "run"} for r in found])
