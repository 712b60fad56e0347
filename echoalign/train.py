"""Noise -> EchoMod -> EchoSelect -> classifiers on the aligned set, and the baselines beside them; a record each.

    python train.py --seeds 0 1 2                                          # 5,000 MNIST digits, needs no data
    python train.py --methods ce echoalign dividemix --noise symmetric --rate 0.5
    python train.py --stage generator --generator concat                    # train the small generator alone
    python train.py --dataset cifar10 --generator sd --features clip --threshold 0.52 --download
    accelerate launch -q train.py --stage modify --dataset cifar10 --generator sd    # shards over all GPUs

The run lands in runs/<scale>/<name>/ and goes on from its last checkpoint when started again.
"""

import sys
from pathlib import Path

from lab import runs
from lab.runs import UserError

import torch

import evaluation
from echoselect import quality, sweep
from generator.build import refuse
from prepare import Prepared
from settings import IGNORE, METHODS, Settings, parse
from tasks import needs_edits, task_of
from trainer import Learner, fit


def train_method(p: Prepared, method: str, run: runs.Run, offset: int, prefix: str) -> tuple[Learner, dict, float]:
    """Train one method of one seed; (learner, metrics, seconds)."""
    name, cls = METHODS[method]
    folder = run.folder(p.seed)

    def log(lines: list[dict], keep_to: int | None) -> None:
        told = [{f"{prefix}{k}" if k != "step" else k: v for k, v in r.items() if k != "main"} for r in lines]
        told = [{**r, "step": offset + r["step"]} for r in told]
        run.log(p.seed, told, keep_to=None if keep_to is None else offset + keep_to)

    if method == "pretrain":
        learner, accuracy = p.pretrained
        row = {"accuracy": accuracy, "accuracy_best": accuracy, "trained_on": len(p.data.pre)}
        if p.s.official_eval:
            row["accuracy_official"] = learner.accuracy(p.test, evaluation.official_seed(p.seed))
        return learner, row, 0.0
    learner = cls(p.s, task_of(p, method), p.seed, p.device)
    checkpoint = folder / "checkpoint" / f"{method}.safetensors"
    curve, seconds = fit(learner, checkpoint, log, p.show, f"{name}, seed {p.seed}")
    metrics = {**evaluation.summary(curve), "trained_on": len(learner.task.x)}
    return learner, metrics, seconds


def selection_records(p: Prepared, run: runs.Run, about: dict) -> None:
    """A record a selector (table <table>-selection), and where images are edited one of the edits (<table>-edits)."""
    s, place = p.s, {"dataset": p.data.kind.title, "setting": p.s.setting, "scale": p.s.scale}
    told = {"data": about, "device": p.device}
    folder = run.folder(p.seed)
    for k, (name, score, kept) in enumerate(p.scores()):
        path = folder / f"record-selection-{k}.json"
        if path.is_file():
            continue
        metrics = {**sweep(score, p.right), **(quality(kept, p.right) if kept is not None else {})}
        if name == "EchoSelect":
            metrics |= {"tau": p.tau} if p.rule == "similarity" else {}
            metrics |= evaluation.histograms(p.similarity, p.right)
        where = {"table": f"{s.table}-selection", "method": name, **place}
        run.record(p.seed, seconds=0.0, metrics=metrics, where=where, suffix=f"-selection-{k}", **told)
    if s.generator == "none":
        return
    path = folder / "record-edits.json"
    if not path.is_file():
        metrics = {**p.edits(), "seconds_modify": p.modified.seconds, "selected": int(p.selected.sum())}
        metrics |= {"rule": p.rule, "wrong": int((~p.right).sum())}
        if p.data.size <= 64:
            metrics["gallery"] = evaluation.thumbnails(p)
        evaluation.gallery(p, folder / "edits.png")
        evaluation.report(p, folder / "selection.csv")
        where = {"table": f"{s.table}-edits", "method": f"EchoMod ({s.generator})", **place}
        run.record(p.seed, seconds=p.modified.seconds, metrics=metrics, where=where, suffix="-edits", **told)


