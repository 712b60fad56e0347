"""What a run holds while it trains: data, network, optimiser, generators, the network that looks; its checkpoint."""

import contextlib
import copy
from pathlib import Path

import torch
from torch import Tensor

import data
import eval as evaluation
import models
import pixel_reweighting as pr
import runs
from baselines import QUADRANTS
from runs import UserError

# Sums over the steps of an epoch.
SUMS = ("loss", "right", "seen", "steps", "bad", "budget")

# First numbers of the random streams: each is seeded anew at every epoch with its base + 100003 seed + epoch, so that
# all arms of a seed see the same order, the same crops and the same start noise. The weights are drawn from `seed`.
ORDER, CROPS, NOISE, MASKS, SHUFFLE = 0, 2_000_000_011, 4_000_000_007, 6_000_000_011, 8_000_000_011


class Trainer:
    """Data, network and optimiser of one phase (a warm-up or an arm) of one seed. `s`: Settings of train.py."""

    def __init__(self, s, device: torch.device, given: data.Data | None = None):
        self.s, self.device = s, device
        self.data = given or data.load(s.dataset, runs.data_dir(s.data_dir), s.download, s.train_limit)
        if s.mask_rule == "jet-rgb" and self.data.channels != 3:
            raise UserError(f"--mask-rule jet-rgb masks three channels; {s.dataset} has {self.data.channels}")
        self.train = data.Batches(self.data.train, self.data.kind, s.batch, device)
        self.test = data.Batches(self.data.test, self.data.kind, s.test_batch, device)
        n = len(self.data.test)
        self.probe = evaluation.order(n, min(s.probe, n))
        self.bf16 = torch.autocast(device.type, torch.bfloat16) if s.precision == "bf16" else contextlib.nullcontext()

    def fresh(self, seed: int) -> None:
        """New weights, optimiser and generators."""
        s = self.s
        torch.manual_seed(seed)
        model = models.build(s.model, self.data.kind.classes, self.data.channels)
        self.seed, self.model = seed, model.to(self.device, memory_format=torch.channels_last)
        self.compiled = torch.compile(self.model) if s.compile else self.model
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
            return self.compiled(x).float()

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
        """Budget of batch `number` of this epoch: eps, one number of the batch, or one a pixel."""
        s = self.s
        if region == "everywhere":
            return s.eps * self.ramp()
        if region in QUADRANTS:
            return pr.budget(pr.quadrant(region, x.shape[2:], x.device), s.eps, s.eps_low)
        if s.mask_order == "released":
            # The released code collects masks in a pass of its own over shuffled, cropped images and later finds them
            # by the number of the batch: they belong to other images. The pass is of the epoch of the last refresh.
            key = MASKS + 100_003 * self.seed + (self.looked if s.refresh else self.epoch)
            crops = torch.Generator(self.device).manual_seed(1_000_003 * key + number)
            x = self.train.one(key, number, crops)
        m = self.mask(x)
        if region == "shuffled":
            order = torch.Generator().manual_seed(1_000_003 * self.key(SHUFFLE) + number)
            m = m[torch.randperm(len(m), generator=order).to(m.device)]
        elif region == "inverted":
            m = ~m
        e = pr.budget(m, s.eps, s.eps_low)
        return e.mean().expand(1, 1, 1, 1) if region == "mean" else e

    def own_budget(self, x: Tensor) -> Tensor:
        """The box of an attacker who knows the masks: of the trained network's own maps of x, around --test-eps."""
        s = self.s
        found = pr.activation_map(self.model, x, s.cam, s.cam_layer)
        m = pr.mask(found, x.shape[2:], s.mask_rule, s.top_fraction)
        return pr.budget(m, s.test_eps, s.test_eps * s.eps_low / s.eps if s.eps else 0.0)

    # ------------------------------------------------------------------ checkpoint: every tensor the next step reads

    def save(self, path: Path, seconds: float) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for i, p in enumerate(self.model.parameters()):
            state = self.optimizer.state.get(p, {}).get("momentum_buffer")
            tensors |= {} if state is None else {f"momentum.{i}": state}
        if self.viewer is not None:
            tensors |= {f"viewer.{k}": v for k, v in self.viewer.state_dict().items()}
            tensors["looked"] = torch.tensor(self.looked)
        tensors |= {"crops": self.crops.get_state(), "noise": self.noise.get_state(), "sums": self.sums}
        numbers = {"epoch": self.epoch, "batch": self.batch, "seconds": seconds, "seed": self.seed}
        runs.write_tensors(path, tensors, {k: str(v) for k, v in numbers.items()})

    def load(self, path: Path) -> None:
        tensors, meta = runs.read_tensors(path)

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}

        try:
            models.load_state(self.model, part("model."))
            for i, p in enumerate(self.model.parameters()):
                if f"momentum.{i}" in tensors:
                    buffer = torch.empty_like(p).copy_(tensors[f"momentum.{i}"])  # in the memory format of p
                    self.optimizer.state[p]["momentum_buffer"] = buffer
            if "looked" in tensors:
                self.viewer, self.looked = copy.deepcopy(self.model).eval(), int(tensors["looked"])
                models.load_state(self.viewer, part("viewer."))
            self.crops.set_state(tensors["crops"])
            self.noise.set_state(tensors["noise"])
            self.sums.copy_(tensors["sums"])
            self.epoch, self.batch, self.before = int(meta["epoch"]), int(meta["batch"]), float(meta["seconds"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} belongs to another run ({error}); delete it to start the run again") from None

    def load_weights(self, path: Path) -> None:
        try:
            models.load_state(self.model, runs.read_tensors(path)[0])
        except ValueError as error:
            raise UserError(f"{path} holds weights of another network ({error}); train it again") from None
        self.model.eval()


def observe(t: Trainer, y: Tensor, z: Tensor, loss: Tensor, e: float | Tensor) -> None:
    """Add a step to the epoch's sums, on the device."""
    one = torch.ones((), device=y.device)
    mean = e.mean() if isinstance(e, Tensor) else one * e
    parts = [loss, (z.argmax(1) == y).sum(), one * len(y), one, ~torch.isfinite(loss), mean]
    t.sums += torch.stack([p.to(t.sums.dtype) for p in parts])


def broken(t: Trainer) -> None:
    """A loss that is not a number ends the run; the last good checkpoint stays."""
    sums = dict(zip(SUMS, t.sums.tolist(), strict=True))
    if sums["bad"]:
        raise UserError(
            f"the loss of seed {t.seed} was not a finite number in {sums['bad']:.0f} steps before step "
            f"{t.epoch * len(t.train) + t.batch} (epoch {t.epoch + 1}); the checkpoint before it is kept; lower --lr"
        )


def close_epoch(t: Trainer, seconds: float, cpu: float) -> dict:
    """The epoch's curves; the only wait for the device."""
    broken(t)
    sums = dict(zip(SUMS, t.sums.tolist(), strict=True))
    row = {"epoch": t.epoch + 1, "lr": t.optimizer.param_groups[0]["lr"], "loss": sums["loss"] / sums["steps"]}
    row |= {"train_accuracy": 100 * sums["right"] / sums["seen"], "budget": 255 * sums["budget"] / sums["steps"]}
    found = evaluation.attack_all(t.model, t.test, t.probe, t.s.test_eps, t.s.test_step, t.s.probe_steps, 0, ("pgd",))
    row |= {f"probe_{k}": 100 * float(v.float().mean()) for k, v in found.items()}
    return row | {"train_seconds": seconds, "train_cpu_seconds": cpu}
