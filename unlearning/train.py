"""Fine-tune a language model on question-answer pairs, unlearn a part of them by several methods, mix every unlearned
model back to the original retention (UWC), and write a record for each forget split, method and bar tau.

    python train.py --methods ga gd kl po npo rmu --seeds 0 1 2            # generated authors, needs no data
    python train.py --preset smollm2 --dataset tofu --forget forget05 --items 20 --train-accum 1 --accum 1
    python train.py --preset phi --dataset tofu --forget forget01 forget05 forget10 --precision mixed --download
    python train.py --preset own --weights FOLDER --forget my_forget.jsonl --retain my_retain.jsonl --tau 0.95 --export
    accelerate launch --config_file configs/fsdp.yaml train.py --preset llama2 --dataset tofu --forget forget05

The run lands in runs/<scale>/<name>/, the fine-tuned originals beside it in models/, where other runs find them. It
goes on from its last checkpoint when started again.
"""

import json
import time
from pathlib import Path

from lab import runs
from lab.runs import UserError

import torch
from torch import Tensor

import control
import evaluation
import metrics
import models
import study
from methods import BETA, METHODS, Unlearner
from models import set_weights, weights
from originals import Bench, accelerator_of
from settings import Settings
from trainer import check_steps, steps_of

# ---------------------------------------------------------------------------------------------------------- unlearning