def describe(p: Prepared) -> str:
    s, d = p.s, p.data
    rate = f"{100 * p.noisy.rate:.2f} % wrong labels"
    line = f"{d.kind.title} ({d.variant}; {len(d.pre)} clean + {len(d.train)} noisy + {len(d.test)} test images), "
    line += f"{s.setting}: {rate}, seed {p.seed}, {p.device}\nEchoMod: {s.generator}, strength {s.strength:g}, "
    line += f"{s.edit.steps} steps; EchoSelect: {p.rule}, {s.features}, threshold {s.threshold}; "
    return line + f"{s.model}, {s.epochs} + {s.finetune} epochs; methods {', '.join(s.methods)}"


def one_seed(s: Settings, seed: int, run: runs.Run, device: torch.device, show: bool) -> list[dict]:
    """All of one seed; the records of its methods."""
    folder, records = run.folder(seed), []
    p = Prepared(s, seed, device, show)
    run.same_data(seed, [p.data.sha256, p.noisy.sha256])
    print(describe(p))
    about = {**p.data.about(), "noise_sha256": p.noisy.sha256, "noise_rate": p.noisy.rate}
    if s.stage == "select" and s.generator == "none":
        selection_records(p, run, about)
        return []
    if needs_edits(s):
        if s.stage == "generator":
            print(f"generator: {p.generator.about()}")
            return []
        print(f"modified images: {p.modified.folder} ({p.modified.seconds:.1f} s in this start)")
        if s.check:
            p.check()
        if s.stage == "modify":
            return []
        if s.stage == "select" or "echoalign" in s.methods:  # one run of a setting tells of it
            selection_records(p, run, about)
        if s.stage == "select":
            return []
    place = {"table": s.table, "dataset": p.data.kind.title, "setting": s.setting, "scale": s.scale}
    for k, method in enumerate(METHODS):
        if method not in s.methods:
            continue
        path = folder / f"record-{method}.json"
        if path.is_file():
            records.append(runs.read_record(path))
            continue
        prefix = "" if len(s.methods) == 1 else f"{method}/"
        learner, metrics, seconds = train_method(p, method, run, 10_000 * k, prefix)
        if method == "echoalign":
            metrics |= {"selected": int((p.selected & p.train).sum())}
            q = quality(p.selected[p.train], p.right[p.train])
            metrics |= {k: q[k] for k in ("precision", "recall") if k in q}
        told = {"seconds": seconds, "data": about, "device": device}
        row = METHODS[method][0]
        before = metrics.pop("before", None)
        runs.write_tensors(folder / f"model-{method}.safetensors", evaluation.weights(learner), {"model": s.model})
        if before is not None and s.finetune:
            where = {**place, "method": f"{s.label or row} without fine-tuning"}
            run.record(seed, metrics=before, where=where, suffix=f"-{method}-before", **told)
        name = s.label or row
        record = run.record(seed, metrics=metrics, where={**place, "method": name}, suffix=f"-{method}", **told)
        records.append(record)
        (folder / "checkpoint" / f"{method}.safetensors").unlink(missing_ok=True)  # the weights stay
    return records


def main() -> None:
    s = parse(__doc__, sys.argv[1:])
    s.check_values()
    s.resolve()
    device = runs.device(s.device, s.precision == "bf16")
    from accelerate import PartialState

    state = PartialState()
    torch.set_float32_matmul_precision("high")
    if s.dry_run:
        for seed in s.seeds:
            p = Prepared(s, seed, device)
            if needs_edits(s):
                refuse(s)
            print(describe(p))
        return
    if state.num_processes > 1 and s.stage != "modify":
        raise UserError("several processes share the work of --stage modify alone; run the other stages in one process")
    out, lead = Path(s.out), state.is_main_process
    if s.stage == "modify" and state.num_processes > 1:
        for seed in s.seeds:
            Prepared(s, seed, device, lead).modify(state.process_index, state.num_processes)
        return
    run = runs.Run(out, s, ignore=IGNORE)
    told = [f for k in s.seeds for m in s.methods if (f := out / f"seed{k}" / f"record-{m}.json").is_file()]
    if (out / "records.jsonl").is_file() and len(told) == len(s.seeds) * len(s.methods) and s.stage == "all":
        print(f"{out} is complete; delete it to run again")
        evaluation.show(runs.read_record(f) for f in told)
        return
    (out / "records.jsonl").unlink(missing_ok=True)
    torch.backends.cudnn.benchmark = True
    records = [r for seed in s.seeds for r in one_seed(s, seed, run, device, lead)]
    if s.stage in ("generator", "modify"):
        return
    run.finish()
    evaluation.show(records)
    print(f"records in {out}")


if __name__ == "__main__":
    runs.command(main)
