"""Whether two folders of runs hold the same records: everything but times, memory, machine and commit."""

import json
import sys
from pathlib import Path


def records(folder):
    out = {}
    for path in sorted(Path(folder).glob("*/seed*/record*.json")):
        r = json.loads(path.read_text())
        metrics = {k: v for k, v in r["metrics"].items() if "second" not in k and "memory" not in k}
        out["/".join(path.parts[-3:])] = [r["table"], r["dataset"], r["setting"], r["method"], r["seed"], metrics]
    return out


one, two = map(records, sys.argv[1:])
different = sorted(k for k in {*one, *two} if one.get(k) != two.get(k))
if not one or different:
    sys.exit(f"{len(different)} of {len(one)} records differ, first {different[:1] or 'none at all'}")
print(f"{len(one)} records, all the same")
