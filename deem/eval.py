"""Evaluate a trained run on the paper's benchmarks, or score a finished demo run again.

    python eval.py --run runs/demo/NAME                                # once more: must give the record's numbers
    python eval.py --run runs/paper/NAME --benchmark pope robustvqa    # Table 1
    python eval.py --run runs/paper/NAME --benchmark pope --fast       # one pass a question instead of a beam search
    python eval.py --run RUN --benchmark okvqa coco --export           # logs in the manner of lmms-eval as well

Writes below --out a JSON line a question (seed<k>/answers-<set>.jsonl) and a record a set. An interrupted start goes on
from the last whole batch. Which files a benchmark needs stands in the README; a missing one is named.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab import runs
from lab.runs import Number, UserError

import torch

import mining
import parsers
import prompts
import scores
from asking import GENERATION, SHORT, ask, seconds_of
from benchmarks import Question
from documents import Picture
from drawing import draw
from sets import BENCHMARKS, SETTINGS_OF, Set, digest, questions_of, variant_of

HEADLINE = {
    **{"yesno": "accuracy", "choice": "accuracy", "name": "accuracy", "vqa": "accuracy", "vizwiz": "accuracy"},
    **{"exact": "accuracy", "rank": "ndcg", "caption": "cider", "paragraph": "cider", "region": "cider"},
    **{"draw": "fid", "clip": "accuracy"},
}


@dataclass
class EvalSettings:
    """Score a run on the paper's benchmarks; without --benchmark, score a finished digit run again."""

    run: str = ""
    """Run folder written by train.py. Not needed for mmvp-vlm, which scores a CLIP model."""
    benchmark: tuple[Literal[tuple(BENCHMARKS)], ...] = ()
    """Benchmarks, one or more; none: the run's own measurements again."""
    data_dir: str = ""
    """Folder with deem/; default $REPRO_DATA, else ./data."""
    items: int = 0
    """Only the first so many questions of each set; 0: all (paper)."""
    parser: Literal[tuple(parsers.PARSERS)] = "deem"
    """How yes/no answers are read: deem (released code, paper's tables), pope (authors of POPE), strict (lmms-eval).
    The record also has the scores by pope."""
    fast: bool = False
    """Yes/no questions: compare the log-probabilities of yes and no in one pass instead of a beam search. Not the
    paper's."""
    form: Literal["", *prompts.FORMS] = ""
    """Wording of the prompts: paper, code, plain; default the run's own."""
    beams: int = 0
    """Beams of generation; 0: the paper's (3 for answers, 5 for captions)."""
    batch_size: int = 16
    """Questions a step."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the run. Without --benchmark: all it has."""
    tokenize: Literal["ptb", "plain"] = "ptb"
    """Captions: ptb is official and needs Java; plain does without, and the record says so."""
    metrics: tuple[Literal["cider", "meteor"], ...] = ("cider", "meteor")
    """Caption metrics; meteor needs Java."""
    draw_steps: int = 250
    """Denoising steps of a drawn picture (code: 250)."""
    guidance: Number = 3.5
    """Classifier-free guidance of a drawn picture (code: 3.5)."""
    samples: int = 0
    """Drawn pictures a caption, best by CLIP kept; 0: 8 for MS-COCO, 1 for LN-COCO (paper)."""
    features: str = "inception"
    """FID features: inception, or a TorchScript file from uint8 pictures to [B, d]."""
    clip: str = "ViT-L-14"
    """open_clip model that re-ranks drawn pictures and answers mmvp-vlm."""
    clip_weights: str = "openai"
    """Its weights: open_clip tag or file."""
    export: bool = False
    """Also write samples_<set>.jsonl and results.json in the manner of lmms-eval."""
    table: str = "own"
    """Table of the records."""
    label: str = ""
    """Method of the records; default the run's label."""
    setting: str = ""
    """Setting of the records; default says parser, form and what is not the paper's."""
    scale: Literal["smoke", "demo", "paper"] = "paper"
    """Scale the records belong to."""
    out: str = ""
    """Folder of logs and records; default <run>-eval-<benchmarks> beside the run folder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    download: bool = False
    """Let libraries fetch weights."""

    def check(self) -> None:
        if self.items < 0 or self.beams < 0 or self.samples < 0 or self.batch_size < 1 or self.draw_steps < 1:
            raise UserError("--items, --beams and --samples take 0 or more, --batch-size and --draw-steps 1 or more")
        if not self.run and set(self.benchmark) != {"mmvp-vlm"}:
            raise UserError("give --run RUN, a folder that train.py wrote (only mmvp-vlm works without)")


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
            elif one.kind == "clip":
                metrics = score_clip(s, questions, root / one.images, device)
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


def score_clip(s: EvalSettings, questions: Sequence[Question], root: Path, device) -> dict[str, float]:
    """MMVP-VLM of a CLIP model: pair accuracy in all and by visual pattern."""
    clip = mining.load_clip(s.clip, s.clip_weights, device, s.download)
    records = mining.score_vlm(clip, questions, root)
    out = parsers.score_pairs(records)
    for group in dict.fromkeys(q.group for q in questions):
        out[f"accuracy {group}"] = parsers.score_pairs([r for r in records if r["group"] == group])["accuracy"]
    return out


def show(record: dict) -> None:
    """Print one set's scores on a line."""
    shown = [f"{k} {v:.2f}" for k, v in record["metrics"].items() if isinstance(v, float) and k != "score"]
    print(f"seed {record['seed']} {record['dataset']} (n={record['data']['n']}): " + ", ".join(shown))


