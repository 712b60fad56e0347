"""Pixel-reweighted adversarial training (PART) beside its baselines: warm up once, fork the arms, train and evaluate
each.

    python train.py --eps 8/255                                   # PART and AT on glyphs, needs no data, two minutes
    python train.py --method at part part-shuffled at-mean --seeds 0 1 2
    python train.py --dataset cifar10 --method at part --download --precision bf16
    python train.py --dataset svhn --method trades part-t --awp
    accelerate launch train.py --dataset cifar10 --method at part --precision bf16      # several GPUs on one run

All arms of a seed start from the same warm-up and see the same images, crops and start noise in the same order. The run
lands in runs/<scale>/<name>/, a record an arm and seed, and goes on from its last checkpoint when started again.
"""

import contextlib
import functools
import sys
import time
from pathlib import Path
from typing import NamedTuple

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import torch
import torch.distributed as dist

import baselines
import evaluation
import models
import pixel_reweighting as pr
from baselines import ARMS, WARMUP
from settings import Settings
from trainer import Trainer, broken, close_epoch, observe

# A run may be started again with other values of these.
IGNORE = ("out", "data_dir", "device", "download", "dry_run", "checkpoint_steps", "check")


class Phase(NamedTuple):
    """A warm-up or an arm: its name, base method, where its budget is eps, first and last epoch, and the number of
    epochs of the phases before it (steps of metrics.jsonl count through all phases of a seed)."""

    name: str
    base: str
    region: str
    first: int
    last: int
    offset: int


def phases(s: Settings) -> list[Phase]:
    out: list[Phase] = []

    def add(name: str, base: str, region: str, first: int, last: int) -> None:
        out.append(Phase(name, base, region, first, last, sum(p.last - p.first for p in out)))

    for base in dict.fromkeys(WARMUP[ARMS[m].base] for m in s.method):
        add(f"warmup-{base}", base, "everywhere", 0, s.warmup)
        for m in s.method:
            if WARMUP[ARMS[m].base] == base:
                add(m, ARMS[m].base, ARMS[m].region, s.warmup, s.epochs)
    return out


def train_epoch(t: Trainer, p: Phase, save) -> None:
    """One epoch from batch t.batch on. Nothing here waits for the device; `save` is called between checkpoints."""
    s = t.s
    looks = p.region in ("cam", "shuffled", "inverted", "mean")
    t.begin_epoch(looks)
    gamma = baselines.awp_gamma(p.base) if s.awp_gamma == -1 else s.awp_gamma
    for x, y in t.train.epoch(t.key(0), t.batch, t.crops):
        t.model.eval()  # maps and attack: batch statistics stay as they are
        e, total, rows = t.box(p.region, x, t.batch), len(x), t.rows(len(x))
        start = baselines.start(s, p.base, x, t.noise, t.ramp())[rows]
        x, y = x[rows], y[rows]
        delta = baselines.perturb(s, p.base, t.forward, x, y, e, start, t.ramp(), t.epoch)
        x_adv = (x + delta).clamp(0, 1)
        t.model.train()

        weight = t.weight(total)

        def objective(forward, x=x, x_adv=x_adv, y=y, weight=weight):
            loss, z = baselines.loss(s, p.base, forward, x, x_adv, y)
            return weight * loss, z

        moved = contextlib.nullcontext()
        if s.awp and t.epoch >= baselines.awp_wait(s, p.base):
            look = functools.partial(objective, t.forward)
            moved = baselines.perturbed_weights(t.model, gamma, lambda f=look: f()[0], t.average)
        with moved:
            loss, z = objective(t.learn)
            t.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            t.optimizer.step()
        t.share_statistics()
        observe(t, y, z.detach(), loss.detach(), e, total)
        t.batch += 1
        if s.checkpoint_steps and t.batch % s.checkpoint_steps == 0 and t.batch < len(t.train):
            save()


