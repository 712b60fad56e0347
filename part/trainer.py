"""What a run holds while it trains: data, network, optimiser, generators, the network that looks; its checkpoint."""

import contextlib
import copy
from pathlib import Path

from lab import checkpoints, runs
from lab.runs import UserError

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import evaluation
import models
import pixel_reweighting as pr
from baselines import QUADRANTS

# Sums over the steps of an epoch.
SUMS = ("loss", "right", "seen", "steps", "bad", "budget")

# First numbers of the random streams: each is seeded anew at every epoch with its base + 100003 seed + epoch, so that
# all arms of a seed see the same order, the same crops and the same start noise. The weights are drawn from `seed`.
ORDER, CROPS, NOISE, MASKS, SHUFFLE = 0, 2_000_000_011, 4_000_000_007, 6_000_000_011, 8_000_000_011


class Trainer:
    """Data, network and optimiser of one phase (a warm-up or an arm) of one seed. `s`: Settings of train.py."""

    def __init__(self, s, device: torch.device, given: data.Data | None = None):
        self.s, self.device = s, device
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.data = given or data.load(s.dataset, runs.data_dir(s.data_dir), s.download, s.train_limit)
        if s.mask_rule == "jet-rgb" and self.data.channels != 3:
            raise UserError(f"--mask-rule jet-rgb masks three channels; {s.dataset} has {self.data.channels}")
        self.train = data.Batches(self.data.train, self.data.kind, s.batch, device)
        self.test = data.Batches(self.data.test, self.data.kind, s.test_batch, device)
        last = len(self.data.train) % s.batch or s.batch
        if s.sync_bn and device.type != "cuda":
            raise UserError("--sync-bn needs CUDA devices; leave it out, or start one process on each GPU")
        if last < self.world:
            raise UserError(f"the last batch has {last} images for {self.world} processes; choose another --batch")
        n = len(self.data.test)
        self.probe = evaluation.order(n, min(s.probe, n))
        self.bf16 = torch.autocast(device.type, torch.bfloat16) if s.precision == "bf16" else contextlib.nullcontext()

    def fresh(self, seed: int) -> None:
        """New weights, optimiser and generators."""
        s = self.s
        torch.manual_seed(seed)
        model = models.build(s.model, self.data.kind.classes, self.data.channels)
        if s.sync_bn and self.world > 1:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.seed, self.model = seed, model.to(self.device, memory_format=torch.channels_last)
        # Attacks and maps go through `single`; only the pass of the training loss has gradients to exchange. Running
        # statistics serve maps, attacks and evaluation and are shared after each step.
        self.single = torch.compile(self.model) if s.compile else self.model
        wrap = {"broadcast_buffers": False}
        self.network = DistributedDataParallel(self.single, **wrap) if self.world > 1 else self.single
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), s.lr, s.momentum, weight_decay=s.weight_decay, fused=True
        )
        self.viewer = None  # the network whose maps are used; None: none yet, or the one in training (--refresh 0)
        self.crops, self.noise = (torch.Generator(self.device) for _ in range(2))
        self.epoch, self.batch, self.before, self.curve = 0, 0, 0.0, []
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)

    def key(self, stream: int) -> int:
        return stream + 100_003 * self.seed + self.epoch

    def begin_epoch(self, looks: bool) -> None:
        """Learning rate, and at the first batch of an epoch also the generators and the network that looks."""
        s = self.s
        # The released code counts from the end of the warm-up, during which nothing drops.
        count = self.epoch + 1 - (s.warmup if s.lr_counter == "released" else 0)
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * 0.1 ** sum(count >= d for d in s.lr_drops)
        if self.batch:  # resumed inside the epoch: the rest came out of the checkpoint
            return
        self.crops.manual_seed(self.key(CROPS))
        self.noise.manual_seed(self.key(NOISE))
        since = self.epoch + 1 - s.warmup  # 1 in the first epoch after the warm-up
        if looks and s.refresh and (self.viewer is None or since % s.refresh == 0):
            self.viewer = copy.deepcopy(self.model).eval()
            self.looked = since

    def forward(self, x: Tensor) -> Tensor:
        with self.bf16:
            return self.single(x).float()

    def learn(self, x: Tensor) -> Tensor:
        """The same in the pass whose gradients the processes exchange."""
        with self.bf16:
            return self.network(x).float()

    # ------------------------------------------------------------------------------------------------------- processes

    def rows(self, total: int) -> slice:
        """This process's part of a batch of `total` images. Every process crops the whole batch and draws all of its
        noise, so the images of a step do not depend on the number of processes."""
        return data.share(total, self.rank, self.world)

    def weight(self, total: int) -> float:
        """Factor of a mean over this process's rows: averaged over processes it is the mean of the batch."""
        rows = self.rows(total)
        return (rows.stop - rows.start) * self.world / total

    def reduce(self, v: Tensor) -> Tensor:
        """Sum over processes."""
        if self.world > 1:
            v = v.clone()
            dist.all_reduce(v)
        return v

    def average(self, tensors: list[Tensor]) -> list[Tensor]:
        return [self.reduce(v) / self.world for v in tensors] if self.world > 1 else list(tensors)

    def wait(self) -> None:
        """Until all processes are here: what the first one writes, the others read."""
        if self.world > 1:
            dist.barrier()

    def share_statistics(self) -> None:
        """Every process takes the running statistics of the first, in one message."""
        buffers = [b for b in self.model.buffers() if b.is_floating_point()] if self.world > 1 else []
        if buffers:
            message = torch.cat([b.flatten() for b in buffers])
            dist.broadcast(message, 0)
            for b, new in zip(buffers, message.split([b.numel() for b in buffers]), strict=True):
                b.copy_(new.view_as(b))

    # --------------------------------------------------------------------------------------------------------- the box

    def ramp(self) -> float:
        """Factor of eps and step in this epoch; 1 from epoch --eps-ramp on."""
        return min((self.epoch + 1) / self.s.eps_ramp, 1.0) if self.s.eps_ramp else 1.0

    def mask(self, x: Tensor) -> Tensor:
        """Masks of images x [B, C, H, W] by the maps of the network that looks."""
        s = self.s
        with self.bf16:
            found = pr.activation_map(self.viewer or self.model, x, s.cam, s.cam_layer)
        return pr.mask(found, x.shape[2:], s.mask_rule, s.top_fraction)

    def box(self, region: str, x: Tensor, number: int) -> float | Tensor:
        """Budget of this process's rows of batch `number` of this epoch, x [B, C, H, W] the whole of it: eps, one
        number of the batch, or one a pixel."""
        s, rows, total = self.s, self.rows(len(x)), len(x)
        if region == "everywhere":
            return s.eps * self.ramp()
        if region == "low":
            return s.eps_low * self.ramp()
        if region in QUADRANTS:
            return pr.budget(pr.quadrant(region, x.shape[2:], x.device), s.eps, s.eps_low)
        if s.mask_order == "released":
            # The released code collects masks in a pass of its own over shuffled, cropped images and later finds them
            # by the number of the batch: they belong to other images. The pass is of the epoch of the last refresh.
            key = MASKS + 100_003 * self.seed + (self.looked if s.refresh else self.epoch)
            crops = torch.Generator(self.device).manual_seed(of_batch(key, number))
            x = self.train.one(key, number, crops)
        if region == "shuffled":
            order = torch.Generator().manual_seed(of_batch(self.key(SHUFFLE), number))
            m = self.mask(x)[runs.sent(torch.randperm(total, generator=order), x.device)[rows]]
        else:
            m = self.mask(x[rows])
        e = pr.budget(~m if region == "inverted" else m, s.eps, s.eps_low)
        if region == "mean":
            return (self.reduce(e.mean() * self.weight(total)) / self.world).expand(1, 1, 1, 1)
        return e

    def own_budget(self, x: Tensor) -> Tensor:
        """The box of an attacker who knows the masks: of the trained network's own maps of x, around --test-eps."""
        s = self.s
        found = pr.activation_map(self.model, x, s.cam, s.cam_layer)
        m = pr.mask(found, x.shape[2:], s.mask_rule, s.top_fraction)
        return pr.budget(m, s.test_eps, s.test_eps * s.eps_low / s.eps if s.eps else 0.0)

    # ------------------------------------------------------------------ checkpoint: every tensor the next step reads

    def save(self, path: Path, seconds: float) -> None:
        sums = self.reduce(self.sums)
        if self.rank == 0:
            self.write(path, seconds, sums)
        self.wait()

    def write(self, path: Path, seconds: float, sums: Tensor) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in checkpoints.pack_optimizer(self.optimizer).items()}
        if self.viewer is not None:
            tensors |= {f"viewer.{k}": v for k, v in self.viewer.state_dict().items()}
            tensors["looked"] = torch.tensor(self.looked)
        tensors |= {"crops": self.crops.get_state(), "noise": self.noise.get_state(), "sums": sums}
        numbers = {"epoch": self.epoch, "batch": self.batch, "seconds": seconds, "seed": self.seed}
        runs.write_tensors(path, tensors, {k: str(v) for k, v in numbers.items()})

    def load(self, path: Path) -> None:
        tensors, meta = runs.read_tensors(path)

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}

        batch = checkpoints.position(meta, "batch", len(self.train), path)
        epoch, before = checkpoints.position(meta, "epoch", self.s.epochs, path), checkpoints.seconds(meta, path)
        checkpoints.restore_module(self.model, part("model."), path)
        checkpoints.restore_optimizer(self.optimizer, part("optimizer."), path, began=epoch + batch > 0)
        try:
            if "looked" in tensors:
                self.viewer, self.looked = copy.deepcopy(self.model).eval(), int(tensors["looked"])
                models.load_state(self.viewer, part("viewer."))
            self.crops.set_state(tensors["crops"])
            self.noise.set_state(tensors["noise"])
            self.sums.copy_(tensors["sums"] / self.world)  # they are of all processes
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise checkpoints.misfit(path, str(error)) from None
        self.epoch, self.batch, self.before = epoch, batch, before

    def load_weights(self, path: Path) -> None:
        checkpoints.restore_module(self.model, runs.read_weights(path)[0], path)
        self.model.eval()