def unlearn(b: Bench, split: str, method: str, out: Path, log) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Run one method on one split from the original weights; -> (weights, numbers of the run)."""
    s, name = b.s, f"seed{b.seed}-{split}-{method}"
    path, kept = out / "checkpoint" / f"{name}.safetensors", out / "checkpoint" / f"{name}-kept.safetensors"
    set_weights(b.lm, b.original)
    u = Unlearner(s, method, b.lm, b.reference, b.chat, b.corpus, split, b.seed)
    total, warmup = steps_of(s.unlearn_epochs, len(u.forget), s.batch, s.accum)
    t = b.trainer(s.unlearn_lr, total, warmup, s.accum, u.trained(method))
    if (s.early_stop or s.eval_every) and t.sharded:
        raise UserError("--early-stop and --eval-every look at the whole model, which FSDP and DeepSpeed cut in pieces")
    u.bind(t)
    t.load(path)
    ended: list[int] = []
    sets = b.sets(split)
    if s.early_stop:
        bar = s.early_stop * b.start(split)["exact", "retain"].es.mean()

    def look(step: int) -> dict[str, float]:
        """ES of both parts as unlearning goes on: excess can be seen while it happens."""
        if not s.eval_every or step % s.eval_every:
            return {}
        return {f"ES_exact_{part}": float(sets.scores(t.lm, "exact", part).es.mean()) for part in metrics.PARTS}

    def stop(step: int) -> bool:
        """Keep the weights while the bar is met; the first look that fails ends the run with the last that were
        kept."""
        if not s.early_stop or (step % s.stop_every and step != total):
            return False
        if sets.scores(t.lm, "exact", "retain").es.mean() >= bar:
            t.lm.train()
            runs.write_tensors(kept, weights(t.lm), {"step": str(step)}) if b.lead else None
            return False
        ended.append(step)
        return True

    lines = log(method, split, t.step)
    title = f"{METHODS[method].label} {split} seed {b.seed}"
    seconds = t.fit(u.micro, path, every=s.checkpoint_steps, title=title, log=lines, after=stop, look=look)
    tensors, numbers = t.full_weights(), {"steps": t.step, "unlearn_seconds": seconds}
    if ended:  # before the first look nothing was kept: the original
        at = 0
        tensors = {k: v.clone() for k, v in b.original.items()}
        if kept.is_file():
            tensors, meta = runs.read_weights(kept)
            at = int(meta["step"])
        numbers |= {"stopped_at": ended[0], "kept_step": at}
    return tensors, numbers


# --------------------------------------------------------------------------------------------------------- the command


class Writer:
    """Records, item files and curves of a run; does nothing on processes other than the first."""

    def __init__(self, run: runs.Run | None, b: Bench):
        self.run, self.b, self.s = run, b, b.s
        self.folder = Path(b.s.out) / f"seed{b.seed}"
        self.stages = [(split, m) for split in b.s.splits for m in b.s.methods]

    def log(self, method: str, split: str, done: int):
        """A function that adds lines to metrics.jsonl; steps of all stages count on, so that they never fall back."""
        if self.run is None:
            return None
        n = {split: len(self.b.corpus.forget[split]) for split in self.s.splits}
        lengths = [steps_of(self.s.unlearn_epochs, n[sp], self.s.batch, self.s.accum)[0] for sp, _ in self.stages]
        before = sum(lengths[: self.stages.index((split, method))])
        self.run.log(self.b.seed, [], keep_to=before + done)

        def add(lines: list[dict]) -> None:
            stage = {"stage": f"{split} {method}"}
            self.run.log(self.b.seed, [{**line, "step": before + line["step"], **stage} for line in lines])

        return add

    def record(self, split: str, name: str, label: str, setting: str, found: dict, seconds: float) -> None:
        title = {"miniature": "miniature", "tofu": "TOFU", "own": "own"}[self.s.source]
        where = {"table": self.s.table, "dataset": f"{title} {split}".strip(), "method": label, "scale": self.s.scale}
        where["setting"] = f"{setting},model={models.PRESETS[self.s.preset].title}"
        about = self.b.corpus.about(split or self.s.splits[0])
        more = {"data": about, "metrics": found, "where": where, "device": self.b.device, "suffix": f"-{name}"}
        self.run.record(self.b.seed, seconds=seconds, **more)

    def has(self, name: str) -> bool:
        return (self.folder / f"record-{name}.json").is_file()

    def items(self, name: str, lines: list[dict]) -> None:
        runs.write_text(self.folder / f"items-{name}.jsonl", "".join(json.dumps(x) + "\n" for x in lines))


def label_of(s: Settings, method: str) -> str:
    """The method and what differs from the preset's defaults: a row of its own for every setting of a sweep."""
    p, m = models.PRESETS[s.preset], METHODS[method]
    parts = [m.label]
    if s.label == "none":
        return m.label
    if s.label:
        return f"{m.label} {s.label}"
    ascent = m.forget == "ga"
    parts += [f"T={s.temperature:g}"] if ascent and s.temperature != 1 else []
    parts += [f"q={s.select:g}"] if ascent and s.select < 1 else []
    parts += [f"cap={s.cap:g}" + (" a token" if s.cap_unit == "token" else "")] if ascent and s.cap else []
    parts += [f"batch={s.batch * s.accum}"] if s.batch * s.accum != (8 if s.preset == "mini" else 16) else []
    parts += [f"lr={s.unlearn_lr:g}"] if s.unlearn_lr != p.unlearn_lr else []
    parts += [f"epochs={s.unlearn_epochs}"] if s.unlearn_epochs != p.unlearn_epochs else []
    parts += [f"beta={s.beta:g}"] if s.beta > 0 and m.forget in BETA else []
    parts += [f"lambda={s.retain_weight:g}"] if s.retain_weight >= 0 and m.retain else []
    if m.forget == "rmu":
        parts += [f"layer={s.rmu_layer:g}"] if s.rmu_layer != Settings.rmu_layer else []
        parts += [f"c={s.rmu_scale:g}"] if s.rmu_scale != Settings.rmu_scale else []
    return " ".join([*parts, *(["early stopping"] if s.early_stop else [])])