def load(folder: Path, device, seed: int):
    """(model, settings) of a seed of a run; UserError for weights that are not finite: they would answer all the same,
    and always-no is right half of the time."""
    import train

    model, settings = train.load_run(folder, device, seed)
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise UserError(f"{folder / f'seed{seed}'}: weights {name} are not finite; train the run again")
    return model, settings


def again(folder: Path, device) -> None:
    """Score a finished run on the digit scenes once more and compare with its records."""
    import study
    import train

    for seed in train.settings_of(folder).seeds:
        model, s = load(folder, device, seed)
        if s.dataset != "digits":
            raise UserError(f"{folder} was not trained on the digit scenes; name a --benchmark to score it on")
        metrics, _ = study.score(model, s, seed)
        path = folder / f"seed{seed}" / "record.json"
        keys = ("csr_ratio", "probe_uncaptioned", "POPE_accuracy", "RobustVQA_accuracy", "MMVP_accuracy")
        print(f"seed {seed}: " + ", ".join(f"{k} {metrics[k]:.4g}" for k in keys if k in metrics))
        if path.is_file():
            old = runs.read_record(path)["metrics"]
            both = {k: (old[k], v) for k, v in metrics.items() if k in old}
            off = {k: (a, b) for k, (a, b) in both.items() if isinstance(a, str) or abs(a - b) > 1e-6 * max(1, abs(b))}
            told = ", ".join(f"{k} {a if isinstance(a, str) else f'{a:.6g}'}, now {b:.6g}" for k, (a, b) in off.items())
            print(f"seed {seed}: record " + (f"says {told}" if off else "agrees"))


IGNORE = ("run", "out", "data_dir", "device", "download")


def main() -> None:
    s = runs.parse(EvalSettings, __doc__)
    s.check()
    device = runs.device(s.device)
    folder = Path(s.run).expanduser()
    if folder.name.startswith("seed") and (folder.parent / "settings.json").is_file():
        folder = folder.parent  # runs/x/seed0 -> runs/x
    if s.run and not (folder / "settings.json").is_file():
        raise UserError(f"no run in {folder} (settings.json is missing); train it first")
    if not s.benchmark:
        return again(folder, device)
    root = runs.data_dir(s.data_dir) / "deem"
    check_data(s, root)
    default = f"{folder}-eval-{'-'.join(s.benchmark)}" if s.run else f"runs/{s.scale}/{'-'.join(s.benchmark)}-{s.clip}"
    run = runs.Run(Path(s.out or default), s, IGNORE)
    if run.complete:
        print(f"{run.out} is complete; delete it to evaluate again")
    else:
        for seed in s.seeds:
            model, form, label = None, s.form or "paper", s.label or s.clip
            if s.run:
                model, trained = load(folder, device, seed)
                form, label = s.form or trained.prompt_form, s.label or trained.label
            evaluate(s, run, seed, model, form, label, root, device)
    for record in run.finish():
        show(record)
    print(f"records in {run.out}")


if __name__ == "__main__":
    runs.command(main)
