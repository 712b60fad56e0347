"""Put the questions of a set to a model: pictures encoded once, answers logged a batch at a time, an interrupted log
taken over; then score and record them, for train.py and eval.py alike."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import torch

from documents import prompts
from documents.readers import Picture
from evaluation import parsers, scores, vqa
from evaluation.benchmarks import Question
from evaluation.drawing import draw
from evaluation.sets import BENCHMARKS, SETTINGS_OF, Set, digest, questions_of, variant_of
from settings import EvalSettings

# Generation of the paper: beams, new tokens (least, most), penalties of length and repetition.
SHORT = {"num_beams": 3, "max_new_tokens": 10, "length_penalty": 0.0}
GENERATION = dict.fromkeys(("yesno", "choice", "name", "vqa", "vizwiz", "exact"), SHORT) | {
    "caption": {"num_beams": 5, "min_new_tokens": 8, "max_new_tokens": 20},
    "region": {"num_beams": 5, "min_new_tokens": 8, "max_new_tokens": 20},
    "paragraph": {"num_beams": 5, "min_new_tokens": 90, "max_new_tokens": 90, "repetition_penalty": 1.2},
}


def batches(questions: Sequence[Question], size: int) -> list[list[int]]:
    """Indices in batches of about `size` in which all questions of a picture stand together, pictures in order of
    first appearance; each picture is then encoded once."""
    by_image: dict[str, list[int]] = {}
    for k, q in enumerate(questions):
        by_image.setdefault(id(q.image) if not isinstance(q.image, str | int) else q.image, []).append(k)
    out: list[list[int]] = [[]]
    for indices in by_image.values():
        if out[-1] and len(out[-1]) + len(indices) > size:
            out.append([])
        out[-1] += indices
    return [b for b in out if b]


def prompt_of(q: Question, kind: str, picture: Picture, form: str) -> list:
    if kind == "yesno":
        return prompts.pope(q.question, picture, form)
    if kind in ("choice", "name"):
        return prompts.options(q.question, picture, form)
    if kind == "rank":
        return prompts.dialog(q.meta["caption"], q.meta["turns"], q.question, picture, form)
    if kind == "caption":
        return prompts.caption(picture, form)
    if kind == "paragraph":
        return prompts.paragraph(picture, form)
    if kind == "region":
        return prompts.region(Picture(picture.source, vqa.mask_of(q), picture.name), form)
    return prompts.vqa(q.question, picture, form)


@torch.no_grad()
def ask(
    model,
    questions: Sequence[Question],
    kind: str,
    *,
    form: str = "paper",
    picture: Callable[[Question], Picture] | None = None,
    fast: bool = False,
    generation: dict | None = None,
    batch_size: int = 16,
    log: Path | None = None,
    title: str = "",
) -> list[dict]:
    """The model's answers, a record a question in the questions' order.

    Each picture is encoded once for all its questions. `log`: a JSON line a question, appended a batch at a time; what
    stands there from an interrupted start is taken over, and a half-written batch is asked again. A record has index,
    answer, label, and what the score of its kind needs.
    """
    picture = picture or (lambda q: q.image if isinstance(q.image, Picture) else Picture(q.image))
    plan, done, before, clock = batches(questions, batch_size), [], 0.0, time.perf_counter()
    if log is not None:
        done, before = _kept(log, questions, plan, kind), seconds_of(log)
    settings = generation if generation is not None else GENERATION.get(kind, SHORT)
    finished = {r["index"] for r in done}
    file = open(log, "a") if log is not None else None  # noqa: SIM115
    bar = progress(desc=title or kind, total=len(questions), initial=len(done), unit="question")
    try:
        for batch in plan:
            if batch[0] in finished:
                continue
            asked = [questions[k] for k in batch]
            keys = {_key(q): q for q in asked}
            pictures = {key: picture(q) for key, q in keys.items()}
            parts = [prompt_of(q, kind, pictures[_key(q)], form) for q in asked]
            images = None
            if kind != "region":  # a region prompt holds two pictures and a mask: the model encodes those itself
                place = {key: k for k, key in enumerate(pictures)}
                images = model.encode_images(model.pictures(list(pictures.values())))
                images = images.select([place[_key(q)] for q in asked])
            fresh = []
            if kind == "rank":
                ranked = model.option_scores(parts, [q.meta["options"] for q in asked], images)
                extra = [{"answer": "", "scores": x.tolist()} for x in ranked]
            elif kind == "yesno" and fast:
                both = model.yes_no(parts, images).float().cpu()
                if not torch.isfinite(both).all():
                    raise UserError("the model's scores are not finite; are the weights broken?")
                extra = [{"answer": "yes" if a > b else "no", "log_yes": a, "log_no": b} for a, b in both.tolist()]
            else:
                extra = [{"answer": text.strip()} for text in model.generate(parts, images=images, **settings)]
            for k, q, more in zip(batch, asked, extra, strict=True):
                fresh.append(_record(k, q, kind, more))
            if file is not None:
                file.write("".join(json.dumps(r) + "\n" for r in fresh))
                file.flush()
                log.with_suffix(".seconds").write_text(f"{before + time.perf_counter() - clock:.3f}")
            done += fresh
            bar.update(len(fresh))
    finally:
        bar.close()
        if file is not None:
            file.close()
    return sorted(done, key=lambda r: r["index"])


def seconds_of(log: Path) -> float:
    """Time spent on a log by all its starts; 0 where that is not known."""
    try:
        found = float(log.with_suffix(".seconds").read_text())
    except (OSError, ValueError):
        return 0.0
    return found if math.isfinite(found) else 0.0


def _key(q: Question):
    return q.image if isinstance(q.image, str | int) else id(q.image)


def _record(k: int, q: Question, kind: str, more: dict) -> dict:
    out = {"index": k, "question_id": q.meta.get("question_id", k + 1), "question": q.question, "label": q.answer}
    out |= {"image": q.image if isinstance(q.image, str | int) else "", "group": q.group, "pair": q.pair, **more}
    for key in ("answers", "references", "relevance", "right", "object"):
        if key in q.meta:
            out[key] = q.meta[key]
    if kind == "yesno":
        out |= {"parsed": parsers.parse_answer(more["answer"]), "parsed_pope": parsers.parse_pope(more["answer"])}
    if kind == "choice":
        out["parsed"] = parsers.parse_choice(more["answer"], q.meta["options"])
        out["right"] = out["parsed"] == q.answer
    return out


def _kept(log: Path, questions: Sequence[Question], plan: list[list[int]], kind: str) -> list[dict]:
    """Records of the whole batches in a log; the file is cut to them. Of a line the model's answer alone is taken over:
    label and reading are made anew."""
    rows = []
    for line in log.read_text(errors="replace").splitlines(keepends=True) if log.is_file() else ():
        try:
            if not line.endswith("\n"):
                break
            row = json.loads(line)
            index = row["index"]
            if questions[index].question != row["question"]:
                raise UserError(f"{log} answers other questions; choose another --out or delete it")
            if not isinstance(row["answer"], str):
                break
            said = {k: row[k] for k in ("answer", "scores", "log_yes", "log_no") if k in row}
            rows.append(_record(index, questions[index], kind, said))
        except (json.JSONDecodeError, KeyError, TypeError, IndexError):
            break  # what follows a damaged line is asked again
    whole, at = [], 0
    for batch in plan:
        part = rows[at : at + len(batch)]
        if [r["index"] for r in part] != batch:
            break
        whole += part
        at += len(batch)
    runs.write_text(log, "".join(json.dumps(r) + "\n" for r in whole))
    return whole


# --------------------------------------------------------------------------------------------------- scores and records

HEADLINE = {
    **{"yesno": "accuracy", "choice": "accuracy", "name": "accuracy", "vqa": "accuracy", "vizwiz": "accuracy"},
    **{"exact": "accuracy", "rank": "ndcg", "caption": "cider", "paragraph": "cider", "region": "cider"},
    **{"draw": "fid"},
}


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
