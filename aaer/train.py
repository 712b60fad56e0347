"""Train one network by single-step adversarial training, with or without AAER, then evaluate it; a record a seed.

    python train.py --method aaer --start v --seeds 0 1 2                       # photo patches, needs no data
    python train.py --dataset cifar10 --method aaer --start rs --eps 8/255
    accelerate launch train.py --dataset cifar10 --method fgsm --start n --eps 16/255 --precision bf16

The run lands in runs/<scale>/<name>/ and goes on from its last checkpoint when started again.
"""

import time
from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import torch
import torch.distributed as dist
import torch.nn.functional as F

import aaer
import baselines
import evaluation
import models
from settings import NOT_PART_OF_A_RUN, Settings
from trainer import SUMS, Trainer, close_epoch, observe


def train_epoch(t: Trainer, save) -> None:
    """One epoch from batch t.batch on. Nothing here waits for the device; `save` is called between checkpoints."""
    s, world = t.s, t.world
    t.model.train()  # both looks in train mode: batch statistics are updated twice
    for x, y, total in t.train.epoch(t.seed, t.epoch, t.batch, t.generator, t.rank, world):
        u = aaer.radius_warmup(t.epoch, t.batch / len(t.train), s.radius_warmup)
        weight = s.lambda1 * aaer.regulariser_warmup(t.epoch, s.regulariser_warmup)
        for _ in range(t.replays):
            p = baselines.perturb(s, t.forward, x, y, t.noise(total), u, t.memory)
            at = (x + p.delta).detach().requires_grad_(s.method == "free")
            with t.bf16:
                z1 = t.network(at)
            z1 = z1.float()
            # Sums over this process's rows, times world / total: averaged over processes that is the mean of the batch.
            main = F.cross_entropy(z1, y, reduction="sum") * (world / total)
            seen, r = None, torch.zeros((), device=x.device)
            if p.z0 is not None:
                learns = s.method == "aaer"
                seen = v = aaer.variation(p.z0, z1 if learns else z1.detach(), y, s.ce_term, t.reduce, world)
                if learns and s.group == "random":
                    others = aaer.fell(p.z0, z1, y)[torch.randperm(len(y), generator=t.generator, device=y.device)]
                    v = aaer.variation(p.z0, z1, y, s.ce_term, t.reduce, world, others)
                r = aaer.regulariser(v, weight, s.lambda2, s.lambda3, s.term) if learns else r
            loss = main + r if p.penalty is None else main + r + p.penalty

            t.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            t.optimizer.step()
            t.scheduler.step()
            if s.method == "free":
                new = baselines.attacks.project(x, p.delta + s.step * s.eps * at.grad.sign(), s.eps)
                t.memory[: len(x)] = new
            observe(t, y, seen, z1.detach(), loss.detach(), r.detach())
        t.batch += 1
        if s.checkpoint_steps and t.batch % s.checkpoint_steps == 0 and t.batch < len(t.train):
            save()


def train(t: Trainer, seed: int, out: Path, run: runs.Run | None, show: bool) -> float:
    """The epochs of one seed; returns the seconds spent on it so far, earlier starts included."""
    s, path = t.s, out / "checkpoint" / f"seed{seed}.safetensors"
    t.fresh(seed)
    if path.is_file():
        t.load(path)
        print(f"resuming {out}, seed {seed}, at epoch {t.epoch}, batch {t.batch}") if run else None
    curve = out / f"seed{seed}" / "metrics.jsonl"
    if t.epoch and curve.is_file():
        try:
            t.curve = [row for row in map(runs.json.loads, curve.read_text().splitlines()) if row["epoch"] <= t.epoch]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{curve} is damaged ({error}); delete {out} and train again") from None
    if len(t.curve) != t.epoch:  # the record's onset of overfitting is read from it
        raise UserError(f"{curve} has {len(t.curve)} of the {t.epoch} epochs behind the checkpoint; delete {out}")
    if run:
        run.log(seed, [], keep_to=t.epoch)
    started = time.perf_counter()

    def save() -> None:
        if int(t.reduce(t.sums)[SUMS.index("bad")]):
            close_epoch(t, 0.0, 0.0)  # raises; the last good checkpoint stays
        t.save(path, t.before + time.perf_counter() - started)

    bar = progress(range(t.epoch, s.epochs), f"{s.label} seed {seed}", s.epochs, t.epoch, hide=not show)
    for _ in bar:
        clock, cpu = time.perf_counter(), time.process_time()
        whole = t.batch == 0
        train_epoch(t, save)
        if t.device.type == "cuda":
            torch.cuda.synchronize(t.device)
        row = close_epoch(t, time.perf_counter() - clock, time.process_time() - cpu)
        if not whole:  # resumed inside the epoch: its time is not that of an epoch
            row = {k: v for k, v in row.items() if not k.startswith("train_") or k == "train_accuracy"}
        if s.surface:
            x, y = next(t.test.in_order(t.probe[: s.surface]))
            surface = evaluation.surface(t.model, x, y, s.eps)
            row["surface"] = surface
        t.curve.append(row)
        t.epoch, t.batch = t.epoch + 1, 0
        t.sums.zero_()
        if run:
            run.log(seed, [row])
            bar.set_postfix(pgd=f"{row['probe_pgd']:.0f}%", abnormal=f"{100 * row.get('abnormal', 0):.0f}%")
        t.save(path, t.before + time.perf_counter() - started)
    return t.before + time.perf_counter() - started


