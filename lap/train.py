"""Train one network by single-step adversarial training, with or without LAP, then evaluate it; a record a seed.

    python train.py --method lap --start v --seeds 0 1 2                        # photo patches, needs no data
    python train.py --dataset cifar10 --method lap --start r --eps 8/255
    accelerate launch train.py --dataset cifar10 --method fgsm --start n --eps 16/255 --precision bf16

The run lands in runs/<scale>/<name>/ and goes on from its last checkpoint when started again.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab import runs
from lab.runs import Number, UserError

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import analyse
import attacks
import baselines
import data
import eval as evaluation
import lap
import vit
from trainer import SUMS, Trainer, close_epoch, observe

MethodName = Literal["lap", "fgsm", "pgd", "free", "zerograd", "multigrad", "gradalign"]


@dataclass
class Settings:
    method: MethodName = "lap"
    """How images and weights are perturbed; lap is the paper's, fgsm the same without the weight perturbation."""
    start: lap.Start = "r"
    """Start noise of lap, fgsm and pgd: v none, r U(-eps, eps), n U(-2 eps, 2 eps) (paper: all three)."""
    dataset: Literal[tuple(data.KINDS)] = "patches"
    """Data set; patches, carriers, digits and mnist5k need no download."""
    model: Literal[("auto", *vit.NAMES)] = "auto"
    """Network; auto: preact18 (paper), preact18-act on Tiny-ImageNet, resnet18-cosine on ImageNet-100, else small."""
    eps: Number = 8 / 255
    """Radius of the attack, in pixels of [0, 1] (paper: 8, 12, 16, 32 over 255)."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, one after the other; each gives its own weights, order, augmentation and noise (paper: not known)."""

    beta: Number = -1.0
    """lap: size of the weight perturbation relative to the weight; -1: the value published for start and radius."""
    gamma: Number = lap.GAMMA
    """lap: exponent of the layer schedule (paper: 0.3); small: the first layer alone; large: all but the last."""
    variant: lap.Variant = "lap"
    """lap, or one of the ablation: awp (undone after the step), modified-awp (kept, all layers alike), lap-a (a pass
    of its own), lap-r (random direction), lap-linf (sign instead of direction)."""
    weight_direction: Literal["auto", "official", "ascent", "random"] = "auto"
    """official: downhill, as the released code; ascent: its opposite, as AWP; auto: official, ascent for awp."""
    radius_warmup: Number = -1.0
    """Epochs over which step and clamp grow from 0; -1: 5 on SVHN (customary there), else 0."""
    noise: Number = -1.0
    """Start noise over eps; -1: 1 for r, 2 for n (3 for N-FGSM on SVHN at 12/255), 0 for v."""
    step: Number = -1.0
    """Step over eps; -1: r 1.25, n and v 1 (paper), zerograd and multigrad 2, pgd 1/2 for 2 steps, else 1/4."""
    attack_steps: int = 10
    """pgd: steps."""
    replays: int = 8
    """free: updates on each batch."""
    samples: int = 3
    """multigrad: start points."""
    zero_share: Number = -1.0
    """zerograd: share of gradient entries set to zero; -1: published for CIFAR-10, CIFAR-100, SVHN."""
    align: Number = -1.0
    """gradalign: weight; -1: published for the radius."""

    epochs: int = 0
    """Passes over the data; 0: 30 (paper), SVHN 15; Free-AT 12 with 8 replays."""
    batch: int = 128
    """Images a step over all processes; a smaller last batch is kept (paper: 128)."""
    schedule: Literal["cyclic", "multistep"] = "cyclic"
    """Learning rate: up and down in straight lines with the momentum opposite (paper), or x0.1 at 50 and 75 %."""
    lr: Number = -1.0
    """Highest learning rate; -1: 0.2 (paper), SVHN 0.05, Free-AT 0.04."""
    peak: Number = -1.0
    """cyclic: where the learning rate is highest; -1: 0.5 (paper), SVHN 0.4."""
    momentum: Number = 0.9
    """SGD momentum; cyclic moves it to 0.8 at the peak and back (paper)."""
    weight_decay: Number = 5e-4
    """L2 on every parameter (paper: 5e-4)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Forward and backward pass; losses stay in fp32 (paper: fp32)."""
    compile: bool = False
    """torch.compile the network."""
    sync_bn: bool = False
    """Batch statistics over all processes (CUDA only); off: each process its own, as in plain data parallelism."""

    carrier: Number = 1.0
    """carriers: amplitude of the easy feature over 16/255."""
    train_limit: int = 0
    """Keep a fixed random subset of the training images; 0: all."""
    eval_limit: int = 0
    """Test images of the final evaluation; 0: all (paper)."""
    test_steps: int = 50
    """PGD steps of the final evaluation, each eps/4 (paper: 50)."""
    test_restarts: int = 10
    """PGD restarts of the final evaluation (paper: 10)."""
    autoattack: str = ""
    """AutoAttack in the final evaluation: standard (paper), or its attacks joined by commas; empty: not run."""
    test_batch: int = 500
    """Images a batch in evaluation."""
    probe: int = 1000
    """Test images attacked after every epoch, always the same."""
    probe_steps: int = 10
    """PGD steps on the probe."""
    distortion: int = 0
    """Probe images on which each layer's sensitivity to weight noise is measured after every epoch; 0: none."""
    keep_every: int = 0
    """Keep the weights of every so many epochs for analyse.py (seed<k>/epochs/); 0: only the last."""
    analyse: bool = False
    """After training, remove weights and draw the layers' loss surfaces, as analyse.py does (a record each)."""
    checkpoint_steps: int = 0
    """Steps between checkpoints inside an epoch; 0: only at its end."""
    workers: int = 8
    """Loader processes of ImageNet-100; the other sets lie on the device."""

    table: str = "own"
    """Table of RESULTS.md the records belong to; own: none of them (plan.yaml names the tables of its runs)."""
    setting: str = ""
    """Label inside the table; default eps=<255 eps>/255."""
    label: str = ""
    """Row of the table; default the method's name (R-LAP, PGD-10)."""
    scale: Literal["smoke", "demo", "paper"] = "demo"
    """Goes into the record; changes nothing else."""
    out: str = ""
    """Run folder; default runs/<scale>/<table>-<dataset>-<method>-<255 eps>."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    download: bool = False
    """Let torchvision fetch CIFAR, SVHN or MNIST into the data folder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dry_run: bool = False
    """Print the data and what would be trained, then stop."""

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        if not 0 <= self.eps <= 1:
            raise UserError(f"--eps must lie in [0, 1], not {self.eps:g}; write 8/255 for eight grey levels")
        at_least = {"batch": 1, "attack_steps": 1, "replays": 1, "samples": 1, "test_steps": 1, "test_restarts": 1}
        at_least |= {"test_batch": 1, "probe": 1, "probe_steps": 1, "lr": -1, "weight_decay": 0, "epochs": 0}
        at_least |= {"train_limit": 0, "eval_limit": 0, "checkpoint_steps": 0, "workers": 0, "carrier": 0, "gamma": 0}
        at_least |= {"distortion": 0, "keep_every": 0}
        at_least |= {k: -1 for k in ("beta", "radius_warmup", "noise", "step", "align")}
        for name, low in at_least.items():
            if getattr(self, name) < low or low == -1 and -1 < getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must be at least {max(low, 0)}, not {getattr(self, name)}")
        for name in ("momentum", "zero_share", "peak"):
            value = getattr(self, name)
            if not (0 <= value < 1 or value == -1 and name != "momentum"):
                raise UserError(f"--{name.replace('_', '-')} must lie in [0, 1), not {value}")
        if self.method == "pgd" and self.start == "n":
            raise UserError("--method pgd stays in the eps-ball and starts at r or v; --start n is for lap and fgsm")
        evaluation.check_attack(self.autoattack)

    def resolve(self) -> None:
        """Put the published values where -1, 0, auto or nothing was given."""
        svhn, radius = self.dataset == "svhn", f"{255 * self.eps:g}"
        beta, published = lap.published_beta(self.start, self.eps)
        self.beta = beta if self.beta == -1 else self.beta
        published = published and (self.beta, self.gamma, self.variant) == (beta, lap.GAMMA, "lap")
        shape = lap.GEOMETRY[self.start]
        wide = svhn and self.start == "n" and radius == "12"
        step = {"lap": shape.step, "fgsm": shape.step, "zerograd": 2.0, "multigrad": 2.0}.get(self.method, 1.0)
        step = (0.5 if self.attack_steps == 2 else 0.25) if self.method == "pgd" else step
        free = self.method == "free"
        small = self.dataset in data.GENERATED or self.dataset == "mnist"
        big = {"tiny-imagenet": "preact18-act", "imagenet100": "resnet18-cosine"}.get(self.dataset, "preact18")
        defaults = {
            "radius_warmup": 5.0 if svhn else 0.0,
            "noise": 3.0 if wide else shape.noise,
            "step": step,
            "zero_share": baselines.ZERO_SHARE.get(self.dataset, 0.35),
            "align": baselines.align_weight(self.dataset, self.eps),
            "lr": 0.04 if free else 0.05 if svhn else 0.2,
            "peak": 0.4 if svhn else 0.5,
        }
        for name, value in defaults.items():
            if getattr(self, name) == -1:
                setattr(self, name, value)
        self.epochs = self.epochs or (12 if free else 15 if svhn else 30)
        self.model = ("preact-small" if small else big) if self.model == "auto" else self.model
        own = self.model == "preact18" and self.dataset == "cifar10" and self.weight_direction in ("auto", "official")
        self.published = published and own
        self.label = self.label or baselines.label(self.method, self.start, self.attack_steps, self.variant)
        self.setting = self.setting or f"eps={radius}/255"
        self.out = self.out or f"runs/{self.scale}/{self.table}-{self.dataset}-{self.label.lower()}-{radius}"

    def recipe(self) -> lap.Recipe:
        """The variant's recipe, with the direction asked for."""
        found = lap.RECIPES[self.variant]
        way = self.weight_direction
        return found if way == "auto" else dataclasses.replace(found, direction=way)

    published = False  # not a field: whether beta is the paper's for this data set, start, radius and network