def baseline(b: Bench, w: Writer, split: str, full: list) -> metrics.Truth | None:
    """Records of the original model and of one that never saw the split; -> truth losses of the latter."""
    clock, truth = time.perf_counter(), None
    if b.s.retrained:
        tensors = b.trained_on(f"retain-{split}", b.corpus.retrain(split))
        if w.run is not None:
            set_weights(b.lm, tensors)
            truth = metrics.truth(b.lm, b.chat, b.corpus.forget[split], b.device, b.s.max_length)
            if not (b.s.only_methods or w.has(f"{split}-retrained")):
                scores = b.sets(split).all_scores(b.lm)
                w.items(f"{split}-retrained", evaluation.item_rows(b.sets(split), scores, {}, None))
                found = metrics.four(scores) | evaluation.summaries(b, split, truth)
                seconds = time.perf_counter() - clock
                w.record(split, f"{split}-retrained", "Retrained", "calibration=none", found, seconds)
    if w.run is not None and not (b.s.only_methods or w.has(f"{split}-original")):
        clock = time.perf_counter()
        set_weights(b.lm, b.original)
        sets, scores = b.sets(split), b.start(split)
        w.items(f"{split}-original", evaluation.item_rows(sets, scores, dict.fromkeys(sets.kinds, 0.0), None))
        alphas = {f"alpha_{kind}": 0.0 for kind in sets.kinds}
        found = metrics.four(scores) | alphas | evaluation.summaries(b, split, truth)
        found["parameters"] = sum(v.numel() for v in b.original.values())
        found["targeted_share"] = 100 * len(b.corpus.forget[split]) / len(b.corpus.full)
        w.record(split, f"{split}-original", "Original", "calibration=none", found, time.perf_counter() - clock)
    return truth


def judge(
    b: Bench, w: Writer, split: str, tensors: dict[str, Tensor], truth: metrics.Truth | None, full: list, name: str,
    label: str, numbers: dict, clock: float,
) -> dict[float, dict]:  # fmt: skip
    """Evaluate, calibrate, record; -> {tau: metrics}. The record without calibration is written last and says that all
    is done."""
    found, calibrated, lines = evaluation.assess(b, split, tensors, truth, full)
    w.items(name, lines)
    for tau, m in calibrated.items():
        w.record(split, f"{name}-tau{tau:g}", label, f"calibration=UWC tau={tau:g}", m, m.pop("search_seconds"))
    seconds = numbers.get("unlearn_seconds", 0.0) + time.perf_counter() - clock
    w.record(split, f"{name}-none", label, "calibration=none", found | numbers, seconds)
    return calibrated


def interpolation(b: Bench, w: Writer, split: str, truth: metrics.Truth | None, full: list) -> None:
    """Control: the mixtures of the original with the model that never saw the split."""
    tensors = b.trained_on(f"retain-{split}", b.corpus.retrain(split))
    if w.run is not None and not w.has(f"{split}-interpolation-none"):
        name, clock = f"{split}-interpolation", time.perf_counter()
        judge(b, w, split, tensors, truth, full, name, "Interpolation to retrained", {}, clock)


def stage(b: Bench, w: Writer, split: str, method: str, truth: metrics.Truth | None, full: list) -> None:
    """Unlearn, evaluate, calibrate, record."""
    s, name = b.s, f"{split}-{method}"
    if w.has(f"{name}-none"):
        return
    clock = time.perf_counter()
    path = evaluation.unlearned_path(w.folder, split, method)
    if path.is_file():
        tensors, meta = runs.read_weights(path)
        numbers = json.loads(meta["numbers"])
    else:
        tensors, numbers = unlearn(b, split, method, Path(s.out), w.log)
        if w.run is not None:
            runs.write_tensors(path, tensors, {"numbers": json.dumps(numbers)})
    if w.run is None:  # the first process evaluates
        return
    for left in (Path(s.out) / "checkpoint").glob(f"seed{b.seed}-{name}*.safetensors"):
        if left.stem in (f"seed{b.seed}-{name}", f"seed{b.seed}-{name}-kept"):
            left.unlink()
    calibrated = judge(b, w, split, tensors, truth, full, name, label_of(s, method), numbers, clock)
    if s.export:
        export(b, w, split, method, tensors, calibrated[max(s.tau)]["alpha_exact"])
    if s.drop_models:
        path.unlink(missing_ok=True)


