"""Fine-tune a language model on question-answer pairs, unlearn a part of them by several methods, mix every unlearned
model back to the original retention (UWC), and write a record for each forget split, method and bar tau.

    python train.py --methods ga gd kl po npo rmu --seeds 0 1 2            # generated authors, needs no data
    python train.py --preset smollm2 --dataset tofu --forget forget05 --items 20 --train-accum 1 --accum 1
    python train.py --preset phi --dataset tofu --forget forget01 forget05 forget10 --precision bf16 --download
    accelerate launch --config_file configs/fsdp.yaml train.py --preset llama2 --dataset tofu --forget forget05

The run lands in runs/<scale>/<name>/, the fine-tuned originals beside it in models/, where other runs find them. It
goes on from its last checkpoint when started again.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import control
import data
import eval as evaluation
import losses
import metrics
import models
import runs
import study
from methods import BETA, METHODS, Unlearner
from models import set_weights, weights
from originals import Bench, accelerator_of
from runs import Number, UserError
from trainer import Optimizer, Precision, steps_of


@dataclass
class Settings:
    preset: Literal[tuple(models.PRESETS)] = "mini"
    """Model: mini (0.6 M, from scratch), scratch-medium (52 M), smollm2 (in a package), phi, llama2 (paper)."""
    weights: str = ""
    """Folder or hub id of other weights for the preset's template, e.g. locuslab/tofu_ft_phi-1.5 with --epochs 0."""
    dataset: Literal["miniature", "tofu"] = "miniature"
    """miniature is generated; tofu is read from <data-dir>/tofu."""
    items: int = 0
    """tofu: keep so many rows of each evaluation part and twice as many other training rows; 0: all (paper)."""
    methods: tuple[Literal[tuple(METHODS)], ...] = ("ga", "gd", "kl", "po", "npo", "rmu")
    """Unlearning methods, one after the other (the default are those of the paper's tables)."""
    forget: tuple[str, ...] = ()
    """Forget splits: forget01, forget05, forget10 (tofu); forget-small, forget-large (miniature). Default: all."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, one after the other; each gives its own order and draws, and a world of its own on miniature (paper:
    5)."""
    origin_seed: int = -1
    """Seed of the fine-tuning; -1: the run's seed from scratch, 42 (paper) for a pretrained model."""

    lr: Number = -1.0
    """Fine-tuning: AdamW rate; -1: phi 2e-5, llama2 1e-5 (paper), mini 2e-3, scratch-medium 1e-3, smollm2 1e-4."""
    epochs: int = -1
    """Fine-tuning: epochs; 0: none, the weights know the data already; -1: 5 (paper), mini 40, scratch-medium 60."""
    train_batch: int = 0
    """Fine-tuning: sequences a micro-batch; 0: 4 (paper), from scratch 32."""
    train_accum: int = 0
    """Fine-tuning: micro-batches a step over all processes; 0: 8 (paper: 4 on each of 2 GPUs), from scratch 1."""

    unlearn_lr: Number = -1.0
    """Unlearning: AdamW rate; -1: phi 2e-5, llama2 1e-5 (paper), mini 5e-4, scratch-medium 1e-4, smollm2 5e-5."""
    unlearn_epochs: int = -1
    """Unlearning: epochs over the forget set; -1: 5 (paper), mini 10."""
    batch: int = 0
    """Unlearning: forget items a micro-batch, with as many retain items; 0: 4 (paper), mini 8."""
    accum: int = 0
    """Unlearning: micro-batches a step over all processes; 0: 4 (paper), mini 1."""
    weight_decay: Number = 0.0
    """AdamW weight decay of both stages (released code: 0)."""
    clip: Number = 1.0
    """Largest norm of the gradient (paper: 1)."""
    optimizer: Optimizer = "adamw"
    """adamw, or bitsandbytes' paged32 (paper) and paged8."""
    precision: Precision = "fp32"
    """fp32; mixed: float32 weights and bf16 arithmetic; bf16: bf16 weights (paper). Losses are float32 in all."""
    checkpointing: bool = False
    """Recompute activations in the backward pass (paper: for llama2)."""
    compile: bool = False
    """torch.compile the model."""
    max_length: int = 500
    """Most tokens of question, answer and end token together (paper: 500)."""
    pad_to: int = 0
    """Pad batches of unlearning to so many tokens; 0: to the longest (released code: 500)."""

    retain_weight: Number = -1.0
    """lambda of the retain term; -1: 1, NPO+KL 20, SatImp 0.1, RMU-origin 100."""
    beta: Number = -1.0
    """beta of NPO, SimNPO, DPO, WGA, SatImp (its first); -1: 0.5, 4.5, 0.1, 5, 5."""
    beta2: Number = 1.0
    """SatImp: second exponent."""
    margin: Number = 0.0
    """SimNPO: delta."""
    kl: Literal[losses.KL_REDUCTIONS] = "tokens"
    """KL divided by its real tokens, by B * kl_length (padded), or over padding positions too (positions)."""
    kl_length: int = 500
    """Length that the divisor of --kl padded stands for."""
    rmu_layer: Number = 21 / 32
    """RMU: steered layer as a share of the depth (released code: layers 10, 21 or 32 of 32)."""
    rmu_scale: Number = 2.0
    """RMU: c, length of the target in units of u (released code: 2)."""
    temperature: Number = 1.0
    """Temperature scaling of GA, GD, KL: logits / T (released code: 2)."""
    select: Number = 1.0
    """Loss selection of GA, GD, KL: share of the tokens of each sequence, those with the smallest loss (0.8)."""
    cap: Number = 0.0
    """Likelihood capping of GA, GD, KL: delta; 0: off (released code: 2)."""
    cap_unit: Literal["sequence", "token"] = "sequence"
    """Capping of the summed loss of a sequence (first version of the paper) or of each token."""
    cap_weight: Number = 0.1
    """Capping with a retain term: weight of the forget side, one minus it for the retain side (released code: 0.1)."""

    tau: tuple[Number, ...] = (0.4, 0.6, 0.9, 0.95)
    """Bars: shares of the original retention that calibration keeps, each in (0, 1] (paper: 0.4, 0.6, 0.9)."""
    alpha_search: control.Search = "scan+bisect"
    """How alpha* is found: scan down and halve the last interval, or halve [0, 1] as the paper names its algorithm."""
    both_searches: bool = False
    """Also note the alpha* of the other search."""
    alpha_step: Number = 0.05
    """Grid of the scan and of the alpha curves."""
    alpha_tolerance: Number = 1e-3
    """Width at which halving ends."""
    early_stop: Number = 0.0
    """Control by stopping: end unlearning before ES on the retain set falls below this share of the original; 0:
    off."""
    stop_every: int = 5
    """Steps between its looks."""

    eval_items: int = 0
    """Random items of each evaluation set; 0: all (released evaluation: 50)."""
    eval_seed: int = 42
    """Seed of that choice (released evaluation: 42)."""
    attacks: tuple[study.Attack, ...] = ()
    """Attacks of the metric study on every unlearned model, e.g. jail-breaking; correlations over the run's models."""
    noise_rate: Number = 0.05
    """token noising: share of prompt tokens replaced (not known of the paper)."""
    probe_layers: tuple[Number, ...] = (1 / 3, 2 / 3, 1.0)
    """embedding probing: layers as shares of the depth (not known of the paper)."""
    gcg_steps: int = 20
    """GCG: steps."""
    utility: bool = False
    """Also TOFU's model utility of every unlearned model and of the original."""
    retrained: bool = False
    """Also train a model without each forget split: forget quality of every unlearned model."""

    table: str = "own"
    """Table of RESULTS.md the records belong to; own: none of them (plan.yaml names the tables of its runs)."""
    label: str = ""
    """Goes behind the method's name in the table; default: what differs from the preset (T=2); none: nothing."""
    scale: Literal["smoke", "demo", "paper"] = "demo"
    """Goes into the record; changes nothing else."""
    out: str = ""
    """Run folder; default runs/<scale>/<table>-<preset>-<dataset>."""
    models: str = ""
    """Folder of the fine-tuned originals; default models/ beside the run folder."""
    drop_models: bool = False
    """Delete the unlearned weights once they are evaluated (eval.py then has nothing to read)."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    download: bool = False
    """Fetch TOFU and weights from the hub."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    checkpoint_steps: int = 200
    """Steps between checkpoints inside a stage; 0: none."""
    dry_run: bool = False
    """Print what would be done, then stop."""

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        whole = {"items": 0, "epochs": -1, "train_batch": 0, "train_accum": 0, "unlearn_epochs": -1, "batch": 0}
        whole |= {"accum": 0, "max_length": 8, "pad_to": 0, "kl_length": 1, "stop_every": 1, "eval_items": 0}
        whole |= {"gcg_steps": 1, "checkpoint_steps": 0, "weight_decay": 0, "cap": 0, "rmu_scale": 0, "margin": 0}
        whole |= {"beta2": 0, "eval_seed": 0, "origin_seed": -1}
        for name, low in whole.items():
            if getattr(self, name) < low:
                raise UserError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(self, name)}")
        if self.unlearn_epochs == 0:
            raise UserError("--unlearn-epochs must be at least 1")
        for name in ("clip", "temperature", "lr", "unlearn_lr", "beta"):
            value = getattr(self, name)
            if value <= 0 and not (value == -1 and name in ("lr", "unlearn_lr", "beta")):
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value:g}")
        if self.retain_weight < 0 and self.retain_weight != -1:
            raise UserError(f"--retain-weight must not be negative, not {self.retain_weight:g}")
        for name in ("select", "rmu_layer", "alpha_step", "alpha_tolerance", "noise_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must lie in (0, 1], not {getattr(self, name):g}")
        for name in ("cap_weight", "early_stop"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must lie in [0, 1], not {getattr(self, name):g}")
        if not self.probe_layers or any(not 0 < x <= 1 for x in self.probe_layers):
            raise UserError("--probe-layers are shares of the depth in (0, 1]")
        for tau in self.tau:
            control.check_tau(tau)
        known = data.splits(self.dataset)
        for name, given in (("forget", self.forget), ("methods", self.methods), ("tau", self.tau)):
            if len(set(given)) != len(given):
                raise UserError(f"--{name} names one of its values twice")
        for split in self.forget:
            if split not in known:
                raise UserError(f"--forget {split} is unknown; {self.dataset} has {', '.join(known)}")
        if not self.methods:
            raise UserError(f"--methods needs one or more of {', '.join(METHODS)}")
        tricks = sum((self.temperature != 1, self.select < 1, self.cap > 0))
        if tricks and (tricks > 1 or any(METHODS[m].forget != "ga" for m in self.methods)):
            raise UserError(
                "--temperature, --select and --cap change GA, GD and KL (--methods ga gd kl), one at a time"
            )
        if self.dataset == "miniature" and self.items:
            raise UserError("--items is for --dataset tofu; miniature is small as it is")

    def resolve(self) -> None:
        """Put the defaults of preset and data set where none was given."""
        p = models.PRESETS[self.preset]
        mini, scratch = self.preset == "mini", not p.source
        defaults = {"lr": p.lr, "epochs": p.epochs, "unlearn_lr": p.unlearn_lr, "unlearn_epochs": p.unlearn_epochs}
        for name, value in defaults.items():
            setattr(self, name, value if getattr(self, name) == -1 else getattr(self, name))
        self.train_batch = self.train_batch or (32 if scratch else 4)
        self.train_accum = self.train_accum or (1 if scratch else 8)
        self.batch, self.accum = self.batch or (8 if mini else 4), self.accum or (1 if mini else 4)
        self.forget = self.forget or data.splits(self.dataset)
        self.out = self.out or f"runs/{self.scale}/{self.table}-{self.preset}-{self.dataset}"
        self.models = self.models or str(Path(self.out).parent / "models")


# ---------------------------------------------------------------------------------------------------------- unlearning


def unlearn(b: Bench, split: str, method: str, out: Path, log) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Run one method on one split from the original weights; -> (weights, numbers of the run)."""
    s, name = b.s, f"seed{b.seed}-{split}-{method}"
    path, kept = out / "checkpoint" / f"{name}.safetensors", out / "checkpoint" / f"{name}-kept.safetensors"
    set_weights(b.lm, b.original)
    u = Unlearner(s, method, b.lm, b.reference, b.chat, b.corpus, split, b.seed)
    total, warmup = steps_of(s.unlearn_epochs, len(u.forget), s.batch, s.accum)
    t = b.trainer(s.unlearn_lr, total, warmup, s.accum, u.trained(method))
    if s.early_stop and t.sharded:
        raise UserError("--early-stop looks at the whole model and cannot be had with FSDP or DeepSpeed")
    u.bind(t)
    t.load(path)
    ended: list[int] = []
    if s.early_stop:
        sets = b.sets(split)
        bar = s.early_stop * sets.es(b.reference, "exact", "retain")

    def stop(step: int) -> bool:
        """Keep the weights while the bar is met; the first look that fails ends the run with the last that were
        kept."""
        if not s.early_stop or (step % s.stop_every and step != total):
            return False
        if sets.es(t.lm, "exact", "retain") >= bar:
            t.lm.train()
            runs.write_tensors(kept, weights(t.lm), {"step": str(step)}) if b.lead else None
            return False
        ended.append(step)
        return True

    lines = log(method, split, t.step)
    title = f"{METHODS[method].label} {split} seed {b.seed}"
    seconds = t.fit(u.micro, path, every=s.checkpoint_steps, title=title, log=lines, after=stop)
    tensors, numbers = t.full_weights(), {"steps": t.step, "unlearn_seconds": seconds}
    if ended:  # before the first look nothing was kept: the original
        at = 0
        tensors = {k: v.clone() for k, v in b.original.items()}
        if kept.is_file():
            tensors, meta = runs.read_tensors(kept)
            at = int(meta["step"])
        numbers |= {"stopped_at": ended[0], "kept_step": at}
    return tensors, numbers


# --------------------------------------------------------------------------------------------------------- the command


class Writer:
    """Records, item files and curves of a run; does nothing on processes other than the first."""

    def __init__(self, run: runs.Run | None, b: Bench):
        self.run, self.b, self.s = run, b, b.s
        self.folder = Path(b.s.out) / f"seed{b.seed}"
        self.stages = [(split, m) for split in b.s.forget for m in b.s.methods]

    def log(self, method: str, split: str, done: int):
        """A function that adds lines to metrics.jsonl; steps of all stages count on, so that they never fall back."""
        if self.run is None:
            return None
        n = {split: len(self.b.corpus.forget[split]) for split in self.s.forget}
        lengths = [steps_of(self.s.unlearn_epochs, n[sp], self.s.batch, self.s.accum)[0] for sp, _ in self.stages]
        before = sum(lengths[: self.stages.index((split, method))])
        self.run.log(self.b.seed, [], keep_to=before + done)

        def add(lines: list[dict]) -> None:
            stage = {"stage": f"{split} {method}"}
            self.run.log(self.b.seed, [{**line, "step": before + line["step"], **stage} for line in lines])

        return add

    def record(self, split: str, name: str, label: str, setting: str, found: dict, seconds: float) -> None:
        title = {"miniature": "miniature", "tofu": "TOFU"}[self.s.dataset]
        where = {"table": self.s.table, "dataset": f"{title} {split}".strip(), "method": label, "scale": self.s.scale}
        where["setting"] = f"{setting},model={models.PRESETS[self.s.preset].title}"
        about = self.b.corpus.about(split or self.s.forget[0])
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
            if not w.has(f"{split}-retrained"):
                found = metrics.four(b.sets(split).all(b.lm)) | evaluation.summaries(b, split, truth)
                seconds = time.perf_counter() - clock
                w.record(split, f"{split}-retrained", "Retrained", "calibration=none", found, seconds)
    if w.run is not None and not w.has(f"{split}-original"):
        clock = time.perf_counter()
        set_weights(b.lm, b.original)
        scores = b.sets(split).all(b.lm)
        w.items(
            f"{split}-original", evaluation.item_rows(b.sets(split), scores, dict.fromkeys(control.KINDS, 0.0), None)
        )
        found = (
            metrics.four(scores) | {"alpha_exact": 0.0, "alpha_perturb": 0.0} | evaluation.summaries(b, split, truth)
        )
        found["parameters"] = sum(v.numel() for v in b.original.values())
        found["targeted_share"] = 100 * len(b.corpus.forget[split]) / len(b.corpus.full)
        w.record(split, f"{split}-original", "Original", "calibration=none", found, time.perf_counter() - clock)
    return truth


def stage(b: Bench, w: Writer, split: str, method: str, truth: metrics.Truth | None, full: list) -> None:
    """Unlearn, evaluate, calibrate, record. The record without calibration is written last and says that all is
    done."""
    s, name = b.s, f"{split}-{method}"
    if w.has(f"{name}-none"):
        return
    clock = time.perf_counter()
    path = evaluation.unlearned_path(w.folder, split, method)
    if path.is_file():
        tensors, meta = runs.read_tensors(path)
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
    found, calibrated, lines = evaluation.assess(b, split, tensors, truth, full)
    w.items(name, lines)
    label = label_of(s, method)
    for tau, m in calibrated.items():
        w.record(split, f"{name}-tau{tau:g}", label, f"calibration=UWC tau={tau:g}", m, m.pop("search_seconds"))
    seconds = numbers["unlearn_seconds"] + time.perf_counter() - clock
    w.record(split, f"{name}-none", label, "calibration=none", found | numbers, seconds)
    if s.drop_models:
        path.unlink(missing_ok=True)


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
    splits = ", ".join(f"{k} ({len(c.forget[k])})" for k in s.forget)
    return (
        f"{models.PRESETS[s.preset].title} ({size:,} parameters, {s.precision}) on {c.name} ({c.variant}; "
        f"{len(c.full)} questions): fine-tuning {s.epochs} epochs at {s.lr:g}; then "
        f"{', '.join(METHODS[m].label for m in s.methods)} on {splits}, {s.unlearn_epochs} epochs at {s.unlearn_lr:g}, "
        f"{s.batch} x {s.accum} items a step; tau {', '.join(f'{t:g}' for t in s.tau)}; {b.device}"
    )


def main() -> None:
    s = runs.parse(Settings, __doc__)
    s.check()
    s.resolve()
    device = runs.device(s.device)
    torch.set_float32_matmul_precision("high")
    accelerator = accelerator_of(device)
    if s.dry_run:
        print(describe(Bench(s, s.seeds[0], accelerator)))
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
        w = Writer(run, b)
        print(describe(b)) if run and not number else None
        b.set_original()
        full = b.encoded(b.corpus.full + b.corpus.extra)
        for split in s.forget:
            truth = baseline(b, w, split, full)
            for method in s.methods:
                stage(b, w, split, method, truth, full)
        if s.attacks and run:
            correlations(b, w)
    if run:
        evaluation.show(run.finish())
        print(f"\nrecords in {s.out}")


if __name__ == "__main__":
    runs.command(main)
