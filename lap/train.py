"""Train one network by single-step adversarial training, with or without LAP, then evaluate it; a record a seed.

    python train.py --method lap --start v --seeds 0 1 2                        # photo patches, needs no data
    python train.py --dataset cifar10 --method lap --start r --eps 8/255
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

import analysis
import attacks
import baselines
import evaluation
import lap
import vit
from settings import NOT_PART_OF_A_RUN, Settings
from trainer import SUMS, Trainer, close_epoch, observe, read_curve


def perturb_both(t: Trainer, x: torch.Tensor, y: torch.Tensor, total: int, u: float):
    """LAP's first look: (delta, moves of the weights, already made, loss at the first look).

    One backward pass at x + eta gives the gradients of images and weights; a variant with a pass of its own takes the
    weights' at x + delta.
    """
    s, scale = t.s, t.world / total
    eta = baselines.start(x, t.noise(total), baselines.noise_size(s, u))
    step, ball = u * s.step * s.eps, u * s.eps if lap.GEOMETRY[s.start].clamp else None
    if t.recipe.own_pass:
        delta, _ = attacks.single_step(t.forward, x, y, eta, step, ball)
        _, first = t.full_backward(x + delta, y, scale)
    else:
        g, first = t.full_backward(x + eta, y, scale)
        delta = attacks.project(x, eta + step * g.sign(), ball)
    gradients = [w.grad for w in t.weights]
    moves = lap.perturb_(t.weights, gradients, t.optimizer, t.sizes, t.recipe, scale, t.generator)
    return delta, moves, first


def train_epoch(t: Trainer, save) -> None:
    """One epoch from batch t.batch on. Nothing here waits for the device; `save` is called between checkpoints."""
    s, world = t.s, t.world
    t.model.train()  # both looks in train mode: batch statistics are updated twice
    for x, y, total in t.train.epoch(t.seed, t.epoch, t.batch, t.generator, t.rank, world):
        u = baselines.radius_warmup(t.epoch, t.batch / len(t.train), s.radius_warmup)
        for _ in range(t.replays):
            moves, first = [], torch.zeros((), device=x.device)
            if s.method == "lap":
                delta, moves, first = perturb_both(t, x, y, total, u)
                p = baselines.Perturbed(delta)
            else:
                p = baselines.perturb(s, t.forward, x, y, t.noise(total), u, t.memory)
            at = (x + p.delta).detach().requires_grad_(s.method == "free")
            with t.bf16:
                z1 = t.network(at)
            z1 = z1.float()
            # Sums over this process's rows, times world / total: averaged over processes that is the mean of the batch.
            main = F.cross_entropy(z1, y, reduction="sum") * (world / total)
            loss = main if p.penalty is None else main + p.penalty

            t.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            t.optimizer.step()
            if moves and not t.recipe.accumulated:
                with torch.no_grad():
                    torch._foreach_sub_(t.weights, moves)
            t.scheduler.step()
            if s.method == "free":
                new = attacks.project(x, p.delta + s.step * s.eps * at.grad.sign(), s.eps)
                t.memory[: len(x)] = new
            observe(t, y, z1.detach(), loss.detach(), first)
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
    if t.epoch:
        t.curve = [row for row in read_curve(curve) if row["epoch"] <= t.epoch]
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
        if s.keep_every and (t.epoch + 1) % s.keep_every == 0:
            t.keep(out)
        t.curve.append(row)
        t.epoch, t.batch = t.epoch + 1, 0
        t.sums.zero_()
        if run:
            run.log(seed, [row])
            bar.set_postfix(fgsm=f"{row['probe_fgsm']:.0f}%", pgd=f"{row['probe_pgd']:.0f}%")
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
    if s.method == "lap":
        found |= {"beta": s.beta, "gamma": s.gamma, "alpha": s.step, "published_beta": int(s.published)}
    return found | evaluation.summary(t.curve, 100 / t.data.kind.classes)


def describe(t: Trainer) -> str:
    s, d = t.s, t.data
    parameters = sum(
        p.numel() for p in vit.build(s.model, d.kind.classes, d.channels, d.size, (0.0,), (1.0,)).parameters()
    )
    line = f"{s.label} on {d.kind.title} ({d.variant}; {len(d.train)} + {len(d.test)} images), {s.setting}, {s.model} "
    line += f"({parameters:,} parameters), {s.epochs} epochs, {s.schedule} lr {s.lr:g}, {s.precision}, {t.device}"
    line += f"\nimages: {baselines.in_words(s)}"
    if s.method == "lap":
        origin = "published" if s.published else "not published for this data set, start, radius, network and variant"
        n, r = len(lap.layers(vit.build(s.model, d.kind.classes, d.channels, d.size, (0.0,), (1.0,)))), s.recipe()
        level = {"ones": "1", "mean": "the mean of 1 - (ln i / ln L)^gamma"}.get(r.levels, "1 - (ln i / ln L)^gamma")
        level += ", the last layer first" if r.levels == "reversed" else ""
        way = {"official": "along", "ascent": "against", "random": "at random, not along"}[r.direction]
        step = "the gradient" if r.bare else "the next SGD step"
        at = "x + delta (a pass of its own)" if r.own_pass else "x + eta"
        line += f"\nweights: moved {way} {step} at {at} by beta lambda_i |w_i|{' in l_inf' * (r.norm == 'linf')}, "
        line += f"{'kept' if r.accumulated else 'taken back after the step'}; beta {s.beta:g} ({origin}), "
        line += f"lambda_i = {level}, gamma {s.gamma:g}, L = {n} layers"
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
        extra = (
            analysis.all_parts(t, out, seed, s.test_steps, s.test_restarts, images=s.analyse_images)
            if s.analyse
            else []
        )
        if lead:
            runs.write_tensors(run.folder(seed) / "model.safetensors", t.model.state_dict(), {"model": s.model})
            where = {"table": s.table, "dataset": t.data.kind.title, "setting": s.setting, "method": s.label}
            seconds += time.perf_counter() - clock
            more = {"data": t.data.about(), "where": {**where, "scale": s.scale}, "device": device}
            for suffix, table, setting, method, found in extra:
                place = {"table": table, "dataset": t.data.kind.title, "setting": setting, "method": method}
                rest = {"seconds": time.perf_counter() - clock, "metrics": found, "suffix": f"-{suffix}"}
                run.record(seed, **rest, data=t.data.about(), where={**place, "scale": s.scale}, device=device)
            records.append(run.record(seed, seconds=seconds, metrics=metrics, **more))
            (out / "checkpoint" / f"seed{seed}.safetensors").unlink(missing_ok=True)  # model.safetensors stays
    if lead:
        run.finish(keep_checkpoint=False)
        evaluation.show(records)
        print(f"records in {out}")


if __name__ == "__main__":
    runs.command(main)