# A run may be started again with other values of these.
IGNORE = ("out", "data_dir", "device", "download", "dry_run", "workers", "checkpoint_steps")


def read_curve(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, one an epoch."""
    try:
        return [runs.json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete the run folder and train again") from None


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

    bar = tqdm(range(t.epoch, s.epochs), f"{s.label} seed {seed}", s.epochs, initial=t.epoch, disable=not show)
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
        found |= evaluation.auto_attack(t.model, t.test, index, s.eps, s.autoattack, t.seed)
    if s.method == "lap":
        found |= {"beta": s.beta, "gamma": s.gamma, "alpha": s.step, "published_beta": int(s.published)}
    return found | evaluation.summary(t.curve)


def describe(t: Trainer) -> str:
    s, d = t.s, t.data
    parameters = sum(
        p.numel() for p in vit.build(s.model, d.kind.classes, d.channels, d.size, (0.0,), (1.0,)).parameters()
    )
    line = f"{s.label} on {d.kind.title} ({d.variant}; {len(d.train)} + {len(d.test)} images), {s.setting}, {s.model} "
    line += f"({parameters:,} parameters), {s.epochs} epochs, {s.schedule} lr {s.lr:g}, {s.precision}, {t.device}"
    if s.method == "lap":
        origin = "published" if s.published else "not published for this data set, start, radius, network and variant"
        net = vit.build(s.model, d.kind.classes, d.channels, d.size, (0.0,), (1.0,))
        line += f"\nbeta {s.beta:g} ({origin}), gamma {s.gamma:g}, L = {len(lap.layers(net))} layers, {s.recipe()}"
    return line


def main() -> None:
    s = runs.parse(Settings, __doc__)
    s.check()
    s.resolve()
    device = runs.device(s.device)
    torch.set_float32_matmul_precision("high")
    out, lead = Path(s.out), not dist.is_initialized() or dist.get_rank() == 0
    if s.dry_run:
        print(describe(Trainer(s, device)))
        return
    run = runs.Run(out, s, ignore=IGNORE) if lead else None
    if (out / "records.jsonl").is_file():
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
        extra = analyse.all_parts(t, out, seed, s.test_steps, s.test_restarts) if s.analyse else []
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
        run.finish()
        evaluation.show(records)
        print(f"records in {out}")


if __name__ == "__main__":
    runs.command(main)