def evaluate(t: Trainer, out: Path) -> dict:
    """Metrics of the last weights of a seed."""
    s = t.s
    index = evaluation.order(len(t.test.part), min(s.eval_limit, len(t.test.part)))
    world = (t.rank, t.world, t.reduce)
    found = evaluation.attack_all(t.model, t.test, index, s.eps, s.test_steps, s.test_restarts, t.seed, *world)
    if s.autoattack:  # every process attacks all images; they are few, and the library knows no processes
        some = index[: s.autoattack_limit or len(index)]
        found |= evaluation.auto_attack(t.model, t.test, some, s.eps, s.autoattack, t.seed)
    if s.method == "aaer":
        found |= {"lambda1": s.lambda1, "lambda2": s.lambda2, "lambda3": s.lambda3, "alpha": s.step}
        found |= {"published_lambdas": int(s.published)}
    return found | evaluation.summary(t.curve, 100 / t.data.kind.classes)


def describe(t: Trainer) -> str:
    s, d = t.s, t.data
    parameters = sum(
        p.numel() for p in models.build(s.model, d.kind.classes, d.channels, d.size, (0.0,), (1.0,)).parameters()
    )
    line = f"{s.label} on {d.kind.title} ({d.variant}; {len(d.train)} + {len(d.test)} images), {s.setting}, {s.model} "
    line += f"({parameters:,} parameters), {s.epochs} epochs, {s.schedule} lr {s.lr:g}, {s.precision}, {t.device}"
    line += f"\nimages: {baselines.in_words(s)}"
    if s.method == "aaer":
        origin = "published" if s.published else "not published for this data set, start, radius and network"
        share = "" if s.term == "difference" else "|A|/B "
        pull = {"pull": "V_A", "count": "1"}.get(s.term, "max(V_A - V_N, 0)")
        e_a = "a constant" if s.ce_term == "constant" else "with its gradient"
        line += f"\nloss: cross-entropy + {s.lambda1:g} {share}({s.lambda2:g} E_A + {s.lambda3:g} {pull}), E_A {e_a}; "
        line += f"A: the examples whose loss fell{', as many at random' if s.group == 'random' else ''}; "
        line += f"lambda1 {s.lambda1:g}, lambda2 {s.lambda2:g}, lambda3 {s.lambda3:g} ({origin})"
    return line


def main() -> None:
    s = runs.parse(Settings, __doc__)
    s.check()
    s.resolve()
    device = runs.device(s.device, s.precision == "bf16")
    torch.set_float32_matmul_precision("high")
    out, lead = Path(s.out), not dist.is_initialized() or dist.get_rank() == 0
    if s.dry_run:
        print(describe(Trainer(s, device)))
        return
    run = runs.Run(out, s, ignore=NOT_PART_OF_A_RUN) if lead else None
    if runs.finished(out, s.seeds):
        if lead:
            print(f"{out} is complete; delete it to run again")
            evaluation.show(runs.read_record(p) for p in sorted(out.glob("seed*/record.json")))
        return
    t = Trainer(s, device)
    print(describe(t)) if lead else None
    records = []
    for seed in s.seeds:
        record = out / f"seed{seed}" / "record.json"
        if record.is_file():
            records.append(runs.read_record(record))
            continue
        torch.backends.cudnn.benchmark = True
        seconds = train(t, seed, out, run, lead)
        torch.backends.cudnn.benchmark = False  # the attack's batches shrink: tuning each size would cost more
        clock = time.perf_counter()
        metrics = evaluate(t, out)
        if lead:
            runs.write_tensors(run.folder(seed) / "model.safetensors", t.model.state_dict(), {"model": s.model})
            where = {"table": s.table, "dataset": t.data.kind.title, "setting": s.setting, "method": s.label}
            seconds += time.perf_counter() - clock
            more = {"data": t.data.about(), "where": {**where, "scale": s.scale}, "device": device}
            records.append(run.record(seed, seconds=seconds, metrics=metrics, **more))
            (out / "checkpoint" / f"seed{seed}.safetensors").unlink(missing_ok=True)  # model.safetensors stays
    if lead:
        run.finish(keep_checkpoint=False)
        evaluation.show(records)
        print(f"records in {out}")


if __name__ == "__main__":
    runs.command(main)