def of_batch(key: int, number: int) -> int:
    """Seed of one batch of an epoch whose key is `key`."""
    return (1_000_003 * key + number) % (2**63 - 1)


def observe(t: Trainer, y: Tensor, z: Tensor, loss: Tensor, e: float | Tensor, total: int) -> None:
    """Add a step to the epoch's sums, on the device; loss is weighted by t.weight already, `total` images are in the
    whole batch."""
    one = torch.ones((), device=y.device)
    mean = (e.mean() if isinstance(e, Tensor) else one * e) * t.weight(total)
    parts = [loss, (z.argmax(1) == y).sum(), one * len(y), one, ~torch.isfinite(loss), mean]
    t.sums += torch.stack([p.to(t.sums.dtype) for p in parts])


def broken(t: Trainer) -> None:
    """A loss that is not a number ends the run; the last good checkpoint stays."""
    sums = dict(zip(SUMS, t.reduce(t.sums).tolist(), strict=True))
    if sums["bad"]:
        raise UserError(
            f"the loss of seed {t.seed} was not a finite number in {-(-sums['bad'] // t.world):.0f} steps before step "
            f"{t.epoch * len(t.train) + t.batch} (epoch {t.epoch + 1}); the checkpoint before it is kept; lower --lr"
        )


def close_epoch(t: Trainer, seconds: float, cpu: float) -> dict:
    """The epoch's curves; the only wait for the device."""
    broken(t)
    sums = dict(zip(SUMS, t.reduce(t.sums).tolist(), strict=True))
    row = {"epoch": t.epoch + 1, "lr": t.optimizer.param_groups[0]["lr"], "loss": sums["loss"] / sums["steps"]}
    row |= {"train_accuracy": 100 * sums["right"] / sums["seen"], "budget": 255 * sums["budget"] / sums["steps"]}
    s = t.s
    found = evaluation.attack_all(
        t.model, t.test, t.probe, s.test_eps, s.test_step, s.probe_steps, 0, ("pgd",), world=t
    )
    row |= {f"probe_{k}": 100 * float(v.float().mean()) for k, v in found.items()}
    return row | {"train_seconds": seconds, "train_cpu_seconds": cpu}