def export(b: Bench, w: Writer, split: str, method: str, tensors: dict[str, Tensor], alpha: float) -> None:
    """The calibrated model as a folder that transformers loads."""
    folder = w.folder / f"calibrated-{split}-{method}-tau{max(b.s.tau):g}"
    control.Mixer(b.lm, b.original, tensors).set(alpha)
    models.save(b.lm.hf, b.chat.tokenizer, folder)
    print(f"{folder}: {METHODS[method].label}, alpha {alpha:.3f}")


def correlations(b: Bench, w: Writer) -> None:
    """Records of the metric study over all models of the seed."""
    names = [f"{split}-{m}-none" for split, m in w.stages]
    population = [runs.read_record(w.folder / f"record-{n}.json")["metrics"] for n in names]
    for kind, metric, found in study.summarise(population, b.s.attacks):
        slug = f"study-{kind.replace(' ', '-')}-{metric}"
        w.record("", slug, metric, f"attack={kind}", found, 0.0)


def describe(b: Bench) -> str:
    s, c = b.s, b.corpus
    size = sum(p.numel() for p in b.lm.parameters())
    splits = ", ".join(f"{k} ({len(c.forget[k])})" for k in s.splits)
    return (
        f"{models.PRESETS[s.preset].title} ({size:,} parameters, {s.precision}) on {c.name} ({c.variant}; "
        f"{len(c.full)} questions): fine-tuning {s.epochs} epochs at {s.lr:g}; then "
        f"{', '.join(METHODS[m].label for m in s.methods)} on {splits}, {s.unlearn_epochs} epochs at {s.unlearn_lr:g}, "
        f"{s.batch} x {s.accum} items a step; tau {', '.join(f'{t:g}' for t in s.tau)}; {b.device}"
    )


def long_enough(b: Bench) -> None:
    """UserError before anything is made: a folder with something in it would refuse the mended command."""
    if b.s.epochs:
        rows = len(b.corpus.full) + len(b.corpus.extra)
        check_steps(steps_of(b.s.epochs, rows, b.s.train_batch, b.s.train_accum)[0])
    for split in b.s.splits:
        check_steps(steps_of(b.s.unlearn_epochs, len(b.corpus.forget[split]), b.s.batch, b.s.accum)[0])


def main() -> None:
    s = runs.parse(Settings, __doc__)
    s.check()
    s.resolve()
    device = runs.device(s.device, s.precision == "mixed")
    torch.set_float32_matmul_precision("high")
    accelerator = accelerator_of(device)
    if s.dry_run:
        b = Bench(s, s.seeds[0], accelerator)
        long_enough(b)
        print(describe(b))
        return
    ignore = ("out", "models", "data_dir", "device", "download", "dry_run", "checkpoint_steps", "drop_models")
    run = runs.Run(Path(s.out), s, ignore) if accelerator.is_main_process else None
    if (Path(s.out) / "records.jsonl").is_file():
        if run:
            print(f"{s.out} is complete; delete it to run again")
            evaluation.show(run.finish())
        return
    accelerator.wait_for_everyone()
    for number, seed in enumerate(s.seeds):
        b = Bench(s, seed, accelerator)
        long_enough(b)
        if run:
            run.same_data(seed, [b.corpus.sha256])
        w = Writer(run, b)
        print(describe(b)) if run and not number else None
        b.set_original()
        full = b.encoded(b.corpus.full + b.corpus.extra)
        for split in s.splits:
            truth = baseline(b, w, split, full)
            for method in s.methods:
                stage(b, w, split, method, truth, full)
            if s.interpolate:
                interpolation(b, w, split, truth, full)
        if s.attacks and run:
            correlations(b, w)
    if run:
        evaluation.show(run.finish())
        print(f"\nrecords in {s.out}")


if __name__ == "__main__":
    runs.command(main)
