"""From questions to records: every set of a benchmark is asked, scored and recorded, by train.py and eval.py alike."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from lab import runs

import torch

from documents.document import Picture
from evaluation import parsers, scores
from evaluation.asking import GENERATION, SHORT, ask, seconds_of
from evaluation.drawing import draw
from evaluation.sets import BENCHMARKS, SETTINGS_OF, Set, digest, questions_of, variant_of
from settings import EvalSettings

HEADLINE = {
    **{"yesno": "accuracy", "choice": "accuracy", "name": "accuracy", "vqa": "accuracy", "vizwiz": "accuracy"},
    **{"exact": "accuracy", "rank": "ndcg", "caption": "cider", "paragraph": "cider", "region": "cider"},
    **{"draw": "fid"},
}


# --------------------------------------------------------------------------------------------------------------- scores


def score(kind: str, records: Sequence[dict], s: EvalSettings | None = None) -> dict[str, float]:
    """Metrics of a set from its records, with `score`, the one the paper prints."""
    s = s or EvalSettings()
    if kind == "yesno":
        out = parsers.score_yes_no(records, s.parser)
    elif kind == "choice":
        out = parsers.score_pairs(records)
    elif kind == "name":
        right = [parsers.name_answer(r["answer"]) == r["label"].strip().lower() for r in records]
        out = {"accuracy": 100 * sum(right) / len(right), "n": len(right)}
    elif kind in ("vqa", "vizwiz"):
        out = scores.score_vqa(records, kind)
    elif kind == "exact":
        out = scores.score_exact(records)
    elif kind == "rank":
        out = scores.score_rankings(records)
    else:
        out = scores.score_captions(records, s.metrics, s.tokenize)
    headline = HEADLINE[kind] if HEADLINE[kind] in out else next(iter(k for k in out if k != "n"))
    return {**out, "score": out[headline]}


def setting_of(s: EvalSettings, name: str, form: str) -> str:
    if s.setting or name in SETTINGS_OF:
        return s.setting or SETTINGS_OF[name]
    words = [form] + ([f"parser={s.parser}"] if s.parser != "deem" else []) + (["fast"] if s.fast else [])
    return ", ".join(words + ([f"beams={s.beams}"] if s.beams else []))


def export(folder: Path, one: Set, records: Sequence[dict], metrics: dict) -> None:
    """samples_<set>.jsonl (doc_id, target, arguments, resps, filtered_resps) and results.json, as of lmms-eval."""
    slug = _slug(one.label)
    rows = []
    for r in records:
        read = r.get("parsed", r.get("answer", ""))
        doc = {k: r[k] for k in ("question_id", "image", "question", "group") if k in r}
        rows.append(
            {
                "doc_id": r["index"],
                "doc": doc,
                "target": r["label"],
                "arguments": [r["question"]],
                "resps": [[r.get("answer", "")]],
                "filtered_resps": [read],
                f"{slug}_correct": float(read == r["label"]),
            }
        )
    runs.write_text(folder / f"samples_{slug}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    path = folder / "results.json"
    old = runs.read_json(path)["results"] if path.is_file() else {}
    runs.write_json(path, {"results": {**old, slug: {f"{k},none": v for k, v in metrics.items()}}})


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in label.lower()).strip("_")


# ----------------------------------------------------------------------------------------------------------------- main


def check_data(s: EvalSettings, root: Path) -> None:
    """Read the questions of every set and look for its pictures: what is missing is told before a model is loaded or
    trained."""
    for name in s.benchmark:
        for one in BENCHMARKS[name]:
            questions_of(s, one, root)


def evaluate(s: EvalSettings, run: runs.Run, seed: int, model, form: str, label: str, root: Path, device) -> None:
    """Ask, score and record every set of the settings for one seed; a set with a record is not asked again.

    A model whose frozen parts are bf16 and whose trained ones float32 answers under autocast, as it was trained.
    """
    kinds = {p.dtype for p in model.parameters()} if model is not None else set()
    with torch.autocast(device.type, torch.bfloat16, enabled=torch.bfloat16 in kinds):
        _evaluate(s, run, seed, model, form, label, root, device)


def _evaluate(s: EvalSettings, run: runs.Run, seed: int, model, form: str, label: str, root: Path, device) -> None:
    for name in s.benchmark:
        for one in BENCHMARKS[name]:
            folder, slug, clock = run.folder(seed), _slug(f"{name}-{one.label}"), time.perf_counter()
            if (folder / f"record-{slug}.json").is_file():
                continue
            questions, log = questions_of(s, one, root), folder / f"answers-{slug}.jsonl"
            records: list[dict] = []
            if one.kind == "draw":
                metrics = draw(model, s, one, questions, root, folder / f"drawn-{slug}", seed, form, device)
            else:
                generation = {**GENERATION.get(one.kind, SHORT), **({"num_beams": s.beams} if s.beams else {})}
                records = ask(
                    model,
                    questions,
                    one.kind,
                    form=form,
                    picture=lambda q, one=one: Picture(root / one.images / str(q.image)),
                    fast=s.fast,
                    generation=generation,
                    batch_size=s.batch_size,
                    log=log,
                    title=one.label,
                )
                metrics = score(one.kind, records, s)
            if HEADLINE[one.kind] in metrics:
                metrics["score"] = metrics[HEADLINE[one.kind]]
            if s.export and records:
                export(folder, one, records, metrics)
            data = {"name": one.label, "variant": variant_of(s, name, one, questions, root), "n": len(questions)}
            where = {"table": s.table, "dataset": one.label, "setting": setting_of(s, name, form), "method": label}
            spent = seconds_of(log) if records else time.perf_counter() - clock
            where["scale"], data["sha256"] = s.scale, digest(questions)
            more = {"data": data, "metrics": metrics, "where": where, "device": device}
            run.record(seed, seconds=spent, suffix=f"-{slug}", **more)


def show(record: dict) -> None:
    """Print one set's scores on a line."""
    shown = [f"{k} {v:.2f}" for k, v in record["metrics"].items() if isinstance(v, float) and k != "score"]
    print(f"seed {record['seed']} {record['dataset']} (n={record['data']['n']}): " + ", ".join(shown))