def read_curve(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, one an epoch and phase."""
    try:
        return [runs.json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete the run folder and train again") from None


def train(t: Trainer, p: Phase, seed: int, out: Path, run: runs.Run | None, start: Path | None) -> float:
    """The epochs of one phase of one seed, from the checkpoint `start` of its warm-up (None: from new weights); returns
    the seconds spent on it so far, earlier starts included. `run` is None in all processes but the first."""
    s, path = t.s, out / "checkpoint" / f"seed{seed}-{p.name}.safetensors"
    t.fresh(seed)
    if path.is_file():
        t.load(path)
        if p.first <= t.epoch < p.last and run:
            print(f"resuming {out}, seed {seed}, {p.name}, at epoch {t.epoch}, batch {t.batch}")
    elif start is not None:
        t.load(start)
        t.before, t.batch = 0.0, 0
    done = t.epoch - p.first
    old = read_curve(out / f"seed{seed}" / "metrics.jsonl")
    t.curve = [row for row in old if row["phase"] == p.name and row["epoch"] <= t.epoch]
    if len(t.curve) != done:  # the pictures and the time of an epoch are read from it
        raise UserError(
            f"{out}/seed{seed}/metrics.jsonl has {len(t.curve)} of the {done} epochs of {p.name}; delete {out}"
        )
    if t.epoch == p.last and path.is_file():
        return t.before  # complete; later phases may have logged since
    t.wait()  # all have read the curve
    if run:
        run.log(seed, [], keep_to=p.offset + done)
    started = time.perf_counter()

    def save() -> None:
        broken(t)  # raises; the last good checkpoint stays
        t.save(path, t.before + time.perf_counter() - started)

    hide = None if run else True
    bar = progress(range(t.epoch, p.last), f"{p.name} seed {seed}", p.last - p.first, done, hide=bool(hide))
    for _ in bar:
        clock, cpu = time.perf_counter(), time.process_time()
        whole = t.batch == 0
        train_epoch(t, p, save)
        if t.device.type == "cuda":
            torch.cuda.synchronize(t.device)
        row = close_epoch(t, time.perf_counter() - clock, time.process_time() - cpu)
        if not whole:  # resumed inside the epoch: its time is not that of an epoch
            row = {k: v for k, v in row.items() if not k.startswith("train_") or k == "train_accuracy"}
        row = {"step": p.offset + t.epoch - p.first + 1, "phase": p.name, **row}
        if s.gallery and t.epoch + 1 in (s.gallery_epochs or (s.epochs,)):
            row["maps"] = maps(t)
        t.curve.append(row)
        t.epoch, t.batch = t.epoch + 1, 0
        t.sums.zero_()
        if run:
            run.log(seed, [row])
        bar.set_postfix(natural=f"{row['probe_natural']:.0f}%", pgd=f"{row['probe_pgd']:.0f}%")
        t.save(path, t.before + time.perf_counter() - started)
    if p.first == p.last:  # no warm-up: the arms still fork from one checkpoint
        t.save(path, 0.0)
    return t.before + time.perf_counter() - started


@torch.no_grad()
def maps(t: Trainer) -> dict:
    """Maps and masks of the first probe images by the network in training, as hexadecimal bytes."""
    t.model.eval()
    x, _ = next(t.test.in_order(t.probe[: t.s.gallery]))
    found = pr.activation_map(t.model, x, t.s.cam, t.s.cam_layer)
    big = pr.resize(found, x.shape[2:]).nan_to_num().clamp(0, 1)
    m = pr.mask(found, x.shape[2:], t.s.mask_rule, t.s.top_fraction).float().mean(1)

    def pack(v: torch.Tensor) -> str:
        return (255 * v).round().byte().cpu().numpy().tobytes().hex()

    return {"cam": pack(big), "mask": pack(m), "shape": [len(x), *x.shape[2:]]}


def evaluate(t: Trainer, p: Phase, out: Path) -> dict:
    """Metrics of the last weights of an arm; every image's outcome goes to images-<arm>.safetensors."""
    s = t.s
    index = evaluation.order(len(t.test.part), min(s.eval_limit, len(t.test.part)))
    given = (s.test_eps, s.test_step, s.test_steps, t.seed, s.final_attacks)
    found = evaluation.attack_all(t.model, t.test, index, *given, world=t)
    if s.autoattack:
        found["autoattack"] = evaluation.auto_attack(t.model, t.test, index, s.test_eps, s.autoattack, t.seed, t)
    if s.adaptive:
        more = evaluation.adaptive(t.model, t.test, index, s.test_eps, s.test_step, t.seed, t.own_budget, world=t)
        found |= more | {"union": torch.stack([v for k, v in (found | more).items() if k != "natural"]).all(0)}
    if t.rank == 0:
        runs.write_tensors(out / f"seed{t.seed}" / f"images-{p.name}.safetensors", {**found, "index": index})
    metrics = evaluation.percent(found)
    if s.corruptions:
        metrics |= evaluation.corruption_accuracy(t.model, runs.data_dir(s.data_dir), s.test_batch, t.device)
    metrics |= evaluation.masks_on_objects(t, index) | {"epochs": s.epochs, "budget": t.curve[-1]["budget"]}
    keys = ("loss", "train_accuracy", "budget", "probe_natural", "probe_pgd", "train_seconds")
    metrics |= {f"curve_{k}": [row.get(k) for row in t.curve] for k in keys}
    for key in ("train_seconds", "train_cpu_seconds"):  # not of an epoch that was cut and resumed
        times = sorted(row[key] for row in t.curve if key in row)
        metrics |= {f"{key}_epoch": times[len(times) // 2]} if times else {}
    kept = [row for row in t.curve if "maps" in row]
    if kept:
        x = t.data.test.x[t.probe[: s.gallery]]
        metrics["gallery"] = {
            **{"images": x.numpy().tobytes().hex(), "shape": list(x.shape)},
            **{"epochs": [row["epoch"] for row in kept], "maps": [row["maps"] for row in kept]},
        }
    return metrics


def describe(t: Trainer) -> str:
    s, d = t.s, t.data
    n = sum(p.numel() for p in models.build(s.model, d.kind.classes, d.channels).parameters())
    line = (
        f"{', '.join(map(s.label, s.method))} on {d.kind.title} ({d.variant}; {len(d.train)} + {len(d.test)} images), "
    )
    line += f"{s.model} ({n:,} parameters), {s.epochs} epochs of which {s.warmup} warm-up, lr {s.lr:g}, {s.precision}, "
    line += (
        f"{t.device}\nbudget {255 * s.eps:g}/255 where the {s.cam} map ({s.mask_rule}, {s.mask_order}, refreshed every "
    )
    line += f"{s.refresh or 'batch'}{' epochs' * (s.refresh > 1) + ' epoch' * (s.refresh == 1)}) is high, "
    line += f"{255 * s.eps_low:g}/255 elsewhere; {s.steps} steps of {255 * s.step:g}/255; "
    return line + f"evaluated at {255 * s.test_eps:g}/255 at every pixel"


def verdict(records: list[dict], ours: str = "PART", base: str = "AT") -> bool:
    """The central claim on these records: PART gains at least 1 point of natural accuracy on AT and loses at most 2 of
    PGD accuracy, on the mean over seeds. `ours` and `base` are their names in the records."""

    def mean(method: str, key: str) -> float:
        v = [r["metrics"][key] for r in records if r["method"] == method]
        return sum(v) / len(v)

    gain, loss = (mean(ours, k) - mean(base, k) for k in ("natural", "pgd"))
    holds = gain >= 1.0 and loss >= -2.0
    word = "holds" if holds else "fails"
    print(f"{ours} against {base}: natural {gain:+.2f} (at least +1), PGD {loss:+.2f} (at least -2): {word}")
    return holds


def main() -> None:
    s = runs.parse(Settings, __doc__)
    s.check_values()
    s.resolve()
    s.check_values()  # eps_low against its default
    device = runs.device(s.device, s.precision == "bf16")
    torch.set_float32_matmul_precision("high")
    out, lead = Path(s.out), not dist.is_initialized() or dist.get_rank() == 0
    if s.dry_run:
        text = describe(Trainer(s, device))
        print(text) if lead else None
        return
    run = runs.Run(out, s, ignore=IGNORE) if lead else None
    if (out / "records.jsonl").is_file():
        if run:
            print(f"{out} is complete; delete it to run again")
    else:
        t = Trainer(s, device)
        print(describe(t)) if run else None
        for seed in s.seeds:
            train_seed(t, seed, out, run)
        run.finish() if run else None
    if not run:
        return
    records = [runs.read_record(out / f"seed{k}" / f"record-{m}.json") for k in s.seeds for m in s.method]
    evaluation.show(records)
    print(f"records in {out}")
    if s.check and not verdict(records, s.label("part"), s.label("at")):
        sys.exit(1)


def train_seed(t: Trainer, seed: int, out: Path, run: runs.Run | None) -> None:
    """All phases of a seed, in the order of phases(). The first process writes; what the others decide by files that it
    writes or deletes, they decide between two waits."""
    s, warm, start = t.s, 0.0, None
    if run:
        run.same_data(seed, [t.data.sha256])
    torch.backends.cudnn.benchmark = True
    todo = {m for m in s.method if not (out / f"seed{seed}" / f"record-{m}.json").is_file()}
    t.wait()
    for p in phases(s):
        checkpoint = out / "checkpoint" / f"seed{seed}-{p.name}.safetensors"
        if p.name not in ARMS:
            start, warm = checkpoint, 0.0
            if any(WARMUP[ARMS[m].base] == p.base for m in todo):
                warm = train(t, p, seed, out, run, None)
        elif p.name not in todo:
            if run:
                runs.read_record(out / f"seed{seed}" / f"record-{p.name}.json")  # a damaged one is told now
                checkpoint.unlink(missing_ok=True)  # killed before it went
        else:
            seconds = warm + train(t, p, seed, out, run, start)
            clock = time.perf_counter()
            metrics = evaluate(t, p, out)
            if not run:
                continue
            meta = {"model": s.model, "arm": p.name}
            runs.write_tensors(run.folder(seed) / f"model-{p.name}.safetensors", t.model.state_dict(), meta)
            where = {"table": s.table, "dataset": t.data.kind.title, "setting": s.setting, "method": s.label(p.name)}
            more = {"data": t.data.about(), "where": {**where, "scale": s.scale}, "device": t.device}
            seconds += time.perf_counter() - clock
            run.record(seed, seconds=seconds, metrics=metrics, suffix=f"-{p.name}", **more)
            checkpoint.unlink(missing_ok=True)  # model-<arm>.safetensors stays
    if run:
        for path in (out / "checkpoint").glob(f"seed{seed}-warmup-*.safetensors"):
            path.unlink()
    t.wait()


if __name__ == "__main__":
    runs.command(main)
