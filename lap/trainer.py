"""What a run holds while it trains: data, network, optimiser, schedule, generator, sums of an epoch; its checkpoint.
A finished run is taken up again by `open_run`."""

import contextlib
import dataclasses
import json
import warnings
from pathlib import Path

from lab import checkpoints, runs
from lab.runs import UserError

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CyclicLR, LambdaLR

import data
import evaluation
import lap
import layerwise
import vit
from settings import NOT_PART_OF_A_RUN, Settings

# Sums over the steps of an epoch.
SUMS = ("loss", "first_loss", "right", "seen", "steps", "bad")


class Trainer:
    """Data, network and optimiser of one seed, and everything a checkpoint needs."""

    def __init__(self, s: Settings, device: torch.device, given: data.Data | None = None):
        self.s, self.device = s, device
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        folder = runs.data_dir(s.data_dir)
        self.data = given or data.load(s.dataset, folder, s.download, s.train_limit, b=s.carrier)
        self.train = data.Batches(self.data, self.data.train, s.batch, device, s.workers)
        self.test = data.Batches(self.data, self.data.test, s.test_batch, device, s.workers)
        last = len(self.data.train) % s.batch or s.batch
        if last < self.world:
            raise UserError(f"the last batch has {last} images for {self.world} processes; choose another --batch")
        self.probe = evaluation.order(len(self.data.test), min(s.probe, len(self.data.test)))
        self.replays = s.replays if s.method == "free" else 1
        self.bf16 = torch.autocast(device.type, torch.bfloat16) if s.precision == "bf16" else contextlib.nullcontext()

    def fresh(self, seed: int) -> None:
        """New weights, optimiser, schedule and generator."""
        s, kind = self.s, self.data.kind
        torch.manual_seed(seed)
        model = vit.build(s.model, kind.classes, self.data.channels, self.data.size, kind.mean, kind.std)
        if s.jitter:
            g = torch.Generator().manual_seed(4_000_000_007 + s.jitter)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=g))
        if s.sync_bn and self.world > 1:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.seed, self.model = seed, model.to(self.device, memory_format=torch.channels_last)
        self.single = torch.compile(self.model) if s.compile else self.model
        # Attack passes go through the network itself; only the training pass has to exchange gradients. Running
        # statistics serve evaluation alone and are shared before it; to write them here would break GradAlign's graph.
        wrap = {"broadcast_buffers": False}
        self.network = DistributedDataParallel(self.single, **wrap) if self.world > 1 else self.single
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), s.lr, s.momentum, weight_decay=s.weight_decay, fused=True
        )
        total = s.epochs * len(self.train) * self.replays
        if s.schedule == "cyclic":  # moves the momentum too: 0.9 -> 0.8 -> 0.9
            up = max(total * s.peak, 1e-9)
            low, down = s.momentum - 0.1, max(total - up, 1e-9)
            self.scheduler = CyclicLR(
                *(self.optimizer, 0.0, s.lr, up, down), base_momentum=max(low, 0.0), max_momentum=s.momentum
            )
        else:
            drop = (total // 2, total * 3 // 4)
            self.scheduler = LambdaLR(self.optimizer, lambda k: 0.1 ** sum(k >= d for d in drop))
        self.layers = lap.layers(self.model)
        self.weights, self.recipe = list(self.layers.values()), s.recipe()
        levels = lap.levels_of(self.recipe.levels, len(self.weights), s.gamma)
        dtype = self.weights[0].dtype
        self.sizes = s.beta * torch.tensor(levels, dtype=dtype, device=self.device)
        # Another stream than that of the weights: with the same seed the first noise would be the stem's weights again.
        self.generator = torch.Generator(self.device).manual_seed(3_000_000_019 + seed)
        size = self.data.size, self.data.size
        rows = -(-s.batch // self.world) if s.method == "free" else 0
        self.memory = torch.zeros(rows, self.data.channels, *size, device=self.device)
        self.epoch, self.batch, self.before, self.curve = 0, 0, 0.0, []
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)

    def forward(self, x: Tensor) -> Tensor:
        with self.bf16:
            return self.single(x).float()

    def noise(self, total: int):
        """A drawer of U(-size, size) for this process's rows of a batch of `total`; the draw is that of all rows."""

        def draw(x: Tensor, size: float) -> Tensor:
            rows = data.share(range(total), self.rank, self.world)
            every = torch.empty(total, *x.shape[1:], device=x.device).contiguous(memory_format=torch.channels_last)
            return every.uniform_(-1, 1, generator=self.generator)[rows].mul_(size)

        return draw

    def full_backward(self, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(gradient of x, summed loss); fills every weight's .grad, averaged over processes, with that of the summed
        loss. The sum, because then the gradient of x is the one `attacks.input_gradient` takes, bit for bit."""
        x = x.detach().requires_grad_(True)
        with self.bf16:
            z = self.network(x)
        loss = torch.nn.functional.cross_entropy(z.float(), y, reduction="sum")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return x.grad, loss.detach() * scale

    def reduce(self, v: Tensor) -> Tensor:
        """Sum over processes."""
        if self.world > 1:
            v = v.clone()
            dist.all_reduce(v)
        return v

    def keep(self, out: Path) -> None:
        """Keep the weights of the epoch that just ended, for analyse.py."""
        if self.rank == 0:
            path = out / f"seed{self.seed}" / "epochs" / f"{self.epoch + 1:04d}.safetensors"
            runs.write_tensors(path, self.model.state_dict())

    def share_statistics(self) -> None:
        """Every process takes the running statistics of the first."""
        if self.world > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    # ------------------------------------------------------------------ checkpoint: every tensor the next step reads

    def save(self, path: Path, seconds: float) -> None:
        memory = self.memory
        if self.world > 1 and len(memory):
            gathered = [torch.empty_like(memory) for _ in range(self.world)]
            dist.all_gather(gathered, memory)
            memory = torch.cat(gathered)
        if self.rank > 0:
            return
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in checkpoints.pack_optimizer(self.optimizer).items()}
        tensors |= {"rng": self.generator.get_state(), "memory": memory, "sums": self.sums}
        numbers = {"epoch": self.epoch, "batch": self.batch, "seconds": seconds, "run": self.fingerprint()}
        runs.write_tensors(path, tensors, {k: str(v) for k, v in numbers.items()})

    def fingerprint(self) -> str:
        """Of the settings that matter, the seed and the data: a checkpoint of anything else is refused."""
        own = {k: v for k, v in dataclasses.asdict(self.s).items() if k not in NOT_PART_OF_A_RUN and k != "seeds"}
        return checkpoints.fingerprint({**own, "seed": self.seed}, [self.data.sha256])

    def load(self, path: Path) -> None:
        tensors, meta = runs.read_tensors(path)
        if meta.get("run") != self.fingerprint():
            raise UserError(f"{path} belongs to another run (settings, seed or data); delete it to start again")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for key, value in tensors.items():
            group, _, name = key.partition(".")
            parts.setdefault(group, {})[name] = value
        epoch = checkpoints.position(meta, "epoch", self.s.epochs, path)
        batch = checkpoints.position(meta, "batch", len(self.train), path)
        before, began = checkpoints.seconds(meta, path), epoch + batch > 0
        try:
            rng, memory, sums = (parts[k][""] for k in ("rng", "memory", "sums"))
            checkpoints.check_tensor("memory", memory[: len(self.memory)], self.memory, path)
            checkpoints.check_tensor("sums", sums, self.sums, path)
            self.generator.set_state(rng)
        except (KeyError, RuntimeError, TypeError) as error:
            raise checkpoints.misfit(path, str(error)) from None
        checkpoints.restore_module(self.model, parts["model"], path)
        checkpoints.restore_optimizer(self.optimizer, parts["optimizer"], path, began)
        rows = len(self.memory)
        self.memory.copy_(memory[self.rank * rows : (self.rank + 1) * rows])
        self.sums.copy_(sums)
        self.epoch, self.batch, self.before = epoch, batch, before
        done = (self.epoch * len(self.train) + self.batch) * self.replays
        if done:  # both schedules are functions of the number of steps
            self.scheduler.last_epoch = done - 1
            with warnings_off():
                self.scheduler.step()

    def load_weights(self, path: Path) -> None:
        checkpoints.restore_module(self.model, runs.read_weights(path)[0], path)
        self.model.eval()


@contextlib.contextmanager
def warnings_off():
    """PyTorch warns when a schedule is set before the optimiser has made a step, which is what a resume does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def observe(t: Trainer, y: Tensor, z1: Tensor, loss: Tensor, first: Tensor) -> None:
    """Add a step to the epoch's sums, on the device."""
    right = (z1.argmax(1) == y).sum()
    steps = torch.ones((), device=y.device)
    parts = [loss, first, right, steps * len(y), steps, ~torch.isfinite(loss)]
    t.sums += torch.stack([p.to(t.sums.dtype) for p in parts])


def close_epoch(t: Trainer, seconds: float, cpu: float) -> dict:
    """The epoch's curves; the only wait for the device. A loss that is not a number ends the run."""
    sums = dict(zip(SUMS, t.reduce(t.sums).tolist(), strict=True))
    if sums["bad"]:
        raise UserError(
            f"the loss of seed {t.seed} was not a finite number in {sums['bad']:.0f} steps before step "
            f"{(t.epoch * len(t.train) + t.batch) * t.replays} (epoch {t.epoch + 1}); the checkpoint before it is "
            "kept, if there is one; lower --lr" + (" or --beta" if t.s.method == "lap" else "")
        )
    s, world = t.s, (t.rank, t.world, t.reduce)
    row = {"step": t.epoch + 1, "epoch": t.epoch + 1, "lr": t.optimizer.param_groups[0]["lr"]}
    row |= {"loss": sums["loss"] / sums["steps"], "train_accuracy": 100 * sums["right"] / sums["seen"]}
    if s.method == "lap":
        row["first_loss"] = sums["first_loss"] / sums["steps"]
    if not torch.stack(torch._foreach_norm(t.weights)).isfinite().all():
        raise UserError(f"a weight of seed {t.seed} was not a finite number after epoch {t.epoch + 1}; lower --beta")
    t.share_statistics()
    found = evaluation.attack_all(t.model, t.test, t.probe, s.eps, s.probe_steps, 1, 0, *world)
    row |= {f"probe_{k}": v for k, v in found.items()}
    row |= layerwise.statistics(t.layers)
    if s.distortion:
        x, y = next(t.test.in_order(t.probe[: s.distortion]))
        row["distortion"] = layerwise.distortion(t.model, t.layers, x, y, s.eps)
    return row | {"train_seconds": seconds, "train_cpu_seconds": cpu}


def read_curve(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, one an epoch."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete the run folder and train again") from None


def open_run(run: str, data_dir: str, device: str, **changed) -> tuple[Trainer, Path, list[int]]:
    """(trainer, run folder, seeds asked for) of a run folder or of one seed's folder in it. `changed`: settings."""
    folder, only = Path(run), None
    if not (folder / "settings.json").is_file() and (folder.parent / "settings.json").is_file():
        folder, only = folder.parent, folder.name
    given = {"data_dir": data_dir, "device": device, "download": False, **changed}
    s = runs.settings_from(folder / "settings.json", Settings, **given)
    s.check()
    s.resolve()
    torch.set_float32_matmul_precision("high")  # as in training
    t = Trainer(s, runs.device(s.device, s.precision == "bf16"))
    seeds = [k for k in s.seeds if only in (None, f"seed{k}")]
    if not seeds:
        raise UserError(f"{folder} has no {only}; its seeds are {', '.join(map(str, s.seeds))}")
    return t, folder, seeds
